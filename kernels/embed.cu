// y[row] = table[token[row]], plus for rows whose experts change the lookup Σ gate · scale · B · A[:, token].
//
// A warp serves 256 columns of one row. It walks its row tile's chunk list, a chunk a lane, and stops only at those
// that the row uses; a row that uses none is copied as it is.
//
// Grid: (rows, blocks of LORAMUX_ROW_COLUMNS columns).
#include <device.cuh>
#include <params.h>
#include <values.cuh>

namespace {

constexpr uint32_t threads = LORAMUX_ROW_THREADS, columns = LORAMUX_ROW_COLUMNS, columns_of_thread = columns / threads;
constexpr uint32_t ranks = LORAMUX_RANK_CHUNK;

class Lookup {
 public:
  __device__ __forceinline__ Lookup(const EmbedParams& p, uint32_t row)
      : p_(p), row_(row), token_(p.tokens[row]), from_(p.table + size_t(token_) * p.width),
        to_(p.y + size_t(row) * p.y_stride) {}

  __device__ __forceinline__ void run() {
    if (p_.chunks != nullptr && add_chunks()) return;
    if (p_.access == 8)
      copy_row<8>();
    else
      copy_row<1>();
  }

 private:
  // Sums a thread's columns over the chunks that the row uses, in list order. False, and nothing is written, where it
  // uses none.
  __device__ __forceinline__ bool add_chunks() {
    const uint32_t lane = threadIdx.x % 32, tile = row_ / LORAMUX_ROW_TILE;
    const uint32_t end = p_.starts[(tile + 1) * p_.cells];
    float sums[columns_of_thread];
    bool changed = false;
#pragma unroll 1
    for (uint32_t first = p_.starts[tile * p_.cells]; first < end; first += 32) {
      uint32_t chunk = 0;
      float factor = 0.0f;
      if (first + lane < end) {
        const RankChunk& mine = p_.chunks[first + lane];
        chunk = mine.chunk;
        factor = mine.scale * p_.gates[size_t(mine.entry) * LORAMUX_ROW_TILE + row_ % LORAMUX_ROW_TILE];
      }
#pragma unroll 1
      for (uint32_t used = __ballot_sync(~0u, factor != 0.0f); used != 0; used &= used - 1) {
        if (!changed) for_columns([&](uint32_t i, uint32_t column) { sums[i] = to_float(from_[column]); });
        changed = true;
        const int of_lane = __ffs(used) - 1;
        add_chunk(__shfl_sync(~0u, chunk, of_lane), __shfl_sync(~0u, factor, of_lane), sums);
      }
    }
    if (changed) for_columns([&](uint32_t i, uint32_t column) { store<1>(to_ + column, {{sums[i]}}); });
    return changed;
  }

  __device__ __forceinline__ void add_chunk(uint32_t chunk, float factor, float (&sums)[columns_of_thread]) const {
    const element* a = p_.a + (size_t(chunk) * p_.vocabulary + token_) * ranks;
    const Values<8> v[2] = {load<8>(a), load<8>(a + 8)};
    for_columns([&](uint32_t i, uint32_t column) {
      const element* b = p_.b + (size_t(chunk) * p_.width + column) * ranks;
      const Values<8> of_column[2] = {load<8>(b), load<8>(b + 8)};
#pragma unroll
      for (uint32_t rank = 0; rank < ranks; ++rank)
        sums[i] = fmaf(factor * v[rank / 8].at[rank % 8], of_column[rank / 8].at[rank % 8], sums[i]);
    });
  }

  // The columns of this thread, neighbours in neighbouring lanes: a warp reads 1 KiB of B in one piece.
  template <class Visit>
  __device__ __forceinline__ void for_columns(Visit visit) const {
#pragma unroll
    for (uint32_t i = 0; i < columns_of_thread; ++i) {
      const uint32_t column = blockIdx.y * columns + i * threads + threadIdx.x;
      if (column < p_.width) visit(i, column);
    }
  }

  template <uint32_t access>
  __device__ __forceinline__ void copy_row() const {
    const uint32_t first = blockIdx.y * columns, end = min(first + columns, p_.width);
    for (uint32_t column = first + threadIdx.x * access; column < end; column += threads * access)
      copy<access>(to_ + column, from_ + column);
  }

  const EmbedParams& p_;
  const uint32_t row_, token_;
  const element* const from_;
  element* const to_;
};

}  // namespace

KERNEL(embed, EmbedParams, threads, 4) {
  ptx::allow_next_grid();
  ptx::wait_for_previous_grid();
  if (blockIdx.x < *p.rows) Lookup(p, blockIdx.x).run();
}
