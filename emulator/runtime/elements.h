// The 16-bit types of kernels, on the host: conversions as the GPU's.
#pragma once
#include <bit>
#include <cstdint>

namespace emulator {

enum class Element { bf16, f16 };

// To the nearest, ties to even; every NaN becomes 0x7fff.
inline uint16_t bf16_of(float value) {
  const auto bits = std::bit_cast<uint32_t>(value);
  return value != value ? 0x7fff : static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline float float_of_bf16(uint16_t bits) { return std::bit_cast<float>(uint32_t{bits} << 16); }

// Likewise; from 65520 on, the result is infinite.
inline uint16_t f16_of(float value) {
  constexpr uint32_t two_to_16 = 0x47800000, smallest_normal = 0x38800000, half = 0x3f000000;
  if (value != value) return 0x7fff;
  const auto bits = std::bit_cast<uint32_t>(value);
  const uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude >= two_to_16) return static_cast<uint16_t>(sign | 0x7c00);
  // A subnormal result counts in units of 2^-24: the last place of numbers from a half to one.
  if (magnitude < smallest_normal)
    return static_cast<uint16_t>(sign | (std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - half));
  const uint32_t rounded = magnitude + 0xfff + (magnitude >> 13 & 1);
  return static_cast<uint16_t>(sign | (rounded - (112u << 23)) >> 13);
}

inline float float_of_f16(uint16_t bits) {
  const uint32_t magnitude = (bits & 0x7fffu) << 13, sign = (bits & 0x8000u) << 16;
  // The exponent's bias differs by 112: exact, subnormal numbers included. Infinities and NaN are not numbers to scale.
  const auto scaled = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) * 0x1p112f);
  return std::bit_cast<float>(sign | (magnitude >= 0x7c00u << 13 ? magnitude | 0x7f800000u : scaled));
}

}  // namespace emulator
