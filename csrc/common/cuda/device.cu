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

// nvcc's code calls __cudaRegisterFunction for each kernel when the library is loaded. The linker
// directs the calls to here (--wrap), as the runtime tells a kernel's symbol only beside a driver.
extern "C" {

void __real___cudaRegisterFunction(void** fatbin, const char* kernel, char* stub,
                                   const char* symbol, int max_threads, uint3* thread, uint3* block,
                                   dim3* block_size, dim3* grid_size, int* warp_size);

void __wrap___cudaRegisterFunction(void** fatbin, const char* kernel, char* stub,
                                   const char* symbol, int max_threads, uint3* thread, uint3* block,
                                   dim3* block_size, dim3* grid_size, int* warp_size) {
  crossvit::kernel_symbols()[kernel] = symbol;
  __real___cudaRegisterFunction(fatbin, kernel, stub, symbol, max_threads, thread, block,
                                block_size, grid_size, warp_size);
}

}  // extern "C"
