#include "attention_core/cuda/forward_pass.h"
#include "cross_attention/cuda/block.h"

namespace crossvit::cross_attention::cuda {
namespace {

using attention_core::ForwardPass;
using attention_core::Image;
using attention_core::log_of_total;
using attention_core::SoftmaxState;

// Grid: clusters, of `images` images each.
template <class P>
__global__ void __launch_bounds__(P::kMaxThreads, 1)
    cross_attention_forward(const ForwardParams p, const Vectors v, int images, bool over) {
  using T = typename P::Element;
  CROSSVIT_DYNAMIC_SHARED(memory);
  const int channels = p.channels, own = p.own_channels, heads = p.num_heads;
  const int head_dim = channels / heads;
  const Images mine = Images::of(p.batch, images, p.num_tokens + 1);
  const int64_t first = mine.first;
  const int count = mine.count;
  const bool keeps = cluster_rank() == 0;  // what every block computes, one writes
  const Layout layout = Layout::of<T>(own, channels, over);
  T* rows = reinterpret_cast<T*>(memory);
  T* queries = reinterpret_cast<T*>(memory + layout.narrow);
  float* y0 = reinterpret_cast<float*>(memory + layout.floats);
  const Weights& w = p.weights;

  // The tokens come while the CLS is on its way.
  ForwardPass<P> pass(memory + layout.pass, channels, p.eps, true);
  const auto image_of = [&](int image) {
    Image<T> x = attention_core::image_of<T>(p.tokens, {}, first + image);
    x.has_extra = true;
    x.extra = rows + image * layout.pitch;
    return x;
  };
  if (!over && mine.begin < count) pass.start(image_of(mine.begin), mine.tokens);

  clear_rows(rows, count, own);
  normalize_rows<T, true>(
      count, own, p.eps, w.proj_norm,
      [&](int row, int c) { return element<T>(p.cls, (first + row) * own + c); },
      [&](int row, int c, float value) {
        rows[row * operand_pitch<T>(own) + c] = from_float<T>(value);
        if (keeps) v.activated[(first + row) * own + c] = value;
      });
  cluster_sync();  // the other blocks have started
  const Share share = Share::of(channels);
  linear(rows, operand_pitch<T>(own), w.proj.weight.data, own, share.first, share.last,
         [&](int row, int c, float a, float b) {
           if (row >= count) return;
           const float2 value =
               make_float2(a + element<T>(w.proj.bias, c), b + element<T>(w.proj.bias, c + 1));
           store_in_ranks(reinterpret_cast<float2*>(y0 + row * channels + c), value);
           *reinterpret_cast<float2*>(v.y0 + (first + row) * channels + c) = value;
         });
  cluster_sync();

  clear_rows(rows, count, channels);
  const int pitch = operand_pitch<T>(channels);
  const auto of_y0 = [&](int row, int c) { return y0[row * channels + c]; };
  normalize_rows<T, false>(count, channels, p.eps, w.norm, of_y0, [&](int row, int c, float value) {
    rows[row * pitch + c] = from_float<T>(value);
    if (keeps) v.normed[(first + row) * channels + c] = value;
  });
  __syncthreads();
  // To the queries of all blocks, and to memory.
  const auto give = [&](const Layer& layer, float* kept) {
    return [&, kept](int row, int c, float a, float b) {
      const bool is = row < count;
      a = is ? a + element<T>(layer.bias, c) : 0, b = is ? b + element<T>(layer.bias, c + 1) : 0;
      store_in_ranks(reinterpret_cast<Pair<T>*>(queries + row * pitch + c), pack<T>(a, b));
      if (is) {
        *reinterpret_cast<float2*>(kept + (first + row) * channels + c) = make_float2(a, b);
      }
    };
  };
  linear(rows, pitch, w.query.weight.data, channels, share.first, share.last, give(w.query, v.q));
  cluster_sync();

  // kt_h = W_k,h^T q_h / sqrt(d)
  const float scale = 1.0f / sqrtf(static_cast<float>(head_dim));
  transposed_linears(queries, pitch, w.key.weight.data, heads, head_dim, channels, [&](int head) {
    float* to = v.kt + (head * p.batch + first) * channels;
    return [&, to](int row, int c, float value) {
      if (row < count) to[int64_t{row} * channels + c] = value * scale;
    };
  });
  // The first row of every image's tokens.
  for (int row = 0; row < count; ++row) {
#pragma unroll 1
    for (int c = static_cast<int>(threadIdx.x); c < channels; c += blockDim.x) {
      rows[row * layout.pitch + c] = from_float<T>(y0[row * channels + c]);
    }
  }
  cluster_sync();

  const auto run = [&](int image, int begin, const TileStates<P>& states) {
    const Image<T> x = image_of(image);
    if (over || image != mine.begin || begin > 0) pass.start(x, mine.tokens);
    T* u = pass.rows();
    const float* kt = v.kt + (begin * p.batch + first + image) * channels;
#pragma unroll 1  // all rows of a channel are loads under way
    for (int c = static_cast<int>(threadIdx.x); c < channels; c += blockDim.x) {
      const float gain = element<T>(w.norm.weight, c);
      float values[P::kRows];
      const float* of_row = kt + c;
#pragma unroll
      for (int row = 0; row < P::kRows; ++row, of_row += p.batch * channels) {
        values[row] = begin + row < heads ? *of_row * gain : 0;
      }
#pragma unroll
      for (int row = 0; row < P::kRows; ++row) {
        u[row * P::row_pitch(channels) + c] = from_float<T>(values[row]);
      }
    }
    pass.run(x, mine.tokens, states);
  };
  const auto results = [&](int image, int begin) {
    const auto write = [&](int row, int c, float sum, const SoftmaxState& state) {
      const int head = begin + row;
      v.m[(head * p.batch + first + image) * channels + c] = sum / state.total;
      if (c == 0) v.lse[(first + image) * heads + head] = log_of_total(state);
    };
    pass.results(min(P::kRows, heads - begin), mine.tokens, write);
    __syncthreads();
  };
  pass_over_images<P>(pass, mine, p.states, heads, channels, run, results);

  // o_h = W_v,h (gamma m_h + beta) + b_v,h
  const auto stage = [&](int head) {
    for (int i = static_cast<int>(threadIdx.x); i < kImages * channels; i += blockDim.x) {
      const int row = i / channels, c = i % channels;
      const float m = row < count ? v.m[(head * p.batch + first + row) * channels + c] : 0;
      const float z =
          row < count ? m * element<T>(w.norm.weight, c) + element<T>(w.norm.bias, c) : 0;
      rows[row * pitch + c] = from_float<T>(z);
    }
  };
  linear_of_heads(rows, pitch, w.value.weight.data, channels, head_dim, stage, give(w.value, v.o));
  cluster_sync();

  // y = y0 + r (W_o o + b_o), in the place of y0
  linear(queries, pitch, w.out.weight.data, channels, share.first, share.last,
         [&](int row, int c, float a, float b) {
           if (row >= count) return;
           const float r = p.residual_scale ? p.residual_scale[first + row] : 1.0f;
           const float* of_y0 = v.y0 + (first + row) * channels + c;
           const float2 value = make_float2(of_y0[0] + r * (a + element<T>(w.out.bias, c)),
                                            of_y0[1] + r * (b + element<T>(w.out.bias, c + 1)));
           store_in_ranks(reinterpret_cast<float2*>(y0 + row * channels + c), value);
           *reinterpret_cast<float2*>(v.y + (first + row) * channels + c) = value;
         });
  cluster_sync();

  clear_rows(rows, count, channels);
  normalize_rows<T, true>(count, channels, p.eps, w.back_norm, of_y0,
                          [&](int row, int c, float value) {
                            rows[row * pitch + c] = from_float<T>(value);
                            if (keeps) v.back_activated[(first + row) * channels + c] = value;
                          });
  __syncthreads();
  const Share back = Share::of(own);
  linear(rows, pitch, w.back.weight.data, channels, back.first, back.last,
         [&](int row, int c, float a, float b) {
           if (row >= count) return;
           T* to = static_cast<T*>(p.new_cls) + (first + row) * own + c;
           store_pair(to,
                      pack<T>(a + element<T>(w.back.bias, c), b + element<T>(w.back.bias, c + 1)));
         });
}

}  // namespace

int64_t states_size(const Division& division, int64_t batch, int num_tokens, int channels,
                    int heads) {
  if (division.blocks / division.images <= 1) return 0;
  const int64_t tiles = num_tokens / attention_core::kTokensOfTile + 1;  // with the CLS
  return batch * tiles * attention_core::cuda::padded_rows(heads) *
         attention_core::tile_state_floats(channels);
}

attention_core::cuda::BlockSize forward_block(DType dtype, int own, int channels, int heads,
                                              int most_bytes) {
  return block_of<ForwardPass>(dtype, own, channels, heads, most_bytes);
}

void forward(const ForwardParams& p, const Division& division,
             const attention_core::cuda::Place& place) {
  start<ForwardPass>("cross_attention_forward", p, division, place,
                     [](auto plan) { return &cross_attention_forward<decltype(plan)>; });
}

}  // namespace crossvit::cross_attention::cuda
