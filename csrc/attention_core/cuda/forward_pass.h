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

// A warp of a pass that is alone has a factor for each warp group and row.
template <class P, bool kAlone>
using ForwardBase = TokenPass<P, kAlone, 1, sizeof(SoftmaxState) / sizeof(float), 0,
                              kAlone ? P::kMaxWarpGroups * P::kRows * 4 : 0>;

template <class P, bool kAlone = false>
class ForwardPass : public ForwardBase<P, kAlone> {
  using Base = ForwardBase<P, kAlone>;
  using Base::channels_, Base::ring_, Base::scores_, Base::slice_, Base::sums_;
  using Base::group_sums, Base::weight_unit_, Base::inverse_unit_;

 public:
  using typename Base::T;

  __device__ ForwardPass(char* memory, int channels, float eps, bool normalize,
                         int second_stages = 0)
      : Base(memory, Base::layout_of(channels, second_stages), channels, eps, normalize,
             second_stages),
        memory_(memory) {}

  // Called by all threads; a pass that is alone needs no barrier after the rows are written. Blocks
  // that share the image store partials in `tiles`. A warp calls after_tiles() before it stores
  // its sums.
  template <class AfterTiles = Nothing>
  __device__ void run(const Image<T>& x, const Range& range, const TilePartials<P>& tiles,
                      AfterTiles after_tiles = {}) {
    if constexpr (!kAlone || P::kWarpsShareTiles) {
      if constexpr (kAlone) __syncthreads();
      scores_.sum_rows();
    }
    clear();
    if constexpr (!decltype(scores_)::kSumsOwnRows) __syncthreads();
    if constexpr (kAlone) this->start_others(x, range);
    const auto token_of = [&](int iteration) {
      return P::template token_of<kAlone>(channels_, range, iteration);
    };
    for (int iteration = 0, token; (token = token_of(iteration)) < range.last; ++iteration) {
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
    after_tiles();
    if constexpr (!Base::kPartialsInRings) __syncthreads();
    if (!tiles) store_partials();
    __syncthreads();
  }

  // After run() in all blocks that share the image: forms the partials that a block with all tiles
  // would have stored, for rows [0, count) and this block's share of the channels. Called by all
  // threads.
  __device__ void gather(const TilePartials<P>& tiles, int count, const Range& range) {
    const int first = this->first_in_share(range);
    const auto store = [&](int warp_group, int row, int channel, const Gathered& gathered) {
      const float2 sums = {gathered.sums.x - gathered.mean, gathered.sums.y - gathered.mean};
      float* to = group_sums(warp_group);
      to[SumsByChannel<P>::element(channel, row)] = sums.x;
      to[SumsByChannel<P>::element(channel + 1, row)] = sums.y;
      if (channel == first) *group_state(warp_group, row) = gathered.state;
    };
    this->template for_each_gathered<Gathered>(tiles, count, range, store);
    __syncthreads();
  }

  // After run() or gather(), for rows [0, count) and this block's share of the channels: writes m,
  // rows `stride` apart, which with `divides` false is still to be divided by the row's total; also
  // calls write_total(row, total) once for each row of the image.
  template <class WriteTotal>
  __device__ void write_results(int count, const Range& range, bool divides, float* m,
                                int64_t stride, WriteTotal write_total) const {
    constexpr int kGroups = P::kMaxWarpGroups, kQuads = P::kRows / 4;
    constexpr int kGroupsAtOnce = kGroups % 3 == 0 ? 3 : minimum(kGroups, 4);
    const int warp_groups = P::warp_groups(channels_), lane = lane_index();
    const int first_channel = this->first_in_share(range), last = this->last_in_share(range);
    const int group_stride = Base::group_floats(channels_);
    float* factors = factors_of_warp();
    const RowTotal total = write_factors(factors, divides);
    __syncwarp();
    // A warp has four rows, whose factors it loads once; in a block of few warps all rows in turn.
    const bool divided = block_warps() % kQuads == 0;
    const int step = 32 * (divided ? block_warps() / kQuads : block_warps());
    const int begin = first_channel + lane + 32 * (divided ? warp_index() / kQuads : warp_index());
#pragma unroll 1
    for (int row = divided ? 4 * (warp_index() % kQuads) : 0; row < count && begin < last;
         row += divided ? P::kRows : 4) {
      float4 factor[kGroups];
#pragma unroll
      for (int i = 0; i < kGroups; ++i) {
        factor[i] = *reinterpret_cast<const float4*>(factors + i * P::kRows + row);
      }
      int channel = begin;
      const float* from = group_sums(0) + SumsByChannel<P>::quad(channel, row / 4);
      float* to = m + row * stride + channel;
#pragma unroll 1  // else the compiler would divide by the step
      for (; channel < last; channel += step, from += step * P::kRows, to += step) {
        float4 result = {0, 0, 0, 0};
#pragma unroll
        for (int first = 0; first < kGroups; first += kGroupsAtOnce) {
          if (first >= warp_groups) break;
          float4 sums[kGroupsAtOnce];
#pragma unroll
          for (int i = 0; i < kGroupsAtOnce; ++i) {
            // Beyond the last group its sums, times 0.
            const int offset = minimum(first + i, warp_groups - 1) * group_stride;
            sums[i] = *reinterpret_cast<const float4*>(from + offset);
          }
#pragma unroll
          for (int i = 0; i < kGroupsAtOnce; ++i) {
            result.x = fmaf(sums[i].x, factor[first + i].x, result.x);
            result.y = fmaf(sums[i].y, factor[first + i].y, result.y);
            result.z = fmaf(sums[i].z, factor[first + i].z, result.z);
            result.w = fmaf(sums[i].w, factor[first + i].w, result.w);
          }
        }
        to[0] = result.x;
        if (row + 1 < count) to[stride] = result.y;
        if (row + 2 < count) to[2 * stride] = result.z;
        if (row + 3 < count) to[3 * stride] = result.w;
      }
    }
    if (range.rank == 0 && warp_index() == 0 && lane < count) write_total(lane, total);
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

  __device__ float* factors_of_warp() const {
    const int bytes = Base::kBytesOfWarp * warp_index();
    return reinterpret_cast<float*>(memory_ + Base::layout_of(channels_).warp_data + bytes);
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
    if constexpr (kAlone) {
      Step steps[P::kRowGroups];
#pragma unroll
      for (int group = 0; group < P::kRowGroups; ++group) {
        weights[group] = softmax_weights(group, attended, scores[0][group], stats, steps[group]);
      }
      for_each_product(tile, stats, weights, [&](int group, int i, float product, float& sum) {
        sum = fmaf(product, steps[group].added[i & 1], sum * steps[group].old[i & 1]);
      });
      // After the products, which do not need them.
#pragma unroll
      for (int group = 0; group < P::kRowGroups; ++group) {
        const Step& step = steps[group];
        softmax_[group].peak = step.peak;
        softmax_[group].total = step.scales.join(softmax_[group].total, sum_of_row(step.total));
        sums_.mean[group] = step.scales.join(sums_.mean[group], sum_of_row(step.mean));
      }
    } else {
      float added[P::kRowGroups][2];
#pragma unroll
      for (int group = 0; group < P::kRowGroups; ++group) {
        weights[group] = softmax_weights(group, attended, scores[0][group], stats, added[group]);
      }
      for_each_product(tile, stats, weights, [&](int group, int i, float product, float& sum) {
        sum = fmaf(product, added[group][i & 1], sum);
      });
    }
  }

  // Calls visit(group, i, product, sum) for this lane's products of the tile and the weights.
  template <class Visit>
  __device__ __forceinline__ void for_each_product(const T* tile, const TokenStatistics& stats,
                                                   const FragmentB<T> (&weights)[P::kRowGroups],
                                                   Visit visit) {
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
            visit(group, i, products[i], sums_.sums[first + unit][group][i]);
          }
        }
      }
    }
  }

  // What a tile adds to a row, of a pass that is alone.
  struct Step {
    float peak;              // with it
    Scales scales;           // of row g
    float old[2], added[2];  // the scales of rows 2 t and 2 t + 1
    float total, mean;       // of this lane's tokens
  };

  // Returns the weights exp(score - peak) * rstd. Sums over tokens and earlier sums are left to the
  // caller, so that the tile's products wait for less.
  __device__ FragmentB<T> softmax_weights(int group, uint32_t attended, const float (&scores)[4],
                                          const TokenStatistics& stats, Step& step) const {
    float s[4], peak = -INFINITY, weights[4];
    for (int i = 0; i < 4; ++i) {
      s[i] = attended >> nth_token(i) & 1 ? scores[i] * kLog2e : -INFINITY;
      peak = fmaxf(peak, s[i]);
    }
    peak = max_of_row(peak);
    SoftmaxState joined = {softmax_[group].peak, 0};
    step.scales = join(joined, {peak, 0});
    step.peak = joined.peak;
    const int t = lane_index() % 4;
    for (int i = 0; i < 2; ++i) {
      step.old[i] = __shfl_sync(~0u, step.scales.old, 8 * t + 4 * i);
      step.added[i] = __shfl_sync(~0u, step.scales.added, 8 * t + 4 * i);
    }
    const float finite = finite_or_zero(peak);
    step.total = 0, step.mean = 0;
    for (int i = 0; i < 4; ++i) {
      const float p = exp2_approx(s[i] - finite);
      step.total += p;
      weights[i] = rounded<T>(p * stats.factor(i) * weight_unit_);
      step.mean += weights[i] * (stats.mean[i] - stats.centre[i]);
    }
    return weights_as_b<T>(weights);
  }

  // The same of a pass that is not alone, which also joins the tile's sums and rescales earlier
  // ones to the new peak. added: factors of the tile's sums of rows 2 t and 2 t + 1.
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

  // Writes what a row's sums of each warp group are multiplied by, [warp groups, kRows]; returns
  // the total of row `lane`.
  __device__ RowTotal write_factors(float* factors, bool divides) const {
    constexpr int kGroups = P::kMaxWarpGroups;
    const int row = lane_index() % P::kRows;
    float decays[kGroups];
    const RowTotal of_row = total_of_groups(P::warp_groups(channels_), decays,
                                            [&](int i) { return *group_state(i, row); });
    const float factor = divides ? of_row.inverse * inverse_unit_ : inverse_unit_;
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      if (lane_index() < P::kRows) factors[i * P::kRows + row] = decays[i] * factor;
    }
    return of_row;
  }

  // Overwrites the rows and the rings, to which no copy is in flight, or the warp's ring.
  __device__ void store_partials() {
    const int warp_group = P::warp_group(channels_);
    float* sums =
        Base::kPartialsInRings ? reinterpret_cast<float*>(ring_.memory()) : group_sums(warp_group);
    // Before sm_90 the compiler would compute all addresses ahead of the first image.
    if constexpr (!kHasClusters) sums = used_from_here(sums);
    if constexpr (kAlone) {
      SumsByChannel<P>::store(sums, sums_, slice_);
    } else {
      sums_.subtract_means();
      sums_.store(sums, Base::sums_pitch(channels_), slice_);
    }
    if (lane_index() % 4 || P::group_lane(channels_)) return;
    auto* states = reinterpret_cast<SoftmaxState*>(sums + P::kRows * Base::sums_pitch(channels_));
    for (int group = 0; group < P::kRowGroups; ++group) {
      states[8 * group + lane_index() / 4] = softmax_[group];
    }
  }

  char* memory_;
  SoftmaxState softmax_[P::kRowGroups];  // of row 8 group + g
};

}  // namespace crossvit::attention_core
