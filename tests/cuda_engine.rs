//! The engine on the CUDA backend: what the promises say of one backend holds on this one, too.

mod common;
#[path = "common/cuda_device.rs"]
mod cuda_device;

use common::traffic::{self, Room, Traffic};
use cuda_device::device;
use loramux::backend::cuda::{Cuda, Element, MemoryOptions};
use loramux::engine::Engine;
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
    let config = Config { cases: 12, failure_persistence: None, ..Config::default() };
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
