#include "common/cuda/linear.h"

#include "common/cuda/dispatch.h"
#include "common/cuda/four_floats.h"
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
  // The result passes through shared memory, from fragments to lines: a warp's rows of floats, of
  // which the four of a store are in different banks.
  static constexpr int kResultPitch = kWarpColumns + 8;
  static constexpr int kResultFloats = kWarpRows * kResultPitch;
  static_assert(kThreads / 32 * kResultFloats * static_cast<int>(sizeof(float)) <= kSharedBytes);
  // Two blocks on a multiprocessor, for which a float's operands take too many registers.
  static constexpr int kBlocks = sizeof(T) == 2 ? 2 : 1;

  // The first row and column of a block's tile. Blocks that run at once share rows in L2.
  struct First {
    int row, column;
  };
  static __device__ __forceinline__ First tile(const LinearParams<T>& params, int block) {
    const int column_tiles = ceil_div(params.columns, kColumns);
    return {block / column_tiles * kRows, block % column_tiles * kColumns};
  }

  static int64_t blocks(const LinearParams<T>& params) {
    return int64_t{ceil_div(params.rows, kRows)} * ceil_div(params.columns, kColumns);
  }
};

// What follows the products, for four columns of rows.
template <class T, Linear kKind, class Function>
class LinearEnd {
 public:
  __device__ __forceinline__ LinearEnd(const LinearParams<T>& a, int column, Function function)
      : a_(a), column_(column), function_(function) {
    if constexpr (!LinearPlan<T, kKind>::kIsTransposed) {
      if (a.bias.data) bias_ = a.bias.load_4(column);
    }
    if constexpr (kKind == Linear::kForward) {
      if (a.layer_scale.data) layer_scale_ = a.layer_scale.load_4(column);
    }
  }

  // What is loaded for a row: its residual, or the hidden units before the activation.
  struct Row {
    uint4 bits = {0, 0, 0, 0};
    float scale = 1;
  };

  __device__ __forceinline__ Row load(int row) const {
    Row loaded;
    if constexpr (kKind == Linear::kForward) {
      if (a_.x.x.data) loaded.bits = a_.x[row].load_bits_4(column_);
      if (a_.scale) loaded.scale = a_.scale[a_.x.image(row)];
    }
    if constexpr (kKind == Linear::kActivationBackward) {
      loaded.bits = hidden().load_bits_4(index(row));
    }
    return loaded;
  }

  __device__ __forceinline__ void store(int row, float4 y, const Row& loaded) const {
    if constexpr (!LinearPlan<T, kKind>::kIsTransposed) y = y + bias_;
    if constexpr (kKind == Linear::kForward) {
      if (a_.x.x.data) y = a_.x.x.four(loaded.bits) + y * (layer_scale_ * loaded.scale);
    }
    if constexpr (kKind == Linear::kActivation) {
      y = apply_to_four(y, [&](float h) { return function_.template at<T>(h).value(); });
    }
    if constexpr (kKind == Linear::kActivationBackward) {
      float4 values;
      const auto slope = [&](float h, float& value) {
        const auto f = function_.template at<T>(h);
        value = f.value();
        return f.slope();
      };
      const float4 h = hidden().four(loaded.bits);
      y = y * make_float4(slope(h.x, values.x), slope(h.y, values.y), slope(h.z, values.z),
                          slope(h.w, values.w));
      MutableElements<T>{a_.hidden, false}.store_4(index(row), values);
    }
    a_.out.store_4(index(row), y);
  }

 private:
  __device__ __forceinline__ int64_t index(int row) const {
    return int64_t{row} * a_.columns + column_;
  }
  __device__ __forceinline__ Elements<T> hidden() const { return {a_.hidden, false}; }

  const LinearParams<T>& a_;
  int column_;
  Function function_;
  float4 bias_ = {0, 0, 0, 0}, layer_scale_ = {1, 1, 1, 1};
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
#pragma unroll 2
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

  // Writes the result, the block's rows and columns from these on, by way of shared memory of the
  // warp.
  __device__ __forceinline__ void write(const LinearParams<T>& a, int row, int column,
                                        float* memory) const {
    const int group = lane_index() / 4, pair = lane_index() % 4 * 2;
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int j = 0; j < kColumnTiles; ++j) {
        float* to = memory + (16 * i + group) * Plan::kResultPitch + 8 * j + pair;
        const float(&s)[4] = sum[i][j];
        *reinterpret_cast<float2*>(to) = make_float2(s[0], s[1]);
        *reinterpret_cast<float2*>(to + 8 * Plan::kResultPitch) = make_float2(s[2], s[3]);
      }
    }
    __syncwarp();
    row += first_row(), column += first_column();
    if constexpr (kKind == Linear::kActivation || kKind == Linear::kActivationBackward) {
      if (a.gate.linear != 0) return write_lines(a, row, column, memory, a.gate);
    }
    write_lines(a, row, column, memory, ExactGelu());
  }

 private:
  template <class Function>
  static __device__ __forceinline__ void write_lines(const LinearParams<T>& a, int row, int column,
                                                     const float* memory, Function function) {
    constexpr int kLanes = Plan::kWarpColumns / 4, kRowsAtOnce = 32 / kLanes;
    constexpr int kLoads = 8;  // in flight
    const int lane = lane_index() % kLanes;
    column += 4 * lane;
    if (column >= a.columns) return;
    const LinearEnd<T, kKind, Function> end(a, column, function);
    using Row = typename LinearEnd<T, kKind, Function>::Row;
#pragma unroll 1
    for (int first = lane_index() / kLanes; first < Plan::kWarpRows;
         first += kLoads * kRowsAtOnce) {
      Row loaded[kLoads];
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        const int of_warp = first + i * kRowsAtOnce;
        if (row + of_warp < a.rows) loaded[i] = end.load(row + of_warp);
      }
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        const int of_warp = first + i * kRowsAtOnce;
        const float* from = memory + of_warp * Plan::kResultPitch + 4 * lane;
        const float4 y = *reinterpret_cast<const float4*>(from);
        if (row + of_warp < a.rows) end.store(row + of_warp, y, loaded[i]);
      }
    }
  }
};

// Grid: tiles of columns, then of rows.
template <class T, Linear kKind>
__global__ void __launch_bounds__(LinearPlan<T, kKind>::kThreads, LinearPlan<T, kKind>::kBlocks)
    linear_kernel(const LinearParams<T> a) {
  using Plan = LinearPlan<T, kKind>;
  CROSSVIT_DYNAMIC_SHARED(memory);
  T* const stages = reinterpret_cast<T*>(memory);
  const auto first = Plan::tile(a, static_cast<int>(blockIdx.x));
  const int first_row = first.row, first_column = first.column;
  const int rows = minimum(a.rows - first_row, Plan::kRows);
  const int columns = minimum(a.columns - first_column, Plan::kColumns);

  LinearSums<T, kKind> sums;
  pipelined<Plan::kStages>(
      ceil_div(a.terms, Plan::kTerms),
      [&](int step, int stage) {
        const int k = step * Plan::kTerms, terms = minimum(a.terms - k, Plan::kTerms);
        T* const tile = stages + stage * Plan::kStageSize;
        Plan::RowTile::template copy<Plan::kThreads>(tile, a.a + int64_t{first_row} * a.terms + k,
                                                     a.terms, rows, terms);
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
  __syncthreads();
  const auto result = Plan::tile(a, used_from_here(static_cast<int>(blockIdx.x)));
  sums.write(a, result.row, result.column,
             reinterpret_cast<float*>(memory) + warp_index() * Plan::kResultFloats);
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
