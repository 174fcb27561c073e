// What remains of a step once products, norms and attention are taken away: a gated activation for products whose
// epilogue cannot apply it, and the rows that a step goes on with.
//
// Grid: (rows, blocks of LORAMUX_ROW_COLUMNS columns).
#include <device.cuh>
#include <params.h>
#include <values.cuh>

namespace {

constexpr uint32_t threads = LORAMUX_ROW_THREADS;

// The columns of this thread, an access at a time.
template <uint32_t access, class Visit>
__device__ __forceinline__ void for_columns(uint32_t width, Visit visit) {
  const uint32_t first = blockIdx.y * LORAMUX_ROW_COLUMNS, end = min(first + LORAMUX_ROW_COLUMNS, width);
  for (uint32_t column = first + threadIdx.x * access; column < end; column += threads * access) visit(column);
}

template <uint32_t access>
__device__ __forceinline__ void swiglu_row(const SwigluParams& p) {
  const element* x = p.x + size_t(blockIdx.x) * p.x_stride;
  element* y = p.y + size_t(blockIdx.x) * p.y_stride;
  for_columns<access>(p.width, [&](uint32_t column) {
    Values<access> gate = load<access>(x + column);
    const Values<access> up = load<access>(x + p.width + column);
#pragma unroll
    for (uint32_t i = 0; i < access; ++i) gate.at[i] = silu(gate.at[i]) * up.at[i];
    store<access>(y + column, gate);
  });
}

template <uint32_t access>
__device__ __forceinline__ void pick_row(const PickRowsParams& p) {
  const element* x = p.x + size_t(p.picked[blockIdx.x]) * p.x_stride;
  element* y = p.y + size_t(blockIdx.x) * p.y_stride;
  for_columns<access>(p.width, [&](uint32_t column) { copy<access>(y + column, x + column); });
}

}  // namespace

KERNEL(swiglu, SwigluParams, threads, 8) {
  ptx::allow_next_grid();
  ptx::wait_for_previous_grid();
  if (blockIdx.x >= *p.rows) return;
  if (p.access == 8)
    swiglu_row<8>(p);
  else
    swiglu_row<1>(p);
}

KERNEL(pick_rows, PickRowsParams, threads, 8) {
  ptx::allow_next_grid();
  ptx::wait_for_previous_grid();
  if (blockIdx.x >= *p.count) return;
  if (p.access == 8)
    pick_row<8>(p);
  else
    pick_row<1>(p);
}
