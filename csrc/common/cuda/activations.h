// Activations of feed-forward networks, and their slopes: x times a distribution.
#pragma once

#include <stdexcept>

#include "common/activation.h"
#include "common/cuda/math.h"

namespace crossvit {

// GELU at x, for results of type T: x times the normal distribution.
template <class T>
class Gelu {
 public:
  __device__ __forceinline__ explicit Gelu(float x) : x_(x) {
    density_ = exp2_approx(x * x * (-0.5f * 1.4426950408889634f));
    if constexpr (sizeof(T) == 2) {
      // 1 - Phi(|x|), in half the instructions of erff: its ratio to exp(-x^2 / 2) is a polynomial
      // in t = 1 / (1 + c |x|); c and the coefficients are a minimax fit. Errors are below 6e-7,
      // those of x times the tail below 3e-7 and 3e-4 of it.
      const float root = rsqrt_approx(fmaf(0.23f, fabsf(x), 1.0f)), t = root * root;
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

struct ExactGelu {
  template <class T>
  __device__ __forceinline__ Gelu<T> at(float x) const {
    return Gelu<T>(x);
  }
};

// x sigmoid(z) at x, for results of type T, from z and dz/dx.
template <class T>
class Gated {
 public:
  __device__ __forceinline__ Gated(float x, float z, float dz) : x_(x), dz_(dz) {
    const float e = exp2_approx(fabsf(z) * -1.4426950408889634f);  // at most 1
    const float inverse = sizeof(T) == 2 ? reciprocal(1.0f + e) : 1.0f / (1.0f + e);
    sigmoid_ = z < 0 ? e * inverse : inverse;
    density_ = e * inverse * inverse;
  }

  __device__ __forceinline__ float value() const { return x_ * sigmoid_; }
  __device__ __forceinline__ float slope() const { return fmaf(x_ * dz_, density_, sigmoid_); }

 private:
  float x_, dz_, sigmoid_, density_;
};

// x sigmoid(z), z = x (linear + cubic x^2).
struct SigmoidGate {
  float linear, cubic;

  template <class T>
  __device__ __forceinline__ Gated<T> at(float x) const {
    const float square = x * x;
    return {x, x * fmaf(cubic, square, linear), fmaf(3 * cubic, square, linear)};
  }
};

// The gate of an activation; all zeros for exact GELU.
inline SigmoidGate gate_of(Activation activation) {
  switch (activation) {
    case Activation::kGelu: return {0, 0};
    case Activation::kGeluTanh: return {1.5957691216057308f, 0.07135481627159471f};
    case Activation::kQuickGelu: return {1.702f, 0};
    case Activation::kSilu: return {1, 0};
  }
  throw std::invalid_argument("no such activation");
}

}  // namespace crossvit
