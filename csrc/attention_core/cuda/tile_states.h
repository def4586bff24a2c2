#pragma once

#include "attention_core/cuda/plan.h"

// Images whose tiles several blocks share. What a tile adds to a sum is formed on its own, and then
// added: a block that has all tiles adds in registers; blocks that share an image leave what each
// tile gives in memory, and add in the order in which the one block does, so that a result's bits
// do not tell how many blocks there were.

namespace crossvit::attention_core {

// Softmax over some of a row's tokens. Peaks are to the base 2.
struct SoftmaxState {
  float peak = -INFINITY;  // where nothing is attended to
  float total = 0;
};

// What sums formed with two states are multiplied by when the states become one.
struct Scales {
  float old, added;

  __device__ float join(float sum, float other) const { return fmaf(other, added, sum * old); }
};

__device__ inline Scales join(SoftmaxState& state, const SoftmaxState& other) {
  const float peak = fmaxf(state.peak, other.peak);
  const float finite = peak == -INFINITY ? 0.0f : peak;
  const Scales scales = {exp2f(state.peak - finite), exp2f(other.peak - finite)};
  state.total = scales.join(state.total, other.total);
  state.peak = peak;
  return scales;
}

// Floats that a tile leaves for a score row, at most: sums, state, the means of up to 8 warps.
constexpr int tile_state_floats(int channels) { return channels + 10; }

// The tiles of one image, or of a part of it, and of one pass's score rows.
template <class P>
class TileStates {
 public:
  __device__ static int64_t floats(int channels) {
    return int64_t{P::kRows} * (channels + kNumbers);
  }

  // memory: floats(channels) a tile; null where no block shares an image.
  __device__ TileStates(float* memory, int channels) : memory_(memory), channels_(channels) {}

  __device__ explicit operator bool() const { return memory_ != nullptr; }

  // Each warp of the tile's team leaves its slice of the channels.
  __device__ void leave(int tile, const WarpSums<P>& sums, Slice slice) const {
    sums.template leave<false>(sums_of(tile), channels_, slice);
    if (lane_index() % 4) return;
    for (int group = 0; group < P::kGroups; ++group) {
      numbers_of(tile, 8 * group + lane_index() / 4)[2 + P::part(channels_)] = sums.mean[group];
    }
  }

  // The team's first warp does; states are of row 8 group + g.
  __device__ void leave(int tile, const SoftmaxState (&states)[P::kGroups]) const {
    if (lane_index() % 4 || P::part(channels_)) return;
    for (int group = 0; group < P::kGroups; ++group) {
      float* numbers = numbers_of(tile, 8 * group + lane_index() / 4);
      numbers[0] = states[group].peak;
      numbers[1] = states[group].total;
    }
  }

  __device__ SoftmaxState state(int tile, int row) const {
    const float* numbers = numbers_of(tile, row);
    return {numbers[0], numbers[1]};
  }
  __device__ float sum(int tile, int row, int channel) const {
    return sums_of(tile)[row * channels_ + channel];
  }
  // What the tokens' means add in the warp that had the channel.
  __device__ float mean(int tile, int row, int channel) const {
    return numbers_of(tile, row)[2 + Slice::part_of(channels_, channel, P::split(channels_))];
  }

 private:
  static constexpr int kNumbers = 2 + P::kMostSplit;

  __device__ float* sums_of(int tile) const { return memory_ + tile * floats(channels_); }
  __device__ float* numbers_of(int tile, int row) const {
    return sums_of(tile) + P::kRows * channels_ + row * kNumbers;
  }

  float* memory_;
  int channels_;
};

// The channels that one of the blocks that share an image adds up.
struct ChannelShare {
  int first, last;

  __device__ static ChannelShare of(int channels, const Range& range) {
    return {channels * range.rank / range.ranks, channels * (range.rank + 1) / range.ranks};
  }
};

}  // namespace crossvit::attention_core
