// LayerNorm: a warp per row, whose values stay in shared memory between the passes; then column
// sums over the block's rows, which need all warps.
#include "common/cuda/launch.h"
#include "common/cuda/warp.h"
#include "kernels/check.h"

namespace crossvit {
namespace {

constexpr int kWarps = 4, kChannels = 96;

__global__ void __launch_bounds__(32 * kWarps)
    layernorm(const __nv_bfloat16* x, float* y, float* column_sums, int rows, float eps) {
  CROSSVIT_DYNAMIC_SHARED(memory);
  auto* values = reinterpret_cast<float*>(memory);
  const int thread = thread_index(), warp = warp_index(), lane = lane_index();
  const int row = static_cast<int>(blockIdx.x) * kWarps + warp;
  float* row_values = values + warp * kChannels;
  for (int i = lane; i < kChannels; i += 32) row_values[i] = 0;
  if (row < rows) {
    float sum = 0, squares = 0;
    for (int i = lane; i < kChannels; i += 32) {
      row_values[i] = __bfloat162float(x[int64_t(row) * kChannels + i]);
      sum += row_values[i];
    }
    const float mean = sum_of_warp(sum) / kChannels;
    for (int i = lane; i < kChannels; i += 32)
      squares += (row_values[i] - mean) * (row_values[i] - mean);
    const float scale = rsqrtf(sum_of_warp(squares) / kChannels + eps);
    for (int i = lane; i < kChannels; i += 32) {
      row_values[i] = (row_values[i] - mean) * scale;
      y[int64_t(row) * kChannels + i] = row_values[i];
    }
  }
  __syncthreads();  // all rows are there
  if (thread < kChannels) {
    float sum = 0;
    for (int i = 0; i < kWarps; ++i) sum += values[i * kChannels + thread];
    column_sums[blockIdx.x * kChannels + thread] = sum;
  }
}

}  // namespace

bool check_kernel() {
  const int rows = 10, blocks = (rows + kWarps - 1) / kWarps;
  const float eps = 1e-5f;
  Numbers numbers;
  const auto x = numbers.bfloat16(rows * kChannels);
  std::vector<float> y(rows * kChannels), sums(blocks * kChannels);
  const LaunchConfig config{blocks, 32 * kWarps, kWarps * kChannels * int(sizeof(float))};
  if (launch(layernorm, config, x.data(), y.data(), sums.data(), rows, eps) != cudaSuccess) {
    return false;
  }
  Error error;
  std::vector<double> expected_sums(blocks * kChannels);
  for (int row = 0; row < rows; ++row) {
    double mean = 0, squares = 0;
    const auto value = [&](int i) -> double { return __bfloat162float(x[row * kChannels + i]); };
    for (int i = 0; i < kChannels; ++i) mean += value(i) / kChannels;
    for (int i = 0; i < kChannels; ++i)
      squares += (value(i) - mean) * (value(i) - mean) / kChannels;
    for (int i = 0; i < kChannels; ++i) {
      const double expected = (value(i) - mean) / std::sqrt(squares + eps);
      error.add(y[row * kChannels + i], expected);
      expected_sums[row / kWarps * kChannels + i] += expected;
    }
  }
  for (size_t i = 0; i < sums.size(); ++i) error.add(sums[i], expected_sums[i]);
  return error.below(1e-4);
}

}  // namespace crossvit
