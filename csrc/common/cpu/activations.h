#pragma once

#include "common/cpu/layer_params.h"
#include "common/cpu/simd.h"

// Activations of feed-forward networks.

namespace crossvit {
namespace {

// x sigmoid(z), x and z of one sign.
inline FloatVector sigmoid_gate(FloatVector x, FloatVector z) {
  const FloatVector y = x / (1.0f + exp(-z));
  return z < -87.0f ? FloatVector{} : y;
}

// Applies the activation to `count` floats, a multiple of a vector.
inline void activate(Activation activation, const float* from, float* to, int count) {
  constexpr int kStep = kLanes<float>;
  const auto each = [&](const auto& function) {
    for (int i = 0; i < count; i += kStep) store(to + i, function(load(from + i)));
  };
  switch (activation) {
    case Activation::kGelu: return each([](FloatVector x) -> FloatVector { return gelu(x); });
    case Activation::kGeluTanh:  // tanh(u) = 2 sigmoid(2 u) - 1
      return each([](FloatVector x) -> FloatVector {
        return sigmoid_gate(x, x * (x * x * 0.0713548163f + 1.59576912f));
      });
    case Activation::kQuickGelu:
      return each([](FloatVector x) -> FloatVector { return sigmoid_gate(x, x * 1.702f); });
    case Activation::kSilu:
      return each([](FloatVector x) -> FloatVector { return sigmoid_gate(x, x); });
  }
}

}  // namespace
}  // namespace crossvit
