#include "common/cuda/dispatch.h"
#include "layernorm_ffn/cuda/kernels.h"
#include "layernorm_msa/cuda/parameters.h"

namespace crossvit::layernorm_ffn::cuda {
namespace {

using layernorm_msa::cuda::elements_of, layernorm_msa::cuda::linear_params,
    layernorm_msa::cuda::norm_backward_params;

// The hidden units before the activation are recomputed where those after it are then stored.
template <class T>
void run(const BackwardParams& params, cudaStream_t stream) {
  const Problem& problem = params.problem;
  const Weights& w = params.weights;
  const int64_t width = problem.channels, hidden_width = problem.hidden_width;
  LinearParams<T> fc1 = linear_params<T>(problem, params.normed, w.fc1.weight.data, width,
                                         hidden_width, params.activated);
  fc1.bias = elements_of<T>(w.fc1.bias);
  linear<Linear::kForward>(fc1, stream);
  LinearParams<T> dhidden = linear_params<T>(problem, params.dupdate, w.fc2.weight.data, width,
                                             hidden_width, params.dhidden);
  dhidden.hidden = static_cast<T*>(params.activated);
  dhidden.gate = gate_of(params.activation);
  linear<Linear::kActivationBackward>(dhidden, stream);
  linear<Linear::kBackward>(linear_params<T>(problem, params.dhidden, w.fc1.weight.data,
                                             hidden_width, width, params.dnormed),
                            stream);
  layer_norm_backward(norm_backward_params<T>(params, nullptr), stream);
}

}  // namespace

int64_t norm_share_floats(const Problem& problem) {
  return norm_backward_blocks(problem.batch * problem.num_tokens) * 2 * problem.channels;
}

void backward(const BackwardParams& params, const Place& place) {
  const DeviceGuard guard(place.device);
  check_launch(guard.status, "layernorm_ffn_backward");
  with_element_type(params.problem.dtype, [&](auto element) {
    run<decltype(element)>(params, static_cast<cudaStream_t>(place.stream));
  });
}

}  // namespace crossvit::layernorm_ffn::cuda
