#pragma once

#include "cross_attention/cuda/rows.h"

// Linear layers of the CLS path's rows. Weights go from memory, mostly L2, straight to registers,
// 16 bytes per lane, so that a cluster reads a matrix once and waits for no barrier.

namespace crossvit::cross_attention {

// 16 bytes of a matrix.
template <class T>
struct Vector {
  static constexpr int kElements = 16 / sizeof(T);
  static constexpr int kPairs = kElements / 2;
  Pair<T> pair[kPairs];

  __device__ static Vector load(const T* from) { return load_if(true, from); }
  __device__ static Vector load_if(bool condition, const T* from) {
    Vector v;
    uint4 bits = make_uint4(0, 0, 0, 0);
    if (condition) bits = *reinterpret_cast<const uint4*>(from);
    memcpy(&v, &bits, sizeof v);
    return v;
  }
};

// Rows g and g + 8 of A from pairs i and i + 1 of theirs.
template <class T>
__device__ __forceinline__ FragmentA<T> a_of_rows(const Vector<T>& upper, const Vector<T>& lower,
                                                  int i) {
  return {{upper.pair[i], lower.pair[i], upper.pair[i + 1], lower.pair[i + 1]}};
}

// A linear layer, rows W^T + bias with W [columns, depth], in tiles of 8 columns; column_of(tile)
// is the first column of a tile. The loads of each warp's first tile start in the constructor: a
// barrier that the rows wait for may follow. The order of k is free as long as both operands share
// it: a lane takes consecutive elements. For all threads of a block.
template <class T, class Columns>
class LinearTiles {
 public:
  __device__ LinearTiles(const Layer& layer, int depth, const Columns& columns)
      : layer_(layer), depth_(depth), columns_(columns) {
    if (warp_index() < columns.tiles()) load_first(warp_index());
  }

  // Calls write(row, column, a, b) with columns `column` and `column` + 1 of each of the 16 rows.
  template <class Write>
  __device__ void run(const T* rows, int pitch, Write write) {
    const int g = lane_index() / 4, t = lane_index() % 4;
    const Elements<T> bias(layer_.bias);
#pragma unroll 1
    for (int tile = warp_index(); tile < columns_.tiles(); tile += block_warps()) {
      if (tile != warp_index()) load_first(tile);
      float sums[4][4] = {};  // several chains of products
      multiply_loaded(rows, pitch, 0, sums);
#pragma unroll 1
      for (int begin = kSteps * kDepth; begin < depth_; begin += kSteps * kDepth) {
        load(tile, begin);
        multiply_loaded(rows, pitch, begin, sums);
      }
      float total[4];
      for (int i = 0; i < 4; ++i) {
        total[i] = sums[0][i] + sums[1][i] + (sums[2][i] + sums[3][i]) + bias.value(biases_[i & 1]);
      }
      const int column = columns_.first(tile) + 2 * t;
      write(g, column, total[0], total[1]);
      write(g + 8, column, total[2], total[3]);
    }
  }

 private:
  using V = Vector<T>;
  static constexpr int kDepth = 4 * V::kElements;
  // Along k, loads in flight: 16-bit rows of 384.
  static constexpr int kSteps = sizeof(T) == 4 ? 6 : 12;

  __device__ __forceinline__ void load_first(int tile) {
    const Elements<T> bias(layer_.bias);
    const int column = columns_.first(tile) + 2 * (lane_index() % 4);
    for (int i = 0; i < 2; ++i) biases_[i] = bias.load(column + i);
    load(tile, 0);
  }

  __device__ __forceinline__ void load(int tile, int begin) {
    const int row = columns_.first(tile) + lane_index() / 4;
    const int k = begin + lane_index() % 4 * V::kElements;
    const T* from = static_cast<const T*>(layer_.weight.data) + int64_t{row} * depth_ + k;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      weights_[step] = V::load_if(k + step * kDepth < depth_, from + step * kDepth);
    }
  }

  __device__ __forceinline__ void multiply_loaded(const T* rows, int pitch, int begin,
                                                  float (&sums)[4][4]) const {
    const int g = lane_index() / 4, k = begin + lane_index() % 4 * V::kElements;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const int k_step = k + step * kDepth < depth_ ? k + step * kDepth : 0;  // weights are 0 there
      const V upper = V::load(rows + g * pitch + k_step);
      const V lower = V::load(rows + (g + 8) * pitch + k_step);
#pragma unroll
      for (int i = 0; i < V::kPairs; i += 2) {
        multiply(sums[(step * V::kPairs / 2 + i / 2) % 4], a_of_rows(upper, lower, i),
                 FragmentB<T>{{weights_[step].pair[i], weights_[step].pair[i + 1]}});
      }
    }
  }

  const Layer& layer_;
  int depth_;
  Columns columns_;
  V weights_[kSteps];
  LoadedElement biases_[2];
};

// Four adjacent elements of a row of a matrix.
template <class T>
struct FourColumns {
  using Bits = std::conditional_t<sizeof(T) == 4, uint4, uint2>;
  Pair<T> pair[2];

  __device__ static FourColumns load_if(bool condition, const T* from) {
    FourColumns columns;
    Bits bits = {};
    if (condition) bits = *reinterpret_cast<const Bits*>(from);
    memcpy(&columns, &bits, sizeof columns);
    return columns;
  }
};

// The elements of one column in two rows.
template <class T>
__device__ __forceinline__ Pair<T> join(const FourColumns<T>& a, const FourColumns<T>& b,
                                        int column) {
  const Pair<T> first = a.pair[column / 2], second = b.pair[column / 2];
  if constexpr (sizeof(T) == 4) {
    return column % 2 ? make_float2(first.y, second.y) : make_float2(first.x, second.x);
  } else {
    return __byte_perm(first, second, column % 2 ? 0x7632 : 0x5410);
  }
}

// Four numbers in the operands' type.
template <class T>
__device__ __forceinline__ typename FourColumns<T>::Bits pack_four(float4 values) {
  const Pair<T> pairs[2] = {pack<T>(values.x, values.y), pack<T>(values.z, values.w)};
  typename FourColumns<T>::Bits bits;
  memcpy(&bits, pairs, sizeof bits);
  return bits;
}

__device__ __forceinline__ float4 scaled(float4 v, float factor) {
  return make_float4(v.x * factor, v.y * factor, v.z * factor, v.w * factor);
}

constexpr int kColumnBlock = 32;  // columns that transposed_linear takes at once

// Columns [first, first + kColumnBlock) of rows W, W [depth, columns]: calls write(row, column,
// values) with the values of four columns. A lane loads four columns for each of its k, one for
// each tile of 8 columns. Called by a warp.
template <class T, class Write>
__device__ void transposed_linear(const T* rows, int pitch, const void* weight, int depth,
                                  int columns, int first, Write write) {
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
      const V upper = V::load(rows + g * pitch + k_step);
      const V lower = V::load(rows + (g + 8) * pitch + k_step);
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

}  // namespace crossvit::cross_attention
