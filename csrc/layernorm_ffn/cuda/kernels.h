#pragma once

#include "common/activation.h"
#include "layernorm_msa/cuda/kernels.h"

// y = x + r s FFN(LN(x)) on an NVIDIA GPU, in the types of LayerNorm-MSA. C and F, the number of
// hidden units, are multiples of 8.

namespace crossvit::layernorm_ffn::cuda {

using attention_core::Tokens;
using attention_core::cuda::Place;
using cross_attention::Layer, cross_attention::Parameter;

struct Problem {
  int64_t batch;
  int64_t num_tokens;
  int64_t channels;
  int64_t hidden_width;  // F
  double eps;
  DType dtype;  // of the matrices
};

struct Weights {
  Layer norm, fc1, fc2;
};

// Tensors out are contiguous; without a note they have the matrices' type.
struct ForwardParams {
  Problem problem;
  Tokens x;
  Weights weights;
  Activation activation;
  const float* residual_scale;  // r: [B], or null
  Parameter layer_scale;        // s: [C], or null
  void* normed;                 // out: LN(x) [B, N, C]
  void* activated;              // scratch: [B, N, F]
  void* y;                      // out: [B, N, C]
  DType y_dtype;                // the matrices' or float32
};

struct BackwardParams {
  Problem problem;
  Tokens x;
  Weights weights;
  Activation activation;
  Parameter dy;         // [B, N, C], of y's type
  const void* dupdate;  // [B, N, C]: r s dy
  const void* normed;   // from forward
  void* activated;      // out: [B, N, F]
  void* dhidden;        // out: [B, N, F], the gradient before the activation
  void* dnormed;        // scratch: [B, N, C]
  Tokens dx;            // out
  float* norm_shares;   // out: [blocks, 2, C], norm_share_floats()
};

// Size of the shares of LayerNorm's gradients, in floats.
int64_t norm_share_floats(const Problem& problem);

// Each launches kernels on a stream and returns; they throw std::runtime_error with the kernel's
// name if a launch fails.
void forward(const ForwardParams& params, const Place& place);
void backward(const BackwardParams& params, const Place& place);

}  // namespace crossvit::layernorm_ffn::cuda
