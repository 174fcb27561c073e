// bfloat16 as storage: 8 bits of exponent, 7 of mantissa. All arithmetic happens in fp32.
#pragma once
#include <stdint.h>

struct bf16 {
  uint16_t bits;
};

__device__ __forceinline__ float to_float(bf16 value) {
  return __uint_as_float(static_cast<uint32_t>(value.bits) << 16);
}

// The two values of a packed pair: the low half comes first in memory.
__device__ __forceinline__ float low_float(uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high_float(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }
