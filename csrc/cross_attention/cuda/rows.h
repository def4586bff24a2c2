#pragma once

#include "common/cuda/fragments.h"
#include "cross_attention/params.h"

// The CLS path: LayerNorm and linear layers of up to 16 rows, one per image. Rows are tensor-core
// operands in shared memory; weights go from memory, mostly L2, straight to registers, 16 bytes per
// lane, so that a cluster reads a matrix once and waits for no barrier.

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

__host__ __device__ constexpr int float_bytes_of(int width) {
  return kImages * width * static_cast<int>(sizeof(float));
}

// An element of a parameter of type T or float; 0 if the parameter is omitted.
template <class T>
__device__ __forceinline__ float element(const Parameter& p, int64_t index) {
  if (!p.data) return 0;
  if (sizeof(T) == 4 || p.dtype == DType::kFloat32) return static_cast<const float*>(p.data)[index];
  return to_float(static_cast<const T*>(p.data)[index]);
}

template <class T>
__device__ __forceinline__ void write_element(void* data, DType dtype, int64_t index, float value) {
  if (sizeof(T) == 4 || dtype == DType::kFloat32) {
    static_cast<float*>(data)[index] = value;
  } else {
    static_cast<T*>(data)[index] = from_float<T>(value);
  }
}

// The residual scale r of an image.
__device__ __forceinline__ float scale_of_residual(const Parameter& scales, int64_t image) {
  return scales.data ? static_cast<const float*>(scales.data)[image] : 1.0f;
}

struct RowStatistics {
  float mean, rstd;
};

// Statistics of value(c) for c in [0, width). Called by a warp.
template <class Value>
__device__ RowStatistics statistics_of_row(int width, float eps, Value value) {
  float sum = 0, squares = 0;
#pragma unroll 4  // loads in flight; the later loops hit the cache
  for (int c = lane_index(); c < width; c += 32) sum += value(c);
  const float mean = sum_of_warp(sum) / width;
#pragma unroll 2
  for (int c = lane_index(); c < width; c += 32) {
    const float deviation = value(c) - mean;
    squares += deviation * deviation;
  }
  return {mean, 1.0f / sqrtf(sum_of_warp(squares) / width + eps)};
}

__device__ __forceinline__ float normal_cdf(float x) {
  return 0.5f * (1.0f + erff(x * 0.70710678118654752f));
}

// Calls write(row, c, y) with the LayerNorm of value(row, c), or its GELU, for rows [0, count).
// Called by a block.
template <class T, bool kGelu, class Value, class Write>
__device__ void normalize_rows(int count, int width, float eps, const Layer& norm, Value value,
                               Write write) {
  for (int row = warp_index(); row < count; row += block_warps()) {
    const auto x = [&](int c) { return value(row, c); };
    const RowStatistics s = statistics_of_row(width, eps, x);
#pragma unroll 2
    for (int c = lane_index(); c < width; c += 32) {
      float y = (x(c) - s.mean) * s.rstd * element<T>(norm.weight, c) + element<T>(norm.bias, c);
      if (kGelu) y *= normal_cdf(y);
      write(row, c, y);
    }
  }
}

// Backward of normalize_rows, for rows begin, begin + step, ... below count: given the gradient
// d(row, c), calls write(row, c, dx, dn, xhat), where dn is the gradient of LayerNorm's output.
// Called by a block.
template <class T, bool kGelu, class Value, class Gradient, class Write>
__device__ void normalize_rows_backward(int begin, int step, int count, int width, float eps,
                                        const Layer& norm, Value value, Gradient d, Write write) {
  for (int row = begin + warp_index() * step; row < count; row += block_warps() * step) {
    const auto x = [&](int c) { return value(row, c); };
    const RowStatistics s = statistics_of_row(width, eps, x);
    const auto xhat_of = [&](int c) { return (x(c) - s.mean) * s.rstd; };
    const auto dn_of = [&](int c, float xhat) {
      if (!kGelu) return d(row, c);
      const float n = xhat * element<T>(norm.weight, c) + element<T>(norm.bias, c);
      const float density = 0.39894228040143268f * expf(-0.5f * n * n);
      return d(row, c) * (normal_cdf(n) + n * density);
    };
    float a = 0, b = 0;
#pragma unroll 2
    for (int c = lane_index(); c < width; c += 32) {
      const float xhat = xhat_of(c), dxhat = dn_of(c, xhat) * element<T>(norm.weight, c);
      a += dxhat;
      b += dxhat * xhat;
    }
    a = sum_of_warp(a) / width;
    b = sum_of_warp(b) / width;
#pragma unroll 1  // everything is cached: unrolling only adds code
    for (int c = lane_index(); c < width; c += 32) {
      const float xhat = xhat_of(c), dn = dn_of(c, xhat);
      write(row, c, (dn * element<T>(norm.weight, c) - a - xhat * b) * s.rstd, dn, xhat);
    }
  }
}

// Zeroes the rows of an operand that no image uses. Called by a block.
template <class T>
__device__ void clear_rows(T* rows, int count, int width) {
  const int pitch = operand_pitch<T>(width);
#pragma unroll 1
  for (int i = thread_index(); i < (kImages - count) * pitch; i += block_threads()) {
    rows[count * pitch + i] = from_float<T>(0);
  }
}

// 16 bytes of a matrix.
template <class T>
struct Vector {
  static constexpr int kElements = 16 / sizeof(T);
  static constexpr int kPairs = kElements / 2;
  Pair<T> pair[kPairs];

  __device__ static Vector load_if(bool condition, const T* from) {
    Vector v;
    uint4 bits = make_uint4(0, 0, 0, 0);
    if (condition) bits = *reinterpret_cast<const uint4*>(from);
    memcpy(&v, &bits, sizeof v);
    return v;
  }
};

// Columns [first, last), multiples of 8, of rows W^T, W [columns, depth]: calls write(row, column,
// a, b) with columns `column` and `column` + 1 for each of the 16 rows. The order of k is free as
// long as both operands share it: a lane takes consecutive elements. Called by a block.
template <class T, class Write>
__device__ void linear(const T* rows, int pitch, const void* weight, int depth, int first, int last,
                       Write write) {
  using V = Vector<T>;
  constexpr int kSteps = 8;  // of kDepth along k: loads in flight
  constexpr int kDepth = 4 * V::kElements;
  const int g = lane_index() / 4, t = lane_index() % 4;
  for (int n = first + warp_index() * 8; n < last; n += block_warps() * 8) {
    const T* w = static_cast<const T*>(weight) + int64_t{n + g} * depth;
    float sums[4] = {};
    for (int begin = 0; begin < depth; begin += kSteps * kDepth) {
      const int k = begin + t * V::kElements;
      V b[kSteps];
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        b[step] = V::load_if(k + step * kDepth < depth, w + k + step * kDepth);
      }
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        const int k_step = k + step * kDepth;
        const V upper = V::load_if(k_step < depth, rows + g * pitch + k_step);
        const V lower = V::load_if(k_step < depth, rows + (g + 8) * pitch + k_step);
#pragma unroll
        for (int i = 0; i < V::kPairs; i += 2) {
          const FragmentA<T> a = {
              {upper.pair[i], lower.pair[i], upper.pair[i + 1], lower.pair[i + 1]}};
          multiply(sums, a, FragmentB<T>{{b[step].pair[i], b[step].pair[i + 1]}});
        }
      }
    }
    write(g, n + 2 * t, sums[0], sums[1]);
    write(g + 8, n + 2 * t, sums[2], sums[3]);
  }
}

// The first, or the second, elements of two pairs.
template <class T>
__device__ __forceinline__ Pair<T> join(Pair<T> a, Pair<T> b, int which) {
  if constexpr (sizeof(T) == 4) {
    return which ? make_float2(a.y, b.y) : make_float2(a.x, b.x);
  } else {
    return __byte_perm(a, b, which ? 0x7632 : 0x5410);
  }
}

constexpr int kColumnBlock = 16;  // columns that transposed_linear takes at once

// Columns [first, first + kColumnBlock) of rows W, W [depth, columns]: calls write(row, column,
// value). A lane loads two columns for each of its four k of a step, one for either tile of 8
// columns. Called by a warp.
template <class T, class Write>
__device__ void transposed_linear(const T* rows, int pitch, const void* weight, int depth,
                                  int columns, int first, Write write) {
  constexpr int kSteps = 4;  // of 16 along k: loads in flight
  const int g = lane_index() / 4, t = lane_index() % 4;
  const T* w = static_cast<const T*>(weight) + int64_t{2 * t} * columns + first + 2 * g;
  float sums[2][4] = {};
#pragma unroll 1
  for (int begin = 0; begin < depth; begin += 16 * kSteps) {
    Pair<T> b[kSteps][4];
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int k = begin + 16 * step + 8 * (i >> 1);  // depth is a multiple of 8
        b[step][i] = k < depth ? load_pair(i & 1 ? w + columns : w) : pack<T>(0, 0);
        if (i & 1) w += 8 * columns;
      }
    }
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      FragmentA<T> a;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int k = begin + 16 * step + 8 * (i >> 1);
        const T* pair = rows + (g + 8 * (i & 1)) * pitch + k + 2 * t;
        a.pair[i] = k < depth ? load_pair(pair) : pack<T>(0, 0);
      }
#pragma unroll
      for (int tile = 0; tile < 2; ++tile) {
        multiply(sums[tile], a,
                 FragmentB<T>{{join<T>(b[step][0], b[step][1], tile),
                               join<T>(b[step][2], b[step][3], tile)}});
      }
    }
  }
#pragma unroll
  for (int tile = 0; tile < 2; ++tile) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      write(g + 8 * (i >> 1), first + 2 * (2 * t + (i & 1)) + tile, sums[tile][i]);
    }
  }
}

}  // namespace crossvit::cross_attention
