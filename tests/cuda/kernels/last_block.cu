// Blocks store partial results in global memory, and the last one to finish adds them up.
#include "common/cuda/launch.h"
#include "kernels/check.h"

namespace crossvit {
namespace {

constexpr int kThreads = 64;

__global__ void __launch_bounds__(kThreads)
    sum_of_samples(const float* x, float* partial, float* out, int* finished, int rows) {
  CROSSVIT_DYNAMIC_SHARED(memory);
  int* is_last = reinterpret_cast<int*>(memory);
  const int column = static_cast<int>(threadIdx.x), block = static_cast<int>(blockIdx.x);
  const int blocks = static_cast<int>(gridDim.x);

  float sum = 0;
  for (int row = block; row < rows; row += blocks) sum += x[row * kThreads + column];
  partial[block * kThreads + column] = sum;
  __threadfence();  // the partial sums come before the count
  __syncthreads();
  if (column == 0) {
    *is_last = atomicAdd(finished, 1) == blocks - 1;
    __threadfence();  // the count comes before the partial sums of others
  }
  __syncthreads();
  if (!*is_last) return;
  float total = 0;
  for (int other = 0; other < blocks; ++other) total += partial[other * kThreads + column];
  out[column] = total;
}

}  // namespace

bool check_kernel() {
  const int blocks = 5, rows = 23;
  Numbers numbers;
  const auto x = numbers.float32(rows * kThreads);
  std::vector<float> partial(blocks * kThreads), out(kThreads);
  int finished = 0;
  const LaunchConfig config{blocks, kThreads, sizeof(int)};
  const cudaError_t status =
      launch(sum_of_samples, config, x.data(), partial.data(), out.data(), &finished, rows);
  if (status != cudaSuccess) return false;
  Error error;
  for (int column = 0; column < kThreads; ++column) {
    double sum = 0;
    for (int row = 0; row < rows; ++row) sum += x[row * kThreads + column];
    error.add(out[column], sum);
  }
  return error.below(1e-5);
}

}  // namespace crossvit
