//! Steps of whole models on a GPU: decode and prefill of Llama 3 8B, Llama 3.2 1B and Phi-3-mini in their shapes, for the
//! base alone and for up to 64 adapters in a batch, against floors and against predictions made beforehand
//! (`model-predictions.md`).
//!
//! A step is timed by the host's clock, from its row lists to its logits: many of them queued one after the other, and each
//! alone. Tokens are random and fixed, positions stand still. Reported are medians. All numbers are random and none is
//! zero; clocks are left as they are.
//!
//! ```sh
//! cargo bench -p loramux-benches --bench model                # LORAMUX_BENCH_SET=full for all cases
//! cargo bench -p loramux-benches --bench model -- --predict   # the predictions, in Markdown; needs no GPU
//! cargo bench -p loramux-benches --bench model -- --cases     # the cases as JSON, for benches of other libraries
//! ```
//!
//! `LORAMUX_BENCH_RECORDS` names a file that gets all numbers as JSON, `LORAMUX_BENCH_MODELS` parts of models' names.
//! `LORAMUX_BENCH_SET=tiny` tries the bench itself out, on small shapes: without a GPU, in a build with kernels, by the
//! emulator's `libcuda.so` in `LD_PRELOAD`.

use std::process::ExitCode;

use loramux::backend::cuda::Device;
use loramux_benches::gpu::cases::Set;
use loramux_benches::gpu::device::copy_bandwidth;
use loramux_benches::gpu::model::cases::{self, Adapters, Case};
use loramux_benches::gpu::model::prediction;
use loramux_benches::gpu::model::records::Records;
use loramux_benches::gpu::model::runner::{Outcome, Runner, SharedWeights};

fn main() -> ExitCode {
    let asks_for = |flag: &str| std::env::args().any(|argument| argument == flag);
    let result = Set::from_environment().and_then(|set| {
        if asks_for("--predict") {
            print!("{}", prediction::to_markdown());
        } else if asks_for("--cases") {
            println!("{:#}", cases::to_json(set)?);
        } else {
            run(set)?;
        }
        Ok(())
    });
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("error: bench model: {message}");
            ExitCode::FAILURE
        }
    }
}

fn run(set: Set) -> Result<(), String> {
    let device = Device::open(0).map_err(|error| error.to_string())?;
    let copied = if set == Set::Tiny { 1 << 16 } else { 1 << 30 };
    let bandwidth = device.stream().and_then(|stream| copy_bandwidth(&stream, copied));
    let bandwidth = bandwidth.map_err(|error| error.to_string())?;
    let mut records = Records::new(set, device.properties().clone(), bandwidth);
    records.print_header();
    let all = cases::cases(set);
    let (without, with): (Vec<Case>, Vec<Case>) =
        all.iter().partition(|case| case.adapters == Adapters::Absent);
    for model in cases::models(set)? {
        let weights = SharedWeights::new(&model);
        for cases in [&without, &with] {
            // One model at a time is on the device.
            let mut runner = Runner::new(set, &device, &model, &weights, cases);
            for &case in cases {
                let outcome = match &mut runner {
                    Ok(runner) => {
                        runner.time(&case).unwrap_or_else(|error| Outcome::Failed(error.to_string()))
                    }
                    Err(error) => Outcome::Failed(error.to_string()),
                };
                records.add(&model, case, outcome).map_err(|error| format!("the records: {error}"))?;
            }
        }
    }
    match records.failures() {
        0 => Ok(()),
        count => Err(format!("{count} cases have failed")),
    }
}
