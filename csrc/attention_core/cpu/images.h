#pragma once

#include <type_traits>

#include "attention_core/params.h"
#include "common/cpu/parallel.h"
#include "common/cpu/simd.h"

// How the CPU kernels divide a problem among threads, and the padded rows they work on.

namespace crossvit::attention_core {
namespace {

// Tokens per partial result: fixed, so that results do not depend on the number of threads.
constexpr int kChunk = 128;

// Tokens that are read, scored and accumulated while they are in L1.
constexpr int kMinTile = 8, kMaxTile = 32;
constexpr int64_t kTileBytes = 24 * 1024;

// The accumulation type.
template <class Token>
using ScalarFor = std::conditional_t<std::is_same_v<Token, double>, double, float>;

// Padded sizes in scratch memory: rows in pairs, channels in whole vectors; the padding is zero.
template <class Scalar>
struct Shape {
  explicit Shape(const Problem& problem)
      : channels(round_up(problem.channels, kLanes<Scalar>)),
        rows(round_up(problem.num_rows, 2)),
        tile(kMaxTile) {
    while (tile > kMinTile && tile * channels * int64_t{sizeof(Scalar)} > kTileBytes)
      tile -= kMinTile;
  }

  // Multiply-adds of forward for `tokens` tokens of an image; backward has twice as many.
  int64_t work(int64_t tokens) const { return 2 * rows * channels * tokens; }

  // Tokens that dot_products takes at once: with two rows, one accumulator per lane.
  static constexpr int kTokenBlock = kLanes<Scalar> / 2;

  int64_t channels;
  int64_t rows;
  int tile;
};

// The reference point of the exponentials: any finite value will do if every score is -inf.
template <class V>
inline V finite_or_zero(V max) {
  return max == -__builtin_inf() ? V{} : max;
}

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

// With few images, threads share the chunks of each. The results are the same either way.
inline bool split_images(int64_t batch, int64_t num_chunks) {
  return num_chunks > 1 && batch < 4 * num_threads();
}

// Runs a pass over all images. Its partial results are formed per chunk and merged in order.
template <class Pass, class Params>
void run_pass(const Params& params) {
  using Scalar = typename Pass::Scalar;
  using Partial = typename Pass::Partial;
  const Shape<Scalar> shape(params.problem);
  const int64_t batch = params.problem.batch, num_tokens = params.problem.num_tokens;
  const int64_t num_chunks = ceil_div(num_tokens, kChunk);
  const int64_t size = Partial::scratch(shape);

  if (!split_images(batch, num_chunks)) {
    const auto images = [&](int64_t begin, int64_t end) {
      Pass pass(params);
      Scratch<Scalar> memory(2 * size);
      Partial total(shape, memory.take(size)), next(shape, memory.take(size));
      for (int64_t b = begin; b < end; ++b) {
        pass.begin_image(b);
        pass.chunk(b, 0, total);
        for (int64_t chunk = 1; chunk < num_chunks; ++chunk) {
          pass.chunk(b, chunk, next);
          total.merge(next, shape);
        }
        pass.end_image(b, total);
      }
    };
    return parallel_for(batch, Pass::kWork * shape.work(num_tokens), images);
  }

  Scratch<Scalar> memory(batch * num_chunks * size);
  Scalar* const partials = memory.take(batch * num_chunks * size);
  const auto partial = [&](int64_t i) { return Partial(shape, partials + i * size); };
  const auto chunks = [&](int64_t begin, int64_t end) {
    Pass pass(params);
    for (int64_t i = begin; i < end; ++i) {
      if (i == begin || i % num_chunks == 0) pass.begin_image(i / num_chunks);
      Partial chunk = partial(i);
      pass.chunk(i / num_chunks, i % num_chunks, chunk);
    }
  };
  parallel_for(batch * num_chunks, Pass::kWork * shape.work(kChunk), chunks);
  parallel_for(batch, shape.work(num_chunks), [&](int64_t begin, int64_t end) {
    Pass pass(params);
    for (int64_t b = begin; b < end; ++b) {
      Partial total = partial(b * num_chunks);
      for (int64_t chunk = 1; chunk < num_chunks; ++chunk)
        total.merge(partial(b * num_chunks + chunk), shape);
      pass.end_image(b, total);
    }
  });
}

// Calls run with a value of the tokens' element type.
template <class Run>
void dispatch(DType tokens, const Run& run) {
  switch (tokens) {
    case DType::kFloat32: return run(float{});
    case DType::kFloat64: return run(double{});
    case DType::kBFloat16: return run(BFloat16{});
    case DType::kFloat16: return run(Float16{});
  }
}

}  // namespace
}  // namespace crossvit::attention_core
