//! Linear layers: shrink every run's rows with its experts' A, then one product per site that goes on over the ranks.

use std::ops::Range;

use super::experts::{Change, LowRank};
use super::gemm::{Block, ChunkB, Correction, RunTerms, Terms, compute_block};
use super::parallel::{Shared, parallel_for, pays};
use super::{Buffer, Cpu, Isa, Site};
use crate::backend::{CHUNK, GateRun, Gates, Write};
use crate::tensor::DType;

/// Rows of a block of V: with K_BLOCK columns of X this takes 192 KiB of L2.
const ROW_BLOCK: usize = 64;

/// Columns of a block of few rows.
const WIDE_COLUMN_BLOCK: usize = 240;

/// How blocks of the output are computed, and the size of those with many rows.
pub(super) struct Kernel {
    /// # Safety
    /// As [`compute_block`].
    pub compute: unsafe fn(Isa, &Block<'_>),
    pub rows: usize,
    pub columns: usize,
}

/// A block's resting accumulators take at most 192 KiB.
const INFERENCE: Kernel = Kernel { compute: compute_block, rows: ROW_BLOCK, columns: 48 };

/// Lists that are rebuilt for every layer, kept so that a step allocates nothing.
#[derive(Default)]
pub(super) struct Workspace {
    terms: Vec<Terms>,
    v: Vec<f32>,
    shrinks: Vec<Shrink>,
    tasks: Vec<Task>,
}

// SAFETY: the raw pointers in the lists are only followed inside the call that wrote them.
unsafe impl Send for Workspace {}

/// One chunk of V: `V[rows, 16] = gate · scale · X A_chunkᵀ`.
struct Shrink {
    rows: Range<usize>,
    /// Row 0 of X. Wraps: a copy may hold the run's rows alone.
    x: *const f32,
    a: *const u8,
    dtype: DType,
    k: usize,
    ranks: usize,
    scale: f32,
    /// The expert's gate of row 0, and the distance to the next row's.
    gate: *const f32,
    gate_stride: usize,
    /// Index in V of row 0's ranks, and the distance to the next row's. Wraps: row 0 may lie before the run.
    v: usize,
    v_stride: usize,
}

/// One block of one site's output.
struct Task {
    site: usize,
    rows: Range<usize>,
    columns: Range<usize>,
    weight: *const u8,
    dtype: DType,
}

// SAFETY: as for `Workspace`; the lists are read by the threads of one call.
unsafe impl Sync for Shrink {}
unsafe impl Sync for Task {}
unsafe impl Sync for Terms {}

pub(super) fn linear(cpu: &mut Cpu, sites: &[Site], x: &Buffer, gates: &Gates, write: Write, y: &mut Buffer) {
    let mut v = std::mem::take(&mut cpu.workspace.v);
    let input = x.data.as_ptr();
    linear_with(cpu, &INFERENCE, sites, x, gates, write, y, &mut v, |_, _, _| input);
    cpu.workspace.v = v;
}

/// [`linear`] by some kernel that leaves V in `v`: site after site, run after run, `[rows, chunks, 16]`. A site's expert, by its index
/// in a run, reads rows that start at `ranks_input(site, run, expert)` (where row 0 would lie).
#[expect(clippy::too_many_arguments, reason = "the operation's own arguments")]
pub(super) fn linear_with(
    cpu: &mut Cpu,
    kernel: &Kernel,
    sites: &[Site],
    x: &Buffer,
    gates: &Gates,
    write: Write,
    y: &mut Buffer,
    v: &mut Vec<f32>,
    ranks_input: impl Fn(usize, &GateRun, usize) -> *const f32,
) {
    let rows = gates.rows();
    assert!(x.data.len() >= rows * x.width && y.data.len() >= rows * y.width, "rows exceed the buffers");
    assert_eq!(y.width, sites.iter().map(|site| site.experts.out_features).sum::<usize>(), "output width");
    if rows == 0 {
        return;
    }
    let mut workspace = std::mem::take(&mut cpu.workspace);
    let Workspace { terms, shrinks, tasks, .. } = &mut workspace;
    terms.resize_with(sites.len().max(terms.len()), Terms::default);
    shrinks.clear();
    tasks.clear();
    let mut v_len = 0;
    for (index, site) in sites.iter().enumerate() {
        assert_eq!(site.experts.in_features, x.width, "input width");
        let input = |run: &GateRun, expert| ranks_input(index, run, expert);
        list_terms(site, gates, &mut terms[index], shrinks, &mut v_len, input);
        list_tasks(kernel, index, site, gates, tasks);
    }
    if v.len() < v_len {
        v.resize(v_len, 0.0);
    }
    let isa = cpu.isa;
    let input = Shared::new(x.data.as_ptr().cast_mut());
    let ranks = Shared::new(v.as_mut_ptr());
    let work = shrinks.iter().map(|shrink| shrink.rows.len() * shrink.k * CHUNK).sum();
    parallel_for(shrinks.len(), work, |index| {
        // SAFETY: every shrink writes its own rows and ranks of V; the sizes were laid out by `list_terms`.
        unsafe { run_shrink(isa, &shrinks[index], ranks.get()) };
    });
    let output = Shared::new(y.data.as_mut_ptr());
    let (width, terms) = (y.width, &*terms);
    let work = rows * x.width * width;
    parallel_for(tasks.len(), work, |index| {
        let task = &tasks[index];
        let first_column: usize = sites[..task.site].iter().map(|site| site.experts.out_features).sum();
        let site_terms = &terms[task.site];
        let block = Block {
            x: input.get(),
            x_stride: x.width,
            w: task.weight,
            dtype: task.dtype,
            k: x.width,
            rows: task.rows.clone(),
            columns: task.columns.clone(),
            y: output.get().wrapping_add(first_column),
            y_stride: width,
            write,
            bias: sites[task.site].bias.as_deref(),
            terms: (!site_terms.chunks.is_empty() || !site_terms.corrections.is_empty())
                .then_some(site_terms),
            v: ranks.get(),
        };
        // SAFETY: the buffers cover all rows (asserted above), the tasks cut the output into disjoint blocks.
        unsafe { (kernel.compute)(isa, &block) };
    });
    cpu.workspace = workspace;
}

/// Lists the chunks and corrections of every run at one site, and the shrinks that make their V.
fn list_terms(
    site: &Site,
    gates: &Gates,
    terms: &mut Terms,
    shrinks: &mut Vec<Shrink>,
    v_len: &mut usize,
    input: impl Fn(&GateRun, usize) -> *const f32,
) {
    terms.runs.clear();
    terms.chunks.clear();
    terms.corrections.clear();
    for run in gates.runs() {
        let (first_chunk, first_correction) = (terms.chunks.len(), terms.corrections.len());
        let experts = gates.experts_of(run);
        let row_gates = gates.gates_of(run, run.rows.start).as_ptr();
        let low_rank = |(index, &slot)| match site.experts.get(slot) {
            Some(Change::LowRank(expert)) => Some((index, expert)),
            _ => None,
        };
        let chunks: usize = experts.iter().enumerate().filter_map(low_rank).map(|(_, e)| e.chunks()).sum();
        for (index, expert) in experts.iter().enumerate().filter_map(low_rank) {
            for chunk in 0..expert.chunks() {
                let v_stride = chunks * CHUNK;
                let v = *v_len + (terms.chunks.len() - first_chunk) * CHUNK;
                list_shrinks(expert, chunk, run.rows.clone(), shrinks, |shrink| {
                    shrink.x = input(run, index);
                    shrink.gate = row_gates.wrapping_add(index).wrapping_sub(run.rows.start * experts.len());
                    shrink.gate_stride = experts.len();
                    shrink.v = v.wrapping_sub(run.rows.start * v_stride);
                    shrink.v_stride = v_stride;
                });
                let b: ChunkB = expert.b_chunk(chunk, site.experts.out_features);
                terms.chunks.push(b);
            }
            if expert.bias.is_some() || expert.column_scale.is_some() {
                let pointer =
                    |values: &Option<Vec<f32>>| values.as_ref().map_or(std::ptr::null(), |v| v.as_ptr());
                terms.corrections.push(Correction {
                    expert: index,
                    bias: pointer(&expert.bias),
                    column_scale: pointer(&expert.column_scale),
                });
            }
        }
        terms.runs.push(RunTerms {
            rows: run.rows.clone(),
            chunks: first_chunk..terms.chunks.len(),
            corrections: first_correction..terms.corrections.len(),
            v: *v_len,
            gates: row_gates,
            gate_width: experts.len(),
        });
        *v_len += run.rows.len() * chunks * CHUNK;
    }
}

/// One chunk's shrinks, a block of rows each; `place` fills in where X, gates and V lie.
fn list_shrinks(
    expert: &LowRank,
    chunk: usize,
    rows: Range<usize>,
    shrinks: &mut Vec<Shrink>,
    place: impl Fn(&mut Shrink),
) {
    let k = expert.a.shape()[1];
    let dtype = expert.a.dtype();
    let a = expert.a.bytes()[chunk * CHUNK * k * dtype.size()..].as_ptr();
    for rows in blocks(rows, ROW_BLOCK) {
        let mut shrink = Shrink {
            rows,
            x: std::ptr::null(),
            a,
            dtype,
            k,
            ranks: expert.ranks(chunk),
            scale: expert.scale,
            gate: std::ptr::null(),
            gate_stride: 0,
            v: 0,
            v_stride: 0,
        };
        place(&mut shrink);
        shrinks.push(shrink);
    }
}

unsafe fn run_shrink(isa: Isa, shrink: &Shrink, v: *mut f32) {
    let block = Block {
        x: shrink.x,
        x_stride: shrink.k,
        w: shrink.a,
        dtype: shrink.dtype,
        k: shrink.k,
        rows: shrink.rows.clone(),
        columns: 0..shrink.ranks,
        y: v.wrapping_add(shrink.v),
        y_stride: shrink.v_stride,
        write: Write::Replace,
        bias: None,
        terms: None,
        v: std::ptr::null(),
    };
    // SAFETY: passed on from the caller.
    unsafe {
        compute_block(isa, &block);
        for row in shrink.rows.clone() {
            let factor = *shrink.gate.wrapping_add(row * shrink.gate_stride) * shrink.scale;
            let ranks = v.wrapping_add(shrink.v.wrapping_add(row * shrink.v_stride));
            for rank in 0..CHUNK {
                *ranks.add(rank) = if rank < shrink.ranks { *ranks.add(rank) * factor } else { 0.0 };
            }
        }
    }
}

/// Cuts a site's output into blocks; rows whose expert replaces the weight are blocks of their own.
fn list_tasks(kernel: &Kernel, index: usize, site: &Site, gates: &Gates, tasks: &mut Vec<Task>) {
    let replaced = |experts: &[u32]| {
        experts.iter().find_map(|&slot| match site.experts.get(slot) {
            Some(Change::Replace(weight)) => Some(weight),
            _ => None,
        })
    };
    let mut runs = gates.runs().iter().peekable();
    while let Some(run) = runs.next() {
        let weight = replaced(gates.experts_of(run)).unwrap_or(&site.weight);
        let same = |other: &[u32]| std::ptr::eq(replaced(other).unwrap_or(&site.weight), weight);
        let mut rows = run.rows.clone();
        while let Some(next) = runs.next_if(|next| same(gates.experts_of(next))) {
            rows.end = next.rows.end;
        }
        let wide = if rows.len() <= 4 { WIDE_COLUMN_BLOCK } else { kernel.columns };
        for columns in blocks(0..site.experts.out_features, wide) {
            for rows in blocks(rows.clone(), kernel.rows) {
                tasks.push(Task {
                    site: index,
                    rows,
                    columns: columns.clone(),
                    weight: weight.bytes().as_ptr(),
                    dtype: weight.dtype(),
                });
            }
        }
    }
}

/// Consecutive ranges of at most `size`.
pub(super) fn blocks(range: Range<usize>, size: usize) -> impl Iterator<Item = Range<usize>> {
    range.clone().step_by(size).map(move |start| start..(start + size).min(range.end))
}

/// `y[row] = table[token]` plus, for rows whose experts change the lookup, `Σ gate · scale · B A[:, token]`.
pub(super) fn embed(table: &Site, rows: &crate::backend::Rows, y: &mut Buffer) {
    let width = y.width;
    assert!(rows.gates.rows() <= rows.len(), "gates exceed the rows");
    assert!(y.data.len() >= rows.len() * width, "rows exceed the buffer");
    let output = Shared::new(y.data.as_mut_ptr());
    let fill = |run: &GateRun, piece: Range<usize>| {
        let experts = rows.gates.experts_of(run);
        let replaced = experts.iter().find_map(|&slot| match table.experts.get(slot) {
            Some(Change::Replace(weight)) => Some(weight),
            _ => None,
        });
        for row in piece {
            let token = rows.tokens[row] as usize;
            // SAFETY: the row lies in the buffer (asserted above) and is written by this piece only.
            let to = unsafe { std::slice::from_raw_parts_mut(output.get().add(row * width), width) };
            copy_row(replaced.unwrap_or(&table.weight), token, to);
            for (&slot, gate) in experts.iter().zip(rows.gates.gates_of(run, row)) {
                if let Some(Change::LowRank(expert)) = table.experts.get(slot) {
                    add_lookup(expert, token, gate * expert.scale, to);
                }
            }
        }
    };
    let runs = rows.gates.runs();
    let work = rows.len() * width;
    if pays(work) {
        let pieces: Vec<(&GateRun, Range<usize>)> = (runs.iter())
            .flat_map(|run| blocks(run.rows.clone(), ROW_BLOCK).map(move |rows| (run, rows)))
            .collect();
        parallel_for(pieces.len(), work, |index| fill(pieces[index].0, pieces[index].1.clone()));
    } else {
        runs.iter().for_each(|run| fill(run, run.rows.clone()));
    }
}

/// One stored element as f32.
pub(super) fn element(bytes: &[u8], index: usize, dtype: DType) -> f32 {
    let at = index * dtype.size();
    let half = |at: usize| [bytes[at], bytes[at + 1]];
    match dtype {
        DType::F32 => f32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]),
        DType::BF16 => half::bf16::from_le_bytes(half(at)).to_f32(),
        DType::F16 => half::f16::from_le_bytes(half(at)).to_f32(),
    }
}

fn copy_row(table: &crate::tensor::Tensor, row: usize, to: &mut [f32]) {
    let (bytes, dtype) = (table.bytes(), table.dtype());
    for (column, value) in to.iter_mut().enumerate() {
        *value = element(bytes, row * table.shape()[1] + column, dtype);
    }
}

fn add_lookup(expert: &LowRank, token: usize, factor: f32, to: &mut [f32]) {
    let vocabulary = expert.a.shape()[1];
    for chunk in 0..expert.chunks() {
        let mut v = [0f32; CHUNK];
        for (rank, value) in v[..expert.ranks(chunk)].iter_mut().enumerate() {
            let index = (chunk * CHUNK + rank) * vocabulary + token;
            *value = factor * element(expert.a.bytes(), index, expert.a.dtype());
        }
        let (b, dtype) = expert.b_rows(chunk, to.len());
        for (n, value) in to.iter_mut().enumerate() {
            let mut sum = 0.0;
            for (rank, v) in v.iter().enumerate() {
                sum += v * element(b, n * CHUNK + rank, dtype);
            }
            *value += sum;
        }
    }
}
