#pragma once

#include "common/cpu/layer_params.h"

// y = x + r s FFN(LN(x)) on the CPU, in float32.

namespace crossvit::layernorm_ffn {

struct ForwardParams {
  TokensParams x;  // without a cls
  NormParams norm;
  LinearParams fc1, fc2;
  int64_t hidden_width;  // F
  Activation activation;
  const float* residual_scale;  // r: [B], or null
  const float* layer_scale;     // s: [C], or null
  float* y;                     // out: [B, N, C]
  float* hidden;                // out: [B, N, F], before the activation; null if nothing is kept
  float* activated;             // out: [B, N, F], after it
};

void forward(const ForwardParams& params);

}  // namespace crossvit::layernorm_ffn
