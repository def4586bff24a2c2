#pragma once

#include "attention_core/cuda/kernels.h"
#include "cross_attention/params.h"

// The fusion on an NVIDIA GPU, one kernel each way: float32, bfloat16 and float16, weight matrices
// of the tokens' type, LayerNorm's parameters, biases and the CLS of the tokens' type or float.
// Widths as attention_core has them.

namespace crossvit::cross_attention::cuda {

// What forward keeps for backward, in float: one piece of memory of vector_size floats an image, in
// this order.
struct Vectors {
  float* activated;       // [B, C_own]: gelu(LN_f(cls))
  float* y0;              // [B, C]
  float* normed;          // [B, C]: LN(y0)
  float* q;               // [B, C]
  float* o;               // [B, C]
  float* y;               // [B, C]
  float* back_activated;  // [B, C]: gelu(LN_g(y))
  float* kt;              // [h, B, C]
  float* m;               // [h, B, C]
  float* lse;             // [B, h]
};

inline int64_t vector_size(int64_t own, int64_t channels, int64_t heads) {
  return own + 6 * channels + 2 * heads * channels + heads;
}

// How a cluster of blocks shares the work; a result's bits do not depend on it. Where it has fewer
// images than blocks, blocks / images blocks share the tokens of one.
struct Division {
  int images;  // of a cluster, at most 16
  int blocks;  // of a cluster: 1, 2, 4 or 8
};

// Floats of memory in which blocks that share an image leave what its tiles give.
int64_t states_size(const Division& division, int64_t batch, int num_tokens, int channels,
                    int heads);

struct ForwardParams {
  int64_t batch;
  int num_tokens;  // without the CLS
  int channels;
  int own_channels;
  int num_heads;
  float eps;
  Parameter cls;  // [B, C_own], contiguous
  attention_core::Tokens tokens;
  Weights weights;
  const float* residual_scale;  // [B] or null
  void* new_cls;                // out: [B, C_own], of the weights' type
  float* vectors;               // out
  float* states;                // states_size, for its own use
};

// What backward leaves for the products over the batch that are the weight matrices' gradients, and
// for the sums over it that are all others': a row of 3 C_own + 8 C floats an image.
struct Gradients {
  float* proj_norm_weight;  // [C_own]
  float* proj_norm_bias;    // [C_own]
  float* dy0;               // [C]: f's bias
  float* norm_weight;       // [C]
  float* norm_bias;         // [C]
  float* dq;                // [C]
  float* dout;              // [C]: of o, the value's bias
  float* dupdate;           // [C]: the output's bias
  float* back_norm_weight;  // [C]
  float* back_norm_bias;    // [C]
  float* dnew_cls;          // [C_own]: g's bias
};

struct BackwardParams {
  int64_t batch;
  int num_tokens;  // without the CLS
  int channels;
  int own_channels;
  int num_heads;
  float eps;
  Parameter dnew_cls;  // [B, C_own], contiguous
  Parameter cls;
  attention_core::Tokens tokens;
  Weights weights;
  const float* residual_scale;
  float* vectors;             // as forward left them
  void* dcls;                 // out: [B, C_own], of the CLS's type
  attention_core::Tokens dx;  // out: [B, N, C]
  float* gradients;           // out: [B, 3 C_own + 8 C]
  float* dz;                  // [h, B, C], for its own use
  float* du;                  // out: [h, B, C]
  float* scratch;             // [2, B, C], for its own use
  float* states;              // states_size, for its own use
};

// Parts of the shared memory of a block, in bytes (cross_attention/cuda/block.h): operands and
// floats of a width, and the least that a pass over tokens takes.
int operand_bytes(DType dtype, int64_t width);
int float_bytes(int64_t width);
int pass_bytes(DType dtype, int64_t channels, int64_t heads);

// A kernel's block where one may have so many bytes of shared memory.
attention_core::cuda::BlockSize forward_block(DType dtype, int own, int channels, int heads,
                                              int most_bytes);
attention_core::cuda::BlockSize backward_block(DType dtype, int own, int channels, int heads,
                                               int most_bytes);

void forward(const ForwardParams& params, const Division& division,
             const attention_core::cuda::Place& place);
void backward(const BackwardParams& params, const Division& division,
              const attention_core::cuda::Place& place);

}  // namespace crossvit::cross_attention::cuda
