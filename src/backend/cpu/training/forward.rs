//! A block of a linear layer's output, by the product of training.

use std::cell::RefCell;

use super::grow;
use super::product::{Along, Product, Sum, accumulate};
use crate::backend::cpu::Isa;
use crate::backend::cpu::gemm::{Block, RunTerms, Terms};
use crate::backend::cpu::linear::Kernel;
use crate::backend::{CHUNK, Write};

/// What `compute_block` is best given: whole panels of weights, and rows enough to make up for turning them round.
pub const KERNEL: Kernel = Kernel { compute: compute_block, rows: 192, columns: 64 };

thread_local! {
    static PRODUCT: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// As [`gemm::compute_block`](crate::backend::cpu::gemm::compute_block), but for the order of the sums: the frozen
/// product, then what the row's experts do to it, then their chunks one after another, then the bias.
///
/// # Safety
/// As there.
unsafe fn compute_block(isa: Isa, block: &Block<'_>) {
    if block.write == Write::Replace {
        // SAFETY: passed on.
        return unsafe { replace_block(isa, block) };
    }
    let width = block.columns.len();
    PRODUCT.with_borrow_mut(|product| {
        grow(product, block.rows.len() * width);
        let first = product.as_mut_ptr().wrapping_sub(block.rows.start * width + block.columns.start);
        let into = Block { y: first, y_stride: width, write: Write::Replace, ..block.clone() };
        // SAFETY: passed on; the product holds the block's rows and columns.
        unsafe { replace_block(isa, &into) };
        for (row, product) in block.rows.clone().zip(product.chunks_exact(width)) {
            // SAFETY: this block of Y is the caller's.
            let y = unsafe { std::slice::from_raw_parts_mut(row_of(block, row), width) };
            y.iter_mut().zip(product).for_each(|(y, product)| *y += product);
        }
    });
}

unsafe fn replace_block(isa: Isa, block: &Block<'_>) {
    let frozen = Product {
        p: block.x,
        p_row: block.x_stride,
        p_column: 1,
        w: block.w,
        dtype: block.dtype,
        along: Along::Depth,
        w_stride: block.k,
        depth: block.k,
        rows: block.rows.clone(),
        columns: block.columns.clone(),
        y: block.y,
        y_stride: block.y_stride,
        write: Write::Replace,
        sum: Sum::Panels,
    };
    // SAFETY: passed on from the caller.
    unsafe {
        accumulate(isa, &frozen);
        if let Some(terms) = block.terms {
            let runs = &terms.runs;
            let first = runs.partition_point(|run| run.rows.end <= block.rows.start);
            for run in runs[first..].iter().take_while(|run| run.rows.start < block.rows.end) {
                add_run(isa, block, terms, run);
            }
        }
        if let Some(bias) = block.bias {
            for row in block.rows.clone() {
                let y = std::slice::from_raw_parts_mut(row_of(block, row), block.columns.len());
                y.iter_mut().zip(&bias[block.columns.clone()]).for_each(|(y, bias)| *y += bias);
            }
        }
    }
}

/// What the experts of a run do to its rows of a block.
unsafe fn add_run(isa: Isa, block: &Block<'_>, terms: &Terms, run: &RunTerms) {
    let rows = run.rows.start.max(block.rows.start)..run.rows.end.min(block.rows.end);
    let corrections = &terms.corrections[run.corrections.clone()];
    if !corrections.is_empty() {
        let width = block.columns.len();
        let (mut scales, mut added) = (vec![0f32; width], vec![0f32; width]);
        for row in rows.clone() {
            scales.fill(1.0);
            added.fill(0.0);
            let gates = run.gates.wrapping_add((row - run.rows.start) * run.gate_width);
            for correction in corrections {
                // SAFETY: passed on from the caller.
                unsafe {
                    let gate = *gates.add(correction.expert);
                    correction.apply(gate, block.columns.start, &mut scales, &mut added);
                }
            }
            // SAFETY: passed on from the caller.
            let y = unsafe { std::slice::from_raw_parts_mut(row_of(block, row), width) };
            for ((y, scale), added) in y.iter_mut().zip(&scales).zip(&added) {
                *y = *y * scale + added;
            }
        }
    }
    let chunks = &terms.chunks[run.chunks.clone()];
    let stride = chunks.len() * CHUNK;
    let v = block.v.wrapping_add(run.v).wrapping_sub(run.rows.start * stride);
    for (index, chunk) in chunks.iter().enumerate() {
        let product = Product {
            p: v.wrapping_add(index * CHUNK),
            p_row: stride,
            p_column: 1,
            w: chunk.data,
            dtype: chunk.dtype,
            along: Along::Depth,
            w_stride: CHUNK,
            depth: chunk.ranks,
            rows: rows.clone(),
            columns: block.columns.clone(),
            y: block.y,
            y_stride: block.y_stride,
            write: Write::Add,
            sum: Sum::Panels,
        };
        // SAFETY: passed on from the caller; a chunk is `[N, 16]`, and so is V for the run's rows.
        unsafe { accumulate(isa, &product) };
    }
}

/// Where a row of a block of Y starts.
fn row_of(block: &Block<'_>, row: usize) -> *mut f32 {
    block.y.wrapping_add(row * block.y_stride + block.columns.start)
}
