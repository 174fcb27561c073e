//! The flags that every command with an engine shares, and the engine they describe.

use std::collections::HashSet;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;

use super::{Failure, Verbosity};
use crate::adapter::peft::validate_adapter_name;
#[cfg(not(feature = "cuda"))]
use crate::engine::EngineError;
use crate::engine::{Device, Engine, EngineOptions};
use crate::model::{Base, Checkpoint};
use crate::tensor::DType;

/// Where a model is to run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum DeviceArg {
    Auto,
    Cpu,
    /// By the driver's number.
    Cuda(usize),
}

impl FromStr for DeviceArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let number =
            |text: &str| text.parse().ok().filter(|_| text.bytes().all(|byte| byte.is_ascii_digit()));
        match (text, text.strip_prefix("cuda:").and_then(number)) {
            ("auto", _) => Ok(DeviceArg::Auto),
            ("cpu", _) => Ok(DeviceArg::Cpu),
            ("cuda", _) => Ok(DeviceArg::Cuda(0)),
            (_, Some(ordinal)) => Ok(DeviceArg::Cuda(ordinal)),
            _ => Err("wanted auto, cpu, cuda or cuda:N".to_owned()),
        }
    }
}

impl DeviceArg {
    /// The device to run on. `auto` is the first GPU that this build has kernels for, else the CPU.
    ///
    /// # Errors
    /// When the one that is asked for cannot run a model: the first of what is missing.
    pub fn choose(self) -> Result<Device, Failure> {
        match self {
            Self::Cpu => Ok(Device::Cpu),
            Self::Auto => Ok(if why_not_cuda(0).is_none() { Device::Cuda(0) } else { Device::Cpu }),
            Self::Cuda(ordinal) => match why_not_cuda(ordinal) {
                None => Ok(Device::Cuda(ordinal)),
                Some(reason) => {
                    Err(Failure::usage(format!("--device cuda:{ordinal}: {reason}; use `cpu` or `auto`")))
                }
            },
        }
    }
}

/// The type of weights and activations on a GPU, by vLLM's names.
#[derive(clap::ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum DTypeArg {
    Auto,
    Bfloat16,
    Float16,
    Float32,
}

impl DTypeArg {
    pub fn dtype(self) -> Option<DType> {
        match self {
            Self::Auto => None,
            Self::Bfloat16 => Some(DType::BF16),
            Self::Float16 => Some(DType::F16),
            Self::Float32 => Some(DType::F32),
        }
    }
}

/// Why a model cannot run on this CUDA device: the first of what is missing.
#[cfg(feature = "cuda")]
fn why_not_cuda(ordinal: usize) -> Option<String> {
    let error = crate::backend::cuda::Device::open(ordinal).err()?;
    error.end_process_if_lost();
    Some(error.to_string())
}

#[cfg(not(feature = "cuda"))]
fn why_not_cuda(_ordinal: usize) -> Option<String> {
    Some(EngineError::WithoutCuda.to_string())
}

/// An adapter to serve.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct LoraModule {
    pub name: String,
    pub path: PathBuf,
}

/// `name=path` of an adapter, or several with spaces between them, as an environment variable holds them. A path may
/// have spaces: only what looks like `name=` begins the next adapter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct LoraModules(pub Vec<LoraModule>);

impl LoraModules {
    pub fn iter(&self) -> impl Iterator<Item = &LoraModule> {
        self.0.iter()
    }
}

impl FromStr for LoraModules {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut modules: Vec<(&str, String)> = Vec::new();
        for word in text.split(' ') {
            match (word.split_once('='), modules.last_mut()) {
                (Some((name, path)), _) => modules.push((name, path.to_owned())),
                (None, Some((_, path))) => path.extend([" ", word]),
                (None, None) => return Err("wanted NAME=PATH".to_owned()),
            }
        }
        let modules = modules.into_iter().map(|(name, path)| match path.trim_end() {
            "" => Err("wanted NAME=PATH, got no path".to_owned()),
            path => Ok(LoraModule { name: name.to_owned(), path: path.into() }),
        });
        modules.collect::<Result<_, _>>().map(Self)
    }
}

/// Bounds and sizes of the engine.
#[derive(clap::Args, Clone, Debug)]
pub(crate) struct EngineArgs {
    /// Where to run: auto, cpu, cuda or cuda:N
    #[arg(long, env = "LORAMUX_DEVICE", default_value = "auto", value_name = "DEVICE")]
    device: DeviceArg,
    /// Type of weights and activations on a GPU; auto is float16 for weights stored in it, else bfloat16
    #[arg(
        long,
        env = "LORAMUX_DTYPE",
        value_enum,
        hide_possible_values = true,
        default_value = "auto",
        value_name = "auto|bfloat16|float16"
    )]
    dtype: DTypeArg,
    /// Threads of the CPU backend [default: all cores]
    #[arg(long, env = "LORAMUX_THREADS", value_name = "N")]
    threads: Option<usize>,
    /// Most sequences in one step
    #[arg(long, env = "LORAMUX_MAX_NUM_SEQS", default_value_t = EngineOptions::default().max_num_seqs, value_name = "N")]
    max_num_seqs: usize,
    /// Most rows (tokens) in one step; longer prompts run in pieces [default: 512; on a GPU 2048]
    #[arg(long, env = "LORAMUX_MAX_NUM_BATCHED_TOKENS", value_name = "N")]
    max_num_batched_tokens: Option<usize>,
    /// Most tokens of a prompt and its continuation [default: the model's context]
    #[arg(long, env = "LORAMUX_MAX_MODEL_LEN", value_name = "N")]
    max_model_len: Option<usize>,
    /// Most distinct adapters in one step, and in GPU memory [default: no bound; on a GPU 64]
    #[arg(long, env = "LORAMUX_MAX_LORAS", value_name = "N")]
    max_loras: Option<usize>,
    /// Most adapters that are loaded; those beyond --max-loras wait in host memory [default: no bound]
    #[arg(long, env = "LORAMUX_MAX_CPU_LORAS", value_name = "N")]
    max_cpu_loras: Option<usize>,
    /// Largest rank of an adapter [default: 512; on a GPU 64]
    #[arg(long, env = "LORAMUX_MAX_LORA_RANK", value_name = "N")]
    max_lora_rank: Option<usize>,
    /// Share of a GPU's memory to use, 0 to 1
    #[arg(long, env = "LORAMUX_GPU_MEMORY_UTILIZATION", default_value_t = EngineOptions::default().gpu_memory_utilization, value_name = "SHARE")]
    gpu_memory_utilization: f32,
    /// Memory for the KV cache, in bytes [default: 4 GiB; on a GPU what is left of its share]
    #[arg(long, env = "LORAMUX_KV_CACHE_MEMORY_BYTES", value_name = "BYTES")]
    kv_cache_memory_bytes: Option<usize>,
    /// Seed of requests that bring none
    #[arg(long, env = "LORAMUX_SEED", default_value_t = 0, value_name = "N")]
    seed: u64,
}

impl EngineArgs {
    /// Threads of the CPU backend, where the user said how many.
    pub fn threads(&self) -> Option<usize> {
        self.threads
    }

    /// The options of an engine.
    ///
    /// # Errors
    /// When the model cannot run where it is asked to.
    pub fn options(&self) -> Result<EngineOptions, Failure> {
        let usual = EngineOptions::on(self.device.choose()?);
        Ok(EngineOptions {
            device: usual.device,
            dtype: self.dtype.dtype(),
            threads: self.threads,
            max_num_seqs: self.max_num_seqs,
            max_num_batched_tokens: self.max_num_batched_tokens.unwrap_or(usual.max_num_batched_tokens),
            max_model_len: self.max_model_len,
            max_loras: self.max_loras,
            max_cpu_loras: self.max_cpu_loras,
            gpu_memory_utilization: self.gpu_memory_utilization,
            max_lora_rank: self.max_lora_rank.unwrap_or(usual.max_lora_rank),
            kv_cache_bytes: self.kv_cache_memory_bytes,
            seed: self.seed,
        })
    }
}

/// The base and the adapters that are served.
#[derive(clap::Args, Clone, Debug)]
pub(crate) struct ModelArgs {
    /// Hugging Face folder of the base model
    #[arg(long, env = "LORAMUX_MODEL", value_name = "DIR")]
    pub model: PathBuf,
    /// Names that requests may call the base by [default: the folder's name]
    #[arg(long, env = "LORAMUX_SERVED_MODEL_NAME", num_args = 1.., value_delimiter = ' ', value_name = "NAME")]
    pub served_model_name: Vec<String>,
    /// Adapters to serve, each a PEFT folder under a name
    #[arg(long, env = "LORAMUX_LORA_MODULES", num_args = 1.., value_name = "NAME=DIR")]
    pub lora_modules: Vec<LoraModules>,
    #[command(flatten)]
    pub engine: EngineArgs,
}

/// What weights are stored in, where some are not in the type that a GPU computes with.
fn rounded_from(checkpoint: &Checkpoint, computed: DType) -> Option<DType> {
    let sites = 0..checkpoint.sites().table.len();
    let stored = |site| checkpoint.site_weight(site).ok().map(|weight| weight.dtype());
    sites.filter_map(stored).find(|&dtype| dtype != computed)
}

/// An adapter that was asked for and is not there.
pub(crate) struct FailedAdapter {
    pub name: String,
    pub reason: String,
}

impl ModelArgs {
    /// Opens the base and starts an engine with all adapters that can be loaded.
    pub fn start(&self, verbosity: Verbosity) -> Result<(Engine, Vec<FailedAdapter>), Failure> {
        let options = self.engine.options()?;
        let base = Base::open(&self.model).map_err(Failure::usage)?;
        for name in base.checkpoint.unused() {
            if verbosity.details() {
                eprintln!("note: {}: tensor `{name}` is not used", self.model.display());
            }
        }
        self.check_names(&base.name)?;
        if let Device::Cuda(_) = options.device {
            let dtype = options.gpu_dtype(&base.checkpoint);
            if let Some(stored) = rounded_from(&base.checkpoint, dtype) {
                let model = self.model.display();
                eprintln!("note: {model}: weights in {stored} are rounded to {dtype} on the GPU");
            }
        }
        let engine = Engine::start(Arc::new(base), options).map_err(Failure::usage)?;
        let mut failed = Vec::new();
        for module in self.modules() {
            match engine.load_adapter(&module.name, &module.path) {
                Ok(adapter) if verbosity.details() => {
                    eprintln!("adapter {}: {} sites, {}", module.name, adapter.sites, adapter.hash);
                }
                Ok(_) => {}
                Err(error) => {
                    // One bad adapter is no reason to leave the others' requests unanswered.
                    eprintln!("error: adapter `{}` is not served: {error}", module.name);
                    failed.push(FailedAdapter { name: module.name.clone(), reason: error.to_string() });
                }
            }
        }
        Ok((engine, failed))
    }

    /// All adapters that are asked for.
    fn modules(&self) -> impl Iterator<Item = &LoraModule> {
        self.lora_modules.iter().flat_map(LoraModules::iter)
    }

    /// Refuses names that cannot be served, or are given twice.
    fn check_names(&self, base: &str) -> Result<(), Failure> {
        let own = self.served_model_name.iter().map(String::as_str).chain([base]);
        let mut names = HashSet::new();
        for module in self.modules() {
            for base in own.clone() {
                validate_adapter_name(&module.name, base).map_err(Failure::usage)?;
            }
            if !names.insert(&module.name) {
                return Err(Failure::usage(format!("adapter name {:?} is given twice", module.name)));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Vec<(String, String)>, String> {
        let modules: LoraModules = text.parse()?;
        let pair = |module: LoraModule| (module.name, module.path.display().to_string());
        Ok(modules.0.into_iter().map(pair).collect())
    }

    #[test]
    fn a_device_is_named_by_its_kind_and_number() {
        for (text, device) in [
            ("auto", DeviceArg::Auto),
            ("cpu", DeviceArg::Cpu),
            ("cuda", DeviceArg::Cuda(0)),
            ("cuda:0", DeviceArg::Cuda(0)),
            ("cuda:12", DeviceArg::Cuda(12)),
        ] {
            assert_eq!(text.parse(), Ok(device));
        }
        for bad in ["", "cuda:", "cuda:+1", "cuda:-1", "cuda:1 ", "cuda1", "CPU", "cuda:99999999999999999999"]
        {
            assert!(bad.parse::<DeviceArg>().unwrap_err().contains("cuda:N"), "{bad:?}");
        }
    }

    #[test]
    fn a_list_of_adapters_may_have_spaces_in_its_paths() {
        let pairs = |pairs: &[(&str, &str)]| {
            Ok(pairs.iter().map(|(name, path)| ((*name).to_owned(), (*path).to_owned())).collect())
        };
        assert_eq!(parse("a=x"), pairs(&[("a", "x")]));
        assert_eq!(parse("a=/my files/x  b=y=z"), pairs(&[("a", "/my files/x"), ("b", "y=z")]));
        assert_eq!(parse("=x"), pairs(&[("", "x")]), "the name is checked with the base's");
        for bad in ["", "a", "a=", "a= b=x", " a=x"] {
            assert!(parse(bad).unwrap_err().contains("NAME=PATH"), "{bad:?}");
        }
    }
}
