#pragma once

#include <algorithm>

#include "attention_core/cuda/choose.h"
#include "common/cuda/cluster.h"
#include "cross_attention/cuda/kernels.h"
#include "cross_attention/cuda/rows.h"

// What the fusion's two kernels have in common. A cluster of blocks owns up to 16 images: its
// blocks share the columns of every linear layer and give each other the results through
// distributed shared memory, so that the cluster reads the weights once; then each takes the tokens
// of its images, or its part of an image's.

namespace crossvit::cross_attention::cuda {

using attention_core::Range;
using attention_core::TileStates;

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

// Shared memory of a block: an operand as wide as the CLS or the tokens are; floats as wide and an
// operand of C channels; what the pass over the tokens has. Nothing of the second kind lives while
// the pass runs: where all do not fit, the pass lies over it, and no token is copied before.
struct Layout {
  int pitch;                 // of the wide operand's rows where they are the images' first tokens
  int floats, narrow, pass;  // in bytes; the wide operand comes first
  bool over;

  template <class T>
  __host__ __device__ static Layout of(int own, int channels, bool over) {
    const int width = own > channels ? own : channels;
    Layout layout;
    layout.pitch = operand_pitch<T>(width);
    layout.floats = operand_bytes_of<T>(width);
    layout.narrow = layout.floats + float_bytes_of(width);
    layout.pass = over ? layout.floats : layout.narrow + operand_bytes_of<T>(channels);
    layout.over = over;
    return layout;
  }

  // With a pass of so many bytes.
  template <class T>
  int bytes(int channels, int of_pass) const {
    return std::max(narrow + operand_bytes_of<T>(channels), pass + of_pass);
  }
};

// The images of a cluster. Where they are fewer than its blocks, blocks share an image's tokens.
struct Images {
  int64_t first;
  int count;
  int sharing;      // blocks an image
  Range tokens;     // of this block, of any of its images
  int begin, step;  // its images are begin, begin + step and so on, up to count

  // Of a grid of clusters with `images` images each.
  __device__ static Images of(int64_t batch, int images, int num_tokens) {
    const int rank = cluster_rank(), ranks = cluster_size(), sharing = max(1, ranks / images);
    const int64_t first = int64_t{blockIdx.x} / ranks * images;
    const int count = batch - first < images ? static_cast<int>(batch - first) : images;
    const Range tokens = {0, num_tokens, rank % sharing, sharing};
    return {first, count, sharing, tokens, rank / sharing, ranks / sharing};
  }
};

// Passes over the tokens of this block's images, for as many heads at a time as a pass has rows:
// run(image, head, states) with the first of the heads, then results(image, head). Blocks that
// share an image meet in between, with what its tiles gave in `memory`.
template <class P, class Pass, class Run, class Results>
__device__ void pass_over_images(Pass& pass, const Images& images, float* memory, int heads,
                                 int channels, Run run, Results results) {
  const auto states_of = [&](int image, int head) -> TileStates<P> {
    if (images.sharing == 1) return {nullptr, channels};
    const int64_t passes = (heads + P::kRows - 1) / P::kRows;
    const int64_t at = (images.first + image) * passes + head / P::kRows;
    const int64_t floats = P::tiles_of(images.tokens) * TileStates<P>::floats(channels);
    return {memory + at * floats, channels};
  };
  for (int image = images.begin; image < images.count; image += images.step) {
    for (int head = 0; head < heads; head += P::kRows) {
      run(image, head, states_of(image, head));
      if (images.sharing == 1) results(image, head);
    }
  }
  cluster_sync();
  if (images.sharing == 1) return;
  for (int head = 0; images.begin < images.count && head < heads; head += P::kRows) {
    pass.gather(states_of(images.begin, head), images.tokens);
    results(images.begin, head);
  }
  cluster_sync();
}

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

// Runs run(plan). A block has eight warps where its shared memory does. Where there is no plan for
// 16 heads they take two passes: of wide tokens and of floats, as registers do not suffice, and of
// narrow ones, which no model has, as every plan is two kernels that take long to compile.
template <class T, class Run>
void with_fusion_plan(int64_t heads, int64_t channels, Run&& run) {
  using attention_core::Plan;
  if constexpr (sizeof(T) == 4) {
    return run(Plan<T, 12, 1, 1, 8, 1>());
  } else {
    if (heads > 8 && channels <= 768) return run(Plan<T, 12, 2, 4, 4, 1>());
    if (channels <= 192) return run(Plan<T, 12, 1, 1, 1, 2>());
    if (channels <= 384) return run(Plan<T, 24, 1, 1, 1, 1>());
    return run(Plan<T, 12, 1, 4, 8, 1>());
  }
}

struct Setup {
  attention_core::cuda::BlockSize block;
  bool over;
};

// As many teams as eight warps and the shared memory of a block make. A pass over the others'
// memory comes last: it begins late.
template <class P, class Pass>
Setup setup_of(int own, int channels, int limit) {
  using T = typename P::Element;
  int teams = 8 / P::split(channels);
  const auto bytes_of = [&](bool over) {
    return Layout::of<T>(own, channels, over)
        .template bytes<T>(channels, Pass::bytes(channels, teams));
  };
  while (teams > 1 && bytes_of(false) > limit) teams /= 2;
  const bool over = bytes_of(false) > limit;
  return {{P::threads(channels, teams), bytes_of(over)}, over};
}

inline LaunchConfig config_of(int64_t batch, const attention_core::cuda::BlockSize& block,
                              const Division& division, const attention_core::cuda::Place& place) {
  const int64_t clusters = (batch + division.images - 1) / division.images;
  LaunchConfig config;
  config.grid = dim3(static_cast<unsigned>(clusters * division.blocks));
  config.block = dim3(static_cast<unsigned>(block.threads));
  config.shared_bytes = block.shared_bytes;
  config.cluster = division.blocks;
  config.stream = static_cast<cudaStream_t>(place.stream);
  return config;
}

// The block of a kernel with this pass, where one may have so many bytes of shared memory.
template <template <class> class Pass>
attention_core::cuda::BlockSize block_of(DType dtype, int own, int channels, int heads,
                                         int most_bytes) {
  attention_core::cuda::BlockSize block = {};
  attention_core::cuda::with_element(dtype, [&](auto element) {
    with_fusion_plan<decltype(element)>(heads, channels, [&](auto plan) {
      block = setup_of<decltype(plan), Pass<decltype(plan)>>(own, channels, most_bytes).block;
    });
  });
  return block;
}

// Starts kernel_of(plan), a kernel with this pass.
template <template <class> class Pass, class Params, class KernelOf>
void start(const char* name, const Params& p, const Division& division,
           const attention_core::cuda::Place& place, KernelOf kernel_of) {
  const DeviceGuard guard(place.device);
  attention_core::cuda::check(guard.status, name);
  const Vectors vectors = vectors_of(p.vectors, p.batch, p.own_channels, p.channels, p.num_heads);
  attention_core::cuda::with_element(p.tokens.dtype, [&](auto element) {
    with_fusion_plan<decltype(element)>(p.num_heads, p.channels, [&](auto plan) {
      using P = decltype(plan);
      const int limit = shared_bytes_of_block(place.device);
      const Setup setup = setup_of<P, Pass<P>>(p.own_channels, p.channels, limit);
      attention_core::cuda::check(
          launch(kernel_of(plan), config_of(p.batch, setup.block, division, place), p, vectors,
                 division.images, setup.over),
          attention_core::cuda::name_of<P>(name));
    });
  });
}

}  // namespace crossvit::cross_attention::cuda
