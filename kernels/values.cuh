// Values that lie side by side, as kernels read and write them: eight at a time, 16 bytes of elements, where widths, strides
// and addresses allow it, else one by one.
#pragma once
#include <element.cuh>
#include <ptx.cuh>

inline namespace ELEMENT {

template <uint32_t count>
struct Values {
  static_assert(count == 1 || count == 8);
  float at[count];
};

template <uint32_t count>
__device__ __forceinline__ Values<count> load(const element* from) {
  if constexpr (count == 1) {
    return {{to_float(*from)}};
  } else {
    const uint4 pairs = *reinterpret_cast<const uint4*>(from);
    return {{low_float(pairs.x), high_float(pairs.x), low_float(pairs.y), high_float(pairs.y), low_float(pairs.z),
             high_float(pairs.z), low_float(pairs.w), high_float(pairs.w)}};
  }
}

template <uint32_t count>
__device__ __forceinline__ Values<count> load(const float* from) {
  if constexpr (count == 1) {
    return {{*from}};
  } else {
    const float4 low = *reinterpret_cast<const float4*>(from), high = *reinterpret_cast<const float4*>(from + 4);
    return {{low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w}};
  }
}

template <uint32_t count>
__device__ __forceinline__ void store(element* to, const Values<count>& values) {
  if constexpr (count == 1) {
    to->bits = static_cast<uint16_t>(ptx::pack(values.at[0], 0.0f));
  } else {
    *reinterpret_cast<uint4*>(to) =
        make_uint4(ptx::pack(values.at[0], values.at[1]), ptx::pack(values.at[2], values.at[3]),
                   ptx::pack(values.at[4], values.at[5]), ptx::pack(values.at[6], values.at[7]));
  }
}

template <uint32_t count>
__device__ __forceinline__ void store(float* to, const Values<count>& values) {
  if constexpr (count == 1) {
    *to = values.at[0];
  } else {
    *reinterpret_cast<float4*>(to) = make_float4(values.at[0], values.at[1], values.at[2], values.at[3]);
    *reinterpret_cast<float4*>(to + 4) = make_float4(values.at[4], values.at[5], values.at[6], values.at[7]);
  }
}

template <uint32_t count>
__device__ __forceinline__ void add(Values<count>& to, const Values<count>& other) {
#pragma unroll
  for (uint32_t i = 0; i < count; ++i) to.at[i] += other.at[i];
}

// x · σ(x). The fast division is exact to 2 ulp, and gives 0 where 1 + exp(−x) overflows.
__device__ __forceinline__ float silu(float x) { return __fdividef(x, 1.0f + expf(-x)); }

// Bits as they are.
template <uint32_t count>
__device__ __forceinline__ void copy(element* to, const element* from) {
  if constexpr (count == 1)
    *to = *from;
  else
    *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
}

}  // inline namespace ELEMENT
