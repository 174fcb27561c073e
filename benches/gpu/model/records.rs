//! The measured steps: beside their floors and predictions, as JSON and as a table.

use std::path::{Path, PathBuf};
use std::{env, fs, io};

use loramux::backend::cuda::Properties;
use serde_json::{Value, json};

use super::super::cases::Set;
use super::super::device::peak;
use super::super::prediction::DEVICE;
use super::cases::{Adapters, Case, Model, case_to_json};
use super::counts::Counts;
use super::prediction::{Prediction, Share, launches_of_blocks};
use super::runner::Outcome;
use crate::commit;

struct Record {
    model: &'static str,
    case: Case,
    counts: Counts,
    prediction: Prediction,
    outcome: Outcome,
}

/// All that a run has measured so far.
pub struct Records {
    set: Set,
    device: Properties,
    copy_bandwidth: f64,
    records: Vec<Record>,
    path: Option<PathBuf>,
}

impl Records {
    /// Written to the file that `LORAMUX_BENCH_RECORDS` names, if it names one.
    pub fn new(set: Set, device: Properties, copy_bandwidth: f64) -> Self {
        let path = env::var_os("LORAMUX_BENCH_RECORDS").map(PathBuf::from);
        Self { set, device, copy_bandwidth, records: Vec::new(), path }
    }

    /// Adds a case, prints it and writes the file anew: what ends a run early leaves the rest.
    pub fn add(&mut self, model: &Model, case: Case, outcome: Outcome) -> io::Result<()> {
        let (counts, prediction) = (Counts::of(model, &case), Prediction::of(model, &case));
        self.records.push(Record { model: model.name, case, counts, prediction, outcome });
        self.print(self.records.last().expect("just added"));
        match &self.path {
            Some(path) => self.write(path),
            None => Ok(()),
        }
    }

    /// How many cases have failed.
    pub fn failures(&self) -> usize {
        self.records.iter().filter(|record| matches!(record.outcome, Outcome::Failed(_))).count()
    }

    fn write(&self, path: &Path) -> io::Result<()> {
        let results: Vec<_> = self.records.iter().map(|record| self.to_json(record)).collect();
        let report = json!({
            "bench": "model", "command": "cargo bench -p loramux-benches --bench model", "set": self.set.name(),
            "device": self.device.name, "commit": commit(), "copy_bytes_per_second": self.copy_bandwidth,
            "peak_flops": peak(&self.device.name), "predictions_are_for": DEVICE, "results": results,
        });
        fs::write(path, serde_json::to_string_pretty(&report)? + "\n")
    }

    fn floor(&self, record: &Record) -> f64 {
        record.counts.floor(self.copy_bandwidth, peak(&self.device.name))
    }

    /// Its time over that of the same step of a model without memory for adapters.
    fn over_none(&self, record: &Record, seconds: f64) -> Option<f64> {
        let none = Case { adapters: Adapters::Absent, ..record.case };
        let same = |other: &&Record| other.model == record.model && other.case == none;
        Some(seconds / self.records.iter().find(same)?.outcome.times()?.medians()[0])
    }

    fn to_json(&self, record: &Record) -> Value {
        let Record { model, case, counts, prediction, outcome } = record;
        let mut value = case_to_json(case);
        let mut add = |more: Value| {
            let (Value::Object(value), Value::Object(more)) = (&mut value, more) else {
                unreachable!("both are objects");
            };
            value.extend(more);
        };
        add(json!({
            "model": model, "rows": case.step.rows(),
            "bytes": {
                "all": counts.bytes(), "weights": counts.weights, "lm_head": counts.lm_head,
                "adapters": counts.adapters, "cache": counts.cache, "ends": counts.ends,
            },
            "flops": counts.flops, "floor_ms": self.floor(record) * 1e3,
            "predicted_ms": prediction.seconds() * 1e3, "predicted_shares_ms": shares_to_json(&prediction.shares),
            "counted_launches_per_block": prediction.launches_per_block(),
        }));
        add(match outcome {
            Outcome::LeftOut(reason) => json!({ "left_out": reason }),
            Outcome::Failed(reason) => json!({ "error": reason }),
            Outcome::Timed(times) => {
                let [queued, alone] = times.medians();
                json!({
                    "median_ms": queued * 1e3, "rounds": times.queued.len(),
                    "least_ms": times.queued.iter().copied().fold(f64::INFINITY, f64::min) * 1e3,
                    "latency_ms": alone * 1e3, "tokens_per_second": case.step.rows() as f64 / queued,
                    "share_of_floor": self.floor(record) / queued, "over_none": self.over_none(record, queued),
                    "traced_shares_ms": shares_to_json(&times.shares),
                    "traced_launches_of_blocks": launches_of_blocks(&times.shares),
                })
            }
        });
        value
    }

    /// The table's first lines.
    pub fn print_header(&self) {
        println!(
            "{}: copies move {:.2} TB/s; predictions are for an {DEVICE}",
            self.device.name,
            self.copy_bandwidth / 1e12
        );
        println!(
            "{:13} {:7} {:>4} {:>5} {:9} {:>9} {:>9} {:>9} {:>6} {:>9} {:>9} {:>10}",
            "model",
            "step",
            "seqs",
            "ctx",
            "adapters",
            "ms",
            "latency",
            "floor",
            "share",
            "over none",
            "predicted",
            "tokens/s"
        );
    }

    fn print(&self, record: &Record) {
        let Record { model, case, prediction, outcome, .. } = record;
        let (step, adapters) = (case.step, case.adapters.name());
        print!("{model:13} {:7} {:>4} {:>5} {adapters:9} ", step.name(), step.sequences(), step.context());
        match outcome {
            Outcome::LeftOut(reason) => println!("left out: {reason}"),
            Outcome::Failed(reason) => println!("failed: {reason}"),
            Outcome::Timed(times) => {
                let [queued, alone] = times.medians();
                let floor = self.floor(record);
                let over_none =
                    self.over_none(record, queued).map_or(String::new(), |over| format!("{over:.3}"));
                println!(
                    "{:>9.3} {:>9.3} {:>9.3} {:>5.0}% {over_none:>9} {:>9.3} {:>10.0}",
                    queued * 1e3,
                    alone * 1e3,
                    floor * 1e3,
                    100.0 * floor / queued,
                    prediction.seconds() * 1e3,
                    step.rows() as f64 / queued
                );
            }
        }
    }
}

fn shares_to_json(shares: &[Share]) -> Value {
    let entry = |share: &Share| (share.class.name().to_owned(), json!(share.seconds * 1e3));
    Value::Object(shares.iter().map(entry).collect())
}
