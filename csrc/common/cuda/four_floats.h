// Arithmetic of four floats, the elements of a lane that are next to each other.
#pragma once

#include "common/cuda/gpu.h"

namespace crossvit {

template <class Function>
__device__ __forceinline__ float4 apply_to_four(const float4& x, Function function) {
  return make_float4(function(x.x), function(x.y), function(x.z), function(x.w));
}

__device__ __forceinline__ float sum_of_four(const float4& x) { return (x.x + x.y) + (x.z + x.w); }
__device__ __forceinline__ float4 operator*(const float4& a, const float4& b) {
  return make_float4(a.x * b.x, a.y * b.y, a.z * b.z, a.w * b.w);
}
__device__ __forceinline__ float4 operator+(const float4& a, const float4& b) {
  return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
}
__device__ __forceinline__ float4 operator*(const float4& a, float b) {
  return make_float4(a.x * b, a.y * b, a.z * b, a.w * b);
}
__device__ __forceinline__ float4 operator-(const float4& a, float b) {
  return make_float4(a.x - b, a.y - b, a.z - b, a.w - b);
}

}  // namespace crossvit
