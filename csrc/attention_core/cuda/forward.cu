#include "attention_core/cuda/choose.h"
#include "attention_core/cuda/forward_pass.h"

namespace crossvit::attention_core::cuda {
namespace {

// Of an image with several parts, in the workspace.
struct Partial {
  float* sums;           // [B, parts, R, C]
  SoftmaxState* states;  // [B, parts, R]
};

// Grid: clusters of blocks that share an image, parts, groups of score rows. tiles: of a part, what
// blocks of a cluster leave for each other.
template <class P>
__global__ void __launch_bounds__(P::kMaxThreads, 1)
    attention_core_forward(const ForwardParams a, const Partial partial, float* tiles) {
  using T = typename P::Element;
  CROSSVIT_DYNAMIC_SHARED(memory);
  const int channels = static_cast<int>(a.problem.channels);
  const int num_rows = static_cast<int>(a.problem.num_rows);
  const int64_t image = blockIdx.x / cluster_size(), part = blockIdx.y;
  const int begin = static_cast<int>(blockIdx.z) * P::kRows;
  const int count = min(P::kRows, num_rows - begin);
  const Range range = range_of_part(a.problem, static_cast<int>(part));
  const int64_t at = (image * gridDim.y + part) * gridDim.z + blockIdx.z;
  const TileStates<P> states = states_of_part<P>(tiles, a.problem, at);

  ForwardPass<P> pass(memory, channels, static_cast<float>(a.problem.eps), a.problem.normalize);
  const Image<T> x = image_of<T>(a.x, a.mask, image);
  pass.start(x, range);
  const float* u = static_cast<const float*>(a.u.data) + image * a.u.batch_stride;
  write_rows<P>(pass.rows(), u + begin * a.u.row_stride, a.u.row_stride, count, channels);
  pass.run(x, range, states);
  if (states) {
    cluster_sync();
    pass.gather(states, range);
  }

  if (gridDim.y > 1) {
    const int64_t at = (image * gridDim.y + part) * num_rows + begin;
    pass.results(count, range, [&](int row, int channel, float sum, const SoftmaxState& state) {
      partial.sums[(at + row) * channels + channel] = sum;
      if (channel == 0) partial.states[at + row] = state;
    });
    return;
  }
  float* m = static_cast<float*>(a.m.data) + image * a.m.batch_stride;
  float* lse = static_cast<float*>(a.lse) + image * num_rows;
  pass.results(count, range, [&](int row, int channel, float sum, SoftmaxState state) {
    if (state.total == 0) state.total = 1;  // nothing attended to: lse is -inf
    m[(begin + row) * a.m.row_stride + channel] = sum / state.total;
    if (channel == 0) lse[begin + row] = log_of_total(state);
  });
}

// The parts of one score row, in their order. Grid: score rows of all images.
__global__ void __launch_bounds__(kMergeThreads)
    attention_core_forward_merge(const ForwardParams a, const Partial partial, int parts) {
  const int channels = static_cast<int>(a.problem.channels);
  const int64_t num_rows = a.problem.num_rows;
  const int64_t image = blockIdx.x / num_rows, row = blockIdx.x % num_rows;
  const auto at = [&](int part) { return (image * parts + part) * num_rows + row; };
  float* m = static_cast<float*>(a.m.data) + image * a.m.batch_stride + row * a.m.row_stride;
  for (int c = static_cast<int>(threadIdx.x); c < channels; c += kMergeThreads) {
    SoftmaxState state;
    float sum = 0;
    for (int part = 0; part < parts; ++part) {
      const Scales scales = join(state, partial.states[at(part)]);
      sum = scales.join(sum, partial.sums[at(part) * channels + c]);
    }
    if (state.total == 0) state.total = 1;
    m[c] = sum / state.total;
    if (c == 0) static_cast<float*>(a.lse)[image * num_rows + row] = log_of_total(state);
  }
}

template <class P>
void run(const ForwardParams& params, int teams, int blocks, float* workspace,
         cudaStream_t stream) {
  const Problem& problem = params.problem;
  const int parts = parts_of(problem);
  const int groups = static_cast<int>((problem.num_rows + P::kRows - 1) / P::kRows);
  const int64_t results = problem.batch * parts * problem.num_rows;
  const Partial partial = {workspace,
                           reinterpret_cast<SoftmaxState*>(workspace + results * problem.channels)};
  LaunchConfig config;
  config.grid = dim3(static_cast<unsigned>(problem.batch * blocks), parts, groups);
  config.cluster = blocks;
  config.block = dim3(P::threads(static_cast<int>(problem.channels), teams));
  config.shared_bytes = ForwardPass<P>::bytes(static_cast<int>(problem.channels), teams);
  config.stream = stream;
  check(launch(attention_core_forward<P>, config, params, partial,
               blocks > 1 ? workspace + forward_workspace(problem, 1) : nullptr),
        name_of<P>("attention_core_forward"));
  if (parts == 1) return;
  LaunchConfig merge;
  merge.grid = dim3(static_cast<unsigned>(problem.batch * problem.num_rows));
  merge.block = dim3(kMergeThreads);
  merge.stream = stream;
  check(launch(attention_core_forward_merge, merge, params, partial, parts),
        "attention_core_forward_merge");
}

}  // namespace

int64_t forward_workspace(const Problem& problem, int blocks) {
  const int parts = parts_of(problem);
  const int64_t of_parts =
      parts == 1 ? 0 : problem.batch * parts * problem.num_rows * (problem.channels + 2);
  return of_parts + tile_floats(problem, blocks, padded_rows(problem.num_rows));
}

int shared_bytes(DType dtype, int64_t channels) {
  return std::max(forward_block(dtype, 8, channels).shared_bytes,
                  backward_block(dtype, 8, channels).shared_bytes);
}

BlockSize forward_block(DType dtype, int64_t rows, int64_t channels) {
  return block_of<ForwardPass, false>(dtype, rows, channels);
}

void forward(const ForwardParams& params, int blocks, float* workspace, const Place& place) {
  start<ForwardPass, false>("attention_core_forward", params.problem, params.x.dtype, place,
                            [&](auto plan, int teams, cudaStream_t stream) {
                              run<decltype(plan)>(params, teams, blocks, workspace, stream);
                            });
}

}  // namespace crossvit::attention_core::cuda
