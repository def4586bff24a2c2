#pragma once

#include "attention_core/params.h"
#include "cross_attention/layout.h"

// The fusion of one CrossViT branch, from the CLS to the new CLS (docs/derivation.md has the
// formulas). B images, C channels of the tokens, C_cls of the CLS, h heads of width d = C / h.

namespace crossvit::cross_attention {

// A contiguous tensor of any element type; data is null for an omitted bias.
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
  Layer proj_norm, proj;               // f: C_cls -> C; null for the identity of C channels
  Layer norm, query, key, value, out;  // attention, width C
  Layer back_norm, back;               // g: C -> C_cls; null likewise
};

// Out tensors are contiguous.
struct ForwardParams {
  Problem problem;
  Parameter cls;                  // [B, C_cls], contiguous; without f [B, C]
  attention_core::Tokens tokens;  // [B, N, C] without an extra token
  Weights weights;
  Parameter residual_scale;  // [B], in the accumulation type, or null
  void* vectors;             // out: VectorsOf the accumulation type
  void* y0_token;            // out: y0 in the tokens' type [B, C]; null if y0 has that type
  void* new_cls;             // out: [B, C_cls]; without g [B, C]
  DType new_cls_dtype;
};

void forward(const ForwardParams& params);

// Only on the GPU.
struct BackwardParams {
  Problem problem;
  Parameter dnew_cls;  // contiguous, as new_cls
  Parameter cls;
  attention_core::Tokens tokens;
  Weights weights;
  Parameter residual_scale;
  void* vectors;              // from forward
  void* dcls;                 // out: as the CLS, of its type
  attention_core::Tokens dx;  // out: [B, N, C]
  float* gradients;           // out: Gradients of all images
  float* dz;                  // scratch: [h, B, C]
  float* du;                  // out: [h, B, C]
  float* residuals;           // scratch: [2, B, C], dy, and the gradient of y0 as a token
};

}  // namespace crossvit::cross_attention
