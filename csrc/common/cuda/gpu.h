// CUDA's own names: from nvcc, or from the test shim when a C++ compiler builds for the CPU.
#pragma once

#ifdef __CUDACC__

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#define CROSSVIT_DYNAMIC_SHARED(name) extern __shared__ __align__(128) char name[]

namespace crossvit {

__device__ __forceinline__ uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// Returns the same pointer or number, but keeps the compiler from computing what follows from it
// any earlier, before a loop or a pass through all of which it would take registers.
template <class T>
__device__ __forceinline__ T used_from_here(T value) {
  if constexpr (sizeof(T) == 8) {
    asm volatile("" : "+l"(value));
  } else {
    asm volatile("" : "+r"(value));
  }
  return value;
}

}  // namespace crossvit

#else

#include "shim/cuda.h"

namespace crossvit {

template <class T>
T used_from_here(T value) {
  return value;
}

}  // namespace crossvit

#endif
