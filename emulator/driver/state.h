// What the driver's functions share. One device, one context; every call holds one lock, so that the work of all host
// threads happens in the order of their calls.
#pragma once
#include <atomic>
#include <cstdint>
#include <mutex>
#include <string>
#include <utility>

#include "driver/api.h"
#include "runtime/fault.h"

namespace emulator {

struct Counters {
  // Kernels that ran, those of graphs included.
  std::atomic<uint64_t> launches;
  // Calls that allocate device memory or pinned host memory.
  std::atomic<uint64_t> allocations;
  // Those of this host thread.
  static thread_local uint64_t allocations_of_thread;
  // Calls that make the host wait: for a stream, an event, the context, or a copy that is not asynchronous.
  std::atomic<uint64_t> synchronizations;
  static thread_local uint64_t synchronizations_of_thread;
};

void count_synchronization();

// Whether queries of the calling host thread find no event reached.
extern thread_local bool events_look_pending;

struct State {
  std::recursive_mutex mutex;
  bool initialized = false;
  // Retained references to the primary context.
  unsigned references = 0;
  // The error that every call returns since a kernel failed.
  CUresult lost = CUDA_SUCCESS;
  // The report of the last fault or of the last launch that was refused.
  std::string report;
  uint64_t seed = 0;
  unsigned multiprocessors = 4;
  Counters counters;
};

State& state();

// The context of the calling host thread, or null.
CUcontext current_context();

// Reports what ended a kernel; the context is lost. Returns the error.
CUresult lose_context(Fault fault);

// Reports why a call is refused. Returns the error.
CUresult refuse(CUresult error, std::string report);

// The body of a driver function that needs the driver to be initialised.
template <class Function>
CUresult with_driver(Function function) {
  const std::lock_guard lock(state().mutex);
  if (!state().initialized) return CUDA_ERROR_NOT_INITIALIZED;
  return function();
}

// The body of a driver function that needs a current context, which is not lost.
template <class Function>
CUresult with_context(Function function) {
  return with_driver([&]() -> CUresult {
    if (state().lost != CUDA_SUCCESS) return state().lost;
    if (current_context() == nullptr) return CUDA_ERROR_INVALID_CONTEXT;
    return function();
  });
}

}  // namespace emulator
