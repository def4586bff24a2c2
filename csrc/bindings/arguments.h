#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "attention_core/params.h"

// Tensors arrive as tuples of address, dtype code and strides in elements
// (crossvit_kernels/extension.py makes them), so nothing here depends on torch.

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

}  // namespace crossvit::bindings
