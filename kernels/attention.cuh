// Causal attention over the paged cache, tile by tile: what `attention` and `attention_split` have in common.
//
// For every (row, head) pair, over blocks of 64 keys in ascending order (online softmax, Milakov & Gimelshein 2018;
// tiles as in FlashAttention-2, Dao 2023):
//
//   S = q · Kᵀ                        m' = max(m, max S)         α = 2^((m − m') · scale)
//   P = 2^((S − m') · scale)          l = α·l + P · 1            O = α·O + P · V
//
// P is rounded to the element type for its products; l sums the rounded P, by the tensor cores too, as one more column of O.
//
// One result on every path. Blocks begin at multiples of 64 positions and splits at multiples of 512; a split begins
// from nothing, and splits are merged in ascending order by `Merge`. A block or split that a pair does not see changes
// nothing: α and both weights of a merge are then exactly 1 and 0, and P is 0. A maximum is the same in any order; an
// element of S or O is the same sequence of tensor core products in every layout of warps. So the bits of a pair
// depend on its own q, keys and values alone.
//
// Two layouts of four warps: each warp has 16 pairs of its own and all keys and columns, or all have the same 16 pairs
// and each every fourth 16 keys of S and every fourth 16 columns of O.
//
// Keys and values arrive alternately in a ring of tiles in shared memory. A row of a tile has a 16-byte piece more
// than it needs: an odd number, so that the eight rows of an 8x8 matrix lie in different banks.
#pragma once
#include <element.cuh>
#include <device.cuh>
#include <math.h>
#include <params.h>
#include <ptx.cuh>

inline namespace ELEMENT {

constexpr uint32_t key_block = LORAMUX_ATTENTION_KEYS;
constexpr uint32_t split_blocks = LORAMUX_ATTENTION_SPLIT / LORAMUX_ATTENTION_KEYS;
constexpr uint32_t block_pages = key_block / LORAMUX_PAGE;
// Tensor core steps along the keys of a block.
constexpr uint32_t key_steps = key_block / 16;

// `dim_`: head_dim up to the next multiple of 16 that there is a kernel for. `warp_rows_`: warps with pairs of their
// own, 1 or 4. `ring_`: tiles of keys and of values in shared memory.
template <uint32_t dim_, uint32_t warp_rows_, uint32_t ring_>
struct AttentionShape {
  static constexpr uint32_t dim = dim_, warp_rows = warp_rows_, ring = ring_;
  static constexpr uint32_t warp_columns = 4 / warp_rows;
  static constexpr uint32_t threads = LORAMUX_ATTENTION_THREADS;
  static constexpr uint32_t pairs = warp_rows * 16;
  static constexpr uint32_t dim_steps = dim / 16, pieces = dim / 8;
  // Blocks of 16 keys, and of 16 columns, of one warp.
  static constexpr uint32_t warp_keys = key_steps / warp_columns;
  static constexpr uint32_t warp_dims = (dim_steps + warp_columns - 1) / warp_columns;
  static_assert(warp_rows * warp_columns == 4 && dim % 16 == 0 && ring >= 2);

  template <uint32_t rows>
  struct alignas(16) Tile {
    element at[rows][dim + 8];

    __device__ __forceinline__ void* piece(uint32_t row, uint32_t piece) { return &at[row][piece * 8]; }
  };
};

// What one warp holds of the results of its 16 pairs: of the pairs g and g + 8 in lane 4g + q (see `mma_16x8x16`).
template <class Shape>
struct AttentionSums {
  float maximum[2];
  float weight[4];
  float at[Shape::warp_dims * 2][4];

  __device__ __forceinline__ void clear() {
    maximum[0] = maximum[1] = -INFINITY;
#pragma unroll
    for (uint32_t i = 0; i < 4; ++i) weight[i] = 0.0f;
#pragma unroll
    for (uint32_t d = 0; d < Shape::warp_dims * 2; ++d)
#pragma unroll
      for (uint32_t i = 0; i < 4; ++i) at[d][i] = 0.0f;
  }
};

// What warps that share pairs tell each other.
template <uint32_t warps>
struct AttentionExchange {
  float maximum[warps][16];
  // The fragments of P along the keys of a block, by lane.
  uint4 weights[key_steps][32];
};
template <>
struct alignas(16) AttentionExchange<1> {};

// What scores are taken relative to: the maximum, or anything finite where no key has been seen.
__device__ __forceinline__ float reference_of(float maximum) { return maximum == -INFINITY ? 0.0f : maximum; }

// 2^((from − to) · scale): what turns sums relative to `from` into sums relative to `to`.
__device__ __forceinline__ float factor_between(float from, float to, float scale) {
  return ptx::exp2(__fmul_rn(__fsub_rn(from, to), scale));
}

// Adds a split's result to those of the splits before it. Written with explicit roundings: one result in all kernels.
struct Merge {
  float maximum, keep, add;

  __device__ __forceinline__ Merge(float total, float part, float scale) : maximum(fmaxf(total, part)) {
    const float reference = reference_of(maximum);
    keep = factor_between(total, reference, scale);
    add = factor_between(part, reference, scale);
  }
  __device__ __forceinline__ float operator()(float total, float part) const {
    return __fmaf_rn(part, add, __fmul_rn(total, keep));
  }
};

// O / l. The zero turns −0 into 0: a block that a pair does not see may do the same earlier.
__device__ __forceinline__ float normalized(float sum, float inverse_weight) {
  return __fadd_rn(__fmul_rn(sum, inverse_weight), 0.0f);
}

// One tile of pairs on its way over the keys of one key head.
template <class Shape>
class Attention {
 public:
  using Sums = AttentionSums<Shape>;
  using QueryTile = typename Shape::template Tile<Shape::pairs>;
  using KeyTile = typename Shape::template Tile<key_block>;
  using Exchange = AttentionExchange<Shape::warp_columns>;

  __device__ __forceinline__ Attention(const AttentionParams& p, const AttentionTile& tile, uint32_t kv_head,
                                       KeyTile* ring, Exchange* exchange)
      : p_(p), tile_(tile), kv_head_(kv_head), ring_(ring), exchange_(exchange) {
    first_position_ = position(0);
    last_position_ = position(tile.pairs - 1);
    first_key_ = first_position_ < p.window ? 0 : first_position_ - p.window + 1;
    warp_ = threadIdx.x / 32;
    lane_ = threadIdx.x % 32;
#pragma unroll
    for (uint32_t half = 0; half < 2; ++half) position_[half] = position(min(pair(half), tile.pairs - 1));
  }

  // Blocks of keys that some pair of the tile sees.
  __device__ __forceinline__ uint32_t first_block() const { return first_key_ / key_block; }
  __device__ __forceinline__ uint32_t end_block() const { return last_position_ / key_block + 1; }

  // Starts to copy the first keys and values of the blocks `first .. end`, and takes the queries into registers.
  __device__ __forceinline__ void start(uint32_t first, uint32_t end, QueryTile& queries) {
    next_block_ = first;
    end_block_ = end;
    fill_place_ = read_place_ = 0;
    next_is_values_ = false;
    copy_queries(queries);
#pragma unroll
    for (uint32_t i = 0; i + 1 < Shape::ring; ++i) fill();
    // The queries are in the oldest group.
    ptx::copy_async_wait<Shape::ring - 2>();
    __syncthreads();
    const uint32_t row = warp_ / Shape::warp_columns * 16 + lane_ % 16;
#pragma unroll
    for (uint32_t d = 0; d < Shape::dim_steps; ++d)
      ptx::load_matrix_x4(query_[d], queries.piece(row, d * 2 + lane_ / 16));
  }

  // Takes in the next block of keys, which is number `block`.
  __device__ __forceinline__ void attend(uint32_t block, Sums& sums) {
    float scores[Shape::warp_keys * 2][4];
    multiply_queries(next_tile(), scores);
    if (!sees_all(block)) hide_unseen(block, scores);

    float maximum[2], reference[2];
    find_maximum(scores, maximum);
#pragma unroll
    for (uint32_t half = 0; half < 2; ++half) {
      maximum[half] = fmaxf(sums.maximum[half], maximum[half]);
      reference[half] = reference_of(maximum[half]);
      const float factor = factor_between(sums.maximum[half], reference[half], p_.scale);
      sums.maximum[half] = maximum[half];
#pragma unroll
      for (uint32_t i = half * 2; i < half * 2 + 2; ++i) {
        sums.weight[i] = __fmul_rn(sums.weight[i], factor);
#pragma unroll
        for (uint32_t d = 0; d < Shape::warp_dims * 2; ++d) sums.at[d][i] = __fmul_rn(sums.at[d][i], factor);
      }
    }

    uint32_t weights[Shape::warp_keys][4];
    find_weights(scores, reference, weights);
    KeyTile& values = next_tile();
#pragma unroll
    for (uint32_t step = 0; step < key_steps; ++step) {
      if constexpr (Shape::warp_columns == 1) {
        multiply_values(values, step, weights[step], sums);
      } else {
        const uint4 shared = exchange_->weights[step][lane_];
        const uint32_t fragment[4] = {shared.x, shared.y, shared.z, shared.w};
        multiply_values(values, step, fragment, sums);
      }
    }
  }

  // Calls `write(pair, half, column, low, high)` for every two neighbouring columns that this thread has of a pair;
  // `half` is which of its two pairs.
  template <class Write>
  __device__ __forceinline__ void for_each_result(const Sums& sums, Write write) const {
#pragma unroll
    for (uint32_t half = 0; half < 2; ++half) {
      if (pair(half) >= tile_.pairs) continue;
#pragma unroll
      for (uint32_t d = 0; d < Shape::warp_dims * 2; ++d) {
        const uint32_t column = (d / 2 * Shape::warp_columns + warp_ % Shape::warp_columns) * 16 + d % 2 * 8;
        if (column >= Shape::dim) continue;
        write(pair(half), half, column + lane_ % 4 * 2, sums.at[d][half * 2], sums.at[d][half * 2 + 1]);
      }
    }
  }

  // Writes the tile's outputs.
  __device__ __forceinline__ void finish(const Sums& sums) const {
    const float inverse[2] = {__frcp_rn(sums.weight[0]), __frcp_rn(sums.weight[2])};
    for_each_result(sums, [&](uint32_t pair, uint32_t half, uint32_t column, float low, float high) {
      store(pair, column, normalized(low, inverse[half]), normalized(high, inverse[half]));
    });
  }

  // Two neighbouring outputs of a pair.
  __device__ __forceinline__ void store(uint32_t pair, uint32_t column, float low, float high) const {
    if (column >= p_.head_dim) return;
    element* to = p_.y + size_t(row(pair)) * p_.y_stride + head(pair) * p_.head_dim + column;
    *reinterpret_cast<uint32_t*>(to) = ptx::pack(low, high);
  }

 private:
  // Row of the step, position and query head of a pair of the tile.
  __device__ __forceinline__ uint32_t row(uint32_t pair) const {
    return tile_.row + (tile_.first_pair + pair) / p_.group;
  }
  __device__ __forceinline__ uint32_t position(uint32_t pair) const {
    return tile_.position + (tile_.first_pair + pair) / p_.group;
  }
  __device__ __forceinline__ uint32_t head(uint32_t pair) const {
    return kv_head_ * p_.group + (tile_.first_pair + pair) % p_.group;
  }
  // This thread's two pairs.
  __device__ __forceinline__ uint32_t pair(uint32_t half) const {
    return warp_ / Shape::warp_columns * 16 + half * 8 + lane_ / 4;
  }

  // Vectors of head_dim values whose 16-byte pieces are aligned; others are copied value by value.
  __device__ __forceinline__ bool aligned() const { return p_.head_dim % 8 == 0; }

  // Starts to copy one piece of a vector: zeros from `head_dim` on, and all zeros where the vector is not `valid`.
  __device__ __forceinline__ void copy_piece(void* to, const element* vector, uint32_t piece, bool valid) const {
    if (aligned()) {
      ptx::copy_async_16(to, vector + piece * 8, valid && piece * 8 < p_.head_dim);
      return;
    }
#pragma unroll 1
    for (uint32_t d = 0; d < 8; ++d)
      static_cast<element*>(to)[d] = valid && piece * 8 + d < p_.head_dim ? vector[piece * 8 + d] : element{0};
  }

  __device__ __forceinline__ void copy_queries(QueryTile& queries) const {
#pragma unroll 1
    for (uint32_t i = threadIdx.x; i < Shape::pairs * Shape::pieces; i += Shape::threads) {
      const uint32_t pair = i / Shape::pieces, piece = i % Shape::pieces;
      const element* from = p_.q + size_t(row(pair)) * p_.q_stride + head(pair) * p_.head_dim;
      copy_piece(queries.piece(pair, piece), from, piece, pair < tile_.pairs);
    }
  }

  // Starts to copy the next tile of the ring, if there is one: keys of a block, then its values. Keys that no pair
  // sees are zeros; neither they nor their page numbers are read.
  __device__ __forceinline__ void fill() {
    if (next_block_ < end_block_) {
      KeyTile& to = ring_[fill_place_];
      const element* cache = next_is_values_ ? p_.values : p_.keys;
      if (!next_is_values_) find_pages();
#pragma unroll
      for (uint32_t page = 0; page < block_pages; ++page) {
        const element* vectors =
            cache + (size_t(pages_[page]) * p_.kv_heads + kv_head_) * LORAMUX_PAGE * p_.head_dim;
#pragma unroll
        for (uint32_t i = threadIdx.x; i < LORAMUX_PAGE * Shape::pieces; i += Shape::threads) {
          const uint32_t slot = i / Shape::pieces, piece = i % Shape::pieces, row = page * LORAMUX_PAGE + slot;
          const uint32_t key = next_block_ * key_block + row;
          const bool valid = key >= first_key_ && key <= last_position_;
          copy_piece(to.piece(row, piece), vectors + slot * p_.head_dim, piece, valid);
        }
      }
      if (next_is_values_) ++next_block_;
      next_is_values_ = !next_is_values_;
    }
    fill_place_ = fill_place_ + 1 == Shape::ring ? 0 : fill_place_ + 1;
    ptx::copy_async_commit();
  }

  __device__ __forceinline__ void find_pages() {
    const uint32_t first = first_key_ / LORAMUX_PAGE, last = last_position_ / LORAMUX_PAGE;
#pragma unroll
    for (uint32_t i = 0; i < block_pages; ++i) {
      const uint32_t page = next_block_ * block_pages + i;
      pages_[i] = page >= first && page <= last ? p_.pages[tile_.page + page] : 0;
    }
  }

  // Waits for the oldest tile of the ring, starts to fill the one that was read before it, and returns the oldest.
  __device__ __forceinline__ KeyTile& next_tile() {
    ptx::copy_async_wait<Shape::ring - 2>();
    __syncthreads();
    fill();
    KeyTile& ready = ring_[read_place_];
    read_place_ = read_place_ + 1 == Shape::ring ? 0 : read_place_ + 1;
    return ready;
  }

  // First of the 16 keys that this warp's scores 2i and 2i + 1 belong to, in the block.
  __device__ __forceinline__ uint32_t first_of_keys(uint32_t i) const {
    return (i * Shape::warp_columns + warp_ % Shape::warp_columns) * 16;
  }

  __device__ __forceinline__ void multiply_queries(KeyTile& keys, float (&scores)[Shape::warp_keys * 2][4]) const {
#pragma unroll
    for (uint32_t k = 0; k < Shape::warp_keys * 2; ++k)
#pragma unroll
      for (uint32_t i = 0; i < 4; ++i) scores[k][i] = 0.0f;
#pragma unroll
    for (uint32_t d = 0; d < Shape::dim_steps; ++d)
#pragma unroll
      for (uint32_t k = 0; k < Shape::warp_keys; ++k) {
        uint32_t b[4];
        const uint32_t row = first_of_keys(k) + lane_ / 16 * 8 + lane_ % 8;
        ptx::load_matrix_x4(b, keys.piece(row, d * 2 + lane_ / 8 % 2));
        ptx::mma_16x8x16(scores[k * 2], query_[d], b[0], b[1]);
        ptx::mma_16x8x16(scores[k * 2 + 1], query_[d], b[2], b[3]);
      }
  }

  // Whether every pair of the tile sees every key of a block.
  __device__ __forceinline__ bool sees_all(uint32_t block) const {
    return (block + 1) * key_block <= first_position_ + 1 && last_position_ - block * key_block < p_.window;
  }

  __device__ __forceinline__ void hide_unseen(uint32_t block, float (&scores)[Shape::warp_keys * 2][4]) const {
#pragma unroll
    for (uint32_t k = 0; k < Shape::warp_keys * 2; ++k)
#pragma unroll
      for (uint32_t i = 0; i < 4; ++i) {
        const uint32_t key = block * key_block + first_of_keys(k / 2) + k % 2 * 8 + lane_ % 4 * 2 + i % 2;
        // A key after the row wraps around, beyond any window.
        if (position_[i / 2] - key >= p_.window) scores[k][i] = -INFINITY;
      }
  }

  // The largest score of each of this thread's pairs over the whole block.
  __device__ __forceinline__ void find_maximum(const float (&scores)[Shape::warp_keys * 2][4], float (&maximum)[2]) {
#pragma unroll
    for (uint32_t half = 0; half < 2; ++half) {
      float most = -INFINITY;
#pragma unroll
      for (uint32_t k = 0; k < Shape::warp_keys * 2; ++k)
        most = fmaxf(most, fmaxf(scores[k][half * 2], scores[k][half * 2 + 1]));
      most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
      maximum[half] = fmaxf(most, __shfl_xor_sync(~0u, most, 2));
    }
    if constexpr (Shape::warp_columns > 1) {
      if (lane_ % 4 == 0) {
        exchange_->maximum[warp_][lane_ / 4] = maximum[0];
        exchange_->maximum[warp_][lane_ / 4 + 8] = maximum[1];
      }
      __syncthreads();
#pragma unroll
      for (uint32_t warp = 0; warp < Shape::warp_columns; ++warp)
#pragma unroll
        for (uint32_t half = 0; half < 2; ++half)
          maximum[half] = fmaxf(maximum[half], exchange_->maximum[warp][lane_ / 4 + half * 8]);
    }
  }

  // P, as the first operands of its products. Where warps share pairs it is left for all of them, and is there after
  // the next barrier: that of `next_tile`.
  __device__ __forceinline__ void find_weights(const float (&scores)[Shape::warp_keys * 2][4],
                                               const float (&reference)[2],
                                               uint32_t (&weights)[Shape::warp_keys][4]) {
    const float offset[2] = {__fmul_rn(-reference[0], p_.scale), __fmul_rn(-reference[1], p_.scale)};
#pragma unroll
    for (uint32_t k = 0; k < Shape::warp_keys; ++k) {
#pragma unroll
      for (uint32_t i = 0; i < 4; ++i) {
        const float* pair = &scores[k * 2 + i / 2][i % 2 * 2];
        weights[k][i] = ptx::pack(ptx::exp2(__fmaf_rn(pair[0], p_.scale, offset[i % 2])),
                                       ptx::exp2(__fmaf_rn(pair[1], p_.scale, offset[i % 2])));
      }
      if constexpr (Shape::warp_columns > 1)
        exchange_->weights[first_of_keys(k) / 16][lane_] =
            make_uint4(weights[k][0], weights[k][1], weights[k][2], weights[k][3]);
    }
  }

  // Adds P · V and P · 1 over 16 keys.
  __device__ __forceinline__ void multiply_values(KeyTile& values, uint32_t step, const uint32_t (&weights)[4],
                                                  Sums& sums) const {
    ptx::mma_16x8x16(sums.weight, weights, pair_of_ones, pair_of_ones);
#pragma unroll
    for (uint32_t d = 0; d < Shape::warp_dims; ++d) {
      const uint32_t column = d * Shape::warp_columns + warp_ % Shape::warp_columns;
      if (column >= Shape::dim_steps) continue;
      uint32_t b[4];
      ptx::load_matrix_x4_transposed(b, values.piece(step * 16 + lane_ % 16, column * 2 + lane_ / 16));
      ptx::mma_16x8x16(sums.at[d * 2], weights, b[0], b[1]);
      ptx::mma_16x8x16(sums.at[d * 2 + 1], weights, b[2], b[3]);
    }
  }

  const AttentionParams& p_;
  const AttentionTile tile_;
  const uint32_t kv_head_;
  KeyTile* const ring_;
  Exchange* const exchange_;
  // Of the tile: positions of its first and last row, and the first key that one of them sees.
  uint32_t first_position_, last_position_, first_key_;
  uint32_t warp_, lane_;
  // Of this thread's pairs.
  uint32_t position_[2];
  uint32_t query_[Shape::dim_steps][4];
  // What is copied next, where to, and the pages of its block; what is read next.
  uint32_t next_block_, end_block_, fill_place_, read_place_;
  uint32_t pages_[block_pages];
  bool next_is_values_;
};

}  // inline namespace ELEMENT
