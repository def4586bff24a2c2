#pragma once

#include "attention_core/cpu/scratch.h"

// Rows of [B, R, C] tensors to and from scratch memory, where whole vectors can be read.

namespace crossvit::attention_core {
namespace {

template <class Scalar>
Scalar* row(const Rows& rows, int64_t b, int64_t r) {
  return static_cast<Scalar*>(rows.data) + b * rows.batch_stride + r * rows.row_stride;
}

template <class Scalar>
void load_rows(Scalar* to, const Rows& from, int64_t b, const Problem& problem,
               const Shape<Scalar>& shape) {
  std::memset(to, 0, shape.rows * shape.channels * sizeof(Scalar));
  for (int64_t r = 0; r < problem.num_rows; ++r)
    std::memcpy(to + r * shape.channels, row<Scalar>(from, b, r),
                problem.channels * sizeof(Scalar));
}

template <class Scalar>
Scalar sum_row(const Scalar* row, int64_t count) {
  Vector<Scalar> total{};
  for (int64_t c = 0; c < count; c += kLanes<Scalar>) total += load(row + c);
  return sum<Scalar>(total);
}

template <class Scalar>
Scalar dot_row(const Scalar* a, const Scalar* b, int64_t count) {
  Vector<Scalar> total{};
  for (int64_t c = 0; c < count; c += kLanes<Scalar>) total += load(a + c) * load(b + c);
  return sum<Scalar>(total);
}

}  // namespace
}  // namespace crossvit::attention_core
