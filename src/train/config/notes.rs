//! Notes on settings that are allowed and uncommon: outside what the literature reports, or without effect.

use std::ops::RangeInclusive;

use super::document::{Document, Given};
use super::job::Job;
use super::{Format, Length, TaskConfig, Warmup};

/// From full-size models (2e-5 to 5e-5) to small ranks and models (1e-4 to 1e-3).
const LR: RangeInclusive<f64> = 2e-5..=1e-3;
const BATCH_SIZE: RangeInclusive<f64> = 16.0..=64.0;
const EPOCHS: RangeInclusive<f64> = 3.0..=10.0;
const WEIGHT_DECAY: RangeInclusive<f64> = 0.01..=0.1;

/// Notes in the order of jobs; one in `[defaults]` once.
pub(super) fn notes(document: &Document, jobs: &[Job]) -> Vec<String> {
    let mut notes = Vec::new();
    let mut note = |line: usize, text: String| {
        let note = document.refuse(line, text).to_string();
        if !notes.contains(&note) {
            notes.push(note);
        }
    };
    for job in jobs {
        let (config, keys) = (&job.config, &job.keys);
        let batch_size = keys.batch_size.map(|size| Given { value: size.value as f64, line: size.line });
        for (key, given, usual) in [
            ("lr", keys.lr, LR),
            ("batch_size", batch_size, BATCH_SIZE),
            ("epochs", keys.epochs, EPOCHS),
            ("weight_decay", keys.weight_decay, WEIGHT_DECAY),
        ] {
            if let Some(given) = given.filter(|given| !usual.contains(&given.value)) {
                let (low, high) = (usual.start(), usual.end());
                let text = format!("`{key}` is {}; usual for fine-tuning are {low} to {high}", given.value);
                note(given.line, text);
            }
        }
        if let (Some(warmup), Length::Steps(steps), Warmup::Steps(rising)) =
            (keys.warmup_steps.or(keys.steps), config.length, config.optimizer.warmup)
            && rising >= steps
        {
            let text =
                format!("the learning rate rises for {rising} steps, and job `{}` has {steps}", config.name);
            note(warmup.line, text);
        }
        let is_other = |task: &TaskConfig| task.format.is_some_and(|format| format != Format::Text);
        if let Some(packing) = keys.packing.filter(|given| given.value && config.tasks.iter().all(is_other)) {
            let text = format!(
                "`packing` joins documents of the format \"text\", and job `{}` has none",
                config.name
            );
            note(packing.line, text);
        }
        for task in &config.tasks {
            for (one, other, names) in [
                (&task.train, &task.valid, "`train` and `valid`"),
                (&task.train, &task.test, "`train` and `test`"),
                (&task.valid, &task.test, "`valid` and `test`"),
            ] {
                if one.is_some() && one == other {
                    let text = format!(
                        "task `{}` of job `{}` has the same file for {names}: what is measured has been seen",
                        task.name, config.name
                    );
                    note(job.name.line, text);
                }
            }
        }
    }
    notes
}
