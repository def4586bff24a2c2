#pragma once

#include <cstdint>

#include "common/arithmetic.h"

// The layouts of the vectors that the fusion's kernels save and of the gradients that they store,
// in the order of crossvit_kernels/ops/cross_attention/layout.py.

namespace crossvit::cross_attention {

struct Problem {
  int64_t batch;
  int64_t num_tokens;  // without the CLS
  int64_t channels;
  int64_t cls_channels;  // those of f and g; without either channels
  int64_t num_heads;
  double eps;
};

// The vectors that forward saves for backward, in one allocation, in the accumulation type: double
// for double tokens, else float.
template <class Element>
struct VectorsOf {
  Element* activated;       // [B, C_cls]: gelu(LN_f(cls))
  Element* y0;              // [B, C]: f(cls)
  Element* normed;          // [B, C]: LN(y0)
  Element* q;               // [B, C], before the scale 1 / sqrt(d)
  Element* o;               // [B, C]
  Element* y;               // [B, C]
  Element* back_activated;  // [B, C]: gelu(LN_g(y))
  Element* kt;              // [h, B, C], scaled
  Element* m;               // [h, B, C]
  Element* lse;             // [B, h]

  static VectorsOf at(Element* memory, const Problem& p) {
    const int64_t vector = p.batch * p.channels, per_head = p.num_heads * vector;
    const auto next = [&](int64_t count) {
      Element* const first = memory;
      memory += count;
      return first;
    };
    return {next(p.batch * p.cls_channels),
            next(vector),
            next(vector),
            next(vector),
            next(vector),
            next(vector),
            next(vector),
            next(per_head),
            next(per_head),
            next(p.batch * p.num_heads)};
  }

  // Elements per image.
  static int64_t size(const Problem& p) {
    return p.cls_channels + 6 * p.channels + 2 * p.num_heads * p.channels + p.num_heads;
  }
};

using Vectors = VectorsOf<float>;

// The offset of the vector of a head and an image in [h, B, C].
CROSSVIT_HOST_DEVICE inline int64_t head_offset(int64_t batch, int channels, int head,
                                                int64_t image) {
  return (head * batch + image) * channels;
}

// The vectors that backward stores per image. Products of them over the batch are the weight
// matrices' gradients, and sums over the batch are all other gradients.
struct Gradients {
  float* proj_norm_weight;  // [C_cls]
  float* proj_norm_bias;    // [C_cls]
  float* dy0;               // [C]: f's bias
  float* norm_weight;       // [C]
  float* norm_bias;         // [C]
  float* dq;                // [C]
  float* dout;              // [C]: of o, the value's bias
  float* dupdate;           // [C]: the output's bias
  float* back_norm_weight;  // [C]
  float* back_norm_bias;    // [C]
  float* dnew_cls;          // [C_cls]: g's bias

  // The vectors of an image, in the rows of all images.
  CROSSVIT_HOST_DEVICE static Gradients at(float* rows, int64_t image, int cls_channels,
                                           int channels) {
    Gradients g;
    g.proj_norm_weight = rows + image * (3 * cls_channels + 8 * channels);
    g.proj_norm_bias = g.proj_norm_weight + cls_channels;
    g.dy0 = g.proj_norm_bias + cls_channels;
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
};

}  // namespace crossvit::cross_attention
