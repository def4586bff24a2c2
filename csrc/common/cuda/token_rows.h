// Rows of tokens and parameters in two element types: T, that of the matrices, or float, as tokens
// and LayerNorm's parameters under autocast are.
#pragma once

#include "common/cuda/divisor.h"
#include "common/cuda/fragments.h"
#include "common/dtype.h"

namespace crossvit {

// Elements of type T or float; null for an omitted parameter.
template <class T>
struct Elements {
  const void* data;
  bool is_float;

  static Elements of(const void* data, DType dtype) { return {data, dtype == DType::kFloat32}; }

  __device__ __forceinline__ Elements from(int64_t index) const {
    const int64_t size = is_float ? sizeof(float) : sizeof(T);
    return {static_cast<const char*>(data) + index * size, is_float};
  }

  // Two adjacent elements, aligned.
  __device__ __forceinline__ float2 load_2(int64_t index) const {
    if constexpr (sizeof(T) == 2) {
      if (!is_float) return unpack<T>(load_pair(static_cast<const T*>(data) + index));
    }
    return *reinterpret_cast<const float2*>(static_cast<const float*>(data) + index);
  }

  // Four adjacent elements, aligned. Loading them and converting them are separate, so that loads
  // start together: a branch on the type would end where the loaded is used.
  __device__ __forceinline__ uint4 load_bits_4(int64_t index) const {
    if constexpr (sizeof(T) == 2) {
      if (!is_float) {
        const uint2 pairs = *reinterpret_cast<const uint2*>(static_cast<const T*>(data) + index);
        return make_uint4(pairs.x, pairs.y, 0, 0);
      }
    }
    return *reinterpret_cast<const uint4*>(static_cast<const float*>(data) + index);
  }

  __device__ __forceinline__ float4 four(const uint4& bits) const {
    if constexpr (sizeof(T) == 2) {
      if (!is_float) {
        const float2 low = unpack<T>(bits.x), high = unpack<T>(bits.y);
        return make_float4(low.x, low.y, high.x, high.y);
      }
    }
    return make_float4(__uint_as_float(bits.x), __uint_as_float(bits.y), __uint_as_float(bits.z),
                       __uint_as_float(bits.w));
  }

  __device__ __forceinline__ float4 load_4(int64_t index) const { return four(load_bits_4(index)); }
};

// The same to write to.
template <class T>
struct MutableElements {
  void* data;
  bool is_float;

  static MutableElements of(void* data, DType dtype) { return {data, dtype == DType::kFloat32}; }

  __device__ __forceinline__ void store_2(int64_t index, float2 x) const {
    if constexpr (sizeof(T) == 2) {
      if (!is_float) return store_pair(static_cast<T*>(data) + index, pack<T>(x.x, x.y));
    }
    *reinterpret_cast<float2*>(static_cast<float*>(data) + index) = x;
  }

  __device__ __forceinline__ void store_4(int64_t index, float4 x) const {
    if constexpr (sizeof(T) == 2) {
      if (!is_float) {
        *reinterpret_cast<uint2*>(static_cast<T*>(data) + index) =
            make_uint2(pack<T>(x.x, x.y), pack<T>(x.z, x.w));
        return;
      }
    }
    *reinterpret_cast<float4*>(static_cast<float*>(data) + index) = x;
  }
};

// Tokens [B, N, C] whose row 0 of each image is cls's, if given. Rows have unit stride.
template <class T>
struct TokenRows {
  Elements<T> x;
  int64_t batch_stride, token_stride;
  const void* cls;  // [B, C] of x's type, or null
  int64_t cls_stride;
  Divisor num_tokens;

  __device__ __forceinline__ int image(int row) const { return num_tokens.quotient(row); }

  // Row `row` of all images', of which there are fewer than 2^31.
  __device__ __forceinline__ Elements<T> operator[](int row) const {
    const int image = this->image(row), token = row - image * num_tokens.value;
    if (cls && token == 0) return Elements<T>{cls, x.is_float}.from(image * cls_stride);
    return x.from(image * batch_stride + token * token_stride);
  }
};

}  // namespace crossvit
