#include "attention_core/cuda/backward_pass.h"
#include "attention_core/cuda/choose.h"

namespace crossvit::attention_core::cuda {
namespace {

// What softmax's backward subtracts: dm . m of each row, dm as rounded, less the gradient of lse.
template <class P>
__device__ void write_numbers(const BackwardPass<P>& pass, const BackwardParams& a, int64_t image,
                              int begin, int count) {
  using T = typename P::Element;
  const int channels = static_cast<int>(a.problem.channels), lane = lane_index();
  const float* dm = static_cast<const float*>(a.dm.data) + image * a.dm.batch_stride;
  const float* m = static_cast<const float*>(a.m.data) + image * a.m.batch_stride;
  const int64_t at = image * a.problem.num_rows + begin;
  for (int row = static_cast<int>(threadIdx.x) / 32; row < P::kRows; row += P::warps()) {
    float delta = 0, lse = INFINITY;
    if (row < count) {
      const float* of_dm = dm + (begin + row) * a.dm.row_stride;
      const float* of_m = m + (begin + row) * a.m.row_stride;
#pragma unroll 2
      for (int c = lane; c < channels; c += 32) delta += rounded<T>(of_dm[c]) * of_m[c];
      for (int far = 16; far > 0; far /= 2) delta += __shfl_xor_sync(~0u, delta, far);
      lse = static_cast<const float*>(a.lse)[at + row];
      if (lse == -INFINITY) lse = INFINITY;  // nothing attended to: no weights
      if (a.dlse) delta -= static_cast<const float*>(a.dlse)[at + row];
    }
    if (lane == 0) {
      pass.lse()[row] = lse;
      pass.delta()[row] = delta;
    }
  }
}

// Score rows [begin, begin + kRows). Grid: clusters of blocks that share an image, parts. partial:
// [B, parts, R, C], du of a part, where there are several; tiles: of a part, what blocks of a
// cluster leave for each other.
template <class P>
__global__ void __launch_bounds__(P::kMaxThreads, 1)
    attention_core_backward(const BackwardParams a, float* partial, float* tiles, int begin) {
  using T = typename P::Element;
  CROSSVIT_DYNAMIC_SHARED(memory);
  const int channels = static_cast<int>(a.problem.channels);
  const int num_rows = static_cast<int>(a.problem.num_rows);
  const int64_t image = blockIdx.x / cluster_size(), part = blockIdx.y;
  const int count = min(P::kRows, num_rows - begin);
  const Range range = range_of_part(a.problem, static_cast<int>(part));
  const TileStates<P> states = states_of_part<P>(tiles, a.problem, image * gridDim.y + part);

  BackwardPass<P> pass(memory, channels, static_cast<float>(a.problem.eps), a.problem.normalize);
  const Image<T> x = image_of<T>(a.x, a.mask, image);
  pass.start(x, range);
  const float* u = static_cast<const float*>(a.u.data) + image * a.u.batch_stride;
  const float* dm = static_cast<const float*>(a.dm.data) + image * a.dm.batch_stride;
  T* rows = pass.rows();
  write_rows<P>(rows, dm + begin * a.dm.row_stride, a.dm.row_stride, count, channels);
  rows += P::kRows * P::row_pitch(channels);
  write_rows<P>(rows, u + begin * a.u.row_stride, a.u.row_stride, count, channels);
  write_numbers<P>(pass, a, image, begin, count);

  const bool add = begin > 0;
  T* dextra = static_cast<T*>(a.dx.extra) + image * a.dx.extra_batch_stride;
  pass.run(x, static_cast<T*>(a.dx.data) + image * a.dx.batch_stride, a.dx.token_stride, range,
           states, add, [&](int channel, T value) {
             dextra[channel] =
                 add ? from_float<T>(to_float(dextra[channel]) + to_float(value)) : value;
           });
  if (states) {
    cluster_sync();
    pass.gather(states, range);
  }

  float* du = static_cast<float*>(a.du.data) + image * a.du.batch_stride;
  int64_t stride = a.du.row_stride;
  if (gridDim.y > 1) {
    du = partial + (image * gridDim.y + part) * num_rows * channels;
    stride = channels;
  }
  pass.results(count, range, [&](int row, int channel, float sum) {
    du[(begin + row) * stride + channel] = sum;
  });
}

// The parts of one row of du, in their order. Grid: score rows of all images.
__global__ void __launch_bounds__(kMergeThreads)
    attention_core_backward_merge(const BackwardParams a, const float* partial, int parts) {
  const int channels = static_cast<int>(a.problem.channels);
  const int64_t num_rows = a.problem.num_rows;
  const int64_t image = blockIdx.x / num_rows, row = blockIdx.x % num_rows;
  float* du = static_cast<float*>(a.du.data) + image * a.du.batch_stride + row * a.du.row_stride;
  for (int c = static_cast<int>(threadIdx.x); c < channels; c += kMergeThreads) {
    float sum = 0;
    for (int part = 0; part < parts; ++part) {
      sum += partial[((image * parts + part) * num_rows + row) * channels + c];
    }
    du[c] = sum;
  }
}

template <class P>
void run(const BackwardParams& params, int teams, int blocks, float* workspace,
         cudaStream_t stream) {
  const Problem& problem = params.problem;
  const int parts = parts_of(problem);
  LaunchConfig config;
  config.grid = dim3(static_cast<unsigned>(problem.batch * blocks), parts);
  config.cluster = blocks;
  config.block = dim3(P::threads(static_cast<int>(problem.channels), teams));
  config.shared_bytes = BackwardPass<P>::bytes(static_cast<int>(problem.channels), teams);
  config.stream = stream;
  float* tiles = blocks > 1 ? workspace + backward_workspace(problem, 1) : nullptr;
  for (int begin = 0; begin < problem.num_rows; begin += P::kRows) {
    check(launch(attention_core_backward<P>, config, params, workspace, tiles, begin),
          name_of<P>("attention_core_backward"));
  }
  if (parts == 1) return;
  LaunchConfig merge;
  merge.grid = dim3(static_cast<unsigned>(problem.batch * problem.num_rows));
  merge.block = dim3(kMergeThreads);
  merge.stream = stream;
  check(launch(attention_core_backward_merge, merge, params, workspace, parts),
        "attention_core_backward_merge");
}

}  // namespace

int64_t backward_workspace(const Problem& problem, int blocks) {
  const int parts = parts_of(problem);
  const int64_t of_parts =
      parts == 1 ? 0 : problem.batch * parts * problem.num_rows * problem.channels;
  return of_parts +
         tile_floats(problem, blocks, padded_rows(std::min(problem.num_rows, int64_t{16})));
}

BlockSize backward_block(DType dtype, int64_t rows, int64_t channels) {
  return block_of<BackwardPass, true>(dtype, rows, channels);
}

void backward(const BackwardParams& params, int blocks, float* workspace, const Place& place) {
  start<BackwardPass, true>("attention_core_backward", params.problem, params.x.dtype, place,
                            [&](auto plan, int teams, cudaStream_t stream) {
                              run<decltype(plan)>(params, teams, blocks, workspace, stream);
                            });
}

}  // namespace crossvit::attention_core::cuda
