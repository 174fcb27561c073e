//! Bytes and floating-point operations of a case: the least that its launches have to do.

use std::iter::Sum;
use std::ops::Add;

use loramux::backend::cuda::params::{RANK_CHUNK, ROW_TILE};

use super::cases::{Batch, Case, Group, Mix, Output, Part};

/// Bytes of each operand, read or written once, and operations.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    pub weights: u64,
    pub x: u64,
    /// Chunks of A and of B that the batch uses.
    pub a: u64,
    pub b: u64,
    /// What lies between the two steps of a product, written by one and read by the other.
    pub v: u64,
    /// Outputs, and residuals where they are added.
    pub y: u64,
    /// 2 · rows · in · out.
    pub base_flops: u64,
    /// 2 · rows · rank · (in + out), with the adapters' own ranks: not those of their chunks.
    pub rank_flops: u64,
}

impl Counts {
    pub fn bytes(&self) -> u64 {
        self.weights + self.x + self.a + self.b + self.v + self.y
    }

    pub fn flops(&self) -> u64 {
        self.base_flops + self.rank_flops
    }

    /// The larger of the two times, in seconds: at `bandwidth` bytes per second and, where it is known, `peak` FLOP/s.
    pub fn floor(&self, bandwidth: f64, peak: Option<f64>) -> f64 {
        let arithmetic = peak.map_or(0.0, |peak| self.flops() as f64 / peak);
        (self.bytes() as f64 / bandwidth).max(arithmetic)
    }

    pub fn of(case: &Case) -> Self {
        case.groups.iter().map(|group| Self::of_group(group, &case.batch, case.mix, case.part)).sum()
    }

    fn of_group(group: &Group, batch: &Batch, mix: Mix, part: Part) -> Self {
        let (rows, sites) = (batch.rows, group.widths.len());
        let all_chunks = batch.chunks(0..batch.segments.len());
        // V of every row of a tile for every chunk of the tile.
        let v_rows = batch
            .tiles(ROW_TILE)
            .into_iter()
            .enumerate()
            .map(|(tile, adapters)| ROW_TILE.min(rows - tile * ROW_TILE) * batch.chunks(adapters));
        let v = v_rows.sum::<usize>() * sites * RANK_CHUNK * 2;
        let rank_sum = |rows_and_rank: (usize, &usize)| batch.ranks.of(rows_and_rank.0) * rows_and_rank.1;
        let ranks_of_rows: usize = batch.segments.iter().enumerate().map(rank_sum).sum();
        let shrink = part != Part::Product && mix != Mix::None;
        let product = part != Part::Shrink;
        let when = |happens: bool, count: usize| if happens { count as u64 } else { 0 };
        let outputs = rows * group.width() * 2 * if group.output == Output::AddResidual { 2 } else { 1 };
        Self {
            weights: when(product, group.weight_bytes()),
            x: (rows * group.in_features * 2) as u64,
            a: when(shrink, all_chunks * sites * RANK_CHUNK * group.in_features * 2),
            b: when(product, all_chunks * RANK_CHUNK * group.out_features() * 2),
            v: when(shrink, v) + when(product, v),
            y: when(product, outputs),
            base_flops: when(product, 2 * rows * group.in_features * group.out_features()),
            rank_flops: when(shrink, 2 * ranks_of_rows * sites * group.in_features)
                + when(product, 2 * ranks_of_rows * group.out_features()),
        }
    }
}

impl Add for Counts {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            weights: self.weights + other.weights,
            x: self.x + other.x,
            a: self.a + other.a,
            b: self.b + other.b,
            v: self.v + other.v,
            y: self.y + other.y,
            base_flops: self.base_flops + other.base_flops,
            rank_flops: self.rank_flops + other.rank_flops,
        }
    }
}

impl Sum for Counts {
    fn sum<I: Iterator<Item = Self>>(counts: I) -> Self {
        counts.fold(Self::default(), Add::add)
    }
}
