#pragma once

#include "attention_core/cpu/images.h"

// A few centred tokens in float or double. Element types, strides, masks and channel counts that
// are not multiples of the vector width are all handled here.

namespace crossvit::attention_core {
namespace {

template <class Token>
class Tile {
 public:
  using Scalar = ScalarFor<Token>;
  using V = Vector<Scalar>;

  static int64_t scratch(const Shape<Scalar>& shape) {
    return (shape.tile + 1) * shape.channels + 2 * kMaxTile;
  }

  Tile(const Problem& problem, const Tokens& x, const Mask& mask, const Shape<Scalar>& shape,
       Scratch<Scalar>& memory)
      : rows(memory.take(shape.tile * shape.channels)),
        rstd(memory.take(kMaxTile)),
        bias(memory.take(kMaxTile)),
        problem_(problem),
        x_(x),
        mask_(mask),
        stride_(shape.channels),
        zero_row_(reinterpret_cast<Token*>(memory.take(shape.channels))) {
    std::memset(zero_row_, 0, stride_ * sizeof(Scalar));
    for (int i = 0; i < kLanes<Scalar>; ++i)
      last_lanes_[i] = problem.channels - (stride_ - kLanes<Scalar>) > i;
  }

  // Tokens [begin, begin + count) of image b, centred, and zero rows up to a whole token block.
  // Masked tokens are not read, so padding may hold garbage.
  void read(int64_t b, int64_t begin, int count) {
    const Token* from[kMaxTile];
    for (int t = 0; t < kMaxTile; ++t) {
      const bool attended = t < count && is_attended(b, begin + t);
      from[t] = attended ? token_row<Token>(x_, b, begin + t) : zero_row_;
      bias[t] = attended ? 0 : -__builtin_inf();
    }
    const int filled = round_up(count, kBlock);
    for (int t = 0; t < filled; t += kLanes<Scalar>)
      centre(t, from + t, minimum(filled - t, kLanes<Scalar>));
  }

  // The memory of the tile after [begin, begin + count) of image b. It may reach into the next
  // image, or past the last: any address may be prefetched.
  template <class Prefetcher>
  Prefetcher next(int64_t b, int64_t begin, int count) const {
    return rows_of<Prefetcher>(x_, b, begin + count, kMaxTile);
  }

  // The memory of tokens [begin, begin + count) of image b; none if they are far apart.
  template <class Prefetcher>
  Prefetcher rows_of(const Tokens& tokens, int64_t b, int64_t begin, int count) const {
    const bool is_dense = tokens.token_stride < 2 * problem_.channels;
    return {token_row<Token>(tokens, b, begin + (tokens.extra && begin == 0)),
            is_dense ? count * tokens.token_stride * int64_t{sizeof(Token)} : 0};
  }

  // Row n of [extra; tokens] of image b.
  template <class Element>
  static Element* token_row(const Tokens& tokens, int64_t b, int64_t n) {
    if (tokens.extra) {
      if (n == 0) return static_cast<Element*>(tokens.extra) + b * tokens.extra_batch_stride;
      --n;
    }
    return static_cast<Element*>(tokens.data) + b * tokens.batch_stride + n * tokens.token_stride;
  }

  Scalar* const rows;  // [tile, channels]: x - mean
  Scalar* const rstd;  // [kMaxTile]; 0 if there is no token
  Scalar* const bias;  // [kMaxTile]; 0 or, if there is no token, -inf

 private:
  static constexpr bool kConverts = !std::is_same_v<Token, Scalar>;
  static constexpr int kBlock = Shape<Scalar>::kTokenBlock;
  static constexpr int kRowsAtOnce = kBlock < 4 ? kBlock : 4;

  bool is_attended(int64_t b, int64_t n) const {
    if (!mask_.data) return true;
    if (x_.extra && n-- == 0) return true;
    return mask_.data[b * mask_.batch_stride + n * mask_.token_stride];
  }

  // Centres up to a vector of rows, from row `first` of the tile, and reduces their sums together.
  // The variance takes a second pass over the row; E[x^2] - mean^2 would cancel.
  void centre(int first, const Token* const* from, int count) {
    V means{};
    if (problem_.normalize || kConverts) {
      V sums[kLanes<Scalar>] = {};
      for (int t = 0; t < count; t += kRowsAtOnce)
        add_channels(rows + (first + t) * stride_, from + t, sums + t);
      if (problem_.normalize) means = sum_each<Scalar>(sums) / Scalar(problem_.channels);
    }
    V squares[kLanes<Scalar>] = {};
    for (int t = 0; t < count; t += kRowsAtOnce)
      subtract_means(rows + (first + t) * stride_, from + t, means, t, squares + t);
    V scale = V{} + 1;
    if (problem_.normalize) {
      V std = sum_each<Scalar>(squares) / Scalar(problem_.channels) + Scalar(problem_.eps);
      for (int t = 0; t < kLanes<Scalar>; ++t) std[t] = sqrt(std[t]);
      scale = 1 / std;
    }
    store(rstd + first, load(bias + first) < 0 ? V{} : scale);
  }

  // Sums over the channels, and stores converted 16-bit elements for the second pass.
  void add_channels(Scalar* to, const Token* const* from, V* sums) const {
    constexpr int kStep = kLanes<Scalar>;
    const int64_t channels = problem_.channels, stride = stride_;
    const Token* row[kRowsAtOnce];
    V total[kRowsAtOnce] = {};
    for (int i = 0; i < kRowsAtOnce; ++i) row[i] = from[i];
    const auto add = [&](int i, int64_t c, V v) {
      if constexpr (kConverts) store(to + i * stride + c, v);
      total[i] += v;
    };
    int64_t c = 0;
    for (; c + kStep <= channels; c += kStep)
      for (int i = 0; i < kRowsAtOnce; ++i) add(i, c, load(row[i] + c));
    for (int i = 0; i < kRowsAtOnce; ++i) {
      if (c < channels) add(i, c, load_partial<Scalar>(row[i] + c, channels - c));
      sums[i] = total[i];
    }
  }

  void subtract_means(Scalar* to, const Token* const* from, V means, int first, V* squares) const {
    constexpr int kStep = kLanes<Scalar>;
    const int64_t channels = problem_.channels, stride = stride_;
    using Source = std::conditional_t<kConverts, Scalar, Token>;
    const Source* row[kRowsAtOnce];
    V mean[kRowsAtOnce], total[kRowsAtOnce] = {};
    for (int i = 0; i < kRowsAtOnce; ++i) {
      if constexpr (kConverts) {
        row[i] = to + i * stride;
      } else {
        row[i] = from[i];
      }
      mean[i] = broadcast(means[first + i]);
    }
    int64_t c = 0;
    for (; c + kStep <= channels; c += kStep)
      for (int i = 0; i < kRowsAtOnce; ++i) {
        const V v = load(row[i] + c) - mean[i];
        store(to + i * stride + c, v);
        total[i] += v * v;
      }
    for (int i = 0; i < kRowsAtOnce; ++i) {
      if (c < channels) {
        const V v = load_partial<Scalar>(row[i] + c, channels - c) - mean[i] * last_lanes_;
        store(to + i * stride + c, v);
        total[i] += v * v;
      }
      squares[i] = total[i];
    }
  }

  const Problem& problem_;
  const Tokens& x_;
  const Mask& mask_;
  const int64_t stride_;
  Token* const zero_row_;  // a row of zeros
  V last_lanes_;           // 1 in the lanes of the last vector that hold channels, else 0
};

}  // namespace
}  // namespace crossvit::attention_core
