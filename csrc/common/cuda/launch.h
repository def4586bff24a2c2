// Launching kernels.
#pragma once

#include <tuple>
#include <utility>

#include "common/cuda/gpu.h"

namespace crossvit {

struct LaunchConfig {
  dim3 grid;
  dim3 block;
  int shared_bytes = 0;
  int cluster = 1;  // blocks per cluster, along grid.x, which it divides
  cudaStream_t stream = nullptr;
};

#ifdef __CUDACC__

// Returns errors of the launch; those of the execution are reported later.
template <class... P, class... A>
cudaError_t launch(void (*kernel)(P...), const LaunchConfig& config, A&&... arguments) {
  constexpr int kMaxDefaultShared = 48 << 10;
  if (config.shared_bytes > kMaxDefaultShared) {
    const cudaError_t status = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, config.shared_bytes);
    if (status != cudaSuccess) return status;
  }
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = static_cast<unsigned>(config.cluster);
  cluster.val.clusterDim.y = 1;
  cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t launch_config = {};
  launch_config.gridDim = config.grid;
  launch_config.blockDim = config.block;
  launch_config.dynamicSmemBytes = static_cast<size_t>(config.shared_bytes);
  launch_config.stream = config.stream;
  launch_config.attrs = &cluster;
  launch_config.numAttrs = config.cluster > 1 ? 1 : 0;
  return cudaLaunchKernelEx(&launch_config, kernel, static_cast<P>(std::forward<A>(arguments))...);
}

// Returns the maximum shared memory per block; 0 if unknown.
inline int shared_bytes_of_block(int device) {
  int bytes = 0;
  cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return bytes;
}

#else

inline int shared_bytes_of_block(int) { return testing::kMaxSharedBytes; }

// Runs the kernel to completion. A fault throws std::runtime_error with the block and the cause.
template <class... P, class... A>
cudaError_t launch(void (*kernel)(P...), const LaunchConfig& config, A&&... arguments) {
  const std::tuple<P...> values{static_cast<P>(std::forward<A>(arguments))...};
  return testing::run_grid({config.grid, config.block, config.shared_bytes, config.cluster},
                           [&] { std::apply(kernel, values); });
}

#endif

// Selects a device; restores the previous one.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    status = cudaGetDevice(&previous_);
    if (status == cudaSuccess) status = cudaSetDevice(device);
  }
  ~DeviceGuard() {
    if (previous_ >= 0) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

  cudaError_t status;

 private:
  int previous_ = -1;
};

}  // namespace crossvit
