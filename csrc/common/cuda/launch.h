// Starting kernels.
#pragma once

#include <tuple>
#include <utility>

#include "common/cuda/gpu.h"

namespace crossvit {

struct LaunchConfig {
  dim3 grid;
  dim3 block;
  int shared_bytes = 0;
  int cluster = 1;  // blocks of a cluster, along grid.x, which is a multiple of it
  cudaStream_t stream = nullptr;
};

#ifdef __CUDACC__

// Returns the launch's own error; what goes wrong in the kernel comes later.
template <class... P, class... A>
cudaError_t launch(void (*kernel)(P...), const LaunchConfig& config, A&&... arguments) {
  constexpr int kSharedWithoutAsking = 48 << 10;
  if (config.shared_bytes > kSharedWithoutAsking) {
    const cudaError_t status = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, config.shared_bytes);
    if (status != cudaSuccess) return status;
  }
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = static_cast<unsigned>(config.cluster);
  cluster.val.clusterDim.y = 1;
  cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t start = {};
  start.gridDim = config.grid;
  start.blockDim = config.block;
  start.dynamicSmemBytes = static_cast<size_t>(config.shared_bytes);
  start.stream = config.stream;
  start.attrs = &cluster;
  start.numAttrs = config.cluster > 1 ? 1 : 0;
  return cudaLaunchKernelEx(&start, kernel, static_cast<P>(std::forward<A>(arguments))...);
}

// What a block may have; 0 where the device does not say.
inline int shared_bytes_of_block(int device) {
  int bytes = 0;
  cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return bytes;
}

#else

inline int shared_bytes_of_block(int) { return testing::kMostShared; }

// Runs the kernel to its end; a fault in it is a std::runtime_error that names block and cause.
template <class... P, class... A>
cudaError_t launch(void (*kernel)(P...), const LaunchConfig& config, A&&... arguments) {
  const std::tuple<P...> values{static_cast<P>(std::forward<A>(arguments))...};
  return testing::run_grid({config.grid, config.block, config.shared_bytes, config.cluster},
                           [&] { std::apply(kernel, values); });
}

#endif

// Leaves the calling thread on the device it was on.
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
