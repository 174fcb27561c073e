// Y = X · Wᵀ + bias + V · Bᵀ for up to 64 rows: weights are streamed once, everything else hides behind them.
//
// Grid: (column tiles of 64, K slices). Each thread block keeps 7 stages of 8 KB of weights on their way.
#include <rank_ext.cuh>

namespace {

// Rows of the batch that a tile holds: 1 x 4 warps, each with all rows and 16 columns.
using Rows16 = ProductShape<1, 1, 2, 8>;
using Rows32 = ProductShape<1, 2, 2, 8>;
using Rows64 = ProductShape<1, 4, 2, 6>;

template <class Shape>
constexpr bool matches(uint32_t rows, uint32_t shared_bytes) {
  return Shape::rows == rows && sizeof(typename Shape::Storage) == shared_bytes &&
         Shape::columns == LORAMUX_GEMM_DECODE_COLUMNS && Shape::threads == LORAMUX_GEMM_DECODE_THREADS;
}
static_assert(matches<Rows16>(16, LORAMUX_GEMM_DECODE_16_SHARED_BYTES));
static_assert(matches<Rows32>(32, LORAMUX_GEMM_DECODE_32_SHARED_BYTES));
static_assert(matches<Rows64>(64, LORAMUX_GEMM_DECODE_64_SHARED_BYTES));

}  // namespace

KERNEL(gemm_decode_16, GemmParams, Rows16::threads, 2) { multiply_one_slice<Rows16, true>(p); }
KERNEL(gemm_decode_32, GemmParams, Rows32::threads, 2) { multiply_one_slice<Rows32, true>(p); }
KERNEL(gemm_decode_64, GemmParams, Rows64::threads, 2) { multiply_one_slice<Rows64, true>(p); }
