// What runs at one time: the threads of a cluster's blocks, who waits for whom, and which is next.
#pragma once

#include <cstdlib>
#include <deque>
#include <functional>
#include <list>
#include <map>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "testing/fibers.h"
#include "testing/numbers.h"

// Of the thread that runs.
inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

namespace crossvit::testing {

constexpr int kWarp = 32;

struct Thread;

// Random choices, or none: then whatever is chosen is the same in every run.
class Chance {
 public:
  void seed(const char* text) {
    state_ = text && *text ? std::strtoull(text, nullptr, 10) * 0x9e3779b97f4a7c15 + 1 : 0;
  }
  bool on() const { return state_ != 0; }
  uint64_t below(uint64_t n) {
    Unwatched unwatched;
    state_ ^= state_ << 13;
    state_ ^= state_ >> 7;
    state_ ^= state_ << 17;
    return state_ % n;
  }
  bool coin() { return on() && below(2); }

 private:
  uint64_t state_ = 0;
};

// One phase after another. A thread may be late to leave a phase while others arrive in the next,
// so what ThreadSanitizer is told alternates between two tokens.
struct Phases {
  unsigned phase = 0;
  uint64_t tokens[2] = {};
  void* token() { return &tokens[phase & 1]; }
};

// Waits until all members have arrived; members that exit count no more.
struct Barrier : Phases {
  int members = 0, arrived = 0;
  std::vector<Thread*> waiting;

  unsigned arrive();
  void wait(unsigned arrived_in, const char* name, int line);
  void leave(bool arrived_in_this_phase);
  void complete_if_all_arrived();
};

// Lanes that call one warp operation with one mask.
struct Meeting : Phases {
  unsigned mask = 0, arrived = 0;
  void (*operation)(Meeting&) = nullptr;
  void* arguments[kWarp] = {};

  template <class Argument>
  Argument& argument(int lane) const {
    return *static_cast<Argument*>(arguments[lane]);
  }
  bool has(int lane) const { return arrived >> lane & 1; }
};

struct Warp {
  Thread* threads[kWarp] = {};
  unsigned live = 0;
  std::list<Meeting> meetings;  // one for each mask in use

  Meeting& meeting(unsigned mask) {
    for (Meeting& one : meetings) {
      if (one.mask == mask) return one;
    }
    Unwatched unwatched;
    meetings.emplace_back().mask = mask;
    return meetings.back();
  }
};

struct SharedCopy {  // cp.async
  char* to;
  const char* from;
  int read;
  int group;
};

struct BulkCopy {
  char* to;
  const char* from;
  int bytes;
};

struct MemoryBarrier : Phases {
  int arrivals = 0, missing_arrivals = 0;
  long long missing_bytes = 0;  // negative while copies are ahead of what was expected
  uint64_t issued = 0;          // token: the copies' issue comes before their delivery
  std::vector<BulkCopy> in_flight;
  std::vector<Thread*> waiting;
};

struct Block {
  uint3 index{};
  int rank = 0;
  int shared_bytes = 0;
  char* shared = nullptr;
  int live = 0;
  bool started = false;
  uint64_t start_token = 0, exit_token = 0;
  Barrier barrier;
  int barrier_line = 0;
  std::map<int, Barrier> warp_barriers;  // by number
  std::deque<Warp> warps;
  std::map<uint64_t*, MemoryBarrier> memory_barriers;
};

struct Thread {
  Fiber* fiber = nullptr;
  Block* block = nullptr;
  Warp* warp = nullptr;
  uint3 index{};
  int lane = 0;
  bool done = false;
  const char* waits_for = nullptr;
  int line = 0;
  bool cluster_arrived = false;
  unsigned cluster_phase = 0;
  int copy_group = 0;
  std::vector<SharedCopy> copies;
  bool fenced = false;
  void* last_atomic = nullptr;
};

struct Cluster {
  std::deque<Block> blocks;
  std::deque<Thread> threads;
  std::vector<Thread*> ready;
  Barrier barrier;
  std::string error;
  bool failed = false;
};

inline Cluster* cluster = nullptr;
inline Thread* current = nullptr;
inline Fiber* launcher = nullptr;
inline Chance chance;
inline const std::function<void()>* kernel = nullptr;

// Unwinds a thread after another one has failed.
struct Cancelled {};

inline std::string text_of(const uint3& index) {
  return "(" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " +
         std::to_string(index.z) + ")";
}

[[noreturn]] inline void fault(const std::string& what) {
  throw std::runtime_error("block " + text_of(current->block->index) + ", thread " +
                           text_of(current->index) + ": " + what);
}

inline void wake(Thread& thread) {
  Unwatched unwatched;
  cluster->ready.push_back(&thread);
}

// In reverse, as the last to become ready is the first to run.
inline void wake_all(std::vector<Thread*>& waiting) {
  Unwatched unwatched;
  cluster->ready.insert(cluster->ready.end(), waiting.rbegin(), waiting.rend());
  waiting.clear();
}

// A thread that waits for bulk copies nothing else can bring about any more.
inline Thread* waiter_of_a_copy() {
  for (Block& block : cluster->blocks) {
    for (auto& [address, barrier] : block.memory_barriers) {
      if (barrier.waiting.empty() || barrier.in_flight.empty()) continue;
      Thread* thread = barrier.waiting.front();
      barrier.waiting.erase(barrier.waiting.begin());
      return thread;
    }
  }
  return nullptr;
}

inline std::string describe_deadlock() {
  std::map<std::string, int> counts;
  const Thread* first = nullptr;
  for (const Thread& thread : cluster->threads) {
    if (thread.done) continue;
    if (!first) first = &thread;
    std::string place = thread.waits_for;
    if (thread.line) place += " (line " + std::to_string(thread.line) + ")";
    ++counts[place];
  }
  std::string text = "block " + text_of(first->block->index) + ": deadlock:";
  for (const auto& [place, count] : counts) {
    text += " " + std::to_string(count) + " threads wait at " + place + ";";
  }
  for (const Block& block : cluster->blocks) {
    for (const auto& [address, barrier] : block.memory_barriers) {
      if (barrier.waiting.empty()) continue;
      text += " the mbarrier at byte " +
              std::to_string(reinterpret_cast<char*>(address) - block.shared) + " misses " +
              std::to_string(barrier.missing_arrivals) + " arrivals and " +
              std::to_string(barrier.missing_bytes) + " bytes;";
    }
  }
  text.pop_back();
  return text;
}

// None when all threads are done. After a fault every thread runs once more, to unwind.
inline Thread* next_thread() {
  std::vector<Thread*>& ready = cluster->ready;
  if (!cluster->failed && !ready.empty()) {
    const std::size_t choice = chance.on() ? chance.below(ready.size()) : ready.size() - 1;
    Thread* thread = ready[choice];
    ready[choice] = ready.back();
    ready.pop_back();
    return thread;
  }
  if (!cluster->failed) {
    if (Thread* thread = waiter_of_a_copy()) return thread;
  }
  for (Thread& thread : cluster->threads) {
    if (thread.done) continue;
    if (!cluster->failed) {
      cluster->failed = true;
      cluster->error = describe_deadlock();
    }
    return &thread;
  }
  return nullptr;
}

__attribute__((no_sanitize("thread"))) inline void run(Fiber& from, Thread& next,
                                                       bool for_good = false) {
  current = &next;
  threadIdx = next.index;
  blockIdx = next.block->index;
  Fiber::change(from, *next.fiber, for_good);
}

// Lets others run until this thread is woken.
inline void suspend(const char* waits_for, int line = 0) {
  Unwatched unwatched;
  Thread& self = *current;
  self.waits_for = waits_for;
  self.line = line;
  Thread* next = next_thread();
  if (next != &self) run(*self.fiber, *next);
  if (cluster->failed) throw Cancelled{};
}

inline unsigned Barrier::arrive() {
  release(token());
  Unwatched unwatched;
  const unsigned arrived_in = phase;
  ++arrived;
  complete_if_all_arrived();
  return arrived_in;
}

inline void Barrier::wait(unsigned arrived_in, const char* name, int line) {
  if (phase == arrived_in) {
    Unwatched unwatched;
    waiting.push_back(current);
    suspend(name, line);
  }
  acquire(&tokens[arrived_in & 1]);
}

inline void Barrier::leave(bool arrived_in_this_phase) {
  Unwatched unwatched;
  --members;
  if (arrived_in_this_phase) --arrived;
  complete_if_all_arrived();
}

inline void Barrier::complete_if_all_arrived() {
  if (arrived == 0 || arrived < members) return;
  arrived = 0;
  ++phase;
  wake_all(waiting);
}

}  // namespace crossvit::testing
