//! What is timed: the site groups of a Llama layer, numbers of rows, and how rows are spread over adapters.

use std::env;
use std::ops::Range;

use loramux::backend::cuda::lora::k_slices;
use loramux::backend::cuda::params::RANK_CHUNK;
use serde_json::{Value, json};

/// What becomes of a group's sums.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Output {
    Store,
    AddResidual,
    SwiGlu,
}

/// Linear layers that read the same rows.
#[derive(Clone, Debug)]
pub struct Group {
    pub name: &'static str,
    pub in_features: usize,
    /// Outputs of each site.
    pub widths: Vec<usize>,
    pub output: Output,
}

impl Group {
    /// Columns of y.
    pub fn width(&self) -> usize {
        if self.output == Output::SwiGlu { self.widths[0] } else { self.out_features() }
    }

    /// Outputs of all sites together.
    pub fn out_features(&self) -> usize {
        self.widths.iter().sum()
    }

    pub fn slices(&self) -> usize {
        k_slices(self.in_features, self.widths.iter().copied())
    }

    pub fn weight_bytes(&self) -> usize {
        self.in_features * self.out_features() * 2
    }
}

/// Widths of a model's layers.
#[derive(Clone, Copy, Debug)]
pub struct Shapes {
    pub name: &'static str,
    pub hidden: usize,
    pub kv: usize,
    pub intermediate: usize,
}

impl Shapes {
    /// The groups of a layer, in the order in which it runs them.
    pub fn groups(&self) -> Vec<Group> {
        let group = |name, in_features, widths, output| Group { name, in_features, widths, output };
        vec![
            group("qkv", self.hidden, vec![self.hidden, self.kv, self.kv], Output::Store),
            group("o", self.hidden, vec![self.hidden], Output::AddResidual),
            group("gate_up", self.hidden, vec![self.intermediate; 2], Output::SwiGlu),
            group("down", self.intermediate, vec![self.hidden], Output::AddResidual),
        ]
    }
}

const LLAMA_3_8B: Shapes = Shapes { name: "Llama 3 8B", hidden: 4096, kv: 1024, intermediate: 14336 };
const TINY: Shapes = Shapes { name: "tiny", hidden: 256, kv: 64, intermediate: 384 };

/// How the rows of a batch are spread over adapters. Rows of one adapter are neighbours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mix {
    /// The base alone.
    None,
    /// One adapter for all rows.
    Identical,
    /// As many adapters as there are rows, at most 64.
    Distinct,
    /// √rows adapters, with as many rows each.
    Uniform,
    /// Each adapter has 1.5 times as many rows as the one before it.
    Skewed,
}

const MIXES: [Mix; 5] = [Mix::None, Mix::Identical, Mix::Distinct, Mix::Uniform, Mix::Skewed];

impl Mix {
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Identical => "identical",
            Self::Distinct => "distinct",
            Self::Uniform => "uniform",
            Self::Skewed => "skewed",
        }
    }

    /// Rows of each adapter.
    pub fn segments(self, rows: usize) -> Vec<usize> {
        let even = |adapters: usize| proportional(rows, &vec![1.0; adapters]);
        match self {
            Self::None => Vec::new(),
            Self::Identical => even(1),
            Self::Distinct => even(rows.min(64)),
            Self::Uniform => even((rows as f64).sqrt().round() as usize),
            Self::Skewed => {
                // As many as there are with one row for the first: Σ 1.5^k = (1.5^n − 1) / 0.5.
                let adapters = (1.0 + rows as f64 / 2.0).log(1.5).floor().max(1.0);
                proportional(rows, &(0..adapters as i32).map(|k| 1.5f64.powi(k)).collect::<Vec<_>>())
            }
        }
    }
}

/// `rows` divided in proportion to `shares`; shares of no row are left out.
fn proportional(rows: usize, shares: &[f64]) -> Vec<usize> {
    let total: f64 = shares.iter().sum();
    let (mut before, mut sum) = (0, 0.0);
    let ends = shares.iter().map(|share| {
        sum += share;
        (rows as f64 * sum / total).round() as usize
    });
    ends.map(|end| end - std::mem::replace(&mut before, end)).filter(|&size| size > 0).collect()
}

/// Ranks of the adapters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ranks {
    Equal(usize),
    /// 8, 16, 64 and again.
    Mixed,
}

impl Ranks {
    pub fn of(self, adapter: usize) -> usize {
        match self {
            Self::Equal(rank) => rank,
            Self::Mixed => [8, 16, 64][adapter % 3],
        }
    }

    pub fn name(self) -> String {
        match self {
            Self::Equal(rank) => format!("r{rank}"),
            Self::Mixed => "mixed".to_owned(),
        }
    }
}

/// The rows of a step and their adapters.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Batch {
    pub rows: usize,
    /// Rows of each adapter, in order; none for rows of the base.
    pub segments: Vec<usize>,
    pub ranks: Ranks,
}

impl Batch {
    pub fn chunks_of(&self, adapter: usize) -> usize {
        self.ranks.of(adapter).div_ceil(RANK_CHUNK)
    }

    /// Adapters of each tile of `tile` rows.
    pub fn tiles(&self, tile: usize) -> Vec<Range<usize>> {
        let mut tiles = Vec::new();
        let (mut adapter, mut end) = (0, self.segments.first().copied().unwrap_or(0));
        for first in (0..self.rows).step_by(tile) {
            let last = (first + tile).min(self.rows) - 1;
            while adapter < self.segments.len() && end <= first {
                adapter += 1;
                end += self.segments.get(adapter).copied().unwrap_or(0);
            }
            let begin = adapter;
            let (mut beyond, mut reach) = (adapter, end);
            while beyond < self.segments.len() && reach <= last {
                beyond += 1;
                reach += self.segments.get(beyond).copied().unwrap_or(0);
            }
            tiles.push(begin..(beyond + 1).min(self.segments.len()));
        }
        tiles
    }

    /// Rank chunks that the adapters of a range have at one site.
    pub fn chunks(&self, adapters: Range<usize>) -> usize {
        adapters.map(|adapter| self.chunks_of(adapter)).sum()
    }
}

/// Which launches are timed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// All that a step launches: where there are adapters, `linear`, else the product.
    Whole,
    Shrink,
    Product,
}

impl Part {
    pub fn name(self) -> &'static str {
        match self {
            Self::Whole => "whole",
            Self::Shrink => "shrink",
            Self::Product => "product",
        }
    }
}

/// One thing to time.
#[derive(Clone, Debug)]
pub struct Case {
    /// A group's name, or `layer` for all of them in one graph.
    pub target: &'static str,
    pub groups: Vec<Group>,
    /// Where the groups are among the layer's.
    pub group_range: Range<usize>,
    pub mix: Mix,
    pub batch: Batch,
    pub part: Part,
}

impl Case {
    /// As in `r16 distinct`, or `none`.
    pub fn adapters(&self) -> String {
        match self.mix {
            Mix::None => "none".to_owned(),
            mix => format!("{} {}", self.batch.ranks.name(), mix.name()),
        }
    }
}

/// How much is timed, by the variable `LORAMUX_BENCH_SET`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Set {
    /// Small shapes, for trying the bench itself out.
    Tiny,
    /// What fits into four minutes.
    Short,
    Full,
}

impl Set {
    /// # Errors
    /// What is wrong with the variable.
    pub fn from_environment() -> Result<Self, String> {
        match env::var("LORAMUX_BENCH_SET").as_deref() {
            Err(_) | Ok("short") => Ok(Self::Short),
            Ok("full") => Ok(Self::Full),
            Ok("tiny") => Ok(Self::Tiny),
            Ok(other) => Err(format!("LORAMUX_BENCH_SET is {other:?}, wanted short or full")),
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            Self::Tiny => "tiny",
            Self::Short => "short",
            Self::Full => "full",
        }
    }

    pub fn shapes(self) -> Shapes {
        if self == Self::Tiny { TINY } else { LLAMA_3_8B }
    }

    fn rows(self) -> &'static [usize] {
        match self {
            Self::Tiny => &[1, 70],
            Self::Short => &[1, 16, 64, 256, 2048, 8192],
            Self::Full => &[1, 4, 16, 64, 256, 2048, 8192],
        }
    }

    fn ranks(self) -> &'static [Ranks] {
        match self {
            Self::Tiny => &[Ranks::Equal(16)],
            Self::Short => &[Ranks::Equal(16), Ranks::Mixed],
            Self::Full => &[Ranks::Equal(16), Ranks::Mixed, Ranks::Equal(8), Ranks::Equal(64)],
        }
    }

    fn mixes(self, ranks: Ranks) -> &'static [Mix] {
        match self {
            Self::Full if ranks == self.ranks()[0] => &MIXES,
            // The base alone has no ranks: once is enough.
            Self::Full => &MIXES[1..],
            Self::Short if ranks == self.ranks()[0] => &MIXES,
            Self::Short => &[Mix::Distinct],
            Self::Tiny => &[Mix::None, Mix::Distinct],
        }
    }

    /// Cases of equal ranks are neighbours, those without adapters come before all others of as many rows.
    pub fn cases(self) -> Vec<Case> {
        let layer = self.shapes().groups();
        let mut targets = vec![("layer", 0..layer.len())];
        targets.extend(layer.iter().enumerate().map(|(i, group)| (group.name, i..i + 1)));
        let mut cases = Vec::new();
        for &ranks in self.ranks() {
            for &rows in self.rows() {
                let mut seen: Vec<Vec<usize>> = Vec::new();
                for &mix in self.mixes(ranks) {
                    let batch = Batch { rows, segments: mix.segments(rows), ranks };
                    if seen.contains(&batch.segments) {
                        continue;
                    }
                    seen.push(batch.segments.clone());
                    for (target, range) in &targets {
                        let parts: &[Part] = if mix == Mix::Distinct && *target != "layer" {
                            &[Part::Whole, Part::Shrink, Part::Product]
                        } else {
                            &[Part::Whole]
                        };
                        cases.extend(parts.iter().map(|&part| Case {
                            target,
                            groups: layer[range.clone()].to_vec(),
                            group_range: range.clone(),
                            mix,
                            batch: batch.clone(),
                            part,
                        }));
                    }
                }
            }
        }
        cases
    }
}

/// The cases for programs that time other libraries.
pub fn to_json(set: Set) -> Value {
    let groups: Vec<_> = set
        .shapes()
        .groups()
        .iter()
        .map(|group| {
            let output = match group.output {
                Output::Store => "store",
                Output::AddResidual => "add_residual",
                Output::SwiGlu => "swiglu",
            };
            json!({
                "name": group.name, "in_features": group.in_features, "widths": group.widths, "output": output,
            })
        })
        .collect();
    let whole = set.cases().into_iter().filter(|case| case.part == Part::Whole);
    let cases: Vec<_> = whole
        .map(|case| {
            let ranks = (0..case.batch.segments.len()).map(|adapter| case.batch.ranks.of(adapter));
            json!({
                "target": case.target, "rows": case.batch.rows, "adapters": case.adapters(),
                "segments": case.batch.segments, "ranks": ranks.collect::<Vec<_>>(),
            })
        })
        .collect();
    json!({ "set": set.name(), "shapes": set.shapes().name, "groups": groups, "cases": cases })
}
