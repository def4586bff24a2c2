#pragma once

#include "attention_core/cuda/partials.h"
#include "attention_core/cuda/row_loads.h"
#include "common/cuda/cluster.h"

// The forward pass: online softmax, and sums of raw tokens whose means are subtracted at the end
// (docs/derivation.md).

namespace crossvit::attention_core {

// lse, for a total above 0. Scores of 16-bit tokens have far larger errors than the approximation.
template <class T>
__device__ float log_of_total(const SoftmaxState& state) {
  constexpr float kLn2 = 0.69314718056f;
  const float log2 = sizeof(T) == 2 ? log2_approx(state.total) : log2f(state.total);
  return (state.peak + log2) * kLn2;
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
      const uint32_t attended = x.attended_bits(token, range.last);
      ring_.wait();
      if (token == 0 && x.has_extra) ring_.write_extra(iteration, x.extra);
      add_tile(iteration, attended);
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
    if (!tiles) store_partials(range);
    __syncthreads();
  }

  // After run() in all blocks that share the image: forms the partials that a block with all tiles
  // would have stored, for rows [0, count) and this block's share of the channels. Called by all
  // threads.
  __device__ void gather(const TilePartials<P>& tiles, int count, const Range& range) {
    const int first = this->first_in_share(range);
    const auto store = [&](int warp_group, int row, int channel, const Gathered& gathered) {
      const float2 sums = {gathered.sums.x - gathered.mean, gathered.sums.y - gathered.mean};
      float* to = group_sums(range, warp_group) + kSumsOffset;
      to[SumsByChannel<P>::element(channel, row)] = sums.x;
      to[SumsByChannel<P>::element(channel + 1, row)] = sums.y;
      if (channel == first) states_of(group_sums(range, warp_group))[row] = gathered.state;
    };
    this->template for_each_gathered<Gathered>(tiles, count, range, store);
    __syncthreads();
  }

  // After run() or gather(), for rows [0, count) and this block's share of the channels: writes m,
  // rows `stride` apart, and lse; or with lse null, m before the division by a row's total, and the
  // states.
  __device__ void write_results(int count, const Range& range, float* m, int64_t stride, float* lse,
                                SoftmaxState* states) const {
    constexpr int kGroups = P::kMaxWarpGroups, kQuads = P::kRows / 4;
    constexpr int kGroupsAtOnce = kGroups % 3 == 0 ? 3 : minimum(kGroups, 4);
    const int warp_groups = P::warp_groups(channels_), lane = lane_index();
    const int last = this->last_in_share(range);
    float* factors = factors_of_warp();
    const RowTotal total = write_factors(range, factors, lse != nullptr);
    // By each warp, without a branch: the last one stores it.
    const float log = log_of_total<T>(total.state);
    const bool stores = range.rank == 0 && warp_index() == block_warps() - 1 && lane < count;
    if (stores && lse) lse[lane] = log;
    if (stores && !lse) states[lane] = total.state;
    __syncwarp();
    // A warp has four rows, whose factors it loads once; in a block of few warps all rows in turn.
    const uint32_t warps = block_warps(), warp = warp_index();
    const bool divided = warps % kQuads == 0;
    const int step = 32 * (divided ? warps / kQuads : warps);
    const int begin = this->first_in_share(range) + lane + 32 * (divided ? warp / kQuads : warp);
#pragma unroll 1
    for (int row = divided ? 4 * (warp % kQuads) : 0; row < count && begin < last;
         row += divided ? P::kRows : 4) {
      float4 factor[kGroups];
#pragma unroll
      for (int i = 0; i < kGroups; ++i) {
        factor[i] = *reinterpret_cast<const float4*>(factors + i * P::kRows + row);
      }
      float* to[4] = {m + row * stride};
      for (int i = 1; i < 4; ++i) to[i] = to[i - 1] + stride;
      int from = SumsByChannel<P>::quad(begin, row / 4);
#pragma unroll 1  // else the compiler would divide by the step
      for (int channel = begin; channel < last; channel += 2 * step, from += 2 * step * P::kRows) {
        // Two channels, whose loads are in flight together; beyond the last one again the first.
        const bool has_second = channel + step < last;
        const int second = from + (has_second ? step * P::kRows : 0);
        float4 result[2] = {};
#pragma unroll
        for (int first = 0; first < kGroups; first += kGroupsAtOnce) {
          if (first >= warp_groups) break;
          float4 sums[2][kGroupsAtOnce];
#pragma unroll
          for (int i = 0; i < kGroupsAtOnce; ++i) {
            // Beyond the last group its sums, times 0.
            const float* group =
                group_sums(range, minimum(first + i, warp_groups - 1)) + kSumsOffset;
            sums[0][i] = *reinterpret_cast<const float4*>(group + from);
            sums[1][i] = *reinterpret_cast<const float4*>(group + second);
          }
#pragma unroll
          for (int i = 0; i < kGroupsAtOnce; ++i) {
            for (int j = 0; j < 2; ++j) {
              result[j].x = fmaf(sums[j][i].x, factor[first + i].x, result[j].x);
              result[j].y = fmaf(sums[j][i].y, factor[first + i].y, result[j].y);
              result[j].z = fmaf(sums[j][i].z, factor[first + i].z, result[j].z);
              result[j].w = fmaf(sums[j][i].w, factor[first + i].w, result[j].w);
            }
          }
        }
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          if (j && !has_second) break;
          to[0][channel + j * step] = result[j].x;
          if (row + 1 < count) to[1][channel + j * step] = result[j].y;
          if (row + 2 < count) to[2][channel + j * step] = result[j].z;
          if (row + 3 < count) to[3][channel + j * step] = result[j].w;
        }
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

  // A warp group's partials are its sums, and a state for each row: behind them, or in front where
  // addresses then have less to add.
  static constexpr int kSumsOffset = kAlone ? P::kRows * sizeof(SoftmaxState) / sizeof(float) : 0;

  __device__ SoftmaxState* states_of(float* partials) const {
    const int offset = kAlone ? 0 : P::kRows * Base::sums_pitch(channels_);
    return reinterpret_cast<SoftmaxState*>(partials + offset);
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
    constexpr int kCount = P::kUnitGroup;
    const auto load = [&](int first, FragmentA<T>(&x)[kCount]) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        x[i] = channels_by_tokens(tile + (first + i) * 16, ring_.pitch(), stats);
      }
    };
    // A group is loaded ahead of the products before it if there are registers, else behind them;
    // beyond the last group that one again.
    const int last_group = ring_.pitch() / (16 * kCount) * kCount - kCount;
    FragmentA<T> x[kCount];
    load(0, x);
#pragma unroll
    for (int first = 0; first < P::kUnits; first += kCount) {
      if (first >= slice_.units) break;
      FragmentA<T> next[kCount];
      const bool has_next = first + kCount < P::kUnits;
      if (kAlone && has_next) load(minimum(first + kCount, last_group), next);
#pragma unroll
      for (int unit = 0; unit < kCount; ++unit) {
#pragma unroll
        for (int group = 0; group < P::kRowGroups; ++group) {
          float products[4] = {};
          multiply(products, x[unit], weights[group]);
          for (int i = 0; i < 4; ++i) {
            visit(group, i, products[i], sums_.sums[first + unit][group][i]);
          }
        }
      }
      if (!kAlone && has_next) load(minimum(first + kCount, last_group), next);
      for (int i = 0; has_next && i < kCount; ++i) x[i] = next[i];
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
      weights[i] = p * stats.factor(i) * weight_unit_;
    }
    const FragmentB<T> b = round_as_b<T>(weights);
    for (int i = 0; i < 4; ++i) step.mean += weights[i] * (stats.mean[i] - stats.centre[i]);
    return b;
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
      weights[i] = p * stats.factor(i) * weight_unit_;
    }
    const FragmentB<T> b = round_as_b<T>(weights);
    for (int i = 0; i < 4; ++i) mean += weights[i] * (stats.mean[i] - stats.centre[i]);
    tile.total = sum_of_row(total);
    const Scales scales = join(softmax_[group], tile);
    sums_.mean[group] = scales.join(sums_.mean[group], sum_of_row(mean));
    if (__any_sync(~0u, scales.old != 1.0f)) rescale(group, scales.old);
    const int t = lane_index() % 4;
    for (int i = 0; i < 2; ++i) added[i] = __shfl_sync(~0u, scales.added, 8 * t + 4 * i);
    return b;
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
  __device__ RowTotal write_factors(const Range& range, float* factors, bool divides) const {
    constexpr int kGroups = P::kMaxWarpGroups;
    const int row = lane_index() % P::kRows;
    float decays[kGroups];
    const RowTotal of_row = total_of_groups(P::warp_groups(channels_), decays, [&](int i) {
      return states_of(group_sums(range, i))[row];
    });
    const float factor = divides ? of_row.inverse * inverse_unit_ : inverse_unit_;
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      if (lane_index() < P::kRows) factors[i * P::kRows + row] = decays[i] * factor;
    }
    return of_row;
  }

  // Overwrites the rows and the rings, to which no copy is in flight, or the warp's ring.
  __device__ void store_partials(const Range& range) {
    float* partials = Base::kPartialsInRings
                          ? reinterpret_cast<float*>(ring_.memory())
                          : group_sums(range, P::warp_group(channels_) ^ range.swap);
    // Before sm_90 the compiler would compute all addresses ahead of the first image.
    if constexpr (!kHasClusters) partials = used_from_here(partials);
    if constexpr (kAlone) {
      SumsByChannel<P>::store(partials + kSumsOffset, sums_, slice_);
    } else {
      sums_.subtract_means();
      sums_.store(partials, Base::sums_pitch(channels_), slice_);
    }
    if (lane_index() % 4 || P::group_lane(channels_)) return;
    SoftmaxState* states = states_of(partials);
    for (int group = 0; group < P::kRowGroups; ++group) {
      states[8 * group + lane_index() / 4] = softmax_[group];
    }
  }

  char* memory_;
  SoftmaxState softmax_[P::kRowGroups];  // of row 8 group + g
};

}  // namespace crossvit::attention_core
