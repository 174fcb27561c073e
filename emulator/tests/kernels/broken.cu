// Kernels with mistakes to find. A parameter says which mistake is made; with none, the kernel is right.
#include <assert.h>

#include <device.cuh>
#include <ptx.cuh>

// ---- barriers: out[t] = Σ_round of x[t + 1 + round], around the block ----

enum Mistake : uint32_t {
  nothing = 0,
  // Reads what others may not have written yet.
  no_barrier_before_reads = 1,
  // Writes what others may not have read yet.
  no_barrier_after_reads = 2,
  // A barrier of the warp, where values come from another warp.
  warp_barrier_before_reads = 3,
};

struct RotateParams {
  float* out;
  const float* x;
  uint32_t rounds;
  uint32_t mistake;
};

struct RotateStorage {
  float values[128];
};

KERNEL(test_rotate, RotateParams, 128, 1) {
  auto& shared = shared_storage<RotateStorage>();
  const uint32_t t = threadIdx.x;
  float value = p.x[t];
  float sum = 0.0f;
  for (uint32_t round = 0; round < p.rounds; ++round) {
    shared.values[t] = value;
    if (p.mistake == warp_barrier_before_reads) __syncwarp();
    if (p.mistake == nothing || p.mistake == no_barrier_after_reads) __syncthreads();
    value = shared.values[(t + 1) % 128];
    if (p.mistake != no_barrier_after_reads) __syncthreads();
    sum += value;
  }
  p.out[t] = sum;
}

// ---- asynchronous copies: out = x, through shared memory ----

struct CopyParams {
  uint32_t* out;
  const uint32_t* x;
  // Groups of four words a thread that x has; the rest of the block's groups are zeros.
  uint32_t valid;
  // Groups the wait leaves under way: 0 is right.
  uint32_t newest;
  uint32_t misaligned;
};

struct CopyStorage {
  uint4 groups[2][32];
};

KERNEL(test_copy, CopyParams, 32, 1) {
  auto& shared = shared_storage<CopyStorage>();
  const uint32_t t = threadIdx.x;
  for (uint32_t stage = 0; stage < 2; ++stage) {
    const uint32_t group = stage * 32 + t;
    char* destination = reinterpret_cast<char*>(&shared.groups[stage][t]) + p.misaligned;
    ptx::copy_async_16(destination, p.x + group * 4, group < p.valid);
    ptx::copy_async_commit();
  }
  if (p.newest == 0) ptx::copy_async_wait<0>();
  if (p.newest == 1) ptx::copy_async_wait<1>();
  for (uint32_t stage = 0; stage < 2; ++stage) {
    const uint4 group = shared.groups[stage][t];
    uint32_t* out = p.out + (stage * 32 + t) * 4;
    out[0] = group.x, out[1] = group.y, out[2] = group.z, out[3] = group.w;
  }
}

// ---- memory ----

struct AccessParams {
  uint32_t* memory;
  int64_t index;
  uint32_t write;
  uint32_t* sink;
};

KERNEL(test_access, AccessParams, 64, 1) {
  if (threadIdx.x != 5) return;
  if (p.write) {
    p.memory[p.index] = 1;
  } else {
    *p.sink = p.memory[p.index];
  }
}

struct SharedAccessParams {
  int64_t index;
  uint32_t write;
  uint32_t matrix;
  uint32_t* sink;
};

struct SharedAccessStorage {
  uint32_t words[64];
};

// Reads or writes a word of shared memory, or loads matrices from there.
KERNEL(test_shared_access, SharedAccessParams, 32, 1) {
  auto& shared = shared_storage<SharedAccessStorage>();
  uint32_t* word = shared.words + p.index;
  if (p.matrix) {
    uint32_t fragment[4];
    ptx::load_matrix_x4(fragment, word);
    p.sink[threadIdx.x] = fragment[0];
  } else if (threadIdx.x == 0) {
    if (p.write) {
      *word = 1;
    } else {
      *p.sink = *word;
    }
  }
}

// ---- threads that miss each other ----

enum Divergence : uint32_t {
  none = 0,
  // Two barriers, each for half of every warp.
  two_barriers = 1,
  // Half of each warp waits for the block, the other half for its warp.
  barrier_and_warp = 2,
  // A shuffle whose mask lacks the lane itself.
  not_among = 3,
  // A shuffle with a lane that has exited.
  exited = 4,
  // A shuffle for all, called by half.
  absent = 5,
  // A lane exits while the others wait for it.
  exits_late = 6,
  // Lanes that name different masks.
  masks_differ = 7,
  trap = 8,
  assertion = 9,
  stack = 10,
};

struct DivergeParams {
  uint32_t* out;
  uint32_t divergence;
};

static uint32_t descend(volatile uint32_t* above, uint32_t depth) {
  volatile uint32_t frame[256];
  for (uint32_t i = 0; i < 256; ++i) frame[i] = above[i % 2] + depth;
  return depth == 0 ? frame[3] : descend(frame, depth - 1) + frame[7];
}

KERNEL(test_diverge, DivergeParams, 64, 1) {
  const uint32_t t = threadIdx.x;
  const uint32_t lane = t % 32;
  uint32_t value = t;
  switch (p.divergence) {
    case none:
      __syncthreads();
      value = __shfl_xor_sync(~0u, t, 1);
      break;
    case two_barriers:
      if (lane < 16) {
        __syncthreads();
      } else {
        __syncthreads();
      }
      break;
    case barrier_and_warp:
      if (lane < 16) {
        __syncthreads();
      } else {
        __syncwarp();
      }
      break;
    case not_among:
      value = __shfl_xor_sync(0x0000ffffu, t, 1);
      break;
    case exited:
      if (lane == 0) return;
      value = __shfl_xor_sync(~0u, t, 1);
      break;
    case absent:
      if (lane < 16) value = __shfl_xor_sync(~0u, t, 1);
      __syncthreads();
      break;
    case exits_late:
      if (lane == 31) return;
      value = __shfl_xor_sync(~0u, t, 1);
      break;
    case masks_differ:
      value = __shfl_xor_sync(lane == 7 ? 0x00ff00ffu : ~0u, t, 1);
      break;
    case trap:
      if (t == 33) __trap();
      break;
    case assertion:
      assert(t != 33);
      break;
    case stack:
      if (t == 33) value = descend(p.out, 1000);
      break;
  }
  p.out[t] = value;
}

// ---- what a schedule decides ----

struct OrderParams {
  // [0]: threads that came so far; then their numbers, in the order in which they came.
  uint32_t* order;
};

KERNEL(test_order, OrderParams, 64, 1) {
  const uint32_t t = blockIdx.x * blockDim.x + threadIdx.x;
  p.order[1 + atomicAdd(p.order, 1)] = t;
}
