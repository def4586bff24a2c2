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

}  // namespace crossvit

#else

#include "shim/cuda.h"

#endif
