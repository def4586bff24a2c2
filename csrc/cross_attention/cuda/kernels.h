#pragma once

#include "attention_core/cuda/kernels.h"
#include "cross_attention/params.h"

// The fusion on an NVIDIA GPU, one kernel each way: float32, bfloat16 and float16; weight matrices
// and the new CLS of the tokens' type; LayerNorm's parameters, biases and the CLS of the tokens'
// type or float. The supported widths are those of attention_core.

namespace crossvit::cross_attention::cuda {

// How a cluster of blocks shares the work; the results are bit-identical for any shape. If it has
// fewer images than blocks, blocks / images of them share an image's tokens.
struct ClusterShape {
  int images;  // per cluster, at most 16
  int blocks;  // per cluster: 1, 2, 4 or 8
};

// Size of the workspace, in floats, for the partials of blocks that share an image.
int64_t workspace_size(const Problem& problem, const ClusterShape& shape);

// Sizes in a block's shared memory, in bytes (cross_attention/cuda/block.h): the operands and the
// floats of a width, what a layer's warps exchange, sums of rows, and the minimum of a token pass.
int operand_bytes(DType dtype, int64_t width);
int float_bytes(int64_t width);
int scratch_bytes();
int statistics_bytes();
int pass_bytes(DType dtype, int64_t channels);

// Launch shape of a kernel whose blocks may have up to `max_bytes` of shared memory.
attention_core::cuda::BlockSize forward_block(DType dtype, int cls_channels, int channels,
                                              int max_bytes);
attention_core::cuda::BlockSize backward_block(DType dtype, int cls_channels, int channels,
                                               int max_bytes);

void forward(const ForwardParams& params, const ClusterShape& shape, float* workspace,
             const attention_core::cuda::Place& place);
void backward(const BackwardParams& params, const ClusterShape& shape, float* workspace,
              const attention_core::cuda::Place& place);

}  // namespace crossvit::cross_attention::cuda
