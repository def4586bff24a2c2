#include "cross_attention/cuda/block.h"
#include "cross_attention/cuda/passes.h"
#include "cross_attention/cuda/sent_rows.h"

namespace crossvit::cross_attention::cuda {
namespace {

using attention_core::Image;
using attention_core::log_of_total;
using attention_core::RowLoads;

// Grid: clusters, of sharing.images images each.
template <class P>
__global__ void __launch_bounds__(P::kMaxThreads, 1)
    cross_attention_forward(const ForwardParams p, const Vectors v, float* workspace,
                            const Sharing sharing, const BlockLayout layout) {
  using T = typename P::Element;
  CROSSVIT_DYNAMIC_SHARED(memory);
  const int channels = static_cast<int>(p.problem.channels);
  const int cls_channels = static_cast<int>(p.problem.cls_channels);
  const int heads = static_cast<int>(p.problem.num_heads);
  const int64_t batch = p.problem.batch;
  const float eps = static_cast<float>(p.problem.eps);
  const Images images = Images::of(p.problem, sharing);
  const int64_t first = images.first;
  const int count = images.count;
  T* rows = reinterpret_cast<T*>(memory + layout.wide);
  T* narrow = reinterpret_cast<T*>(memory + layout.narrow);
  const int pitch = operand_pitch<T>(channels), cls_pitch = operand_pitch<T>(cls_channels);
  const Weights& w = p.weights;

  // Made anew for each use: what follows from its members would take many registers in between.
  const auto new_pass = [&](int channels) {
    return ForwardTokens<P>(memory + used_from_here(layout.pass), channels, eps, true,
                            layout.second_stages);
  };
  const auto image_of = [&](int image) {
    Image<T> x = attention_core::image_of<T>(p.tokens, {}, first + image);
    x.has_extra = true;
    x.extra = rows + image * pitch;
    return x;
  };
  // Every block normalises all rows: that takes less time than another barrier of the cluster.
  const auto writer_of = [&](int width, float* saved) {
    const int rank = cluster_rank(), ranks = cluster_size();
    return [=](int row, int c, float4 values) {
      store_quad(rows + row * operand_pitch<T>(width) + c, values);
      if ((row & (ranks - 1)) == rank) store_quad(saved + (first + row) * width + c, values);
    };
  };
  float* gains = reinterpret_cast<float*>(memory + layout.floats + sharing.sent_bytes);

  // f, while the first tokens are copied
  RowNormalization<T, true, ParameterRows<T>> proj_norm(
      w.proj_norm, {Elements<T>(p.cls), first, cls_channels}, cls_channels, count);
  proj_norm.start();
  LinearTiles<T, Share> proj(w.proj, cls_channels, Share::of(channels));
  if (images.blocks_per_image == 1) prefetch_parameters<T>(w, cls_channels, channels);
  const bool starts_early = !layout.aliased && images.begin < count;
  if (starts_early) new_pass(channels).start_first(image_of(images.begin), images.tokens);
  proj_norm.run(eps, writer_of(cls_channels, v.activated));
  __syncthreads();
  const SentRows<P> sent(memory + layout.floats, images, heads);
  if (sharing.operands_are_sent) sent.clear_unused(channels);
  proj.run(rows, cls_pitch, count, [&](int row, int c, float a, float b) {
    *reinterpret_cast<float2*>(v.y0 + (first + row) * channels + c) = make_float2(a, b);
  });
  cluster_arrive();
  RowNormalization<T, false, FloatRows> norm(w.norm, {v.y0 + first * channels, channels}, channels,
                                             count);
  const OwnHeads own_heads = OwnHeads::of(sharing, heads);
  LinearTiles<T, OwnHeads> query(w.query, channels, own_heads);
  TransposedHeads<T, OwnHeads> key(w.key.weight, own_heads, channels);
  cluster_wait();

  norm.start();
  norm.run(eps, writer_of(channels, v.normed));
  __syncthreads();
  if (sharing.operands_are_sent) norm.store_parameters(gains, gains + channels);
  // q and kt of a head are the same block's.
  query.run(rows, pitch, count, [&](int row, int c, float a, float b) {
    *reinterpret_cast<Pair<T>*>(narrow + row * pitch + c) = pack<T>(a, b);
    *reinterpret_cast<float2*>(v.q + (first + row) * channels + c) = make_float2(a, b);
  });
  __syncthreads();

  // kt_h = W_k,h^T q_h / sqrt(d), to memory and, times gamma, to the blocks of the image
  const float scale = rsqrtf(static_cast<float>(sharing.head_dim));
  key.run(narrow, pitch, count, [&](int head, int row, int c, float4 low, float4 high, Ranks to) {
    low = low * scale, high = high * scale;
    if (to.first == 0) {
      float* kt = v.kt + head_offset(batch, channels, head, first + row) + c;
      store_quad(kt, low);
      store_quad(kt + 4, high);
    }
    if (!sharing.operands_are_sent) return;
    sent.send(row, head, channels, c, low * load_quad(gains + c), high * load_quad(gains + c + 4),
              to);
  });
  // y0 is the first token of each image.
  for_each_quad<true>(images.begin, images.step, count, channels, [&](int image, int c) {
    store_quad(rows + image * pitch + c, load_quad(v.y0 + (first + image) * channels + c));
  });
  cluster_arrive();
  if (starts_early) new_pass(channels).start_others(image_of(images.begin), images.tokens);
  cluster_wait();

  const auto run = [&](const Sizes& s, int image, int head, const TilePartials<P>& tiles) {
    auto pass = new_pass(s.channels);
    const Image<T> x = image_of(image);
    const bool is_first = image == images.begin && head == 0;
    const auto start = [&] {
      if (layout.aliased) {
        pass.start(x, s.tokens);
      } else if (!is_first) {
        pass.start_rest(x, s.tokens);
      }
    };
    if (sharing.operands_are_sent) {
      start();
      const SentRows<P> sent(memory + used_from_here(layout.floats), images, s.heads);
      if constexpr (P::kWarpsShareTiles) {
        sent.copy(pass.rows(), image, head, s.channels);
        __syncthreads();
      } else {
        pass.use_rows(sent.row(image, head, s.channels));
      }
    } else {
      const float* kt = v.kt + head_offset(s.batch, s.channels, head, s.first + image);
      const int rows = minimum(P::kRows, s.heads - head);
      const RowLoads<P, 1, Elements<T>> u(kt, s.batch * s.channels, rows, s.channels,
                                          Elements<T>(w.norm.weight));
      start();
      u.write(pass.rows());
      __syncthreads();
    }
    pass.run(x, s.tokens, tiles, [&] {
      const int next = head + P::kRows < s.heads ? image : image + images.step;
      if (!layout.aliased && next < images.count) pass.start_early(image_of(next), s.tokens);
    });
  };
  const auto gather = [&](const Sizes& s, int head, const TilePartials<P>& tiles) {
    new_pass(s.channels).gather(tiles, minimum(P::kRows, s.heads - head), s.tokens);
  };
  const auto of_value = [](float4 weight, float4 bias, float4 m) { return m * weight + bias; };
  const auto results = [&](const Sizes& s, int image, int first_head) {
    new_pass(s.channels)
        .results(
            minimum(P::kRows, s.heads - first_head), s.tokens,
            [&](int row, int c, float4 m) {
              const int head = first_head + row;
              store_quad(v.m + head_offset(s.batch, s.channels, head, s.first + image) + c, m);
              if (!sharing.operands_are_sent || head >= cluster_size()) return;
              T* to = narrow + image * operand_pitch<T>(s.channels) + c;
              const float* gain = gains + c;
              store_quad(in_rank(to, head),
                         of_value(load_quad(gain), load_quad(gain + s.channels), m));
            },
            [&](int row, const RowTotal& total) {
              v.lse[(s.first + image) * s.heads + first_head + row] = log_of_total<T>(total.state);
            });
    __syncthreads();
  };
  pass_over_images<P>(images, p.problem, workspace, run, gather, results);

  // o_h = W_v,h (gamma m_h + beta) + b_v,h, to the operands of all blocks, and to memory
  const OwnHeads heads_of_o = OwnHeads::of(sharing, heads);
  LinearTiles<T, Share> value(w.value, channels, heads_of_o.columns(0));
  cluster_sync();
  linear_of_heads(
      value, narrow, pitch, sharing.operands_are_sent, w.norm, channels, heads_of_o, count,
      [&](int head) { return v.m + head_offset(batch, channels, head, first); }, of_value,
      [&](int row, int c, float a, float b) {
        store_in_ranks(reinterpret_cast<Pair<T>*>(rows + row * pitch + c), pack<T>(a, b));
        *reinterpret_cast<float2*>(v.o + (first + row) * channels + c) = make_float2(a, b);
      });
  cluster_arrive();
  LinearTiles<T, Share> out(w.out, channels, Share::of(channels));
  cluster_wait();

  // y = y0 + r (W_o o + b_o)
  struct Residual {
    float2 y0;
    float scale;
  };
  out.run(
      rows, pitch, count,
      [&](int row, int c) -> Residual {
        return {*reinterpret_cast<const float2*>(v.y0 + (first + row) * channels + c),
                scale_of_residual(p.residual_scale, first + row)};
      },
      [&](int row, int c, float a, float b, const Residual& of) {
        *reinterpret_cast<float2*>(v.y + (first + row) * channels + c) =
            make_float2(of.y0.x + of.scale * a, of.y0.y + of.scale * b);
      });
  cluster_arrive();
  RowNormalization<T, true, FloatRows> back_norm(w.back_norm, {v.y + first * channels, channels},
                                                 channels, count);
  LinearTiles<T, Share> back(w.back, channels, Share::of(cls_channels));
  cluster_wait();

  // g
  back_norm.start();
  back_norm.run(eps, writer_of(channels, v.back_activated));
  __syncthreads();
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
