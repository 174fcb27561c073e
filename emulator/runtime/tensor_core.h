// What the tensor-core path of a kernel does with fragments and shared memory: the work behind ptx.cuh.
#pragma once
#include <cstdint>
#include <source_location>

#include "runtime/elements.h"

namespace emulator {

// cp.async of 16 bytes; zeros if not `valid`. Both addresses are checked, and only the bounds of `global` are left to
// its guard pages.
void copy_async_16(void* shared, const void* global, bool valid, const std::source_location& where);

// ldmatrix.x4: lane l names row l % 8 of matrix l / 8.
void load_matrix_x4(uint32_t (&fragment)[4], const void* row, const std::source_location& where);

// ldmatrix.x4.trans: each matrix transposed.
void load_matrix_x4_transposed(uint32_t (&fragment)[4], const void* row, const std::source_location& where);

// mma.m16n8k16, `type` in, fp32 sums over ascending k.
void mma_16x8x16(Element type, float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                 const std::source_location& where);

}  // namespace emulator
