// ldmatrix and mma, with the fragments' layouts of the PTX manual.
#pragma once

#include <cmath>
#include <type_traits>

#include "shim/sync.h"

namespace crossvit::testing {

inline void require_whole_warp(const WarpSync& sync, const char* name) {
  if (sync.arrived != kAllLanes) fault(std::string(name) + " needs all 32 lanes");
}

struct MatrixLoad {
  const void* row;
  uint32_t* registers;
};

// Loads 8x8 matrices of 16-bit elements. Lanes 8j to 8j + 7 hold the addresses of matrix j's rows;
// lane 4g + t gets elements 2t and 2t + 1 of row g or, transposed, of column g.
template <int kCount, bool kTransposed>
struct LoadMatrices {
  static constexpr const char* kName = "ldmatrix";
  static void run(WarpSync& sync) {
    require_whole_warp(sync, kName);
    const void* rows[8 * kCount];
    {
      Unwatched unwatched;
      for (int row = 0; row < 8 * kCount; ++row) rows[row] = sync.argument<MatrixLoad>(row).row;
    }
    uint16_t matrices[kCount][8][8];
    for (int row = 0; row < 8 * kCount; ++row) {
      std::memcpy(matrices[row / 8][row % 8], rows[row], 16);
    }
    Unwatched unwatched;
    for (int lane = 0; lane < kWarp; ++lane) {
      const int g = lane / 4, t = 2 * (lane % 4);
      uint32_t* registers = sync.argument<MatrixLoad>(lane).registers;
      for (int j = 0; j < kCount; ++j) {
        const auto& m = matrices[j];
        const uint32_t low = kTransposed ? m[t][g] : m[g][t];
        const uint32_t high = kTransposed ? m[t + 1][g] : m[g][t + 1];
        registers[j] = low | high << 16;
      }
    }
  }
};

template <int kCount, bool kTransposed>
void load_matrices(uint32_t (&registers)[kCount], const void* row) {
  if (current->lane < 8 * kCount && reinterpret_cast<uintptr_t>(row) % 16) {
    fault("misaligned ldmatrix address");
  }
  MatrixLoad load{row, registers};
  sync_lanes<LoadMatrices<kCount, kTransposed>>(kAllLanes, load);
}

inline void load_matrix_x4(uint32_t (&r)[4], const void* row) { load_matrices<4, false>(r, row); }
inline void load_matrix_x4_transposed(uint32_t (&r)[4], const void* row) {
  load_matrices<4, true>(r, row);
}
inline void load_matrix_x2(uint32_t (&r)[2], const void* row) { load_matrices<2, false>(r, row); }
inline void load_matrix_x2_transposed(uint32_t (&r)[2], const void* row) {
  load_matrices<2, true>(r, row);
}

struct Fragments {
  float* c;
  const uint32_t* a;
  const uint32_t* b;
};

template <class T>
float to_float(uint16_t bits) {
  return std::is_same_v<T, __half> ? float_of_half(bits) : float_of_bfloat16(bits);
}

// The eight columns of a row, in vectors of the size that every 64-bit processor has.
struct Row {
  using Quarter = double __attribute__((vector_size(16)));
  Quarter quarters[4];
  void add(double factor, const Row& other) {
    for (int i = 0; i < 4; ++i) quarters[i] += factor * other.quarters[i];
  }
};

// As tensor cores round (M. Fasi et al. 2021, "Numerical behavior of NVIDIA tensor cores"): to
// nearest, the sum of many products would look more accurate than it is on a GPU.
inline float towards_zero(double x) {
  const float nearest = static_cast<float>(x);
  return std::fabs(nearest) > std::fabs(x) ? std::nextafterf(nearest, 0.0f) : nearest;
}

// c += a b, where lane 4g + t holds c's rows g and g + 8, columns 2t and 2t + 1. The sum of a
// product's terms and of c is rounded once.
template <int kDepth>
void multiply(WarpSync& sync, const float (&a)[16][kDepth], const float (&b)[kDepth][8]) {
  Row rows[kDepth];
  for (int k = 0; k < kDepth; ++k) {
    double row[8];
    for (int i = 0; i < 8; ++i) row[i] = b[k][i];
    std::memcpy(&rows[k], row, sizeof row);
  }
  for (int g = 0; g < 8; ++g) {
    double sums[2][8];
    for (int t = 0; t < 4; ++t) {
      const float* c = sync.argument<Fragments>(4 * g + t).c;
      for (int i = 0; i < 4; ++i) sums[i / 2][2 * t + i % 2] = c[i];
    }
    Row upper = bits_as<Row>(sums[0]), lower = bits_as<Row>(sums[1]);
    for (int k = 0; k < kDepth; ++k) {
      upper.add(a[g][k], rows[k]);
      lower.add(a[g + 8][k], rows[k]);
    }
    std::memcpy(sums[0], &upper, sizeof upper);
    std::memcpy(sums[1], &lower, sizeof lower);
    for (int t = 0; t < 4; ++t) {
      float* c = sync.argument<Fragments>(4 * g + t).c;
      for (int i = 0; i < 4; ++i) c[i] = towards_zero(sums[i / 2][2 * t + i % 2]);
    }
  }
}

// m16n8k16: register i of a holds row g + 8 (i mod 2), columns from 2t + 8 (i / 2); of b, rows from
// 2t + 8i of column g. m16n8k8 has the first half of them.
template <class T, int kDepth>
struct Multiply16 {
  static constexpr const char* kName = "mma";
  static void run(WarpSync& sync) {
    require_whole_warp(sync, kName);
    Unwatched unwatched;
    float a[16][kDepth];
    float b[kDepth][8];
    for (int lane = 0; lane < kWarp; ++lane) {
      const auto& fragments = sync.argument<Fragments>(lane);
      const int g = lane / 4, t = 2 * (lane % 4);
      for (int i = 0; i < kDepth / 4; ++i) {
        float* to = &a[g + 8 * (i & 1)][t + 8 * (i >> 1)];
        to[0] = to_float<T>(static_cast<uint16_t>(fragments.a[i]));
        to[1] = to_float<T>(static_cast<uint16_t>(fragments.a[i] >> 16));
      }
      for (int i = 0; i < kDepth / 8; ++i) {
        b[t + 8 * i][g] = to_float<T>(static_cast<uint16_t>(fragments.b[i]));
        b[t + 8 * i + 1][g] = to_float<T>(static_cast<uint16_t>(fragments.b[i] >> 16));
      }
    }
    multiply(sync, a, b);
  }
};

// m16n8k8 of tf32: register i of a holds row g + 8 (i mod 2), column t + 4 (i / 2); of b, row t +
// 4i of column g.
struct Multiply8 {
  static constexpr const char* kName = "mma";
  static float truncated(uint32_t bits) { return bits_as<float>(bits & 0xffffe000); }
  static void run(WarpSync& sync) {
    require_whole_warp(sync, kName);
    Unwatched unwatched;
    float a[16][8];
    float b[8][8];
    for (int lane = 0; lane < kWarp; ++lane) {
      const auto& fragments = sync.argument<Fragments>(lane);
      const int g = lane / 4, t = lane % 4;
      for (int i = 0; i < 4; ++i) a[g + 8 * (i & 1)][t + 4 * (i >> 1)] = truncated(fragments.a[i]);
      for (int i = 0; i < 2; ++i) b[t + 4 * i][g] = truncated(fragments.b[i]);
    }
    multiply(sync, a, b);
  }
};

template <class T>
void mma_16x8x16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  static_assert(std::is_same_v<T, __half> || std::is_same_v<T, __nv_bfloat16>);
  Fragments fragments{c, a, b};
  sync_lanes<Multiply16<T, 16>>(kAllLanes, fragments);
}

template <class T>
void mma_16x8x8(float (&c)[4], const uint32_t (&a)[2], uint32_t b) {
  static_assert(std::is_same_v<T, __half> || std::is_same_v<T, __nv_bfloat16>);
  Fragments fragments{c, a, &b};
  sync_lanes<Multiply16<T, 8>>(kAllLanes, fragments);
}

inline void mma_16x8x8_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  Fragments fragments{c, a, b};
  sync_lanes<Multiply8>(kAllLanes, fragments);
}

}  // namespace crossvit::testing
