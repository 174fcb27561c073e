// kernels/ptx.cuh's twin: the same functions, on the host.
#pragma once
#include <element_type.h>
#include <stdint.h>

#include <source_location>
#include <string>

#include "runtime/block.h"
#include "runtime/elements.h"
#include "runtime/tensor_core.h"

namespace ptx {
inline namespace ELEMENT {

// ---- asynchronous copies, global to shared ----

// The bytes land at the wait; until then the destination is NaN.
inline void copy_async_16(void* shared, const void* global, bool valid,
                          std::source_location where = std::source_location::current()) {
  emulator::copy_async_16(shared, global, valid, where);
}

inline uint64_t evict_first_policy() { return 0; }

inline void copy_async_16(void* shared, const void* global, bool valid, uint64_t,
                          std::source_location where = std::source_location::current()) {
  emulator::copy_async_16(shared, global, valid, where);
}

inline void copy_async_commit() { emulator::running->copies.commit(); }

template <int newest>
inline void copy_async_wait() {
  emulator::running->copies.wait(newest);
}

// ---- tensor cores ----

inline void load_matrix_x4(uint32_t (&fragment)[4], const void* row,
                           std::source_location where = std::source_location::current()) {
  emulator::load_matrix_x4(fragment, row, where);
}

inline void load_matrix_x4_transposed(uint32_t (&fragment)[4], const void* row,
                                      std::source_location where = std::source_location::current()) {
  emulator::load_matrix_x4_transposed(fragment, row, where);
}

inline void mma_16x8x16(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                        std::source_location where = std::source_location::current()) {
  emulator::mma_16x8x16(emulator::Element::ELEMENT, sum, a, b0, b1, where);
}

// ---- arithmetic ----

inline float exp2(float x) {
  const float power = exp2f(x);
  return power < 0x1p-126f ? 0.0f : power;
}

// ---- conversion ----

inline uint32_t pack(float low, float high) {
  constexpr auto round = emulator::Element::ELEMENT == emulator::Element::f16 ? emulator::f16_of : emulator::bf16_of;
  return uint32_t{round(high)} << 16 | round(low);
}

inline float float_of_f16(uint16_t bits) { return emulator::float_of_f16(bits); }

// ---- prefetch ----

inline void prefetch_l2(const void*) {}

// ---- between thread blocks and grids ----

inline uint32_t fetch_add_acquire_release(uint32_t* counter, uint32_t value) {
  const uint32_t before = *counter;
  *counter = before + value;
  return before;
}

inline uint32_t fetch_add_relaxed(uint32_t* counter, uint32_t value) {
  return fetch_add_acquire_release(counter, value);
}

// Blocks run one after another: what has not been counted by now never will be.
inline void wait_for_count(const uint32_t* counter, uint32_t count) {
  if (*counter >= count) return;
  emulator::raise_fault(emulator::FaultCode::launch_failed, "waits for a count of " + std::to_string(count) +
                                                                " with no block left to add to " +
                                                                std::to_string(*counter));
}

// Grids run one after another.
inline void wait_for_previous_grid() {}
inline void allow_next_grid() {}

}  // inline namespace ELEMENT
}  // namespace ptx
