#pragma once

#include "attention_core/cuda/statistics.h"
#include "common/cuda/math.h"

namespace crossvit::attention_core {

constexpr float kLog2e = 1.4426950408889634f;

// Scores of a tile's tokens against kSets matrices of rows (u, or dm and u), with the statistics of
// LayerNorm from the same read, or from a second one where a mean is far above the spread.
// kAlone: see TokenPass.
template <class P, int kSets, bool kAlone>
class TileScores {
 public:
  using T = typename P::Element;

  // Float tokens have no precision to spare: they are centred before the products.
  static constexpr bool kCentre = sizeof(T) == 4;
  static constexpr int kRows = P::kRows;
  static constexpr int kSums = kSets * kRows;
  static constexpr int kOperands = ceil_div(kSums, 16);  // of 16 rows, which the sets share
  // One warp's partials of a tile where warps share it: three floats and the scores per token.
  static constexpr int kFloats = P::kWarpsShareTiles ? (3 + kSums) * P::kTokens : 0;
  static constexpr int kBuffers = 2;
  // Whether a row of ones lies behind the rows, for all the rows that an operand has besides them:
  // it then comes from one load, where registers would be moved to a copy of it.
  static constexpr bool kOnesInMemory =
      kAlone && kSets == 1 && P::kRowGroups == 1 && sizeof(T) == 2;

  // Whether a warp sums the rows for itself, as products with ones: no barrier, and no reduction.
  static constexpr bool kSumsOwnRows = !kAlone && kSets == 1 && !P::kWarpsShareTiles;

  __host__ __device__ static int bytes(int channels, int warp_groups) {
    const int sums = kSumsOwnRows ? 0 : kSums;
    const int floats = (warp_groups * kBuffers * kFloats + sums) * P::group_warps(channels);
    return floats * static_cast<int>(sizeof(float));
  }

  // rows: [kSums, row_pitch] in shared memory.
  __device__ TileScores(char* memory, const T* rows, int channels, Slice slice, float eps,
                        bool normalize)
      : partials_(reinterpret_cast<float*>(memory)),
        row_sums_(partials_ + block_warps() * kBuffers * kFloats),
        rows_(rows),
        channels_(channels),
        slice_(slice),
        inverse_channels_(inverse(channels)),
        inverse_width_(inverse(slice.units * 16)),
        // From a lane: else the compiler would convert the parameter, a double, in each tile.
        eps_(__shfl_sync(~0u, eps, 0)),
        normalize_(normalize) {}

  // Where a warp has all channels: notes the sum of a rounded row of a set. By one lane.
  __device__ void set_row_sum(int set, int row, float sum) { row_sums_[set * kRows + row] = sum; }

  // Else sums the rounded rows over each slice. Called by all threads; the caller then
  // synchronizes, but for kSumsOwnRows.
  __device__ void sum_rows() {
    if constexpr (kSumsOwnRows) {
      own_row_sum_ = sum_of_own_row();
      return;
    }
    const int pitch = P::row_pitch(channels_);
    for (int i = warp_index(); i < P::group_warps(channels_) * kSums; i += block_warps()) {
      const int group_lane = i / kSums, row = i % kSums;
      const Slice slice = slice_of(group_lane);
      const T* from = rows_ + row * pitch + slice.first;
      float2 sums = {0, 0};
#pragma unroll 2
      for (int c = 4 * lane_index(); c < slice.units * 16; c += 128) {
        const float2 low = unpack<T>(load_pair(from + c)),
                     high = unpack<T>(load_pair(from + c + 2));
        sums.x += low.x + high.x;
        sums.y += low.y + high.y;
      }
      const float sum = sum_of_warp(sums.x + sums.y);
      if (lane_index() == 0) row_sums_[i] = sum;
    }
  }

  __device__ void use_rows(const T* rows) { rows_ = rows; }

  // The sum of a row over all channels.
  __device__ float row_sum(int row) const {
    float sum = 0;
    for (int i = 0; i < P::group_warps(channels_); ++i) sum += row_sums_[i * kSums + row];
    return sum;
  }

  // Computes scores[set][group][i] of row 8 group + g and the i-th of the lane's tokens: those of
  // xhat, 0 if the token is not attended to. Synchronizes the warp group.
  __device__ void compute(const T* tile, int iteration, uint32_t attended,
                          float (&scores)[kSets][P::kRowGroups][4], TokenStatistics& stats) {
    Products products = {};
    SliceStatistics slice;
    if constexpr (kCentre) {
      slice = multiply_floats(tile, products);
    } else {
      slice = multiply_pairs(tile, attended, products);
    }
    if constexpr (P::kWarpsShareTiles) {
      store_partials(partials_of(warp_index(), iteration), slice, products);
      P::sync_warp_group(channels_);
      combine_partials(iteration, attended, scores, stats);
    } else {
      finish(slice, attended, products, scores, stats);
    }
  }

 private:
  __device__ float* partials_of(int warp, int iteration) const {
    return partials_ + (warp * kBuffers + iteration % kBuffers) * kFloats;
  }

  // The sum of row g.
  __device__ float sum_of_own_row() const {
    const FragmentA<T> ones = {kOnes<T>, kOnes<T>, kOnes<T>, kOnes<T>};
    const int pitch = P::row_pitch(channels_);
    float sums[4][4] = {};  // so that products wait less for the ones before
    slice_.template for_each_group<round_up(P::kUnits / 2, 2)>([&](int first, auto count) {
      constexpr int kCount = decltype(count)::value;
      static_assert(kCount == 1 || kCount % 2 == 0);
      const T* from = rows_ + slice_.first + first * 16;
      if constexpr (kCount == 1) {
        multiply(sums[0], ones, load_8_columns(from, pitch));
      } else {
        TwoSteps<T> rows[kCount / 2];
#pragma unroll
        for (int i = 0; i < kCount / 2; ++i) rows[i] = load_8_columns_twice(from + 32 * i, pitch);
#pragma unroll
        for (int i = 0; i < kCount; ++i) multiply(sums[i % 4], ones, rows[i / 2].step[i % 2]);
      }
    });
    // Lane t has those of rows 2 t and 2 t + 1.
    const int g = lane_index() / 4;
    float pair[2];
    for (int i = 0; i < 2; ++i) {
      pair[i] = __shfl_sync(~0u, sums[0][i] + sums[1][i] + (sums[2][i] + sums[3][i]), g / 2);
    }
    return g % 2 ? pair[1] : pair[0];
  }

  // Means of 16-bit tokens have far larger errors than the approximation.
  __device__ static float inverse(int count) {
    const float x = static_cast<float>(count);
    return sizeof(T) == 2 ? reciprocal(x) : 1.0f / x;
  }

  using Products = float[kOperands][2][4];  // of tokens 0 to 7 and 8 to 15

  // Of row 8 group + g of a set, and this lane's two tokens of a side.
  __device__ static const float* product_pair(const Products& products, int set, int group,
                                              int side) {
    const int eighth = set * P::kRowGroups + group;
    return products[eighth / 2][side] + eighth % 2 * 2;
  }

  // A unit of the nth 16 rows, or of all 8 with a number in the others.
  __device__ FragmentA<T> rows_of(int nth, int unit, float others = 0) const {
    const int pitch = P::row_pitch(channels_);
    const T* rows = rows_ + nth * 16 * pitch + slice_.first + unit * 16;
    if constexpr (kOnesInMemory) {
      const int lane = lane_index(), row = lane % 16 < 8 ? lane % 8 : kRows;
      FragmentA<T> a;
      load_matrix_x4(a.pair, rows + row * pitch + lane / 16 * 8);
      return a;
    }
    return kSums == 8 ? load_8_rows(rows, pitch, others) : load_rows(rows, pitch);
  }

  // The tensor cores also add up a token's channels, as products with ones, and their squares, as
  // the diagonal of x x^T. One group of rows leaves room for the ones.
  __device__ SliceStatistics multiply_pairs(const T* tile, uint32_t attended,
                                            Products& products) const {
    constexpr bool kOnesBesideRows = kSums == 8;
    // Where units are many, they take turns between two sums, so that products wait less for the
    // ones before.
    constexpr int kTurns = kAlone && kSets == 1 && P::kUnits > 12 ? 2 : 1;
    constexpr bool kAhead = kSets == 1;
    // Whether the second eight tokens' products are left out where none is attended to.
    constexpr bool kSkipsSide = kSets == 1 && !kAlone && !P::kWarpsShareTiles;
    constexpr Pair<T> ones = kOnes<T>;
    const int pitch = P::tile_pitch(channels_);
    const float width = static_cast<float>(slice_.units * 16);
    Products others = {};
    Squares squares[kTurns][2];
    float sums[2][4] = {};
    struct Operands {
      ColumnsOfB<T> x;
      FragmentA<T> rows[kOperands];
    };
    const auto load = [&](Operands& to, int unit) {
      to.x = load_columns(tile + unit * 16, pitch);
      for (int nth = 0; nth < kOperands; ++nth) to.rows[nth] = rows_of(nth, unit, 1);
    };
    const auto multiply_sides = [&](auto sides) {
      const auto add = [&](int i, const Operands& from) {
        for (int side = 0; side < decltype(sides)::value; ++side) {
          const FragmentB<T>& x = from.x.side[side];
          for (int nth = 0; nth < kOperands; ++nth) {
            multiply((i % kTurns ? others : products)[nth][side], from.rows[nth], x);
          }
          if (!kOnesBesideRows) multiply(sums[side], {{ones, ones, ones, ones}}, x);
          squares[i % kTurns][side].add(x);
        }
      };
      slice_.template for_each_loaded<P::kUnroll, kAhead, Operands>(load, add);
    };
    if (kSkipsSide && attended < 256) {
      multiply_sides(std::integral_constant<int, 1>());
    } else {
      multiply_sides(std::integral_constant<int, 2>());
    }
    if constexpr (kTurns > 1) {
      for (int i = 0; i < 8; ++i) products[0][i / 4][i % 4] += others[0][i / 4][i % 4];
    }
    SliceStatistics slice;
    float own_sums[2];
    for (int i = 0; i < 2; ++i) {
      own_sums[i] = own_column(kOnesBesideRows ? products[0][i] + 2 : sums[i]);
      float sum_of_squares = 0;
      for (const auto& of_turn : squares) sum_of_squares += of_turn[i].own();
      slice.set(i, own_sums[i], own_sums[i] * inverse_width_, sum_of_squares, 0);
    }
    if (!normalize_) return slice;
    const bool cancels = slice.template cancels<T>(0, width) || slice.template cancels<T>(1, width);
    if (__any_sync(~0u, slice.is_owner() && cancels)) {
      set_from_means(slice, tile, pitch, slice_, own_sums);
    }
    return slice;
  }

  // The same in float's own precision, relative to the slice's mean: one more read of the tile.
  __device__ SliceStatistics multiply_floats(const T* tile, Products& products) const {
    const int g = lane_index() / 4, pitch = P::tile_pitch(channels_);
    float centre[2] = {0, 0};
#pragma unroll 2
    for (int c = lane_index() % 4; c < slice_.units * 16; c += 4) {
      for (int i = 0; i < 2; ++i) centre[i] += tile[(g + 8 * i) * pitch + c];
    }
    for (float& c : centre) c = sum_of_row(c) * inverse_width_;
    float sums[2] = {0, 0}, squares[2] = {0, 0};
    slice_.template for_each_unit<P::kUnroll>([&](int unit) {
      ColumnsOfB<T> x = load_columns(tile + unit * 16, pitch);
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        for (Pair<T>& pair : x.side[side].pair) {
          const float first = pair.x - centre[side], second = pair.y - centre[side];
          sums[side] += first + second;
          squares[side] += first * first + second * second;
          if (normalize_) pair = make_float2(first, second);
        }
      }
#pragma unroll
      for (int nth = 0; nth < kOperands; ++nth) {
        const FragmentA<T> rows = rows_of(nth, unit);
        for (int side = 0; side < 2; ++side) multiply(products[nth][side], rows, x.side[side]);
      }
    });
    SliceStatistics slice;
    for (int i = 0; i < 2; ++i) {
      const float deviations = sum_of_row(sums[i]);
      slice.set(i, deviations, deviations * inverse_width_, sum_of_row(squares[i]), centre[i]);
    }
    return slice;
  }

  // 1 / standard deviation, as in TokenStatistics.
  __device__ float signed_rstd(float mean, float squares, bool is_attended) const {
    if constexpr (kAlone && !kCentre) {  // without a branch
      const float variance = squares * inverse_channels_, rstd = rsqrtf(variance + eps_);
      const float with_sign = variance <= mean * mean * 0x1p-40f ? -rstd : rstd;
      const float normalized = normalize_ ? with_sign : 1.0f;
      return is_attended ? normalized : 0.0f;
    }
    if (!is_attended) return 0;
    if (!normalize_) return 1;
    const float variance = squares * inverse_channels_;
    // Others of 16 bits vary by 2^-11 of their mean at least.
    const bool constant = !kCentre && variance <= mean * mean * 0x1p-40f;
    const float rstd = rsqrtf(variance + eps_);
    return constant ? -rstd : rstd;
  }

  // The scores where a warp has all channels.
  __device__ void finish(const SliceStatistics& slice, uint32_t attended, const Products& products,
                         float (&scores)[kSets][P::kRowGroups][4], TokenStatistics& stats) const {
    static_assert(P::kWarpsShareTiles || (!kCentre && P::kRowGroups == 1));
    const int g = lane_index() / 4;
    float own_rstd[2];
    for (int i = 0; i < 2; ++i) {
      const bool is_attended = attended >> (g + 8 * i) & 1;
      own_rstd[i] = signed_rstd(slice.mean[i], slice.squares[i], is_attended);
    }
    float row_sums[kSets];
    for (int set = 0; set < kSets; ++set) {
      row_sums[set] = kSumsOwnRows ? own_row_sum_ : row_sums_[set * kRows + g];
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      stats.signed_rstd[i] = from_owner(own_rstd, i);
      if constexpr (kAlone) {
        const float mean = from_owner(slice.mean, i);
        stats.mean[i] = normalize_ ? mean : 0.0f;
      } else {
        stats.mean[i] = normalize_ ? from_owner(slice.mean, i) : 0.0f;
      }
      stats.centre[i] = 0;
      for (int set = 0; set < kSets; ++set) {
        const float product = product_pair(products, set, 0, i >> 1)[i & 1];
        scores[set][0][i] = (product - stats.mean[i] * row_sums[set]) * stats.rstd(i);
      }
    }
  }

  // Stores each token's mean, squared deviations and centre, then the products.
  __device__ void store_partials(float* to, const SliceStatistics& slice,
                                 const Products& products) const {
    const int g = lane_index() / 4, t = lane_index() % 4;
    if (slice.is_owner()) {
      for (int i = 0; i < 2; ++i) {
        float* to_token = to + g + 8 * i;
        to_token[0] = slice.mean[i];
        to_token[P::kTokens] = slice.squares[i];
        to_token[2 * P::kTokens] = slice.centre[i];
      }
    }
    for (int set = 0; set < kSets; ++set) {
      for (int group = 0; group < P::kRowGroups; ++group) {
        for (int side = 0; side < 2; ++side) {
          float* to_scores =
              to + 3 * P::kTokens + (set * kRows + 8 * group + g) * P::kTokens + 8 * side + 2 * t;
          const float* pair = product_pair(products, set, group, side);
          *reinterpret_cast<float2*>(to_scores) = make_float2(pair[0], pair[1]);
        }
      }
    }
  }

  // Adds up the partials of the group's warps in the order of their lanes.
  __device__ void combine_partials(int iteration, uint32_t attended,
                                   float (&scores)[kSets][P::kRowGroups][4],
                                   TokenStatistics& stats) const {
    const int g = lane_index() / 4;
    const int group_lane = P::group_lane(channels_), group_warps = P::group_warps(channels_);
    constexpr int kWarpStride = kBuffers * kFloats;
    const float* partials = partials_of(warp_index() - group_lane, iteration);
    float mean[4], squares[4] = {};
    means_of_tile(partials, mean);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      stats.centre[i] = centre_of(partials + group_lane * kWarpStride, nth_token(i));
      stats.mean[i] = normalize_ ? mean[i] : 0.0f;
      for (int set = 0; set < kSets; ++set) {
        for (int group = 0; group < P::kRowGroups; ++group) scores[set][group][i] = 0;
      }
    }
#pragma unroll 1  // one warp's partials are enough loads in flight
    for (int warp = 0; warp < group_warps; ++warp, partials += kWarpStride) {
      const float* row_sums = row_sums_ + warp * kSums;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int token = nth_token(i);
        const float deviation = partials[token] - mean[i];
        squares[i] += partials[P::kTokens + token] + deviation * deviation * width_of(warp);
        const float centred = stats.mean[i] - centre_of(partials, token);
#pragma unroll
        for (int set = 0; set < kSets; ++set) {
#pragma unroll
          for (int group = 0; group < P::kRowGroups; ++group) {
            const int row = set * kRows + 8 * group + g;
            const float product = partials[3 * P::kTokens + row * P::kTokens + token];
            scores[set][group][i] += product - centred * row_sums[row];
          }
        }
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const bool is_attended = attended >> nth_token(i) & 1;
      stats.signed_rstd[i] = signed_rstd(mean[i], squares[i], is_attended);
      for (int set = 0; set < kSets; ++set) {
        for (int group = 0; group < P::kRowGroups; ++group) scores[set][group][i] *= stats.rstd(i);
      }
    }
  }

  // Combines the means of the lane's tokens that the group's warps have.
  __device__ void means_of_tile(const float* partials, float (&mean)[4]) const {
    for (int i = 0; i < 4; ++i) mean[i] = 0;
#pragma unroll 1
    for (int warp = 0; warp < P::group_warps(channels_); ++warp) {
      const float* means = partials + warp * kBuffers * kFloats;
      for (int i = 0; i < 4; ++i) mean[i] += means[nth_token(i)] * width_of(warp);
    }
    for (int i = 0; i < 4; ++i) mean[i] *= inverse_channels_;
  }

  __device__ float centre_of(const float* partials, int token) const {
    return kCentre && normalize_ ? partials[2 * P::kTokens + token] : 0.0f;
  }

  __device__ Slice slice_of(int group_lane) const {
    return Slice::of(channels_, group_lane, P::log2_group_warps(channels_));
  }
  __device__ int width_of(int group_lane) const { return slice_of(group_lane).units * 16; }

  float* partials_;
  float* row_sums_;
  float own_row_sum_ = 0;  // of row g
  const T* rows_;
  int channels_;
  Slice slice_;
  float inverse_channels_;
  float inverse_width_;  // of the slice
  float eps_;
  bool normalize_;
};

}  // namespace crossvit::attention_core
