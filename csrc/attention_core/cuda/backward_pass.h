#pragma once

#include "attention_core/cuda/partials.h"
#include "attention_core/cuda/row_loads.h"

// The backward pass: reads the tokens once, writes their gradient once, and sums du. Probabilities
// are recomputed from lse (docs/derivation.md).

namespace crossvit::attention_core {

// Shared memory of the backward pass. A block has lse, delta, and the sums of dm and of u per row;
// a warp has p and ds of a tile, [kTokens, p of all rows | ds of all rows], and moments, [kTokens,
// kRows].
template <class P, bool kAlone>
struct BackwardMemory {
  using T = typename P::Element;
  static constexpr int kFloat = sizeof(float), kElement = sizeof(T);
  static constexpr int kWeightPitch = 2 * P::kRows + 16 / kElement;
  static constexpr int kBlockBytes = 4 * P::kRows * kFloat;
  static constexpr int kWarpBytes = P::kTokens * (kWeightPitch * kElement + P::kRows * kFloat);
  using Base = TokenPass<P, kAlone, 2, 0, kBlockBytes, kWarpBytes>;
};

template <class P, bool kAlone = false>
class BackwardPass : public BackwardMemory<P, kAlone>::Base {
  using Memory = BackwardMemory<P, kAlone>;
  using Base = typename Memory::Base;
  using Base::channels_, Base::ring_, Base::rows_, Base::scores_, Base::slice_, Base::sums_;
  using Base::group_sums, Base::weight_unit_, Base::inverse_unit_;
  static constexpr int kRows = P::kRows, kWeightPitch = Memory::kWeightPitch;

 public:
  using typename Base::T;

  __device__ BackwardPass(char* memory, int channels, float eps, bool normalize,
                          int second_stages = 0)
      : Base(memory, Base::layout_of(channels, second_stages), channels, eps, normalize,
             second_stages),
        normalize_(normalize),
        inverse_width_(normalize ? 1.0f / channels : 0.0f) {
    const auto layout = Base::layout_of(channels, second_stages);
    char* warp_data = memory + layout.warp_data + warp_index() * Memory::kWarpBytes;
    row_floats_ = reinterpret_cast<float*>(memory + layout.block_data);
    weights_ = reinterpret_cast<T*>(warp_data);
  }

  // To be called before run(), by all threads: writes lse, inf in unused rows, and the term that
  // softmax's backward subtracts, dm . m with dm rounded, minus the gradient of lse. Thread i gives
  // those of row i.
  template <class Dm, class M>
  __device__ void write_row_floats(float lse_of_row, float dlse_of_row, const Dm& dm, const M& m) {
    float products[kRows] = {};
    dm.add_products(m, products);
    float* of_warp = moments();
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      const float sum = sum_of_warp(products[row]);
      if (lane_index() == 0) of_warp[row] = sum;
    }
    __syncthreads();
    const int row = thread_index();
    if (row >= kRows) return;
    float sum = 0;
    for (int warp = 0; warp < block_warps(); ++warp) {
      sum += of_warp[warp * Memory::kWarpBytes / Memory::kFloat + row];
    }
    lse()[row] = lse_of_row;
    delta()[row] = sum - dlse_of_row;
  }

  // To be called before run(), by all threads: writes the rows and lse, inf in unused rows, and the
  // term that softmax's backward subtracts, dm . m with dm rounded, minus the gradient of lse. Lane
  // i gives those of the warp's i-th row, as WarpRowLoads has them.
  template <class Dm, class U, class M>
  __device__ void write_rows(float lse_of_row, float dlse_of_row, const Dm& dm, const U& u,
                             const M& m) {
    const int own_row = Dm::row(lane_index());
    if (own_row < kRows) lse()[own_row] = lse_of_row;
    const auto write_delta = [&](int i, const auto& sums) {
      if (lane_index() == i) delta()[own_row] = sums[1] - dlse_of_row;
      if (!P::kWarpsShareTiles && lane_index() == 0) row_sums()[Dm::row(i)] = sums[0];
    };
    Base::write_rows(0, dm, write_delta, m);
    Base::write_rows(1, u, [&](int i, const auto& sums) {
      if (!P::kWarpsShareTiles && lane_index() == 0) row_sums()[kRows + U::row(i)] = sums[0];
    });
  }

  // Called by all threads, after write_row_floats(), whose barrier the rows need. dx is null if not
  // wanted; write_extra(channel, value) gets the gradient of the extra token; with add, dx already
  // holds the contribution of other rows. Blocks that share the image store partials of du in
  // `tiles`. after_tiles: see forward_pass.h.
  template <class WriteExtra, class AfterTiles = Nothing>
  __device__ void run(const Image<T>& x, T* dx, int64_t dx_stride, const Range& range,
                      const TilePartials<P>& tiles, bool add, WriteExtra write_extra,
                      AfterTiles after_tiles = {}) {
    if constexpr (!kAlone || P::kWarpsShareTiles) {
      if constexpr (kAlone) __syncthreads();
      scores_.sum_rows();
      sums_.clear();
      __syncthreads();
      if (thread_index() < 2 * kRows) row_sums()[thread_index()] = scores_.row_sum(thread_index());
    } else {
      sums_.clear();
    }
    __syncthreads();
    const auto token_of = [&](int iteration) {
      return P::template token_of<kAlone>(channels_, range, iteration);
    };
    for (int iteration = 0, token; (token = token_of(iteration)) < range.last; ++iteration) {
      ring_.wait();
      const bool extra = token == 0 && x.has_extra;
      if (extra) ring_.write_extra(iteration, x.extra);
      add_tile(iteration, x.attended_bits(token, range.last), dx || extra);
      __syncwarp();
      if (extra) copy_extra(iteration, write_extra);
      if (dx) store(iteration, x, dx, dx_stride, token, range.last, add);
      __syncwarp();
      ring_.copy_next(x, range, iteration);
      if (tiles) {
        tiles.store(P::tile_of(channels_, range, iteration), sums_, slice_);
        sums_.clear();
      }
    }
    ring_.drain();
    after_tiles();
    if constexpr (!Base::kPartialsInRings) __syncthreads();
    if (!tiles) store_partials(range);
    __syncthreads();
  }

  // See forward_pass.h.
  __device__ void gather(const TilePartials<P>& tiles, int count, const Range& range) {
    const auto store = [&](int warp_group, int row, int channel, const Gathered& gathered) {
      float2* to = reinterpret_cast<float2*>(group_sums(range, warp_group) +
                                             row * Base::sums_pitch(channels_) + channel);
      *to = make_float2(gathered.sums.x - gathered.mean, gathered.sums.y - gathered.mean);
    };
    this->template for_each_gathered<Gathered>(tiles, count, range, store);
    __syncthreads();
  }

  // After run() or gather(), for rows [0, count) and this block's share of the channels: calls
  // write(row, channel, du) with du of a channel and the next.
  template <class Write>
  __device__ void results(int count, const Range& range, Write write) const {
    const int warp_groups = P::warp_groups(channels_);
    const int first = this->first_in_share(range), last = this->last_in_share(range);
#pragma unroll 1
    for (int row = warp_index(); row < count; row += block_warps()) {
#pragma unroll 2
      for (int channel = first + 2 * lane_index(); channel < last; channel += 64) {
        float2 sum = {0, 0};
#pragma unroll 4
        for (int i = 0; i < warp_groups; ++i) {
          const float* from = group_sums(range, i) + row * Base::sums_pitch(channels_) + channel;
          const float2 sums = *reinterpret_cast<const float2*>(from);
          sum.x += sums.x, sum.y += sums.y;
        }
        write(row, channel, make_float2(sum.x * inverse_unit_, sum.y * inverse_unit_));
      }
    }
  }

 private:
  struct Gathered {
    float2 sums = {0, 0};
    float mean = 0;

    __device__ void load(const TilePartials<P>& tiles, int tile, int row, int channel) {
      sums = tiles.sums(tile, row, channel);
      mean = tiles.mean(tile, row, channel);
    }
    __device__ void add(const Gathered& other) {
      sums.x += other.sums.x;
      sums.y += other.sums.y;
      mean += other.mean;
    }
  };

  __device__ float* lse() const { return row_floats_; }                   // [kRows]
  __device__ float* delta() const { return row_floats_ + kRows; }         // [kRows]
  __device__ float* row_sums() const { return row_floats_ + 2 * kRows; }  // dm's, then u's
  __device__ float* moments() const {
    return reinterpret_cast<float*>(weights_ + P::kTokens * kWeightPitch);
  }

  // Overwrites the rows and the rings, to which no copy is in flight.
  __device__ void store_partials(const Range& range) {
    int group = P::warp_group(channels_);
    // The compiler would compute all addresses ahead of the first image.
    if constexpr (!kAlone) group = used_from_here(group);
    float* to = Base::kPartialsInRings ? reinterpret_cast<float*>(ring_.memory())
                                       : group_sums(range, group ^ range.swap);
    sums_.subtract_means();
    sums_.store(to, Base::sums_pitch(channels_), slice_);
  }

  __device__ void add_tile(int iteration, uint32_t attended, bool wants_dx) {
    float scores[2][P::kRowGroups][4];  // dp, s
    TokenStatistics stats;
    T* tile = ring_.tile(iteration);
    scores_.compute(tile, iteration, attended, scores, stats);
    FragmentB<T> weights[P::kRowGroups];
#pragma unroll
    for (int group = 0; group < P::kRowGroups; ++group) {
      weights[group] = softmax_gradient(group, attended, scores[0][group], scores[1][group], stats);
    }
#pragma unroll
    for (int first = 0; first < P::kUnits; first += P::kUnitGroup) {
      if (first >= slice_.units) break;
      FragmentA<T> x[P::kUnitGroup];
#pragma unroll
      for (int i = 0; i < P::kUnitGroup; ++i) {
        x[i] = channels_by_tokens(tile + (first + i) * 16, ring_.pitch(), stats);
      }
#pragma unroll
      for (int unit = 0; unit < P::kUnitGroup; ++unit) {
#pragma unroll
        for (int group = 0; group < P::kRowGroups; ++group) {
          float du[4] = {};
          multiply(du, x[unit], weights[group]);
          for (int i = 0; i < 4; ++i) sums_.sums[first + unit][group][i] += du[i];
        }
      }
    }
    __syncwarp();
    if (wants_dx) write_dx(tile, stats);
  }

  // Stores p, ds and p dp + ds s of each token for write_dx; returns ds rstd.
  __device__ FragmentB<T> softmax_gradient(int group, uint32_t attended, const float (&dp)[4],
                                           const float (&s)[4], const TokenStatistics& stats) {
    const int row = 8 * group + lane_index() / 4;
    float mean = 0, weights[4];
    for (int i = 0; i < 4; ++i) {
      const int token = nth_token(i);
      const bool is_attended = attended >> token & 1;
      const float p = is_attended ? exp2_approx((s[i] - lse()[row]) * kLog2e) : 0.0f;
      const float ds = p * (dp[i] - delta()[row]);
      weights[i] = rounded<T>(ds * stats.factor(i) * weight_unit_);
      mean += weights[i] * (stats.mean[i] - stats.centre[i]);
      T* token_weights = weights_ + token * kWeightPitch;
      token_weights[row] = from_float<T>(p);
      token_weights[kRows + row] = from_float<T>(ds);
      moments()[token * kRows + row] = rounded<T>(p) * dp[i] + rounded<T>(ds) * s[i];
    }
    sums_.mean[group] += sum_of_row(mean);
    return weights_as_b<T>(weights);
  }

  // Overwrites the tile with dx: each lane writes the elements that it reads.
  __device__ void write_dx(T* tile, const TokenStatistics& stats) {
    const int g = lane_index() / 4, t = lane_index() % 4;
    FragmentA<T> weights[P::kRowGroups];
    float a[2] = {0, 0}, b[2] = {0, 0}, mean[2], rstd[2];
#pragma unroll
    for (int step = 0; step < P::kRowGroups; ++step) {
      weights[step] = load_rows(weights_ + step * 16, kWeightPitch);
      for (int i = 0; i < 4; ++i) {
        const float2 pair = unpack<T>(weights[step].pair[i]);
        const float* sums = row_sums() + step * 16 + 2 * t + 8 * (i >> 1);
        a[i & 1] += pair.x * sums[0] + pair.y * sums[1];
      }
    }
    for (int i = 0; i < 2; ++i) {
      for (int row = 2 * t; row < kRows; row += 8) {
        const float* token_moments = moments() + (g + 8 * i) * kRows + row;
        b[i] += token_moments[0] + token_moments[1];
      }
      const int owner = (lane_index() & ~3) + lane_index() / 8;
      const float even_mean = __shfl_sync(~0u, stats.mean[2 * i], owner);
      const float odd_mean = __shfl_sync(~0u, stats.mean[2 * i + 1], owner);
      const float even_rstd = __shfl_sync(~0u, stats.rstd(2 * i), owner);
      const float odd_rstd = __shfl_sync(~0u, stats.rstd(2 * i + 1), owner);
      mean[i] = g & 1 ? odd_mean : even_mean;
      rstd[i] = g & 1 ? odd_rstd : even_rstd;
      if constexpr (kAlone) {
        a[i] = sum_of_row(a[i]) * inverse_width_;
        b[i] = sum_of_row(b[i]) * inverse_width_ * rstd[i];
      } else {
        a[i] = normalize_ ? sum_of_row(a[i]) / channels_ : 0.0f;
        b[i] = normalize_ ? sum_of_row(b[i]) / channels_ * rstd[i] : 0.0f;
      }
    }
    // dx = rstd dxhat + slope (x - shift) + offset
    float slope[2], offset[2], shift[2];
    for (int i = 0; i < 2; ++i) {
      slope[i] = -b[i] * rstd[i];
      shift[i] = sizeof(T) == 4 ? mean[i] : 0.0f;  // 16 bits have more error than float's products
      offset[i] = -a[i] * rstd[i] - slope[i] * (mean[i] - shift[i]);
    }
    const int row_pitch = P::row_pitch(channels_), pitch = ring_.pitch();
    slice_.template for_each_group<P::kUnroll>([&](int first, auto count) {
      constexpr int kCount = decltype(count)::value;
      FragmentA<T> x[kCount];
      float dxhat[kCount][2][4] = {};
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const int unit = first + i;
        x[i] = load_rows(tile + unit * 16, pitch);
#pragma unroll
        for (int step = 0; step < P::kRowGroups; ++step) {
          const T* rows = rows_ + step * 16 * row_pitch + slice_.first + unit * 16;
          const ColumnsOfB<T> columns = load_transposed_columns(rows, row_pitch);
          for (int side = 0; side < 2; ++side) {
            multiply(dxhat[i][side], weights[step], columns.side[side]);
          }
        }
      }
      __syncwarp();  // one lane's elements were loaded by another
      T* corner = tile + first * 16 + g * pitch + 2 * t;
#pragma unroll
      for (int i = 0; i < 4 * kCount; ++i) {
        const int unit = i / 4, side = i / 2 % 2, token = i % 2;
        const auto gradient = [&](float x, float dxhat) {
          return fmaf(x - shift[token], slope[token], fmaf(dxhat, rstd[token], offset[token]));
        };
        const float2 pair = unpack<T>(x[unit].pair[i % 4]);
        const float* pair_dxhat = dxhat[unit][side] + 2 * token;
        store_pair(corner + token * 8 * pitch + unit * 16 + side * 8,
                   pack<T>(gradient(pair.x, pair_dxhat[0]), gradient(pair.y, pair_dxhat[1])));
      }
    });
  }

  template <class WriteExtra>
  __device__ void copy_extra(int iteration, WriteExtra write_extra) const {
    const T* from = ring_.tile(iteration);
#pragma unroll 1  // once per image
    for (int c = lane_index(); c < slice_.units * 16; c += 32) {
      write_extra(slice_.first + c, from[c]);
    }
  }

  // Stores the tile, now dx, to memory. Eight lanes store a row.
  __device__ void store(int iteration, const Image<T>& x, T* dx, int64_t stride, int token,
                        int last, bool add) const {
    constexpr int kChunk = Base::Ring::kChunk, kColumns = 8 * kChunk;
    constexpr int kChunks = ceil_div(P::kUnits * 16, kColumns);
    const int column = lane_index() % 8 * kChunk, width = slice_.units * 16 - column;
    if (!kAlone && width <= 0) return;
#pragma unroll 1
    for (int row = lane_index() / 8; row < P::kTokens; row += 4) {
      if (token + row >= last || token + row < x.has_extra) continue;
      T* to = dx + (token + row - x.has_extra) * stride + slice_.first + column;
      T* from = ring_.tile(iteration) + row * ring_.pitch() + column;
      if (add) add_row(from, to, width);
      uint4 chunks[kChunks];
#pragma unroll
      for (int i = 0; i < kChunks; ++i) {
        // In the fusion, beyond the row the first chunk again: a branch would keep loads apart.
        const int offset = i * kColumns < width ? i * kColumns : 0;
        if (!kAlone || i * kColumns < width)
          chunks[i] = *reinterpret_cast<const uint4*>(from + offset);
      }
#pragma unroll
      for (int i = 0; i < kChunks; ++i) {
        if (i * kColumns < width) *reinterpret_cast<uint4*>(to + i * kColumns) = chunks[i];
      }
    }
  }

  // Adds a lane's part of a row in memory to one in shared memory.
  __device__ static void add_row(T* row, const T* other, int width) {
    constexpr int kChunk = Base::Ring::kChunk;
#pragma unroll 1
    for (int c = 0; c < width; c += 8 * kChunk) {
      for (int i = 0; i < kChunk; ++i) {
        row[c + i] = from_float<T>(to_float(row[c + i]) + to_float(other[c + i]));
      }
    }
  }

  float* row_floats_;
  T* weights_;
  bool normalize_;
  float inverse_width_;  // 0 without LayerNorm, whose gradient has means over the channels
};

}  // namespace crossvit::attention_core
