//! Parameters of the kernels. Generated from `kernels/params.h` by `scripts/generate-bindings.sh`.
//!
//! A `u64` is a device address. The comments give the shape and type of what is there.
#![allow(dead_code, reason = "the kernels' own constants are here too")]
#![allow(rustdoc::broken_intra_doc_links, reason = "shapes like [rows][width] are no links")]

/// Ranks of a rank chunk: the tensor core's K step.
pub const RANK_CHUNK: usize = 16;
/// Rows that share a chunk list, and rows of a v block.
pub const ROW_TILE: usize = 128;
/// Most sites of a group (q, k, v).
pub const MAX_SITES: usize = 4;
/// Most K slices of a site group.
pub const MAX_SLICES: usize = 8;
/// Most K slices of V.
pub const MAX_SHRINK_SLICES: usize = 8;
/// K is cut into slices between blocks of this many elements.
pub const K_BLOCK: usize = 64;
/// Launch geometry of the kernels whose names begin so. The kernels assert that it is theirs.
pub const CHUNK_LISTS_THREADS: usize = 256;
/// `shrink_gate_16`, for few rows: rows and rank chunks of a thread block.
pub const SHRINK_GATE_16_ROWS: usize = 16;
pub const SHRINK_GATE_16_CHUNKS: usize = 1;
pub const SHRINK_GATE_16_THREADS: usize = 128;
pub const SHRINK_GATE_16_SHARED_BYTES: usize = 98304;
/// `shrink_gate_64`, for many rows.
pub const SHRINK_GATE_64_ROWS: usize = 64;
pub const SHRINK_GATE_64_CHUNKS: usize = 4;
pub const SHRINK_GATE_64_THREADS: usize = 256;
pub const SHRINK_GATE_64_SHARED_BYTES: usize = 92160;
/// `gemm_rank_ext_*`: tiles of ROW_TILE rows.
pub const GEMM_RANK_EXT_COLUMNS: usize = 128;
pub const GEMM_RANK_EXT_THREADS: usize = 256;
pub const GEMM_RANK_EXT_SHARED_BYTES: usize = 98304;
/// `gemm_decode_*`, for at most 16, 32 or 64 rows.
pub const GEMM_DECODE_COLUMNS: usize = 64;
pub const GEMM_DECODE_THREADS: usize = 128;
pub const GEMM_DECODE_16_SHARED_BYTES: usize = 82944;
pub const GEMM_DECODE_32_SHARED_BYTES: usize = 99328;
pub const GEMM_DECODE_64_SHARED_BYTES: usize = 99328;
/// Tokens of a page of the KV cache.
pub const PAGE: usize = 16;
/// Grids of these kernels: a row in x; `embed`, `swiglu` and `pick_rows` have a thread block for so many columns in y,
/// `rope_store` one for so many heads of q | k | v.
pub const ROW_THREADS: usize = 256;
pub const ROW_COLUMNS: usize = 2048;
pub const ROPE_THREADS: usize = 128;
pub const ROPE_HEADS: usize = 16;
/// Keys that a softmax goes over at a time, from multiples of this position.
pub const ATTENTION_KEYS: usize = 64;
/// Keys of a split, from multiples of this position: summed from zero, then added to the splits before it.
pub const ATTENTION_SPLIT: usize = 512;
pub const ATTENTION_THREADS: usize = 128;
/// (row, head) pairs of a tile of `attention_*`, and of `attention_256` and all `attention_split_*`.
pub const ATTENTION_TILE_64: usize = 64;
pub const ATTENTION_TILE_16: usize = 16;
/// Floats before the sums of a partial result: maximum, sum of weights, and up to 16 bytes.
pub const ATTENTION_PARTIAL_HEADER: usize = 4;
/// A window that no position reaches back to.
pub const ATTENTION_NO_WINDOW: usize = 2147483647;
/// Shared memory, by head_dim as padded.
pub const ATTENTION_16_SHARED_BYTES: usize = 16400;
pub const ATTENTION_32_SHARED_BYTES: usize = 28688;
pub const ATTENTION_64_SHARED_BYTES: usize = 53264;
pub const ATTENTION_80_SHARED_BYTES: usize = 43024;
pub const ATTENTION_96_SHARED_BYTES: usize = 51216;
pub const ATTENTION_128_SHARED_BYTES: usize = 67600;
pub const ATTENTION_256_SHARED_BYTES: usize = 86272;
pub const ATTENTION_SPLIT_16_SHARED_BYTES: usize = 15360;
pub const ATTENTION_SPLIT_32_SHARED_BYTES: usize = 24064;
pub const ATTENTION_SPLIT_64_SHARED_BYTES: usize = 41472;
pub const ATTENTION_SPLIT_80_SHARED_BYTES: usize = 50176;
pub const ATTENTION_SPLIT_96_SHARED_BYTES: usize = 58880;
pub const ATTENTION_SPLIT_128_SHARED_BYTES: usize = 76288;
pub const ATTENTION_SPLIT_256_SHARED_BYTES: usize = 78336;
pub const SAMPLE_THREADS: usize = 1024;
pub const SAMPLE_SHARED_BYTES: usize = 16904;
/// Most likely tokens that a draw reports, at most.
pub const SAMPLE_TOP: usize = 32;
/// Weights are summed in units of 2^−40.
pub const SAMPLE_UNIT_BITS: usize = 40;

/// A rank chunk in use by a row tile. Its index in the chunk list is also its v block: where `shrink_gate` leaves and
/// the products find V[row] = gate · scale · (x · A_chunkᵀ).
#[repr(C)]
#[derive(Debug, Default, Copy, Clone, bytemuck::Pod, bytemuck::Zeroable)]
pub struct RankChunk {
    /// Chunk of the site's arenas: A is [chunk][16][in], B is [chunk][out][16].
    pub chunk: u32,
    /// Row of the gates [entry][ROW_TILE]: which expert of the tile this chunk belongs to.
    pub entry: u32,
    /// Site of the group.
    pub site: u32,
    /// The adapter's scale: alpha / r, or alpha / √r.
    pub scale: f32,
}

#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of RankChunk"][::std::mem::size_of::<RankChunk>() - 16usize];
    ["Alignment of RankChunk"][::std::mem::align_of::<RankChunk>() - 4usize];
    ["Offset of field: RankChunk::chunk"][::std::mem::offset_of!(RankChunk, chunk) - 0usize];
    ["Offset of field: RankChunk::entry"][::std::mem::offset_of!(RankChunk, entry) - 4usize];
    ["Offset of field: RankChunk::site"][::std::mem::offset_of!(RankChunk, site) - 8usize];
    ["Offset of field: RankChunk::scale"][::std::mem::offset_of!(RankChunk, scale) - 12usize];
};

/// What a site knows of the expert in a slot. Its chunk ids are `chunk_ids[slot · chunks_per_slot + j]`, j < count.
#[repr(C)]
#[derive(Debug, Default, Copy, Clone, bytemuck::Pod, bytemuck::Zeroable)]
pub struct SlotChunks {
    /// Rank chunks of this expert at this site; 0 where the site is no target or the slot is empty.
    pub count: u32,
    /// Chunk j extends K slice (phase + j) mod slices. A property of the adapter's content, so that neither its slot
    /// nor its neighbours decide in which order a row is summed.
    pub phase: u32,
    pub scale: f32,
    pub reserved: u32,
    /// What the expert changes besides: with gate g, the frozen product is multiplied by 1 + g · (column_scale − 1)
    /// (DoRA), and g · bias is added. [out_features], or null.
    pub column_scale: u64,
    pub bias: u64,
}

#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of SlotChunks"][::std::mem::size_of::<SlotChunks>() - 32usize];
    ["Alignment of SlotChunks"][::std::mem::align_of::<SlotChunks>() - 8usize];
    ["Offset of field: SlotChunks::count"][::std::mem::offset_of!(SlotChunks, count) - 0usize];
    ["Offset of field: SlotChunks::phase"][::std::mem::offset_of!(SlotChunks, phase) - 4usize];
    ["Offset of field: SlotChunks::scale"][::std::mem::offset_of!(SlotChunks, scale) - 8usize];
    ["Offset of field: SlotChunks::reserved"][::std::mem::offset_of!(SlotChunks, reserved) - 12usize];
    ["Offset of field: SlotChunks::column_scale"][::std::mem::offset_of!(SlotChunks, column_scale) - 16usize];
    ["Offset of field: SlotChunks::bias"][::std::mem::offset_of!(SlotChunks, bias) - 24usize];
};

/// Where one site's chunks are looked up.
#[repr(C)]
#[derive(Debug, Default, Copy, Clone, bytemuck::Pod, bytemuck::Zeroable)]
pub struct ChunkListSite {
    /// [slots]
    pub slots: u64,
    /// [slots][chunks_per_slot]
    pub chunk_ids: u64,
    pub chunks_per_slot: u64,
}

#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of ChunkListSite"][::std::mem::size_of::<ChunkListSite>() - 24usize];
    ["Alignment of ChunkListSite"][::std::mem::align_of::<ChunkListSite>() - 8usize];
    ["Offset of field: ChunkListSite::slots"][::std::mem::offset_of!(ChunkListSite, slots) - 0usize];
    ["Offset of field: ChunkListSite::chunk_ids"][::std::mem::offset_of!(ChunkListSite, chunk_ids) - 8usize];
    ["Offset of field: ChunkListSite::chunks_per_slot"]
        [::std::mem::offset_of!(ChunkListSite, chunks_per_slot) - 16usize];
};

/// A site group's chunk list: what to build it from and where to.
///
/// A cell is (row tile, K slice, site), in this order; `starts[cell] .. starts[cell + 1]` are its chunks.
#[repr(C)]
#[derive(Debug, Default, Copy, Clone, bytemuck::Pod, bytemuck::Zeroable)]
pub struct ChunkListGroup {
    pub site: [ChunkListSite; 4usize],
    /// [tiles · sites · slices + 1]
    pub starts: u64,
    /// [tiles · tile_capacity]
    pub chunks: u64,
    pub sites: u32,
    pub slices: u32,
    /// Most chunks of a row tile.
    pub tile_capacity: u32,
    pub reserved: u32,
}

#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of ChunkListGroup"][::std::mem::size_of::<ChunkListGroup>() - 128usize];
    ["Alignment of ChunkListGroup"][::std::mem::align_of::<ChunkListGroup>() - 8usize];
    ["Offset of field: ChunkListGroup::site"][::std::mem::offset_of!(ChunkListGroup, site) - 0usize];
    ["Offset of field: ChunkListGroup::starts"][::std::mem::offset_of!(ChunkListGroup, starts) - 96usize];
    ["Offset of field: ChunkListGroup::chunks"][::std::mem::offset_of!(ChunkListGroup, chunks) - 104usize];
    ["Offset of field: ChunkListGroup::sites"][::std::mem::offset_of!(ChunkListGroup, sites) - 112usize];
    ["Offset of field: ChunkListGroup::slices"][::std::mem::offset_of!(ChunkListGroup, slices) - 116usize];
    ["Offset of field: ChunkListGroup::tile_capacity"]
        [::std::mem::offset_of!(ChunkListGroup, tile_capacity) - 120usize];
    ["Offset of field: ChunkListGroup::reserved"]
        [::std::mem::offset_of!(ChunkListGroup, reserved) - 124usize];
};

/// `chunk_lists`: one thread block per site group.
#[repr(C)]
#[derive(Debug, Default, Copy, Clone, bytemuck::Pod, bytemuck::Zeroable)]
pub struct ChunkListParams {
    /// [groups]
    pub groups: u64,
    /// [1]: rows of this step; on the device, so that one graph serves every step of its capacity.
    pub rows: u64,
    /// [tiles + 1]: tile t uses the experts of entries `tile_entries[t] .. tile_entries[t + 1]`.
    pub tile_entries: u64,
    /// [entries]: slots. A tile's entries ascend by the experts' order, the same in every step.
    pub entry_slots: u64,
    /// [1]: set to 1 when a tile had more chunks than it may have; they are cut off, never overrun.
    pub overflow: u64,
}

#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of ChunkListParams"][::std::mem::size_of::<ChunkListParams>() - 40usize];
    ["Alignment of ChunkListParams"][::std::mem::align_of::<ChunkListParams>() - 8usize];
    ["Offset of field: ChunkListParams::groups"][::std::mem::offset_of!(ChunkListParams, groups) - 0usize];
    ["Offset of field: ChunkListParams::rows"][::std::mem::offset_of!(ChunkListParams, rows) - 8usize];
    ["Offset of field: ChunkListParams::tile_entries"]
        [::std::mem::offset_of!(ChunkListParams, tile_entries) - 16usize];
    ["Offset of field: ChunkListParams::entry_slots"]
        [::std::mem::offset_of!(ChunkListParams, entry_slots) - 24usize];
    ["Offset of field: ChunkListParams::overflow"]
        [::std::mem::offset_of!(ChunkListParams, overflow) - 32usize];
};

/// `shrink_gate_*`: V = gate · scale · (X · Aᵀ) for every chunk of a site group's list.
#[repr(C)]
#[derive(Debug, Default, Copy, Clone, bytemuck::Pod, bytemuck::Zeroable)]
pub struct ShrinkGateParams {
    /// [rows][x_stride], in_features used.
    pub x: u64,
    /// [v blocks][ROW_TILE][16]
    pub v: u64,
    /// [entries][ROW_TILE]: 0 for rows that do not use the expert.
    pub gates: u64,
    pub chunks: u64,
    pub starts: u64,
    /// Arenas [chunk][16][in_features] of the group's sites.
    pub a: [u64; 4usize],
    /// [1]: rows of this step.
    pub rows: u64,
    /// With more than one slice, for `shrink_gate_16` and `gemm_decode_*`: partial sums
    /// [v blocks][slices][ROW_TILE][16].
    pub partials: u64,
    /// Likewise [v blocks][ROW_TILE / 16]: slices that have arrived; zero before and after every launch.
    pub arrived: u64,
    pub in_features: u32,
    pub x_stride: u32,
    /// K slices of V: not those of the products.
    pub slices: u32,
    /// Cells of a row tile in the chunk list: the products' slices · sites.
    pub cells: u32,
}

#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of ShrinkGateParams"][::std::mem::size_of::<ShrinkGateParams>() - 112usize];
    ["Alignment of ShrinkGateParams"][::std::mem::align_of::<ShrinkGateParams>() - 8usize];
    ["Offset of field: ShrinkGateParams::x"][::std::mem::offset_of!(ShrinkGateParams, x) - 0usize];
    ["Offset of field: ShrinkGateParams::v"][::std::mem::offset_of!(ShrinkGateParams, v) - 8usize];
    ["Offset of field: ShrinkGateParams::gates"][::std::mem::offset_of!(ShrinkGateParams, gates) - 16usize];
    ["Offset of field: ShrinkGateParams::chunks"][::std::mem::offset_of!(ShrinkGateParams, chunks) - 24usize];
    ["Offset of field: ShrinkGateParams::starts"][::std::mem::offset_of!(ShrinkGateParams, starts) - 32usize];
    ["Offset of field: ShrinkGateParams::a"][::std::mem::offset_of!(ShrinkGateParams, a) - 40usize];
    ["Offset of field: ShrinkGateParams::rows"][::std::mem::offset_of!(ShrinkGateParams, rows) - 72usize];
    ["Offset of field: ShrinkGateParams::partials"]
        [::std::mem::offset_of!(ShrinkGateParams, partials) - 80usize];
    ["Offset of field: ShrinkGateParams::arrived"]
        [::std::mem::offset_of!(ShrinkGateParams, arrived) - 88usize];
    ["Offset of field: ShrinkGateParams::in_features"]
        [::std::mem::offset_of!(ShrinkGateParams, in_features) - 96usize];
    ["Offset of field: ShrinkGateParams::x_stride"]
        [::std::mem::offset_of!(ShrinkGateParams, x_stride) - 100usize];
    ["Offset of field: ShrinkGateParams::slices"]
        [::std::mem::offset_of!(ShrinkGateParams, slices) - 104usize];
    ["Offset of field: ShrinkGateParams::cells"][::std::mem::offset_of!(ShrinkGateParams, cells) - 108usize];
};

/// One linear layer of a group.
#[repr(C)]
#[derive(Debug, Default, Copy, Clone, bytemuck::Pod, bytemuck::Zeroable)]
pub struct GemmSite {
    /// [out_features][in_features]
    pub weight: u64,
    /// [out_features], or null.
    pub bias: u64,
    /// Arena [chunk][out_features][16].
    pub b: u64,
    /// [slots]
    pub slots: u64,
    pub out_features: u32,
    /// Where the site's outputs start in a row of y.
    pub y_column: u32,
}

#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of GemmSite"][::std::mem::size_of::<GemmSite>() - 40usize];
    ["Alignment of GemmSite"][::std::mem::align_of::<GemmSite>() - 8usize];
    ["Offset of field: GemmSite::weight"][::std::mem::offset_of!(GemmSite, weight) - 0usize];
    ["Offset of field: GemmSite::bias"][::std::mem::offset_of!(GemmSite, bias) - 8usize];
    ["Offset of field: GemmSite::b"][::std::mem::offset_of!(GemmSite, b) - 16usize];
    ["Offset of field: GemmSite::slots"][::std::mem::offset_of!(GemmSite, slots) - 24usize];
    ["Offset of field: GemmSite::out_features"][::std::mem::offset_of!(GemmSite, out_features) - 32usize];
    ["Offset of field: GemmSite::y_column"][::std::mem::offset_of!(GemmSite, y_column) - 36usize];
};

#[repr(u32)]
/// What becomes of a tile of sums.
#[derive(Debug, Copy, Clone, Hash, PartialEq, Eq)]
pub enum Epilogue {
    /// y = sum + bias
    Store = 0,
    /// y = residual + sum + bias
    AddResidual = 1,
    /// y = silu(site 0) ⊙ site 1, each with its bias
    Swiglu = 2,
    /// y = sum + bias in fp32, not rounded
    StoreFp32 = 3,
}

/// `gemm_rank_ext_*`, and most of `gemm_decode_*`: Y = X · Wᵀ + bias + Σ_chunks V · Bᵀ, all sites of a group.
///
/// The sum of one output is defined by the group alone: K is cut into `slices` runs of K blocks; a slice is summed in
/// fp32 over ascending k, from zero, then changed column by column where experts do that (their biases in slice 0), then
/// summed over its rank chunks in list order; slices are added in ascending order; bias and residual come last; the
/// result is rounded to the element type once, or not at all. All kernels keep to it, so a row's bits depend neither on the kernel nor on the other
/// rows.
#[repr(C)]
#[derive(Debug, Default, Copy, Clone, bytemuck::Pod, bytemuck::Zeroable)]
pub struct GemmParams {
    /// [rows][x_stride], in_features used.
    pub x: u64,
    /// [rows][y_stride] of elements, or of floats for STORE_FP32.
    pub y: u64,
    /// [rows][y_stride], for ADD_RESIDUAL; may be y itself.
    pub residual: u64,
    /// [v blocks][ROW_TILE][16]
    pub v: u64,
    /// null for a group without adapters.
    pub chunks: u64,
    pub starts: u64,
    /// With more than one slice, partial sums. Where slices are spread over thread blocks: [tiles][slices][rows of the
    /// tile][columns of the tile]; where a thread block has them all: as much for each thread block.
    pub partials: u64,
    /// [tiles]: slices that have arrived; zero before the first launch and after every launch.
    pub arrived: u64,
    /// [1]: rows of this step.
    pub rows: u64,
    /// The step's experts, as in `ChunkListParams` and `ShrinkGateParams`; read only if `changes_columns`.
    pub tile_entries: u64,
    pub entry_slots: u64,
    pub gates: u64,
    pub site: [GemmSite; 4usize],
    pub sites: u32,
    pub slices: u32,
    pub in_features: u32,
    pub x_stride: u32,
    pub y_stride: u32,
    /// enum Epilogue
    pub epilogue: u32,
    /// Tiles of `gemm_rank_ext` and `gemm_rank_ext_sliced`.
    pub row_tiles: u32,
    pub column_tiles: u32,
    /// Whether a slot of the group has a column scale or a bias.
    pub changes_columns: u32,
    /// Outputs of an access: 8 where widths, strides and addresses allow it, else 1.
    pub access: u32,
}

#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of GemmParams"][::std::mem::size_of::<GemmParams>() - 296usize];
    ["Alignment of GemmParams"][::std::mem::align_of::<GemmParams>() - 8usize];
    ["Offset of field: GemmParams::x"][::std::mem::offset_of!(GemmParams, x) - 0usize];
    ["Offset of field: GemmParams::y"][::std::mem::offset_of!(GemmParams, y) - 8usize];
    ["Offset of field: GemmParams::residual"][::std::mem::offset_of!(GemmParams, residual) - 16usize];
    ["Offset of field: GemmParams::v"][::std::mem::offset_of!(GemmParams, v) - 24usize];
    ["Offset of field: GemmParams::chunks"][::std::mem::offset_of!(GemmParams, chunks) - 32usize];
    ["Offset of field: GemmParams::starts"][::std::mem::offset_of!(GemmParams, starts) - 40usize];
    ["Offset of field: GemmParams::partials"][::std::mem::offset_of!(GemmParams, partials) - 48usize];
    ["Offset of field: GemmParams::arrived"][::std::mem::offset_of!(GemmParams, arrived) - 56usize];
    ["Offset of field: GemmParams::rows"][::std::mem::offset_of!(GemmParams, rows) - 64usize];
    ["Offset of field: GemmParams::tile_entries"][::std::mem::offset_of!(GemmParams, tile_entries) - 72usize];
    ["Offset of field: GemmParams::entry_slots"][::std::mem::offset_of!(GemmParams, entry_slots) - 80usize];
    ["Offset of field: GemmParams::gates"][::std::mem::offset_of!(GemmParams, gates) - 88usize];
    ["Offset of field: GemmParams::site"][::std::mem::offset_of!(GemmParams, site) - 96usize];
    ["Offset of field: GemmParams::sites"][::std::mem::offset_of!(GemmParams, sites) - 256usize];
    ["Offset of field: GemmParams::slices"][::std::mem::offset_of!(GemmParams, slices) - 260usize];
    ["Offset of field: GemmParams::in_features"][::std::mem::offset_of!(GemmParams, in_features) - 264usize];
    ["Offset of field: GemmParams::x_stride"][::std::mem::offset_of!(GemmParams, x_stride) - 268usize];
    ["Offset of field: GemmParams::y_stride"][::std::mem::offset_of!(GemmParams, y_stride) - 272usize];
    ["Offset of field: GemmParams::epilogue"][::std::mem::offset_of!(GemmParams, epilogue) - 276usize];
    ["Offset of field: GemmParams::row_tiles"][::std::mem::offset_of!(GemmParams, row_tiles) - 280usize];
    ["Offset of field: GemmParams::column_tiles"]
        [::std::mem::offset_of!(GemmParams, column_tiles) - 284usize];
    ["Offset of field: GemmParams::changes_columns"]
        [::std::mem::offset_of!(GemmParams, changes_columns) - 288usize];
    ["Offset of field: GemmParams::access"][::std::mem::offset_of!(GemmParams, access) - 292usize];
};

/// What the thread blocks of a `gemm_decode_*` that computes V tell each other; zero before the first launch and after
/// every launch.
#[repr(C)]
#[derive(Debug, Default, Copy, Clone, bytemuck::Pod, bytemuck::Zeroable)]
pub struct GemmDecodeCounters {
    /// Units of V that have been taken.
    pub taken: u32,
    /// Pairs of 16 rows and a rank chunk whose V is there.
    pub written: u32,
    /// Thread blocks that need neither any more.
    pub left: u32,
}

#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of GemmDecodeCounters"][::std::mem::size_of::<GemmDecodeCounters>() - 12usize];
    ["Alignment of GemmDecodeCounters"][::std::mem::align_of::<GemmDecodeCounters>() - 4usize];
    ["Offset of field: GemmDecodeCounters::taken"]
        [::std::mem::offset_of!(GemmDecodeCounters, taken) - 0usize];
    ["Offset of field: GemmDecodeCounters::written"]
        [::std::mem::offset_of!(GemmDecodeCounters, written) - 4usize];
    ["Offset of field: GemmDecodeCounters::left"][::std::mem::offset_of!(GemmDecodeCounters, left) - 8usize];
};

/// `gemm_decode_*`.
#[repr(C)]
#[derive(Debug, Default, Copy, Clone, bytemuck::Pod, bytemuck::Zeroable)]
pub struct GemmDecodeParams {
    pub product: GemmParams,
    /// Of the same rows and lists; read where `counters` is not null.
    pub shrink: ShrinkGateParams,
    /// Null where V is there before the launch, or no adapters are.
    pub counters: u64,
}

#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of GemmDecodeParams"][::std::mem::size_of::<GemmDecodeParams>() - 416usize];
    ["Alignment of GemmDecodeParams"][::std::mem::align_of::<GemmDecodeParams>() - 8usize];
    ["Offset of field: GemmDecodeParams::product"]
        [::std::mem::offset_of!(GemmDecodeParams, product) - 0usize];
    ["Offset of field: GemmDecodeParams::shrink"]
        [::std::mem::offset_of!(GemmDecodeParams, shrink) - 296usize];
    ["Offset of field: GemmDecodeParams::counters"]
        [::std::mem::offset_of!(GemmDecodeParams, counters) - 408usize];
};

/// Where a row of a step stands in its sequence.
#[repr(C)]
#[derive(Debug, Default, Copy, Clone, bytemuck::Pod, bytemuck::Zeroable)]
pub struct StepRow {
    /// Index of its `StepSequence`.
    pub sequence: u32,
    pub position: u32,
    /// Which rotary table its position is looked up in.
    pub rotary_variant: u32,
    /// Where its key and value belong: page · PAGE + place in the page.
    pub cache_slot: u32,
}

#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of StepRow"][::std::mem::size_of::<StepRow>() - 16usize];
    ["Alignment of StepRow"][::std::mem::align_of::<StepRow>() - 4usize];
    ["Offset of field: StepRow::sequence"][::std::mem::offset_of!(StepRow, sequence) - 0usize];
    ["Offset of field: StepRow::position"][::std::mem::offset_of!(StepRow, position) - 4usize];
    ["Offset of field: StepRow::rotary_variant"][::std::mem::offset_of!(StepRow, rotary_variant) - 8usize];
    ["Offset of field: StepRow::cache_slot"][::std::mem::offset_of!(StepRow, cache_slot) - 12usize];
};

/// A sequence of a step.
#[repr(C)]
#[derive(Debug, Default, Copy, Clone, bytemuck::Pod, bytemuck::Zeroable)]
pub struct StepSequence {
    /// Its rows are `first_row .. first_row + rows`.
    pub first_row: u32,
    pub rows: u32,
    /// Position of its first row; with this step the cache holds `start + rows` of its tokens.
    pub start: u32,
    /// Page p of the sequence has the number `pages[first_page + p]`.
    pub first_page: u32,
}

#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of StepSequence"][::std::mem::size_of::<StepSequence>() - 16usize];
    ["Alignment of StepSequence"][::std::mem::align_of::<StepSequence>() - 4usize];
    ["Offset of field: StepSequence::first_row"][::std::mem::offset_of!(StepSequence, first_row) - 0usize];
    ["Offset of field: StepSequence::rows"][::std::mem::offset_of!(StepSequence, rows) - 4usize];
    ["Offset of field: StepSequence::start"][::std::mem::offset_of!(StepSequence, start) - 8usize];
    ["Offset of field: StepSequence::first_page"][::std::mem::offset_of!(StepSequence, first_page) - 12usize];
};

/// `embed`: y[row] = table[token[row]] + Σ_chunks V · Bᵀ with V = gate · scale · A[:, token], in fp32, rounded once.
#[repr(C)]
#[derive(Debug, Default, Copy, Clone, bytemuck::Pod, bytemuck::Zeroable)]
pub struct EmbedParams {
    /// [vocabulary][width]
    pub table: u64,
    /// [rows]
    pub tokens: u64,
    /// [rows][y_stride], width used.
    pub y: u64,
    /// [1]: rows of this step.
    pub rows: u64,
    /// The chunk list of the lookup as `chunk_lists` leaves it; null for a table without adapters.
    pub chunks: u64,
    pub starts: u64,
    /// [entries][ROW_TILE]: 0 for rows that do not use the expert.
    pub gates: u64,
    /// Arena [chunk][vocabulary][16]: the ranks of a token lie side by side.
    pub a: u64,
    /// Arena [chunk][width][16].
    pub b: u64,
    pub vocabulary: u32,
    pub width: u32,
    pub y_stride: u32,
    /// Cells of a row tile in the chunk list.
    pub cells: u32,
    /// Values of an access: 8 where widths, strides and addresses allow it, else 1.
    pub access: u32,
    pub reserved: u32,
}

#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of EmbedParams"][::std::mem::size_of::<EmbedParams>() - 96usize];
    ["Alignment of EmbedParams"][::std::mem::align_of::<EmbedParams>() - 8usize];
    ["Offset of field: EmbedParams::table"][::std::mem::offset_of!(EmbedParams, table) - 0usize];
    ["Offset of field: EmbedParams::tokens"][::std::mem::offset_of!(EmbedParams, tokens) - 8usize];
    ["Offset of field: EmbedParams::y"][::std::mem::offset_of!(EmbedParams, y) - 16usize];
    ["Offset of field: EmbedParams::rows"][::std::mem::offset_of!(EmbedParams, rows) - 24usize];
    ["Offset of field: EmbedParams::chunks"][::std::mem::offset_of!(EmbedParams, chunks) - 32usize];
    ["Offset of field: EmbedParams::starts"][::std::mem::offset_of!(EmbedParams, starts) - 40usize];
    ["Offset of field: EmbedParams::gates"][::std::mem::offset_of!(EmbedParams, gates) - 48usize];
    ["Offset of field: EmbedParams::a"][::std::mem::offset_of!(EmbedParams, a) - 56usize];
    ["Offset of field: EmbedParams::b"][::std::mem::offset_of!(EmbedParams, b) - 64usize];
    ["Offset of field: EmbedParams::vocabulary"][::std::mem::offset_of!(EmbedParams, vocabulary) - 72usize];
    ["Offset of field: EmbedParams::width"][::std::mem::offset_of!(EmbedParams, width) - 76usize];
    ["Offset of field: EmbedParams::y_stride"][::std::mem::offset_of!(EmbedParams, y_stride) - 80usize];
    ["Offset of field: EmbedParams::cells"][::std::mem::offset_of!(EmbedParams, cells) - 84usize];
    ["Offset of field: EmbedParams::access"][::std::mem::offset_of!(EmbedParams, access) - 88usize];
    ["Offset of field: EmbedParams::reserved"][::std::mem::offset_of!(EmbedParams, reserved) - 92usize];
};

/// `rms_norm`: y = x / √(mean(x²) + ε) ⊙ weight.
#[repr(C)]
#[derive(Debug, Default, Copy, Clone, bytemuck::Pod, bytemuck::Zeroable)]
pub struct RmsNormParams {
    /// [rows][x_stride], width used.
    pub x: u64,
    /// [width]
    pub weight: u64,
    /// [rows][y_stride]; may be x.
    pub y: u64,
    /// [1]: rows of this step.
    pub rows: u64,
    pub width: u32,
    pub x_stride: u32,
    pub y_stride: u32,
    pub epsilon: f32,
    /// Values of an access: 8 or 1.
    pub access: u32,
    pub reserved: u32,
}

#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of RmsNormParams"][::std::mem::size_of::<RmsNormParams>() - 56usize];
    ["Alignment of RmsNormParams"][::std::mem::align_of::<RmsNormParams>() - 8usize];
    ["Offset of field: RmsNormParams::x"][::std::mem::offset_of!(RmsNormParams, x) - 0usize];
    ["Offset of field: RmsNormParams::weight"][::std::mem::offset_of!(RmsNormParams, weight) - 8usize];
    ["Offset of field: RmsNormParams::y"][::std::mem::offset_of!(RmsNormParams, y) - 16usize];
    ["Offset of field: RmsNormParams::rows"][::std::mem::offset_of!(RmsNormParams, rows) - 24usize];
    ["Offset of field: RmsNormParams::width"][::std::mem::offset_of!(RmsNormParams, width) - 32usize];
    ["Offset of field: RmsNormParams::x_stride"][::std::mem::offset_of!(RmsNormParams, x_stride) - 36usize];
    ["Offset of field: RmsNormParams::y_stride"][::std::mem::offset_of!(RmsNormParams, y_stride) - 40usize];
    ["Offset of field: RmsNormParams::epsilon"][::std::mem::offset_of!(RmsNormParams, epsilon) - 44usize];
    ["Offset of field: RmsNormParams::access"][::std::mem::offset_of!(RmsNormParams, access) - 48usize];
    ["Offset of field: RmsNormParams::reserved"][::std::mem::offset_of!(RmsNormParams, reserved) - 52usize];
};

/// `rope_store`: normalises and rotates q and k in place, then stores k and v in the rows' pages.
#[repr(C)]
#[derive(Debug, Default, Copy, Clone, bytemuck::Pod, bytemuck::Zeroable)]
pub struct RopeStoreParams {
    /// [rows][stride]: vectors of head_dim, `heads` of q, `kv_heads` of k, `kv_heads` of v.
    pub qkv: u64,
    /// [head_dim] each, or both null: no normalisation.
    pub q_norm: u64,
    pub k_norm: u64,
    /// [variants][positions][rotary_dim / 2]
    pub cos: u64,
    pub sin: u64,
    /// [rows]
    pub step_rows: u64,
    /// One transformer block's [pages][kv_heads][PAGE][head_dim].
    pub keys: u64,
    pub values: u64,
    /// [1]: rows of this step.
    pub rows: u64,
    pub stride: u32,
    pub heads: u32,
    pub kv_heads: u32,
    pub head_dim: u32,
    /// Element i is rotated with element i + rotary_dim / 2; elements from rotary_dim on are not.
    pub rotary_dim: u32,
    pub positions: u32,
    pub epsilon: f32,
    /// Values of an access: 8 or 1.
    pub access: u32,
}

#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of RopeStoreParams"][::std::mem::size_of::<RopeStoreParams>() - 104usize];
    ["Alignment of RopeStoreParams"][::std::mem::align_of::<RopeStoreParams>() - 8usize];
    ["Offset of field: RopeStoreParams::qkv"][::std::mem::offset_of!(RopeStoreParams, qkv) - 0usize];
    ["Offset of field: RopeStoreParams::q_norm"][::std::mem::offset_of!(RopeStoreParams, q_norm) - 8usize];
    ["Offset of field: RopeStoreParams::k_norm"][::std::mem::offset_of!(RopeStoreParams, k_norm) - 16usize];
    ["Offset of field: RopeStoreParams::cos"][::std::mem::offset_of!(RopeStoreParams, cos) - 24usize];
    ["Offset of field: RopeStoreParams::sin"][::std::mem::offset_of!(RopeStoreParams, sin) - 32usize];
    ["Offset of field: RopeStoreParams::step_rows"]
        [::std::mem::offset_of!(RopeStoreParams, step_rows) - 40usize];
    ["Offset of field: RopeStoreParams::keys"][::std::mem::offset_of!(RopeStoreParams, keys) - 48usize];
    ["Offset of field: RopeStoreParams::values"][::std::mem::offset_of!(RopeStoreParams, values) - 56usize];
    ["Offset of field: RopeStoreParams::rows"][::std::mem::offset_of!(RopeStoreParams, rows) - 64usize];
    ["Offset of field: RopeStoreParams::stride"][::std::mem::offset_of!(RopeStoreParams, stride) - 72usize];
    ["Offset of field: RopeStoreParams::heads"][::std::mem::offset_of!(RopeStoreParams, heads) - 76usize];
    ["Offset of field: RopeStoreParams::kv_heads"]
        [::std::mem::offset_of!(RopeStoreParams, kv_heads) - 80usize];
    ["Offset of field: RopeStoreParams::head_dim"]
        [::std::mem::offset_of!(RopeStoreParams, head_dim) - 84usize];
    ["Offset of field: RopeStoreParams::rotary_dim"]
        [::std::mem::offset_of!(RopeStoreParams, rotary_dim) - 88usize];
    ["Offset of field: RopeStoreParams::positions"]
        [::std::mem::offset_of!(RopeStoreParams, positions) - 92usize];
    ["Offset of field: RopeStoreParams::epsilon"][::std::mem::offset_of!(RopeStoreParams, epsilon) - 96usize];
    ["Offset of field: RopeStoreParams::access"][::std::mem::offset_of!(RopeStoreParams, access) - 100usize];
};

/// `swiglu`: y = silu(gate) ⊙ up.
#[repr(C)]
#[derive(Debug, Default, Copy, Clone, bytemuck::Pod, bytemuck::Zeroable)]
pub struct SwigluParams {
    /// [rows][x_stride]: width of gate, width of up.
    pub x: u64,
    /// [rows][y_stride]
    pub y: u64,
    /// [1]: rows of this step.
    pub rows: u64,
    pub width: u32,
    pub x_stride: u32,
    pub y_stride: u32,
    /// Values of an access: 8 or 1.
    pub access: u32,
}

#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of SwigluParams"][::std::mem::size_of::<SwigluParams>() - 40usize];
    ["Alignment of SwigluParams"][::std::mem::align_of::<SwigluParams>() - 8usize];
    ["Offset of field: SwigluParams::x"][::std::mem::offset_of!(SwigluParams, x) - 0usize];
    ["Offset of field: SwigluParams::y"][::std::mem::offset_of!(SwigluParams, y) - 8usize];
    ["Offset of field: SwigluParams::rows"][::std::mem::offset_of!(SwigluParams, rows) - 16usize];
    ["Offset of field: SwigluParams::width"][::std::mem::offset_of!(SwigluParams, width) - 24usize];
    ["Offset of field: SwigluParams::x_stride"][::std::mem::offset_of!(SwigluParams, x_stride) - 28usize];
    ["Offset of field: SwigluParams::y_stride"][::std::mem::offset_of!(SwigluParams, y_stride) - 32usize];
    ["Offset of field: SwigluParams::access"][::std::mem::offset_of!(SwigluParams, access) - 36usize];
};

/// `pick_rows`: y[i] = x[picked[i]].
#[repr(C)]
#[derive(Debug, Default, Copy, Clone, bytemuck::Pod, bytemuck::Zeroable)]
pub struct PickRowsParams {
    /// [rows][x_stride], width used.
    pub x: u64,
    /// [count]
    pub picked: u64,
    /// [count][y_stride]
    pub y: u64,
    /// [1]: picked rows of this step.
    pub count: u64,
    pub width: u32,
    pub x_stride: u32,
    pub y_stride: u32,
    /// Values of an access: 8 or 1.
    pub access: u32,
}

#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of PickRowsParams"][::std::mem::size_of::<PickRowsParams>() - 48usize];
    ["Alignment of PickRowsParams"][::std::mem::align_of::<PickRowsParams>() - 8usize];
    ["Offset of field: PickRowsParams::x"][::std::mem::offset_of!(PickRowsParams, x) - 0usize];
    ["Offset of field: PickRowsParams::picked"][::std::mem::offset_of!(PickRowsParams, picked) - 8usize];
    ["Offset of field: PickRowsParams::y"][::std::mem::offset_of!(PickRowsParams, y) - 16usize];
    ["Offset of field: PickRowsParams::count"][::std::mem::offset_of!(PickRowsParams, count) - 24usize];
    ["Offset of field: PickRowsParams::width"][::std::mem::offset_of!(PickRowsParams, width) - 32usize];
    ["Offset of field: PickRowsParams::x_stride"][::std::mem::offset_of!(PickRowsParams, x_stride) - 36usize];
    ["Offset of field: PickRowsParams::y_stride"][::std::mem::offset_of!(PickRowsParams, y_stride) - 40usize];
    ["Offset of field: PickRowsParams::access"][::std::mem::offset_of!(PickRowsParams, access) - 44usize];
};

/// Query heads of one sequence that share key heads: pair i is row i / group of the sequence's rows in this step, and
/// query head i % group of each key head, where group = heads / kv_heads. A tile is a run of pairs.
#[repr(C)]
#[derive(Debug, Default, Copy, Clone, bytemuck::Pod, bytemuck::Zeroable)]
pub struct AttentionTile {
    /// The sequence's first row in the step, the position of that row, and its first page in `pages`.
    pub row: u32,
    pub position: u32,
    pub page: u32,
    pub first_pair: u32,
    pub pairs: u32,
    /// The rest is for `attention_split_*`, whose list has an entry for each split of a tile. Which split:
    pub split: u32,
    /// The tile's counter, of those in `arrived`.
    pub counter: u32,
    /// Partial result of pair i (of the tile) in split s: slot `partial + s · pairs + i` of `partials`.
    pub partial: u32,
}

#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of AttentionTile"][::std::mem::size_of::<AttentionTile>() - 32usize];
    ["Alignment of AttentionTile"][::std::mem::align_of::<AttentionTile>() - 4usize];
    ["Offset of field: AttentionTile::row"][::std::mem::offset_of!(AttentionTile, row) - 0usize];
    ["Offset of field: AttentionTile::position"][::std::mem::offset_of!(AttentionTile, position) - 4usize];
    ["Offset of field: AttentionTile::page"][::std::mem::offset_of!(AttentionTile, page) - 8usize];
    ["Offset of field: AttentionTile::first_pair"]
        [::std::mem::offset_of!(AttentionTile, first_pair) - 12usize];
    ["Offset of field: AttentionTile::pairs"][::std::mem::offset_of!(AttentionTile, pairs) - 16usize];
    ["Offset of field: AttentionTile::split"][::std::mem::offset_of!(AttentionTile, split) - 20usize];
    ["Offset of field: AttentionTile::counter"][::std::mem::offset_of!(AttentionTile, counter) - 24usize];
    ["Offset of field: AttentionTile::partial"][::std::mem::offset_of!(AttentionTile, partial) - 28usize];
};

/// `attention_*`, a thread block for a tile and key head, and `attention_split_*`, one for each split of a tile as well:
/// y[row][head] = softmax(q · Kᵀ / √head_dim) · V over the keys j ≤ i, j > i − window, for the row at position i.
///
/// Pages are [kv_heads][PAGE][head_dim].
#[repr(C)]
#[derive(Debug, Default, Copy, Clone, bytemuck::Pod, bytemuck::Zeroable)]
pub struct AttentionParams {
    /// [rows][q_stride], heads · head_dim used; rotated.
    pub q: u64,
    /// [rows][y_stride], heads · head_dim used.
    pub y: u64,
    /// [pages of the cache][kv_heads][PAGE][head_dim]; the step's own rows are there already.
    pub keys: u64,
    pub values: u64,
    /// Page numbers of all sequences, in order of position.
    pub pages: u64,
    pub tiles: u64,
    /// [1]: entries of `tiles` in this step; on the device, so that one graph serves every step.
    pub tile_count: u64,
    /// [slots][kv_heads][ATTENTION_PARTIAL_HEADER + head_dim as padded]
    pub partials: u64,
    /// [tiles][kv_heads]: splits that have arrived; zero before the first launch and after every launch.
    pub arrived: u64,
    pub q_stride: u32,
    pub y_stride: u32,
    pub kv_heads: u32,
    /// Query heads of a key head.
    pub group: u32,
    pub head_dim: u32,
    pub window: u32,
    /// log₂(e) / √head_dim: scores become exponents of two.
    pub scale: f32,
    pub reserved: u32,
}

#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of AttentionParams"][::std::mem::size_of::<AttentionParams>() - 104usize];
    ["Alignment of AttentionParams"][::std::mem::align_of::<AttentionParams>() - 8usize];
    ["Offset of field: AttentionParams::q"][::std::mem::offset_of!(AttentionParams, q) - 0usize];
    ["Offset of field: AttentionParams::y"][::std::mem::offset_of!(AttentionParams, y) - 8usize];
    ["Offset of field: AttentionParams::keys"][::std::mem::offset_of!(AttentionParams, keys) - 16usize];
    ["Offset of field: AttentionParams::values"][::std::mem::offset_of!(AttentionParams, values) - 24usize];
    ["Offset of field: AttentionParams::pages"][::std::mem::offset_of!(AttentionParams, pages) - 32usize];
    ["Offset of field: AttentionParams::tiles"][::std::mem::offset_of!(AttentionParams, tiles) - 40usize];
    ["Offset of field: AttentionParams::tile_count"]
        [::std::mem::offset_of!(AttentionParams, tile_count) - 48usize];
    ["Offset of field: AttentionParams::partials"]
        [::std::mem::offset_of!(AttentionParams, partials) - 56usize];
    ["Offset of field: AttentionParams::arrived"][::std::mem::offset_of!(AttentionParams, arrived) - 64usize];
    ["Offset of field: AttentionParams::q_stride"]
        [::std::mem::offset_of!(AttentionParams, q_stride) - 72usize];
    ["Offset of field: AttentionParams::y_stride"]
        [::std::mem::offset_of!(AttentionParams, y_stride) - 76usize];
    ["Offset of field: AttentionParams::kv_heads"]
        [::std::mem::offset_of!(AttentionParams, kv_heads) - 80usize];
    ["Offset of field: AttentionParams::group"][::std::mem::offset_of!(AttentionParams, group) - 84usize];
    ["Offset of field: AttentionParams::head_dim"]
        [::std::mem::offset_of!(AttentionParams, head_dim) - 88usize];
    ["Offset of field: AttentionParams::window"][::std::mem::offset_of!(AttentionParams, window) - 92usize];
    ["Offset of field: AttentionParams::scale"][::std::mem::offset_of!(AttentionParams, scale) - 96usize];
    ["Offset of field: AttentionParams::reserved"]
        [::std::mem::offset_of!(AttentionParams, reserved) - 100usize];
};

#[repr(u32)]
/// Which token a draw is about.
#[derive(Debug, Copy, Clone, Hash, PartialEq, Eq)]
pub enum SampleMode {
    /// `token`
    Given = 0,
    /// The one with the largest logit, the lowest id on a tie.
    MostLikely = 1,
    /// The first, in order of id, at which the sum of the kept weights passes a random fraction of the whole.
    Random = 2,
}

#[repr(u32)]
#[derive(Debug, Copy, Clone, Hash, PartialEq, Eq)]
pub enum SampleStatus {
    Sampled = 0,
    /// The logit of `token` is `value`: NaN or +inf. It is the first such token.
    NotFinite = 1,
    /// All logits are −inf.
    NoTokenLeft = 2,
}

/// Something that changes one token's logit. What the value is depends on the list.
#[repr(C)]
#[derive(Debug, Default, Copy, Clone, bytemuck::Pod, bytemuck::Zeroable)]
pub struct SampleEntry {
    pub token: u32,
    pub value: u32,
}

#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of SampleEntry"][::std::mem::size_of::<SampleEntry>() - 8usize];
    ["Alignment of SampleEntry"][::std::mem::align_of::<SampleEntry>() - 4usize];
    ["Offset of field: SampleEntry::token"][::std::mem::offset_of!(SampleEntry, token) - 0usize];
    ["Offset of field: SampleEntry::value"][::std::mem::offset_of!(SampleEntry, value) - 4usize];
};

/// What to do with one row of logits. Tokens of entries are below the vocabulary.
#[repr(C)]
#[derive(Debug, Default, Copy, Clone, bytemuck::Pod, bytemuck::Zeroable)]
pub struct SampleDraw {
    /// The random fraction and the fraction of the weight that is kept, in units of 2^−64. All ones: all is kept.
    pub fraction: u64,
    pub top_p: u64,
    pub row: u32,
    /// enum SampleMode
    pub mode: u32,
    pub token: u32,
    /// Whether log-probabilities are wanted, and of how many most likely tokens, at most the vocabulary.
    pub reports: u32,
    pub top: u32,
    /// How many tokens are kept. All ones: all.
    pub top_k: u32,
    pub min_p: f32,
    pub temperature: f32,
    pub repetition_penalty: f32,
    pub frequency_penalty: f32,
    pub presence_penalty: f32,
    /// From here on `entries` has the lists below, one after another. In a list with values no token is twice.
    pub first_entry: u32,
    /// Values: floats that are added.
    pub biases: u32,
    /// No values.
    pub banned: u32,
    /// Values: how often the token was generated, 0 for one that is in the prompt only.
    pub seen: u32,
    pub reserved: u32,
}

#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of SampleDraw"][::std::mem::size_of::<SampleDraw>() - 80usize];
    ["Alignment of SampleDraw"][::std::mem::align_of::<SampleDraw>() - 8usize];
    ["Offset of field: SampleDraw::fraction"][::std::mem::offset_of!(SampleDraw, fraction) - 0usize];
    ["Offset of field: SampleDraw::top_p"][::std::mem::offset_of!(SampleDraw, top_p) - 8usize];
    ["Offset of field: SampleDraw::row"][::std::mem::offset_of!(SampleDraw, row) - 16usize];
    ["Offset of field: SampleDraw::mode"][::std::mem::offset_of!(SampleDraw, mode) - 20usize];
    ["Offset of field: SampleDraw::token"][::std::mem::offset_of!(SampleDraw, token) - 24usize];
    ["Offset of field: SampleDraw::reports"][::std::mem::offset_of!(SampleDraw, reports) - 28usize];
    ["Offset of field: SampleDraw::top"][::std::mem::offset_of!(SampleDraw, top) - 32usize];
    ["Offset of field: SampleDraw::top_k"][::std::mem::offset_of!(SampleDraw, top_k) - 36usize];
    ["Offset of field: SampleDraw::min_p"][::std::mem::offset_of!(SampleDraw, min_p) - 40usize];
    ["Offset of field: SampleDraw::temperature"][::std::mem::offset_of!(SampleDraw, temperature) - 44usize];
    ["Offset of field: SampleDraw::repetition_penalty"]
        [::std::mem::offset_of!(SampleDraw, repetition_penalty) - 48usize];
    ["Offset of field: SampleDraw::frequency_penalty"]
        [::std::mem::offset_of!(SampleDraw, frequency_penalty) - 52usize];
    ["Offset of field: SampleDraw::presence_penalty"]
        [::std::mem::offset_of!(SampleDraw, presence_penalty) - 56usize];
    ["Offset of field: SampleDraw::first_entry"][::std::mem::offset_of!(SampleDraw, first_entry) - 60usize];
    ["Offset of field: SampleDraw::biases"][::std::mem::offset_of!(SampleDraw, biases) - 64usize];
    ["Offset of field: SampleDraw::banned"][::std::mem::offset_of!(SampleDraw, banned) - 68usize];
    ["Offset of field: SampleDraw::seen"][::std::mem::offset_of!(SampleDraw, seen) - 72usize];
    ["Offset of field: SampleDraw::reserved"][::std::mem::offset_of!(SampleDraw, reserved) - 76usize];
};

#[repr(C)]
#[derive(Debug, Default, Copy, Clone, bytemuck::Pod, bytemuck::Zeroable)]
pub struct SampleTop {
    pub token: u32,
    pub logit: f32,
}

#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of SampleTop"][::std::mem::size_of::<SampleTop>() - 8usize];
    ["Alignment of SampleTop"][::std::mem::align_of::<SampleTop>() - 4usize];
    ["Offset of field: SampleTop::token"][::std::mem::offset_of!(SampleTop, token) - 0usize];
    ["Offset of field: SampleTop::logit"][::std::mem::offset_of!(SampleTop, logit) - 4usize];
};

/// Logits in it are raw: before biases, bans, penalties and temperature.
#[repr(C)]
#[derive(Debug, Default, Copy, Clone, bytemuck::Pod, bytemuck::Zeroable)]
pub struct SampleResult {
    /// Σ exp(l − largest) in units of 2^−SAMPLE_UNIT_BITS, where an infinite largest logit counts as 1.
    pub sum: u64,
    /// enum SampleStatus
    pub status: u32,
    pub token: u32,
    pub value: f32,
    /// −inf where no logit is a number.
    pub largest: f32,
    /// Of `token`; −inf for one outside the vocabulary.
    pub logit: f32,
    /// Tokens whose logits are at least that.
    pub rank: u32,
    /// The most likely tokens, best first, the lower id first on a tie.
    pub top: [SampleTop; 32usize],
}

#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of SampleResult"][::std::mem::size_of::<SampleResult>() - 288usize];
    ["Alignment of SampleResult"][::std::mem::align_of::<SampleResult>() - 8usize];
    ["Offset of field: SampleResult::sum"][::std::mem::offset_of!(SampleResult, sum) - 0usize];
    ["Offset of field: SampleResult::status"][::std::mem::offset_of!(SampleResult, status) - 8usize];
    ["Offset of field: SampleResult::token"][::std::mem::offset_of!(SampleResult, token) - 12usize];
    ["Offset of field: SampleResult::value"][::std::mem::offset_of!(SampleResult, value) - 16usize];
    ["Offset of field: SampleResult::largest"][::std::mem::offset_of!(SampleResult, largest) - 20usize];
    ["Offset of field: SampleResult::logit"][::std::mem::offset_of!(SampleResult, logit) - 24usize];
    ["Offset of field: SampleResult::rank"][::std::mem::offset_of!(SampleResult, rank) - 28usize];
    ["Offset of field: SampleResult::top"][::std::mem::offset_of!(SampleResult, top) - 32usize];
};

/// `sample`: a thread block for each draw.
#[repr(C)]
#[derive(Debug, Default, Copy, Clone, bytemuck::Pod, bytemuck::Zeroable)]
pub struct SampleParams {
    /// [rows][stride], vocabulary used.
    pub logits: u64,
    /// [draws]
    pub draws: u64,
    pub entries: u64,
    /// [draws][vocabulary]: changed logits, then weights.
    pub scratch: u64,
    /// [draws]
    pub results: u64,
    pub vocabulary: u32,
    pub stride: u32,
}

#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of SampleParams"][::std::mem::size_of::<SampleParams>() - 48usize];
    ["Alignment of SampleParams"][::std::mem::align_of::<SampleParams>() - 8usize];
    ["Offset of field: SampleParams::logits"][::std::mem::offset_of!(SampleParams, logits) - 0usize];
    ["Offset of field: SampleParams::draws"][::std::mem::offset_of!(SampleParams, draws) - 8usize];
    ["Offset of field: SampleParams::entries"][::std::mem::offset_of!(SampleParams, entries) - 16usize];
    ["Offset of field: SampleParams::scratch"][::std::mem::offset_of!(SampleParams, scratch) - 24usize];
    ["Offset of field: SampleParams::results"][::std::mem::offset_of!(SampleParams, results) - 32usize];
    ["Offset of field: SampleParams::vocabulary"][::std::mem::offset_of!(SampleParams, vocabulary) - 40usize];
    ["Offset of field: SampleParams::stride"][::std::mem::offset_of!(SampleParams, stride) - 44usize];
};
