// Tiles of a product: operands in shared memory, sums in registers.
//
// An operand tile holds `rows` rows of 64 values along K, 128 bytes each. Its 16-byte pieces are swizzled, piece c of
// row r at place c ^ (r mod 8): the eight rows of one 8x8 matrix lie in different banks, and so do the eight pieces
// of a row, so neither `ldmatrix` nor the copies that fill the tile meet a bank conflict.
#pragma once
#include <params.h>
#include <ptx.cuh>

inline namespace ELEMENT {

// 16-byte pieces of a row of K block: eight values each.
constexpr uint32_t piece_values = 8;
constexpr uint32_t block_pieces = LORAMUX_K_BLOCK / piece_values;
// Tensor core steps of a K block; a rank chunk is one step.
constexpr uint32_t block_steps = LORAMUX_K_BLOCK / LORAMUX_RANK_CHUNK;

// Where piece `piece` of row `row` lies in its row.
__host__ __device__ constexpr uint32_t swizzled(uint32_t row, uint32_t piece) { return piece ^ (row % 8); }

// Whether eight rows' pieces of the same number lie in eight different bank groups, and a row's pieces in eight places.
constexpr bool swizzle_is_free_of_conflicts() {
  for (uint32_t i = 0; i < 8; ++i) {
    uint32_t of_piece = 0, of_row = 0;
    for (uint32_t j = 0; j < 8; ++j) {
      of_piece |= 1u << swizzled(j, i);
      of_row |= 1u << swizzled(i, j);
    }
    if (of_piece != 0xff || of_row != 0xff) return false;
  }
  return true;
}
static_assert(swizzle_is_free_of_conflicts());

template <uint32_t rows>
struct alignas(1024) OperandTile {
  unsigned char bytes[rows * LORAMUX_K_BLOCK * 2];

  __device__ __forceinline__ void* piece(uint32_t row, uint32_t piece) {
    return bytes + row * (LORAMUX_K_BLOCK * 2) + swizzled(row, piece) * 16;
  }
};

// A warp's sums: `row_blocks` x `column_blocks` blocks of 16x8.
template <uint32_t row_blocks, uint32_t column_blocks>
struct WarpSums {
  static_assert(column_blocks % 2 == 0, "one ldmatrix brings the columns of two blocks");
  float at[row_blocks][column_blocks][4];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (uint32_t r = 0; r < row_blocks; ++r)
#pragma unroll
      for (uint32_t c = 0; c < column_blocks; ++c)
#pragma unroll
        for (uint32_t i = 0; i < 4; ++i) at[r][c][i] = 0.0f;
  }

  // Quads of sums of a thread.
  static constexpr uint32_t quads = row_blocks * column_blocks;

  // Leaves this thread's sums in memory that only it looks at: quad q of thread t at `quad_of_thread[q · threads]`.
  __device__ __forceinline__ void park(float4* quad_of_thread, uint32_t threads) const {
#pragma unroll
    for (uint32_t r = 0; r < row_blocks; ++r)
#pragma unroll
      for (uint32_t c = 0; c < column_blocks; ++c)
        quad_of_thread[(r * column_blocks + c) * threads] =
            make_float4(at[r][c][0], at[r][c][1], at[r][c][2], at[r][c][3]);
  }

  // Adds X · Wᵀ over 16 values of K: rows from `row` of `x`, columns from `column` of `w`, step `step` of the block.
  template <uint32_t x_rows, uint32_t w_rows>
  __device__ __forceinline__ void multiply(OperandTile<x_rows>& x, uint32_t row, OperandTile<w_rows>& w,
                                           uint32_t column, uint32_t step) {
    const uint32_t lane = threadIdx.x % 32;
    uint32_t a[row_blocks][4];
#pragma unroll
    for (uint32_t r = 0; r < row_blocks; ++r)
      ptx::load_matrix_x4(a[r], x.piece(row + r * 16 + lane % 16, step * 2 + lane / 16));
#pragma unroll
    for (uint32_t c = 0; c < column_blocks; c += 2) {
      uint32_t b[4];
      ptx::load_matrix_x4(b, w.piece(column + c * 8 + lane / 16 * 8 + lane % 8, step * 2 + lane / 8 % 2));
#pragma unroll
      for (uint32_t r = 0; r < row_blocks; ++r) {
        ptx::mma_16x8x16(at[r][c], a[r], b[0], b[1]);
        ptx::mma_16x8x16(at[r][c + 1], a[r], b[2], b[3]);
      }
    }
  }

  // Leaves the sums in a row-major tile of `stride` floats a row, this warp's first sum at `tile`.
  __device__ __forceinline__ void store(float* tile, uint32_t stride) const {
#pragma unroll
    for (uint32_t r = 0; r < row_blocks; ++r)
#pragma unroll
      for (uint32_t c = 0; c < column_blocks; ++c)
        store_quad(tile, stride, r, c, make_float4(at[r][c][0], at[r][c][1], at[r][c][2], at[r][c][3]));
  }

  // Likewise the sum of `count` parked sums, added in order.
  static __device__ __forceinline__ void store_parked(float* tile, uint32_t stride, const float4* quad_of_thread,
                                                      uint32_t threads, uint32_t count) {
#pragma unroll 1
    for (uint32_t quad = 0; quad < quads; ++quad) {
      float4 total = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      for (uint32_t i = 0; i < count; ++i) {
        const float4 parked = quad_of_thread[(i * quads + quad) * threads];
        total = make_float4(total.x + parked.x, total.y + parked.y, total.z + parked.z, total.w + parked.w);
      }
      store_quad(tile, stride, quad / column_blocks, quad % column_blocks, total);
    }
  }

 private:
  static __device__ __forceinline__ void store_quad(float* tile, uint32_t stride, uint32_t r, uint32_t c, float4 quad) {
    float* to = tile + (r * 16 + threadIdx.x % 32 / 4) * stride + c * 8 + threadIdx.x % 4 * 2;
    *reinterpret_cast<float2*>(to) = make_float2(quad.x, quad.y);
    *reinterpret_cast<float2*>(to + 8 * stride) = make_float2(quad.z, quad.w);
  }
};

}  // inline namespace ELEMENT
