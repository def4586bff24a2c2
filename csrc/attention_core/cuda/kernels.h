#pragma once

#include "attention_core/params.h"

// attention_core on an NVIDIA GPU: float32, bfloat16 and float16 tokens with 16-byte-aligned rows,
// C a multiple of 16 up to 1536. Each function launches kernels on a stream and returns; it throws
// std::runtime_error with the kernel's name if a launch fails.

namespace crossvit::attention_core::cuda {

// The device and the stream that kernels run on.
struct Place {
  int device;
  void* stream;
};

// Tokens per split, the range of an image's tokens that one block or cluster processes. It does not
// depend on the batch, so neither do the results.
constexpr int kSplitTokens = 1024;

// Size of the workspace of forward and backward, in floats: 0 if an image has one split and one
// block.
int64_t forward_workspace(const Problem& problem, int blocks);
int64_t backward_workspace(const Problem& problem, int blocks);

// The maximum width of tokens.
constexpr int kMaxChannels = 1536;

// Launch shape of a block.
struct BlockSize {
  int threads;
  int shared_bytes;
};

// Launch shape of a token pass with up to `rows` queries, whose blocks may have up to `max_bytes`
// of shared memory, and of the kernels that merge splits.
BlockSize forward_block(DType dtype, int64_t rows, int64_t channels, int max_bytes);
BlockSize backward_block(DType dtype, int64_t rows, int64_t channels, int max_bytes);
constexpr int kMergeThreads = 128;

// The minimum shared memory of a block, in bytes, for tokens of a width.
int shared_bytes(DType dtype, int64_t channels);

// u, m, lse and their gradients are floats, rows of u, m and dm 16 bytes aligned. A cluster of
// `blocks` blocks, a power of two up to 8, shares the tokens of a split; the results are
// bit-identical for any number of them.
void forward(const ForwardParams& params, int blocks, float* workspace, const Place& place);
void backward(const BackwardParams& params, int blocks, float* workspace, const Place& place);

}  // namespace crossvit::attention_core::cuda
