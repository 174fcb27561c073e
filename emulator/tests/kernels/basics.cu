// Kernels that do nothing wrong: the emulator's own tests compare them with plain loops.
#include <device.cuh>
#include <element.cuh>
#include <ptx.cuh>

struct AxpyParams {
  float* y;
  const float* x;
  float a;
  uint32_t count;
};

KERNEL(test_axpy, AxpyParams, 256, 1) {
  const uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < p.count) p.y[i] += p.a * p.x[i];
}

struct MmaParams {
  const element* a;
  const element* b;
  float* sums;
  uint32_t repeats;
};

struct MmaStorage {
  element a[16][16 + 8];
  element b[8][16 + 8];
};

// sums[16][8] = repeats · A[16][16] · B[8][16]ᵀ, one warp, fragments by ldmatrix.
KERNEL(test_mma, MmaParams, 32, 1) {
  auto& shared = shared_storage<MmaStorage>();
  const uint32_t lane = threadIdx.x;
  for (uint32_t i = lane; i < 16 * 2; i += 32) {
    ptx::copy_async_16(&shared.a[i / 2][i % 2 * 8], p.a + i * 8, true);
    if (i < 8 * 2) ptx::copy_async_16(&shared.b[i / 2][i % 2 * 8], p.b + i * 8, true);
  }
  ptx::copy_async_commit();
  ptx::copy_async_wait<0>();
  __syncthreads();
  uint32_t a[4], b[4];
  ptx::load_matrix_x4(a, &shared.a[lane % 16][lane / 16 * 8]);
  ptx::load_matrix_x4(b, &shared.b[lane % 8][lane / 8 % 2 * 8]);
  float sum[4] = {};
  for (uint32_t i = 0; i < p.repeats; ++i) ptx::mma_16x8x16(sum, a, b[0], b[1]);
  const uint32_t row = lane / 4, column = lane % 4 * 2;
  p.sums[row * 8 + column] = sum[0];
  p.sums[row * 8 + column + 1] = sum[1];
  p.sums[(row + 8) * 8 + column] = sum[2];
  p.sums[(row + 8) * 8 + column + 1] = sum[3];
}

struct RoundParams {
  const float* values;
  uint32_t* pairs;
  float* rounded;
  uint32_t count;
};

// Every value as an element, in both halves of a pair, and what that is as a float: of the low half, then of the high.
KERNEL(test_round, RoundParams, 256, 1) {
  const uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= p.count) return;
  // By its address, so that it is not inlined: of two functions of one name, the linker would keep one.
  uint32_t (*const volatile pack)(float, float) = ptx::pack;
  const uint32_t pair = pack(p.values[i], p.values[i]);
  p.pairs[i] = pair;
  p.rounded[i * 2] = low_float(pair);
  p.rounded[i * 2 + 1] = high_float(pair);
}

struct StackParams {
  uint32_t* out;
};

// Everything that lanes exchange, one result after another: out[function][thread].
KERNEL(test_exchange, StackParams, 64, 1) {
  const uint32_t t = threadIdx.x;
  const uint32_t lane = t % 32;
  uint32_t* out = p.out + t;
  const auto put = [&](uint32_t value) {
    *out = value;
    out += 64;
  };
  put(__shfl_sync(~0u, t, 3));
  put(__shfl_sync(~0u, t, 3, 8));
  put(__shfl_up_sync(~0u, t, 5));
  put(__shfl_up_sync(~0u, t, 5, 16));
  put(__shfl_down_sync(~0u, t, 5));
  put(__shfl_down_sync(~0u, t, 5, 16));
  put(__shfl_xor_sync(~0u, t, 9));
  put(__shfl_xor_sync(~0u, t, 9, 8));
  put(__ballot_sync(~0u, t % 3 == 0));
  put(__any_sync(~0u, t == 40));
  put(__all_sync(~0u, t < 40));
  put(__reduce_add_sync(~0u, t));
  put(__reduce_max_sync(~0u, t));
  // Halves of a warp at the same time, each among itself.
  const uint32_t half = lane < 16 ? 0xffffu : 0xffff0000u;
  if (lane < 16) {
    put(__reduce_add_sync(half, t));
  } else {
    put(__reduce_add_sync(half, 1u));
  }
  put(static_cast<uint32_t>(__syncthreads_count(t % 5 == 0)));
  put(static_cast<uint32_t>(__syncthreads_or(t == 63)));
  put(static_cast<uint32_t>(__syncthreads_and(t != 63)));
  __syncwarp();
}
