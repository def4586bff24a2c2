#pragma once

#include "common/cpu/layer_params.h"
#include "common/cpu/panels.h"

// Tokens [B, N, C] as the rows of matrix products: LayerNorm on the way in, the residual on the way
// out.

namespace crossvit {
namespace {

// Returns a row of [B N, C]: of x, or of cls where that replaces row 0 of an image.
inline const float* token(const TokensParams& x, int64_t row) {
  const int64_t b = row / x.num_tokens, n = row % x.num_tokens;
  if (n == 0 && x.cls) return x.cls + b * x.cls_stride;
  return x.data + b * x.batch_stride + n * x.token_stride;
}

// LayerNorm of tokens, packed; weight and bias padded to whole panels.
class PackedNorm {
 public:
  PackedNorm(const NormParams& params, int64_t channels)
      : params_(params), channels_(channels), memory_(2 * round_up(channels, kPanel)) {
    const int64_t width = round_up(channels, kPanel);
    weight_ = memory_.take(width);
    bias_ = memory_.take(width);
    for (int64_t c = 0; c < width; ++c) {
      weight_[c] = c < channels ? params.weight[c] : 0;
      bias_[c] = params.bias && c < channels ? params.bias[c] : 0;
    }
  }

  // Normalizes x [C] to row i of packed rows; `row` is its row in the saved outputs.
  void apply(float* rows, int64_t i, const float* x, int64_t row) const {
    const int64_t whole = channels_ / kLane * kLane;
    const FloatVector rest = load_at_most(x + whole, channels_ - whole);
    FloatVector total = rest;
    for (int64_t c = 0; c < whole; c += kLane) total += load(x + c);
    const float mean = sum<float>(total) / channels_;
    FloatVector squares = rest - mean;
    for (int64_t lane = channels_ - whole; lane < kLane; ++lane) squares[lane] = 0;
    squares *= squares;
    for (int64_t c = 0; c < whole; c += kLane) {
      const FloatVector centred = load(x + c) - mean;
      squares += centred * centred;
    }
    const float rstd = 1 / sqrt(sum<float>(squares) / channels_ + static_cast<float>(params_.eps));
    float* const to = packed_row(rows, i, round_up(channels_, kPanel));
    each_packed_vector(channels_, [&](int64_t c, int64_t packed, int64_t left) {
      const FloatVector xhat = (load_at_most(x + c, left) - mean) * rstd;
      const FloatVector normed = xhat * load(weight_ + c) + load(bias_ + c);
      store(to + packed, normed);
      if (params_.normed) store_at_most(params_.normed + row * channels_ + c, normed, left);
    });
    if (params_.mean) params_.mean[row] = mean;
    if (params_.rstd) params_.rstd[row] = rstd;
  }

 private:
  const NormParams& params_;
  const int64_t channels_;
  Scratch<float> memory_;
  float *weight_, *bias_;
};

// Stores columns [n, n + kPanel) of `count` rows of a product to a tensor [rows, width].
inline void store_columns(float* to, int64_t width, int64_t first, int64_t count, int64_t n,
                          const float* product) {
  for (int64_t i = 0; i < count; ++i)
    for (int j = 0; j < kPanel; j += kLane)
      store_at_most(to + (first + i) * width + n + j, load(product + i * kPanel + j),
                    width - n - j);
}

// The same for y = x + scale * layer_scale * product; both factors may be null.
inline void store_residual(float* y, const TokensParams& x, const float* scale,
                           const float* layer_scale, int64_t first, int64_t count, int64_t n,
                           const float* product) {
  for (int64_t i = 0; i < count; ++i) {
    const int64_t row = first + i;
    const float* const from = token(x, row);
    const float r = scale ? scale[row / x.num_tokens] : 1;
    for (int j = 0; j < kPanel; j += kLane) {
      const int64_t left = x.channels - n - j;
      FloatVector update = load(product + i * kPanel + j);
      if (layer_scale) update *= load_at_most(layer_scale + n + j, left);
      update *= r;
      store_at_most(y + row * x.channels + n + j, load_at_most(from + n + j, left) + update, left);
    }
  }
}

}  // namespace
}  // namespace crossvit
