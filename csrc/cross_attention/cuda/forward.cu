#include "cross_attention/cuda/block.h"
#include "cross_attention/cuda/passes.h"

namespace crossvit::cross_attention::cuda {
namespace {

using attention_core::Image;
using attention_core::log_of_total;
using attention_core::RowLoads;

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
  cluster_arrive();
  // Made anew for each use: what follows from its members would take many registers in between.
  const auto new_pass = [&](int channels) {
    return ForwardTokens<P>(memory + used_from_here(layout.pass), channels, eps, true);
  };
  const auto image_of = [&](int image) {
    Image<T> x = attention_core::image_of<T>(p.tokens, {}, first + image);
    x.has_extra = true;
    x.extra = rows + image * pitch;
    return x;
  };
  prefetch_parameters<T>(w, cls_channels, channels);
  const RowOwners owners = RowOwners::of(count);
  // Where all blocks compute all rows, others may store y0 while this one reads its CLS.
  float* cls = floats + (owners.are_all ? 14 * maximum(cls_channels, channels) : 0);
  copy_rows<T>(cls, p.cls, first, owners.begin(), owners.step(), count, cls_channels);
  const RowNormalization<T, true> proj_norm(w.proj_norm, cls_channels, owners, count);
  if (!layout.aliased && images.begin < count)
    new_pass(channels).start(image_of(images.begin), images.tokens);

  // f
  LinearTiles<T, Share> proj(w.proj, cls_channels, Share::of(channels));
  __syncthreads();
  cluster_wait();  // for the other blocks to start
  proj_norm.run(cls, eps, owners.writer(rows, cls_channels, v.activated, first));
  owners.wait();
  proj.run(rows, operand_pitch<T>(cls_channels), count, [&](int row, int c, float a, float b) {
    const float2 value = make_float2(a, b);
    owners.store_input(row, reinterpret_cast<float2*>(floats + row * channels + c), value);
    *reinterpret_cast<float2*>(v.y0 + (first + row) * channels + c) = value;
  });
  const RowNormalization<T, false> norm(w.norm, channels, owners, count);
  const OwnHeads own_heads = OwnHeads::of(channels, heads);
  LinearTiles<T, OwnHeads> query(w.query, channels, own_heads);
  cluster_sync();

  norm.run(floats, eps, owners.writer(rows, channels, v.normed, first));
  TransposedHeads<T, OwnHeads> key(w.key.weight, own_heads, channels);
  owners.wait();
  // q and kt of a head are the same block's.
  query.run(rows, pitch, count, [&](int row, int c, float a, float b) {
    *reinterpret_cast<Pair<T>*>(queries + row * pitch + c) = pack<T>(a, b);
    *reinterpret_cast<float2*>(v.q + (first + row) * channels + c) = make_float2(a, b);
  });
  __syncthreads();

  // kt_h = W_k,h^T q_h / sqrt(d)
  const float scale = 1.0f / sqrtf(static_cast<float>(channels / heads));
  key.run(queries, pitch, count, [&](int head, int row, int c, float4 values) {
    store_quad(v.kt + head_offset(batch, channels, head, first + row) + c, values * scale);
  });
  // y0 is the first token of each image.
  for_each_quad(images.begin, images.step, count, channels, [&](int image, int c) {
    store_quad(rows + image * pitch + c, load_quad(v.y0 + (first + image) * channels + c));
  });
  cluster_sync();

  const auto run = [&](const Sizes& s, int image, int head, const TilePartials<P>& tiles) {
    auto pass = new_pass(s.channels);
    const Image<T> x = image_of(image);
    const float* kt = v.kt + head_offset(s.batch, s.channels, head, s.first + image);
    constexpr int kColumns = P::kWarpsShareTiles ? 1 : 2;  // as registers allow
    const RowLoads<P, kColumns, Elements<T>> u(kt, s.batch * s.channels,
                                               minimum(P::kRows, s.heads - head), s.channels,
                                               Elements<T>(w.norm.weight));
    if (layout.aliased || image != images.begin || head > 0) pass.start(x, s.tokens);
    u.write(pass.rows());
    pass.run(x, s.tokens, tiles);
  };
  const auto gather = [&](const Sizes& s, int head, const TilePartials<P>& tiles) {
    new_pass(s.channels).gather(tiles, minimum(P::kRows, s.heads - head), s.tokens);
  };
  const auto results = [&](const Sizes& s, int image, int first_head) {
    new_pass(s.channels)
        .results(
            minimum(P::kRows, s.heads - first_head), s.tokens,
            [&](int row, int c, float4 m) {
              const int head = first_head + row;
              store_quad(v.m + head_offset(s.batch, s.channels, head, s.first + image) + c, m);
            },
            [&](int row, const RowTotal& total) {
              v.lse[(s.first + image) * s.heads + first_head + row] = log_of_total(total.state);
            });
    __syncthreads();
  };
  pass_over_images<P>(images, p.problem, workspace, run, gather, results);

  // o_h = W_v,h (gamma m_h + beta) + b_v,h, to the operands of all blocks, and to memory
  linear_of_heads(
      rows, pitch, w.value, w.norm, channels, OwnHeads::of(channels, heads), count,
      [&](int head) { return v.m + head_offset(batch, channels, head, first); },
      [](float4 weight, float4 bias, float4 m) { return m * weight + bias; },
      [&](int row, int c, float a, float b) {
        store_in_ranks(reinterpret_cast<Pair<T>*>(queries + row * pitch + c), pack<T>(a, b));
        *reinterpret_cast<float2*>(v.o + (first + row) * channels + c) = make_float2(a, b);
      });
  LinearTiles<T, Share> out(w.out, channels, Share::of(channels));
  cluster_sync();

  // y = y0 + r (W_o o + b_o)
  const RowOwners last_owners = RowOwners::of(count);
  out.run(queries, pitch, count, [&](int row, int c, float a, float b) {
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
  back_norm.run(floats, eps, last_owners.writer(rows, channels, v.back_activated, first));
  last_owners.wait();
  back.run(rows, pitch, count, [&](int row, int c, float a, float b) {
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
  return block_of<ForwardTokens>(dtype, cls_channels, channels, max_bytes);
}

void forward(const ForwardParams& params, const ClusterShape& shape, float* workspace,
             const Place& place) {
  start<ForwardTokens>("cross_attention_forward", params, shape, workspace, place,
                       [](auto plan) { return &cross_attention_forward<decltype(plan)>; });
}

}  // namespace crossvit::cross_attention::cuda
