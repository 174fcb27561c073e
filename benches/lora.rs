//! The LoRA kernels on a GPU: every site group of a Llama 3 8B layer and the whole layer, over numbers of rows, mixes
//! of adapters and ranks, against floors and against predictions made beforehand (`predictions.md`).
//!
//! A case is a CUDA graph of the launches of several layers in turn, so that neither weights nor adapters nor inputs are
//! in L2 when a launch begins; its time is the time between two events around a replay, divided by the number of
//! layers. Reported is the median over all replays. All numbers are random and none is zero; clocks are left as they are.
//!
//! ```sh
//! cargo bench -p loramux-benches --bench lora                # LORAMUX_BENCH_SET=full for all cases
//! cargo bench -p loramux-benches --bench lora -- --predict   # the predictions, in Markdown; needs no GPU
//! cargo bench -p loramux-benches --bench lora -- --cases     # the cases as JSON, for benches of other libraries
//! ```
//!
//! `LORAMUX_BENCH_RECORDS` names a file that gets all numbers as JSON. Other arguments are criterion's.

use std::process::ExitCode;
use std::time::Duration;

use criterion::{BenchmarkId, Criterion, SamplingMode, Throughput};
use loramux::backend::cuda::{CudaError, Graph};
use loramux_benches::gpu::cases::{self, Case, Set};
use loramux_benches::gpu::counts::Counts;
use loramux_benches::gpu::device::copy_bandwidth;
use loramux_benches::gpu::layers::Layers;
use loramux_benches::gpu::prediction;
use loramux_benches::gpu::records::Records;

fn main() -> ExitCode {
    let asks_for = |flag: &str| std::env::args().any(|argument| argument == flag);
    let result = Set::from_environment().and_then(|set| {
        if asks_for("--predict") {
            print!("{}", prediction::to_markdown());
        } else if asks_for("--cases") {
            println!("{:#}", cases::to_json(set));
        } else {
            run(set)?;
        }
        Ok(())
    });
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => fail(&message),
    }
}

fn fail(message: &str) -> ExitCode {
    eprintln!("error: bench lora: {message}");
    ExitCode::FAILURE
}

fn run(set: Set) -> Result<(), String> {
    let message = |error: CudaError| error.to_string();
    let mut criterion = criterion(set);
    let cases = set.cases();
    let mut layers = Layers::new(set, &cases).map_err(message)?;
    let copied = if set == Set::Tiny { 1 << 16 } else { 1 << 30 };
    let bandwidth = copy_bandwidth(layers.stream(), copied).map_err(message)?;
    let mut records = Records::new(set, layers.device().properties().clone(), layers.copies(), bandwidth);
    let mut loaded = None;
    for case in &cases {
        if loaded != Some(case.batch.ranks) {
            layers.load_adapters(case.batch.ranks).map_err(message)?;
            if loaded.is_none() {
                let most_rows = cases.iter().max_by_key(|case| case.batch.rows).expect("a set has cases");
                layers.prepare(most_rows).map_err(message)?;
            }
            loaded = Some(case.batch.ranks);
        }
        layers.set_batch(case).map_err(message)?;
        let (graph, times) = layers.capture(case).map_err(message)?;
        layers.replay(&graph, 2).map_err(message)?;
        let seconds = measure(&mut criterion, &layers, case, &graph, times);
        records.add(case.clone(), seconds).map_err(|error| format!("the records: {error}"))?;
    }
    criterion.final_summary();
    records.print();
    Ok(())
}

/// Hundreds of cases: each gets a moment only. The GPU's times scatter little, and outliers do not move a median.
fn criterion(set: Set) -> Criterion {
    let (samples, warm_up, measurement) = match set {
        Set::Tiny => (10, 1, 1),
        Set::Short => (15, 50, 250),
        Set::Full => (50, 200, 1000),
    };
    Criterion::default()
        .sample_size(samples)
        .warm_up_time(Duration::from_millis(warm_up))
        .measurement_time(Duration::from_millis(measurement))
        .nresamples(2000)
        .without_plots()
        .configure_from_args()
}

/// Seconds of the case, once for each replay of `graph`, which does it `times` times.
fn measure(criterion: &mut Criterion, layers: &Layers, case: &Case, graph: &Graph, times: usize) -> Vec<f64> {
    let mut all = Vec::new();
    let mut group = criterion.benchmark_group(format!("{} {}", case.target, case.part.name()));
    // A graph is long already: the same few replays for every sample.
    group.sampling_mode(SamplingMode::Flat).throughput(Throughput::Elements(Counts::of(case).flops()));
    group.bench_function(BenchmarkId::new(case.adapters(), case.batch.rows), |bencher| {
        bencher.iter_custom(|iterations| {
            let replays = iterations.div_ceil(times as u64);
            let seconds = layers.replay(graph, replays as usize).unwrap_or_else(|error| {
                // Criterion has no way to pass an error on. What was measured is written already.
                fail(&error.to_string());
                std::process::exit(1)
            });
            let sum: f64 = seconds.iter().sum();
            all.extend(seconds.iter().map(|seconds| seconds / times as f64));
            Duration::from_secs_f64(sum * iterations as f64 / (replays * times as u64) as f64)
        });
    });
    group.finish();
    all
}
