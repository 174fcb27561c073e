// How a kernel is declared, under the emulator: kernels/device.cuh's twin.
#pragma once
#include <element_type.h>
#include <stdint.h>

#include <string>

#include "runtime/kernel.h"
#include "runtime/shared_memory.h"

#define EMULATOR_TEXT(tokens) EMULATOR_TEXT_OF(tokens)
#define EMULATOR_TEXT_OF(tokens) #tokens

// Enters the kernel in the driver's table; `p` is the driver's copy of the parameters.
#define KERNEL(name, Params, threads, blocks) EMULATOR_KERNEL(KERNEL_NAME(name), Params, threads, blocks)
#define EMULATOR_KERNEL(name, Params, threads, blocks) EMULATOR_KERNEL_OF(name, Params, threads, blocks)
#define EMULATOR_KERNEL_OF(name, Params, threads, blocks)                                                         \
  static void name(const Params&);                                                                              \
  static const emulator::Kernel name##_kernel(EMULATOR_TEXT(name), sizeof(Params), threads, blocks, __FILE__,     \
                                              [](const void* params) { name(*static_cast<const Params*>(params)); }); \
  static void name([[maybe_unused]] const Params& p)

template <class Storage>
Storage& shared_storage() {
  static_assert(alignof(Storage) <= emulator::SharedMemory::alignment);
  const emulator::SharedMemory& memory = emulator::shared_memory;
  if (sizeof(Storage) > memory.bytes()) [[unlikely]] {
    emulator::raise_fault(emulator::FaultCode::illegal_address,
                          "needs " + std::to_string(sizeof(Storage)) + " bytes of shared memory; the launch gives " +
                              std::to_string(memory.bytes()));
  }
  return *reinterpret_cast<Storage*>(memory.start());
}
