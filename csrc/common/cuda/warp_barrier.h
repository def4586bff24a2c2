#pragma once

#include "common/cuda/gpu.h"

namespace crossvit {

#ifdef __CUDACC__

// Barrier `id`, 1 to 15, of `threads` of the block's threads: whole warps.
__device__ __forceinline__ void barrier_of_warps(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

#else

using testing::barrier_of_warps;

#endif

}  // namespace crossvit
