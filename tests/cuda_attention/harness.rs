//! Sequences, the steps they are computed in, what the kernels make of them, and what a plain loop in f64 does.

use loramux::backend::cuda::attention::{
    AttentionInputs, AttentionKernels, AttentionLimits, AttentionPath, AttentionStep, AttentionWork,
};
use loramux::backend::cuda::{DeviceBuffer, Half, Stream};
use loramux::backend::{AttentionShape, PAGE, Rows, SequenceRows};

use crate::cuda_device::device;
use crate::element::{NAN, element, half_of_smallest, half_ulp};
pub use crate::element::{bits, f};
pub use crate::random::Random;

/// One layer's q, k and v of every position of a sequence.
pub struct Sequence {
    pub length: usize,
    /// `[length, heads, head_dim]`
    pub q: Vec<Half>,
    /// `[length, kv_heads, head_dim]`
    pub k: Vec<Half>,
    pub v: Vec<Half>,
}

impl Sequence {
    /// Scores spread over several units, so that a few keys decide each row and every key decides some.
    pub fn new(random: &mut Random, shape: AttentionShape, length: usize) -> Self {
        let AttentionShape { heads, kv_heads, head_dim } = shape;
        Self {
            length,
            q: random.values(length * heads * head_dim, 3.0),
            k: random.values(length * kv_heads * head_dim, 3.0),
            v: random.values(length * kv_heads * head_dim, 1.0),
        }
    }
}

/// Some rows of a sequence in a step.
#[derive(Clone, Copy, Debug)]
pub struct Piece {
    pub sequence: usize,
    pub start: usize,
    pub rows: usize,
    pub path: AttentionPath,
}

impl Piece {
    pub fn all(sequences: &[Sequence], sequence: usize, path: AttentionPath) -> Self {
        Self { sequence, start: 0, rows: sequences[sequence].length, path }
    }

    /// Keys that its rows see.
    fn keys(&self, window: Option<usize>) -> std::ops::Range<usize> {
        let first = window.map_or(0, |window| (self.start + 1).saturating_sub(window));
        first..self.start + self.rows
    }
}

/// A step's memory on the device, and its row list.
pub struct Inputs {
    pub q: Vec<Half>,
    pub keys: Vec<Half>,
    pub values: Vec<Half>,
    pub rows: Rows,
}

/// The kernels on the device, with room for any step of the tests.
pub struct OnDevice {
    pub stream: Stream,
    pub kernels: AttentionKernels,
    pub shape: AttentionShape,
    pub limits: AttentionLimits,
}

impl OnDevice {
    pub fn new(shape: AttentionShape, limits: AttentionLimits) -> Self {
        let device = device();
        Self {
            stream: device.stream().expect("a stream"),
            kernels: AttentionKernels::new(&device, element()).expect("kernels"),
            shape,
            limits,
        }
    }

    /// Elements between the starts of two rows of q, of which the rest must not be read.
    pub fn q_stride(&self) -> usize {
        self.shape.qkv_width().next_multiple_of(8)
    }

    pub fn y_stride(&self) -> usize {
        (self.shape.heads * self.shape.head_dim).next_multiple_of(8) + 8
    }

    /// Puts the keys and values that the pieces see into pages at random; all else is NaN, and pages that no position
    /// has reached have numbers of no page.
    pub fn inputs(
        &self,
        random: &mut Random,
        sequences: &[Sequence],
        window: Option<usize>,
        step: &[Piece],
    ) -> Inputs {
        let AttentionShape { heads, kv_heads, head_dim } = self.shape;
        let mut free: Vec<u32> = (0..self.limits.cache_pages as u32).collect();
        for i in (1..free.len()).rev() {
            free.swap(i, random.below(i + 1));
        }
        let len = self.limits.cache_pages * kv_heads * PAGE * head_dim;
        let (mut keys, mut values) = (vec![NAN; len], vec![NAN; len]);
        let (mut q, mut rows) = (Vec::new(), Rows::default());
        for piece in step {
            let sequence = &sequences[piece.sequence];
            let length = piece.start + piece.rows;
            let mut pages = free.split_off(free.len() - length.div_ceil(PAGE));
            for key in piece.keys(window) {
                for head in 0..kv_heads {
                    let page = pages[key / PAGE] as usize;
                    let to = ((page * kv_heads + head) * PAGE + key % PAGE) * head_dim;
                    let from = (key * kv_heads + head) * head_dim;
                    keys[to..to + head_dim].copy_from_slice(&sequence.k[from..from + head_dim]);
                    values[to..to + head_dim].copy_from_slice(&sequence.v[from..from + head_dim]);
                }
            }
            pages.extend([u32::MAX; 2]);
            let width = heads * head_dim;
            for row in piece.start..length {
                q.extend_from_slice(&sequence.q[row * width..(row + 1) * width]);
                q.resize(q.len() + self.q_stride() - width, NAN);
            }
            rows.push_sequence(&vec![0; piece.rows], piece.start, 0, &pages, &[]);
        }
        Inputs { q, keys, values, rows }
    }

    pub fn work(&self) -> AttentionWork {
        AttentionWork::new(&self.stream, self.shape, self.limits).expect("a work list")
    }

    /// The outputs of each piece, `[rows, heads · head_dim]`.
    pub fn run(
        &self,
        random: &mut Random,
        sequences: &[Sequence],
        window: Option<usize>,
        step: &[Piece],
    ) -> Vec<Vec<Half>> {
        let inputs = self.inputs(random, sequences, window, step);
        let mut work = self.work();
        let path = |of: &SequenceRows| {
            let index = inputs.rows.sequences.iter().position(|other| other.pages == of.pages);
            step[index.expect("a sequence of the step")].path
        };
        work.set_by(&self.stream, &inputs.rows, path).expect("a work list");
        let whole = step.iter().any(|piece| piece.path == AttentionPath::Whole && piece.rows > 0);
        assert_eq!(work.has_whole(), whole, "the paths that were asked for");

        let upload = |values: &[Half]| {
            let buffer = DeviceBuffer::new(self.stream.device(), values.len(), "inputs").expect("memory");
            self.stream.upload(values, &buffer).expect("a copy");
            buffer
        };
        let (q, keys, values) = (upload(&inputs.q), upload(&inputs.keys), upload(&inputs.values));
        let rows = inputs.rows.len();
        let unwritten = vec![NAN; rows * self.y_stride()];
        let y = upload(&unwritten);
        let of_layer = AttentionInputs {
            q: q.slice(..),
            q_stride: self.q_stride(),
            keys: keys.slice(..),
            values: values.slice(..),
            y: y.slice(..),
            y_stride: self.y_stride(),
            window,
        };
        let launches = AttentionStep { work: &work, row_bound: rows, whole, overlap: true };
        let mut padded = unwritten.clone();
        // Twice: the first launch must leave the counters as it found them.
        for _ in 0..2 {
            self.stream.upload(&unwritten, &y).expect("a copy");
            self.kernels.attention(&self.stream, &of_layer, &launches).expect("attention");
        }
        self.stream.download(&y, &mut padded).expect("the outputs");
        self.unpadded(&padded, step)
    }

    /// The rows of y by piece, and nothing written beside them.
    pub fn unpadded(&self, padded: &[Half], step: &[Piece]) -> Vec<Vec<Half>> {
        let width = self.shape.heads * self.shape.head_dim;
        let mut rows = padded.chunks_exact(self.y_stride());
        let of_piece = |piece: &Piece| {
            let rows = rows.by_ref().take(piece.rows);
            rows.flat_map(|row| {
                assert!(row[width..].iter().all(|&value| f(value).is_nan()), "written past a row");
                row[..width].to_vec()
            })
            .collect()
        };
        step.iter().map(of_piece).collect()
    }
}

/// Panics unless every output of a piece lies within the error that a correct kernel can have.
///
/// Every weight has its own relative error ε: half a unit in its last place, and what fp32 scores bring; one that is
/// small beside the largest has half the smallest value besides. A common error of all weights cancels, so an output is
/// off by at most `ε / (1 − ε) · Σ w |v − y|`, by the rounding of fp32 sums, and by its own rounding.
pub fn assert_close(
    shape: AttentionShape,
    sequence: &Sequence,
    window: Option<usize>,
    piece: &Piece,
    outputs: &[Half],
) {
    let AttentionShape { heads, kv_heads, head_dim } = shape;
    let scale = 1.0 / (head_dim as f64).sqrt();
    assert_eq!(outputs.len(), piece.rows * heads * head_dim);
    for row in 0..piece.rows {
        let position = piece.start + row;
        let first = window.map_or(0, |window| (position + 1).saturating_sub(window));
        for head in 0..heads {
            let q = &sequence.q[(position * heads + head) * head_dim..][..head_dim];
            let vector = |of: &[Half], key: usize| -> Vec<f64> {
                let at = (key * kv_heads + head / (heads / kv_heads)) * head_dim;
                of[at..at + head_dim].iter().map(|&value| f(value)).collect()
            };
            let (mut scores, mut largest_size) = (Vec::new(), 0f64);
            for key in first..=position {
                let products = vector(&sequence.k, key).into_iter().zip(q).map(|(k, &q)| k * f(q));
                let (sum, size) = products.fold((0.0, 0.0), |(sum, size), p| (sum + p, size + p.abs()));
                scores.push(sum * scale);
                largest_size = largest_size.max(size * scale);
            }
            let maximum = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let weights: Vec<f64> = scores.iter().map(|score| (score - maximum).exp()).collect();
            let total: f64 = weights.iter().sum();
            let values: Vec<Vec<f64>> = (first..=position).map(|key| vector(&sequence.v, key)).collect();
            let of_weights = half_ulp() + largest_size * 2f64.powi(-19) + 2f64.powi(-20);
            for d in 0..head_dim {
                let weighted = |of: &dyn Fn(f64) -> f64| -> f64 {
                    weights.iter().zip(&values).map(|(w, v)| w * of(v[d])).sum::<f64>() / total
                };
                let wanted = weighted(&|v| v);
                let error = of_weights / (1.0 - of_weights) * weighted(&|v| (v - wanted).abs())
                    + half_of_smallest() * values.iter().map(|v| (v[d] - wanted).abs()).sum::<f64>() / total
                    + 2f64.powi(-18) * weighted(&f64::abs);
                let error = error + (wanted.abs() + error) * half_ulp() + half_of_smallest();
                let got = f(outputs[(row * heads + head) * head_dim + d]);
                assert!(
                    (got - wanted).abs() <= error,
                    "position {position}, head {head}, column {d}: {got}, wanted {wanted} ± {error}"
                );
            }
        }
    }
}
