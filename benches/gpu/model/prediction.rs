//! What a step should take on an H100 SXM, launch by launch: written down before measuring.
//!
//! - Products and shrinks: by the model of the bench `lora` (`predictions.md`). Up to 64 rows a product computes V itself;
//!   for more rows it has a shrink launch before it where there is memory for adapters, whether any are in use or not.
//! - Norms, rotations, SwiGLU and embeddings move what they read and write at 3.0 TB/s, and cost 2 µs a launch beside it:
//!   while few rows are decoded, that alone.
//! - Decode attention reads keys and values at 3.0 TB/s. A thread block goes through 512 keys in eight blocks of 64, 1 µs
//!   each, two of them on a multiprocessor: one sequence alone waits for that.
//! - Prefill attention does 300 TFLOP/s, bound by L2 and shared memory.
//! - A step begins with eight copies of row lists, 1.5 µs each, and the embeddings; the end has two copies, the picked
//!   rows, a norm and `lm_head`. Chunk lists are those of the step before while a decoding has the same adapters; where
//!   only some rows give logits they are built twice, each time after two copies. The host's own work is left out.

use std::fmt::Write as _;

use super::super::cases::{Batch, Case as LoraCase, Group, Mix, Output, Part, Ranks, Set};
use super::super::prediction::{
    DECODE_ROWS, DEVICE, LAUNCH, MEMORY, MULTIPROCESSORS, PEAK, predict as predict_lora,
};
use super::cases::{Adapters, Case, Model, Step, all_models, cases};
use super::counts::{Counts, attention_flops};

const COPY: f64 = 1.5e-6;
const COPIES_OF_STEP: usize = 8;
const COPIES_OF_HEAD: usize = 2;
/// Copies before chunk lists are built.
const COPIES_OF_LISTS: usize = 2;
const KEY_BLOCK_SECONDS: f64 = 1e-6;
const KEYS_OF_BLOCK: usize = 64;
/// Keys that a thread block goes through while few rows are decoded.
const SPLIT: usize = 512;
/// Thread blocks of attention on a multiprocessor.
const ATTENTION_BLOCKS: usize = 2;
const ATTENTION_FLOPS: f64 = 300e12;

/// Launches that do the same kind of work.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Class {
    /// Row lists, chunk lists and embeddings, before the first block.
    Begin,
    Norm,
    Shrink,
    Product,
    Rope,
    Attention,
    SwiGlu,
    /// Everything behind the last block.
    Head,
}

pub const CLASSES: [Class; 8] = [
    Class::Begin,
    Class::Norm,
    Class::Shrink,
    Class::Product,
    Class::Rope,
    Class::Attention,
    Class::SwiGlu,
    Class::Head,
];

impl Class {
    pub fn name(self) -> &'static str {
        match self {
            Self::Begin => "begin",
            Self::Norm => "norm",
            Self::Shrink => "shrink",
            Self::Product => "product",
            Self::Rope => "rope",
            Self::Attention => "attention",
            Self::SwiGlu => "swiglu",
            Self::Head => "head",
        }
    }
}

/// Launches of a class in a step, and their seconds together.
#[derive(Clone, Copy, Debug)]
pub struct Share {
    pub class: Class,
    pub launches: usize,
    pub seconds: f64,
}

/// A step by classes; those that it does not have are left out.
#[derive(Clone, Debug)]
pub struct Prediction {
    pub shares: Vec<Share>,
    blocks: usize,
}

impl Prediction {
    pub fn of(model: &Model, case: &Case) -> Self {
        let mut prediction = Self { shares: Vec::new(), blocks: model.config.num_layers };
        prediction.add_begin(model, case);
        prediction.add_blocks(model, case);
        prediction.add_head(model, case);
        prediction
    }

    pub fn seconds(&self) -> f64 {
        self.shares.iter().map(|share| share.seconds).sum()
    }

    /// Launches of a transformer block.
    pub fn launches_per_block(&self) -> usize {
        launches_of_blocks(&self.shares) / self.blocks
    }

    pub fn share(&self, class: Class) -> Option<&Share> {
        self.shares.iter().find(|share| share.class == class)
    }

    fn add(&mut self, class: Class, launches: usize, seconds: f64) {
        add_share(&mut self.shares, class, launches, seconds);
    }

    fn add_begin(&mut self, model: &Model, case: &Case) {
        let embed = moves(4 * case.step.rows() * model.config.hidden_size);
        let (launches, lists) = lists(case);
        self.add(Class::Begin, 1 + launches, COPIES_OF_STEP as f64 * COPY + lists + embed);
    }

    fn add_blocks(&mut self, model: &Model, case: &Case) {
        let (config, rows, blocks) = (&model.config, case.step.rows(), self.blocks);
        let mut each = |class, seconds: f64| self.add(class, blocks, blocks as f64 * seconds);
        for group in model.groups() {
            let Seconds { shrink, product } = seconds_of_group(&group, &case.batch());
            if let Some(shrink) = shrink {
                each(Class::Shrink, shrink);
            }
            each(Class::Product, product);
            if group.name == "gate_up" && group.output != Output::SwiGlu {
                each(Class::SwiGlu, moves(6 * rows * config.intermediate_size));
            }
        }
        for _ in 0..2 {
            each(Class::Norm, moves(4 * rows * config.hidden_size));
        }
        // Reads q, k and v; writes q and k, and k and v into the cache.
        each(Class::Rope, moves(rows * (4 * config.query_width() + 10 * config.kv_width())));
        each(Class::Attention, attention(model, case.step));
        if let Step::Prefill { .. } = case.step {
            // Sequences of few rows have a launch of their own, here for none.
            each(Class::Attention, LAUNCH);
        }
    }

    fn add_head(&mut self, model: &Model, case: &Case) {
        let rows = case.step.sequences();
        let batch = Batch { rows, segments: Vec::new(), ranks: Ranks::Equal(0) };
        let Seconds { shrink, product } = seconds_of_group(&model.lm_head(), &batch);
        // Logits are fp32: two bytes more than the outputs of other products.
        let logits = (2 * rows * model.config.vocab_size) as f64 / MEMORY;
        let rows_and_norm = 2.0 * moves(4 * rows * model.config.hidden_size);
        let (of_lists, lists) = lists(case);
        let copies = COPIES_OF_HEAD as f64 * COPY + lists;
        let launches = 3 + of_lists + usize::from(shrink.is_some());
        let products = shrink.unwrap_or(0.0) + product + logits;
        self.add(Class::Head, launches, copies + rows_and_norm + products);
    }
}

/// Adds launches that take so many seconds together.
pub fn add_share(shares: &mut Vec<Share>, class: Class, launches: usize, seconds: f64) {
    match shares.iter_mut().find(|share| share.class == class) {
        Some(share) => {
            share.launches += launches;
            share.seconds += seconds;
        }
        None => shares.push(Share { class, launches, seconds }),
    }
}

/// Launches of all blocks together.
pub fn launches_of_blocks(shares: &[Share]) -> usize {
    let of_blocks = shares.iter().filter(|share| ![Class::Begin, Class::Head].contains(&share.class));
    of_blocks.map(|share| share.launches).sum()
}

/// Launches that build chunk lists, and their seconds with the copies before.
fn lists(case: &Case) -> (usize, f64) {
    match case.step {
        Step::Decode { .. } => (0, 0.0),
        Step::Prefill { .. } => (1, COPIES_OF_LISTS as f64 * COPY + LAUNCH),
    }
}

/// Seconds of a launch that memory bounds.
fn moves(bytes: usize) -> f64 {
    bytes as f64 / MEMORY + LAUNCH
}

/// Seconds of a group's launches.
struct Seconds {
    /// Up to 64 rows the product computes V itself.
    shrink: Option<f64>,
    product: f64,
}

fn seconds_of_group(group: &Group, batch: &Batch) -> Seconds {
    let mix = if batch.segments.is_empty() { Mix::None } else { Mix::Distinct };
    let seconds = |part| {
        let case = LoraCase {
            target: group.name,
            groups: vec![group.clone()],
            group_range: 0..1,
            mix,
            batch: batch.clone(),
            part,
        };
        predict_lora(&case).seconds
    };
    match (batch.rows <= DECODE_ROWS, mix) {
        (true, _) => Seconds { shrink: None, product: seconds(Part::Whole) },
        (false, Mix::None) => Seconds { shrink: Some(LAUNCH), product: seconds(Part::Product) },
        (false, _) => Seconds { shrink: Some(seconds(Part::Shrink)), product: seconds(Part::Product) },
    }
}

/// Seconds of one block's attention.
fn attention(model: &Model, step: Step) -> f64 {
    let config = &model.config;
    let Step::Decode { sequences, context } = step else {
        return attention_flops(model, step) as f64 / ATTENTION_FLOPS + LAUNCH;
    };
    let bytes = sequences * context * 2 * config.kv_width() * 2;
    let thread_blocks = sequences * config.num_kv_heads * context.div_ceil(SPLIT);
    let waves = thread_blocks.div_ceil(ATTENTION_BLOCKS * MULTIPROCESSORS);
    let of_block = SPLIT.min(context).div_ceil(KEYS_OF_BLOCK) as f64 * KEY_BLOCK_SECONDS;
    (bytes as f64 / MEMORY).max(waves as f64 * of_block) + LAUNCH
}

/// The tables of all predictions of a full run, in Markdown.
pub fn to_markdown() -> String {
    let mut text = format!(
        "# What steps of whole models should take\n\n\
         Made by `cargo bench -p loramux-benches --bench model -- --predict` before anything was measured: bytes and\n\
         operations of each step, and its time on an {DEVICE} by the model below. Measured results stand in `results/`.\n\n\
         - *Floor*: the larger of bytes over {:.1} TB/s and operations over {:.0} TFLOP/s, activations left out.\n\
         \u{20} *Share*: floor over prediction.\n\
         - *Over none*: prediction over that of the same step of a model without memory for adapters.\n\
         - Columns of classes are milliseconds of all their launches.\n\n## The model\n\n",
        MEMORY / 1e12,
        PEAK / 1e12
    );
    let model = include_str!("prediction.rs").lines().skip_while(|line| *line != "//!").skip(1);
    for line in model.map_while(|line| line.strip_prefix("//!")) {
        text += line.strip_prefix(' ').unwrap_or(line);
        text.push('\n');
    }
    for model in all_models(Set::Full) {
        write_table(&mut text, &model).expect("writing to a string");
    }
    text
}

fn write_table(text: &mut String, model: &Model) -> std::fmt::Result {
    let of_case = |case: &Case| Prediction::of(model, case);
    let cases = cases(Set::Full);
    let per_block = |wanted: fn(&Step) -> bool| {
        let case = cases.iter().find(|case| wanted(&case.step)).expect("both kinds of steps");
        of_case(case).launches_per_block()
    };
    writeln!(
        text,
        "\n## {}\n\nLaunches of a block: {} in decode steps, {} in prefill.\n",
        model.name,
        per_block(|step| matches!(step, Step::Decode { .. })),
        per_block(|step| matches!(step, Step::Prefill { .. }))
    )?;
    let names: Vec<_> = CLASSES.iter().map(|class| class.name()).collect();
    writeln!(
        text,
        "| step | adapters | GB | TFLOP | floor ms | {} | sum ms | share | over none | tokens/s |",
        names.join(" | ")
    )?;
    writeln!(text, "|---|---|--:|--:|--:|{}--:|--:|--:|--:|", "--:|".repeat(names.len()))?;
    let mut sorted = cases.clone();
    sorted.sort_by_key(|case| cases.iter().position(|other| other.step == case.step));
    for case in sorted {
        let (counts, prediction) = (Counts::of(model, &case), of_case(&case));
        let seconds = prediction.seconds();
        let none = of_case(&Case { adapters: Adapters::Absent, ..case }).seconds();
        let floor = counts.floor(MEMORY, Some(PEAK));
        let step = match case.step {
            Step::Decode { sequences, context } => format!("decode {sequences} at {context}"),
            Step::Prefill { sequences, tokens } => format!("prefill {sequences} of {tokens}"),
        };
        let shares = CLASSES.map(|class| {
            prediction.share(class).map_or(String::new(), |share| format!("{:.2}", share.seconds * 1e3))
        });
        writeln!(
            text,
            "| {step} | {} | {:.2} | {:.2} | {:.2} | {} | {:.2} | {:.0} % | {:.3} | {:.0} |",
            case.adapters.name(),
            counts.bytes() as f64 / 1e9,
            counts.flops as f64 / 1e12,
            floor * 1e3,
            shares.join(" | "),
            seconds * 1e3,
            100.0 * floor / seconds,
            seconds / none,
            case.step.rows() as f64 / seconds
        )?;
    }
    Ok(())
}
