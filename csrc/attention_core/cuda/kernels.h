#pragma once

#include "attention_core/params.h"

// attention_core on an NVIDIA GPU: float32, bfloat16 and float16 tokens, whose rows begin at
// multiples of 16 bytes, with C a multiple of 16 up to 1536. Each function starts kernels on a
// stream and returns; it throws std::runtime_error with the kernel's name where one does not start.

namespace crossvit::attention_core::cuda {

// Where kernels run.
struct Place {
  int device;
  void* stream;
};

// Tokens of a block: a part of an image that has more. It does not follow the batch, so that
// neither does a result.
constexpr int kPart = 1024;

// Floats of memory that forward and backward need beside their results: none for images of one
// part that no blocks share.
int64_t forward_workspace(const Problem& problem, int blocks);
int64_t backward_workspace(const Problem& problem, int blocks);

// The widest tokens.
constexpr int kMaxChannels = 1536;

// A block of threads, as kernels are launched.
struct BlockSize {
  int threads;
  int shared_bytes;
};

// Of a pass over the tokens for at most so many score rows, and of what adds the parts up.
BlockSize forward_block(DType dtype, int64_t rows, int64_t channels);
BlockSize backward_block(DType dtype, int64_t rows, int64_t channels);
constexpr int kMergeThreads = 128;

// Shared memory of a block, in bytes, that tokens of a width need at least.
int shared_bytes(DType dtype, int64_t channels);

// m, lse, du and all score rows are floats. A cluster of `blocks` blocks, up to 8, shares the
// tokens of an image's part; a result's bits do not depend on it.
void forward(const ForwardParams& params, int blocks, float* workspace, const Place& place);
void backward(const BackwardParams& params, int blocks, float* workspace, const Place& place);

}  // namespace crossvit::attention_core::cuda
