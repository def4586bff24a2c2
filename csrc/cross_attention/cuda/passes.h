#pragma once

#include "attention_core/cuda/backward_pass.h"
#include "attention_core/cuda/forward_pass.h"
#include "cross_attention/cuda/rows.h"

// The token passes of attention_core with the fusion's own ways to add up a block's partials, and
// those of blocks that share an image: four channels a thread, in all threads.

namespace crossvit::cross_attention {

using attention_core::ForwardPass;
using attention_core::Range;
using attention_core::RowTotal;
using attention_core::SoftmaxState;
using attention_core::TilePartials;

// This block's share of the channels of an image.
struct ChannelShare {
  int first, last;

  __device__ static ChannelShare of(int channels, const Range& range) {
    const int quads = channels / 4, log = log2_of(range.ranks);
    return {4 * (quads * range.rank >> log), 4 * (quads * (range.rank + 1) >> log)};
  }
};

// Adds up the tiles' partials in this block's share of the channels, for rows [0, count) of each
// warp group, as a block that has all tiles would in registers: calls visit(warp_group, row,
// channel, sums) with the Sums of a channel and the next three. Called by all threads.
template <class P, class Sums, class Visit>
__device__ __forceinline__ void for_each_gathered(const TilePartials<P>& tiles, int channels,
                                                  int count, const Range& range, Visit visit) {
  using T = typename P::Element;
  constexpr int kTiles = sizeof(T) == 4 ? 2 : 4;  // whose loads are in flight
  const int warp_groups = P::warp_groups(channels), num_tiles = P::tiles_of(range);
  const ChannelShare share = ChannelShare::of(channels, range);
  // A thread's quads are a power of two apart, as are its sums: divisions are slow.
  const int quads = (share.last - share.first) / 4, log_groups = log2_of(warp_groups);
  int log_quads = 0;
  while (quads > 1 << log_quads) ++log_quads;
#pragma unroll 1
  for (int item = thread_index(); item < warp_groups * count << log_quads;
       item += block_threads()) {
    const int quad = item & ((1 << log_quads) - 1), rest = item >> log_quads;
    const int warp_group = rest & (warp_groups - 1), row = rest >> log_groups;
    const int channel = share.first + 4 * quad;
    if (quad >= quads) continue;
    Sums sums;
#pragma unroll 1
    for (int begin = warp_group; begin < num_tiles; begin += kTiles * warp_groups) {
      Sums added[kTiles];
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        const int tile = begin + i * warp_groups;
        if (tile < num_tiles) added[i].load(tiles, tile, row, channel);
      }
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        if (begin + i * warp_groups < num_tiles) sums.add(added[i]);
      }
    }
    visit(warp_group, row, channel, sums);
  }
}

// A tile's sums of four channels.
struct TileSums {
  float4 sums = {0, 0, 0, 0};
  float mean = 0;

  template <class P>
  __device__ void load(const TilePartials<P>& tiles, int tile, int row, int channel) {
    const float2 low = tiles.sums(tile, row, channel), high = tiles.sums(tile, row, channel + 2);
    sums = make_float4(low.x, low.y, high.x, high.y);
    mean = tiles.mean(tile, row, P::kMaxGroupWarps == 1 ? 0 : channel);
  }
};

// Calls visit(c) for a row's share of the channels. Called by a warp.
template <class Visit>
__device__ __forceinline__ void for_each_channel(const ChannelShare& share, Visit visit) {
#pragma unroll 1
  for (int c = share.first + 4 * lane_index(); c < share.last; c += 128) visit(c);
}

// A block's partials at the end of a pass: of each warp group, sums of rows and kStateFloats for
// each of them.
template <class Pass, int kStateFloats>
struct Partials {
  char* memory;
  int channels;

  __device__ int pitch() const { return channels + 4; }  // TokenPass::sums_pitch
  __device__ float* of(int warp_group) const {
    return reinterpret_cast<float*>(memory + Pass::partials_offset(channels)) +
           warp_group * Pass::partials_stride(channels);
  }
  __device__ float* of(int warp_group, int row) const { return of(warp_group) + row * pitch(); }
  __device__ float* state(int warp_group, int row) const {
    return of(warp_group, Pass::kRowsOfPass) + row * kStateFloats;
  }
};

template <class P>
class ForwardTokens : public ForwardPass<P> {
  static constexpr int kGroups = P::kMaxThreads / 32;

 public:
  __device__ ForwardTokens(char* memory, int channels, float eps, bool normalize, int second_stages)
      : ForwardPass<P>(memory, channels, eps, normalize, second_stages),
        partials_{memory, channels},
        inverse_unit_(1.0f / attention_core::weight_unit<typename P::Element>(eps)) {}

  // After run() in all blocks that share the image: forms the partials that a block with all tiles
  // would have stored, for rows [0, count) and this block's share of the channels. Called by all
  // threads.
  __device__ void gather(const TilePartials<P>& tiles, int count, const Range& range) {
    const int first = ChannelShare::of(partials_.channels, range).first;
    for_each_gathered<P, Gathered>(
        tiles, partials_.channels, count, range,
        [&](int warp_group, int row, int channel, const Gathered& gathered) {
          store_quad(partials_.of(warp_group, row) + channel,
                     gathered.tile.sums - gathered.tile.mean);
          if (channel == first) *group_state(warp_group, row) = gathered.state;
        });
    __syncthreads();
  }

  // After run() or gather(), for rows [0, count) and this block's share of the channels: calls
  // write(row, channel, m) with four channels; also calls write_total(row, total) once for each row
  // of the image.
  template <class Write, class WriteTotal>
  __device__ void results(int count, const Range& range, Write write,
                          WriteTotal write_total) const {
    const int channels = partials_.channels, warp_groups = P::warp_groups(channels);
    const ChannelShare share = ChannelShare::of(channels, range);
    // By a warp that has no row if there are fewer rows than warps.
    if (share.first == 0 && warp_index() + 1 == block_warps() && lane_index() < count) {
      float decays[kGroups];
      write_total(lane_index(), total_of(lane_index(), warp_groups, decays));
    }
#pragma unroll 1
    for (int row = warp_index(); row < count; row += block_warps()) {
      float factors[kGroups];
      const float inverse = total_of(row, warp_groups, factors).inverse * inverse_unit_;
#pragma unroll
      for (float& factor : factors) factor *= inverse;
      constexpr int kQuads = sizeof(typename P::Element) == 4 ? 1 : 3;  // in flight
#pragma unroll 1
      for (int first = share.first + 4 * lane_index(); first < share.last; first += 128 * kQuads) {
        float4 sums[kQuads][kGroups];
#pragma unroll
        for (int i = 0; i < kGroups; ++i) {
#pragma unroll
          for (int j = 0; j < kQuads; ++j) {
            // Beyond the last group its sums, times 0; beyond the share its first channels.
            const int c = first + 128 * j < share.last ? first + 128 * j : first;
            sums[j][i] = load_quad(partials_.of(minimum(i, warp_groups - 1), row) + c);
          }
        }
#pragma unroll
        for (int j = 0; j < kQuads; ++j) {
          float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll
          for (int i = 0; i < kGroups; ++i) sum = fma_quad(sums[j][i], factors[i], sum);
          if (first + 128 * j < share.last) write(row, first + 128 * j, sum);
        }
      }
    }
  }

 private:
  // Sums of tiles' partials.
  struct Gathered {
    SoftmaxState state;
    TileSums tile;

    __device__ void load(const TilePartials<P>& tiles, int number, int row, int channel) {
      state = tiles.state(number, row);
      tile.load(tiles, number, row, channel);
    }
    __device__ void add(const Gathered& other) {
      const attention_core::Scales scales = join(state, other.state);
      const auto add = [&](float& sum, float added) { sum = scales.join(sum, added); };
      add(tile.sums.x, other.tile.sums.x), add(tile.sums.y, other.tile.sums.y);
      add(tile.sums.z, other.tile.sums.z), add(tile.sums.w, other.tile.sums.w);
      add(tile.mean, other.tile.mean);
    }
  };

  __device__ RowTotal total_of(int row, int warp_groups, float (&decays)[kGroups]) const {
    return attention_core::total_of_groups(warp_groups, decays,
                                           [&](int i) { return *group_state(i, row); });
  }

  __device__ SoftmaxState* group_state(int warp_group, int row) const {
    return reinterpret_cast<SoftmaxState*>(partials_.state(warp_group, row));
  }

  Partials<ForwardPass<P>, sizeof(SoftmaxState) / sizeof(float)> partials_;
  float inverse_unit_;
};

template <class P>
class BackwardTokens : public attention_core::BackwardPass<P> {
 public:
  __device__ BackwardTokens(char* memory, int channels, float eps, bool normalize,
                            int second_stages)
      : attention_core::BackwardPass<P>(memory, channels, eps, normalize, second_stages),
        partials_{memory, channels},
        inverse_unit_(1.0f / attention_core::weight_unit<typename P::Element>(eps)) {}

  // See ForwardTokens.
  __device__ void gather(const TilePartials<P>& tiles, int count, const Range& range) {
    for_each_gathered<P, Gathered>(
        tiles, partials_.channels, count, range,
        [&](int warp_group, int row, int channel, const Gathered& gathered) {
          store_quad(partials_.of(warp_group, row) + channel, gathered.sums - gathered.mean);
        });
    __syncthreads();
  }

  // After run() or gather(), for rows [0, count) and this block's share of the channels: calls
  // write(row, channel, du) with four channels.
  template <class Write>
  __device__ void results(int count, const Range& range, Write write) const {
    const int channels = partials_.channels, warp_groups = P::warp_groups(channels);
    const ChannelShare share = ChannelShare::of(channels, range);
#pragma unroll 1
    for (int row = warp_index(); row < count; row += block_warps()) {
      for_each_channel(share, [&](int c) {
        float4 sum = {0, 0, 0, 0};
#pragma unroll 4
        for (int i = 0; i < warp_groups; ++i) {
          sum = sum + load_quad(partials_.of(i, row) + c);
        }
        write(row, c, sum * inverse_unit_);
      });
    }
  }

 private:
  struct Gathered : TileSums {
    __device__ void add(const Gathered& other) {
      sums = sums + other.sums;
      mean += other.mean;
    }
  };

  Partials<attention_core::BackwardPass<P>, 0> partials_;
  float inverse_unit_;
};

}  // namespace crossvit::cross_attention
