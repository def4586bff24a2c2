#include "attention_core/cuda/backward_pass.h"
#include "attention_core/cuda/choose.h"
#include "attention_core/cuda/warp_rows.h"

namespace crossvit::attention_core::cuda {
namespace {

template <class P>
using Pass = BackwardPass<P, true>;

// Processes rows [begin, begin + kRows) of u. Grid: clusters of blocks that share an image, splits.
// partials: [B, splits, R, C], du per split, if there are several. tile_memory holds the partials
// that the blocks of a cluster exchange.
template <class P>
__global__ void __launch_bounds__(P::kMaxThreads, 1)
    attention_core_backward(const BackwardParams a, float* partials, float* tile_memory,
                            int begin) {
  using T = typename P::Element;
  CROSSVIT_DYNAMIC_SHARED(memory);
  const int channels = static_cast<int>(a.problem.channels);
  const int num_rows = static_cast<int>(a.problem.num_rows);
  const int64_t image = blockIdx.x >> log2_of(cluster_size()), split = blockIdx.y;
  const int count = minimum(P::kRows, num_rows - begin);
  const Range range = range_of_split<P, true>(a.problem, static_cast<int>(split));
  const int64_t index = image * gridDim.y + split;
  const TilePartials<P> tiles = partials_of_split<P>(tile_memory, a.problem, index);

  const float* u = static_cast<const float*>(a.u.data) + image * a.u.batch_stride;
  const float* dm = static_cast<const float*>(a.dm.data) + image * a.dm.batch_stride;
  const float* m = static_cast<const float*>(a.m.data) + image * a.m.batch_stride;
  const WarpRowLoads<P, 24> dm_rows(dm + begin * a.dm.row_stride, a.dm.row_stride, count, channels);
  const WarpRowLoads<P, 24> u_rows(u + begin * a.u.row_stride, a.u.row_stride, count, channels);
  const WarpRowLoads<P, 24> m_rows(m + begin * a.m.row_stride, a.m.row_stride, count, channels);
  const auto load_lse = [&](const void* from, float otherwise) {
    const int row = WarpRowLoads<P, 24>::row(lane_index());
    const int64_t index = image * num_rows + begin + row;
    return from && row < count ? static_cast<const float*>(from)[index] : otherwise;
  };
  float lse = load_lse(a.lse, INFINITY);
  if (lse == -INFINITY) lse = INFINITY;  // nothing attended to: no weights
  const float dlse = load_lse(a.dlse, 0);
  Pass<P> pass(memory, channels, static_cast<float>(a.problem.eps), a.problem.normalize);
  const Image<T> x = image_of<T>(a.x, a.mask, image);
  pass.start(x, range);
  pass.write_rows(lse, dlse, dm_rows, u_rows, m_rows);

  const bool add = begin > 0;
  T* dextra = static_cast<T*>(a.dx.extra) + image * a.dx.extra_batch_stride;
  pass.run(x, static_cast<T*>(a.dx.data) + image * a.dx.batch_stride, a.dx.token_stride, range,
           tiles, add, [&](int channel, T value) {
             dextra[channel] =
                 add ? from_float<T>(to_float(dextra[channel]) + to_float(value)) : value;
           });
  if (tiles) {
    cluster_sync();
    pass.gather(tiles, count, range);
  }

  float* du = static_cast<float*>(a.du.data) + image * a.du.batch_stride;
  int64_t stride = a.du.row_stride;
  if (gridDim.y > 1) {
    du = partials + index * num_rows * channels;
    stride = channels;
  }
  pass.results(count, range, [&](int row, int channel, float2 sums) {
    *reinterpret_cast<float2*>(du + (begin + row) * stride + channel) = sums;
  });
}

// Merges the splits of a row of du, in order. Grid: the rows of all images.
__global__ void __launch_bounds__(kMergeThreads)
    attention_core_backward_merge(const BackwardParams a, const float* partials, int splits) {
  const int channels = static_cast<int>(a.problem.channels);
  const int64_t num_rows = a.problem.num_rows;
  const int64_t image = blockIdx.x / num_rows, row = blockIdx.x % num_rows;
  float* du = static_cast<float*>(a.du.data) + image * a.du.batch_stride + row * a.du.row_stride;
  for (int c = thread_index(); c < channels; c += kMergeThreads) {
    float sum = 0;
    for (int split = 0; split < splits; ++split) {
      sum += partials[((image * splits + split) * num_rows + row) * channels + c];
    }
    du[c] = sum;
  }
}

template <class P>
void run(const BackwardParams& params, LaunchConfig config, float* workspace) {
  const Problem& problem = params.problem;
  const int splits = num_splits(problem);
  config.grid = dim3(static_cast<unsigned>(problem.batch * config.cluster), splits);
  float* tiles = config.cluster > 1 ? workspace + backward_workspace(problem, 1) : nullptr;
  for (int begin = 0; begin < problem.num_rows; begin += P::kRows) {
    check(launch(attention_core_backward<P>, config, params, workspace, tiles, begin),
          name_of<P>("attention_core_backward"));
  }
  if (splits == 1) return;
  check(launch(attention_core_backward_merge, merge_config(problem, config.stream), params,
               workspace, splits),
        "attention_core_backward_merge");
}

}  // namespace

int64_t backward_workspace(const Problem& problem, int blocks) {
  const int splits = num_splits(problem);
  const int64_t split_floats =
      splits == 1 ? 0 : problem.batch * splits * problem.num_rows * problem.channels;
  const int64_t rows = padded_rows(minimum(problem.num_rows, int64_t{16}));
  return split_floats + tile_floats(problem, blocks, rows);
}

BlockSize backward_block(DType dtype, int64_t rows, int64_t channels, int max_bytes) {
  return block_of<Pass, true>(dtype, rows, channels, max_bytes);
}

void backward(const BackwardParams& params, int blocks, float* workspace, const Place& place) {
  start<Pass, true>("attention_core_backward", params.problem, params.x.dtype, blocks, place,
                    [&](auto plan, const LaunchConfig& config) {
                      run<decltype(plan)>(params, config, workspace);
                    });
}

}  // namespace crossvit::attention_core::cuda
