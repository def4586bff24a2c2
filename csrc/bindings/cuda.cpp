#include "attention_core/cuda/kernels.h"
#include "bindings/arguments.h"
#include "common/cuda/recording.h"
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

using ClusterShapeArg = std::tuple<int, int>;  // images and blocks of a cluster

fusion::cuda::ClusterShape to_cluster_shape(const ClusterShapeArg& arg) {
  return {std::get<0>(arg), std::get<1>(arg)};
}

fusion::Parameter to_floats(Address address) {
  return {pointer<const void>(address), DType::kFloat32};
}

// threads, bytes of shared memory
std::tuple<int, int> to_tuple(const core::cuda::BlockSize& block) {
  return {block.threads, block.shared_bytes};
}

// What run() launches: symbol, grid, block, dynamic shared memory, blocks of a cluster, parameters.
py::list record_launches(const py::function& run, int shared_bytes_of_block) {
  Recording recorded = {shared_bytes_of_block, {}};
  {
    const RecordingScope scope(&recorded);
    run();
  }
  py::list launches;
  for (const RecordedLaunch& launch : recorded.launches) {
    launches.append(py::make_tuple(launch.symbol, launch.grid, launch.block, launch.shared_bytes,
                                   launch.cluster, py::bytes(launch.parameters)));
  }
  return launches;
}

// Dtype code -> values of size(dtype, width) for 16, 32, ... channels.
template <class Size>
py::dict by_width(Size size) {
  py::dict by_type;
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    py::list sizes;
    for (int width = 16; width <= core::cuda::kMaxChannels; width += 16) {
      sizes.append(py::cast(size(dtype, width)));
    }
    by_type[py::int_(static_cast<int>(dtype))] = sizes;
  }
  return by_type;
}

}  // namespace

void define_cuda(py::module_& m) {
  using Released = py::call_guard<py::gil_scoped_release>;

  // Shared memory that a block needs, in dicts and lists, which torch.compile can trace.
  m.attr("attention_core_shared_bytes") =
      by_width([](DType dtype, int channels) { return core::cuda::shared_bytes(dtype, channels); });
  m.attr("cross_attention_row_bytes") = by_width([](DType dtype, int width) {
    return std::tuple(fusion::cuda::operand_bytes(dtype, width), fusion::cuda::float_bytes(width));
  });
  m.attr("cross_attention_scratch_bytes") = fusion::cuda::scratch_bytes();
  m.attr("cross_attention_statistics_bytes") = fusion::cuda::statistics_bytes();
  m.attr("cross_attention_pass_bytes") =
      by_width([](DType dtype, int channels) { return fusion::cuda::pass_bytes(dtype, channels); });

  // Launch shapes of forward and backward, for reports that launch nothing.
  m.def("attention_core_blocks", [](int dtype, int rows, int channels, int max_bytes) {
    return std::tuple(
        to_tuple(core::cuda::forward_block(DType(dtype), rows, channels, max_bytes)),
        to_tuple(core::cuda::backward_block(DType(dtype), rows, channels, max_bytes)));
  });
  m.def("cross_attention_blocks", [](int dtype, int cls_channels, int channels, int max_bytes) {
    const DType type = DType(dtype);
    return std::tuple(
        to_tuple(fusion::cuda::forward_block(type, cls_channels, channels, max_bytes)),
        to_tuple(fusion::cuda::backward_block(type, cls_channels, channels, max_bytes)));
  });
  m.def("record_launches", &record_launches, py::arg("run"), py::arg("shared_bytes_of_block"));
  m.attr("attention_core_split_tokens") = core::cuda::kSplitTokens;
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
      [](const FusionArg& problem, const ClusterShapeArg& cluster_shape) {
        return fusion::cuda::workspace_size(to_problem(problem), to_cluster_shape(cluster_shape));
      },
      py::arg("problem"), py::arg("cluster_shape"));

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
         Address vectors, Address states, const ClusterShapeArg& cluster_shape,
         const PlaceArg& place) {
        const fusion::Problem p = to_problem(problem);
        const core::Tokens x = to_tokens(tokens);
        fusion::cuda::forward(
            {p, to_parameter(cls), x, to_weights(weights), to_floats(residual_scale),
             pointer<void>(vectors), nullptr, pointer<void>(new_cls), x.dtype},
            to_cluster_shape(cluster_shape), pointer<float>(states), to_place(place));
      },
      py::arg("problem"), py::arg("cls"), py::arg("tokens"), py::arg("weights"),
      py::arg("residual_scale"), py::arg("new_cls"), py::arg("vectors"), py::arg("states"),
      py::arg("cluster_shape"), py::arg("place"), Released());

  m.def(
      "cross_attention_backward",
      [](const FusionArg& problem, const ParameterArg& dnew_cls, const ParameterArg& cls,
         const TokensArg& tokens, const std::vector<ParameterArg>& weights, Address residual_scale,
         Address vectors, Address dcls, const TokensArg& dx, Address gradients, Address dz,
         Address du, Address scratch, Address states, const ClusterShapeArg& cluster_shape,
         const PlaceArg& place) {
        const fusion::Problem p = to_problem(problem);
        fusion::cuda::backward(
            {p, to_parameter(dnew_cls), to_parameter(cls), to_tokens(tokens), to_weights(weights),
             to_floats(residual_scale), pointer<void>(vectors), pointer<void>(dcls), to_tokens(dx),
             pointer<float>(gradients), pointer<float>(dz), pointer<float>(du),
             pointer<float>(scratch)},
            to_cluster_shape(cluster_shape), pointer<float>(states), to_place(place));
      },
      py::arg("problem"), py::arg("dnew_cls"), py::arg("cls"), py::arg("tokens"),
      py::arg("weights"), py::arg("residual_scale"), py::arg("vectors"), py::arg("dcls"),
      py::arg("dx"), py::arg("gradients"), py::arg("dz"), py::arg("du"), py::arg("scratch"),
      py::arg("states"), py::arg("cluster_shape"), py::arg("place"), Released());

  define_cuda_blocks(m);
}

}  // namespace crossvit::bindings
