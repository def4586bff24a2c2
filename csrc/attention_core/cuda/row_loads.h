#pragma once

#include "attention_core/cuda/plan.h"

// The rows of a pass, u or dm, on their way from memory.

namespace crossvit::attention_core {

// The gain of rows that have none.
struct NoGain {
  struct Loaded {};
  __device__ static Loaded load(int) { return {}; }
  __device__ static float value(const Loaded&) { return 1; }
};

// Rows [0, count) of floats, times a gain per channel, on their way to the rows of a pass. To be
// loaded before the copies of tokens start, which would hold them up, and used afterwards: so many
// columns of 8 rows of each thread, of wider tokens the rest later. For all threads.
template <class P, int kColumnsOf8Rows, class Gain = NoGain>
class RowLoads {
 public:
  using T = typename P::Element;

  __device__ RowLoads(const float* from, int64_t stride, int count, int channels,
                      Gain gain = Gain())
      : from_(from), stride_(stride), count_(count), channels_(channels), gain_(gain) {
#pragma unroll
    for (int i = 0; i < kColumns; ++i) loads_[i] = load(channel(i));
  }

  // Writes tensor-core operands, with zeros in unused rows.
  __device__ void write(T* to) const {
    const auto write_channel = [&](int c, const Loads& loads) {
      if (c >= channels_) return;
#pragma unroll
      for (int row = 0; row < P::kRows; ++row) {
        to[row * P::row_pitch(channels_) + c] = from_float<T>(value(loads, row));
      }
    };
#pragma unroll
    for (int i = 0; i < kColumns; ++i) write_channel(channel(i), loads_[i]);
#pragma unroll 1
    for (int c = channel(kColumns); c < channels_; c += block_threads()) write_channel(c, load(c));
  }

  // Adds the products of this thread's channels, rounded to T, with other rows.
  template <class Other>
  __device__ void add_products(const Other& other, float (&sums)[P::kRows]) const {
    const auto add = [&](const Loads& loads, const typename Other::Loads& others) {
#pragma unroll
      for (int row = 0; row < P::kRows; ++row) {
        sums[row] += rounded<T>(value(loads, row)) * others.values[row];
      }
    };
#pragma unroll
    for (int i = 0; i < kColumns; ++i) add(loads_[i], other.loads_[i]);
#pragma unroll 1
    for (int c = channel(kColumns); c < channels_; c += block_threads())
      add(load(c), other.load(c));
  }

 private:
  template <class, int, class>
  friend class RowLoads;
  static constexpr int kColumns = maximum(kColumnsOf8Rows * 8 / P::kRows, 1);

  struct Loads {
    float values[P::kRows];
    decltype(std::declval<Gain>().load(0)) gain;
  };

  __device__ static int channel(int i) { return thread_index() + i * block_threads(); }

  __device__ __forceinline__ Loads load(int c) const {
    Loads loads = {};
    if (c >= channels_) return loads;
    loads.gain = gain_.load(c);
    const float* from = from_ + c;
#pragma unroll
    for (int row = 0; row < P::kRows; ++row, from += stride_) {
      if (row < count_) loads.values[row] = *from;
    }
    return loads;
  }

  __device__ __forceinline__ float value(const Loads& loads, int row) const {
    return loads.values[row] * gain_.value(loads.gain);
  }

  const float* from_;
  int64_t stride_;
  int count_, channels_;
  Gain gain_;
  Loads loads_[kColumns];
};

}  // namespace crossvit::attention_core
