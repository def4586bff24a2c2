// The state of a running cluster: its blocks, warps and threads, and what they wait for.
#pragma once

#include <cstdlib>
#include <deque>
#include <functional>
#include <list>
#include <map>
#include <string>
#include <vector>

#include "shim/fibers.h"
#include "shim/numbers.h"

// Set to the running thread's.
inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

namespace crossvit::testing {

constexpr int kWarp = 32;

struct Thread;

// Makes random choices if there is a seed; without one every run is the same.
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

// Successive phases. Threads may arrive in the next phase before all have left the last, so the
// tokens passed to ThreadSanitizer alternate.
struct Phases {
  unsigned phase = 0;
  uint64_t tokens[2] = {};
  void* token() { return &tokens[phase & 1]; }
};

// Completes when all members have arrived. Threads that exit are no longer members.
struct Barrier : Phases {
  int members = 0, arrived = 0;
  std::vector<Thread*> waiting;

  unsigned arrive();
  void wait(unsigned arrived_in, const char* name, int line);
  void drop_member(bool arrived_in_this_phase);
  void complete_if_all_arrived();
};

// Lanes that synchronize in a warp operation with the same mask.
struct WarpSync : Phases {
  unsigned mask = 0, arrived = 0;
  void (*operation)(WarpSync&) = nullptr;
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
  std::list<WarpSync> syncs;  // one per mask in use

  WarpSync& sync_of(unsigned mask) {
    for (WarpSync& sync : syncs) {
      if (sync.mask == mask) return sync;
    }
    Unwatched unwatched;
    syncs.emplace_back().mask = mask;
    return syncs.back();
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
  long long missing_bytes = 0;  // negative while more has been copied than expected
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
  Barrier warp_barriers[16];  // by number, from 1 on
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

}  // namespace crossvit::testing
