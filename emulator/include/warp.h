// Barriers, and what the lanes of a warp exchange.
#pragma once
#include <stdint.h>
#include <string.h>

#include <bit>
#include <source_location>
#include <type_traits>

#include "runtime/block.h"

// ---- the block ----

inline void __syncthreads(std::source_location where = std::source_location::current()) {
  emulator::meet_block("__syncthreads", false, where);
}

inline int __syncthreads_count(int predicate, std::source_location where = std::source_location::current()) {
  return static_cast<int>(emulator::meet_block("__syncthreads_count", predicate != 0, where));
}

inline int __syncthreads_or(int predicate, std::source_location where = std::source_location::current()) {
  return emulator::meet_block("__syncthreads_or", predicate != 0, where) != 0;
}

inline int __syncthreads_and(int predicate, std::source_location where = std::source_location::current()) {
  return emulator::meet_block("__syncthreads_and", predicate == 0, where) == 0;
}

// Threads run one at a time: every write is visible to all.
inline void __threadfence_block() {}
inline void __threadfence() {}
inline void __threadfence_system() {}

// ---- the warp ----

namespace emulator {

// The operand of a collective in which every lane gives one value and gets one.
template <class Value, class Result = Value>
struct Exchange {
  Value value;
  Result result;
  // The lane whose value a shuffle takes.
  unsigned source = 0;
};

template <class Operand>
Operand& operand_of(void* const* operands, unsigned lane) {
  return *static_cast<Operand*>(operands[lane]);
}

template <class Function>
void for_each_lane(uint32_t lanes, Function function) {
  for (; lanes != 0; lanes &= lanes - 1) function(static_cast<unsigned>(std::countr_zero(lanes)));
}

template <class T>
void combine_shuffle(void* const* operands, uint32_t lanes) {
  for_each_lane(lanes, [&](unsigned lane) {
    auto& own = operand_of<Exchange<T>>(operands, lane);
    if ((lanes >> own.source & 1) != 0) {
      own.result = operand_of<Exchange<T>>(operands, own.source).value;
    } else {
      // The value of a lane that takes no part is undefined.
      memset(&own.result, 0xff, sizeof own.result);
    }
  });
}

enum class Shuffle { index, up, down, exclusive_or };

template <class T, Shuffle mode>
T shuffle(uint32_t lanes, T value, unsigned argument, int width, const std::source_location& where) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8));
  static constexpr const char* names[] = {"__shfl_sync", "__shfl_up_sync", "__shfl_down_sync", "__shfl_xor_sync"};
  static constexpr Collective collective{names[static_cast<int>(mode)], combine_shuffle<T>};
  const unsigned own = running->lane;
  const unsigned segment = static_cast<unsigned>(width);
  const unsigned first = own & ~(segment - 1);
  const unsigned last = first + segment - 1;
  unsigned source = own;
  // A lane whose partner lies outside of its segment keeps its own value.
  if constexpr (mode == Shuffle::index) {
    source = first + (argument & (segment - 1));
  } else if constexpr (mode == Shuffle::up) {
    if (own >= first + argument) source = own - argument;
  } else if constexpr (mode == Shuffle::down) {
    if (own + argument <= last) source = own + argument;
  } else if ((own ^ argument) <= last) {
    source = own ^ argument;
  }
  Exchange<T> exchange{value, {}, source};
  meet(collective, lanes, &exchange, where);
  return exchange.result;
}

inline void combine_nothing(void* const*, uint32_t) {}

// The lanes for which the predicate holds.
inline void combine_ballot(void* const* operands, uint32_t lanes) {
  using Ballot = Exchange<bool, uint32_t>;
  uint32_t holds = 0;
  for_each_lane(lanes, [&](unsigned lane) { holds |= uint32_t{operand_of<Ballot>(operands, lane).value} << lane; });
  for_each_lane(lanes, [&](unsigned lane) { operand_of<Ballot>(operands, lane).result = holds; });
}

inline uint32_t ballot(const Collective& collective, uint32_t lanes, bool predicate,
                       const std::source_location& where) {
  Exchange<bool, uint32_t> exchange{predicate, 0};
  meet(collective, lanes, &exchange, where);
  return exchange.result;
}

template <class T, class Operation>
void combine_reduction(void* const* operands, uint32_t lanes) {
  const auto first = static_cast<unsigned>(std::countr_zero(lanes));
  T total = operand_of<Exchange<T>>(operands, first).value;
  for_each_lane(lanes & (lanes - 1),
                [&](unsigned lane) { total = Operation{}(total, operand_of<Exchange<T>>(operands, lane).value); });
  for_each_lane(lanes, [&](unsigned lane) { operand_of<Exchange<T>>(operands, lane).result = total; });
}

}  // namespace emulator

inline void __syncwarp(unsigned mask = ~0u, std::source_location where = std::source_location::current()) {
  static constexpr emulator::Collective collective{"__syncwarp", emulator::combine_nothing};
  emulator::meet(collective, mask, nullptr, where);
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = warpSize,
              std::source_location where = std::source_location::current()) {
  return emulator::shuffle<T, emulator::Shuffle::index>(mask, value, static_cast<unsigned>(source), width, where);
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize,
                 std::source_location where = std::source_location::current()) {
  return emulator::shuffle<T, emulator::Shuffle::up>(mask, value, delta, width, where);
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize,
                   std::source_location where = std::source_location::current()) {
  return emulator::shuffle<T, emulator::Shuffle::down>(mask, value, delta, width, where);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = warpSize,
                  std::source_location where = std::source_location::current()) {
  return emulator::shuffle<T, emulator::Shuffle::exclusive_or>(mask, value, static_cast<unsigned>(lane_mask), width,
                                                               where);
}

inline unsigned __ballot_sync(unsigned mask, int predicate,
                              std::source_location where = std::source_location::current()) {
  static constexpr emulator::Collective collective{"__ballot_sync", emulator::combine_ballot};
  return emulator::ballot(collective, mask, predicate != 0, where);
}

inline int __any_sync(unsigned mask, int predicate, std::source_location where = std::source_location::current()) {
  static constexpr emulator::Collective collective{"__any_sync", emulator::combine_ballot};
  return emulator::ballot(collective, mask, predicate != 0, where) != 0;
}

inline int __all_sync(unsigned mask, int predicate, std::source_location where = std::source_location::current()) {
  static constexpr emulator::Collective collective{"__all_sync", emulator::combine_ballot};
  return emulator::ballot(collective, mask, predicate != 0, where) == mask;
}

#define EMULATOR_REDUCTION(T, name, expression)                                                            \
  inline T name(unsigned mask, T value, std::source_location where = std::source_location::current()) {    \
    struct Operation {                                                                                     \
      T operator()(T a, T b) const { return expression; }                                                  \
    };                                                                                                     \
    static constexpr emulator::Collective collective{#name, emulator::combine_reduction<T, Operation>};    \
    emulator::Exchange<T> exchange{value, {}};                                                             \
    emulator::meet(collective, mask, &exchange, where);                                                    \
    return exchange.result;                                                                                \
  }

EMULATOR_REDUCTION(unsigned, __reduce_add_sync, a + b)
EMULATOR_REDUCTION(unsigned, __reduce_min_sync, a < b ? a : b)
EMULATOR_REDUCTION(unsigned, __reduce_max_sync, a > b ? a : b)
EMULATOR_REDUCTION(unsigned, __reduce_and_sync, a & b)
EMULATOR_REDUCTION(unsigned, __reduce_or_sync, a | b)
EMULATOR_REDUCTION(unsigned, __reduce_xor_sync, a ^ b)
EMULATOR_REDUCTION(int, __reduce_add_sync, static_cast<int>(static_cast<unsigned>(a) + static_cast<unsigned>(b)))
EMULATOR_REDUCTION(int, __reduce_min_sync, a < b ? a : b)
EMULATOR_REDUCTION(int, __reduce_max_sync, a > b ? a : b)

#undef EMULATOR_REDUCTION
