// y = x / √(mean(x²) + ε) ⊙ weight (Zhang & Sennrich 2019).
//
// A thread block serves a row: squares are summed by thread, by warp and over the warps, an order that the width alone
// decides. The second pass finds the row in L1.
//
// Grid: (rows).
#include <device.cuh>
#include <params.h>
#include <values.cuh>

namespace {

constexpr uint32_t threads = LORAMUX_ROW_THREADS, warps = threads / 32;

struct Storage {
  float of_warp[warps];
};

// The sum over all threads, for all of them.
__device__ __forceinline__ float sum_of_block(float value) {
  Storage& storage = shared_storage<Storage>();
#pragma unroll
  for (uint32_t distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(~0u, value, distance);
  if (threadIdx.x % 32 == 0) storage.of_warp[threadIdx.x / 32] = value;
  __syncthreads();
  float sum = 0.0f;
#pragma unroll
  for (uint32_t warp = 0; warp < warps; ++warp) sum += storage.of_warp[warp];
  return sum;
}

template <uint32_t access>
__device__ __forceinline__ void normalize(const RmsNormParams& p) {
  const element* x = p.x + size_t(blockIdx.x) * p.x_stride;
  element* y = p.y + size_t(blockIdx.x) * p.y_stride;
  float squares = 0.0f;
#pragma unroll 2
  for (uint32_t column = threadIdx.x * access; column < p.width; column += threads * access) {
    const Values<access> values = load<access>(x + column);
#pragma unroll
    for (uint32_t i = 0; i < access; ++i) squares = fmaf(values.at[i], values.at[i], squares);
  }
  const float factor = rsqrtf(sum_of_block(squares) / static_cast<float>(p.width) + p.epsilon);
#pragma unroll 2
  for (uint32_t column = threadIdx.x * access; column < p.width; column += threads * access) {
    Values<access> values = load<access>(x + column);
    const Values<access> weight = load<access>(p.weight + column);
#pragma unroll
    for (uint32_t i = 0; i < access; ++i) values.at[i] = values.at[i] * factor * weight.at[i];
    store<access>(y + column, values);
  }
}

}  // namespace

KERNEL(rms_norm, RmsNormParams, threads, 8) {
  ptx::allow_next_grid();
  // The weight does not depend on the previous grid: it is under way while that ends.
  for (uint32_t column = threadIdx.x * 8; column < p.width; column += threads * 8) ptx::prefetch_l2(p.weight + column);
  ptx::wait_for_previous_grid();
  if (blockIdx.x >= *p.rows) return;
  if (p.access == 8)
    normalize<8>(p);
  else
    normalize<1>(p);
}
