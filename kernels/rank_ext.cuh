// The product of a site group in which rank is just more K: what `gemm_rank_ext` and `gemm_decode` have in common.
//
//   Y = [X | V] · [W | B]ᵀ        K blocks of 64 values, then rank blocks of four rank chunks
//
// A thread block computes a tile of rows x columns over one K slice at a time. Blocks stream through a ring of stages
// in shared memory; a rank block has the layout of a K block, chunk j in steps j of all rows, so what multiplies them
// cannot tell which is which. See `GemmParams` for the order of every sum.
//
// Columns of a tile belong to one site; for SwiGLU half of every warp's columns are gates and the other half the same
// columns of up, so that a pair meets in one tile.
#pragma once
#include <device.cuh>
#include <tile.cuh>
#include <values.cuh>

inline namespace ELEMENT {

// `warp_rows` x 4 warps, each with sums of `row_blocks` x `column_blocks` blocks of 16x8.
template <uint32_t warp_rows_, uint32_t row_blocks_, uint32_t column_blocks_, uint32_t stages_>
struct ProductShape {
  static constexpr uint32_t warp_rows = warp_rows_, row_blocks = row_blocks_, column_blocks = column_blocks_;
  static constexpr uint32_t stages = stages_;
  static constexpr uint32_t warp_columns = 4;
  static constexpr uint32_t threads = warp_rows * warp_columns * 32;
  static constexpr uint32_t rows_of_warp = row_blocks * 16, columns_of_warp = column_blocks * 8;
  static constexpr uint32_t rows = warp_rows * rows_of_warp, columns = warp_columns * columns_of_warp;
  // Rows of a tile that all threads together copy at a time, a piece each.
  static constexpr uint32_t copied_rows = threads / block_pieces;
  static_assert(copied_rows == columns_of_warp, "each pass brings the weights of one warp's columns");
  static_assert(rows % copied_rows == 0 && LORAMUX_ROW_TILE % rows == 0);
  // Floats from row to row of a tile of sums: rows of a column of blocks fall into different banks.
  static constexpr uint32_t sum_stride = columns + 8;

  using Sums = WarpSums<row_blocks, column_blocks>;
  struct Stage {
    OperandTile<rows> x;
    OperandTile<columns> w;
  };
  // All of a thread block's shared memory.
  union Storage {
    Stage stage[stages];
    float sums[rows * sum_stride];
  };
};

// Whether a tile's columns are of two sites.
__device__ __forceinline__ bool is_paired(const GemmParams& p) { return p.epilogue == LORAMUX_SWIGLU; }

// Columns that a thread block computes: `columns` of one site, or for SwiGLU half as many of site 0 and of site 1.
struct ColumnTile {
  uint32_t site, first;

  // Tile number `index` of the group; the host counts them the same way (`column_tiles`).
  __device__ __forceinline__ ColumnTile(const GemmParams& p, uint32_t index, uint32_t columns)
      : site(0), first(index * columns) {
    if (is_paired(p)) {
      first = index * (columns / 2);
      return;
    }
    while (first >= p.site[site].out_features) {
      first -= (p.site[site].out_features + columns - 1) / columns * columns;
      ++site;
    }
  }
};

// First K block of a slice.
__device__ __forceinline__ uint32_t slice_begin(const GemmParams& p, uint32_t slice) {
  const uint32_t blocks = (p.in_features + LORAMUX_K_BLOCK - 1) / LORAMUX_K_BLOCK;
  return slice * blocks / p.slices;
}

// Fills stages and multiplies them. `decodes`: weights are read once, so they should not displace the rest from L2, and
// V may still be on its way from other thread blocks of the grid.
template <class Shape, bool decodes>
class Product {
 public:
  using Sums = typename Shape::Sums;

  __device__ __forceinline__ Product(const GemmParams& p, const ColumnTile& tile, uint32_t row, uint32_t slice,
                                     typename Shape::Storage& storage)
      : p_(p), storage_(storage), tile_(tile), row_(row), slice_(slice) {
    policy_ = decodes ? ptx::evict_first_policy() : 0;
    block_ = slice_begin(p, slice);
    block_end_ = slice_begin(p, slice + 1);
    // Weights do not depend on the previous grid: they are under way while it ends.
    const uint32_t blocks = block_end_ - block_;
#pragma unroll 1
    for (uint32_t i = 0; i + 1 < Shape::stages && i < blocks; ++i) copy_weights(storage_.stage[i], block_ + i);
    ptx::wait_for_previous_grid();
    rows_ = *p.rows;
    const Range chunks = chunk_range();
    chunk_ = chunks.begin;
    chunk_end_ = chunks.end;
    look_up_chunk();
    fill_first_stages(true);
  }

  // Begins again, after another use of shared memory.
  __device__ __forceinline__ void restart() {
    block_ = slice_begin(p_, slice_);
    fill_first_stages(false);
  }

  // V is to be read once `written` has reached `count`.
  __device__ __forceinline__ void await_v(const uint32_t* written, uint32_t count) {
    v_written_ = written;
    v_count_ = count;
  }

  // Whether the tile has rows in this step. Without, there is nothing to multiply.
  __device__ __forceinline__ bool has_rows() const { return row_ < rows_; }
  __device__ __forceinline__ uint32_t rows() const { return rows_; }

  // The sums of the slice. Afterwards no thread reads or fills a stage: shared memory is free for other use.
  __device__ __forceinline__ void multiply(Sums& sums) {
    if (decodes) {
      // A short K leaves stages for rank blocks.
#pragma unroll 1
      for (uint32_t i = block_end_ - slice_begin(p_, slice_); i + 1 < Shape::stages; ++i) {
        fill(i, false);
        ptx::copy_async_commit();
      }
    }
    sums.clear();
#pragma unroll 1
    for (uint32_t i = slice_begin(p_, slice_); i < block_end_; ++i) {
      typename Shape::Stage& stage = next_stage();
#pragma unroll
      for (uint32_t step = 0; step < block_steps; ++step) multiply_step(stage, step, sums);
    }
    if (p_.changes_columns) change_columns(sums);
    const Range chunks = chunk_range();
#pragma unroll 1
    for (uint32_t chunk = chunks.begin; chunk < chunks.end; chunk += block_steps) {
      typename Shape::Stage& stage = next_stage();
      const uint32_t steps = min(block_steps, chunks.end - chunk);
#pragma unroll 1
      for (uint32_t step = 0; step < steps; ++step) multiply_step(stage, step, sums);
    }
    ptx::copy_async_wait<0>();
    __syncthreads();
  }

 private:
  struct Range {
    uint32_t begin, end;
  };

  // Starts to copy the first blocks: where V may be on its way, those of K.
  __device__ __forceinline__ void fill_first_stages(bool weights_are_under_way) {
    const uint32_t blocks = block_end_ - block_;
#pragma unroll 1
    for (uint32_t i = 0; i + 1 < Shape::stages && (!decodes || i < blocks); ++i) {
      fill(i, weights_are_under_way && i < blocks);
      ptx::copy_async_commit();
    }
  }

  // Waits for the oldest stage, starts to fill the one that was multiplied before it, and returns the oldest.
  __device__ __forceinline__ typename Shape::Stage& next_stage() {
    ptx::copy_async_wait<Shape::stages - 2>();
    __syncthreads();
    typename Shape::Stage& ready = storage_.stage[read_stage_];
    const uint32_t free_stage = read_stage_ == 0 ? Shape::stages - 1 : read_stage_ - 1;
    fill(free_stage, false);
    ptx::copy_async_commit();
    read_stage_ = read_stage_ + 1 == Shape::stages ? 0 : read_stage_ + 1;
    return ready;
  }

  __device__ __forceinline__ void multiply_step(typename Shape::Stage& stage, uint32_t step, Sums& sums) {
    const uint32_t warp = threadIdx.x / 32;
    sums.multiply(stage.x, warp / Shape::warp_columns * Shape::rows_of_warp, stage.w,
                  warp % Shape::warp_columns * Shape::columns_of_warp, step);
  }

  // What experts do to the frozen product of a slice besides their ranks. An expert that a row does not use has gate 0
  // there and changes no bit of it.
  __device__ __forceinline__ void change_columns(Sums& sums) const {
    const uint32_t warp = threadIdx.x / 32, tile = row_ / LORAMUX_ROW_TILE;
    const uint32_t row_of_warp = row_ % LORAMUX_ROW_TILE + warp / Shape::warp_columns * Shape::rows_of_warp;
    const uint32_t row = row_of_warp + threadIdx.x % 32 / 4;
#pragma unroll
    for (uint32_t c = 0; c < Shape::column_blocks; ++c) {
      uint32_t column = c * 8 + threadIdx.x % 4 * 2, site = tile_.site, width = Shape::columns_of_warp;
      if (is_paired(p_)) {
        width /= 2;
        site = column / width;
        column %= width;
      }
      column += tile_.first + warp % Shape::warp_columns * width;
      if (column >= p_.site[site].out_features) continue;
      const uint32_t columns = min(2u, p_.site[site].out_features - column);
#pragma unroll
      for (uint32_t r = 0; r < Shape::row_blocks * 2; ++r) {
        float scale[2] = {1.0f, 1.0f}, added[2] = {};
#pragma unroll 1
        for (uint32_t entry = p_.tile_entries[tile]; entry < p_.tile_entries[tile + 1]; ++entry) {
          const SlotChunks& expert = p_.site[site].slots[p_.entry_slots[entry]];
          const float gate = p_.gates[size_t(entry) * LORAMUX_ROW_TILE + row + r * 8];
#pragma unroll
          for (uint32_t i = 0; i < 2; ++i) {
            if (i >= columns) continue;
            if (expert.column_scale != nullptr)
              scale[i] = fmaf(gate, expert.column_scale[column + i] - 1.0f, scale[i]);
            if (expert.bias != nullptr) added[i] = fmaf(gate, expert.bias[column + i], added[i]);
          }
        }
#pragma unroll
        for (uint32_t i = 0; i < 2; ++i) {
          float& sum = sums.at[r / 2][c][r % 2 * 2 + i];
          // Spelt out, so that all kernels round alike.
          sum = fmaf(sum, scale[i], slice_ == 0 ? added[i] : 0.0f);
        }
      }
    }
  }

  // Starts to copy the next block, if there is one, and moves on to the one after it.
  __device__ __forceinline__ void fill(uint32_t stage_index, bool weights_are_under_way) {
    typename Shape::Stage& stage = storage_.stage[stage_index];
    if (block_ < block_end_) {
      if (!weights_are_under_way) copy_weights(stage, block_);
      copy_inputs(stage, block_);
      ++block_;
    } else if (chunk_ < chunk_end_) {
      if (decodes && v_count_ > 0) {
        ptx::wait_for_count(v_written_, v_count_);
        v_count_ = 0;
      }
      copy_rank_block(stage);
      chunk_ += block_steps;
      look_up_chunk();
    }
  }

  __device__ __forceinline__ Range chunk_range() const {
    if (p_.chunks == nullptr || !has_rows()) return {0, 0};
    const uint32_t cell =
        (row_ / LORAMUX_ROW_TILE * p_.slices + slice_) * p_.sites + (is_paired(p_) ? 0 : tile_.site);
    return {p_.starts[cell], p_.starts[cell + (is_paired(p_) ? 2 : 1)]};
  }

  // Reads this thread's entry of the next rank block a block early, so that nobody waits for it.
  __device__ __forceinline__ void look_up_chunk() {
    const uint32_t mine = chunk_ + piece() / 2;
    if (mine < chunk_end_) arena_chunk_ = p_.chunks[mine].site == site() ? p_.chunks[mine].chunk : no_chunk;
  }

  // This thread's rows of the weight tile: their site, the first of them, and their distance. Computed anew each time:
  // registers are what a tile is short of.
  __device__ __forceinline__ uint32_t site() const {
    return is_paired(p_) ? threadIdx.x / block_pieces / (Shape::columns_of_warp / 2) : tile_.site;
  }
  __device__ __forceinline__ uint32_t weight_row() const {
    return tile_.first + threadIdx.x / block_pieces % weight_step();
  }
  __device__ __forceinline__ uint32_t weight_step() const {
    return is_paired(p_) ? Shape::columns_of_warp / 2 : Shape::columns_of_warp;
  }
  __device__ __forceinline__ uint32_t out_features() const { return p_.site[site()].out_features; }

  // The 16-byte piece of every row that this thread copies.
  __device__ __forceinline__ uint32_t piece() const { return threadIdx.x % block_pieces; }

  __device__ __forceinline__ void copy_weights(typename Shape::Stage& stage, uint32_t block) {
    const uint32_t k = block * LORAMUX_K_BLOCK + piece() * piece_values;
    const element* from = p_.site[site()].weight + size_t(weight_row()) * p_.in_features + k;
    copy_columns(stage, from, p_.in_features, k < p_.in_features);
  }

  // Pieces for the rows of the weight tile: this thread's row of every warp's columns, `stride` values a row.
  __device__ __forceinline__ void copy_columns(typename Shape::Stage& stage, const element* from, uint32_t stride,
                                               bool valid) {
#pragma unroll
    for (uint32_t i = 0; i < Shape::warp_columns; ++i) {
      void* to = stage.w.piece(threadIdx.x / block_pieces + i * Shape::copied_rows, piece());
      const element* row = from + size_t(i * weight_step()) * stride;
      const bool copied = valid && weight_row() + i * weight_step() < out_features();
      if (decodes)
        ptx::copy_async_16(to, row, copied, policy_);
      else
        ptx::copy_async_16(to, row, copied);
    }
  }

  // Likewise for the rows of the input tile; rows past the batch are zeros.
  __device__ __forceinline__ void copy_rows(typename Shape::Stage& stage, const element* from, uint32_t stride,
                                            bool valid) {
#pragma unroll
    for (uint32_t i = 0; i < Shape::rows / Shape::copied_rows; ++i) {
      const uint32_t row = threadIdx.x / block_pieces + i * Shape::copied_rows;
      ptx::copy_async_16(stage.x.piece(row, piece()), from + size_t(row) * stride, valid && row_ + row < rows_);
    }
  }

  __device__ __forceinline__ void copy_inputs(typename Shape::Stage& stage, uint32_t block) {
    const uint32_t k = block * LORAMUX_K_BLOCK + piece() * piece_values;
    copy_rows(stage, p_.x + size_t(row_) * p_.x_stride + k, p_.x_stride, k < p_.in_features);
  }

  // Chunk j of the rank block lies in pieces 2j and 2j + 1: V in place of X, B in place of W.
  __device__ __forceinline__ void copy_rank_block(typename Shape::Stage& stage) {
    const uint32_t mine = chunk_ + piece() / 2, value = piece() % 2 * piece_values;
    const bool valid = mine < chunk_end_;
    const size_t v_row = size_t(mine) * LORAMUX_ROW_TILE + row_ % LORAMUX_ROW_TILE;
    copy_rows(stage, p_.v + v_row * LORAMUX_RANK_CHUNK + value, LORAMUX_RANK_CHUNK, valid);
    const size_t b_row = size_t(arena_chunk_) * out_features() + weight_row();
    copy_columns(stage, p_.site[site()].b + b_row * LORAMUX_RANK_CHUNK + value, LORAMUX_RANK_CHUNK,
                 valid && arena_chunk_ != no_chunk);
  }

  const GemmParams& p_;
  typename Shape::Storage& storage_;
  const ColumnTile tile_;
  // First row of the tile, rows of the step.
  uint32_t row_, rows_;
  uint64_t policy_;
  const uint32_t slice_;
  // What is filled next: K block or rank chunk.
  uint32_t block_, block_end_, chunk_, chunk_end_;
  // This thread's chunk of the next rank block; none where it is for the tile's other site.
  static constexpr uint32_t no_chunk = ~0u;
  uint32_t arena_chunk_ = no_chunk;
  uint32_t read_stage_ = 0;
  // What to wait for before V is read; 0 once that is there.
  const uint32_t* v_written_ = nullptr;
  uint32_t v_count_ = 0;
};

template <uint32_t count>
__device__ __forceinline__ void add_bias(Values<count>& to, const GemmSite& site, uint32_t column) {
  if (site.bias != nullptr) add(to, load<count>(site.bias + column));
}

// Writes the tile's outputs, `access` columns a thread at a time. `sums(row, column, to)` gives as many sums of the
// tile as `to` holds.
template <class Shape, uint32_t access, class Sums>
__device__ __forceinline__ void write_by(const GemmParams& p, const ColumnTile& tile, uint32_t first_row, uint32_t rows,
                                         Sums sums) {
  const uint32_t pieces = (is_paired(p) ? Shape::columns / 2 : Shape::columns) / access;
  const GemmSite& site = p.site[tile.site];
#pragma unroll 1
  for (uint32_t i = threadIdx.x; i < Shape::rows * pieces; i += Shape::threads) {
    const uint32_t row = i / pieces, of_tile = i % pieces * access;
    const uint32_t column = tile.first + of_tile;
    if (first_row + row >= rows || column >= site.out_features) continue;
    const size_t output = size_t(first_row + row) * p.y_stride + site.y_column + column;
    Values<access> value;
    if (is_paired(p)) {
      constexpr uint32_t half = Shape::columns_of_warp / 2;
      const uint32_t gate_column = of_tile / half * Shape::columns_of_warp + of_tile % half;
      Values<access> up;
      sums(row, gate_column, value);
      sums(row, gate_column + half, up);
      add_bias(value, p.site[0], column);
      add_bias(up, p.site[1], column);
#pragma unroll
      for (uint32_t j = 0; j < access; ++j) value.at[j] = silu(value.at[j]) * up.at[j];
    } else {
      sums(row, of_tile, value);
      add_bias(value, site, column);
      if (p.epilogue == LORAMUX_ADD_RESIDUAL) add(value, load<access>(p.residual + output));
    }
    if (p.epilogue == LORAMUX_STORE_FP32)
      store(static_cast<float*>(p.y) + output, value);
    else
      store(static_cast<element*>(p.y) + output, value);
  }
}

template <class Shape, class Sums>
__device__ __forceinline__ void write_outputs(const GemmParams& p, const ColumnTile& tile, uint32_t first_row,
                                              uint32_t rows, Sums sums) {
  if (p.access == 8)
    write_by<Shape, 8>(p, tile, first_row, rows, sums);
  else
    write_by<Shape, 1>(p, tile, first_row, rows, sums);
}

// This warp's corner of a tile of sums.
template <class Shape>
__device__ __forceinline__ float* warp_corner(float* tile, uint32_t stride) {
  const uint32_t warp = threadIdx.x / 32;
  return tile + warp / Shape::warp_columns * Shape::rows_of_warp * stride +
         warp % Shape::warp_columns * Shape::columns_of_warp;
}

// Outputs of sums that lie in shared memory, once all threads have left theirs there.
template <class Shape>
__device__ __forceinline__ void finish(const GemmParams& p, const ColumnTile& tile, uint32_t first_row, uint32_t rows,
                                       const typename Shape::Storage& storage) {
  __syncthreads();
  write_outputs<Shape>(p, tile, first_row, rows, [&]<uint32_t n>(uint32_t row, uint32_t column, Values<n>& to) {
    to = load<n>(storage.sums + row * Shape::sum_stride + column);
  });
}

// What becomes of the sums of a slice, where the slices of a tile are spread over thread blocks. Grid: (column tiles,
// K slices, row tiles).
//
// The slices' sums meet in global memory. The last block of a tile to arrive adds them in ascending order, as
// `gemm_rank_ext_sliced` does with those it has parked.
template <class Shape>
__device__ __forceinline__ void finish_slice(const GemmParams& p, const ColumnTile& tile, uint32_t first_row,
                                             uint32_t rows, const typename Shape::Sums& sums,
                                             typename Shape::Storage& storage) {
  if (p.slices == 1) {
    sums.store(warp_corner<Shape>(storage.sums, Shape::sum_stride), Shape::sum_stride);
    finish<Shape>(p, tile, first_row, rows, storage);
    return;
  }

  constexpr uint32_t tile_sums = Shape::rows * Shape::columns;
  const uint32_t place = blockIdx.z * gridDim.x + blockIdx.x;
  float* partials = p.partials + size_t(place) * p.slices * tile_sums;
  sums.store(warp_corner<Shape>(partials + blockIdx.y * tile_sums, Shape::columns), Shape::columns);
  __syncthreads();
  bool last = false;
  if (threadIdx.x == 0) {
    last = ptx::fetch_add_acquire_release(&p.arrived[place], 1) == p.slices - 1;
    if (last) p.arrived[place] = 0;
  }
  if (!__syncthreads_or(last)) return;
  const auto total = [&]<uint32_t n>(uint32_t row, uint32_t column, Values<n>& to) {
    to = {};
    for (uint32_t i = 0; i < p.slices; ++i)
      add(to, load<n>(partials + i * tile_sums + row * Shape::columns + column));
  };
  write_outputs<Shape>(p, tile, first_row, rows, total);
}

}  // inline namespace ELEMENT
