//! Memory of training.

use super::serving::add_engine;
use super::{BaseShape, Estimate, F32, PairShape};
use crate::adapter::SiteTable;
use crate::backend::Backend;
use crate::backend::cpu::Cpu;
use crate::engine::{EngineError, EngineOptions};
use crate::model::{ModelConfig, Recompute, TapeSize};
use crate::train::config::{AdapterConfig, JobConfig, RunConfig};

/// Tokens of a sample, on average, where the data is not known.
const USUAL_LENGTH: usize = 64;

/// What the memory of a job depends on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JobShape {
    pub name: String,
    pub pairs: Vec<PairShape>,
    /// Expert slots, each with weights, gradients and moments of its own: with PCGrad one for each task.
    pub slots: usize,
    /// Whether elements of pairs' inputs are dropped.
    pub drops: bool,
    /// Whether the weights of the best evaluation are kept.
    pub keeps_best: bool,
}

impl JobShape {
    pub fn new(config: &JobConfig, pairs: Vec<PairShape>) -> Self {
        let (AdapterConfig::Fresh { dropout, .. } | AdapterConfig::From { dropout, .. }) = config.adapter;
        let trained = config.tasks.iter().filter(|task| task.train.is_some()).count();
        Self {
            name: config.name.clone(),
            pairs,
            slots: if config.pcgrad { trained } else { 1 },
            drops: dropout > 0.0,
            keeps_best: config.early_stop.is_some(),
        }
    }

    /// Numbers that are trained.
    pub fn parameters(&self, sites: &SiteTable) -> u64 {
        self.pairs.iter().map(|pair| pair.parameters(sites)).sum()
    }

    /// Bytes while the job is in training: in every slot weights, gradients and two moments, and B once more as the
    /// forward pass reads it; the weights that it began with, and the best.
    pub fn bytes(&self, sites: &SiteTable) -> u64 {
        let copies = 1 + u64::from(self.keeps_best) + 4 * self.slots as u64;
        (copies * self.parameters(sites) + self.slots as u64 * self.laid_out(sites)) * F32
    }

    /// Numbers of B in whole chunks, and with DoRA norms, the column scale and the slot's copy of it.
    fn laid_out(&self, sites: &SiteTable) -> u64 {
        let of_pair = |pair: &PairShape| {
            let per_output = pair.padded_rank() + if pair.dora { 3 } else { 0 };
            (sites.get(pair.site).out_features * per_output) as u64
        };
        self.pairs.iter().map(of_pair).sum()
    }

    /// Bytes that saving takes for a moment: weights and moments, as values and as tensors of a file.
    fn bytes_to_save(&self, sites: &SiteTable) -> u64 {
        2 * (3 + u64::from(self.keeps_best)) * self.parameters(sites) * F32
    }

    /// What the ranks of this job's pairs take for each row of a step: V of all sites, and dU of the largest group.
    fn rank_widths(&self, base: &BaseShape) -> RankWidths {
        let mut widths = RankWidths::default();
        for group in base.groups() {
            let pairs: Vec<&PairShape> =
                self.pairs.iter().filter(|pair| group.contains(&pair.site)).collect();
            let site = |pair: &PairShape| base.sites.table.get(pair.site);
            let ranks: usize = pairs.iter().map(|pair| pair.padded_rank()).sum();
            let inputs: usize = pairs.iter().map(|pair| site(pair).in_features).sum();
            let scaled = pairs.iter().filter(|pair| pair.dora).map(|pair| site(pair).out_features);
            // Factors and what they leave of the input; scaled gradients and frozen products.
            let dropped = if self.drops { 2 * inputs } else { 0 };
            let scaled = 2 * scaled.sum::<usize>();
            if group == [base.sites.lm_head] {
                widths.head = 2 * ranks + dropped + scaled;
            } else {
                widths.v += ranks;
                widths.du = widths.du.max(ranks);
                widths.dropped = widths.dropped.max(dropped);
                widths.scaled = widths.scaled.max(scaled);
            }
        }
        widths
    }
}

/// Numbers per row.
#[derive(Clone, Copy, Debug, Default)]
struct RankWidths {
    v: usize,
    du: usize,
    dropped: usize,
    scaled: usize,
    /// All of this of `lm_head`, whose rows are the picked ones.
    head: usize,
}

/// How large a run's steps are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step {
    /// Rows that the largest may have, and so the longest sequence.
    pub limit: usize,
    /// Rows that the largest has.
    pub rows: usize,
    /// How many of them are labelled.
    pub labelled: usize,
    /// Of its sequences.
    pub mean_length: usize,
    pub recompute: Recompute,
    /// Most jobs in training at a time.
    pub concurrent: usize,
}

impl Step {
    /// The largest steps of a run, should no sample be longer and every token be labelled. Evaluations fill them; where there are none, the jobs'
    /// batches bound them.
    pub fn of(config: &RunConfig, base: &BaseShape) -> Self {
        let context = base.config.max_position_embeddings;
        let mut batches: Vec<usize> = config
            .jobs
            .iter()
            .map(|job| job.batch_size.saturating_mul(job.max_length.min(context)))
            .collect();
        batches.sort_unstable_by(|one, other| other.cmp(one));
        let together = batches
            .iter()
            .take(config.max_concurrent_jobs)
            .fold(0, |sum: usize, rows| sum.saturating_add(*rows));
        let rows = if config.jobs.iter().any(is_evaluated) { usize::MAX } else { together };
        let rows = rows.min(config.max_tokens_per_step);
        Self {
            limit: config.max_tokens_per_step,
            rows,
            labelled: rows,
            mean_length: USUAL_LENGTH,
            recompute: config.recompute,
            concurrent: config.max_concurrent_jobs,
        }
    }

    /// The tape of such steps, as far as it is used: of the cache's pages, a sequence leaves half of one on average.
    fn tape_size(self, config: &ModelConfig) -> TapeSize {
        let logit_rows =
            (Cpu::LOGITS_BYTES / (config.vocab_size * size_of::<f32>())).clamp(1, self.labelled.max(1));
        let sequences = self.rows.div_ceil(2 * self.mean_length.max(1));
        TapeSize { rows: self.rows, sequences, logit_rows }
    }
}

/// The engine beside the training that generates answers for evaluations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Evaluation {
    /// Most tokens of questions and answers in its cache at a time.
    pub tokens: usize,
}

impl Evaluation {
    /// That of a run; `None` where nothing is generated. Without the data, as if every sample was as long as may be.
    pub fn of(config: &RunConfig, base: &BaseShape) -> Option<Self> {
        let asks = |job: &&JobConfig| job.eval_max_tokens > 0 && is_evaluated(job);
        let longest = |job: &JobConfig| job.max_length.saturating_add(job.eval_max_tokens);
        let longest = config.jobs.iter().filter(asks).map(longest).max()?;
        let longest = longest.min(base.config.max_position_embeddings);
        Some(Self { tokens: longest.saturating_mul(EngineOptions::default().max_num_seqs) })
    }
}

/// Whether any task of a job has data to evaluate on.
fn is_evaluated(job: &JobConfig) -> bool {
    job.tasks.iter().any(|task| task.valid.is_some() || task.test.is_some())
}

/// Memory of a run that trains `jobs`, all of them queued at its start.
pub fn training(
    base: &BaseShape,
    step: Step,
    jobs: &[JobShape],
    evaluation: Option<Evaluation>,
) -> Result<Estimate, EngineError> {
    let (config, sites) = (&base.config, &base.sites.table);
    let mut estimate = Estimate::default();
    base.add_to(&mut estimate, step.limit);

    let mut seated: Vec<&JobShape> = jobs.iter().collect();
    seated.sort_by_key(|job| std::cmp::Reverse(job.bytes(sites)));
    let waiting = seated.split_off(step.concurrent.min(seated.len()));
    for job in jobs.iter().filter(|job| seated.iter().any(|seated| std::ptr::eq(*seated, *job))) {
        let name = format!("`{}`: weights, gradients, moments", job.name);
        estimate.add("adapters", name, job.bytes(sites));
    }
    let begun: u64 = waiting.iter().map(|job| job.parameters(sites) * F32).sum();
    estimate.add("adapters", format!("weights of {} that wait", waiting.len()), begun);
    let saved = jobs.iter().map(|job| job.bytes_to_save(sites)).max().unwrap_or(0);
    estimate.add("adapters", "saving the largest", saved);

    let size = step.tape_size(config);
    let tape = size.bytes(config, step.recompute, size_of::<f32>()) as u64;
    let logits = (size.logit_rows * config.vocab_size) as u64 * F32;
    estimate.add("step", format!("activations of {} rows", step.rows), tape - logits);
    estimate.add("step", format!("logits of {} rows", size.logit_rows), logits);
    // Any row may be of the job that takes most.
    let widths: Vec<RankWidths> = jobs.iter().map(|job| job.rank_widths(base)).collect();
    let most = |width: fn(&RankWidths) -> usize| widths.iter().map(width).max().unwrap_or(0) as u64 * F32;
    let (rows, head_rows) = (step.rows as u64, size.logit_rows as u64);
    let ranks = rows * most(|widths| widths.v + widths.du) + head_rows * most(|widths| widths.head);
    estimate.add("step", "ranks of its rows", ranks);
    estimate.add("step", "dropout", rows * most(|widths| widths.dropped));
    estimate.add("step", "DoRA's products", rows * most(|widths| widths.scaled));
    if let Some(Evaluation { tokens }) = evaluation {
        // As it is read from the training, and B as the engine has it.
        let asked = |job: &JobShape| (job.parameters(sites) + job.laid_out(sites)) * F32;
        let asked = jobs.iter().map(asked).max().unwrap_or(0);
        estimate.add("evaluation", "the largest adapter", asked);
        add_engine(&mut estimate, "evaluation", base, &EngineOptions::default(), tokens)?;
    }
    Ok(estimate)
}
