#pragma once

#include "common/cpu/layer_params.h"

// y = x + r s MSA(LN(x)) on the CPU, in float32. B images, N tokens, h heads of width d, C = h d.

namespace crossvit::layernorm_msa {

// Tensors out are contiguous.
struct ForwardParams {
  TokensParams x;
  NormParams norm;
  LinearParams qkv, out;
  int64_t num_heads;
  const float* residual_scale;  // r: [B], or null
  const float* layer_scale;     // s: [C], or null
  const bool* key_mask;         // [B, N], true: attended to; or null
  float* qkv_rows;              // out: [B, N, 3, h, d]
  float* heads;                 // out: [B, N, h, d]
  float* lse;                   // out: [B, N, h], or null
  float* y;                     // out: [B, N, C]
};

void forward(const ForwardParams& params);

}  // namespace crossvit::layernorm_msa
