#include "runtime/fiber.h"

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <sys/mman.h>
#include <unistd.h>

#if defined(EMULATOR_ADDRESS_SANITIZER)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace emulator {
namespace {

#if defined(EMULATOR_ADDRESS_SANITIZER)
// Instrumented frames are several times larger.
constexpr size_t stack_size = 256 << 10;
#else
constexpr size_t stack_size = 64 << 10;
#endif

// The fiber that the last switch left.
Fiber* left = nullptr;

}  // namespace

#if !defined(EMULATOR_UCONTEXT)
// emulator_switch_stack(void** save, void* load): pushes the registers that a call preserves, exchanges the stacks and
// pops the other side's. The floating-point control words are the same on all fibers.
extern "C" void emulator_switch_stack(void** save, void* load);
asm(R"(
  .text
  .p2align 4
  .hidden emulator_switch_stack
  .globl emulator_switch_stack
  .type emulator_switch_stack, @function
emulator_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size emulator_switch_stack, .-emulator_switch_stack
)");
#endif

void Fiber::start(void (*entry)(), unsigned number) {
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  if (stack_ == nullptr) {
    void* mapping = mmap(nullptr, page + stack_size, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapping == MAP_FAILED || mprotect(mapping, page, PROT_NONE) != 0) {
      perror("loramux emulator: no memory for a thread's stack");
      abort();
    }
    stack_ = static_cast<char*>(mapping) + page;
    stack_bytes_ = stack_size;
  }
  forget_frames();
  // All stacks are page-aligned: without a shift, 32 lanes would compete for the same few cache sets.
  const size_t shift = number * 5 % 64 * 64;
#if !defined(EMULATOR_UCONTEXT)
  // What emulator_switch_stack pops: six registers, then the address it returns to. The function entered that way
  // sees the stack as after a call, with a null return address.
  void** top = reinterpret_cast<void**>(stack_ + stack_bytes_ - shift);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  stack_pointer_ = top;
#else
  getcontext(&context_);
  context_.uc_stack.ss_sp = stack_;
  context_.uc_stack.ss_size = stack_bytes_ - shift;
  context_.uc_link = nullptr;
  makecontext(&context_, entry, 0);
#endif
  fake_stack_ = nullptr;
}

bool Fiber::in_guard(const void* address) const {
  const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  const auto at = reinterpret_cast<uintptr_t>(address);
  const auto bottom = reinterpret_cast<uintptr_t>(stack_);
  return at < bottom && at >= bottom - page;
}

void Fiber::forget_frames() {
#if defined(EMULATOR_ADDRESS_SANITIZER)
  __asan_unpoison_memory_region(stack_, stack_bytes_);
#endif
}

// Tells AddressSanitizer which stack is in use now, and learns the bounds of the one that was left: the only way to
// know those of the host thread.
void arrive([[maybe_unused]] void* fake_stack) {
#if defined(EMULATOR_ADDRESS_SANITIZER)
  const void* bottom;
  size_t bytes;
  __sanitizer_finish_switch_fiber(fake_stack, &bottom, &bytes);
  left->stack_ = const_cast<char*>(static_cast<const char*>(bottom));
  left->stack_bytes_ = bytes;
#endif
}

void switch_fiber(Fiber& from, Fiber& to) {
  left = &from;
#if defined(EMULATOR_ADDRESS_SANITIZER)
  __sanitizer_start_switch_fiber(&from.fake_stack_, to.stack_, to.stack_bytes_);
#endif
#if defined(EMULATOR_UCONTEXT)
  swapcontext(&from.context_, &to.context_);
#else
  emulator_switch_stack(&from.stack_pointer_, to.stack_pointer_);
#endif
  arrive(from.fake_stack_);
}

void fiber_entered() { arrive(nullptr); }

}  // namespace emulator
