#include "common/cuda/layer_norm.h"

#include "common/cuda/dispatch.h"
#include "common/cuda/four_floats.h"

// A warp has a row, in registers, so that memory is read once.

namespace crossvit {
namespace {

constexpr int kNormWarps = 8;

// Of each 128 channels of a row, a lane has four.
__device__ __forceinline__ int lane_channel(int i) { return 4 * (lane_index() + 32 * i); }

// A row in a warp's registers.
template <int kVectors>
struct LaneRow {
  float4 part[kVectors];

  // Calls visit(channel, part) for the lane's channels below `channels`, a multiple of 4.
  template <class Visit>
  __device__ __forceinline__ void visit(int channels, Visit visit) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if (lane_channel(i) < channels) visit(lane_channel(i), part[i]);
    }
  }
};

// A row as it was loaded, followed by zeros.
template <class T, int kVectors>
struct LoadedRow {
  uint4 bits[kVectors];

  __device__ __forceinline__ void load(const Elements<T>& row, int channels) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      bits[i] = make_uint4(0, 0, 0, 0);
      if (lane_channel(i) < channels) bits[i] = row.load_bits_4(lane_channel(i));
    }
  }

  __device__ __forceinline__ LaneRow<kVectors> values(const Elements<T>& type) const {
    LaneRow<kVectors> row;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) row.part[i] = type.four(bits[i]);
    return row;
  }
};

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
  const int row = static_cast<int>(blockIdx.x) * kNormWarps + warp_index();
  if (row >= a.rows) return;
  LoadedRow<T, kVectors> loaded;
  loaded.load(a.x[row], a.channels);
  LaneRow<kVectors> x = loaded.values(a.x.x);
  standardize(x, a.channels, a.eps);
  const MutableElements<T> out = {normed, false};
  x.visit(a.channels, [&](int c, float4& xhat) {
    out.store_4(int64_t{row} * a.channels + c, xhat * a.weight.load_4(c) + a.bias.load_4(c));
  });
}

// Rows of a warp and of a block of backward. They do not depend on the batch, so neither
// do the results.
constexpr int kNormBackwardRowsOfWarp = 4;
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

// What backward loads of a row.
template <class T, int kVectors>
struct NormBackwardRow {
  LoadedRow<T, kVectors> x, d, dy;

  __device__ __forceinline__ void load(const NormBackwardParams<T>& a, int row) {
    const int channels = a.norm.channels;
    const int64_t first = int64_t{row} * channels;
    x.load(a.norm.x[row], channels);
    d.load(Elements<T>{a.d, false}.from(first), channels);
    dy.load(a.dy.from(first), channels);
  }
};

// dx = dy + LayerNorm's backward of d. Grid: kNormBackwardRows rows a block.
template <class T, int kVectors>
__global__ void __launch_bounds__(32 * kNormWarps)
    layer_norm_backward_kernel(const NormBackwardParams<T> a) {
  CROSSVIT_DYNAMIC_SHARED(memory);
  const NormParams<T>& norm = a.norm;
  const int channels = norm.channels;
  const float inverse_width = 1.0f / channels;
  LaneRow<kVectors> dweight = {}, dbias = {};
  const int first = static_cast<int>(blockIdx.x) * kNormBackwardRows + warp_index();
  const int end = minimum(norm.rows, first - warp_index() + kNormBackwardRows);
  constexpr int kAhead = kVectors <= 3 ? kNormWarps : 0;  // as registers allow
  NormBackwardRow<T, kVectors> next;
  if (kAhead > 0 && first < end) next.load(a, first);
#pragma unroll 1
  for (int row = first; row < end; row += kNormWarps) {
    if (kAhead == 0) next.load(a, row);
    LaneRow<kVectors> x = next.x.values(norm.x.x);
    LaneRow<kVectors> d = next.d.values({a.d, false});
    const LaneRow<kVectors> dy = next.dy.values(a.dy);
    if (kAhead > 0 && row + kAhead < end) next.load(a, row + kAhead);
    const int64_t first_element = int64_t{row} * channels;
    const float rstd = standardize(x, channels, norm.eps);
    float sum = 0, products = 0;
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      const int c = lane_channel(j);
      if (c >= channels) continue;
      const float4 weight = norm.weight.load_4(c), xhat = x.part[j];
      dweight.part[j] = dweight.part[j] + d.part[j] * xhat;
      dbias.part[j] = dbias.part[j] + d.part[j];
      if (a.normed) {
        const MutableElements<T> normed = {a.normed, false};
        normed.store_4(first_element + c, xhat * weight + norm.bias.load_4(c));
      }
      d.part[j] = d.part[j] * weight;
      sum += sum_of_four(d.part[j]);
      products += sum_of_four(d.part[j] * xhat);
    }
    const float mean = sum_of_warp(sum) * inverse_width;
    const float slope = sum_of_warp(products) * inverse_width;
    const int image = norm.x.image(row);
    const bool is_cls = norm.x.cls && row == image * norm.x.num_tokens.value;
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      const int c = lane_channel(j);
      if (c >= channels) continue;
      const float4 dx = ((d.part[j] - mean) + x.part[j] * -slope) * rstd + dy.part[j];
      if (is_cls) a.dcls.store_4(int64_t{image} * channels + c, dx);
      a.dx.store_4(first_element + c, is_cls ? make_float4(0, 0, 0, 0) : dx);
    }
  }
  float* const shares = a.shares + int64_t{blockIdx.x} * 2 * channels;
  add_shares(dweight, dbias, reinterpret_cast<float*>(memory), shares, channels);
}

// Calls run() with the vectors of four channels that a lane has of a row of up to 256, 384 or 1024.
template <class Run>
void with_vectors(int channels, Run&& run) {
  if (channels <= 256) return run(std::integral_constant<int, 2>());
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
