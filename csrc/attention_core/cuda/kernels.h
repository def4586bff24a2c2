#pragma once

#include "attention_core/params.h"

// attention_core on an NVIDIA GPU: float32, bfloat16 and float16 tokens, whose rows begin at
// multiples of 16 bytes, with C a multiple of 16 up to 1536. Each function launches kernels on a
// stream and returns; it throws std::runtime_error with the kernel's name where a launch fails.

namespace crossvit::attention_core::cuda {

// Where kernels run.
struct Place {
  int device;
  void* stream;
};

// The tokens of a split: the range of an image's tokens that one block, or cluster, takes. It does
// not depend on the batch, so neither do the results.
constexpr int kSplitTokens = 1024;

// Floats of workspace that forward and backward need: none for images of one split each that no
// blocks share.
int64_t forward_workspace(const Problem& problem, int blocks);
int64_t backward_workspace(const Problem& problem, int blocks);

// The widest tokens.
constexpr int kMaxChannels = 1536;

// A block, as kernels are launched.
struct BlockSize {
  int threads;
  int shared_bytes;
};

// Launch shape of a token pass with up to `rows` rows of u, and of the kernels that merge splits.
BlockSize forward_block(DType dtype, int64_t rows, int64_t channels);
BlockSize backward_block(DType dtype, int64_t rows, int64_t channels);
constexpr int kMergeThreads = 128;

// The least shared memory, in bytes, that a block needs for tokens of a width.
int shared_bytes(DType dtype, int64_t channels);

// m, lse, du and all rows of u are floats. A cluster of `blocks` blocks, up to 8, shares the tokens
// of a split; the results' bits do not depend on it.
void forward(const ForwardParams& params, int blocks, float* workspace, const Place& place);
void backward(const BackwardParams& params, int blocks, float* workspace, const Place& place);

}  // namespace crossvit::attention_core::cuda
