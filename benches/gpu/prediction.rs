//! What a case should take on an H100 SXM, from the launch geometry and a few rates: written down before measuring, so
//! that a measurement far off in either direction is noticed and explained.
//!
//! - Memory moves 3.0 TB/s, the rate of a copy. Whatever a launch reads or writes once goes at this rate.
//! - `mma.sync` reaches 62 % of the 989 TFLOP/s that `wgmma` has. Where a wave leaves a multiprocessor one thread block
//!   of `gemm_rank_ext` instead of two, it has nothing to do while that block waits at its barrier: 45 %. Decode
//!   kernels multiply small tiles: 25 %.
//! - A multiprocessor takes 80 GB/s from L2: 47 bytes a clock at 1.7 GHz.
//! - A load takes 0.7 µs under load: a thread block cannot take more than its stages in flight in that time.
//! - A launch costs 2 µs beside its work: the tail of one grid and the start of the next, partly overlapped.
//! - A wave of thread blocks fills its pipelines once: 1 µs; and `gemm_rank_ext` writes its tiles at the end: 1 µs more.
//!   Two thread blocks on a multiprocessor hide half of that.
//! - Partial sums of K slices are written to L2 and read back, by the thread block that has all slices of a tile or by
//!   the last of several to arrive. Each further slice of a thread block fills its pipelines again, half hidden.
//! - Waves are whole: with 132 multiprocessors, a grid of 133 thread blocks at one each takes two.

use std::fmt::Write as _;

use loramux::backend::cuda::lora::{ShrinkKernel, shrink_slices};
use loramux::backend::cuda::params::{
    GEMM_DECODE_COLUMNS, GEMM_RANK_EXT_COLUMNS, RANK_CHUNK, ROW_TILE, SHRINK_GATE_16_CHUNKS,
    SHRINK_GATE_16_ROWS, SHRINK_GATE_16_SHARED_BYTES, SHRINK_GATE_64_CHUNKS, SHRINK_GATE_64_ROWS,
    SHRINK_GATE_64_SHARED_BYTES,
};

use super::cases::{Batch, Case, Group, Mix, Output, Part, Ranks, Set};
use super::counts::Counts;

/// What the predictions are for.
pub const DEVICE: &str = "H100 SXM";

pub const MULTIPROCESSORS: usize = 132;
pub const MEMORY: f64 = 3.0e12;
pub const PEAK: f64 = 989e12;
const SHARE_OF_TWO_BLOCKS: f64 = 0.62;
const SHARE_OF_ONE_BLOCK: f64 = 0.45;
const DECODE_SHARE: f64 = 0.25;
const L2_OF_MULTIPROCESSOR: f64 = 80e9;
const LATENCY: f64 = 0.7e-6;
pub const LAUNCH: f64 = 2e-6;
const FILL: f64 = 1e-6;
const WRITE_TILES: f64 = 1e-6;

/// Most rows of a decode product.
pub const DECODE_ROWS: usize = 64;
/// Row tiles that walk along the columns together.
const BAND: usize = 8;

/// Seconds, and what they are spent on.
#[derive(Clone, Copy, Debug, Default)]
pub struct Prediction {
    pub seconds: f64,
    /// The resource that decides.
    pub limit: &'static str,
}

impl Prediction {
    /// The slowest of several things that happen at the same time, then `overhead`.
    fn slowest(of: &[(f64, &'static str)], overhead: f64) -> Self {
        let most = of.iter().copied().max_by(|a, b| a.0.total_cmp(&b.0)).expect("something happens");
        Self { seconds: most.0 + overhead + LAUNCH, limit: most.1 }
    }

    /// One after the other; the limit is that of the longer.
    fn then(self, next: Self) -> Self {
        let longer = if next.seconds > self.seconds { next } else { self };
        Self { seconds: self.seconds + next.seconds, limit: longer.limit }
    }
}

/// The launches of a case.
pub fn predict(case: &Case) -> Prediction {
    let mut sum = Prediction::default();
    for group in &case.groups {
        let of_part = |part| {
            let case = Case { groups: vec![group.clone()], part, ..case.clone() };
            let memory = Counts::of(&case).bytes() as f64 / MEMORY;
            match part {
                Part::Shrink => shrink(group, &case.batch, memory),
                Part::Whole => decode(group, &case.batch, memory, true),
                Part::Product if case.batch.rows <= DECODE_ROWS => decode(group, &case.batch, memory, false),
                Part::Product => gemm(group, &case.batch, memory),
            }
        };
        let adapters = case.mix != Mix::None;
        sum = sum.then(match case.part {
            Part::Whole if adapters && case.batch.rows <= DECODE_ROWS => of_part(Part::Whole),
            Part::Whole if adapters => of_part(Part::Shrink).then(of_part(Part::Product)),
            Part::Shrink if !adapters => continue,
            Part::Whole => of_part(Part::Product),
            part => of_part(part),
        });
    }
    sum
}

fn column_tiles(group: &Group, columns: usize) -> usize {
    if group.output == Output::SwiGlu {
        return group.widths[0].div_ceil(columns / 2);
    }
    group.widths.iter().map(|width| width.div_ceil(columns)).sum()
}

/// Rank chunks that a tile of columns multiplies, on average over the row tiles.
fn chunks_of_tile(group: &Group, batch: &Batch) -> f64 {
    let tiles = batch.tiles(ROW_TILE);
    let chunks: usize = tiles.iter().map(|adapters| batch.chunks(adapters.clone())).sum();
    let sites = if group.output == Output::SwiGlu { 2 } else { 1 };
    (chunks * sites) as f64 / tiles.len() as f64
}

fn gemm(group: &Group, batch: &Batch, memory: f64) -> Prediction {
    let row_tiles = batch.rows.div_ceil(ROW_TILE);
    let tiles = row_tiles * column_tiles(group, GEMM_RANK_EXT_COLUMNS);
    // Few tiles: a thread block for each slice. Otherwise a thread block has all of them and parks their sums.
    let split = if tiles <= MULTIPROCESSORS { group.slices() } else { 1 };
    let parked = if split == 1 && group.slices() > 1 { group.slices() } else { 0 };
    let (blocks, resident) = (tiles * split, 2);
    let steps = ((group.in_features / RANK_CHUNK) as f64 + chunks_of_tile(group, batch)) / split as f64;
    let flops = steps * (2 * ROW_TILE * GEMM_RANK_EXT_COLUMNS * RANK_CHUNK) as f64;
    let bytes = steps * ((ROW_TILE + GEMM_RANK_EXT_COLUMNS) * RANK_CHUNK * 2) as f64
        + (2 * parked * ROW_TILE * GEMM_RANK_EXT_COLUMNS * 4) as f64;
    let fills = parked.saturating_sub(1) as f64 * FILL;
    // Sums of a slice are written, and those of all slices read by the thread block that adds them.
    let partials = if split > 1 { (1 + split) * ROW_TILE * GEMM_RANK_EXT_COLUMNS * 4 } else { 0 };
    let wave = |of_multiprocessor: usize| {
        let (share, overhead) = match of_multiprocessor {
            1 => (SHARE_OF_ONE_BLOCK, FILL + WRITE_TILES + fills),
            _ => (SHARE_OF_TWO_BLOCKS, FILL + fills / 2.0),
        };
        let multiply = flops / (share * PEAK / MULTIPROCESSORS as f64);
        let load = bytes / L2_OF_MULTIPROCESSOR;
        (of_multiprocessor as f64 * multiply.max(load) + overhead, load > multiply)
    };
    let at_once = MULTIPROCESSORS * resident;
    let rest = (blocks % at_once).div_ceil(MULTIPROCESSORS);
    let mut seconds = (blocks / at_once) as f64 * wave(resident).0;
    if rest > 0 {
        seconds += wave(rest).0;
    }
    // Every band of row tiles reads the weights again.
    let again = (row_tiles.div_ceil(BAND) - 1) * group.weight_bytes();
    let limit = match (wave(resident).1, blocks < at_once) {
        (true, _) => "L2",
        (false, true) => "too few tiles",
        (false, false) => "tensor cores",
    };
    let products = [(memory + again as f64 / MEMORY, "memory"), (seconds, limit)];
    Prediction::slowest(&products, partials as f64 / L2_OF_MULTIPROCESSOR)
}

/// A decode product; `with_v`: it computes V too. Units of V take multiprocessors' time at L2 and, before rank blocks can
/// begin, their own latency; what memory moves meanwhile is weights.
fn decode(group: &Group, batch: &Batch, memory: f64, with_v: bool) -> Prediction {
    let rows = [16, 32, DECODE_ROWS].into_iter().find(|&rows| batch.rows <= rows).expect("few rows");
    let blocks = column_tiles(group, GEMM_DECODE_COLUMNS) * group.slices();
    let slice_steps =
        ((group.in_features / RANK_CHUNK) as f64 + chunks_of_tile(group, batch)) / group.slices() as f64;
    let bytes_of_block = slice_steps * ((rows + GEMM_DECODE_COLUMNS) * RANK_CHUNK * 2) as f64;
    let per_multiprocessor = blocks as f64 / MULTIPROCESSORS.min(blocks) as f64;
    let load = per_multiprocessor * bytes_of_block / L2_OF_MULTIPROCESSOR;
    let multiply = blocks as f64 * slice_steps * (2 * rows * GEMM_DECODE_COLUMNS * RANK_CHUNK) as f64
        / (DECODE_SHARE * PEAK);
    let v = if with_v { Units::of(group, batch) } else { Units::default() };
    let limits = [
        (memory, "memory"),
        (load + v.load(), "L2"),
        (multiply, "tensor cores"),
        (v.latency + v.load(), "latency"),
    ];
    Prediction::slowest(&limits, 2.0 * FILL)
}

fn shrink(group: &Group, batch: &Batch, memory: f64) -> Prediction {
    let units = Units::of(group, batch);
    let limits = [(memory, "memory"), (units.latency, "latency"), (units.load(), "L2")];
    Prediction::slowest(&limits, 2.0 * FILL)
}

/// Blocks of rows and chunks of V, in slices of K, that are multiplied: those of which a row uses a chunk.
#[derive(Default)]
struct Units {
    count: usize,
    /// Of each.
    bytes: f64,
    /// Seconds of one alone.
    latency: f64,
}

impl Units {
    fn of(group: &Group, batch: &Batch) -> Self {
        let few = ShrinkKernel::for_rows(batch.rows) == ShrinkKernel::Rows16;
        let slices = if few { shrink_slices(group.in_features) } else { 1 };
        // One stage of the ring is being multiplied, the others are under way.
        let (rows, chunks, in_flight) = if few {
            (SHRINK_GATE_16_ROWS, SHRINK_GATE_16_CHUNKS, SHRINK_GATE_16_SHARED_BYTES * 5 / 6)
        } else {
            (SHRINK_GATE_64_ROWS, SHRINK_GATE_64_CHUNKS, SHRINK_GATE_64_SHARED_BYTES * 3 / 4)
        };
        let sites = group.widths.len();
        let of_tile = |adapters| (batch.chunks(adapters) * sites).div_ceil(chunks);
        let count = batch.tiles(rows).into_iter().map(of_tile).sum::<usize>() * slices;
        let ranks = chunks * RANK_CHUNK;
        let bytes = ((rows + ranks) * group.in_features * 2) as f64 / slices as f64;
        let latency = bytes / (in_flight as f64 / LATENCY).min(L2_OF_MULTIPROCESSOR);
        Self { count, bytes, latency }
    }

    /// Seconds in which multiprocessors take them from L2.
    fn load(&self) -> f64 {
        self.count.div_ceil(MULTIPROCESSORS) as f64 * self.bytes / L2_OF_MULTIPROCESSOR
    }
}

/// The table of all predictions of a full run, in Markdown.
pub fn to_markdown() -> String {
    let mut text = format!(
        "# What the LoRA kernels should take\n\n\
         Made by `cargo bench -p loramux-benches --bench lora -- --predict` before anything was measured: bytes and\n\
         operations of each case, and its time on an {DEVICE} by the model below. Measured results stand in `results/`.\n\n\
         - *Floor*: the larger of bytes over {:.1} TB/s and operations over {:.0} TFLOP/s. *Share*: floor over prediction.\n\
         - *Over none*: prediction over that of the same product without adapters and without `shrink_gate`.\n\
         - *Whole*: of up to 64 rows, V is computed in the product's own launch; of more, the sum of two launches.\n\
         - *Limit*: what decides the one launch, or the longer of the two.\n\n## The model\n\n",
        MEMORY / 1e12,
        PEAK / 1e12
    );
    let model = include_str!("prediction.rs").lines().skip_while(|line| *line != "//!").skip(1);
    for line in model.map_while(|line| line.strip_prefix("//!")) {
        writeln!(text, "{}", line.strip_prefix(' ').unwrap_or(line)).expect("writing to a string");
    }
    let cases: Vec<_> = Set::Full.cases().into_iter().filter(|case| case.part == Part::Whole).collect();
    let mut targets: Vec<&str> = cases.iter().map(|case| case.target).collect();
    targets.dedup();
    targets.sort_unstable_by_key(|target| (*target != "layer", *target));
    targets.dedup();
    for target in targets {
        writeln!(text, "\n## {}, {target}\n", Set::Full.shapes().name).expect("writing to a string");
        text += "| rows | adapters | n | MB | GFLOP | floor µs | shrink µs | product µs | whole µs | share | over none | limit |\n\
                 |--:|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|---|\n";
        let mut base = 0.0;
        let shown = |case: &&Case| case.target == target && case.batch.ranks != Ranks::Equal(8);
        let mut of_target: Vec<_> = cases.iter().filter(shown).collect();
        of_target.sort_by_key(|case| case.batch.rows);
        for case in of_target {
            let counts = Counts::of(case);
            let part = |part| match part {
                Part::Shrink if case.mix == Mix::None => 0.0,
                _ => predict(&Case { part, ..case.clone() }).seconds,
            };
            let whole = predict(case);
            if case.mix == Mix::None {
                base = whole.seconds;
            }
            let floor = counts.floor(MEMORY, Some(PEAK));
            writeln!(
                text,
                "| {} | {} | {} | {:.1} | {:.1} | {:.1} | {:.1} | {:.1} | {:.1} | {:.0} % | {:.3} | {} |",
                case.batch.rows,
                case.adapters(),
                case.batch.segments.len(),
                counts.bytes() as f64 / 1e6,
                counts.flops() as f64 / 1e9,
                floor * 1e6,
                part(Part::Shrink) * 1e6,
                part(Part::Product) * 1e6,
                whole.seconds * 1e6,
                100.0 * floor / whole.seconds,
                whole.seconds / base,
                whole.limit
            )
            .expect("writing to a string");
        }
    }
    text
}
