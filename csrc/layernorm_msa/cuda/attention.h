#pragma once

#include "common/cuda/math.h"
#include "common/cuda/pipeline.h"

// What attention's kernels share. A block has 64 rows of one head of one image, queries or keys,
// each of its warps one or two tiles of 16; it walks over all tokens in steps, as keys or queries.
// A head's channels, up to kHeadDim, are padded with zeros in shared memory.

namespace crossvit::layernorm_msa {

constexpr int kRowsOfBlock = 64;
constexpr float kLog2E = 1.4426950408889634f;

template <class T>
struct AttentionParams {
  const T* qkv;          // [B, N, 3, h, d]
  const bool* key_mask;  // [B, N], true: attended to; or null. k and v of others are 0
  T* heads;              // [B, N, h, d]
  float* lse;            // [B, h, N], or null
  const T* dheads;       // [B, N, h, d], for backward, as are those below
  float2* query_terms;   // [B, h, N rounded up to kRowsOfBlock]: lse in base 2, and o . do
  T* dqkv;               // [B, N, 3, h, d]
  int64_t batch;
  int num_tokens, num_heads, head_dim;

  __host__ __device__ int tiles() const { return ceil_div(num_tokens, kRowsOfBlock); }
  // From products of q and k to exponents in base 2.
  __device__ float exponent_scale() const { return kLog2E * scale(); }
  __device__ float scale() const { return 1 / sqrtf(static_cast<float>(head_dim)); }
};

// The head of an image and the rows that are a block's. Grid: images, heads, tiles of rows.
struct BlockOfHead {
  int64_t image, pair;  // pair: image and head
  int head, first, rows;

  template <class T>
  __device__ explicit BlockOfHead(const AttentionParams<T>& a) {
    const int tiles = a.tiles();
    pair = blockIdx.x / tiles;
    first = static_cast<int>(blockIdx.x % tiles) * kRowsOfBlock;
    image = pair / a.num_heads;
    head = static_cast<int>(pair % a.num_heads);
    rows = minimum(a.num_tokens - first, kRowsOfBlock);
  }
};

// One of q, k, v of a head, or of the tensors like them: rows of all tokens, `stride` apart.
template <class E>
struct HeadRows {
  E* data;
  int stride;

  __device__ E* row(int token) const { return data + int64_t{token} * stride; }
};

template <class T, class E>
__device__ HeadRows<E> rows_of_qkv(E* qkv, const AttentionParams<T>& a, const BlockOfHead& block,
                                   int which) {
  const int width = a.num_heads * a.head_dim;
  const int offset = which * width + block.head * a.head_dim;
  return {qkv + block.image * a.num_tokens * 3 * width + offset, 3 * width};
}

template <class T, class E>
__device__ HeadRows<E> rows_of_heads(E* heads, const AttentionParams<T>& a,
                                     const BlockOfHead& block) {
  const int width = a.num_heads * a.head_dim;
  return {heads + block.image * a.num_tokens * width + block.head * a.head_dim, width};
}

// A kernel of attention for heads of up to kWidestHead channels, with kStepRows rows a step.
// kTilesOfWarp: of 16 rows; with two, each operand of a step is read once for both.
// kInRegisters: whether warps keep the block's rows there, as operands, for which floats are too
// many.
template <class E, int kWidestHead, int kStepRows, int kTilesOfWarp,
          bool kInRegisters = sizeof(E) == 2>
struct AttentionPlan {
  using T = E;
  static constexpr int kHeadDim = kWidestHead, kStep = kStepRows, kStages = 3;
  static constexpr int kTiles = kTilesOfWarp, kWarpRows = 16 * kTiles;
  static constexpr int kThreads = kRowsOfBlock / kWarpRows * 32;
  static constexpr bool kRowsInRegisters = kInRegisters;
  static constexpr int kUnits = kHeadDim / 16, kColumnTiles = kHeadDim / 8;
  using RowTile = Tile<T, kRowsOfBlock, kHeadDim>;
  using StepTile = Tile<T, kStep, kHeadDim>;

  // The first row of a warp's tile.
  static __device__ __forceinline__ int first_row(int tile) {
    return warp_index() * kWarpRows + 16 * tile;
  }
  static __device__ void copy_rows(T* tile, const HeadRows<const T>& from, int first, int rows,
                                   int head_dim) {
    RowTile::template copy<kThreads>(tile, from.row(first), from.stride, rows, head_dim);
  }
  static __device__ void copy_step(T* tile, const HeadRows<const T>& from, int first, int rows,
                                   int head_dim) {
    StepTile::template copy<kThreads>(tile, from.row(first), from.stride, rows, head_dim);
  }
};

// A warp's rows as operands: in registers or in shared memory.
template <class P>
class WarpRows {
  using T = typename P::T;
  static constexpr bool kInRegisters = P::kRowsInRegisters;

 public:
  __device__ __forceinline__ explicit WarpRows(const T* tile) : rows_(tile) {}

  // Once the block's rows are there.
  __device__ __forceinline__ void load() {
    if constexpr (kInRegisters) {
#pragma unroll
      for (int i = 0; i < P::kTiles * P::kUnits; ++i) {
        fragments_[i] = from_shared(i / P::kUnits, i % P::kUnits);
      }
    }
  }

  __device__ __forceinline__ FragmentA<T> at(int tile, int unit) const {
    if constexpr (kInRegisters) {
      return fragments_[tile * P::kUnits + unit];
    } else {
      return from_shared(tile, unit);
    }
  }

 private:
  __device__ __forceinline__ FragmentA<T> from_shared(int tile, int unit) const {
    constexpr int kPitch = P::RowTile::kPitch;
    return load_rows(rows_ + P::first_row(tile) * kPitch + 16 * unit, kPitch);
  }

  const T* rows_;
  FragmentA<T> fragments_[kInRegisters ? P::kTiles * P::kUnits : 1];
};

// Sums of 16 rows and 8 kTiles columns in a warp's registers.
template <int kTiles>
struct Sums {
  float of[kTiles][4];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) of[i][j] = 0;
    }
  }
};

// Those of a warp's tiles: with a step's rows, and of a head's channels.
template <class P>
struct StepSums {
  Sums<P::kStep / 8> tile[P::kTiles];
};
template <class P>
struct HeadSums {
  Sums<P::kColumnTiles> tile[P::kTiles];

  __device__ __forceinline__ HeadSums() {
#pragma unroll
    for (auto& sums : tile) sums.clear();
  }
};

// Excludes columns from `count` on from a softmax.
template <int kTiles>
__device__ __forceinline__ void exclude(Sums<kTiles>& s, int count) {
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (8 * j + lane_index() % 4 * 2 + i % 2 >= count) s.of[j][i] = -INFINITY;
    }
  }
}

// Excludes columns whose keys do not exist or are masked.
template <int kTiles>
__device__ __forceinline__ void exclude(Sums<kTiles>& s, int count, const bool* mask) {
  unsigned attended = 0;  // of 32 keys, a bit each
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
    if (j % 4 == 0) {
      const int key = 8 * j + lane_index();
      attended = __ballot_sync(~0u, key < count && mask[key]);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int bit = j % 4 * 8 + lane_index() % 4 * 2 + i % 2;
      if (!(attended >> bit & 1)) s.of[j][i] = -INFINITY;
    }
  }
}

// Excludes the columns of a step that are past the last key or masked.
template <bool kMasked, int kTiles, class T>
__device__ __forceinline__ void exclude_others(Sums<kTiles>& s, const AttentionParams<T>& a,
                                               const BlockOfHead& block, int first) {
  const int count = a.num_tokens - first;
  if constexpr (kMasked) {
    exclude(s, count, a.key_mask + block.image * a.num_tokens + first);
  } else {
    if (count < 8 * kTiles) exclude(s, count);
  }
}

// Products of the warp's rows with the rows of a step: rows of kStep columns.
template <class P>
__device__ __forceinline__ StepSums<P> products_with_step(const WarpRows<P>& rows,
                                                          const typename P::T* step) {
  StepSums<P> sums;
#pragma unroll
  for (auto& tile : sums.tile) tile.clear();
#pragma unroll
  for (int unit = 0; unit < P::kUnits; ++unit) {
    FragmentA<typename P::T> a[P::kTiles];
#pragma unroll
    for (int i = 0; i < P::kTiles; ++i) a[i] = rows.at(i, unit);
#pragma unroll
    for (int j = 0; j < P::kStep / 16; ++j) {
      constexpr int kPitch = P::StepTile::kPitch;
      const auto b = load_columns(step + 16 * j * kPitch + 16 * unit, kPitch);
#pragma unroll
      for (int i = 0; i < P::kTiles; ++i) {
        multiply(sums.tile[i].of[2 * j], a[i], b.side[0]);
        multiply(sums.tile[i].of[2 * j + 1], a[i], b.side[1]);
      }
    }
  }
  return sums;
}

// sums += weights times the rows of a step; weights [.., kStep] as products_with_step() returns
// them, rounded to T.
template <class P>
__device__ __forceinline__ void add_weighted_step(HeadSums<P>& sums, const StepSums<P>& weights,
                                                  const typename P::T* step) {
  using T = typename P::T;
#pragma unroll
  for (int j = 0; j < P::kStep / 16; ++j) {
    FragmentA<T> a[P::kTiles];
#pragma unroll
    for (int i = 0; i < P::kTiles; ++i) {
      const float(&left)[4] = weights.tile[i].of[2 * j];
      const float(&right)[4] = weights.tile[i].of[2 * j + 1];
      a[i] = {{pack<T>(left[0], left[1]), pack<T>(left[2], left[3]), pack<T>(right[0], right[1]),
               pack<T>(right[2], right[3])}};
    }
#pragma unroll
    for (int unit = 0; unit < P::kUnits; ++unit) {
      constexpr int kPitch = P::StepTile::kPitch;
      const auto b = load_transposed_columns(step + 16 * j * kPitch + 16 * unit, kPitch);
#pragma unroll
      for (int i = 0; i < P::kTiles; ++i) {
        multiply(sums.tile[i].of[2 * unit], a[i], b.side[0]);
        multiply(sums.tile[i].of[2 * unit + 1], a[i], b.side[1]);
      }
    }
  }
}

// Stores a warp's tile of 16 rows, times a factor each (of rows g and g + 8): through its rows of
// shared memory, which no other warp reads, so that a lane stores 16 bytes.
template <class P>
__device__ __forceinline__ void store_rows(const Sums<P::kColumnTiles>& sums, float upper,
                                           float lower, int tile, typename P::T* shared,
                                           const HeadRows<typename P::T>& to,
                                           const BlockOfHead& block, int head_dim) {
  using T = typename P::T;
  constexpr int kPitch = P::RowTile::kPitch, kUnit = P::RowTile::kUnit;
  T* const rows = shared + P::first_row(tile) * kPitch;
  T* const from = rows + lane_index() / 4 * kPitch + lane_index() % 4 * 2;
  __syncwarp();
#pragma unroll
  for (int i = 0; i < P::kColumnTiles; ++i) {
    const float(&sum)[4] = sums.of[i];
    store_pair(from + 8 * i, pack<T>(sum[0] * upper, sum[1] * upper));
    store_pair(from + 8 * kPitch + 8 * i, pack<T>(sum[2] * lower, sum[3] * lower));
  }
  __syncwarp();
  constexpr int kUnitsOfRow = P::kHeadDim / kUnit;
#pragma unroll
  for (int i = lane_index(); i < 16 * kUnitsOfRow; i += 32) {
    const int row = i / kUnitsOfRow, column = i % kUnitsOfRow * kUnit;
    const int token = P::first_row(tile) + row;
    if (token >= block.rows || column >= head_dim) continue;
    *reinterpret_cast<uint4*>(to.row(block.first + token) + column) =
        *reinterpret_cast<const uint4*>(rows + row * kPitch + column);
  }
}

}  // namespace crossvit::layernorm_msa
