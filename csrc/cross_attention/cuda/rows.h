#pragma once

#include "common/cuda/fragments.h"
#include "common/cuda/memory.h"
#include "cross_attention/params.h"

// The CLS path's rows, up to 16, one per image: tensor-core operands in shared memory, and
// LayerNorm. The path is a chain of latencies: whatever loads there are start together, before what
// depends on one of them.

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

}  // namespace crossvit::cross_attention
