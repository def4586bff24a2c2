#pragma once

#include "attention_core/cpu/micro_kernels.h"
#include "cross_attention/params.h"

// Parameters in the layout that the micro-kernels read, and the layers of the CLS path for a few
// images at once.

namespace crossvit::cross_attention {
namespace {

using attention_core::kMaxTile;

// Images whose CLS paths are computed together and share each weight that is read.
constexpr int kImages = 8;

template <class Scalar>
int64_t padded(int64_t channels) {
  return round_up(channels, kLanes<Scalar>);
}

// Calls visit with a pointer of the parameter's element type.
template <class Scalar, class Visit>
void visit(const Parameter& parameter, const Visit& visit) {
  if constexpr (std::is_same_v<Scalar, double>) {
    visit(static_cast<const double*>(parameter.data));
  } else {
    switch (parameter.dtype) {
      case DType::kBFloat16: return visit(static_cast<const BFloat16*>(parameter.data));
      case DType::kFloat16: return visit(static_cast<const Float16*>(parameter.data));
      default: return visit(static_cast<const float*>(parameter.data));
    }
  }
}

// Loads a row to scratch, padded with zeros to a whole vector. A null parameter loads zeros.
template <class Scalar>
void load_row(Scalar* to, const Parameter& from, int64_t offset, int64_t count) {
  if (!from.data) {
    std::memset(to, 0, padded<Scalar>(count) * sizeof(Scalar));
    return;
  }
  visit<Scalar>(from, [&](const auto* data) {
    int64_t c = 0;
    for (; c + kLanes<Scalar> <= count; c += kLanes<Scalar>) store(to + c, load(data + offset + c));
    if (c < count) store(to + c, load_partial<Scalar>(data + offset + c, count - c));
  });
}

// A weight matrix [out, in] with rows of whole vectors, of which a pair can be read from any row
// on. It is read in place if it already has this layout, else copied.
template <class Scalar>
class Matrix {
 public:
  Matrix(const Parameter& weight, int64_t out, int64_t in, bool rows_in_pairs)
      : stride(padded<Scalar>(in)),
        copy_(fits(weight, in) && rows_in_pairs ? 0 : (out + 1) * stride) {
    if (fits(weight, in) && rows_in_pairs) {
      rows = static_cast<const Scalar*>(weight.data);
      return;
    }
    Scalar* const copied = copy_.take((out + 1) * stride);
    parallel_for(out, stride * kWorkOfCopy, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row)
        load_row(copied + row * stride, weight, row * in, in);
    });
    std::memset(copied + out * stride, 0, stride * sizeof(Scalar));
    rows = copied;
  }

  const int64_t stride;
  const Scalar* rows;

 private:
  static bool fits(const Parameter& weight, int64_t in) {
    const DType scalar = std::is_same_v<Scalar, double> ? DType::kFloat64 : DType::kFloat32;
    return weight.dtype == scalar && in % kLanes<Scalar> == 0;
  }

  Scratch<Scalar> copy_;
};

template <class Scalar>
class PaddedVectors {
 public:
  explicit PaddedVectors(int64_t count) : memory_(count) {}

  const Scalar* load(const Parameter& parameter, int64_t count) {
    Scalar* const to = memory_.take(count);
    load_row(to, parameter, 0, count);
    return to;
  }

 private:
  Scratch<Scalar> memory_;
};

template <class Scalar>
struct LayerNorm {
  const Scalar* weight;
  const Scalar* bias;

  // Normalizes a row of whole vectors. Padding stays zero, as weight and bias have zeros there.
  void apply(Scalar* to, const Scalar* from, int64_t channels, Scalar eps) const {
    using V = Vector<Scalar>;
    constexpr int kStep = kLanes<Scalar>;
    const int64_t width = padded<Scalar>(channels);
    V total{};
    for (int64_t c = 0; c < width; c += kStep) total += crossvit::load(from + c);
    const Scalar mean = sum<Scalar>(total) / channels;
    V squares{};
    for (int64_t c = 0; c < width; c += kStep) {
      V v = crossvit::load(from + c) - mean;
      for (int i = 0; i < kStep && c + kStep > channels; ++i) v[i] = c + i < channels ? v[i] : 0;
      squares += v * v;
    }
    const Scalar rstd = 1 / sqrt(sum<Scalar>(squares) / channels + eps);
    for (int64_t c = 0; c < width; c += kStep) {
      const V xhat = (crossvit::load(from + c) - mean) * rstd;
      store(to + c, xhat * crossvit::load(weight + c) + crossvit::load(bias + c));
    }
  }
};

// Computes out[i][o] = bias[o] + in[i] . weight[o] for kImages rows of in, num_rows rows of weight.
template <class Scalar>
void linear(Scalar* out, int64_t out_stride, const Scalar* in, int64_t channels,
            const Scalar* weight, const Scalar* bias, int64_t num_rows) {
  constexpr int64_t kRowsAtOnce = 32;
  Scalar products[kRowsAtOnce * kMaxTile];
  attention_core::NoPrefetch prefetcher(nullptr, 0);
  for (int64_t first = 0; first < num_rows; first += kRowsAtOnce) {
    const int64_t count = minimum(kRowsAtOnce, num_rows - first);
    attention_core::dot_products(products, weight + first * channels, round_up(count, 2), in,
                                 kImages, channels, prefetcher);
    for (int i = 0; i < kImages; ++i)
      for (int64_t o = 0; o < count; ++o)
        out[i * out_stride + first + o] = products[o * kMaxTile + i] + bias[first + o];
  }
}

}  // namespace
}  // namespace crossvit::cross_attention
