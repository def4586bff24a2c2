#pragma once

#include "common/cuda/activations.h"
#include "common/cuda/fragments.h"
#include "common/cuda/memory.h"
#include "cross_attention/params.h"

// The CLS path's rows, up to 16, one per image: tensor-core operands in shared memory. The path is
// a chain of latencies: whatever loads there are start together, before what depends on one of
// them, and threads take four columns at a time.

namespace crossvit::cross_attention {

constexpr int kImages = 16;  // rows of a tensor-core tile

// Row pitch of an operand, in elements. Rows g and g + 1 are 64 bytes apart in the banks, the
// right stride for 16-byte vectors of four lanes each.
template <class T>
__host__ __device__ constexpr int operand_pitch(int width) {
  constexpr int kLine = 128 / sizeof(T);
  return round_up(width, kLine) + kLine / 2;
}

template <class T>
__host__ __device__ constexpr int operand_bytes_of(int width) {
  return kImages * operand_pitch<T>(width) * static_cast<int>(sizeof(T));
}

// Floats as wide.
__host__ __device__ constexpr int float_bytes_of(int width) {
  return kImages * width * static_cast<int>(sizeof(float));
}

// This thread's index. What follows from it is not kept from before a pass to behind it, nor from
// one image to the next, where it would take registers that the pass needs.
__device__ __forceinline__ int hidden_thread() { return used_from_here(thread_index()); }
__device__ __forceinline__ int hidden_lane() { return hidden_thread() % 32; }
__device__ __forceinline__ int hidden_warp() { return hidden_thread() / 32; }

__device__ __forceinline__ float4 load_quad(const float* from) {
  return *reinterpret_cast<const float4*>(from);
}
__device__ __forceinline__ void store_quad(float* to, float4 values) {
  *reinterpret_cast<float4*>(to) = values;
}

__device__ __forceinline__ float4 operator+(float4 a, float4 b) {
  return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
}
__device__ __forceinline__ float4 operator-(float4 a, float b) {
  return make_float4(a.x - b, a.y - b, a.z - b, a.w - b);
}
__device__ __forceinline__ float4 operator*(float4 a, float4 b) {
  return make_float4(a.x * b.x, a.y * b.y, a.z * b.z, a.w * b.w);
}
__device__ __forceinline__ float4 operator*(float4 a, float b) {
  return make_float4(a.x * b, a.y * b, a.z * b, a.w * b);
}
__device__ __forceinline__ float4 fma_quad(float4 a, float b, float4 c) {
  return make_float4(fmaf(a.x, b, c.x), fmaf(a.y, b, c.y), fmaf(a.z, b, c.z), fmaf(a.w, b, c.w));
}
__device__ __forceinline__ float4 fma_quad(float4 a, float4 b, float4 c) {
  return make_float4(fmaf(a.x, b.x, c.x), fmaf(a.y, b.y, c.y), fmaf(a.z, b.z, c.z),
                     fmaf(a.w, b.w, c.w));
}
__device__ __forceinline__ float sum_of(float4 v) { return (v.x + v.y) + (v.z + v.w); }
__device__ __forceinline__ float squares_of(float4 v) {
  return fmaf(v.x, v.x, v.y * v.y) + fmaf(v.z, v.z, v.w * v.w);
}

// function(v) of each of four numbers.
template <class Function>
__device__ __forceinline__ float4 each(float4 v, Function function) {
  return make_float4(function(v.x), function(v.y), function(v.z), function(v.w));
}

// Four numbers in the operands' type.
template <class T>
using QuadBits = std::conditional_t<sizeof(T) == 4, uint4, uint2>;

template <class T>
__device__ __forceinline__ QuadBits<T> pack_quad(float4 values) {
  const Pair<T> pairs[2] = {pack<T>(values.x, values.y), pack<T>(values.z, values.w)};
  QuadBits<T> bits;
  memcpy(&bits, pairs, sizeof bits);
  return bits;
}

template <class T>
__device__ __forceinline__ void store_quad(T* to, float4 values) {
  *reinterpret_cast<QuadBits<T>*>(to) = pack_quad<T>(values);
}

// The elements of a parameter of type T or float; zeros if it is omitted. Loading them and
// converting them are separate, so that no branch on the type keeps loads apart.
template <class T>
class Elements {
 public:
  __device__ explicit Elements(const Parameter& p)
      : data_(static_cast<const char*>(p.data)),
        size_(!p.data                                        ? 0
              : sizeof(T) == 4 || p.dtype == DType::kFloat32 ? 4
                                                             : 2) {}

  // With `is_used` false, a 0.
  __device__ __forceinline__ LoadedElement load(int64_t index, bool is_used = true) const {
    return load_constant(data_ + index * size_, is_used ? size_ : 0);
  }
  // Elements from a multiple of four on.
  __device__ __forceinline__ LoadedQuad load_quad(int64_t index, bool is_used = true) const {
    return load_constant_quad(data_ + index * size_, is_used ? size_ : 0);
  }

  __device__ __forceinline__ float value(const LoadedElement& loaded) const {
    if constexpr (sizeof(T) == 4) {
      return __uint_as_float(loaded.four_bytes);
    } else {
      return size_ == 4 ? __uint_as_float(loaded.four_bytes) : unpack<T>(loaded.two_bytes).x;
    }
  }
  __device__ __forceinline__ float4 value(const LoadedQuad& loaded) const {
    const uint4 bits = loaded.four_bytes;
    const float4 floats = make_float4(__uint_as_float(bits.x), __uint_as_float(bits.y),
                                      __uint_as_float(bits.z), __uint_as_float(bits.w));
    if constexpr (sizeof(T) == 4) {
      return floats;
    } else {
      const float2 low = unpack<T>(loaded.two_bytes.x), high = unpack<T>(loaded.two_bytes.y);
      return size_ == 4 ? floats : make_float4(low.x, low.y, high.x, high.y);
    }
  }

 private:
  const char* data_;
  int size_;  // of an element, in bytes; 0 if there are none
};

// Stores four numbers to a tensor of type T or float.
template <class T>
__device__ __forceinline__ void write_quad(void* data, DType dtype, int64_t index, float4 values) {
  if (sizeof(T) == 4 || dtype == DType::kFloat32) {
    store_quad(static_cast<float*>(data) + index, values);
  } else {
    store_quad(static_cast<T*>(data) + index, values);
  }
}

// The residual scale r of an image.
__device__ __forceinline__ float scale_of_residual(const Parameter& scales, int64_t image) {
  return scales.data ? static_cast<const float*>(scales.data)[image] : 1.0f;
}

// Threads that share a row: 64, or the block's 32.
__device__ __forceinline__ int log_threads_of_row() {
  return used_from_here(block_threads()) < 64 ? 5 : 6;
}

// Calls visit(row, c) for columns c to c + 3 of rows begin, begin + step, ... below count: 64
// threads share a row, the block's first ones, or its last where others have more to do. Called by
// a block.
template <bool kFromLast = false, class Visit>
__device__ __forceinline__ void for_each_quad(int begin, int step, int count, int width,
                                              Visit visit) {
  const int index = hidden_thread(), log = log_threads_of_row(), rows = block_threads() >> log;
  const int thread = kFromLast ? block_threads() - 1 - index : index;
#pragma unroll 1
  for (int c = 4 * (thread & ((1 << log) - 1)); c < width; c += 4 << log) {
#pragma unroll 1
    for (int row = begin + (thread >> log) * step; row < count; row += rows * step) {
      visit(row, c);
    }
  }
}

// Calls visit(c, rows_of) for columns c to c + 3, a warp or two for all of them, which then calls
// rows_of(count, load, use) for this thread's rows: several are loaded before the first is used.
template <class T, class Visit>
__device__ __forceinline__ void for_each_column(int width, Visit visit) {
  constexpr int kLoads = sizeof(T) == 4 ? 1 : 4;
  const int thread = hidden_thread(), log = log_threads_of_row(), step = block_threads() >> log;
  const auto rows_of = [&](int count, auto load, auto use) {
#pragma unroll 1
    for (int first = thread >> log; first < count; first += kLoads * step) {
      decltype(load(0)) loaded[kLoads];
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        if (first + i * step < count) loaded[i] = load(first + i * step);
      }
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        if (first + i * step < count) use(first + i * step, loaded[i]);
      }
    }
  };
#pragma unroll 1
  for (int c = 4 * (thread & ((1 << log) - 1)); c < width; c += 4 << log) visit(c, rows_of);
}

// What the warps of TransposedLinear exchange, at most.
constexpr int kMostParts = 6, kPartBytes = kImages * 32 * static_cast<int>(sizeof(float));
constexpr int kScratchBytes = kMostParts * kPartBytes;

// For backward's sums of rows, of each warp, in two buffers.
constexpr int kMostWarps = 8;
constexpr int kStatisticsBytes = 2 * kMostWarps * static_cast<int>(sizeof(float2));

}  // namespace crossvit::cross_attention
