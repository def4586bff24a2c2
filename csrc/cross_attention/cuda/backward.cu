#include "attention_core/cuda/backward_pass.h"
#include "cross_attention/cuda/block.h"

namespace crossvit::cross_attention::cuda {
namespace {

using attention_core::BackwardPass;
using attention_core::Image;
using attention_core::RowLoads;

// Grid: clusters, of images_per_cluster images each.
template <class P>
__global__ void __launch_bounds__(P::kMaxThreads, 1)
    cross_attention_backward(const BackwardParams p, const Vectors v, float* workspace,
                             int images_per_cluster, const BlockLayout layout) {
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
  const RowOwners owners = RowOwners::of(count);
  RowStatistics* statistics = reinterpret_cast<RowStatistics*>(memory);
  T* rows = reinterpret_cast<T*>(memory + layout.wide);
  T* narrow = reinterpret_cast<T*>(memory + layout.narrow);
  float* floats = reinterpret_cast<float*>(memory + layout.floats);
  float* residual_dy = p.residuals;
  float* token_dy0 = p.residuals + batch * channels;
  const int pitch = operand_pitch<T>(channels);
  const Weights& w = p.weights;
  const auto gradients_of = [&](int row) {
    return Gradients::at(p.gradients, first + row, cls_channels, channels);
  };
  BackwardPass<P> pass(memory + layout.pass, channels, eps, true);
  const auto image_of = [&](int image) {
    Image<T> x = attention_core::image_of<T>(p.tokens, {}, first + image);
    x.has_extra = true;
    x.extra = rows + image * pitch;
    return x;
  };
  prefetch_parameters<T>(w, cls_channels, channels);
  copy_rows<T>(floats, p.dnew_cls, first, 0, 1, count, cls_channels);
  if (!layout.aliased && images.begin < count) pass.start(image_of(images.begin), images.tokens);

  // g
  clear_rows(rows, count, cls_channels);
  const int cls_pitch = operand_pitch<T>(cls_channels);
  __syncthreads();
#pragma unroll 1
  for (int c = thread_index(); c < cls_channels; c += block_threads()) {
#pragma unroll 4
    for (int row = 0; row < count; ++row) {
      const float value = floats[row * cls_channels + c];
      rows[row * cls_pitch + c] = from_float<T>(value);
      if (owners.stores(row)) gradients_of(row).dnew_cls[c] = value;
    }
  }
  cluster_sync();  // waits for the other blocks to start, and until this one has read dnew_cls
  transposed_linears(rows, cls_pitch, w.back.weight.data, 1, cls_channels, channels, [&](int) {
    return [&](int row, int c, float4 values) {
      if (row >= count) return;
      owners.store_input(row, reinterpret_cast<float4*>(floats + row * channels + c), values);
    };
  });
  cluster_sync();

  // dy of the residual, and r dy of the update.
  clear_rows(rows, count, channels);
  normalize_rows_backward<T, true>(
      statistics, owners.begin(), owners.step(), count, channels, eps, w.back_norm,
      [&](int row, int c) { return v.y[(first + row) * channels + c]; }, floats,
      [&](int row, int c, float dy, float dn, float xhat) {
        const float r = scale_of_residual(p.residual_scale, first + row);
        rows[row * pitch + c] = from_float<T>(dy * r);
        if (!owners.stores(row)) return;
        const Gradients g = gradients_of(row);
        g.back_norm_weight[c] = dn * xhat;
        g.back_norm_bias[c] = dn;
        g.dupdate[c] = dy * r;
        residual_dy[(first + row) * channels + c] = dy;
      });
  owners.exchange(rows, channels, count);

  // do = W_o^T dupdate, written to the operands of all blocks and to memory
  transposed_linears(rows, pitch, w.out.weight.data, 1, channels, channels, [&](int) {
    return [&](int row, int c, float4 values) {
      const bool has_image = row < count;
      if (!has_image) values = make_float4(0, 0, 0, 0);
      using Bits = typename FourColumns<T>::Bits;
      store_in_ranks(reinterpret_cast<Bits*>(narrow + row * pitch + c), pack_four<T>(values));
      if (has_image) *reinterpret_cast<float4*>(gradients_of(row).dout + c) = values;
    };
  });
  cluster_sync();
  // dz_h = W_v,h^T do_h
  transposed_linears(narrow, pitch, w.value.weight.data, heads, head_dim, channels, [&](int head) {
    float* to = p.dz + head_offset(batch, channels, head, first);
    return [&, to](int row, int c, float4 values) {
      if (row < count) *reinterpret_cast<float4*>(to + int64_t{row} * channels + c) = values;
    };
  });
  for (int row = 0; row < count; ++row) {
#pragma unroll 1
    for (int c = thread_index(); c < channels; c += block_threads()) {
      rows[row * pitch + c] = from_float<T>(v.y0[(first + row) * channels + c]);
    }
  }
  cluster_sync();

  const auto run = [&](int image, int begin, const TilePartials<P>& tiles) {
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
    if (layout.aliased || image != images.begin || begin > 0) pass.start(x, images.tokens);
    dm.write(pass.rows());
    u.write(pass.rows() + P::kRows * P::row_pitch(channels));
    pass.write_row_floats(lse, 0, dm, m);
    float* dy0 = token_dy0 + (first + image) * channels;
    pass.run(x, dx, p.dx.token_stride, images.tokens, tiles, begin > 0, [&](int c, T value) {
      dy0[c] = begin > 0 ? dy0[c] + to_float(value) : to_float(value);
    });
  };
  const auto results = [&](int image, int begin) {
    const auto write = [&](int row, int c, float sum) {
      p.du[head_offset(batch, channels, begin + row, first + image) + c] = sum;
    };
    pass.results(minimum(P::kRows, heads - begin), images.tokens, write);
    __syncthreads();
  };
  pass_over_images<P>(pass, images, workspace, heads, channels, run, results);

  // dq_h = W_k,h (gamma du_h) / sqrt(d)
  const float scale = 1.0f / sqrtf(static_cast<float>(head_dim));
  linear_of_heads(
      rows, pitch, {w.key.weight, {}}, w.norm, channels, OwnHeads::of(channels, heads), count,
      [&](int head) { return p.du + head_offset(batch, channels, head, first); },
      [](float weight, float, float du) { return du * weight; },
      [&](int row, int c, float a, float b) {
        const bool has_image = row < count;
        a = has_image ? a * scale : 0, b = has_image ? b * scale : 0;
        store_in_ranks(reinterpret_cast<Pair<T>*>(narrow + row * pitch + c), pack<T>(a, b));
        if (!has_image) return;
        float* dq = gradients_of(row).dq + c;
        dq[0] = a, dq[1] = b;
      });
  cluster_sync();
  // The gradient of LN(y0) as the query
  const RowOwners last_owners = RowOwners::of(count);
  transposed_linears(narrow, pitch, w.query.weight.data, 1, channels, channels, [&](int) {
    return [&](int row, int c, float4 values) {
      if (row >= count) return;
      last_owners.store_input(row, reinterpret_cast<float4*>(floats + row * channels + c), values);
    };
  });
  cluster_sync();

  // dy0 sums the gradients of the residual, the query and the token.
  clear_rows(rows, count, channels);
  normalize_rows_backward<T, false>(
      statistics, last_owners.begin(), last_owners.step(), count, channels, eps, w.norm,
      [&](int row, int c) { return v.y0[(first + row) * channels + c]; }, floats,
      [&](int row, int c, float dx, float dn, float xhat) {
        const int64_t offset = (first + row) * channels + c;
        const float dy0 = dx + residual_dy[offset] + token_dy0[offset];
        rows[row * pitch + c] = from_float<T>(dy0);
        if (!last_owners.stores(row)) return;
        float dgain = dn * xhat, dbeta = dn;
        for (int head = 0; head < heads; ++head) {
          const int64_t i = head_offset(batch, channels, head, first + row) + c;
          dgain += p.dz[i] * v.m[i] + p.du[i] * v.kt[i];
          dbeta += p.dz[i];
        }
        const Gradients g = gradients_of(row);
        g.dy0[c] = dy0;
        g.norm_weight[c] = dgain;
        g.norm_bias[c] = dbeta;
      });
  last_owners.exchange(rows, channels, count);
  if (last_owners.are_all) cluster_sync();  // waits until no block reads its floats any more

  // f
  const int rank = last_owners.rank, ranks = last_owners.ranks;
  transposed_linears(rows, pitch, w.proj.weight.data, 1, channels, cls_channels, [&](int) {
    return [&](int row, int c, float4 values) {
      if (row >= count) return;
      float* to = in_rank(floats + row * cls_channels + c, row & (ranks - 1));
      *reinterpret_cast<float4*>(to) = values;
    };
  });
  cluster_sync();
  const Elements<T> cls(p.cls);
  normalize_rows_backward<T, true>(
      statistics, rank, ranks, count, cls_channels, eps, w.proj_norm,
      [&](int row, int c) { return cls[(first + row) * cls_channels + c]; }, floats,
      [&](int row, int c, float dcls, float dn, float xhat) {
        write_element<T>(p.dcls, p.cls.dtype, (first + row) * cls_channels + c, dcls);
        gradients_of(row).proj_norm_weight[c] = dn * xhat;
        gradients_of(row).proj_norm_bias[c] = dn;
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

// Uses backward's size, the larger of the two.
int pass_bytes(DType dtype, int64_t channels) {
  int bytes = 0;
  attention_core::cuda::with_element(dtype, [&](auto element) {
    with_fusion_plan<decltype(element)>(channels, [&](auto plan) {
      bytes = BackwardPass<decltype(plan)>::bytes(static_cast<int>(channels), 1);
    });
  });
  return bytes;
}

BlockSize backward_block(DType dtype, int cls_channels, int channels, int max_bytes) {
  return block_of<BackwardPass>(dtype, cls_channels, channels, max_bytes);
}

void backward(const BackwardParams& params, const ClusterShape& shape, float* workspace,
              const Place& place) {
  start<BackwardPass>("cross_attention_backward", params, shape, workspace, place,
                      [](auto plan) { return &cross_attention_backward<decltype(plan)>; });
}

}  // namespace crossvit::cross_attention::cuda
