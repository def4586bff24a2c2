#pragma once

#include "cross_attention/cuda/block.h"

// The two layers before backward's token pass, a block of columns to each warp: with their depth
// divided among warps (TransposedLinear) the pass's kernel would spill registers.

namespace crossvit::cross_attention::cuda {

constexpr int kColumnBlock = 32;  // columns that transposed_linear takes at once

// Columns [first, first + kColumnBlock) of rows W, W [depth, columns]: calls write(row, column,
// values) with the values of four columns. A lane loads four columns for each of its k, one for
// each tile of 8 columns. Of rows from `count` on the values are 0. Called by a warp.
template <class T, class Write>
__device__ void transposed_linear(const T* rows, int pitch, int count, const void* weight,
                                  int depth, int columns, int first, Write write) {
  using V = Vector<T>;
  constexpr int kDepth = 4 * V::kElements;
  constexpr int kSteps = sizeof(T) == 4 ? 2 : 4;  // of kDepth along k: loads in flight
  const int g = lane_index() / 4, t = lane_index() % 4;
  const T* w = static_cast<const T*>(weight) + first + 4 * g;
  float sums[4][4] = {};
#pragma unroll 1
  for (int begin = 0; begin < depth; begin += kSteps * kDepth) {
    const int k = begin + t * V::kElements;
    FourColumns<T> b[kSteps][V::kElements];
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const bool is_used = k + step * kDepth < depth && first + 4 * g < columns;
#pragma unroll
      for (int i = 0; i < V::kElements; ++i) {
        b[step][i] = FourColumns<T>::load_if(is_used, w + int64_t{k + step * kDepth + i} * columns);
      }
    }
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const int k_step = k + step * kDepth < depth ? k + step * kDepth : 0;  // there b is 0
      const V upper = V::load_if(g < count, rows + g * pitch + k_step);
      const V lower = V::load_if(g + 8 < count, rows + (g + 8) * pitch + k_step);
#pragma unroll
      for (int i = 0; i < V::kPairs; i += 2) {
        const FragmentA<T> a = a_of_rows(upper, lower, i);
        const FourColumns<T>* b_rows = b[step] + 2 * i;
#pragma unroll
        for (int tile = 0; tile < 4; ++tile) {
          multiply(sums[tile], a,
                   FragmentB<T>{
                       {join<T>(b_rows[0], b_rows[1], tile), join<T>(b_rows[2], b_rows[3], tile)}});
        }
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int column = first + 4 * (2 * t + (i & 1));
    if (column >= columns) continue;
    write(g + 8 * (i >> 1), column, make_float4(sums[0][i], sums[1][i], sums[2][i], sums[3][i]));
  }
}

// transposed_linear for all columns of `heads` matrices of `depth` rows each, with `depth` columns
// of the operand per head. Column blocks go round-robin to the warps of the cluster; write_of(head)
// returns the function that writes a head's results.
template <class T, class WriteOf>
__device__ void transposed_linears(const T* rows, int pitch, int count, const void* weights,
                                   int heads, int depth, int columns, WriteOf write_of) {
  const int warps = block_warps(), column_blocks = ceil_div(columns, kColumnBlock);
  const int first = cluster_rank() * warps + warp_index();
  for (int i = first; i < heads * column_blocks; i += cluster_size() * warps) {
    const int head = i / column_blocks;
    const T* weight = static_cast<const T*>(weights) + int64_t{head} * depth * columns;
    transposed_linear(rows + head * depth, pitch, count, weight, depth, columns,
                      i % column_blocks * kColumnBlock, write_of(head));
  }
}

}  // namespace crossvit::cross_attention::cuda
