#pragma once

#include "attention_core/cpu/micro_kernels.h"
#include "attention_core/cpu/tile.h"

// attention_core forward in one pass over the tokens: online softmax over tiles, then over chunks.

namespace crossvit::attention_core {
namespace {

// Softmax over some of the tokens: acc = sum_n exp(s_n - max) xhat_n, sum = sum_n exp(s_n - max).
template <class Scalar>
struct State {
  Scalar* max;  // [rows]; -inf before the first token
  Scalar* sum;  // [rows]
  Scalar* acc;  // [rows, channels]

  static int64_t scratch(const Shape<Scalar>& shape) {
    return shape.rows * shape.channels + 2 * round_up(shape.rows, kLanes<Scalar>);
  }
  State(const Shape<Scalar>& shape, Scalar* memory)
      : max(memory),
        sum(max + round_up(shape.rows, kLanes<Scalar>)),
        acc(sum + round_up(shape.rows, kLanes<Scalar>)) {}

  void clear(const Shape<Scalar>& shape) {
    for (int64_t r = 0; r < round_up(shape.rows, kLanes<Scalar>); ++r) {
      max[r] = -__builtin_inf();
      sum[r] = 0;
    }
    std::memset(acc, 0, shape.rows * shape.channels * sizeof(Scalar));
  }

  void merge(const State& other, const Shape<Scalar>& shape) {
    for (int64_t r = 0; r < shape.rows; ++r) {
      const Scalar new_max = max[r] > other.max[r] ? max[r] : other.max[r];
      const Scalar keep = exp(max[r] - finite_or_zero(new_max));
      const Scalar add = exp(other.max[r] - finite_or_zero(new_max));
      max[r] = new_max;
      sum[r] = sum[r] * keep + other.sum[r] * add;
      for (int64_t c = r * shape.channels; c < (r + 1) * shape.channels; c += kLanes<Scalar>)
        store(acc + c, load(acc + c) * keep + load(other.acc + c) * add);
    }
  }
};

template <class Token>
class Forward {
 public:
  using Scalar = ScalarFor<Token>;
  using V = Vector<Scalar>;
  using Partial = State<Scalar>;
  using Prefetcher = std::conditional_t<sizeof(Token) == 2, NoPrefetch, Prefetch<false>>;

  static constexpr int kWork = 1;  // in units of Shape::work

  explicit Forward(const ForwardParams& params)
      : shape(params.problem),
        params_(params),
        memory_(Tile<Token>::scratch(shape) + shape.rows * shape.channels + shape.rows * kMaxTile +
                round_up(shape.rows, kLanes<Scalar>)),
        tile_(params.problem, params.x, params.mask, shape, memory_),
        u_(memory_.take(shape.rows * shape.channels)),
        scores_(memory_.take(shape.rows * kMaxTile)),
        decay_(memory_.take(shape.rows)) {}

  void begin_image(int64_t b) { load_rows(u_, params_.u, b, params_.problem, shape); }

  void chunk(int64_t b, int64_t chunk, State<Scalar>& state) {
    const int64_t begin = chunk * kChunk;
    const int64_t end = minimum(begin + kChunk, params_.problem.num_tokens);
    state.clear(shape);
    for (int64_t n = begin; n < end; n += shape.tile) {
      const int count = minimum(shape.tile, end - n);
      tile_.read(b, n, count);
      auto prefetcher = tile_.template next<Prefetcher>(b, n, count);
      dot_products(scores_, u_, shape.rows, tile_.rows, count, shape.channels, prefetcher);
      softmax(count, state);
      rank_update(state.acc, decay_, {scores_, kMaxTile, 1}, shape.rows, tile_.rows, count,
                  shape.channels, prefetcher);
    }
  }

  void end_image(int64_t b, const State<Scalar>& state) {
    const Problem& problem = params_.problem;
    for (int64_t r = 0; r < problem.num_rows; ++r) {
      const bool nothing_attended = state.sum[r] == 0;
      const Scalar inverse = nothing_attended ? 0 : 1 / state.sum[r];
      static_cast<Scalar*>(params_.lse)[b * problem.num_rows + r] =
          nothing_attended ? -__builtin_inf() : state.max[r] + log(state.sum[r]);
      Scalar* const m = row<Scalar>(params_.m, b, r);
      const Scalar* const acc = state.acc + r * shape.channels;
      for (int64_t c = 0; c < problem.channels; ++c) m[c] = acc[c] * inverse;
    }
  }

  const Shape<Scalar> shape;

 private:
  // Turns the tile's dot products into its tokens' weights in acc, kLanes rows at a time.
  void softmax(int count, State<Scalar>& state) {
    constexpr int kStep = kLanes<Scalar>;
    for (int64_t first = 0; first < shape.rows; first += kStep) {
      const int num_rows = minimum(kStep, shape.rows - first);
      Scalar* const scores = scores_ + first * kMaxTile;

      V max[kStep];
      for (int r = 0; r < kStep; ++r) max[r] = V{} - __builtin_inf();
      for (int r = 0; r < num_rows; ++r) {
        for (int t = 0; t < count; t += kStep) {
          const V bias = load(tile_.bias + t);  // selected, not added: the score may be NaN
          const V products = load(scores + r * kMaxTile + t);
          const V s = bias < 0 ? bias : products * load(tile_.rstd + t);
          store(scores + r * kMaxTile + t, s);
          max[r] = larger(s, max[r]);
        }
      }
      const V old_max = load(state.max + first);
      const V new_max = larger(max_each<Scalar>(max), old_max);
      const V shift = finite_or_zero(new_max);
      const V decay = exp(old_max - shift);

      V sums[kStep] = {};
      for (int r = 0; r < num_rows; ++r) {
        for (int t = 0; t < count; t += kStep) {
          const V p = exp(load(scores + r * kMaxTile + t) - shift[r]);
          store(scores + r * kMaxTile + t, p * load(tile_.rstd + t));
          sums[r] += p;
        }
      }
      store(state.max + first, new_max);
      store(state.sum + first, load(state.sum + first) * decay + sum_each<Scalar>(sums));
      store(decay_ + first, decay);
    }
  }

  const ForwardParams& params_;
  Scratch<Scalar> memory_;
  Tile<Token> tile_;
  Scalar* u_;       // [rows, channels]
  Scalar* scores_;  // [rows, kMaxTile]
  Scalar* decay_;   // [rows]
};

template <class Token>
void forward_tokens(const ForwardParams& params) {
  run_pass<Forward<Token>>(params);
}

}  // namespace
}  // namespace crossvit::attention_core
