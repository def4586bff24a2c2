#pragma once

#include <cstdint>

// Asking for memory ahead of its use, in step with the arithmetic.
//
// A tile is read in a burst, then worked on for several times as long. The hardware prefetcher runs
// only a little ahead of the reads, so without help memory idles while the core computes, and the
// core while memory answers. Asked for all at once, lines queue in the few fill buffers that a core
// has and stall other loads; a line or two per step of an inner loop keeps memory evenly busy.

namespace crossvit::attention_core {
namespace {

template <bool kForWriting>
class Prefetch {
 public:
  Prefetch(const void* begin, int64_t bytes)
      : next_(static_cast<const char*>(begin)), end_(next_ + bytes) {}

  template <int kLines>
  void ask() {
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

// For work that outlasts the memory it needs.
struct NoPrefetch {
  NoPrefetch(const void*, int64_t) {}
  template <int kLines>
  void ask() {}
};

}  // namespace
}  // namespace crossvit::attention_core
