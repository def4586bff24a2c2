// LayerNorm over rows of up to 1024 channels, and its backward with the residual's.
#pragma once

#include "common/cuda/token_rows.h"

namespace crossvit {

constexpr int kMaxNormChannels = 1024;

template <class T>
struct NormParams {
  TokenRows<T> x;
  Elements<T> weight, bias;  // [C]
  int rows;
  int channels;
  float eps;
};

// normed = LN(x) [rows, C]
template <class T>
void layer_norm_forward(const NormParams<T>& params, T* normed, cudaStream_t stream);

template <class T>
struct NormBackwardParams {
  NormParams<T> norm;
  const T* d;               // [rows, C]: the gradient of LN(x)
  Elements<T> dy;           // [rows, C]: the residual's, in a type of its own
  MutableElements<T> dx;    // out: [rows, C]; row 0 of each image is 0 if there is a cls
  MutableElements<T> dcls;  // out: [B, C] if there is one
  T* normed;                // out: LN(x) [rows, C], or null
  float* shares;            // out: [blocks, 2, C]: d xhat and d, summed over the block's rows
};

// dx = dy + LayerNorm's backward of d
template <class T>
void layer_norm_backward(const NormBackwardParams<T>& params, cudaStream_t stream);

// Blocks of layer_norm_backward, as many as there are shares.
int64_t norm_backward_blocks(int64_t rows);

}  // namespace crossvit
