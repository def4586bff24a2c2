#pragma once

#include "common/cuda/fragments.h"
#include "cross_attention/params.h"

// The CLS path: up to 16 rows, one an image, through LayerNorm and linear layers. Rows are operands
// of the tensor cores in shared memory; weights go from memory, mostly L2, straight to registers,
// 16 bytes a lane, so that a matrix is read once a cluster and waits for no barrier.

namespace crossvit::cross_attention {

constexpr int kImages = 16;  // rows of a tensor core's tile

// From a row to the next, in elements: rows g and g + 1 lie 64 bytes apart in the banks, as
// vectors of 16 bytes of four lanes each want it.
template <class T>
__host__ __device__ constexpr int operand_pitch(int width) {
  constexpr int kLine = 128 / sizeof(T);
  return (width + kLine - 1) / kLine * kLine + kLine / 2;
}

template <class T>
__host__ __device__ constexpr int operand_bytes_of(int width) {
  return kImages * operand_pitch<T>(width) * static_cast<int>(sizeof(T));
}

__host__ __device__ constexpr int float_bytes_of(int width) {
  return kImages * width * static_cast<int>(sizeof(float));
}

// Element `at` of a parameter, of type T or float; 0 where there is none.
template <class T>
__device__ __forceinline__ float element(const Parameter& p, int64_t at) {
  if (!p.data) return 0;
  if (sizeof(T) == 4 || p.dtype == DType::kFloat32) return static_cast<const float*>(p.data)[at];
  return to_float(static_cast<const T*>(p.data)[at]);
}

template <class T>
__device__ __forceinline__ void write_element(void* data, DType dtype, int64_t at, float value) {
  if (sizeof(T) == 4 || dtype == DType::kFloat32) {
    static_cast<float*>(data)[at] = value;
  } else {
    static_cast<T*>(data)[at] = from_float<T>(value);
  }
}

__device__ __forceinline__ float sum_of_warp(float x) {
#pragma unroll 1  // of many places, none in a loop that matters
  for (int far = 16; far > 0; far /= 2) x += __shfl_xor_sync(~0u, x, far);
  return x;
}

struct RowStatistics {
  float mean, rstd;
};

// Of `width` values value(c). A warp.
template <class Value>
__device__ RowStatistics statistics_of_row(int width, float eps, Value value) {
  float sum = 0, squares = 0;
#pragma unroll 4  // loads under way, which the others find in the cache
  for (int c = lane_index(); c < width; c += 32) sum += value(c);
  const float mean = sum_of_warp(sum) / width;
#pragma unroll 2
  for (int c = lane_index(); c < width; c += 32) {
    const float apart = value(c) - mean;
    squares += apart * apart;
  }
  return {mean, 1.0f / sqrtf(sum_of_warp(squares) / width + eps)};
}

__device__ __forceinline__ float normal_distribution(float x) {
  return 0.5f * (1.0f + erff(x * 0.70710678118654752f));
}

// LayerNorm of rows [0, count) of value(row, c), or its GELU, to write(row, c, y). A block.
template <class T, bool kGelu, class Value, class Write>
__device__ void normalize_rows(int count, int width, float eps, const Layer& norm, Value value,
                               Write write) {
  const int warp = static_cast<int>(threadIdx.x) / 32, warps = static_cast<int>(blockDim.x) / 32;
  for (int row = warp; row < count; row += warps) {
    const auto of_row = [&](int c) { return value(row, c); };
    const RowStatistics s = statistics_of_row(width, eps, of_row);
#pragma unroll 2
    for (int c = lane_index(); c < width; c += 32) {
      float y =
          (of_row(c) - s.mean) * s.rstd * element<T>(norm.weight, c) + element<T>(norm.bias, c);
      if (kGelu) y *= normal_distribution(y);
      write(row, c, y);
    }
  }
}

// Of normalize_rows, for rows begin, begin + step, ... below count: given the gradient d(row, c),
// write(row, c, dx, dn, xhat) with dn the gradient of LayerNorm's result. A block.
template <class T, bool kGelu, class Value, class Gradient, class Write>
__device__ void normalize_rows_backward(int begin, int step, int count, int width, float eps,
                                        const Layer& norm, Value value, Gradient d, Write write) {
  const int warp = static_cast<int>(threadIdx.x) / 32, warps = static_cast<int>(blockDim.x) / 32;
  for (int row = begin + warp * step; row < count; row += warps * step) {
    const auto of_row = [&](int c) { return value(row, c); };
    const RowStatistics s = statistics_of_row(width, eps, of_row);
    const auto xhat_of = [&](int c) { return (of_row(c) - s.mean) * s.rstd; };
    const auto dn_of = [&](int c, float xhat) {
      if (!kGelu) return d(row, c);
      const float n = xhat * element<T>(norm.weight, c) + element<T>(norm.bias, c);
      const float density = 0.39894228040143268f * expf(-0.5f * n * n);
      return d(row, c) * (normal_distribution(n) + n * density);
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
#pragma unroll 1  // all of it has been read: more at once is more code, and no faster
    for (int c = lane_index(); c < width; c += 32) {
      const float xhat = xhat_of(c), dn = dn_of(c, xhat);
      write(row, c, (dn * element<T>(norm.weight, c) - a - xhat * b) * s.rstd, dn, xhat);
    }
  }
}

// Zeros in the rows of an operand that no image has. A block.
template <class T>
__device__ void clear_rows(T* rows, int count, int width) {
  const int pitch = operand_pitch<T>(width);
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < (kImages - count) * pitch; i += blockDim.x) {
    rows[count * pitch + i] = from_float<T>(0);
  }
}

// 16 bytes of a matrix.
template <class T>
struct Vector {
  static constexpr int kElements = 16 / sizeof(T);
  static constexpr int kPairs = kElements / 2;
  Pair<T> pair[kPairs];

  __device__ static Vector load(const T* at, bool is) {
    Vector v;
    uint4 bits = make_uint4(0, 0, 0, 0);
    if (is) bits = *reinterpret_cast<const uint4*>(at);
    memcpy(&v, &bits, sizeof v);
    return v;
  }
};

// rows W^T of the columns [first, last), multiples of 8, W [columns, depth]: write(row, column, a,
// b) gets columns `column` and `column` + 1 of each of the 16 rows. The order of k is free as long
// as both operands have the same: a lane takes consecutive elements. A block.
template <class T, class Write>
__device__ void linear(const T* rows, int pitch, const void* weight, int depth, int first, int last,
                       Write write) {
  using V = Vector<T>;
  constexpr int kSteps = 8;  // of kDepth along k: loads under way
  constexpr int kDepth = 4 * V::kElements;
  const int g = lane_index() / 4, t = lane_index() % 4;
  const int warp = static_cast<int>(threadIdx.x) / 32, warps = static_cast<int>(blockDim.x) / 32;
  for (int n = first + warp * 8; n < last; n += warps * 8) {
    const T* w = static_cast<const T*>(weight) + int64_t{n + g} * depth;
    float sums[4] = {};
    for (int begin = 0; begin < depth; begin += kSteps * kDepth) {
      const int k = begin + t * V::kElements;
      V b[kSteps];
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        b[step] = V::load(w + k + step * kDepth, k + step * kDepth < depth);
      }
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        const int at = k + step * kDepth;
        const V upper = V::load(rows + g * pitch + at, at < depth);
        const V lower = V::load(rows + (g + 8) * pitch + at, at < depth);
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

// Two elements, one from each of two pairs: the first ones or the second ones.
template <class T>
__device__ __forceinline__ Pair<T> join(Pair<T> a, Pair<T> b, int which) {
  if constexpr (sizeof(T) == 4) {
    return which ? make_float2(a.y, b.y) : make_float2(a.x, b.x);
  } else {
    return __byte_perm(a, b, which ? 0x7632 : 0x5410);
  }
}

constexpr int kPiece = 16;  // columns that transposed_linear takes at once

// rows W of the columns [first, first + kPiece), W [depth, columns]: write(row, column, value). A
// lane loads two columns of each of its four k of a step: one is in the first tile of 8 columns,
// one in the second. A warp.
template <class T, class Write>
__device__ void transposed_linear(const T* rows, int pitch, const void* weight, int depth,
                                  int columns, int first, Write write) {
  constexpr int kSteps = 4;  // of 16 along k: loads under way
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
        const int k = begin + 16 * step + 8 * (i >> 1);  // of a depth that is a multiple of 8
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
        const T* at = rows + (g + 8 * (i & 1)) * pitch + k + 2 * t;
        a.pair[i] = k < depth ? load_pair(at) : pack<T>(0, 0);
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
