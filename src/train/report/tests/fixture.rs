//! The files of a run that never was: two tasks in one adapter, one of them alone in another, a third on guard.

use std::path::Path;

use serde_json::{Map, Value, json};

use crate::backend::sampling::Philox;

const TASKS: [&str; 3] = ["headline-sentiment", "topic", "general"];
const CLASSES: [&str; 3] = ["negative", "neutral", "positive"];
const STEPS: u64 = 240;
const EVAL_EVERY: u64 = 40;

/// The files of one job.
#[derive(Clone)]
pub struct Job {
    pub name: String,
    metrics: String,
    manifest: String,
}

impl Job {
    /// `headline-sentiment` and `topic` together, continued from another adapter; early stopping chose step 200.
    pub fn multi(name: &str) -> Self {
        Self::new(name, &TASKS[..2], [0.81, 0.74, 0.42])
    }

    /// `headline-sentiment` alone.
    pub fn single(name: &str) -> Self {
        Self::new(name, &TASKS[..1], [0.87, 0.2, 0.35])
    }

    /// With another text in the place of one, everywhere in its files.
    pub fn replacing(mut self, from: &str, to: &str) -> Self {
        let quoted = json!(to).to_string();
        let to = &quoted[1..quoted.len() - 1];
        self.metrics = self.metrics.replace(from, to);
        self.manifest = self.manifest.replace(from, to);
        self
    }

    fn new(name: &str, trained: &[&str], after: [f64; 3]) -> Self {
        let multi = trained.len() > 1;
        let mut lines = Vec::new();
        let evaluate = |lines: &mut Vec<Value>, step: u64, splits: &[&str]| {
            for (index, task) in TASKS.iter().enumerate() {
                for split in splits {
                    let eval = evaluation(index, split, trained.contains(task), step, after[index]);
                    lines.push(json!({"job": name, "step": step, "eval": eval}));
                }
            }
        };
        evaluate(&mut lines, 0, &["valid", "test"]);
        for step in 1..=STEPS {
            lines.push(training_step(name, trained, step));
            if step.is_multiple_of(EVAL_EVERY) {
                if multi {
                    let cosine = -0.2 + 0.001 * step as f64;
                    lines
                        .push(json!({"job": name, "step": step, "affinity": [[TASKS[0], TASKS[1], cosine]]}));
                }
                evaluate(&mut lines, step, &["valid"]);
            }
        }
        evaluate(&mut lines, STEPS, &["valid", "test"]);
        let metrics = lines.iter().map(|line| format!("{line}\n")).collect();
        Self { name: name.to_owned(), metrics, manifest: manifest(name, trained).to_string() }
    }
}

/// Writes the files of jobs into a run's folder.
pub fn write_run(run: &Path, jobs: &[Job]) {
    for job in jobs {
        let folder = run.join(&job.name);
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::write(folder.join("metrics.jsonl"), &job.metrics).unwrap();
        std::fs::write(folder.join("manifest.json"), &job.manifest).unwrap();
    }
}

/// About normal, of variance 1.
fn noise(stream: u64, position: u64) -> f64 {
    let uniform = |word: u32| f64::from(word) / f64::from(u32::MAX);
    let words = Philox::new(1).block([position as u32, stream as u32, 0, 0]);
    (words.map(uniform).iter().sum::<f64>() - 2.0) * 3f64.sqrt()
}

fn training_step(job: &str, trained: &[&str], step: u64) -> Value {
    let progress = step as f64 / STEPS as f64;
    let skipped = trained.len() > 1 && step == 77;
    let mut tasks = Map::new();
    let mut mean = 0.0;
    for (index, task) in trained.iter().enumerate() {
        // Of 16 samples ten are of the first task, or all.
        let samples = if trained.len() == 1 { 16 } else { [10, 6][index] };
        let floor = [0.12, 0.3][index];
        let loss = (floor + 3.1 * (-9.0 * progress).exp()) * (0.18 * noise(index as u64, step)).exp();
        mean += loss * samples as f64 / 16.0;
        tasks.insert((*task).to_owned(), json!({"loss": loss, "samples": samples, "labels": 2 * samples}));
    }
    let warmup = (step as f64 / 20.0).min(1.0);
    let lr = 1e-3 * warmup * 0.5 * (1.0 + (std::f64::consts::PI * progress).cos());
    let grad_norm = (!skipped).then(|| (0.4 + 1.6 * (-5.0 * progress).exp()) * (0.3 * noise(9, step)).exp());
    let mut line = json!({
        "job": job, "step": step, "epoch": step as f64 * 16.0 / 3000.0, "loss": mean, "grad_norm": grad_norm,
        "lr": lr, "tokens": 512 + step % 7, "labels": 32, "samples": 16, "tasks": tasks,
    });
    if skipped {
        line["skipped"] =
            json!(["model.layers.0.self_attn.q_proj.lora_A", "model.layers.0.mlp.up_proj.lora_B"]);
    }
    line
}

fn evaluation(task: usize, split: &str, trained: bool, step: u64, after: f64) -> Value {
    let before = [0.31, 0.18, 0.60][task];
    let progress = 1.0 - (-4.0 * step as f64 / STEPS as f64).exp();
    let wobble = if step.is_multiple_of(STEPS) { 0.0 } else { 0.02 * noise(20 + task as u64, step) };
    let last = step == STEPS;
    let share = if last { after } else { before + (after - before) * progress + wobble };
    let overfit = if step > 200 { 0.06 } else { 0.0 };
    let loss = if after > before { 2.9 - 2.3 * after * progress + overfit } else { 1.8 + 0.5 * progress };
    let mut eval = json!({
        "task": TASKS[task], "split": split, "trained": trained, "loss": loss, "perplexity": loss.exp(),
        "exact_match": share, "samples": 200,
    });
    if task == 0 {
        eval["label_accuracy"] = json!(share + 0.03);
        eval["f1"] = json!(share - 0.02);
        if split == "test" {
            eval["confusion"] = json!({
                "negative": {"negative": 50, "neutral": 9, "positive": 5},
                "neutral": {"negative": 6, "neutral": 62, "positive": 3, "mixed": 1},
                "positive": {"neutral": 14, "positive": 50},
            });
            if trained && after < 0.85 {
                let group = |samples: u64, exact: [f64; 2], positive: [f64; 2]| {
                    let at = usize::from(last);
                    json!({"samples": samples, "exact_match": exact[at], "positive": positive[at]})
                };
                eval["groups"] = json!({
                    "group-a": group(120, [0.35, 0.84], [0.60, 0.48]),
                    "group-b": group(80, [0.25, 0.765], [0.41, 0.45]),
                });
            }
        }
    }
    eval
}

fn manifest(name: &str, trained: &[&str]) -> Value {
    let multi = trained.len() > 1;
    let mut data = Vec::new();
    for (index, task) in TASKS.iter().enumerate() {
        for split in ["train", "valid", "test"] {
            if split == "train" && !trained.contains(task) {
                continue;
            }
            let kept = if split == "train" { [1800, 1200, 0][index] } else { 200 };
            let duplicates = if split == "train" { 12 * (1 - index) } else { 0 };
            let mut entry = json!({
                "task": task, "split": split, "path": format!("examples/tasks/{task}/{split}.jsonl"),
                "hash": "ab".repeat(32), "leakage": if multi && split == "valid" && index == 0 { 3 } else { 0 },
                "counts": {
                    "read": kept + kept / 36, "kept": kept, "dropped_too_long": kept / 36,
                    "dropped_without_target": 0, "truncated": 0, "duplicates": duplicates,
                    "tokens": 31 * kept, "targets": 2 * kept,
                },
            });
            if index == 0 {
                let shares = [kept / 5, kept / 2, kept - kept / 5 - kept / 2];
                let classes: Map<String, Value> =
                    CLASSES.iter().zip(shares).map(|(class, n)| ((*class).to_owned(), json!(n))).collect();
                entry["classes"] = Value::Object(classes);
            }
            data.push(entry);
        }
    }
    let tasks: Vec<Value> = (TASKS.iter())
        .map(|task| {
            let folder = format!("examples/tasks/{task}");
            let mut entry = json!({"name": task, "valid": format!("{folder}/valid.jsonl")});
            if trained.contains(task) {
                entry["train"] = json!(format!("{folder}/train.jsonl"));
            }
            entry
        })
        .collect();
    let lineage = if multi {
        json!([{"adapter": "runs/earlier/general", "sha256": "cd".repeat(32)}])
    } else {
        json!([])
    };
    json!({
        "loramux": "0.1.0", "job": name,
        "base": {"model": "examples/base", "hash": "0123456789abcdef".repeat(4)},
        "config": {
            "rank": 8, "alpha": 16.0, "targets": "all-linear", "dropout": 0.05, "lr": 0.001, "lr_b_ratio": 1.0,
            "weight_decay": 0.01, "betas": [0.9, 0.999], "eps": 1e-8, "schedule": "cosine", "warmup_steps": 20,
            "max_grad_norm": 1.0, "batch_size": 16, "steps": STEPS, "shuffle": true, "max_length": 1024,
            "sampling": "annealed", "batch_tasks": "mixed", "balance": "token", "pcgrad": multi,
            "eval_every": EVAL_EVERY, "task": tasks,
        },
        "seed": 7, "data": data, "lineage": lineage, "steps": STEPS, "bad_steps": u64::from(multi),
        "best_step": multi.then_some(200), "outcome": if multi { "stopped early" } else { "finished" },
        "files": {
            "adapter_config.json": "12".repeat(32), "adapter_model.safetensors": "34".repeat(32),
            "metrics.jsonl": "56".repeat(32),
        },
    })
}
