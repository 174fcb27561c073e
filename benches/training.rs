//! The CPU backend's linear layers forward and backward, by criterion: for following a change, not for comparing.
//!
//! Shapes are those of the example base's MLP and of a model of 2048; bf16 weights, random. Jobs train pairs of rank 8.

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use loramux::backend::cpu::{Cpu, Ranks, Trainee};
use loramux::backend::training::{Learning, Pair, PairValues, Training};
use loramux::backend::{Backend, FrozenLinear, Gates, SitePlace, Write};
use loramux_benches::random_bf16;

const RANK: usize = 8;

fn linear(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("linear in training");
    group.sample_size(10);
    for (jobs, rows, k, n) in [
        (1, 528, 160, 432),
        (1, 528, 432, 160),
        (1, 528, 2048, 2048),
        (7, 3696, 160, 864),
        (7, 3696, 432, 160),
    ] {
        let mut cpu = Cpu::new(None).expect("threads");
        let frozen = FrozenLinear { weight: random_bf16([n, k], 0.04, 1), bias: None };
        let mut groups = vec![cpu.group(vec![frozen]).expect("room")];
        let mut table = cpu.table(random_bf16([1, 1], 1.0, 2)).expect("room");
        let values =
            |len: usize| (0..len).map(|i| ((i * 7919) % 1000) as f32 / 500.0 - 1.0).collect::<Vec<_>>();
        let weights = PairValues { a: values(RANK * k), b: values(n * RANK), magnitude: vec![] };
        let pair = Pair { place: SitePlace::Group(0, 0), rank: RANK, scale: 2.0, weights };
        let mut trainees: Vec<Option<Trainee>> = (0..jobs)
            .map(|slot| {
                let pairs = std::slice::from_ref(&pair);
                Some(cpu.trainee(&mut groups, &mut table, slot, pairs, 0.0).expect("room"))
            })
            .collect();
        let mut gates = Gates::default();
        (0..jobs).for_each(|slot| gates.push_rows(rows / jobs, &[(slot as u32, 1.0)]));
        let row_keys = vec![0; rows];
        let [mut x, mut dx] = [0; 2].map(|_| cpu.buffer(rows, k).expect("room"));
        let [mut y, mut dy] = [0; 2].map(|_| cpu.buffer(rows, n).expect("room"));
        x.write(&values(rows * k));
        dy.write(&values(rows * n));
        let mut ranks = Ranks::default();
        let mut learning =
            Learning { gates: &gates, row_keys: &row_keys, trainees: &mut trainees, gate_gradients: None };
        let name = format!("{jobs} jobs, {rows} rows, {k} to {n}");
        group.throughput(Throughput::Elements((2 * rows * k * n) as u64));
        group.bench_function(BenchmarkId::new("forward", &name), |bencher| {
            bencher.iter(|| {
                cpu.scope(|cpu| {
                    cpu.linear_kept(&groups[0], 0, &x, &learning, Write::Replace, &mut y, &mut ranks)
                })
            });
        });
        group.bench_function(BenchmarkId::new("backward", &name), |bencher| {
            bencher.iter(|| {
                cpu.scope(|cpu| {
                    let dx = Some(&mut dx);
                    cpu.linear_backward(&groups[0], 0, &x, &ranks, &dy, &mut learning, dx)
                })
            });
        });
    }
}

criterion_group!(benches, linear);
criterion_main!(benches);
