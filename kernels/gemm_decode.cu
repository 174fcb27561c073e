// Y = X · Wᵀ + bias + V · Bᵀ for up to 64 rows: weights are streamed once, everything else hides behind them.
//
// Grid: (column tiles of 64, K slices). Each thread block keeps up to 7 stages of 8 KB of weights on their way.
//
// V may be computed in the same launch. Before a thread block multiplies, it takes units of V (a rank chunk, a slice of
// K, 16 rows) as long as there are any, and gives up its stages for them: its weights come again, from L2. Everyone
// else's weights stream meanwhile, and V is waited for where the rank blocks begin. By then all units are taken, by
// thread blocks that run and wait for nothing, so the grid goes on in whatever order its thread blocks start.
#include <rank_ext.cuh>
#include <shrink.cuh>

namespace {

template <class Shape>
class Decode {
  using Product = ::Product<Shape, true>;

  // Stages of 16 KB, as many as the product's make room for.
  static constexpr uint32_t unit_blocks = 4, unit_stage_bytes = unit_blocks * 2 * 16 * LORAMUX_K_BLOCK * 2;
  using Unit = ShrinkShape<1, 1, 1, unit_blocks, sizeof(typename Shape::Storage) / unit_stage_bytes, true>;

 public:
  // All of a thread block's shared memory.
  struct Storage {
    union {
      typename Shape::Storage product;
      typename Unit::Storage unit;
    };
    uint32_t taken;
  };

  static __device__ __forceinline__ void run(const GemmDecodeParams& params) {
    auto& storage = shared_storage<Storage>();
    const GemmParams& p = params.product;
    ptx::allow_next_grid();
    const ColumnTile tile(p, blockIdx.x, Shape::columns);
    Product product(p, tile, 0, blockIdx.y, storage.product);
    if (!product.has_rows()) return;

    const uint32_t chunks = params.counters == nullptr ? 0 : p.starts[params.shrink.cells];
    if (chunks > 0) {
      const uint32_t parts = (min(product.rows(), Shape::rows) + Unit::rows - 1) / Unit::rows;
      if (compute_v(params, storage, chunks, parts, product.rows())) product.restart();
      product.await_v(&params.counters->written, chunks * parts);
    }
    typename Shape::Sums sums;
    product.multiply(sums);
    if (chunks > 0) leave(*params.counters);
    finish_slice<Shape>(p, tile, 0, product.rows(), sums, storage.product);
  }

 private:
  // Takes units of V until there are none left. Returns whether it got any: then no stage is what it was.
  static __device__ __forceinline__ bool compute_v(const GemmDecodeParams& params, Storage& storage, uint32_t chunks,
                                                   uint32_t parts, uint32_t rows) {
    const ShrinkGateParams& p = params.shrink;
    // A chunk is seldom used by all rows. Where there are enough units without, one has all parts of the rows, so that
    // few are taken in vain.
    const uint32_t parts_of_unit = chunks * p.slices >= blocks_of_grid() ? parts : 1;
    const uint32_t units = chunks * p.slices * (parts / parts_of_unit);
#pragma unroll 1
    for (bool any = false;; any = true) {
      if (threadIdx.x == 0) storage.taken = ptx::fetch_add_relaxed(&params.counters->taken, 1);
      __syncthreads();
      const uint32_t unit = storage.taken;
      if (unit >= units) return any;
      // The product's copies must not land among the unit's; a barrier follows before those begin.
      ptx::copy_async_wait<0>();
      const uint32_t slice = unit % p.slices, chunk = unit / p.slices % chunks;
      const uint32_t first_part = unit / p.slices / chunks;
      uint32_t written = 0;
#pragma unroll 1
      for (uint32_t part = first_part; part < first_part + parts_of_unit; ++part) {
        Shrink<Unit> shrink(p, storage.unit, part * Unit::rows, rows);
        written += shrink.run(chunk, chunk + 1, slice);
      }
      __syncthreads();
      if (threadIdx.x == 0 && written > 0) ptx::fetch_add_acquire_release(&params.counters->written, written);
    }
  }

  // The last thread block to leave makes the counters what they were.
  static __device__ __forceinline__ void leave(GemmDecodeCounters& counters) {
    if (threadIdx.x == 0 && ptx::fetch_add_acquire_release(&counters.left, 1) == blocks_of_grid() - 1) counters = {};
  }

  static __device__ __forceinline__ uint32_t blocks_of_grid() { return gridDim.x * gridDim.y; }
};

// Rows of the batch that a tile holds: 1 x 4 warps, each with all rows and 16 columns.
using Rows16 = ProductShape<1, 1, 2, 8>;
using Rows32 = ProductShape<1, 2, 2, 8>;
using Rows64 = ProductShape<1, 4, 2, 6>;

template <class Shape>
constexpr bool matches(uint32_t rows, uint32_t shared_bytes) {
  return Shape::rows == rows && sizeof(typename Decode<Shape>::Storage) == shared_bytes &&
         Shape::columns == LORAMUX_GEMM_DECODE_COLUMNS && Shape::threads == LORAMUX_GEMM_DECODE_THREADS;
}
static_assert(matches<Rows16>(16, LORAMUX_GEMM_DECODE_16_SHARED_BYTES));
static_assert(matches<Rows32>(32, LORAMUX_GEMM_DECODE_32_SHARED_BYTES));
static_assert(matches<Rows64>(64, LORAMUX_GEMM_DECODE_64_SHARED_BYTES));

}  // namespace

KERNEL(gemm_decode_16, GemmDecodeParams, Rows16::threads, 2) { Decode<Rows16>::run(p); }
KERNEL(gemm_decode_32, GemmDecodeParams, Rows32::threads, 2) { Decode<Rows32>::run(p); }
KERNEL(gemm_decode_64, GemmDecodeParams, Rows64::threads, 2) { Decode<Rows64>::run(p); }
