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
LaunchConfig attention_config(const AttentionParams<T>& a, int shared_bytes, cudaStream_t stream) {
  return launch_config(a.batch * a.num_heads * a.tiles(), kAttentionThreads, shared_bytes, stream);
}

constexpr int kZeroWarps = 8;

// Zeroes k and v of masked keys: rows of `units` times 16 bytes, `stride` units apart. Grid: eight
// rows a block.
inline __global__ void __launch_bounds__(32 * kZeroWarps)
    zero_masked_rows(uint4* kv, const bool* key_mask, int64_t rows, int stride, int units) {
  const int64_t row = int64_t{blockIdx.x} * kZeroWarps + warp_index();
  if (row >= rows || key_mask[row]) return;
  uint4* const to = kv + row * stride;
  for (int i = lane_index(); i < units; i += 32) to[i] = make_uint4(0, 0, 0, 0);
}

template <class T>
void zero_masked_keys(const Problem& problem, const bool* key_mask, void* qkv,
                      cudaStream_t stream) {
  const int64_t rows = problem.batch * problem.num_tokens;
  const int units = static_cast<int>(problem.channels * sizeof(T) / sizeof(uint4));
  uint4* const kv = static_cast<uint4*>(qkv) + units;
  const LaunchConfig config = launch_config(ceil_div(rows, kZeroWarps), 32 * kZeroWarps, 0, stream);
  check_launch(launch(zero_masked_rows, config, kv, key_mask, rows, 3 * units, 2 * units),
               "zero_masked_keys");
}

template <class Run>
void with_head_dim(int head_dim, Run&& run) {
  if (head_dim <= 32) return run(std::integral_constant<int, 32>());
  if (head_dim <= 64) return run(std::integral_constant<int, 64>());
  return run(std::integral_constant<int, kMaxHeadDim>());
}

}  // namespace crossvit::layernorm_msa::cuda
