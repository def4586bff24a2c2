// Fibers: threads of execution with their own stacks, which run one at a time and switch
// explicitly.
#pragma once

#include <cstdint>
#include <cstring>
#include <memory>

#include "shim/sanitizers.h"

#if !defined(__x86_64__) || defined(CROSSVIT_SHIM_UCONTEXT)
#define CROSSVIT_SHIM_PORTABLE_SWITCH
#include <ucontext.h>
#endif

namespace crossvit::testing {

#ifdef CROSSVIT_SHIM_PORTABLE_SWITCH

// Twenty times slower, as it saves the signal mask with a system call.
struct Stack {
  ucontext_t context;
  void prepare(char* memory, std::size_t bytes, void (*entry)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = memory;
    context.uc_stack.ss_size = bytes;
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
  }
};

inline void switch_stacks(Stack& from, const Stack& to) { swapcontext(&from.context, &to.context); }

#else

// Saves the System V ABI's callee-saved registers on the current stack, and its top in *from.
__attribute__((naked, noinline)) inline void switch_tops(void** /*from: rdi*/, void* /*to: rsi*/) {
  asm("push %rbp\n push %rbx\n push %r12\n push %r13\n push %r14\n push %r15\n"
      "mov %rsp, (%rdi)\n mov %rsi, %rsp\n"
      "pop %r15\n pop %r14\n pop %r13\n pop %r12\n pop %rbx\n pop %rbp\n ret");
}

struct Stack {
  void* top = nullptr;
  void prepare(char* memory, std::size_t bytes, void (*entry)()) {
    constexpr int kSavedRegisters = 6;
    const auto end = reinterpret_cast<uintptr_t>(memory + bytes) & ~uintptr_t(15);
    void** slot = reinterpret_cast<void**>(end);
    *--slot = nullptr;  // entry's return address; keeps the stack aligned as after a call
    *--slot = reinterpret_cast<void*>(entry);
    for (int i = 0; i < kSavedRegisters; ++i) *--slot = nullptr;
    top = slot;
  }
};

inline void switch_stacks(Stack& from, const Stack& to) { switch_tops(&from.top, to.top); }

#endif

class Fiber {
 public:
  // The program's original stack.
  Fiber() {
#if defined(__SANITIZE_THREAD__)
    tsan_ = __tsan_get_current_fiber();
#endif
  }

  // A new stack. ThreadSanitizer takes half a millisecond for each: reuse them.
  explicit Fiber(std::size_t bytes)
      : owned_(new char[bytes]), memory_(owned_.get()), bytes_(bytes) {
#if defined(__SANITIZE_THREAD__)
    tsan_ = __tsan_create_fiber(0);
#endif
  }

  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // The next switch to this fiber calls `entry`, which must begin with entered() and never return.
  void prepare(void (*entry)()) {
    unpoison(memory_, bytes_);
    std::memset(memory_ + kSlack, kUntouched, kGuard);
    stack_.prepare(memory_, bytes_, entry);
  }

  // Whether no overflow of the stack has been detected since prepare().
  bool fitted() const {
    for (std::size_t i = 0; i < kGuard; ++i) {
      if (memory_[kSlack + i] != kUntouched) return false;
    }
    return true;
  }

  // `program` is the fiber of the program's original stack.
  static void entered([[maybe_unused]] Fiber& program) {
#if defined(__SANITIZE_ADDRESS__)
    const void* bottom;
    std::size_t bytes;
    __sanitizer_finish_switch_fiber(nullptr, &bottom, &bytes);
    // The first switch comes from that stack, whose bounds become known only here.
    if (!program.bytes_) {
      program.memory_ = static_cast<char*>(const_cast<void*>(bottom));
      program.bytes_ = bytes;
    }
#endif
  }

  // Returns when a fiber switches back to `from`; never with for_good.
  __attribute__((noinline, no_sanitize("thread", "address"))) static void change(
      Fiber& from, Fiber& to, [[maybe_unused]] bool for_good = false) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(for_good ? nullptr : &from.fake_stack_, to.memory_, to.bytes_);
#elif defined(__SANITIZE_THREAD__)
    // A switch does not order the two fibers.
    __tsan_switch_to_fiber(to.tsan_, __tsan_switch_to_fiber_no_sync);
#endif
    asm volatile("" ::: "memory");
    switch_stacks(from.stack_, to.stack_);
    asm volatile("" ::: "memory");
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(from.fake_stack_, nullptr, nullptr);
#endif
  }

 private:
  // An overflow changes the guard; the slack below keeps it from doing harm.
  static constexpr std::size_t kSlack = 4096, kGuard = 64;
  static constexpr char kUntouched = 0x5a;
  Stack stack_;
  std::unique_ptr<char[]> owned_;
  char* memory_ = nullptr;
  std::size_t bytes_ = 0;
  [[maybe_unused]] void* fake_stack_ = nullptr;
  [[maybe_unused]] void* tsan_ = nullptr;
};

}  // namespace crossvit::testing
