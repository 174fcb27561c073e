//! Fixed-weight mixtures: the sum of weighted adapters is one adapter of all their ranks.
//!
//! `Σ_e g_e · s_e · B_e A_e = [g_1 s_1 B_1 | g_2 s_2 B_2 | …] [A_1; A_2; …]`, so a mixture must give the logits of the
//! adapter on the right, which is written as a PEFT folder, read back and run alone.

mod common;

use std::collections::BTreeMap;

use common::Case;
use common::traffic::{self, Room, Traffic};
use loramux::adapter::peft::{Limits, WriteOptions, read_adapter, write_adapter};
use loramux::adapter::{Adapter, SiteAdapter};
use loramux::backend::cpu::Cpu;
use loramux::backend::{Backend, PAGE, Rows};
use loramux::engine::request::Request;
use loramux::model::{Base, Transformer};
use loramux::tensor::Tensor;
use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};

const TOLERANCE: f32 = 1e-4;
const LIMITS: Limits = Limits { max_rank: 256 };
const LONGEST: usize = 32;

/// Adapters with plain low-rank pairs only, which a sum of products can express.
const PLAIN: [&str; 7] = ["all-r8", "head", "last-layer", "odd-r3-mlp", "pattern", "rslora-r16", "small-qv"];
/// The slot of the adapter made by concatenation.
const SUM: usize = PLAIN.len();

struct Model {
    base: Base,
    backend: Cpu,
    transformer: Transformer<Cpu>,
    adapters: Vec<Adapter>,
}

impl Model {
    /// A golden model with the plain adapters in slots 0, 1, …
    fn open(family: &str) -> Self {
        let case = Case::open(family);
        let base = Base::open(&case.model()).unwrap();
        let backend = Cpu::new(Some(2)).unwrap();
        let mut transformer = Transformer::new(&backend, &base.config, &base.checkpoint, LONGEST).unwrap();
        let sites = &base.checkpoint.sites().table;
        let read = |name| read_adapter(&case.adapter_folder(name), sites, &base.checkpoint, LIMITS).unwrap();
        let adapters: Vec<Adapter> = PLAIN.into_iter().map(read).collect();
        for (slot, adapter) in adapters.iter().enumerate() {
            transformer.load_adapter(&backend, slot, adapter, &base.checkpoint).unwrap();
        }
        Self { base, backend, transformer, adapters }
    }

    /// Logits `[tokens, vocabulary]` of a prompt whose rows all have these gates.
    fn logits(&mut self, prompt: &[u32], entries: &[(u32, f32)]) -> Vec<f32> {
        let pages: Vec<u32> = (0..LONGEST.div_ceil(PAGE) as u32).collect();
        let mut rows = Rows::default();
        rows.push_sequence(prompt, 0, 0, &pages, entries);
        let Self { backend, transformer, .. } = self;
        let mut cache = transformer.kv_cache(backend, pages.len()).unwrap();
        let mut activations = transformer.activations(backend, prompt.len(), prompt.len()).unwrap();
        let picked: Vec<u32> = (0..prompt.len() as u32).collect();
        backend.scope(|backend| {
            transformer.forward(backend, &rows, &mut cache, &mut activations);
            let logits = transformer.logits(backend, &rows, &picked, &mut activations);
            backend.read(logits, picked.len()).to_vec()
        })
    }

    /// Puts the concatenation of weighted adapters into its slot, through a PEFT folder.
    fn load_sum(&mut self, entries: &[(u32, f32)]) {
        let mut sites = BTreeMap::<usize, Vec<(&SiteAdapter, f32)>>::new();
        for &(slot, gate) in entries {
            for site in &self.adapters[slot as usize].sites {
                sites.entry(site.site).or_default().push((site, gate));
            }
        }
        let sites = sites.into_values().map(|parts| concatenate(&parts)).collect();
        // `all-r8` has nothing but sites.
        let sum = Adapter { sites, ..self.adapters[0].clone() };
        let (table, weights) = (&self.base.checkpoint.sites().table, &self.base.checkpoint);
        let folder = tempfile::tempdir().unwrap();
        write_adapter(&folder.path().join("sum"), &sum, table, WriteOptions::default()).unwrap();
        let sum = read_adapter(&folder.path().join("sum"), table, weights, LIMITS).unwrap();
        self.transformer.unload_adapter(&self.backend, SUM);
        self.transformer.load_adapter(&self.backend, SUM, &sum, weights).unwrap();
    }
}

/// `A = [A_1; A_2; …]`, `B = [g_1 s_1 B_1 | g_2 s_2 B_2 | …]`, scale 1.
fn concatenate(parts: &[(&SiteAdapter, f32)]) -> SiteAdapter {
    let rank = parts.iter().map(|(part, _)| part.rank).sum();
    let (input, output) = (parts[0].0.a.shape()[1], parts[0].0.b.shape()[0]);
    let a: Vec<f32> = parts.iter().flat_map(|(part, _)| part.a.to_f32()).collect();
    let mut b = vec![0f32; output * rank];
    let mut first = 0;
    for (part, gate) in parts {
        for (row, values) in part.b.to_f32().chunks_exact(part.rank).enumerate() {
            for (column, value) in values.iter().enumerate() {
                b[row * rank + first + column] = gate * part.scale * value;
            }
        }
        first += part.rank;
    }
    SiteAdapter {
        site: parts[0].0.site,
        rank,
        scale: 1.0,
        a: Tensor::from_f32(vec![rank, input], &a),
        b: Tensor::from_f32(vec![output, rank], &b),
        bias: None,
        magnitude: None,
    }
}

fn sum_is_one_adapter(family: &str) {
    let model = std::cell::RefCell::new(Model::open(family));
    let config = Config { cases: 40, failure_persistence: None, ..Config::default() };
    let mut runner = TestRunner::new_with_rng(config, TestRng::deterministic_rng(RngAlgorithm::ChaCha));
    let slots = prop::sample::subsequence((0..PLAIN.len() as u32).collect::<Vec<_>>(), 1..=4);
    let entries = slots.prop_flat_map(|slots| {
        let gates = prop::collection::vec(-1f32..1.5, slots.len());
        gates.prop_map(move |gates| slots.iter().copied().zip(gates).collect::<Vec<_>>())
    });
    let prompts = prop::collection::vec(2..512u32, 1..=LONGEST);
    runner
        .run(&(prompts, entries), |(prompt, entries)| {
            let mut model = model.borrow_mut();
            model.load_sum(&entries);
            let mixed = model.logits(&prompt, &entries);
            let one = model.logits(&prompt, &[(SUM as u32, 1.0)]);
            let worst = mixed.iter().zip(&one).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            prop_assert!(mixed.iter().all(|logit| logit.is_finite()));
            prop_assert!(worst <= TOLERANCE, "logits are off by {}", worst);
            Ok(())
        })
        .unwrap();
}

#[test]
fn a_mixture_is_the_adapter_of_all_its_ranks_llama() {
    sum_is_one_adapter("llama");
}

#[test]
fn a_mixture_is_the_adapter_of_all_its_ranks_phi3() {
    sum_is_one_adapter("phi3");
}

#[test]
fn weights_change_the_logits_and_order_does_not() {
    let mut model = Model::open("llama");
    let prompt: Vec<u32> = (5..25).collect();
    let (a, b) = (0, 5);
    let mixed = model.logits(&prompt, &[(a, 0.7), (b, 0.3)]);
    for other in [vec![], vec![(a, 1.0)], vec![(b, 1.0)], vec![(a, 0.3), (b, 0.7)]] {
        let logits = model.logits(&prompt, &other);
        let farthest = logits.iter().zip(&mixed).map(|(x, y)| (x - y).abs()).fold(0.0, f32::max);
        assert!(farthest > 1e-2, "{other:?} gives what 0.7 and 0.3 give");
    }

    let traffic = Traffic::open("llama");
    let engine = traffic.engine(Room { sequences: 4, rows: 64, pages: 64 });
    let answer = |adapters: &[(&str, f32)]| {
        let mut request = Request::new(prompt.clone());
        request.sampling.temperature = 0.0;
        request.logprobs = Some(3);
        request.adapters = adapters.iter().map(|&(name, weight)| (name.to_owned(), weight)).collect();
        traffic::bits(&engine.submit(request).unwrap().wait().unwrap())
    };
    let weighted = answer(&[("all-r8", 0.7), ("rslora-r16", 0.3)]);
    assert_eq!(weighted, answer(&[("rslora-r16", 0.3), ("all-r8", 0.7)]));
    assert_eq!(answer(&[("all-r8", 1.0)]), answer(&[("rslora-r16", 0.0), ("all-r8", 1.0)]));
    assert_eq!(answer(&[]), answer(&[("all-r8", 0.0)]));
    assert_ne!(weighted, answer(&[("all-r8", 1.0)]));
}
