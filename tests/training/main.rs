//! Training as its users run it: what a run leaves behind, whatever happens to it.

#[path = "../common/mod.rs"]
mod common;
mod data;
mod kills;
mod lineage;
mod promises;
mod report;
mod resume;
mod stop;
mod tasks;

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use common::training::{TrainingRun, token_lines};

fn golden_model() -> PathBuf {
    Path::new("tests/golden/llama/model").to_owned()
}

/// Jobs that differ in everything that a job may differ in.
const KINDS: [&str; 6] = [
    "rank = 4\ntargets = [\"q_proj\", \"v_proj\"]\nlr = 3e-3",
    "rank = 8\nlr = 1e-3\nweight_decay = 0.1\nschedule = \"linear\"\ndropout = 0.2",
    "rank = 17\ntargets = [\"gate_proj\", \"up_proj\", \"down_proj\"]\nlr_b_ratio = 4\nuse_rslora = true",
    "rank = 3\nuse_dora = true\nmax_grad_norm = 0.05",
    "rank = 8\ntargets = [\"o_proj\", \"lm_head\", \"embed_tokens\"]\nbatch_size = 3\nbalance = \"sample\"",
    "rank = 5\ndropout = 0.5\nuse_dora = true\ntargets = [\"k_proj\", \"down_proj\"]",
];

/// Adds job `index` of many, with data of its own.
fn add_job(run: &mut TrainingRun, index: usize, more: &str) -> String {
    let name = format!("job-{index}");
    let train = run.data(&format!("train-{index}.jsonl"), &token_lines(14, 500, index as u64));
    let valid = run.data(&format!("valid-{index}.jsonl"), &token_lines(5, 500, 100 + index as u64));
    let batch = if KINDS[index % KINDS.len()].contains("batch_size") { "" } else { "batch_size = 5\n" };
    let keys = format!(
        "train = \"{train}\"\nvalid = \"{valid}\"\nepochs = 2\nseed = {index}\nwarmup_steps = 2\neval_every = 2\n\
         {batch}{}\n{more}",
        KINDS[index % KINDS.len()]
    );
    run.job(&name, &keys);
    name
}

/// The results of one job trained alone, with everything at its usual.
fn alone(index: usize, more: &str) -> Vec<(&'static str, Vec<u8>)> {
    let mut run = TrainingRun::new(&golden_model());
    let name = add_job(&mut run, index, more);
    without_paths(run.finish(&[]).results(&name))
}

/// Manifests name files by path, and every run here has a folder of its own.
fn without_paths(results: Vec<(&'static str, Vec<u8>)>) -> Vec<(&'static str, Vec<u8>)> {
    let strip = |(name, bytes): (&'static str, Vec<u8>)| {
        if name != "manifest.json" {
            return (name, bytes);
        }
        let mut manifest: Value = serde_json::from_slice(&bytes).unwrap();
        for entry in manifest["data"].as_array_mut().unwrap() {
            entry["path"] = json!(Path::new(entry["path"].as_str().unwrap()).file_name().unwrap().to_str());
        }
        for key in ["train", "valid"] {
            manifest["config"].as_object_mut().unwrap().remove(key);
        }
        manifest["config"].as_object_mut().unwrap().remove("tasks");
        manifest["config"].as_object_mut().unwrap().remove("task");
        (name, manifest.to_string().into_bytes())
    };
    results.into_iter().map(strip).collect()
}

/// Compares what jobs left.
#[track_caller]
fn assert_same_results(wanted: &[(&str, Vec<u8>)], found: &[(&str, Vec<u8>)], what: &str) {
    for ((file, wanted), (_, found)) in wanted.iter().zip(found) {
        assert_same(wanted, found, &format!("{file}: {what}"));
    }
}

/// Compares bytes, and shows those that are text.
#[track_caller]
fn assert_same(one: &[u8], other: &[u8], what: &str) {
    match (std::str::from_utf8(one), std::str::from_utf8(other)) {
        (Ok(one), Ok(other)) => assert_eq!(one, other, "{what}"),
        _ => assert!(one == other, "{what}"),
    }
}
