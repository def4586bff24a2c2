#pragma once

#include "attention_core/cuda/statistics.h"

// The operands of a product over a tile's tokens: their weights, and the tokens transposed.

namespace crossvit::attention_core {

// A power of two that weights of type half are multiplied by, and sums over tokens divided by: 1 /
// standard deviation is up to 1 / sqrt(eps), which may be more than a half can hold. 1 down to an
// eps of 2^-30, and for other types.
template <class T>
__device__ inline float weight_unit(float eps) {
  if constexpr (std::is_same_v<T, half>) {
    return exp2f(fmaxf(fminf(15 + floorf(0.5f * log2f(eps)), 0.0f), -14.0f));
  } else {
    return 1;
  }
}

// B of a product over a tile's tokens: weights[i] of row g and the i-th of the lane's tokens.
template <class T>
__device__ __forceinline__ FragmentB<T> weights_as_b(const float (&weights)[4]) {
  return {pack<T>(weights[0], weights[1]), pack<T>(weights[2], weights[3])};
}

// The same, which rounds the weights to what it holds.
template <class T>
__device__ __forceinline__ FragmentB<T> round_as_b(float (&weights)[4]) {
  const FragmentB<T> b = weights_as_b<T>(weights);
  for (int side = 0; side < 2; ++side) {
    const float2 held = unpack<T>(b.pair[side]);
    weights[2 * side] = held.x, weights[2 * side + 1] = held.y;
  }
  return b;
}

// A transposed tile, 16 channels by 16 tokens, centred where the type requires it.
template <class T>
__device__ __forceinline__ FragmentA<T> channels_by_tokens(const T* tile, int pitch,
                                                           const TokenStatistics& stats) {
  FragmentA<T> x = load_transposed(tile, pitch);
  if constexpr (sizeof(T) == 4) {
    for (int i = 0; i < 4; ++i) {
      const int first = i >> 1 << 1;
      x.pair[i].x -= stats.centre[first];
      x.pair[i].y -= stats.centre[first + 1];
    }
  }
  return x;
}

}  // namespace crossvit::attention_core
