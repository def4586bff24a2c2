#pragma once

#include "attention_core/cuda/plan.h"

namespace crossvit::attention_core {

constexpr float kLog2e = 1.4426950408889634f;

// Statistics of a lane's four tokens of a tile: 2 t, 2 t + 1, 2 t + 8 and 2 t + 9.
struct TokenStatistics {
  float mean[4];
  float rstd[4];
  float centre[4];
  uint32_t constant;  // bit i: all channels of token i are the same, so that its xhat is 0

  // rstd as a factor of weights, which a half cannot hold for most constant tokens.
  __device__ float factor(int i) const { return constant >> i & 1 ? 0.0f : rstd[i]; }
};

__device__ __forceinline__ int nth_token(int i) {
  return lane_index() % 4 * 2 + (i & 1) + (i >> 1) * 8;
}

// Sums over a warp's slice of tokens g and g + 8, relative to each token's first channel there. A
// mean far above the spread then costs no precision: the variance's relative error is at most about
// C times float's eps, whatever that channel holds.
struct TokenSums {
  float centre[2];
  float sum[2] = {0, 0};
  float squares[2] = {0, 0};

  __device__ void add(int token, float2 x) {
    const float first = x.x - centre[token], second = x.y - centre[token];
    sum[token] += first + second;
    squares[token] += first * first + second * second;
  }
};

// Writes rows [0, count) as tensor-core operands, and zeros to the others. Called by all threads.
template <class P>
__device__ void write_rows(typename P::Element* to, const float* from, int64_t stride, int count,
                           int channels) {
  using T = typename P::Element;
  const int pitch = P::row_pitch(channels);
#pragma unroll 1  // the loads of a channel's rows are in flight together
  for (int c = thread_index(); c < channels; c += block_threads()) {
    float values[P::kRows];
#pragma unroll
    for (int row = 0; row < P::kRows; ++row) {
      values[row] = row < count ? from[row * stride + c] : 0.0f;
    }
#pragma unroll
    for (int row = 0; row < P::kRows; ++row) to[row * pitch + c] = from_float<T>(values[row]);
  }
}

// Scores of a tile's tokens against kSets matrices of rows (u, or dm and u), with the statistics of
// LayerNorm from the same read.
template <class P, int kSets>
class TileScores {
 public:
  using T = typename P::Element;

  // Float tokens have no precision to spare: they are centred before the products.
  static constexpr bool kCentre = sizeof(T) == 4;
  static constexpr int kRows = P::kRows;
  static constexpr int kSums = kSets * kRows;
  // One warp's partials of a tile: three floats per token, and scores where warps share tiles.
  static constexpr int kScores = P::kWarpsShareTiles ? kSums * P::kTokens : 0;
  static constexpr int kFloats = 3 * P::kTokens + kScores;
  static constexpr int kBuffers = P::kWarpsShareTiles ? 2 : 1;

  __host__ __device__ static int bytes(int channels, int warp_groups) {
    const int floats = (warp_groups * kBuffers * kFloats + kSums) * P::group_warps(channels);
    return floats * static_cast<int>(sizeof(float));
  }

  // rows: [kSums, row_pitch] in shared memory.
  __device__ TileScores(char* memory, const T* rows, int channels, Slice slice, float eps,
                        bool normalize)
      : partials_(reinterpret_cast<float*>(memory)),
        row_sums_(partials_ + block_warps() * kBuffers * kFloats),
        rows_(rows),
        channels_(channels),
        slice_(slice),
        eps_(eps),
        normalize_(normalize) {}

  // Sums the rounded rows over each slice. Called by all threads; the caller then synchronizes.
  __device__ void sum_rows() {
    const int pitch = P::row_pitch(channels_);
    for (int i = warp_index(); i < P::group_warps(channels_) * kSums; i += block_warps()) {
      const int group_lane = i / kSums, row = i % kSums;
      const Slice slice = slice_of(group_lane);
      float sum = 0;
#pragma unroll 2
      for (int c = lane_index(); c < slice.units * 16; c += 32) {
        sum += to_float(rows_[row * pitch + slice.first + c]);
      }
      sum = sum_of_warp(sum);
      if (lane_index() == 0) row_sums_[i] = sum;
    }
  }

  // The sum of a row over all channels.
  __device__ float row_sum(int row) const {
    float sum = 0;
    for (int i = 0; i < P::group_warps(channels_); ++i) sum += row_sums_[i * kSums + row];
    return sum;
  }

  // Computes scores[set][group][i] of row 8 group + g and the i-th of the lane's tokens: those of
  // xhat, 0 if the token is not attended to. Synchronizes the warp group.
  __device__ void compute(const T* tile, int iteration, uint32_t attended,
                          float (&scores)[kSets][P::kRowGroups][4], TokenStatistics& stats) {
    float products[kSets][2][4] = {};  // of tokens 0 to 7 and 8 to 15
    const TokenSums sums = products_of_slice(tile, products);
    store_partials(partials_of(warp_index(), iteration), sums, products);
    P::sync_warp_group(channels_);
    combine_partials(iteration, attended, products, scores, stats);
  }

 private:
  __device__ float* partials_of(int warp, int iteration) const {
    return partials_ + (warp * kBuffers + iteration % kBuffers) * kFloats;
  }

  __device__ TokenSums products_of_slice(const T* tile, float (&products)[kSets][2][4]) const {
    const int g = lane_index() / 4, pitch = P::tile_pitch(channels_);
    const int row_pitch = P::row_pitch(channels_);
    TokenSums sums;
    for (int i = 0; i < 2; ++i) sums.centre[i] = to_float(tile[(g + 8 * i) * pitch]);
#pragma unroll P::kUnroll
    for (int unit = 0; unit < slice_.units; ++unit) {
      FragmentA<T> x = load_rows(tile + unit * 16, pitch);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 pair = unpack<T>(x.pair[i]);
        sums.add(i & 1, pair);
        if constexpr (kCentre) {
          if (normalize_) {
            const float centre = sums.centre[i & 1];
            x.pair[i] = pack<T>(pair.x - centre, pair.y - centre);
          }
        }
      }
#pragma unroll
      for (int set = 0; set < kSets; ++set) {
        const T* rows = rows_ + set * kRows * row_pitch + slice_.first + unit * 16;
        const FragmentA<T> a =
            P::kRowGroups == 1 ? load_8_rows(rows, row_pitch) : load_rows(rows, row_pitch);
        multiply(products[set][0], a, to_b(x, 0));
        multiply(products[set][1], a, to_b(x, 1));
      }
    }
    return sums;
  }

  // Stores each token's mean, squared deviations and centre, then the products.
  __device__ void store_partials(float* to, const TokenSums& sums,
                                 const float (&products)[kSets][2][4]) const {
    const int g = lane_index() / 4, t = lane_index() % 4, width = slice_.units * 16;
    for (int i = 0; i < 2; ++i) {
      const float sum = sum_of_row(sums.sum[i]), squares = sum_of_row(sums.squares[i]);
      if (t == 0) {
        float* to_token = to + g + 8 * i;
        to_token[0] = sums.centre[i] + sum / width;
        to_token[P::kTokens] = fmaxf(squares - sum * (sum / width), 0.0f);
        to_token[2 * P::kTokens] = sums.centre[i];
      }
    }
    if constexpr (P::kWarpsShareTiles) {
      for (int set = 0; set < kSets; ++set) {
        for (int group = 0; group < P::kRowGroups; ++group) {
          for (int side = 0; side < 2; ++side) {
            float* to_scores =
                to + 3 * P::kTokens + (set * kRows + 8 * group + g) * P::kTokens + 8 * side + 2 * t;
            const float* pair = &products[set][side][2 * group];
            *reinterpret_cast<float2*>(to_scores) = make_float2(pair[0], pair[1]);
          }
        }
      }
    }
  }

  // Adds up the partials of the group's warps in the order of their lanes.
  __device__ void combine_partials(int iteration, uint32_t attended,
                                   const float (&products)[kSets][2][4],
                                   float (&scores)[kSets][P::kRowGroups][4],
                                   TokenStatistics& stats) const {
    const int g = lane_index() / 4;
    const int group_lane = P::group_lane(channels_), group_warps = P::group_warps(channels_);
    constexpr int kWarpStride = kBuffers * kFloats;
    const float* partials = partials_of(warp_index() - group_lane, iteration);
    float mean[4], squares[4] = {};
    means_of_tile(partials, mean);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      stats.centre[i] = centre_of(partials + group_lane * kWarpStride, nth_token(i));
      stats.mean[i] = normalize_ ? mean[i] : 0.0f;
      for (int set = 0; set < kSets; ++set) {
        for (int group = 0; group < P::kRowGroups; ++group) scores[set][group][i] = 0;
      }
    }
#pragma unroll 1  // one warp's partials are enough loads in flight
    for (int warp = 0; warp < group_warps; ++warp, partials += kWarpStride) {
      const float* row_sums = row_sums_ + warp * kSums;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int token = nth_token(i);
        const float deviation = partials[token] - mean[i];
        const float between = P::kWarpsShareTiles ? deviation * deviation * width_of(warp) : 0.0f;
        squares[i] += partials[P::kTokens + token] + between;
        const float centred = stats.mean[i] - centre_of(partials, token);
#pragma unroll
        for (int set = 0; set < kSets; ++set) {
#pragma unroll
          for (int group = 0; group < P::kRowGroups; ++group) {
            const int row = set * kRows + 8 * group + g;
            const float product = P::kWarpsShareTiles
                                      ? partials[3 * P::kTokens + row * P::kTokens + token]
                                      : products[set][i >> 1][2 * group + (i & 1)];
            scores[set][group][i] += product - centred * row_sums[row];
          }
        }
      }
    }
    stats.constant = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const bool is_attended = attended >> nth_token(i) & 1;
      const float variance = squares[i] / channels_;
      stats.rstd[i] = !is_attended ? 0.0f : normalize_ ? 1.0f / sqrtf(variance + eps_) : 1.0f;
      if constexpr (!kCentre) {  // others vary by 2^-11 of their mean at least
        const bool constant = variance <= mean[i] * mean[i] * 0x1p-40f;
        stats.constant |= (normalize_ && constant) << i;
      }
      for (int set = 0; set < kSets; ++set) {
        for (int group = 0; group < P::kRowGroups; ++group) scores[set][group][i] *= stats.rstd[i];
      }
    }
  }

  // Combines the means of the lane's tokens that the group's warps have.
  __device__ void means_of_tile(const float* partials, float (&mean)[4]) const {
    if constexpr (!P::kWarpsShareTiles) {
      for (int i = 0; i < 4; ++i) mean[i] = partials[nth_token(i)];
    } else {
      for (int i = 0; i < 4; ++i) mean[i] = 0;
#pragma unroll 1
      for (int warp = 0; warp < P::group_warps(channels_); ++warp) {
        const float* means = partials + warp * kBuffers * kFloats;
        for (int i = 0; i < 4; ++i) mean[i] += means[nth_token(i)] * width_of(warp);
      }
      for (int i = 0; i < 4; ++i) mean[i] /= channels_;
    }
  }

  __device__ float centre_of(const float* partials, int token) const {
    return kCentre && normalize_ ? partials[2 * P::kTokens + token] : 0.0f;
  }

  __device__ Slice slice_of(int group_lane) const {
    return Slice::of(channels_, group_lane, P::log2_group_warps(channels_));
  }
  __device__ int width_of(int group_lane) const { return slice_of(group_lane).units * 16; }

  float* partials_;
  float* row_sums_;
  const T* rows_;
  int channels_;
  Slice slice_;
  float eps_;
  bool normalize_;
};

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
