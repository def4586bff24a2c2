#pragma once

#include <cstdint>

// Loops on torch's own thread pool, without linking to torch: one pool means that our loops and
// torch's never compete for cores, and torch.set_num_threads() holds for both. Since torch 2.10
// libtorch_cpu exports the pool through a stable C interface (torch/csrc/stable/c/shim.h); it is
// looked up among the libraries that are already loaded. Without it loops run serially.

namespace crossvit {

namespace internal {
using LoopBody = void (*)(int64_t begin, int64_t end, void* context);
void parallel_for(int64_t count, LoopBody body, void* context);
}  // namespace internal

// Threads that parallel_for may use now.
int num_threads();

// Calls body(begin, end) on disjoint ranges that cover [0, count). body must not throw.
template <class Body>
void parallel_for(int64_t count, const Body& body) {
  internal::parallel_for(
      count,
      [](int64_t begin, int64_t end, void* context) {
        (*static_cast<const Body*>(context))(begin, end);
      },
      const_cast<Body*>(&body));
}

}  // namespace crossvit
