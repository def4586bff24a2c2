#pragma once

#include "attention_core/cuda/scores.h"
#include "attention_core/cuda/tile_states.h"

// The backward pass of one block over a range of one image's tokens: reads them once, writes their
// gradient once, and sums du. Probabilities come from lse (docs/derivation.md).

namespace crossvit::attention_core {

template <class P>
class BackwardPass {
 public:
  using T = typename P::Element;
  using Scores = TileScores<P, 2>;
  static constexpr int kRows = P::kRows;

  __host__ __device__ static int bytes(int channels, int teams) {
    return before_barriers(channels, teams) +
           teams * P::split(channels) * TileRing<P>::barrier_bytes();
  }

  // memory: bytes(channels, teams) of shared memory, 16-byte aligned.
  __device__ BackwardPass(char* memory, int channels, float eps, bool normalize)
      : rows_(reinterpret_cast<T*>(memory)),
        numbers_(reinterpret_cast<float*>(memory + span_bytes(channels, P::teams(channels)) +
                                          Scores::bytes(channels, P::teams(channels)))),
        weights_(reinterpret_cast<T*>(reinterpret_cast<char*>(numbers_) + number_bytes() +
                                      P::warp() * weight_bytes())),
        channels_(channels),
        normalize_(normalize),
        slice_(Slice::of(channels, P::part(channels), P::split_log(channels))),
        ring_(memory + row_bytes(channels) + P::warp() * TileRing<P>::bytes(channels),
              memory + before_barriers(channels, P::teams(channels)) +
                  P::warp() * TileRing<P>::barrier_bytes(),
              channels, slice_),
        scores_(memory + span_bytes(channels, P::teams(channels)), rows_, channels, slice_, eps,
                normalize) {}

  // [2 kRows, row_pitch] for the caller to write before run(): dm, then u; zeros where there is no
  // row.
  __device__ T* rows() const { return rows_; }

  // [kRows] each, for the caller to write before run(): lse, inf where there is no row, and what
  // softmax's backward subtracts, dm . m less the gradient of lse.
  __device__ float* lse() const { return numbers_; }
  __device__ float* delta() const { return numbers_ + kRows; }

  __device__ void start(const Image<T>& x, const Range& range) { ring_.fill(x, range); }

  // All threads. What the caller wrote need not be seen yet. dx is null where it is not wanted;
  // write_extra(channel, pair) gets the gradient of the extra token; with add, dx holds what other
  // score rows gave. Blocks that share the image leave their tiles' du in `states`.
  template <class WriteExtra>
  __device__ void run(const Image<T>& x, T* dx, int64_t dx_stride, const Range& range,
                      const TileStates<P>& states, bool add, WriteExtra write_extra) {
    __syncthreads();
    scores_.sum_rows();
    du_.clear();
    __syncthreads();
    if (threadIdx.x < 2 * kRows) sums()[threadIdx.x] = scores_.row_sum(threadIdx.x);
    __syncthreads();
    for (int turn = 0, token; (token = P::token_of(channels_, range, turn)) < range.last; ++turn) {
      ring_.wait(turn);
      const bool extra = token == 0 && x.has_extra;
      if (extra) ring_.write_extra(turn, x.extra);
      add_tile(turn, x.attended_of_tile(token, range.last), dx || extra);
      __syncwarp();
      if (extra) copy_extra(turn, write_extra);
      if (dx) store(turn, x, dx, dx_stride, token, range.last, add);
      __syncwarp();
      ring_.copy_next(x, range, turn);
      if (states) {
        states.leave(P::tile_of(channels_, range, turn), du_, slice_);
        du_.clear();
      }
    }
    ring_.drain();
    __syncthreads();
    if (!states) leave();
    __syncthreads();
  }

  // As in forward_pass.h.
  __device__ void gather(const TileStates<P>& states, const Range& range) {
    const int pitch = P::row_pitch(channels_), tiles = P::tiles_of(range);
    const ChannelShare share = ChannelShare::of(channels_, range);
    const int width = share.last - share.first, all = P::teams(channels_) * kRows * width;
    for (int i = static_cast<int>(threadIdx.x); i < all; i += blockDim.x) {
      const int channel = share.first + i % width, row = i / width % kRows;
      const int team = i / width / kRows;
      float sum = 0, mean = 0;
#pragma unroll 4  // loads under way
      for (int tile = team; tile < tiles; tile += P::teams(channels_)) {
        sum += states.sum(tile, row, channel);
        mean += states.mean(tile, row, channel);
      }
      sums_of(team)[row * pitch + channel] = sum - mean;
    }
    __syncthreads();
  }

  // After run(), or gather(), for rows [0, count) and this block's share of the channels:
  // write(row, channel, du).
  template <class Write>
  __device__ void results(int count, const Range& range, Write write) const {
    const int pitch = P::row_pitch(channels_);
    const ChannelShare share = ChannelShare::of(channels_, range);
    const int width = share.last - share.first;
    for (int i = static_cast<int>(threadIdx.x); i < count * width; i += blockDim.x) {
      const int row = i / width, channel = share.first + i % width;
      float sum = 0;
#pragma unroll 2
      for (int team = 0; team < P::teams(channels_); ++team) {
        sum += sums_of(team)[row * pitch + channel];
      }
      write(row, channel, sum);
    }
  }

 private:
  // Of a tile: p and ds of each token, [kTokens, p of all rows | ds of all rows], then a number of
  // each token and row.
  static constexpr int kWeightPitch = 2 * kRows + static_cast<int>(16 / sizeof(T));

  __host__ __device__ static int before_barriers(int channels, int teams) {
    return span_bytes(channels, teams) + Scores::bytes(channels, teams) + number_bytes() +
           teams * P::split(channels) * weight_bytes();
  }
  __host__ __device__ static int row_bytes(int channels) {
    return 2 * kRows * P::row_pitch(channels) * static_cast<int>(sizeof(T));
  }
  __host__ __device__ static int span_bytes(int channels, int teams) {
    const int rings =
        row_bytes(channels) + teams * P::split(channels) * TileRing<P>::bytes(channels);
    const int sums = teams * floats_of_team(channels) * static_cast<int>(sizeof(float));
    return rings > sums ? rings : sums;
  }
  __host__ __device__ static int floats_of_team(int channels) {
    return kRows * P::row_pitch(channels);
  }
  __host__ __device__ static constexpr int number_bytes() {
    return 4 * kRows * static_cast<int>(sizeof(float));
  }
  __host__ __device__ static constexpr int weight_bytes() {
    return P::kTokens *
           (kWeightPitch * static_cast<int>(sizeof(T)) + kRows * static_cast<int>(sizeof(float)));
  }
  __device__ float* sums_of(int team) const {
    return reinterpret_cast<float*>(rows_) + team * floats_of_team(channels_);
  }
  __device__ float* sums() const { return numbers_ + 2 * kRows; }  // of the rows, dm's then u's
  __device__ float* moments() const {
    return reinterpret_cast<float*>(weights_ + P::kTokens * kWeightPitch);
  }

  // Over the rows and the rings, which no copy is under way to.
  __device__ void leave() {
    du_.template leave<true>(sums_of(P::team(channels_)), P::row_pitch(channels_), slice_);
  }

  __device__ void add_tile(int turn, uint32_t attended, bool wants_dx) {
    float scores[2][P::kGroups][4];  // dp, s
    FourTokens four;
    T* tile = ring_.tile(turn);
    scores_.of_tile(tile, turn, attended, scores, four);
    FragmentB<T> weights[P::kGroups];
#pragma unroll
    for (int group = 0; group < P::kGroups; ++group) {
      weights[group] = differentiate(group, attended, scores[0][group], scores[1][group], four);
    }
#pragma unroll
    for (int unit = 0; unit < P::kUnits; ++unit) {
      if (unit >= slice_.units) break;
      const FragmentA<T> x = channels_by_tokens(tile + unit * 16, ring_.pitch(), four);
#pragma unroll
      for (int group = 0; group < P::kGroups; ++group) {
        float du[4] = {};
        multiply(du, x, weights[group]);
        for (int i = 0; i < 4; ++i) du_.of[unit][group][i] += du[i];
      }
    }
    __syncwarp();
    if (wants_dx) write_dx(tile, four);
  }

  // Leaves p, ds and p dp + ds s of each token for write_dx; returns ds rstd.
  __device__ FragmentB<T> differentiate(int group, uint32_t attended, const float (&dp)[4],
                                        const float (&s)[4], const FourTokens& four) {
    const int row = 8 * group + lane_index() / 4;
    float mean = 0, weights[4];
    for (int i = 0; i < 4; ++i) {
      const int token = nth_token(i);
      const bool is = attended >> token & 1;
      const float p = is ? exp2f((s[i] - lse()[row]) * kLog2e) : 0.0f;
      const float ds = p * (dp[i] - delta()[row]);
      weights[i] = rounded<T>(ds * four.rstd[i]);
      mean += weights[i] * (four.mean[i] - four.centre[i]);
      T* of_token = weights_ + token * kWeightPitch;
      of_token[row] = from_float<T>(p);
      of_token[kRows + row] = from_float<T>(ds);
      moments()[token * kRows + row] = rounded<T>(p) * dp[i] + rounded<T>(ds) * s[i];
    }
    du_.mean[group] += sum_of_row(mean);
    return weights_as_b<T>(weights);
  }

  // dx over the tile: every lane writes the elements that it reads.
  __device__ void write_dx(T* tile, const FourTokens& four) {
    const int g = lane_index() / 4, t = lane_index() % 4;
    FragmentA<T> weights[P::kGroups];
    float a[2] = {0, 0}, b[2] = {0, 0}, mean[2], rstd[2];
#pragma unroll
    for (int step = 0; step < P::kGroups; ++step) {
      weights[step] = load_rows(weights_ + step * 16, kWeightPitch);
      for (int i = 0; i < 4; ++i) {
        const float2 pair = unpack<T>(weights[step].pair[i]);
        const float* of_pair = sums() + step * 16 + 2 * t + 8 * (i >> 1);
        a[i & 1] += pair.x * of_pair[0] + pair.y * of_pair[1];
      }
    }
    for (int i = 0; i < 2; ++i) {
      for (int row = 2 * t; row < kRows; row += 8) {
        const float* of_token = moments() + (g + 8 * i) * kRows + row;
        b[i] += of_token[0] + of_token[1];
      }
      // The four tokens of lane 4 g + t include g where 2 t or 2 t + 1 is g (mod 8).
      const int from = lane_index() / 8 % 4 + (lane_index() & ~3);
      const float even_mean = __shfl_sync(~0u, four.mean[2 * i], from);
      const float odd_mean = __shfl_sync(~0u, four.mean[2 * i + 1], from);
      const float even_rstd = __shfl_sync(~0u, four.rstd[2 * i], from);
      const float odd_rstd = __shfl_sync(~0u, four.rstd[2 * i + 1], from);
      mean[i] = g & 1 ? odd_mean : even_mean;
      rstd[i] = g & 1 ? odd_rstd : even_rstd;
      a[i] = normalize_ ? sum_of_row(a[i]) / channels_ : 0.0f;
      b[i] = normalize_ ? sum_of_row(b[i]) / channels_ * rstd[i] : 0.0f;
    }
    const int row_pitch = P::row_pitch(channels_), pitch = ring_.pitch();
#pragma unroll P::kUnroll
    for (int unit = 0; unit < slice_.units; ++unit) {
      float dx[2][4] = {};
#pragma unroll
      for (int step = 0; step < P::kGroups; ++step) {
        const FragmentA<T> rows =
            load_transposed(rows_ + step * 16 * row_pitch + slice_.first + unit * 16, row_pitch);
        multiply(dx[0], weights[step], to_b(rows, 0));
        multiply(dx[1], weights[step], to_b(rows, 1));
      }
      T* at = tile + unit * 16 + g * pitch + 2 * t;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int token = i & 1, side = i >> 1;
        T* pair = at + token * 8 * pitch + side * 8;
        const float2 x = unpack<T>(load_pair(pair));
        const auto of = [&](float x, float dxhat) {
          return (dxhat - a[token] - (x - mean[token]) * b[token]) * rstd[token];
        };
        store_pair(pair, pack<T>(of(x.x, dx[side][2 * token]), of(x.y, dx[side][2 * token + 1])));
      }
    }
  }

  template <class WriteExtra>
  __device__ void copy_extra(int turn, WriteExtra write_extra) const {
    const T* from = ring_.tile(turn);
#pragma unroll 1  // one tile of an image has it
    for (int c = lane_index(); c < slice_.units * 16; c += 32) {
      write_extra(slice_.first + c, from[c]);
    }
  }

  // The tile, now dx, to memory; eight lanes share a row.
  __device__ void store(int turn, const Image<T>& x, T* dx, int64_t stride, int token, int last,
                        bool add) const {
    constexpr int kChunk = TileRing<P>::kChunk;
    const int lane = lane_index();
#pragma unroll 1
    for (int row = lane / 8; row < P::kTokens; row += 4) {
      if (token + row >= last || token + row < x.has_extra) continue;
      T* to = dx + (token + row - x.has_extra) * stride + slice_.first;
      T* from = ring_.tile(turn) + row * ring_.pitch();
      if (add) {
#pragma unroll 1
        for (int c = lane % 8 * kChunk; c < slice_.units * 16; c += 8 * kChunk) {
          for (int i = 0; i < kChunk; ++i) {
            from[c + i] = from_float<T>(to_float(from[c + i]) + to_float(to[c + i]));
          }
        }
      }
#pragma unroll 2
      for (int c = lane % 8 * kChunk; c < slice_.units * 16; c += 8 * kChunk) {
        *reinterpret_cast<uint4*>(to + c) = *reinterpret_cast<const uint4*>(from + c);
      }
    }
  }

  T* rows_;
  float* numbers_;
  T* weights_;
  int channels_;
  bool normalize_;
  Slice slice_;
  TileRing<P> ring_;
  Scores scores_;
  WarpSums<P> du_;
};

}  // namespace crossvit::attention_core
