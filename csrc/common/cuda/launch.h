// Launching kernels.
#pragma once

#include <map>
#include <mutex>
#include <tuple>
#include <utility>

#include "common/cuda/gpu.h"
#include "common/cuda/recording.h"

namespace crossvit {

struct LaunchConfig {
  dim3 grid;
  dim3 block;
  int shared_bytes = 0;
  int cluster = 1;  // blocks per cluster, along grid.x, which it divides
  cudaStream_t stream = nullptr;
};

template <class... P>
cudaError_t record(void (*kernel)(P...), const LaunchConfig& config, const P&... parameters) {
  const dim3 grid = config.grid, block = config.block;
  recording->launches.push_back({kernel_symbols()[reinterpret_cast<const void*>(kernel)],
                                 {grid.x, grid.y, grid.z},
                                 {block.x, block.y, block.z},
                                 config.shared_bytes,
                                 config.cluster,
                                 parameter_bytes(parameters...)});
  return cudaSuccess;
}

#ifdef __CUDACC__

// Returns the maximum shared memory per block; 0 if unknown.
inline int shared_bytes_of_block(int device) {
  if (recording) return recording->shared_bytes_of_block;
  int bytes = 0;
  cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return bytes;
}

// A kernel as a device has loaded it.
struct LoadedKernel {
  cudaError_t status;
  bool has_clusters;  // its code is for sm_90 or later; earlier code takes each block for a cluster
};

// Lets the kernel's blocks have all the shared memory there is. A limit is a property of the
// kernel: were it set to what each launch needs, one thread could lower it under another's launch.
inline LoadedKernel load_kernel(const void* kernel, int device) {
  cudaFuncAttributes attributes = {};
  cudaError_t status = cudaFuncGetAttributes(&attributes, kernel);
  const int most = shared_bytes_of_block(device) - static_cast<int>(attributes.sharedSizeBytes);
  if (status == cudaSuccess) {
    status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
  }
  if (status == cudaSuccess) {
    status = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                  cudaSharedmemCarveoutMaxShared);
  }
  return {status, attributes.ptxVersion >= 90};
}

// The same, once per kernel and device.
inline LoadedKernel loaded_kernel(const void* kernel) {
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, LoadedKernel> kernels;
  int device = 0;
  const cudaError_t status = cudaGetDevice(&device);
  if (status != cudaSuccess) return {status, false};
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = kernels.find({kernel, device});
  if (found != kernels.end()) return found->second;
  const LoadedKernel loaded = load_kernel(kernel, device);
  if (loaded.status == cudaSuccess) kernels.insert({{kernel, device}, loaded});
  return loaded;
}

// Returns errors of the launch; those of the execution are reported later.
template <class... P, class... A>
cudaError_t launch(void (*kernel)(P...), const LaunchConfig& config, A&&... arguments) {
  if (recording) return record<P...>(kernel, config, static_cast<P>(arguments)...);
  const LoadedKernel loaded = loaded_kernel(reinterpret_cast<const void*>(kernel));
  if (loaded.status != cudaSuccess) return loaded.status;
  if (config.cluster > 1 && !loaded.has_clusters) return cudaErrorInvalidClusterSize;
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

#else

inline int shared_bytes_of_block(int) {
  return recording ? recording->shared_bytes_of_block : testing::max_shared_bytes();
}

// Runs the kernel to completion. A fault throws std::runtime_error with the block and the cause.
template <class... P, class... A>
cudaError_t launch(void (*kernel)(P...), const LaunchConfig& config, A&&... arguments) {
  if (recording) return record<P...>(kernel, config, static_cast<P>(arguments)...);
  const std::tuple<P...> values{static_cast<P>(std::forward<A>(arguments))...};
  return testing::run_grid({config.grid, config.block, config.shared_bytes, config.cluster},
                           [&] { std::apply(kernel, values); });
}

#endif

// Selects a device, if launches are not recorded; restores the previous one.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) : status(cudaSuccess) {
    if (recording) return;
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
