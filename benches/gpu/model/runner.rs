//! A random model on a GPU, and its steps timed.
//!
//! All tensors are windows into one block of random numbers, so that the host needs memory for the largest matrix only;
//! on the device each has its own. The cache holds keys and values of random tokens.

use std::sync::Arc;
use std::time::Instant;

use loramux::adapter::{Adapter, SiteAdapter};
use loramux::backend::cuda::{Cuda, Device, Element, MemoryOptions, TracedLaunch};
use loramux::backend::{Backend, BackendError, PAGE};
use loramux::model::{ModelError, ModelSites, Weights, WorkspaceSize};
use loramux::tensor::{Bytes, DType, Tensor};

use super::super::cases::Set;
use super::super::device::median;
use super::cases::{Adapters, Case, LOADED, MOST_ADAPTERS, Model, Step};
use super::prediction::{Class, Share, add_share};
use crate::{Bench, Plan, random_bf16};

/// Places in the random numbers where windows begin, beyond the largest matrix.
const PLACES: usize = 8 << 20;

/// Random frozen tensors and adapters of a model.
pub struct SharedWeights {
    sites: ModelSites,
    /// `[largest matrix + PLACES]`
    numbers: Tensor,
}

impl SharedWeights {
    pub fn new(model: &Model) -> Self {
        // Rows of unit variance stay so: uniform numbers in (-s, s) have the variance s² / 3.
        let scale = 1.7 / (model.config.hidden_size as f32).sqrt();
        let numbers = random_bf16([1, model.largest_matrix() + PLACES], scale, 1);
        Self { sites: model.sites().clone(), numbers }
    }

    /// A matrix that begins at a place of its own.
    fn window(&self, shape: [usize; 2], seed: usize) -> Tensor {
        let first = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 20;
        let bytes = first % PLACES * 2..(first % PLACES + shape[0] * shape[1]) * 2;
        Tensor::new(DType::BF16, shape.to_vec(), self.numbers.bytes().slice(bytes))
    }

    /// An adapter over all linear layers of the blocks.
    fn adapter(&self, rank: usize, seed: usize) -> Adapter {
        let adapted = self.sites.table.iter().filter(|(_, site)| site.block.is_some());
        let count = self.sites.table.len();
        let sites = adapted
            .map(|(id, site)| SiteAdapter {
                site: id,
                rank,
                scale: 2.0,
                a: self.window([rank, site.in_features], (2 * seed + 2) * count + id),
                b: self.window([site.out_features, rank], (2 * seed + 3) * count + id),
                bias: None,
                magnitude: None,
            })
            .collect();
        Adapter { hash: format!("random-{seed}"), sites, ..Adapter::default() }
    }
}

impl Weights for SharedWeights {
    fn sites(&self) -> &ModelSites {
        &self.sites
    }

    fn site_weight(&self, site: usize) -> Result<Tensor, ModelError> {
        let of = self.sites.table.get(site);
        let shape = match site == self.sites.embed_tokens {
            true => [of.in_features, of.out_features],
            false => [of.out_features, of.in_features],
        };
        Ok(self.window(shape, site))
    }

    fn site_bias(&self, _site: usize) -> Result<Option<Tensor>, ModelError> {
        Ok(None)
    }

    fn norm(&self, _name: &str, width: usize) -> Result<Tensor, ModelError> {
        Ok(Tensor::new(DType::BF16, vec![width], Bytes::new(half::bf16::ONE.to_le_bytes().repeat(width))))
    }
}

/// Seconds of a step.
#[derive(Clone, Debug)]
pub struct Times {
    /// One after the other, as fast as they can be queued: the host waits at the end only. Each is the mean of many.
    pub queued: Vec<f64>,
    /// Until the logits are there, each waited for.
    pub alone: Vec<f64>,
    /// One step launch by launch, without graphs and overlap: seconds by class.
    pub shares: Vec<Share>,
}

impl Times {
    /// The medians of both.
    pub fn medians(&self) -> [f64; 2] {
        [&self.queued, &self.alone].map(|seconds| median(&mut seconds.clone()))
    }
}

/// What came of a case.
#[derive(Clone, Debug)]
pub enum Outcome {
    Timed(Times),
    /// There is not enough memory for it.
    LeftOut(String),
    Failed(String),
}

impl Outcome {
    pub fn times(&self) -> Option<&Times> {
        if let Self::Timed(times) = self { Some(times) } else { None }
    }
}

/// How often a step is run.
struct Repetitions {
    rounds: usize,
    steps: usize,
}

impl Repetitions {
    fn of(set: Set, step: Step) -> Self {
        match (set, step) {
            (Set::Tiny, _) => Self { rounds: 2, steps: 2 },
            (_, Step::Decode { .. }) => Self { rounds: 9, steps: 16 },
            (_, Step::Prefill { .. }) => Self { rounds: 5, steps: 2 },
        }
    }
}

/// A model on a device.
pub struct Runner {
    set: Set,
    backend: Cuda,
    bench: Bench<Cuda>,
    pages: usize,
}

impl Runner {
    /// A model for `cases`, with memory for adapters where the first of them has it: all or none do.
    ///
    /// # Errors
    /// When the device has no room.
    pub fn new(
        set: Set,
        device: &Arc<Device>,
        model: &Model,
        weights: &SharedWeights,
        cases: &[Case],
    ) -> Result<Self, ModelError> {
        let lora = cases.first().is_some_and(|case| case.adapters != Adapters::Absent);
        let memory = MemoryOptions {
            utilization: 0.95,
            seats: if lora { MOST_ADAPTERS } else { 0 },
            max_rank: LOADED.iter().filter(|_| lora).map(|(rank, _)| *rank).max().unwrap_or(0),
            chunks: if lora { MOST_ADAPTERS } else { 0 },
        };
        let mut backend = Cuda::on(device, memory, Element::Bf16).map_err(BackendError::from)?;
        let most = |of: fn(&Case) -> usize| cases.iter().map(of).max().unwrap_or(0);
        let sequences = most(|case| case.step.sequences());
        let size = WorkspaceSize { rows: most(|case| case.step.rows()), sequences, logit_rows: sequences };
        let page_bytes = model.cache_bytes() * PAGE;
        let mut pages = 0;
        let positions = most(|case| case.step.context());
        let bench = Bench::new(&mut backend, &model.config, weights, size, positions, |room| {
            // As many as the largest case that fits.
            let fits = |pages: &usize| room.is_none_or(|room| pages * page_bytes <= room);
            pages = cases.iter().map(pages_of).filter(fits).max().unwrap_or(0);
            pages
        })?;
        let mut runner = Self { set, backend, bench, pages };
        if lora {
            runner.load_adapters(weights)?;
        }
        runner.fill_cache(size, positions)?;
        Ok(runner)
    }

    /// Adapters of each rank in slots one after the other.
    fn load_adapters(&mut self, weights: &SharedWeights) -> Result<(), ModelError> {
        let ranks = LOADED.iter().flat_map(|&(rank, count)| std::iter::repeat_n(rank, count));
        for (slot, rank) in ranks.enumerate() {
            let adapter = weights.adapter(rank, slot);
            self.bench.transformer.load_adapter(&mut self.backend, slot, &adapter, weights)?;
        }
        Ok(())
    }

    /// Runs prompts through all pages of the cache, in steps as large as they may be.
    fn fill_cache(&mut self, size: WorkspaceSize, positions: usize) -> Result<(), BackendError> {
        let pages_each = (positions.min(size.rows) / PAGE).clamp(1, self.pages);
        let most = (size.rows / (pages_each * PAGE)).clamp(1, size.sequences);
        let mut first_page = 0;
        while first_page < self.pages {
            let left = self.pages - first_page;
            let (sequences, pages_each) = ((left / pages_each).clamp(1, most), pages_each.min(left));
            let tokens = pages_each * PAGE;
            self.bench.plan(Plan { sequences, tokens, first_page, ..Plan::default() });
            self.bench.queue(&mut self.backend)?;
            first_page += sequences * pages_each;
        }
        Ok(self.backend.synchronize()?)
    }

    /// Runs a case's step and times it.
    ///
    /// # Errors
    /// When a step fails. Logits that are zero or not finite are an [`Outcome::Failed`].
    pub fn time(&mut self, case: &Case) -> Result<Outcome, BackendError> {
        if pages_of(case) > self.pages {
            let (wanted, pages) = (pages_of(case), self.pages);
            return Ok(Outcome::LeftOut(format!("{wanted} pages, with room for {pages}")));
        }
        self.plan(case)?;
        // The first captures a graph where there is one.
        for _ in 0..2 {
            self.bench.queue(&mut self.backend)?;
        }
        let logits = self.bench.logits(&mut self.backend)?;
        let wrong = logits.iter().filter(|logit| !logit.is_finite() || **logit == 0.0).count();
        if wrong > logits.len() / 100 {
            let count = logits.len();
            return Ok(Outcome::Failed(format!("{wrong} of {count} logits are zero or not finite")));
        }
        self.measure(Repetitions::of(self.set, case.step)).map(Outcome::Timed)
    }

    fn plan(&mut self, case: &Case) -> Result<(), BackendError> {
        let (count, rank) = (case.adapters.count(), case.adapters.rank());
        let of_other_ranks = LOADED.iter().take_while(|(loaded, _)| *loaded != rank);
        let first_slot = if count > 0 { of_other_ranks.map(|(_, count)| *count).sum() } else { 0 };
        let wanted: Vec<u32> = (first_slot..first_slot + count).map(|slot| slot as u32).collect();
        while !self.backend.bring_experts(&wanted, &[])? {
            std::thread::yield_now();
        }
        self.bench.plan(Plan {
            sequences: case.step.sequences(),
            tokens: case.step.tokens(),
            start: case.step.context() - case.step.tokens(),
            adapters: count,
            first_slot,
            ..Plan::default()
        });
        Ok(())
    }

    fn measure(&mut self, Repetitions { rounds, steps }: Repetitions) -> Result<Times, BackendError> {
        let mut times = Times { queued: Vec::new(), alone: Vec::new(), shares: Vec::new() };
        for _ in 0..rounds {
            let started = Instant::now();
            for _ in 0..steps {
                self.bench.queue(&mut self.backend)?;
            }
            self.backend.synchronize()?;
            times.queued.push(started.elapsed().as_secs_f64() / steps as f64);
            let started = Instant::now();
            self.bench.queue(&mut self.backend)?;
            self.backend.synchronize()?;
            times.alone.push(started.elapsed().as_secs_f64());
        }
        let Self { backend, bench, .. } = self;
        let ((), launches) = backend.trace(|backend| bench.queue(backend))?;
        times.shares = by_class(&launches);
        Ok(times)
    }
}

/// Launches of a step by what they do. Copies count as the launch behind them.
fn by_class(launches: &[TracedLaunch]) -> Vec<Share> {
    let (mut shares, mut lists) = (Vec::new(), 0);
    for TracedLaunch { kernel, seconds } in launches {
        // Chunk lists are built at the start, and again for the rows that give logits.
        lists += usize::from(&**kernel == "chunk_lists");
        let class = match &**kernel {
            _ if lists > 1 => Class::Head,
            "chunk_lists" | "embed" => Class::Begin,
            "rms_norm" => Class::Norm,
            "rope_store" => Class::Rope,
            "swiglu" => Class::SwiGlu,
            name if name.starts_with("attention") => Class::Attention,
            name if name.starts_with("shrink") => Class::Shrink,
            _ => Class::Product,
        };
        add_share(&mut shares, class, 1, *seconds);
    }
    shares
}

/// Pages of the cache that a step needs.
fn pages_of(case: &Case) -> usize {
    case.step.sequences() * case.step.context().div_ceil(PAGE)
}
