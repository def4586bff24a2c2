#include "attention_core/cuda/forward_pass.h"
#include "cross_attention/cuda/block.h"

namespace crossvit::cross_attention::cuda {
namespace {

using attention_core::ForwardPass;
using attention_core::Image;
using attention_core::log_of_total;
using attention_core::RowLoads;
using attention_core::RowTotal;

// Grid: clusters, of images_per_cluster images each.
template <class P>
__global__ void __launch_bounds__(P::kMaxThreads, 1)
    cross_attention_forward(const ForwardParams p, const Vectors v, float* workspace,
                            int images_per_cluster, bool aliased) {
  using T = typename P::Element;
  CROSSVIT_DYNAMIC_SHARED(memory);
  const int channels = static_cast<int>(p.problem.channels);
  const int cls_channels = static_cast<int>(p.problem.cls_channels);
  const int heads = static_cast<int>(p.problem.num_heads), head_dim = channels / heads;
  const int64_t batch = p.problem.batch;
  const float eps = static_cast<float>(p.problem.eps);
  const Images images = Images::of(p.problem, images_per_cluster);
  const int64_t first = images.first;
  const int count = images.count;
  // Divides what every block computes among those that store it; their number is a power of two.
  const int rank = cluster_rank(), last_rank = cluster_size() - 1;
  const auto stores = [=](int row) { return (row & last_rank) == rank; };
  const BlockLayout layout = BlockLayout::of<T>(cls_channels, channels, aliased);
  RowStatistics* statistics = reinterpret_cast<RowStatistics*>(memory);
  T* rows = reinterpret_cast<T*>(memory + layout.wide);
  T* queries = reinterpret_cast<T*>(memory + layout.narrow);
  float* y0 = reinterpret_cast<float*>(memory + layout.floats);
  const Weights& w = p.weights;

  // The copies of the tokens overlap with the CLS path.
  ForwardPass<P> pass(memory + layout.pass, channels, eps, true);
  const auto image_of = [&](int image) {
    Image<T> x = attention_core::image_of<T>(p.tokens, {}, first + image);
    x.has_extra = true;
    x.extra = rows + image * layout.pitch;
    return x;
  };
  prefetch_parameters<T>(w, cls_channels, channels);
  copy_rows<T>(y0, p.cls, first, count, cls_channels);
  if (!aliased && images.begin < count) pass.start(image_of(images.begin), images.tokens);

  clear_rows(rows, count, cls_channels);
  __syncthreads();
  normalize_rows<T, true>(
      statistics, count, cls_channels, eps, w.proj_norm,
      [&](int row, int c) { return y0[row * cls_channels + c]; },
      [&](int row, int c, float value) {
        rows[row * operand_pitch<T>(cls_channels) + c] = from_float<T>(value);
        if (stores(row)) v.activated[(first + row) * cls_channels + c] = value;
      });
  cluster_sync();  // waits for the other blocks to start, and until this one has read the CLS
  const Share share = Share::of(channels);
  linear(rows, operand_pitch<T>(cls_channels), w.proj, cls_channels, share.first, share.last,
         [&](int row, int c, float a, float b) {
           if (row >= count) return;
           const float2 value = make_float2(a, b);
           store_in_ranks(reinterpret_cast<float2*>(y0 + row * channels + c), value);
           *reinterpret_cast<float2*>(v.y0 + (first + row) * channels + c) = value;
         });
  cluster_sync();

  clear_rows(rows, count, channels);
  const int pitch = operand_pitch<T>(channels);
  const auto load_y0 = [&](int row, int c) { return y0[row * channels + c]; };
  normalize_rows<T, false>(statistics, count, channels, eps, w.norm, load_y0,
                           [&](int row, int c, float value) {
                             rows[row * pitch + c] = from_float<T>(value);
                             if (stores(row)) v.normed[(first + row) * channels + c] = value;
                           });
  __syncthreads();
  // Writes to the queries of all blocks, and to memory.
  const auto write_queries = [&](float* saved) {
    return [&, saved](int row, int c, float a, float b) {
      const bool has_image = row < count;
      a = has_image ? a : 0;
      b = has_image ? b : 0;
      store_in_ranks(reinterpret_cast<Pair<T>*>(queries + row * pitch + c), pack<T>(a, b));
      if (has_image) {
        *reinterpret_cast<float2*>(saved + (first + row) * channels + c) = make_float2(a, b);
      }
    };
  };
  linear(rows, pitch, w.query, channels, share.first, share.last, write_queries(v.q));
  cluster_sync();

  // kt_h = W_k,h^T q_h / sqrt(d)
  const float scale = 1.0f / sqrtf(static_cast<float>(head_dim));
  transposed_linears(queries, pitch, w.key.weight.data, heads, head_dim, channels, [&](int head) {
    float* to = v.kt + head_offset(batch, channels, head, first);
    return [&, to](int row, int c, float4 values) {
      if (row >= count) return;
      *reinterpret_cast<float4*>(to + int64_t{row} * channels + c) = scaled(values, scale);
    };
  });
  // y0 is the first token of each image.
  for (int row = 0; row < count; ++row) {
#pragma unroll 1
    for (int c = thread_index(); c < channels; c += block_threads()) {
      rows[row * layout.pitch + c] = from_float<T>(y0[row * channels + c]);
    }
  }
  cluster_sync();

  const Elements<T> gains(w.norm.weight);
  const auto run = [&](int image, int begin, const TilePartials<P>& tiles) {
    const Image<T> x = image_of(image);
    const int count = minimum(P::kRows, heads - begin);
    const float* kt = v.kt + head_offset(batch, channels, begin, first + image);
    const RowLoads<P, 2, Elements<T>> u(kt, batch * channels, count, channels, gains);
    if (aliased || image != images.begin || begin > 0) pass.start(x, images.tokens);
    u.write(pass.rows());
    pass.run(x, images.tokens, tiles);
  };
  const auto results = [&](int image, int begin) {
    const auto write = [&](int row, int c, float sum, const RowTotal& total) {
      const int head = begin + row;
      v.m[head_offset(batch, channels, head, first + image) + c] = sum * total.inverse;
      if (c == 0) v.lse[(first + image) * heads + head] = log_of_total(total.state);
    };
    pass.results(minimum(P::kRows, heads - begin), images.tokens, write);
    __syncthreads();
  };
  pass_over_images<P>(pass, images, workspace, heads, channels, run, results);

  // o_h = W_v,h (gamma m_h + beta) + b_v,h
  linear_of_heads(
      rows, pitch, w.value, w.norm, channels, head_dim, count,
      [&](int head) { return v.m + head_offset(batch, channels, head, first); },
      [](float weight, float bias, float m) { return m * weight + bias; }, write_queries(v.o));
  cluster_sync();

  // y = y0 + r (W_o o + b_o) replaces y0
  linear(queries, pitch, w.out, channels, share.first, share.last,
         [&](int row, int c, float a, float b) {
           if (row >= count) return;
           const float r = scale_of_residual(p.residual_scale, first + row);
           const float2 residual =
               *reinterpret_cast<const float2*>(v.y0 + (first + row) * channels + c);
           const float2 value = make_float2(residual.x + r * a, residual.y + r * b);
           store_in_ranks(reinterpret_cast<float2*>(y0 + row * channels + c), value);
           *reinterpret_cast<float2*>(v.y + (first + row) * channels + c) = value;
         });
  cluster_sync();

  clear_rows(rows, count, channels);
  normalize_rows<T, true>(statistics, count, channels, eps, w.back_norm, load_y0,
                          [&](int row, int c, float value) {
                            rows[row * pitch + c] = from_float<T>(value);
                            if (stores(row)) v.back_activated[(first + row) * channels + c] = value;
                          });
  __syncthreads();
  const Share back = Share::of(cls_channels);
  linear(rows, pitch, w.back, channels, back.first, back.last,
         [&](int row, int c, float a, float b) {
           if (row >= count) return;
           T* to = static_cast<T*>(p.new_cls) + (first + row) * cls_channels + c;
           store_pair(to, pack<T>(a, b));
         });
}

}  // namespace

int64_t workspace_size(const Problem& problem, const ClusterShape& shape) {
  if (shape.blocks / shape.images <= 1) return 0;
  const int64_t tiles = problem.num_tokens / attention_core::kTileTokens + 1;  // with the CLS
  return problem.batch * tiles * attention_core::cuda::padded_rows(problem.num_heads) *
         attention_core::partial_floats(static_cast<int>(problem.channels));
}

BlockSize forward_block(DType dtype, int cls_channels, int channels, int max_bytes) {
  return block_of<ForwardPass>(dtype, cls_channels, channels, max_bytes);
}

void forward(const ForwardParams& params, const ClusterShape& shape, float* workspace,
             const Place& place) {
  start<ForwardPass>("cross_attention_forward", params, shape, workspace, place,
                     [](auto plan) { return &cross_attention_forward<decltype(plan)>; });
}

}  // namespace crossvit::cross_attention::cuda
