#pragma once

#include "attention_core/cuda/scores.h"
#include "attention_core/cuda/weights.h"
#include "common/cuda/cluster.h"
#include "common/cuda/math.h"

// Sums over an image's tokens: of a warp, of a block, and of blocks that share the image.
//
// Each tile's contribution is formed separately and then added. A block that has all tiles adds in
// registers; blocks that share an image store partials per tile in memory and add them in the same
// order, so that a result's bits do not depend on the number of blocks.

namespace crossvit::attention_core {

// Softmax over some of a row's tokens. Peaks are in base 2.
struct alignas(8) SoftmaxState {
  float peak = -INFINITY;  // if nothing is attended to
  float total = 0;
};

// A finite reference point for exponents.
__device__ inline float finite_or_zero(float peak) { return peak == -INFINITY ? 0.0f : peak; }

// Factors that rescale the sums of two states when the states are joined.
struct Scales {
  float old, added;

  __device__ float join(float sum, float other) const { return fmaf(other, added, sum * old); }
};

__device__ inline Scales join(SoftmaxState& state, const SoftmaxState& other) {
  const float peak = fmaxf(state.peak, other.peak);
  const float finite = finite_or_zero(peak);
  const Scales scales = {exp2_approx(state.peak - finite), exp2_approx(other.peak - finite)};
  state.total = scales.join(state.total, other.total);
  state.peak = peak;
  return scales;
}

// A row's softmax over all tokens of a block, and what divides its sums: 1 if nothing is attended
// to.
struct RowTotal {
  SoftmaxState state;
  float inverse;

  __device__ static RowTotal of(const SoftmaxState& state) {
    return {state, state.total == 0 ? 1.0f : reciprocal(state.total)};
  }
};

// The total of a row that has a state in each warp group, and what each group's sums are multiplied
// by to be relative to the row's peak: 0 beyond the last group.
template <int kGroups, class StateOf>
__device__ __forceinline__ RowTotal total_of_groups(int warp_groups, float (&decays)[kGroups],
                                                    StateOf state_of) {
  SoftmaxState states[kGroups], total;
#pragma unroll
  for (int i = 0; i < kGroups; ++i) states[i] = state_of(minimum(i, warp_groups - 1));
  for (const SoftmaxState& state : states) total.peak = fmaxf(total.peak, state.peak);
  const float finite = finite_or_zero(total.peak);
#pragma unroll
  for (int i = 0; i < kGroups; ++i) {
    const float decay = exp2_approx(states[i].peak - finite);
    decays[i] = i < warp_groups ? decay : 0.0f;
    total.total = fmaf(states[i].total, decays[i], total.total);
  }
  return RowTotal::of(total);
}

// A warp's sums over its tokens, for each unit's channels [g, g + 8] and a row group's rows
// [2 t, 2 t + 1].
template <class P>
struct WarpSums {
  float sums[P::kUnits][P::kRowGroups][4];
  float mean[P::kRowGroups];  // of row g: what the tokens' means add to every channel

  __device__ void clear() {
#pragma unroll
    for (int group = 0; group < P::kRowGroups; ++group) {
      mean[group] = 0;
#pragma unroll
      for (int unit = 0; unit < P::kUnits; ++unit) {
        for (int i = 0; i < 4; ++i) sums[unit][group][i] = 0;
      }
    }
  }

  // Subtracts the means, before the stores: none of these then waits for registers of the one
  // before.
  __device__ void subtract_means() {
    const int t = lane_index() % 4;
#pragma unroll
    for (int group = 0; group < P::kRowGroups; ++group) {
      float means[2];
      for (int i = 0; i < 2; ++i) means[i] = __shfl_sync(~0u, mean[group], 8 * t + 4 * i);
#pragma unroll
      for (int unit = 0; unit < P::kUnits; ++unit) {
        for (int i = 0; i < 4; ++i) sums[unit][group][i] -= means[i & 1];
      }
    }
  }

  // Stores to [kRows, pitch].
  __device__ void store(float* rows, int pitch, Slice slice) const {
    const int g = lane_index() / 4, t = lane_index() % 4;
#pragma unroll
    for (int group = 0; group < P::kRowGroups; ++group) {
      float* to = rows + (8 * group + 2 * t) * pitch + slice.first + g;
#pragma unroll
      for (int unit = 0; unit < P::kUnits; ++unit) {
        if (unit >= slice.units) break;
        for (int i = 0; i < 4; ++i) {
          to[(i & 1) * pitch + unit * 16 + 8 * (i >> 1)] = sums[unit][group][i];
        }
      }
    }
  }
};

// A warp group's sums in shared memory, [channels, kRows]: what one access of a warp reads, four
// rows of consecutive channels, or writes, pairs of rows of a fragment, lies in different banks.
template <class P>
struct SumsByChannel {
  static constexpr int kQuads = P::kRows / 4, kChannelsOfBanks = 32 / P::kRows;

  __device__ static int quad(int channel, int quad) {
    return channel * P::kRows + 4 * (quad ^ (channel / kChannelsOfBanks % kQuads));
  }
  __device__ static int element(int channel, int row) { return quad(channel, row / 4) + row % 4; }

  // Stores a warp's sums, minus the means; where the warp has all channels, in whole groups of
  // units, for which there must be room.
  __device__ static void store(float* to, const WarpSums<P>& sums, Slice slice) {
    constexpr int kStep = P::kWarpsShareTiles ? 1 : P::kUnitGroup;
    const int g = lane_index() / 4, t = lane_index() % 4;
#pragma unroll
    for (int group = 0; group < P::kRowGroups; ++group) {
      float means[2];
      for (int i = 0; i < 2; ++i) means[i] = __shfl_sync(~0u, sums.mean[group], 8 * t + 4 * i);
      float* to_rows = to + element(slice.first + g, 8 * group + 2 * t);
#pragma unroll
      for (int first = 0; first < P::kUnits; first += kStep) {
        if (first >= slice.units) break;
        float2 centred[2 * kStep];
#pragma unroll
        for (int i = 0; i < 2 * kStep; ++i) {
          const float* pair = &sums.sums[first + i / 2][group][i % 2 * 2];
          centred[i] = make_float2(pair[0] - means[0], pair[1] - means[1]);
        }
#pragma unroll
        for (int i = 0; i < 2 * kStep; ++i) {
          float* to_pair = to_rows + (first * 16 + 8 * i) * P::kRows;
          *reinterpret_cast<float2*>(to_pair) = centred[i];
        }
      }
    }
  }
};

// Maximum floats per row of a tile's partials: sums, softmax state, the means of up to 8 warps.
constexpr int partial_floats(int channels) { return channels + 10; }

// Partials per tile of an image, or of a split of it, for the rows of one pass.
template <class P>
class TilePartials {
 public:
  __device__ static int64_t floats(int channels) {
    return int64_t{P::kRows} * (channels + kRowStats);
  }

  // memory: floats(channels) per tile; null if no blocks share an image.
  __device__ TilePartials(float* memory, int channels) : memory_(memory), channels_(channels) {}

  __device__ explicit operator bool() const { return memory_ != nullptr; }

  // Called by every warp of the tile's group, for its slice of the channels.
  __device__ void store(int tile, const WarpSums<P>& sums, Slice slice) const {
    sums.store(sums_of(tile), channels_, slice);
    if (lane_index() % 4) return;
    for (int group = 0; group < P::kRowGroups; ++group) {
      float* row_stats = row_stats_of(tile, 8 * group + lane_index() / 4);
      row_stats[2 + P::group_lane(channels_)] = sums.mean[group];
    }
  }

  // states[group] is that of row 8 group + g. Only the first warp of the group stores it.
  __device__ void store(int tile, const SoftmaxState (&states)[P::kRowGroups]) const {
    if (lane_index() % 4 || P::group_lane(channels_)) return;
    for (int group = 0; group < P::kRowGroups; ++group) {
      float* row_stats = row_stats_of(tile, 8 * group + lane_index() / 4);
      *reinterpret_cast<float2*>(row_stats) = make_float2(states[group].peak, states[group].total);
    }
  }

  __device__ SoftmaxState state(int tile, int row) const {
    const float2 pair = *reinterpret_cast<const float2*>(row_stats_of(tile, row));
    return {pair.x, pair.y};
  }
  // Of the channel and the next.
  __device__ float2 sums(int tile, int row, int channel) const {
    return *reinterpret_cast<const float2*>(sums_of(tile) + row * channels_ + channel);
  }
  // The means' contribution from the warp that had the channel.
  __device__ float mean(int tile, int row, int channel) const {
    const int group_lane = Slice::lane_of(channels_, channel, P::group_warps(channels_));
    return row_stats_of(tile, row)[2 + group_lane];
  }

 private:
  static constexpr int kRowStats = round_up(2 + P::kMaxGroupWarps, 2);

  __device__ float* sums_of(int tile) const { return memory_ + tile * floats(channels_); }
  __device__ float* row_stats_of(int tile, int row) const {
    return sums_of(tile) + P::kRows * channels_ + row * kRowStats;
  }

  float* memory_;
  int channels_;
};

// A callback of a pass that does nothing.
struct Nothing {
  __device__ void operator()() const {}
};

// Base class of one block's pass over a range of an image's tokens. kStateFloats: per row of a warp
// group's partials, besides its sums; kBlockBytes and kWarpBytes: a derived pass's shared memory.
// kAlone: of attention_core itself. The fusion's kernels have no registers for what that adds.
template <class P, bool kAlone, int kSets, int kStateFloats, int kBlockBytes, int kWarpBytes>
class TokenPass {
 public:
  using T = typename P::Element;
  using Ring = TileRing<P, kAlone>;

  static constexpr int kBytesOfWarp = kWarpBytes;
  static constexpr int kRowsOfPass = P::kRows;
  // Where a warp has whole tiles, it stores its partials to its ring, and waits for no other: but
  // for the core's backward, which then takes longer.
  static constexpr bool kPartialsInRings = !P::kWarpsShareTiles && (!kAlone || kSets == 1);

  // Of the warp groups' partials: the first one's place in memory, in bytes, and what lies between
  // one and the next, in floats.
  __host__ __device__ static int partials_offset(int channels) {
    return kPartialsInRings ? rows_bytes(channels) : 0;
  }
  __host__ __device__ static int partials_stride(int channels) {
    return kPartialsInRings ? Ring::stride(channels) / static_cast<int>(sizeof(float))
                            : group_floats(channels);
  }

  // The shared memory that a pass needs, in bytes.
  __host__ __device__ static int bytes(int channels, int warp_groups, int second_stages = 0) {
    return Layout::of(channels, warp_groups, second_stages).end;
  }

  // [kSets, kRows, row_pitch]: u, or dm and u, to be written by the caller before run(), with zeros
  // in unused rows.
  __device__ T* rows() const { return rows_; }

  // Takes rows that lie elsewhere, with the same pitch.
  __device__ void use_rows(T* rows) {
    static_assert(kPartialsInRings);
    rows_ = rows;
    scores_.use_rows(rows);
  }

  // Writes the rows of a set, u, or dm and u, for all threads. visit: see WarpRowLoads; the sums
  // are those of whole rows.
  template <class Loads, class Visit, class... Others>
  __device__ void write_rows(int set, const Loads& loads, Visit visit, const Others&... others) {
    const auto add_up = [&](int i, auto& sums) {
      for (float& sum : sums) sum = sum_of_warp(sum);
      if constexpr (!P::kWarpsShareTiles) {
        if (lane_index() == 0) scores_.set_row_sum(set, Loads::row(i), sums[0]);
      }
      visit(i, sums);
    };
    loads.write(rows_ + set * P::kRows * P::row_pitch(channels_), add_up, others...);
    if constexpr (TileScores<P, kSets, kAlone>::kOnesInMemory) {
      T* ones = rows_ + P::kRows * P::row_pitch(channels_);
      for (int c = 2 * thread_index(); c < channels_; c += 2 * block_threads()) {
        store_pair(ones + c, pack<T>(1, 1));
      }
    }
  }
  // Starts the first copies. The rows and the extra token need not be written yet.
  __device__ void start(const Image<T>& x, const Range& range) { ring_.fill(x, range); }

  // The same in two steps: a tile of each warp, those of other blocks of the multiprocessor too,
  // comes before the second of any.
  __device__ void start_first(const Image<T>& x, const Range& range) { ring_.copy(x, range, 0); }
  __device__ void start_others(const Image<T>& x, const Range& range) { ring_.fill(x, range, 1); }

  // The same for the next image: what has room beside this one's sums, and the rest once those have
  // been read.
  __device__ void start_early(const Image<T>& x, const Range& range) {
    if (ring_.stages() > 1) ring_.copy(x, range, 0);
  }
  __device__ void start_rest(const Image<T>& x, const Range& range) {
    ring_.fill(x, range, ring_.stages() - 1);
  }

 protected:
  __host__ __device__ static int rows_bytes(int channels) {
    const int rows = kSets * P::kRows + TileScores<P, kSets, kAlone>::kOnesInMemory;
    return rows * P::row_pitch(channels) * static_cast<int>(sizeof(T));
  }

  // Shared memory, as byte offsets. Rows and rings come first; at the end the warp groups' partials
  // overwrite them, or with kPartialsInRings the rings alone, whose tiles are larger.
  struct Layout {
    int rings, scores, block_data, warp_data, end;

    __host__ __device__ static Layout of(int channels, int warp_groups, int second_stages) {
      const int warps = warp_groups * P::group_warps(channels);
      const int partials = warp_groups * group_floats(channels) * static_cast<int>(sizeof(float));
      Layout layout;
      layout.rings = rows_bytes(channels);
      const int rings = Ring::bytes(channels, warps, second_stages);
      layout.scores = maximum(layout.rings + rings, kPartialsInRings ? 0 : partials);
      layout.block_data =
          layout.scores + TileScores<P, kSets, kAlone>::bytes(channels, warp_groups);
      layout.warp_data = layout.block_data + kBlockBytes;
      layout.end = layout.warp_data + warps * kWarpBytes;
      return layout;
    }
  };

  // memory: 16-byte aligned.
  __device__ TokenPass(char* memory, const Layout& layout, int channels, float eps, bool normalize,
                       int second_stages)
      : rows_(reinterpret_cast<T*>(memory)),
        channels_(channels),
        slice_(Slice::of(channels, P::group_lane(channels), P::log2_group_warps(channels))),
        ring_(memory + layout.rings, channels, slice_, second_stages),
        scores_(memory + layout.scores, rows_, channels, slice_, eps, normalize),
        weight_unit_(weight_unit<T>(normalize ? eps : 1.0f)),
        inverse_unit_(1.0f / weight_unit_) {}

  __device__ static Layout layout_of(int channels, int second_stages = 0) {
    return Layout::of(channels, P::warp_groups(channels), second_stages);
  }

  // Row pitch of a warp group's partials, which puts the rows of a fragment in different banks.
  // A pass of its own has room for whole groups of units.
  __host__ __device__ static int sums_pitch(int channels) {
    const int unit = P::kWarpsShareTiles ? 16 : 16 * P::kUnitGroup;
    return (kAlone ? round_up(channels, unit) : channels) + 4;
  }
  // Floats of a warp group's partials: sums of its rows, then a state for each.
  __host__ __device__ static int group_floats(int channels) {
    return P::kRows * (sums_pitch(channels) + kStateFloats);
  }
  // The partials of a group's tiles, which warp group `group ^ range.swap` has.
  __device__ float* group_sums(const Range& range, int group) const {
    const int place = (group ^ range.swap) * partials_stride(channels_);
    char* first = reinterpret_cast<char*>(rows_) + partials_offset(channels_);
    return reinterpret_cast<float*>(first) + place;
  }

  // Adds up the tiles' partials in this block's share of the channels, for rows [0, count) of each
  // warp group, as a block that has all tiles would in registers: calls visit(warp_group, row,
  // channel, sums) with the Sums of a channel and the next. Called by all threads.
  template <class Sums, class Visit>
  __device__ void for_each_gathered(const TilePartials<P>& tiles, int count, const Range& range,
                                    Visit visit) const {
    constexpr int kItems = kHasFewRegisters<T> ? 1 : 2, kTiles = 4;  // whose loads are in flight
    const int warp_groups = P::warp_groups(channels_), num_tiles = P::tiles_of(range);
    const int items = warp_groups * count;
#pragma unroll 1
    for (int first = warp_index(); first < items; first += kItems * block_warps()) {
#pragma unroll 1
      for (int channel = first_in_share(range) + 2 * lane_index(); channel < last_in_share(range);
           channel += 64) {
        Sums sums[kItems];
#pragma unroll 1
        for (int begin = 0; begin < num_tiles; begin += kTiles * warp_groups) {
          Sums added[kItems][kTiles];
#pragma unroll
          for (int i = 0; i < kItems * kTiles; ++i) {
            const int item = first + i / kTiles * block_warps();
            const int tile = begin + i % kTiles * warp_groups + item / count;
            if (item < items && tile < num_tiles) {
              added[i / kTiles][i % kTiles].load(tiles, tile, item % count, channel);
            }
          }
#pragma unroll
          for (int i = 0; i < kItems * kTiles; ++i) {
            sums[i / kTiles].add(added[i / kTiles][i % kTiles]);
          }
        }
#pragma unroll
        for (int i = 0; i < kItems; ++i) {
          const int item = first + i * block_warps();
          if (item < items) visit(item / count, item % count, channel, sums[i]);
        }
      }
    }
  }

  // This block's share of the channels. Of several blocks there is a power of two.
  __device__ int first_in_share(const Range& range) const {
    return channels_ * range.rank >> log2_of(range.ranks);
  }
  __device__ int last_in_share(const Range& range) const {
    return channels_ * (range.rank + 1) >> log2_of(range.ranks);
  }

  T* rows_;
  int channels_;
  Slice slice_;
  Ring ring_;
  TileScores<P, kSets, kAlone> scores_;
  float weight_unit_;  // a power of two
  float inverse_unit_;
  WarpSums<P> sums_;
};

}  // namespace crossvit::attention_core
