#pragma once

#include "attention_core/cuda/partials.h"
#include "attention_core/cuda/row_loads.h"
#include "common/cuda/cluster.h"

// The forward pass: online softmax, and sums of raw tokens whose means are subtracted at the end
// (docs/derivation.md).

namespace crossvit::attention_core {

// lse, for a total above 0.
__device__ inline float log_of_total(const SoftmaxState& state) {
  return (state.peak + log2f(state.total)) / kLog2e;
}

template <class P, bool kAlone>
using ForwardBase = TokenPass<P, kAlone, 1, sizeof(SoftmaxState) / sizeof(float), 0, 0>;

template <class P, bool kAlone = false>
class ForwardPass : public ForwardBase<P, kAlone> {
  using Base = ForwardBase<P, kAlone>;
  using Base::channels_, Base::ring_, Base::scores_, Base::slice_, Base::sums_;
  using Base::group_sums, Base::weight_unit_, Base::inverse_unit_;

 public:
  using typename Base::T;

  __device__ ForwardPass(char* memory, int channels, float eps, bool normalize)
      : Base(memory, Base::layout_of(channels), channels, eps, normalize) {}

  // Called by all threads; no barrier is needed after the rows are written. Blocks that share the
  // image store partials in `tiles`.
  __device__ void run(const Image<T>& x, const Range& range, const TilePartials<P>& tiles) {
    if constexpr (!kAlone || P::kWarpsShareTiles) {
      __syncthreads();
      scores_.sum_rows();
    }
    clear();
    __syncthreads();
    for (int iteration = 0, token; (token = P::token_of(channels_, range, iteration)) < range.last;
         ++iteration) {
      ring_.wait();
      if (token == 0 && x.has_extra) ring_.write_extra(iteration, x.extra);
      add_tile(iteration, x.attended_bits(token, range.last));
      __syncwarp();
      ring_.copy_next(x, range, iteration);
      if (tiles) {
        const int tile = P::tile_of(channels_, range, iteration);
        tiles.store(tile, sums_, slice_);
        tiles.store(tile, softmax_);
        clear();
      }
    }
    ring_.drain();
    __syncthreads();
    if (!tiles) store_partials();
    __syncthreads();
  }

  // After run() in all blocks that share the image: forms the partials that a block with all tiles
  // would have stored, for rows [0, count) and this block's share of the channels. Called by all
  // threads.
  __device__ void gather(const TilePartials<P>& tiles, int count, const Range& range) {
    const int first = this->first_in_share(range);
    const auto store = [&](int warp_group, int row, int channel, const Gathered& gathered) {
      float2* to = reinterpret_cast<float2*>(group_sums(warp_group) +
                                             row * Base::sums_pitch(channels_) + channel);
      *to = make_float2(gathered.sums.x - gathered.mean, gathered.sums.y - gathered.mean);
      if (channel == first) *group_state(warp_group, row) = gathered.state;
    };
    this->template for_each_gathered<Gathered>(tiles, count, range, store);
    __syncthreads();
  }

  // After run() or gather(), for rows [0, count) and this block's share of the channels: calls
  // write(row, channel, sum, total), where m is the sum times the total's inverse.
  template <class Write>
  __device__ void results(int count, const Range& range, Write write) const {
    const int warp_groups = P::warp_groups(channels_);
    const int first = this->first_in_share(range), last = this->last_in_share(range);
#pragma unroll 1
    for (int row = warp_index(); row < count; row += block_warps()) {
      SoftmaxState state;
#pragma unroll 1
      for (int i = 0; i < warp_groups; ++i) join(state, *group_state(i, row));
      const RowTotal total = RowTotal::of(state);
      const float finite = finite_or_zero(state.peak);
#pragma unroll 1
      for (int channel = first + lane_index(); channel < last; channel += 32) {
        float sum = 0;
#pragma unroll 4
        for (int i = 0; i < warp_groups; ++i) {
          const float decay = exp2_approx(group_state(i, row)->peak - finite);
          sum = fmaf(group_sums(i)[row * Base::sums_pitch(channels_) + channel], decay, sum);
        }
        write(row, channel, sum * inverse_unit_, total);
      }
    }
  }

  // The same with write(row, channel, sums, total) for a channel and the next; also calls
  // write_total(row, total) once for each row of the image.
  template <class Write, class WriteTotal>
  __device__ void results_of_pairs(int count, const Range& range, Write write,
                                   WriteTotal write_total) const {
    constexpr int kGroups = P::kMaxThreads / 32;
    const int warp_groups = P::warp_groups(channels_), lane = lane_index() % kGroups;
    const int first = this->first_in_share(range), last = this->last_in_share(range);
#pragma unroll 1
    for (int row = warp_index(); row < count; row += block_warps()) {
      SoftmaxState group;
      if (lane < warp_groups) group = *group_state(lane, row);
      SoftmaxState state = {group.peak, 0};
#pragma unroll
      for (int i = 1; i < kGroups; i *= 2) {
        state.peak = fmaxf(state.peak, __shfl_xor_sync(~0u, state.peak, i));
      }
      const float decay = exp2_approx(group.peak - finite_or_zero(state.peak));
      state.total = group.total * decay;
#pragma unroll
      for (int i = 1; i < kGroups; i *= 2) {
        state.total += __shfl_xor_sync(~0u, state.total, i);
      }
      const RowTotal total = RowTotal::of(state);
      if (first == 0 && lane_index() == 0) write_total(row, total);
      float decays[kGroups];
#pragma unroll
      for (int i = 0; i < kGroups; ++i) decays[i] = __shfl_sync(~0u, decay, i) * inverse_unit_;
#pragma unroll 2
      for (int channel = first + 2 * lane_index(); channel < last; channel += 64) {
        float2 sums[kGroups];
#pragma unroll
        for (int i = 0; i < kGroups; ++i) {
          const float* from = group_sums(i) + row * Base::sums_pitch(channels_) + channel;
          sums[i] = i < warp_groups ? *reinterpret_cast<const float2*>(from) : make_float2(0, 0);
        }
        float2 sum = {0, 0};
#pragma unroll
        for (int i = 0; i < kGroups; ++i) {
          sum.x = fmaf(sums[i].x, decays[i], sum.x);
          sum.y = fmaf(sums[i].y, decays[i], sum.y);
        }
        write(row, channel, sum, total);
      }
    }
  }

 private:
  // Sums of tiles' partials.
  struct Gathered {
    SoftmaxState state;
    float2 sums = {0, 0};
    float mean = 0;

    __device__ void load(const TilePartials<P>& tiles, int tile, int row, int channel) {
      state = tiles.state(tile, row);
      sums = tiles.sums(tile, row, channel);
      mean = tiles.mean(tile, row, channel);
    }
    __device__ void add(const Gathered& other) {
      const Scales scales = join(state, other.state);
      sums = make_float2(scales.join(sums.x, other.sums.x), scales.join(sums.y, other.sums.y));
      mean = scales.join(mean, other.mean);
    }
  };

  __device__ SoftmaxState* group_state(int warp_group, int row) const {
    float* states = group_sums(warp_group) + P::kRows * Base::sums_pitch(channels_);
    return reinterpret_cast<SoftmaxState*>(states) + row;
  }

  __device__ void clear() {
    sums_.clear();
    for (int group = 0; group < P::kRowGroups; ++group) softmax_[group] = {};
  }

  __device__ void add_tile(int iteration, uint32_t attended) {
    float scores[1][P::kRowGroups][4];
    TokenStatistics stats;
    const T* tile = ring_.tile(iteration);
    scores_.compute(tile, iteration, attended, scores, stats);
    FragmentB<T> weights[P::kRowGroups];
    float added[P::kRowGroups][2];
#pragma unroll
    for (int group = 0; group < P::kRowGroups; ++group) {
      weights[group] = softmax_weights(group, attended, scores[0][group], stats, added[group]);
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
          float products[4] = {};
          multiply(products, x[unit], weights[group]);
          for (int i = 0; i < 4; ++i) {
            float& sum = sums_.sums[first + unit][group][i];
            sum = fmaf(products[i], added[group][i & 1], sum);
          }
        }
      }
    }
  }

  // Returns the weights exp(score - peak) * rstd, and rescales earlier sums to the new peak. added:
  // factors of the tile's sums of rows 2 t and 2 t + 1.
  __device__ FragmentB<T> softmax_weights(int group, uint32_t attended, const float (&scores)[4],
                                          const TokenStatistics& stats, float (&added)[2]) {
    SoftmaxState tile;
    float s[4];
    for (int i = 0; i < 4; ++i) {
      s[i] = attended >> nth_token(i) & 1 ? scores[i] * kLog2e : -INFINITY;
      tile.peak = fmaxf(tile.peak, s[i]);
    }
    tile.peak = max_of_row(tile.peak);
    const float finite = finite_or_zero(tile.peak);
    float total = 0, mean = 0, weights[4];
    for (int i = 0; i < 4; ++i) {
      const float p = exp2_approx(s[i] - finite);
      total += p;
      weights[i] = rounded<T>(p * stats.factor(i) * weight_unit_);
      mean += weights[i] * (stats.mean[i] - stats.centre[i]);
    }
    tile.total = sum_of_row(total);
    const Scales scales = join(softmax_[group], tile);
    sums_.mean[group] = scales.join(sums_.mean[group], sum_of_row(mean));
    if (__any_sync(~0u, scales.old != 1.0f)) rescale(group, scales.old);
    const int t = lane_index() % 4;
    for (int i = 0; i < 2; ++i) added[i] = __shfl_sync(~0u, scales.added, 8 * t + 4 * i);
    return weights_as_b<T>(weights);
  }

  // This lane has sums of rows 2 t and 2 t + 1, but the decay of row g.
  __device__ void rescale(int group, float decay) {
    const int t = lane_index() % 4;
    const float even = __shfl_sync(~0u, decay, 8 * t);
    const float odd = __shfl_sync(~0u, decay, 8 * t + 4);
#pragma unroll
    for (int unit = 0; unit < P::kUnits; ++unit) {
      for (int i = 0; i < 4; ++i) sums_.sums[unit][group][i] *= i & 1 ? odd : even;
    }
  }

  // Overwrites the rows and the rings, to which no copy is in flight.
  __device__ void store_partials() {
    const int warp_group = P::warp_group(channels_);
    float* sums = group_sums(warp_group);
    // Before sm_90 the compiler would compute all addresses ahead of the first image.
    if constexpr (!kHasClusters) sums = used_from_here(sums);
    sums_.template store<true>(sums, Base::sums_pitch(channels_), slice_);
    if (lane_index() % 4 || P::group_lane(channels_)) return;
    for (int group = 0; group < P::kRowGroups; ++group) {
      *group_state(warp_group, 8 * group + lane_index() / 4) = softmax_[group];
    }
  }

  SoftmaxState softmax_[P::kRowGroups];  // of row 8 group + g
};

}  // namespace crossvit::attention_core
