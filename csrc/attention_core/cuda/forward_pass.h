#pragma once

#include "attention_core/cuda/scores.h"
#include "attention_core/cuda/tile_states.h"

// The forward pass of one block over a range of one image's tokens: online softmax, and sums of raw
// tokens whose means are subtracted at the end (docs/derivation.md).

namespace crossvit::attention_core {

// lse, for a total above 0.
__device__ inline float log_of_total(const SoftmaxState& state) {
  return (state.peak + log2f(state.total)) / kLog2e;
}

template <class P>
class ForwardPass {
 public:
  using T = typename P::Element;
  using Scores = TileScores<P, 1>;

  // Score rows, rings, exchange. What the teams leave for each other at the end goes over the
  // rings.
  __host__ __device__ static int bytes(int channels, int teams) {
    return before_barriers(channels, teams) +
           teams * P::split(channels) * TileRing<P>::barrier_bytes();
  }

  // memory: bytes(channels, teams) of shared memory, 16-byte aligned.
  __device__ ForwardPass(char* memory, int channels, float eps, bool normalize)
      : rows_(reinterpret_cast<T*>(memory)),
        channels_(channels),
        slice_(Slice::of(channels, P::part(channels), P::split_log(channels))),
        ring_(memory + row_bytes(channels) + P::warp() * TileRing<P>::bytes(channels),
              memory + before_barriers(channels, P::teams(channels)) +
                  P::warp() * TileRing<P>::barrier_bytes(),
              channels, slice_),
        scores_(memory + span_bytes(channels, P::teams(channels)), rows_, channels, slice_, eps,
                normalize) {}

  // [kRows, row_pitch]: u, for the caller to write before run(), zeros where there is no row.
  __device__ T* rows() const { return rows_; }

  // Starts the first copies. Needs no rows and no extra token yet.
  __device__ void start(const Image<T>& x, const Range& range) { ring_.fill(x, range); }

  // All threads. The rows are written, not necessarily seen. Blocks that share the image leave
  // their tiles in `states`.
  __device__ void run(const Image<T>& x, const Range& range, const TileStates<P>& states) {
    __syncthreads();
    scores_.sum_rows();
    clear();
    __syncthreads();
    for (int turn = 0, token; (token = P::token_of(channels_, range, turn)) < range.last; ++turn) {
      ring_.wait(turn);
      if (token == 0 && x.has_extra) ring_.write_extra(turn, x.extra);
      add_tile(turn, x.attended_of_tile(token, range.last));
      __syncwarp();
      ring_.copy_next(x, range, turn);
      if (states) {
        const int tile = P::tile_of(channels_, range, turn);
        states.leave(tile, sums_, slice_);
        states.leave(tile, softmax_);
        clear();
      }
    }
    ring_.drain();
    __syncthreads();
    if (!states) leave();
    __syncthreads();
  }

  // After run() of all blocks that share the image: what the teams of a block that has all tiles
  // would have left, of this block's share of the channels. All threads.
  __device__ void gather(const TileStates<P>& states, const Range& range) {
    const int pitch = P::row_pitch(channels_), tiles = P::tiles_of(range);
    const ChannelShare share = ChannelShare::of(channels_, range);
    const int width = share.last - share.first, all = P::teams(channels_) * P::kRows * width;
    for (int i = static_cast<int>(threadIdx.x); i < all; i += blockDim.x) {
      const int channel = share.first + i % width, row = i / width % P::kRows;
      const int team = i / width / P::kRows;
      SoftmaxState state;
      float sum = 0, mean = 0;
#pragma unroll 4  // loads under way
      for (int tile = team; tile < tiles; tile += P::teams(channels_)) {
        const Scales scales = join(state, states.state(tile, row));
        sum = scales.join(sum, states.sum(tile, row, channel));
        mean = scales.join(mean, states.mean(tile, row, channel));
      }
      sums_of(team)[row * pitch + channel] = sum - mean;
      if (channel == share.first) *left(team, row) = state;
    }
    __syncthreads();
  }

  // After run(), or gather(), for rows [0, count) and this block's share of the channels:
  // write(row, channel, m, state), m not divided by the total yet.
  template <class Write>
  __device__ void results(int count, const Range& range, Write write) const {
    const int pitch = P::row_pitch(channels_);
    const ChannelShare share = ChannelShare::of(channels_, range);
    const int width = share.last - share.first;
    for (int i = static_cast<int>(threadIdx.x); i < count * width; i += blockDim.x) {
      const int row = i / width, channel = share.first + i % width;
      SoftmaxState state;
      float sum = 0;
#pragma unroll 2
      for (int team = 0; team < P::teams(channels_); ++team) {
        sum = join(state, *left(team, row)).join(sum, sums_of(team)[row * pitch + channel]);
      }
      write(row, channel, sum, state);
    }
  }

 private:
  __host__ __device__ static int before_barriers(int channels, int teams) {
    return span_bytes(channels, teams) + Scores::bytes(channels, teams);
  }
  __host__ __device__ static int row_bytes(int channels) {
    return P::kRows * P::row_pitch(channels) * static_cast<int>(sizeof(T));
  }
  // What a team leaves: sums of its rows, then a peak and a total for each.
  __host__ __device__ static int floats_of_team(int channels) {
    return P::kRows * P::row_pitch(channels) + 2 * P::kRows;
  }
  __host__ __device__ static int span_bytes(int channels, int teams) {
    const int rings =
        row_bytes(channels) + teams * P::split(channels) * TileRing<P>::bytes(channels);
    const int sums = teams * floats_of_team(channels) * static_cast<int>(sizeof(float));
    return rings > sums ? rings : sums;
  }
  __device__ float* sums_of(int team) const {
    return reinterpret_cast<float*>(rows_) + team * floats_of_team(channels_);
  }
  __device__ SoftmaxState* left(int team, int row) const {
    return reinterpret_cast<SoftmaxState*>(sums_of(team) + P::kRows * P::row_pitch(channels_)) +
           row;
  }

  __device__ void clear() {
    sums_.clear();
    for (int group = 0; group < P::kGroups; ++group) softmax_[group] = {};
  }

  __device__ void add_tile(int turn, uint32_t attended) {
    float scores[1][P::kGroups][4];
    FourTokens four;
    const T* tile = ring_.tile(turn);
    scores_.of_tile(tile, turn, attended, scores, four);
    FragmentB<T> weights[P::kGroups];
    float added[P::kGroups][2];
#pragma unroll
    for (int group = 0; group < P::kGroups; ++group) {
      weights[group] = soften(group, attended, scores[0][group], four, added[group]);
    }
#pragma unroll
    for (int unit = 0; unit < P::kUnits; ++unit) {
      if (unit >= slice_.units) break;
      const FragmentA<T> x = channels_by_tokens(tile + unit * 16, ring_.pitch(), four);
#pragma unroll
      for (int group = 0; group < P::kGroups; ++group) {
        float sums[4] = {};
        multiply(sums, x, weights[group]);
        for (int i = 0; i < 4; ++i) {
          float& sum = sums_.of[unit][group][i];
          sum = fmaf(sums[i], added[group][i & 1], sum);
        }
      }
    }
  }

  // Scores to weights exp(score - peak) * rstd; brings what was summed before to the new peak.
  // added: what the tile's sums of rows 2 t and 2 t + 1 are multiplied by.
  __device__ FragmentB<T> soften(int group, uint32_t attended, const float (&scores)[4],
                                 const FourTokens& four, float (&added)[2]) {
    SoftmaxState tile;
    float s[4];
    for (int i = 0; i < 4; ++i) {
      s[i] = attended >> nth_token(i) & 1 ? scores[i] * kLog2e : -INFINITY;
      tile.peak = fmaxf(tile.peak, s[i]);
    }
    tile.peak = max_of_row(tile.peak);
    const float finite = tile.peak == -INFINITY ? 0.0f : tile.peak;
    float total = 0, mean = 0, weights[4];
    for (int i = 0; i < 4; ++i) {
      const float p = exp2f(s[i] - finite);
      total += p;
      weights[i] = rounded<T>(p * four.rstd[i]);
      mean += weights[i] * (four.mean[i] - four.centre[i]);
    }
    tile.total = sum_of_row(total);
    const Scales scales = join(softmax_[group], tile);
    sums_.mean[group] = scales.join(sums_.mean[group], sum_of_row(mean));
    if (__any_sync(~0u, scales.old != 1.0f)) rescale(group, scales.old);
    const int t = lane_index() % 4;
    for (int i = 0; i < 2; ++i) added[i] = __shfl_sync(~0u, scales.added, 8 * t + 4 * i);
    return weights_as_b<T>(weights);
  }

  // The sums have rows 2 t and 2 t + 1 in this lane, decay is of row g.
  __device__ void rescale(int group, float decay) {
    const int t = lane_index() % 4;
    const float of_even = __shfl_sync(~0u, decay, 8 * t);
    const float of_odd = __shfl_sync(~0u, decay, 8 * t + 4);
#pragma unroll
    for (int unit = 0; unit < P::kUnits; ++unit) {
      for (int i = 0; i < 4; ++i) sums_.of[unit][group][i] *= i & 1 ? of_odd : of_even;
    }
  }

  // Over the rows and the rings, which no copy is under way to.
  __device__ void leave() {
    sums_.template leave<true>(sums_of(P::team(channels_)), P::row_pitch(channels_), slice_);
    if (lane_index() % 4 || P::part(channels_)) return;
    for (int group = 0; group < P::kGroups; ++group) {
      *left(P::team(channels_), 8 * group + lane_index() / 4) = softmax_[group];
    }
  }

  T* rows_;
  int channels_;
  Slice slice_;
  TileRing<P> ring_;
  Scores scores_;
  WarpSums<P> sums_;
  SoftmaxState softmax_[P::kGroups];  // of row 8 group + g
};

}  // namespace crossvit::attention_core
