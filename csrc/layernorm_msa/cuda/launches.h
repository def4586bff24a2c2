#pragma once

#include "common/cuda/dispatch.h"
#include "layernorm_msa/cuda/attention.h"
#include "layernorm_msa/cuda/kernels.h"
#include "layernorm_msa/cuda/parameters.h"

// Launches that forward and backward share.

namespace crossvit::layernorm_msa::cuda {

template <class T>
AttentionParams<T> attention_params(const Problem& problem, const void* qkv, const bool* key_mask,
                                    const void* heads, const float* lse) {
  AttentionParams<T> a = {};
  a.qkv = static_cast<const T*>(qkv);
  a.key_mask = key_mask;
  a.heads = static_cast<T*>(const_cast<void*>(heads));
  a.lse = const_cast<float*>(lse);
  a.batch = problem.batch;
  a.num_tokens = static_cast<int>(problem.num_tokens);
  a.num_heads = static_cast<int>(problem.num_heads);
  a.head_dim = static_cast<int>(problem.channels / problem.num_heads);
  return a;
}

template <class T>
LaunchConfig attention_config(const AttentionParams<T>& a, int threads, int shared_bytes,
                              cudaStream_t stream) {
  return launch_config(a.batch * a.num_heads * a.tiles(), threads, shared_bytes, stream);
}

// Zeroes k and v of masked keys, in qkv or its gradient: [B, N, 3, C] of elements of this size.
void zero_masked_keys(const Problem& problem, const bool* key_mask, void* qkv, int element_size,
                      cudaStream_t stream);

template <class Run>
void with_head_dim(int head_dim, Run&& run) {
  if (head_dim <= 32) return run(std::integral_constant<int, 32>());
  if (head_dim <= 64) return run(std::integral_constant<int, 64>());
  return run(std::integral_constant<int, kMaxHeadDim>());
}

}  // namespace crossvit::layernorm_msa::cuda
