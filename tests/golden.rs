//! The forward pass and the engine against transformers + PEFT: every family with every adapter, alone and mixed.

mod common;

use std::path::Path;
use std::sync::Arc;

use common::{Case, FAMILIES, VARIANTS};
use loramux::adapter::peft::{Limits, read_adapter};
use loramux::backend::cpu::{Cpu, Isa};
use loramux::backend::{Backend, PAGE, Rows};
use loramux::engine::request::Request;
use loramux::engine::{Engine, EngineOptions};
use loramux::model::{Base, Transformer};

const TOLERANCE: f32 = 2e-4;

fn cases(test: impl Fn(&str, &Case)) {
    for name in FAMILIES.into_iter().chain(VARIANTS) {
        test(name, &Case::open(name));
    }
}

/// A base with all adapters of a case resident: adapter `i` of [`Case::adapters`] in slot `i` (the base has none).
fn load(case: &Case, backend: &Cpu) -> Transformer<Cpu> {
    let base = Base::open(&case.model()).unwrap();
    let mut transformer = Transformer::new(backend, &base.config, &base.checkpoint, 512).unwrap();
    for (slot, name) in case.adapters().iter().enumerate().skip(1) {
        let sites = &base.checkpoint.sites().table;
        let limits = Limits { max_rank: 512 };
        let adapter = read_adapter(&case.adapter_folder(name), sites, &base.checkpoint, limits).unwrap();
        transformer.load_adapter(backend, slot, &adapter, &base.checkpoint).unwrap();
    }
    transformer
}

fn entries(slot: usize) -> Vec<(u32, f32)> {
    if slot == 0 { vec![] } else { vec![(slot as u32, 1.0)] }
}

/// Logits of some prompts, each with its slot, in one step.
fn logits(backend: &mut Cpu, transformer: &Transformer<Cpu>, batch: &[(usize, &[u32])]) -> Vec<Vec<f32>> {
    let pages_each = 512 / PAGE;
    let mut rows = Rows::default();
    for (index, (slot, prompt)) in batch.iter().enumerate() {
        let pages: Vec<u32> = (0..pages_each).map(|page| (index * pages_each + page) as u32).collect();
        let variant = transformer.config().rope.variant_for(prompt.len());
        rows.push_sequence(prompt, 0, variant, &pages, &entries(*slot));
    }
    let mut cache = transformer.kv_cache(backend, pages_each * batch.len()).unwrap();
    let mut activations = transformer.activations(backend, rows.len(), rows.len()).unwrap();
    let picked: Vec<u32> = (0..rows.len() as u32).collect();
    backend.scope(|backend| {
        transformer.forward(backend, &rows, &mut cache, &mut activations);
        let all = transformer.logits(backend, &rows, &picked, &mut activations);
        let all = backend.read(all, picked.len());
        let vocabulary = transformer.config().vocab_size;
        let range = |s: &loramux::backend::SequenceRows| s.rows.start * vocabulary..s.rows.end * vocabulary;
        rows.sequences.iter().map(|sequence| all[range(sequence)].to_vec()).collect()
    })
}

fn assert_close(got: &[f32], wanted: &[f32], what: &str) {
    assert_eq!(got.len(), wanted.len(), "{what}");
    let worst = got
        .iter()
        .zip(wanted)
        .map(|(a, b)| (a - b).abs())
        .fold(0f32, |m, e| if e > m || e.is_nan() { e } else { m });
    assert!(worst <= TOLERANCE, "{what}: logits are off by {worst}");
}

#[test]
fn logits_match_with_each_adapter_alone_and_with_all_adapters_in_one_batch() {
    cases(|label, case| {
        for isa in Isa::available() {
            let mut backend = Cpu::with_isa(isa, Some(2)).unwrap();
            let transformer = load(case, &backend);
            let prompts = case.prompts();
            let names = case.adapters();
            let mut mixed = Vec::new();
            let mut alone = Vec::new();
            let mut compared = 0;
            for (slot, name) in names.iter().enumerate() {
                for (index, prompt) in prompts.iter().enumerate() {
                    mixed.push((slot, prompt.as_slice()));
                    let got = logits(&mut backend, &transformer, &[(slot, prompt)]).remove(0);
                    if let Some(wanted) = case.logits(name, index) {
                        assert_close(&got, &wanted, &format!("{label} {name} prompt {index} {isa:?}"));
                        compared += 1;
                    }
                    alone.push(got);
                }
            }
            assert!(compared >= names.len(), "{label}: only {compared} prompts have logits to compare");
            let together = logits(&mut backend, &transformer, &mixed);
            for (index, (alone, together)) in alone.iter().zip(&together).enumerate() {
                let same = alone.iter().zip(together).all(|(a, b)| a.to_bits() == b.to_bits());
                assert!(same, "{label}: batch entry {index} changed bits among others ({isa:?})");
            }
        }
    });
}

#[test]
fn greedy_continuations_match_with_all_adapters_in_one_batch() {
    cases(|label, case| {
        let base = Arc::new(Base::open(&case.model()).unwrap());
        let engine =
            Engine::start(base, EngineOptions { max_num_seqs: 7, ..EngineOptions::default() }).unwrap();
        let mut streams = Vec::new();
        for name in case.adapters() {
            if name != "base" {
                engine.load_adapter(&name, &case.adapter_folder(&name)).unwrap();
            }
            for (index, prompt) in case.prompts().into_iter().enumerate() {
                let mut request = Request::new(prompt);
                request.sampling.temperature = 0.0;
                request.stop.max_tokens = Some(12);
                request.adapters = if name == "base" { vec![] } else { vec![(name.clone(), 1.0)] };
                streams.push((name.clone(), index, engine.submit(request).unwrap()));
            }
        }
        for (name, index, stream) in streams {
            let choice = stream.wait().unwrap().choices.remove(0);
            assert_eq!(choice.token_ids, case.greedy(&name, index), "{label} {name} prompt {index}");
        }
    });
}

#[test]
fn promise_1_the_base_is_frozen() {
    let case = Case::open("mistral");
    let base = Arc::new(Base::open(&case.model()).unwrap());
    let before = base.checkpoint.content_hash().unwrap();
    let engine = Engine::start(Arc::clone(&base), EngineOptions::default()).unwrap();
    engine.load_adapter("dora", &case.adapter_folder("dora-r8")).unwrap();
    let mut request = Request::new(case.prompts().remove(2));
    request.adapters = vec![("dora".to_owned(), 1.0)];
    engine.submit(request).unwrap().wait().unwrap();
    drop(engine);
    assert_eq!(base.checkpoint.content_hash().unwrap(), before);
    let reopened = Base::open(Path::new(&case.model())).unwrap();
    assert_eq!(reopened.checkpoint.content_hash().unwrap(), before);
}
