// LayerNorm: a warp for each row, whose values wait in shared memory between the passes; then
// their mean over the block's rows, which needs all warps.
#include "common/cuda/launch.h"
#include "kernels/check.h"

namespace crossvit {
namespace {

constexpr int kWarps = 4, kChannels = 96;

__device__ float warp_sum(float value) {
  for (int bit = 16; bit > 0; bit /= 2) value += __shfl_xor_sync(~0u, value, bit);
  return value;
}

__global__ void __launch_bounds__(32 * kWarps)
    layernorm(const __nv_bfloat16* x, float* y, float* column_sums, int rows, float eps) {
  CROSSVIT_DYNAMIC_SHARED(memory);
  auto* values = reinterpret_cast<float*>(memory);
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const int row = static_cast<int>(blockIdx.x) * kWarps + warp;
  float* mine = values + warp * kChannels;
  for (int i = lane; i < kChannels; i += 32) mine[i] = 0;
  if (row < rows) {
    float sum = 0, squares = 0;
    for (int i = lane; i < kChannels; i += 32) {
      mine[i] = __bfloat162float(x[int64_t(row) * kChannels + i]);
      sum += mine[i];
    }
    const float mean = warp_sum(sum) / kChannels;
    for (int i = lane; i < kChannels; i += 32) squares += (mine[i] - mean) * (mine[i] - mean);
    const float scale = rsqrtf(warp_sum(squares) / kChannels + eps);
    for (int i = lane; i < kChannels; i += 32) {
      mine[i] = (mine[i] - mean) * scale;
      y[int64_t(row) * kChannels + i] = mine[i];
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
    const auto at = [&](int i) -> double { return __bfloat162float(x[row * kChannels + i]); };
    for (int i = 0; i < kChannels; ++i) mean += at(i) / kChannels;
    for (int i = 0; i < kChannels; ++i) squares += (at(i) - mean) * (at(i) - mean) / kChannels;
    for (int i = 0; i < kChannels; ++i) {
      const double expected = (at(i) - mean) / std::sqrt(squares + eps);
      error.add(y[row * kChannels + i], expected);
      expected_sums[row / kWarps * kChannels + i] += expected;
    }
  }
  for (size_t i = 0; i < sums.size(); ++i) error.add(sums[i], expected_sums[i]);
  return error.below(1e-4);
}

}  // namespace crossvit
