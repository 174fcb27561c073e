//! Golden training traces as they lie in `tests/golden/<family>`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use loramux::adapter::Adapter;
use loramux::adapter::SiteKind;
use loramux::adapter::peft::{Limits, read_adapter};
use loramux::backend::training::{AdamW, PairValues};
use loramux::format::safetensors::SafetensorsFile;
use loramux::model::Base;
use serde_json::Value;

use crate::common::{FAMILIES, ids, repository};

/// A base and the jobs that were trained on it.
pub struct Case {
    pub family: String,
    pub base: Base,
    pub jobs: Vec<Job>,
}

/// One adapter in training.
pub struct Job {
    pub name: String,
    pub initial: Adapter,
    /// With the step 0.
    pub optimizer: AdamW,
    pub steps: Vec<Step>,
    pub gradients: Reference,
    pub weights: Reference,
}

/// The rows of an optimizer step, and what was found before the update.
pub struct Step {
    pub samples: Vec<Sample>,
    pub loss: f64,
    pub grad_norm: f64,
}

pub struct Sample {
    pub tokens: Vec<u32>,
    /// Per token; a token without one is not learned.
    pub labels: Vec<Option<u32>>,
}

/// Tensors of an adapter as the reference has them.
pub enum Reference {
    /// By module path and part.
    Whole(BTreeMap<String, Vec<f32>>),
    /// `[tensors, 8]`, tensors by name: products with the vectors of [`signs`].
    Projected(Vec<[f32; SIGNS]>),
}

pub const SIGNS: usize = 8;

/// Calls `test` with every case.
///
/// `LORAMUX_TRAINING_CASES` names a folder of cases to take instead of the repository's.
pub fn cases(test: impl Fn(&Case)) {
    let root = std::env::var_os("LORAMUX_TRAINING_CASES")
        .map_or_else(|| repository().join("tests/golden"), PathBuf::from);
    for family in FAMILIES {
        test(&Case::open(&root.join(family), family));
    }
}

impl Case {
    pub fn open(folder: &Path, family: &str) -> Self {
        let base = Base::open(&folder.join("model")).unwrap();
        let text = std::fs::read_to_string(folder.join("train.json")).unwrap();
        let jobs: Value = serde_json::from_str(&text).unwrap();
        let jobs: Vec<Job> =
            jobs.as_array().unwrap().iter().map(|job| Job::read(folder, &base, job)).collect();
        assert!(jobs.len() >= 3, "{family}: {} jobs", jobs.len());
        Self { family: family.to_owned(), base, jobs }
    }

    /// The tensors of an adapter by module path and part.
    pub fn tensors(&self, adapter: &Adapter, values: &[PairValues]) -> BTreeMap<String, Vec<f32>> {
        let mut tensors = BTreeMap::new();
        assert_eq!(adapter.sites.len(), values.len());
        for (adapted, values) in adapter.sites.iter().zip(values) {
            let site = self.base.checkpoint.sites().table.get(adapted.site);
            let [a, b] = match site.kind {
                SiteKind::Linear => ["lora_A.weight", "lora_B.weight"],
                SiteKind::Embedding => ["lora_embedding_A", "lora_embedding_B"],
            };
            let mut add = |part: &str, values: &[f32]| {
                tensors.insert(format!("{}.{part}", site.module), values.to_vec());
            };
            add(a, &values.a);
            add(b, &values.b);
            if adapted.magnitude.is_some() {
                add("lora_magnitude_vector.weight", &values.magnitude);
            }
        }
        tensors
    }
}

impl Job {
    fn read(folder: &Path, base: &Base, job: &Value) -> Self {
        let name = job["name"].as_str().unwrap();
        let whole = folder.join("train").join(name);
        let initial = if whole.exists() { whole.join("initial") } else { folder.join("adapters").join(name) };
        let sites = &base.checkpoint.sites().table;
        let initial = read_adapter(&initial, sites, &base.checkpoint, Limits { max_rank: 64 }).unwrap();
        let reference = |whole_file: &str, part: &str| {
            if whole.exists() {
                Reference::whole(&whole.join(whole_file))
            } else {
                Reference::projected(&folder.join("train.safetensors"), &format!("{name}.{part}"))
            }
        };
        let number = |field: &str| job[field].as_f64().unwrap();
        Self {
            name: name.to_owned(),
            initial,
            optimizer: AdamW {
                lr: number("lr"),
                lr_b: number("lr"),
                weight_decay: number("wd"),
                betas: [0, 1].map(|index| job["betas"][index].as_f64().unwrap()),
                eps: number("eps"),
                step: 0,
                gradient_scale: 1.0,
            },
            steps: job["steps"].as_array().unwrap().iter().map(Step::read).collect(),
            gradients: reference("first_step_gradients.safetensors", "gradients"),
            weights: reference("final/adapter_model.safetensors", "final"),
        }
    }
}

impl Step {
    fn read(step: &Value) -> Self {
        let label = |label: &Value| u32::try_from(label.as_i64().unwrap()).ok();
        let sample = |row: &Value| Sample {
            tokens: ids(&row["input_ids"]),
            labels: row["labels"].as_array().unwrap().iter().map(label).collect(),
        };
        Self {
            samples: step["rows"].as_array().unwrap().iter().map(sample).collect(),
            loss: step["loss"].as_f64().unwrap(),
            grad_norm: step["grad_norm"].as_f64().unwrap(),
        }
    }

    /// How many tokens are learned.
    pub fn labelled(&self) -> usize {
        self.samples.iter().map(|sample| sample.targets().count()).sum()
    }
}

impl Sample {
    /// Rows and the tokens that should follow them.
    pub fn targets(&self) -> impl Iterator<Item = (usize, u32)> {
        self.labels.iter().enumerate().skip(1).filter_map(|(index, label)| Some((index - 1, (*label)?)))
    }
}

impl Reference {
    fn whole(path: &Path) -> Self {
        let file = SafetensorsFile::open(path).unwrap();
        let module = |name: &str| name.strip_prefix("base_model.model.").unwrap_or(name).to_owned();
        Self::Whole(file.names().map(|name| (module(name), file.tensor(name).unwrap().to_f32())).collect())
    }

    fn projected(path: &Path, name: &str) -> Self {
        let tensor = SafetensorsFile::open(path).unwrap().tensor(name).unwrap();
        Self::Projected(tensor.to_f32().as_chunks().0.to_vec())
    }

    /// Calls `check(name, ours, differences)` for every tensor.
    pub fn compare(
        &self,
        tensors: &BTreeMap<String, Vec<f32>>,
        mut check: impl FnMut(&str, &[f32], Differences),
    ) {
        match self {
            Self::Whole(wanted) => {
                assert!(tensors.keys().eq(wanted.keys()), "the same tensors");
                for ((name, ours), wanted) in tensors.iter().zip(wanted.values()) {
                    assert_eq!(ours.len(), wanted.len(), "{name}");
                    let differences = ours.iter().zip(wanted).map(|(a, b)| f64::from(a - b));
                    check(name, ours, Differences::Elements(differences.collect()));
                }
            }
            Self::Projected(wanted) => {
                assert_eq!(tensors.len(), wanted.len(), "as many tensors");
                for ((name, ours), wanted) in tensors.iter().zip(wanted) {
                    let differences = project(ours).into_iter().zip(wanted).map(|(a, b)| a - f64::from(*b));
                    check(name, ours, Differences::Projections(differences.collect()));
                }
            }
        }
    }
}

/// How a tensor differs from its reference.
pub enum Differences {
    /// Of every element.
    Elements(Vec<f64>),
    /// Of the products with [`SIGNS`] vectors of signs.
    Projections(Vec<f64>),
}

impl Differences {
    /// Norm of the difference; from projections an estimate of it.
    pub fn norm(&self) -> f64 {
        let squares = |values: &[f64]| values.iter().map(|value| value * value).sum::<f64>();
        match self {
            Self::Elements(differences) => squares(differences).sqrt(),
            Self::Projections(differences) => (squares(differences) / SIGNS as f64).sqrt(),
        }
    }
}

/// Products with eight vectors of signs: bits 0 to 7 of splitmix64's numbers from 0 (Steele et al. 2014).
fn project(values: &[f32]) -> [f64; SIGNS] {
    let mut sums = [0.0; SIGNS];
    for (index, &value) in values.iter().enumerate() {
        let mut z = (index as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^= z >> 31;
        for (bit, sum) in sums.iter_mut().enumerate() {
            *sum += f64::from(value) * if z >> bit & 1 == 0 { 1.0 } else { -1.0 };
        }
    }
    sums
}
