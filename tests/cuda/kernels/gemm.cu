// y = x w^T in bfloat16: tiles of 64x64, k in steps of 64, two stages of cp.async, four warps.
#include "common/cuda/async_copy.h"
#include "common/cuda/launch.h"
#include "common/cuda/mma.h"
#include "kernels/check.h"

namespace crossvit {
namespace {

constexpr int kTile = 64, kThreads = 128;
constexpr int kStride = kTile + 8;  // of a shared row: conflict-free ldmatrix
constexpr int kShared = 2 * 2 * kTile * kStride * static_cast<int>(sizeof(__nv_bfloat16));

__global__ void __launch_bounds__(kThreads)
    gemm(const __nv_bfloat16* x, const __nv_bfloat16* w, __nv_bfloat16* y, int m, int n, int k) {
  CROSSVIT_DYNAMIC_SHARED(memory);
  auto* stages = reinterpret_cast<__nv_bfloat16*>(memory);
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const int row0 = static_cast<int>(blockIdx.x) * kTile,
            column0 = static_cast<int>(blockIdx.y) * kTile;

  const auto load = [&](int stage, int k0) {
    __nv_bfloat16* a = stages + stage * 2 * kTile * kStride;
    __nv_bfloat16* b = a + kTile * kStride;
    for (int chunk = thread; chunk < kTile * 8; chunk += kThreads) {
      const int row = chunk / 8, column = chunk % 8 * 8;
      const bool inside = row0 + row < m;
      const int safe_row = inside ? row0 + row : 0;
      copy_async_16(a + row * kStride + column, x + int64_t(safe_row) * k + k0 + column,
                    inside ? 16 : 0);
      copy_async_16(b + row * kStride + column, w + int64_t(column0 + row) * k + k0 + column);
    }
    copy_async_commit();
  };

  float sums[8][4] = {};
  load(0, 0);
  for (int k0 = 0, stage = 0; k0 < k; k0 += kTile, stage ^= 1) {
    if (k0 + kTile < k) {
      load(stage ^ 1, k0 + kTile);
    } else {
      copy_async_commit();
    }
    copy_async_wait<1>();
    __syncthreads();  // the stage is there
    const __nv_bfloat16* a = stages + stage * 2 * kTile * kStride;
    const __nv_bfloat16* b = a + kTile * kStride;
    for (int step = 0; step < kTile; step += 16) {
      uint32_t rows[4];
      load_matrix_x4(rows, a + (warp * 16 + lane % 16) * kStride + step + lane / 16 * 8);
      for (int tile = 0; tile < 8; tile += 2) {
        uint32_t columns[4];
        const int row = tile * 8 + lane % 8 + lane / 16 * 8;
        load_matrix_x4(columns, b + row * kStride + step + lane / 8 % 2 * 8);
        const uint32_t left[2] = {columns[0], columns[1]}, right[2] = {columns[2], columns[3]};
        mma_16x8x16<__nv_bfloat16>(sums[tile], rows, left);
        mma_16x8x16<__nv_bfloat16>(sums[tile + 1], rows, right);
      }
    }
    __syncthreads();  // the stage may be refilled
  }
  for (int tile = 0; tile < 8; ++tile) {
    for (int half = 0; half < 2; ++half) {
      const int row = row0 + warp * 16 + lane / 4 + 8 * half;
      const int column = column0 + tile * 8 + lane % 4 * 2;
      if (row >= m) continue;
      *reinterpret_cast<__nv_bfloat162*>(y + int64_t(row) * n + column) =
          __floats2bfloat162_rn(sums[tile][2 * half], sums[tile][2 * half + 1]);
    }
  }
}

}  // namespace

bool check_kernel() {
  const int m = 100, n = 128, k = 192;
  Numbers numbers;
  const auto x = numbers.bfloat16(m * k), w = numbers.bfloat16(n * k);
  std::vector<__nv_bfloat16> y(m * n);
  const LaunchConfig config{dim3((m + kTile - 1) / kTile, n / kTile), kThreads, kShared};
  if (launch(gemm, config, x.data(), w.data(), y.data(), m, n, k) != cudaSuccess) return false;
  Error error;
  for (int i = 0; i < m; ++i) {
    for (int j = 0; j < n; ++j) {
      double sum = 0;
      for (int l = 0; l < k; ++l) {
        sum += double(__bfloat162float(x[i * k + l])) * __bfloat162float(w[j * k + l]);
      }
      error.add(__bfloat162float(y[i * n + j]), sum);
    }
  }
  return error.below(0.01);
}

}  // namespace crossvit
