#include "common/cuda/dispatch.h"
#include "layernorm_ffn/cuda/kernels.h"
#include "layernorm_msa/cuda/parameters.h"

namespace crossvit::layernorm_ffn::cuda {
namespace {

using layernorm_msa::cuda::elements_of, layernorm_msa::cuda::linear_params,
    layernorm_msa::cuda::norm_params, layernorm_msa::cuda::residual_params;

template <class T>
void run(const ForwardParams& params, cudaStream_t stream) {
  const Problem& problem = params.problem;
  const Weights& w = params.weights;
  layer_norm_forward(norm_params<T>(params.x, w.norm, problem), static_cast<T*>(params.normed),
                     stream);
  LinearParams<T> fc1 = linear_params<T>(problem, params.normed, w.fc1.weight.data,
                                         problem.channels, problem.hidden_width, params.activated);
  fc1.bias = elements_of<T>(w.fc1.bias);
  fc1.gate = gate_of(params.activation);
  linear<Linear::kActivation>(fc1, stream);
  linear<Linear::kForward>(
      residual_params<T>(params, params.activated, w.fc2, problem.hidden_width), stream);
}

}  // namespace

void forward(const ForwardParams& params, const Place& place) {
  const DeviceGuard guard(place.device);
  check_launch(guard.status, "layernorm_ffn_forward");
  with_element_type(params.problem.dtype, [&](auto element) {
    run<decltype(element)>(params, static_cast<cudaStream_t>(place.stream));
  });
}

}  // namespace crossvit::layernorm_ffn::cuda
