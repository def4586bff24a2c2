#pragma once

#include <cstdint>

#include "common/activation.h"

// Parameters that both halves of a transformer block have, in float32.

namespace crossvit {

// [B, N, C] with unit stride along C. cls [B, C], if not null, replaces row 0.
struct TokensParams {
  const float* data;
  int64_t batch;
  int64_t num_tokens;
  int64_t channels;
  int64_t batch_stride;
  int64_t token_stride;
  const float* cls;
  int64_t cls_stride;
};

// A LayerNorm, and its outputs saved for backward, which may be null.
struct NormParams {
  const float* weight;  // [C]
  const float* bias;    // or null
  double eps;
  float* normed;  // out: [B, N, C]
  float* mean;    // out: [B, N]
  float* rstd;
};

// Contiguous; bias may be null.
struct LinearParams {
  const float* weight;  // [out, in]
  const float* bias;    // [out]
};

}  // namespace crossvit
