// Eight values that lie side by side: 16 bytes of bf16, 32 of fp32.
#pragma once
#include <bf16.cuh>
#include <ptx.cuh>

struct Eight {
  float at[8];
};

__device__ __forceinline__ Eight read_eight(const float* from) {
  const float4 low = *reinterpret_cast<const float4*>(from), high = *reinterpret_cast<const float4*>(from + 4);
  return {{low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w}};
}

__device__ __forceinline__ void write_eight(float* to, const Eight& value) {
  *reinterpret_cast<float4*>(to) = make_float4(value.at[0], value.at[1], value.at[2], value.at[3]);
  *reinterpret_cast<float4*>(to + 4) = make_float4(value.at[4], value.at[5], value.at[6], value.at[7]);
}

__device__ __forceinline__ Eight unpack(uint4 pairs) {
  return {{low_float(pairs.x), high_float(pairs.x), low_float(pairs.y), high_float(pairs.y), low_float(pairs.z),
           high_float(pairs.z), low_float(pairs.w), high_float(pairs.w)}};
}

__device__ __forceinline__ uint4 pack(const Eight& value) {
  return make_uint4(ptx::pack_bf16(value.at[0], value.at[1]), ptx::pack_bf16(value.at[2], value.at[3]),
                    ptx::pack_bf16(value.at[4], value.at[5]), ptx::pack_bf16(value.at[6], value.at[7]));
}

__device__ __forceinline__ void add(Eight& to, const Eight& other) {
#pragma unroll
  for (uint32_t i = 0; i < 8; ++i) to.at[i] += other.at[i];
}
