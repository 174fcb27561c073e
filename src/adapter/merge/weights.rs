//! Adapters merged into a weight of the base, row by row, and taken out again.
//!
//! An adapter with weight `w` moves a site's weight by `w` times what it changes: `W' = W + w · s B A`; with a DoRA
//! magnitude `m`, `W' = W + w (m/n ⊙ (W + s B A) − W)` with `n = ‖W + s B A‖` over rows; where it replaces the module by
//! `S`, `W' = W + w (S − W)`. Several follow one another, each on the weight that the one before left. For an embedding
//! `[vocabulary, hidden]` read `(B A)ᵀ` for `B A`. Sums are in f64 and rounded once.

use rayon::prelude::*;

use crate::adapter::{SiteAdapter, SiteKind};
use crate::tensor::{Bytes, DType, Tensor};

/// What one adapter does to a weight.
#[derive(Clone, Copy, Debug)]
pub enum Change<'a> {
    Add(&'a SiteAdapter),
    /// By a weight of the same shape.
    Replace(&'a Tensor),
}

/// The norms `n` by row that DoRA divided by when a weight was merged: by adapter, in order; empty without DoRA.
pub type Norms = Vec<Vec<f64>>;

/// A weight with adapters merged into it one after another, each with its weight, stored as `dtype`; with the norms that
/// [`unmerge`] needs.
///
/// # Panics
/// When a shape does not fit.
pub fn merge(
    weight: &Tensor,
    kind: SiteKind,
    changes: &[(Change<'_>, f64)],
    dtype: DType,
) -> (Tensor, Norms) {
    let steps: Vec<Step<'_>> =
        changes.iter().map(|&(change, weight)| Step::new(change, kind, weight)).collect();
    let (merged, norms) = map_rows(weight, dtype, |row, values| {
        steps.iter().map(|step| step.apply(row, values)).collect::<Vec<Option<f64>>>()
    });
    let of_step = |step: usize| norms.iter().filter_map(|norms| norms[step]).collect();
    (merged, (0..steps.len()).map(of_step).collect())
}

/// The weight that `adapters` were merged into, from what [`merge`] gave: the last is taken out first. Exact but for
/// rounding to the dtypes.
///
/// # Panics
/// When a shape does not fit.
pub fn unmerge(
    merged: &Tensor,
    kind: SiteKind,
    adapters: &[(&SiteAdapter, f64)],
    norms: &Norms,
    dtype: DType,
) -> Tensor {
    let steps = adapters.iter().map(|&(adapter, weight)| Step::new(Change::Add(adapter), kind, weight));
    let steps: Vec<(Step<'_>, &Vec<f64>)> = steps.zip(norms).collect();
    let undo = |row: usize, values: &mut [f64]| {
        steps.iter().rev().for_each(|(step, norms)| step.undo(row, values, norms.get(row).copied()));
    };
    map_rows(merged, dtype, undo).0
}

/// The same values in another dtype.
pub fn convert(tensor: &Tensor, dtype: DType) -> Tensor {
    if tensor.dtype() == dtype { tensor.clone() } else { map_rows(tensor, dtype, |_, _| ()).0 }
}

/// One change, ready for rows.
enum Step<'a> {
    Add {
        /// Row `i` moves by `scale · Σ_r left[i, r] · right[r]`.
        left: Vec<f32>,
        right: Vec<f32>,
        rank: usize,
        scale: f64,
        magnitude: Option<&'a [f32]>,
        weight: f64,
    },
    Replace {
        by: &'a Tensor,
        weight: f64,
    },
}

impl<'a> Step<'a> {
    fn new(change: Change<'a>, kind: SiteKind, weight: f64) -> Self {
        match change {
            Change::Replace(by) => Step::Replace { by, weight },
            Change::Add(adapter) => {
                let (a, b) = (adapter.a.to_f32(), adapter.b.to_f32());
                let (left, right) = match kind {
                    SiteKind::Linear => (b, a),
                    SiteKind::Embedding => {
                        (transposed(&a, adapter.rank), transposed(&b, adapter.b.shape()[0]))
                    }
                };
                let magnitude = adapter.magnitude.as_deref();
                Step::Add { left, right, rank: adapter.rank, scale: adapter.scale.into(), magnitude, weight }
            }
        }
    }

    /// Changes a row; returns its norm where there is a magnitude.
    fn apply(&self, row: usize, values: &mut [f64]) -> Option<f64> {
        match self {
            Step::Replace { by, weight } if *weight == 1.0 => {
                read_row(by, row, values);
                None
            }
            Step::Replace { by, weight } => {
                let mut other = vec![0.0; values.len()];
                read_row(by, row, &mut other);
                values.iter_mut().zip(other).for_each(|(value, other)| *value += weight * (other - *value));
                None
            }
            Step::Add { magnitude: None, weight, .. } => {
                self.add_product(row, *weight, values);
                None
            }
            Step::Add { magnitude: Some(magnitude), weight, .. } => {
                let mut sum = values.to_vec();
                self.add_product(row, 1.0, &mut sum);
                let norm = sum.iter().map(|value| value * value).sum::<f64>().sqrt();
                let factor = f64::from(magnitude[row]) / norm;
                values
                    .iter_mut()
                    .zip(sum)
                    .for_each(|(value, sum)| *value += weight * (factor * sum - *value));
                Some(norm)
            }
        }
    }

    /// The row before [`apply`](Self::apply) changed it.
    fn undo(&self, row: usize, values: &mut [f64], norm: Option<f64>) {
        let Step::Add { magnitude, weight, .. } = self else { return };
        match (magnitude, norm) {
            // W' = (1 − w) W + w c (W + s B A) with c = m / n
            (Some(magnitude), Some(norm)) => {
                let factor = weight * f64::from(magnitude[row]) / norm;
                self.add_product(row, -factor, values);
                values.iter_mut().for_each(|value| *value /= 1.0 - weight + factor);
            }
            _ => self.add_product(row, -weight, values),
        }
    }

    /// `values += factor · scale · Σ_r left[row, r] · right[r]`.
    fn add_product(&self, row: usize, factor: f64, values: &mut [f64]) {
        let Step::Add { left, right, rank, scale, .. } = self else { return };
        let ranks = left[row * rank..(row + 1) * rank].iter().zip(right.chunks_exact(values.len()));
        for (left, right) in ranks {
            let factor = factor * scale * f64::from(*left);
            values.iter_mut().zip(right).for_each(|(value, right)| *value += factor * f64::from(*right));
        }
    }
}

/// Columns as rows; `rows` is how many rows there are.
fn transposed(values: &[f32], rows: usize) -> Vec<f32> {
    let columns = values.len() / rows;
    (0..columns).flat_map(|column| (0..rows).map(move |row| values[row * columns + column])).collect()
}

/// Widens a row of a stored matrix.
fn read_row(tensor: &Tensor, row: usize, values: &mut [f64]) {
    let size = values.len() * tensor.dtype().size();
    let bytes = tensor.bytes().slice(row * size..(row + 1) * size);
    let stored = Tensor::new(tensor.dtype(), vec![values.len()], bytes).to_f32();
    values.iter_mut().zip(stored).for_each(|(value, stored)| *value = stored.into());
}

/// The tensor with `change` made to every row (a vector is one row), and what that returned, row by row.
fn map_rows<T: Send>(
    tensor: &Tensor,
    dtype: DType,
    change: impl Fn(usize, &mut [f64]) -> T + Sync,
) -> (Tensor, Vec<T>) {
    let width = tensor.shape().last().copied().unwrap_or(1);
    let mut bytes = vec![0; tensor.len() * dtype.size()];
    let rows = bytes.par_chunks_exact_mut((width * dtype.size()).max(1)).enumerate();
    let returned = rows.map(|(row, bytes)| {
        let mut values = vec![0.0; width];
        read_row(tensor, row, &mut values);
        let returned = change(row, &mut values);
        for (bytes, value) in bytes.chunks_exact_mut(dtype.size()).zip(values) {
            match dtype {
                DType::F32 => bytes.copy_from_slice(&(value as f32).to_le_bytes()),
                DType::F16 => bytes.copy_from_slice(&half::f16::from_f64(value).to_le_bytes()),
                DType::BF16 => bytes.copy_from_slice(&half::bf16::from_f64(value).to_le_bytes()),
            }
        }
        returned
    });
    let returned = returned.collect();
    (Tensor::new(dtype, tensor.shape().to_vec(), Bytes::new(bytes)), returned)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROWS: usize = 5;
    const COLUMNS: usize = 4;
    const RANK: usize = 2;

    fn numbers(shape: [usize; 2], salt: f32) -> Tensor {
        let values: Vec<f32> = (0..shape[0] * shape[1]).map(|i| ((i as f32 + salt) * 1.7).sin()).collect();
        Tensor::from_f32(shape.to_vec(), &values)
    }

    fn adapter(salt: f32, magnitude: Option<Vec<f32>>) -> SiteAdapter {
        let (a, b) = (numbers([RANK, COLUMNS], salt), numbers([ROWS, RANK], salt + 0.5));
        SiteAdapter { site: 0, rank: RANK, scale: 1.5, a, b, bias: None, magnitude }
    }

    /// `scale · B A` in f64, by row.
    fn product(adapter: &SiteAdapter) -> Vec<Vec<f64>> {
        let (a, b) = (adapter.a.to_f32(), adapter.b.to_f32());
        let term = |row: usize, column: usize, rank: usize| {
            f64::from(b[row * RANK + rank]) * f64::from(a[rank * COLUMNS + column])
        };
        let element = |row, column| 1.5 * (0..RANK).map(|rank| term(row, column, rank)).sum::<f64>();
        (0..ROWS).map(|row| (0..COLUMNS).map(|column| element(row, column)).collect()).collect()
    }

    fn assert_near(got: &Tensor, wanted: &[Vec<f64>], allowed: f64) {
        let wanted: Vec<f64> = wanted.concat();
        assert_eq!(got.len(), wanted.len());
        for (index, (got, wanted)) in got.to_f32().into_iter().zip(wanted).enumerate() {
            assert!((f64::from(got) - wanted).abs() <= allowed, "element {index}: {got}, not {wanted}");
        }
    }

    fn rows_of(tensor: &Tensor) -> Vec<Vec<f64>> {
        let values: Vec<f64> = tensor.to_f32().into_iter().map(f64::from).collect();
        values.chunks(tensor.shape()[1]).map(<[f64]>::to_vec).collect()
    }

    #[test]
    fn adapters_are_added_by_weight_one_after_another() {
        let weight = numbers([ROWS, COLUMNS], 9.0);
        let magnitude = vec![0.5, 1.0, 2.0, 3.0, 0.1];
        let (plain, dora) = (adapter(1.0, None), adapter(2.0, Some(magnitude.clone())));
        let changes = [(Change::Add(&plain), 0.5), (Change::Add(&dora), 0.8)];
        let (merged, norms) = merge(&weight, SiteKind::Linear, &changes, DType::F32);

        let (first, second) = (product(&plain), product(&dora));
        let mut wanted = rows_of(&weight);
        for (row, values) in wanted.iter_mut().enumerate() {
            values.iter_mut().zip(&first[row]).for_each(|(value, change)| *value += 0.5 * change);
            let sum: Vec<f64> =
                values.iter().zip(&second[row]).map(|(value, change)| value + change).collect();
            let norm = sum.iter().map(|value| value * value).sum::<f64>().sqrt();
            let factor = f64::from(magnitude[row]) / norm;
            values.iter_mut().zip(sum).for_each(|(value, sum)| *value = 0.2 * *value + 0.8 * factor * sum);
        }
        assert_near(&merged, &wanted, 1e-6);
        assert_eq!((norms[0].len(), norms[1].len()), (0, ROWS));

        let back = unmerge(&merged, SiteKind::Linear, &[(&plain, 0.5), (&dora, 0.8)], &norms, DType::F32);
        assert_near(&back, &rows_of(&weight), 2e-6);
    }

    #[test]
    fn an_embedding_is_changed_by_the_transposed_product() {
        let adapter = adapter(1.0, None);
        let weight = numbers([COLUMNS, ROWS], 9.0);
        let (merged, norms) =
            merge(&weight, SiteKind::Embedding, &[(Change::Add(&adapter), 2.0)], DType::F32);
        let change = product(&adapter);
        let mut wanted = rows_of(&weight);
        for (column, values) in wanted.iter_mut().enumerate() {
            values.iter_mut().enumerate().for_each(|(row, value)| *value += 2.0 * change[row][column]);
        }
        assert_near(&merged, &wanted, 1e-6);
        let back = unmerge(&merged, SiteKind::Embedding, &[(&adapter, 2.0)], &norms, DType::F32);
        assert_near(&back, &rows_of(&weight), 1e-6);
    }

    #[test]
    fn a_whole_replacement_is_exact_and_a_weighted_one_lies_between() {
        let (weight, other) = (numbers([ROWS, COLUMNS], 1.0), numbers([ROWS, COLUMNS], 5.0));
        let replaced =
            |by: f64| merge(&weight, SiteKind::Linear, &[(Change::Replace(&other), by)], DType::F32).0;
        assert_eq!(replaced(1.0).bytes()[..], other.bytes()[..]);
        let mut wanted = rows_of(&weight);
        wanted.iter_mut().zip(rows_of(&other)).for_each(|(values, others)| {
            values.iter_mut().zip(others).for_each(|(value, other)| *value = 0.75 * *value + 0.25 * other);
        });
        assert_near(&replaced(0.25), &wanted, 1e-6);
    }

    #[test]
    fn a_merged_weight_is_rounded_once_to_its_dtype() {
        let weight = numbers([ROWS, COLUMNS], 9.0);
        let (one, other) = (adapter(1.0, None), adapter(2.0, None));
        let changes = [(Change::Add(&one), 1.0), (Change::Add(&other), 1.0)];
        let (exact, _) = merge(&weight, SiteKind::Linear, &changes, DType::F32);
        for (dtype, places) in [(DType::BF16, 8), (DType::F16, 11)] {
            let (rounded, _) = merge(&weight, SiteKind::Linear, &changes, dtype);
            assert_eq!((rounded.dtype(), rounded.shape()), (dtype, weight.shape()));
            for (rounded, exact) in rounded.to_f32().into_iter().zip(exact.to_f32()) {
                assert!((rounded - exact).abs() <= exact.abs() * 0.5f32.powi(places), "{rounded} of {exact}");
            }
            assert_eq!(convert(&exact, dtype).bytes()[..], rounded.bytes()[..]);
        }
        let vector = Tensor::from_f32(vec![3], &[1.0, 2.0, 3.0]);
        assert_eq!(convert(&vector, DType::BF16).to_f32(), [1.0, 2.0, 3.0]);
    }
}
