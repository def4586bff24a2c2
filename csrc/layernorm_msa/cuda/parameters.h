#pragma once

#include "common/cuda/layer_norm.h"
#include "common/cuda/linear.h"
#include "cross_attention/params.h"

// From the parameters of layernorm_msa and layernorm_ffn to those of the kernels they launch.

namespace crossvit::layernorm_msa::cuda {

template <class T>
Elements<T> elements_of(const cross_attention::Parameter& p) {
  return Elements<T>::of(p.data, p.dtype);
}

template <class T, class Problem>
TokenRows<T> token_rows(const attention_core::Tokens& x, const Problem& problem) {
  TokenRows<T> rows = {};
  rows.x = Elements<T>::of(x.data, x.dtype);
  rows.batch_stride = x.batch_stride, rows.token_stride = x.token_stride;
  rows.cls = x.extra, rows.cls_stride = x.extra_batch_stride;
  rows.num_tokens = Divisor::of(static_cast<int>(problem.num_tokens));
  return rows;
}

template <class T, class Problem>
NormParams<T> norm_params(const attention_core::Tokens& x, const cross_attention::Layer& norm,
                          const Problem& problem) {
  NormParams<T> a = {};
  a.x = token_rows<T>(x, problem);
  a.weight = elements_of<T>(norm.weight), a.bias = elements_of<T>(norm.bias);
  a.rows = static_cast<int>(problem.batch * problem.num_tokens);
  a.channels = static_cast<int>(problem.channels);
  a.eps = static_cast<float>(problem.eps);
  return a;
}

// LayerNorm's backward from `params.dnormed` to `params.dx`; normed, if given, is an output.
template <class T, class Params>
NormBackwardParams<T> norm_backward_params(const Params& params, void* normed) {
  const DType dtype = params.x.dtype;
  NormBackwardParams<T> a = {};
  a.norm = norm_params<T>(params.x, params.weights.norm, params.problem);
  a.d = static_cast<const T*>(params.dnormed);
  a.dy = elements_of<T>(params.dy);
  a.dx = MutableElements<T>::of(params.dx.data, dtype);
  a.dcls = MutableElements<T>::of(params.dx.extra, dtype);
  a.normed = static_cast<T*>(normed);
  a.shares = params.norm_shares;
  return a;
}

// A layer over rows `a` [rows, terms], without what may follow its products.
template <class T, class Problem>
LinearParams<T> linear_params(const Problem& problem, const void* a, const void* weight,
                              int64_t terms, int64_t columns, void* out) {
  LinearParams<T> layer = {};
  layer.a = static_cast<const T*>(a);
  layer.weight = static_cast<const T*>(weight);
  layer.rows = static_cast<int>(problem.batch * problem.num_tokens);
  layer.terms = static_cast<int>(terms), layer.columns = static_cast<int>(columns);
  layer.out = {out, false};
  return layer;
}

// The layer that ends a block: y = x + r s (a W^T + b).
template <class T, class Params>
LinearParams<T> residual_params(const Params& params, const void* a,
                                const cross_attention::Layer& out, int64_t terms) {
  LinearParams<T> layer =
      linear_params<T>(params.problem, a, out.weight.data, terms, params.problem.channels, nullptr);
  layer.bias = elements_of<T>(out.bias);
  layer.x = token_rows<T>(params.x, params.problem);
  layer.scale = params.residual_scale;
  layer.layer_scale = elements_of<T>(params.layer_scale);
  layer.out = MutableElements<T>::of(params.y, params.y_dtype);
  return layer;
}

}  // namespace crossvit::layernorm_msa::cuda
