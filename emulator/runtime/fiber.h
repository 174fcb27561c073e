// Fibers: one stack for each CUDA thread, and the switch between two of them.
//
// On x86-64 the switch is a dozen instructions of our own; elsewhere it is ucontext's, which saves the signal mask by
// two system calls and is several times slower.
#pragma once
#include <cstddef>

// Defined by a build that wants the portable switch.
#if !defined(__x86_64__) && !defined(EMULATOR_UCONTEXT)
#define EMULATOR_UCONTEXT 1
#endif
#if defined(EMULATOR_UCONTEXT)
#include <ucontext.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#define EMULATOR_ADDRESS_SANITIZER 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define EMULATOR_ADDRESS_SANITIZER 1
#endif
#endif

namespace emulator {

class Fiber {
 public:
  // Makes the next switch to this fiber enter `entry`, on an empty stack. `entry` begins with fiber_entered() and
  // never returns. Fibers of different `number` use different cache sets for the busiest part of their stacks.
  void start(void (*entry)(), unsigned number);

  // Whether `address` lies in the stack's guard page: the fiber ran out of stack.
  bool in_guard(const void* address) const;

  // The highest aligned address of the stack: a fiber that is given up may be resumed there.
  void* top() const { return stack_ + stack_bytes_; }

  // Forgets what AddressSanitizer knows of the frames on this stack, which will never return.
  void forget_frames();

  friend void switch_fiber(Fiber& from, Fiber& to);
  friend void arrive(void* fake_stack);

 private:
  char* stack_ = nullptr;
  size_t stack_bytes_ = 0;
#if defined(EMULATOR_UCONTEXT)
  ucontext_t context_;
#else
  void* stack_pointer_ = nullptr;
#endif
  // AddressSanitizer's record of this stack while another one is in use.
  void* fake_stack_ = nullptr;
};

// Leaves `from`, which is running, and goes on in `to`; returns when something switches back to `from`. A `Fiber` that
// was never started stands for the host thread's own stack.
void switch_fiber(Fiber& from, Fiber& to);

// The first thing a fiber calls.
void fiber_entered();

}  // namespace emulator
