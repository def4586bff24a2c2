// Tiles of rows in shared memory, and loops over them whose copies run ahead.
#pragma once

#include "common/cuda/async_copy.h"
#include "common/cuda/warp.h"

namespace crossvit {

// Calls use(step, stage) for steps 0, 1, ..., with what copy(step, stage) has issued in shared
// memory. Copies are kStages - 1 steps ahead. One barrier a step is enough: it is between a step's
// arrival and its use, and between a stage's last use and its refill. Called by a block, which
// synchronizes before it reuses the stages.
template <int kStages, class Copy, class Use>
__device__ __forceinline__ void pipelined(int steps, Copy copy, Use use) {
#pragma unroll
  for (int step = 0; step < kStages - 1; ++step) {
    if (step < steps) copy(step, step);
    copy_async_commit();
  }
  int stage = 0, refilled = kStages - 1;
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    copy_async_wait<kStages - 2>();
    __syncthreads();
    if (step + kStages - 1 < steps) copy(step + kStages - 1, refilled);
    copy_async_commit();
    use(step, stage);
    stage = stage + 1 < kStages ? stage + 1 : 0;
    refilled = refilled + 1 < kStages ? refilled + 1 : 0;
  }
}

// A tile of kRows rows of kColumns elements in shared memory. Its pitch puts the 16-byte units that
// ldmatrix reads, and the pairs of floats that lanes read, into different banks.
template <class T, int kTileRows, int kTileColumns>
struct Tile {
  static constexpr int kRows = kTileRows;
  static constexpr int kColumns = kTileColumns;
  static constexpr int kPitch = kColumns + 8;
  static constexpr int kSize = kRows * kPitch;  // in elements
  static constexpr int kUnit = 16 / sizeof(T);  // elements of a copy

  // Issues the copies of `rows` rows of `columns` elements, `stride` apart, by kThreads threads;
  // zeros follow them. Columns are a multiple of 8, rows are aligned to 16 bytes.
  template <int kThreads>
  static __device__ __forceinline__ void copy(T* tile, const T* from, int stride, int rows,
                                              int columns) {
    constexpr int kUnits = kColumns / kUnit;
    constexpr int kCopies = kRows * kUnits / kThreads;
    static_assert(kRows * kUnits % kThreads == 0 && kThreads % kUnits == 0);
    const int row = thread_index() / kUnits, column = thread_index() % kUnits * kUnit;
    T* to = tile + row * kPitch + column;
    const T* source = from + row * stride + column;
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      constexpr int kStep = kThreads / kUnits;
      const bool exists = row + i * kStep < rows && column < columns;
      copy_async_16(to + i * kStep * kPitch, exists ? source + i * kStep * stride : from,
                    exists ? 16 : 0);
    }
  }
};

}  // namespace crossvit
