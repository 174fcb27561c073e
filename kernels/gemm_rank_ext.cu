// Y = X · Wᵀ + bias + V · Bᵀ for many rows: tiles of 128 x 128, mma.m16n8k16, three stages of 32 KB.
//
// Grid: row tiles · column tiles in one dimension (`_split`: column tiles, K slices, row tiles). Eight row tiles at a time walk along the columns, so that the
// thread blocks that run together read few distinct tiles of X and of W, and share them through L2.
#include <rank_ext.cuh>

namespace {

// 2 x 4 warps of 64 x 32.
using Shape = ProductShape<2, 4, 4, 3>;
static_assert(Shape::rows == LORAMUX_ROW_TILE && Shape::columns == LORAMUX_GEMM_RANK_EXT_COLUMNS);
static_assert(Shape::threads == LORAMUX_GEMM_RANK_EXT_THREADS && sizeof(Shape::Storage) == LORAMUX_GEMM_RANK_EXT_SHARED_BYTES);

struct Place {
  uint32_t row_tile, column_tile;
};

__device__ __forceinline__ Place place(uint32_t row_tiles) {
  constexpr uint32_t band = 8;
  const uint32_t column_tiles = gridDim.x / row_tiles;
  const uint32_t first = blockIdx.x / (band * column_tiles) * band;
  const uint32_t height = min(band, row_tiles - first);
  const uint32_t in_band = blockIdx.x - first * column_tiles;
  return {first + in_band % height, in_band / height};
}

// `sliced`: K has more than one slice, whose sums are added up in a second set of registers.
template <bool sliced>
__device__ __forceinline__ void gemm_rank_ext(const GemmParams& p) {
  auto& storage = shared_storage<Shape::Storage>();
  ptx::allow_next_grid();
  const Place at = place(p.row_tiles);
  const ColumnTile tile(p, at.column_tile, Shape::columns);
  const uint32_t row = at.row_tile * Shape::rows;
  Product<Shape, false> product(p, tile, row, storage, 0, p.slices);
  if (!product.has_rows()) return;

  typename Shape::Sums sums;
  product.multiply_slice(0, sums);
  if constexpr (sliced) {
    typename Shape::Sums total;
    total.clear();
    total.add(sums);
#pragma unroll 1
    for (uint32_t slice = 1; slice < p.slices; ++slice) {
      product.multiply_slice(slice, sums);
      total.add(sums);
    }
    sums = total;
  }
  product.drain();
  finish<Shape>(p, tile, row, product.rows(), sums, storage);
}

}  // namespace

KERNEL(gemm_rank_ext, GemmParams, Shape::threads, 2) { gemm_rank_ext<false>(p); }
// K in slices: one thread block for all of them, or one for each where there are few tiles.
KERNEL(gemm_rank_ext_sliced, GemmParams, Shape::threads, 1) { gemm_rank_ext<true>(p); }
KERNEL(gemm_rank_ext_split, GemmParams, Shape::threads, 2) { multiply_one_slice<Shape, false>(p); }
