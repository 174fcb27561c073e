// What tests ask of the stand-in itself: schedules, counters, the last fault. Declared again in src/lib.rs.
#include <cstdlib>

#include "driver/state.h"
#include "runtime/device_memory.h"

using namespace emulator;

#define CONTROL(type) extern "C" __attribute__((visibility("default"))) type

// Also the mark by which a driver is known to be the stand-in.
CONTROL(void) loramux_emulator_set_seed(uint64_t seed) {
  const std::lock_guard lock(state().mutex);
  state().seed = seed;
}

CONTROL(void) loramux_emulator_set_multiprocessors(unsigned count) {
  const std::lock_guard lock(state().mutex);
  state().multiprocessors = count;
}

CONTROL(void) loramux_emulator_set_memory(uint64_t bytes) {
  const std::lock_guard lock(state().mutex);
  device_memory.set_total(bytes);
}

CONTROL(uint64_t) loramux_emulator_launches() { return state().counters.launches; }
CONTROL(uint64_t) loramux_emulator_allocations() { return state().counters.allocations; }
CONTROL(uint64_t) loramux_emulator_allocations_of_thread() { return Counters::allocations_of_thread; }
CONTROL(uint64_t) loramux_emulator_synchronizations() { return state().counters.synchronizations; }
CONTROL(uint64_t) loramux_emulator_synchronizations_of_thread() { return Counters::synchronizations_of_thread; }
CONTROL(void) loramux_emulator_hold_events(bool hold) { events_look_pending = hold; }

// Copies the report of the last fault, cut off at `capacity` bytes, and returns its length; 0 if there was none.
CONTROL(size_t) loramux_emulator_last_report(char* text, size_t capacity) {
  const std::lock_guard lock(state().mutex);
  return state().report.copy(text, capacity), state().report.size();
}

// The device as after a restart: no fault, no memory in use.
CONTROL(void) loramux_emulator_reset() {
  const std::lock_guard lock(state().mutex);
  state().lost = CUDA_SUCCESS;
  state().report.clear();
  device_memory.free_all();
}
