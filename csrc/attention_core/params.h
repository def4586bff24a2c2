#pragma once

#include <cstdint>

#include "common/dtype.h"

// attention_core: any number of queries, the rows of u, over tokens that are normalized on the fly.
// All strides are in elements; every tensor has unit stride along its channels.
//
//   xhat_n = (x_n - mean_n) * rstd_n          s_rn = u_r . xhat_n
//   p_r    = softmax_n(s_r)                   m_r  = sum_n p_rn xhat_n
//   lse_r  = log sum_n exp(s_rn)

namespace crossvit::attention_core {

// [B, R, C] in the accumulation type: double for double tokens, else float.
struct Rows {
  void* data;
  int64_t batch_stride;
  int64_t row_stride;
};

// [B, N, C], preceded by one more token per image if extra is not null.
struct Tokens {
  void* data;
  DType dtype;
  int64_t batch_stride;
  int64_t token_stride;
  void* extra;
  int64_t extra_batch_stride;
};

// [B, N], true where a token is attended to; null if all are. The extra token always is.
struct Mask {
  const bool* data;
  int64_t batch_stride;
  int64_t token_stride;
};

struct Problem {
  int64_t batch;
  int64_t num_tokens;  // including the extra token
  int64_t num_rows;
  int64_t channels;
  bool normalize;  // false: xhat = x
  double eps;
};

// lse and dlse are in the accumulation type, [B, R] and contiguous.
struct ForwardParams {
  Problem problem;
  Tokens x;
  Rows u;
  Mask mask;
  Rows m;     // out
  void* lse;  // out
};

struct BackwardParams {
  Problem problem;
  Tokens x;
  Rows u;
  Mask mask;
  Rows m;
  const void* lse;
  Rows dm;
  const void* dlse;  // null: zero
  Rows du;           // out, per image even if u is shared
  Tokens dx;         // out; if not wanted, its data is null and its strides are 0
};

void forward(const ForwardParams& params);
void backward(const BackwardParams& params);

}  // namespace crossvit::attention_core
