//! The matrix product of training, `Y (+)= P W`, computed along the columns of Y.
//!
//! `Y[m, c] (+)= Σ_n P[m, n] W[n, c]`, over ascending `n`, and rows and columns may be computed in any company with the
//! same bits. With W a stored weight `[out, in]` this is `dx = Wᵀ dy`; with W read across it is the forward pass
//! `y = W x`; with P read across it is the sum over rows that is a parameter's gradient, `G += Pᵀ Q`.
//!
//! Blocking: a tile of up to 6 × 4 accumulators stays in registers for a block of `n`. The weights of that block are
//! brought to f32 and along columns once (in L1) for all row tiles; f32 weights that lie so already and that few row
//! tiles use are read in place.
//!
//! Inference has a product of its own ([`gemm`](crate::backend::cpu::gemm)), made for few rows: it reads weights along
//! K as they are stored, but sums lanes for every output. With many rows, as training has them, turning the weights
//! round costs less. The two differ in the order of a sum, so in rounding.

use std::cell::RefCell;
use std::ops::Range;

use crate::backend::Write;
use crate::backend::cpu::linear::blocks;
use crate::backend::cpu::simd::{BF16, Element, F16, F32, Isa, Simd, multiversion};
use crate::tensor::DType;

/// Columns of a panel of widened weights, and how deep it is: 24 KiB of L1.
const PANEL_COLUMNS: usize = 64;
const PANEL_DEPTH: usize = 96;

/// Up to so many rows, f32 weights are read where they lie.
const DIRECT_ROWS: usize = 24;

/// In what order a sum is taken.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Sum {
    /// Term after term, on top of what Y holds: may be cut anywhere into calls.
    Running,
    /// A sum for each [`PANEL_DEPTH`] terms, which are then added up: rounds less.
    Panels,
}

/// What lies side by side in W.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Along {
    /// `W[n, c]` lies at `w + n · w_stride + c`.
    Columns,
    /// `W[n, c]` lies at `w + c · w_stride + n`.
    Depth,
}

/// `Y (+)= P W` for some rows and columns.
#[derive(Clone)]
pub struct Product {
    /// `P[m, n]` lies at `p + m · p_row + n · p_column`.
    pub p: *const f32,
    pub p_row: usize,
    pub p_column: usize,
    /// Row 0, column 0 of W, and the elements from one row (or column) to the next.
    pub w: *const u8,
    pub dtype: DType,
    pub along: Along,
    pub w_stride: usize,
    /// Rows of W.
    pub depth: usize,
    pub rows: Range<usize>,
    pub columns: Range<usize>,
    /// Row 0, column 0 of Y.
    pub y: *mut f32,
    pub y_stride: usize,
    pub write: Write,
    pub sum: Sum,
}

thread_local! {
    static PANEL: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// Computes one block of Y.
///
/// # Safety
/// The pointers of `product` must cover its rows, columns and depth, nobody else may touch the block of Y, and `isa` must
/// be one of [`Isa::available`].
pub unsafe fn accumulate(isa: Isa, product: &Product) {
    PANEL.with_borrow_mut(|panel| {
        panel.resize(PANEL_COLUMNS * PANEL_DEPTH, 0.0);
        // SAFETY: passed on.
        unsafe { accumulate_with(isa, product, panel.as_mut_ptr()) };
    });
}

multiversion! {
    fn accumulate_with(product: &Product, panel: *mut f32) = accumulate_body
}

#[inline(always)]
unsafe fn accumulate_body<S: Simd>(product: &Product, panel: *mut f32) {
    // SAFETY: passed on from the caller.
    unsafe {
        match product.dtype {
            DType::F32 => accumulate_stored::<S, F32>(product, panel),
            DType::BF16 => accumulate_stored::<S, BF16>(product, panel),
            DType::F16 => accumulate_stored::<S, F16>(product, panel),
        }
    }
}

/// Some columns of W as tiles read them, and which part of the sum they are.
#[derive(Clone, Copy)]
struct Panel {
    w: *const f32,
    stride: usize,
    first: usize,
    depth: usize,
    column: usize,
    width: usize,
}

#[inline(always)]
unsafe fn accumulate_stored<S: Simd, E: Element>(product: &Product, panel: *mut f32) {
    for columns in blocks(product.columns.clone(), PANEL_COLUMNS) {
        let width = columns.len();
        let direct = E::SIZE == F32::SIZE
            && product.along == Along::Columns
            && width % S::LANES == 0
            && product.rows.len() <= DIRECT_ROWS;
        let mut first = 0;
        loop {
            let depth = (product.depth - first).min(PANEL_DEPTH);
            let stride = product.w_stride * E::SIZE;
            let stored = match product.along {
                Along::Columns => product.w.wrapping_add(first * stride + columns.start * E::SIZE),
                Along::Depth => product.w.wrapping_add(columns.start * stride + first * E::SIZE),
            };
            let (w, stride) = if direct {
                (stored.cast::<f32>(), product.w_stride)
            } else {
                // SAFETY: `depth` times `width` elements are readable; the panel holds them.
                unsafe {
                    match product.along {
                        Along::Columns => widen::<S, E>(stored, stride, depth, width, panel),
                        Along::Depth => turn::<S, E>(stored, stride, depth, width, panel),
                    }
                }
                (panel.cast_const(), PANEL_COLUMNS)
            };
            let part = Panel { w, stride, first, depth, column: columns.start, width };
            // SAFETY: passed on from the caller.
            unsafe { row_tiles::<S>(product, &part) };
            first += depth;
            if first >= product.depth {
                break;
            }
        }
    }
}

/// Copies rows of `width` elements into the panel, as f32 and with zeros up to a whole vector.
#[inline(always)]
unsafe fn widen<S: Simd, E: Element>(
    from: *const u8,
    stride: usize,
    depth: usize,
    width: usize,
    panel: *mut f32,
) {
    // SAFETY: passed on from the caller.
    unsafe {
        for n in 0..depth {
            let (from, to) = (from.add(n * stride), panel.add(n * PANEL_COLUMNS));
            let mut c = 0;
            while c + S::LANES <= width {
                S::store(to.add(c), E::load::<S>(from.add(c * E::SIZE)));
                c += S::LANES;
            }
            if c < width {
                S::store(to.add(c), E::load_partial::<S>(from.add(c * E::SIZE), width - c));
            }
        }
    }
}

/// [`widen`] of `width` rows of `depth` elements, which become the panel's columns.
#[inline(always)]
unsafe fn turn<S: Simd, E: Element>(
    from: *const u8,
    stride: usize,
    depth: usize,
    width: usize,
    panel: *mut f32,
) {
    for c in (0..width).step_by(S::LANES) {
        for n in (0..depth).step_by(S::LANES) {
            // SAFETY: passed on from the caller; both sides of the panel are whole vectors.
            unsafe {
                let mut square = [S::zero(); 16];
                for (lane, vector) in square.iter_mut().enumerate().take(S::LANES.min(width - c)) {
                    let from = from.add((c + lane) * stride + n * E::SIZE);
                    *vector = match depth - n {
                        rest if rest < S::LANES => E::load_partial::<S>(from, rest),
                        _ => E::load::<S>(from),
                    };
                }
                S::transpose(&mut square);
                for (lane, vector) in square.iter().enumerate().take(S::LANES) {
                    S::store(panel.add((n + lane) * PANEL_COLUMNS + c), *vector);
                }
            }
        }
    }
}

/// Rows and vectors of the register tile.
const fn tile_shape(isa: Isa) -> (usize, usize) {
    match isa {
        Isa::Avx512 => (6, 4),
        Isa::Avx2 => (6, 2),
        Isa::Portable => (2, 2),
    }
}

#[inline(always)]
unsafe fn row_tiles<S: Simd>(product: &Product, panel: &Panel) {
    let mut row = product.rows.start;
    while row < product.rows.end {
        // As even as can be: 8 rows are two tiles of 4, not one of 6 and one of 2.
        let left = product.rows.end - row;
        let height = left.div_ceil(left.div_ceil(tile_shape(S::ISA).0));
        // SAFETY: passed on from the caller.
        unsafe {
            match height {
                1 => column_tiles::<S, 1>(product, panel, row),
                2 => column_tiles::<S, 2>(product, panel, row),
                3 => column_tiles::<S, 3>(product, panel, row),
                4 => column_tiles::<S, 4>(product, panel, row),
                5 => column_tiles::<S, 5>(product, panel, row),
                _ => column_tiles::<S, 6>(product, panel, row),
            }
        }
        row += height;
    }
}

#[inline(always)]
unsafe fn column_tiles<S: Simd, const ROWS: usize>(product: &Product, panel: &Panel, row: usize) {
    let mut column = 0;
    while column < panel.width {
        let vectors = (panel.width - column).div_ceil(S::LANES);
        // SAFETY: passed on from the caller.
        unsafe {
            column += match vectors {
                4.. if tile_shape(S::ISA).1 >= 4 => tile::<S, ROWS, 4>(product, panel, row, column),
                2.. => tile::<S, ROWS, 2>(product, panel, row, column),
                _ => tile::<S, ROWS, 1>(product, panel, row, column),
            };
        }
    }
}

/// Adds a panel's part of the sum to one tile; returns the columns it has.
#[inline(always)]
unsafe fn tile<S: Simd, const ROWS: usize, const VECTORS: usize>(
    product: &Product,
    panel: &Panel,
    row: usize,
    column: usize,
) -> usize {
    let width = (panel.width - column).min(VECTORS * S::LANES);
    // Elements of the last vector.
    let last = width - (VECTORS - 1) * S::LANES;
    let at = |m: usize, i: usize| {
        let element = (row + m) * product.y_stride + panel.column + column + i * S::LANES;
        product.y.wrapping_add(element)
    };
    let p = product.p.wrapping_add(row * product.p_row + panel.first * product.p_column);
    // SAFETY: passed on from the caller.
    unsafe {
        let mut sums = [[S::zero(); VECTORS]; ROWS];
        let goes_on = panel.first > 0 || product.write == Write::Add;
        let count = |i: usize| if i + 1 == VECTORS { last } else { S::LANES };
        if goes_on && product.sum == Sum::Running {
            for (m, row) in sums.iter_mut().enumerate() {
                for (i, sum) in row.iter_mut().enumerate() {
                    *sum = load::<S>(at(m, i), count(i));
                }
            }
        }
        for n in 0..panel.depth {
            let w = panel.w.add(n * panel.stride + column);
            let mut weights = [S::zero(); VECTORS];
            for (i, weight) in weights.iter_mut().enumerate() {
                *weight = S::load(w.add(i * S::LANES));
            }
            for (m, row) in sums.iter_mut().enumerate() {
                let factor = S::splat(*p.add(m * product.p_row + n * product.p_column));
                for (sum, weight) in row.iter_mut().zip(weights) {
                    *sum = S::fma(factor, weight, *sum);
                }
            }
        }
        if goes_on && product.sum == Sum::Panels {
            for (m, row) in sums.iter_mut().enumerate() {
                for (i, sum) in row.iter_mut().enumerate() {
                    *sum = S::add(load::<S>(at(m, i), count(i)), *sum);
                }
            }
        }
        for (m, row) in sums.iter().enumerate() {
            for (i, sum) in row.iter().enumerate() {
                match count(i) {
                    count if count < S::LANES => S::store_partial(at(m, i), *sum, count),
                    _ => S::store(at(m, i), *sum),
                }
            }
        }
    }
    width
}

/// The first `count` elements of up to a whole vector, zero behind them.
#[inline(always)]
unsafe fn load<S: Simd>(from: *const f32, count: usize) -> S::V {
    // SAFETY: passed on from the caller.
    unsafe { if count < S::LANES { S::load_partial(from, count) } else { S::load(from) } }
}
