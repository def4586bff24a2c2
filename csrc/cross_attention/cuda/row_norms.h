#pragma once

#include "cross_attention/cuda/rows.h"

// LayerNorm of the CLS path's rows, and its backward.

namespace crossvit::cross_attention {

struct RowStatistics {
  float mean, rstd;
};

// Statistics of x(c), columns c to c + 3. Called by a warp.
template <class X>
__device__ __forceinline__ RowStatistics statistics_of(int width, float eps, X x) {
  constexpr int kQuads = 3;  // in registers: 384 columns
  const float inverse_width = 1.0f / width;
  const int first = 4 * (hidden_thread() % 32);
  float4 values[kQuads];
  float sum = 0, squares = 0;
#pragma unroll
  for (int i = 0; i < kQuads; ++i) {
    values[i] = first + 128 * i < width ? x(first + 128 * i) : make_float4(0, 0, 0, 0);
  }
#pragma unroll
  for (int i = 0; i < kQuads; ++i) sum += sum_of(values[i]);
#pragma unroll 1
  for (int c = first + 128 * kQuads; c < width; c += 128) sum += sum_of(x(c));
  const float mean = sum_of_warp(sum) * inverse_width;
  const auto add_squares = [&](float4 v) {
    v = v - mean;
    squares += sum_of(v * v);
  };
#pragma unroll
  for (int i = 0; i < kQuads; ++i) {
    if (first + 128 * i < width) add_squares(values[i]);
  }
#pragma unroll 1
  for (int c = first + 128 * kQuads; c < width; c += 128) add_squares(x(c));
  return {mean, rsqrtf(sum_of_warp(squares) * inverse_width + eps)};
}

// Rows of a parameter, or of floats that other blocks have stored, as what LayerNorm reads.
template <class T>
struct ParameterRows {
  using Loaded = LoadedQuad;
  Elements<T> elements;
  int64_t first;
  int width;

  __device__ __forceinline__ Loaded load(int row, int c) const {
    return elements.load_quad((first + row) * width + c);
  }
  __device__ __forceinline__ float4 value(const Loaded& loaded) const {
    return elements.value(loaded);
  }
};
struct FloatRows {
  using Loaded = float4;
  const float* data;
  int width;

  __device__ __forceinline__ Loaded load(int row, int c) const {
    return load_quad(data + row * width + c);
  }
  __device__ __forceinline__ float4 value(const Loaded& loaded) const { return loaded; }
};

// LayerNorm of rows below count, or its GELU, two rows of a warp at a time if there are more rows
// than warps; if there are fewer, several warps find a row's statistics and share its columns. A
// row has the same bits either way: what is fused is not left to the compiler. The parameters'
// loads start in the constructor, those of the first rows in start(). For all threads of a block.
template <class T, bool kGelu, class Rows>
class RowNormalization {
  static constexpr int kMostRows = sizeof(T) == 4 ? 1 : 2, kQuads = 3;  // in registers: 384 columns

 public:
  __device__ __forceinline__ RowNormalization(const Layer& norm, const Rows& rows, int width,
                                              int count)
      : weight_(norm.weight), bias_(norm.bias), rows_(rows), width_(width), count_(count) {
    const int warps = block_warps(), thread = hidden_thread();
    while (count << (log_warps_ + 1) <= warps) ++log_warps_;  // a block's are a power of two
    lane_ = thread % 32;
    const int warp = thread / 32;
    part_ = warp & ((1 << log_warps_) - 1);
    row_ = warp >> log_warps_, step_ = warps >> log_warps_;
#pragma unroll
    for (int i = 0; i < kQuads; ++i) load(i, weights_[i], biases_[i]);
  }

  __device__ __forceinline__ void start() { load_rows(row_); }

  // Stores the parameters to shared memory.
  __device__ __forceinline__ void store_parameters(float* weights, float* biases) const {
    if (warp_index() + 1 < block_warps()) return;
#pragma unroll
    for (int i = 0; i < kQuads; ++i) {
      if (column(i) >= width_) break;
      store_quad(weights + column(i), weight_.value(weights_[i]));
      store_quad(biases + column(i), bias_.value(biases_[i]));
    }
#pragma unroll 1
    for (int i = kQuads; column(i) < width_; ++i) {
      LoadedQuad weight, bias;
      load(i, weight, bias);
      store_quad(weights + column(i), weight_.value(weight));
      store_quad(biases + column(i), bias_.value(bias));
    }
  }

  // Calls write(row, c, y) with columns c to c + 3.
  template <class Write>
  __device__ __forceinline__ void run(float eps, Write write) {
    if (count_ <= step_) {
      if (row_ < count_) run_rows<1>(row_, eps, write);
      return;
    }
#pragma unroll 1
    for (int first = row_; first < count_; first += kMostRows * step_) {
      if (first > row_) load_rows(first);
      run_rows<kMostRows>(first, eps, write);
    }
  }

 private:
  template <int kRows, class Write>
  __device__ __forceinline__ void run_rows(int first, float eps, Write write) {
    const float inverse_width = reciprocal(static_cast<float>(width_));
    float4 values[kRows][kQuads];
    float sums[kRows], means[kRows], rstds[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      sums[r] = 0;
#pragma unroll
      for (int i = 0; i < kQuads; ++i) {
        values[r][i] = rows_.value(loaded_[r][i]);
        sums[r] += column(i) < width_ ? sum_of(values[r][i]) : 0.0f;
      }
#pragma unroll 1
      for (int i = kQuads; column(i) < width_; ++i) {
        sums[r] += sum_of(rows_.value(rows_.load(row_of(first, r), column(i))));
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) means[r] = sum_of_warp(sums[r]) * inverse_width;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      float squares = 0;
#pragma unroll
      for (int i = 0; i < kQuads; ++i) {
        values[r][i] = values[r][i] - means[r];
        squares += column(i) < width_ ? squares_of(values[r][i]) : 0.0f;
      }
#pragma unroll 1
      for (int i = kQuads; column(i) < width_; ++i) {
        const float4 v = rows_.value(rows_.load(row_of(first, r), column(i))) - means[r];
        squares += squares_of(v);
      }
      rstds[r] = squares;
    }
    // Apart from the roots, whose branches would keep the rows' exchanges one behind the other.
#pragma unroll
    for (int r = 0; r < kRows; ++r) rstds[r] = sum_of_warp(rstds[r]);
#pragma unroll
    for (int r = 0; r < kRows; ++r) rstds[r] = rsqrtf(fmaf(rstds[r], inverse_width, eps));
    const auto finish = [&](int r, int i, float4 centred, const LoadedQuad& weight,
                            const LoadedQuad& bias) {
      const int row = first + r * step_;
      if (row >= count_ || column(i) >= width_ || (i & ((1 << log_warps_) - 1)) != part_) return;
      const float4 n = fma_quad(centred * rstds[r], value(weight_, weight), value(bias_, bias));
      write(row, column(i), kGelu ? each(n, [](float v) { return Gelu<T>(v).value(); }) : n);
    };
#pragma unroll
    for (int i = 0; i < kQuads; ++i) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) finish(r, i, values[r][i], weights_[i], biases_[i]);
    }
#pragma unroll 1
    for (int i = kQuads; column(i) < width_; ++i) {
      LoadedQuad weight, bias;
      load(i, weight, bias);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const float4 v = rows_.value(rows_.load(row_of(first, r), column(i)));
        finish(r, i, v - means[r], weight, bias);
      }
    }
  }

  // Not converted before a loop over rows, where all of them would take registers.
  __device__ __forceinline__ static float4 value(const Elements<T>& elements, LoadedQuad loaded) {
    loaded.two_bytes.x = used_from_here(loaded.two_bytes.x);
    loaded.two_bytes.y = used_from_here(loaded.two_bytes.y);
    return elements.value(loaded);
  }
  __device__ __forceinline__ int column(int i) const { return 4 * lane_ + 128 * i; }
  // Beyond the last row it again: a branch would keep loads apart.
  __device__ __forceinline__ int row_of(int first, int r) const {
    return minimum(first + r * step_, count_ - 1);
  }
  __device__ __forceinline__ void load(int i, LoadedQuad& weight, LoadedQuad& bias) const {
    weight = weight_.load_quad(column(i), column(i) < width_);
    bias = bias_.load_quad(column(i), column(i) < width_);
  }
  __device__ __forceinline__ void load_rows(int first) {
#pragma unroll
    for (int r = 0; r < kMostRows; ++r) {
#pragma unroll
      for (int i = 0; i < kQuads; ++i) {
        loaded_[r][i] = rows_.load(row_of(first, r), column(i) < width_ ? column(i) : 0);
      }
    }
  }

  Elements<T> weight_, bias_;
  Rows rows_;
  int width_, count_, log_warps_ = 0, lane_, part_, row_, step_;
  LoadedQuad weights_[kQuads], biases_[kQuads];
  typename Rows::Loaded loaded_[kMostRows][kQuads];
};

// Backward of LayerNorm, or of its GELU, for rows begin, begin + step, ... below count; four warps
// share a row. Given the gradients of the result, d [.., width] in shared memory, calls write(row,
// c, dx, dn, xhat, more) with those of LayerNorm's input and output. x(row, c) and more(row, c) are
// what it takes of columns c to c + 3 besides; wait() is called once by all threads, before
// gradients are read: statistics and slopes of the first rows are found before it. sums:
// kStatisticsBytes. For all threads of a block.
template <class T, bool kGelu, class X, class More, class Wait, class Write>
__device__ __forceinline__ void normalize_rows_backward(const Layer& norm, int width, int begin,
                                                        int step, int count, float eps, float* d,
                                                        float2* sums, X x, More more, Wait wait,
                                                        Write write) {
  const Elements<T> weights(norm.weight), biases(norm.bias);
  const int thread = hidden_thread(), warp = thread / 32, team = warp / 4;
  const int warps = minimum(4, used_from_here(block_warps())), stride = 128 * warps;
  const int first = 4 * (thread - team * 128);
  const int rows_at_once = maximum(1, used_from_here(block_warps()) / 4);
  const float inverse_width = 1.0f / used_from_here(width);
  int buffer = 0;
#pragma unroll 1
  for (int of_first = begin; of_first == begin || of_first < count;
       of_first += rows_at_once * step) {
    const int row = of_first + team * step;
    float* d_row = d + row * width;
    RowStatistics statistics;
    if (row < count) {
      statistics = statistics_of(width, eps, [&](int c) { return x(row, c); });
    }
    const auto xhat_of = [&](int c) { return (x(row, c) - statistics.mean) * statistics.rstd; };
    // Of the last columns.
    int last = first;
    float4 weight, xhat, dn;
    decltype(more(0, 0)) more_of;
    float a = 0, b = 0;
#pragma unroll 1
    for (int c = first;; c += stride) {
      float4 slope;
      const bool is_used = row < count && c < width;
      if (is_used) {
        last = c;
        const LoadedQuad loaded = weights.load_quad(c), loaded_bias = biases.load_quad(c, kGelu);
        more_of = more(row, c);
        xhat = xhat_of(c);
        weight = weights.value(loaded);
        if (kGelu) {
          slope = each(xhat * weight + biases.value(loaded_bias),
                       [](float v) { return Gelu<T>(v).slope(); });
        }
      }
      if (c == first && of_first == begin) wait();
      if (is_used) {
        dn = load_quad(d_row + c);
        if (kGelu) dn = dn * slope;
        if (kGelu && c + stride < width) store_quad(d_row + c, dn);
        const float4 dxhat = dn * weight;
        a += sum_of(dxhat);
        b += sum_of(dxhat * xhat);
      }
      if (c + stride >= width) break;
    }
    a = sum_of_warp(a), b = sum_of_warp(b);
    if (thread % 32 == 0) sums[buffer + warp] = make_float2(a, b);
    __syncthreads();
    a = b = 0;
#pragma unroll 1
    for (int i = 0; i < warps; ++i) {
      const float2 of_warp = sums[buffer + team * warps + i];
      a += of_warp.x, b += of_warp.y;
    }
    a *= inverse_width, b *= -inverse_width;
#pragma unroll 1
    for (int c = last; row < count && c >= first && c < width; c -= stride) {
      if (c != last) {
        weight = weights.value(weights.load_quad(c));
        more_of = more(row, c);
        xhat = xhat_of(c);
        dn = load_quad(d_row + c);
      }
      write(row, c, fma_quad(xhat, b, dn * weight - a) * statistics.rstd, dn, xhat, more_of);
    }
    buffer ^= kMostWarps;
  }
}

}  // namespace crossvit::cross_attention
