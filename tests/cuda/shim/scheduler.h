// Chooses the thread that runs next, and reports a deadlock if none can.
#pragma once

#include <stdexcept>

#include "shim/cluster_state.h"

namespace crossvit::testing {

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

// Appends in reverse, as the last to become ready runs first.
inline void wake_all(std::vector<Thread*>& waiting) {
  Unwatched unwatched;
  cluster->ready.insert(cluster->ready.end(), waiting.rbegin(), waiting.rend());
  waiting.clear();
}

// Returns a thread that waits for bulk copies, to run if no other thread can.
inline Thread* thread_waiting_for_copy() {
  std::vector<MemoryBarrier*> barriers;
  for (Block& block : cluster->blocks) {
    for (auto& [address, barrier] : block.memory_barriers) {
      if (!barrier.waiting.empty() && !barrier.in_flight.empty()) barriers.push_back(&barrier);
    }
  }
  if (barriers.empty()) return nullptr;
  std::vector<Thread*>& waiting =
      barriers[chance.on() ? chance.below(barriers.size()) : 0]->waiting;
  Thread* thread = waiting.front();
  waiting.erase(waiting.begin());
  return thread;
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

// Returns null if all threads are done. After a fault each thread runs once more, to unwind.
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
    if (Thread* thread = thread_waiting_for_copy()) return thread;
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

inline void Barrier::drop_member(bool arrived_in_this_phase) {
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
