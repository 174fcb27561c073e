// What kernels and host share: sizes, and one struct per kernel, passed by value.
//
// `scripts/generate-bindings.sh` turns this file into `src/backend/cuda/params.rs`. A field is either a number or a
// device address, so a struct has the same bytes on both sides.
#pragma once
#include <stddef.h>
#include <stdint.h>

#if defined(__cplusplus) && !defined(LORAMUX_BINDGEN)
#include <element_type.h>
#define DEVICE(type) type*
#else
// Rust sees addresses as numbers: they are no pointers there.
#define DEVICE(type) uint64_t
#endif

#if defined(ELEMENT)
inline namespace ELEMENT {
#endif

// Ranks of a rank chunk: the tensor core's K step.
#define LORAMUX_RANK_CHUNK 16
// Rows that share a chunk list, and rows of a v block.
#define LORAMUX_ROW_TILE 128
// Most sites of a group (q, k, v).
#define LORAMUX_MAX_SITES 4
// Most K slices of a site group.
#define LORAMUX_MAX_SLICES 8
// Most K slices of V.
#define LORAMUX_MAX_SHRINK_SLICES 8
// K is cut into slices between blocks of this many elements.
#define LORAMUX_K_BLOCK 64

// Launch geometry of the kernels whose names begin so. The kernels assert that it is theirs.
#define LORAMUX_CHUNK_LISTS_THREADS 256
// `shrink_gate_16`, for few rows: rows and rank chunks of a thread block.
#define LORAMUX_SHRINK_GATE_16_ROWS 16
#define LORAMUX_SHRINK_GATE_16_CHUNKS 1
#define LORAMUX_SHRINK_GATE_16_THREADS 128
#define LORAMUX_SHRINK_GATE_16_SHARED_BYTES 98304
// `shrink_gate_64`, for many rows.
#define LORAMUX_SHRINK_GATE_64_ROWS 64
#define LORAMUX_SHRINK_GATE_64_CHUNKS 4
#define LORAMUX_SHRINK_GATE_64_THREADS 256
#define LORAMUX_SHRINK_GATE_64_SHARED_BYTES 92160
// `gemm_rank_ext_*`: tiles of LORAMUX_ROW_TILE rows.
#define LORAMUX_GEMM_RANK_EXT_COLUMNS 128
#define LORAMUX_GEMM_RANK_EXT_THREADS 256
#define LORAMUX_GEMM_RANK_EXT_SHARED_BYTES 98304
// `gemm_decode_*`, for at most 16, 32 or 64 rows.
#define LORAMUX_GEMM_DECODE_COLUMNS 64
#define LORAMUX_GEMM_DECODE_THREADS 128
#define LORAMUX_GEMM_DECODE_16_SHARED_BYTES 82944
#define LORAMUX_GEMM_DECODE_32_SHARED_BYTES 99328
#define LORAMUX_GEMM_DECODE_64_SHARED_BYTES 99328

// A rank chunk in use by a row tile. Its index in the chunk list is also its v block: where `shrink_gate` leaves and
// the products find V[row] = gate · scale · (x · A_chunkᵀ).
struct RankChunk {
  // Chunk of the site's arenas: A is [chunk][16][in], B is [chunk][out][16].
  uint32_t chunk;
  // Row of the gates [entry][LORAMUX_ROW_TILE]: which expert of the tile this chunk belongs to.
  uint32_t entry;
  // Site of the group.
  uint32_t site;
  // The adapter's scale: alpha / r, or alpha / √r.
  float scale;
};

// What a site knows of the expert in a slot. Its chunk ids are `chunk_ids[slot · chunks_per_slot + j]`, j < count.
struct SlotChunks {
  // Rank chunks of this expert at this site; 0 where the site is no target or the slot is empty.
  uint32_t count;
  // Chunk j extends K slice (phase + j) mod slices. A property of the adapter's content, so that neither its slot
  // nor its neighbours decide in which order a row is summed.
  uint32_t phase;
  float scale;
  uint32_t reserved;
  // What the expert changes besides: with gate g, the frozen product is multiplied by 1 + g · (column_scale − 1)
  // (DoRA), and g · bias is added. [out_features], or null.
  DEVICE(const float) column_scale;
  DEVICE(const float) bias;
};

// Where one site's chunks are looked up.
struct ChunkListSite {
  // [slots]
  DEVICE(const struct SlotChunks) slots;
  // [slots][chunks_per_slot]
  DEVICE(const uint32_t) chunk_ids;
  uint64_t chunks_per_slot;
};

// A site group's chunk list: what to build it from and where to.
//
// A cell is (row tile, K slice, site), in this order; `starts[cell] .. starts[cell + 1]` are its chunks.
struct ChunkListGroup {
  struct ChunkListSite site[LORAMUX_MAX_SITES];
  // [tiles · sites · slices + 1]
  DEVICE(uint32_t) starts;
  // [tiles · tile_capacity]
  DEVICE(struct RankChunk) chunks;
  uint32_t sites;
  uint32_t slices;
  // Most chunks of a row tile.
  uint32_t tile_capacity;
  uint32_t reserved;
};

// `chunk_lists`: one thread block per site group.
struct ChunkListParams {
  // [groups]
  DEVICE(const struct ChunkListGroup) groups;
  // [1]: rows of this step; on the device, so that one graph serves every step of its capacity.
  DEVICE(const uint32_t) rows;
  // [tiles + 1]: tile t uses the experts of entries `tile_entries[t] .. tile_entries[t + 1]`.
  DEVICE(const uint32_t) tile_entries;
  // [entries]: slots. A tile's entries ascend by the experts' order, the same in every step.
  DEVICE(const uint32_t) entry_slots;
  // [1]: set to 1 when a tile had more chunks than it may have; they are cut off, never overrun.
  DEVICE(uint32_t) overflow;
};

// `shrink_gate_*`: V = gate · scale · (X · Aᵀ) for every chunk of a site group's list.
struct ShrinkGateParams {
  // [rows][x_stride], in_features used.
  DEVICE(const struct element) x;
  // [v blocks][LORAMUX_ROW_TILE][16]
  DEVICE(struct element) v;
  // [entries][LORAMUX_ROW_TILE]: 0 for rows that do not use the expert.
  DEVICE(const float) gates;
  DEVICE(const struct RankChunk) chunks;
  DEVICE(const uint32_t) starts;
  // Arenas [chunk][16][in_features] of the group's sites.
  DEVICE(const struct element) a[LORAMUX_MAX_SITES];
  // [1]: rows of this step.
  DEVICE(const uint32_t) rows;
  // With more than one slice, for `shrink_gate_16` and `gemm_decode_*`: partial sums
  // [v blocks][slices][LORAMUX_ROW_TILE][16].
  DEVICE(float) partials;
  // Likewise [v blocks][LORAMUX_ROW_TILE / 16]: slices that have arrived; zero before and after every launch.
  DEVICE(uint32_t) arrived;
  uint32_t in_features;
  uint32_t x_stride;
  // K slices of V: not those of the products.
  uint32_t slices;
  // Cells of a row tile in the chunk list: the products' slices · sites.
  uint32_t cells;
};

// One linear layer of a group.
struct GemmSite {
  // [out_features][in_features]
  DEVICE(const struct element) weight;
  // [out_features], or null.
  DEVICE(const float) bias;
  // Arena [chunk][out_features][16].
  DEVICE(const struct element) b;
  // [slots]
  DEVICE(const struct SlotChunks) slots;
  uint32_t out_features;
  // Where the site's outputs start in a row of y.
  uint32_t y_column;
};

// What becomes of a tile of sums.
enum Epilogue {
  // y = sum + bias
  LORAMUX_STORE = 0,
  // y = residual + sum + bias
  LORAMUX_ADD_RESIDUAL = 1,
  // y = silu(site 0) ⊙ site 1, each with its bias
  LORAMUX_SWIGLU = 2,
  // y = sum + bias in fp32, not rounded
  LORAMUX_STORE_FP32 = 3,
};

// `gemm_rank_ext_*`, and most of `gemm_decode_*`: Y = X · Wᵀ + bias + Σ_chunks V · Bᵀ, all sites of a group.
//
// The sum of one output is defined by the group alone: K is cut into `slices` runs of K blocks; a slice is summed in
// fp32 over ascending k, from zero, then changed column by column where experts do that (their biases in slice 0), then
// summed over its rank chunks in list order; slices are added in ascending order; bias and residual come last; the
// result is rounded to the element type once, or not at all. All kernels keep to it, so a row's bits depend neither on the kernel nor on the other
// rows.
struct GemmParams {
  // [rows][x_stride], in_features used.
  DEVICE(const struct element) x;
  // [rows][y_stride] of elements, or of floats for LORAMUX_STORE_FP32.
  DEVICE(void) y;
  // [rows][y_stride], for LORAMUX_ADD_RESIDUAL; may be y itself.
  DEVICE(const struct element) residual;
  // [v blocks][LORAMUX_ROW_TILE][16]
  DEVICE(const struct element) v;
  // null for a group without adapters.
  DEVICE(const struct RankChunk) chunks;
  DEVICE(const uint32_t) starts;
  // With more than one slice, partial sums. Where slices are spread over thread blocks: [tiles][slices][rows of the
  // tile][columns of the tile]; where a thread block has them all: as much for each thread block.
  DEVICE(float) partials;
  // [tiles]: slices that have arrived; zero before the first launch and after every launch.
  DEVICE(uint32_t) arrived;
  // [1]: rows of this step.
  DEVICE(const uint32_t) rows;
  // The step's experts, as in `ChunkListParams` and `ShrinkGateParams`; read only if `changes_columns`.
  DEVICE(const uint32_t) tile_entries;
  DEVICE(const uint32_t) entry_slots;
  DEVICE(const float) gates;
  struct GemmSite site[LORAMUX_MAX_SITES];
  uint32_t sites;
  uint32_t slices;
  uint32_t in_features;
  uint32_t x_stride;
  uint32_t y_stride;
  // enum Epilogue
  uint32_t epilogue;
  // Tiles of `gemm_rank_ext` and `gemm_rank_ext_sliced`.
  uint32_t row_tiles;
  uint32_t column_tiles;
  // Whether a slot of the group has a column scale or a bias.
  uint32_t changes_columns;
  // Outputs of an access: 8 where widths, strides and addresses allow it, else 1.
  uint32_t access;
};

// What the thread blocks of a `gemm_decode_*` that computes V tell each other; zero before the first launch and after
// every launch.
struct GemmDecodeCounters {
  // Units of V that have been taken.
  uint32_t taken;
  // Pairs of 16 rows and a rank chunk whose V is there.
  uint32_t written;
  // Thread blocks that need neither any more.
  uint32_t left;
};

// `gemm_decode_*`.
struct GemmDecodeParams {
  struct GemmParams product;
  // Of the same rows and lists; read where `counters` is not null.
  struct ShrinkGateParams shrink;
  // Null where V is there before the launch, or no adapters are.
  DEVICE(struct GemmDecodeCounters) counters;
};

// ---- kernels of rows: `embed`, `rms_norm`, `rope_store`, `swiglu`, `pick_rows` ----

// Tokens of a page of the KV cache.
#define LORAMUX_PAGE 16
// Grids of these kernels: a row in x; `embed`, `swiglu` and `pick_rows` have a thread block for so many columns in y,
// `rope_store` one for so many heads of q | k | v.
#define LORAMUX_ROW_THREADS 256
#define LORAMUX_ROW_COLUMNS 2048
#define LORAMUX_ROPE_THREADS 128
#define LORAMUX_ROPE_HEADS 16

// Where a row of a step stands in its sequence.
struct StepRow {
  // Index of its `StepSequence`.
  uint32_t sequence;
  uint32_t position;
  // Which rotary table its position is looked up in.
  uint32_t rotary_variant;
  // Where its key and value belong: page · LORAMUX_PAGE + place in the page.
  uint32_t cache_slot;
};

// A sequence of a step.
struct StepSequence {
  // Its rows are `first_row .. first_row + rows`.
  uint32_t first_row;
  uint32_t rows;
  // Position of its first row; with this step the cache holds `start + rows` of its tokens.
  uint32_t start;
  // Page p of the sequence has the number `pages[first_page + p]`.
  uint32_t first_page;
};

// `embed`: y[row] = table[token[row]] + Σ_chunks V · Bᵀ with V = gate · scale · A[:, token], in fp32, rounded once.
struct EmbedParams {
  // [vocabulary][width]
  DEVICE(const struct element) table;
  // [rows]
  DEVICE(const uint32_t) tokens;
  // [rows][y_stride], width used.
  DEVICE(struct element) y;
  // [1]: rows of this step.
  DEVICE(const uint32_t) rows;
  // The chunk list of the lookup as `chunk_lists` leaves it; null for a table without adapters.
  DEVICE(const struct RankChunk) chunks;
  DEVICE(const uint32_t) starts;
  // [entries][LORAMUX_ROW_TILE]: 0 for rows that do not use the expert.
  DEVICE(const float) gates;
  // Arena [chunk][vocabulary][16]: the ranks of a token lie side by side.
  DEVICE(const struct element) a;
  // Arena [chunk][width][16].
  DEVICE(const struct element) b;
  uint32_t vocabulary;
  uint32_t width;
  uint32_t y_stride;
  // Cells of a row tile in the chunk list.
  uint32_t cells;
  // Values of an access: 8 where widths, strides and addresses allow it, else 1.
  uint32_t access;
  uint32_t reserved;
};

// `rms_norm`: y = x / √(mean(x²) + ε) ⊙ weight.
struct RmsNormParams {
  // [rows][x_stride], width used.
  DEVICE(const struct element) x;
  // [width]
  DEVICE(const float) weight;
  // [rows][y_stride]; may be x.
  DEVICE(struct element) y;
  // [1]: rows of this step.
  DEVICE(const uint32_t) rows;
  uint32_t width;
  uint32_t x_stride;
  uint32_t y_stride;
  float epsilon;
  // Values of an access: 8 or 1.
  uint32_t access;
  uint32_t reserved;
};

// `rope_store`: normalises and rotates q and k in place, then stores k and v in the rows' pages.
struct RopeStoreParams {
  // [rows][stride]: vectors of head_dim, `heads` of q, `kv_heads` of k, `kv_heads` of v.
  DEVICE(struct element) qkv;
  // [head_dim] each, or both null: no normalisation.
  DEVICE(const float) q_norm;
  DEVICE(const float) k_norm;
  // [variants][positions][rotary_dim / 2]
  DEVICE(const float) cos;
  DEVICE(const float) sin;
  // [rows]
  DEVICE(const struct StepRow) step_rows;
  // One transformer block's [pages][kv_heads][LORAMUX_PAGE][head_dim].
  DEVICE(struct element) keys;
  DEVICE(struct element) values;
  // [1]: rows of this step.
  DEVICE(const uint32_t) rows;
  uint32_t stride;
  uint32_t heads;
  uint32_t kv_heads;
  uint32_t head_dim;
  // Element i is rotated with element i + rotary_dim / 2; elements from rotary_dim on are not.
  uint32_t rotary_dim;
  uint32_t positions;
  float epsilon;
  // Values of an access: 8 or 1.
  uint32_t access;
};

// `swiglu`: y = silu(gate) ⊙ up.
struct SwigluParams {
  // [rows][x_stride]: width of gate, width of up.
  DEVICE(const struct element) x;
  // [rows][y_stride]
  DEVICE(struct element) y;
  // [1]: rows of this step.
  DEVICE(const uint32_t) rows;
  uint32_t width;
  uint32_t x_stride;
  uint32_t y_stride;
  // Values of an access: 8 or 1.
  uint32_t access;
};

// `pick_rows`: y[i] = x[picked[i]].
struct PickRowsParams {
  // [rows][x_stride], width used.
  DEVICE(const struct element) x;
  // [count]
  DEVICE(const uint32_t) picked;
  // [count][y_stride]
  DEVICE(struct element) y;
  // [1]: picked rows of this step.
  DEVICE(const uint32_t) count;
  uint32_t width;
  uint32_t x_stride;
  uint32_t y_stride;
  // Values of an access: 8 or 1.
  uint32_t access;
};

// ---- attention over the paged cache ----

// Keys that a softmax goes over at a time, from multiples of this position.
#define LORAMUX_ATTENTION_KEYS 64
// Keys of a split, from multiples of this position: summed from zero, then added to the splits before it.
#define LORAMUX_ATTENTION_SPLIT 512
#define LORAMUX_ATTENTION_THREADS 128
// (row, head) pairs of a tile of `attention_*`, and of `attention_256` and all `attention_split_*`.
#define LORAMUX_ATTENTION_TILE_64 64
#define LORAMUX_ATTENTION_TILE_16 16
// Floats before the sums of a partial result: maximum, sum of weights, and up to 16 bytes.
#define LORAMUX_ATTENTION_PARTIAL_HEADER 4
// A window that no position reaches back to.
#define LORAMUX_ATTENTION_NO_WINDOW 0x7fffffff
// Shared memory, by head_dim as padded.
#define LORAMUX_ATTENTION_16_SHARED_BYTES 16400
#define LORAMUX_ATTENTION_32_SHARED_BYTES 28688
#define LORAMUX_ATTENTION_64_SHARED_BYTES 53264
#define LORAMUX_ATTENTION_80_SHARED_BYTES 43024
#define LORAMUX_ATTENTION_96_SHARED_BYTES 51216
#define LORAMUX_ATTENTION_128_SHARED_BYTES 67600
#define LORAMUX_ATTENTION_256_SHARED_BYTES 86272
#define LORAMUX_ATTENTION_SPLIT_16_SHARED_BYTES 15360
#define LORAMUX_ATTENTION_SPLIT_32_SHARED_BYTES 24064
#define LORAMUX_ATTENTION_SPLIT_64_SHARED_BYTES 41472
#define LORAMUX_ATTENTION_SPLIT_80_SHARED_BYTES 50176
#define LORAMUX_ATTENTION_SPLIT_96_SHARED_BYTES 58880
#define LORAMUX_ATTENTION_SPLIT_128_SHARED_BYTES 76288
#define LORAMUX_ATTENTION_SPLIT_256_SHARED_BYTES 78336

// Query heads of one sequence that share key heads: pair i is row i / group of the sequence's rows in this step, and
// query head i % group of each key head, where group = heads / kv_heads. A tile is a run of pairs.
struct AttentionTile {
  // The sequence's first row in the step, the position of that row, and its first page in `pages`.
  uint32_t row;
  uint32_t position;
  uint32_t page;
  uint32_t first_pair;
  uint32_t pairs;
  // The rest is for `attention_split_*`, whose list has an entry for each split of a tile. Which split:
  uint32_t split;
  // The tile's counter, of those in `arrived`.
  uint32_t counter;
  // Partial result of pair i (of the tile) in split s: slot `partial + s · pairs + i` of `partials`.
  uint32_t partial;
};

// `attention_*`, a thread block for a tile and key head, and `attention_split_*`, one for each split of a tile as well:
// y[row][head] = softmax(q · Kᵀ / √head_dim) · V over the keys j ≤ i, j > i − window, for the row at position i.
//
// Pages are [kv_heads][LORAMUX_PAGE][head_dim].
struct AttentionParams {
  // [rows][q_stride], heads · head_dim used; rotated.
  DEVICE(const struct element) q;
  // [rows][y_stride], heads · head_dim used.
  DEVICE(struct element) y;
  // [pages of the cache][kv_heads][LORAMUX_PAGE][head_dim]; the step's own rows are there already.
  DEVICE(const struct element) keys;
  DEVICE(const struct element) values;
  // Page numbers of all sequences, in order of position.
  DEVICE(const uint32_t) pages;
  DEVICE(const struct AttentionTile) tiles;
  // [1]: entries of `tiles` in this step; on the device, so that one graph serves every step.
  DEVICE(const uint32_t) tile_count;
  // [slots][kv_heads][LORAMUX_ATTENTION_PARTIAL_HEADER + head_dim as padded]
  DEVICE(float) partials;
  // [tiles][kv_heads]: splits that have arrived; zero before the first launch and after every launch.
  DEVICE(uint32_t) arrived;
  uint32_t q_stride;
  uint32_t y_stride;
  uint32_t kv_heads;
  // Query heads of a key head.
  uint32_t group;
  uint32_t head_dim;
  uint32_t window;
  // log₂(e) / √head_dim: scores become exponents of two.
  float scale;
  uint32_t reserved;
};

// ---- sampling ----

#define LORAMUX_SAMPLE_THREADS 1024
#define LORAMUX_SAMPLE_SHARED_BYTES 16904
// Most likely tokens that a draw reports, at most.
#define LORAMUX_SAMPLE_TOP 32
// Weights are summed in units of 2^−40.
#define LORAMUX_SAMPLE_UNIT_BITS 40

// Which token a draw is about.
enum SampleMode {
  // `token`
  LORAMUX_GIVEN = 0,
  // The one with the largest logit, the lowest id on a tie.
  LORAMUX_MOST_LIKELY = 1,
  // The first, in order of id, at which the sum of the kept weights passes a random fraction of the whole.
  LORAMUX_RANDOM = 2,
};

enum SampleStatus {
  LORAMUX_SAMPLED = 0,
  // The logit of `token` is `value`: NaN or +inf. It is the first such token.
  LORAMUX_NOT_FINITE = 1,
  // All logits are −inf.
  LORAMUX_NO_TOKEN_LEFT = 2,
};

// Something that changes one token's logit. What the value is depends on the list.
struct SampleEntry {
  uint32_t token;
  uint32_t value;
};

// What to do with one row of logits. Tokens of entries are below the vocabulary.
struct SampleDraw {
  // The random fraction and the fraction of the weight that is kept, in units of 2^−64. All ones: all is kept.
  uint64_t fraction;
  uint64_t top_p;
  uint32_t row;
  // enum SampleMode
  uint32_t mode;
  uint32_t token;
  // Whether log-probabilities are wanted, and of how many most likely tokens, at most the vocabulary.
  uint32_t reports;
  uint32_t top;
  // How many tokens are kept. All ones: all.
  uint32_t top_k;
  float min_p;
  float temperature;
  float repetition_penalty;
  float frequency_penalty;
  float presence_penalty;
  // From here on `entries` has the lists below, one after another. In a list with values no token is twice.
  uint32_t first_entry;
  // Values: floats that are added.
  uint32_t biases;
  // No values.
  uint32_t banned;
  // Values: how often the token was generated, 0 for one that is in the prompt only.
  uint32_t seen;
  uint32_t reserved;
};

struct SampleTop {
  uint32_t token;
  float logit;
};

// Logits in it are raw: before biases, bans, penalties and temperature.
struct SampleResult {
  // Σ exp(l − largest) in units of 2^−LORAMUX_SAMPLE_UNIT_BITS, where an infinite largest logit counts as 1.
  uint64_t sum;
  // enum SampleStatus
  uint32_t status;
  uint32_t token;
  float value;
  // −inf where no logit is a number.
  float largest;
  // Of `token`; −inf for one outside the vocabulary.
  float logit;
  // Tokens whose logits are at least that.
  uint32_t rank;
  // The most likely tokens, best first, the lower id first on a tie.
  struct SampleTop top[LORAMUX_SAMPLE_TOP];
};

// `sample`: a thread block for each draw.
struct SampleParams {
  // [rows][stride], vocabulary used.
  DEVICE(const float) logits;
  // [draws]
  DEVICE(const struct SampleDraw) draws;
  DEVICE(const struct SampleEntry) entries;
  // [draws][vocabulary]: changed logits, then weights.
  DEVICE(float) scratch;
  // [draws]
  DEVICE(struct SampleResult) results;
  uint32_t vocabulary;
  uint32_t stride;
};

#if defined(ELEMENT)
}  // inline namespace ELEMENT
#include "params_layout.h"
#endif
