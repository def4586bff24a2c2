#pragma once

#include "common/cuda/mma.h"
#include "common/cuda/warp.h"

// Tensor-core operands of every element type, in one layout. In a k-step of 16, lane 4 g + t holds
// the pairs (2 t, 2 t + 1) and (2 t + 8, 2 t + 9): of rows g and g + 8 of A [16, k], of column g of
// B [k, 8]. Of C [16, 8] it holds rows g and g + 8, columns 2 t and 2 t + 1.
//
// 16-bit elements go to the tensor cores as they are. A float is split into two tf32 numbers; three
// products then have an error of about 2^-22. Tensor cores round sums towards zero, which over a
// long sum is a bias that grows with its length (Ootomo and Yokota 2022, section 3.1): each k-step
// starts from zero, and ordinary additions, which round to nearest, add it to the rest.

namespace crossvit {

using bf16 = __nv_bfloat16;
using half = __half;

// Whether a kernel has no registers to spare for more loads in flight: the fusion's in float, as
// the compiler allocates them before sm_90.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
template <class T>
constexpr bool kHasFewRegisters = sizeof(T) == 4;
#else
template <class T>
constexpr bool kHasFewRegisters = false;
#endif

template <class T>
struct PairOf {
  using type = uint32_t;
};
template <>
struct PairOf<float> {
  using type = float2;
};
// Two adjacent elements.
template <class T>
using Pair = typename PairOf<T>::type;

// Register i: row g + 8 * (i & 1), pair from 2 t + 8 * (i >> 1).
template <class T>
struct FragmentA {
  Pair<T> pair[4];
};

// Register i: the pair from 2 t + 8 * i.
template <class T>
struct FragmentB {
  Pair<T> pair[2];
};

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(half x) { return __half2float(x); }

template <class T>
__device__ __forceinline__ T from_float(float x) {
  if constexpr (sizeof(T) == 4) {
    return x;
  } else if constexpr (std::is_same_v<T, bf16>) {
    return __float2bfloat16(x);
  } else {
    return __float2half(x);
  }
}

// Rounds a float to T and back.
template <class T>
__device__ __forceinline__ float rounded(float x) {
  return to_float(from_float<T>(x));
}

template <class T>
__device__ __forceinline__ float2 unpack(Pair<T> pair) {
  if constexpr (std::is_same_v<T, float>) {
    return pair;
  } else if constexpr (std::is_same_v<T, bf16>) {
    return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
  } else {
    __half2 both;
    memcpy(&both, &pair, sizeof both);
    return __half22float2(both);
  }
}

template <class T>
__device__ __forceinline__ Pair<T> pack(float first, float second) {
  if constexpr (std::is_same_v<T, float>) {
    return make_float2(first, second);
  } else {
    uint32_t pair;
    if constexpr (std::is_same_v<T, bf16>) {
      const __nv_bfloat162 both = __floats2bfloat162_rn(first, second);
      memcpy(&pair, &both, sizeof pair);
    } else {
      const __half2 both = __floats2half2_rn(first, second);
      memcpy(&pair, &both, sizeof pair);
    }
    return pair;
  }
}

// Arithmetic of pairs of 16-bit elements.
template <class T>
using Packed = std::conditional_t<std::is_same_v<T, bf16>, __nv_bfloat162, __half2>;

// A pair of ones, which the compiler would pack at run time.
template <class T>
constexpr uint32_t kOnes = std::is_same_v<T, bf16> ? 0x3f803f80 : 0x3c003c00;

template <class T>
__device__ __forceinline__ uint32_t subtract(uint32_t a, uint32_t b) {
  Packed<T> first, second;
  memcpy(&first, &a, sizeof first);
  memcpy(&second, &b, sizeof second);
  const Packed<T> result = __hsub2(first, second);
  memcpy(&a, &result, sizeof a);
  return a;
}

template <class T>
__device__ __forceinline__ Pair<T> load_pair(const T* from) {
  return *reinterpret_cast<const Pair<T>*>(from);
}

template <class T>
__device__ __forceinline__ void store_pair(T* to, Pair<T> pair) {
  *reinterpret_cast<Pair<T>*>(to) = pair;
}

// Stores four adjacent elements, which are aligned.
template <class T>
__device__ __forceinline__ void store_quad(T* to, const Pair<T> (&pairs)[2]) {
  if constexpr (sizeof(T) == 4) {
    *reinterpret_cast<float4*>(to) = {pairs[0].x, pairs[0].y, pairs[1].x, pairs[1].y};
  } else {
    *reinterpret_cast<uint2*>(to) = {pairs[0], pairs[1]};
  }
}

// Loads 16 rows of 16 elements, `pitch` elements apart: as A, or as B of 16 columns (to_b).
template <class T>
__device__ __forceinline__ FragmentA<T> load_rows(const T* tile, int pitch) {
  FragmentA<T> a;
  const int lane = lane_index();
  if constexpr (sizeof(T) == 2) {
    load_matrix_x4(a.pair, tile + (lane % 16) * pitch + lane / 16 * 8);
  } else {
    const T* from = tile + lane / 4 * pitch + lane % 4 * 2;
    for (int i = 0; i < 4; ++i) a.pair[i] = load_pair(from + (i & 1) * 8 * pitch + (i >> 1) * 8);
  }
  return a;
}

// The same as B of 16 columns, whose sides are in registers next to each other.
template <class T>
struct ColumnsOfB {
  FragmentB<T> side[2];  // columns 8 * side to 8 * side + 7
};

template <class T>
__device__ __forceinline__ ColumnsOfB<T> load_columns(const T* tile, int pitch) {
  if constexpr (sizeof(T) == 2) {
    const int lane = lane_index();
    uint32_t pairs[4];
    load_matrix_x4(pairs, tile + (lane % 8 + lane / 16 * 8) * pitch + lane / 8 % 2 * 8);
    return {{{pairs[0], pairs[1]}, {pairs[2], pairs[3]}}};
  } else {
    const FragmentA<T> a = load_rows(tile, pitch);
    return {{{a.pair[0], a.pair[2]}, {a.pair[1], a.pair[3]}}};
  }
}

// Loads 8 rows of 16-bit elements as B of 8 columns.
template <class T>
__device__ __forceinline__ FragmentB<T> load_8_columns(const T* rows, int pitch) {
  FragmentB<T> b;
  load_matrix_x2(b.pair, rows + lane_index() % 8 * pitch + lane_index() / 8 % 2 * 8);
  return b;
}

// The same of two k-steps.
template <class T>
struct TwoSteps {
  FragmentB<T> step[2];
};

template <class T>
__device__ __forceinline__ TwoSteps<T> load_8_columns_twice(const T* rows, int pitch) {
  uint32_t pairs[4];
  load_matrix_x4(pairs, rows + lane_index() % 8 * pitch + lane_index() / 8 * 8);
  return {{{pairs[0], pairs[1]}, {pairs[2], pairs[3]}}};
}

// Loads 8 rows as A, with one number in rows 8 to 15.
template <class T>
__device__ __forceinline__ FragmentA<T> load_8_rows(const T* tile, int pitch, float others = 0) {
  const int lane = lane_index();
  const Pair<T> rest = pack<T>(others, others);
  if constexpr (sizeof(T) == 2) {
    uint32_t rows[2];
    load_matrix_x2(rows, tile + lane % 8 * pitch + lane / 8 % 2 * 8);
    return {rows[0], rest, rows[1], rest};
  } else {
    const T* from = tile + lane / 4 * pitch + lane % 4 * 2;
    return {load_pair(from), rest, load_pair(from + 8), rest};
  }
}

// Loads 16 rows of 16 elements transposed: the rows run along k.
template <class T>
__device__ __forceinline__ FragmentA<T> load_transposed(const T* tile, int pitch) {
  FragmentA<T> a;
  const int lane = lane_index();
  if constexpr (sizeof(T) == 2) {
    load_matrix_x4_transposed(a.pair, tile + (lane % 8 + lane / 16 * 8) * pitch + lane / 8 % 2 * 8);
  } else {
    const T* from = tile + lane % 4 * 2 * pitch + lane / 4;
    for (int i = 0; i < 4; ++i) {
      const T* pair = from + (i >> 1) * 8 * pitch + (i & 1) * 8;
      a.pair[i] = make_float2(pair[0], pair[pitch]);
    }
  }
  return a;
}

// The same as B of 16 columns, which rows along k have.
template <class T>
__device__ __forceinline__ ColumnsOfB<T> load_transposed_columns(const T* tile, int pitch) {
  if constexpr (sizeof(T) == 2) {
    const int lane = lane_index();
    uint32_t pairs[4];
    load_matrix_x4_transposed(pairs, tile + lane % 16 * pitch + lane / 16 * 8);
    return {{{pairs[0], pairs[1]}, {pairs[2], pairs[3]}}};
  } else {
    const FragmentA<T> a = load_transposed(tile, pitch);
    return {{{a.pair[0], a.pair[2]}, {a.pair[1], a.pair[3]}}};
  }
}

// Returns columns [8 * side, 8 * side + 8) of a B of 16 columns, which was loaded like an A.
template <class T>
__device__ __forceinline__ FragmentB<T> to_b(const FragmentA<T>& a, int side) {
  return {a.pair[side], a.pair[side + 2]};
}

struct SplitFloat {
  uint32_t high, low;
};

__device__ __forceinline__ SplitFloat split(float x) {
  constexpr uint32_t kMask = 0xffffe000u, kHalf = 0x1000u;  // keeps 10 bits of mantissa
  // A half added to a GPU's NaN, 0x7fffffff, would make it -0, and to the largest numbers infinity.
  const uint32_t rounding = fabsf(x) < 0x1.ffep127f ? kHalf : 0;
  const uint32_t high = (__float_as_uint(x) + rounding) & kMask;
  const uint32_t low = (__float_as_uint(x - __uint_as_float(high)) + kHalf) & kMask;
  return {high, fabsf(x) < INFINITY ? low : 0};
}

// c += a b
template <class T>
__device__ __forceinline__ void multiply(float (&c)[4], const FragmentA<T>& a,
                                         const FragmentB<T>& b) {
  if constexpr (sizeof(T) == 2) {
    mma_16x8x16<T>(c, a.pair, b.pair);
  } else {
    // Two k-steps of 8, with k permuted: t stands for 2 t, and t + 4 for 2 t + 1.
    float sums[4] = {};
    for (int step = 0; step < 2; ++step) {
      uint32_t a_high[4], a_low[4], b_high[2], b_low[2];
      for (int i = 0; i < 4; ++i) {
        const float2 pair = a.pair[2 * step + (i & 1)];
        const SplitFloat s = split(i < 2 ? pair.x : pair.y);
        a_high[i] = s.high, a_low[i] = s.low;
      }
      for (int i = 0; i < 2; ++i) {
        const SplitFloat s = split(i == 0 ? b.pair[step].x : b.pair[step].y);
        b_high[i] = s.high, b_low[i] = s.low;
      }
      mma_16x8x8_tf32(sums, a_low, b_high);
      mma_16x8x8_tf32(sums, a_high, b_low);
      mma_16x8x8_tf32(sums, a_high, b_high);
    }
    for (int i = 0; i < 4; ++i) c[i] += sums[i];
  }
}

// Reductions over the four lanes of a row g.
__device__ __forceinline__ float sum_of_row(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

__device__ __forceinline__ float max_of_row(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

}  // namespace crossvit
