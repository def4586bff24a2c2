#pragma once

#include "common/cuda/fragments.h"
#include "common/cuda/memory.h"
#include "cross_attention/params.h"

// The CLS path: LayerNorm and linear layers of up to 16 rows, one per image. Rows are tensor-core
// operands in shared memory; weights go from memory, mostly L2, straight to registers, 16 bytes per
// lane, so that a cluster reads a matrix once and waits for no barrier. The path is a chain of
// latencies: whatever loads there are start together, before what depends on one of them.

namespace crossvit::cross_attention {

constexpr int kImages = 16;  // rows of a tensor-core tile

// Row pitch of an operand, in elements. Rows g and g + 1 are 64 bytes apart in the banks, the
// right stride for 16-byte vectors of four lanes each.
template <class T>
__host__ __device__ constexpr int operand_pitch(int width) {
  constexpr int kLine = 128 / sizeof(T);
  return round_up(width, kLine) + kLine / 2;
}

template <class T>
__host__ __device__ constexpr int operand_bytes_of(int width) {
  return kImages * operand_pitch<T>(width) * static_cast<int>(sizeof(T));
}

__host__ __device__ constexpr int float_bytes_of(int width) {
  return kImages * width * static_cast<int>(sizeof(float));
}

// The elements of a parameter of type T or float; zeros if it is omitted. Loading one and
// converting it are separate, so that no branch on the type keeps loads apart.
template <class T>
class Elements {
 public:
  __device__ explicit Elements(const Parameter& p)
      : data_(static_cast<const char*>(p.data)),
        size_(!p.data                                        ? 0
              : sizeof(T) == 4 || p.dtype == DType::kFloat32 ? 4
                                                             : 2) {}

  // With `is_used` false, a 0.
  __device__ __forceinline__ LoadedElement load(int64_t index, bool is_used = true) const {
    return load_constant(data_ + index * size_, is_used ? size_ : 0);
  }

  __device__ __forceinline__ float value(const LoadedElement& loaded) const {
    if constexpr (sizeof(T) == 4) {
      return __uint_as_float(loaded.four_bytes);
    } else {
      return size_ == 4 ? __uint_as_float(loaded.four_bytes) : unpack<T>(loaded.two_bytes).x;
    }
  }

  __device__ __forceinline__ float operator[](int64_t index) const { return value(load(index)); }

 private:
  const char* data_;
  int size_;  // of an element, in bytes; 0 if there are none
};

template <class T>
__device__ __forceinline__ void write_element(void* data, DType dtype, int64_t index, float value) {
  if (sizeof(T) == 4 || dtype == DType::kFloat32) {
    static_cast<float*>(data)[index] = value;
  } else {
    static_cast<T*>(data)[index] = from_float<T>(value);
  }
}

// The residual scale r of an image.
__device__ __forceinline__ float scale_of_residual(const Parameter& scales, int64_t image) {
  return scales.data ? static_cast<const float*>(scales.data)[image] : 1.0f;
}

struct RowStatistics {
  float mean, rstd;
};

// The statistics of the images' rows, and the means that backward subtracts.
constexpr int kStatisticsBytes = 2 * kImages * static_cast<int>(sizeof(RowStatistics));

// Sums value(c) over c in [0, width). Called by a warp.
template <class Value>
__device__ __forceinline__ float sum_of_columns(int width, Value value) {
  constexpr int kLoads = 6;  // in flight: all of 192 columns
  float sum = 0;
#pragma unroll 1
  for (int begin = lane_index(); begin < width; begin += 32 * kLoads) {
    float values[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      values[i] = begin + 32 * i < width ? value(begin + 32 * i) : 0.0f;
    }
#pragma unroll
    for (int i = 0; i < kLoads; ++i) sum += values[i];
  }
  return sum_of_warp(sum);
}

// Statistics of x(row, c), for rows begin, begin + step, ... below count. Called by a block, which
// synchronizes before it reads them.
template <class X>
__device__ void find_statistics(RowStatistics* statistics, int begin, int step, int count,
                                int width, float eps, X x) {
  const float inverse_width = 1.0f / width;
  for (int row = begin + warp_index() * step; row < count; row += block_warps() * step) {
    const float mean = sum_of_columns(width, [&](int c) { return x(row, c); }) * inverse_width;
    const float squares = sum_of_columns(width, [&](int c) {
      const float deviation = x(row, c) - mean;
      return deviation * deviation;
    });
    if (lane_index() == 0) statistics[row] = {mean, rsqrtf(squares * inverse_width + eps)};
  }
}

// Calls visit(row, c, weight, bias, load(row, c)) with a LayerNorm's parameters, for rows begin,
// begin + step, ... below count. Several rows are loaded before the first is visited. Called by a
// block.
template <class T, class Load, class Visit>
__device__ __forceinline__ void for_each_element(int begin, int step, int count, int width,
                                                 const Layer& norm, Load load, Visit visit) {
  constexpr int kRows = kHasFewRegisters<T> ? 1 : 4;
  const Elements<T> weights(norm.weight), biases(norm.bias);
#pragma unroll 1
  for (int c = thread_index(); c < width; c += block_threads()) {
    const LoadedElement loaded_weight = weights.load(c), loaded_bias = biases.load(c);
    const float weight = weights.value(loaded_weight), bias = biases.value(loaded_bias);
#pragma unroll 1
    for (int first = begin; first < count; first += kRows * step) {
      decltype(load(0, 0)) loaded[kRows];
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        if (first + i * step < count) loaded[i] = load(first + i * step, c);
      }
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        if (first + i * step < count) visit(first + i * step, c, weight, bias, loaded[i]);
      }
    }
  }
}

__device__ __forceinline__ float normal_cdf(float x) {
  return 0.5f * (1.0f + erff(x * 0.70710678118654752f));
}

// LayerNorm of this block's rows (RowOwners) below count, or its GELU. The parameters' first loads
// start in the constructor. If there are fewer rows than warps, several warps share a row, of which
// each finds the statistics. For all threads of a block.
template <class T, bool kGelu>
class RowNormalization {
 public:
  template <class Owners>
  __device__ RowNormalization(const Layer& norm, int width, const Owners& owners, int count)
      : weight_(norm.weight), bias_(norm.bias), width_(width), step_(owners.step()), count_(count) {
    const int rows = maximum(1, ceil_div(count - owners.begin(), step_));
    warps_of_row_ = maximum(1, block_warps() / rows);
    first_row_ = owners.begin() + warp_index() / warps_of_row_ * step_;
    first_ = warp_index() % warps_of_row_ * 64 + 2 * lane_index();
    parameters_ = load(first_);
  }

  // Calls write(row, c, y) with columns c and c + 1 of x [.., width].
  template <class Write>
  __device__ void run(const float* x, float eps, Write write) const {
    const float inverse_width = 1.0f / width_;
    const int rows_at_once = block_warps() / warps_of_row_;
#pragma unroll 1
    for (int row = first_row_; row < count_; row += rows_at_once * step_) {
      const float* values = x + row * width_;
      const float mean = sum_of_columns(width_, [&](int c) { return values[c]; }) * inverse_width;
      const float squares = sum_of_columns(width_, [&](int c) {
        const float deviation = values[c] - mean;
        return deviation * deviation;
      });
      const float rstd = rsqrtf(squares * inverse_width + eps);
      const auto normalize = [&](float value, const LoadedElement& w, const LoadedElement& b) {
        const float n = (value - mean) * rstd * weight_.value(w) + bias_.value(b);
        return kGelu ? n * normal_cdf(n) : n;
      };
      Parameters p = parameters_;
#pragma unroll 1
      for (int c = first_; c < width_; c += kPairs * stride()) {
        if (c != first_) p = load(c);
#pragma unroll
        for (int i = 0; i < kPairs; ++i) {
          const int column = c + i * stride();
          if (column >= width_) continue;
          const float2 pair = *reinterpret_cast<const float2*>(values + column);
          write(row, column,
                make_float2(normalize(pair.x, p.weight[i][0], p.bias[i][0]),
                            normalize(pair.y, p.weight[i][1], p.bias[i][1])));
        }
      }
    }
  }

 private:
  static constexpr int kPairs = 2;  // in flight
  struct Parameters {
    LoadedElement weight[kPairs][2], bias[kPairs][2];
  };

  // Between the pairs of columns of a lane.
  __device__ int stride() const { return 64 * warps_of_row_; }

  __device__ __forceinline__ Parameters load(int first) const {
    Parameters p;
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int c = first + i * stride() + j;
        p.weight[i][j] = weight_.load(c, c < width_);
        p.bias[i][j] = bias_.load(c, c < width_);
      }
    }
    return p;
  }

  Elements<T> weight_, bias_;
  int width_, step_, count_, warps_of_row_, first_row_, first_;
  Parameters parameters_;
};

// Backward of LayerNorm, or of its GELU, for rows begin, begin + step, ... below count: given the
// gradients of the result, d [.., width] in shared memory, which it overwrites with those of
// LayerNorm's output, calls write(row, c, dx, dn, xhat). Called by a block.
template <class T, bool kGelu, class X, class Write>
__device__ void normalize_rows_backward(RowStatistics* statistics, int begin, int step, int count,
                                        int width, float eps, const Layer& norm, X x, float* d,
                                        Write write) {
  const auto xhat = [&](int row, int c) {
    return (x(row, c) - statistics[row].mean) * statistics[row].rstd;
  };
  find_statistics(statistics, begin, step, count, width, eps, x);
  __syncthreads();
  if (kGelu) {
    const auto multiply_by_slope = [&](int row, int c, float weight, float bias, float xhat) {
      const float n = xhat * weight + bias;
      const float density = 0.39894228040143268f * expf(-0.5f * n * n);
      d[row * width + c] *= normal_cdf(n) + n * density;
    };
    for_each_element<T>(begin, step, count, width, norm, xhat, multiply_by_slope);
    __syncthreads();
  }
  // The means of dxhat and of dxhat xhat.
  RowStatistics* means = statistics + kImages;
  const Elements<T> weights(norm.weight);
  const float inverse_width = 1.0f / width;
  for (int row = begin + warp_index() * step; row < count; row += block_warps() * step) {
    const auto dxhat = [&](int c) { return d[row * width + c] * weights[c]; };
    const float a = sum_of_columns(width, dxhat);
    const float b = sum_of_columns(width, [&](int c) { return dxhat(c) * xhat(row, c); });
    if (lane_index() == 0) means[row] = {a * inverse_width, b * inverse_width};
  }
  __syncthreads();
  const auto load = [&](int row, int c) { return make_float2(d[row * width + c], xhat(row, c)); };
  const auto differentiate = [&](int row, int c, float weight, float, float2 loaded) {
    const float dn = loaded.x, normed = loaded.y;
    const float dxhat = dn * weight - means[row].mean - normed * means[row].rstd;
    write(row, c, dxhat * statistics[row].rstd, dn, normed);
  };
  for_each_element<T>(begin, step, count, width, norm, load, differentiate);
}

// Zeroes the rows of an operand that no image uses. Called by a block.
template <class T>
__device__ void clear_rows(T* rows, int count, int width) {
  const int pitch = operand_pitch<T>(width);
#pragma unroll 1
  for (int i = thread_index(); i < (kImages - count) * pitch; i += block_threads()) {
    rows[count * pitch + i] = from_float<T>(0);
  }
}

// 16 bytes of a matrix.
template <class T>
struct Vector {
  static constexpr int kElements = 16 / sizeof(T);
  static constexpr int kPairs = kElements / 2;
  Pair<T> pair[kPairs];

  __device__ static Vector load(const T* from) { return load_if(true, from); }
  __device__ static Vector load_if(bool condition, const T* from) {
    Vector v;
    uint4 bits = make_uint4(0, 0, 0, 0);
    if (condition) bits = *reinterpret_cast<const uint4*>(from);
    memcpy(&v, &bits, sizeof v);
    return v;
  }
};

// Rows g and g + 8 of A from pairs i and i + 1 of theirs.
template <class T>
__device__ __forceinline__ FragmentA<T> a_of_rows(const Vector<T>& upper, const Vector<T>& lower,
                                                  int i) {
  return {{upper.pair[i], lower.pair[i], upper.pair[i + 1], lower.pair[i + 1]}};
}

// A linear layer, rows W^T + bias with W [columns, depth], in tiles of 8 columns; column_of(tile)
// is the first column of a tile. The loads of each warp's first tile start in the constructor: a
// barrier that the rows wait for may follow. The order of k is free as long as both operands share
// it: a lane takes consecutive elements. For all threads of a block.
template <class T, class Columns>
class LinearTiles {
 public:
  __device__ LinearTiles(const Layer& layer, int depth, const Columns& columns)
      : layer_(layer), depth_(depth), columns_(columns) {
    if (warp_index() < columns.tiles()) load_first(warp_index());
  }

  // Calls write(row, column, a, b) with columns `column` and `column` + 1 of each of the 16 rows.
  template <class Write>
  __device__ void run(const T* rows, int pitch, Write write) {
    const int g = lane_index() / 4, t = lane_index() % 4;
    const Elements<T> bias(layer_.bias);
#pragma unroll 1
    for (int tile = warp_index(); tile < columns_.tiles(); tile += block_warps()) {
      if (tile != warp_index()) load_first(tile);
      float sums[4][4] = {};  // several chains of products
      multiply_loaded(rows, pitch, 0, sums);
#pragma unroll 1
      for (int begin = kSteps * kDepth; begin < depth_; begin += kSteps * kDepth) {
        load(tile, begin);
        multiply_loaded(rows, pitch, begin, sums);
      }
      float total[4];
      for (int i = 0; i < 4; ++i) {
        total[i] = sums[0][i] + sums[1][i] + (sums[2][i] + sums[3][i]) + bias.value(biases_[i & 1]);
      }
      const int column = columns_.first(tile) + 2 * t;
      write(g, column, total[0], total[1]);
      write(g + 8, column, total[2], total[3]);
    }
  }

 private:
  using V = Vector<T>;
  static constexpr int kDepth = 4 * V::kElements;
  // Along k, loads in flight: 16-bit rows of 384.
  static constexpr int kSteps = sizeof(T) == 4 ? 6 : 12;

  __device__ __forceinline__ void load_first(int tile) {
    const Elements<T> bias(layer_.bias);
    const int column = columns_.first(tile) + 2 * (lane_index() % 4);
    for (int i = 0; i < 2; ++i) biases_[i] = bias.load(column + i);
    load(tile, 0);
  }

  __device__ __forceinline__ void load(int tile, int begin) {
    const int row = columns_.first(tile) + lane_index() / 4;
    const int k = begin + lane_index() % 4 * V::kElements;
    const T* from = static_cast<const T*>(layer_.weight.data) + int64_t{row} * depth_ + k;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      weights_[step] = V::load_if(k + step * kDepth < depth_, from + step * kDepth);
    }
  }

  __device__ __forceinline__ void multiply_loaded(const T* rows, int pitch, int begin,
                                                  float (&sums)[4][4]) const {
    const int g = lane_index() / 4, k = begin + lane_index() % 4 * V::kElements;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const int k_step = k + step * kDepth < depth_ ? k + step * kDepth : 0;  // weights are 0 there
      const V upper = V::load(rows + g * pitch + k_step);
      const V lower = V::load(rows + (g + 8) * pitch + k_step);
#pragma unroll
      for (int i = 0; i < V::kPairs; i += 2) {
        multiply(sums[(step * V::kPairs / 2 + i / 2) % 4], a_of_rows(upper, lower, i),
                 FragmentB<T>{{weights_[step].pair[i], weights_[step].pair[i + 1]}});
      }
    }
  }

  const Layer& layer_;
  int depth_;
  Columns columns_;
  V weights_[kSteps];
  LoadedElement biases_[2];
};

// Four adjacent elements of a row of a matrix.
template <class T>
struct FourColumns {
  using Bits = std::conditional_t<sizeof(T) == 4, uint4, uint2>;
  Pair<T> pair[2];

  __device__ static FourColumns load_if(bool condition, const T* from) {
    FourColumns columns;
    Bits bits = {};
    if (condition) bits = *reinterpret_cast<const Bits*>(from);
    memcpy(&columns, &bits, sizeof columns);
    return columns;
  }
};

// The elements of one column in two rows.
template <class T>
__device__ __forceinline__ Pair<T> join(const FourColumns<T>& a, const FourColumns<T>& b,
                                        int column) {
  const Pair<T> first = a.pair[column / 2], second = b.pair[column / 2];
  if constexpr (sizeof(T) == 4) {
    return column % 2 ? make_float2(first.y, second.y) : make_float2(first.x, second.x);
  } else {
    return __byte_perm(first, second, column % 2 ? 0x7632 : 0x5410);
  }
}

// Four numbers in the operands' type.
template <class T>
__device__ __forceinline__ typename FourColumns<T>::Bits pack_four(float4 values) {
  const Pair<T> pairs[2] = {pack<T>(values.x, values.y), pack<T>(values.z, values.w)};
  typename FourColumns<T>::Bits bits;
  memcpy(&bits, pairs, sizeof bits);
  return bits;
}

__device__ __forceinline__ float4 scaled(float4 v, float factor) {
  return make_float4(v.x * factor, v.y * factor, v.z * factor, v.w * factor);
}

constexpr int kColumnBlock = 32;  // columns that transposed_linear takes at once

// Columns [first, first + kColumnBlock) of rows W, W [depth, columns]: calls write(row, column,
// values) with the values of four columns. A lane loads four columns for each of its k, one for
// each tile of 8 columns. Called by a warp.
template <class T, class Write>
__device__ void transposed_linear(const T* rows, int pitch, const void* weight, int depth,
                                  int columns, int first, Write write) {
  using V = Vector<T>;
  constexpr int kDepth = 4 * V::kElements;
  constexpr int kSteps = sizeof(T) == 4 ? 2 : 4;  // of kDepth along k: loads in flight
  const int g = lane_index() / 4, t = lane_index() % 4;
  const T* w = static_cast<const T*>(weight) + first + 4 * g;
  float sums[4][4] = {};
#pragma unroll 1
  for (int begin = 0; begin < depth; begin += kSteps * kDepth) {
    const int k = begin + t * V::kElements;
    FourColumns<T> b[kSteps][V::kElements];
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const bool is_used = k + step * kDepth < depth && first + 4 * g < columns;
#pragma unroll
      for (int i = 0; i < V::kElements; ++i) {
        b[step][i] = FourColumns<T>::load_if(is_used, w + int64_t{k + step * kDepth + i} * columns);
      }
    }
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const int k_step = k + step * kDepth < depth ? k + step * kDepth : 0;  // there b is 0
      const V upper = V::load(rows + g * pitch + k_step);
      const V lower = V::load(rows + (g + 8) * pitch + k_step);
#pragma unroll
      for (int i = 0; i < V::kPairs; i += 2) {
        const FragmentA<T> a = a_of_rows(upper, lower, i);
        const FourColumns<T>* b_rows = b[step] + 2 * i;
#pragma unroll
        for (int tile = 0; tile < 4; ++tile) {
          multiply(sums[tile], a,
                   FragmentB<T>{
                       {join<T>(b_rows[0], b_rows[1], tile), join<T>(b_rows[2], b_rows[3], tile)}});
        }
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int column = first + 4 * (2 * t + (i & 1));
    if (column >= columns) continue;
    write(g + 8 * (i >> 1), column, make_float4(sums[0][i], sums[1][i], sums[2][i], sums[3][i]));
  }
}

}  // namespace crossvit::cross_attention
