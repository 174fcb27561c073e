// Atomic operations. CUDA threads run one at a time on one host thread, so that plain reads and writes do.
#pragma once
#include <stdint.h>

#include <type_traits>

namespace emulator {

template <class T, class Function>
T exchange_with(T* address, Function function) {
  const T before = *address;
  *address = function(before);
  return before;
}

template <class T>
concept AtomicInteger = std::is_integral_v<T> && (sizeof(T) == 4 || sizeof(T) == 8);

template <class T>
concept AtomicNumber = AtomicInteger<T> || std::is_same_v<T, float> || std::is_same_v<T, double>;

// The value's own type: the pointer decides, as CUDA's overloads do.
template <class T>
using Same = std::type_identity_t<T>;

}  // namespace emulator

template <emulator::AtomicNumber T>
T atomicAdd(T* address, emulator::Same<T> value) {
  return emulator::exchange_with(address, [&](T before) { return static_cast<T>(before + value); });
}

template <emulator::AtomicInteger T>
T atomicSub(T* address, emulator::Same<T> value) {
  return emulator::exchange_with(address, [&](T before) { return static_cast<T>(before - value); });
}

template <emulator::AtomicInteger T>
T atomicMax(T* address, emulator::Same<T> value) {
  return emulator::exchange_with(address, [&](T before) { return before > value ? before : value; });
}

template <emulator::AtomicInteger T>
T atomicMin(T* address, emulator::Same<T> value) {
  return emulator::exchange_with(address, [&](T before) { return before < value ? before : value; });
}

template <emulator::AtomicInteger T>
T atomicAnd(T* address, emulator::Same<T> value) {
  return emulator::exchange_with(address, [&](T before) { return before & value; });
}

template <emulator::AtomicInteger T>
T atomicOr(T* address, emulator::Same<T> value) {
  return emulator::exchange_with(address, [&](T before) { return before | value; });
}

template <emulator::AtomicInteger T>
T atomicXor(T* address, emulator::Same<T> value) {
  return emulator::exchange_with(address, [&](T before) { return before ^ value; });
}

template <emulator::AtomicNumber T>
T atomicExch(T* address, emulator::Same<T> value) {
  return emulator::exchange_with(address, [&](T) { return value; });
}

template <emulator::AtomicInteger T>
T atomicCAS(T* address, emulator::Same<T> compare, emulator::Same<T> value) {
  return emulator::exchange_with(address, [&](T before) { return before == compare ? value : before; });
}

// Counts up to `limit` and wraps to zero.
inline unsigned atomicInc(unsigned* address, unsigned limit) {
  return emulator::exchange_with(address, [&](unsigned before) { return before >= limit ? 0 : before + 1; });
}
