#pragma once

#include <algorithm>
#include <stdexcept>
#include <string>

#include "attention_core/cuda/kernels.h"
#include "attention_core/cuda/tile_states.h"
#include "common/cuda/cluster.h"
#include "common/cuda/launch.h"

// Which plan runs a problem, and what launchers have in common.

namespace crossvit::attention_core::cuda {

inline int parts_of(const Problem& problem) {
  return static_cast<int>(std::max<int64_t>(1, (problem.num_tokens + kPart - 1) / kPart));
}

// Of a part, what this block of its cluster has.
__device__ inline Range range_of_part(const Problem& problem, int part) {
  const int first = part * kPart;
  const int64_t left = problem.num_tokens - first;
  return {first, first + (left < kPart ? static_cast<int>(left) : kPart), cluster_rank(),
          cluster_size()};
}

// Enough for passes of 8 score rows and of 16.
inline int64_t padded_rows(int64_t rows) { return (rows + 15) / 16 * 16; }

// The most tiles that a part has.
__host__ __device__ inline int64_t tiles_of_part(const Problem& problem) {
  const int64_t tokens = problem.num_tokens < kPart ? problem.num_tokens : kPart;
  return (tokens + kTokensOfTile - 1) / kTokensOfTile;
}

// What the tiles of so many score rows of all parts leave in memory, where blocks share them.
inline int64_t tile_floats(const Problem& problem, int blocks, int64_t rows) {
  if (blocks == 1) return 0;
  const int64_t tiles = problem.batch * parts_of(problem) * tiles_of_part(problem);
  return tiles * rows * tile_state_floats(static_cast<int>(problem.channels));
}

// Of the index-th part, of all images and groups of score rows.
template <class P>
__device__ TileStates<P> states_of_part(float* tiles, const Problem& problem, int64_t index) {
  const int channels = static_cast<int>(problem.channels);
  if (!tiles) return {nullptr, channels};
  return {tiles + index * tiles_of_part(problem) * TileStates<P>::floats(channels), channels};
}

// Runs run(plan, teams). A wide image goes to more warps rather than to more registers of one. Few
// problems have 16 rows of narrow tokens, or floats: the former have no kernels of their own, which
// take long to compile, the latter one kernel for all. At 384 channels backward has three teams:
// two blocks of four are more shared memory than a multiprocessor of sm_90 has.
template <class T, bool kBackward, class Run>
void with_plan(int64_t rows, int64_t channels, Run&& run) {
  if constexpr (sizeof(T) == 4) {
    return run(Plan<T, 12, 1, 1, 8, 2>(), channels <= 192 ? 4 : channels <= 384 ? 2 : 1);
  } else {
    constexpr int kOneUnitEach = 64;  // channels; four warps of a tile want one or more
    if (rows > 8 && channels >= kOneUnitEach) return run(Plan<T, 12, 2, 4, 8, 2>(), 1);
    if (channels <= 192) return run(Plan<T, 12, 1, 1, 1, 3>(), 4);
    if (channels <= 384) return run(Plan<T, 24, 1, 1, 1, 2>(), kBackward ? 3 : 4);
    return run(Plan<T, 12, 1, 4, 8, 2>(), 1);
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

// Score rows of a pass, more of which take several: 16, or 8 where they do not fit.
inline int64_t rows_of_pass(int64_t num_rows, int bytes_of_16, int device) {
  return num_rows <= 8 || bytes_of_16 > shared_bytes_of_block(device) ? 8 : 16;
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

// The block of a kernel with this pass for at most so many score rows.
template <template <class> class Pass, bool kBackward>
BlockSize block_of(DType dtype, int64_t rows, int64_t channels) {
  BlockSize block = {};
  with_element(dtype, [&](auto element) {
    with_plan<decltype(element), kBackward>(rows, channels, [&](auto plan, int teams) {
      using P = decltype(plan);
      const int width = static_cast<int>(channels);
      block = {P::threads(width, teams), Pass<P>::bytes(width, teams)};
    });
  });
  return block;
}

// Runs run(plan, teams, stream) on the device for a problem of any number of score rows.
template <template <class> class Pass, bool kBackward, class Run>
void start(const char* name, const Problem& problem, DType dtype, const Place& place, Run run) {
  const DeviceGuard guard(place.device);
  check(guard.status, name);
  const int bytes = block_of<Pass, kBackward>(dtype, 16, problem.channels).shared_bytes;
  const int64_t rows = rows_of_pass(problem.num_rows, bytes, place.device);
  with_element(dtype, [&](auto element) {
    with_plan<decltype(element), kBackward>(rows, problem.channels, [&](auto plan, int teams) {
      run(plan, teams, static_cast<cudaStream_t>(place.stream));
    });
  });
}

}  // namespace crossvit::attention_core::cuda
