#pragma once

#include "common/cpu/panels.h"
#include "layernorm_msa/params.h"

// Self-attention between the two projections.
//
//   p_nm = softmax_m(q_n . k_m / sqrt(d))        out_n = sum_m p_nm v_m
//
// A head's keys and values are packed once and stay in L2. All scores of a few queries fit in L1,
// so the softmax is the textbook one: maximum, exponentials, sum.

namespace crossvit::layernorm_msa {
namespace {

// Queries that share a panel of keys or values while it is in L1.
constexpr int kGroup = 4 * kRows;
// Prefetch distance of packing, in tokens.
constexpr int kPrefetchDistance = 2 * kLane;

// A head of an image in panels, with scratch for its queries. Tokens and channels are padded to
// whole panels.
class Head {
 public:
  explicit Head(const ForwardParams& params)
      : params_(params),
        num_tokens_(params.x.num_tokens),
        head_dim_(params.x.channels / params.num_heads),
        tokens_(round_up(num_tokens_, kPanel)),
        dim_(round_up(head_dim_, kPanel)),
        memory_(2 * tokens_ * dim_ + kGroup * (tokens_ + 2 * dim_)),
        keys_(memory_.take(tokens_ * dim_)),
        values_(memory_.take(tokens_ * dim_)),
        scores_(memory_.take(kGroup * tokens_)),
        queries_(memory_.take(kGroup * dim_)),
        out_(memory_.take(kGroup * dim_)) {}

  void pack(int64_t image, int64_t head) {
    image_ = image;
    head_ = head;
    is_empty_ = true;
    for (int64_t n = 0; is_empty_ && n < num_tokens_; ++n) is_empty_ = is_masked(n);
    for (int64_t n = 0; n < tokens_; n += kLane) {
      for (int64_t i = n + kPrefetchDistance; i < n + kPrefetchDistance + kLane; ++i) {
        prefetch(kKey, i);
        prefetch(kValue, i);
      }
      for (int64_t c = 0; c < dim_; c += kLane) {
        FloatVector block[kLane];
        for (int i = 0; i < kLane; ++i) {
          block[i] = channels(kKey, n + i, c);
          store(values_ + c / kPanel * kPanel * tokens_ + (n + i) * kPanel + c % kPanel,
                channels(kValue, n + i, c));
        }
        transpose<float>(block);
        float* const to = keys_ + n / kPanel * kPanel * dim_ + c * kPanel + n % kPanel;
        for (int i = 0; i < kLane; ++i) store(to + i * kPanel, block[i]);
      }
    }
  }

  // Computes the outputs of queries [first, first + kGroup).
  void attend(int64_t first) {
    const int64_t count = minimum(kGroup, num_tokens_ - first);
    alignas(kVectorBytes) static constexpr float zeros[kPanel] = {};
    pack_queries(first, count);
    for (int64_t n = 0; n < tokens_; n += kPanel)
      for (int64_t i = 0; i < count; i += kRows)
        multiply(scores_ + i * tokens_ + n * kRows, zeros, 0, queries_ + i * dim_, keys_ + n * dim_,
                 dim_);
    float inverse[kGroup];
    for (int64_t i = 0; i < count; ++i) inverse[i] = softmax(i, first + i);
    for (int64_t c = 0; c < dim_; c += kPanel)
      for (int64_t i = 0; i < count; i += kRows)
        multiply(out_ + i * dim_ + c * kRows, zeros, 0, scores_ + i * tokens_,
                 values_ + c * tokens_, num_tokens_);
    for (int64_t i = 0; i < count; ++i) {
      const float* const from = packed_row(out_, i, dim_);
      float* const to = params_.heads + (row(first + i) * params_.num_heads + head_) * head_dim_;
      each_packed_vector(head_dim_, [&](int64_t c, int64_t packed, int64_t left) {
        store_at_most(to + c, load(from + packed) * inverse[i], left);
      });
    }
  }

 private:
  enum Operand { kQuery, kKey, kValue };

  // Scales the queries so that the softmax can use powers of two.
  void pack_queries(int64_t first, int64_t count) {
    const float scale = kLog2E / sqrt(static_cast<float>(head_dim_));
    for (int64_t i = 0; i < round_up(count, kRows); ++i) {
      prefetch(kQuery, first + i + kGroup);
      float* const to = packed_row(queries_, i, dim_);
      each_packed_vector(dim_, [&](int64_t c, int64_t packed, int64_t) {
        store(to + packed, channels(kQuery, first + i, c) * scale);
      });
    }
  }

  // Replaces the scores of row i by 2^(score - max); returns the inverse of their sum.
  float softmax(int64_t i, int64_t query) const {
    constexpr float kLowest = -__builtin_inff();
    float* const scores = packed_row(scores_, i, tokens_);
    for (int64_t n = num_tokens_; n < tokens_; ++n)
      scores[(tokens_ - kPanel) * kRows + n % kPanel] = kLowest;
    if (is_empty_) {
      for (int64_t n = 0; n < tokens_; n += kPanel)
        for (int j = 0; j < kPanel; j += kLane) store(scores + n * kRows + j, FloatVector{});
      if (params_.lse) params_.lse[row(query) * params_.num_heads + head_] = 0;
      return 0;
    }
    if (params_.key_mask)
      for (int64_t n = 0; n < num_tokens_; ++n)
        if (is_masked(n)) scores[n / kPanel * kPanel * kRows + n % kPanel] = kLowest;
    FloatVector largest[2] = {broadcast(kLowest), broadcast(kLowest)};
    for (int64_t n = 0; n < tokens_; n += kPanel)
      for (int j = 0; j < 2; ++j)
        largest[j] = larger(largest[j], load(scores + n * kRows + j * kLane));
    largest[0] = larger(largest[0], largest[1]);
    float max = largest[0][0];
    for (int j = 1; j < kLane; ++j) max = larger(max, largest[0][j]);
    FloatVector total[2] = {};
    for (int64_t n = 0; n < tokens_; n += kPanel)
      for (int j = 0; j < 2; ++j) {
        float* const chunk = scores + n * kRows + j * kLane;
        const FloatVector p = exp2_nonpositive(load(chunk) - max);
        store(chunk, p);
        total[j] += p;
      }
    const float sum_of_all = sum<float>(total[0] + total[1]);
    if (params_.lse)
      params_.lse[row(query) * params_.num_heads + head_] = max / kLog2E + log(sum_of_all);
    return 1 / sum_of_all;
  }

  // Returns the row of a token in [B, N, ...].
  int64_t row(int64_t token) const { return image_ * num_tokens_ + token; }

  const float* operand_row(Operand operand, int64_t token) const {
    return params_.qkv_rows + ((row(token) * 3 + operand) * params_.num_heads + head_) * head_dim_;
  }

  bool is_masked(int64_t token) const { return params_.key_mask && !params_.key_mask[row(token)]; }

  // Loads a vector of channels from c on, with zeros past the last channel or token, and in masked
  // keys and values: their contents, even NaN, must not propagate.
  FloatVector channels(Operand operand, int64_t token, int64_t c) const {
    if (token >= num_tokens_ || (operand != kQuery && is_masked(token))) return FloatVector{};
    return load_at_most(operand_row(operand, token) + c, head_dim_ - c);
  }

  // A head's tokens are too far apart for the hardware prefetcher.
  void prefetch(Operand operand, int64_t token) const {
    const float* const from = operand_row(operand, minimum(token, num_tokens_ - 1));
    for (int64_t c = 0; c < head_dim_; c += 16) __builtin_prefetch(from + c);
  }

  const ForwardParams& params_;
  const int64_t num_tokens_, head_dim_;
  const int64_t tokens_, dim_;  // padded
  Scratch<float> memory_;
  float* const keys_;     // panels of tokens
  float* const values_;   // panels of channels
  float* const scores_;   // packed rows, as the next two
  float* const queries_;  // scaled
  float* const out_;
  int64_t image_ = 0, head_ = 0;
  bool is_empty_ = false;  // whether all keys are masked
};

// A task is a head or, if there are few heads, a range of a head's queries.
void attention(const ForwardParams& params) {
  const int64_t heads = params.x.batch * params.num_heads;
  const int64_t groups = ceil_div(params.x.num_tokens, kGroup);
  const int64_t ranges = minimum(groups, ceil_div(16 * num_threads(), heads));
  const int64_t tokens = params.x.num_tokens, head_dim = params.x.channels / params.num_heads;
  parallel_tasks(
      heads * ranges, 2 * tokens * ceil_div(tokens, ranges) * head_dim, [&](const auto& next_task) {
        Head head(params);
        for (int64_t task = next_task(); task < heads * ranges; task = next_task()) {
          const int64_t index = task / ranges, range = task % ranges;
          head.pack(index / params.num_heads, index % params.num_heads);
          for (int64_t i = groups * range / ranges; i < groups * (range + 1) / ranges; ++i)
            head.attend(i * kGroup);
        }
      });
}

}  // namespace
}  // namespace crossvit::layernorm_msa
