#pragma once

#include <cstdint>

// What forward keeps for backward, in the order of crossvit_kernels/ops/cross_attention/layout.py:
// one piece of memory, in the type of the arithmetic.

namespace crossvit::cross_attention {

template <class Scalar>
struct SavedVectors {
  Scalar* activated;       // [B, C_own]: gelu(LN_f(cls))
  Scalar* y0;              // [B, C]: f(cls)
  Scalar* normed;          // [B, C]: LN(y0)
  Scalar* q;               // [B, C], before the scale 1 / sqrt(d)
  Scalar* o;               // [B, C]
  Scalar* y;               // [B, C]
  Scalar* back_activated;  // [B, C]: gelu(LN_g(y))
  Scalar* kt;              // [h, B, C]
  Scalar* m;               // [h, B, C]
  Scalar* lse;             // [B, h]

  static SavedVectors at(void* memory, int64_t batch, int64_t cls_channels, int64_t channels,
                         int64_t heads) {
    const int64_t vector = batch * channels;
    SavedVectors v;
    v.activated = static_cast<Scalar*>(memory);
    v.y0 = v.activated + batch * cls_channels;
    v.normed = v.y0 + vector;
    v.q = v.normed + vector;
    v.o = v.q + vector;
    v.y = v.o + vector;
    v.back_activated = v.y + vector;
    v.kt = v.back_activated + vector;
    v.m = v.kt + heads * vector;
    v.lse = v.m + heads * vector;
    return v;
  }
};

}  // namespace crossvit::cross_attention
