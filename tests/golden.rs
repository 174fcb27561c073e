//! The forward pass and the engine against transformers + PEFT: every family with every adapter, alone and mixed.

mod common;

use std::path::Path;
use std::sync::Arc;

use common::forward::{entries, load, logits};
use common::{Case, FAMILIES, VARIANTS, VOCABULARY};
use loramux::backend::cpu::{Cpu, Isa};
use loramux::engine::request::Request;
use loramux::engine::{Engine, EngineOptions};
use loramux::model::Base;

const TOLERANCE: f32 = 2e-4;

fn cases(test: impl Fn(&str, &Case)) {
    for name in FAMILIES.into_iter().chain(VARIANTS) {
        test(name, &Case::open(name));
    }
}

/// The last rows of `got` against those that the reference keeps.
fn assert_close(got: &[f32], wanted: &[f32], what: &str) {
    assert!((1..=got.len()).contains(&wanted.len()) && wanted.len().is_multiple_of(VOCABULARY), "{what}");
    let got = &got[got.len() - wanted.len()..];
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
            let transformer = load(case, &mut backend);
            let prompts = case.prompts();
            let names = case.adapters();
            let mut mixed = Vec::new();
            let mut alone = Vec::new();
            let mut compared = 0;
            for (slot, name) in names.iter().enumerate() {
                for (index, prompt) in prompts.iter().enumerate() {
                    mixed.push((slot, prompt.as_slice()));
                    let got = logits(&mut backend, &transformer, &[(&entries(slot), prompt)]).remove(0);
                    if let Some(wanted) = case.logits(name, index) {
                        assert_close(&got, &wanted, &format!("{label} {name} prompt {index} {isa:?}"));
                        compared += 1;
                    }
                    alone.push(got);
                }
            }
            assert!(compared >= names.len(), "{label}: only {compared} prompts have logits to compare");
            let gates: Vec<_> = mixed.iter().map(|(slot, _)| entries(*slot)).collect();
            let mixed: Vec<_> = gates.iter().map(Vec::as_slice).zip(mixed.iter().map(|m| m.1)).collect();
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
