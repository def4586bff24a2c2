// Linear layers over rows of tokens, on tensor cores.
#pragma once

#include "common/cuda/activations.h"
#include "common/cuda/token_rows.h"

namespace crossvit {

// What a linear layer computes. Backward's products are with W as it is stored, without a bias.
enum class Linear {
  kForward,             // out = a W^T + b or, with x, x + r s (a W^T + b)
  kActivation,          // out = f(a W^T + b)
  kBackward,            // out = a W
  kActivationBackward,  // out = (a W) f'(h), and h = f(h)
};

template <class T>
struct LinearParams {
  const T* a;       // [rows, terms]
  const T* weight;  // [columns, terms]; backward [terms, columns]
  int rows;
  int terms, columns;       // multiples of 8
  Elements<T> bias;         // [columns], or null
  TokenRows<T> x;           // [rows, columns]; its data is null if there is no residual
  const float* scale;       // r: [images], or null
  Elements<T> layer_scale;  // s: [columns], or null
  SigmoidGate gate;         // of f; zeros for exact GELU
  T* hidden;                // h: [rows, columns]
  MutableElements<T> out;
};

template <Linear kKind, class T>
void linear(const LinearParams<T>& params, cudaStream_t stream);

}  // namespace crossvit
