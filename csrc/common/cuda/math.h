// Functions that a GPU approximates, to a few units in the last place.
#pragma once

#include "common/cuda/gpu.h"

namespace crossvit {

#ifdef __CUDACC__

// Returns 2^x, or 0 if that is below float's smallest normal number.
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Returns the base-2 logarithm of 0 or a normal number, to 2^-22 of itself or of 1.
__device__ __forceinline__ float log2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Returns 1 / sqrt(x) for a normal x, without rsqrtf's instructions for others.
__device__ __forceinline__ float rsqrt_approx(float x) {
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Returns 1 / x for a normal x.
__device__ __forceinline__ float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

#else

using testing::exp2_approx;

inline float log2_approx(float x) { return log2f(x); }
inline float rsqrt_approx(float x) { return 1.0f / sqrtf(x); }
inline float reciprocal(float x) { return 1.0f / x; }

#endif

}  // namespace crossvit
