#include <cfloat>

#include "layernorm_msa/cuda/launches.h"

namespace crossvit::layernorm_msa::cuda {
namespace {

template <class T, int kHeadDim>
using ForwardPlan = AttentionPlan<T, kHeadDim, sizeof(T) == 2 || kHeadDim <= 64 ? 32 : 16, 1>;

// The softmax over the keys so far of 16 queries. Lane 4 g + t has queries g and g + 8.
template <class P, bool kMasked>
struct Softmax {
  // With a mask finite, as no key of the first steps may be attended to.
  static constexpr float kLowest = kMasked ? -FLT_MAX : -INFINITY;
  // Largest products with a key; sums of exponentials relative to them, the lane's share.
  float peak[2] = {kLowest, kLowest}, total[2] = {0, 0};

  // Turns a step's products into weights relative to new peaks, and scales the sums to these.
  __device__ __forceinline__ void add(Sums<P::kStep / 8>& s, float scale,
                                      Sums<P::kColumnTiles>& sums) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float largest = peak[half];
#pragma unroll
      for (auto& tile : s.of) largest = fmaxf(largest, fmaxf(tile[2 * half], tile[2 * half + 1]));
      largest = max_of_row(largest);
      const float decay = exp2_approx((peak[half] - largest) * scale);
      const float shift = largest * scale;
      float total_of_step = 0;
#pragma unroll
      for (auto& tile : s.of) {
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; ++i) {
          tile[i] = exp2_approx(fmaf(tile[i], scale, -shift));
          total_of_step += tile[i];
        }
      }
      peak[half] = largest;
      total[half] = fmaf(total[half], decay, total_of_step);
#pragma unroll
      for (auto& tile : sums.of) tile[2 * half] *= decay, tile[2 * half + 1] *= decay;
    }
  }
};

template <class P>
constexpr int kForwardBytes = (P::RowTile::kSize + 2 * P::kStages * P::StepTile::kSize) *
                              static_cast<int>(sizeof(typename P::T));

// heads = softmax(q k^T / sqrt(d)) v, and its log-sum-exp.
template <class P, bool kMasked>
__global__ void __launch_bounds__(P::kThreads)
    attention_forward(const AttentionParams<typename P::T> a) {
  using T = typename P::T;
  CROSSVIT_DYNAMIC_SHARED(memory);
  T* const queries = reinterpret_cast<T*>(memory);
  T* const stages = queries + P::RowTile::kSize;
  const BlockOfHead block(a);
  const HeadRows<const T> q = rows_of_qkv(a.qkv, a, block, 0), k = rows_of_qkv(a.qkv, a, block, 1),
                          v = rows_of_qkv(a.qkv, a, block, 2);
  const float scale = a.exponent_scale();
  P::copy_rows(queries, q, block.first, block.rows, a.head_dim);  // in the first step's group

  WarpRows<P> rows(queries);
  Softmax<P, kMasked> softmax[P::kTiles];
  HeadSums<P> sums;
  pipelined<P::kStages>(
      ceil_div(a.num_tokens, P::kStep),
      [&](int step, int stage) {
        const int first = step * P::kStep, count = minimum(a.num_tokens - first, P::kStep);
        T* const tile = stages + stage * 2 * P::StepTile::kSize;
        P::copy_step(tile, k, first, count, a.head_dim);
        P::copy_step(tile + P::StepTile::kSize, v, first, count, a.head_dim);
      },
      [&](int step, int stage) {
        if (step == 0) rows.load();
        const T* const tile = stages + stage * 2 * P::StepTile::kSize;
        auto s = products_with_step(rows, tile);
#pragma unroll
        for (int i = 0; i < P::kTiles; ++i) {
          exclude_others<kMasked>(s.tile[i], a, block, step * P::kStep);
          softmax[i].add(s.tile[i], scale, sums.tile[i]);
        }
        add_weighted_step<P>(sums, s, tile + P::StepTile::kSize);
      });

  const HeadRows<T> out = rows_of_heads(a.heads, a, block);
#pragma unroll
  for (int i = 0; i < P::kTiles; ++i) {
    const auto& [peak, total] = softmax[i];
    float upper = sum_of_row(total[0]), lower = sum_of_row(total[1]);
    if constexpr (kMasked) {  // without keys to attend to, the result is 0
      if (upper == 0) upper = 1;
      if (lower == 0) lower = 1;
    }
    if (a.lse && lane_index() % 4 == 0) {
      const int token = P::first_row(i) + lane_index() / 4;
      float* const lse = a.lse + block.pair * a.num_tokens + block.first;
      const float to_natural = 1 / kLog2E;
      const auto value = [&](float largest, float sum) {
        return fmaf(largest, scale, log2f(sum)) * to_natural;
      };
      if (token < block.rows) lse[token] = value(peak[0], upper);
      if (token + 8 < block.rows) lse[token + 8] = value(peak[1], lower);
    }
    store_rows<P>(sums.tile[i], 1 / upper, 1 / lower, i, queries, out, block, a.head_dim);
  }
}

template <class T>
void launch_attention(const AttentionParams<T>& a, cudaStream_t stream) {
  with_head_dim(a.head_dim, [&](auto head_dim) {
    using P = ForwardPlan<T, head_dim()>;
    const auto kernel = a.key_mask ? attention_forward<P, true> : attention_forward<P, false>;
    check_launch(launch(kernel, attention_config(a, P::kThreads, kForwardBytes<P>, stream), a),
                 "attention_forward");
  });
}

constexpr int kZeroWarps = 8;

// Rows of `units` times 16 bytes, `stride` units apart. Grid: eight rows a block.
__global__ void __launch_bounds__(32 * kZeroWarps)
    zero_masked_rows(uint4* keys, const bool* key_mask, int64_t rows, int stride, int units) {
  const int64_t row = int64_t{blockIdx.x} * kZeroWarps + warp_index();
  if (row >= rows || key_mask[row]) return;
  uint4* const to = keys + row * stride;
  for (int i = lane_index(); i < units; i += 32) to[i] = make_uint4(0, 0, 0, 0);
}

template <class T>
void run(const ForwardParams& params, cudaStream_t stream) {
  const Problem& problem = params.problem;
  const Weights& w = params.weights;
  const int64_t width = problem.channels;
  layer_norm_forward(norm_params<T>(params.x, w.norm, problem), static_cast<T*>(params.normed),
                     stream);
  LinearParams<T> qkv =
      linear_params<T>(problem, params.normed, w.qkv.weight.data, width, 3 * width, params.qkv);
  qkv.bias = elements_of<T>(w.qkv.bias);
  linear<Linear::kForward>(qkv, stream);
  if (params.key_mask) zero_masked_keys(problem, params.key_mask, params.qkv, sizeof(T), stream);
  launch_attention(
      attention_params<T>(problem, params.qkv, params.key_mask, params.heads, params.lse), stream);
  if (!params.y) return;
  linear<Linear::kForward>(residual_params<T>(params, params.heads, w.out, width), stream);
}

}  // namespace

void zero_masked_keys(const Problem& problem, const bool* key_mask, void* qkv, int element_size,
                      cudaStream_t stream) {
  const int64_t rows = problem.batch * problem.num_tokens;
  const int units = static_cast<int>(problem.channels) * element_size / int{sizeof(uint4)};
  uint4* const keys = static_cast<uint4*>(qkv) + units;
  const LaunchConfig config = launch_config(ceil_div(rows, kZeroWarps), 32 * kZeroWarps, 0, stream);
  check_launch(launch(zero_masked_rows, config, keys, key_mask, rows, 3 * units, 2 * units),
               "zero_masked_keys");
}

void forward(const ForwardParams& params, const Place& place) {
  const DeviceGuard guard(place.device);
  check_launch(guard.status, "layernorm_msa_forward");
  with_element_type(params.problem.dtype, [&](auto element) {
    run<decltype(element)>(params, static_cast<cudaStream_t>(place.stream));
  });
}

}  // namespace crossvit::layernorm_msa::cuda
