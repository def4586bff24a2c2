// Threads and warps of a block.
#pragma once

#include "common/arithmetic.h"
#include "common/cuda/gpu.h"

namespace crossvit {

__device__ __forceinline__ int thread_index() { return static_cast<int>(threadIdx.x); }
__device__ __forceinline__ int block_threads() { return static_cast<int>(blockDim.x); }
__device__ __forceinline__ int lane_index() { return thread_index() % 32; }
__device__ __forceinline__ int warp_index() { return thread_index() / 32; }
__device__ __forceinline__ int block_warps() { return block_threads() / 32; }

__device__ __forceinline__ float sum_of_warp(float x) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(~0u, x, distance);
  return x;
}

#ifdef __CUDACC__

// Synchronizes `threads` threads of the block, whole warps, at barrier `id`, 1 to 15.
__device__ __forceinline__ void barrier_of_warps(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

#else

using testing::barrier_of_warps;

#endif

}  // namespace crossvit
