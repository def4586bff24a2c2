#pragma once

#include "attention_core/cuda/choose.h"
#include "common/cuda/cluster.h"
#include "common/cuda/memory.h"
#include "cross_attention/cuda/kernels.h"
#include "cross_attention/cuda/layers.h"

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
  int wide, floats, narrow, pass;
  bool aliased;

  template <class T>
  static BlockLayout of(int cls_channels, int channels, bool aliased) {
    const int width = maximum(cls_channels, channels);
    BlockLayout layout;
    layout.aliased = aliased;
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

// Which blocks of a cluster compute the LayerNorm of an image's row. Each row has one, which sends
// the result to all, unless there are few rows: then each block computes all of them, in less time
// than another barrier of the cluster takes. A cluster's size is a power of two.
struct RowOwners {
  int rank, ranks;
  bool are_all;

  __device__ static RowOwners of(int count) { return {cluster_rank(), cluster_size(), count <= 2}; }

  // This block's rows: begin, begin + step and so on.
  __device__ int begin() const { return are_all ? 0 : rank; }
  __device__ int step() const { return are_all ? 1 : ranks; }
  // Whether this block stores what is computed from a row to memory.
  __device__ bool stores(int row) const { return (row & (ranks - 1)) == rank; }

  // Stores to an input of a row's LayerNorm.
  template <class V>
  __device__ void store_input(int row, V* to, V value) const {
    if (are_all) {
      store_in_ranks(to, value);
    } else {
      *in_rank(to, row & (ranks - 1)) = value;
    }
  }

  // Returns write(row, c, y): stores results as operands of all blocks, and to rows `first` and
  // following in memory.
  template <class T>
  __device__ auto writer(T* rows, int width, float* saved, int64_t first) const {
    return [=, *this](int row, int c, float2 value) {
      Pair<T>* to = reinterpret_cast<Pair<T>*>(rows + row * operand_pitch<T>(width) + c);
      const Pair<T> operand = pack<T>(value.x, value.y);
      if (are_all) {
        *to = operand;
      } else {
        store_in_ranks(to, operand);
      }
      if (stores(row)) *reinterpret_cast<float2*>(saved + (first + row) * width + c) = value;
    };
  }

  // Sends this block's rows of an operand to the others, and waits for theirs. For all threads of a
  // block.
  template <class T>
  __device__ void exchange(T* rows, int width, int count) const {
    __syncthreads();
    if (are_all || ranks == 1) return;
    const int vectors = width * static_cast<int>(sizeof(T)) / 16;
#pragma unroll 1
    for (int row = rank; row < count; row += ranks) {
      uint4* from = reinterpret_cast<uint4*>(rows + row * operand_pitch<T>(width));
#pragma unroll 1
      for (int i = thread_index(); i < vectors; i += block_threads()) {
        store_in_ranks(from + i, from[i]);
      }
    }
    cluster_sync();
  }

  // Waits for the results of all rows.
  __device__ void wait() const {
    if (are_all) {
      __syncthreads();
    } else {
      cluster_sync();
    }
  }
};

// This block's columns of a linear layer, in tiles of 8.
struct Share {
  int begin, end;  // in tiles

  __device__ static Share of(int columns) {
    const int all = columns / 8, rank = cluster_rank(), size = cluster_size();
    return {all * rank / size, all * (rank + 1) / size};
  }
  __device__ int tiles() const { return end - begin; }
  __device__ int first(int tile) const { return 8 * (begin + tile); }
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

// The heads of this block, rank, rank + size and so on, as tiles of 8 of their columns.
struct OwnHeads {
  int head_dim, rank, size, count;

  __device__ static OwnHeads of(int channels, int heads) {
    const int head_dim = channels / used_from_here(heads);
    const int rank = cluster_rank(), size = cluster_size();
    return {head_dim, rank, size, rank < heads ? ceil_div(heads - rank, size) : 0};
  }
  __device__ int head(int i) const { return rank + i * size; }
  __device__ int tiles() const { return count * head_dim / 8; }
  __device__ int first(int tile) const {
    const int i = tile * 8 / head_dim;
    return head(i) * head_dim + tile * 8 - i * head_dim;
  }
};

// The same for this block's heads only, by its warps.
template <class T, class WriteOf>
__device__ void transposed_linears_of_heads(const T* rows, int pitch, const void* weights,
                                            const OwnHeads& own, int columns, WriteOf write_of) {
  const int column_blocks = ceil_div(columns, kColumnBlock), depth = own.head_dim;
  for (int i = warp_index(); i < own.count * column_blocks; i += block_warps()) {
    const int head = own.head(i / column_blocks);
    const T* weight = static_cast<const T*>(weights) + int64_t{head} * depth * columns;
    transposed_linear(rows + head * depth, pitch, weight, depth, columns,
                      i % column_blocks * kColumnBlock, write_of(head));
  }
}

// A linear layer for the columns of this block's heads. A head's operand is of value(weight, bias,
// x) for the images' x [count, depth] of that head, with the parameters of a LayerNorm, and is
// computed into `rows`.
template <class T, class XOf, class Value, class Write>
__device__ void linear_of_heads(T* rows, int pitch, const Layer& layer, const Layer& norm,
                                int depth, const OwnHeads& own, int count, XOf x_of, Value value,
                                Write write) {
  const Elements<T> weights(norm.weight), biases(norm.bias);
#pragma unroll 1
  for (int i = 0; i < own.count; ++i) {
    const int head = own.head(i);
    const int tile = head * own.head_dim / 8;
    LinearTiles<T, Share> linear(layer, depth, {tile, tile + own.head_dim / 8});
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
    linear.run(rows, pitch, write);
    __syncthreads();
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

// Copies rows begin, begin + step, ... below count of a parameter [.., width], after its first
// ones, to floats in shared memory. Called by a block.
template <class T>
__device__ void copy_rows(float* to, const Parameter& from, int64_t first, int begin, int step,
                          int count, int width) {
  constexpr int kLoads = 8;  // in flight
  const Elements<T> elements(from);
  const int total = begin < count ? ceil_div(count - begin, step) * width : 0;
#pragma unroll 1
  for (int start = thread_index(); start < total; start += kLoads * block_threads()) {
    LoadedElement loaded[kLoads];
    int offsets[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int index = start + i * block_threads();
      // Row begin + index / width * step, column index % width.
      offsets[i] = begin * width + index + index / width * ((step - 1) * width);
      loaded[i] = elements.load(first * width + offsets[i], index < total);
    }
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      if (start + i * block_threads() < total) to[offsets[i]] = elements.value(loaded[i]);
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
  BlockLayout layout;
};

// Takes as many warp groups as eight warps and the block's shared memory allow. An aliased pass is
// the last resort, as its copies start late.
template <class P, class Pass>
Setup setup_of(int cls_channels, int channels, int max_bytes) {
  using T = typename P::Element;
  int warp_groups = 8 / P::group_warps(channels);
  BlockLayout layout = BlockLayout::of<T>(cls_channels, channels, false);
  const auto bytes = [&] { return layout.bytes<T>(channels, Pass::bytes(channels, warp_groups)); };
  while (warp_groups > 1 && bytes() > max_bytes) warp_groups /= 2;
  if (bytes() > max_bytes) layout = BlockLayout::of<T>(cls_channels, channels, true);
  return {{P::threads(channels, warp_groups), bytes()}, layout};
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
          launch(kernel_of(plan), config, p, vectors, workspace, shape.images, setup.layout),
          attention_core::cuda::name_of<P>(name));
    });
  });
}

}  // namespace crossvit::cross_attention::cuda
