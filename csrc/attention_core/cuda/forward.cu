#include "attention_core/cuda/choose.h"
#include "attention_core/cuda/forward_pass.h"
#include "attention_core/cuda/warp_rows.h"

namespace crossvit::attention_core::cuda {
namespace {

template <class P>
using Pass = ForwardPass<P, true>;

// Partial results of an image with several splits, in the workspace.
struct SplitPartials {
  float* sums;           // [B, splits, R, C]
  SoftmaxState* states;  // [B, splits, R]
};

// What a block writes: an image's results, or those of a split before their division.
struct Results {
  float* m;
  int64_t batch_stride;  // of a split
  int64_t row_stride;
  float* lse;  // or null
  SoftmaxState* states;
};

// Grid: clusters of blocks that share an image, splits, groups of rows. tile_memory holds the
// partials that the blocks of a cluster exchange.
template <class P>
__global__ void __launch_bounds__(P::kThreadsAlone, P::kBlocksAlone)
    attention_core_forward(const ForwardParams a, const Results to, float* tile_memory) {
  using T = typename P::Element;
  CROSSVIT_DYNAMIC_SHARED(memory);
  const int channels = static_cast<int>(a.problem.channels);
  const int num_rows = static_cast<int>(a.problem.num_rows);
  const int64_t image = blockIdx.x >> log2_of(cluster_size()), split = blockIdx.y;
  const int begin = static_cast<int>(blockIdx.z) * P::kRows;
  const int count = minimum(P::kRows, num_rows - begin);
  // Before anything else: behind the tiles of another block their loads would take long.
  const float* u = static_cast<const float*>(a.u.data) + image * a.u.batch_stride;
  const WarpRowLoads<P, 24> rows(u + begin * a.u.row_stride, a.u.row_stride, count, channels);
  const Range range = range_of_split<P, false>(a.problem, static_cast<int>(split));
  Pass<P> pass(memory, channels, static_cast<float>(a.problem.eps), a.problem.normalize);
  const Image<T> x = image_of<T>(a.x, a.mask, image);
  pass.start_first(x, range);
  const int64_t index = (image * gridDim.y + split) * gridDim.z + blockIdx.z;
  const TilePartials<P> tiles = partials_of_split<P>(tile_memory, a.problem, index);
  pass.write_rows(0, rows, [](int, auto&) {});
  pass.run(x, range, tiles);
  if (tiles) {
    cluster_sync();
    pass.gather(tiles, count, range);
  }

  const int64_t part = image * gridDim.y + split, first = part * num_rows + begin;
  pass.write_results(count, range, to.m + part * to.batch_stride + begin * to.row_stride,
                     to.row_stride, to.lse ? to.lse + first : nullptr, to.states + first);
}

// Merges the splits of a row, in order. Grid: the rows of all images.
__global__ void __launch_bounds__(kMergeThreads)
    attention_core_forward_merge(const ForwardParams a, const SplitPartials partials, int splits) {
  const int channels = static_cast<int>(a.problem.channels);
  const int64_t num_rows = a.problem.num_rows;
  const int64_t image = blockIdx.x / num_rows, row = blockIdx.x % num_rows;
  float* m = static_cast<float*>(a.m.data) + image * a.m.batch_stride + row * a.m.row_stride;
  for (int c = thread_index(); c < channels; c += kMergeThreads) {
    SoftmaxState state;
    float sum = 0;
    for (int split = 0; split < splits; ++split) {
      const int64_t index = (image * splits + split) * num_rows + row;
      const Scales scales = join(state, partials.states[index]);
      sum = scales.join(sum, partials.sums[index * channels + c]);
    }
    m[c] = sum * RowTotal::of(state).inverse;
    if (c == 0) static_cast<float*>(a.lse)[image * num_rows + row] = log_of_total<float>(state);
  }
}

template <class P>
void run(const ForwardParams& params, LaunchConfig config, float* workspace) {
  const Problem& problem = params.problem;
  const int splits = num_splits(problem);
  const int64_t rows = problem.batch * splits * problem.num_rows;
  const SplitPartials partials = {
      workspace, reinterpret_cast<SoftmaxState*>(workspace + rows * problem.channels)};
  config.grid = dim3(static_cast<unsigned>(problem.batch * config.cluster), splits,
                     static_cast<unsigned>(ceil_div(problem.num_rows, P::kRows)));
  float* tiles = config.cluster > 1 ? workspace + forward_workspace(problem, 1) : nullptr;
  const Results results =
      splits == 1 ? Results{static_cast<float*>(params.m.data), params.m.batch_stride,
                            params.m.row_stride, static_cast<float*>(params.lse), nullptr}
                  : Results{partials.sums, problem.num_rows * problem.channels, problem.channels,
                            nullptr, partials.states};
  check(launch(attention_core_forward<P>, config, params, results, tiles),
        name_of<P>("attention_core_forward"));
  if (splits == 1) return;
  check(launch(attention_core_forward_merge, merge_config(problem, config.stream), params, partials,
               splits),
        "attention_core_forward_merge");
}

}  // namespace

int64_t forward_workspace(const Problem& problem, int blocks) {
  const int splits = num_splits(problem);
  const int64_t split_floats =
      splits == 1 ? 0 : problem.batch * splits * problem.num_rows * (problem.channels + 2);
  return split_floats + tile_floats(problem, blocks, padded_rows(problem.num_rows));
}

int shared_bytes(DType dtype, int64_t channels) {
  return maximum(forward_block(dtype, 8, channels, 0).shared_bytes,
                 backward_block(dtype, 8, channels, 0).shared_bytes);
}

BlockSize forward_block(DType dtype, int64_t rows, int64_t channels, int max_bytes) {
  return block_of<Pass, false>(dtype, rows, channels, max_bytes);
}

void forward(const ForwardParams& params, int blocks, float* workspace, const Place& place) {
  start<Pass, false>("attention_core_forward", params.problem, params.x.dtype, blocks, place,
                     [&](auto plan, const LaunchConfig& config) {
                       run<decltype(plan)>(params, config, workspace);
                     });
}

}  // namespace crossvit::attention_core::cuda
