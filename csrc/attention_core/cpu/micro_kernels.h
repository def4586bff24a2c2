#pragma once

#include "attention_core/cpu/images.h"

// The two loops that do the work. A pass over the tokens costs 2 R multiply-adds per element
// forward and 5 R backward, all of them here.
//
// They prefetch in step with the arithmetic. A tile is read in a burst and then worked on for
// several times as long; the hardware prefetcher stays only a little ahead of the reads, so without
// help memory idles while the core computes, and the core while memory answers. A request for all
// lines at once would fill the core's few fill buffers and stall other loads: a line or two per
// inner step keeps memory evenly busy.

namespace crossvit::attention_core {
namespace {

template <bool kForWriting>
class Prefetch {
 public:
  Prefetch(const void* begin, int64_t bytes)
      : next_(static_cast<const char*>(begin)), end_(next_ + bytes) {}

  template <int kLines>
  void prefetch() {
    for (int i = 0; i < kLines; ++i) {
      if (next_ >= end_) return;
      __builtin_prefetch(next_, kForWriting, 3);
      next_ += kCacheLine;
    }
  }

 private:
  static constexpr int kCacheLine = 64;

  const char* next_;
  const char* end_;
};

// For loops that are not memory-bound.
struct NoPrefetch {
  NoPrefetch(const void*, int64_t) {}
  template <int kLines>
  void prefetch() {}
};

// out[r][t] = rows[r] . tokens[t]; out has kMaxTile columns. num_rows is even and num_tokens is
// rounded up to whole blocks.
template <class Scalar, class Prefetcher>
void dot_products(Scalar* out, const Scalar* rows, int64_t num_rows, const Scalar* tokens,
                  int num_tokens, int64_t channels, Prefetcher& prefetcher) {
  constexpr int kBlock = Shape<Scalar>::kTokenBlock;
  using V = Vector<Scalar>;
  for (int t = 0; t < num_tokens; t += kBlock) {
    for (int64_t r = 0; r < num_rows; r += 2) {
      const Scalar* row = rows + r * channels;
      const Scalar* token = tokens + t * channels;
      V products[2 * kBlock] = {};
      for (int64_t c = 0; c < channels; c += kLanes<Scalar>) {
        prefetcher.template prefetch<1>();
        const V first = load(row + c);
        const V second = load(row + channels + c);
        for (int i = 0; i < kBlock; ++i) {
          const V x = in_register(load(token + i * channels + c));
          products[i] += first * x;
          products[kBlock + i] += second * x;
        }
      }
      const V sums = sum_each<Scalar>(products);
      std::memcpy(out + r * kMaxTile + t, &sums, kBlock * sizeof(Scalar));
      std::memcpy(out + (r + 1) * kMaxTile + t,
                  reinterpret_cast<const char*>(&sums) + kBlock * sizeof(Scalar),
                  kBlock * sizeof(Scalar));
    }
  }
}

// Weights of a rank_update: the weight of term k in row i is at data[i * row_stride + k *
// term_stride].
template <class Scalar>
struct Weights {
  const Scalar* data;
  int64_t row_stride;
  int64_t term_stride;
};

template <int kRows, int kVectors, class Scalar, class Prefetcher>
inline void rank_update_block(Scalar* out, const Scalar* decay, Weights<Scalar> weights,
                              const Scalar* terms, int64_t num_terms, int64_t channels,
                              Prefetcher& prefetcher) {
  using V = Vector<Scalar>;
  constexpr int kStep = kLanes<Scalar>;
  V total[kRows][kVectors];
  for (int i = 0; i < kRows; ++i)
    for (int j = 0; j < kVectors; ++j)
      total[i][j] = decay ? load(out + i * channels + j * kStep) * decay[i] : V{};
  for (int64_t k = 0; k < num_terms; ++k) {
    prefetcher.template prefetch<3>();
    V term[kVectors];
    for (int j = 0; j < kVectors; ++j) term[j] = load(terms + k * channels + j * kStep);
    for (int i = 0; i < kRows; ++i) {
      const Scalar weight = weights.data[i * weights.row_stride + k * weights.term_stride];
      for (int j = 0; j < kVectors; ++j) total[i][j] += weight * term[j];
    }
  }
  for (int i = 0; i < kRows; ++i)
    for (int j = 0; j < kVectors; ++j) store(out + i * channels + j * kStep, total[i][j]);
}

template <int kRows, class Scalar, class Prefetcher>
void rank_update_rows(Scalar* out, const Scalar* decay, Weights<Scalar> weights,
                      const Scalar* terms, int64_t num_terms, int64_t channels,
                      Prefetcher& prefetcher) {
  // As many accumulators as the registers hold: 32 vector registers with AVX-512, 16 without.
  constexpr int kWide = kVectorBytes == 64 ? 4 : 2;
  constexpr int kStep = kLanes<Scalar>;
  int64_t c = 0;
  for (; c + kWide * kStep <= channels; c += kWide * kStep)
    rank_update_block<kRows, kWide>(out + c, decay, weights, terms + c, num_terms, channels,
                                    prefetcher);
  if constexpr (kWide == 4) {
    if (c + 2 * kStep <= channels) {
      rank_update_block<kRows, 2>(out + c, decay, weights, terms + c, num_terms, channels,
                                  prefetcher);
      c += 2 * kStep;
    }
  }
  if (c < channels)
    rank_update_block<kRows, 1>(out + c, decay, weights, terms + c, num_terms, channels,
                                prefetcher);
}

// out[i] = decay[i] * out[i] + sum_k weight(i, k) * terms[k]; without decay, out is overwritten.
// num_rows is even.
template <class Scalar, class Prefetcher>
void rank_update(Scalar* out, const Scalar* decay, Weights<Scalar> weights, int64_t num_rows,
                 const Scalar* terms, int64_t num_terms, int64_t channels, Prefetcher& prefetcher) {
  int64_t i = 0;
  const auto update = [&](auto rows) {
    constexpr int kRows = decltype(rows)::value;
    rank_update_rows<kRows>(
        out + i * channels, decay ? decay + i : nullptr,
        {weights.data + i * weights.row_stride, weights.row_stride, weights.term_stride}, terms,
        num_terms, channels, prefetcher);
    i += kRows;
  };
  while (num_rows - i >= 6) update(std::integral_constant<int, 6>{});
  if (num_rows - i == 4) update(std::integral_constant<int, 4>{});
  if (num_rows - i == 2) update(std::integral_constant<int, 2>{});
}

}  // namespace
}  // namespace crossvit::attention_core
