// Loads from global memory.
#pragma once

#include "common/arithmetic.h"
#include "common/cuda/gpu.h"

namespace crossvit {

constexpr int kLineBytes = 128;

// An element of two bytes or of four, the other 0.
struct LoadedElement {
  uint32_t two_bytes, four_bytes;

  __device__ uint32_t bits() const { return two_bytes | four_bytes; }
};

// The same of four adjacent elements.
struct LoadedQuad {
  uint2 two_bytes;
  uint4 four_bytes;
};

#ifdef __CUDACC__

// Loads an element of `size` bytes, 2 or 4, that no one writes while the kernel runs; with another
// size, nothing. Takes no branch, which would keep loads apart, nor waits for one of the two.
__device__ __forceinline__ LoadedElement load_constant(const char* from, int size) {
  LoadedElement loaded;
  asm("{\n.reg .pred two, four;\n"
      "setp.eq.s32 two, %3, 2;\n"
      "setp.eq.s32 four, %3, 4;\n"
      "mov.u32 %0, 0;\n"
      "mov.u32 %1, 0;\n"
      "@two ld.global.nc.u16 %0, [%2];\n"
      "@four ld.global.nc.u32 %1, [%2];\n}"
      : "=&r"(loaded.two_bytes), "=&r"(loaded.four_bytes)
      : "l"(__cvta_generic_to_global(from)), "r"(size));
  return loaded;
}

// The same for four adjacent elements, aligned to four times their size.
__device__ __forceinline__ LoadedQuad load_constant_quad(const char* from, int size) {
  LoadedQuad quad;
  asm("{\n.reg .pred two, four;\n"
      "setp.eq.s32 two, %7, 2;\n"
      "setp.eq.s32 four, %7, 4;\n"
      "mov.u32 %0, 0;\nmov.u32 %1, 0;\nmov.u32 %2, 0;\n"
      "mov.u32 %3, 0;\nmov.u32 %4, 0;\nmov.u32 %5, 0;\n"
      "@two ld.global.nc.v2.u32 {%0, %1}, [%6];\n"
      "@four ld.global.nc.v4.u32 {%2, %3, %4, %5}, [%6];\n}"
      : "=&r"(quad.two_bytes.x), "=&r"(quad.two_bytes.y), "=&r"(quad.four_bytes.x),
        "=&r"(quad.four_bytes.y), "=&r"(quad.four_bytes.z), "=&r"(quad.four_bytes.w)
      : "l"(__cvta_generic_to_global(from)), "r"(size));
  return quad;
}

// Asks for the kLineBytes around an address to be brought to L2.
__device__ __forceinline__ void prefetch_line(const void* address) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(__cvta_generic_to_global(address)));
}

#else

inline LoadedElement load_constant(const char* from, int size) {
  LoadedElement loaded = {0, 0};
  if (size == 2) memcpy(&loaded.two_bytes, from, 2);
  if (size == 4) memcpy(&loaded.four_bytes, from, 4);
  return loaded;
}

inline LoadedQuad load_constant_quad(const char* from, int size) {
  LoadedQuad quad = {};
  if (size == 2) memcpy(&quad.two_bytes, from, 8);
  if (size == 4) memcpy(&quad.four_bytes, from, 16);
  return quad;
}

using testing::prefetch_line;

#endif

// Brings the lines of [from, from + bytes) to L2 that are this thread's among `threads`.
__device__ __forceinline__ void prefetch(const void* from, int bytes, int thread, int threads) {
#pragma unroll 1
  for (int line = thread; line < ceil_div(bytes, kLineBytes); line += threads) {
    prefetch_line(static_cast<const char*>(from) + line * kLineBytes);
  }
}

}  // namespace crossvit
