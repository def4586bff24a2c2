#pragma once

#include <stdexcept>
#include <string>

#include "attention_core/cuda/kernels.h"
#include "attention_core/cuda/partials.h"
#include "common/cuda/cluster.h"
#include "common/cuda/launch.h"

// Chooses the plan that runs a problem; code that the launchers share.

namespace crossvit::attention_core::cuda {

inline int num_splits(const Problem& problem) {
  return static_cast<int>(maximum(int64_t{1}, ceil_div(problem.num_tokens, kSplitTokens)));
}

// Warp groups of a block, forward and backward, where a warp has whole tiles. At 384 channels
// backward has three: with four, two blocks would need more shared memory than an sm_90
// multiprocessor has.
constexpr int kNarrowGroups[2] = {6, 4}, kMediumGroups[2] = {4, 3};

// The tokens of a split, and this block's rank among the blocks that share them.
template <class P, bool kBackward>
__device__ inline Range range_of_split(const Problem& problem, int split) {
  const int first = split * kSplitTokens;
  const int64_t remaining = problem.num_tokens - first;
  Range range = {first, first + static_cast<int>(minimum(remaining, int64_t{kSplitTokens})),
                 cluster_rank(), cluster_size()};
  constexpr int kGroups = (P::kUnits > 12 ? kMediumGroups : kNarrowGroups)[kBackward];
  if constexpr (!P::kWarpsShareTiles && kGroups % 4 == 0) {
    // Where all blocks fit at once, those of one multiprocessor are half a grid apart.
    range.swap = block_warps() % 4 == 0 && 2 * blockIdx.x >= gridDim.x ? 2 : 0;
  }
  return range;
}

// Rounds up to whole passes: one of 8 rows, or several, of 8 rows or of 16.
inline int64_t padded_rows(int64_t rows) { return rows <= 8 ? 8 : round_up(rows, 16); }

// The maximum number of tiles per split.
__host__ __device__ inline int64_t tiles_of_split(const Problem& problem) {
  return ceil_div(minimum(problem.num_tokens, int64_t{kSplitTokens}), kTileTokens);
}

// Floats of all tiles' partials of `rows` rows; 0 if no blocks share an image.
inline int64_t tile_floats(const Problem& problem, int blocks, int64_t rows) {
  if (blocks == 1) return 0;
  const int64_t tiles = problem.batch * num_splits(problem) * tiles_of_split(problem);
  return tiles * rows * partial_floats(static_cast<int>(problem.channels));
}

// The partials of a split, by its index over all images and passes.
template <class P>
__device__ TilePartials<P> partials_of_split(float* tiles, const Problem& problem, int64_t index) {
  const int channels = static_cast<int>(problem.channels);
  if (!tiles) return {nullptr, channels};
  return {tiles + index * tiles_of_split(problem) * TilePartials<P>::floats(channels), channels};
}

// The plans: units, row groups, fewest and most warps of a group, stages and their widest tokens.
// Wide tokens take more warps rather than more registers per warp. Float tokens and 9 to 16 queries
// of narrow ones are rare: the former share one plan, the latter have none of their own.
inline constexpr PlanShape kFloats = {12, 1, 1, 8, 2, 768};
inline constexpr PlanShape kManyRows = {12, 2, 4, 8, 2};
inline constexpr PlanShape kNarrow = {12, 1, 1, 1, 2};
inline constexpr PlanShape kNarrowBackward = {12, 1, 1, 1, 3};
inline constexpr PlanShape kMedium = {24, 1, 1, 1, 2};
inline constexpr PlanShape kWide = {12, 1, 4, 8, 2};

// Calls run(plan, warp_groups).
template <class T, bool kBackward, class Run>
void with_plan(int64_t rows, int64_t channels, Run&& run) {
  if constexpr (sizeof(T) == 4) {
    return run(PlanOf<T, kFloats>(), channels <= 192 ? 4 : channels <= 384 ? 2 : 1);
  } else {
    constexpr int kMinManyRowsChannels = 16 * kManyRows.min_group_warps;  // a unit per warp
    if (rows > 8 && channels >= kMinManyRowsChannels) return run(PlanOf<T, kManyRows>(), 1);
    using Narrow = std::conditional_t<kBackward, PlanOf<T, kNarrowBackward>, PlanOf<T, kNarrow>>;
    if (channels <= 192) return run(Narrow(), kNarrowGroups[kBackward]);
    if (channels <= 384) return run(PlanOf<T, kMedium>(), kMediumGroups[kBackward]);
    return run(PlanOf<T, kWide>(), 1);
  }
}

template <class Run>
void with_element(DType dtype, Run&& run) {
  switch (dtype) {
    case DType::kFloat32: return run(float{});
    case DType::kBFloat16: return run(bf16{});
    case DType::kFloat16: return run(half{});
    default: throw std::invalid_argument("no CUDA kernel for this element type");
  }
}

// Rows per pass: 16, or 8 if those are enough or 16 do not fit.
inline int64_t rows_of_pass(int64_t num_rows, int bytes_of_16, int max_bytes) {
  return num_rows <= 8 || bytes_of_16 > max_bytes ? 8 : 16;
}

template <class P>
std::string name_of(const char* kernel) {
  const char* type = sizeof(typename P::Element) == 4            ? "float32"
                     : std::is_same_v<typename P::Element, bf16> ? "bfloat16"
                                                                 : "float16";
  return std::string(kernel) + "<" + type + ", up to " + std::to_string(P::kMaxChannels) +
         " channels and " + std::to_string(P::kRows) + " rows>";
}

inline void check(cudaError_t error, const std::string& kernel) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(kernel + ": " + cudaGetErrorName(error) + ": " +
                           cudaGetErrorString(error));
}

// Launch shape of the kernel with this pass, for up to `rows` rows per pass: the plan's warp
// groups, or as many as fit into `max_bytes` of shared memory, at least one.
template <template <class> class Pass, bool kBackward>
BlockSize block_of(DType dtype, int64_t rows, int64_t channels, int max_bytes) {
  BlockSize block = {};
  with_element(dtype, [&](auto element) {
    with_plan<decltype(element), kBackward>(rows, channels, [&](auto plan, int warp_groups) {
      using P = decltype(plan);
      const int width = static_cast<int>(channels);
      while (warp_groups > 1 && Pass<P>::bytes(width, warp_groups) > max_bytes) --warp_groups;
      block = {P::threads(width, warp_groups), Pass<P>::bytes(width, warp_groups)};
    });
  });
  return block;
}

// Selects the device and calls run(plan, config), where config's grid is still to be set.
template <template <class> class Pass, bool kBackward, class Run>
void start(const char* name, const Problem& problem, DType dtype, int blocks, const Place& place,
           Run run) {
  if (blocks < 1 || blocks > 8 || (blocks & (blocks - 1))) {
    throw std::invalid_argument("blocks of a cluster: expected a power of two up to 8, found " +
                                std::to_string(blocks));
  }
  const DeviceGuard guard(place.device);
  check(guard.status, name);
  const int max_bytes = shared_bytes_of_block(place.device);
  const int bytes = block_of<Pass, kBackward>(dtype, 16, problem.channels, max_bytes).shared_bytes;
  const int64_t rows = rows_of_pass(problem.num_rows, bytes, max_bytes);
  const BlockSize block = block_of<Pass, kBackward>(dtype, rows, problem.channels, max_bytes);
  LaunchConfig config;
  config.cluster = blocks;
  config.block = dim3(static_cast<unsigned>(block.threads));
  config.shared_bytes = block.shared_bytes;
  config.stream = static_cast<cudaStream_t>(place.stream);
  with_element(dtype, [&](auto element) {
    with_plan<decltype(element), kBackward>(rows, problem.channels,
                                            [&](auto plan, int) { run(plan, config); });
  });
}

// Launch shape of a kernel that merges the splits' partials: a block per row.
inline LaunchConfig merge_config(const Problem& problem, cudaStream_t stream) {
  LaunchConfig config;
  config.grid = dim3(static_cast<unsigned>(problem.batch * problem.num_rows));
  config.block = dim3(kMergeThreads);
  config.stream = stream;
  return config;
}

}  // namespace crossvit::attention_core::cuda
