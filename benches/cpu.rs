//! The CPU backend's operations and steps, one by one, by criterion: for following a change, not for comparing.
//!
//! Shapes are Llama 3.2 1B's; bf16 weights, random. `decode` runs one row per sequence after 128 tokens.

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use loramux::backend::cpu::Cpu;
use loramux::backend::{Backend, ExpertWeights, FrozenLinear, Gates, SiteChange, Write};
use loramux::model::Weights;
use loramux_benches::{Bench, Plan, RandomWeights, llama_1b, random_adapter, random_bf16};

/// One linear layer `[8192, 2048]`: rows × adapters of rank 16.
fn linear(criterion: &mut Criterion) {
    let (k, n) = (2048, 8192);
    let mut cpu = Cpu::new(None).expect("threads");
    let frozen = FrozenLinear { weight: random_bf16([n, k], 0.04, 1), bias: None };
    let mut site = cpu.group(vec![frozen]).expect("room");
    for slot in 0..8 {
        let change = SiteChange::LowRank(ExpertWeights {
            a: random_bf16([16, k], 0.02, slot + 100),
            b: random_bf16([n, 16], 0.02, slot + 200),
            scale: 2.0,
            bias: None,
            column_scale: None,
        });
        site.site_mut(0).load(slot as usize, &change);
    }
    let mut group = criterion.benchmark_group("linear");
    for rows in [1usize, 4, 16, 64, 512] {
        let mut x = cpu.buffer(rows, k).expect("room");
        let mut y = cpu.buffer(rows, n).expect("room");
        let values: Vec<f32> = (0..rows * k).map(|i| ((i * 7919) % 1000) as f32 / 500.0 - 1.0).collect();
        x.write(&values);
        for adapters in [0usize, 1, 8] {
            let mut gates = Gates::default();
            for adapter in 0..adapters.clamp(1, rows) {
                let share =
                    rows * (adapter + 1) / adapters.clamp(1, rows) - rows * adapter / adapters.clamp(1, rows);
                let entries: &[(u32, f32)] = if adapters == 0 { &[] } else { &[(adapter as u32, 1.0)] };
                gates.push_rows(share, entries);
            }
            group.throughput(Throughput::Elements((2 * rows * k * n) as u64));
            group.bench_function(BenchmarkId::new(format!("{adapters} adapters"), rows), |bencher| {
                bencher.iter(|| {
                    cpu.scope(|cpu| {
                        cpu.linear(&site, &x, &gates, Write::Replace, &mut y).expect("a product");
                    });
                });
            });
        }
    }
}

/// Whole steps of a model of two blocks.
fn steps(criterion: &mut Criterion) {
    let config = llama_1b(2);
    let weights = RandomWeights::new(&config);
    let mut cpu = Cpu::new(None).expect("threads");
    let mut bench = Bench::on_cpu(&mut cpu, &config, &weights);
    for slot in 0..8 {
        let adapter = random_adapter(weights.sites(), 16, slot as u64 + 1);
        bench.transformer.load_adapter(&mut cpu, slot, &adapter, &weights).expect("room");
    }
    let mut group = criterion.benchmark_group("step");
    group.sample_size(10);
    for (name, sequences, tokens, start) in
        [("decode 1", 1, 1, 128), ("decode 16", 16, 1, 128), ("prefill 512", 1, 512, 0)]
    {
        for adapters in [0, 8] {
            group.throughput(Throughput::Elements((sequences * tokens) as u64));
            group.bench_function(BenchmarkId::new(name, format!("{adapters} adapters")), |bencher| {
                bench.plan(Plan { sequences, tokens, start, adapters, ..Plan::default() });
                bencher.iter(|| bench.step(&mut cpu));
            });
        }
    }
}

criterion_group!(benches, linear, steps);
criterion_main!(benches);
