#pragma once

#include "attention_core/cuda/plan.h"

namespace crossvit::attention_core {

constexpr float kLog2e = 1.4426950408889634f;

// Scores of a tile: kSets matrices of score rows (u, or dm and u) against its tokens, with the
// statistics of LayerNorm from the same read.
template <class P, int kSets>
class TileScores {
 public:
  using T = typename P::Element;

  // A float has no digits to spare: tokens are centred before products are formed.
  static constexpr bool kCentre = sizeof(T) == 4;
  static constexpr int kRows = P::kRows;
  static constexpr int kSums = kSets * kRows;
  // Of one warp, for one tile: three numbers a token, and the scores where warps share a tile.
  static constexpr int kScores = P::kTeams ? kSums * P::kTokens : 0;
  static constexpr int kFloats = 3 * P::kTokens + kScores;
  static constexpr int kBuffers = P::kTeams ? 2 : 1;

  __host__ __device__ static int bytes(int channels, int teams) {
    const int floats = (teams * kBuffers * kFloats + kSums) * P::split(channels);
    return floats * static_cast<int>(sizeof(float));
  }

  // rows: [kSums, row_pitch] in shared memory.
  __device__ TileScores(char* memory, const T* rows, int channels, Slice slice, float eps,
                        bool normalize)
      : exchange_(reinterpret_cast<float*>(memory)),
        row_sums_(exchange_ + P::warps() * kBuffers * kFloats),
        rows_(rows),
        channels_(channels),
        slice_(slice),
        eps_(eps),
        normalize_(normalize) {}

  // Sums of the rows as rounded, a number a slice. All threads; a barrier must follow.
  __device__ void sum_rows() {
    const int pitch = P::row_pitch(channels_);
    for (int i = P::warp(); i < P::split(channels_) * kSums; i += P::warps()) {
      const int part = i / kSums, row = i % kSums;
      const Slice slice = Slice::of(channels_, part, P::split_log(channels_));
      float sum = 0;
#pragma unroll 2
      for (int c = lane_index(); c < slice.units * 16; c += 32) {
        sum += to_float(rows_[row * pitch + slice.first + c]);
      }
      for (int far = 16; far > 0; far /= 2) sum += __shfl_xor_sync(~0u, sum, far);
      if (lane_index() == 0) row_sums_[i] = sum;
    }
  }

  // The sum of a row over all channels.
  __device__ float row_sum(int row) const {
    float sum = 0;
    for (int part = 0; part < P::split(channels_); ++part) sum += row_sums_[part * kSums + row];
    return sum;
  }

  // scores[set][group][i] of row 8 group + g and the i-th of the four tokens: of xhat, 0 where no
  // token is attended to. Meets the team's other warps.
  __device__ void of_tile(const T* tile, int turn, uint32_t attended,
                          float (&scores)[kSets][P::kGroups][4], FourTokens& four) {
    float products[kSets][2][4] = {};  // of tokens 0 to 7 and 8 to 15
    const TokenSums sums = products_of_slice(tile, products);
    float* mine = exchange_ + (P::warp() * kBuffers + turn % kBuffers) * kFloats;
    leave(mine, sums, products);
    P::meet_team(channels_);
    collect(turn, attended, products, scores, four);
  }

 private:
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
            P::kGroups == 1 ? load_8_rows(rows, row_pitch) : load_rows(rows, row_pitch);
        multiply(products[set][0], a, to_b(x, 0));
        multiply(products[set][1], a, to_b(x, 1));
      }
    }
    return sums;
  }

  // mean, squared deviations and centre of each token, then the products.
  __device__ void leave(float* mine, const TokenSums& sums,
                        const float (&products)[kSets][2][4]) const {
    const int g = lane_index() / 4, t = lane_index() % 4, width = slice_.units * 16;
    for (int i = 0; i < 2; ++i) {
      const float sum = sum_of_row(sums.sum[i]), squares = sum_of_row(sums.squares[i]);
      if (t == 0) {
        float* of_token = mine + g + 8 * i;
        of_token[0] = sums.centre[i] + sum / width;
        of_token[P::kTokens] = fmaxf(squares - sum * (sum / width), 0.0f);
        of_token[2 * P::kTokens] = sums.centre[i];
      }
    }
    if constexpr (P::kTeams) {
      for (int set = 0; set < kSets; ++set) {
        for (int group = 0; group < P::kGroups; ++group) {
          for (int side = 0; side < 2; ++side) {
            float* to = mine + 3 * P::kTokens + (set * kRows + 8 * group + g) * P::kTokens +
                        8 * side + 2 * t;
            const float* from = &products[set][side][2 * group];
            *reinterpret_cast<float2*>(to) = make_float2(from[0], from[1]);
          }
        }
      }
    }
  }

  // Of the team's warps in their order.
  __device__ void collect(int turn, uint32_t attended, const float (&products)[kSets][2][4],
                          float (&scores)[kSets][P::kGroups][4], FourTokens& four) const {
    const int g = lane_index() / 4, part = P::part(channels_), parts = P::split(channels_);
    constexpr int kNext = kBuffers * kFloats;  // from a warp to the next
    const int first_warp = P::warp() - part;
    const float* left = exchange_ + (first_warp * kBuffers + turn % kBuffers) * kFloats;
    float mean[4], squares[4] = {};
    means_of_tile(left, mean);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      four.centre[i] = centre_of(left + part * kNext, nth_token(i));
      four.mean[i] = normalize_ ? mean[i] : 0.0f;
      for (int set = 0; set < kSets; ++set) {
        for (int group = 0; group < P::kGroups; ++group) scores[set][group][i] = 0;
      }
    }
#pragma unroll 1  // what it loads is enough to wait for at once
    for (int p = 0; p < parts; ++p, left += kNext) {
      const float* row_sums = row_sums_ + p * kSums;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int token = nth_token(i);
        const float apart = left[token] - mean[i];
        const float of_part = P::kTeams ? apart * apart * width_of(p) : 0.0f;
        squares[i] += left[P::kTokens + token] + of_part;
        const float centred = four.mean[i] - centre_of(left, token);
#pragma unroll
        for (int set = 0; set < kSets; ++set) {
#pragma unroll
          for (int group = 0; group < P::kGroups; ++group) {
            const int row = set * kRows + 8 * group + g;
            const float product = P::kTeams ? left[3 * P::kTokens + row * P::kTokens + token]
                                            : products[set][i >> 1][2 * group + (i & 1)];
            scores[set][group][i] += product - centred * row_sums[row];
          }
        }
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const bool is = attended >> nth_token(i) & 1;
      four.rstd[i] = !is ? 0.0f : normalize_ ? 1.0f / sqrtf(squares[i] / channels_ + eps_) : 1.0f;
      for (int set = 0; set < kSets; ++set) {
        for (int group = 0; group < P::kGroups; ++group) scores[set][group][i] *= four.rstd[i];
      }
    }
  }

  // Of the four tokens, from what the team's warps left.
  __device__ void means_of_tile(const float* left, float (&mean)[4]) const {
    if constexpr (!P::kTeams) {
      for (int i = 0; i < 4; ++i) mean[i] = left[nth_token(i)];
    } else {
      for (int i = 0; i < 4; ++i) mean[i] = 0;
#pragma unroll 1
      for (int part = 0; part < P::split(channels_); ++part) {
        const float* of_part = left + part * kBuffers * kFloats;
        for (int i = 0; i < 4; ++i) mean[i] += of_part[nth_token(i)] * width_of(part);
      }
      for (int i = 0; i < 4; ++i) mean[i] /= channels_;
    }
  }

  __device__ float centre_of(const float* left, int token) const {
    return kCentre && normalize_ ? left[2 * P::kTokens + token] : 0.0f;
  }

  __device__ int width_of(int part) const {
    return Slice::of(channels_, part, P::split_log(channels_)).units * 16;
  }

  float* exchange_;
  float* row_sums_;
  const T* rows_;
  int channels_;
  Slice slice_;
  float eps_;
  bool normalize_;
};

// B of a product whose k are a tile's tokens: weights[i] of row g and the i-th of four tokens.
template <class T>
__device__ __forceinline__ FragmentB<T> weights_as_b(const float (&weights)[4]) {
  return {pack<T>(weights[0], weights[1]), pack<T>(weights[2], weights[3])};
}

// A tile transposed, 16 channels by 16 tokens, centred where the type wants it.
template <class T>
__device__ __forceinline__ FragmentA<T> channels_by_tokens(const T* tile, int pitch,
                                                           const FourTokens& four) {
  FragmentA<T> x = load_transposed(tile, pitch);
  if constexpr (sizeof(T) == 4) {
    for (int i = 0; i < 4; ++i) {
      const int first = i >> 1 << 1;
      x.pair[i].x -= four.centre[first];
      x.pair[i].y -= four.centre[first + 1];
    }
  }
  return x;
}

}  // namespace crossvit::attention_core
