#pragma once

#include "attention_core/params.h"
#include "common/cuda/async_copy.h"
#include "common/cuda/fragments.h"

// How a block passes over a range of an image's tokens.
//
// A tile is 16 tokens. It belongs to a warp group, each warp of which has its own slice of the
// channels, in units of 16, and its own ring of tiles in shared memory, filled by asynchronous
// copies. Tiles go to the warp groups round-robin. A group of one warp synchronizes with others
// only at the end of the range, where their sums are added in a fixed order; the warps of a larger
// group exchange partial scores once per tile. A block's warps form as many groups as they can.
//
// Kernels are compiled per plan, which takes seconds each, so a plan serves several widths: the
// warps of a group follow from the channels, within the plan's limits.

namespace crossvit::attention_core {

constexpr int kTileTokens = 16;
constexpr int kAnyChannels = 1 << 30;

// Tokens [first, last) of an image. Tiles go round-robin to the `ranks` blocks that share it.
struct Range {
  int first, last;
  int rank = 0, ranks = 1;
  // Warp group i has the tiles and sums of group i ^ swap. The first groups may have a tile more:
  // they should not share a scheduler with those of another block of the multiprocessor.
  int swap = 0;
};

// The parameters that a kernel is compiled for, besides the element type.
struct PlanShape {
  int units;                             // of 16 channels per warp, at most
  int row_groups;                        // of 8 rows of u
  int min_group_warps, max_group_warps;  // powers of two
  int stages;                            // of a warp's ring of tiles
  int stage_channels = kAnyChannels;     // the widest tokens with so many: others have one stage
};

template <class T, int kUnits_, int kRowGroups_, int kMinGroupWarps_, int kMaxGroupWarps_,
          int kStages_, int kStageChannels_ = kAnyChannels>
struct Plan {
  using Element = T;
  static constexpr int kUnits = kUnits_;
  static constexpr int kRowGroups = kRowGroups_;
  static constexpr int kMinGroupWarps = kMinGroupWarps_;
  static constexpr int kMaxGroupWarps = kMaxGroupWarps_;
  static constexpr bool kWarpsShareTiles = kMaxGroupWarps > 1;
  static constexpr int kStages = kStages_;
  static constexpr int kTokens = kTileTokens;
  static constexpr int kRows = 8 * kRowGroups;
  static constexpr int kMaxThreads = 256;
  // At least as many as any launch has.
  static constexpr int kMaxWarpGroups =
      minimum(kMaxThreads / 32 / kMinGroupWarps, kUnits > 12 ? 4 : 6);
  // Of attention_core's own kernels: a block's threads at most, and blocks that registers must not
  // keep off a multiprocessor.
  static constexpr int kThreadsAlone = kWarpsShareTiles ? kMaxThreads : 32 * kMaxWarpGroups;
  static constexpr int kBlocksAlone = kWarpsShareTiles ? 1 : 2;
  // Units per iteration of loops whose results are not in registers.
  static constexpr int kUnroll = sizeof(T) == 4 ? 1 : kRowGroups > 1 ? 2 : 4;
  // Units whose loads are in flight together where results are in registers. Tiles are padded to
  // whole groups: what is read of the padding goes to sums that no one reads.
  static constexpr int kUnitGroup = sizeof(T) == 4 ? 2 : kUnits % 4 == 0 ? 4 : 3;
  static_assert(kUnits % kUnitGroup == 0);
  static constexpr int kMaxChannels = 16 * kUnits * kMaxGroupWarps;

  __host__ __device__ static int group_warps(int channels) {
    return 1 << log2_group_warps(channels);
  }
  __host__ __device__ static int log2_group_warps(int channels) {
    int log = 0;
    for (int warps = 1; warps < kMaxGroupWarps; warps *= 2) {
      log += warps < kMinGroupWarps || channels > 16 * kUnits * warps;
    }
    return log;
  }
  __host__ __device__ static int stages(int channels) {
    return kStageChannels_ < kMaxChannels && channels > kStageChannels_ ? 1 : kStages;
  }

  static int threads(int channels, int warp_groups) {
    return 32 * group_warps(channels) * warp_groups;
  }
  __device__ static int warp_groups(int channels) {
    return block_warps() >> log2_group_warps(channels);
  }
  __device__ static int warp_group(int channels) {
    return warp_index() >> log2_group_warps(channels);
  }
  // This warp's lane in its group.
  __device__ static int group_lane(int channels) {
    return warp_index() & (group_warps(channels) - 1);
  }

  // The group's tile in an iteration, counted from the start of the range.
  __device__ static int tile_of(int channels, const Range& range, int iteration) {
    const int tile = iteration * warp_groups(channels) + (warp_group(channels) ^ range.swap);
    return tile * range.ranks + range.rank;
  }
  __device__ static int tiles_of(const Range& range) {
    return ceil_div(range.last - range.first, kTokens);
  }
  // Its first token; range.last if there is no such tile. kLastFirst: tile 0 is the last tokens,
  // which may be fewer than 16. A warp has it besides as many tiles as the others have, and is done
  // with it while DRAM is busy with theirs.
  template <bool kLastFirst>
  __device__ static int token_of(int channels, const Range& range, int iteration) {
    int tile = tile_of(channels, range, iteration);
    if constexpr (kLastFirst) {
      const int tiles = tiles_of(range);
      if (tile >= tiles) return range.last;
      tile = tile == 0 ? tiles - 1 : tile - 1;
    }
    return range.first + tile * kTokens;
  }

  __device__ static void sync_warp_group(int channels) {
    barrier_of_warps(1 + warp_group(channels), 32 * group_warps(channels));
  }

  // Row pitch of a tile, in elements: 16 bytes of padding put 8 rows in different banks.
  __host__ __device__ static int tile_pitch(int channels) {
    const int units = (channels / 16 + group_warps(channels) - 1) >> log2_group_warps(channels);
    return round_up(units, kUnitGroup) * 16 + static_cast<int>(16 / sizeof(T));
  }
  // The same for rows of all channels.
  __host__ __device__ static int row_pitch(int channels) {
    return channels + static_cast<int>(16 / sizeof(T));
  }
};

template <class T, const PlanShape& kShape>
using PlanOf = Plan<T, kShape.units, kShape.row_groups, kShape.min_group_warps,
                    kShape.max_group_warps, kShape.stages, kShape.stage_channels>;

// The channels of one warp of a group.
struct Slice {
  int first;  // channel
  int units;

  __device__ static Slice of(int channels, int group_lane, int log2_group_warps) {
    const int total = channels / 16, begin = total * group_lane >> log2_group_warps;
    return {begin * 16, (total * (group_lane + 1) >> log2_group_warps) - begin};
  }

  // Calls visit(first, count) for groups of kCount units from `unit` on, and for the rest one at a
  // time; count is a constant. No branch keeps a group's loads apart.
  template <int kCount, class Visit>
  __device__ __forceinline__ void for_each_group(Visit visit, int unit = 0) const {
#pragma unroll 1
    for (; unit + kCount <= units; unit += kCount) {
      visit(unit, std::integral_constant<int, kCount>());
    }
    if constexpr (kCount > 1) {
#pragma unroll 1
      for (; unit < units; ++unit) visit(unit, std::integral_constant<int, 1>());
    }
  }

  // Calls visit(unit) in the same way.
  template <int kCount, class Visit>
  __device__ __forceinline__ void for_each_unit(Visit visit) const {
    for_each_group<kCount>([&](int first, auto count) {
#pragma unroll
      for (int i = 0; i < decltype(count)::value; ++i) visit(first + i);
    });
  }

  // Calls use(i, operands) for the i-th unit of a group, after load(operands, unit) for all of the
  // group; with kAhead for half a group, behind the loads for the next half.
  template <int kCount, bool kAhead, class Operands, class Load, class Use>
  __device__ __forceinline__ void for_each_loaded(Load load, Use use) const {
    const auto at_once = [&](int first, auto count) {
      constexpr int kUnits = decltype(count)::value;
      Operands all[kUnits];
#pragma unroll
      for (int i = 0; i < kUnits; ++i) load(all[i], first + i);
#pragma unroll
      for (int i = 0; i < kUnits; ++i) use(i, all[i]);
    };
    if constexpr (kAhead) {
      static_assert(kCount % 2 == 0);
      constexpr int kHalf = kCount / 2;
      Operands even[kHalf], odd[kHalf];
      if (units >= kCount) {
#pragma unroll
        for (int i = 0; i < kHalf; ++i) load(even[i], i);
      }
      int unit = 0;
#pragma unroll 1
      for (; unit + kCount <= units; unit += kCount) {
#pragma unroll
        for (int i = 0; i < kHalf; ++i) load(odd[i], unit + kHalf + i);
#pragma unroll
        for (int i = 0; i < kHalf; ++i) use(i, even[i]);
        const int next = minimum(unit + kCount, units - kHalf);  // the last ones for nothing
#pragma unroll
        for (int i = 0; i < kHalf; ++i) load(even[i], next + i);
#pragma unroll
        for (int i = 0; i < kHalf; ++i) use(kHalf + i, odd[i]);
      }
      for_each_group<1>(at_once, unit);
    } else {
      for_each_group<kCount>(at_once);
    }
  }

  // The group lane of the warp that has a channel.
  __device__ static int lane_of(int channels, int channel, int group_warps) {
    return ((channel / 16 + 1) * group_warps - 1) / (channels / 16);
  }
};

// One image's tokens; with has_extra, token 0 is apart from the others, in global or shared memory.
template <class T>
struct Image {
  const T* data;
  int64_t token_stride;
  const bool* mask;  // or null
  int64_t mask_stride;
  bool has_extra;
  const T* extra;

  __device__ const T* row(int token) const { return data + (token - has_extra) * token_stride; }

  __device__ bool is_attended(int token, int last) const {
    if (token >= last) return false;
    if (token < has_extra || !mask) return true;
    return mask[(token - has_extra) * mask_stride];
  }

  // A bit for each of the 16 tokens from `token` on, set if attended to; the same in all lanes.
  __device__ uint32_t attended_bits(int token, int last) const {
    if (!mask) return token + kTileTokens <= last ? 0xffffu : (1u << (last - token)) - 1;
    const int lane = lane_index();
    return __ballot_sync(~0u, lane < 16 && is_attended(token + lane, last));
  }
};

template <class T>
__device__ Image<T> image_of(const Tokens& x, const Mask& mask, int64_t image) {
  return {static_cast<const T*>(x.data) + image * x.batch_stride,
          x.token_stride,
          mask.data ? mask.data + image * mask.batch_stride : nullptr,
          mask.token_stride,
          x.extra != nullptr,
          static_cast<const T*>(x.extra) + image * x.extra_batch_stride};
}

// One warp's tiles, of its slice of the channels. Each copy of a tile must be waited for once. In a
// pass that is not alone, only the first `second_stages` of a block's warps have two stages, if the
// plan has them. The second stages lie behind all first ones, and come first: the next image's tile
// is copied there while the warp's sums lie in the first stage.
template <class P, bool kAlone>
class TileRing {
 public:
  using T = typename P::Element;

  static constexpr int kChunk = 16 / sizeof(T);  // elements in 16 bytes

  __host__ __device__ static int tile_bytes(int channels) {
    return P::kTokens * P::tile_pitch(channels) * static_cast<int>(sizeof(T));
  }
  // Between a warp's first tile and the next one's.
  __host__ __device__ static int stride(int channels) {
    return (kAlone ? P::stages(channels) : 1) * tile_bytes(channels);
  }
  // Of a block's rings.
  __host__ __device__ static int bytes(int channels, int warps, int second_stages) {
    return warps * stride(channels) + (kAlone ? 0 : second_stages * tile_bytes(channels));
  }

  // memory: of the block's rings.
  __device__ TileRing(char* memory, int channels, Slice slice, int second_stages)
      : memory_(reinterpret_cast<T*>(memory + warp_index() * stride(channels))),
        channels_(channels),
        pitch_(P::tile_pitch(channels)),
        second_stages_(second_stages),
        slice_(slice) {}

  __device__ int pitch() const { return pitch_; }
  __device__ T* memory() const { return memory_; }
  __device__ T* tile(int iteration) const {
    return memory_ + stage_of(iteration) * (P::kTokens * pitch_);
  }
  __device__ int stages() const {
    if constexpr (kAlone) return P::stages(channels_);
    return P::kStages > 1 && warp_index() < second_stages_ ? 2 : 1;
  }

  // Starts the copies of the warp group's first tiles, in stages from `begin` on.
  __device__ void fill(const Image<T>& x, const Range& range, int begin = 0) {
#pragma unroll 1
    for (int iteration = begin; iteration < stages(); ++iteration) {
      copy(x, range, iteration);
    }
  }

  // Starts the copy of the tile that replaces an iteration's.
  __device__ void copy_next(const Image<T>& x, const Range& range, int iteration) {
    copy(x, range, iteration + stages());
  }

  // Starts the copy of a tile, with zeros where a token is not attended to.
  __device__ void copy(const Image<T>& x, const Range& range, int iteration) {
    const int token = P::template token_of<kAlone>(channels_, range, iteration);
    if (token < range.last) copy_rows(x, iteration, token, range.last);
    copy_async_commit();
  }

  // Waits for the oldest in-flight tile, which must be this iteration's.
  __device__ void wait() {
    if (stages() == P::kStages) {
      copy_async_wait<P::kStages - 1>();
    } else {
      copy_async_wait<0>();
    }
    __syncwarp();
  }

  // Must be called after the last tile.
  __device__ void drain() { copy_async_wait<0>(); }

  // Writes the extra token to the first row of its tile.
  __device__ void write_extra(int iteration, const T* extra) {
    T* to = tile(iteration);
#pragma unroll 1
    for (int c = kChunk * lane_index(); c < slice_.units * 16; c += 32 * kChunk) {
      *reinterpret_cast<uint4*>(to + c) = *reinterpret_cast<const uint4*>(extra + slice_.first + c);
    }
    __syncwarp();
  }

 private:
  __device__ int stage_of(int iteration) const {
    if constexpr (kAlone) return P::stages(channels_) == P::kStages ? iteration % P::kStages : 0;
    return stages() > 1 && iteration % 2 == 0 ? block_warps() : 0;
  }

  // Eight lanes copy a row.
  __device__ void copy_rows(const Image<T>& x, int iteration, int token, int last) {
    constexpr int kLanes = 8, kRows = 32 / kLanes, kColumns = kLanes * kChunk;
    const uint32_t read = x.attended_bits(token, last) & ~(token < x.has_extra ? 1u : 0u);
    const int row = lane_index() / kLanes, column = lane_index() % kLanes * kChunk;
    const int width = slice_.units * 16 - column;
    T* to = tile(iteration) + row * pitch_ + column;
    const T* from = x.row(token + row) + slice_.first + column;
#pragma unroll
    for (int first = 0; first < P::kTokens; first += kRows) {
      const bool is_read = read >> (first + row) & 1;
      const T* from_row = is_read ? from : x.data;
#pragma unroll
      for (int c = 0; c < P::kUnits * 16; c += kColumns) {
        if (c < width) copy_async_16(to + c, from_row + c, is_read ? 16 : 0);
      }
      to += kRows * pitch_;
      from += kRows * x.token_stride;
    }
  }

  T* memory_;
  int channels_;
  int pitch_;
  int second_stages_;
  Slice slice_;
};

}  // namespace crossvit::attention_core
