//! `loramux plan`: how much memory a training run or an engine takes, before anything is loaded.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use serde_json::json;

use super::output::print;
use super::serving::LoraModules;
use super::{Failure, Outcome};
use crate::adapter::peft::{Limits, read_adapter, validate_adapter_name};
use crate::engine::EngineOptions;
use crate::model::{Checkpoint, ModelConfig};
use crate::train::config::RunConfig;
use crate::train::plan::{
    BaseShape, Estimate, Evaluation, Machine, ServedAdapter, Step, jobs, serving, training, verdict,
};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Configuration of a training run, of which no data is read; without, what serving --model takes
    #[arg(value_name = "CONFIG.toml", required_unless_present = "model")]
    config: Option<PathBuf>,
    /// Hugging Face folder of a base model to serve
    #[arg(long, env = "LORAMUX_MODEL", value_name = "DIR")]
    model: Option<PathBuf>,
    /// Adapters to serve, each a PEFT folder under a name
    #[arg(long, env = "LORAMUX_LORA_MODULES", num_args = 1.., value_name = "NAME=DIR")]
    lora_modules: Vec<LoraModules>,
    /// Largest rank of an adapter
    #[arg(long, env = "LORAMUX_MAX_LORA_RANK", default_value_t = EngineOptions::default().max_lora_rank, value_name = "N")]
    max_lora_rank: usize,
    /// Most sequences in one step
    #[arg(long, env = "LORAMUX_MAX_NUM_SEQS", default_value_t = EngineOptions::default().max_num_seqs, value_name = "N")]
    max_num_seqs: usize,
    /// Most rows (tokens) in one step
    #[arg(long, env = "LORAMUX_MAX_NUM_BATCHED_TOKENS", default_value_t = EngineOptions::default().max_num_batched_tokens, value_name = "N")]
    max_num_batched_tokens: usize,
    /// Most tokens of a prompt and its continuation [default: the model's context]
    #[arg(long, env = "LORAMUX_MAX_MODEL_LEN", value_name = "N")]
    max_model_len: Option<usize>,
    /// Memory for the KV cache, in bytes [default: 4 GiB]
    #[arg(long, env = "LORAMUX_KV_CACHE_MEMORY_BYTES", value_name = "BYTES")]
    kv_cache_memory_bytes: Option<usize>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args) -> Result<Outcome, Failure> {
    let (estimate, notes) = match (&args.config, &args.model) {
        (Some(config), _) => of_training(config)?,
        (None, Some(model)) => (of_serving(args, model)?, Vec::new()),
        (None, None) => return Err(Failure::usage("wanted CONFIG.toml or --model")),
    };
    let machine = Machine::this();
    let fits = machine.map(|machine| estimate.total() <= machine.total);
    for note in notes {
        eprintln!("note: {note}");
    }
    if args.json {
        let Estimate { items } = &estimate;
        let found = json!({"items": items, "total": estimate.total(), "machine": machine, "fits": fits});
        print(&format!("{found}\n"))?;
    } else {
        let verdict = verdict(&estimate, machine);
        print(&format!("{estimate}\n{verdict}\n"))?;
    }
    match fits {
        Some(false) => Err(Failure::Failed(verdict(&estimate, machine))),
        _ => Ok(Outcome::Done),
    }
}

fn open(model: &Path) -> Result<(BaseShape, Checkpoint), Failure> {
    let config = ModelConfig::read(model).map_err(Failure::usage)?;
    let checkpoint = Checkpoint::open(model, &config).map_err(Failure::usage)?;
    let shape = BaseShape::new(&config, &checkpoint).map_err(Failure::usage)?;
    Ok((shape, checkpoint))
}

fn of_training(path: &Path) -> Result<(Estimate, Vec<String>), Failure> {
    let (config, notes) = RunConfig::read(path).map_err(Failure::usage)?;
    let (base, checkpoint) = open(&config.model)?;
    let jobs = jobs(&config, &checkpoint).map_err(Failure::usage)?;
    let evaluation = Evaluation::of(&config, &base);
    let estimate = training(&base, Step::of(&config, &base), &jobs, evaluation).map_err(Failure::usage)?;
    Ok((estimate, notes))
}

fn of_serving(args: &Args, model: &Path) -> Result<Estimate, Failure> {
    let (base, checkpoint) = open(model)?;
    let options = EngineOptions {
        max_lora_rank: args.max_lora_rank,
        max_num_seqs: args.max_num_seqs,
        max_num_batched_tokens: args.max_num_batched_tokens,
        max_model_len: args.max_model_len,
        kv_cache_bytes: args.kv_cache_memory_bytes,
        ..EngineOptions::default()
    };
    let limits = Limits { max_rank: args.max_lora_rank };
    let mut names = HashSet::new();
    let mut adapters = Vec::new();
    for module in args.lora_modules.iter().flat_map(LoraModules::iter) {
        validate_adapter_name(&module.name, "").map_err(Failure::usage)?;
        if !names.insert(&module.name) {
            return Err(Failure::usage(format!("adapter name {:?} is given twice", module.name)));
        }
        let adapter =
            read_adapter(&module.path, &base.sites.table, &checkpoint, limits).map_err(Failure::usage)?;
        adapters.push(ServedAdapter::new(&module.name, &adapter));
    }
    serving(&base, &options, &adapters).map_err(Failure::usage)
}
