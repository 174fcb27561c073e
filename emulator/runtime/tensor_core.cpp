#include "runtime/tensor_core.h"

#include <bit>
#include <cstdio>
#include <cstring>
#include <string>

#include "runtime/block.h"
#include "runtime/shared_memory.h"

namespace emulator {
namespace {

std::string pointer_text(const void* pointer) {
  char text[32];
  snprintf(text, sizeof text, "%p", pointer);
  return text;
}

// Ends the launch unless `row` is the address of 16 aligned bytes of shared memory.
void check_shared_16(const void* row, const char* instruction, const std::source_location& where) {
  const bool aligned = reinterpret_cast<uintptr_t>(row) % 16 == 0;
  if (aligned && shared_memory.contains(row, 16)) [[likely]] return;
  const std::string call = std::string(instruction) + " (" + describe_place(where) + ") at ";
  if (shared_memory.contains(row, 16)) {
    raise_fault(FaultCode::misaligned_address, call + shared_memory.describe(row) + ", which is no multiple of 16");
  }
  raise_fault(FaultCode::illegal_address,
              call + (shared_memory.reserved(row) ? shared_memory.describe(row)
                                                  : pointer_text(row) + ", which is not in shared memory"));
}

struct LoadMatrix {
  uint32_t* fragment;
  const unsigned char* row;
};

void combine_load_matrix(void* const* operands, uint32_t) {
  for (unsigned lane = 0; lane < warp_lanes; ++lane) {
    const auto& own = *static_cast<const LoadMatrix*>(operands[lane]);
    for (unsigned matrix = 0; matrix < 4; ++matrix) {
      const auto& source = *static_cast<const LoadMatrix*>(operands[matrix * 8 + lane / 4]);
      memcpy(&own.fragment[matrix], source.row + lane % 4 * 4, 4);
    }
  }
}

void combine_load_transposed(void* const* operands, uint32_t) {
  for (unsigned lane = 0; lane < warp_lanes; ++lane) {
    const auto& own = *static_cast<const LoadMatrix*>(operands[lane]);
    for (unsigned matrix = 0; matrix < 4; ++matrix) {
      uint16_t pair[2];
      for (unsigned i = 0; i < 2; ++i) {
        const auto& source = *static_cast<const LoadMatrix*>(operands[matrix * 8 + lane % 4 * 2 + i]);
        memcpy(&pair[i], source.row + lane / 4 * 2, 2);
      }
      memcpy(&own.fragment[matrix], pair, 4);
    }
  }
}

struct Mma {
  float* sum;
  const uint32_t* a;
  uint32_t b0, b1;
};

// Eight floats: a row of B or D.
using Row [[gnu::vector_size(32)]] = float;

// D[16x8] += A[16x16] · B[16x8], where `to_float` reads an element of A and B.
template <float to_float(uint16_t)>
[[gnu::always_inline]] inline void multiply(void* const* operands) {
  const auto low_half = [](uint32_t pair) { return to_float(static_cast<uint16_t>(pair)); };
  const auto high_half = [](uint32_t pair) { return to_float(static_cast<uint16_t>(pair >> 16)); };
  alignas(32) float a[16][16];
  alignas(32) float b[16][8];
  alignas(32) float d[16][8];
  for (unsigned lane = 0; lane < warp_lanes; ++lane) {
    const auto& own = *static_cast<const Mma*>(operands[lane]);
    const unsigned g = lane / 4;
    const unsigned q = lane % 4 * 2;
    for (unsigned half = 0; half < 2; ++half) {
      a[g][q + 8 * half] = low_half(own.a[2 * half]);
      a[g][q + 8 * half + 1] = high_half(own.a[2 * half]);
      a[g + 8][q + 8 * half] = low_half(own.a[2 * half + 1]);
      a[g + 8][q + 8 * half + 1] = high_half(own.a[2 * half + 1]);
      memcpy(&d[g + 8 * half][q], own.sum + 2 * half, 2 * sizeof(float));
    }
    b[q][g] = low_half(own.b0);
    b[q + 1][g] = high_half(own.b0);
    b[q + 8][g] = low_half(own.b1);
    b[q + 9][g] = high_half(own.b1);
  }
  // Four rows at a time: each is one chain of dependent additions.
  for (unsigned m = 0; m < 16; m += 4) {
    Row sums[4];
    memcpy(sums, d[m], sizeof sums);
    for (unsigned k = 0; k < 16; ++k) {
      Row row;
      memcpy(&row, b[k], sizeof row);
      for (unsigned i = 0; i < 4; ++i) sums[i] += a[m + i][k] * row;
    }
    memcpy(d[m], sums, sizeof sums);
  }
  for (unsigned lane = 0; lane < warp_lanes; ++lane) {
    float* sum = static_cast<const Mma*>(operands[lane])->sum;
    memcpy(sum, &d[lane / 4][lane % 4 * 2], 2 * sizeof(float));
    memcpy(sum + 2, &d[lane / 4 + 8][lane % 4 * 2], 2 * sizeof(float));
  }
}

template <float to_float(uint16_t)>
void combine_mma(void* const* operands, uint32_t) {
  multiply<to_float>(operands);
}

#if defined(__x86_64__)
// The same operations in the same order: the bits do not depend on the machine.
template <float to_float(uint16_t)>
[[gnu::target("avx2")]] void combine_mma_avx2(void* const* operands, uint32_t) {
  multiply<to_float>(operands);
}

template <float to_float(uint16_t)>
const Collective mma{"mma_16x8x16", __builtin_cpu_supports("avx2") ? combine_mma_avx2<to_float> : combine_mma<to_float>};
#else
template <float to_float(uint16_t)>
const Collective mma{"mma_16x8x16", combine_mma<to_float>};
#endif

constexpr Collective load_matrix{"load_matrix_x4", combine_load_matrix};
constexpr Collective load_transposed{"load_matrix_x4_transposed", combine_load_transposed};

}  // namespace

void copy_async_16(void* shared, const void* global, bool valid, const std::source_location& where) {
  check_shared_16(shared, "copy_async_16", where);
  if (valid && reinterpret_cast<uintptr_t>(global) % 16 != 0) {
    raise_fault(FaultCode::misaligned_address, "copy_async_16 (" + describe_place(where) + ") from " +
                                                   pointer_text(global) + ", which is no multiple of 16");
  }
  running->copies.begin(shared, valid ? global : nullptr);
}

void load_matrix_x4(uint32_t (&fragment)[4], const void* row, const std::source_location& where) {
  check_shared_16(row, "load_matrix_x4", where);
  LoadMatrix operand{fragment, static_cast<const unsigned char*>(row)};
  meet(load_matrix, ~0u, &operand, where);
}

void load_matrix_x4_transposed(uint32_t (&fragment)[4], const void* row, const std::source_location& where) {
  check_shared_16(row, "load_matrix_x4_transposed", where);
  LoadMatrix operand{fragment, static_cast<const unsigned char*>(row)};
  meet(load_transposed, ~0u, &operand, where);
}

void mma_16x8x16(Element type, float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                 const std::source_location& where) {
  Mma operand{sum, a, b0, b1};
  meet(type == Element::f16 ? mma<float_of_f16> : mma<float_of_bf16>, ~0u, &operand, where);
}

}  // namespace emulator
