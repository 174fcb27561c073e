// Faults: what ends a launch from within a kernel.
#pragma once
#include <string>

namespace emulator {

// The driver's error codes for them.
enum class FaultCode {
  none = 0,
  illegal_address = 700,
  assertion = 710,
  misaligned_address = 716,
  launch_failed = 719,
};

struct Fault {
  FaultCode code = FaultCode::none;
  // Kernel, block, thread, and what happened.
  std::string report;
};

// Called by a CUDA thread: ends the launch.
[[noreturn, gnu::cold]] void raise_fault(FaultCode code, std::string what);

// Makes accesses to guard pages from within kernels faults of theirs. All other signals go where they went before.
void install_signal_handler();

// An alternate stack for the signal handler, on the host thread that lives through a launch: a kernel may have used up
// its own.
class SignalStack {
 public:
  SignalStack();
  ~SignalStack();
  SignalStack(const SignalStack&) = delete;
  SignalStack& operator=(const SignalStack&) = delete;

 private:
  void* previous_stack_;
  size_t previous_bytes_;
  int previous_flags_;
};

}  // namespace emulator
