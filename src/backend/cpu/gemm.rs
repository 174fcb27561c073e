//! The matrix product `Y = X Wᵀ`, whose loop over K goes on over the rank chunks of each row's experts.
//!
//! Both operands lie along K (`X` `[rows, K]`, `W` `[N, K]` as stored in a checkpoint), so an output is a dot product:
//! one accumulator vector of L lanes, lane `l` summing the products at `k ≡ l (mod L)` in ascending order, then the
//! products of the row's rank chunks (`V` and `B` chunks are 16 ranks wide), then one fixed tree over the lanes. Nothing
//! in that order depends on how many rows or columns are computed together: a register tile, a cache block or a thread
//! only decides *when* an output is computed. That is what makes a row's bits independent of its batch, and why this
//! is not a library call: the packed kernels of GEMM libraries choose their K order by the shape.
//!
//! Blocking: a tile of `TILE_ROWS × 6` accumulators stays in registers for a block of K; the weights of that block are
//! widened to f32 once (in L1) when several row tiles use them; between blocks of K the accumulator vectors rest in
//! memory, untouched.

use std::cell::RefCell;
use std::ops::Range;

use super::simd::{BF16, Element, F16, F32, Isa, Simd, multiversion};
use crate::backend::{CHUNK, Write};
use crate::tensor::DType;

/// Columns of a register tile.
pub const TILE_COLUMNS: usize = 6;

/// Elements of K per cache block: six widened weight rows of this length take 18 KiB of L1.
const K_BLOCK: usize = 768;

/// A chunk of 16 ranks of an expert's B at one site: `[N, 16]` as stored.
#[derive(Clone, Copy)]
pub struct ChunkB {
    pub data: *const u8,
    pub dtype: DType,
    /// Ranks that are not padding.
    pub ranks: usize,
}

/// What an expert does to the output besides its chunks.
#[derive(Clone, Copy)]
pub struct Correction {
    /// Index of the expert in its run.
    pub expert: usize,
    /// `[N]`, times the gate.
    pub bias: *const f32,
    /// `[N]`, DoRA.
    pub column_scale: *const f32,
}

/// The rank chunks and corrections of a run of rows at one site.
#[derive(Clone, Default)]
pub struct RunTerms {
    pub rows: Range<usize>,
    /// Into [`Terms::chunks`].
    pub chunks: Range<usize>,
    /// Into [`Terms::corrections`].
    pub corrections: Range<usize>,
    /// Where `V` `[rows, chunks, 16]` starts.
    pub v: usize,
    /// Where the gates `[rows, experts]` start, and how many a row has.
    pub gates: *const f32,
    pub gate_width: usize,
}

/// Everything the rows' experts add at one site.
#[derive(Default)]
pub struct Terms {
    pub runs: Vec<RunTerms>,
    pub chunks: Vec<ChunkB>,
    pub corrections: Vec<Correction>,
}

/// One block of `Y`: what a thread computes at a time.
#[derive(Clone)]
pub struct Block<'a> {
    /// `[rows, k]`, the whole input.
    pub x: *const f32,
    pub x_stride: usize,
    /// `[columns, k]`, the whole weight.
    pub w: *const u8,
    pub dtype: DType,
    pub k: usize,
    pub rows: Range<usize>,
    pub columns: Range<usize>,
    /// Row 0, column 0 of the output.
    pub y: *mut f32,
    pub y_stride: usize,
    pub write: Write,
    pub bias: Option<&'a [f32]>,
    pub terms: Option<&'a Terms>,
    /// `V` of all runs.
    pub v: *const f32,
}

#[derive(Default)]
struct Scratch {
    /// Widened weights `[TILE_COLUMNS, K_BLOCK]`.
    panel: Vec<f32>,
    /// Accumulators between blocks of K.
    accumulators: Vec<f32>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// Computes one block of `Y`.
///
/// # Safety
/// The pointers of `block` must cover its rows, columns and K, nobody else may touch the output block, and `isa` must
/// be one of [`Isa::available`].
pub unsafe fn compute_block(isa: Isa, block: &Block<'_>) {
    // SAFETY: passed on.
    SCRATCH.with_borrow_mut(|scratch| unsafe { compute_with(isa, block, scratch) });
}

multiversion! {
    fn compute_with(block: &Block<'_>, scratch: &mut Scratch) = compute
}

#[inline(always)]
unsafe fn compute<S: Simd>(block: &Block<'_>, scratch: &mut Scratch) {
    // SAFETY: passed on from the caller.
    unsafe {
        match block.dtype {
            DType::F32 => compute_stored::<S, F32>(block, scratch),
            DType::BF16 => compute_stored::<S, BF16>(block, scratch),
            DType::F16 => compute_stored::<S, F16>(block, scratch),
        }
    }
}

/// A slice of K of some weight rows, as a tile reads them.
#[derive(Clone, Copy)]
struct Weights {
    data: *const u8,
    /// Bytes from one row to the next.
    stride: usize,
}

/// Where a tile lies and which part of K it adds.
#[derive(Clone, Copy)]
struct Tile {
    row: usize,
    k: usize,
    depth: usize,
    /// Nothing has been added yet.
    first: bool,
    /// `[rows, columns, lanes]` from the tile's first row on.
    accumulators: *mut f32,
}

#[inline(always)]
unsafe fn compute_stored<S: Simd, E: Element>(block: &Block<'_>, scratch: &mut Scratch) {
    let rows = block.rows.len();
    let many = rows > S::TILE_ROWS;
    let widen = E::SIZE != F32::SIZE && (many || E::SIZE != E::Direct::SIZE);
    let k_block = if many || widen { K_BLOCK } else { block.k.max(1) };
    let k_blocks = block.k.div_ceil(k_block).max(1);
    if widen {
        scratch.panel.resize(TILE_COLUMNS * K_BLOCK, 0.0);
    }
    // With one block of K the accumulators of a column tile are finished before the next tile needs the room.
    let tile_columns = if k_blocks > 1 { block.columns.len() } else { TILE_COLUMNS };
    let wanted = rows * tile_columns * S::LANES;
    if scratch.accumulators.len() < wanted {
        scratch.accumulators.resize(wanted, 0.0);
    }
    for index in 0..k_blocks {
        let k = index * k_block..((index + 1) * k_block).min(block.k);
        let mut column = block.columns.start;
        while column < block.columns.end {
            let width = match block.columns.end - column {
                // Two tiles of 4, not one of 6 and two of 1: ranks are often 8.
                8 => 4,
                TILE_COLUMNS.. => TILE_COLUMNS,
                4.. => 4,
                _ => 1,
            };
            // SAFETY: the caller's pointers cover rows, columns and K; the scratch was sized above.
            unsafe {
                let stride = block.k * E::SIZE;
                let stored = Weights { data: block.w.add(column * stride + k.start * E::SIZE), stride };
                let resting = if k_blocks > 1 { (column - block.columns.start) * rows * S::LANES } else { 0 };
                let accumulators = scratch.accumulators.as_mut_ptr().add(resting);
                let tile = Tile {
                    row: block.rows.start,
                    k: k.start,
                    depth: k.len(),
                    first: index == 0,
                    accumulators,
                };
                if widen {
                    let panel = scratch.panel.as_mut_ptr();
                    for n in 0..width {
                        widen_row::<S, E>(stored.data.add(n * stride), k.len(), panel.add(n * K_BLOCK));
                    }
                    let widened = Weights { data: panel.cast(), stride: K_BLOCK * F32::SIZE };
                    row_tiles::<S, F32>(block, widened, width, tile);
                } else {
                    row_tiles::<S, E::Direct>(block, stored, width, tile);
                }
                if index + 1 == k_blocks {
                    finish_columns(S::ISA, block, column, width, accumulators);
                }
            }
            column += width;
        }
    }
}

#[inline(always)]
unsafe fn widen_row<S: Simd, E: Element>(from: *const u8, count: usize, to: *mut f32) {
    let mut k = 0;
    // SAFETY: `count` elements are readable and writable.
    unsafe {
        while k + S::LANES <= count {
            S::store(to.add(k), E::load::<S>(from.add(k * E::SIZE)));
            k += S::LANES;
        }
        if k < count {
            S::store_partial(to.add(k), E::load_partial::<S>(from.add(k * E::SIZE), count - k), count - k);
        }
    }
}

/// Walks the rows of a block in register tiles, from `tile` on.
#[inline(always)]
unsafe fn row_tiles<S: Simd, E: Element>(block: &Block<'_>, weights: Weights, width: usize, mut tile: Tile) {
    while tile.row < block.rows.end {
        let left = block.rows.end - tile.row;
        let height = match left {
            4.. if S::TILE_ROWS >= 4 => 4,
            2.. if S::TILE_ROWS >= 2 => 2,
            _ => 1,
        };
        // SAFETY: passed on from the caller.
        unsafe {
            match (height, width) {
                (4, 6) => compute_tile::<S, E, 4, 6>(block, weights, &tile),
                (4, 4) => compute_tile::<S, E, 4, 4>(block, weights, &tile),
                (4, _) => compute_tile::<S, E, 4, 1>(block, weights, &tile),
                (2, 6) => compute_tile::<S, E, 2, 6>(block, weights, &tile),
                (2, 4) => compute_tile::<S, E, 2, 4>(block, weights, &tile),
                (2, _) => compute_tile::<S, E, 2, 1>(block, weights, &tile),
                (_, 6) => compute_tile::<S, E, 1, 6>(block, weights, &tile),
                (_, 4) => compute_tile::<S, E, 1, 4>(block, weights, &tile),
                (_, _) => compute_tile::<S, E, 1, 1>(block, weights, &tile),
            }
        }
        tile.row += height;
        tile.accumulators = tile.accumulators.wrapping_add(height * width * S::LANES);
    }
}

#[inline(always)]
unsafe fn compute_tile<S: Simd, E: Element, const ROWS: usize, const COLUMNS: usize>(
    block: &Block<'_>,
    weights: Weights,
    tile: &Tile,
) {
    // SAFETY: passed on from the caller.
    unsafe {
        let mut sums = [[S::zero(); COLUMNS]; ROWS];
        if !tile.first {
            for (m, row) in sums.iter_mut().enumerate() {
                for (n, sum) in row.iter_mut().enumerate() {
                    *sum = S::load(tile.accumulators.add((m * COLUMNS + n) * S::LANES));
                }
            }
        }
        let x = block.x.wrapping_add(tile.row * block.x_stride + tile.k);
        let depth = tile.depth;
        let mut k = 0;
        while k + S::LANES <= depth {
            let mut inputs = [S::zero(); ROWS];
            for (m, input) in inputs.iter_mut().enumerate() {
                *input = S::load(x.add(m * block.x_stride + k));
            }
            #[expect(clippy::needless_range_loop, reason = "two indices, as in the formula")]
            for n in 0..COLUMNS {
                let w = E::load::<S>(weights.data.add(n * weights.stride + k * E::SIZE));
                for m in 0..ROWS {
                    sums[m][n] = S::fma(inputs[m], w, sums[m][n]);
                }
            }
            k += S::LANES;
        }
        if k < depth {
            for n in 0..COLUMNS {
                let w = E::load_partial::<S>(weights.data.add(n * weights.stride + k * E::SIZE), depth - k);
                for (m, row) in sums.iter_mut().enumerate() {
                    let input = S::load_partial(x.add(m * block.x_stride + k), depth - k);
                    row[n] = S::fma(input, w, row[n]);
                }
            }
        }
        for (m, row) in sums.iter().enumerate() {
            for (n, sum) in row.iter().enumerate() {
                S::store(tile.accumulators.add((m * COLUMNS + n) * S::LANES), *sum);
            }
        }
    }
}

multiversion! {
    /// Finishes `width` columns of all rows of a block, whose accumulators `[rows, width, lanes]` hold the whole K.
    ///
    /// # Safety
    /// As [`compute_block`]; chunks and corrections must have as many columns as the weight.
    fn finish_columns(
        block: &Block<'_>,
        column: usize,
        width: usize,
        accumulators: *const f32,
    ) = finish_columns_body
}

#[inline(always)]
unsafe fn finish_columns_body<S: Simd>(
    block: &Block<'_>,
    column: usize,
    width: usize,
    accumulators: *const f32,
) {
    // SAFETY: passed on from the caller.
    unsafe {
        match width {
            6 => finish_tile::<S, 6>(block, column, accumulators),
            4 => finish_tile::<S, 4>(block, column, accumulators),
            _ => finish_tile::<S, 1>(block, column, accumulators),
        }
    }
}

/// Goes on from the frozen products over each row's rank chunks, sums the lanes and writes the outputs.
#[inline(always)]
unsafe fn finish_tile<S: Simd, const COLUMNS: usize>(
    block: &Block<'_>,
    column: usize,
    mut accumulators: *const f32,
) {
    let runs = block.terms.map_or(&[][..], |terms| &terms.runs);
    let mut next = runs.partition_point(|run| run.rows.end <= block.rows.start);
    let mut row = block.rows.start;
    while row < block.rows.end {
        let run = runs.get(next);
        let end = run.map_or(block.rows.end, |run| run.rows.end.min(block.rows.end));
        next += 1;
        while row < end {
            // SAFETY: passed on from the caller.
            unsafe {
                let mut sums = [S::zero(); COLUMNS];
                for (n, sum) in sums.iter_mut().enumerate() {
                    *sum = S::load(accumulators.add(n * S::LANES));
                }
                let mut added = [0f32; COLUMNS];
                if let (Some(terms), Some(run)) = (block.terms, run) {
                    if !run.corrections.is_empty() {
                        correct::<S, COLUMNS>(terms, run, row, column, &mut sums, &mut added);
                    }
                    let chunks = &terms.chunks[run.chunks.clone()];
                    let mut v = block.v.wrapping_add(run.v + (row - run.rows.start) * chunks.len() * CHUNK);
                    for chunk in chunks {
                        match chunk.dtype {
                            DType::F32 => add_chunk::<S, F32, COLUMNS>(v, chunk.data, column, &mut sums),
                            DType::BF16 => add_chunk::<S, BF16, COLUMNS>(v, chunk.data, column, &mut sums),
                            DType::F16 => add_chunk::<S, F16, COLUMNS>(v, chunk.data, column, &mut sums),
                        }
                        v = v.wrapping_add(CHUNK);
                    }
                }
                write_row::<S, COLUMNS>(block, row, column, &sums, &added);
                accumulators = accumulators.add(COLUMNS * S::LANES);
            }
            row += 1;
        }
    }
}

/// `sums[n] += v · b[column + n]` over the 16 ranks of a chunk.
#[inline(always)]
unsafe fn add_chunk<S: Simd, E: Element, const COLUMNS: usize>(
    v: *const f32,
    b: *const u8,
    column: usize,
    sums: &mut [S::V; COLUMNS],
) {
    // SAFETY: passed on from the caller.
    unsafe {
        let mut lane = 0;
        while lane < CHUNK {
            let ranks = S::load(v.add(lane));
            for (n, sum) in sums.iter_mut().enumerate() {
                *sum = S::fma(ranks, E::load::<S>(b.add(((column + n) * CHUNK + lane) * E::SIZE)), *sum);
            }
            lane += S::LANES;
        }
    }
}

#[inline(always)]
unsafe fn write_row<S: Simd, const COLUMNS: usize>(
    block: &Block<'_>,
    row: usize,
    column: usize,
    sums: &[S::V; COLUMNS],
    added: &[f32; COLUMNS],
) {
    // SAFETY: passed on from the caller.
    unsafe {
        let mut values = *added;
        for (value, sum) in values.iter_mut().zip(sums) {
            *value += S::sum(*sum);
        }
        if let Some(bias) = block.bias {
            for (value, bias) in values.iter_mut().zip(&bias[column..column + COLUMNS]) {
                *value += bias;
            }
        }
        let y = block.y.add(row * block.y_stride + column);
        for (n, value) in values.into_iter().enumerate() {
            match block.write {
                Write::Replace => *y.add(n) = value,
                Write::Add => *y.add(n) += value,
            }
        }
    }
}

/// Applies what the row's experts do besides their chunks: DoRA's scales of the frozen products, and biases.
#[inline(always)]
unsafe fn correct<S: Simd, const COLUMNS: usize>(
    terms: &Terms,
    run: &RunTerms,
    row: usize,
    column: usize,
    sums: &mut [S::V; COLUMNS],
    added: &mut [f32; COLUMNS],
) {
    let mut scales = [1f32; COLUMNS];
    let gates = run.gates.wrapping_add((row - run.rows.start) * run.gate_width);
    // SAFETY: passed on from the caller.
    unsafe {
        for correction in &terms.corrections[run.corrections.clone()] {
            correction.apply(*gates.add(correction.expert), column, &mut scales, added);
        }
        for (sum, scale) in sums.iter_mut().zip(scales) {
            *sum = S::mul(*sum, S::splat(scale));
        }
    }
}

impl Correction {
    /// Adds what this expert does to some columns: DoRA's scale of the frozen product, and its bias.
    ///
    /// # Safety
    /// The columns must exist.
    pub unsafe fn apply(&self, gate: f32, column: usize, scales: &mut [f32], added: &mut [f32]) {
        // SAFETY: passed on from the caller.
        unsafe {
            for n in 0..added.len() {
                if !self.bias.is_null() {
                    added[n] += gate * *self.bias.add(column + n);
                }
                if !self.column_scale.is_null() {
                    scales[n] += gate * (*self.column_scale.add(column + n) - 1.0);
                }
            }
        }
    }
}
