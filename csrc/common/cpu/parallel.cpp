#include "common/cpu/parallel.h"

#include <dlfcn.h>

#include <stdexcept>

namespace crossvit {
namespace {

// Both return 0 on success.
using TorchParallelFor = int (*)(int64_t, int64_t, int64_t grain, internal::LoopBody, void*);
using TorchNumThreads = int (*)(uint32_t*);

#ifdef __APPLE__
constexpr const char* kTorchLibrary = "libtorch_cpu.dylib";
#else
constexpr const char* kTorchLibrary = "libtorch_cpu.so";
#endif

struct TorchPool {
  TorchParallelFor parallel_for = nullptr;
  TorchNumThreads num_threads = nullptr;

  TorchPool() {
    // RTLD_NOLOAD: torch is loaded already, by the `import torch` that precedes every call.
    if (void* torch = dlopen(kTorchLibrary, RTLD_NOW | RTLD_NOLOAD)) {
      parallel_for = reinterpret_cast<TorchParallelFor>(dlsym(torch, "torch_parallel_for"));
      num_threads = reinterpret_cast<TorchNumThreads>(dlsym(torch, "torch_get_num_threads"));
    }
  }
};

const TorchPool& pool() {
  static const TorchPool instance;
  return instance;
}

}  // namespace

int num_threads() {
  uint32_t count = 1;
  if (!pool().parallel_for || !pool().num_threads || pool().num_threads(&count) != 0) return 1;
  return static_cast<int>(count);
}

void internal::parallel_for(int64_t count, LoopBody body, void* context) {
  if (count <= 0) return;
  if (!pool().parallel_for || count == 1) return body(0, count, context);
  if (pool().parallel_for(0, count, /*grain=*/1, body, context) != 0)
    throw std::runtime_error("torch_parallel_for failed");
}

}  // namespace crossvit
