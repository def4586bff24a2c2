#pragma once

#include "attention_core/cuda/scores.h"

// The forward pass of one block over a range of one image's tokens: online softmax, and sums of raw
// tokens whose means are subtracted at the end (docs/derivation.md).

namespace crossvit::attention_core {

// lse of weights that sum to `total` where the peak, to the base 2, counts 1.
__device__ inline float log_of_total(float peak, float total) {
  return (peak + log2f(total)) / kLog2e;
}

template <class P>
class ForwardPass {
 public:
  using T = typename P::Element;
  using Scores = TileScores<P, 1>;

  // Score rows, rings, exchange. What the teams leave for each other at the end goes over the
  // rings.
  __host__ __device__ static int bytes(int channels, int teams) {
    return before_barriers(channels, teams) + teams * P::kSplit * TileRing<P>::barrier_bytes();
  }

  // memory: bytes(channels, teams) of shared memory, 16-byte aligned.
  __device__ ForwardPass(char* memory, int channels, float eps, bool normalize)
      : rows_(reinterpret_cast<T*>(memory)),
        channels_(channels),
        slice_(Slice::of(channels, P::part(), P::kSplit)),
        ring_(memory + row_bytes(channels) + P::warp() * TileRing<P>::bytes(channels),
              memory + before_barriers(channels, P::teams()) +
                  P::warp() * TileRing<P>::barrier_bytes(),
              channels, slice_),
        scores_(memory + span_bytes(channels, P::teams()), rows_, channels, slice_, eps,
                normalize) {}

  // [kRows, row_pitch]: u, for the caller to write before run(), zeros where there is no row.
  __device__ T* rows() const { return rows_; }

  // Starts the first copies of tokens [first, last). Needs no rows and no extra token yet.
  __device__ void start(const Image<T>& x, int first, int last) { ring_.fill(x, first, last); }

  // All threads. The rows are written, not necessarily seen.
  __device__ void run(const Image<T>& x, int first, int last) {
    __syncthreads();
    scores_.sum_rows();
    clear();
    __syncthreads();
    for (int turn = 0, token; (token = P::token_of(first, turn)) < last; ++turn) {
      ring_.wait(turn);
      if (token == 0 && x.has_extra) ring_.write_extra(turn, x.extra);
      add_tile(turn, x.attended_of_tile(token, last));
      __syncwarp();
      ring_.copy(x, turn + P::kStages, P::token_of(first, turn + P::kStages), last);
    }
    ring_.drain();
    __syncthreads();
    leave();
    __syncthreads();
  }

  // After run(), for rows [0, count): write(row, channel, m, peak, total), m not divided by the
  // total yet; peaks are to the base 2, and -inf where nothing is attended to.
  template <class Write>
  __device__ void results(int count, Write write) const {
    const int pitch = P::row_pitch(channels_);
    for (int i = static_cast<int>(threadIdx.x); i < count * channels_; i += blockDim.x) {
      const int row = i / channels_, channel = i % channels_;
      float peak = -INFINITY;
      for (int team = 0; team < P::teams(); ++team) peak = fmaxf(peak, left(team, row)[0]);
      const float finite = peak == -INFINITY ? 0.0f : peak;
      float sum = 0, total = 0;
      for (int team = 0; team < P::teams(); ++team) {
        const float decay = exp2f(left(team, row)[0] - finite);
        total += decay * left(team, row)[1];
        sum += decay * sums_of(team)[row * pitch + channel];
      }
      write(row, channel, sum, peak, total);
    }
  }

 private:
  __host__ __device__ static int before_barriers(int channels, int teams) {
    return span_bytes(channels, teams) + Scores::bytes(teams);
  }
  __host__ __device__ static int row_bytes(int channels) {
    return P::kRows * P::row_pitch(channels) * static_cast<int>(sizeof(T));
  }
  // What a team leaves: sums of its rows, then a peak and a total for each.
  __host__ __device__ static int floats_of_team(int channels) {
    return P::kRows * P::row_pitch(channels) + 2 * P::kRows;
  }
  __host__ __device__ static int span_bytes(int channels, int teams) {
    const int rings = row_bytes(channels) + teams * P::kSplit * TileRing<P>::bytes(channels);
    const int sums = teams * floats_of_team(channels) * static_cast<int>(sizeof(float));
    return rings > sums ? rings : sums;
  }
  __device__ float* sums_of(int team) const {
    return reinterpret_cast<float*>(rows_) + team * floats_of_team(channels_);
  }
  __device__ float* left(int team, int row) const {
    return sums_of(team) + P::kRows * P::row_pitch(channels_) + 2 * row;
  }

  __device__ void clear() {
    sums_.clear();
    for (int group = 0; group < P::kGroups; ++group) {
      peak_[group] = -INFINITY;
      total_[group] = 0;
    }
  }

  __device__ void add_tile(int turn, uint32_t attended) {
    float scores[1][P::kGroups][4];
    FourTokens four;
    const T* tile = ring_.tile(turn);
    scores_.of_tile(tile, turn, attended, scores, four);
    FragmentB<T> weights[P::kGroups];
#pragma unroll
    for (int group = 0; group < P::kGroups; ++group) {
      weights[group] = soften(group, attended, scores[0][group], four);
    }
#pragma unroll
    for (int unit = 0; unit < P::kUnits; ++unit) {
      if (unit >= slice_.units) break;
      const FragmentA<T> x = channels_by_tokens(tile + unit * 16, ring_.pitch(), four);
#pragma unroll
      for (int group = 0; group < P::kGroups; ++group) {
        multiply(sums_.of[unit][group], x, weights[group]);
      }
    }
  }

  // Scores to weights exp(score - peak) * rstd; brings what was summed before to the new peak.
  __device__ FragmentB<T> soften(int group, uint32_t attended, const float (&scores)[4],
                                 const FourTokens& four) {
    float s[4], top = -INFINITY;
    for (int i = 0; i < 4; ++i) {
      s[i] = attended >> nth_token(i) & 1 ? scores[i] * kLog2e : -INFINITY;
      top = fmaxf(top, s[i]);
    }
    const float peak = fmaxf(peak_[group], max_of_row(top));
    const float finite = peak == -INFINITY ? 0.0f : peak;
    const float decay = exp2f(peak_[group] - finite);
    float total = 0, mean = 0, weights[4];
    for (int i = 0; i < 4; ++i) {
      const float p = exp2f(s[i] - finite);
      total += p;
      weights[i] = rounded<T>(p * four.rstd[i]);
      mean += weights[i] * (four.mean[i] - four.centre[i]);
    }
    total_[group] = total_[group] * decay + sum_of_row(total);
    sums_.mean[group] = sums_.mean[group] * decay + sum_of_row(mean);
    peak_[group] = peak;
    if (__any_sync(~0u, decay != 1.0f)) rescale(group, decay);
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
    sums_.leave(sums_of(P::team()), channels_, slice_);
    if (lane_index() % 4 || P::part()) return;
    for (int group = 0; group < P::kGroups; ++group) {
      float* numbers = left(P::team(), 8 * group + lane_index() / 4);
      numbers[0] = peak_[group];
      numbers[1] = total_[group];
    }
  }

  T* rows_;
  int channels_;
  Slice slice_;
  TileRing<P> ring_;
  Scores scores_;
  WarpSums<P> sums_;
  float peak_[P::kGroups];  // of row 8 group + g, to the base 2
  float total_[P::kGroups];
};

}  // namespace crossvit::attention_core
