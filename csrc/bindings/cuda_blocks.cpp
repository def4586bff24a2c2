#include "bindings/arguments.h"
#include "layernorm_ffn/cuda/kernels.h"
#include "layernorm_msa/cuda/kernels.h"

// The functions that launch the kernels of transformer blocks.

namespace py = pybind11;

namespace crossvit::bindings {
namespace {

namespace ffn = layernorm_ffn::cuda;
namespace msa = layernorm_msa::cuda;

using Released = py::call_guard<py::gil_scoped_release>;
using PlaceArg = std::tuple<int, Address>;  // device, stream
// batch, tokens, channels, heads or hidden units, eps, dtype of the matrices
using BlockArg = std::tuple<int64_t, int64_t, int64_t, int64_t, double, int>;

msa::Place to_place(const PlaceArg& arg) {
  return {std::get<0>(arg), pointer<void>(std::get<1>(arg))};
}

template <class Problem>
Problem to_problem(const BlockArg& arg) {
  const auto& [batch, num_tokens, channels, heads_or_hidden, eps, dtype] = arg;
  return {batch, num_tokens, channels, heads_or_hidden, eps, DType(dtype)};
}

// In the order of crossvit_kernels.MsaWeights and FfnWeights.
template <class Weights>
Weights to_weights(const std::vector<ParameterArg>& args) {
  if (args.size() != 6) throw py::value_error("half a block has 6 weights");
  const auto layer = [&](int i) {
    return cross_attention::Layer{to_parameter(args[2 * i]), to_parameter(args[2 * i + 1])};
  };
  return {layer(0), layer(1), layer(2)};
}

void define_msa(py::module_& m) {
  m.attr("layernorm_msa_widest") = msa::kMaxChannels;
  m.attr("layernorm_msa_widest_head") = msa::kMaxHeadDim;
  m.def(
      "layernorm_msa_shared_bytes",
      [](int head_dim, int dtype) { return msa::shared_bytes(head_dim, DType(dtype)); },
      py::arg("head_dim"), py::arg("dtype"));
  m.def(
      "layernorm_msa_scratch",
      [](const BlockArg& arg) {
        const auto problem = to_problem<msa::Problem>(arg);
        return std::tuple(msa::query_term_floats(problem), msa::norm_share_floats(problem));
      },
      py::arg("problem"));
  m.def(
      "layernorm_msa_forward",
      [](const BlockArg& problem, const TokensArg& x, const std::vector<ParameterArg>& weights,
         Address residual_scale, const ParameterArg& layer_scale, Address key_mask, Address normed,
         Address qkv, Address heads, Address lse, const ParameterArg& y, const PlaceArg& place) {
        msa::forward({to_problem<msa::Problem>(problem), to_tokens(x),
                      to_weights<msa::Weights>(weights), pointer<const float>(residual_scale),
                      to_parameter(layer_scale), pointer<const bool>(key_mask),
                      pointer<void>(normed), pointer<void>(qkv), pointer<void>(heads),
                      pointer<float>(lse), pointer<void>(std::get<0>(y)), DType(std::get<1>(y))},
                     to_place(place));
      },
      py::arg("problem"), py::arg("x"), py::arg("weights"), py::arg("residual_scale"),
      py::arg("layer_scale"), py::arg("key_mask"), py::arg("normed"), py::arg("qkv"),
      py::arg("heads"), py::arg("lse"), py::arg("y"), py::arg("place"), Released());
  m.def(
      "layernorm_msa_backward",
      [](const BlockArg& problem, const TokensArg& x, const std::vector<ParameterArg>& weights,
         Address key_mask, Address qkv, Address heads, Address lse, const ParameterArg& dy,
         Address dupdate, Address dheads, Address query_terms, Address dqkv, Address dnormed,
         Address normed, const TokensArg& dx, Address norm_shares, const PlaceArg& place) {
        msa::backward(
            {to_problem<msa::Problem>(problem), to_tokens(x), to_weights<msa::Weights>(weights),
             pointer<const bool>(key_mask), pointer<const void>(qkv), pointer<const void>(heads),
             pointer<const float>(lse), to_parameter(dy), pointer<const void>(dupdate),
             pointer<void>(dheads), pointer<float>(query_terms), pointer<void>(dqkv),
             pointer<void>(dnormed), pointer<void>(normed), to_tokens(dx),
             pointer<float>(norm_shares)},
            to_place(place));
      },
      py::arg("problem"), py::arg("x"), py::arg("weights"), py::arg("key_mask"), py::arg("qkv"),
      py::arg("heads"), py::arg("lse"), py::arg("dy"), py::arg("dupdate"), py::arg("dheads"),
      py::arg("query_terms"), py::arg("dqkv"), py::arg("dnormed"), py::arg("normed"), py::arg("dx"),
      py::arg("norm_shares"), py::arg("place"), Released());
}

void define_ffn(py::module_& m) {
  m.def(
      "layernorm_ffn_scratch",
      [](const BlockArg& problem) {
        return ffn::norm_share_floats(to_problem<ffn::Problem>(problem));
      },
      py::arg("problem"));
  m.def(
      "layernorm_ffn_forward",
      [](const BlockArg& problem, const TokensArg& x, const std::vector<ParameterArg>& weights,
         int activation, Address residual_scale, const ParameterArg& layer_scale, Address normed,
         Address activated, const ParameterArg& y, const PlaceArg& place) {
        ffn::forward(
            {to_problem<ffn::Problem>(problem), to_tokens(x), to_weights<ffn::Weights>(weights),
             Activation(activation), pointer<const float>(residual_scale),
             to_parameter(layer_scale), pointer<void>(normed), pointer<void>(activated),
             pointer<void>(std::get<0>(y)), DType(std::get<1>(y))},
            to_place(place));
      },
      py::arg("problem"), py::arg("x"), py::arg("weights"), py::arg("activation"),
      py::arg("residual_scale"), py::arg("layer_scale"), py::arg("normed"), py::arg("activated"),
      py::arg("y"), py::arg("place"), Released());
  m.def(
      "layernorm_ffn_backward",
      [](const BlockArg& problem, const TokensArg& x, const std::vector<ParameterArg>& weights,
         int activation, const ParameterArg& dy, Address dupdate, Address normed, Address activated,
         Address dhidden, Address dnormed, const TokensArg& dx, Address norm_shares,
         const PlaceArg& place) {
        ffn::backward(
            {to_problem<ffn::Problem>(problem), to_tokens(x), to_weights<ffn::Weights>(weights),
             Activation(activation), to_parameter(dy), pointer<const void>(dupdate),
             pointer<void>(normed), pointer<void>(activated), pointer<void>(dhidden),
             pointer<void>(dnormed), to_tokens(dx), pointer<float>(norm_shares)},
            to_place(place));
      },
      py::arg("problem"), py::arg("x"), py::arg("weights"), py::arg("activation"), py::arg("dy"),
      py::arg("dupdate"), py::arg("normed"), py::arg("activated"), py::arg("dhidden"),
      py::arg("dnormed"), py::arg("dx"), py::arg("norm_shares"), py::arg("place"), Released());
}

}  // namespace

void define_cuda_blocks(py::module_& m) {
  define_msa(m);
  define_ffn(m);
}

}  // namespace crossvit::bindings
