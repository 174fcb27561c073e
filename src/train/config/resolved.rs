//! A job with nothing left to defaults, as `CONFIG.toml` would say it.

use std::path::Path;

use serde_json::{Map, Value, json};

use super::{AdapterConfig, JobConfig, Length, RunConfig, Sampling, Targets, Warmup, Word};

impl RunConfig {
    /// All keys of a job as they would stand in its `[[job]]` if nothing was left to defaults, always in the same order:
    /// what a manifest keeps and a resumed run is compared with. Paths are as in the file.
    pub fn resolved(&self, job: &JobConfig) -> Value {
        let path = |path: &Path| {
            let inside = path.strip_prefix(&self.folder).unwrap_or(path);
            Value::from(inside.to_string_lossy().into_owned())
        };
        let mut keys = Map::new();
        let mut set = |key: &str, value: Value| drop(keys.insert(key.to_owned(), value));
        set("name", json!(job.name));
        match &job.adapter {
            AdapterConfig::Fresh { rank, alpha, targets, use_rslora, use_dora, dropout } => {
                set("init_from", json!("base"));
                set("rank", json!(rank));
                set("alpha", json!(alpha));
                set(
                    "targets",
                    match targets {
                        Targets::AllLinear => json!("all-linear"),
                        Targets::Named(names) => json!(names),
                    },
                );
                set("use_rslora", json!(use_rslora));
                set("use_dora", json!(use_dora));
                set("dropout", shortest(*dropout));
            }
            AdapterConfig::From { folder, dropout } => {
                let folder = folder.strip_prefix(&self.folder).unwrap_or(folder);
                set("init_from", json!(format!("adapter:{}", folder.display())));
                set("dropout", shortest(*dropout));
            }
        }
        let optimizer = &job.optimizer;
        set("lr", json!(optimizer.lr));
        set("lr_b_ratio", json!(optimizer.lr_b_ratio));
        set("weight_decay", json!(optimizer.weight_decay));
        set("betas", json!(optimizer.betas));
        set("eps", json!(optimizer.eps));
        set("schedule", json!(optimizer.schedule.word()));
        match optimizer.warmup {
            Warmup::Steps(steps) => set("warmup_steps", json!(steps)),
            Warmup::Ratio(ratio) => set("warmup_ratio", json!(ratio)),
        }
        set("max_grad_norm", json!(optimizer.max_grad_norm));
        set("batch_size", json!(job.batch_size));
        match job.length {
            Length::Epochs(epochs) => set("epochs", json!(epochs)),
            Length::Steps(steps) => set("steps", json!(steps)),
        }
        set("shuffle", json!(job.shuffle));
        set("seed", json!(job.seed));
        set("max_length", json!(job.max_length));
        set("on_overlong", json!(job.on_overlong.word()));
        set("packing", json!(job.packing));
        set("sampling", json!(job.sampling.word()));
        if let Sampling::Temperature(temperature) = job.sampling {
            set("temperature", json!(temperature));
        }
        set("batch_tasks", json!(job.batch_tasks.word()));
        set("balance", json!(job.balance.word()));
        set("coba", json!(job.coba));
        set("pcgrad", json!(job.pcgrad));
        set("eval_every", json!(job.eval_every));
        set("eval_max_tokens", json!(job.eval_max_tokens));
        set("early_stop", json!(job.early_stop.unwrap_or(0)));
        set("save_every", json!(job.save_every));
        set("max_bad_steps", json!(job.max_bad_steps));
        let tasks = job.tasks.iter().map(|task| {
            let mut keys = Map::new();
            keys.insert("name".to_owned(), json!(task.name));
            for (key, file) in [("train", &task.train), ("valid", &task.valid), ("test", &task.test)] {
                keys.extend(file.as_deref().map(|file| (key.to_owned(), path(file))));
            }
            keys.extend(task.ratio.map(|ratio| ("ratio".to_owned(), json!(ratio))));
            keys.extend(task.format.map(|format| ("format".to_owned(), json!(format.word()))));
            Value::Object(keys)
        });
        let tasks = tasks.collect();
        set("task", tasks);
        Value::Object(keys)
    }
}

/// The number as it was written: an f32 as f64 would have digits that nobody gave.
fn shortest(number: f32) -> Value {
    number.to_string().parse::<f64>().map_or(Value::Null, Value::from)
}
