// Asynchronous copies from global to shared memory, and the barriers that they signal. Everything
// from barrier_init on needs sm_90; it traps on older devices.
#pragma once

#include "common/cuda/gpu.h"

namespace crossvit {

#ifdef __CUDACC__

// Copies 16 bytes between 16-byte-aligned addresses, or writes zeros if `bytes` (0 or 16) is 0.
__device__ __forceinline__ void copy_async_16(void* shared, const void* global, int bytes = 16) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
               "l"(__cvta_generic_to_global(global)), "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void copy_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most kPending of the thread's committed groups are in flight.
template <int kPending>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

__device__ __forceinline__ void barrier_init(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals)
               : "memory");
}

// Makes initialized barriers visible to copies and to the cluster's other blocks. The block's own
// threads still need a __syncthreads().
__device__ __forceinline__ void barrier_init_visible() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Arrives, and makes the phase wait for `bytes` bytes of copies.
__device__ __forceinline__ void barrier_expect_bytes(uint64_t* barrier, int bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}

__device__ __forceinline__ void barrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
}

// Waits for the phase of this parity to complete; the first phase has parity 0.
__device__ __forceinline__ void barrier_wait(uint64_t* barrier, int parity) {
  uint32_t complete = 0;
  while (!complete) {
    asm volatile(
        "{\n.reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}"
        : "=r"(complete)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
  }
}

// Addresses and size must be multiples of 16, and the barrier's phase must expect the bytes.
__device__ __forceinline__ void copy_bulk(void* shared, const void* global, int bytes,
                                          uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(shared_address(shared)),
      "l"(__cvta_generic_to_global(global)), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
}

// Orders the threads' accesses to shared memory before those of later bulk copies.
__device__ __forceinline__ void fence_async_proxy() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

#else

__device__ __forceinline__ void barrier_init(uint64_t*, int) { __trap(); }
__device__ __forceinline__ void barrier_init_visible() { __trap(); }
__device__ __forceinline__ void barrier_expect_bytes(uint64_t*, int) { __trap(); }
__device__ __forceinline__ void barrier_arrive(uint64_t*) { __trap(); }
__device__ __forceinline__ void barrier_wait(uint64_t*, int) { __trap(); }
__device__ __forceinline__ void copy_bulk(void*, const void*, int, uint64_t*) { __trap(); }
__device__ __forceinline__ void fence_async_proxy() { __trap(); }

#endif

#else

using testing::barrier_arrive;
using testing::barrier_expect_bytes;
using testing::barrier_init;
using testing::barrier_init_visible;
using testing::barrier_wait;
using testing::copy_async_16;
using testing::copy_async_commit;
using testing::copy_async_wait;
using testing::copy_bulk;
using testing::fence_async_proxy;

#endif

}  // namespace crossvit
