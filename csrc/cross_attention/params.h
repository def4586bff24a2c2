#pragma once

#include <cstdint>

#include "attention_core/params.h"

// The fusion of one CrossViT branch on the CPU, from the CLS to the new CLS (docs/derivation.md has
// the formulas). B images, C channels of the tokens, C_own of the CLS, h heads of width d = C / h.

namespace crossvit::cross_attention {

// A contiguous tensor of any element type; data is null for a bias that is left out.
struct Parameter {
  const void* data;
  DType dtype;
};

// A linear layer, weight [out, in], or a LayerNorm, weight [width].
struct Layer {
  Parameter weight;
  Parameter bias;
};

struct Weights {
  Layer proj_norm, proj;               // f: C_own -> C
  Layer norm, query, key, value, out;  // attention, width C
  Layer back_norm, back;               // g: C -> C_own
};

struct ForwardParams {
  int64_t batch;
  int64_t num_tokens;  // without the CLS
  int64_t channels;
  int64_t own_channels;
  int64_t num_heads;
  double eps;
  Parameter cls;                  // [B, C_own], contiguous
  attention_core::Tokens tokens;  // [B, N, C] without an extra token
  Weights weights;
  Parameter residual_scale;  // [B], of the type of the arithmetic, or null
  void* vectors;             // out: SavedVectors, of the type of the arithmetic
  void* y0_token;            // out: y0 in the tokens' type [B, C]; null where that is y0 itself
  void* new_cls;             // out: [B, C_own]
  DType new_cls_dtype;
};

void forward(const ForwardParams& params);

}  // namespace crossvit::cross_attention
