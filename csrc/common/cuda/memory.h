// Loads from global memory.
#pragma once

#include "common/cuda/gpu.h"

namespace crossvit {

constexpr int kLineBytes = 128;

#ifdef __CUDACC__

// Loads `size` bytes, 0, 2 or 4, that no one writes while the kernel runs; the rest are 0. Takes no
// branch, which would keep loads apart.
__device__ __forceinline__ uint32_t load_constant(const char* from, int size) {
  uint32_t bits;
  asm("{\n.reg .pred two, four;\n"
      "setp.eq.s32 two, %2, 2;\n"
      "setp.eq.s32 four, %2, 4;\n"
      "mov.u32 %0, 0;\n"
      "@two ld.global.nc.u16 %0, [%1];\n"
      "@four ld.global.nc.u32 %0, [%1];\n}"
      : "=&r"(bits)
      : "l"(__cvta_generic_to_global(from)), "r"(size));
  return bits;
}

// Asks for the kLineBytes around an address to be brought to L2.
__device__ __forceinline__ void prefetch_line(const void* address) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(__cvta_generic_to_global(address)));
}

#else

using testing::load_constant;
using testing::prefetch_line;

#endif

// Brings the lines of [from, from + bytes) to L2 that are this thread's among `threads`.
__device__ __forceinline__ void prefetch(const void* from, int64_t bytes, int thread, int threads) {
#pragma unroll 1
  for (int64_t at = int64_t{thread} * kLineBytes; at < bytes; at += int64_t{threads} * kLineBytes) {
    prefetch_line(static_cast<const char*>(from) + at);
  }
}

}  // namespace crossvit
