//! Random traffic: batches of requests over a golden model's adapters, and engines with more or less room for them.

use std::sync::Arc;
use std::time::{Duration, Instant};

use loramux::backend::cpu::Cpu;
use loramux::backend::{Backend, BackendError, PAGE};
use loramux::engine::request::{Completion, FinishReason, Request, TokenLogprobs};
use loramux::engine::{Engine, EngineOptions};
use loramux::model::Base;
use proptest::prelude::*;

use super::Case;

/// Most tokens of a prompt and its continuation: as many as the smallest cache holds.
pub const CONTEXT: usize = 96;
const LONGEST_PROMPT: usize = 60;
const LONGEST_OUTPUT: usize = 24;

/// What an engine has to work with.
#[derive(Clone, Copy, Debug)]
pub struct Room {
    /// Sequences in a step.
    pub sequences: usize,
    /// Rows in a step.
    pub rows: usize,
    /// Pages of the cache.
    pub pages: usize,
}

/// A request, and how many steps the engine makes before it comes.
#[derive(Clone, Debug)]
pub struct Arrival {
    pub request: Request,
    pub after: u64,
}

pub type Batch = Vec<Arrival>;

/// A golden model with its adapters.
pub struct Traffic {
    pub case: Case,
    /// All adapters, by name.
    pub adapters: Vec<String>,
    base: Arc<Base>,
}

impl Traffic {
    pub fn open(family: &str) -> Self {
        let case = Case::open(family);
        let adapters = case.adapters().into_iter().filter(|name| name != "base").collect();
        let base = Arc::new(Base::open(&case.model()).unwrap());
        Self { case, adapters, base }
    }

    /// An engine with every adapter resident.
    pub fn engine(&self, room: Room) -> Engine {
        self.engine_on(room, || Cpu::new(Some(2)))
    }

    /// The same on a backend of the caller's making.
    pub fn engine_on<B: Backend>(
        &self,
        room: Room,
        open: impl FnOnce() -> Result<B, BackendError> + Send + 'static,
    ) -> Engine {
        let config = &self.base.config;
        let elements = config.num_layers * 2 * config.num_kv_heads * config.head_dim * PAGE;
        let options = EngineOptions {
            max_num_seqs: room.sequences,
            max_num_batched_tokens: room.rows,
            max_model_len: Some(CONTEXT),
            kv_cache_bytes: Some(room.pages * elements * B::CACHE_ELEMENT_BYTES),
            ..EngineOptions::default()
        };
        let engine = Engine::start_on(Arc::clone(&self.base), options, open).unwrap();
        for name in &self.adapters {
            engine.load_adapter(name, &self.case.adapter_folder(name)).unwrap();
        }
        engine
    }

    /// One to nine requests, near each other in time.
    pub fn batches(&self) -> impl Strategy<Value = Batch> + use<> {
        let arrival = (self.requests(), 0..4u64).prop_map(|(request, after)| Arrival { request, after });
        prop::collection::vec(arrival, 1..10)
    }

    fn requests(&self) -> impl Strategy<Value = Request> + use<> {
        let shape = (
            prop::collection::vec(2..self.base.config.vocab_size as u32, 1..=LONGEST_PROMPT),
            1..=LONGEST_OUTPUT,
            prop_oneof![4 => Just(1usize), 1 => Just(3)],
            any::<bool>(),
        );
        let reports = (prop::option::of(0..4usize), prop::option::of(0..3usize));
        (shape, self.mixtures(), sampling(), reports).prop_map(
            |((prompt, max_tokens, n, ignore_eos), adapters, sampling, (logprobs, prompt_logprobs))| {
                let mut request = Request::new(prompt);
                request.adapters = adapters;
                request.n = n;
                request.sampling = sampling;
                request.stop.max_tokens = Some(max_tokens);
                request.stop.ignore_eos = ignore_eos;
                request.logprobs = logprobs;
                request.prompt_logprobs = prompt_logprobs;
                request
            },
        )
    }

    /// The base, one adapter, or a weighted set of those that can be mixed.
    fn mixtures(&self) -> impl Strategy<Value = Vec<(String, f32)>> + use<> {
        let mixable: Vec<String> =
            self.adapters.iter().filter(|name| *name != "saved-head").cloned().collect();
        let one = prop::sample::select(self.adapters.clone()).prop_map(|name| vec![(name, 1.0)]);
        let weighted = prop::sample::subsequence(mixable.clone(), 1..=mixable.len().min(4))
            .prop_shuffle()
            .prop_flat_map(|names| {
                let weights = prop::collection::vec(-1f32..1.5, names.len());
                weights.prop_map(move |weights| names.iter().cloned().zip(weights).collect())
            });
        prop_oneof![1 => Just(vec![]), 3 => one, 2 => weighted]
    }
}

fn sampling() -> impl Strategy<Value = loramux::engine::request::SamplingParams> {
    let filters = (prop::option::of(1..40usize), 0.5f32..=1.0, 0f32..0.1);
    let penalties = (prop_oneof![Just(0f32), -1f32..1.0], prop_oneof![Just(1f32), 0.8f32..1.3]);
    (any::<u64>(), prop_oneof![Just(0f32), 0.3f32..1.5], filters, penalties).prop_map(
        |(seed, temperature, (top_k, top_p, min_p), (presence, repetition))| {
            loramux::engine::request::SamplingParams {
                temperature,
                top_k,
                top_p,
                min_p,
                presence_penalty: presence,
                repetition_penalty: repetition,
                // Without a seed of its own a request's draws depend on the order of arrival.
                seed: Some(seed),
                ..Default::default()
            }
        },
    )
}

/// Submits a batch as its requests arrive and waits for all answers.
pub fn run(engine: &Engine, batch: &Batch) -> Vec<Completion> {
    let mut streams = Vec::with_capacity(batch.len());
    for arrival in batch {
        let (from, asked) = (engine.stats().steps(), Instant::now());
        // An engine that has nothing left to do makes no steps.
        while engine.stats().steps() < from + arrival.after && asked.elapsed() < Duration::from_millis(1) {
            std::thread::yield_now();
        }
        streams.push(engine.submit(arrival.request.clone()).unwrap());
    }
    streams.into_iter().map(|stream| stream.wait().unwrap()).collect()
}

/// A completion with every float as its bits: `==` would take 0 for −0.
pub type Bits = (Option<Vec<Option<TokenBits>>>, Vec<ChoiceBits>);
pub type TokenBits = (u32, u32, usize, Vec<(u32, u32)>);
pub type ChoiceBits = (Vec<u32>, String, FinishReason, Option<Vec<TokenBits>>);

pub fn bits(completion: &Completion) -> Bits {
    let token = |entry: &TokenLogprobs| {
        let top = entry.top.iter().map(|&(token, logprob)| (token, logprob.to_bits())).collect();
        (entry.token, entry.logprob.to_bits(), entry.rank, top)
    };
    let prompt = completion.prompt_logprobs.as_ref();
    let prompt = prompt.map(|entries| entries.iter().map(|entry| entry.as_ref().map(token)).collect());
    let choices = completion.choices.iter().map(|choice| {
        let logprobs = choice.logprobs.as_ref().map(|entries| entries.iter().map(token).collect());
        (choice.token_ids.clone(), choice.text.clone(), choice.finish_reason.clone(), logprobs)
    });
    (prompt, choices.collect())
}
