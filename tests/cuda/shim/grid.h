// Runs a launch: clusters one after another, with threads as fibers, until the first fault.
#pragma once

#include <algorithm>
#include <memory>
#include <mutex>
#include <new>
#include <numeric>

#include "shim/sync.h"

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidDevice = 101,
};
using cudaStream_t = void*;

inline const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "cudaSuccess";
    case cudaErrorInvalidValue: return "cudaErrorInvalidValue";
    case cudaErrorInvalidConfiguration: return "cudaErrorInvalidConfiguration";
    case cudaErrorInvalidDevice: return "cudaErrorInvalidDevice";
  }
  return "an unknown error";
}
inline const char* cudaGetErrorString(cudaError_t error) { return cudaGetErrorName(error); }
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) {
  return device == 0 ? cudaSuccess : cudaErrorInvalidDevice;
}

namespace crossvit::testing {

constexpr std::size_t kStackBytes = 128 << 10;
constexpr int kMaxThreads = 1024, kMaxClusterSize = 8;

// Of a block: an sm_90's, or CROSSVIT_SHIM_SHARED_BYTES.
inline int max_shared_bytes() {
  const char* const bytes = std::getenv("CROSSVIT_SHIM_SHARED_BYTES");
  return bytes ? std::atoi(bytes) : 227 << 10;
}

// ThreadSanitizer regards the accesses of one fiber as ordered, so successive clusters must run on
// different fibers for a race between them to be seen. Fibers are expensive; an odd number of sets
// is best, as grids are often even.
inline int fiber_sets([[maybe_unused]] int threads) {
#if defined(__SANITIZE_THREAD__)
  return threads <= 128 ? 3 : 2;
#else
  return 1;
#endif
}

// The byte of a NaN in every float type.
constexpr int kNotWritten = 0xff;

struct SharedMemoryDeleter {
  void operator()(char* memory) const { ::operator delete(memory, std::align_val_t(128)); }
};
using SharedMemory = std::unique_ptr<char, SharedMemoryDeleter>;

inline uint64_t launch_token, finish_token;

// Another block may access this one's shared memory only while this one runs. Both the start and
// the exit of a block write all of its shared memory: an access at the wrong time races with them,
// reads NaN or is lost.
inline void start_block(Block& block) {
  if (block.started) return acquire(&block.start_token);
  std::memset(block.shared, kNotWritten, block.shared_bytes);
  release(&block.start_token);
  Unwatched unwatched;
  block.started = true;
}

inline void finish_block(Block& block) {
  acquire(&block.exit_token);
  for (const auto& [address, barrier] : block.memory_barriers) {
    if (!barrier.in_flight.empty()) fault("the block exits with a bulk copy in flight");
  }
  std::memset(block.shared, kNotWritten, block.shared_bytes);
  poison(block.shared, block.shared_bytes);
}

inline void finish_thread(Thread& self) {
  if (!self.copies.empty()) fault("exits with cp.async copies it has not waited for");
  Block& block = *self.block;
  exit_lane(*self.warp, self.lane);
  block.barrier.drop_member(false);
  Barrier& cluster_barrier = cluster->barrier;
  cluster_barrier.drop_member(self.cluster_arrived && self.cluster_phase == cluster_barrier.phase);
  release(&block.exit_token);
  {
    Unwatched unwatched;
    --block.live;
  }
  if (block.live == 0) finish_block(block);
}

[[noreturn]] inline void thread_main() {
  Fiber::entered(*launcher);
  Thread& self = *current;
  acquire(&launch_token);
  try {
    if (!cluster->failed) {
      start_block(*self.block);
      (*kernel)();
      finish_thread(self);
    }
  } catch (const Cancelled&) {
  } catch (const std::exception& error) {
    Unwatched unwatched;
    if (!cluster->failed) cluster->error = error.what();
    cluster->failed = true;
  }
  release(&finish_token);
  Thread* next;
  {
    Unwatched unwatched;
    self.done = true;
    next = next_thread();
  }
  if (next) {
    run(*self.fiber, *next, true);
  } else {
    Fiber::change(*self.fiber, *launcher, true);
  }
  std::abort();
}

struct Shape {
  dim3 grid, block;
  int shared_bytes, cluster;
  int threads() const { return static_cast<int>(block.x * block.y * block.z); }
  int64_t clusters() const { return int64_t(grid.x) * grid.y * grid.z / cluster; }
};

inline cudaError_t check(const Shape& shape) {
  const auto& [grid, block, shared_bytes, cluster_blocks] = shape;
  constexpr unsigned kMaxInX = 0x7fffffff, kMaxInYZ = 65535, kMaxThreadsInZ = 64;
  const auto within = [](const dim3& extent, unsigned x, unsigned y, unsigned z) {
    return extent.x && extent.y && extent.z && extent.x <= x && extent.y <= y && extent.z <= z;
  };
  if (!within(block, kMaxThreads, kMaxThreads, kMaxThreadsInZ) || shape.threads() > kMaxThreads ||
      !within(grid, kMaxInX, kMaxInYZ, kMaxInYZ)) {
    return cudaErrorInvalidConfiguration;
  }
  if (shared_bytes < 0 || shared_bytes > max_shared_bytes()) return cudaErrorInvalidValue;
  constexpr int kMaxBlocks = __CUDA_ARCH__ < 900 ? 1 : kMaxClusterSize;
  if (cluster_blocks < 1 || cluster_blocks > kMaxBlocks) return cudaErrorInvalidValue;
  if (grid.x % cluster_blocks) return cudaErrorInvalidConfiguration;
  return cudaSuccess;
}

inline uint3 index_in(const dim3& extent, int64_t linear) {
  return {unsigned(linear % extent.x), unsigned(linear / extent.x % extent.y),
          unsigned(linear / extent.x / extent.y)};
}

inline Fiber& fiber_of(std::size_t number) {
  static std::deque<Fiber> fibers;
  while (fibers.size() <= number) fibers.emplace_back(kStackBytes);
  return fibers[number];
}

inline void add_block(Cluster& cluster, const Shape& shape, int64_t number, std::size_t first) {
  Block& block = cluster.blocks.emplace_back();
  const int threads = shape.threads();
  block.rank = static_cast<int>(cluster.blocks.size()) - 1;
  block.index = index_in(shape.grid, number);
  block.shared_bytes = shape.shared_bytes;
  block.live = block.barrier.members = threads;
  block.warps.resize((threads + kWarp - 1) / kWarp);
  for (int i = 0; i < threads; ++i) {
    Thread& thread = cluster.threads.emplace_back();
    thread.fiber = &fiber_of(first + cluster.threads.size() - 1);
    thread.fiber->prepare(thread_main);
    thread.block = &block;
    thread.warp = &block.warps[i / kWarp];
    thread.index = index_in(shape.block, i);
    thread.lane = i % kWarp;
    thread.warp->threads[thread.lane] = &thread;
    thread.warp->live |= 1u << thread.lane;
  }
  cluster.barrier.members += threads;
}

inline void run_cluster(const Shape& shape, int64_t number, int64_t position) {
  Unwatched unwatched;
  Cluster running;
  std::vector<SharedMemory> memories;
  const int threads = shape.threads() * shape.cluster;
  const auto first_fiber = static_cast<std::size_t>(position % fiber_sets(threads) * threads);
  for (int rank = 0; rank < shape.cluster; ++rank) {
    add_block(running, shape, number * shape.cluster + rank, first_fiber);
    // Exactly the requested size, so that AddressSanitizer detects the first byte past it.
    memories.emplace_back(
        static_cast<char*>(::operator new(shape.shared_bytes, std::align_val_t(128))));
    running.blocks.back().shared = memories.back().get();
  }
  for (auto thread = running.threads.rbegin(); thread != running.threads.rend(); ++thread) {
    running.ready.push_back(&*thread);
  }
  cluster = &running;
  run(*launcher, *next_thread());
  cluster = nullptr;
  for (const Thread& thread : running.threads) {
    if (!thread.fiber->fitted()) throw std::runtime_error("a thread's stack overflowed");
  }
  if (running.failed) throw std::runtime_error(running.error);
}

inline cudaError_t run_grid(const Shape& shape, const std::function<void()>& body) {
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  if (const cudaError_t error = check(shape)) return error;
  Fiber program;
  std::vector<int64_t> order;  // of clusters, if random
  {
    Unwatched unwatched;
    launcher = &program;
    kernel = &body;
    gridDim = shape.grid;
    blockDim = shape.block;
    chance.seed(std::getenv("CROSSVIT_SHIM_SEED"));
    if (chance.on()) order.resize(shape.clusters());
    std::iota(order.begin(), order.end(), int64_t(0));
    for (std::size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[chance.below(i)]);
  }
  release(&launch_token);
  for (int64_t i = 0; i < shape.clusters(); ++i) run_cluster(shape, chance.on() ? order[i] : i, i);
  acquire(&finish_token);
  return cudaSuccess;
}

}  // namespace crossvit::testing
