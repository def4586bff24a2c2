// Activations of feed-forward networks, and their slopes: x times a distribution.
#pragma once

#include <stdexcept>
#include <type_traits>

#include "common/activation.h"
#include "common/cuda/math.h"

namespace crossvit {

// GELU at x, for results of type T: x times the normal distribution.
template <class T>
class Gelu {
 public:
  __device__ __forceinline__ explicit Gelu(float x) : x_(x) {
    if constexpr (sizeof(T) == 2) {
      // 1 - Phi(|x|), in a third of erff's instructions: its logarithm to base 2 is a polynomial, a
      // minimax fit. Up to 3.5 errors are below 2e-4 of the tail in bfloat16, 1/20 of a rounding
      // error, and 4e-6 in float16; up to 5 7e-4 and 1e-5.
      const float size = fabsf(x);
      float power;
      if constexpr (std::is_same_v<T, __half>) {
        power = fmaf(-1.78168047e-06f, size, 6.06695262e-05f);
        power = fmaf(power, size, -0.00092431097f);
        power = fmaf(power, size, 0.00848785019f);
        power = fmaf(power, size, -0.0539279067f);
        power = fmaf(power, size, -0.458488116f);
        power = fmaf(power, size, -1.15124477f);
        power = fmaf(power, size, -0.999995562f);
      } else {
        power = fmaf(-0.000256385217f, size, 0.00515643039f);
        power = fmaf(power, size, -0.045810577f);
        power = fmaf(power, size, -0.467650187f);
        power = fmaf(power, size, -1.14741397f);
        power = fmaf(power, size, -1.00025812f);
      }
      tail_ = exp2_approx(power);
    } else {
      tail_ = 0.5f * erfcf(fabsf(x) * 0.70710678118654752f);
    }
  }

  __device__ __forceinline__ float value() const { return fmaxf(x_, 0.0f) - fabsf(x_) * tail_; }

  __device__ __forceinline__ float slope() const {
    const float distribution = x_ > 0 ? 1.0f - tail_ : tail_;
    const float density = exp2_approx(x_ * x_ * (-0.5f * 1.4426950408889634f));
    return fmaf(x_ * 0.3989422804014327f, density, distribution);
  }

 private:
  float x_, tail_;
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
