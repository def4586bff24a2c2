// The extension module crossvit_kernels._C. Nothing outside this folder depends on Python.

#include "bindings/arguments.h"
#include "common/cpu/isa.h"
#include "cross_attention/params.h"
#include "layernorm_ffn/params.h"
#include "layernorm_msa/params.h"
#ifdef CROSSVIT_WITH_CUDA
#include "common/cuda/device.h"
#endif

namespace py = pybind11;
namespace core = crossvit::attention_core;
namespace fusion = crossvit::cross_attention;
namespace ffn = crossvit::layernorm_ffn;
namespace msa = crossvit::layernorm_msa;

namespace {

using namespace crossvit::bindings;

// [B, N, C], batch and token strides, cls and its stride
using TokenRowsArg =
    std::tuple<Address, int64_t, int64_t, int64_t, int64_t, int64_t, Address, int64_t>;
// weight, bias, eps, normed, mean, rstd
using NormArg = std::tuple<Address, Address, double, Address, Address, Address>;
using LinearArg = std::tuple<Address, Address>;

crossvit::TokensParams to_token_rows(const TokenRowsArg& arg) {
  const auto& [data, batch, num_tokens, channels, batch_stride, token_stride, cls, cls_stride] =
      arg;
  return {pointer<const float>(data), batch,     num_tokens, channels, batch_stride, token_stride,
          pointer<const float>(cls),  cls_stride};
}

crossvit::NormParams to_norm(const NormArg& arg) {
  const auto& [weight, bias, eps, normed, mean, rstd] = arg;
  return {pointer<const float>(weight), pointer<const float>(bias), eps,
          pointer<float>(normed),       pointer<float>(mean),       pointer<float>(rstd)};
}

crossvit::LinearParams to_linear(const LinearArg& arg) {
  return {pointer<const float>(std::get<0>(arg)), pointer<const float>(std::get<1>(arg))};
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  using Released = py::call_guard<py::gil_scoped_release>;

  m.def(
      "attention_core_forward",
      [](const ProblemArg& problem, const TokensArg& x, const RowsArg& u, const MaskArg& mask,
         const RowsArg& m_out, Address lse) {
        core::forward({to_problem(problem), to_tokens(x), to_rows(u), to_mask(mask), to_rows(m_out),
                       pointer<void>(lse)});
      },
      py::arg("problem"), py::arg("x"), py::arg("u"), py::arg("mask"), py::arg("m"), py::arg("lse"),
      Released());

  m.def(
      "attention_core_backward",
      [](const ProblemArg& problem, const TokensArg& x, const RowsArg& u, const MaskArg& mask,
         const RowsArg& m_in, Address lse, const RowsArg& dm, Address dlse, const RowsArg& du,
         const TokensArg& dx) {
        core::backward({to_problem(problem), to_tokens(x), to_rows(u), to_mask(mask), to_rows(m_in),
                        pointer<const void>(lse), to_rows(dm), pointer<const void>(dlse),
                        to_rows(du), to_tokens(dx)});
      },
      py::arg("problem"), py::arg("x"), py::arg("u"), py::arg("mask"), py::arg("m"), py::arg("lse"),
      py::arg("dm"), py::arg("dlse"), py::arg("du"), py::arg("dx"), Released());

  m.def(
      "cross_attention_forward",
      [](const FusionArg& problem, const ParameterArg& cls, const TokensArg& tokens,
         const std::vector<ParameterArg>& weights, const ParameterArg& residual_scale,
         Address vectors, Address y0_token, const ParameterArg& new_cls) {
        fusion::forward({to_problem(problem), to_parameter(cls), to_tokens(tokens),
                         to_weights(weights), to_parameter(residual_scale), pointer<void>(vectors),
                         pointer<void>(y0_token), pointer<void>(std::get<0>(new_cls)),
                         crossvit::DType(std::get<1>(new_cls))});
      },
      py::arg("problem"), py::arg("cls"), py::arg("tokens"), py::arg("weights"),
      py::arg("residual_scale"), py::arg("vectors"), py::arg("y0_token"), py::arg("new_cls"),
      Released());

  m.def(
      "layernorm_msa_forward",
      [](const TokenRowsArg& x, const NormArg& norm, const LinearArg& qkv, const LinearArg& out,
         int64_t num_heads, Address residual_scale, Address layer_scale, Address key_mask,
         Address qkv_rows, Address heads, Address lse, Address y) {
        msa::forward({to_token_rows(x), to_norm(norm), to_linear(qkv), to_linear(out), num_heads,
                      pointer<const float>(residual_scale), pointer<const float>(layer_scale),
                      pointer<const bool>(key_mask), pointer<float>(qkv_rows),
                      pointer<float>(heads), pointer<float>(lse), pointer<float>(y)});
      },
      py::arg("x"), py::arg("norm"), py::arg("qkv"), py::arg("out"), py::arg("num_heads"),
      py::arg("residual_scale"), py::arg("layer_scale"), py::arg("key_mask"), py::arg("qkv_rows"),
      py::arg("heads"), py::arg("lse"), py::arg("y"), Released());

  m.def(
      "layernorm_ffn_forward",
      [](const TokenRowsArg& x, const NormArg& norm, const LinearArg& fc1, const LinearArg& fc2,
         int64_t hidden_width, int activation, Address residual_scale, Address layer_scale,
         Address hidden, Address activated, Address y) {
        ffn::forward({to_token_rows(x), to_norm(norm), to_linear(fc1), to_linear(fc2), hidden_width,
                      static_cast<crossvit::Activation>(activation),
                      pointer<const float>(residual_scale), pointer<const float>(layer_scale),
                      pointer<float>(y), pointer<float>(hidden), pointer<float>(activated)});
      },
      py::arg("x"), py::arg("norm"), py::arg("fc1"), py::arg("fc2"), py::arg("hidden_width"),
      py::arg("activation"), py::arg("residual_scale"), py::arg("layer_scale"), py::arg("hidden"),
      py::arg("activated"), py::arg("y"), Released());

  m.def("usable_isas", &crossvit::usable_isas);
  m.def("active_isa", &crossvit::active_isa_name);
  m.def("use_isa", &crossvit::use_isa, py::arg("name"));

#ifdef CROSSVIT_WITH_CUDA
  m.attr("cuda_architectures") = CROSSVIT_CUDA_ARCH_LIST;
  m.def("cuda_self_check", &crossvit::cuda_self_check, py::arg("device"), Released());
  py::module_ cuda = m.def_submodule("cuda");
  crossvit::bindings::define_cuda(cuda);
#else
  m.attr("cuda_architectures") = "";
#endif
}
