#include "common/cuda/device.h"
#include "common/cuda/launch.h"

namespace crossvit {
namespace {

constexpr int kThreads = 256;

// Sums the thread indices in a shared-memory tree reduction.
__global__ void __launch_bounds__(kThreads) sum_of_indices_kernel(int* out) {
  __shared__ int partial[kThreads];
  const int thread = static_cast<int>(threadIdx.x);
  partial[thread] = thread;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (thread < half) partial[thread] += partial[thread + half];
  }
  if (thread == 0) *out = partial[0];
}

std::string describe(cudaError_t error) {
  return std::string(cudaGetErrorName(error)) + ": " + cudaGetErrorString(error);
}

}  // namespace

std::string cuda_self_check(int device) {
  const DeviceGuard guard(device);
  if (guard.status != cudaSuccess) return describe(guard.status);

  int* out = nullptr;
  cudaError_t status = cudaMalloc(&out, sizeof *out);
  if (status != cudaSuccess) return describe(status);
  sum_of_indices_kernel<<<1, kThreads>>>(out);
  status = cudaGetLastError();
  int sum = -1;
  if (status == cudaSuccess) status = cudaMemcpy(&sum, out, sizeof sum, cudaMemcpyDeviceToHost);
  cudaFree(out);
  if (status != cudaSuccess) return describe(status);
  return sum == kThreads * (kThreads - 1) / 2 ? "" : "the check kernel computed a wrong sum";
}

}  // namespace crossvit
