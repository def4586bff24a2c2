// Barriers, warp operations, atomics and fences.
#pragma once

#include <type_traits>

#include "shim/scheduler.h"

namespace crossvit::testing {

constexpr unsigned kAllLanes = ~0u;

// Performs the operation for all lanes that have arrived, and wakes them.
inline void complete(WarpSync& sync, const Warp& warp) {
  void* token = sync.token();
  acquire(token);
  sync.operation(sync);
  release(token);
  Unwatched unwatched;
  for (int lane = kWarp; lane-- > 0;) {
    if (sync.has(lane) && warp.threads[lane] != current) wake(*warp.threads[lane]);
  }
  sync.arrived = 0;
  ++sync.phase;
}

struct WarpBarrier {
  static constexpr const char* kName = "__syncwarp";
  static void run(WarpSync&) {}
};

// The last lane to arrive runs Operation::run for all, directly on the arguments on the lanes'
// stacks: a warp operation costs each lane one switch. Lanes wait for each other in every
// operation, but only the barrier orders their other accesses in CUDA.
template <class Operation, class Argument>
void sync_lanes(unsigned mask, Argument& argument) {
  constexpr bool kOrders = std::is_same_v<Operation, WarpBarrier>;
  const Thread& self = *current;
  Warp& warp = *self.warp;
  if (!(mask >> self.lane & 1)) fault(std::string(Operation::kName) + " by a lane not in its mask");
  WarpSync& sync = warp.sync_of(mask);
  if (sync.arrived && sync.operation != &Operation::run) {
    fault(std::string(Operation::kName) + " syncs with another warp operation");
  }
  void* token = sync.token();
  if (kOrders) release(token);
  {
    Unwatched unwatched;
    sync.operation = &Operation::run;
    sync.arguments[self.lane] = &argument;
    sync.arrived |= 1u << self.lane;
  }
  if (sync.arrived == (mask & warp.live)) {
    complete(sync, warp);
  } else {
    suspend(Operation::kName);
    if (kOrders) acquire(token);
  }
}

// Removes a lane that exits: the others no longer wait for it.
inline void exit_lane(Warp& warp, int lane) {
  {
    Unwatched unwatched;
    warp.live &= ~(1u << lane);
  }
  for (WarpSync& sync : warp.syncs) {
    if (sync.arrived && sync.arrived == (sync.mask & warp.live)) complete(sync, warp);
  }
}

struct Vote {
  static constexpr const char* kName = "a warp vote";
  bool predicate;
  unsigned lanes = 0;
  static void run(WarpSync& sync) {
    Unwatched unwatched;
    unsigned lanes = 0;
    for (int lane = 0; lane < kWarp; ++lane) {
      if (sync.has(lane)) lanes |= unsigned(sync.argument<Vote>(lane).predicate) << lane;
    }
    for (int lane = 0; lane < kWarp; ++lane) {
      if (sync.has(lane)) sync.argument<Vote>(lane).lanes = lanes;
    }
  }
};

template <class T>
struct Shuffle {
  static constexpr const char* kName = "a warp shuffle";
  T value;
  int source;
  T result{};
  static void run(WarpSync& sync) {
    Unwatched unwatched;
    for (int lane = 0; lane < kWarp; ++lane) {
      if (!sync.has(lane)) continue;
      auto& self = sync.argument<Shuffle>(lane);
      if (!sync.has(self.source)) {
        fault("a warp shuffle reads lane " + std::to_string(self.source) +
              ", which takes no part in it");
      }
      self.result = sync.argument<Shuffle>(self.source).value;
    }
  }
};

template <class T>
T shuffle(unsigned mask, T value, int source) {
  Shuffle<T> argument{value, source};
  sync_lanes<Shuffle<T>>(mask, argument);
  return argument.result;
}

inline unsigned vote(unsigned mask, bool predicate) {
  Vote argument{predicate};
  sync_lanes<Vote>(mask, argument);
  return argument.lanes;
}

inline int first_of_segment(int width) { return current->lane & ~(width - 1); }

inline void cluster_arrive() {
  Thread& self = *current;
  if (self.cluster_arrived) fault("arrives at the cluster's barrier twice without a wait");
  const unsigned arrived_in = cluster->barrier.arrive();
  Unwatched unwatched;
  self.cluster_arrived = true;
  self.cluster_phase = arrived_in;
}

inline void cluster_wait(int line = __builtin_LINE()) {
  Thread& self = *current;
  if (!self.cluster_arrived) fault("waits at the cluster's barrier without having arrived");
  cluster->barrier.wait(self.cluster_phase, "the cluster's barrier", line);
  Unwatched unwatched;
  self.cluster_arrived = false;
}

inline int cluster_rank() { return current->block->rank; }
inline int cluster_size() { return static_cast<int>(cluster->blocks.size()); }

inline void cluster_sync(int line = __builtin_LINE());

// A barrier of `threads` threads of the block, whole warps.
inline void barrier_of_warps(int id, int threads, int line = __builtin_LINE()) {
  if (id < 1 || id > 15 || threads % kWarp) fault("no such barrier of warps");
  Barrier& barrier = current->block->warp_barriers[id];
  {
    Unwatched unwatched;
    if (barrier.arrived == 0) barrier.members = threads;
  }
  if (barrier.members != threads) fault("warps sync at one barrier with different counts");
  barrier.wait(barrier.arrive(), "a barrier of warps", line);
}

inline char* dynamic_shared() { return current->block->shared; }

// The address in another block of the cluster that corresponds to `shared` in the calling block.
template <class T>
T* in_rank(T* shared, int rank) {
  const Block& block = *current->block;
  const char* address = reinterpret_cast<const char*>(shared);
  if (rank < 0 || rank >= cluster_size()) {
    fault("rank " + std::to_string(rank) + " of a cluster of " + std::to_string(cluster_size()));
  }
  if (address < block.shared || address >= block.shared + block.shared_bytes) {
    fault("in_rank of an address outside the block's shared memory");
  }
  const Block& other = cluster->blocks[rank];
  if (other.started && other.live == 0) {
    fault("shared memory of block " + text_of(other.index) + ", which has exited");
  }
  return reinterpret_cast<T*>(other.shared + (address - block.shared));
}

// Relaxed, as on the device: atomics order other accesses only with a fence before and after.
template <class T>
T atomic_add(T* address, T value) {
  if (current->fenced) release(address);
  {
    Unwatched unwatched;
    current->last_atomic = address;
  }
  return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
}

inline void fence() {
  if (current->last_atomic) acquire(current->last_atomic);
  Unwatched unwatched;
  current->fenced = true;
}

}  // namespace crossvit::testing

inline void __syncthreads(int line = __builtin_LINE()) {
  using namespace crossvit::testing;
  Block& block = *current->block;
  if (block.barrier.arrived == 0) {
    Unwatched unwatched;
    block.barrier_line = line;
  } else if (block.barrier_line != line) {
    fault("divergent __syncthreads: threads of one block wait at lines " +
          std::to_string(block.barrier_line) + " and " + std::to_string(line));
  }
  block.barrier.wait(block.barrier.arrive(), "__syncthreads", line);
}

inline void crossvit::testing::cluster_sync(int line) {
  if (cluster_size() == 1) return __syncthreads(line);
  cluster_arrive();
  cluster_wait(line);
}

inline void __syncwarp(unsigned mask = crossvit::testing::kAllLanes) {
  crossvit::testing::WarpBarrier barrier;
  crossvit::testing::sync_lanes<crossvit::testing::WarpBarrier>(mask, barrier);
}

template <class T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32) {
  const int first = crossvit::testing::first_of_segment(width);
  return crossvit::testing::shuffle(mask, value, first + (lane & (width - 1)));
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
  const int lane = crossvit::testing::current->lane;
  const int end = crossvit::testing::first_of_segment(width) + width;
  return crossvit::testing::shuffle(mask, value, (lane ^ bits) < end ? lane ^ bits : lane);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int lane = crossvit::testing::current->lane;
  const int end = crossvit::testing::first_of_segment(width) + width;
  const int source = lane + static_cast<int>(delta);
  return crossvit::testing::shuffle(mask, value, source < end ? source : lane);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int lane = crossvit::testing::current->lane;
  const int source = lane - static_cast<int>(delta);
  const int first = crossvit::testing::first_of_segment(width);
  return crossvit::testing::shuffle(mask, value, source >= first ? source : lane);
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  return crossvit::testing::vote(mask, predicate != 0);
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) {
  return __ballot_sync(mask, predicate == 0) == 0;
}

inline int atomicAdd(int* address, int value) {
  return crossvit::testing::atomic_add(address, value);
}
inline unsigned atomicAdd(unsigned* address, unsigned value) {
  return crossvit::testing::atomic_add(address, value);
}

inline void __threadfence() { crossvit::testing::fence(); }
inline void __threadfence_block() { crossvit::testing::fence(); }
