// Annotations for ThreadSanitizer and AddressSanitizer, empty in a plain build.
#pragma once

#include <cstddef>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#elif defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
// Exported by the library, but not declared in its headers.
extern "C" {
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
void __tsan_read_range(void* address, std::size_t bytes);
void __tsan_write_range(void* address, std::size_t bytes);
}
#endif

namespace crossvit::testing {

// Makes ThreadSanitizer ignore the thread's accesses. It must cover every write to the shim's own
// state, which is not memory of the kernel.
class Unwatched {
 public:
#if defined(__SANITIZE_THREAD__)
  Unwatched() {
    AnnotateIgnoreReadsBegin("", 0);
    AnnotateIgnoreWritesBegin("", 0);
  }
  ~Unwatched() {
    AnnotateIgnoreWritesEnd("", 0);
    AnnotateIgnoreReadsEnd("", 0);
  }
#else
  Unwatched() {}
  ~Unwatched() {}
#endif
  Unwatched(const Unwatched&) = delete;
  Unwatched& operator=(const Unwatched&) = delete;
};

// Accesses before release(token) are ordered before those after acquire(token): the only order that
// ThreadSanitizer knows of.
inline void release([[maybe_unused]] void* token) {
#if defined(__SANITIZE_THREAD__)
  __tsan_release(token);
#endif
}

inline void acquire([[maybe_unused]] void* token) {
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(token);
#endif
}

// An asynchronous copy may access its memory at any time once issued: the access is announced at
// the issue, and made at the wait.
inline void announce_copy([[maybe_unused]] void* to, [[maybe_unused]] std::size_t bytes,
                          [[maybe_unused]] const void* from, [[maybe_unused]] std::size_t read) {
#if defined(__SANITIZE_THREAD__)
  __tsan_write_range(to, bytes);
  if (read) __tsan_read_range(const_cast<void*>(from), read);
#elif defined(__SANITIZE_ADDRESS__)
  // An access to the first bad byte here makes the report name the line that issued the copy.
  void* bad = __asan_region_is_poisoned(to, bytes);
  if (!bad && read) bad = __asan_region_is_poisoned(const_cast<void*>(from), read);
  if (bad) (void)*static_cast<volatile char*>(bad);
#endif
}

inline void poison([[maybe_unused]] void* memory, [[maybe_unused]] std::size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __asan_poison_memory_region(memory, bytes);
#endif
}

inline void unpoison([[maybe_unused]] void* memory, [[maybe_unused]] std::size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(memory, bytes);
#endif
}

}  // namespace crossvit::testing
