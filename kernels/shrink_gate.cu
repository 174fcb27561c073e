// V = gate · scale · (X · Aᵀ) for every rank chunk in use: one pass over X for all sites of a group.
//
// Grid: (row tiles · parts of a tile, thread blocks that share the tile's chunks, K slices or 1).
#include <shrink.cuh>

namespace {

template <class Shape>
__device__ __forceinline__ void shrink_gate(const ShrinkGateParams& p) {
  ptx::allow_next_grid();
  ptx::wait_for_previous_grid();
  const uint32_t rows = *p.rows, first_row = blockIdx.x * Shape::rows;
  if (first_row >= rows) return;
  const uint32_t tile = first_row / LORAMUX_ROW_TILE;
  const uint32_t begin = p.starts[tile * p.cells], end = p.starts[(tile + 1) * p.cells];
  Shrink<Shape> shrink(p, shared_storage<typename Shape::Storage>(), first_row, rows);
#pragma unroll 1
  for (uint32_t first = begin + blockIdx.y * Shape::chunks; first < end; first += gridDim.y * Shape::chunks)
    shrink.run(first, end, blockIdx.z);
}

// Few rows: a chunk for each thread block, as many bytes on their way as fit.
using Rows16 = ShrinkShape<1, 1, 1, 4, 6, true>;
// Many rows: X is read once for four chunks.
using Rows64 = ShrinkShape<2, 2, 4, 1, 4, false>;

static_assert(Rows16::rows == LORAMUX_SHRINK_GATE_16_ROWS && Rows16::chunks == LORAMUX_SHRINK_GATE_16_CHUNKS);
static_assert(Rows16::threads == LORAMUX_SHRINK_GATE_16_THREADS);
static_assert(sizeof(Rows16::Storage) == LORAMUX_SHRINK_GATE_16_SHARED_BYTES);
static_assert(Rows64::rows == LORAMUX_SHRINK_GATE_64_ROWS && Rows64::chunks == LORAMUX_SHRINK_GATE_64_CHUNKS);
static_assert(Rows64::threads == LORAMUX_SHRINK_GATE_64_THREADS);
static_assert(sizeof(Rows64::Storage) == LORAMUX_SHRINK_GATE_64_SHARED_BYTES);

}  // namespace

KERNEL(shrink_gate_16, ShrinkGateParams, Rows16::threads, 2) { shrink_gate<Rows16>(p); }
KERNEL(shrink_gate_64, ShrinkGateParams, Rows64::threads, 2) { shrink_gate<Rows64>(p); }
