//! Steps of a model on the CUDA backend: recorded launches under changing mixes of adapters, and what they cost.
//!
//! Runs on the emulator, or with `LORAMUX_TEST_DEVICE=cuda` on a GPU.
#![cfg(feature = "cuda")]

mod common;
#[path = "common/cuda_device.rs"]
mod cuda_device;
#[path = "common/element.rs"]
mod element;
#[path = "common/random.rs"]
mod random;

use common::Case;
use common::forward::{LONGEST, bring, load, logits};
use cuda_device::{device, on_gpu};
use loramux::adapter::peft::{Limits, read_adapter};
use loramux::backend::cuda::{Cuda, Element, MemoryOptions};
use loramux::backend::sampling::{Draw, Drawn, Sampler, SamplingParams, TokenSource};
use loramux::backend::{Backend, BackendError, PAGE, Rows};
use loramux::model::{Base, Transformer, Workspace, WorkspaceSize};
use random::Random;

const MEMORY: MemoryOptions = MemoryOptions { utilization: 0.9, seats: 12, max_rank: 32, chunks: 24 };

/// Sequences that may be in a step.
const SEQUENCES: usize = 20;

type Mixture = Vec<(u32, f32)>;

/// Sequences that are decoded through a golden model, each with its own mixture.
struct Decoder {
    transformer: Transformer<Cuda>,
    workspace: Workspace<Cuda>,
    rows: Rows,
    sequences: Vec<Decoded>,
}

struct Decoded {
    tokens: Vec<u32>,
    mixture: Mixture,
    pages: Vec<u32>,
}

impl Decoder {
    fn new(backend: &mut Cuda, case: &Case, mixtures: Vec<Mixture>) -> Self {
        let transformer = load(case, backend);
        let size = WorkspaceSize { rows: 64, sequences: SEQUENCES, logit_rows: 64 };
        let pages_each = LONGEST / PAGE;
        let pages = mixtures.len() * pages_each;
        let workspace = transformer.workspace(backend, size, |_| Ok::<_, BackendError>(pages)).unwrap();
        let sequence = |(index, mixture)| Decoded {
            tokens: vec![3 + index as u32],
            mixture,
            pages: (index * pages_each..(index + 1) * pages_each).map(|page| page as u32).collect(),
        };
        let sequences = mixtures.into_iter().enumerate().map(sequence).collect();
        Self { transformer, workspace, rows: Rows::default(), sequences }
    }

    /// Computes the newest token of some sequences, in a step of one row each; their logits are in the workspace.
    fn step(&mut self, backend: &mut Cuda, chosen: &[usize]) {
        self.rows.clear();
        for &index in chosen {
            let Decoded { tokens, mixture, pages } = &self.sequences[index];
            let start = tokens.len() - 1;
            self.rows.push_sequence(&tokens[start..], start, 0, &pages[..=start / PAGE], mixture);
        }
        let picked: [u32; SEQUENCES] = std::array::from_fn(|row| row as u32);
        backend.begin_step(&self.rows).unwrap();
        self.transformer.forward(backend, &self.rows, &mut self.workspace).unwrap();
        self.transformer.logits(backend, &self.rows, &picked[..chosen.len()], &mut self.workspace).unwrap();
    }
}

/// Mixtures of the adapters that can be mixed, in the slots of [`load`].
fn mixtures(case: &Case, count: usize, random: &mut Random) -> Vec<Mixture> {
    let names = case.adapters();
    let usable: Vec<u32> =
        (1..names.len() as u32).filter(|&slot| names[slot as usize] != "saved-head").collect();
    (0..count)
        .map(|index| {
            let mut slots = usable.clone();
            let experts = [0, 1, 1, 3][index % 4];
            let mut mixture = Mixture::new();
            for _ in 0..experts {
                let slot = slots.swap_remove(random.below(slots.len()));
                mixture.push((slot, if experts == 1 { 1.0 } else { 0.25 + random.below(4) as f32 / 4.0 }));
            }
            mixture.sort_unstable_by_key(|entry| entry.0);
            mixture
        })
        .collect()
}

/// Every logit of steps with any sequences is that of the whole prompt in one step, to the bit: the launches of the first
/// are recorded and serve other rows and adapters each time, those of the second are not.
#[test]
fn recorded_steps_of_any_mix_give_the_bits_of_whole_prompts() {
    for name in ["llama", "phi3"] {
        let case = Case::open(name);
        let mut random = Random(7);
        let mut backend = Cuda::on(&device(), MEMORY, Element::Bf16).unwrap();
        let mixtures = mixtures(&case, SEQUENCES, &mut random);
        let mut decoder = Decoder::new(&mut backend, &case, mixtures);
        let vocabulary = decoder.transformer.config().vocab_size;
        let mut seen: Vec<Vec<Vec<f32>>> = vec![Vec::new(); SEQUENCES];
        for step in 0..12 {
            // Different numbers of rows, so that several graphs take turns.
            let count = [1, 3, 7, SEQUENCES, 5, 12][step % 6];
            let mut all: Vec<usize> = (0..SEQUENCES).collect();
            let mut chosen: Vec<usize> =
                (0..count).map(|_| all.swap_remove(random.below(all.len()))).collect();
            let experts =
                |index: &usize| decoder.sequences[*index].mixture.iter().map(|e| e.0).collect::<Vec<_>>();
            chosen.sort_by_key(experts);
            let mixtures: Vec<Mixture> =
                chosen.iter().map(|&i| decoder.sequences[i].mixture.clone()).collect();
            bring(&mut backend, &mixtures.iter().map(|m| (m.as_slice(), &[][..])).collect::<Vec<_>>());
            decoder.step(&mut backend, &chosen);
            let logits = backend.read(decoder.workspace.logits(), count).unwrap();
            for (&index, logits) in chosen.iter().zip(logits.chunks_exact(vocabulary)) {
                seen[index].push(logits.to_vec());
                decoder.sequences[index].tokens.push(random.below(vocabulary) as u32);
            }
        }
        for (Decoded { tokens, mixture, .. }, seen) in decoder.sequences.iter().zip(&seen) {
            if seen.is_empty() {
                continue;
            }
            let prompt = &tokens[..seen.len()];
            let whole = logits(&mut backend, &decoder.transformer, &[(mixture, prompt)]).remove(0);
            for (position, (got, wanted)) in seen.iter().zip(whole.chunks_exact(vocabulary)).enumerate() {
                let same = got.iter().zip(wanted).all(|(a, b)| a.to_bits() == b.to_bits());
                assert!(same, "{name}, {mixture:?}, position {position}");
            }
        }
    }
}

/// The lists of a step are not taken for those of the next when a slot has another adapter by then, even one that moves
/// nothing to the device; and an expert that has not been brought is an error, not the base.
#[test]
fn a_slot_with_another_adapter_has_lists_of_its_own() {
    let case = Case::open("llama");
    let slot = case.adapters().iter().position(|name| name == "all-r8").unwrap();
    let base = Base::open(&case.model()).unwrap();
    let sites = &base.checkpoint.sites().table;
    let folder = case.adapter_folder("saved-head");
    let mut head = read_adapter(&folder, sites, &base.checkpoint, Limits { max_rank: 32 }).unwrap();
    head.sites.clear();
    head.saved_biases.clear();
    let mixture: Mixture = vec![(slot as u32, 1.0)];

    let mut backend = Cuda::on(&device(), MEMORY, Element::Bf16).unwrap();
    let mut decoder = Decoder::new(&mut backend, &case, vec![mixture.clone(); 4]);
    decoder.rows.push_sequence(&[3], 0, 0, &[0], &mixture);
    let refused = backend.begin_step(&decoder.rows).unwrap_err().to_string();
    assert!(refused.contains("has not been brought"), "{refused}");

    let step = |backend: &mut Cuda, decoder: &mut Decoder| {
        bring(backend, &[(&mixture, &[])]);
        decoder.step(backend, &[0, 1, 2, 3]);
        backend.read(decoder.workspace.logits(), 4).unwrap().to_vec()
    };
    let before = step(&mut backend, &mut decoder);
    decoder.transformer.unload_adapter(&mut backend, slot).unwrap();
    decoder.transformer.load_adapter(&mut backend, slot, &head, &base.checkpoint).unwrap();
    let after = step(&mut backend, &mut decoder);

    let mut backend = Cuda::on(&device(), MEMORY, Element::Bf16).unwrap();
    let mut fresh = Decoder::new(&mut backend, &case, vec![mixture.clone(); 4]);
    fresh.transformer.unload_adapter(&mut backend, slot).unwrap();
    fresh.transformer.load_adapter(&mut backend, slot, &head, &base.checkpoint).unwrap();
    let wanted = step(&mut backend, &mut fresh);
    assert_eq!(after, wanted);
    assert_ne!(after, before);
}

/// Promise 7 on this backend: a step of decoding allocates no memory and waits once, for the sampled tokens.
#[test]
fn promise_7_steady_state_decoding_waits_for_the_sampled_tokens_alone() {
    if on_gpu() {
        // The emulator is who counts.
        return;
    }
    let case = Case::open("llama");
    let mut random = Random(3);
    let mut backend = Cuda::on(&device(), MEMORY, Element::Bf16).unwrap();
    let mixtures = mixtures(&case, 8, &mut random);
    let mut decoder = Decoder::new(&mut backend, &case, mixtures.clone());
    let mut chosen: Vec<usize> = (0..8).collect();
    chosen.sort_by_key(|&index| mixtures[index].iter().map(|entry| entry.0).collect::<Vec<_>>());
    bring(&mut backend, &mixtures.iter().map(|m| (m.as_slice(), &[][..])).collect::<Vec<_>>());
    let mut samplers: Vec<Sampler> = (0..8)
        .map(|seed| {
            let params = SamplingParams { top_p: 0.9, presence_penalty: 0.1, ..SamplingParams::default() };
            Sampler::new(&params, &[3], seed, 0, LONGEST)
        })
        .collect();
    let mut drawn: Vec<Drawn> = Vec::new();
    let mut costs = Vec::new();
    for position in 0..20 {
        // What has been copied before is not waited for, and tokens are, however long they take.
        let before = counts();
        decoder.step(&mut backend, &chosen);
        let draws: [Draw<'_>; 8] = std::array::from_fn(|row| {
            let token = TokenSource::Sampler { sampler: &samplers[row], position, banned: &[2] };
            Draw { row, token, logprobs: None }
        });
        let queued = counts();
        loramux_emulator::hold_events(true);
        backend.sample(decoder.workspace.logits(), &draws, &mut drawn).unwrap();
        loramux_emulator::hold_events(false);
        let after = counts();
        let [allocations, waits, launches] = std::array::from_fn(|i| after[i] - before[i]);
        costs.push([allocations, queued[1] - before[1], waits, launches]);
        for (row, drawn) in drawn.iter().enumerate() {
            let token = *drawn.token.as_ref().unwrap();
            samplers[row].record(token);
            decoder.sequences[chosen[row]].tokens.push(token);
        }
    }
    // Embedding, eight launches for each of three blocks, rows, norm, lm_head and sampling: the lists stay as they are.
    assert_eq!(costs[1..], [[0, 0, 1, 1 + 8 * 3 + 4]; 19]);
}

/// Allocations, waits and launches so far.
fn counts() -> [u64; 3] {
    use loramux_emulator::{allocations_of_thread, launches, synchronizations_of_thread};
    [allocations_of_thread(), synchronizations_of_thread(), launches()]
}
