#pragma once

#include "attention_core/cuda/choose.h"
#include "common/cuda/cluster.h"
#include "common/cuda/memory.h"
#include "cross_attention/cuda/kernels.h"
#include "cross_attention/cuda/layers.h"
#include "cross_attention/cuda/row_norms.h"

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

// Shared memory of a block, as byte offsets: sums of rows, at 0; a wide operand for the CLS or the
// tokens; floats as wide; an operand of C channels; the token pass, and after it what a layer's
// warps exchange, unless an operand that is not in use has room for that. The floats and the narrow
// operand are dead while the pass runs: if not everything fits, the pass is aliased to them, and
// its copies start late.
struct BlockLayout {
  int wide, floats, narrow, pass;
  bool aliased;
  int second_stages = 0;  // of the warps' rings, as far as there is room

  template <class T>
  static BlockLayout of(int cls_channels, int channels, bool aliased) {
    const int width = maximum(cls_channels, channels);
    BlockLayout layout;
    layout.aliased = aliased;
    layout.wide = kStatisticsBytes;
    layout.floats = layout.wide + operand_bytes_of<T>(width);
    layout.narrow = layout.floats + float_bytes_of(width);
    // Before backward's pass its rows, two sets of eight, are part of what warps exchange.
    const int rows_bytes = 16 * channels * static_cast<int>(sizeof(T));
    layout.pass = aliased ? layout.floats
                          : maximum(layout.template scratch<T>(channels),
                                    layout.narrow + kScratchBytes - rows_bytes);
    return layout;
  }

  template <class T>
  __host__ __device__ int scratch(int channels) const {
    return narrow + operand_bytes_of<T>(channels);
  }

  template <class T>
  __host__ __device__ static bool operands_have_room(int channels) {
    return operand_bytes_of<T>(channels) >= kScratchBytes;
  }

  // The size with a pass of `pass_bytes`.
  template <class T>
  int bytes(int channels, int pass_bytes) const {
    const int scratch_bytes = operands_have_room<T>(channels) ? 0 : kScratchBytes;
    return maximum(scratch<T>(channels) + scratch_bytes, pass + pass_bytes);
  }
};

// How a cluster divides its work, as far as the launch knows it: divisions are slow.
struct Sharing {
  int images;  // of a cluster
  int log_blocks_of_image;
  int head_dim;
  // Forward's rows of passes and operands of heads' layers, from block to block; else through
  // memory.
  bool operands_are_sent;
  int sent_bytes;  // of rows, behind which are gamma and beta

  template <class P>
  static Sharing of(const Problem& problem, const ClusterShape& shape, const BlockLayout& layout) {
    using T = typename P::Element;
    Sharing sharing = {shape.images, 0, static_cast<int>(problem.channels / problem.num_heads)};
    while (2 * shape.images << sharing.log_blocks_of_image <= shape.blocks) {
      ++sharing.log_blocks_of_image;
    }
    const int64_t passes =
        ceil_div(shape.images, shape.blocks) * ceil_div(problem.num_heads, int64_t{P::kRows});
    const int64_t rows_bytes = P::kRows * P::row_pitch(static_cast<int>(problem.channels)) *
                               static_cast<int64_t>(sizeof(T));
    const int64_t norm_bytes = 2 * problem.channels * static_cast<int64_t>(sizeof(float));
    sharing.operands_are_sent =
        !layout.aliased && passes * rows_bytes + norm_bytes <= layout.narrow - layout.floats;
    sharing.sent_bytes = sharing.operands_are_sent ? static_cast<int>(passes * rows_bytes) : 0;
    return sharing;
  }
};

// The images of a cluster. If there are fewer of them than blocks, blocks share an image's tokens.
struct Images {
  int64_t first;
  int count;
  int blocks_per_image;
  Range tokens;     // this block's, of each of its images
  int begin, step;  // this block's images: begin, begin + step and so on, below count

  __device__ static Images of(const Problem& problem, const Sharing& sharing) {
    const int rank = cluster_rank(), ranks = cluster_size(), log = sharing.log_blocks_of_image;
    const int64_t first = int64_t{blockIdx.x >> log2_of(ranks)} * sharing.images;
    const int64_t count = minimum(problem.batch - first, int64_t{sharing.images});
    const int num_tokens = static_cast<int>(problem.num_tokens) + 1;  // with the CLS
    const Range tokens = {0, num_tokens, rank & ((1 << log) - 1), 1 << log};
    return {first, static_cast<int>(count), 1 << log, tokens, rank >> log, ranks >> log};
  }
};

// What an image's pass takes. The pass needs almost all registers there are: these are read anew,
// so that nothing that follows from them is kept from one image to the next, nor from before the
// pass to behind it.
struct Sizes {
  int channels, heads;
  int64_t batch, first;  // first: the cluster's first image
  Range tokens;

  __device__ static Sizes of(const Problem& problem, const Images& images) {
    return {used_from_here(static_cast<int>(problem.channels)),
            used_from_here(static_cast<int>(problem.num_heads)),
            used_from_here(problem.batch),
            used_from_here(images.first),
            {0, used_from_here(static_cast<int>(problem.num_tokens) + 1),
             used_from_here(images.tokens.rank), used_from_here(images.blocks_per_image)}};
  }
};

// Runs passes over the tokens of this block's images, for as many heads at a time as a pass has
// rows: run(sizes, image, head, tiles) with the first of the heads, then results(sizes, image,
// head). Blocks that share an image synchronize in between, with the tiles' partials in `memory`,
// and gather(sizes, head, tiles). The caller synchronizes the cluster.
template <class P, class Run, class Gather, class Results>
__device__ __forceinline__ void pass_over_images(const Images& images, const Problem& problem,
                                                 float* memory, Run run, Gather gather,
                                                 Results results) {
  const auto partials_of = [&](const Sizes& s, int image, int head) -> TilePartials<P> {
    if (images.blocks_per_image == 1) return {nullptr, s.channels};
    const int64_t passes = ceil_div(s.heads, P::kRows);
    const int64_t index = (s.first + image) * passes + head / P::kRows;
    const int64_t floats = P::tiles_of(s.tokens) * TilePartials<P>::floats(s.channels);
    return {memory + index * floats, s.channels};
  };
  const int heads = static_cast<int>(problem.num_heads);
#pragma unroll 1
  for (int image = images.begin; image < images.count; image += images.step) {
#pragma unroll 1
    for (int head = 0; head < heads; head += P::kRows) {
      const Sizes s = Sizes::of(problem, images);
      run(s, image, head, partials_of(s, image, head));
      if (images.blocks_per_image == 1) results(Sizes::of(problem, images), image, head);
    }
  }
  if (images.blocks_per_image == 1) return;
  cluster_sync();
#pragma unroll 1
  for (int head = 0; images.begin < images.count && head < heads; head += P::kRows) {
    const Sizes s = Sizes::of(problem, images);
    gather(s, head, partials_of(s, images.begin, head));
    results(s, images.begin, head);
  }
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

  // Stores to an input of a row's LayerNorm, if that is in one of these blocks.
  template <class V>
  __device__ void store_input(int row, V* to, V value, Ranks ranks = {}) const {
    if (are_all) {
      store_in_ranks(to, value, ranks);
    } else if (ranks.first == 0) {
      *in_rank(to, row & (this->ranks - 1)) = value;
    }
  }

  // Stores four results of a row, which this block computes, as operands of all blocks.
  template <class T>
  __device__ void store_operand(T* to, float4 values) const {
    const QuadBits<T> bits = pack_quad<T>(values);
    QuadBits<T>* quad = reinterpret_cast<QuadBits<T>*>(to);
    if (are_all) {
      *quad = bits;
    } else {
      store_in_ranks(quad, bits);
    }
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
    const int all = columns / 8, rank = cluster_rank(), log = log2_of(cluster_size());
    return {all * rank >> log, all * (rank + 1) >> log};
  }
  __device__ int tiles() const { return end - begin; }
  __device__ int first(int tile) const { return 8 * (begin + tile); }
};

// The heads of this block, rank, rank + size and so on, as tiles of 8 of their columns.
struct OwnHeads {
  int head_dim, rank, size, count;

  __device__ static OwnHeads of(const Sharing& sharing, int heads) {
    const int rank = cluster_rank(), size = cluster_size();
    return {sharing.head_dim, rank, size, (heads - rank + size - 1) >> log2_of(size)};
  }
  __device__ int head(int i) const { return rank + i * size; }
  __device__ int tiles() const { return count * head_dim / 8; }
  __device__ int first(int tile) const {
    int c = 8 * tile, i = 0;
    for (; c >= head_dim; c -= head_dim) ++i;
    return head(i) * head_dim + c;
  }
  // The columns of a head.
  __device__ Share columns(int i) const {
    const int first = head(i) * head_dim / 8;
    return {first, i < count ? first + head_dim / 8 : first};
  }
};

// Runs a linear layer for the columns of this block's heads, with the first head's loaded. A head's
// operand is of value(weight, bias, x) for the images' x [count, depth] of that head, with the
// parameters of a LayerNorm: in `rows`, where it is computed unless it is sent there. Of other
// heads than the first of a block it is computed.
template <class T, class XOf, class Value, class Write>
__device__ void linear_of_heads(LinearTiles<T, Share>& linear, T* rows, int pitch, bool is_sent,
                                const Layer& norm, int depth, const OwnHeads& own, int count,
                                XOf x_of, Value value, Write write) {
  const Elements<T> weights(norm.weight), biases(norm.bias);
#pragma unroll 1
  for (int i = 0; i < own.count; ++i) {
    if (i > 0) linear.start(own.columns(i));
    if (i > 0 || !is_sent) {
      const float* x = x_of(own.head(i));
      for_each_column<T>(depth, [&](int c, auto rows_of) {
        const LoadedQuad loaded_weight = weights.load_quad(c), loaded_bias = biases.load_quad(c);
        const float4 weight = weights.value(loaded_weight), bias = biases.value(loaded_bias);
        rows_of(
            count, [&](int row) { return load_quad(x + row * depth + c); },
            [&](int row, float4 v) { store_quad(rows + row * pitch + c, value(weight, bias, v)); });
      });
      __syncthreads();
    }
    linear.run(rows, pitch, count, write);
    if (i + 1 < own.count) __syncthreads();
  }
}

// Brings the parameters to L2, a line once in the whole grid. The tokens' copies, which start
// early, would hold up the loads of one layer after another. What is loaded first is left out.
template <class T>
__device__ void prefetch_parameters(const Weights& w, int cls_channels, int channels) {
  const auto lines_of = [](int elements) {
    return ceil_div(elements * static_cast<int>(sizeof(T)), kLineBytes);
  };
  const int blocks = static_cast<int>(gridDim.x), block = static_cast<int>(blockIdx.x);
  const int square = lines_of(channels * channels), other = lines_of(cls_channels * channels);
#pragma unroll 1
  for (int i = thread_index() * blocks + block; i < 4 * square + 2 * other;
       i += block_threads() * blocks) {
    const void* data = w.query.weight.data;
    int line = i;
    const auto next = [&](const Parameter& p, int lines) {
      if (line >= lines) line -= lines, data = p.data;
    };
    if (line >= 4 * square) {
      line -= 4 * square, data = w.proj.weight.data;
      next(w.back.weight, other);
    } else {
      next(w.key.weight, square);
      if (data == w.key.weight.data) next(w.value.weight, square);
      if (data == w.value.weight.data) next(w.out.weight, square);
    }
    prefetch_line(static_cast<const char*>(data) + line * kLineBytes);
  }
  // Vectors have few lines: four lanes of one warp have each.
  if (block > 0 || warp_index() + 1 < block_warps()) return;
  const int vector = lane_index() / 4;
  Parameter p = w.norm.weight;
  const auto choose = [&](int number, const Parameter& other) {
    if (vector == number) p = other;
  };
  choose(1, w.norm.bias);
  choose(2, w.query.bias);
  choose(3, w.value.bias);
  choose(4, w.out.bias);
  choose(5, w.back_norm.weight);
  choose(6, w.back_norm.bias);
  choose(7, w.back.bias);
  const int size = p.dtype == DType::kFloat32 ? 4 : static_cast<int>(sizeof(T));
  const int width = vector == 7 ? cls_channels : channels;
  if (p.data) prefetch(p.data, width * size, lane_index() % 4, 4);
}

// The plans: units, row groups, fewest and most warps of a group, and stages at most. A block has
// eight warps if its shared memory suffices. A pass has eight heads: more, which are rare, take
// several passes over tokens that are then in L2. Each kernel takes a core many seconds to compile,
// so plans are few: one for narrow tokens would hardly be faster, by the cycle model.
inline constexpr PlanShape kFloats = {12, 1, 1, 8, 1};
inline constexpr PlanShape kMedium = {24, 1, 1, 1, 2};
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
  const auto bytes = [&] {
    return layout.bytes<T>(channels, Pass::bytes(channels, warp_groups, layout.second_stages));
  };
  while (warp_groups > 1 && bytes() > max_bytes) warp_groups /= 2;
  if (bytes() > max_bytes) layout = BlockLayout::of<T>(cls_channels, channels, true);
  while (P::kStages > 1 && layout.second_stages < warp_groups) {
    ++layout.second_stages;
    if (bytes() <= max_bytes) continue;
    --layout.second_stages;
    break;
  }
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
          launch(kernel_of(plan), config, p, vectors, workspace,
                 Sharing::of<P>(p.problem, shape, setup.layout), setup.layout),
          attention_core::cuda::name_of<P>(name));
    });
  });
}

}  // namespace crossvit::cross_attention::cuda
