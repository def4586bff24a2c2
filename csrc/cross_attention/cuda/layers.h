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

  __device__ static Vector load_if(bool condition, const T* from) {
    Vector v;
    uint4 bits = make_uint4(0, 0, 0, 0);
    if (condition) bits = *reinterpret_cast<const uint4*>(from);
    memcpy(&v, &bits, sizeof v);
    return v;
  }
};

// Rows g and g + 8 of an operand with `count` rows. Beyond them it is the last row, whose products
// no one uses.
template <class T>
class RowPair {
 public:
  __device__ __forceinline__ RowPair(const T* rows, int pitch, int count)
      : upper_(rows + minimum(hidden_lane() / 4, count - 1) * pitch),
        lower_(rows + minimum(hidden_lane() / 4 + 8, count - 1) * pitch) {}

  __device__ __forceinline__ Vector<T> upper(int k) const {
    return Vector<T>::load_if(true, upper_ + k);
  }
  __device__ __forceinline__ Vector<T> lower(int k) const {
    return Vector<T>::load_if(true, lower_ + k);
  }

 private:
  const T *upper_, *lower_;
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
  __device__ __forceinline__ LinearTiles(const Layer& layer, int depth, const Columns& columns)
      : layer_(layer), depth_(depth), columns_(columns) {
    load(warp_index(), 0);
  }

  // Takes other columns.
  __device__ __forceinline__ void start(const Columns& columns) {
    columns_ = columns;
    load(warp_index(), 0);
  }

  // Calls write(row, column, a, b) with columns `column` and `column` + 1 of rows below count.
  template <class Write>
  __device__ __forceinline__ void run(const T* rows, int pitch, int count, Write write) {
    struct Nothing {};
    run(
        rows, pitch, count, [](int, int) { return Nothing(); },
        [&](int row, int column, float a, float b, Nothing) { write(row, column, a, b); });
  }

  // Also gives it load(row, column), called before the products.
  template <class Load, class Write>
  __device__ __forceinline__ void run(const T* rows, int pitch, int count, Load load_more,
                                      Write write) {
    const int g = lane_index() / 4, t = lane_index() % 4;
    const Elements<T> bias(layer_.bias);
#pragma unroll 1
    for (int tile = warp_index(); tile < columns_.tiles(); tile += block_warps()) {
      const float biases[2] = {bias.value(biases_[0]), bias.value(biases_[1])};
      const int column = columns_.first(tile) + 2 * t;
      const auto upper = load_more(minimum(g, count - 1), column);
      const auto lower = load_more(minimum(g + 8, count - 1), column);
      float sums[4][4] = {};  // several chains of products
#pragma unroll 1
      for (int begin = 0; begin < depth_; begin += kSteps * kDepth) {
        multiply_loaded(rows, pitch, count, begin, sums);
        const int next = begin + kSteps * kDepth;
        const bool is_last = next >= depth_;
        load(is_last ? tile + block_warps() : tile, is_last ? 0 : next);
      }
      float total[4];
      for (int i = 0; i < 4; ++i) {
        total[i] = sums[0][i] + sums[1][i] + (sums[2][i] + sums[3][i]) + biases[i & 1];
      }
      if (g < count) write(g, column, total[0], total[1], upper);
      if (g + 8 < count) write(g + 8, column, total[2], total[3], lower);
    }
  }

 private:
  using V = Vector<T>;
  static constexpr int kDepth = 4 * V::kElements;
  // Along k, loads in flight: 16-bit rows of 384.
  static constexpr int kSteps = sizeof(T) == 4 ? 6 : 12, kHalf = kSteps / 2;

  __device__ __forceinline__ void load(int tile, int begin) {
    if (tile >= columns_.tiles()) return;
    const int first = columns_.first(tile), row = first + lane_index() / 4;
    const int k = begin + lane_index() % 4 * V::kElements;
    if (begin == 0) {
      const Elements<T> bias(layer_.bias);
      for (int i = 0; i < 2; ++i) biases_[i] = bias.load(first + 2 * (lane_index() % 4) + i);
    }
    const T* from = static_cast<const T*>(layer_.weight.data) + row * depth_ + k;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      if (step == kHalf && begin + kHalf * kDepth >= depth_) break;
      weights_[step] = V::load_if(k + step * kDepth < depth_, from + step * kDepth);
    }
  }

  __device__ __forceinline__ void multiply_loaded(const T* rows, int pitch, int count, int begin,
                                                  float (&sums)[4][4]) const {
    const int k = begin + lane_index() % 4 * V::kElements;
    const RowPair<T> pair(rows, pitch, count);
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      if (step == kHalf && begin + kHalf * kDepth >= depth_) break;
      const int k_step = k + step * kDepth < depth_ ? k + step * kDepth : 0;  // weights are 0 there
      const V upper = pair.upper(k_step), lower = pair.lower(k_step);
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
  using Bits = QuadBits<T>;
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

// 32 columns of some rows of a matrix W [depth, columns], in registers, as operands with these
// columns. A lane has four columns of each of its k, one for each tile of 8 columns. Of a warp.
template <class T>
class ColumnBlock {
  using V = Vector<T>;
  static constexpr int kSteps = 2;  // of kDepth along k

 public:
  static constexpr int kColumns = 32;
  static constexpr int kDepth = 4 * V::kElements;
  static constexpr int kRows = kSteps * kDepth;

  // Starts the loads of rows from `begin`, below `end`, and of columns from `first`, below `last`.
  __device__ __forceinline__ void load(const T* weight, int columns, int first, int last, int begin,
                                       int end) {
    const int lane = hidden_lane();
    const int k = begin + lane % 4 * V::kElements, c = first + lane / 4 * 4;
    const T* from = weight + k * columns + c;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const bool is_used = k + step * kDepth < end && c < last;
#pragma unroll
      for (int i = 0; i < V::kElements; ++i) {
        rows_[step][i] = FourColumns<T>::load_if(is_used, from + (step * kDepth + i) * columns);
      }
    }
  }

  // Adds the products with columns `begin` to `end` of an operand's rows below count.
  __device__ __forceinline__ void multiply(const T* rows, int pitch, int count, int begin, int end,
                                           float (&sums)[4][4]) const {
    const int k = begin + hidden_lane() % 4 * V::kElements;
    const RowPair<T> pair(rows, pitch, count);
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      if (begin + step * kDepth >= end) break;
      const int k_step = k + step * kDepth < end ? k + step * kDepth : begin;  // there W is 0
      const V upper = pair.upper(k_step), lower = pair.lower(k_step);
#pragma unroll
      for (int i = 0; i < V::kPairs; i += 2) {
        const FragmentA<T> a = a_of_rows(upper, lower, i);
        const FourColumns<T>* b_rows = rows_[step] + 2 * i;
#pragma unroll
        for (int tile = 0; tile < 4; ++tile) {
          multiply_tile(sums[tile], a, b_rows, tile);
        }
      }
    }
  }

  // Calls visit(row, column, low, high, ranks), of rows below count, with the sums of eight
  // columns, and the blocks of a cluster that this lane is to send them to. A single row is in
  // eight lanes, which share the blocks.
  template <class Visit>
  __device__ __forceinline__ static void for_each_sum(const float (&sums)[4][4], int count,
                                                      Visit visit) {
    const int lane = hidden_lane(), g = lane / 4, t = lane % 4;
    const bool is_single = count == 1;
    const Ranks ranks = is_single ? Ranks{g, 8} : Ranks{};
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
      const int row = (is_single ? 0 : g) + 4 * i;
      if (row >= count) continue;
      visit(row, 8 * t, make_float4(sums[0][i], sums[1][i], sums[2][i], sums[3][i]),
            make_float4(sums[0][i + 1], sums[1][i + 1], sums[2][i + 1], sums[3][i + 1]), ranks);
    }
  }

 private:
  __device__ __forceinline__ static void multiply_tile(float (&sums)[4], const FragmentA<T>& a,
                                                       const FourColumns<T>* rows, int tile) {
    crossvit::multiply(
        sums, a, FragmentB<T>{{join<T>(rows[0], rows[1], tile), join<T>(rows[2], rows[3], tile)}});
  }

  FourColumns<T> rows_[kSteps][V::kElements];
};

// The columns of a whole matrix, in blocks that go to the blocks of a cluster in turn.
struct AllColumns {
  int columns, rank, size;

  __device__ int count() const {
    const int blocks = ceil_div(columns, 32);
    return rank < blocks ? ceil_div(blocks - rank, size) : 0;
  }
  __device__ int first(int i) const { return 32 * (rank + i * size); }
  __device__ int last(int) const { return columns; }
};

// rows W, W [depth, columns], in blocks of 32 columns, first(i) to last(i) of Columns. Warps take
// parts of the depth, and exchange their sums through shared memory. Parts and the order of their
// sums follow from the depth alone. The first loads of weights start in the constructor. For all
// threads of a block.
template <class T, class Columns>
class TransposedLinear {
  using Block = ColumnBlock<T>;
  static constexpr int kParts = kMostParts;

 public:
  __device__ __forceinline__ TransposedLinear(const Parameter& weight, int depth, int columns,
                                              const Columns& own)
      : weight_(static_cast<const T*>(weight.data)),
        depth_(depth),
        columns_(columns),
        part_rows_(round_up(ceil_div(depth, kParts), 32)),
        own_(own) {
    load(0, hidden_warp(), 0);
  }

  // Calls write(row, column, values, ranks) with four columns of rows below count. What it stores
  // to other blocks is for these ranks; all others have a call of their own. scratch: kPartBytes
  // for 32 of the depth, at most kScratchBytes.
  template <class Write>
  __device__ __forceinline__ void run(const T* rows, int pitch, int count, float* scratch,
                                      Write write) {
    const int parts = ceil_div(depth_, part_rows_), blocks = own_.count(), warp = hidden_warp();
#pragma unroll 1
    for (int i = 0; i < blocks; ++i) {
#pragma unroll 1
      for (int part = warp; part < parts; part += block_warps()) {
        const int begin = part * part_rows_, end = minimum(depth_, begin + part_rows_);
        float sums[4][4] = {};
#pragma unroll 1
        for (int k = begin; k < end; k += Block::kRows) {
          block_.multiply(rows, pitch, count, k, end, sums);
          // What is next: of the part, of another part, or of another block.
          const bool has_part = k + Block::kRows >= end, is_last = part + block_warps() >= parts;
          const int next = !has_part ? part : is_last ? warp : part + block_warps();
          load(i + (has_part && is_last), next, has_part ? 0 : k + Block::kRows - begin);
        }
        Block::for_each_sum(sums, count, [&](int row, int c, float4 low, float4 high, Ranks of) {
          if (of.first > 0) return;
          float* to = scratch + (part * kImages + row) * Block::kColumns + c;
          store_quad(to, low);
          store_quad(to + 4, high);
        });
      }
      __syncthreads();
      add_up(i, parts, count, scratch, write);
      if (i + 1 < blocks) __syncthreads();
    }
  }

 private:
  // Rows from `offset` of a part on.
  __device__ __forceinline__ void load(int i, int part, int offset) {
    const int begin = part * part_rows_;
    if (i >= own_.count() || begin >= depth_) return;
    block_.load(weight_, columns_, own_.first(i), own_.last(i), begin + offset,
                minimum(depth_, begin + part_rows_));
  }

  template <class Write>
  __device__ __forceinline__ void add_up(int i, int parts, int count, const float* scratch,
                                         Write write) const {
    int log_slots = 3;  // of rows, a power of two, of eight quads
    while (8 * count > 1 << log_slots) ++log_slots;
    const int slots = 1 << log_slots;
    // With few rows several threads share the stores to a cluster's blocks.
    const Ranks most = {0, maximum(1, minimum(block_threads() >> log_slots, cluster_size()))};
#pragma unroll 1
    for (int j = hidden_thread(); j < slots * most.step; j += block_threads()) {
      const int row = (j & (slots - 1)) / 8, c = 4 * (j & 7), column = own_.first(i) + c;
      if (row >= count || column >= own_.last(i)) continue;
      float4 values[kParts];
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        values[part] = make_float4(0, 0, 0, 0);
        if (part < parts) {
          values[part] = load_quad(scratch + (part * kImages + row) * Block::kColumns + c);
        }
      }
      float4 sum = values[0];
#pragma unroll
      for (int part = 1; part < kParts; ++part) sum = sum + values[part];
      write(row, column, sum, Ranks{j >> log_slots, most.step});
    }
  }

  const T* weight_;
  int depth_, columns_, part_rows_;
  Columns own_;
  Block block_;
};

// For heads of this block: rows_h W_h for all columns, with W_h [depth, columns] the matrices of
// all heads below each other, and `depth` columns of the operand for each. The first loads start in
// the constructor. For all threads of a block.
template <class T, class Heads>
class TransposedHeads {
  using Block = ColumnBlock<T>;

 public:
  __device__ __forceinline__ TransposedHeads(const Parameter& weight, const Heads& own, int columns)
      : weight_(static_cast<const T*>(weight.data)),
        own_(own),
        columns_(columns),
        column_blocks_(ceil_div(columns, Block::kColumns)) {
    load(warp_index(), 0);
  }

  // Calls write(head, row, column, low, high, ranks) with eight columns of rows below count, and
  // the blocks that this lane is to send them to.
  template <class Write>
  __device__ __forceinline__ void run(const T* rows, int pitch, int count, Write write) {
#pragma unroll 1
    for (int job = warp_index(); job < own_.count * column_blocks_; job += block_warps()) {
      const int i = head_of(job), first = (job - i * column_blocks_) * Block::kColumns;
      float sums[4][4] = {};
#pragma unroll 1
      for (int k = 0; k < own_.head_dim; k += Block::kRows) {
        block_.multiply(rows + own_.head(i) * own_.head_dim, pitch, count, k, own_.head_dim, sums);
        const bool is_last = k + Block::kRows >= own_.head_dim;
        load(is_last ? job + block_warps() : job, is_last ? 0 : k + Block::kRows);
      }
      Block::for_each_sum(sums, count, [&](int row, int c, float4 low, float4 high, Ranks ranks) {
        if (first + c < columns_) write(own_.head(i), row, first + c, low, high, ranks);
      });
    }
  }

 private:
  // job / column_blocks_, of which there are few.
  __device__ __forceinline__ int head_of(int job) const {
    int i = 0;
    while (job >= (i + 1) * column_blocks_) ++i;
    return i;
  }

  __device__ __forceinline__ void load(int job, int k) {
    const int i = head_of(job), first = (job - i * column_blocks_) * Block::kColumns;
    if (i >= own_.count) return;
    const T* weight = weight_ + own_.head(i) * own_.head_dim * columns_;
    block_.load(weight, columns_, first, columns_, k, own_.head_dim);
  }

  const T* weight_;
  Heads own_;
  int columns_, column_blocks_;
  Block block_;
};

}  // namespace crossvit::cross_attention
