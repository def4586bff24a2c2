// GELU, x times the normal distribution, and its slope.
#pragma once

#include <type_traits>

#include "common/cuda/math.h"

namespace crossvit {

// GELU at x, for results of type T.
template <class T>
class Gelu {
 public:
  __device__ __forceinline__ explicit Gelu(float x) : x_(x) {
    density_ = exp2_approx(x * x * (-0.5f * 1.4426950408889634f));
    if constexpr (sizeof(T) == 2) {
      // 1 - Phi(|x|), in half the instructions of erff: its ratio to exp(-x^2 / 2) is a polynomial
      // in t = 1 / (1 + c |x|); c and the coefficients are a minimax fit. Errors are below 6e-7,
      // those of x times the tail below 3e-7 and 3e-4 of it.
      const float root = rsqrtf(fmaf(0.23f, fabsf(x), 1.0f)), t = root * root;
      float ratio = fmaf(0.599980137f, t, -0.946215317f);
      ratio = fmaf(ratio, t, 1.00769368f);
      ratio = fmaf(ratio, t, -0.353475154f);
      ratio = fmaf(ratio, t, 0.20338157f);
      ratio = fmaf(ratio, t, -0.011364827f);
      tail_ = ratio * density_;
    } else {
      tail_ = 0.5f * erfcf(fabsf(x) * 0.70710678118654752f);
    }
  }

  __device__ __forceinline__ float value() const { return fmaxf(x_, 0.0f) - fabsf(x_) * tail_; }

  __device__ __forceinline__ float slope() const {
    const float distribution = x_ > 0 ? 1.0f - tail_ : tail_;
    return fmaf(x_ * 0.3989422804014327f, density_, distribution);
  }

 private:
  float x_, density_, tail_;
};

}  // namespace crossvit
