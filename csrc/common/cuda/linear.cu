#include "common/cuda/linear.h"

#include "common/cuda/dispatch.h"
#include "common/cuda/pipeline.h"

namespace crossvit {
namespace {

// A block computes 128 x 128 elements of the result, each of its eight warps 32 x 64. The terms of
// a step are 128 bytes of a row.
template <class T, Linear kKind>
struct LinearPlan {
  static constexpr bool kIsTransposed =
      kKind == Linear::kBackward || kKind == Linear::kActivationBackward;
  static constexpr int kRows = 128, kColumns = 128, kTerms = 128 / sizeof(T);
  static constexpr int kThreads = 256, kStages = 3;
  static constexpr int kWarpRows = 32, kWarpColumns = 64;
  static constexpr int kRowWarps = kRows / kWarpRows;
  using RowTile = Tile<T, kRows, kTerms>;
  using WeightTile =
      std::conditional_t<kIsTransposed, Tile<T, kTerms, kColumns>, Tile<T, kColumns, kTerms>>;
  static constexpr int kStageSize = RowTile::kSize + WeightTile::kSize;
  static constexpr int kSharedBytes = kStages * kStageSize * static_cast<int>(sizeof(T));
  // Two blocks on a multiprocessor, for which a float's operands take too many registers.
  static constexpr int kBlocks = sizeof(T) == 2 ? 2 : 1;

  static int64_t blocks(const LinearParams<T>& params) {
    return ceil_div(params.rows, kRows) * ceil_div(params.columns, kColumns);
  }
};

// What is applied to the update of a residual.
struct NoLayerScale {
  __device__ __forceinline__ float2 operator()(float2 update, int) const { return update; }
};

template <class T>
struct LayerScale {
  Elements<T> scale;

  __device__ __forceinline__ float2 operator()(float2 update, int column) const {
    const float2 s = scale.load_2(column);
    return make_float2(update.x * s.x, update.y * s.y);
  }
};

// A warp's share of a block's result.
template <class T, Linear kKind>
struct LinearSums {
  using Plan = LinearPlan<T, kKind>;
  static constexpr int kRowTiles = Plan::kWarpRows / 16, kColumnTiles = Plan::kWarpColumns / 8;
  float sum[kRowTiles][kColumnTiles][4] = {};

  static __device__ __forceinline__ int first_row() {
    return warp_index() % Plan::kRowWarps * Plan::kWarpRows;
  }
  static __device__ __forceinline__ int first_column() {
    return warp_index() / Plan::kRowWarps * Plan::kWarpColumns;
  }

  // Adds the products of a step.
  __device__ __forceinline__ void add(const T* rows, const T* weight) {
    using RowTile = typename Plan::RowTile;
    using WeightTile = typename Plan::WeightTile;
#pragma unroll
    for (int k = 0; k < Plan::kTerms; k += 16) {
      FragmentA<T> a[kRowTiles];
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
        a[i] = load_rows(rows + (first_row() + 16 * i) * RowTile::kPitch + k, RowTile::kPitch);
      }
#pragma unroll
      for (int j = 0; j < kColumnTiles; j += 2) {
        const int column = first_column() + 8 * j;
        ColumnsOfB<T> b;
        if constexpr (Plan::kIsTransposed) {
          b = load_transposed_columns(weight + k * WeightTile::kPitch + column, WeightTile::kPitch);
        } else {
          b = load_columns(weight + column * WeightTile::kPitch + k, WeightTile::kPitch);
        }
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) {
          multiply(sum[i][j], a[i], b.side[0]);
          multiply(sum[i][j + 1], a[i], b.side[1]);
        }
      }
    }
  }

  // Writes the result, the block's rows and columns from these on.
  __device__ __forceinline__ void write(const LinearParams<T>& a, int64_t row, int column) const {
    if constexpr (kKind == Linear::kActivation || kKind == Linear::kActivationBackward) {
      if (a.gate.linear != 0) return write(a, row, column, a.gate);
    }
    if constexpr (kKind == Linear::kForward) {
      if (a.layer_scale.data) return write(a, row, column, LayerScale<T>{a.layer_scale});
    }
    write(a, row, column, std::conditional_t<kKind == Linear::kForward, NoLayerScale, ExactGelu>());
  }

 private:
  template <class Function>
  __device__ __forceinline__ void write(const LinearParams<T>& a, int64_t block_row,
                                        int block_column, Function function) const {
    const int group = lane_index() / 4, pair = lane_index() % 4 * 2;
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t row = block_row + first_row() + 16 * i + 8 * half + group;
        if (row >= a.rows) continue;
        const RowEnd end(a, row);
#pragma unroll
        for (int j = 0; j < kColumnTiles; ++j) {
          const int column = block_column + first_column() + 8 * j + pair;
          if (column >= a.columns) continue;
          const float2 y = make_float2(sum[i][j][2 * half], sum[i][j][2 * half + 1]);
          a.out.store_2(row * a.columns + column, end(y, column, function));
        }
      }
    }
  }

  // What follows the products of a row.
  struct RowEnd {
    __device__ __forceinline__ RowEnd(const LinearParams<T>& a, int64_t row) : bias(a.bias) {
      if constexpr (kKind == Linear::kForward) {
        if (a.x.x.data) x = a.x[row];
        if (a.scale) scale = a.scale[row / a.x.num_tokens];
      }
      if constexpr (kKind == Linear::kActivationBackward) hidden = a.hidden + row * a.columns;
    }

    template <class Function>
    __device__ __forceinline__ float2 operator()(float2 y, int column, Function function) const {
      if constexpr (kKind == Linear::kActivationBackward) {
        const float2 h = unpack<T>(load_pair(hidden + column));
        const auto first = function.template at<T>(h.x), second = function.template at<T>(h.y);
        store_pair(hidden + column, pack<T>(first.value(), second.value()));
        return make_float2(y.x * first.slope(), y.y * second.slope());
      }
      if constexpr (Plan::kIsTransposed) return y;
      if (bias.data) {
        const float2 b = bias.load_2(column);
        y = make_float2(y.x + b.x, y.y + b.y);
      }
      if constexpr (kKind == Linear::kActivation) {
        return make_float2(function.template at<T>(y.x).value(),
                           function.template at<T>(y.y).value());
      }
      if (x.data) {
        const float2 residual = x.load_2(column);
        if constexpr (kKind == Linear::kForward) y = function(y, column);
        y = make_float2(fmaf(scale, y.x, residual.x), fmaf(scale, y.y, residual.y));
      }
      return y;
    }

    Elements<T> bias, x = {nullptr, false};
    float scale = 1;
    T* hidden = nullptr;
  };
};

// Grid: tiles of columns, then of rows, so that blocks that run at once share rows in L2.
template <class T, Linear kKind>
__global__ void __launch_bounds__(LinearPlan<T, kKind>::kThreads, LinearPlan<T, kKind>::kBlocks)
    linear_kernel(const LinearParams<T> a) {
  using Plan = LinearPlan<T, kKind>;
  CROSSVIT_DYNAMIC_SHARED(memory);
  T* const stages = reinterpret_cast<T*>(memory);
  const int column_tiles = ceil_div(a.columns, Plan::kColumns);
  const int64_t first_row = int64_t{blockIdx.x} / column_tiles * Plan::kRows;
  const int first_column = static_cast<int>(blockIdx.x % column_tiles) * Plan::kColumns;
  const int rows = static_cast<int>(minimum(a.rows - first_row, int64_t{Plan::kRows}));
  const int columns = minimum(a.columns - first_column, Plan::kColumns);

  LinearSums<T, kKind> sums;
  pipelined<Plan::kStages>(
      ceil_div(a.terms, Plan::kTerms),
      [&](int step, int stage) {
        const int k = step * Plan::kTerms, terms = minimum(a.terms - k, Plan::kTerms);
        T* const tile = stages + stage * Plan::kStageSize;
        Plan::RowTile::template copy<Plan::kThreads>(tile, a.a + first_row * a.terms + k, a.terms,
                                                     rows, terms);
        T* const weight = tile + Plan::RowTile::kSize;
        if constexpr (Plan::kIsTransposed) {
          Plan::WeightTile::template copy<Plan::kThreads>(
              weight, a.weight + int64_t{k} * a.columns + first_column, a.columns, terms, columns);
        } else {
          Plan::WeightTile::template copy<Plan::kThreads>(
              weight, a.weight + int64_t{first_column} * a.terms + k, a.terms, columns, terms);
        }
      },
      [&](int, int stage) {
        const T* tile = stages + stage * Plan::kStageSize;
        sums.add(tile, tile + Plan::RowTile::kSize);
      });
  sums.write(a, first_row, first_column);
}

}  // namespace

template <Linear kKind, class T>
void linear(const LinearParams<T>& params, cudaStream_t stream) {
  using Plan = LinearPlan<T, kKind>;
  const LaunchConfig config =
      launch_config(Plan::blocks(params), Plan::kThreads, Plan::kSharedBytes, stream);
  check_launch(launch(linear_kernel<T, kKind>, config, params), "linear");
}

#define CROSSVIT_LINEAR(T)                                                            \
  template void linear<Linear::kForward, T>(const LinearParams<T>&, cudaStream_t);    \
  template void linear<Linear::kActivation, T>(const LinearParams<T>&, cudaStream_t); \
  template void linear<Linear::kBackward, T>(const LinearParams<T>&, cudaStream_t);   \
  template void linear<Linear::kActivationBackward, T>(const LinearParams<T>&, cudaStream_t);
CROSSVIT_LINEAR(float)
CROSSVIT_LINEAR(bf16)
CROSSVIT_LINEAR(half)
#undef CROSSVIT_LINEAR

}  // namespace crossvit
