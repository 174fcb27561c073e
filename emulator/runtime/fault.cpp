#include "runtime/fault.h"

#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <pthread.h>
#include <utility>
#include <ucontext.h>

#include "runtime/block.h"
#include "runtime/device_memory.h"
#include "runtime/shared_memory.h"

namespace emulator {
namespace {

constexpr size_t signal_stack_bytes = 64 << 10;

// The host thread that a launch runs on.
pthread_t launching_thread;
bool launching = false;

struct sigaction previous_segv;
struct sigaction previous_bus;

// What the handler found; the launch is abandoned after it has returned, on the faulting fiber's stack.
Fault pending;

void abandon_after_signal() { abandon_launch(std::move(pending)); }

enum class Access { read, write, unknown };

Access access_of(const ucontext_t& context) {
#if defined(__x86_64__)
  // Bit 1 of the page fault's error code.
  return (context.uc_mcontext.gregs[REG_ERR] & 2) != 0 ? Access::write : Access::read;
#else
  (void)context;
  return Access::unknown;
#endif
}

// Makes the interrupted fiber go on in abandon_after_signal(), on an empty stack. False on machines where we do not
// know how.
bool resume_in_abandon(ucontext_t& context, void* stack_top) {
#if defined(__x86_64__)
  // As after a call: a return address on an otherwise aligned stack.
  void** top = static_cast<void**>(stack_top) - 1;
  *top = nullptr;
  context.uc_mcontext.gregs[REG_RSP] = reinterpret_cast<greg_t>(top);
  context.uc_mcontext.gregs[REG_RIP] = reinterpret_cast<greg_t>(abandon_after_signal);
  return true;
#elif defined(__aarch64__)
  context.uc_mcontext.sp = reinterpret_cast<uintptr_t>(stack_top);
  context.uc_mcontext.pc = reinterpret_cast<uintptr_t>(abandon_after_signal);
  return true;
#else
  (void)context, (void)stack_top;
  return false;
#endif
}

Fault describe_access(const siginfo_t& info, const ucontext_t& context) {
  const void* address = info.si_addr;
  if (running->fiber.in_guard(address)) {
    return {FaultCode::launch_failed, "ran out of stack"};
  }
  // The kernel gives no address for these: vector instructions that demand alignment, and addresses no machine has.
  if (info.si_code == SI_KERNEL || info.si_signo == SIGBUS) {
    return {FaultCode::misaligned_address, "access to an address that is misaligned, or that no machine has"};
  }
  const Access access = access_of(context);
  char text[64];
  snprintf(text, sizeof text, "%s %p, ",
           access == Access::write  ? "write to"
           : access == Access::read ? "read of"
                                    : "access to",
           address);
  return {FaultCode::illegal_address,
          text + (shared_memory.reserved(address) ? shared_memory.describe(address) : device_memory.describe(address))};
}

void pass_on(int signal, siginfo_t* info, void* context) {
  const struct sigaction& previous = signal == SIGSEGV ? previous_segv : previous_bus;
  if ((previous.sa_flags & SA_SIGINFO) != 0) {
    previous.sa_sigaction(signal, info, context);
  } else if (previous.sa_handler == SIG_DFL || previous.sa_handler == SIG_IGN) {
    // The access is repeated after our return and ends the process as if we had never been there.
    sigaction(signal, &previous, nullptr);
  } else {
    previous.sa_handler(signal);
  }
}

void on_signal(int signal, siginfo_t* info, void* context) {
  if (!launching || !pthread_equal(pthread_self(), launching_thread) || running == nullptr) {
    pass_on(signal, info, context);
    return;
  }
  auto& interrupted = *static_cast<ucontext_t*>(context);
  pending = describe_access(*info, interrupted);
  pending.report = describe_running() + ": " + pending.report;
  running->fiber.forget_frames();
  if (!resume_in_abandon(interrupted, running->fiber.top())) {
    fprintf(stderr, "loramux emulator: %s\n", pending.report.c_str());
    pass_on(signal, info, context);
  }
}

}  // namespace

void install_signal_handler() {
  static const bool installed = [] {
    struct sigaction action = {};
    action.sa_sigaction = on_signal;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigemptyset(&action.sa_mask);
    sigaction(SIGSEGV, &action, &previous_segv);
    sigaction(SIGBUS, &action, &previous_bus);
    return true;
  }();
  (void)installed;
}

SignalStack::SignalStack() {
  static char* const memory = static_cast<char*>(malloc(signal_stack_bytes));
  stack_t ours = {};
  ours.ss_sp = memory;
  ours.ss_size = signal_stack_bytes;
  stack_t previous;
  sigaltstack(&ours, &previous);
  previous_stack_ = previous.ss_sp;
  previous_bytes_ = previous.ss_size;
  previous_flags_ = previous.ss_flags;
  launching_thread = pthread_self();
  launching = true;
}

SignalStack::~SignalStack() {
  launching = false;
  stack_t previous = {};
  previous.ss_sp = previous_stack_;
  previous.ss_size = previous_bytes_;
  previous.ss_flags = previous_flags_;
  sigaltstack(&previous, nullptr);
}

}  // namespace emulator

// What `assert` calls. Inside a kernel it ends the launch, as on a device.
extern "C" [[noreturn, gnu::visibility("hidden")]] void __assert_fail(const char* assertion, const char* file,
                                                                     unsigned line, const char* function) noexcept {
  if (emulator::running == nullptr) {
    fprintf(stderr, "%s:%u: %s: assertion `%s` failed\n", file, line, function, assertion);
    abort();
  }
  emulator::raise_fault(emulator::FaultCode::assertion, "assertion `" + std::string(assertion) + "` failed at " + file +
                                                            ":" + std::to_string(line));
}
