#pragma once

#include <cstdlib>
#include <new>
#include <type_traits>

#include "attention_core/params.h"
#include "common/cpu/parallel.h"
#include "common/cpu/simd.h"

// How the CPU kernels cut up a problem, and the padded scratch memory they work in.

namespace crossvit::attention_core {
namespace {

// Tokens with one softmax state: fixed, so that results do not depend on the number of threads.
constexpr int kChunk = 128;

// Tokens that are read, scored and accumulated while they lie in L1.
constexpr int kMinTile = 8, kMaxTile = 32;
constexpr int64_t kTileBytes = 24 * 1024;

// The type of all arithmetic.
template <class Token>
using ScalarFor = std::conditional_t<std::is_same_v<Token, double>, double, float>;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
inline int64_t minimum(int64_t a, int64_t b) { return a < b ? a : b; }

// One allocation, handed out in vector-aligned pieces.
template <class Scalar>
class Scratch {
 public:
  explicit Scratch(int64_t count)
      : data_(static_cast<Scalar*>(
            std::aligned_alloc(kVectorBytes, round_up(count * sizeof(Scalar) + 1, kVectorBytes)))) {
    if (!data_) throw std::bad_alloc();
  }
  ~Scratch() { std::free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  Scalar* take(int64_t count) {
    Scalar* taken = data_ + used_;
    used_ += round_up(count, kLanes<Scalar>);
    return taken;
  }

 private:
  Scalar* data_;
  int64_t used_ = 0;
};

// Sizes in scratch memory: rows in pairs, channels in whole vectors, the padding zero.
template <class Scalar>
struct Shape {
  explicit Shape(const Problem& problem)
      : channels(round_up(problem.channels, kLanes<Scalar>)),
        rows(round_up(problem.num_rows, 2)),
        tile(kMaxTile) {
    while (tile > kMinTile && tile * channels * int64_t{sizeof(Scalar)} > kTileBytes)
      tile -= kMinTile;
  }

  // Multiply-adds of forward for some tokens of an image; backward has twice as many.
  int64_t work(int64_t tokens) const { return 2 * rows * channels * tokens; }

  // Tokens that dot_products takes at once: with two rows, one accumulator per lane.
  static constexpr int kTokenBlock = kLanes<Scalar> / 2;

  int64_t channels;
  int64_t rows;
  int tile;
};

// The reference point of the exponentials: where every score is -inf, any finite one will do.
template <class V>
inline V finite_or_zero(V max) {
  return max == -__builtin_inf() ? V{} : max;
}

// Few images: threads share an image's chunks. Results are the same either way.
inline bool split_images(int64_t batch, int64_t num_chunks) {
  return num_chunks > 1 && batch < 4 * num_threads();
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
