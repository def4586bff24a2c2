#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cross_attention/params.h"

// Tensors arrive as tuples of address, dtype code and strides in elements, made by
// crossvit_kernels/extension.py, so nothing here depends on torch.

namespace crossvit::bindings {

using Address = std::uintptr_t;
using ProblemArg = std::tuple<int64_t, int64_t, int64_t, int64_t, bool, double>;
using RowsArg = std::tuple<Address, int64_t, int64_t>;
using TokensArg = std::tuple<Address, int, int64_t, int64_t, Address, int64_t>;
using MaskArg = std::tuple<Address, int64_t, int64_t>;

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

inline attention_core::Problem to_problem(const ProblemArg& arg) {
  const auto& [batch, num_tokens, num_rows, channels, normalize, eps] = arg;
  return {batch, num_tokens, num_rows, channels, normalize, eps};
}

inline attention_core::Rows to_rows(const RowsArg& arg) {
  const auto& [data, batch_stride, row_stride] = arg;
  return {pointer<void>(data), batch_stride, row_stride};
}

inline attention_core::Tokens to_tokens(const TokensArg& arg) {
  const auto& [data, dtype, batch_stride, token_stride, extra, extra_batch_stride] = arg;
  return {pointer<void>(data), DType(dtype),         batch_stride,
          token_stride,        pointer<void>(extra), extra_batch_stride};
}

inline attention_core::Mask to_mask(const MaskArg& arg) {
  const auto& [data, batch_stride, token_stride] = arg;
  return {pointer<const bool>(data), batch_stride, token_stride};
}

// batch, tokens without the CLS, channels, channels of the CLS, heads, eps
using FusionArg = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, double>;
using ParameterArg = std::tuple<Address, int>;

inline cross_attention::Parameter to_parameter(const ParameterArg& arg) {
  return {pointer<const void>(std::get<0>(arg)), DType(std::get<1>(arg))};
}

inline cross_attention::Problem to_problem(const FusionArg& arg) {
  const auto& [batch, num_tokens, channels, cls_channels, num_heads, eps] = arg;
  return {batch, num_tokens, channels, cls_channels, num_heads, eps};
}

// In the order of crossvit_kernels.FusionWeights.
inline cross_attention::Weights to_weights(const std::vector<ParameterArg>& args) {
  if (args.size() != 18) throw pybind11::value_error("a fusion has 18 weights");
  const auto layer = [&](int i) {
    return cross_attention::Layer{to_parameter(args[2 * i]), to_parameter(args[2 * i + 1])};
  };
  return {layer(0), layer(1), layer(2), layer(3), layer(4), layer(5), layer(6), layer(7), layer(8)};
}

// Defines the functions that launch CUDA kernels.
void define_cuda(pybind11::module_& m);
void define_cuda_blocks(pybind11::module_& m);

}  // namespace crossvit::bindings
