// From an element type at run time to one at compile time, and to a launch.
#pragma once

#include <stdexcept>
#include <string>

#include "common/cuda/fragments.h"
#include "common/cuda/launch.h"
#include "common/dtype.h"

namespace crossvit {

template <class Run>
void with_element_type(DType dtype, Run&& run) {
  switch (dtype) {
    case DType::kFloat32: return run(float{});
    case DType::kBFloat16: return run(bf16{});
    case DType::kFloat16: return run(half{});
    default: throw std::invalid_argument("no CUDA kernel for this element type");
  }
}

inline void check_launch(cudaError_t error, const char* kernel) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string(kernel) + ": " + cudaGetErrorName(error) + ": " +
                           cudaGetErrorString(error));
}

inline LaunchConfig launch_config(int64_t blocks, int threads, int shared_bytes,
                                  cudaStream_t stream) {
  LaunchConfig config;
  config.grid = dim3(static_cast<unsigned>(blocks));
  config.block = dim3(static_cast<unsigned>(threads));
  config.shared_bytes = shared_bytes;
  config.stream = stream;
  return config;
}

}  // namespace crossvit
