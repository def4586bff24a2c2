// attention_core backward in one pass: reads x once, writes dx once, recomputes the statistics and,
// from the saved lse, the softmax. Compiled once for each instruction-set level; CROSSVIT_ISA names
// the level's namespace.
//
//   dp_rn = dm_r . xhat_n      ds_rn = p_rn (dp_rn - delta_r)     delta_r = dm_r . m_r - dlse_r
//   du_r  = sum_n ds_rn xhat_n       dxhat_n = sum_r (p_rn dm_r + ds_rn u_r)

#include "attention_core/cpu/micro_kernels.h"
#include "attention_core/cpu/tile.h"

namespace crossvit::attention_core {
namespace {

// A sum of du over some of the tokens, [rows, channels].
template <class Scalar>
struct Du {
  Scalar* sum;

  static int64_t scratch(const Shape<Scalar>& shape) { return shape.rows * shape.channels; }
  Du(const Shape<Scalar>&, Scalar* memory) : sum(memory) {}

  void merge(const Du& other, const Shape<Scalar>& shape) {
    for (int64_t i = 0; i < scratch(shape); i += kLanes<Scalar>)
      store(sum + i, load(sum + i) + load(other.sum + i));
  }
};

template <class Token>
class Backward {
 public:
  using Scalar = ScalarFor<Token>;
  using V = Vector<Scalar>;
  using Partial = Du<Scalar>;
  static constexpr int kWork = 2;  // in units of Shape::work

  explicit Backward(const BackwardParams& params)
      : shape(params.problem),
        params_(params),
        memory_(Tile<Token>::scratch(shape) + shape.tile * shape.channels +
                3 * shape.rows * shape.channels + 4 * shape.rows * kMaxTile + 2 * kMaxTile +
                5 * round_up(shape.rows, kLanes<Scalar>)),
        tile_(params.problem, params.x, params.mask, shape, memory_),
        dxhat_(memory_.take(shape.tile * shape.channels)),
        dm_(memory_.take(2 * shape.rows * shape.channels)),
        u_(dm_ + shape.rows * shape.channels),
        m_(memory_.take(shape.rows * shape.channels)),
        p_(memory_.take(2 * shape.rows * kMaxTile)),
        ds_(p_ + shape.rows * kMaxTile),
        scores_(memory_.take(shape.rows * kMaxTile)),
        dp_(memory_.take(shape.rows * kMaxTile)),
        mean_dxhat_(memory_.take(kMaxTile)),
        mean_dxhat_xhat_(memory_.take(kMaxTile)),
        lse_(memory_.take(shape.rows)),
        delta_(memory_.take(shape.rows)),
        sum_dm_(memory_.take(shape.rows)),
        sum_u_(memory_.take(shape.rows)),
        ones_(memory_.take(shape.rows)) {
    for (int64_t r = 0; r < shape.rows; ++r) ones_[r] = 1;
  }

  void begin_image(int64_t b) {
    const Problem& problem = params_.problem;
    load_rows(u_, params_.u, b, problem, shape);
    load_rows(dm_, params_.dm, b, problem, shape);
    load_rows(m_, params_.m, b, problem, shape);
    for (int64_t r = 0; r < shape.rows; ++r) {
      const int64_t i = r * shape.channels, j = b * problem.num_rows + r;
      const bool padding = r >= problem.num_rows;
      lse_[r] = padding ? 0 : finite_or_zero(static_cast<const Scalar*>(params_.lse)[j]);
      delta_[r] = dot_row(dm_ + i, m_ + i, shape.channels);
      if (params_.dlse && !padding) delta_[r] -= static_cast<const Scalar*>(params_.dlse)[j];
      sum_dm_[r] = sum_row(dm_ + i, shape.channels);
      sum_u_[r] = sum_row(u_ + i, shape.channels);
    }
  }

  // Writes dx of the chunk's tokens if it is wanted, and their contribution to du.
  void chunk(int64_t b, int64_t chunk, Du<Scalar>& du) {
    const int64_t begin = chunk * kChunk;
    const int64_t end = minimum(begin + kChunk, params_.problem.num_tokens);
    std::memset(du.sum, 0, shape.rows * shape.channels * sizeof(Scalar));
    for (int64_t n = begin; n < end; n += shape.tile) {
      const int count = minimum(shape.tile, end - n);
      tile_.read(b, n, count);
      auto dx_prefetcher = tile_.template rows_of<Prefetch<true>>(params_.dx, b, n, count);
      auto x_prefetcher = tile_.template next<Prefetch<false>>(b, n, count);
      dot_products(scores_, u_, shape.rows, tile_.rows, count, shape.channels, dx_prefetcher);
      dot_products(dp_, dm_, shape.rows, tile_.rows, count, shape.channels, x_prefetcher);
      std::memset(mean_dxhat_, 0, kMaxTile * sizeof(Scalar));
      std::memset(mean_dxhat_xhat_, 0, kMaxTile * sizeof(Scalar));
      for (int64_t r = 0; r < shape.rows; ++r) softmax_gradient(r, count);

      // dxhat_n = sum_r p_rn dm_r + ds_rn u_r
      const int extra = n == 0 && params_.dx.extra;
      const int num_wanted = params_.dx.data ? count : extra;
      rank_update<Scalar>(dxhat_, nullptr, {p_, 1, kMaxTile}, round_up(num_wanted, 2), dm_,
                          2 * shape.rows, shape.channels, x_prefetcher);
      for (int t = 0; t < num_wanted; ++t)
        write_dx(Tile<Token>::template token_row<Token>(params_.dx, b, n + t), t);

      // du_r = sum_n ds_rn xhat_n
      for (int64_t i = 0; i < shape.rows * kMaxTile; i += kLanes<Scalar>)
        store(ds_ + i, load(ds_ + i) * load(tile_.rstd + i % kMaxTile));
      rank_update(du.sum, ones_, {ds_, kMaxTile, 1}, shape.rows, tile_.rows, count, shape.channels,
                  x_prefetcher);
    }
  }

  void end_image(int64_t b, const Du<Scalar>& du) {
    for (int64_t r = 0; r < params_.problem.num_rows; ++r)
      std::memcpy(row<Scalar>(params_.du, b, r), du.sum + r * shape.channels,
                  params_.problem.channels * sizeof(Scalar));
  }

  const Shape<Scalar> shape;

 private:
  // Computes p and ds of row r in the tile; adds the row's terms of the means in LayerNorm's
  // gradient.
  void softmax_gradient(int64_t r, int count) {
    for (int t = 0; t < count; t += kLanes<Scalar>) {
      const int64_t i = r * kMaxTile + t;
      const V rstd = load(tile_.rstd + t);
      const V bias = load(tile_.bias + t);
      const V s = load(scores_ + i) * rstd;
      const V dp = load(dp_ + i) * rstd;
      const V p = exp((bias < 0 ? bias : s) - lse_[r]);
      const V ds = p * (dp - delta_[r]);
      store(p_ + i, p);
      store(ds_ + i, ds);
      store(mean_dxhat_ + t, load(mean_dxhat_ + t) + p * sum_dm_[r] + ds * sum_u_[r]);
      store(mean_dxhat_xhat_ + t, load(mean_dxhat_xhat_ + t) + p * dp + ds * s);
    }
  }

  // Writes dx = rstd (dxhat - mean(dxhat) - xhat mean(dxhat xhat)) for the tile's token t.
  void write_dx(Token* to, int t) const {
    constexpr int kStep = kLanes<Scalar>;
    const int64_t channels = params_.problem.channels;
    const Scalar rstd = tile_.rstd[t];
    const bool normalize = params_.problem.normalize;
    const Scalar shift = normalize ? rstd * mean_dxhat_[t] / channels : 0;
    const Scalar slope = normalize ? rstd * rstd * mean_dxhat_xhat_[t] / channels : 0;
    const Scalar* const dxhat = dxhat_ + t * shape.channels;
    const Scalar* const x = tile_.rows + t * shape.channels;
    const auto dx = [&](int64_t c) { return load(dxhat + c) * rstd - shift - load(x + c) * slope; };
    int64_t c = 0;
    for (; c + kStep <= channels; c += kStep) store(to + c, dx(c));
    if (c < channels) store_partial<Scalar>(to + c, dx(c), channels - c);
  }

  const BackwardParams& params_;
  Scratch<Scalar> memory_;
  Tile<Token> tile_;
  Scalar* dxhat_;            // [tile, channels]
  Scalar* dm_;               // [rows, channels], followed by u
  Scalar* u_;                // [rows, channels]
  Scalar* m_;                // [rows, channels]
  Scalar* p_;                // [rows, kMaxTile], followed by ds
  Scalar* ds_;               // [rows, kMaxTile]
  Scalar* scores_;           // [rows, kMaxTile]
  Scalar* dp_;               // [rows, kMaxTile]
  Scalar* mean_dxhat_;       // [kMaxTile], times the number of channels
  Scalar* mean_dxhat_xhat_;  // [kMaxTile], likewise
  Scalar* lse_;              // [rows]
  Scalar* delta_;            // [rows]: dm . m - dlse
  Scalar* sum_dm_;           // [rows]
  Scalar* sum_u_;            // [rows]
  Scalar* ones_;             // [rows]
};

}  // namespace

namespace CROSSVIT_ISA {

void backward(const BackwardParams& params) {
  dispatch(params.x.dtype, [&](auto token) { run_pass<Backward<decltype(token)>>(params); });
}

}  // namespace CROSSVIT_ISA
}  // namespace crossvit::attention_core
