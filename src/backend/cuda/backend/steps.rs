//! The row lists of a model's steps, and which rows the operations in hand are about.

use super::super::attention::{AttentionLimits, AttentionStep, AttentionWork};
use super::super::elementwise::{RowCount, StepLimits as RowLimits, StepRows};
use super::super::lora::{ChunkLists, LoraKernels, Scratch, Seated, SiteGroup, Step, WorkList};
use super::super::params::ROW_TILE;
use super::super::sample::SampleWork;
use super::super::{CudaError, DeviceBuffer, Stream};
use super::Buffer;
use crate::backend::{Gates, Rows, StepLimits};

/// Most rows of a step that is replayed as a graph, and the numbers of rows that there are graphs for.
const GRAPH_ROWS: [usize; 14] = [1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 256];

/// The rows of a step on the device.
#[derive(Debug)]
pub(super) struct Steps {
    limits: StepLimits,
    pub rows: StepRows,
    work: WorkList,
    picked: WorkList,
    attention: AttentionWork,
    lists: ChunkLists,
    scratch: Scratch,
    pub draws: SampleWork,
    /// `gate | up` of layers that have both in one; without rows where there are none.
    pub gate_up: Buffer,
    /// The numbers 0, 1, 2, …: how many rows a launch has that the host counts.
    counts: DeviceBuffer<u32>,
    current: Current,
    /// What the chunk lists were built for: the gates of a step, after so many moves of experts.
    gates: Gates,
    listed: Option<u64>,
}

/// The rows that operations are about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Current {
    /// All of the step, launched for `bound` of them.
    All {
        rows: usize,
        bound: usize,
        graph: bool,
    },
    Picked {
        rows: usize,
    },
}

impl Steps {
    /// Memory for steps within `limits` over `groups`, whose tiles use up to `seats` experts each.
    pub fn new(
        stream: &Stream,
        groups: &[SiteGroup],
        limits: &StepLimits,
        seats: usize,
    ) -> Result<Self, CudaError> {
        let device = stream.device();
        let &StepLimits { rows, sequences, picked, cache_pages, .. } = limits;
        let entries = |rows: usize| rows.div_ceil(ROW_TILE) * seats;
        let of_rows = RowLimits {
            rows,
            sequences,
            pages: cache_pages,
            picked,
            vocabulary: limits.vocabulary,
            positions: limits.positions,
            rotary_variants: limits.rotary_variants,
            cache_pages,
        };
        let of_attention = AttentionLimits { rows, sequences, pages: cache_pages, cache_pages };
        let both =
            |group: &SiteGroup| group.sites().len() == 1 && group.out_features() == 2 * limits.gated_width;
        let gate_up_rows = if groups.iter().any(both) { rows } else { 0 };
        let groups: Vec<&SiteGroup> = groups.iter().collect();
        let counts: Vec<u32> = (0..=rows.max(picked) as u32).collect();
        let steps = Self {
            limits: *limits,
            rows: StepRows::new(device, of_rows)?,
            work: WorkList::new(device, rows, entries(rows))?,
            picked: WorkList::new(device, picked, entries(picked))?,
            attention: AttentionWork::new(stream, limits.attention, of_attention)?,
            lists: ChunkLists::new(stream, &groups)?,
            scratch: Scratch::new(stream, &groups)?,
            draws: SampleWork::new(device, picked, limits.vocabulary)?,
            gate_up: Buffer::half(stream, gate_up_rows, 2 * limits.gated_width)?,
            counts: DeviceBuffer::new(device, counts.len(), "numbers of rows")?,
            current: Current::All { rows: 0, bound: 0, graph: false },
            gates: Gates::default(),
            listed: None,
        };
        stream.upload(&counts, &steps.counts)?;
        Ok(steps)
    }

    /// Takes the rows of the next step. Experts are where they were at the last step with as many `moves`.
    pub fn begin(
        &mut self,
        stream: &Stream,
        kernels: &LoraKernels,
        rows: &Rows,
        moves: u64,
        expert: impl Fn(u32) -> Option<Seated>,
    ) -> Result<(), CudaError> {
        self.rows.set_rows(stream, rows)?;
        self.attention.set(stream, rows)?;
        // Most steps of a decoding have the experts of the step before.
        if self.listed != Some(moves) || self.gates != rows.gates {
            self.listed = None;
            self.work.set_seated(stream, &rows.gates, expert)?;
            self.lists.build(stream, kernels, &self.work)?;
            self.gates.clone_from(&rows.gates);
            self.listed = Some(moves);
        }
        let count = rows.len();
        let graph = GRAPH_ROWS
            .into_iter()
            .find(|&bound| count <= bound && bound <= self.limits.rows)
            .filter(|_| !self.attention.has_whole());
        self.current = Current::All { rows: count, bound: graph.unwrap_or(count), graph: graph.is_some() };
        Ok(())
    }

    /// Has the lists of the next step built anew.
    pub fn forget_lists(&mut self) {
        self.listed = None;
    }

    /// Goes on with some of the rows, ascending.
    pub fn pick(
        &mut self,
        stream: &Stream,
        kernels: &LoraKernels,
        picked: &[u32],
        gates: &Gates,
        expert: impl Fn(u32) -> Option<Seated>,
    ) -> Result<(), CudaError> {
        self.rows.set_picked(stream, picked)?;
        if let Current::All { rows, .. } = self.current
            && rows == picked.len()
        {
            // All of them: their lists are there.
            self.current = Current::All { rows, bound: rows, graph: false };
            return Ok(());
        }
        self.listed = None;
        self.picked.set_seated(stream, gates, expert)?;
        self.lists.build(stream, kernels, &self.picked)?;
        self.current = Current::Picked { rows: picked.len() };
        Ok(())
    }

    /// How many rows launches are made for while they are recorded; `None` for a step that is not worth it.
    pub fn graph_rows(&self) -> Option<usize> {
        match self.current {
            Current::All { bound, graph: true, .. } => Some(bound),
            _ => None,
        }
    }

    /// What products of the current rows have in common.
    pub fn products(&self) -> Step<'_> {
        let (work, row_bound) = match self.current {
            Current::All { bound, .. } => (&self.work, bound),
            Current::Picked { rows } => (&self.picked, rows),
        };
        Step { work, row_bound, scratch: &self.scratch, overlap: true }
    }

    /// The experts of all rows of the step.
    pub fn work(&self) -> &WorkList {
        &self.work
    }

    /// The current rows.
    pub fn count(&self) -> RowCount<'_> {
        match self.current {
            Current::All { bound, .. } => self.rows.row_count(bound, true),
            Current::Picked { rows } => self.rows.picked_count(rows, true),
        }
    }

    /// A number of rows that the host knows.
    pub fn count_of(&self, rows: usize) -> RowCount<'_> {
        RowCount { count: self.counts.slice(rows..=rows), bound: rows, overlap: true }
    }

    pub fn scratch(&self) -> &Scratch {
        &self.scratch
    }

    /// What the attention of all rows has in common.
    pub fn attention(&self) -> AttentionStep<'_> {
        let row_bound = match self.current {
            Current::All { bound, .. } => bound,
            Current::Picked { .. } => self.limits.rows,
        };
        let whole = self.attention.has_whole();
        AttentionStep { work: &self.attention, row_bound, whole, overlap: true }
    }

    /// Whether a chunk list has not fitted since the last call: it says so of a bug, never of a batch.
    pub fn take_overflow(&self, stream: &Stream) -> Result<bool, CudaError> {
        self.lists.take_overflow(stream)
    }
}
