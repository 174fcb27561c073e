//! `loramux merge`: several adapters into one, or into the base's weights, with a look at the tasks on the way.

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

use super::output::print;
use super::serving::{DTypeArg, DeviceArg, LoraModule, LoraModules};
use super::tasks::{
    Column, EvaluationArgs, Matrix, Task, details_table, evaluate_all, matrix_table, outcome, read_tasks,
};
use super::{Failure, Outcome, Verbosity};
use crate::adapter::Adapter;
use crate::adapter::merge::{MergeOptions, Method, Part, merge_adapters};
use crate::adapter::peft::{Limits, WriteOptions, read_adapter, validate_adapter_name, write_adapter};
use crate::engine::{Engine, EngineOptions};
use crate::model::{Base, MergedBase};

/// The column of the base before anything is merged.
const BASE: &str = "base";

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Hugging Face folder of the base model
    #[arg(long, env = "LORAMUX_MODEL", value_name = "DIR")]
    model: PathBuf,
    /// Adapters to merge in this order, each a PEFT folder under a name
    #[arg(long, env = "LORAMUX_LORA_MODULES", num_args = 1.., required = true, value_name = "NAME=DIR")]
    lora_modules: Vec<LoraModules>,
    /// Weights of adapters; the others have 1
    #[arg(long, num_args = 1.., value_name = "NAME=NUMBER")]
    weights: Vec<Weight>,
    /// How several adapters become one, by PEFT's names: linear, cat, svd, ties, dare_linear (short dare), dare_ties,
    /// magnitude_prune; of the last four also with _svd
    #[arg(long, required_unless_present = "into_base", value_name = "METHOD")]
    method: Option<Method>,
    /// Rank of the result, with svd methods [default: the largest of the adapters']
    #[arg(long, requires = "method", value_name = "N")]
    rank: Option<usize>,
    /// Share of elements kept, with ties, dare and magnitude_prune methods [default: 0.5]
    #[arg(long, requires = "method", value_name = "SHARE")]
    density: Option<f64>,
    /// Of the elements that dare drops
    #[arg(long, default_value_t = 0, value_name = "N")]
    seed: u64,
    /// Merge into the base's weights and write a model: the adapters one after another, or what METHOD makes of them
    #[arg(long)]
    into_base: bool,
    /// Type to store a merged model in [default: as the base]
    #[arg(
        long,
        value_enum,
        requires = "into_base",
        hide_possible_values = true,
        value_name = "bfloat16|float16|float32"
    )]
    dtype: Option<DTypeArg>,
    /// Folder for the merged adapter or model, empty or absent
    #[arg(short, long, value_name = "DIR")]
    output: PathBuf,
    /// Folder of tasks to evaluate on after each adapter that is merged
    #[arg(long, env = "LORAMUX_TASKS", value_name = "DIR")]
    tasks: Option<PathBuf>,
    #[command(flatten)]
    evaluation: EvaluationArgs,
    /// Where to evaluate: auto, cpu, cuda or cuda:N
    #[arg(long, env = "LORAMUX_DEVICE", default_value = "auto", value_name = "DEVICE")]
    device: DeviceArg,
    /// Threads of the CPU backend in evaluation [default: all cores]
    #[arg(long, env = "LORAMUX_THREADS", value_name = "N")]
    threads: Option<usize>,
}

/// What an adapter counts.
#[derive(Clone, Debug, PartialEq)]
struct Weight {
    name: String,
    value: f64,
}

impl FromStr for Weight {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, value) = text.split_once('=').ok_or("wanted NAME=NUMBER")?;
        match value.parse() {
            Ok(value) if f64::is_finite(value) => Ok(Self { name: name.to_owned(), value }),
            _ => Err(format!("wanted NAME=NUMBER, got {value:?} for a number")),
        }
    }
}

pub(crate) fn run(args: &Args, verbosity: Verbosity) -> Result<Outcome, Failure> {
    let options = args.method.map(|method| {
        let Args { rank, density, seed, .. } = *args;
        MergeOptions { method, rank, density, seed }
    });
    if let Some(options) = &options {
        options.check().map_err(Failure::usage)?;
    }
    refuse_used(&args.output)?;
    let base = Arc::new(Base::open(&args.model).map_err(Failure::usage)?);
    let ingredients = args.read_ingredients(&base)?;
    let parts: Vec<Part<'_>> = ingredients.iter().map(Ingredient::part).collect();
    let tasks = match &args.tasks {
        Some(folder) => {
            read_tasks(folder, &args.evaluation, &base, base.config.max_position_embeddings, verbosity)?
        }
        None => Vec::new(),
    };
    let merge = Merge { args, options, base: &base, parts: &parts, tasks: &tasks, verbosity };
    if args.into_base { merge.make_model() } else { merge.make_adapter() }
}

/// An adapter to merge.
struct Ingredient {
    name: String,
    adapter: Adapter,
    weight: f64,
}

impl Ingredient {
    fn part(&self) -> Part<'_> {
        Part { name: &self.name, adapter: &self.adapter, weight: self.weight }
    }
}

impl Args {
    fn read_ingredients(&self, base: &Base) -> Result<Vec<Ingredient>, Failure> {
        let modules: Vec<&LoraModule> = self.lora_modules.iter().flat_map(|modules| &modules.0).collect();
        let mut names = HashSet::new();
        for module in &modules {
            validate_adapter_name(&module.name, &base.name).map_err(Failure::usage)?;
            if !names.insert(module.name.as_str()) {
                return Err(Failure::usage(format!("adapter name {:?} is given twice", module.name)));
            }
        }
        let mut weighted = HashSet::new();
        for Weight { name, .. } in &self.weights {
            if !names.contains(name.as_str()) {
                return Err(Failure::usage(format!(
                    "--weights names {name:?}, which --lora-modules does not"
                )));
            }
            if !weighted.insert(name) {
                return Err(Failure::usage(format!("--weights names {name:?} twice")));
            }
        }
        let read = |module: &&LoraModule| {
            // What a rank costs is known from the file's size already.
            let limits = Limits { max_rank: usize::MAX };
            let sites = &base.checkpoint.sites().table;
            let adapter =
                read_adapter(&module.path, sites, &base.checkpoint, limits).map_err(Failure::usage)?;
            let weight = self.weights.iter().find(|weight| weight.name == module.name);
            Ok(Ingredient {
                name: module.name.clone(),
                adapter,
                weight: weight.map_or(1.0, |weight| weight.value),
            })
        };
        modules.iter().map(read).collect()
    }
}

/// Refuses a folder with something in it, before any work is done.
fn refuse_used(output: &Path) -> Result<(), Failure> {
    let is_used = match fs::read_dir(output) {
        Ok(mut entries) => entries.next().is_some(),
        Err(_) => output.exists(),
    };
    if is_used {
        let output = output.display();
        return Err(Failure::usage(format!("{output}: not an empty folder; remove it or choose another")));
    }
    Ok(())
}

/// A merge with all that was asked for.
struct Merge<'a> {
    args: &'a Args,
    options: Option<MergeOptions>,
    base: &'a Arc<Base>,
    parts: &'a [Part<'a>],
    tasks: &'a [Task],
    verbosity: Verbosity,
}

impl Merge<'_> {
    /// The first adapters as one.
    fn adapter(&self, count: usize, options: &MergeOptions) -> Result<Adapter, Failure> {
        merge_adapters(&self.parts[..count], &self.base.checkpoint.sites().table, options)
            .map_err(Failure::usage)
    }

    /// Writes one adapter made of all.
    fn make_adapter(&self) -> Result<Outcome, Failure> {
        let Some(options) = &self.options else { return Ok(Outcome::Done) };
        let merged = self.adapter(self.parts.len(), options)?;
        let (sites, output) = (&self.base.checkpoint.sites().table, &self.args.output);
        write_adapter(output, &merged, sites, WriteOptions::default()).map_err(Failure::failed)?;
        if self.verbosity.talks() {
            let ranks = || merged.sites.iter().map(|adapted| adapted.rank);
            let (low, high) = (ranks().min().unwrap_or(0), ranks().max().unwrap_or(0));
            let rank = if low == high { format!("rank {low}") } else { format!("ranks {low} to {high}") };
            eprintln!("{}: an adapter of {} sites, {rank}", output.display(), merged.sites.len());
        }
        if self.tasks.is_empty() {
            return Ok(Outcome::Done);
        }
        // All stages are adapters of one engine, and run in one batch.
        let mut stages =
            (1..self.parts.len()).map(|count| self.adapter(count, options)).collect::<Result<Vec<_>, _>>()?;
        stages.push(merged);
        let largest = stages.iter().flat_map(|stage| stage.sites.iter().map(|adapted| adapted.rank)).max();
        let engine = self.engine(Arc::clone(self.base), largest)?;
        let titles = self.titles();
        for (stage, title) in stages.into_iter().zip(&titles[1..]) {
            engine.insert_adapter(title, stage).map_err(Failure::failed)?;
        }
        let adapter = |title: &str| titles[1..].iter().find(|other| **other == title).map(String::as_str);
        let columns: Vec<Column<'_>> =
            titles.iter().map(|title| Column { title, adapter: adapter(title) }).collect();
        self.print(&self.evaluate(&engine, &columns)?)
    }

    /// Writes the base with all adapters merged into it.
    fn make_model(&self) -> Result<Outcome, Failure> {
        let output = &self.args.output;
        let last = self.parts.len();
        if self.tasks.is_empty() {
            self.write_model(last, output)?;
            return Ok(Outcome::Done);
        }
        // Every stage is written and opened again: what is evaluated is what a merged model is worth.
        let mut matrix = self.evaluate_base(Arc::clone(self.base))?;
        for count in 1..=last {
            let scratch = (count < last).then(|| Scratch::beside(output)).transpose()?;
            let folder = scratch.as_ref().map_or(output.as_path(), |scratch| &scratch.0);
            self.write_model(count, folder)?;
            let stage = Arc::new(Base::open(folder).map_err(Failure::failed)?);
            for (row, stage) in matrix.iter_mut().zip(self.evaluate_base(stage)?) {
                row.extend(stage);
            }
        }
        self.print(&matrix)
    }

    /// Writes the base with the first adapters merged into it.
    fn write_model(&self, count: usize, folder: &Path) -> Result<(), Failure> {
        let one = self.options.as_ref().map(|options| self.adapter(count, options)).transpose()?;
        let mut merged = MergedBase::new(self.base);
        match (&one, self.args.method) {
            (Some(adapter), Some(method)) => merged.add(method.name(), adapter, 1.0),
            _ => self.parts[..count]
                .iter()
                .try_for_each(|part| merged.add(part.name, part.adapter, part.weight)),
        }
        .map_err(Failure::usage)?;
        let dtype = self.args.dtype.and_then(DTypeArg::dtype);
        merged.write(folder, dtype).map_err(Failure::failed)?;
        let is_result = folder == self.args.output;
        if is_result && self.verbosity.talks() {
            eprintln!("{}: a model with {count} adapters merged into it", folder.display());
            if merged.unties() {
                eprintln!(
                    "note: an adapter changes one end of the tied embeddings: embed_tokens and lm_head are stored each \
                     by itself, and config.json has `tie_word_embeddings` = false"
                );
            }
        }
        Ok(())
    }

    fn engine(&self, base: Arc<Base>, max_rank: Option<usize>) -> Result<Engine, Failure> {
        let usual = EngineOptions::on(self.args.device.choose()?);
        let max_lora_rank = max_rank.unwrap_or(usual.max_lora_rank);
        let options = EngineOptions { threads: self.args.threads, max_lora_rank, ..usual };
        Engine::start(base, options).map_err(Failure::usage)
    }

    fn evaluate(&self, engine: &Engine, columns: &[Column<'_>]) -> Result<Matrix, Failure> {
        let measures = self.args.evaluation.measures(self.verbosity.details());
        evaluate_all(engine, self.tasks, columns, |_, _| true, measures, self.verbosity)
    }

    /// A base alone.
    fn evaluate_base(&self, base: Arc<Base>) -> Result<Matrix, Failure> {
        self.evaluate(&self.engine(base, None)?, &[Column { title: BASE, adapter: None }])
    }

    /// The base, and what each adapter is added to it.
    fn titles(&self) -> Vec<String> {
        let added = self.parts.iter().map(|part| format!("+{}", part.name));
        std::iter::once(BASE.to_owned()).chain(added).collect()
    }

    fn print(&self, matrix: &Matrix) -> Result<Outcome, Failure> {
        let titles = self.titles();
        let titles: Vec<&str> = titles.iter().map(String::as_str).collect();
        print(&matrix_table(self.tasks, &titles, matrix).to_string())?;
        if self.verbosity.details() {
            print(&format!("\n{}", details_table(self.tasks, &titles, matrix)))?;
        }
        Ok(outcome(matrix))
    }
}

/// A folder that is gone when it is done with.
struct Scratch(PathBuf);

impl Scratch {
    /// A hidden one beside another, on the same disk.
    fn beside(output: &Path) -> Result<Self, Failure> {
        let name = output.file_name().ok_or_else(|| Failure::usage("--output has no name"))?;
        let name = format!(".{}.{}.stage", name.to_string_lossy(), std::process::id());
        Ok(Self(output.with_file_name(name)))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // A leftover harms nothing but the room it takes.
        fs::remove_dir_all(&self.0).ok();
    }
}
