//! Singular values in f64: what the `svd` methods of merging need, and no more.
//!
//! A product of thin factors is decomposed exactly through its small core: with `B = Q_B R_B` and `Aᵀ = Q_A R_A`,
//! `B A = Q_B (R_B R_Aᵀ) Q_Aᵀ`, and the core's singular values are the product's. A dense matrix is decomposed by
//! subspace iteration with a block wider than the wanted rank (Halko, Martinsson & Tropp 2011, section 4.5), repeated
//! until the wanted directions stand still. Small matrices: Householder's QR, one-sided Jacobi (Golub & Van Loan,
//! sections 5.2 and 8.6).

use rayon::prelude::*;

use crate::backend::sampling::Philox;

/// A matrix in f64, column after column.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Matrix {
    rows: usize,
    columns: usize,
    data: Vec<f64>,
}

impl Matrix {
    fn zeros(rows: usize, columns: usize) -> Self {
        Self { rows, columns, data: vec![0.0; rows * columns] }
    }

    /// From values that lie column after column.
    pub fn from_columns(rows: usize, columns: usize, values: Vec<f32>) -> Self {
        Self { rows, columns, data: values.into_iter().map(f64::from).collect() }
    }

    /// From values that lie row after row.
    pub fn from_rows(rows: usize, columns: usize, values: Vec<f32>) -> Self {
        Self::from_columns(columns, rows, values).transposed()
    }

    pub fn rows(&self) -> usize {
        self.rows
    }

    pub fn columns(&self) -> usize {
        self.columns
    }

    /// The values column after column.
    pub fn by_column(&self) -> Vec<f32> {
        self.data.iter().map(|&value| value as f32).collect()
    }

    /// The values row after row.
    pub fn by_row(&self) -> Vec<f32> {
        self.transposed().by_column()
    }

    fn column(&self, column: usize) -> &[f64] {
        &self.data[column * self.rows..(column + 1) * self.rows]
    }

    fn column_mut(&mut self, column: usize) -> &mut [f64] {
        &mut self.data[column * self.rows..(column + 1) * self.rows]
    }

    fn transposed(&self) -> Self {
        let mut transposed = Self::zeros(self.columns, self.rows);
        for column in 0..self.columns {
            for (row, &value) in self.column(column).iter().enumerate() {
                transposed.data[row * self.columns + column] = value;
            }
        }
        transposed
    }

    /// The first columns.
    fn leading(mut self, columns: usize) -> Self {
        self.data.truncate(columns * self.rows);
        Self { columns, ..self }
    }

    fn times(&self, other: &Self) -> Self {
        assert_eq!(self.columns, other.rows, "inner dimensions");
        let mut product = Self::zeros(self.rows, other.columns);
        product.data.par_chunks_mut(self.rows.max(1)).enumerate().for_each(|(column, values)| {
            for (inner, &factor) in other.column(column).iter().enumerate() {
                add_scaled(values, factor, self.column(inner));
            }
        });
        product
    }

    fn scale_columns(&mut self, factors: &[f64]) {
        for (column, factor) in factors.iter().enumerate().take(self.columns) {
            self.column_mut(column).iter_mut().for_each(|value| *value *= factor);
        }
    }
}

/// `values += factor · other`.
fn add_scaled(values: &mut [f64], factor: f64, other: &[f64]) {
    values.iter_mut().zip(other).for_each(|(value, other)| *value += factor * other);
}

fn dot(one: &[f64], other: &[f64]) -> f64 {
    one.iter().zip(other).map(|(one, other)| one * other).sum()
}

/// `(U S, V)` with `U S Vᵀ` the best approximation of `B A` of at most `rank`; `b` is `[m, k]`, `a` is `Aᵀ [n, k]`.
pub(super) fn truncated_product(b: Matrix, a: Matrix, rank: usize) -> (Matrix, Matrix) {
    let ((b_basis, b_core), (a_basis, a_core)) = (qr(b), qr(a));
    let Svd { left, values, right } = svd(&b_core.times(&a_core.transposed()));
    let rank = rank.min(values.len());
    let mut left = b_basis.times(&left.leading(rank));
    left.scale_columns(&values);
    (left, a_basis.times(&right.leading(rank)))
}

/// How far the wanted directions may still turn, weighted by their singular values over the largest.
const STILL: f64 = 1e-10;
/// Where singular values at the cut are so close that it takes more, either side of the cut is as good.
const MOST_ITERATIONS: usize = 100;

/// `(U S, V)` with `U S Vᵀ` the best approximation of at most `rank` to a dense matrix, given row by row.
pub(super) fn truncated(values: &[f32], rows: usize, columns: usize, rank: usize) -> (Matrix, Matrix) {
    let most = rows.min(columns);
    let rank = rank.min(most);
    let dense = Dense { values, columns };
    let transposed = dense.transposed();
    let transposed = Dense { values: &transposed, columns: rows };
    let mut basis = random(columns, most.min(2 * rank + 8));
    let mut previous: Option<Matrix> = None;
    for _ in 0..MOST_ITERATIONS {
        let (left_basis, _) = qr(dense.times(&basis));
        let (right_basis, core) = qr(transposed.times(&left_basis));
        // The matrix is near `left_basis · coreᵀ · right_basisᵀ`.
        let Svd { left, values, right } = svd(&core.transposed());
        let right = right_basis.times(&right.leading(rank));
        let is_still = previous.is_some_and(|previous| turn(&right, &previous, &values) <= STILL);
        if is_still {
            let mut left = left_basis.times(&left.leading(rank));
            left.scale_columns(&values);
            return (left, right);
        }
        previous = Some(right);
        basis = right_basis;
    }
    let right = previous.expect("there is at least one iteration");
    (dense.times(&right), right)
}

/// How much of `vectors` lies outside the span of orthonormal `others`, each weighted by its singular value over the
/// largest.
fn turn(vectors: &Matrix, others: &Matrix, values: &[f64]) -> f64 {
    let inside = others.times(&others.transposed().times(vectors));
    let largest = values.first().copied().unwrap_or(0.0).max(f64::MIN_POSITIVE);
    let outside = |column: usize| {
        let differences = vectors.column(column).iter().zip(inside.column(column)).map(|(v, p)| v - p);
        differences.map(|difference| difference * difference).sum::<f64>().sqrt() * values[column] / largest
    };
    (0..vectors.columns).map(outside).fold(0.0, f64::max)
}

/// Numbers in [-1, 1) that are the same in every run.
fn random(rows: usize, columns: usize) -> Matrix {
    let generator = Philox::new(0);
    let number = |index: usize| (generator.bits(0, index as u64) >> 11) as f64 / (1u64 << 52) as f64 - 1.0;
    Matrix { rows, columns, data: (0..rows * columns).map(number).collect() }
}

/// A large matrix as it is stored, row by row.
struct Dense<'a> {
    values: &'a [f32],
    columns: usize,
}

impl Dense<'_> {
    fn transposed(&self) -> Vec<f32> {
        let rows = self.values.len() / self.columns;
        let mut transposed = vec![0.0; self.values.len()];
        transposed.par_chunks_exact_mut(rows).enumerate().for_each(|(column, values)| {
            values
                .iter_mut()
                .enumerate()
                .for_each(|(row, value)| *value = self.values[row * self.columns + column]);
        });
        transposed
    }

    fn times(&self, other: &Matrix) -> Matrix {
        let by_row = other.transposed();
        let width = other.columns;
        let mut product = Matrix::zeros(width, self.values.len() / self.columns);
        product.data.par_chunks_exact_mut(width).zip(self.values.par_chunks_exact(self.columns)).for_each(
            |(sums, row)| {
                for (inner, &value) in row.iter().enumerate() {
                    add_scaled(sums, f64::from(value), by_row.column(inner));
                }
            },
        );
        product.transposed()
    }
}

/// Thin QR by Householder's reflections: `Q [m, k]` with orthonormal columns and `R [k, n]`, `k = min(m, n)`. A matrix of
/// lower rank is no exception.
fn qr(mut matrix: Matrix) -> (Matrix, Matrix) {
    let (rows, columns) = (matrix.rows, matrix.columns);
    let count = rows.min(columns);
    // The vector of reflection `i` is zero before row `i`.
    let mut reflections: Vec<Vec<f64>> = Vec::with_capacity(count);
    for index in 0..count {
        let mut vector = matrix.column(index)[index..].to_vec();
        let norm = dot(&vector, &vector).sqrt();
        vector[0] += norm.copysign(vector[0]);
        let length = dot(&vector, &vector).sqrt();
        if length > 0.0 {
            vector.iter_mut().for_each(|value| *value /= length);
        }
        matrix.data[index * rows..]
            .par_chunks_exact_mut(rows)
            .for_each(|column| reflect(&mut column[index..], &vector));
        reflections.push(vector);
    }
    let mut triangle = Matrix::zeros(count, columns);
    for column in 0..columns {
        let used = count.min(column + 1);
        let (to, from) = (triangle.column_mut(column), matrix.column(column));
        to[..used].copy_from_slice(&from[..used]);
    }
    let mut basis = Matrix::zeros(rows, count);
    basis.data.par_chunks_exact_mut(rows).enumerate().for_each(|(column, values)| {
        values[column] = 1.0;
        // The reflections after this column's own leave it alone.
        for (index, vector) in reflections.iter().enumerate().take(column + 1).rev() {
            reflect(&mut values[index..], vector);
        }
    });
    (basis, triangle)
}

/// `values -= 2 (vector · values) vector`.
fn reflect(values: &mut [f64], vector: &[f64]) {
    let twice = 2.0 * dot(vector, values);
    add_scaled(values, -twice, vector);
}

/// `U [m, k]`, the singular values from the largest on, `V [n, k]`, with `k = min(m, n)`. The vectors of a singular value
/// of 0 are not all of length 1.
struct Svd {
    left: Matrix,
    values: Vec<f64>,
    right: Matrix,
}

/// Sweeps after which Jacobi's method has long converged.
const MOST_SWEEPS: usize = 60;

/// One-sided Jacobi: columns are rotated in pairs until all are orthogonal.
fn svd(matrix: &Matrix) -> Svd {
    if matrix.rows < matrix.columns {
        let Svd { left, values, right } = svd(&matrix.transposed());
        return Svd { left: right, values, right: left };
    }
    let mut turned = matrix.clone();
    let count = matrix.columns;
    let mut rotations = Matrix::zeros(count, count);
    for index in 0..count {
        rotations.column_mut(index)[index] = 1.0;
    }
    for _ in 0..MOST_SWEEPS {
        let mut is_done = true;
        for first in 0..count {
            for second in first + 1..count {
                if let Some((cosine, sine)) = rotation(turned.column(first), turned.column(second)) {
                    is_done = false;
                    rotate(&mut turned, first, second, cosine, sine);
                    rotate(&mut rotations, first, second, cosine, sine);
                }
            }
        }
        if is_done {
            break;
        }
    }
    let norms: Vec<f64> =
        (0..count).map(|column| dot(turned.column(column), turned.column(column)).sqrt()).collect();
    let mut order: Vec<usize> = (0..count).collect();
    order.sort_by(|&one, &other| norms[other].total_cmp(&norms[one]));
    let (mut left, mut right) = (Matrix::zeros(matrix.rows, count), Matrix::zeros(count, count));
    for (to, &from) in order.iter().enumerate() {
        if norms[from] > 0.0 {
            add_scaled(left.column_mut(to), norms[from].recip(), turned.column(from));
        }
        right.column_mut(to).copy_from_slice(rotations.column(from));
    }
    Svd { left, values: order.into_iter().map(|from| norms[from]).collect(), right }
}

/// Cosine and sine of the rotation that makes two columns orthogonal, unless they are.
fn rotation(first: &[f64], second: &[f64]) -> Option<(f64, f64)> {
    let (one, other, mixed) = (dot(first, first), dot(second, second), dot(first, second));
    if mixed.abs() <= f64::EPSILON * (one * other).sqrt() {
        return None;
    }
    let ratio = (other - one) / (2.0 * mixed);
    let tangent = (ratio.abs() + ratio.hypot(1.0)).recip().copysign(ratio);
    let cosine = tangent.hypot(1.0).recip();
    Some((cosine, cosine * tangent))
}

fn rotate(matrix: &mut Matrix, first: usize, second: usize, cosine: f64, sine: f64) {
    let (before, after) = matrix.data.split_at_mut(second * matrix.rows);
    let first = &mut before[first * matrix.rows..(first + 1) * matrix.rows];
    for (one, other) in first.iter_mut().zip(&mut after[..matrix.rows]) {
        (*one, *other) = (cosine * *one - sine * *other, sine * *one + cosine * *other);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn largest_difference(one: &Matrix, other: &Matrix) -> f64 {
        assert_eq!((one.rows, one.columns), (other.rows, other.columns));
        one.data.iter().zip(&other.data).map(|(one, other)| (one - other).abs()).fold(0.0, f64::max)
    }

    fn assert_orthonormal(matrix: &Matrix) {
        let gram = matrix.transposed().times(matrix);
        let mut identity = Matrix::zeros(matrix.columns, matrix.columns);
        (0..matrix.columns).for_each(|index| identity.column_mut(index)[index] = 1.0);
        assert!(largest_difference(&gram, &identity) < 1e-12);
    }

    /// Of the given singular values.
    fn of_values(rows: usize, columns: usize, values: &[f64]) -> Matrix {
        let (mut left, _) = qr(random(rows, values.len()));
        let (right, _) = qr(random(columns, values.len() + 1));
        left.scale_columns(values);
        left.times(&right.leading(values.len()).transposed())
    }

    #[test]
    fn qr_gives_an_orthonormal_basis_also_of_a_matrix_of_lower_rank() {
        for (rows, columns) in [(7, 3), (3, 7), (5, 5), (1, 4), (4, 1)] {
            let matrix = random(rows, columns);
            let (basis, triangle) = qr(matrix.clone());
            assert_orthonormal(&basis);
            assert!(largest_difference(&basis.times(&triangle), &matrix) < 1e-13);
            for column in 0..columns {
                assert!(triangle.column(column).iter().skip(column + 1).all(|&value| value == 0.0));
            }
        }
        let low = of_values(6, 5, &[2.0, 1.0]);
        for matrix in [low, Matrix::zeros(6, 4)] {
            let (basis, triangle) = qr(matrix.clone());
            assert_orthonormal(&basis);
            assert!(largest_difference(&basis.times(&triangle), &matrix) < 1e-13);
        }
    }

    #[test]
    fn the_singular_values_are_found_largest_first() {
        let wanted = [9.0, 4.0, 4.0, 1e-3, 0.0];
        for (rows, columns) in [(8, 5), (5, 8), (5, 5)] {
            let matrix = of_values(rows, columns, &wanted);
            let Svd { mut left, values, right } = svd(&matrix);
            let off = values.iter().zip(wanted).map(|(found, wanted)| (found - wanted).abs());
            assert!(off.fold(0.0, f64::max) < 1e-12, "{values:?}");
            left.scale_columns(&values);
            assert!(largest_difference(&left.times(&right.transposed()), &matrix) < 1e-12);
        }
    }

    #[test]
    fn a_truncated_matrix_is_the_nearest_of_its_rank_however_it_is_given() {
        // Eckart and Young: what is missing has the singular values that were left out.
        let values: Vec<f64> = (0..30).map(|index| 0.8f64.powi(index)).collect();
        for (rows, columns) in [(70, 40), (40, 70)] {
            let matrix = of_values(rows, columns, &values);
            let dense = matrix.by_row();
            for rank in [1, 4, 30, 99] {
                let (left, right) = truncated(&dense, rows, columns, rank);
                assert_eq!(left.columns, rank.min(40));
                let mut missing = left.times(&right.transposed());
                missing.data.iter_mut().zip(&matrix.data).for_each(|(found, wanted)| *found -= wanted);
                let found = svd(&missing).values[0];
                let wanted = values.get(rank).copied().unwrap_or(0.0);
                // The dense values are in f32.
                assert!((found - wanted).abs() < 2e-6, "rank {rank}: {found} is missing, not {wanted}");

                let thin = (of_values(rows, 30, &values), of_values(columns, 30, &vec![1.0; 30]));
                let product = thin.0.times(&thin.1.transposed());
                let (left, right) = truncated_product(thin.0, thin.1, rank);
                let (expected_left, expected_right) = truncated(&product.by_row(), rows, columns, rank);
                let got = left.times(&right.transposed());
                assert_eq!(left.columns, rank.min(30));
                assert!(largest_difference(&got, &expected_left.times(&expected_right.transposed())) < 2e-6);
            }
        }
    }

    #[test]
    fn equal_singular_values_at_the_cut_and_zeros_end_too() {
        let flat = of_values(60, 50, &[1.0; 50]);
        let (left, right) = truncated(&flat.by_row(), 60, 50, 3);
        let captured = svd(&left.times(&right.transposed())).values;
        assert!((captured[2] - 1.0).abs() < 1e-6 && captured[3] < 1e-6);
        let (left, right) = truncated(&[0.0; 12], 3, 4, 2);
        assert!(left.times(&right.transposed()).data.iter().all(|&value| value == 0.0));
    }
}
