// The subset of CUDA that this project's kernels use, on a CPU, for tests of their results.
//
// Every CUDA thread is a fiber. The blocks of a cluster run at the same time, clusters one after
// another. A thread runs until it waits; CROSSVIT_SHIM_SEED=n, read at each launch, chooses at
// random which thread runs next, in which order clusters run and which asynchronous copies arrive
// early. docs/cuda_on_cpu.md describes which faults are detected and how.
//
// Not modelled:
//   * time, occupancy, registers, bank conflicts, coalescing;
//   * weak memory: accesses happen in program order, and proxies need no fences;
//   * races, except in their effect on the order that runs: ThreadSanitizer finds those;
//   * divergence of a warp's lanes: every warp operation synchronizes them, though ThreadSanitizer
//     sees an order only for __syncwarp;
//   * the hardware's order of summation in mma, and its approximate functions;
//   * polling of memory: a thread yields only when it waits;
//   * __shared__ variables, textures, dynamic parallelism, wgmma, tensor maps, float atomics;
//   * more than one launch at a time; a launch is complete when launch() returns.
#pragma once

// Selects a kernel's newest path, unless a test defines another.
#ifndef __CUDA_ARCH__
#define __CUDA_ARCH__ 900
#endif

#include "shim/async.h"
#include "shim/grid.h"
#include "shim/matrix.h"
#include "shim/numbers.h"
#include "shim/sync.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)

#define CROSSVIT_DYNAMIC_SHARED(name) char* const name = ::crossvit::testing::dynamic_shared()

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
