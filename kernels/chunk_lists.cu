// The chunk lists of all site groups of a model, built from the step's experts in one launch.
//
// A row tile's entries name slots; each site knows which chunks of its arenas the slot's expert owns. A list holds,
// for each cell (row tile, K slice, site), the chunks that extend this slice: entries ascending, then chunk ascending.
//
// Grid: one thread block per site group. Each warp counts cells and cuts tiles, one warp turns counts into starts, each
// warp fills.
#include <device.cuh>
#include <params.h>
#include <ptx.cuh>

namespace {

constexpr uint32_t threads = LORAMUX_CHUNK_LISTS_THREADS, warps = threads / 32;

// Chunks of an expert that extend a slice: `first`, `first + slices`, …, `count` of them.
struct ChunksOfSlice {
  uint32_t first, count;
};

__device__ __forceinline__ ChunksOfSlice chunks_of_slice(const SlotChunks& slot, uint32_t slice, uint32_t slices) {
  const uint32_t first = (slice + slices - slot.phase % slices) % slices;
  return {first, first < slot.count ? (slot.count - first + slices - 1) / slices : 0};
}

// Sum over the lanes before this one.
__device__ __forceinline__ uint32_t sum_before(uint32_t value) {
  const uint32_t lane = threadIdx.x % 32;
  uint32_t sum = value;
#pragma unroll
  for (uint32_t distance = 1; distance < 32; distance *= 2) {
    const uint32_t before = __shfl_up_sync(~0u, sum, distance);
    if (lane >= distance) sum += before;
  }
  return sum - value;
}

class ChunkLists {
 public:
  __device__ __forceinline__ ChunkLists(const ChunkListParams& p, const ChunkListGroup& group, uint32_t cells)
      : p_(p), group_(group), cells_(cells) {}

  // starts[cell] = chunks of the cell.
  __device__ __forceinline__ void count() {
    for (uint32_t cell = threadIdx.x / 32; cell < cells_; cell += warps) {
      uint32_t sum = 0;
      for_entries(cell, [&](uint32_t, uint32_t, float, ChunksOfSlice chunks) { sum += chunks.count; });
      sum = __reduce_add_sync(~0u, sum);
      if (threadIdx.x % 32 == 0) group_.starts[cell] = sum;
    }
  }

  // Leaves a tile no more chunks than it may have. A lane for each of its cells.
  __device__ __forceinline__ void cut() {
    static_assert(LORAMUX_MAX_SITES * LORAMUX_MAX_SLICES <= 32);
    const uint32_t lane = threadIdx.x % 32, cells_of_tile = group_.slices * group_.sites;
    for (uint32_t first = threadIdx.x / 32 * cells_of_tile; first < cells_; first += warps * cells_of_tile) {
      const uint32_t count = lane < cells_of_tile ? group_.starts[first + lane] : 0;
      const uint32_t before = sum_before(count), room = group_.tile_capacity - min(before, group_.tile_capacity);
      if (count > room) {
        group_.starts[first + lane] = room;
        *p_.overflow = 1;
      }
    }
  }

  // starts[cell] = chunks of all cells before. By one warp.
  __device__ __forceinline__ void scan() {
    const uint32_t lane = threadIdx.x % 32;
    uint32_t total = 0;
    for (uint32_t first = 0; first < cells_; first += 32) {
      const uint32_t cell = first + lane, count = cell < cells_ ? group_.starts[cell] : 0;
      const uint32_t before = total + sum_before(count);
      if (cell < cells_) group_.starts[cell] = before;
      total = __shfl_sync(~0u, before + count, 31);
    }
    if (lane == 0) group_.starts[cells_] = total;
  }

  __device__ __forceinline__ void fill() {
    for (uint32_t cell = threadIdx.x / 32; cell < cells_; cell += warps) {
      const uint32_t site = cell % group_.sites;
      uint32_t next = group_.starts[cell];
      const uint32_t end = group_.starts[cell + 1];
      for_entries(cell, [&](uint32_t entry, uint32_t slot, float scale, ChunksOfSlice chunks) {
        const uint32_t before = sum_before(chunks.count);
        const uint32_t* ids = group_.site[site].chunk_ids + slot * group_.site[site].chunks_per_slot;
        for (uint32_t i = 0; i < chunks.count && next + before + i < end; ++i)
          group_.chunks[next + before + i] = {ids[chunks.first + i * group_.slices], entry, site, scale};
        next += __shfl_sync(~0u, before + chunks.count, 31);
      });
    }
  }

 private:
  // Visits the entries of a cell's row tile, one a lane; lanes past the last visit an expert without chunks.
  template <class Visit>
  __device__ __forceinline__ void for_entries(uint32_t cell, Visit visit) const {
    const uint32_t site = cell % group_.sites, slice = cell / group_.sites % group_.slices;
    const uint32_t tile = cell / (group_.sites * group_.slices);
    const uint32_t end = p_.tile_entries[tile + 1];
    for (uint32_t first = p_.tile_entries[tile]; first < end; first += 32) {
      const uint32_t entry = first + threadIdx.x % 32;
      uint32_t slot = 0;
      SlotChunks expert = {};
      if (entry < end) {
        slot = p_.entry_slots[entry];
        expert = group_.site[site].slots[slot];
      }
      visit(entry, slot, expert.scale, chunks_of_slice(expert, slice, group_.slices));
    }
  }

  const ChunkListParams& p_;
  const ChunkListGroup& group_;
  const uint32_t cells_;
};

}  // namespace

KERNEL(chunk_lists, ChunkListParams, threads, 1) {
  ptx::allow_next_grid();
  ptx::wait_for_previous_grid();
  const ChunkListGroup& group = p.groups[blockIdx.x];
  const uint32_t tiles = (*p.rows + LORAMUX_ROW_TILE - 1) / LORAMUX_ROW_TILE;
  ChunkLists lists(p, group, tiles * group.slices * group.sites);
  lists.count();
  __syncthreads();
  lists.cut();
  __syncthreads();
  if (threadIdx.x < 32) lists.scan();
  __syncthreads();
  lists.fill();
}
