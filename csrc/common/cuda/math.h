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

// Returns 1 / sqrt(x) for a normal x, without rsqrtf's instructions for others.
__device__ __forceinline__ float rsqrt_approx(float x) {
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

#else

using testing::exp2_approx;

inline float rsqrt_approx(float x) { return 1.0f / sqrtf(x); }

#endif

__device__ __forceinline__ float reciprocal(float x) { return __fdividef(1.0f, x); }

}  // namespace crossvit
