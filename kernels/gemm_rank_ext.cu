// Y = X · Wᵀ + bias + V · Bᵀ for many rows: tiles of 128 x 128, mma.m16n8k16, three stages of 32 KB.
//
// Grid: any number of thread blocks, which take tiles in turn (`_split`: column tiles, K slices, row tiles). Eight row
// tiles at a time walk along the columns, so that the thread blocks that run together read few distinct tiles of X and
// of W, and share them through L2.
#include <rank_ext.cuh>

namespace {

// 2 x 4 warps of 64 x 32.
using Shape = ProductShape<2, 4, 4, 3>;
static_assert(Shape::rows == LORAMUX_ROW_TILE && Shape::columns == LORAMUX_GEMM_RANK_EXT_COLUMNS);
static_assert(Shape::threads == LORAMUX_GEMM_RANK_EXT_THREADS);
static_assert(sizeof(Shape::Storage) == LORAMUX_GEMM_RANK_EXT_SHARED_BYTES);

struct Place {
  uint32_t row_tile, column_tile;
};

// Tile number `index` of `row_tiles · column_tiles`.
__device__ __forceinline__ Place place(uint32_t index, uint32_t row_tiles, uint32_t column_tiles) {
  constexpr uint32_t band = 8;
  const uint32_t first = index / (band * column_tiles) * band;
  const uint32_t height = min(band, row_tiles - first);
  const uint32_t in_band = index - first * column_tiles;
  return {first + in_band % height, in_band / height};
}

// This thread's part of what its thread block parks: quads of a slice, thread by thread.
__device__ __forceinline__ float4* parked_sums(const GemmParams& p, uint32_t slice) {
  const size_t sums = (size_t(blockIdx.x) * p.slices + slice) * Shape::Sums::quads * Shape::threads;
  return reinterpret_cast<float4*>(p.partials) + sums + threadIdx.x;
}

// One tile. `sliced`: K has more than one slice; their sums are parked in this thread block's part of the partial sums,
// which stays in L2, so that two thread blocks still fit a multiprocessor's registers.
template <bool sliced>
__device__ __forceinline__ void multiply_tile(const GemmParams& p, Place at, Shape::Storage& storage) {
  const ColumnTile tile(p, at.column_tile, Shape::columns);
  const uint32_t row = at.row_tile * Shape::rows;
  float* corner = warp_corner<Shape>(storage.sums, Shape::sum_stride);
#pragma unroll 1
  for (uint32_t slice = 0; slice < (sliced ? p.slices : 1); ++slice) {
    Product<Shape, false> product(p, tile, row, slice, storage);
    if (!product.has_rows()) {
      // Copies that are under way must not land in the next tile's stages.
      ptx::copy_async_wait<0>();
      return;
    }
    Shape::Sums sums;
    product.multiply(sums);
    if (sliced)
      sums.park(parked_sums(p, slice), Shape::threads);
    else
      sums.store(corner, Shape::sum_stride);
  }
  if (sliced) Shape::Sums::store_parked(corner, Shape::sum_stride, parked_sums(p, 0), Shape::threads, p.slices);
  finish<Shape>(p, tile, row, *p.rows, storage);
}

template <bool sliced>
__device__ __forceinline__ void gemm_rank_ext(const GemmParams& p) {
  auto& storage = shared_storage<Shape::Storage>();
  ptx::allow_next_grid();
#pragma unroll 1
  for (uint32_t i = blockIdx.x; i < p.row_tiles * p.column_tiles; i += gridDim.x) {
    multiply_tile<sliced>(p, place(i, p.row_tiles, p.column_tiles), storage);
    // The next tile's stages lie where this one's sums are being read.
    __syncthreads();
  }
}

__device__ __forceinline__ void multiply_one_slice(const GemmParams& p) {
  auto& storage = shared_storage<Shape::Storage>();
  ptx::allow_next_grid();
  const ColumnTile tile(p, blockIdx.x, Shape::columns);
  const uint32_t row = blockIdx.z * Shape::rows;
  Product<Shape, false> product(p, tile, row, blockIdx.y, storage);
  if (!product.has_rows()) return;
  Shape::Sums sums;
  product.multiply(sums);
  finish_slice<Shape>(p, tile, row, product.rows(), sums, storage);
}

}  // namespace

KERNEL(gemm_rank_ext, GemmParams, Shape::threads, 2) { gemm_rank_ext<false>(p); }
// K in slices: a thread block for all of them, or one for each where there are few tiles.
KERNEL(gemm_rank_ext_sliced, GemmParams, Shape::threads, 2) { gemm_rank_ext<true>(p); }
KERNEL(gemm_rank_ext_split, GemmParams, Shape::threads, 2) { multiply_one_slice(p); }
