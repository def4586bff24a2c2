#pragma once

#include "common/cpu/parallel.h"
#include "common/cpu/simd.h"

// Matrix products in float32: blocks of kRows rows times panels of kPanel columns, formed in
// registers at the peak rate of multiply-adds.
//
// Rows are packed as [ceil(K / kPanel), kRows, kPanel], a panel as [K, kPanel]: in the order in
// which the inner loop reads them. A product is itself packed as rows of the next one. Padding is
// zero. Each element is a sum over K in a fixed order, so results depend neither on the number of
// threads nor on the other rows.

namespace crossvit {
namespace {

constexpr int kLane = kLanes<float>;
constexpr int kPanel = 2 * kLane;
// A block's accumulators fill the registers: 16, or 32 with AVX-512.
constexpr int kRows = kVectorBytes == 64 ? 12 : 6;
// Row blocks that reuse a panel, and the depth of it that stays in L1 meanwhile.
constexpr int kBlocks = 12;
constexpr int64_t kDepth = 384;

// Returns the start of row i of packed rows; its columns [c, c + kPanel) begin at c * kRows.
inline float* packed_row(float* rows, int64_t i, int64_t width) {
  return rows + i / kRows * kRows * width + i % kRows * kPanel;
}

// Loads the first `count` elements of a vector, padded with zeros; `count` may be 0 or less.
inline FloatVector load_at_most(const float* from, int64_t count) {
  if (count >= kLane) return load(from);
  return count > 0 ? load_partial<float>(from, count) : FloatVector{};
}

inline void store_at_most(float* to, FloatVector v, int64_t count) {
  if (count >= kLane) return store(to, v);
  if (count > 0) store_partial<float>(to, v, count);
}

// Calls visit(column, packed column, columns left) for each vector of a row of any width.
template <class Visit>
inline void each_packed_vector(int64_t width, const Visit& visit) {
  for (int64_t c = 0; c < width; c += kPanel)
    for (int j = 0; j < kPanel; j += kLane) visit(c + j, c * kRows + j, width - c - j);
}

// Computes to = start + rows . panel, [kRows, kPanel], over `count` steps of K. The rows of start
// are start_stride apart.
inline void multiply(float* to, const float* start, int64_t start_stride, const float* rows,
                     const float* panel, int64_t count) {
  FloatVector total[kRows][2];
  for (int i = 0; i < kRows; ++i)
    for (int j = 0; j < 2; ++j) total[i][j] = load(start + i * start_stride + j * kLane);
  const auto step = [&](int64_t k) {
    const FloatVector a = load(panel), b = load(panel + kLane);
    for (int i = 0; i < kRows; ++i) {
      total[i][0] += rows[i * kPanel + k] * a;
      total[i][1] += rows[i * kPanel + k] * b;
    }
    panel += kPanel;
  };
  for (; count >= kPanel; count -= kPanel, rows += kRows * kPanel)
#pragma GCC unroll 4
    for (int k = 0; k < kPanel; ++k) step(k);
  for (int64_t k = 0; k < count; ++k) step(k);
  for (int i = 0; i < kRows; ++i)
    for (int j = 0; j < 2; ++j) store(to + i * kPanel + j * kLane, total[i][j]);
}

// A linear layer, weight [out, in] and bias [out] or null, in panels of its outputs.
class PackedLinear {
 public:
  PackedLinear(const float* weight, const float* bias, int64_t out, int64_t in)
      : out_(out),
        in_(round_up(in, kPanel)),
        memory_((in_ + 1) * round_up(out, kPanel)),
        panels_(memory_.take(in_ * round_up(out, kPanel))),
        bias_(memory_.take(round_up(out, kPanel))) {
    for (int64_t n = 0; n < round_up(out, kPanel); ++n) bias_[n] = bias && n < out ? bias[n] : 0;
    const auto pack = [&](int64_t begin, int64_t end) {
      for (int64_t n = begin * kPanel; n < end * kPanel; n += kLane)
        for (int64_t k = 0; k < in_; k += kLane) {
          FloatVector block[kLane];
          for (int i = 0; i < kLane; ++i)
            block[i] =
                n + i < out ? load_at_most(weight + (n + i) * in + k, in - k) : FloatVector{};
          transpose<float>(block);
          float* const to = panels_ + n / kPanel * kPanel * in_ + k * kPanel + n % kPanel;
          for (int i = 0; i < kLane; ++i) store(to + i * kPanel, block[i]);
        }
    };
    parallel_for(ceil_div(out, kPanel), kPanel * in_ * kWorkOfCopy, pack);
  }

  // The layer's padded input width, which packed rows have.
  int64_t in() const { return in_; }

  // Multiply-adds per row.
  int64_t work() const { return out_ * in_; }

  // Calls consume(first column, product) for each panel, with bias + product of packed rows as
  // [num_blocks, kRows, kPanel].
  template <class Consume>
  void apply(const float* rows, int64_t num_blocks, const Consume& consume) const {
    alignas(kVectorBytes) float product[kBlocks * kRows * kPanel];
    for (int64_t n = 0; n < out_; n += kPanel) {
      for (int64_t k = 0; k < in_; k += kDepth)
        for (int64_t i = 0; i < num_blocks; ++i) {
          float* const to = product + i * kRows * kPanel;
          multiply(to, k ? to : bias_ + n, k ? kPanel : 0, rows + i * kRows * in_ + k * kRows,
                   panels_ + n * in_ + k * kPanel, minimum(kDepth, in_ - k));
        }
      consume(n, product);
    }
  }

 private:
  const int64_t out_, in_;
  Scratch<float> memory_;
  float* const panels_;
  float* const bias_;
};

// Calls run(first row, number of rows, number of blocks, scratch) for groups of rows that share
// panels. work is per row; scratch holds scratch_width floats per row, initially zero, and belongs
// to the thread.
template <class Run>
void each_group(int64_t num_rows, int64_t work, int64_t scratch_width, const Run& run) {
  const int64_t blocks = ceil_div(num_rows, kRows);
  // The last few blocks are tasks of their own, so that all threads finish at about the same time.
  const int64_t groups = (blocks - minimum(blocks, 4 * num_threads())) / kBlocks;
  const int64_t count = groups + blocks - groups * kBlocks;
  parallel_tasks(count, work * num_rows / maximum(count, 1), [&](const auto& next_task) {
    const int64_t size = kBlocks * kRows * scratch_width;
    Scratch<float> memory(size);
    float* const scratch = memory.take(size);
    std::memset(scratch, 0, size * sizeof(float));
    for (int64_t task = next_task(); task < count; task = next_task()) {
      const bool is_group = task < groups;
      const int64_t first = (is_group ? task * kBlocks : task + groups * (kBlocks - 1)) * kRows;
      const int64_t rows = minimum((is_group ? kBlocks : 1) * kRows, num_rows - first);
      run(first, rows, ceil_div(rows, kRows), scratch);
    }
  });
}

}  // namespace
}  // namespace crossvit
