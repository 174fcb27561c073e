//! A training run takes what was planned. Linux says how much a process has had at most: this binary has one test.
#![cfg(target_os = "linux")]

mod common;

use std::path::Path;

use common::training::{TrainingRun, token_lines};
use loramux::backend::cpu::Cpu;
use loramux::model::Checkpoint;
use loramux::train::config::RunConfig;
use loramux::train::folder::Existing;
use loramux::train::plan::{BaseShape, Step, jobs, training};
use loramux::train::run::Run;

/// A line of `/proc/self/status`, in bytes.
fn status(name: &str) -> f64 {
    let text = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).unwrap();
    line.trim().strip_suffix(" kB").unwrap().parse::<f64>().unwrap() * 1024.0
}

#[test]
fn a_training_run_takes_what_was_planned() {
    let mut written = TrainingRun::new(Path::new("examples/base"));
    written.run_keys("max_tokens_per_step = 2048");
    for (name, keys) in [("plain", ""), ("dropped", "dropout = 0.1"), ("dora", "rank = 40\nuse_dora = true")]
    {
        let train = written.data(&format!("{name}.jsonl"), &token_lines(128, 1000, 1));
        written.job(
            name,
            &format!("train = {train:?}\nbatch_size = 64\nsteps = 2\neval_max_tokens = 0\n{keys}"),
        );
    }
    let (config, _) = RunConfig::read(&written.config()).unwrap();

    let before = status("VmRSS");
    let run = Run::open(config.clone()).unwrap();
    let checkpoint = Checkpoint::open(&config.model, &run.base.config).unwrap();
    let base = BaseShape::new(&run.base.config, &checkpoint).unwrap();
    let shapes = jobs(&config, &checkpoint).unwrap();
    // The samples have 18 tokens on average, 10 of them labelled.
    let step = Step::of(&config, &base);
    let step = Step { mean_length: 18, labelled: step.rows * 10 / 18, ..step };
    let planned = training(&base, step, &shapes, None).unwrap();
    run.train(Cpu::new(Some(2)).unwrap(), None, Existing::Refuse, &mut |_| {}).unwrap();
    let taken = status("VmHWM") - before;

    let ratio = planned.total() as f64 / taken;
    assert!((0.9..1.1).contains(&ratio), "{:.1} MiB taken; planned:\n{planned}", taken / (1 << 20) as f64);
}
