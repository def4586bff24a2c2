#pragma once

#include "common/cuda/activations.h"
#include "common/cuda/fragments.h"
#include "common/cuda/memory.h"
#include "cross_attention/params.h"

// The CLS path's rows, up to 16, one per image: tensor-core operands in shared memory, and
// LayerNorm. The path is a chain of latencies: whatever loads there are start together, before what
// depends on one of them, and threads take four columns at a time.

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
__device__ __forceinline__ float sum_of(float4 v) { return (v.x + v.y) + (v.z + v.w); }

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

// Calls visit(row, c) for columns c to c + 3 of rows begin, begin + step, ... below count: 64
// threads share a row. Called by a block.
template <class Visit>
__device__ __forceinline__ void for_each_quad(int begin, int step, int count, int width,
                                              Visit visit) {
  const int thread = hidden_thread();
  const int threads = minimum(64, block_threads()), rows = block_threads() / threads;
#pragma unroll 1
  for (int c = 4 * (thread & (threads - 1)); c < width; c += 4 * threads) {
#pragma unroll 1
    for (int row = begin + thread / threads * step; row < count; row += rows * step) {
      visit(row, c);
    }
  }
}

// Calls visit(c, rows_of) for columns c to c + 3, a warp or two for all of them, which then calls
// rows_of(count, load, use) for this thread's rows: several are loaded before the first is used.
template <class T, class Visit>
__device__ __forceinline__ void for_each_column(int width, Visit visit) {
  constexpr int kLoads = sizeof(T) == 4 ? 1 : 4;
  const int thread = hidden_thread();
  const int threads = minimum(64, block_threads()), step = block_threads() / threads;
  const auto rows_of = [&](int count, auto load, auto use) {
#pragma unroll 1
    for (int first = thread / threads; first < count; first += kLoads * step) {
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
  for (int c = 4 * (thread & (threads - 1)); c < width; c += 4 * threads) visit(c, rows_of);
}

struct RowStatistics {
  float mean, rstd;
};

// What the warps of TransposedLinear exchange, at most.
constexpr int kMostParts = 6, kPartBytes = kImages * 32 * static_cast<int>(sizeof(float));
constexpr int kScratchBytes = kMostParts * kPartBytes;

// For backward's sums of rows, of each warp, in two buffers.
constexpr int kMostWarps = 8;
constexpr int kStatisticsBytes = 2 * kMostWarps * static_cast<int>(sizeof(float2));

// Statistics of x(c), columns c to c + 3. Called by a warp.
template <class X>
__device__ __forceinline__ RowStatistics statistics_of(int width, float eps, X x) {
  constexpr int kQuads = 3;  // in registers: 384 columns
  const float inverse_width = 1.0f / width;
  const int first = 4 * (hidden_thread() % 32);
  float4 values[kQuads];
  float sum = 0, squares = 0;
#pragma unroll
  for (int i = 0; i < kQuads; ++i) {
    values[i] = first + 128 * i < width ? x(first + 128 * i) : make_float4(0, 0, 0, 0);
  }
#pragma unroll
  for (int i = 0; i < kQuads; ++i) sum += sum_of(values[i]);
#pragma unroll 1
  for (int c = first + 128 * kQuads; c < width; c += 128) sum += sum_of(x(c));
  const float mean = sum_of_warp(sum) * inverse_width;
  const auto add_squares = [&](float4 v) {
    v = v - mean;
    squares += sum_of(v * v);
  };
#pragma unroll
  for (int i = 0; i < kQuads; ++i) {
    if (first + 128 * i < width) add_squares(values[i]);
  }
#pragma unroll 1
  for (int c = first + 128 * kQuads; c < width; c += 128) add_squares(x(c));
  return {mean, rsqrtf(sum_of_warp(squares) * inverse_width + eps)};
}

// LayerNorm of this block's rows (RowOwners) below count, or its GELU. The parameters' first loads
// start in the constructor. If there are fewer rows than warps, several warps share a row, of which
// each finds the statistics. For all threads of a block.
template <class T, bool kGelu>
class RowNormalization {
 public:
  template <class Owners>
  __device__ RowNormalization(const Layer& norm, int width, const Owners& owners, int count)
      : weight_(norm.weight), bias_(norm.bias), width_(width), step_(owners.step()), count_(count) {
    const int rows = maximum(1, ceil_div(count - owners.begin(), step_));
    warps_of_row_ = maximum(1, block_warps() / rows);
    const int thread = hidden_thread(), of_block = thread / 32 / warps_of_row_;
    first_row_ = owners.begin() + of_block * step_;
    first_ = 4 * (thread - of_block * 32 * warps_of_row_);
    load(first_, loaded_weight_, loaded_bias_);
  }

  // Calls write(row, c, y) with columns c to c + 3 of x [.., width].
  template <class Write>
  __device__ void run(const float* x, float eps, Write write) const {
    const int rows_at_once = block_warps() / warps_of_row_;
#pragma unroll 1
    for (int row = first_row_; row < count_; row += rows_at_once * step_) {
      const float* values = x + row * width_;
      const RowStatistics s =
          statistics_of(width_, eps, [&](int c) { return load_quad(values + c); });
      LoadedQuad weight = loaded_weight_, bias = loaded_bias_;
#pragma unroll 1
      for (int c = first_; c < width_; c += 128 * warps_of_row_) {
        if (c != first_) load(c, weight, bias);
        float4 n = (load_quad(values + c) - s.mean) * s.rstd;
        n = n * weight_.value(weight) + bias_.value(bias);
        write(row, c, kGelu ? each(n, [](float v) { return Gelu<T>(v).value(); }) : n);
      }
    }
  }

 private:
  __device__ __forceinline__ void load(int c, LoadedQuad& weight, LoadedQuad& bias) const {
    weight = weight_.load_quad(c, c < width_);
    bias = bias_.load_quad(c, c < width_);
  }

  Elements<T> weight_, bias_;
  int width_, step_, count_, warps_of_row_, first_row_, first_;
  LoadedQuad loaded_weight_, loaded_bias_;
};

// Backward of LayerNorm, or of its GELU, for rows begin, begin + step, ... below count; four warps
// share a row. Given the gradients of the result, d [.., width] in shared memory, calls write(row,
// c, dx, dn, xhat, more) with those of LayerNorm's input and output. x(row, c) and more(row, c) are
// what it takes of columns c to c + 3 besides; wait() is called once by all threads, before
// gradients are read: statistics and slopes of the first rows are found before it. sums:
// kStatisticsBytes. For all threads of a block.
template <class T, bool kGelu, class X, class More, class Wait, class Write>
__device__ __forceinline__ void normalize_rows_backward(const Layer& norm, int width, int begin,
                                                        int step, int count, float eps, float* d,
                                                        float2* sums, X x, More more, Wait wait,
                                                        Write write) {
  const Elements<T> weights(norm.weight), biases(norm.bias);
  const int thread = hidden_thread(), warp = thread / 32, team = warp / 4;
  const int warps = minimum(4, block_warps()), stride = 128 * warps;
  const int first = 4 * (thread - team * 128);
  const int rows_at_once = maximum(1, used_from_here(block_warps()) / 4);
  const float inverse_width = 1.0f / width;
  int buffer = 0;
#pragma unroll 1
  for (int of_first = begin; of_first == begin || of_first < count;
       of_first += rows_at_once * step) {
    const int row = of_first + team * step;
    float* d_row = d + row * width;
    RowStatistics statistics;
    if (row < count) {
      statistics = statistics_of(width, eps, [&](int c) { return x(row, c); });
    }
    const auto xhat_of = [&](int c) { return (x(row, c) - statistics.mean) * statistics.rstd; };
    // Of the last columns.
    int last = first;
    float4 weight, xhat, dn;
    decltype(more(0, 0)) more_of;
    float a = 0, b = 0;
#pragma unroll 1
    for (int c = first;; c += stride) {
      float4 slope;
      const bool is_used = row < count && c < width;
      if (is_used) {
        last = c;
        const LoadedQuad loaded = weights.load_quad(c), loaded_bias = biases.load_quad(c, kGelu);
        more_of = more(row, c);
        xhat = xhat_of(c);
        weight = weights.value(loaded);
        if (kGelu) {
          slope = each(xhat * weight + biases.value(loaded_bias),
                       [](float v) { return Gelu<T>(v).slope(); });
        }
      }
      if (c == first && of_first == begin) wait();
      if (is_used) {
        dn = load_quad(d_row + c);
        if (kGelu) dn = dn * slope;
        if (kGelu && c + stride < width) store_quad(d_row + c, dn);
        const float4 dxhat = dn * weight;
        a += sum_of(dxhat);
        b += sum_of(dxhat * xhat);
      }
      if (c + stride >= width) break;
    }
    a = sum_of_warp(a), b = sum_of_warp(b);
    if (thread % 32 == 0) sums[buffer + warp] = make_float2(a, b);
    __syncthreads();
    a = b = 0;
#pragma unroll 1
    for (int i = 0; i < warps; ++i) {
      const float2 of_warp = sums[buffer + team * warps + i];
      a += of_warp.x, b += of_warp.y;
    }
    a *= inverse_width, b *= -inverse_width;
#pragma unroll 1
    for (int c = last; row < count && c >= first && c < width; c -= stride) {
      if (c != last) {
        weight = weights.value(weights.load_quad(c));
        more_of = more(row, c);
        xhat = xhat_of(c);
        dn = load_quad(d_row + c);
      }
      write(row, c, fma_quad(xhat, b, dn * weight - a) * statistics.rstd, dn, xhat, more_of);
    }
    buffer ^= kMostWarps;
  }
}

}  // namespace crossvit::cross_attention
