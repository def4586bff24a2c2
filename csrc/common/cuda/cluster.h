// Blocks of a cluster: their barrier, and access to each other's shared memory. Before sm_90 each
// block is its own cluster.
#pragma once

#include "common/cuda/gpu.h"

namespace crossvit {

#ifdef __CUDACC__

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

constexpr bool kHasClusters = true;

__device__ __forceinline__ int cluster_rank() {
  int rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

__device__ __forceinline__ int cluster_size() {
  int size;
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
}

__device__ __forceinline__ void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
}

__device__ __forceinline__ void cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
}

__device__ __forceinline__ void cluster_sync() {
  if (cluster_size() == 1) {
    __syncthreads();
  } else {
    cluster_arrive();
    cluster_wait();
  }
}

// Returns the address of the same variable in another block's shared memory. That block must have
// started, and must not exit before the access: a cluster_sync() is needed before and after.
template <class T>
__device__ __forceinline__ T* in_rank(T* shared, int rank) {
  uint64_t address;
  asm volatile("mapa.u64 %0, %1, %2;"
               : "=l"(address)
               : "l"(reinterpret_cast<uint64_t>(shared)), "r"(rank));
  return reinterpret_cast<T*>(address);
}

#else

constexpr bool kHasClusters = false;

// 0, which the compiler does not know: otherwise it would keep what follows from it in registers.
__device__ __forceinline__ int cluster_rank() {
  int rank;
  asm volatile("mov.u32 %0, 0;" : "=r"(rank));
  return rank;
}
__device__ __forceinline__ int cluster_size() { return 1; }
__device__ __forceinline__ void cluster_arrive() {}
__device__ __forceinline__ void cluster_wait() { __syncthreads(); }
__device__ __forceinline__ void cluster_sync() { __syncthreads(); }

template <class T>
__device__ __forceinline__ T* in_rank(T* shared, int) {
  return shared;
}

#endif

#else

constexpr bool kHasClusters = true;

using testing::cluster_arrive;
using testing::cluster_rank;
using testing::cluster_size;
using testing::cluster_sync;
using testing::cluster_wait;
using testing::in_rank;

#endif

// The logarithm of a cluster's size, or of a part of it: a power of two up to 16.
__device__ __forceinline__ int log2_of(int blocks) {
  return (blocks > 1) + (blocks > 2) + (blocks > 4) + (blocks > 8);
}

// Some of a cluster's blocks: first, first + step and so on.
struct Ranks {
  int first = 0, step = 1;
};

// Stores to the variable in these blocks of the cluster.
template <class V>
__device__ __forceinline__ void store_in_ranks(V* shared, V value, Ranks to = {}) {
  const int ranks = cluster_size();
#pragma unroll 1  // unrolled, this would be most of a kernel's code
  for (int rank = to.first; rank < ranks; rank += to.step) *in_rank(shared, rank) = value;
}

}  // namespace crossvit
