//! The engine on the CUDA backend: what the promises say of one backend holds on this one, too.
//!
//! Runs on the emulator, or with `LORAMUX_TEST_DEVICE=cuda` on a GPU.
#![cfg(feature = "cuda")]

mod common;
#[path = "common/cuda_device.rs"]
mod cuda_device;

use std::sync::Arc;

use common::Case;
use common::traffic::{self, Room, Traffic};
use cuda_device::device;
use loramux::backend::cuda::{Cuda, Element, MemoryOptions};
use loramux::engine::request::Request;
use loramux::engine::{Engine, EngineOptions};
use loramux::model::Base;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};

/// Room for few adapters: less than there are.
fn memory(seats: usize) -> MemoryOptions {
    MemoryOptions { utilization: 0.9, seats, max_rank: 128, chunks: 2 * seats }
}

fn engine(traffic: &Traffic, room: Room, seats: usize) -> Engine {
    traffic.engine_on(room, move || Ok(Cuda::on(&device(), memory(seats), Element::Bf16)?))
}

fn bit_equal_alone_or_among_others(family: &str) {
    let traffic = Traffic::open(family);
    let alone = engine(&traffic, Room { sequences: 1, rows: 96, pages: 8 }, 8);
    let crowded = [
        engine(&traffic, Room { sequences: 12, rows: 96, pages: 96 }, 16),
        // Prompts in pieces, sequences that are preempted, adapters that wait for each other.
        engine(&traffic, Room { sequences: 6, rows: 20, pages: 10 }, 4),
    ];
    let config = Config { cases: 6, failure_persistence: None, ..Config::default() };
    let mut runner = TestRunner::new_with_rng(config, TestRng::deterministic_rng(RngAlgorithm::ChaCha));
    let next = std::cell::Cell::new(0);
    runner
        .run(&traffic.batches(), |batch| {
            let engine = &crowded[next.replace(next.get() + 1) % crowded.len()];
            let together = traffic::run(engine, &batch);
            for (arrival, together) in batch.iter().zip(together) {
                let solo = alone.submit(arrival.request.clone()).unwrap().wait().unwrap();
                proptest::prop_assert_eq!(traffic::bits(&solo), traffic::bits(&together));
            }
            Ok(())
        })
        .unwrap();
}

#[test]
fn promise_3_a_request_gives_bit_equal_output_alone_or_among_others_llama() {
    bit_equal_alone_or_among_others("llama");
}

#[test]
fn promise_3_a_request_gives_bit_equal_output_alone_or_among_others_phi3() {
    bit_equal_alone_or_among_others("phi3");
}

#[test]
fn promise_3_a_request_gives_bit_equal_output_alone_or_among_others_qwen2() {
    bit_equal_alone_or_among_others("qwen2");
}

/// Without a size the cache gets what weights, adapters and steps leave of the GPU's share; too small a share is an error
/// that names the option.
#[test]
fn the_cache_is_made_of_what_is_left_of_the_share() {
    let case = Case::open("llama");
    let base = Arc::new(Base::open(&case.model()).unwrap());
    let start = |share: f32| {
        let options = EngineOptions {
            gpu_memory_utilization: share,
            max_num_seqs: 4,
            max_model_len: Some(64),
            ..EngineOptions::default()
        };
        let memory = MemoryOptions { utilization: share, ..memory(2) };
        Engine::start_on(Arc::clone(&base), options, move || Ok(Cuda::on(&device(), memory, Element::Bf16)?))
    };
    let engine = start(0.5).unwrap();
    assert_eq!(engine.max_model_len(), 64);
    let mut request = Request::new(vec![5; 40]);
    request.stop.max_tokens = Some(24);
    request.stop.ignore_eos = true;
    assert_eq!(engine.submit(request).unwrap().wait().unwrap().choices[0].token_ids.len(), 24);

    let refused = start(0.001).map(|_| ()).unwrap_err().to_string();
    assert!(refused.contains("`gpu-memory-utilization` is 0.001"), "{refused}");
    assert!(refused.contains("bytes for the KV cache"), "{refused}");
}

/// An adapter that needs more than there is for all adapters together is refused by name when it is used, and its
/// neighbours run on.
#[test]
fn a_mixture_that_can_never_fit_fails_by_itself() {
    let traffic = Traffic::open("llama");
    let engine = engine(&traffic, Room { sequences: 4, rows: 32, pages: 32 }, 2);
    let request = |names: &[&str]| {
        let mut request = Request::new(vec![7, 8, 9]);
        request.adapters = names.iter().map(|&name| (name.to_owned(), 0.5)).collect();
        request
    };
    let fits = engine.submit(request(&["all-r8", "odd-r3-mlp"])).unwrap();
    let never = engine.submit(request(&["all-r8", "odd-r3-mlp", "small-qv"])).unwrap();
    let also_fits = engine.submit(request(&["small-qv", "rslora-r16"])).unwrap();
    let refused = never.wait().unwrap_err().to_string();
    assert!(refused.contains("3 experts"), "{refused}");
    assert!(fits.wait().is_ok() && also_fits.wait().is_ok());
}
