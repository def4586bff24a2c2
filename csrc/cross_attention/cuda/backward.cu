#include "attention_core/cuda/backward_pass.h"
#include "cross_attention/cuda/block.h"

namespace crossvit::cross_attention::cuda {
namespace {

using attention_core::BackwardPass;
using attention_core::Image;

// Of image `image`.
__device__ Gradients gradients_of(const BackwardParams& p, int64_t image) {
  const int own = p.own_channels, channels = p.channels;
  Gradients g;
  g.proj_norm_weight = p.gradients + image * (3 * own + 8 * channels);
  g.proj_norm_bias = g.proj_norm_weight + own;
  g.dy0 = g.proj_norm_bias + own;
  g.norm_weight = g.dy0 + channels;
  g.norm_bias = g.norm_weight + channels;
  g.dq = g.norm_bias + channels;
  g.dout = g.dq + channels;
  g.dupdate = g.dout + channels;
  g.back_norm_weight = g.dupdate + channels;
  g.back_norm_bias = g.back_norm_weight + channels;
  g.dnew_cls = g.back_norm_bias + channels;
  return g;
}

// dm = gamma dz and u = gamma kt of the heads [begin, begin + count) of an image, with lse and what
// softmax's backward subtracts.
template <class P>
__device__ void write_score_rows(const BackwardPass<P>& pass, const BackwardParams& p,
                                 const Vectors& v, int64_t image, int begin, int count) {
  using T = typename P::Element;
  const int channels = p.channels, pitch = P::row_pitch(channels);
  T* dm = pass.rows();
  T* u = dm + P::kRows * pitch;
  for (int row = P::warp(); row < P::kRows; row += P::warps()) {
    const int64_t at = ((begin + row) * p.batch + image) * channels;
    float delta = 0;
#pragma unroll 2
    for (int c = lane_index(); c < channels; c += 32) {
      const float gain = row < count ? element<T>(p.weights.norm.weight, c) : 0;
      dm[row * pitch + c] = from_float<T>(row < count ? p.dz[at + c] * gain : 0);
      u[row * pitch + c] = from_float<T>(row < count ? v.kt[at + c] * gain : 0);
      if (row < count) delta += to_float(dm[row * pitch + c]) * v.m[at + c];
    }
    delta = sum_of_warp(delta);
    if (lane_index() == 0) {
      pass.lse()[row] = row < count ? v.lse[image * p.num_heads + begin + row] : INFINITY;
      pass.delta()[row] = delta;
    }
  }
}

// Grid: clusters, of `images` images each.
template <class P>
__global__ void __launch_bounds__(P::kMaxThreads, 1)
    cross_attention_backward(const BackwardParams p, const Vectors v, int images, bool over) {
  using T = typename P::Element;
  CROSSVIT_DYNAMIC_SHARED(memory);
  const int channels = p.channels, own = p.own_channels, heads = p.num_heads;
  const int head_dim = channels / heads;
  const int rank = cluster_rank(), ranks = cluster_size();
  const Images mine = Images::of(p.batch, images, p.num_tokens + 1);
  const int64_t first = mine.first;
  const int count = mine.count;
  const bool keeps = rank == 0;  // what every block computes, one writes
  const Layout layout = Layout::of<T>(own, channels, over);
  T* rows = reinterpret_cast<T*>(memory);
  T* narrow = reinterpret_cast<T*>(memory + layout.narrow);
  float* floats = reinterpret_cast<float*>(memory + layout.floats);
  float* scratch_dy = p.scratch;
  float* scratch_token = p.scratch + p.batch * channels;
  const Weights& w = p.weights;
  const auto of = [&](int row) { return gradients_of(p, first + row); };
  const auto of_floats = [&](int row, int c) { return floats[row * channels + c]; };

  BackwardPass<P> pass(memory + layout.pass, channels, p.eps, true);
  const auto image_of = [&](int image) {
    Image<T> x = attention_core::image_of<T>(p.tokens, {}, first + image);
    x.has_extra = true;
    x.extra = rows + image * layout.pitch;
    return x;
  };
  if (!over && mine.begin < count) pass.start(image_of(mine.begin), mine.tokens);

  // g
  clear_rows(rows, count, own);
  const int own_pitch = operand_pitch<T>(own), pitch = operand_pitch<T>(channels);
#pragma unroll 2
  for (int i = static_cast<int>(threadIdx.x); i < count * own; i += blockDim.x) {
    const int row = i / own, c = i % own;
    const float value = element<T>(p.dnew_cls, first * own + i);
    rows[row * own_pitch + c] = from_float<T>(value);
    if (keeps) of(row).dnew_cls[c] = value;
  }
  cluster_sync();  // the other blocks have started
  // To the floats of all blocks.
  const auto give_floats = [&](int width) {
    return [&, width](int) {
      return [&, width](int row, int c, float value) {
        if (row >= count) return;
        store_in_ranks(floats + row * width + c, value);
      };
    };
  };
  transposed_linears(rows, own_pitch, w.back.weight.data, 1, own, channels, give_floats(channels));
  cluster_sync();

  // The residual: dy, and the update's r dy.
  clear_rows(rows, count, channels);
  normalize_rows_backward<T, true>(
      0, 1, count, channels, p.eps, w.back_norm,
      [&](int row, int c) { return v.y[(first + row) * channels + c]; }, of_floats,
      [&](int row, int c, float dy, float dn, float xhat) {
        const float r = p.residual_scale ? p.residual_scale[first + row] : 1.0f;
        rows[row * pitch + c] = from_float<T>(dy * r);
        if (!keeps) return;
        const Gradients g = of(row);
        g.back_norm_weight[c] = dn * xhat;
        g.back_norm_bias[c] = dn;
        g.dupdate[c] = dy * r;
        scratch_dy[(first + row) * channels + c] = dy;
      });
  __syncthreads();

  // do = W_o^T dupdate, to the operands of all blocks and to memory
  transposed_linears(rows, pitch, w.out.weight.data, 1, channels, channels, [&](int) {
    return [&](int row, int c, float value) {
      const bool is = row < count;
      store_in_ranks(narrow + row * pitch + c, from_float<T>(is ? value : 0));
      if (is) of(row).dout[c] = value;
    };
  });
  cluster_sync();
  // dz_h = W_v,h^T do_h
  transposed_linears(narrow, pitch, w.value.weight.data, heads, head_dim, channels, [&](int head) {
    float* to = p.dz + (head * p.batch + first) * channels;
    return [&, to](int row, int c, float value) {
      if (row < count) to[int64_t{row} * channels + c] = value;
    };
  });
  for (int row = 0; row < count; ++row) {
#pragma unroll 1
    for (int c = static_cast<int>(threadIdx.x); c < channels; c += blockDim.x) {
      rows[row * layout.pitch + c] = from_float<T>(v.y0[(first + row) * channels + c]);
    }
  }
  cluster_sync();

  const auto run = [&](int image, int begin, const TileStates<P>& states) {
    const Image<T> x = image_of(image);
    T* dx = static_cast<T*>(p.dx.data) + (first + image) * p.dx.batch_stride;
    if (over || image != mine.begin || begin > 0) pass.start(x, mine.tokens);
    write_score_rows<P>(pass, p, v, first + image, begin, min(P::kRows, heads - begin));
    float* token = scratch_token + (first + image) * channels;
    pass.run(x, dx, p.dx.token_stride, mine.tokens, states, begin > 0, [&](int c, T value) {
      token[c] = begin > 0 ? token[c] + to_float(value) : to_float(value);
    });
  };
  const auto results = [&](int image, int begin) {
    const auto write = [&](int row, int c, float sum) {
      p.du[((begin + row) * p.batch + first + image) * channels + c] = sum;
    };
    pass.results(min(P::kRows, heads - begin), mine.tokens, write);
    __syncthreads();
  };
  pass_over_images<P>(pass, mine, p.states, heads, channels, run, results);

  // dq_h = W_k,h (gamma du_h) / sqrt(d)
  const float scale = 1.0f / sqrtf(static_cast<float>(head_dim));
  const auto stage = [&](int head) {
    for (int i = static_cast<int>(threadIdx.x); i < kImages * channels; i += blockDim.x) {
      const int row = i / channels, c = i % channels;
      const float du = row < count ? p.du[(head * p.batch + first + row) * channels + c] : 0;
      rows[row * pitch + c] = from_float<T>(row < count ? du * element<T>(w.norm.weight, c) : 0);
    }
  };
  linear_of_heads(rows, pitch, w.key.weight.data, channels, head_dim, stage,
                  [&](int row, int c, float a, float b) {
                    const bool is = row < count;
                    a = is ? a * scale : 0, b = is ? b * scale : 0;
                    store_in_ranks(reinterpret_cast<Pair<T>*>(narrow + row * pitch + c),
                                   pack<T>(a, b));
                    if (is) of(row).dq[c] = a, of(row).dq[c + 1] = b;
                  });
  cluster_sync();
  // LN(y0)'s gradient as the query
  transposed_linears(narrow, pitch, w.query.weight.data, 1, channels, channels,
                     give_floats(channels));
  cluster_sync();

  // y0 is what is added to, a query and a token.
  clear_rows(rows, count, channels);
  normalize_rows_backward<T, false>(
      0, 1, count, channels, p.eps, w.norm,
      [&](int row, int c) { return v.y0[(first + row) * channels + c]; }, of_floats,
      [&](int row, int c, float dx, float dn, float xhat) {
        const int64_t at = (first + row) * channels + c;
        const float dy0 = dx + scratch_dy[at] + scratch_token[at];
        rows[row * pitch + c] = from_float<T>(dy0);
        if (row % ranks != rank) return;
        float dgain = dn * xhat, dbeta = dn;
        for (int head = 0; head < heads; ++head) {
          const int64_t of_head = head * p.batch * channels + at;
          dgain += p.dz[of_head] * v.m[of_head] + p.du[of_head] * v.kt[of_head];
          dbeta += p.dz[of_head];
        }
        const Gradients g = of(row);
        g.dy0[c] = dy0;
        g.norm_weight[c] = dgain;
        g.norm_bias[c] = dbeta;
      });
  cluster_sync();  // no block reads its floats any more

  // f
  transposed_linears(rows, pitch, w.proj.weight.data, 1, channels, own, give_floats(own));
  cluster_sync();
  normalize_rows_backward<T, true>(
      rank, ranks, count, own, p.eps, w.proj_norm,
      [&](int row, int c) { return element<T>(p.cls, (first + row) * own + c); },
      [&](int row, int c) { return floats[row * own + c]; },
      [&](int row, int c, float dcls, float dn, float xhat) {
        write_element<T>(p.dcls, p.cls.dtype, (first + row) * own + c, dcls);
        of(row).proj_norm_weight[c] = dn * xhat;
        of(row).proj_norm_bias[c] = dn;
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

// That of backward, which has more to hold.
int pass_bytes(DType dtype, int64_t channels, int64_t heads) {
  int bytes = 0;
  attention_core::cuda::with_element(dtype, [&](auto element) {
    with_fusion_plan<decltype(element)>(heads, channels, [&](auto plan) {
      bytes = BackwardPass<decltype(plan)>::bytes(static_cast<int>(channels), 1);
    });
  });
  return bytes;
}

attention_core::cuda::BlockSize backward_block(DType dtype, int own, int channels, int heads,
                                               int most_bytes) {
  return block_of<BackwardPass>(dtype, own, channels, heads, most_bytes);
}

void backward(const BackwardParams& p, const Division& division,
              const attention_core::cuda::Place& place) {
  start<BackwardPass>("cross_attention_backward", p, division, place,
                      [](auto plan) { return &cross_attention_backward<decltype(plan)>; });
}

}  // namespace crossvit::cross_attention::cuda
