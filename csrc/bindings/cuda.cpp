#include "bindings/cuda.h"

#include "attention_core/cuda.h"
#include "bindings/arguments.h"

namespace py = pybind11;

namespace crossvit::bindings {
namespace {

namespace core = attention_core;

using PlaceArg = std::tuple<int, Address>;  // device, stream

core::cuda::Place to_place(const PlaceArg& arg) {
  return {std::get<0>(arg), pointer<void>(std::get<1>(arg))};
}

}  // namespace

void define_cuda(py::module_& m) {
  using Released = py::call_guard<py::gil_scoped_release>;

  // Dtype code -> bytes of shared memory by width, 16, 32, ... channels: a dict, as what compiles
  // Python calls can look into it.
  py::dict shared_bytes;
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    py::list of_widths;
    for (int channels = 16; channels <= core::cuda::kMaxChannels; channels += 16) {
      of_widths.append(core::cuda::shared_bytes(dtype, channels));
    }
    shared_bytes[py::int_(static_cast<int>(dtype))] = of_widths;
  }
  m.attr("attention_core_shared_bytes") = shared_bytes;

  m.def(
      "attention_core_workspaces",
      [](const ProblemArg& problem) {
        return std::tuple(core::cuda::forward_workspace(to_problem(problem)),
                          core::cuda::backward_workspace(to_problem(problem)));
      },
      py::arg("problem"));

  m.def(
      "attention_core_forward",
      [](const ProblemArg& problem, const TokensArg& x, const RowsArg& u, const MaskArg& mask,
         const RowsArg& m_out, Address lse, Address workspace, const PlaceArg& place) {
        core::cuda::forward({to_problem(problem), to_tokens(x), to_rows(u), to_mask(mask),
                             to_rows(m_out), pointer<void>(lse)},
                            pointer<float>(workspace), to_place(place));
      },
      py::arg("problem"), py::arg("x"), py::arg("u"), py::arg("mask"), py::arg("m"), py::arg("lse"),
      py::arg("workspace"), py::arg("place"), Released());

  m.def(
      "attention_core_backward",
      [](const ProblemArg& problem, const TokensArg& x, const RowsArg& u, const MaskArg& mask,
         const RowsArg& m_in, Address lse, const RowsArg& dm, Address dlse, const RowsArg& du,
         const TokensArg& dx, Address workspace, const PlaceArg& place) {
        core::cuda::backward({to_problem(problem), to_tokens(x), to_rows(u), to_mask(mask),
                              to_rows(m_in), pointer<const void>(lse), to_rows(dm),
                              pointer<const void>(dlse), to_rows(du), to_tokens(dx)},
                             pointer<float>(workspace), to_place(place));
      },
      py::arg("problem"), py::arg("x"), py::arg("u"), py::arg("mask"), py::arg("m"), py::arg("lse"),
      py::arg("dm"), py::arg("dlse"), py::arg("du"), py::arg("dx"), py::arg("workspace"),
      py::arg("place"), Released());
}

}  // namespace crossvit::bindings
