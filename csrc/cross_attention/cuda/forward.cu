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
                            int images_per_cluster, const BlockLayout layout) {
  using T = typename P::Element;
  CROSSVIT_DYNAMIC_SHARED(memory);
  const int channels = static_cast<int>(p.problem.channels);
  const int cls_channels = static_cast<int>(p.problem.cls_channels);
  const int heads = static_cast<int>(p.problem.num_heads);
  const int64_t batch = p.problem.batch;
  const float eps = static_cast<float>(p.problem.eps);
  const Images images = Images::of(p.problem, images_per_cluster);
  const int64_t first = images.first;
  const int count = images.count;
  T* rows = reinterpret_cast<T*>(memory + layout.wide);
  T* queries = reinterpret_cast<T*>(memory + layout.narrow);
  float* floats = reinterpret_cast<float*>(memory + layout.floats);
  const int pitch = operand_pitch<T>(channels);
  const Weights& w = p.weights;

  // The copies of the tokens overlap with the CLS path.
  ForwardPass<P> pass(memory + layout.pass, channels, eps, true);
  const auto image_of = [&](int image) {
    Image<T> x = attention_core::image_of<T>(p.tokens, {}, first + image);
    x.has_extra = true;
    x.extra = rows + image * pitch;
    return x;
  };
  prefetch_parameters<T>(w, cls_channels, channels);
  const RowOwners owners = RowOwners::of(count);
  copy_rows<T>(floats, p.cls, first, owners.begin(), owners.step(), count, cls_channels);
  if (!layout.aliased && images.begin < count) pass.start(image_of(images.begin), images.tokens);

  // f
  const RowNormalization<T, true> proj_norm(w.proj_norm, cls_channels, owners, count);
  LinearTiles<T, Share> proj(w.proj, cls_channels, Share::of(channels));
  clear_rows(rows, count, cls_channels);
  cluster_sync();  // waits for the other blocks to start
  proj_norm.run(floats, eps, owners.writer(rows, cls_channels, v.activated, first));
  cluster_sync();  // also until no block reads its CLS any more
  proj.run(rows, operand_pitch<T>(cls_channels), [&](int row, int c, float a, float b) {
    if (row >= count) return;
    const float2 value = make_float2(a, b);
    owners.store_input(row, reinterpret_cast<float2*>(floats + row * channels + c), value);
    *reinterpret_cast<float2*>(v.y0 + (first + row) * channels + c) = value;
  });
  const RowNormalization<T, false> norm(w.norm, channels, owners, count);
  cluster_sync();

  LinearTiles<T, OwnHeads> query(w.query, channels, OwnHeads::of(channels, heads));
  clear_rows(rows, count, channels);
  norm.run(floats, eps, owners.writer(rows, channels, v.normed, first));
  owners.wait();
  // q and kt of a head are the same block's.
  query.run(rows, pitch, [&](int row, int c, float a, float b) {
    const bool has_image = row < count;
    a = has_image ? a : 0;
    b = has_image ? b : 0;
    *reinterpret_cast<Pair<T>*>(queries + row * pitch + c) = pack<T>(a, b);
    if (has_image) {
      *reinterpret_cast<float2*>(v.q + (first + row) * channels + c) = make_float2(a, b);
    }
  });
  __syncthreads();

  // kt_h = W_k,h^T q_h / sqrt(d)
  const float scale = 1.0f / sqrtf(static_cast<float>(channels / heads));
  transposed_linears_of_heads(
      queries, pitch, w.key.weight.data, OwnHeads::of(channels, heads), channels, [&](int head) {
        float* to = v.kt + head_offset(batch, channels, head, first);
        return [&, to](int row, int c, float4 values) {
          if (row >= count) return;
          *reinterpret_cast<float4*>(to + int64_t{row} * channels + c) = scaled(values, scale);
        };
      });
  // y0 is the first token of each image.
#pragma unroll 1
  for (int image = images.begin; image < count; image += images.step) {
    const float* y0 = v.y0 + (first + image) * channels;
#pragma unroll 1
    for (int c = thread_index(); c < channels; c += block_threads()) {
      rows[image * pitch + c] = from_float<T>(y0[c]);
    }
  }
  cluster_sync();

  const auto run = [&](int image, int head, const TilePartials<P>& tiles) {
    const Image<T> x = image_of(image);
    const int count = minimum(P::kRows, heads - head);
    const float* kt = v.kt + head_offset(batch, channels, head, first + image);
    constexpr int kColumns = P::kWarpsShareTiles ? 1 : 2;  // as registers allow
    const RowLoads<P, kColumns, Elements<T>> u(kt, batch * channels, count, channels,
                                               Elements<T>(w.norm.weight));
    if (layout.aliased || image != images.begin || head > 0) pass.start(x, images.tokens);
    u.write(pass.rows());
    pass.run(x, images.tokens, tiles);
  };
  const auto results = [&](int image, int first_head) {
    const auto write = [&](int row, int c, float sum, const RowTotal& total) {
      const int head = first_head + row;
      v.m[head_offset(batch, channels, head, first + image) + c] = sum * total.inverse;
      if (c == 0) v.lse[(first + image) * heads + head] = log_of_total(total.state);
    };
    pass.results(minimum(P::kRows, heads - first_head), images.tokens, write);
    __syncthreads();
  };
  pass_over_images<P>(pass, images, workspace, heads, channels, run, results);

  // o_h = W_v,h (gamma m_h + beta) + b_v,h, to the operands of all blocks, and to memory
  linear_of_heads(
      rows, pitch, w.value, w.norm, channels, OwnHeads::of(channels, heads), count,
      [&](int head) { return v.m + head_offset(batch, channels, head, first); },
      [](float weight, float bias, float m) { return m * weight + bias; },
      [&](int row, int c, float a, float b) {
        const bool has_image = row < count;
        a = has_image ? a : 0;
        b = has_image ? b : 0;
        store_in_ranks(reinterpret_cast<Pair<T>*>(queries + row * pitch + c), pack<T>(a, b));
        if (has_image) {
          *reinterpret_cast<float2*>(v.o + (first + row) * channels + c) = make_float2(a, b);
        }
      });
  LinearTiles<T, Share> out(w.out, channels, Share::of(channels));
  cluster_sync();

  // y = y0 + r (W_o o + b_o)
  const RowOwners last_owners = RowOwners::of(count);
  out.run(queries, pitch, [&](int row, int c, float a, float b) {
    if (row >= count) return;
    const float r = scale_of_residual(p.residual_scale, first + row);
    const float2 residual = *reinterpret_cast<const float2*>(v.y0 + (first + row) * channels + c);
    const float2 value = make_float2(residual.x + r * a, residual.y + r * b);
    last_owners.store_input(row, reinterpret_cast<float2*>(floats + row * channels + c), value);
    *reinterpret_cast<float2*>(v.y + (first + row) * channels + c) = value;
  });
  const RowNormalization<T, true> back_norm(w.back_norm, channels, last_owners, count);
  LinearTiles<T, Share> back(w.back, channels, Share::of(cls_channels));
  cluster_sync();

  // g
  clear_rows(rows, count, channels);
  back_norm.run(floats, eps, last_owners.writer(rows, channels, v.back_activated, first));
  last_owners.wait();
  back.run(rows, pitch, [&](int row, int c, float a, float b) {
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
