//! Promise 4: the CUDA backend passes the CPU's golden tests. Every family with every adapter, alone and mixed, against
//! what transformers + PEFT compute; weights and activations are bf16 here, or fp16 where the weights are stored so.
//!
//! Runs on the emulator, or with `LORAMUX_TEST_DEVICE=cuda` on a GPU.
#![cfg(feature = "cuda")]

mod common;
#[path = "common/cuda_device.rs"]
mod cuda_device;

use common::forward::{entries, load, logits};
use common::{Case, FAMILIES, VARIANTS};
use loramux::adapter::{Adapter, SiteAdapter};
use loramux::backend::Backend;
use loramux::backend::cpu::Cpu;
use loramux::backend::cuda::{Cuda, Element, MemoryOptions};
use loramux::engine::EngineOptions;
use loramux::model::{Base, Transformer};
use loramux::tensor::Tensor;

/// ‖Δ‖ / ‖wanted‖ of a case's logits: weights and activations are rounded to eight or eleven bits here, and to 24 there.
fn tolerance(element: Element) -> f64 {
    match element {
        Element::Bf16 => 2e-2,
        Element::F16 => 2.5e-3,
    }
}

/// The same of three adapters whose gates add up to more than one, and with them what is rounded.
const OF_MIXTURES: f64 = 3e-2;

const MEMORY: MemoryOptions = MemoryOptions { utilization: 0.9, seats: 32, max_rank: 128, chunks: 64 };

fn cuda(element: Element) -> Cuda {
    Cuda::on(&cuda_device::device(), MEMORY, element).expect("a backend")
}

/// The type that an engine takes for a case's weights.
fn element_of(case: &Case) -> Element {
    let base = Base::open(&case.model()).unwrap();
    Element::from_dtype(EngineOptions::default().gpu_dtype(&base.checkpoint)).expect("a type of 16 bits")
}

fn matches(label: &str) {
    let case = Case::open(label);
    let element = element_of(&case);
    let mut backend = cuda(element);
    let transformer = load(&case, &mut backend);
    let prompts = case.prompts();
    let names = case.adapters();
    let gates: Vec<_> = (0..names.len()).map(entries).collect();
    let mut mixed = Vec::new();
    let mut alone = Vec::new();
    for (slot, name) in names.iter().enumerate() {
        for (index, prompt) in prompts.iter().enumerate() {
            let Some(wanted) = case.logits(name, index) else { continue };
            mixed.push((gates[slot].as_slice(), prompt.as_slice()));
            let got = logits(&mut backend, &transformer, &[(&gates[slot], prompt)]).remove(0);
            // The reference keeps the last rows.
            let error = relative_error(&got[got.len() - wanted.len()..], &wanted);
            assert!(error <= tolerance(element), "{label} {name} prompt {index}: logits are off by {error}");
            alone.push(got);
        }
    }
    assert!(alone.len() >= names.len(), "{label}: only {} prompts have logits", alone.len());
    let together = logits(&mut backend, &transformer, &mixed);
    for (index, (alone, together)) in alone.iter().zip(&together).enumerate() {
        let same = alone.iter().zip(together).all(|(a, b)| a.to_bits() == b.to_bits());
        assert!(same, "{label}: batch entry {index} changed bits among others");
    }
}

fn relative_error(got: &[f32], wanted: &[f32]) -> f64 {
    assert_eq!(got.len(), wanted.len());
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>().sqrt();
    let difference = norm(&mut got.iter().zip(wanted).map(|(a, b)| f64::from(*a) - f64::from(*b)));
    difference / norm(&mut wanted.iter().map(|&b| f64::from(b)))
}

macro_rules! cases {
    ($($name:ident: $label:literal,)*) => {
        /// Every case has its test.
        const TESTED: &[&str] = &[$($label),*];
        $(#[test] fn $name() { matches($label); })*
    };
}

cases! {
    logits_of_llama_match: "llama",
    logits_of_llama_with_tied_embeddings_match: "llama-tied",
    logits_of_qwen2_match: "qwen2",
    logits_of_qwen3_match: "qwen3",
    logits_of_mistral_match: "mistral",
    logits_of_phi3_match: "phi3",
    logits_of_llama_linear_match: "llama-linear",
    logits_of_llama_yarn_match: "llama-yarn",
    logits_of_phi3_su_match: "phi3-su",
    logits_of_qwen2_windows_match: "qwen2-windows",
    logits_of_qwen3_biases_match: "qwen3-biases",
}

#[test]
fn weights_that_are_stored_in_fp16_run_in_fp16() {
    for label in TESTED {
        let wanted = if *label == "qwen2-windows" { Element::F16 } else { Element::Bf16 };
        assert_eq!(element_of(&Case::open(label)), wanted, "{label}");
    }
}

/// What a checkpoint in another type, or an adapter, may have and fp16 has not.
#[test]
fn values_that_fp16_cannot_hold_are_refused() {
    let backend = cuda(Element::F16);
    let tensor = Tensor::from_f32(vec![2, 8], &[65504.0; 16]);
    assert!(backend.weight(&tensor).is_ok());
    let mut values = [1.0; 16];
    values[9] = -1e5;
    let tensor = Tensor::from_f32(vec![2, 8], &values);
    let refused = backend.weight(&tensor).expect_err("too large").to_string();
    assert!(refused.contains("a weight of shape [2, 8] has the value -100000"), "{refused}");
    assert!(cuda(Element::Bf16).weight(&tensor).is_ok());

    let case = Case::open("qwen2-windows");
    let base = Base::open(&case.model()).unwrap();
    let (id, site) = base.checkpoint.sites().table.iter().last().expect("a site");
    let mut b = vec![0.5; site.out_features];
    b[3] = 7e4;
    let of_site = SiteAdapter {
        site: id,
        rank: 1,
        scale: 1.0,
        a: Tensor::from_f32(vec![1, site.in_features], &vec![0.5; site.in_features]),
        b: Tensor::from_f32(vec![site.out_features, 1], &b),
        bias: None,
        magnitude: None,
    };
    let adapter = Adapter {
        hash: String::new(),
        sites: vec![of_site],
        saved_modules: vec![],
        saved_biases: vec![],
        base_name: None,
    };
    let load = |mut backend: Cuda| {
        let mut model = Transformer::new(&mut backend, &base.config, &base.checkpoint, 64).unwrap();
        model.load_adapter(&mut backend, 0, &adapter, &base.checkpoint)
    };
    let refused = load(backend).expect_err("too large").to_string();
    assert!(refused.contains("B of an adapter") && refused.contains("has the value 70000"), "{refused}");
    assert!(load(cuda(Element::Bf16)).is_ok());
}

#[test]
fn promise_4_both_backends_pass_the_same_cases() {
    let mut all: Vec<_> = FAMILIES.into_iter().chain(VARIANTS).collect();
    all.sort_unstable();
    let mut tested = TESTED.to_vec();
    tested.sort_unstable();
    assert_eq!(tested, all);
}

/// Weighted sets of adapters, against the CPU.
#[test]
fn logits_of_mixtures_match_the_other_backend() {
    for label in ["llama", "qwen2", "phi3"] {
        let case = Case::open(label);
        let (mut cuda, mut cpu) = (cuda(Element::Bf16), Cpu::new(Some(2)).unwrap());
        let on_cuda = load(&case, &mut cuda);
        let on_cpu = load(&case, &mut cpu);
        let names = case.adapters();
        let mixable = (1..names.len() as u32).filter(|&slot| names[slot as usize] != "saved-head");
        let slots: Vec<u32> = mixable.collect();
        let prompt = &case.prompts()[1];
        for (index, slots) in slots.windows(3).enumerate() {
            let gates: Vec<_> =
                slots.iter().zip([0.75, -0.5, 1.25]).map(|(&slot, gate)| (slot, gate)).collect();
            let batch = [(gates.as_slice(), prompt.as_slice())];
            let got = logits(&mut cuda, &on_cuda, &batch).remove(0);
            let wanted = logits(&mut cpu, &on_cpu, &batch).remove(0);
            let error = relative_error(&got, &wanted);
            assert!(error <= OF_MIXTURES, "{label}, mixture {index}: logits are off by {error}");
            // A set without its last adapter is far from it: the bound is one that a missing expert would break.
            let fewer = logits(&mut cuda, &on_cuda, &[(&gates[..2], prompt)]).remove(0);
            let error = relative_error(&fewer, &wanted);
            assert!(error > 2.0 * OF_MIXTURES, "{label}, mixture {index}: only {error} without an adapter");
        }
    }
}
