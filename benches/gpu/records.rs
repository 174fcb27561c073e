//! The measured cases: beside their floors and predictions, as JSON and as a table.

use std::path::{Path, PathBuf};
use std::{env, fs, io};

use loramux::backend::cuda::Properties;
use serde_json::{Value, json};

use super::cases::{Case, Mix, Part, Set};
use super::counts::Counts;
use super::device::{median, peak};
use super::prediction::{self, predict};
use crate::commit;

struct Record {
    case: Case,
    counts: Counts,
    median: f64,
    least: f64,
    samples: usize,
}

/// All that a run has measured so far.
pub struct Records {
    set: Set,
    device: Properties,
    /// Copies of the layers that the launches rotate through.
    layers: usize,
    copy_bandwidth: f64,
    records: Vec<Record>,
    path: Option<PathBuf>,
}

impl Records {
    /// Written to the file that `LORAMUX_BENCH_RECORDS` names, if it names one.
    pub fn new(set: Set, device: Properties, layers: usize, copy_bandwidth: f64) -> Self {
        let path = env::var_os("LORAMUX_BENCH_RECORDS").map(PathBuf::from);
        Self { set, device, layers, copy_bandwidth, records: Vec::new(), path }
    }

    /// Adds a case by the seconds of its runs, and writes the file anew: what ends a run early leaves the rest.
    pub fn add(&mut self, case: Case, mut seconds: Vec<f64>) -> io::Result<()> {
        if seconds.is_empty() {
            return Ok(());
        }
        let median = median(&mut seconds);
        let counts = Counts::of(&case);
        self.records.push(Record { case, counts, median, least: seconds[0], samples: seconds.len() });
        match &self.path {
            Some(path) => self.write(path),
            None => Ok(()),
        }
    }

    fn write(&self, path: &Path) -> io::Result<()> {
        let results: Vec<_> = self.records.iter().map(|record| self.to_json(record)).collect();
        let report = json!({
            "bench": "lora", "command": "cargo bench -p loramux-benches --bench lora", "set": self.set.name(),
            "device": self.device.name, "multiprocessors": self.device.multiprocessors,
            "l2_bytes": self.device.l2_bytes, "commit": commit(), "shapes": self.set.shapes().name,
            "layers": self.layers, "copy_bytes_per_second": self.copy_bandwidth, "peak_flops": peak(&self.device.name),
            "predictions_are_for": prediction::DEVICE, "results": results,
        });
        fs::write(path, serde_json::to_string_pretty(&report)? + "\n")
    }

    fn floor(&self, record: &Record) -> f64 {
        record.counts.floor(self.copy_bandwidth, peak(&self.device.name))
    }

    /// Its time over that of the same product without adapters.
    fn over_none(&self, record: &Record) -> Option<f64> {
        let same = |other: &&Record| {
            other.case.mix == Mix::None
                && other.case.target == record.case.target
                && other.case.batch.rows == record.case.batch.rows
        };
        let none = self.records.iter().find(same)?;
        (record.case.part == Part::Whole).then(|| record.median / none.median)
    }

    fn to_json(&self, record: &Record) -> Value {
        let Record { case, counts, .. } = record;
        let predicted = predict(case);
        json!({
            "target": case.target, "rows": case.batch.rows, "adapters": case.adapters(), "part": case.part.name(),
            "distinct_adapters": case.batch.segments.len(),
            "median_us": record.median * 1e6, "least_us": record.least * 1e6, "samples": record.samples,
            "bytes": {
                "all": counts.bytes(), "weights": counts.weights, "x": counts.x, "a": counts.a, "b": counts.b,
                "v": counts.v, "y": counts.y,
            },
            "base_flops": counts.base_flops, "rank_flops": counts.rank_flops,
            "floor_us": self.floor(record) * 1e6, "share_of_floor": self.floor(record) / record.median,
            "over_none": self.over_none(record),
            "predicted_us": predicted.seconds * 1e6, "predicted_limit": predicted.limit,
        })
    }

    pub fn print(&self) {
        println!(
            "\n{}: copies move {:.2} TB/s; {} layers in turn; predictions are for an {}",
            self.device.name,
            self.copy_bandwidth / 1e12,
            self.layers,
            prediction::DEVICE
        );
        println!(
            "{:8} {:>5} {:16} {:8} {:>10} {:>10} {:>6} {:>9} {:>10}",
            "target", "rows", "adapters", "part", "median µs", "floor µs", "share", "over none", "predicted"
        );
        for record in &self.records {
            let over_none = self.over_none(record).map_or(String::new(), |ratio| format!("{ratio:.3}"));
            println!(
                "{:8} {:>5} {:16} {:8} {:>10.1} {:>10.1} {:>5.0}% {over_none:>9} {:>10.1}",
                record.case.target,
                record.case.batch.rows,
                record.case.adapters(),
                record.case.part.name(),
                record.median * 1e6,
                self.floor(record) * 1e6,
                100.0 * self.floor(record) / record.median,
                predict(&record.case).seconds * 1e6
            );
        }
    }
}
