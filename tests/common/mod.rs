//! Golden cases: what transformers and PEFT compute for small random models (see scripts/reference).
#![allow(dead_code, reason = "every test binary uses its own part")]

pub mod forward;
pub mod program;
pub mod traffic;
pub mod training;

use std::path::PathBuf;

use loramux::format::safetensors::SafetensorsFile;
use serde_json::Value;

pub const FAMILIES: [&str; 6] = ["llama", "llama-tied", "qwen2", "qwen3", "mistral", "phi3"];

/// Smaller cases for what the families' own leave out: longrope across its original context, partial rotation, yarn with
/// mscale, linear rope, windows of some layers, biases everywhere, 16-bit and sharded weights, uncommon adapters.
pub const VARIANTS: [&str; 5] = ["llama-linear", "llama-yarn", "phi3-su", "qwen2-windows", "qwen3-biases"];

/// Size of every case's vocabulary.
pub const VOCABULARY: usize = 512;

pub struct Case {
    pub folder: PathBuf,
    pub forward: Value,
    logits: SafetensorsFile,
}

impl Case {
    pub fn open(family: &str) -> Self {
        let folder = repository().join("tests/golden").join(family);
        let text = std::fs::read_to_string(folder.join("forward.json")).unwrap();
        let logits = SafetensorsFile::open(&folder.join("forward.safetensors")).unwrap();
        Self { forward: serde_json::from_str(&text).unwrap(), logits, folder }
    }

    pub fn model(&self) -> PathBuf {
        self.folder.join("model")
    }

    /// Adapter names, `base` (no adapter) first.
    pub fn adapters(&self) -> Vec<String> {
        let mut names: Vec<String> = self.forward["greedy"].as_object().unwrap().keys().cloned().collect();
        names.sort_by_key(|name| (name != "base", name.clone()));
        names
    }

    pub fn adapter_folder(&self, name: &str) -> PathBuf {
        self.folder.join("adapters").join(name)
    }

    pub fn prompts(&self) -> Vec<Vec<u32>> {
        self.forward["prompts"].as_array().unwrap().iter().map(ids).collect()
    }

    pub fn greedy(&self, adapter: &str, prompt: usize) -> Vec<u32> {
        ids(&self.forward["greedy"][adapter][prompt])
    }

    /// Logits `[rows, VOCABULARY]` of the last rows of a prompt, where the file keeps them.
    pub fn logits(&self, adapter: &str, prompt: usize) -> Option<Vec<f32>> {
        let name = format!("logits.{adapter}.{prompt}");
        self.logits.contains(&name).then(|| self.logits.tensor(&name).unwrap().to_f32())
    }
}

/// Where the repository is: `cargo` says so at run time too, and `scripts/gpu.sh` where tests run on another machine than
/// they were built on.
pub fn repository() -> PathBuf {
    std::env::var_os("CARGO_MANIFEST_DIR").map_or_else(|| env!("CARGO_MANIFEST_DIR").into(), PathBuf::from)
}

pub fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}
