#include "cross_attention/cuda/column_blocks.h"
#include "cross_attention/cuda/passes.h"

namespace crossvit::cross_attention::cuda {
namespace {

using attention_core::Image;
using attention_core::RowLoads;

// Grid: clusters, of sharing.images images each.
template <class P>
__global__ void __launch_bounds__(P::kMaxThreads, 1)
    cross_attention_backward(const BackwardParams p, const Vectors v, float* workspace,
                             const Sharing sharing, const BlockLayout layout) {
  using T = typename P::Element;
  CROSSVIT_DYNAMIC_SHARED(memory);
  const int channels = static_cast<int>(p.problem.channels);
  const int cls_channels = static_cast<int>(p.problem.cls_channels);
  const int heads = static_cast<int>(p.problem.num_heads), head_dim = sharing.head_dim;
  const int64_t batch = p.problem.batch;
  const float eps = static_cast<float>(p.problem.eps);
  const Images images = Images::of(p.problem, sharing);
  const int64_t first = images.first;
  const int count = images.count;
  const RowOwners owners = RowOwners::of(count);
  float2* sums = reinterpret_cast<float2*>(memory);
  T* rows = reinterpret_cast<T*>(memory + layout.wide);
  T* narrow = reinterpret_cast<T*>(memory + layout.narrow);
  float* floats = reinterpret_cast<float*>(memory + layout.floats);
  float* residual_dy = p.residuals;
  float* token_dy0 = p.residuals + batch * channels;
  const int pitch = operand_pitch<T>(channels);
  const Weights& w = p.weights;
  const auto gradients_of = [&](int row) {
    return Gradients::at(p.gradients, first + row, used_from_here(cls_channels),
                         used_from_here(channels));
  };
  BackwardTokens<P> pass(memory + layout.pass, channels, eps, true, layout.second_stages);
  const auto image_of = [&](int image) {
    Image<T> x = attention_core::image_of<T>(p.tokens, {}, first + image);
    x.has_extra = true;
    x.extra = rows + image * pitch;
    return x;
  };
  cluster_arrive();

  // g
  const int cls_pitch = operand_pitch<T>(cls_channels);
  const Elements<T> dnew_cls(p.dnew_cls);
  for_each_column<T>(cls_channels, [&](int c, auto rows_of) {
    rows_of(
        count, [&](int row) { return dnew_cls.load_quad((first + row) * cls_channels + c); },
        [&](int row, const LoadedQuad& loaded) {
          const float4 values = dnew_cls.value(loaded);
          store_quad(rows + row * cls_pitch + c, values);
          if (owners.stores(row)) store_quad(gradients_of(row).dnew_cls + c, values);
        });
  });
  TransposedLinear<T, AllColumns> back(w.back.weight, cls_channels, channels,
                                       {channels, owners.rank, owners.ranks});
  if (images.blocks_per_image == 1) prefetch_parameters<T>(w, cls_channels, channels);
  const bool starts_early = !layout.aliased && images.begin < count;
  if (starts_early) pass.start_first(image_of(images.begin), images.tokens);
  __syncthreads();
  // For the other blocks to start.
  cluster_wait();
  // It goes on into the rows of the pass.
  float* scratch = reinterpret_cast<float*>(narrow);
  back.run(rows, cls_pitch, count, scratch, [&](int row, int c, float4 values, Ranks to) {
    owners.store_input(row, reinterpret_cast<float4*>(floats + row * channels + c), values, to);
  });
  cluster_arrive();

  // dy of the residual, and r dy of the update.
  normalize_rows_backward<T, true>(
      w.back_norm, channels, owners.begin(), owners.step(), count, eps, floats, sums,
      [&](int row, int c) { return load_quad(v.y + (first + row) * channels + c); },
      [&](int row, int) { return scale_of_residual(p.residual_scale, first + row); },
      [] { cluster_wait(); },
      [&](int row, int c, float4 dy, float4 dn, float4 xhat, float r) {
        owners.store_operand(rows + row * pitch + c, dy * r);
        if (!owners.stores(row)) return;
        const Gradients g = gradients_of(row);
        store_quad(g.back_norm_weight + c, dn * xhat);
        store_quad(g.back_norm_bias + c, dn);
        store_quad(g.dupdate + c, dy * r);
        store_quad(residual_dy + (first + row) * channels + c, dy);
      });
  owners.wait();

  // do = W_o^T dupdate, written to the operands of all blocks and to memory
  transposed_linears(rows, pitch, count, w.out.weight.data, 1, channels, channels, [&](int) {
    return [&](int row, int c, float4 values) {
      if (row >= count) return;
      store_in_ranks(reinterpret_cast<QuadBits<T>*>(narrow + row * pitch + c),
                     pack_quad<T>(values));
      store_quad(gradients_of(row).dout + c, values);
    };
  });
  cluster_arrive();
  if (starts_early) pass.start_others(image_of(images.begin), images.tokens);
  cluster_wait();
  // dz_h = W_v,h^T do_h
  transposed_linears(narrow, pitch, count, w.value.weight.data, heads, head_dim, channels,
                     [&](int head) {
                       float* to = p.dz + head_offset(batch, channels, head, first);
                       return [&, to](int row, int c, float4 values) {
                         if (row < count)
                           *reinterpret_cast<float4*>(to + int64_t{row} * channels + c) = values;
                       };
                     });
  for_each_quad(images.begin, images.step, count, channels, [&](int image, int c) {
    store_quad(rows + image * pitch + c, load_quad(v.y0 + (first + image) * channels + c));
  });
  cluster_sync();

  const auto run = [&](const Sizes&, int image, int begin, const TilePartials<P>& tiles) {
    const Image<T> x = image_of(image);
    T* dx = static_cast<T*>(p.dx.data) + (first + image) * p.dx.batch_stride;
    const int count = minimum(P::kRows, heads - begin);
    const int64_t offset = head_offset(batch, channels, begin, first + image);
    constexpr int kColumns = sizeof(T) == 4 ? 1 : 2;
    const Elements<T> gains(w.norm.weight);
    const RowLoads<P, kColumns, Elements<T>> dm(p.dz + offset, batch * channels, count, channels,
                                                gains);
    const RowLoads<P, kColumns, Elements<T>> u(v.kt + offset, batch * channels, count, channels,
                                               gains);
    const RowLoads<P, kColumns> m(v.m + offset, batch * channels, count, channels);
    const int row = thread_index();
    const float lse = row < count ? v.lse[(first + image) * heads + begin + row] : INFINITY;
    if (layout.aliased) {
      pass.start(x, images.tokens);
    } else if (image != images.begin || begin > 0) {
      pass.start_rest(x, images.tokens);
    }
    dm.write(pass.rows());
    u.write(pass.rows() + P::kRows * P::row_pitch(channels));
    pass.write_row_floats(lse, 0, dm, m);
    float* dy0 = token_dy0 + (first + image) * channels;
    pass.run(
        x, dx, p.dx.token_stride, images.tokens, tiles, begin > 0,
        [&](int c, T value) { dy0[c] = begin > 0 ? dy0[c] + to_float(value) : to_float(value); },
        [&] {
          const int next = begin + P::kRows < heads ? image : image + images.step;
          if (!layout.aliased && next < images.count) {
            pass.start_early(image_of(next), images.tokens);
          }
        });
  };
  const auto gather = [&](const Sizes&, int begin, const TilePartials<P>& tiles) {
    pass.gather(tiles, minimum(P::kRows, heads - begin), images.tokens);
  };
  const auto of_key = [](float4 weight, float4, float4 du) { return du * weight; };
  const auto results = [&](const Sizes& s, int image, int begin) {
    const Elements<T> gains(w.norm.weight);
    pass.results(minimum(P::kRows, s.heads - begin), s.tokens, [&](int row, int c, float4 sum) {
      const int head = begin + row;
      store_quad(p.du + head_offset(s.batch, s.channels, head, s.first + image) + c, sum);
      if (layout.aliased || head >= cluster_size()) return;
      const LoadedQuad gain = gains.load_quad(c);
      T* to = narrow + image * operand_pitch<T>(s.channels) + c;
      store_quad(in_rank(to, head), of_key(gains.value(gain), {}, sum));
    });
    __syncthreads();
  };
  pass_over_images<P>(images, p.problem, workspace, run, gather, results);

  // dq_h = W_k,h (gamma du_h) / sqrt(d)
  const float scale = 1.0f / sqrtf(static_cast<float>(head_dim));
  const OwnHeads own_heads = OwnHeads::of(sharing, heads);
  const Layer key = {w.key.weight, {}};
  LinearTiles<T, Share> of_du(key, channels, own_heads.columns(0));
  cluster_sync();
  linear_of_heads(
      of_du, narrow, pitch, !layout.aliased, w.norm, channels, own_heads, count,
      [&](int head) { return p.du + head_offset(batch, channels, head, first); }, of_key,
      [&](int row, int c, float a, float b) {
        a *= scale, b *= scale;
        store_in_ranks(reinterpret_cast<Pair<T>*>(rows + row * pitch + c), pack<T>(a, b));
        *reinterpret_cast<float2*>(gradients_of(row).dq + c) = make_float2(a, b);
      });
  const RowOwners last_owners = RowOwners::of(count);
  const int rank = last_owners.rank, ranks = last_owners.ranks;
  const auto scratch_at = [&](T* unused) {
    return reinterpret_cast<float*>(BlockLayout::operands_have_room<T>(channels)
                                        ? reinterpret_cast<char*>(unused)
                                        : memory + layout.template scratch<T>(channels));
  };
  const int late = used_from_here(channels);
  TransposedLinear<T, AllColumns> query(w.query.weight, late, late, {late, rank, ranks});
  cluster_sync();
  // The gradient of LN(y0) as the query
  query.run(rows, pitch, count, scratch_at(narrow), [&](int row, int c, float4 values, Ranks to) {
    last_owners.store_input(row, reinterpret_cast<float4*>(floats + row * channels + c), values,
                            to);
  });
  cluster_arrive();

  // dy0 sums the gradients of the residual, the query and the token.
  struct OfTokens {  // what they add to the gradients of LayerNorm
    float4 dy0, dgain, dbeta;
  };
  const auto of_tokens = [&](int row, int c) {
    const int64_t offset = (first + row) * channels + c;
    OfTokens of = {load_quad(residual_dy + offset) + load_quad(token_dy0 + offset), {}, {}};
    if (!last_owners.stores(row)) return of;
#pragma unroll 2
    for (int head = 0; head < heads; ++head) {
      const int64_t i = head_offset(batch, channels, head, first + row) + c;
      const float4 dz = load_quad(p.dz + i), m = load_quad(v.m + i);
      const float4 du = load_quad(p.du + i), kt = load_quad(v.kt + i);
      of.dgain = of.dgain + (dz * m + du * kt);
      of.dbeta = of.dbeta + dz;
    }
    return of;
  };
  normalize_rows_backward<T, false>(
      w.norm, channels, last_owners.begin(), last_owners.step(), count, eps, floats, sums,
      [&](int row, int c) { return load_quad(v.y0 + (first + row) * channels + c); }, of_tokens,
      [] { cluster_wait(); },
      [&](int row, int c, float4 dx, float4 dn, float4 xhat, const OfTokens& of) {
        const float4 dy0 = dx + of.dy0;
        last_owners.store_operand(rows + row * pitch + c, dy0);
        if (!last_owners.stores(row)) return;
        const Gradients g = gradients_of(row);
        store_quad(g.dy0 + c, dy0);
        store_quad(g.norm_weight + c, dn * xhat + of.dgain);
        store_quad(g.norm_bias + c, dn + of.dbeta);
      });
  cluster_sync();  // also until no block reads its floats any more

  // f
  TransposedLinear<T, AllColumns> proj(w.proj.weight, channels, cls_channels,
                                       {cls_channels, rank, ranks});
  const Elements<T> cls(p.cls);
  proj.run(rows, pitch, count, scratch_at(narrow), [&](int row, int c, float4 values, Ranks to) {
    if (to.first > 0) return;
    float* input = in_rank(floats + row * cls_channels + c, row & (ranks - 1));
    store_quad(input, values);
  });
  cluster_arrive();
  normalize_rows_backward<T, true>(
      w.proj_norm, cls_channels, rank, ranks, count, eps, floats, sums,
      [&](int row, int c) {
        const LoadedQuad loaded = cls.load_quad((first + row) * cls_channels + c);
        return cls.value(loaded);
      },
      [](int, int) { return 0; }, [] { cluster_wait(); },
      [&](int row, int c, float4 dcls, float4 dn, float4 xhat, int) {
        write_quad<T>(p.dcls, p.cls.dtype, (first + row) * cls_channels + c, dcls);
        const Gradients g = gradients_of(row);
        store_quad(g.proj_norm_weight + c, dn * xhat);
        store_quad(g.proj_norm_bias + c, dn);
      });
}

}  // namespace

int operand_bytes(DType dtype, int64_t width) {
  int bytes = 0;
  attention_core::cuda::with_element(dtype, [&](auto element) {
    bytes = operand_bytes_of<decltype(element)>(static_cast<int>(width));
  });
  return bytes;
}

int float_bytes(int64_t width) { return float_bytes_of(static_cast<int>(width)); }

int scratch_bytes() { return kScratchBytes; }

int statistics_bytes() { return kStatisticsBytes; }

// Uses backward's size, the larger of the two.
int pass_bytes(DType dtype, int64_t channels) {
  int bytes = 0;
  attention_core::cuda::with_element(dtype, [&](auto element) {
    with_fusion_plan<decltype(element)>(channels, [&](auto plan) {
      bytes = BackwardTokens<decltype(plan)>::bytes(static_cast<int>(channels), 1);
    });
  });
  return bytes;
}

BlockSize backward_block(DType dtype, int cls_channels, int channels, int max_bytes) {
  return block_of<BackwardTokens>(dtype, cls_channels, channels, max_bytes);
}

void backward(const BackwardParams& params, const ClusterShape& shape, float* workspace,
              const Place& place) {
  start<BackwardTokens>("cross_attention_backward", params, shape, workspace, place,
                        [](auto plan) { return &cross_attention_backward<decltype(plan)>; });
}

}  // namespace crossvit::cross_attention::cuda
