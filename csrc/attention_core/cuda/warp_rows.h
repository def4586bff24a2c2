#pragma once

#include "attention_core/cuda/plan.h"

// The rows of attention_core's own pass, u or dm, on their way from memory. The fusion, whose rows
// have gains and whose kernels have no registers left, has those of row_loads.h.

namespace crossvit::attention_core {

// Rows [0, count) of floats, 16 bytes aligned, on their way to a pass. To be loaded before the
// copies of tokens start, which would hold them up, and used afterwards: up to kInFlight numbers of
// each lane, the others later, as many at a time. A warp has every block_warps()-th row and sums
// it: no barrier is needed for a row's sum, and there are fewer instructions before the first copy
// than RowLoads has. For all threads.
template <class P, int kInFlight>
class WarpRowLoads {
 public:
  using T = typename P::Element;

  __device__ WarpRowLoads(const float* from, int64_t stride, int count, int channels)
      : from_(from), stride_(stride), count_(count), channels_(channels) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) values_[i].load(*this, row(i), 0);
  }

  // This warp's i-th row.
  __device__ static int row(int i) { return warp_index() + i * block_warps(); }

  // Writes tensor-core operands, with zeros in unused rows. Calls visit(i, sums) for each of the
  // warp's rows: the sum of what was written in this lane's channels, then of its products with
  // each of the others' rows.
  template <class Visit, class... Others>
  __device__ void write(T* to, Visit visit, const Others&... others) const {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if (row(i) >= P::kRows) break;
      float sums[1 + sizeof...(Others)] = {};
      write_columns(to, row(i), 0, sums, values_[i], others.values_[i]...);
      write_rest(to, row(i), 128 * kQuads, sums, others...);
      visit(i, sums);
    }
#pragma unroll 1
    for (int i = kRows; row(i) < P::kRows; ++i) {
      float sums[1 + sizeof...(Others)] = {};
      write_rest(to, row(i), 0, sums, others...);
      visit(i, sums);
    }
  }

 private:
  template <class, int>
  friend class WarpRowLoads;
  // Of four channels each: a lane's are 128 apart.
  static constexpr int kQuads = minimum(ceil_div(P::kMaxChannels, 128), kInFlight / 4);
  static constexpr int kRows = minimum(maximum(kInFlight / (4 * kQuads), 1), 2);

  // A lane's numbers of a row, in columns from `first` on.
  struct Values {
    float4 loaded[kQuads];

    __device__ __forceinline__ void load(const WarpRowLoads& rows, int row, int first) {
      first += 4 * lane_index();
      const float* from = rows.from_ + row * rows.stride_ + first;
      const int width = row < rows.count_ ? rows.channels_ - first : 0;
#pragma unroll
      for (int k = 0; k < kQuads; ++k) {
        loaded[k] = {0, 0, 0, 0};
        if (128 * k < width) loaded[k] = *reinterpret_cast<const float4*>(from + 128 * k);
      }
    }
  };

  template <int kSums, class... Factors>
  __device__ __forceinline__ void write_columns(T* to, int row, int first, float (&sums)[kSums],
                                                const Values& values,
                                                const Factors&... factors) const {
    first += 4 * lane_index();
    T* to_row = to + row * P::row_pitch(channels_) + first;
#pragma unroll
    for (int k = 0; k < kQuads; ++k) {
      const float4 quad = values.loaded[k];
      const Pair<T> pairs[2] = {pack<T>(quad.x, quad.y), pack<T>(quad.z, quad.w)};
      if (first + 128 * k < channels_) store_quad<T>(to_row + 128 * k, pairs);
      const float2 low = unpack<T>(pairs[0]), high = unpack<T>(pairs[1]);  // 0 beyond the row
      sums[0] += low.x + low.y + (high.x + high.y);
      int j = 1;
      ((sums[j++] += low.x * factors.loaded[k].x + low.y * factors.loaded[k].y +
                     (high.x * factors.loaded[k].z + high.y * factors.loaded[k].w)),
       ...);
    }
  }

  template <int kSums, class... Others>
  __device__ void write_rest(T* to, int row, int first, float (&sums)[kSums],
                             const Others&... others) const {
#pragma unroll 1
    for (; first < channels_; first += 128 * kQuads) {
      Values values;
      values.load(*this, row, first);
      write_columns(to, row, first, sums, values, others.values_at(row, first)...);
    }
  }

  __device__ __forceinline__ Values values_at(int row, int first) const {
    Values values;
    values.load(*this, row, first);
    return values;
  }

  const float* from_;
  int64_t stride_;
  int count_, channels_;
  Values values_[kRows];
};

}  // namespace crossvit::attention_core
