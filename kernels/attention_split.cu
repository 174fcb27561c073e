// Attention of tiles of few pairs, a thread block for each split of 512 keys: decode. The last block of a tile to arrive
// merges its splits in ascending order, as `attention` does in registers.
//
// Any grid: thread blocks take (entry of the list, key head) in turn.
//
// Counted for heads 128 wide in groups of 4: a split is 256 KiB of keys and values, read once for all pairs of the tile,
// and 4.2 KiB of partial results written and read (1.6 %), most of them in L2. An SM of an H100 holds three thread
// blocks, each with 51 KiB on their way; its share of the memory's 3.0 TB/s asks for 18 KiB over 800 ns of latency.
// Predicted, not measured: 64 sequences of 4096 tokens with 8 key heads (1.07 GB a layer) in 0.36 ms.
#include <attention.cuh>

namespace {

template <class Shape>
struct Split {
  using Attend = Attention<Shape>;
  using Sums = typename Attend::Sums;
  static constexpr uint32_t slot_floats = LORAMUX_ATTENTION_PARTIAL_HEADER + Shape::dim;

  // All of a thread block's shared memory.
  struct Storage {
    typename Attend::KeyTile ring[Shape::ring];
    typename Attend::QueryTile queries;
    typename Attend::Exchange exchange;
  };

  // The partial result of a pair of the tile in one split.
  static __device__ __forceinline__ float* slot(const AttentionParams& p, const AttentionTile& tile, uint32_t kv_head,
                                                uint32_t split, uint32_t pair) {
    const size_t index = (size_t(tile.partial) + split * tile.pairs + pair) * p.kv_heads + kv_head;
    return p.partials + index * slot_floats;
  }

  static __device__ __forceinline__ void leave(const AttentionParams& p, const AttentionTile& tile, uint32_t kv_head,
                                               const Attend& attention, const Sums& sums) {
    attention.for_each_result(sums, [&](uint32_t pair, uint32_t half, uint32_t column, float low, float high) {
      float* to = slot(p, tile, kv_head, tile.split, pair);
      *reinterpret_cast<float2*>(to + LORAMUX_ATTENTION_PARTIAL_HEADER + column) = make_float2(low, high);
      if (column == 0) *reinterpret_cast<float2*>(to) = make_float2(sums.maximum[half], sums.weight[half * 2]);
    });
  }

  // Outputs of a tile whose splits `first .. end` have all been left.
  static __device__ __forceinline__ void merge(const AttentionParams& p, const AttentionTile& tile, uint32_t kv_head,
                                               const Attend& attention, uint32_t first, uint32_t end) {
    constexpr uint32_t columns = 4, pieces = Shape::dim / columns;
#pragma unroll 1
    for (uint32_t i = threadIdx.x; i < tile.pairs * pieces; i += Shape::threads) {
      const uint32_t pair = i / pieces, column = i % pieces * columns;
      float maximum = -INFINITY, weight = 0.0f;
      float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 4
      for (uint32_t split = first; split < end; ++split) {
        const float* from = slot(p, tile, kv_head, split, pair);
        const float2 header = *reinterpret_cast<const float2*>(from);
        const float4 part = *reinterpret_cast<const float4*>(from + LORAMUX_ATTENTION_PARTIAL_HEADER + column);
        const Merge merged(maximum, header.x, p.scale);
        maximum = merged.maximum;
        weight = merged(weight, header.y);
        sum = make_float4(merged(sum.x, part.x), merged(sum.y, part.y), merged(sum.z, part.z), merged(sum.w, part.w));
      }
      const float inverse = __frcp_rn(weight);
      attention.store(pair, column, normalized(sum.x, inverse), normalized(sum.y, inverse));
      attention.store(pair, column + 2, normalized(sum.z, inverse), normalized(sum.w, inverse));
    }
  }

  static __device__ __forceinline__ void run_one(const AttentionParams& p, const AttentionTile& tile, uint32_t kv_head,
                                                 Storage& storage) {
    Attend attention(p, tile, kv_head, storage.ring, &storage.exchange);
    const uint32_t first_split = attention.first_block() / split_blocks;
    const uint32_t end_split = (attention.end_block() + split_blocks - 1) / split_blocks;
    // Before the window.
    if (tile.split < first_split) return;
    const uint32_t first = max(attention.first_block(), tile.split * split_blocks);
    const uint32_t end = min(attention.end_block(), (tile.split + 1) * split_blocks);
    attention.start(first, end, storage.queries);
    Sums sums;
    sums.clear();
#pragma unroll 1
    for (uint32_t block = first; block < end; ++block) attention.attend(block, sums);

    const uint32_t splits = end_split - first_split;
    if (splits == 1) {
      attention.finish(sums);
      return;
    }
    leave(p, tile, kv_head, attention, sums);
    __syncthreads();
    bool last = false;
    if (threadIdx.x == 0) {
      uint32_t* arrived = &p.arrived[tile.counter * p.kv_heads + kv_head];
      last = ptx::fetch_add_acquire_release(arrived, 1) == splits - 1;
      if (last) *arrived = 0;
    }
    if (__syncthreads_or(last)) merge(p, tile, kv_head, attention, first_split, end_split);
  }

  static __device__ __forceinline__ void run(const AttentionParams& p) {
    ptx::allow_next_grid();
    ptx::wait_for_previous_grid();
    const uint32_t count = *p.tile_count * p.kv_heads;
#pragma unroll 1
    for (uint32_t i = blockIdx.x; i < count; i += gridDim.x) {
      run_one(p, p.tiles[i / p.kv_heads], i % p.kv_heads, shared_storage<Storage>());
      // The next one fills what this one reads.
      __syncthreads();
    }
  }
};

using Dim16 = AttentionShape<16, 1, 4>;
using Dim32 = AttentionShape<32, 1, 4>;
using Dim64 = AttentionShape<64, 1, 4>;
using Dim80 = AttentionShape<80, 1, 4>;
using Dim96 = AttentionShape<96, 1, 4>;
using Dim128 = AttentionShape<128, 1, 4>;
using Dim256 = AttentionShape<256, 1, 2>;

template <class Shape>
constexpr bool matches(uint32_t shared_bytes) {
  return Shape::pairs == LORAMUX_ATTENTION_TILE_16 && sizeof(typename Split<Shape>::Storage) == shared_bytes;
}
static_assert(matches<Dim16>(LORAMUX_ATTENTION_SPLIT_16_SHARED_BYTES));
static_assert(matches<Dim32>(LORAMUX_ATTENTION_SPLIT_32_SHARED_BYTES));
static_assert(matches<Dim64>(LORAMUX_ATTENTION_SPLIT_64_SHARED_BYTES));
static_assert(matches<Dim80>(LORAMUX_ATTENTION_SPLIT_80_SHARED_BYTES));
static_assert(matches<Dim96>(LORAMUX_ATTENTION_SPLIT_96_SHARED_BYTES));
static_assert(matches<Dim128>(LORAMUX_ATTENTION_SPLIT_128_SHARED_BYTES));
static_assert(matches<Dim256>(LORAMUX_ATTENTION_SPLIT_256_SHARED_BYTES));

}  // namespace

KERNEL(attention_split_16, AttentionParams, LORAMUX_ATTENTION_THREADS, 4) { Split<Dim16>::run(p); }
KERNEL(attention_split_32, AttentionParams, LORAMUX_ATTENTION_THREADS, 4) { Split<Dim32>::run(p); }
KERNEL(attention_split_64, AttentionParams, LORAMUX_ATTENTION_THREADS, 4) { Split<Dim64>::run(p); }
KERNEL(attention_split_80, AttentionParams, LORAMUX_ATTENTION_THREADS, 3) { Split<Dim80>::run(p); }
KERNEL(attention_split_96, AttentionParams, LORAMUX_ATTENTION_THREADS, 3) { Split<Dim96>::run(p); }
KERNEL(attention_split_128, AttentionParams, LORAMUX_ATTENTION_THREADS, 3) { Split<Dim128>::run(p); }
KERNEL(attention_split_256, AttentionParams, LORAMUX_ATTENTION_THREADS, 2) { Split<Dim256>::run(p); }
