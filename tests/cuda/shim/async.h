// Asynchronous copies, delivered as late as the kernel's waits allow.
#pragma once

#include "shim/sync.h"

namespace crossvit::testing {

constexpr int kCopyAlignment = 16;
constexpr long long kMaxExpectedBytes = (1 << 20) - 1;
constexpr uint64_t kInitialised = 0x6d62617272696572;  // what an mbarrier's memory holds

inline void check_copy(const char* name, const void* to, int bytes, const void* from) {
  const Block& block = *current->block;
  const char* first = static_cast<const char*>(to);
  if (reinterpret_cast<uintptr_t>(to) % kCopyAlignment) {
    fault(std::string("misaligned ") + name + ": its shared address");
  }
  if (reinterpret_cast<uintptr_t>(from) % kCopyAlignment) {
    fault(std::string("misaligned ") + name + ": its global address");
  }
  if (first < block.shared || first + bytes > block.shared + block.shared_bytes) {
    fault(std::string(name) + " to outside the block's shared memory");
  }
}

// --- cp.async

inline void deliver(const SharedCopy& copy) {
  std::memcpy(copy.to, copy.from, copy.read);
  std::memset(copy.to + copy.read, 0, kCopyAlignment - copy.read);
}

inline void copy_async_16(void* shared, const void* global, int bytes = kCopyAlignment) {
  Thread& self = *current;
  if (bytes != 0 && bytes != kCopyAlignment)
    fault("cp.async of " + std::to_string(bytes) + " bytes");
  check_copy("cp.async", shared, kCopyAlignment, bytes ? global : nullptr);
  announce_copy(shared, kCopyAlignment, global, bytes);
  const SharedCopy copy{static_cast<char*>(shared), static_cast<const char*>(global), bytes,
                        self.copy_group};
  if (chance.coin()) return deliver(copy);
  Unwatched unwatched;
  self.copies.push_back(copy);
}

inline void copy_async_commit() {
  Unwatched unwatched;
  ++current->copy_group;
}

template <int kPending>
void copy_async_wait() {
  Thread& self = *current;
  auto last = self.copies.begin();
  for (; last != self.copies.end() && last->group < self.copy_group - kPending; ++last) {
    deliver(*last);
  }
  Unwatched unwatched;
  self.copies.erase(self.copies.begin(), last);
}

// --- mbarriers

inline MemoryBarrier& barrier_at(uint64_t* address) {
  auto& barriers = current->block->memory_barriers;
  const auto entry = barriers.find(address);
  // ThreadSanitizer needs this read: initialisation must be ordered before every use.
  if (entry == barriers.end() || *address != kInitialised) {
    fault("an mbarrier that is not initialised, or was overwritten");
  }
  return entry->second;
}

inline void barrier_init(uint64_t* address, int arrivals) {
  Block& block = *current->block;
  const char* first = reinterpret_cast<char*>(address);
  if (reinterpret_cast<uintptr_t>(address) % sizeof *address) fault("misaligned mbarrier");
  if (first < block.shared || first + sizeof *address > block.shared + block.shared_bytes) {
    fault("an mbarrier outside the block's shared memory");
  }
  if (arrivals < 1) fault("an mbarrier for " + std::to_string(arrivals) + " arrivals");
  *address = kInitialised;
  Unwatched unwatched;
  MemoryBarrier& barrier = block.memory_barriers[address] = {};
  barrier.arrivals = barrier.missing_arrivals = arrivals;
}

inline void complete_if_all_arrived(MemoryBarrier& barrier) {
  if (barrier.missing_arrivals || barrier.missing_bytes) return;
  if (!barrier.in_flight.empty()) {
    fault("an mbarrier's phase completes with copies in flight: more bytes than were expected");
  }
  Unwatched unwatched;
  barrier.missing_arrivals = barrier.arrivals;
  ++barrier.phase;
  wake_all(barrier.waiting);
}

inline void arrive(MemoryBarrier& barrier, int bytes) {
  if (barrier.missing_arrivals == 0) fault("more arrivals than an mbarrier was initialised for");
  if (barrier.missing_bytes + bytes > kMaxExpectedBytes)
    fault("an mbarrier expects too many bytes");
  release(barrier.token());
  {
    Unwatched unwatched;
    barrier.missing_bytes += bytes;
    --barrier.missing_arrivals;
  }
  complete_if_all_arrived(barrier);
}

inline void barrier_arrive(uint64_t* address) { arrive(barrier_at(address), 0); }
inline void barrier_expect_bytes(uint64_t* address, int bytes) {
  arrive(barrier_at(address), bytes);
}

inline void deliver(MemoryBarrier& barrier, const BulkCopy& copy) {
  std::memcpy(copy.to, copy.from, copy.bytes);
  release(barrier.token());
  {
    Unwatched unwatched;
    barrier.missing_bytes -= copy.bytes;
  }
  complete_if_all_arrived(barrier);
}

// If the phase is incomplete, the thread sleeps until it completes or until no other thread can
// run; then it delivers the copies itself.
inline void barrier_wait(uint64_t* address, int parity, int line = __builtin_LINE()) {
  MemoryBarrier& barrier = barrier_at(address);
  const unsigned awaited_parity = parity & 1;
  while ((barrier.phase & 1) == awaited_parity) {
    {
      Unwatched unwatched;
      barrier.waiting.push_back(current);
    }
    suspend("an mbarrier", line);
    while ((barrier.phase & 1) == awaited_parity && !barrier.in_flight.empty()) {
      acquire(&barrier.issued);
      const BulkCopy copy = barrier.in_flight.back();
      {
        Unwatched unwatched;
        barrier.in_flight.pop_back();
      }
      deliver(barrier, copy);
    }
  }
  acquire(&barrier.tokens[awaited_parity]);
}

inline void copy_bulk(void* shared, const void* global, int bytes, uint64_t* address) {
  if (bytes <= 0 || bytes % kCopyAlignment) {
    fault("bulk copy of " + std::to_string(bytes) + " bytes: no multiple of 16");
  }
  check_copy("bulk copy", shared, bytes, global);
  MemoryBarrier& barrier = barrier_at(address);
  announce_copy(shared, bytes, global, bytes);
  const BulkCopy copy{static_cast<char*>(shared), static_cast<const char*>(global), bytes};
  if (chance.coin()) return deliver(barrier, copy);
  release(&barrier.issued);
  Unwatched unwatched;
  barrier.in_flight.push_back(copy);
}

// Order between the proxies is not modelled.
inline void barrier_init_visible() {}
inline void fence_async_proxy() {}

}  // namespace crossvit::testing
