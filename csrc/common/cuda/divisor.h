// Division by a number that a launch knows.
#pragma once

#include "common/arithmetic.h"
#include "common/cuda/gpu.h"

namespace crossvit {

// One multiplication by the reciprocal in place of some 20 instructions, or 70 for 64 bits. The
// reciprocal is rounded up, which is exact for numerators below 2^31 (Granlund and Montgomery,
// Division by Invariant Integers using Multiplication, 1994, theorem 4.2).
struct Divisor {
  int value;
  uint32_t reciprocal;  // 2^shift / value
  int shift;

  static Divisor of(int value) {
    int bits = 0;
    while (int64_t{1} << bits < value) ++bits;
    const int shift = 31 + bits;
    return {value, static_cast<uint32_t>(ceil_div(uint64_t{1} << shift, uint64_t(value))), shift};
  }

  // n / value, for n >= 0
  __host__ __device__ __forceinline__ int quotient(int n) const {
    return static_cast<int>(uint64_t{static_cast<uint32_t>(n)} * reciprocal >> shift);
  }
};

}  // namespace crossvit
