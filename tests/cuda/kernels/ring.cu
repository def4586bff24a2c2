// A ring of stages filled by bulk copies: one warp issues them, four warps consume them.
#include "common/cuda/async_copy.h"
#include "common/cuda/launch.h"
#include "kernels/check.h"

namespace crossvit {
namespace {

constexpr int kStages = 3, kConsumers = 128, kThreads = kConsumers + 32;
constexpr int kTile = 256;  // floats
constexpr int kTileBytes = kTile * static_cast<int>(sizeof(float));
constexpr int kBarrierBytes = 128;  // keeps the stages aligned
constexpr int kShared = kBarrierBytes + kStages * kTileBytes;

// out[i] = sum over tiles of (tile + 1) x[tile][i]
__global__ void __launch_bounds__(kThreads) weighted_sum(const float* x, float* out, int tiles) {
  CROSSVIT_DYNAMIC_SHARED(memory);
  auto* full = reinterpret_cast<uint64_t*>(memory);
  uint64_t* empty = full + kStages;
  auto* stages = reinterpret_cast<float*>(memory + kBarrierBytes);
  const int thread = static_cast<int>(threadIdx.x);
  x += int64_t(blockIdx.x) * tiles * kTile;
  out += int64_t(blockIdx.x) * kTile;

  if (thread == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      barrier_init(full + stage, 1);
      barrier_init(empty + stage, kConsumers);
    }
    barrier_init_visible();
  }
  __syncthreads();

  if (thread >= kConsumers) {
    if (thread != kConsumers) return;
    for (int tile = 0; tile < tiles; ++tile) {
      const int stage = tile % kStages, round = tile / kStages;
      barrier_wait(empty + stage, round % 2 ^ 1);
      barrier_expect_bytes(full + stage, kTileBytes);
      // Two copies, so that a phase may end between them.
      for (int half = 0; half < 2; ++half) {
        const int first = half * kTile / 2;
        copy_bulk(stages + stage * kTile + first, x + int64_t(tile) * kTile + first, kTileBytes / 2,
                  full + stage);
      }
    }
    return;
  }
  float sums[kTile / kConsumers] = {};
  for (int tile = 0; tile < tiles; ++tile) {
    const int stage = tile % kStages, round = tile / kStages;
    barrier_wait(full + stage, round % 2);
    for (int i = 0; i < kTile / kConsumers; ++i) {
      // Tiles are read mirrored, so not by the thread that runs first.
      sums[i] += (tile + 1) * stages[stage * kTile + kTile - 1 - (thread + i * kConsumers)];
    }
    barrier_arrive(empty + stage);
  }
  for (int i = 0; i < kTile / kConsumers; ++i) {
    out[kTile - 1 - (thread + i * kConsumers)] = sums[i];
  }
}

}  // namespace

bool check_kernel() {
  const int blocks = 2, tiles = 8;
  Numbers numbers;
  const auto x = numbers.float32(blocks * tiles * kTile);
  std::vector<float> out(blocks * kTile);
  const LaunchConfig config{blocks, kThreads, kShared};
  if (launch(weighted_sum, config, x.data(), out.data(), tiles) != cudaSuccess) return false;
  Error error;
  for (int block = 0; block < blocks; ++block) {
    for (int i = 0; i < kTile; ++i) {
      double sum = 0;
      for (int tile = 0; tile < tiles; ++tile) {
        sum += (tile + 1.0) * x[(block * tiles + tile) * kTile + i];
      }
      error.add(out[block * kTile + i], sum);
    }
  }
  return error.below(1e-5);
}

}  // namespace crossvit
