// Attention of tiles of pairs over all their keys: prefill. Grid: (tiles, key heads).
//
// Counted for 64 pairs, 128 wide, and a block of 64 keys: 2.1 MFLOP over 32 KiB of keys and values out of L2, and over
// 128 KiB of fragments out of shared memory, 1024 clocks of an SM. On an H100 the fragments bound it to 470 TFLOP/s, half
// of what the tensor cores can do, and L2 at 5.5 TB/s to 350; merging a split moves 64 KiB more, once in 512 keys (6 %).
// Predicted, not measured: 300 TFLOP/s, a causal prompt of 8192 tokens (32 heads: 0.55 TFLOP) in 1.8 ms.
#include <attention.cuh>

namespace {

template <class Shape>
struct Whole {
  using Attend = Attention<Shape>;
  using Sums = typename Attend::Sums;

  // All of a thread block's shared memory.
  struct Storage {
    typename Attend::KeyTile ring[Shape::ring];
    union {
      typename Attend::QueryTile queries;
      // Of the splits before this one; each thread its own.
      float4 total[Shape::warp_dims * 2][Shape::threads];
    };
    typename Attend::Exchange exchange;
  };

  // Merges a split's sums into the total, or the total into them if it is the last.
  static __device__ __forceinline__ void merge(const AttentionParams& p, Sums& sums, float (&maximum)[2],
                                               float (&weight)[2], Storage& storage, bool last) {
    const Merge merges[2] = {{maximum[0], sums.maximum[0], p.scale}, {maximum[1], sums.maximum[1], p.scale}};
#pragma unroll
    for (uint32_t half = 0; half < 2; ++half) {
      maximum[half] = merges[half].maximum;
      weight[half] = sums.weight[half * 2] = merges[half](weight[half], sums.weight[half * 2]);
    }
#pragma unroll
    for (uint32_t d = 0; d < Shape::warp_dims * 2; ++d) {
      float4& total = storage.total[d][threadIdx.x];
      const float before[4] = {total.x, total.y, total.z, total.w};
#pragma unroll
      for (uint32_t i = 0; i < 4; ++i) sums.at[d][i] = merges[i / 2](before[i], sums.at[d][i]);
      if (!last) total = make_float4(sums.at[d][0], sums.at[d][1], sums.at[d][2], sums.at[d][3]);
    }
  }

  static __device__ __forceinline__ void run(const AttentionParams& p) {
    ptx::allow_next_grid();
    ptx::wait_for_previous_grid();
    if (blockIdx.x >= *p.tile_count) return;
    auto& storage = shared_storage<Storage>();
    Attend attention(p, p.tiles[blockIdx.x], blockIdx.y, storage.ring, &storage.exchange);
    const uint32_t first = attention.first_block(), end = attention.end_block();
    attention.start(first, end, storage.queries);

    Sums sums;
    sums.clear();
    float maximum[2] = {-INFINITY, -INFINITY}, weight[2] = {0.0f, 0.0f};
    bool merged = false;
#pragma unroll 1
    for (uint32_t block = first; block < end; ++block) {
      attention.attend(block, sums);
      const bool last = block + 1 == end;
      if ((block + 1) % split_blocks != 0 && !last) continue;
      if (merged) {
        merge(p, sums, maximum, weight, storage, last);
      } else if (!last) {
        keep(sums, maximum, weight, storage);
        merged = true;
      }
      if (!last) sums.clear();
    }
    attention.finish(sums);
  }

  // The first split: merged with nothing, a result is what it was.
  static __device__ __forceinline__ void keep(const Sums& sums, float (&maximum)[2], float (&weight)[2],
                                              Storage& storage) {
#pragma unroll
    for (uint32_t half = 0; half < 2; ++half) {
      maximum[half] = sums.maximum[half];
      weight[half] = sums.weight[half * 2];
    }
#pragma unroll
    for (uint32_t d = 0; d < Shape::warp_dims * 2; ++d)
      storage.total[d][threadIdx.x] = make_float4(sums.at[d][0], sums.at[d][1], sums.at[d][2], sums.at[d][3]);
  }
};

// Narrow heads have room for more tiles on their way; wide ones leave it to more thread blocks beside each other.
using Dim16 = AttentionShape<16, 4, 4>;
using Dim32 = AttentionShape<32, 4, 4>;
using Dim64 = AttentionShape<64, 4, 4>;
using Dim80 = AttentionShape<80, 4, 2>;
using Dim96 = AttentionShape<96, 4, 2>;
using Dim128 = AttentionShape<128, 4, 2>;
// The sums of 64 pairs do not fit the registers of 128 threads.
using Dim256 = AttentionShape<256, 1, 2>;

template <class Shape>
constexpr bool matches(uint32_t pairs, uint32_t shared_bytes) {
  return Shape::pairs == pairs && sizeof(typename Whole<Shape>::Storage) == shared_bytes;
}
static_assert(matches<Dim16>(LORAMUX_ATTENTION_TILE_64, LORAMUX_ATTENTION_16_SHARED_BYTES));
static_assert(matches<Dim32>(LORAMUX_ATTENTION_TILE_64, LORAMUX_ATTENTION_32_SHARED_BYTES));
static_assert(matches<Dim64>(LORAMUX_ATTENTION_TILE_64, LORAMUX_ATTENTION_64_SHARED_BYTES));
static_assert(matches<Dim80>(LORAMUX_ATTENTION_TILE_64, LORAMUX_ATTENTION_80_SHARED_BYTES));
static_assert(matches<Dim96>(LORAMUX_ATTENTION_TILE_64, LORAMUX_ATTENTION_96_SHARED_BYTES));
static_assert(matches<Dim128>(LORAMUX_ATTENTION_TILE_64, LORAMUX_ATTENTION_128_SHARED_BYTES));
static_assert(matches<Dim256>(LORAMUX_ATTENTION_TILE_16, LORAMUX_ATTENTION_256_SHARED_BYTES));

}  // namespace

KERNEL(attention_16, AttentionParams, LORAMUX_ATTENTION_THREADS, 4) { Whole<Dim16>::run(p); }
KERNEL(attention_32, AttentionParams, LORAMUX_ATTENTION_THREADS, 4) { Whole<Dim32>::run(p); }
KERNEL(attention_64, AttentionParams, LORAMUX_ATTENTION_THREADS, 3) { Whole<Dim64>::run(p); }
KERNEL(attention_80, AttentionParams, LORAMUX_ATTENTION_THREADS, 3) { Whole<Dim80>::run(p); }
KERNEL(attention_96, AttentionParams, LORAMUX_ATTENTION_THREADS, 3) { Whole<Dim96>::run(p); }
KERNEL(attention_128, AttentionParams, LORAMUX_ATTENTION_THREADS, 2) { Whole<Dim128>::run(p); }
KERNEL(attention_256, AttentionParams, LORAMUX_ATTENTION_THREADS, 2) { Whole<Dim256>::run(p); }
