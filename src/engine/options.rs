//! The engine's settings and what a request may ask of it.

use super::EngineError;
use super::request::Request;
#[cfg(feature = "cuda")]
use crate::backend::CHUNK;
use crate::backend::PAGE;
#[cfg(feature = "cuda")]
use crate::backend::cuda::MemoryOptions;
use crate::model::{Checkpoint, ModelConfig};
use crate::tensor::DType;

/// Adapters on a GPU where nothing is said.
#[cfg(feature = "cuda")]
const ADAPTERS_ON_GPU: usize = 64;

/// Memory of a KV cache on the CPU where nothing is said.
const CPU_CACHE_BYTES: usize = 4 << 30;

/// Where an engine runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Device {
    Cpu,
    /// By the driver's number.
    Cuda(usize),
}

/// Bounds and sizes of an engine. Names follow vLLM's flags.
#[derive(Clone, Debug, PartialEq)]
pub struct EngineOptions {
    pub device: Device,
    /// The type of weights, adapters and activations on a GPU; `None` takes F16 where all weights are stored in it, else
    /// BF16. The CPU computes in F32 and has no choice.
    pub dtype: Option<DType>,
    /// Threads of the CPU backend; `None` takes all cores.
    pub threads: Option<usize>,
    /// Most sequences in one step.
    pub max_num_seqs: usize,
    /// Most rows in one step: a longer prompt runs in pieces.
    pub max_num_batched_tokens: usize,
    /// Most tokens of a prompt and its continuation; `None` takes the model's own context length, cut to what the cache
    /// can hold.
    pub max_model_len: Option<usize>,
    /// Most distinct adapters in one step, and so in a GPU's memory; `None` sets no bound on the CPU, and 64 on a GPU.
    pub max_loras: Option<usize>,
    /// Most adapters that are loaded, on whatever side; `None` sets no bound.
    pub max_cpu_loras: Option<usize>,
    /// Share of a GPU's memory that the engine may take, 0 to 1.
    pub gpu_memory_utilization: f32,
    /// Largest rank of an adapter at any site.
    pub max_lora_rank: usize,
    /// Memory for the KV cache, in bytes. On the CPU pages take memory when they are first used, and `None` means 4 GiB;
    /// on a GPU `None` means what is left of its share.
    pub kv_cache_bytes: Option<usize>,
    /// Seed of requests that bring none.
    pub seed: u64,
}

impl Default for EngineOptions {
    fn default() -> Self {
        Self {
            device: Device::Cpu,
            dtype: None,
            threads: None,
            max_num_seqs: 256,
            max_num_batched_tokens: 512,
            max_model_len: None,
            max_loras: None,
            max_cpu_loras: None,
            gpu_memory_utilization: 0.9,
            max_lora_rank: 512,
            kv_cache_bytes: None,
            seed: 0,
        }
    }
}

impl EngineOptions {
    /// What is usual on a device: on a GPU steps of more rows, which it needs to be busy, and smaller ranks, since room
    /// for `max_loras` adapters of the largest is taken at once.
    pub fn on(device: Device) -> Self {
        let cpu = Self::default();
        match device {
            Device::Cpu => cpu,
            Device::Cuda(_) => Self { device, max_num_batched_tokens: 2048, max_lora_rank: 64, ..cpu },
        }
    }

    /// # Errors
    /// Naming the option that is out of range.
    pub fn check(&self, config: &ModelConfig) -> Result<(), EngineError> {
        let positive = |option, value: usize| match value {
            0 => Err(EngineError::Option { option, found: "0".to_owned(), wanted: "at least 1".to_owned() }),
            _ => Ok(()),
        };
        let wanted = match (self.device, self.dtype) {
            (_, None) | (Device::Cuda(_), Some(DType::BF16 | DType::F16)) => None,
            (Device::Cuda(_), Some(DType::F32)) => {
                Some("auto, bfloat16 or float16: GPUs have 16-bit kernels only")
            }
            (Device::Cpu, Some(_)) => Some("auto: the CPU computes in float32 on weights as they are stored"),
        };
        if let (Some(dtype), Some(wanted)) = (self.dtype, wanted) {
            let found = match dtype {
                DType::F32 => "float32",
                DType::F16 => "float16",
                DType::BF16 => "bfloat16",
            };
            let (found, wanted) = (found.to_owned(), wanted.to_owned());
            return Err(EngineError::Option { option: "dtype", found, wanted });
        }
        positive("max-num-seqs", self.max_num_seqs)?;
        positive("max-num-batched-tokens", self.max_num_batched_tokens)?;
        positive("max-loras", self.max_loras.unwrap_or(1))?;
        positive("max-cpu-loras", self.max_cpu_loras.unwrap_or(1))?;
        positive("max-lora-rank", self.max_lora_rank)?;
        positive("threads", self.threads.unwrap_or(1))?;
        positive("max-model-len", self.max_model_len.unwrap_or(1))?;
        let share = self.gpu_memory_utilization;
        if !(share > 0.0 && share <= 1.0) {
            return Err(EngineError::Option {
                option: "gpu-memory-utilization",
                found: share.to_string(),
                wanted: "more than 0, at most 1".to_owned(),
            });
        }
        let context = config.max_position_embeddings;
        match self.max_model_len {
            Some(wanted) if wanted > context => Err(EngineError::Option {
                option: "max-model-len",
                found: wanted.to_string(),
                wanted: format!("at most {context}, the model's context"),
            }),
            _ => Ok(()),
        }
    }

    /// The type of weights, adapters and activations on a GPU.
    pub fn gpu_dtype(&self, checkpoint: &Checkpoint) -> DType {
        let is_f16 = |site| checkpoint.site_weight(site).is_ok_and(|weight| weight.dtype() == DType::F16);
        let stored =
            || if (0..checkpoint.sites().table.len()).all(is_f16) { DType::F16 } else { DType::BF16 };
        self.dtype.unwrap_or_else(stored)
    }

    /// What a GPU's memory is divided by: room for `max_loras` adapters of the largest rank where that is given, else for
    /// 64 of rank 16, or fewer of larger ranks.
    #[cfg(feature = "cuda")]
    pub(super) fn cuda_memory(&self) -> MemoryOptions {
        let of_adapter = self.max_lora_rank.div_ceil(CHUNK);
        let (seats, chunks) = match self.max_loras {
            Some(seats) => (seats, seats * of_adapter),
            None => (ADAPTERS_ON_GPU, ADAPTERS_ON_GPU.max(of_adapter)),
        };
        MemoryOptions {
            utilization: self.gpu_memory_utilization,
            seats,
            max_rank: self.max_lora_rank,
            chunks,
        }
    }

    /// Pages of a KV cache with elements of `element_bytes`: as many as the memory holds, `room` bytes where the backend
    /// says so, but no more than all sequences can fill.
    ///
    /// # Errors
    /// When that is not even a page, or less than a sequence of the wanted length takes.
    pub(crate) fn cache_pages(
        &self,
        config: &ModelConfig,
        element_bytes: usize,
        room: Option<usize>,
    ) -> Result<usize, EngineError> {
        let bytes = self.kv_cache_bytes.or(room).unwrap_or(CPU_CACHE_BYTES);
        let page = config.num_layers * 2 * config.num_kv_heads * config.head_dim * PAGE * element_bytes;
        let pages = bytes / page;
        // Where nothing was said, the GPU's share is what the cache has to do with.
        if self.kv_cache_bytes.is_none()
            && room.is_some()
            && pages < self.max_model_len.unwrap_or(1).div_ceil(PAGE)
        {
            return Err(EngineError::Option {
                option: "gpu-memory-utilization",
                found: self.gpu_memory_utilization.to_string(),
                wanted: format!(
                    "more, or other options smaller: weights, adapters and steps leave {bytes} bytes for the KV cache, \
                     of which {PAGE} tokens take {page}"
                ),
            });
        }
        if pages == 0 {
            return Err(EngineError::Option {
                option: "kv-cache-memory-bytes",
                found: bytes.to_string(),
                wanted: format!("at least {page}, one page of {PAGE} tokens"),
            });
        }
        if let Some(wanted) = self.max_model_len
            && wanted > pages * PAGE
        {
            return Err(EngineError::Option {
                option: "max-model-len",
                found: wanted.to_string(),
                wanted: format!("at most {}, the tokens that a cache of {bytes} bytes holds", pages * PAGE),
            });
        }
        let useful = self.max_num_seqs.saturating_mul(self.most_positions(config).div_ceil(PAGE));
        Ok(pages.min(useful))
    }

    /// Most tokens of a prompt and its continuation, before the cache is made.
    pub(crate) fn most_positions(&self, config: &ModelConfig) -> usize {
        self.max_model_len.unwrap_or(config.max_position_embeddings)
    }
}

/// Refuses a request that the engine cannot run, naming the field.
pub(super) fn check_request(
    request: &Request,
    vocab_size: usize,
    max_model_len: usize,
) -> Result<(), EngineError> {
    let refuse = |field, found: String, wanted: String| Err(EngineError::Request { field, found, wanted });
    let within = |field, value: f32, range: std::ops::RangeInclusive<f32>| {
        if range.contains(&value) {
            return Ok(());
        }
        refuse(field, value.to_string(), format!("{} to {}", range.start(), range.end()))
    };
    let prompt = request.prompt.len();
    if prompt == 0 || prompt >= max_model_len {
        return refuse("prompt", format!("{prompt} tokens"), format!("1 to {} tokens", max_model_len - 1));
    }
    let tokens = [&request.prompt, &request.stop.stop_token_ids].into_iter().flatten();
    if let Some(token) = tokens
        .chain(request.sampling.logit_bias.iter().map(|(token, _)| token))
        .find(|&&token| token as usize >= vocab_size)
    {
        return refuse("token id", token.to_string(), format!("below {vocab_size}, the vocabulary's size"));
    }
    if request.n == 0 {
        return refuse("n", "0".to_owned(), "at least 1".to_owned());
    }
    if request.stop.max_tokens == Some(0) {
        return refuse("max_tokens", "0".to_owned(), "at least 1".to_owned());
    }
    if request.stop.stop.iter().any(String::is_empty) {
        return refuse("stop", "an empty string".to_owned(), "strings of at least one character".to_owned());
    }
    let sampling = &request.sampling;
    within("temperature", sampling.temperature, 0.0..=f32::MAX)?;
    within("min_p", sampling.min_p, 0.0..=1.0)?;
    within("top_p", sampling.top_p, f32::MIN_POSITIVE..=1.0)?;
    within("repetition_penalty", sampling.repetition_penalty, f32::MIN_POSITIVE..=f32::MAX)?;
    within("presence_penalty", sampling.presence_penalty, f32::MIN..=f32::MAX)?;
    within("frequency_penalty", sampling.frequency_penalty, f32::MIN..=f32::MAX)?;
    if sampling.top_k == Some(0) {
        return refuse("top_k", "0".to_owned(), "at least 1".to_owned());
    }
    for (_, bias) in &sampling.logit_bias {
        within("logit_bias", *bias, f32::MIN..=f32::MAX)?;
    }
    Ok(())
}
