// The part of CUDA's runtime that common/cuda/launch.h uses, with no device behind it: it keeps
// each kernel's limit of shared memory as the driver does, and refuses a launch above it.
#pragma once

#include <atomic>
#include <cstddef>
#include <map>

#define __device__
#define __forceinline__ inline
#define __align__(bytes) alignas(bytes)

enum cudaError_t { cudaSuccess, cudaErrorInvalidValue, cudaErrorInvalidClusterSize };
enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize,
  cudaFuncAttributePreferredSharedMemoryCarveout
};
enum { cudaSharedmemCarveoutMaxShared = 100 };
enum cudaDeviceAttr { cudaDevAttrMaxSharedMemoryPerBlockOptin };
enum { cudaLaunchAttributeClusterDimension };

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
using cudaStream_t = void*;
struct cudaFuncAttributes {
  size_t sharedSizeBytes;
  int ptxVersion;
};
struct cudaLaunchAttribute {
  int id;
  struct {
    dim3 clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

namespace fake {

constexpr int kOptIn = 227 << 10, kDefault = 48 << 10;
inline std::atomic<int> ptx_version{90}, limit{kDefault}, changes{0}, launches{0};

}  // namespace fake

inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  return *value = fake::kOptIn, cudaSuccess;
}
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  *attributes = {0, fake::ptx_version};
  return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  fake::limit = value;
  ++fake::changes;
  return cudaSuccess;
}
template <class... P>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*)(P...), P...) {
  ++fake::launches;
  const bool fits = config->dynamicSmemBytes <= static_cast<size_t>(fake::limit.load());
  return fits ? cudaSuccess : cudaErrorInvalidValue;
}
inline size_t __cvta_generic_to_shared(const void*) { return 0; }
