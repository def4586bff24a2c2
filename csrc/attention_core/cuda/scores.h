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
  static constexpr int kScores = P::kSplit > 1 ? kSums* P::kTokens : 0;
  static constexpr int kFloats = 3 * P::kTokens + kScores;
  static constexpr int kBuffers = P::kSplit > 1 ? 2 : 1;

  __host__ __device__ static int bytes(int teams) {
    return (teams * kBuffers * kFloats + kSums) * P::kSplit * static_cast<int>(sizeof(float));
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
    for (int i = P::warp(); i < P::kSplit * kSums; i += P::warps()) {
      const int part = i / kSums, row = i % kSums;
      const Slice slice = Slice::of(channels_, part, P::kSplit);
      float sum = 0;
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
    for (int part = 0; part < P::kSplit; ++part) sum += row_sums_[part * kSums + row];
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
    P::meet_team();
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
    if constexpr (P::kSplit > 1) {
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

  __device__ void collect(int turn, uint32_t attended, const float (&products)[kSets][2][4],
                          float (&scores)[kSets][P::kGroups][4], FourTokens& four) const {
    const int g = lane_index() / 4, first_warp = P::warp() - P::part();
    const float* left = exchange_ + (first_warp * kBuffers + turn % kBuffers) * kFloats;
    constexpr int kNext = kBuffers * kFloats;  // from a warp to the next
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int token = nth_token(i);
      float mean = left[token], squares = left[P::kTokens + token];
      if constexpr (P::kSplit > 1) {
        mean = squares = 0;
        for (int part = 0; part < P::kSplit; ++part) {
          mean += left[part * kNext + token] * width_of(part);
        }
        mean /= channels_;
        for (int part = 0; part < P::kSplit; ++part) {
          const float apart = left[part * kNext + token] - mean;
          squares += left[part * kNext + P::kTokens + token] + apart * apart * width_of(part);
        }
      }
      const bool is = attended >> token & 1;
      const int part = P::part();
      four.centre[i] = kCentre && normalize_ ? left[part * kNext + 2 * P::kTokens + token] : 0.0f;
      four.mean[i] = normalize_ ? mean : 0.0f;
      four.rstd[i] = !is ? 0.0f : normalize_ ? 1.0f / sqrtf(squares / channels_ + eps_) : 1.0f;
#pragma unroll
      for (int set = 0; set < kSets; ++set) {
#pragma unroll
        for (int group = 0; group < P::kGroups; ++group) {
          const int row = set * kRows + 8 * group + g;
          float score = 0;
          for (int p = 0; p < P::kSplit; ++p) {
            const float* of_part = left + p * kNext;
            const float centre = kCentre && normalize_ ? of_part[2 * P::kTokens + token] : 0.0f;
            const float product = P::kSplit == 1
                                      ? products[set][i >> 1][2 * group + (i & 1)]
                                      : of_part[3 * P::kTokens + row * P::kTokens + token];
            score += product - (four.mean[i] - centre) * row_sums_[p * kSums + row];
          }
          scores[set][group][i] = score * four.rstd[i];
        }
      }
    }
  }

  __device__ int width_of(int part) const {
    return Slice::of(channels_, part, P::kSplit).units * 16;
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
