// One 16-bit value as storage: bf16 has 8 bits of exponent and 7 of mantissa, fp16 has 5 and 10. All arithmetic happens
// in fp32.
#pragma once
#include <element_type.h>
#include <ptx.cuh>
#include <stdint.h>

inline namespace ELEMENT {

struct element {
  uint16_t bits;
};

#if defined(LORAMUX_F16)
__device__ __forceinline__ float to_float(element value) { return ptx::float_of_f16(value.bits); }

// The two values of a packed pair: the low half comes first in memory.
__device__ __forceinline__ float low_float(uint32_t pair) { return ptx::float_of_f16(static_cast<uint16_t>(pair)); }
__device__ __forceinline__ float high_float(uint32_t pair) {
  return ptx::float_of_f16(static_cast<uint16_t>(pair >> 16));
}

constexpr uint32_t pair_of_ones = 0x3c003c00;
#else
__device__ __forceinline__ float to_float(element value) {
  return __uint_as_float(static_cast<uint32_t>(value.bits) << 16);
}

// The two values of a packed pair: the low half comes first in memory.
__device__ __forceinline__ float low_float(uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high_float(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }

constexpr uint32_t pair_of_ones = 0x3f803f80;
#endif

}  // inline namespace ELEMENT
