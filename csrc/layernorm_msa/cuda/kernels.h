#pragma once

#include "attention_core/cuda/kernels.h"
#include "cross_attention/params.h"

// y = x + r s MSA(LN(x)) on an NVIDIA GPU. The matrices, and what is passed between kernels, are in
// float32, bfloat16 or float16; tokens, their gradients and vectors of parameters in that type or
// in float32. C is a multiple of 8, as is d = C / h.

namespace crossvit::layernorm_msa::cuda {

using attention_core::Tokens;
using attention_core::cuda::Place;
using cross_attention::Layer, cross_attention::Parameter;

struct Problem {
  int64_t batch;
  int64_t num_tokens;
  int64_t channels;
  int64_t num_heads;
  double eps;
  DType dtype;  // of the matrices
};

constexpr int kMaxHeadDim = 128;
constexpr int kMaxChannels = 1024;

struct Weights {
  Layer norm, qkv, out;
};

// Tensors out are contiguous; without a note they have the matrices' type.
struct ForwardParams {
  Problem problem;
  Tokens x;  // its extra token, if any, is the CLS that replaces row 0
  Weights weights;
  const float* residual_scale;  // r: [B], or null
  Parameter layer_scale;        // s: [C], or null
  const bool* key_mask;         // [B, N], true: attended to; or null
  void* normed;                 // scratch: LN(x) [B, N, C]
  void* qkv;                    // out: [B, N, 3, h, d]; k and v of masked keys are 0
  void* heads;                  // out: attention's result [B, N, h, d]
  float* lse;                   // out: [B, h, N], or null
  void* y;                      // out: [B, N, C], or null
  DType y_dtype;                // the matrices' or float32
};

struct BackwardParams {
  Problem problem;
  Tokens x;
  Weights weights;
  const bool* key_mask;  // as in forward
  const void* qkv;       // from forward
  const void* heads;     // from forward
  const float* lse;      // from forward
  Parameter dy;          // [B, N, C], of y's type
  const void* dupdate;   // [B, N, C]: r s dy
  void* dheads;          // scratch: [B, N, C]
  float* query_terms;    // scratch: [B, h, N rounded up, 2], query_term_floats()
  void* dqkv;            // out: [B, N, 3, h, d]
  void* dnormed;         // scratch: [B, N, C]
  void* normed;          // out: LN(x) [B, N, C]
  Tokens dx;             // out, with the gradient of the CLS as its extra token
  float* norm_shares;    // out: [blocks, 2, C], norm_share_floats()
};

// Most shared memory of a block of these kernels, for heads of this width.
int shared_bytes(int head_dim, DType dtype);

// Sizes of scratch memory, in floats.
int64_t query_term_floats(const Problem& problem);
int64_t norm_share_floats(const Problem& problem);

// Each launches kernels on a stream and returns; they throw std::runtime_error with the kernel's
// name if a launch fails.
void forward(const ForwardParams& params, const Place& place);
void backward(const BackwardParams& params, const Place& place);

}  // namespace crossvit::layernorm_msa::cuda
