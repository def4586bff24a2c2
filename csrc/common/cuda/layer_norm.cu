#include "common/cuda/layer_norm.h"

#include "common/cuda/dispatch.h"

// A warp has a row, in registers, so that memory is read once.

namespace crossvit {
namespace {

constexpr int kNormWarps = 8;

// A row in a warp's registers: of each 128 channels, a lane has four.
template <int kVectors>
struct LaneRow {
  float4 part[kVectors];

  static __device__ __forceinline__ int channel(int i) { return 4 * (lane_index() + 32 * i); }

  // Calls visit(channel, part) for the lane's channels below `channels`, a multiple of 4.
  template <class Visit>
  __device__ __forceinline__ void visit(int channels, Visit visit) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if (channel(i) < channels) visit(channel(i), part[i]);
    }
  }

  // Loads a row; zeros follow it.
  template <class T>
  __device__ __forceinline__ void load(const Elements<T>& row, int channels) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) part[i] = make_float4(0, 0, 0, 0);
    visit(channels, [&](int c, float4& x) { x = row.load_4(c); });
  }
};

__device__ __forceinline__ float sum_of_four(const float4& x) { return (x.x + x.y) + (x.z + x.w); }
__device__ __forceinline__ float4 operator*(const float4& a, const float4& b) {
  return make_float4(a.x * b.x, a.y * b.y, a.z * b.z, a.w * b.w);
}
__device__ __forceinline__ float4 operator+(const float4& a, const float4& b) {
  return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
}
__device__ __forceinline__ float4 operator*(const float4& a, float b) {
  return make_float4(a.x * b, a.y * b, a.z * b, a.w * b);
}
__device__ __forceinline__ float4 operator-(const float4& a, float b) {
  return make_float4(a.x - b, a.y - b, a.z - b, a.w - b);
}

// Replaces a row by (x - mean) rstd; returns rstd.
template <int kVectors>
__device__ __forceinline__ float standardize(LaneRow<kVectors>& row, int channels, float eps) {
  const float inverse_width = 1.0f / channels;
  float sum = 0, squares = 0;
  row.visit(channels, [&](int, float4& x) { sum += sum_of_four(x); });
  const float mean = sum_of_warp(sum) * inverse_width;
  row.visit(channels, [&](int, float4& x) {
    x = x - mean;
    squares += sum_of_four(x * x);
  });
  const float rstd = rsqrtf(sum_of_warp(squares) * inverse_width + eps);
  row.visit(channels, [&](int, float4& x) { x = x * rstd; });
  return rstd;
}

// normed = LN(x) [rows, C]. Grid: eight rows a block.
template <class T, int kVectors>
__global__ void __launch_bounds__(32 * kNormWarps)
    layer_norm_forward_kernel(const NormParams<T> a, T* normed) {
  const int64_t row = int64_t{blockIdx.x} * kNormWarps + warp_index();
  if (row >= a.rows) return;
  LaneRow<kVectors> x;
  x.load(a.x[row], a.channels);
  standardize(x, a.channels, a.eps);
  const MutableElements<T> out = {normed, false};
  x.visit(a.channels, [&](int c, float4& xhat) {
    out.store_4(row * a.channels + c, xhat * a.weight.load_4(c) + a.bias.load_4(c));
  });
}

// Rows of a warp and of a block of backward. They do not depend on the batch, so neither
// do the results.
constexpr int kNormBackwardRowsOfWarp = 8;
constexpr int kNormBackwardRows = kNormWarps * kNormBackwardRowsOfWarp;

int norm_backward_shared_bytes(int channels) {
  return kNormWarps * 2 * channels * static_cast<int>(sizeof(float));
}

// Adds up a block's shares of the gradients of weight and bias, in the order of warps.
template <int kVectors>
__device__ void add_shares(LaneRow<kVectors>& dweight, LaneRow<kVectors>& dbias, float* shared,
                           float* shares, int channels) {
  float* of_warp = shared + warp_index() * 2 * channels;
  dweight.visit(channels, [&](int c, float4& x) { *reinterpret_cast<float4*>(of_warp + c) = x; });
  dbias.visit(channels,
              [&](int c, float4& x) { *reinterpret_cast<float4*>(of_warp + channels + c) = x; });
  __syncthreads();
  for (int c = thread_index(); c < 2 * channels; c += 32 * kNormWarps) {
    float sum = 0;
#pragma unroll
    for (int warp = 0; warp < kNormWarps; ++warp) sum += shared[warp * 2 * channels + c];
    shares[c] = sum;
  }
}

// dx = dy + LayerNorm's backward of d. Grid: kNormBackwardRows rows a block.
template <class T, int kVectors>
__global__ void __launch_bounds__(32 * kNormWarps)
    layer_norm_backward_kernel(const NormBackwardParams<T> a) {
  CROSSVIT_DYNAMIC_SHARED(memory);
  const NormParams<T>& norm = a.norm;
  const int channels = norm.channels;
  const float inverse_width = 1.0f / channels;
  LaneRow<kVectors> dweight = {}, dbias = {};
  const int64_t first = int64_t{blockIdx.x} * kNormBackwardRows + warp_index();
#pragma unroll 1
  for (int i = 0; i < kNormBackwardRowsOfWarp; ++i) {
    const int64_t row = first + i * kNormWarps;
    if (row >= norm.rows) break;
    LaneRow<kVectors> x, d;
    x.load(norm.x[row], channels);
    d.load(Elements<T>{a.d, false}.from(row * channels), channels);
    const float rstd = standardize(x, channels, norm.eps);
    float sum = 0, products = 0;
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      const int c = LaneRow<kVectors>::channel(j);
      if (c >= channels) continue;
      const float4 weight = norm.weight.load_4(c), xhat = x.part[j];
      dweight.part[j] = dweight.part[j] + d.part[j] * xhat;
      dbias.part[j] = dbias.part[j] + d.part[j];
      if (a.normed) {
        const MutableElements<T> normed = {a.normed, false};
        normed.store_4(row * channels + c, xhat * weight + norm.bias.load_4(c));
      }
      d.part[j] = d.part[j] * weight;
      sum += sum_of_four(d.part[j]);
      products += sum_of_four(d.part[j] * xhat);
    }
    const float mean = sum_of_warp(sum) * inverse_width;
    const float slope = sum_of_warp(products) * inverse_width;
    const int64_t image = row / norm.x.num_tokens;
    const bool is_cls = norm.x.cls && row == image * norm.x.num_tokens;
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      const int c = LaneRow<kVectors>::channel(j);
      if (c >= channels) continue;
      const float4 through_norm = ((d.part[j] - mean) + x.part[j] * -slope) * rstd;
      const float4 dx = through_norm + a.dy.load_4(row * channels + c);
      if (is_cls) a.dcls.store_4(image * channels + c, dx);
      a.dx.store_4(row * channels + c, is_cls ? make_float4(0, 0, 0, 0) : dx);
    }
  }
  float* const shares = a.shares + int64_t{blockIdx.x} * 2 * channels;
  add_shares(dweight, dbias, reinterpret_cast<float*>(memory), shares, channels);
}

// Calls run() with the vectors of four channels that a lane has of a row of up to 384 or 1024.
template <class Run>
void with_vectors(int channels, Run&& run) {
  if (channels <= 384) return run(std::integral_constant<int, 3>());
  return run(std::integral_constant<int, kMaxNormChannels / 128>());
}

}  // namespace

template <class T>
void layer_norm_forward(const NormParams<T>& params, T* normed, cudaStream_t stream) {
  const LaunchConfig config =
      launch_config(ceil_div(params.rows, kNormWarps), 32 * kNormWarps, 0, stream);
  with_vectors(params.channels, [&](auto vectors) {
    check_launch(launch(layer_norm_forward_kernel<T, vectors()>, config, params, normed),
                 "layer_norm_forward");
  });
}

template <class T>
void layer_norm_backward(const NormBackwardParams<T>& params, cudaStream_t stream) {
  const LaunchConfig config =
      launch_config(norm_backward_blocks(params.norm.rows), 32 * kNormWarps,
                    norm_backward_shared_bytes(params.norm.channels), stream);
  with_vectors(params.norm.channels, [&](auto vectors) {
    check_launch(launch(layer_norm_backward_kernel<T, vectors()>, config, params),
                 "layer_norm_backward");
  });
}

int64_t norm_backward_blocks(int64_t rows) { return ceil_div(rows, kNormBackwardRows); }

#define CROSSVIT_LAYER_NORM(T)                                                 \
  template void layer_norm_forward<T>(const NormParams<T>&, T*, cudaStream_t); \
  template void layer_norm_backward<T>(const NormBackwardParams<T>&, cudaStream_t);
CROSSVIT_LAYER_NORM(float)
CROSSVIT_LAYER_NORM(bf16)
CROSSVIT_LAYER_NORM(half)
#undef CROSSVIT_LAYER_NORM

}  // namespace crossvit
