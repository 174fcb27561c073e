// Y = X · Wᵀ + bias + V · Bᵀ for up to 64 rows: weights are streamed once, everything else hides behind them.
//
// Grid: (column tiles of 64, K slices). Each thread block keeps 7 stages of 8 KB of weights on their way. A group's
// slices are its own and no other's: their sums meet in global memory, where the last block of a column tile to
// arrive adds them in ascending order, the order in which `gemm_rank_ext` adds them in registers.
#include <rank_ext.cuh>

namespace {

template <class Shape>
__device__ __forceinline__ void gemm_decode(const GemmParams& p) {
  auto& storage = shared_storage<typename Shape::Storage>();
  ptx::allow_next_grid();
  const ColumnTile tile(p, blockIdx.x, Shape::columns);
  const uint32_t slice = blockIdx.y;
  Product<Shape, true> product(p, tile, 0, storage, slice, slice + 1);
  if (!product.has_rows()) return;

  typename Shape::Sums sums;
  product.multiply_slice(slice, sums);
  product.drain();
  if (p.slices == 1) {
    finish<Shape>(p, tile, 0, product.rows(), sums, storage);
    return;
  }

  constexpr uint32_t tile_sums = Shape::rows * Shape::columns;
  float* partials = p.partials + size_t(tile.index) * p.slices * tile_sums;
  sums.store(warp_corner<Shape>(partials + slice * tile_sums, Shape::columns), Shape::columns);
  __syncthreads();
  bool last = false;
  if (threadIdx.x == 0) {
    last = ptx::fetch_add_acquire_release(&p.arrived[tile.index], 1) == p.slices - 1;
    if (last) p.arrived[tile.index] = 0;
  }
  if (!__syncthreads_or(last)) return;
  write_outputs<Shape>(p, tile, 0, product.rows(), [&](uint32_t row, uint32_t column) {
    Eight total = {};
    for (uint32_t i = 0; i < p.slices; ++i)
      add(total, read_eight(partials + i * tile_sums + row * Shape::columns + column));
    return total;
  });
}

// Rows of the batch that a tile holds: 1 x 4 warps, each with all rows and 16 columns.
using Rows16 = ProductShape<1, 1, 2, 8>;
using Rows32 = ProductShape<1, 2, 2, 8>;
using Rows64 = ProductShape<1, 4, 2, 6>;

template <class Shape>
constexpr bool matches(uint32_t rows, uint32_t shared_bytes) {
  return Shape::rows == rows && sizeof(typename Shape::Storage) == shared_bytes &&
         Shape::columns == LORAMUX_DECODE_COLUMNS && Shape::threads == LORAMUX_DECODE_THREADS;
}
static_assert(matches<Rows16>(16, LORAMUX_DECODE_16_SHARED_BYTES));
static_assert(matches<Rows32>(32, LORAMUX_DECODE_32_SHARED_BYTES));
static_assert(matches<Rows64>(64, LORAMUX_DECODE_64_SHARED_BYTES));

}  // namespace

KERNEL(gemm_decode_16, GemmParams, Rows16::threads, 2) { gemm_decode<Rows16>(p); }
KERNEL(gemm_decode_32, GemmParams, Rows32::threads, 2) { gemm_decode<Rows32>(p); }
KERNEL(gemm_decode_64, GemmParams, Rows64::threads, 2) { gemm_decode<Rows64>(p); }
