#include "bindings/cuda.h"

#include "attention_core/cuda/kernels.h"
#include "bindings/arguments.h"
#include "cross_attention/cuda/kernels.h"

namespace py = pybind11;

namespace crossvit::bindings {
namespace {

namespace core = attention_core;
namespace fusion = cross_attention;

using PlaceArg = std::tuple<int, Address>;  // device, stream

core::cuda::Place to_place(const PlaceArg& arg) {
  return {std::get<0>(arg), pointer<void>(std::get<1>(arg))};
}

// batch, tokens without the CLS, channels, own channels, heads, eps
using FusionArg = std::tuple<int64_t, int, int, int, int, float>;
using DivisionArg = std::tuple<int, int>;  // images and blocks of a cluster

fusion::cuda::Division to_division(const DivisionArg& arg) {
  return {std::get<0>(arg), std::get<1>(arg)};
}

// threads, bytes of shared memory
std::tuple<int, int> to_tuple(const core::cuda::BlockSize& block) {
  return {block.threads, block.shared_bytes};
}

// Dtype code -> of_width for 16, 32, ... channels.
template <class OfWidth>
py::dict by_width(OfWidth of_width) {
  py::dict of_types;
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    py::list of_widths;
    for (int width = 16; width <= core::cuda::kMaxChannels; width += 16) {
      of_widths.append(py::cast(of_width(dtype, width)));
    }
    of_types[py::int_(static_cast<int>(dtype))] = of_widths;
  }
  return of_types;
}

}  // namespace

void define_cuda(py::module_& m) {
  using Released = py::call_guard<py::gil_scoped_release>;

  // Shared memory that a block needs. Dicts and lists, as what compiles Python calls can look into
  // them.
  m.attr("attention_core_shared_bytes") =
      by_width([](DType dtype, int channels) { return core::cuda::shared_bytes(dtype, channels); });
  m.attr("cross_attention_row_bytes") = by_width([](DType dtype, int width) {
    return std::tuple(fusion::cuda::operand_bytes(dtype, width), fusion::cuda::float_bytes(width));
  });
  m.attr("cross_attention_pass_bytes") = by_width([](DType dtype, int channels) {
    return std::tuple(fusion::cuda::pass_bytes(dtype, channels, 8),
                      fusion::cuda::pass_bytes(dtype, channels, 16));
  });

  // The blocks of forward and backward, for what reports on them without launching any.
  m.def("attention_core_blocks", [](int dtype, int rows, int channels) {
    return std::tuple(to_tuple(core::cuda::forward_block(DType(dtype), rows, channels)),
                      to_tuple(core::cuda::backward_block(DType(dtype), rows, channels)));
  });
  m.def("cross_attention_blocks", [](int dtype, int own, int channels, int heads, int most_bytes) {
    const DType type = DType(dtype);
    return std::tuple(
        to_tuple(fusion::cuda::forward_block(type, own, channels, heads, most_bytes)),
        to_tuple(fusion::cuda::backward_block(type, own, channels, heads, most_bytes)));
  });
  m.attr("attention_core_part") = core::cuda::kPart;
  m.attr("attention_core_merge_threads") = core::cuda::kMergeThreads;

  m.def(
      "attention_core_workspaces",
      [](const ProblemArg& problem, int blocks) {
        return std::tuple(core::cuda::forward_workspace(to_problem(problem), blocks),
                          core::cuda::backward_workspace(to_problem(problem), blocks));
      },
      py::arg("problem"), py::arg("blocks"));

  m.def(
      "cross_attention_states",
      [](const FusionArg& problem, const DivisionArg& division) {
        const auto& [batch, num_tokens, channels, own, heads, eps] = problem;
        return fusion::cuda::states_size(to_division(division), batch, num_tokens, channels, heads);
      },
      py::arg("problem"), py::arg("division"));

  m.def(
      "attention_core_forward",
      [](const ProblemArg& problem, const TokensArg& x, const RowsArg& u, const MaskArg& mask,
         const RowsArg& m_out, Address lse, int blocks, Address workspace, const PlaceArg& place) {
        core::cuda::forward({to_problem(problem), to_tokens(x), to_rows(u), to_mask(mask),
                             to_rows(m_out), pointer<void>(lse)},
                            blocks, pointer<float>(workspace), to_place(place));
      },
      py::arg("problem"), py::arg("x"), py::arg("u"), py::arg("mask"), py::arg("m"), py::arg("lse"),
      py::arg("blocks"), py::arg("workspace"), py::arg("place"), Released());

  m.def(
      "attention_core_backward",
      [](const ProblemArg& problem, const TokensArg& x, const RowsArg& u, const MaskArg& mask,
         const RowsArg& m_in, Address lse, const RowsArg& dm, Address dlse, const RowsArg& du,
         const TokensArg& dx, int blocks, Address workspace, const PlaceArg& place) {
        core::cuda::backward({to_problem(problem), to_tokens(x), to_rows(u), to_mask(mask),
                              to_rows(m_in), pointer<const void>(lse), to_rows(dm),
                              pointer<const void>(dlse), to_rows(du), to_tokens(dx)},
                             blocks, pointer<float>(workspace), to_place(place));
      },
      py::arg("problem"), py::arg("x"), py::arg("u"), py::arg("mask"), py::arg("m"), py::arg("lse"),
      py::arg("dm"), py::arg("dlse"), py::arg("du"), py::arg("dx"), py::arg("blocks"),
      py::arg("workspace"), py::arg("place"), Released());

  m.def(
      "cross_attention_forward",
      [](const FusionArg& problem, const ParameterArg& cls, const TokensArg& tokens,
         const std::vector<ParameterArg>& weights, Address residual_scale, Address new_cls,
         Address vectors, Address states, const DivisionArg& division, const PlaceArg& place) {
        const auto& [batch, num_tokens, channels, own, heads, eps] = problem;
        fusion::cuda::forward(
            {batch, num_tokens, channels, own, heads, eps, to_parameter(cls), to_tokens(tokens),
             to_weights(weights), pointer<const float>(residual_scale), pointer<void>(new_cls),
             pointer<float>(vectors), pointer<float>(states)},
            to_division(division), to_place(place));
      },
      py::arg("problem"), py::arg("cls"), py::arg("tokens"), py::arg("weights"),
      py::arg("residual_scale"), py::arg("new_cls"), py::arg("vectors"), py::arg("states"),
      py::arg("division"), py::arg("place"), Released());

  m.def(
      "cross_attention_backward",
      [](const FusionArg& problem, const ParameterArg& dnew_cls, const ParameterArg& cls,
         const TokensArg& tokens, const std::vector<ParameterArg>& weights, Address residual_scale,
         Address vectors, Address dcls, const TokensArg& dx, Address gradients, Address dz,
         Address du, Address scratch, Address states, const DivisionArg& division,
         const PlaceArg& place) {
        const auto& [batch, num_tokens, channels, own, heads, eps] = problem;
        fusion::cuda::backward(
            {batch, num_tokens, channels, own, heads, eps, to_parameter(dnew_cls),
             to_parameter(cls), to_tokens(tokens), to_weights(weights),
             pointer<const float>(residual_scale), pointer<float>(vectors), pointer<void>(dcls),
             to_tokens(dx), pointer<float>(gradients), pointer<float>(dz), pointer<float>(du),
             pointer<float>(scratch), pointer<float>(states)},
            to_division(division), to_place(place));
      },
      py::arg("problem"), py::arg("dnew_cls"), py::arg("cls"), py::arg("tokens"),
      py::arg("weights"), py::arg("residual_scale"), py::arg("vectors"), py::arg("dcls"),
      py::arg("dx"), py::arg("gradients"), py::arg("dz"), py::arg("du"), py::arg("scratch"),
      py::arg("states"), py::arg("division"), py::arg("place"), Released());
}

}  // namespace crossvit::bindings
