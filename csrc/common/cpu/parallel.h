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

// Multiply-adds below which threading costs more than it saves: about 10 microseconds.
constexpr int64_t kWorthThreads = 1 << 19;
}  // namespace internal

// Returns the number of threads that parallel_for may use now.
int num_threads();

// Multiply-adds in the time it takes to copy an uncached element.
constexpr int kWorkOfCopy = 16;

// Calls body(begin, end) on disjoint ranges that cover [0, count). body must not throw. work is
// that of one index, in multiply-adds; small loops run on the calling thread.
template <class Body>
void parallel_for(int64_t count, int64_t work, const Body& body) {
  if (count * work < internal::kWorthThreads) {
    if (count > 0) body(int64_t{0}, count);
    return;
  }
  internal::parallel_for(
      count,
      [](int64_t begin, int64_t end, void* context) {
        (*static_cast<const Body*>(context))(begin, end);
      },
      const_cast<Body*>(&body));
}

// Calls body(next_task) once on each thread. next_task() returns an unclaimed task, or a number >=
// count when none is left, so a thread that is preempted does not delay the others.
template <class Body>
void parallel_tasks(int64_t count, int64_t work, const Body& body) {
  int64_t next = 0;
  const int64_t threads = num_threads() < count ? num_threads() : count;
  if (threads == 0) return;
  parallel_for(threads, count * work / threads, [&](int64_t begin, int64_t end) {
    for (; begin < end; ++begin)
      body([&] { return __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED); });
  });
}

}  // namespace crossvit
