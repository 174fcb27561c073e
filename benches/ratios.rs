//! The CPU backend's speeds as ratios: each figure and its peer take turns in one run; medians are compared.
//!
//! - decode of one sequence, in weight bytes per second, against a plain read of the same bytes;
//! - decode of 16 sequences and prefill of 512 rows, in FLOP/s, against the `gemm` crate alone in f32;
//! - how many outputs of the `gemm` crate change bits when a row is computed alone: why the backend has its own products;
//! - the same steps with up to 8 adapters of rank 16, as many as there are sequences, against the base alone.
//!
//! Prints a table and, with a path as argument, writes it as JSON. `ROUNDS` and `BLOCKS` (of the model) make it shorter.

use std::hint::black_box;
use std::time::Instant;

use loramux::backend::cpu::Cpu;
use loramux::tensor::Tensor;
use loramux_benches::{Bench, Plan, RandomWeights, commit, device, llama_1b, random_adapter};
use rayon::prelude::*;
use serde_json::json;

const ADAPTERS: usize = 8;
const RANK: usize = 16;

fn main() {
    // Cargo passes `--bench`; anything else is the path of the report.
    let report = std::env::args().skip(1).find(|argument| !argument.starts_with("--"));
    let number = |name, default| std::env::var(name).ok().and_then(|n| n.parse().ok()).unwrap_or(default);
    let (rounds, blocks) = (number("ROUNDS", 7), number("BLOCKS", 16));
    let config = llama_1b(blocks);
    let weights = RandomWeights::new(&config);
    let mut cpu = Cpu::new(None).expect("threads");
    let mut bench = Bench::on_cpu(&mut cpu, &config, &weights);
    for slot in 0..ADAPTERS {
        let adapter = random_adapter(loramux::model::Weights::sites(&weights), RANK, slot as u64 + 1);
        bench.transformer.load_adapter(&mut cpu, slot, &adapter, &weights).expect("room");
    }
    let bytes = weights.decode_bytes();
    let linear = weights.linear_weights();
    let flops_per_row: f64 = linear.iter().map(|weight| 2.0 * weight.len() as f64).sum();
    let block_flops = flops_per_row - 2.0 * (config.vocab_size * config.hidden_size) as f64;
    println!(
        "{} on {} threads, {:.2} GB of weights, medians of {rounds}",
        cpu.isa().name(),
        cpu.threads(),
        bytes as f64 / 1e9
    );

    let mut results = Vec::new();
    {
        let functions: [&mut dyn FnMut(&mut Cpu) -> f32; 2] =
            [&mut |cpu| step(&mut bench, cpu, 1, 1, 128, 0), &mut |_| read_all(&linear)];
        let [own, plain] = medians(rounds, &mut cpu, functions);
        results.push(result(
            "decode, 1 sequence: weight bytes/s over a plain read",
            own,
            bytes as f64 / own / 1e9,
            "GB/s",
            bytes as f64 / plain / 1e9,
            plain / own,
        ));
    }
    for (sequences, tokens, name) in [
        (16, 1, "decode, 16 sequences"),
        (1, 512, "prefill, 512 rows"),
        (8, 64, "prefill, 8 sequences of 64 rows"),
    ] {
        let rows = sequences * tokens;
        let start = if tokens == 1 { 128 } else { 0 };
        let mut peer = GemmPeer::new(&config, rows);
        let peer_flops = peer.flops();
        // Each side in a state of its own: the closures take turns on one model.
        let bench = std::cell::RefCell::new(&mut bench);
        let [own, library, mixed] = medians(
            rounds,
            &mut cpu,
            [
                &mut |cpu: &mut Cpu| step(&mut bench.borrow_mut(), cpu, sequences, tokens, start, 0),
                &mut |_| peer.run(),
                &mut |cpu: &mut Cpu| step(&mut bench.borrow_mut(), cpu, sequences, tokens, start, ADAPTERS),
            ],
        );
        // Only the last row of a sequence goes through the output layer.
        let flops = block_flops * rows as f64 + (flops_per_row - block_flops) * sequences as f64;
        let (own_rate, peer_rate) = (flops / own / 1e9, peer_flops / library / 1e9);
        results.push(result(
            &format!("{name}: FLOP/s over the gemm crate in f32"),
            own,
            own_rate,
            "GFLOP/s",
            peer_rate,
            own_rate / peer_rate,
        ));
        results.push(result(
            // A sequence uses one adapter.
            &format!("{name}: {} adapters of rank {RANK} over base only (time)", ADAPTERS.min(sequences)),
            mixed,
            mixed * 1e3,
            "ms",
            own * 1e3,
            mixed / own,
        ));
    }
    let (changed, outputs) = GemmPeer::new(&config, 16).outputs_changed_alone();
    println!(
        "gemm crate: {changed} of {outputs} outputs of 16 rows change bits when their row is computed alone"
    );
    if let Some(path) = report {
        let report = json!({
            "gemm_outputs_changed_alone": {"changed": changed, "outputs": outputs},
            "bench": "ratios", "command": "cargo bench -p loramux-benches --bench ratios -- FILE",
            "device": device(), "commit": commit(), "isa": cpu.isa().name(), "threads": cpu.threads(), "rounds": rounds,
            "model": "llama-3.2-1b shape, bf16, random weights", "blocks": blocks, "results": results,
        });
        std::fs::write(&path, format!("{report:#}\n")).expect("the report can be written");
    }
}

fn result(name: &str, seconds: f64, value: f64, unit: &str, peer: f64, ratio: f64) -> serde_json::Value {
    println!("{name:<68} {value:9.1} {unit:<8} peer {peer:9.1}  ratio {ratio:.3}");
    json!({"name": name, "seconds": seconds, "value": value, "unit": unit, "peer": peer, "ratio": ratio})
}

fn step(
    bench: &mut Bench<Cpu>,
    cpu: &mut Cpu,
    sequences: usize,
    tokens: usize,
    start: usize,
    adapters: usize,
) -> f32 {
    bench.plan(Plan { sequences, tokens, start, adapters, ..Plan::default() });
    bench.step(cpu)
}

/// Medians of each function's seconds over `rounds` turns.
fn medians<const N: usize>(
    rounds: usize,
    cpu: &mut Cpu,
    functions: [&mut dyn FnMut(&mut Cpu) -> f32; N],
) -> [f64; N] {
    let mut times = [(); N].map(|()| Vec::new());
    let mut functions = functions;
    for round in 0..=rounds {
        for (function, times) in functions.iter_mut().zip(&mut times) {
            let start = Instant::now();
            black_box(function(cpu));
            // The first round warms up.
            if round > 0 {
                times.push(start.elapsed().as_secs_f64());
            }
        }
    }
    times.map(|mut times| {
        times.sort_by(f64::total_cmp);
        times[times.len() / 2]
    })
}

/// Reads every byte once, on all threads.
fn read_all(weights: &[Tensor]) -> f32 {
    let sum: u64 = weights
        .par_iter()
        .flat_map(|weight| weight.bytes().par_chunks(1 << 20))
        .map(|chunk| {
            let words = chunk.chunks_exact(64);
            let mut lanes = [0u64; 8];
            for word in words {
                for (lane, bytes) in lanes.iter_mut().zip(word.as_chunks::<8>().0) {
                    *lane = lane.wrapping_add(u64::from_le_bytes(*bytes));
                }
            }
            lanes.iter().fold(0u64, |a, b| a.wrapping_add(*b))
        })
        .reduce(|| 0, u64::wrapping_add);
    sum as f32
}

/// The products of one block by the `gemm` crate, in f32.
struct GemmPeer {
    rows: usize,
    shapes: Vec<(usize, usize)>,
    weights: Vec<Vec<f32>>,
    x: Vec<f32>,
    y: Vec<f32>,
}

impl GemmPeer {
    fn new(config: &loramux::model::ModelConfig, rows: usize) -> Self {
        let (hidden, inner) = (config.hidden_size, config.intermediate_size);
        let qkv = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim;
        let shapes = vec![
            (qkv, hidden),
            (hidden, config.num_heads * config.head_dim),
            (2 * inner, hidden),
            (hidden, inner),
        ];
        let value = |i: usize| ((i * 2_654_435_761) % 1000) as f32 / 500.0 - 1.0;
        Self {
            rows,
            weights: shapes.iter().map(|(n, k)| (0..n * k).map(value).collect()).collect(),
            x: (0..rows * inner).map(value).collect(),
            y: vec![0.0; rows * 2 * inner],
            shapes,
        }
    }

    fn flops(&self) -> f64 {
        self.shapes.iter().map(|(n, k)| 2.0 * (n * k * self.rows) as f64).sum()
    }

    /// Of the first layer's outputs, how many differ in bits when their row is computed alone; and all of them.
    fn outputs_changed_alone(&mut self) -> (usize, usize) {
        let (rows, inputs) = (self.rows, self.x.clone());
        let (n, k) = self.shapes[0];
        self.shapes.truncate(1);
        self.run();
        let together = self.y[..rows * n].to_vec();
        self.rows = 1;
        let mut changed = 0;
        for row in 0..rows {
            self.x[..k].copy_from_slice(&inputs[row * k..(row + 1) * k]);
            self.run();
            let pairs = self.y[..n].iter().zip(&together[row * n..(row + 1) * n]);
            changed += pairs.filter(|(alone, together)| alone.to_bits() != together.to_bits()).count();
        }
        (changed, rows * n)
    }

    fn run(&mut self) -> f32 {
        for ((n, k), w) in self.shapes.iter().zip(&self.weights) {
            let (n, k) = (*n, *k);
            // SAFETY: the buffers hold [rows, k], [n, k] and [rows, n].
            unsafe {
                gemm::gemm(
                    self.rows,
                    n,
                    k,
                    self.y.as_mut_ptr(),
                    1,
                    n as isize,
                    false,
                    self.x.as_ptr(),
                    1,
                    k as isize,
                    w.as_ptr(),
                    k as isize,
                    1,
                    0.0f32,
                    1.0,
                    false,
                    false,
                    false,
                    gemm::Parallelism::Rayon(0),
                );
            }
        }
        self.y[0]
    }
}
