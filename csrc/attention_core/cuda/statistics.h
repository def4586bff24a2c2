#pragma once

#include "attention_core/cuda/plan.h"

// LayerNorm's statistics of a tile's tokens.

namespace crossvit::attention_core {

// Statistics of a lane's four tokens of a tile: 2 t, 2 t + 1, 2 t + 8 and 2 t + 9.
struct TokenStatistics {
  float mean[4];
  float signed_rstd[4];  // negative if a token's channels are all the same, 0 if it is unattended
  float centre[4];       // what float tokens are relative to in products

  __device__ float rstd(int i) const { return fabsf(signed_rstd[i]); }

  // rstd as a factor of weights. A half cannot hold that of most constant tokens, but their xhat,
  // which it multiplies, is 0.
  __device__ float factor(int i) const { return fmaxf(signed_rstd[i], 0.0f); }
};

__device__ __forceinline__ int nth_token(int i) {
  return lane_index() % 4 * 2 + (i & 1) + (i >> 1) * 8;
}

// Statistics of tokens g and g + 8 over a warp's slice of the channels: the mean, the sum of
// squared deviations from it, and the centre that the sums were relative to. Token g's owner, the
// lane that has it among its four, knows them.
struct SliceStatistics {
  float mean[2];
  float squares[2];
  float centre[2];

  __device__ static bool is_owner() { return lane_index() / 8 == lane_index() % 4; }

  // From deviations from the centre: their sum over the slice, their mean, the sum of squares.
  __device__ void set(int i, float deviations, float offset, float sum_of_squares, float centre_) {
    const float from_mean = fmaf(-deviations, offset, sum_of_squares);
    centre[i] = centre_;
    mean[i] = centre_ + offset;
    squares[i] = from_mean < 0 ? 0 : from_mean;  // NaN stays
  }

  // Whether a sum of squares from 0 leaves too few digits of the variance, as the mean's square is
  // larger by this factor, or none, as both are infinite or NaN. Half has more digits to lose.
  template <class T>
  __device__ bool cancels(int i, float width) const {
    constexpr float kFactor = std::is_same_v<T, half> ? 256 : 1024;
    constexpr float kTiny = 0x1p-126f;  // for tokens of zeros, as those beyond the last one are
    return !(mean[i] * mean[i] * width < fmaf(kFactor, squares[i], kTiny));
  }
};

// Gives each lane the value of its i-th token, from the lane that owns it.
__device__ __forceinline__ float from_owner(const float (&values)[2], int i) {
  return __shfl_sync(~0u, values[i >> 1], lane_index() % 4 * 9 + (i & 1) * 4);
}

// Of a product's two columns, which are tokens, the one that the lane owns if it owns any.
__device__ __forceinline__ float own_column(const float* columns) {
  return lane_index() / 4 % 2 ? columns[1] : columns[0];
}

// The sums of squares of 8 tokens' channels, as diagonals of products x x^T of half the usual
// depth: a B of 16 channels is the A of two such products without a move, of which one has the
// first eight channels' diagonal in its upper rows, the other one that of the rest in its lower
// rows.
struct Squares {
  float upper[4] = {}, lower[4] = {};

  template <class T>
  __device__ __forceinline__ void add(const FragmentB<T>& x) {
    mma_16x8x8<T>(upper, x.pair, x.pair[0]);
    mma_16x8x8<T>(lower, x.pair, x.pair[1]);
  }
  // Of the token that the lane owns if it owns any.
  __device__ float own() const { return own_column(upper) + own_column(lower + 2); }
};

// Sets the statistics of tokens whose squares cancel, from deviations from the mean, rounded.
// Within a factor of two of it, where all channels but one must be, deviations are exact. own_sums:
// of the lane's tokens.
template <class T>
__device__ void set_from_means(SliceStatistics& statistics, const T* tile, int pitch,
                               const Slice& slice, const float (&own_sums)[2]) {
  const Pair<T> own = pack<T>(statistics.mean[0], statistics.mean[1]);
  const Pair<T> of_row = __shfl_sync(~0u, own, (lane_index() & ~3) + lane_index() / 8);
  const Pair<T> centre[2] = {__byte_perm(of_row, of_row, 0x1010),
                             __byte_perm(of_row, of_row, 0x3232)};
  Squares squares[2];
  slice.template for_each_unit<1>([&](int unit) {
    const ColumnsOfB<T> x = load_columns(tile + unit * 16, pitch);
    for (int side = 0; side < 2; ++side) {
      FragmentB<T> d = x.side[side];
      for (Pair<T>& pair : d.pair) pair = subtract<T>(pair, centre[side]);
      squares[side].add(d);
    }
  });
  const float width = static_cast<float>(slice.units * 16);
  for (int i = 0; i < 2; ++i) {
    if (!statistics.template cancels<T>(i, width)) continue;
    const float own_centre = unpack<T>(centre[i]).x;
    const float deviations = fmaf(-width, own_centre, own_sums[i]);
    statistics.set(i, deviations, deviations / width, squares[i].own(), own_centre);
  }
}

}  // namespace crossvit::attention_core
