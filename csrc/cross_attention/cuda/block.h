#pragma once

#include "attention_core/cuda/choose.h"
#include "common/cuda/cluster.h"
#include "common/cuda/memory.h"
#include "cross_attention/cuda/kernels.h"
#include "cross_attention/cuda/rows.h"

// Code that the fusion's two kernels share. A cluster of blocks processes up to 16 images. Its
// blocks share the columns of every linear layer and exchange the results through distributed
// shared memory, so that the cluster reads the weights once; each block then processes the tokens
// of some images, or its share of one image's.

namespace crossvit::cross_attention::cuda {

using attention_core::PlanOf;
using attention_core::PlanShape;
using attention_core::Range;
using attention_core::TilePartials;
using attention_core::cuda::BlockSize;
using attention_core::cuda::Place;

// Shared memory of a block, as byte offsets: statistics of rows, at 0; a wide operand for the CLS
// or the tokens; floats as wide; an operand of C channels; the token pass. The floats and the
// narrow operand are dead while the pass runs: if not everything fits, the pass is aliased to them,
// and its copies start late.
struct BlockLayout {
  int pitch;  // of the wide operand's rows that hold the images' first tokens
  int wide, floats, narrow, pass;

  template <class T>
  __host__ __device__ static BlockLayout of(int cls_channels, int channels, bool aliased) {
    const int width = maximum(cls_channels, channels);
    BlockLayout layout;
    layout.pitch = operand_pitch<T>(width);
    layout.wide = kStatisticsBytes;
    layout.floats = layout.wide + operand_bytes_of<T>(width);
    layout.narrow = layout.floats + float_bytes_of(width);
    layout.pass = aliased ? layout.floats : layout.narrow + operand_bytes_of<T>(channels);
    return layout;
  }

  // The size with a pass of `pass_bytes`.
  template <class T>
  int bytes(int channels, int pass_bytes) const {
    return maximum(narrow + operand_bytes_of<T>(channels), pass + pass_bytes);
  }
};

// The images of a cluster. If there are fewer of them than blocks, blocks share an image's tokens.
struct Images {
  int64_t first;
  int count;
  int blocks_per_image;
  Range tokens;     // this block's, of each of its images
  int begin, step;  // this block's images: begin, begin + step and so on, below count

  __device__ static Images of(const Problem& problem, int images_per_cluster) {
    const int rank = cluster_rank(), ranks = cluster_size();
    const int blocks_per_image = maximum(1, ranks / images_per_cluster);
    const int64_t first = int64_t{blockIdx.x} / ranks * images_per_cluster;
    const int64_t count = minimum(problem.batch - first, int64_t{images_per_cluster});
    const int num_tokens = static_cast<int>(problem.num_tokens) + 1;  // with the CLS
    const Range tokens = {0, num_tokens, rank % blocks_per_image, blocks_per_image};
    return {first,  static_cast<int>(count), blocks_per_image,
            tokens, rank / blocks_per_image, ranks / blocks_per_image};
  }
};

// Runs passes over the tokens of this block's images, for as many heads at a time as a pass has
// rows: run(image, head, tiles) with the first of the heads, then results(image, head). Blocks that
// share an image synchronize in between, with the tiles' partials in `memory`.
template <class P, class Pass, class Run, class Results>
__device__ void pass_over_images(Pass& pass, const Images& images, float* memory, int heads,
                                 int channels, Run run, Results results) {
  const auto partials_of = [&](int image, int head) -> TilePartials<P> {
    if (images.blocks_per_image == 1) return {nullptr, channels};
    const int64_t passes = ceil_div(heads, P::kRows);
    const int64_t index = (images.first + image) * passes + head / P::kRows;
    const int64_t floats = P::tiles_of(images.tokens) * TilePartials<P>::floats(channels);
    return {memory + index * floats, channels};
  };
  for (int image = images.begin; image < images.count; image += images.step) {
    for (int head = 0; head < heads; head += P::kRows) {
      run(image, head, partials_of(image, head));
      if (images.blocks_per_image == 1) results(image, head);
    }
  }
  cluster_sync();
  if (images.blocks_per_image == 1) return;
  for (int head = 0; images.begin < images.count && head < heads; head += P::kRows) {
    const int count = minimum(P::kRows, heads - head);
    pass.gather(partials_of(images.begin, head), count, images.tokens);
    results(images.begin, head);
  }
  cluster_sync();
}

// This block's columns of a linear layer, in tiles of 8.
struct Share {
  int first, last;
  __device__ static Share of(int columns) {
    const int tiles = columns / 8, rank = cluster_rank(), size = cluster_size();
    return {tiles * rank / size * 8, tiles * (rank + 1) / size * 8};
  }
};

// transposed_linear for all columns of `heads` matrices of `depth` rows each, with `depth` columns
// of the operand per head. Column blocks go round-robin to the warps of the cluster; write_of(head)
// returns the function that writes a head's results.
template <class T, class WriteOf>
__device__ void transposed_linears(const T* rows, int pitch, const void* weights, int heads,
                                   int depth, int columns, WriteOf write_of) {
  const int warps = block_warps(), column_blocks = ceil_div(columns, kColumnBlock);
  const int first = cluster_rank() * warps + warp_index();
  for (int i = first; i < heads * column_blocks; i += cluster_size() * warps) {
    const int head = i / column_blocks;
    const T* weight = static_cast<const T*>(weights) + int64_t{head} * depth * columns;
    transposed_linear(rows + head * depth, pitch, weight, depth, columns,
                      i % column_blocks * kColumnBlock, write_of(head));
  }
}

// linear for this block's columns, with head_dim columns per head. A head's operand is of
// value(weight, bias, x) for the images' x [count, depth] of that head, with the parameters of a
// LayerNorm, and is computed into `rows`.
template <class T, class XOf, class Value, class Write>
__device__ void linear_of_heads(T* rows, int pitch, const Layer& layer, const Layer& norm,
                                int depth, int head_dim, int count, XOf x_of, Value value,
                                Write write) {
  const Share share = Share::of(depth);
  const Elements<T> weights(norm.weight), biases(norm.bias);
#pragma unroll 1
  for (int begin = share.first; begin < share.last;) {
    const int head = begin / head_dim;
    const int end = minimum((head + 1) * head_dim, share.last);
    const float* x = x_of(head);
#pragma unroll 1
    for (int c = thread_index(); c < depth; c += block_threads()) {
      const LoadedElement weight = weights.load(c), bias = biases.load(c);
      float values[kImages];
#pragma unroll
      for (int row = 0; row < kImages; ++row) {
        values[row] = row < count ? x[int64_t{row} * depth + c] : 0.0f;
      }
#pragma unroll
      for (int row = 0; row < kImages; ++row) {
        const float v = value(weights.value(weight), biases.value(bias), values[row]);
        rows[row * pitch + c] = from_float<T>(row < count ? v : 0.0f);
      }
    }
    __syncthreads();
    linear(rows, pitch, layer, depth, begin, end, write);
    __syncthreads();
    begin = end;
  }
}

// Brings the parameters to L2, a line once in the whole grid. The tokens' copies, which start
// early, would hold up the loads of one layer after another.
template <class T>
__device__ void prefetch_parameters(const Weights& w, int cls_channels, int channels) {
  const int thread = static_cast<int>(blockIdx.x) * block_threads() + thread_index();
  const int threads = static_cast<int>(gridDim.x) * block_threads();
  const auto fetch = [&](const Parameter& p, int64_t count) {
    const int size = p.dtype == DType::kFloat32 ? 4 : static_cast<int>(sizeof(T));
    if (p.data) prefetch(p.data, count * size, thread, threads);
  };
  const auto fetch_layer = [&](const Layer& layer, int64_t depth, int width) {
    fetch(layer.weight, depth * width);
    fetch(layer.bias, width);
  };
  fetch_layer(w.proj_norm, 1, cls_channels);
  fetch_layer(w.norm, 1, channels);
  fetch_layer(w.back_norm, 1, channels);
  fetch_layer(w.proj, cls_channels, channels);
  fetch_layer(w.query, channels, channels);
  fetch_layer(w.key, channels, channels);
  fetch_layer(w.value, channels, channels);
  fetch_layer(w.out, channels, channels);
  fetch_layer(w.back, channels, cls_channels);
}

// Copies rows of a parameter [.., width] to floats in shared memory. Called by a block.
template <class T>
__device__ void copy_rows(float* to, const Parameter& from, int64_t first, int count, int width) {
  constexpr int kLoads = 8;  // in flight
  const Elements<T> elements(from);
#pragma unroll 1
  for (int begin = thread_index(); begin < count * width; begin += kLoads * block_threads()) {
    LoadedElement loaded[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int index = begin + i * block_threads();
      loaded[i] = elements.load(first * width + index, index < count * width);
    }
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int index = begin + i * block_threads();
      if (index < count * width) to[index] = elements.value(loaded[i]);
    }
  }
}

// The plans: units, row groups, fewest and most warps of a group, stages and their widest tokens. A
// block has eight warps if its shared memory suffices. A pass has eight heads: more, which are
// rare, take several passes over tokens that are then in L2. Each kernel takes a core many seconds
// to compile, so plans are few: one for narrow tokens would hardly be faster, by the cycle model.
inline constexpr PlanShape kFloats = {12, 1, 1, 8, 1};
inline constexpr PlanShape kMedium = {24, 1, 1, 1, 2, 192};
inline constexpr PlanShape kWide = {12, 1, 4, 8, 1};

// Calls run(plan).
template <class T, class Run>
void with_fusion_plan(int64_t channels, Run&& run) {
  if constexpr (sizeof(T) == 4) {
    return run(PlanOf<T, kFloats>());
  } else {
    if (channels <= 384) return run(PlanOf<T, kMedium>());
    return run(PlanOf<T, kWide>());
  }
}

struct Setup {
  BlockSize block;
  bool aliased;
};

// Takes as many warp groups as eight warps and the block's shared memory allow. An aliased pass is
// the last resort, as its copies start late.
template <class P, class Pass>
Setup setup_of(int cls_channels, int channels, int max_bytes) {
  using T = typename P::Element;
  int warp_groups = 8 / P::group_warps(channels);
  const auto bytes = [&](bool aliased) {
    return BlockLayout::of<T>(cls_channels, channels, aliased)
        .template bytes<T>(channels, Pass::bytes(channels, warp_groups));
  };
  while (warp_groups > 1 && bytes(false) > max_bytes) warp_groups /= 2;
  const bool aliased = bytes(false) > max_bytes;
  return {{P::threads(channels, warp_groups), bytes(aliased)}, aliased};
}

// Launch shape of the kernel with this pass, whose blocks may have up to `max_bytes`.
template <template <class> class Pass>
BlockSize block_of(DType dtype, int cls_channels, int channels, int max_bytes) {
  BlockSize block = {};
  attention_core::cuda::with_element(dtype, [&](auto element) {
    with_fusion_plan<decltype(element)>(channels, [&](auto plan) {
      using P = decltype(plan);
      block = setup_of<P, Pass<P>>(cls_channels, channels, max_bytes).block;
    });
  });
  return block;
}

// Launches kernel_of(plan), a kernel with this pass.
template <template <class> class Pass, class Params, class KernelOf>
void start(const char* name, const Params& p, const ClusterShape& shape, float* workspace,
           const Place& place, KernelOf kernel_of) {
  const DeviceGuard guard(place.device);
  attention_core::cuda::check(guard.status, name);
  const int cls_channels = static_cast<int>(p.problem.cls_channels);
  const int channels = static_cast<int>(p.problem.channels);
  const int64_t clusters = ceil_div(p.problem.batch, shape.images);
  LaunchConfig config;
  config.grid = dim3(static_cast<unsigned>(clusters * shape.blocks));
  config.cluster = shape.blocks;
  config.stream = static_cast<cudaStream_t>(place.stream);
  attention_core::cuda::with_element(p.tokens.dtype, [&](auto element) {
    with_fusion_plan<decltype(element)>(channels, [&](auto plan) {
      using P = decltype(plan);
      const Setup setup =
          setup_of<P, Pass<P>>(cls_channels, channels, shared_bytes_of_block(place.device));
      config.block = dim3(static_cast<unsigned>(setup.block.threads));
      config.shared_bytes = setup.block.shared_bytes;
      const Vectors vectors = Vectors::at(static_cast<float*>(p.vectors), p.problem);
      attention_core::cuda::check(
          launch(kernel_of(plan), config, p, vectors, workspace, shape.images, setup.aliased),
          attention_core::cuda::name_of<P>(name));
    });
  });
}

}  // namespace crossvit::cross_attention::cuda
