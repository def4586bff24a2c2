#pragma once

#include "attention_core/cuda/plan.h"

// The rows of attention_core's own pass, u or dm, on their way from memory. The fusion, whose rows
// have gains and whose kernels have no registers left, has those of row_loads.h.

namespace crossvit::attention_core {

// Rows [0, count) of floats on their way to the rows of a pass. To be loaded before the copies of
// tokens start, which would hold them up, and used afterwards: up to kInFlight numbers of each
// lane, the others later, as many at a time. A warp has every block_warps()-th row and sums it: no
// barrier is needed for a row's sum, and there are fewer instructions before the first copy than
// RowLoads has. For all threads.
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
      write_rest(to, row(i), 32 * kColumns, sums, others...);
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
  static constexpr int kColumns = minimum(P::kMaxChannels / 32, kInFlight);
  static constexpr int kRows = minimum(maximum(kInFlight / kColumns, 1), 2);

  // A lane's numbers of a row, in columns from `first` on.
  struct Values {
    float loaded[kColumns];

    __device__ __forceinline__ void load(const WarpRowLoads& rows, int row, int first) {
      first += lane_index();
      const float* from = rows.from_ + row * rows.stride_ + first;
      const int width = row < rows.count_ ? rows.channels_ - first : 0;
#pragma unroll
      for (int k = 0; k < kColumns; ++k) loaded[k] = 32 * k < width ? from[32 * k] : 0.0f;
    }
  };

  template <int kSums, class... Factors>
  __device__ __forceinline__ void write_columns(T* to, int row, int first, float (&sums)[kSums],
                                                const Values& values,
                                                const Factors&... factors) const {
    first += lane_index();
    T* to_row = to + row * P::row_pitch(channels_) + first;
#pragma unroll
    for (int k = 0; k < kColumns; ++k) {
      const float element = rounded<T>(values.loaded[k]);  // without a branch: 0 beyond the row
      if (first + 32 * k < channels_) to_row[32 * k] = from_float<T>(element);
      sums[0] += element;
      int j = 1;
      ((sums[j++] += element * factors.loaded[k]), ...);
    }
  }

  template <int kSums, class... Others>
  __device__ void write_rest(T* to, int row, int first, float (&sums)[kSums],
                             const Others&... others) const {
#pragma unroll 1
    for (; first < channels_; first += 32 * kColumns) {
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
