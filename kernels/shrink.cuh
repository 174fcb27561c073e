// V = gate · scale · (X · Aᵀ) for rank chunks in use: what `shrink_gate` and the decode products have in common.
//
// A thread block takes some rows of a row tile and some chunks of the tile's list. Four warps share a K block, one tensor
// core step each, so even a single chunk has short chains of sums. K is cut into slices, as for the products, but by its
// length alone: a slice's sums are added as ((s0 + s1) + s2) + s3, slices in ascending order. An element of V depends on
// its row, its chunk and nothing else.
//
// Where few rows are split over K, each slice is computed by whichever thread block takes it, and the last one to arrive
// adds them up. Otherwise a thread block has all slices.
//
// Chunks that no row of the thread block uses are not multiplied; their V is zero.
#pragma once
#include <device.cuh>
#include <tile.cuh>
#include <values.cuh>

#include <type_traits>

inline namespace ELEMENT {

// `row_groups` x 4 warps; a thread block has `row_groups · row_blocks · 16` rows and `chunks` rank chunks at a time,
// and stages of `blocks` K blocks. `split`: it has one slice of K, else all of them.
template <uint32_t row_groups_, uint32_t row_blocks_, uint32_t chunks_, uint32_t blocks_, uint32_t stages_, bool split_>
struct ShrinkShape {
  static constexpr bool split = split_;
  static constexpr uint32_t row_groups = row_groups_, row_blocks = row_blocks_, chunks = chunks_;
  static constexpr uint32_t blocks = blocks_, stages = stages_;
  static constexpr uint32_t threads = row_groups * block_steps * 32;
  static constexpr uint32_t rows = row_groups * row_blocks * 16, ranks = chunks * LORAMUX_RANK_CHUNK;
  // Rows of a tile that all threads together copy at a time, a piece each.
  static constexpr uint32_t copied_rows = threads / block_pieces;
  static_assert(rows % copied_rows == 0 && ranks % copied_rows == 0 && LORAMUX_ROW_TILE % rows == 0);
  static constexpr uint32_t sum_stride = ranks + 8;

  using Sums = WarpSums<row_blocks, chunks * 2>;
  struct Block {
    OperandTile<rows> x;
    OperandTile<ranks> a;
  };
  struct OneSlice {
    union {
      Block stage[stages][blocks];
      float sums[block_steps][rows][sum_stride];
    };
  };
  struct AllSlices : OneSlice {
    float totals[rows][sum_stride];
  };
  // All of a thread block's shared memory.
  using Storage = std::conditional_t<split, OneSlice, AllSlices>;
};

template <class Shape>
class Shrink {
 public:
  // For the rows from `first_row` on, of `rows` in the step.
  __device__ __forceinline__ Shrink(const ShrinkGateParams& p, typename Shape::Storage& storage, uint32_t first_row,
                                    uint32_t rows)
      : p_(p), storage_(storage), rows_(rows), first_row_(first_row) {}

  // The chunks `first ..` of the list, at most `Shape::chunks` of them and none from `end` on; where K is split, its
  // slice `slice`. Returns whether this thread block has written their V: no other will. The barrier of the first
  // question keeps the sums of the chunks before until every thread has read them.
  __device__ __forceinline__ bool run(uint32_t first, uint32_t end, uint32_t slice) {
    if (!any_row_uses(first, end)) {
      if (slice == 0) write(first, end, [](uint32_t, uint32_t) { return Values<8>{}; });
      return slice == 0;
    }
    if constexpr (Shape::split) {
      return run_slice(first, end, slice);
    } else {
      run_all_slices(first, end);
      return true;
    }
  }

 private:
  __device__ __forceinline__ void run_all_slices(uint32_t first, uint32_t end) {
    for (uint32_t slice = 0; slice < p_.slices; ++slice) {
      multiply(first, end, slice);
      for_pieces(first, end, [&](uint32_t row, uint32_t column) {
        Values<8> total = {};
        if (slice > 0) total = load<8>(&storage_.totals[row][column]);
        add(total, slice_sums(row, column));
        store(&storage_.totals[row][column], total);
      });
      // The next slice's stages lie where this one's sums are being read.
      __syncthreads();
    }
    write(first, end, [&](uint32_t row, uint32_t column) { return load<8>(&storage_.totals[row][column]); });
  }

  // One chunk at a time, so the partial sums of all its slices are [slices][LORAMUX_ROW_TILE][16].
  __device__ __forceinline__ bool run_slice(uint32_t first, uint32_t end, uint32_t slice) {
    static_assert(!Shape::split || Shape::chunks == 1);
    multiply(first, end, slice);
    if (p_.slices == 1) {
      write(first, end, [&](uint32_t row, uint32_t column) { return slice_sums(row, column); });
      return true;
    }
    const auto partial = [&](uint32_t of_slice, uint32_t row, uint32_t column) {
      const size_t v_row = (size_t(first) * p_.slices + of_slice) * LORAMUX_ROW_TILE + row_in_tile(row);
      return p_.partials + v_row * LORAMUX_RANK_CHUNK + column;
    };
    for_pieces(first, end, [&](uint32_t row, uint32_t column) {
      store(partial(slice, row, column), slice_sums(row, column));
    });
    __syncthreads();
    bool last = false;
    if (threadIdx.x == 0) {
      uint32_t& arrived = p_.arrived[(size_t(first) * LORAMUX_ROW_TILE + row_in_tile(0)) / Shape::rows];
      last = ptx::fetch_add_acquire_release(&arrived, 1) == p_.slices - 1;
      if (last) arrived = 0;
    }
    if (!__syncthreads_or(last)) return false;
    write(first, end, [&](uint32_t row, uint32_t column) {
      Values<8> total = {};
      for (uint32_t i = 0; i < p_.slices; ++i) add(total, load<8>(partial(i, row, column)));
      return total;
    });
    return true;
  }

  // Gate times scale of a row for a chunk.
  __device__ __forceinline__ float factor(uint32_t row, uint32_t chunk) const {
    const RankChunk& c = p_.chunks[chunk];
    return p_.gates[size_t(c.entry) * LORAMUX_ROW_TILE + row_in_tile(row)] * c.scale;
  }

  __device__ __forceinline__ uint32_t row_in_tile(uint32_t row) const { return first_row_ % LORAMUX_ROW_TILE + row; }

  __device__ __forceinline__ bool any_row_uses(uint32_t first, uint32_t end) const {
    bool used = false;
    for (uint32_t i = threadIdx.x; i < Shape::rows * Shape::chunks; i += Shape::threads) {
      const uint32_t row = i % Shape::rows, chunk = first + i / Shape::rows;
      if (chunk < end && first_row_ + row < rows_) used |= factor(row, chunk) != 0.0f;
    }
    return __syncthreads_or(used);
  }

  // Leaves each warp's sums over one slice in shared memory.
  __device__ __forceinline__ void multiply(uint32_t first, uint32_t end, uint32_t slice) {
    const uint32_t warp = threadIdx.x / 32, step = warp % block_steps, row = warp / block_steps * Shape::row_blocks * 16;
    const uint32_t blocks = (p_.in_features + LORAMUX_K_BLOCK - 1) / LORAMUX_K_BLOCK;
    block_ = slice * blocks / p_.slices;
    block_end_ = (slice + 1) * blocks / p_.slices;
    const uint32_t stages = (block_end_ - block_ + Shape::blocks - 1) / Shape::blocks;
    find_ranks(first, end);
    typename Shape::Sums sums;
    sums.clear();
#pragma unroll 1
    for (uint32_t i = 0; i + 1 < Shape::stages; ++i) fill(i);
#pragma unroll 1
    for (uint32_t i = 0; i < stages; ++i) {
      ptx::copy_async_wait<Shape::stages - 2>();
      __syncthreads();
      fill((i + Shape::stages - 1) % Shape::stages);
#pragma unroll
      for (uint32_t b = 0; b < Shape::blocks; ++b) {
        typename Shape::Block& block = storage_.stage[i % Shape::stages][b];
        sums.multiply(block.x, row, block.a, 0, step);
      }
    }
    ptx::copy_async_wait<0>();
    __syncthreads();
    sums.store(&storage_.sums[step][row][0], Shape::sum_stride);
    __syncthreads();
  }

  // Where in the arenas the ranks lie whose pieces this thread copies.
  __device__ __forceinline__ void find_ranks(uint32_t first, uint32_t end) {
#pragma unroll
    for (uint32_t i = 0; i < rank_passes; ++i) {
      const uint32_t rank = threadIdx.x / block_pieces + i * Shape::copied_rows;
      const uint32_t chunk = first + rank / LORAMUX_RANK_CHUNK;
      ranks_[i] = nullptr;
      if (chunk >= end) continue;
      const RankChunk& c = p_.chunks[chunk];
      const size_t row = size_t(c.chunk) * LORAMUX_RANK_CHUNK + rank % LORAMUX_RANK_CHUNK;
      ranks_[i] = p_.a[c.site] + row * p_.in_features;
    }
  }

  // Starts to copy the slice's next K blocks into a stage; past its end only the group is closed.
  __device__ __forceinline__ void fill(uint32_t place) {
    const uint32_t piece = threadIdx.x % block_pieces;
#pragma unroll
    for (uint32_t b = 0; b < Shape::blocks; ++b) {
      typename Shape::Block& block = storage_.stage[place][b];
      const uint32_t k = (block_ + b) * LORAMUX_K_BLOCK + piece * piece_values;
      const bool inside = block_ + b < block_end_ && k < p_.in_features;
#pragma unroll
      for (uint32_t i = 0; i < Shape::rows / Shape::copied_rows; ++i) {
        const uint32_t row = threadIdx.x / block_pieces + i * Shape::copied_rows;
        const element* from = p_.x + size_t(first_row_ + row) * p_.x_stride + k;
        ptx::copy_async_16(block.x.piece(row, piece), from, inside && first_row_ + row < rows_);
      }
#pragma unroll
      for (uint32_t i = 0; i < rank_passes; ++i) {
        const uint32_t rank = threadIdx.x / block_pieces + i * Shape::copied_rows;
        ptx::copy_async_16(block.a.piece(rank, piece), ranks_[i] + k, inside && ranks_[i] != nullptr);
      }
    }
    ptx::copy_async_commit();
    block_ += Shape::blocks;
  }

  // Eight sums of a slice.
  __device__ __forceinline__ Values<8> slice_sums(uint32_t row, uint32_t column) const {
    Values<8> sums = load<8>(&storage_.sums[0][row][column]);
#pragma unroll
    for (uint32_t step = 1; step < block_steps; ++step) add(sums, load<8>(&storage_.sums[step][row][column]));
    return sums;
  }

  // Visits the rows and the columns (eight ranks each) that are this thread's, the same in every call.
  template <class Visit>
  __device__ __forceinline__ void for_pieces(uint32_t first, uint32_t end, Visit visit) const {
    constexpr uint32_t pieces = LORAMUX_RANK_CHUNK / piece_values;
    for (uint32_t i = threadIdx.x; i < Shape::rows * Shape::chunks * pieces; i += Shape::threads) {
      const uint32_t row = i / pieces % Shape::rows, chunk = i / pieces / Shape::rows;
      if (first + chunk < end && first_row_ + row < rows_)
        visit(row, chunk * LORAMUX_RANK_CHUNK + i % pieces * piece_values);
    }
  }

  // Writes V: factor times `sums(row, column)` where the row uses the chunk, else zero, whatever the row holds.
  template <class Sums>
  __device__ __forceinline__ void write(uint32_t first, uint32_t end, Sums sums) const {
    for_pieces(first, end, [&](uint32_t row, uint32_t column) {
      const uint32_t chunk = first + column / LORAMUX_RANK_CHUNK;
      const float f = factor(row, chunk);
      Values<8> value = {};
      if (f != 0.0f) {
        value = sums(row, column);
#pragma unroll
        for (uint32_t i = 0; i < 8; ++i) value.at[i] *= f;
      }
      const size_t v_row = size_t(chunk) * LORAMUX_ROW_TILE + row_in_tile(row);
      store(p_.v + v_row * LORAMUX_RANK_CHUNK + column % LORAMUX_RANK_CHUNK, value);
    });
  }

  static constexpr uint32_t rank_passes = Shape::ranks / Shape::copied_rows;
  const ShrinkGateParams& p_;
  typename Shape::Storage& storage_;
  uint32_t rows_, first_row_;
  // K block that is filled next, and the end of the slice.
  uint32_t block_, block_end_;
  const element* ranks_[rank_passes];
};

}  // inline namespace ELEMENT
