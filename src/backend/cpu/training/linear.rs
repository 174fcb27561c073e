//! Linear layers forward, keeping what the backward pass needs, and backward.
//!
//! The gradient of the input is one product whose loop goes over the outputs of all sites of the group and then over
//! the ranks of the row's experts: "rank is just more K", backwards.

use std::ops::Range;

use super::dora;
use super::forward;
use super::product::{Along, Product, Sum, accumulate};
use super::uses::{Use, drop_inputs, list_uses, scale_outputs};
use super::{Ranks, Trainee, grow};
use crate::backend::cpu::experts::Change;
use crate::backend::cpu::gemm::{Block, compute_block};
use crate::backend::cpu::linear::{blocks, linear_with};
use crate::backend::cpu::parallel::{Shared, parallel_for};
use crate::backend::cpu::{Buffer, Cpu, Group, Isa, Site};
use crate::backend::training::Learning;
use crate::backend::{CHUNK, GateRun, Gates, Write};
use crate::tensor::{DType, Tensor};

/// Columns of a block of the input's gradient, and of a parameter's.
const COLUMN_BLOCK: usize = 64;

/// Rows of a block of the input's gradient where there are few blocks of columns to share out, and where there are many:
/// the more rows, the less often a weight is read.
const ROW_BLOCK: usize = 96;
const TALL_ROW_BLOCK: usize = 288;
const MANY_COLUMN_BLOCKS: usize = 16;

/// Memory that is kept from step to step.
#[derive(Default)]
pub struct Workspace {
    /// As V, of the gradient: `g · s · Bᵀ dy`.
    du: Vec<f32>,
    /// What dropout multiplies each use's input with, and the products, `[rows, in]`.
    pub(super) factors: Vec<f32>,
    pub(super) dropped: Vec<f32>,
    /// Output gradients times column scales, `[rows, out]`.
    scaled: Vec<f32>,
    /// The frozen products of DoRA's rows, `[rows, out]`.
    products: Vec<f32>,
}

/// `P W` of some rows: a part of the input's gradient.
struct Part {
    rows: Range<usize>,
    /// Row 0; wraps.
    p: *const f32,
    p_stride: usize,
    w: *const u8,
    dtype: DType,
    depth: usize,
    write: Write,
}

// SAFETY: the pointers are followed inside the call that wrote them.
unsafe impl Sync for Part {}

#[expect(clippy::too_many_arguments, reason = "the operation's own arguments")]
pub(super) fn linear_kept(
    cpu: &mut Cpu,
    group: &Group,
    number: usize,
    x: &Buffer,
    learning: &Learning<'_, Cpu>,
    write: Write,
    y: &mut Buffer,
    ranks: &mut Ranks,
) {
    let mut workspace = std::mem::take(&mut cpu.training);
    let uses = list_uses(&group.0, number, learning.gates, learning.trainees);
    drop_inputs(cpu.isa, &uses, number, x, learning.row_keys, learning.trainees, &mut workspace);
    let dropped = workspace.dropped.as_ptr();
    let input = |site: usize, run: &GateRun, expert: usize| {
        let gate = learning.gates.first_value(run) + expert;
        let user = uses.iter().find(|user| user.site == site && user.gate == gate);
        match user.and_then(|user| user.dropped) {
            Some(start) => dropped.wrapping_add(start).wrapping_sub(run.rows.start * x.width),
            None => x.data.as_ptr(),
        }
    };
    linear_with(cpu, &forward::KERNEL, &group.0, x, learning.gates, write, y, &mut ranks.v, input);
    cpu.training = workspace;
}

#[expect(clippy::too_many_arguments, reason = "the operation's own arguments")]
pub(super) fn linear_backward(
    cpu: &mut Cpu,
    group: &Group,
    number: usize,
    x: &Buffer,
    ranks: &Ranks,
    dy: &Buffer,
    learning: &mut Learning<'_, Cpu>,
    dx: Option<&mut Buffer>,
) {
    let (sites, gates) = (&*group.0, learning.gates);
    let rows = gates.rows();
    assert!(x.data.len() >= rows * x.width && dy.data.len() >= rows * dy.width, "rows exceed the buffers");
    assert_eq!(dy.width, sites.iter().map(|site| site.experts.out_features).sum::<usize>(), "output width");
    assert!(sites.iter().all(|site| site.experts.in_features == x.width), "input width");
    let mut workspace = std::mem::take(&mut cpu.training);
    let mut uses = list_uses(sites, number, gates, learning.trainees);
    drop_inputs(cpu.isa, &uses, number, x, learning.row_keys, learning.trainees, &mut workspace);
    scale_outputs(&mut uses, dy, learning.trainees, &mut workspace.scaled);
    let backward = Backward { isa: cpu.isa, sites, uses, gates, x, v: &ranks.v, dy };
    backward.ranks(&mut workspace, learning);
    if let Some(dx) = dx {
        assert!(dx.width == x.width && dx.data.len() >= rows * dx.width, "rows exceed the buffers");
        backward.input(&mut workspace, dx);
    }
    backward.pairs(&workspace, learning.trainees);
    dora::magnitudes(&backward, &mut workspace.products, learning);
    cpu.training = workspace;
}

/// The backward pass of one group.
pub(super) struct Backward<'a> {
    pub isa: Isa,
    pub sites: &'a [Site],
    pub uses: Vec<Use<'a>>,
    pub gates: &'a Gates,
    pub x: &'a Buffer,
    pub v: &'a [f32],
    pub dy: &'a Buffer,
}

impl Backward<'_> {
    /// `dU = g · s · Bᵀ dy` of every use, and what it says about the gates.
    fn ranks(&self, workspace: &mut Workspace, learning: &mut Learning<'_, Cpu>) {
        let end = |user: &Use<'_>| user.v + user.rows.len() * user.v_stride;
        grow(&mut workspace.du, self.uses.iter().map(end).max().unwrap_or(0));
        let du = Shared::new(workspace.du.as_mut_ptr());
        let trainees = &*learning.trainees;
        let gate_gradients = learning.gate_gradients.as_deref_mut();
        assert!(
            gate_gradients.as_ref().is_none_or(|all| all.len() == self.gates.values().len()),
            "a gradient for every gate"
        );
        let gate_gradients = gate_gradients.map(|all| Shared::new(all.as_mut_ptr()));
        let pieces: Vec<Range<usize>> =
            self.gates.runs().iter().flat_map(|run| blocks(run.rows.clone(), ROW_BLOCK)).collect();
        let work = self.uses.iter().map(|user| user.rows.len() * user.out_features * user.v_stride).sum();
        let workspace = &*workspace;
        parallel_for(pieces.len(), work, |index| {
            let rows = &pieces[index];
            for user in self.uses.iter().filter(|user| user.rows.contains(&rows.start)) {
                // SAFETY: this piece alone writes dU and gates of its rows; both have room for all.
                unsafe {
                    self.shrink(user, rows.clone(), trainees, workspace, du.get());
                    if let Some(all) = gate_gradients {
                        self.gates(user, rows.clone(), workspace, du.get(), all.get());
                    }
                    for row in rows.clone() {
                        let at = row - user.rows.start;
                        let factor =
                            self.gates.values()[user.gate + at * user.gate_stride] * user.expert.scale;
                        let ranks = du.get().add(user.v + at * user.v_stride);
                        for rank in 0..user.expert.rank {
                            *ranks.add(rank) *= factor;
                        }
                    }
                }
            }
        });
    }

    /// `Bᵀ dy` of some rows of a use, to where its dU goes.
    unsafe fn shrink(
        &self,
        user: &Use<'_>,
        rows: Range<usize>,
        trainees: &[Option<Trainee>],
        workspace: &Workspace,
        du: *mut f32,
    ) {
        let y = du.wrapping_add(user.v).wrapping_sub(user.rows.start * user.v_stride);
        if let Some(pair) = user.pair {
            let pair = &trainees[user.slot].as_ref().expect("the pair's").pairs[pair];
            let (x, x_stride) = self.output_gradients(user, workspace);
            let block = Block {
                x,
                x_stride,
                w: pair.weights[pair.b_range()].as_ptr().cast(),
                dtype: DType::F32,
                k: user.out_features,
                rows,
                columns: 0..pair.rank,
                y,
                y_stride: user.v_stride,
                write: Write::Replace,
                bias: None,
                terms: None,
                v: std::ptr::null(),
            };
            // SAFETY: passed on from the caller; B transposed is `[rank, out]`.
            unsafe { compute_block(self.isa, &block) };
            return;
        }
        for chunk in 0..user.expert.chunks() {
            let (b, dtype) = user.expert.b_rows(chunk, user.out_features);
            let product = Product {
                p: self.dy.data.as_ptr().wrapping_add(user.column),
                p_row: self.dy.width,
                p_column: 1,
                w: b.as_ptr(),
                dtype,
                along: Along::Columns,
                w_stride: CHUNK,
                depth: user.out_features,
                rows: rows.clone(),
                columns: 0..user.expert.ranks(chunk),
                y: y.wrapping_add(chunk * CHUNK),
                y_stride: user.v_stride,
                write: Write::Replace,
                sum: Sum::Running,
            };
            // SAFETY: passed on from the caller; a chunk is `[out, 16]`.
            unsafe { accumulate(self.isa, &product) };
        }
    }

    /// Row 0 of the output gradients that a use's pair is multiplied with (wraps), and the distance to the next.
    fn output_gradients(&self, user: &Use<'_>, workspace: &Workspace) -> (*const f32, usize) {
        match user.scaled {
            Some(start) => {
                let first = workspace.scaled.as_ptr().wrapping_add(start);
                (first.wrapping_sub(user.rows.start * user.out_features), user.out_features)
            }
            None => (self.dy.data.as_ptr().wrapping_add(user.column), self.dy.width),
        }
    }

    /// Row 0 of the rows that a use's A is multiplied with; wraps.
    fn pair_input(&self, user: &Use<'_>, workspace: &Workspace) -> *const f32 {
        match user.dropped {
            Some(start) => {
                let first = workspace.dropped.as_ptr().wrapping_add(start);
                first.wrapping_sub(user.rows.start * self.x.width)
            }
            None => self.x.data.as_ptr(),
        }
    }

    /// Adds what the low-rank part of some rows of a use says about their gates; dU holds `Bᵀ dy`.
    unsafe fn gates(
        &self,
        user: &Use<'_>,
        rows: Range<usize>,
        workspace: &Workspace,
        du: *const f32,
        gate_gradients: *mut f32,
    ) {
        let expert = user.expert;
        // V holds the gate, which may be 0.
        let mut ax = vec![0f32; rows.len() * expert.rank];
        let block = Block {
            x: self.pair_input(user, workspace).wrapping_add(rows.start * self.x.width),
            x_stride: self.x.width,
            w: expert.a.bytes().as_ptr(),
            dtype: expert.a.dtype(),
            k: self.x.width,
            rows: 0..rows.len(),
            columns: 0..expert.rank,
            y: ax.as_mut_ptr(),
            y_stride: expert.rank,
            write: Write::Replace,
            bias: None,
            terms: None,
            v: std::ptr::null(),
        };
        // SAFETY: passed on from the caller; A is `[rank, in]`.
        unsafe { compute_block(self.isa, &block) };
        for (index, row) in rows.enumerate() {
            let at = row - user.rows.start;
            let ax = &ax[index * expert.rank..(index + 1) * expert.rank];
            // SAFETY: passed on from the caller.
            let ranks =
                unsafe { std::slice::from_raw_parts(du.add(user.v + at * user.v_stride), expert.rank) };
            let mut sum = 0.0;
            for (ax, rank) in ax.iter().zip(ranks) {
                sum += ax * rank;
            }
            sum *= expert.scale;
            if let Some(bias) = &expert.bias {
                let dy = &self.dy.data[row * self.dy.width + user.column..];
                sum += bias.iter().zip(dy).map(|(bias, dy)| bias * dy).sum::<f32>();
            }
            // SAFETY: passed on from the caller.
            unsafe { *gate_gradients.add(user.gate + at * user.gate_stride) += sum };
        }
    }

    /// Lists the parts of dx in their order: the frozen weights of all sites, then the pairs whose input is not dropped.
    fn parts(&self, workspace: &mut Workspace, frozen: &mut Vec<f32>) -> Vec<Part> {
        let mut parts = Vec::new();
        let mut column = 0;
        self.scale_frozen(frozen);
        let mut next_scaled = 0;
        for (index, site) in self.sites.iter().enumerate() {
            let out = site.experts.out_features;
            let write = if index == 0 { Write::Replace } else { Write::Add };
            for run in self.gates.runs() {
                let experts = self.gates.experts_of(run);
                let weight: &Tensor = experts
                    .iter()
                    .find_map(|&slot| match site.experts.get(slot) {
                        Some(Change::Replace(weight)) => Some(weight),
                        _ => None,
                    })
                    .unwrap_or(&site.weight);
                let (p, p_stride) = if is_scaled(site, experts) {
                    let first = frozen.as_ptr().wrapping_add(next_scaled);
                    next_scaled += run.rows.len() * out;
                    (first.wrapping_sub(run.rows.start * out), out)
                } else {
                    (self.dy.data.as_ptr().wrapping_add(column), self.dy.width)
                };
                let w = weight.bytes().as_ptr();
                // Runs differ in experts; here it matters only whether they differ in what is multiplied.
                match parts.last_mut() {
                    Some(Part { rows, p: last, w: same, .. })
                        if *last == p && *same == w && rows.end == run.rows.start =>
                    {
                        rows.end = run.rows.end;
                    }
                    _ => parts.push(Part {
                        rows: run.rows.clone(),
                        p,
                        p_stride,
                        w,
                        dtype: weight.dtype(),
                        depth: out,
                        write,
                    }),
                }
            }
            column += out;
        }
        for user in self.uses.iter().filter(|user| user.dropped.is_none()) {
            parts.push(self.rank_part(user, workspace, Write::Add));
        }
        parts
    }

    fn rank_part(&self, user: &Use<'_>, workspace: &Workspace, write: Write) -> Part {
        let du = workspace.du.as_ptr().wrapping_add(user.v);
        Part {
            rows: user.rows.clone(),
            p: du.wrapping_sub(user.rows.start * user.v_stride),
            p_stride: user.v_stride,
            w: user.expert.a.bytes().as_ptr(),
            dtype: user.expert.a.dtype(),
            depth: user.expert.rank,
            write,
        }
    }

    /// The output gradients of rows with column scales, times these: site after site, run after run.
    fn scale_frozen(&self, frozen: &mut Vec<f32>) {
        let (mut column, mut start) = (0, 0);
        for site in self.sites {
            let out = site.experts.out_features;
            for run in self.gates.runs() {
                let experts = self.gates.experts_of(run);
                if !is_scaled(site, experts) {
                    continue;
                }
                grow(frozen, start + run.rows.len() * out);
                let all = Shared::new(frozen.as_mut_ptr());
                parallel_for(run.rows.len(), run.rows.len() * out * (experts.len() + 1), |index| {
                    let row = run.rows.start + index;
                    // SAFETY: this piece's row of what has been grown to hold all.
                    let to =
                        unsafe { std::slice::from_raw_parts_mut(all.get().add(start + index * out), out) };
                    to.fill(1.0);
                    for (&slot, gate) in experts.iter().zip(self.gates.gates_of(run, row)) {
                        let Some(scales) = column_scale(site, slot) else { continue };
                        for (to, scale) in to.iter_mut().zip(scales) {
                            *to += gate * (scale - 1.0);
                        }
                    }
                    for (to, dy) in to.iter_mut().zip(&self.dy.data[row * self.dy.width + column..]) {
                        *to *= dy;
                    }
                });
                start += run.rows.len() * out;
            }
            column += out;
        }
    }

    /// The gradient of the input.
    fn input(&self, workspace: &mut Workspace, dx: &mut Buffer) {
        let mut frozen = std::mem::take(&mut workspace.products);
        let parts = self.parts(workspace, &mut frozen);
        let dropped: Vec<(Part, usize)> = self
            .uses
            .iter()
            .filter_map(|user| Some((self.rank_part(user, workspace, Write::Replace), user.dropped?)))
            .collect();
        let (rows, k) = (self.gates.rows(), dx.width);
        let column_blocks = k.div_ceil(COLUMN_BLOCK);
        let row_block = if column_blocks < MANY_COLUMN_BLOCKS { ROW_BLOCK } else { TALL_ROW_BLOCK };
        let row_blocks: Vec<Range<usize>> = blocks(0..rows, row_block).collect();
        let output = Shared::new(dx.data.as_mut_ptr());
        let factors = &workspace.factors;
        let isa = self.isa;
        parallel_for(row_blocks.len() * column_blocks, rows * k * self.dy.width, |index| {
            let rows = row_blocks[index / column_blocks].clone();
            let first = index % column_blocks * COLUMN_BLOCK;
            let columns = first..(first + COLUMN_BLOCK).min(k);
            for part in &parts {
                // SAFETY: parts lie within their buffers; this piece alone writes this block.
                unsafe { part.add(isa, rows.clone(), columns.clone(), k, output.get(), k) };
            }
            for (part, start) in &dropped {
                let factors = &factors[*start..];
                for rows in blocks(overlap(&part.rows, &rows), ROW_BLOCK) {
                    // SAFETY: as above.
                    unsafe { part.add_dropped(isa, rows, columns.clone(), k, factors, output.get()) };
                }
            }
        });
        workspace.products = frozen;
    }

    /// Adds the gradients of all pairs in training: `dA += dUᵀ X`, `dBᵀ += Vᵀ dY`.
    fn pairs(&self, workspace: &Workspace, trainees: &mut [Option<Trainee>]) {
        let mut tasks = Vec::new();
        for (index, user) in self.uses.iter().enumerate() {
            let same = |other: &&Use<'_>| other.site == user.site && other.slot == user.slot;
            let Some(pair) = user.pair else { continue };
            if self.uses[..index].iter().any(|other| same(&other)) {
                continue;
            }
            let pair = &mut trainees[user.slot].as_mut().expect("the pair's").pairs[pair];
            let (a, b) = (pair.a_range(), pair.b_range());
            for (is_a, range, width) in [(true, a, pair.in_features), (false, b, pair.out_features)] {
                let gradient = Shared::new(pair.gradients[range].as_mut_ptr());
                tasks.extend(
                    blocks(0..width, COLUMN_BLOCK).map(|columns| (index, is_a, gradient, width, columns)),
                );
            }
        }
        let work =
            self.uses.iter().map(|u| u.rows.len() * u.expert.rank * (self.x.width + u.out_features)).sum();
        parallel_for(tasks.len(), work, |index| {
            let (first, is_a, gradient, width, columns) = &tasks[index];
            let first = &self.uses[*first];
            for user in self.uses.iter().filter(|user| user.site == first.site && user.slot == first.slot) {
                let (values, (w, w_stride)) = match is_a {
                    true => (workspace.du.as_ptr(), (self.pair_input(user, workspace), self.x.width)),
                    false => (self.v.as_ptr(), self.output_gradients(user, workspace)),
                };
                let product = Product {
                    p: values.wrapping_add(user.v),
                    p_row: 1,
                    p_column: user.v_stride,
                    w: w.wrapping_add(user.rows.start * w_stride).cast(),
                    dtype: DType::F32,
                    along: Along::Columns,
                    w_stride,
                    depth: user.rows.len(),
                    rows: 0..user.expert.rank,
                    columns: columns.clone(),
                    y: gradient.get(),
                    y_stride: *width,
                    write: Write::Add,
                    sum: Sum::Running,
                };
                // SAFETY: the ranks and rows of the use; these columns of the gradient are this piece's.
                unsafe { accumulate(self.isa, &product) };
            }
        });
    }
}

fn column_scale(site: &Site, slot: u32) -> Option<&[f32]> {
    match site.experts.get(slot) {
        Some(Change::LowRank(expert)) => expert.column_scale.as_deref(),
        _ => None,
    }
}

fn is_scaled(site: &Site, experts: &[u32]) -> bool {
    experts.iter().any(|&slot| column_scale(site, slot).is_some())
}

fn overlap(a: &Range<usize>, b: &Range<usize>) -> Range<usize> {
    a.start.max(b.start)..a.end.min(b.end)
}

impl Part {
    /// Computes what this part adds to a block of Y.
    unsafe fn add(
        &self,
        isa: Isa,
        rows: Range<usize>,
        columns: Range<usize>,
        w_stride: usize,
        y: *mut f32,
        y_stride: usize,
    ) {
        let rows = overlap(&self.rows, &rows);
        if rows.is_empty() {
            return;
        }
        let product = Product {
            p: self.p,
            p_row: self.p_stride,
            p_column: 1,
            w: self.w,
            dtype: self.dtype,
            along: Along::Columns,
            w_stride,
            depth: self.depth,
            rows,
            columns,
            y,
            y_stride,
            write: self.write,
            sum: Sum::Panels,
        };
        // SAFETY: passed on from the caller.
        unsafe { accumulate(isa, &product) };
    }

    /// Computes what this part adds to a block of dx `[rows, k]` through a mask: `factors` are those of its own rows.
    unsafe fn add_dropped(
        &self,
        isa: Isa,
        rows: Range<usize>,
        columns: Range<usize>,
        k: usize,
        factors: &[f32],
        dx: *mut f32,
    ) {
        let mut block = [0f32; ROW_BLOCK * COLUMN_BLOCK];
        let first = block.as_mut_ptr().wrapping_sub(rows.start * COLUMN_BLOCK + columns.start);
        // SAFETY: passed on from the caller; the block holds all rows and columns.
        unsafe { self.add(isa, rows.clone(), columns.clone(), k, first, COLUMN_BLOCK) };
        for (row, block) in rows.zip(block.chunks_exact(COLUMN_BLOCK)) {
            let factors = &factors[(row - self.rows.start) * k..][columns.clone()];
            // SAFETY: passed on from the caller.
            let dx =
                unsafe { std::slice::from_raw_parts_mut(dx.add(row * k + columns.start), columns.len()) };
            for ((dx, value), factor) in dx.iter_mut().zip(block).zip(factors) {
                *dx += value * factor;
            }
        }
    }
}
