//! DoRA's column scales and the gradients of its magnitudes (Liu et al. 2024, sections 4.1 and 4.3).

use std::ops::Range;

use super::grow;
use super::linear::Backward;
use super::optimizer::sum_of_squares;
use super::product::{Along, Product, Sum, accumulate};
use super::trainee::{Dora, TrainedPair};
use super::uses::Use;
use crate::backend::Write;
use crate::backend::cpu::gemm::{Block, compute_block};
use crate::backend::cpu::linear::blocks;
use crate::backend::cpu::parallel::{Shared, parallel_for};
use crate::backend::cpu::{Cpu, Isa};
use crate::backend::training::Learning;
use crate::tensor::{DType, Tensor};

/// Rows of W whose norms are computed together.
const NORM_ROWS: usize = 12;

/// Rows and columns of a block of the frozen products.
const PRODUCT_ROWS: usize = 64;
const PRODUCT_COLUMNS: usize = 48;

/// `‖W + s B A‖` of every output and `c = m / ‖W + s B A‖`.
pub(super) fn scales(isa: Isa, pair: &TrainedPair, weight: &Tensor) -> Dora {
    let (k, out) = (pair.in_features, pair.out_features);
    let mut dora = Dora { norms: vec![0.0; out], column_scale: vec![0.0; out] };
    let (norms, scales) = (Shared::new(dora.norms.as_mut_ptr()), Shared::new(dora.column_scale.as_mut_ptr()));
    let magnitude = &pair.weights[pair.magnitude_range()];
    let blocks: Vec<Range<usize>> = blocks(0..out, NORM_ROWS).collect();
    parallel_for(blocks.len(), out * k * (pair.rank + 1), |index| {
        let rows = blocks[index].clone();
        let bytes = weight
            .bytes()
            .slice(rows.start * k * weight.dtype().size()..rows.end * k * weight.dtype().size());
        let mut sum = Tensor::new(weight.dtype(), vec![rows.len(), k], bytes).to_f32();
        let b = &pair.weights[pair.b_range()];
        let factor = |row: usize| move |rank: usize| pair.scale * b[rank * out + row];
        let factors: Vec<f32> = rows.clone().flat_map(|row| (0..pair.rank).map(factor(row))).collect();
        let product = Product {
            p: factors.as_ptr(),
            p_row: pair.rank,
            p_column: 1,
            w: pair.weights.as_ptr().cast(),
            dtype: DType::F32,
            along: Along::Columns,
            w_stride: k,
            depth: pair.rank,
            rows: 0..rows.len(),
            columns: 0..k,
            y: sum.as_mut_ptr(),
            y_stride: k,
            write: Write::Add,
            sum: Sum::Running,
        };
        // SAFETY: A is `[rank, k]`, the factors `[rows, rank]`, the sum `[rows, k]`.
        unsafe { accumulate(isa, &product) };
        for (row, sum) in rows.zip(sum.chunks_exact(k)) {
            let norm = sum_of_squares(sum).sqrt();
            // SAFETY: below `out`; each output is one piece's.
            unsafe {
                *norms.get().add(row) = norm as f32;
                *scales.get().add(row) = (f64::from(magnitude[row]) / norm) as f32;
            }
        }
    });
    dora
}

/// Adds the gradients of magnitudes, `dm = Σ dy ⊙ (g · W x + B v) / ‖W + s B A‖`, and what column scales say about gates,
/// `dg = Σ dy ⊙ (c − 1) ⊙ W x`.
pub(super) fn magnitudes(backward: &Backward<'_>, products: &mut Vec<f32>, learning: &mut Learning<'_, Cpu>) {
    for user in &backward.uses {
        let Some(scales) = &user.expert.column_scale else { continue };
        let pair = user.pair.and_then(|pair| Some(&mut learning.trainees[user.slot].as_mut()?.pairs[pair]));
        let pair = pair.filter(|pair| pair.dora.is_some());
        if pair.is_none() && learning.gate_gradients.is_none() {
            continue;
        }
        frozen_products(backward, user, products);
        if let Some(gradients) = &mut learning.gate_gradients {
            add_gates(backward, user, scales, products, gradients);
        }
        if let Some(pair) = pair {
            add_magnitude(backward, user, products, pair);
        }
    }
}

/// `W x` of the rows of a use, `[rows, out]`.
fn frozen_products(backward: &Backward<'_>, user: &Use<'_>, products: &mut Vec<f32>) {
    let (x, out) = (backward.x, user.out_features);
    let weight = &backward.sites[user.site].weight;
    grow(products, user.rows.len() * out);
    let y = Shared::new(products.as_mut_ptr());
    let columns: Vec<Range<usize>> = blocks(0..out, PRODUCT_COLUMNS).collect();
    let rows: Vec<Range<usize>> = blocks(user.rows.clone(), PRODUCT_ROWS).collect();
    parallel_for(columns.len() * rows.len(), user.rows.len() * x.width * out, |index| {
        let block = Block {
            x: x.data.as_ptr(),
            x_stride: x.width,
            w: weight.bytes().as_ptr(),
            dtype: weight.dtype(),
            k: x.width,
            rows: rows[index % rows.len()].clone(),
            columns: columns[index / rows.len()].clone(),
            y: y.get().wrapping_sub(user.rows.start * out),
            y_stride: out,
            write: Write::Replace,
            bias: None,
            terms: None,
            v: std::ptr::null(),
        };
        // SAFETY: rows of x, columns of the weight; each block is one piece's.
        unsafe { compute_block(backward.isa, &block) };
    });
}

fn add_gates(
    backward: &Backward<'_>,
    user: &Use<'_>,
    scales: &[f32],
    products: &[f32],
    gradients: &mut [f32],
) {
    let products = products.chunks_exact(user.out_features);
    for (index, (row, products)) in user.rows.clone().zip(products).enumerate() {
        let dy = &backward.dy.data[row * backward.dy.width + user.column..];
        let terms =
            dy.iter().zip(scales).zip(products).map(|((dy, scale), product)| dy * (scale - 1.0) * product);
        gradients[user.gate + index * user.gate_stride] += terms.sum::<f32>();
    }
}

/// Goes on from `W x` to `g · W x + B v`, then adds up the rows, one after another.
fn add_magnitude(backward: &Backward<'_>, user: &Use<'_>, products: &mut [f32], pair: &mut TrainedPair) {
    let (rows, out) = (user.rows.len(), user.out_features);
    let range = pair.magnitude_range();
    let dora = pair.dora.as_ref().expect("a pair with a magnitude");
    let b = Shared::new(pair.weights[pair.b_range()].as_ptr().cast_mut());
    let gradients = Shared::new(pair.gradients[range].as_mut_ptr());
    let products = Shared::new(products.as_mut_ptr());
    let columns: Vec<Range<usize>> = blocks(0..out, PRODUCT_COLUMNS).collect();
    parallel_for(columns.len(), rows * out * (pair.rank + 1), |index| {
        let columns = columns[index].clone();
        // SAFETY: these columns of all rows are this piece's.
        let own = |row: usize| unsafe {
            let first = products.get().add(row * out + columns.start);
            std::slice::from_raw_parts_mut(first, columns.len())
        };
        for row in 0..rows {
            let gate = backward.gates.values()[user.gate + row * user.gate_stride];
            own(row).iter_mut().for_each(|product| *product *= gate);
        }
        let product = Product {
            p: backward.v.as_ptr().wrapping_add(user.v),
            p_row: user.v_stride,
            p_column: 1,
            w: b.get().cast_const().cast(),
            dtype: DType::F32,
            along: Along::Columns,
            w_stride: out,
            depth: pair.rank,
            rows: 0..rows,
            columns: columns.clone(),
            y: products.get(),
            y_stride: out,
            write: Write::Add,
            sum: Sum::Running,
        };
        // SAFETY: B transposed is `[rank, out]`, the products `[rows, out]`; these columns are this piece's.
        let gradients = unsafe {
            accumulate(backward.isa, &product);
            std::slice::from_raw_parts_mut(gradients.get().add(columns.start), columns.len())
        };
        for row in 0..rows {
            let dy = &backward.dy.data[(user.rows.start + row) * backward.dy.width + user.column..];
            let terms = dy[columns.clone()].iter().zip(own(row)).zip(&dora.norms[columns.clone()]);
            for (gradient, ((dy, product), norm)) in gradients.iter_mut().zip(terms) {
                *gradient += dy * *product / norm;
            }
        }
    });
}
