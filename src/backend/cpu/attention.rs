//! Causal attention over the paged cache.
//!
//! Every query goes over its own keys in order of position: scores, their maximum, exponentials and their sum, then
//! the weighted sum of values. Queries (rows and the heads that share a key head) are taken four at a time only to
//! load keys and values once; each keeps its own order, so its bits depend on its own sequence alone.

use std::cell::RefCell;
use std::ops::Range;

use super::kv_cache::KvCache;
use super::parallel::{Shared, parallel_for};
use super::sampling::{exp_or_nan, largest};
use super::simd::{Simd, multiversion};
use super::{Buffer, Isa};
use crate::backend::{AttentionShape, PAGE, Rows, SequenceRows};

/// Queries that share loads.
const QUERIES: usize = 4;

/// Rows of one piece of work.
const ROW_BLOCK: usize = 16;

thread_local! {
    static SCORES: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// One piece: some rows of one sequence, all query heads of one key head.
struct Piece<'a> {
    cache: &'a KvCache,
    block: usize,
    pages: &'a [u32],
    sequence: &'a SequenceRows,
    rows: Range<usize>,
    kv_head: usize,
    window: Option<usize>,
    qkv: *const f32,
    y: *mut f32,
}

/// One query vector: where it is read, where its result goes, and the keys it sees.
#[derive(Clone)]
struct Query {
    q: *const f32,
    y: *mut f32,
    keys: Range<usize>,
}

multiversion! {
    fn attend_piece(piece: &Piece<'_>, scores: &mut Vec<f32>) = attend_piece_body
}

/// Pieces of a step, kept between calls.
pub(super) type Pieces = Vec<(usize, Range<usize>)>;

#[expect(clippy::too_many_arguments, reason = "the operation's own arguments")]
pub(super) fn attention(
    isa: Isa,
    pieces: &mut Pieces,
    qkv: &Buffer,
    window: Option<usize>,
    rows: &Rows,
    cache: &KvCache,
    block: usize,
    y: &mut Buffer,
) {
    let AttentionShape { heads, kv_heads, head_dim } = cache.shape;
    assert!(qkv.width == cache.shape.qkv_width() && y.width == heads * head_dim, "attention widths");
    assert!(
        qkv.data.len() >= rows.len() * qkv.width && y.data.len() >= rows.len() * y.width,
        "rows exceed the buffers"
    );
    pieces.clear();
    let mut work = 0;
    for (index, sequence) in rows.sequences.iter().enumerate() {
        let length = sequence.start + sequence.rows.len();
        assert!(sequence.pages.len() * PAGE >= length, "pages for every position");
        work += sequence.rows.len() * length * heads * head_dim * 2;
        for start in sequence.rows.clone().step_by(ROW_BLOCK) {
            pieces.push((index, start..(start + ROW_BLOCK).min(sequence.rows.end)));
        }
    }
    let pieces = &*pieces;
    let (input, output) = (Shared::new(qkv.data.as_ptr().cast_mut()), Shared::new(y.data.as_mut_ptr()));
    parallel_for(pieces.len() * kv_heads, work, |index| {
        let (sequence, piece_rows) = &pieces[index / kv_heads];
        let sequence = &rows.sequences[*sequence];
        let piece = Piece {
            cache,
            block,
            pages: &rows.pages[sequence.pages.clone()],
            sequence,
            rows: piece_rows.clone(),
            kv_head: index % kv_heads,
            window,
            qkv: input.get(),
            y: output.get(),
        };
        // SAFETY: buffers cover all rows (asserted above); a piece writes its own rows and heads.
        SCORES.with_borrow_mut(|scores| unsafe { attend_piece(isa, &piece, scores) });
    });
}

impl Piece<'_> {
    /// Query vector `index` of the piece: row after row, head after head.
    fn query(&self, index: usize) -> Query {
        let AttentionShape { heads, kv_heads, head_dim } = self.cache.shape;
        let group = heads / kv_heads;
        let (row, head) = (self.rows.start + index / group, self.kv_head * group + index % group);
        let position = self.sequence.start + row - self.sequence.rows.start;
        let first = self.window.map_or(0, |window| (position + 1).saturating_sub(window));
        Query {
            q: self.qkv.wrapping_add(row * self.cache.shape.qkv_width() + head * head_dim),
            y: self.y.wrapping_add((row * heads + head) * head_dim),
            keys: first..position + 1,
        }
    }

    /// The value at a key position, from element `d` on.
    fn value(&self, key: usize, d: usize) -> *const f32 {
        let values = self.cache.values(self.block, self.pages[key / PAGE], self.kv_head);
        values[key % PAGE * self.cache.shape.head_dim + d..].as_ptr()
    }
}

#[inline(always)]
unsafe fn attend_piece_body<S: Simd>(piece: &Piece<'_>, scores: &mut Vec<f32>) {
    let count = piece.rows.len() * piece.cache.shape.heads / piece.cache.shape.kv_heads;
    let mut index = 0;
    // SAFETY: passed on from the caller.
    unsafe {
        while index + QUERIES <= count {
            attend::<S, QUERIES>(piece, &std::array::from_fn(|i| piece.query(index + i)), scores);
            index += QUERIES;
        }
        while index < count {
            attend::<S, 1>(piece, &[piece.query(index)], scores);
            index += 1;
        }
    }
}

#[inline(always)]
unsafe fn attend<S: Simd, const N: usize>(piece: &Piece<'_>, queries: &[Query; N], scores: &mut Vec<f32>) {
    let head_dim = piece.cache.shape.head_dim;
    let scale = 1.0 / (head_dim as f32).sqrt();
    let first = queries.iter().map(|query| query.keys.start).min().unwrap_or(0);
    let end = queries.iter().map(|query| query.keys.end).max().unwrap_or(0);
    let pages = first / PAGE..end.div_ceil(PAGE);
    let base = pages.start * PAGE;
    let stride = pages.len() * PAGE;
    if scores.len() < N * stride {
        // In large steps, so that a growing sequence does not allocate at every page.
        scores.resize((N * stride).next_power_of_two(), 0.0);
    }
    // SAFETY: a page's keys are `[head_dim, 16]`, queries hold `head_dim` elements, scores hold `[N, stride]`.
    unsafe {
        for page in pages {
            let keys = piece.cache.keys(piece.block, piece.pages[page], piece.kv_head).as_ptr();
            for lane in (0..PAGE).step_by(S::LANES) {
                let mut sums = [S::zero(); N];
                for d in 0..head_dim {
                    let key = S::load(keys.add(d * PAGE + lane));
                    for (sum, query) in sums.iter_mut().zip(queries) {
                        *sum = S::fma(S::splat(*query.q.add(d)), key, *sum);
                    }
                }
                for (n, sum) in sums.iter().enumerate() {
                    let to = scores.as_mut_ptr().add(n * stride + page * PAGE - base + lane);
                    S::store(to, S::mul(*sum, S::splat(scale)));
                }
            }
        }
    }
    let mut norms = [0f32; N];
    for (n, query) in queries.iter().enumerate() {
        let own = n * stride + query.keys.start - base..n * stride + query.keys.end - base;
        norms[n] = 1.0 / exponentials(&mut scores[own]);
    }
    // Ascending per query: keys only it sees, keys that all see, keys only it sees.
    let shared_start = queries.iter().map(|query| query.keys.start).max().unwrap_or(0);
    let shared_end = queries.iter().map(|query| query.keys.end).min().unwrap_or(0).max(shared_start);
    let weights: [*const f32; N] =
        std::array::from_fn(|n| scores.as_ptr().wrapping_add(n * stride).wrapping_sub(base));
    let mut d = 0;
    while d < head_dim {
        let left = head_dim - d;
        // SAFETY: passed on from the caller; weights cover every key of their query.
        unsafe {
            if left >= 4 * S::LANES {
                weigh::<S, N, 4>(piece, queries, &weights, &norms, shared_start..shared_end, d, 4 * S::LANES);
                d += 4 * S::LANES;
            } else {
                let width = left.min(S::LANES);
                weigh::<S, N, 1>(piece, queries, &weights, &norms, shared_start..shared_end, d, width);
                d += width;
            }
        }
    }
}

/// Replaces scores by `exp(score − maximum)`; returns their sum.
#[inline(always)]
fn exponentials(scores: &mut [f32]) -> f32 {
    let maximum = largest(scores);
    for score in &mut *scores {
        *score = exp_or_nan(*score - maximum);
    }
    // In the order of the keys, so that a vector's width does not matter.
    scores.iter().sum()
}

/// `y[d..d + width] = norm · Σ_j weight_j · value_j[d..d + width]` for every query, in `D` vectors.
#[inline(always)]
unsafe fn weigh<S: Simd, const N: usize, const D: usize>(
    piece: &Piece<'_>,
    queries: &[Query; N],
    weights: &[*const f32; N],
    norms: &[f32; N],
    shared: Range<usize>,
    d: usize,
    width: usize,
) {
    let partial = width < D * S::LANES;
    // SAFETY: passed on from the caller; a page's values are `[16, head_dim]`.
    unsafe {
        let mut sums = [[S::zero(); D]; N];
        for n in 0..N {
            for key in queries[n].keys.start..queries[n].keys.end.min(shared.start) {
                let value = load_value::<S, D>(piece.value(key, d), width);
                add_weighted::<S, D>(&mut sums[n], *weights[n].wrapping_add(key), value);
            }
        }
        for key in shared.clone() {
            let value = load_value::<S, D>(piece.value(key, d), width);
            for n in 0..N {
                add_weighted::<S, D>(&mut sums[n], *weights[n].wrapping_add(key), value);
            }
        }
        for n in 0..N {
            for key in queries[n].keys.start.max(shared.end)..queries[n].keys.end {
                let value = load_value::<S, D>(piece.value(key, d), width);
                add_weighted::<S, D>(&mut sums[n], *weights[n].wrapping_add(key), value);
            }
            for (i, sum) in sums[n].iter().enumerate() {
                let to = queries[n].y.add(d + i * S::LANES);
                let value = S::mul(*sum, S::splat(norms[n]));
                if partial { S::store_partial(to, value, width) } else { S::store(to, value) }
            }
        }
    }
}

/// `width` elements in `D` vectors; fewer than a vector's lanes only where `D` is 1.
#[inline(always)]
unsafe fn load_value<S: Simd, const D: usize>(from: *const f32, width: usize) -> [S::V; D] {
    // SAFETY: passed on from the caller.
    unsafe {
        let mut vectors = [S::zero(); D];
        if width < S::LANES {
            vectors[0] = S::load_partial(from, width);
        } else {
            for (i, vector) in vectors.iter_mut().enumerate() {
                *vector = S::load(from.add(i * S::LANES));
            }
        }
        vectors
    }
}

#[inline(always)]
unsafe fn add_weighted<S: Simd, const D: usize>(sums: &mut [S::V; D], weight: f32, value: [S::V; D]) {
    // SAFETY: registers only.
    unsafe {
        for (sum, value) in sums.iter_mut().zip(value) {
            *sum = S::fma(S::splat(weight), value, *sum);
        }
    }
}
