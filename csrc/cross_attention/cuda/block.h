#pragma once

#include <algorithm>

#include "attention_core/cuda/choose.h"
#include "common/cluster.h"
#include "cross_attention/cuda.h"
#include "cross_attention/cuda/rows.h"

// What the fusion's two kernels have in common. A cluster of blocks owns up to 16 images: its
// blocks share the columns of every linear layer and give each other the results through
// distributed shared memory, so that the cluster reads the weights once; then each takes the tokens
// of its images.

namespace crossvit::cross_attention::cuda {

inline Vectors vectors_of(float* memory, int64_t batch, int64_t own, int64_t channels,
                          int64_t heads) {
  Vectors v;
  v.activated = memory;
  v.y0 = v.activated + batch * own;
  v.normed = v.y0 + batch * channels;
  v.q = v.normed + batch * channels;
  v.o = v.q + batch * channels;
  v.y = v.o + batch * channels;
  v.back_activated = v.y + batch * channels;
  v.kt = v.back_activated + batch * channels;
  v.m = v.kt + heads * batch * channels;
  v.lse = v.m + heads * batch * channels;
  return v;
}

// Shared memory of a block: an operand and rows of floats, as wide as the CLS or the tokens are, an
// operand of C channels, and what the pass over the tokens has.
template <class T>
struct Layout {
  int pitch;                 // of the wide operand's rows where they are the images' first tokens
  int floats, narrow, pass;  // in bytes; the wide operand comes first

  __host__ __device__ static int wide_bytes(int width) {
    return operand_bytes<T>(width) + kImages * width * static_cast<int>(sizeof(float));
  }
  __host__ __device__ Layout(int own, int channels) {
    const int width = own > channels ? own : channels;
    pitch = operand_pitch<T>(width);
    floats = operand_bytes<T>(width);
    narrow = wide_bytes(width);
    pass = narrow + operand_bytes<T>(channels);
  }
};

// The columns of a linear layer that belong to this block of the cluster, in tiles of 8.
struct Share {
  int first, last;
  __device__ static Share of(int columns) {
    const int tiles = columns / 8, rank = cluster_rank(), size = cluster_size();
    return {tiles * rank / size * 8, tiles * (rank + 1) / size * 8};
  }
};

// transposed_linear for all columns of `heads` matrices of `depth` rows each, which take as many
// columns of the rows each: pieces go around the warps of the cluster. write(head) writes one's.
template <class T, class WriteOf>
__device__ void transposed_linears(const T* rows, int pitch, const void* weights, int heads,
                                   int depth, int columns, WriteOf write) {
  const int warp = static_cast<int>(threadIdx.x) / 32, warps = static_cast<int>(blockDim.x) / 32;
  const int pieces = columns / kPiece;
  for (int i = cluster_rank() * warps + warp; i < heads * pieces; i += cluster_size() * warps) {
    const int head = i / pieces;
    const T* weight = static_cast<const T*>(weights) + int64_t{head} * depth * columns;
    transposed_linear(rows + head * depth, pitch, weight, depth, columns, i % pieces * kPiece,
                      write(head));
  }
}

// linear for this block's columns, of heads of head_dim each: stage(head) writes the rows that the
// head's columns take.
template <class T, class Stage, class Write>
__device__ void linear_of_heads(T* rows, int pitch, const void* weight, int depth, int head_dim,
                                Stage stage, Write write) {
  const Share share = Share::of(depth);
  for (int begin = share.first; begin < share.last;) {
    const int head = begin / head_dim;
    const int end = min((head + 1) * head_dim, share.last);
    stage(head);
    __syncthreads();
    linear(rows, pitch, weight, depth, begin, end, write);
    __syncthreads();
    begin = end;
  }
}

// Runs run(plan). A block has eight warps where its shared memory does. There is no plan for 16
// heads of wide tokens, which take two passes and leave no register to spare, nor one for as many
// of narrow ones, which no model has: every plan is two kernels that take long to compile.
template <class T, class Run>
void with_fusion_plan(int64_t heads, int64_t channels, Run&& run) {
  using attention_core::Plan;
  if (channels > 768) return run(Plan<T, 12, 1, 8, 1>());
  if (heads > 8) return run(Plan<T, 12, 2, 4, 1>());
  if (channels <= 192) return run(Plan<T, 12, 1, 1, sizeof(T) == 4 ? 1 : 2>());
  if (channels <= 384) return run(Plan<T, 24, 1, 1, 1>());
  run(Plan<T, 12, 1, 4, 1>());
}

// As many teams as eight warps and the shared memory of a block make, or one.
template <class P, class Pass>
int teams_of(int own, int channels, int limit) {
  const int before = Layout<typename P::Element>(own, channels).pass;
  int teams = 8 / P::kSplit;
  while (teams > 1 && before + Pass::bytes(channels, teams) > limit) teams /= 2;
  return teams;
}

template <class P, class Pass>
attention_core::cuda::BlockSize block_of(int own, int channels, int limit) {
  const int teams = teams_of<P, Pass>(own, channels, limit);
  const int before = Layout<typename P::Element>(own, channels).pass;
  return {P::threads(teams), before + Pass::bytes(channels, teams)};
}

template <class P, class Pass>
LaunchConfig config_of(int64_t batch, int own, int channels, const Division& division,
                       const attention_core::cuda::Place& place) {
  const auto block = block_of<P, Pass>(own, channels, shared_bytes_of_block(place.device));
  const int64_t clusters = (batch + division.images - 1) / division.images;
  LaunchConfig config;
  config.grid = dim3(static_cast<unsigned>(clusters * division.blocks));
  config.block = dim3(static_cast<unsigned>(block.threads));
  config.shared_bytes = block.shared_bytes;
  config.cluster = division.blocks;
  config.stream = static_cast<cudaStream_t>(place.stream);
  return config;
}

}  // namespace crossvit::cross_attention::cuda
