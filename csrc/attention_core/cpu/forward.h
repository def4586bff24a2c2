#pragma once

#include "attention_core/cpu/micro_kernels.h"
#include "attention_core/cpu/rows.h"
#include "attention_core/cpu/tile.h"

// attention_core forward in one pass over the tokens: online softmax over tiles, chunk states
// merged in order.

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
};

template <class Scalar>
void merge(State<Scalar>& into, const State<Scalar>& from, const Shape<Scalar>& shape) {
  for (int64_t r = 0; r < shape.rows; ++r) {
    const Scalar max = into.max[r] > from.max[r] ? into.max[r] : from.max[r];
    const Scalar keep = exp(into.max[r] - finite_or_zero(max));
    const Scalar add = exp(from.max[r] - finite_or_zero(max));
    into.max[r] = max;
    into.sum[r] = into.sum[r] * keep + from.sum[r] * add;
    for (int64_t c = r * shape.channels; c < (r + 1) * shape.channels; c += kLanes<Scalar>)
      store(into.acc + c, load(into.acc + c) * keep + load(from.acc + c) * add);
  }
}

template <class Token>
class Forward {
 public:
  using Scalar = ScalarFor<Token>;
  using V = Vector<Scalar>;
  using Ahead = std::conditional_t<sizeof(Token) == 2, NoPrefetch, Prefetch<false>>;

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
      auto ahead = tile_.template next<Ahead>(b, n, count);
      dot_products(scores_, u_, shape.rows, tile_.rows, count, shape.channels, ahead);
      softmax(count, state);
      rank_update(state.acc, decay_, {scores_, kMaxTile, 1}, shape.rows, tile_.rows, count,
                  shape.channels, ahead);
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
  // Turns the tile's products into the weights of its tokens in acc, kLanes rows at a time.
  void softmax(int count, State<Scalar>& state) {
    constexpr int kStep = kLanes<Scalar>;
    for (int64_t first = 0; first < shape.rows; first += kStep) {
      const int num_rows = minimum(kStep, shape.rows - first);
      Scalar* const scores = scores_ + first * kMaxTile;

      V max[kStep];
      for (int r = 0; r < kStep; ++r) max[r] = V{} - __builtin_inf();
      for (int r = 0; r < num_rows; ++r) {
        for (int t = 0; t < count; t += kStep) {
          const V bias = load(tile_.bias + t);  // selected, not added: what lies there may be NaN
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

// Images [begin, end), one after another.
template <class Token>
void forward_images(const ForwardParams& params, int64_t begin, int64_t end) {
  using Scalar = ScalarFor<Token>;
  const Shape<Scalar> shape(params.problem);
  const int64_t num_chunks = ceil_div(params.problem.num_tokens, kChunk);
  const int64_t size = State<Scalar>::scratch(shape);
  Forward<Token> pass(params);
  Scratch<Scalar> memory(2 * size);
  State<Scalar> total(shape, memory.take(size)), part(shape, memory.take(size));
  for (int64_t b = begin; b < end; ++b) {
    pass.begin_image(b);
    pass.chunk(b, 0, total);
    for (int64_t chunk = 1; chunk < num_chunks; ++chunk) {
      pass.chunk(b, chunk, part);
      merge(total, part, shape);
    }
    pass.end_image(b, total);
  }
}

template <class Token>
void forward_tokens(const ForwardParams& params) {
  using Scalar = ScalarFor<Token>;
  const Shape<Scalar> shape(params.problem);
  const int64_t batch = params.problem.batch;
  const int64_t num_chunks = ceil_div(params.problem.num_tokens, kChunk);

  if (!split_images(batch, num_chunks)) {
    parallel_for(batch, shape.work(params.problem.num_tokens),
                 [&](int64_t begin, int64_t end) { forward_images<Token>(params, begin, end); });
    return;
  }

  const int64_t size = State<Scalar>::scratch(shape);
  Scratch<Scalar> memory(batch * num_chunks * size);
  Scalar* const states = memory.take(batch * num_chunks * size);
  const auto state = [&](int64_t i) { return State<Scalar>(shape, states + i * size); };
  parallel_for(batch * num_chunks, shape.work(kChunk), [&](int64_t begin, int64_t end) {
    Forward<Token> pass(params);
    for (int64_t i = begin; i < end; ++i) {
      if (i == begin || i % num_chunks == 0) pass.begin_image(i / num_chunks);
      State<Scalar> part = state(i);
      pass.chunk(i / num_chunks, i % num_chunks, part);
    }
  });
  parallel_for(batch, shape.work(num_chunks), [&](int64_t begin, int64_t end) {
    Forward<Token> pass(params);
    for (int64_t b = begin; b < end; ++b) {
      State<Scalar> total = state(b * num_chunks);
      for (int64_t chunk = 1; chunk < num_chunks; ++chunk)
        merge(total, state(b * num_chunks + chunk), shape);
      pass.end_image(b, total);
    }
  });
}

}  // namespace
}  // namespace crossvit::attention_core
