//! Promise 7: steady-state decoding allocates nothing. This binary counts every allocation of every thread.

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::backtrace::Backtrace;
use std::cell::Cell;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use common::Case;
use loramux::adapter::peft::{Limits, read_adapter};
use loramux::backend::cpu::Cpu;
use loramux::backend::sampling::{Draw, Drawn, Sampler, SamplingParams, TokenSource};
use loramux::backend::{Backend, BackendError, PAGE, Rows};
use loramux::model::{Base, Transformer, Workspace, WorkspaceSize};

/// The system's allocator, with a count that can be switched on.
struct Counting;

static ON: AtomicBool = AtomicBool::new(false);
static COUNT: AtomicUsize = AtomicUsize::new(0);
/// Where the first counted allocation came from.
static FIRST: Mutex<Option<Backtrace>> = Mutex::new(None);

thread_local! {
    /// Whether this thread is counting already: taking the backtrace allocates, too.
    static INSIDE: Cell<bool> = const { Cell::new(false) };
}

fn count() {
    if ON.load(Ordering::Relaxed) && !INSIDE.replace(true) {
        COUNT.fetch_add(1, Ordering::Relaxed);
        FIRST.lock().unwrap().get_or_insert_with(Backtrace::force_capture);
        INSIDE.set(false);
    }
}

// SAFETY: every call is passed on to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: as above.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: as above.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count();
        // SAFETY: as above.
        unsafe { System.realloc(pointer, layout, size) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Tokens of every sequence at the end.
const LENGTH: usize = 64;
/// Sequences of a step, at most.
const MOST_SEQUENCES: usize = 12;
/// Decodings from an empty cache that may pass until nothing is left to grow. Scratch memory belongs to a thread and
/// grows to the longest sequence that the thread has met, so a busy machine can need more than one.
const WARM_UP: usize = 5;

/// A model that decodes one token of every sequence per step, in lists that are filled anew for each.
struct Decoder {
    transformer: Transformer<Cpu>,
    workspace: Workspace<Cpu>,
    rows: Rows,
    picked: Vec<u32>,
    /// Gates of each sequence.
    mixtures: Vec<Vec<(u32, f32)>>,
    pages: Vec<Vec<u32>>,
    tokens: Vec<u32>,
    /// One of each sequence, greedy and random ones.
    samplers: Vec<Sampler>,
    drawn: Vec<Drawn>,
}

impl Decoder {
    /// Sequences through the base, through each adapter, and through mixtures of all.
    fn new(backend: &mut Cpu, model: &Path, adapters: &[PathBuf]) -> Self {
        let base = Base::open(model).unwrap();
        let mut transformer = Transformer::new(backend, &base.config, &base.checkpoint, LENGTH).unwrap();
        for (slot, folder) in adapters.iter().enumerate() {
            let sites = &base.checkpoint.sites().table;
            let adapter = read_adapter(folder, sites, &base.checkpoint, Limits { max_rank: 64 }).unwrap();
            transformer.load_adapter(backend, slot, &adapter, &base.checkpoint).unwrap();
        }
        let slots = adapters.len() as u32;
        let mut mixtures = vec![vec![], (0..slots).map(|slot| (slot, 0.25)).collect()];
        mixtures.extend((0..slots).flat_map(|slot| [vec![(slot, 1.0)], vec![(slot, 0.5)]]));
        mixtures.sort_by_key(|entries| entries.iter().map(|&(slot, _)| slot).collect::<Vec<_>>());
        let count = mixtures.len();
        let pages_each = LENGTH.div_ceil(PAGE);
        let pages = (0..count * pages_each).map(|page| page as u32).collect::<Vec<_>>();
        let size = WorkspaceSize { rows: count, sequences: count, logit_rows: count };
        let room = |_| Ok::<_, BackendError>(pages.len());
        Self {
            workspace: transformer.workspace(backend, size, room).unwrap(),
            transformer,
            rows: Rows::default(),
            picked: (0..count as u32).collect(),
            mixtures,
            pages: pages.chunks(pages_each).map(<[u32]>::to_vec).collect(),
            tokens: (0..count).map(|index| 3 + index as u32).collect(),
            samplers: Vec::new(),
            drawn: Vec::with_capacity(count),
        }
    }

    /// New samplers, as for new requests, past the first token of each.
    fn restart(&mut self) {
        let greedy = SamplingParams { temperature: 0.0, ..SamplingParams::default() };
        let filtered = SamplingParams {
            top_k: Some(40),
            top_p: 0.9,
            min_p: 0.01,
            repetition_penalty: 1.1,
            frequency_penalty: 0.1,
            logit_bias: vec![(5, 1.0)],
            ..SamplingParams::default()
        };
        let params = [greedy, SamplingParams::default(), filtered];
        self.samplers = (0..self.tokens.len())
            .map(|index| Sampler::new(&params[index % params.len()], &[3, 4, 5], index as u64, 0, LENGTH + 1))
            .collect();
        for sampler in &mut self.samplers {
            sampler.record(3);
        }
    }

    /// Computes the token at `position` of every sequence and draws the next one.
    fn step(&mut self, backend: &mut Cpu, position: usize) {
        self.rows.clear();
        for (index, entries) in self.mixtures.iter().enumerate() {
            let pages = &self.pages[index][..position / PAGE + 1];
            self.rows.push_sequence(&self.tokens[index..=index], position, 0, pages, entries);
        }
        backend.begin_step(&self.rows).unwrap();
        self.transformer.forward(backend, &self.rows, &mut self.workspace).unwrap();
        self.transformer.logits(backend, &self.rows, &self.picked, &mut self.workspace).unwrap();
        let samplers = &self.samplers;
        let draws: [Draw<'_>; MOST_SEQUENCES] = std::array::from_fn(|row| {
            let sampler = &samplers[row % samplers.len()];
            Draw { row, token: TokenSource::Sampler { sampler, position, banned: &[2] }, logprobs: Some(0) }
        });
        backend.sample(self.workspace.logits(), &draws[..samplers.len()], &mut self.drawn).unwrap();
        for (index, drawn) in self.drawn.iter().enumerate() {
            self.tokens[index] = drawn.token.clone().unwrap();
            self.samplers[index].record(self.tokens[index]);
        }
    }
}

/// Allocations of decoding from an empty cache to [`LENGTH`] tokens.
fn allocations(backend: &mut Cpu, decoder: &mut Decoder) -> usize {
    decoder.restart();
    backend.scope(|backend| {
        COUNT.store(0, Ordering::SeqCst);
        ON.store(true, Ordering::SeqCst);
        (0..LENGTH).for_each(|position| decoder.step(backend, position));
        ON.store(false, Ordering::SeqCst);
    });
    COUNT.load(Ordering::SeqCst)
}

#[test]
fn promise_7_steady_state_decoding_allocates_nothing() {
    // The count must count, or nothing below means anything.
    ON.store(true, Ordering::SeqCst);
    drop(std::hint::black_box(vec![1u8; 100]));
    ON.store(false, Ordering::SeqCst);
    assert!(COUNT.load(Ordering::SeqCst) > 0, "the counting allocator is not in use");

    let case = Case::open("llama");
    let golden: Vec<PathBuf> = ["all-r8", "dora-r8", "rslora-r16", "odd-r3-mlp", "head"]
        .map(|name| case.adapter_folder(name))
        .to_vec();
    // Wide enough that a step's loops run on all threads.
    let examples = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples");
    let trained: Vec<PathBuf> = ["general", "filing-qa", "ticket-routing", "tweet-sentiment"]
        .map(|name| examples.join("adapters").join(name))
        .to_vec();
    for threads in [1, 2] {
        for (model, adapters) in [(case.model(), &golden), (examples.join("base"), &trained)] {
            let mut backend = Cpu::new(Some(threads)).unwrap();
            let mut decoder = Decoder::new(&mut backend, &model, adapters);
            // What a step allocates every time is there in every decoding.
            let mut counts = Vec::new();
            while counts.len() < WARM_UP && counts.last() != Some(&0) {
                *FIRST.lock().unwrap() = None;
                counts.push(allocations(&mut backend, &mut decoder));
            }
            let (model, origin) = (model.display(), FIRST.lock().unwrap());
            assert_eq!(counts.last(), Some(&0), "{model}, {threads} threads, {counts:?}; first: {origin:#?}");
        }
    }
}
