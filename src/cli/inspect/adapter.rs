//! An adapter folder: what its configuration says, its pairs by site, and its tensors.
//!
//! With a base the folder is read as serving reads it. Without one the sites are taken from the tensors themselves, so
//! that everything is checked but whether the adapter fits its base; what is refused then is reported beside the
//! tensors, which are what one needs to see to find out why.

use std::collections::HashMap;
use std::fmt;
use std::path::Path;

use serde::Serialize;
use serde_json::Value;

use super::tensors::{Tensors, describe_dtypes, table};
use super::{last_component, ranges};
use crate::adapter::peft::{BaseWeights, CONFIG_FILE, Limits, WEIGHTS_FILE, read_adapter};
use crate::adapter::{Adapter, Site, SiteKind, SiteTable};
use crate::cli::Failure;
use crate::cli::output::{Align, Table, bytes};
use crate::format::read_json;
use crate::format::safetensors::SafetensorsFile;
use crate::model::Base;
use crate::tensor::Tensor;

/// PEFT's prefix of every tensor name.
const PREFIX: &str = "base_model.model.";
/// What begins the part of a tensor's name that follows its module.
const PARTS: [&str; 8] = [
    ".lora_A",
    ".lora_B",
    ".lora_embedding_A",
    ".lora_embedding_B",
    ".lora_magnitude_vector",
    ".modules_to_save",
    ".base_layer",
    ".original_module",
];

#[derive(Serialize)]
pub(super) struct AdapterReport {
    kind: &'static str,
    path: String,
    base_model_name_or_path: Option<String>,
    /// adapter_config.json as it is.
    config: Value,
    /// The base it was checked against.
    checked_against: Option<String>,
    /// Why it would not be served.
    pub refused: Option<String>,
    /// Identity of the content; null for an adapter that is refused.
    hash: Option<String>,
    /// Distinct ranks, ascending.
    ranks: Vec<usize>,
    sites: Vec<PairRow>,
    saved_modules: Vec<SavedRow>,
    saved_biases: Vec<SavedRow>,
    bytes: u64,
    #[serde(flatten)]
    tensors: Tensors,
}

/// Pairs that are alike, in the blocks that have them.
#[derive(Clone, PartialEq, Serialize)]
struct PairRow {
    name: String,
    /// Empty for a site outside the blocks.
    blocks: Vec<usize>,
    rank: usize,
    scale: f32,
    in_features: usize,
    out_features: usize,
    dtype: String,
    dora: bool,
    bias: bool,
}

/// A whole tensor that replaces the base's.
#[derive(Serialize)]
struct SavedRow {
    module: String,
    shape: Vec<usize>,
}

/// Reads an adapter folder, against a base if there is one.
pub(super) fn report(folder: &Path, base: Option<&Path>, limits: Limits) -> Result<AdapterReport, Failure> {
    let config = read_json(&folder.join(CONFIG_FILE)).map_err(Failure::failed)?;
    if let Some(base_folder) = base {
        let base = Base::open(base_folder).map_err(Failure::failed)?;
        let sites = &base.checkpoint.sites().table;
        let adapter = read_adapter(folder, sites, &base.checkpoint, limits).map_err(Failure::failed)?;
        let file = open(folder)?;
        return Ok(describe(folder, config, &file, Some(base_folder), Ok((adapter, sites))));
    }
    let file = open(folder)?;
    let sites = sites_of(&file);
    let adapter = read_adapter(folder, &sites, &Copies { file: &file, sites: &sites }, limits);
    let checked = adapter.map(|adapter| (adapter, &sites)).map_err(|error| error.to_string());
    Ok(describe(folder, config, &file, None, checked))
}

fn open(folder: &Path) -> Result<SafetensorsFile, Failure> {
    let path = folder.join(WEIGHTS_FILE);
    if !path.exists() {
        // The reader knows what to say about a folder with other files.
        let nothing = SiteTable::default();
        let weights = NoWeights;
        read_adapter(folder, &nothing, &weights, Limits { max_rank: usize::MAX }).map_err(Failure::failed)?;
    }
    SafetensorsFile::read(&path).map_err(Failure::failed)
}

fn describe(
    folder: &Path,
    config: Value,
    file: &SafetensorsFile,
    base: Option<&Path>,
    checked: Result<(Adapter, &SiteTable), String>,
) -> AdapterReport {
    let mut report = AdapterReport {
        kind: "adapter",
        path: folder.display().to_string(),
        base_model_name_or_path: config["base_model_name_or_path"].as_str().map(str::to_owned),
        config,
        checked_against: base.map(|base| base.display().to_string()),
        refused: None,
        hash: None,
        ranks: Vec::new(),
        sites: Vec::new(),
        saved_modules: Vec::new(),
        saved_biases: Vec::new(),
        bytes: file.file_len() as u64,
        tensors: Tensors::of(file),
    };
    match checked {
        Err(reason) => report.refused = Some(reason),
        Ok((adapter, sites)) => {
            report.sites = pairs(&adapter, sites);
            report.ranks = report.sites.iter().map(|pair| pair.rank).collect();
            report.ranks.sort_unstable();
            report.ranks.dedup();
            let row = |site: usize, shape: &[usize]| SavedRow {
                module: sites.get(site).module.clone(),
                shape: shape.to_vec(),
            };
            let modules = adapter.saved_modules.iter().map(|saved| row(saved.site, saved.weight.shape()));
            report.saved_modules = modules.collect();
            let biases = adapter.saved_biases.iter().map(|saved| row(saved.site, &[saved.bias.len()]));
            report.saved_biases = biases.collect();
            report.saved_biases.sort_unstable_by(|a, b| a.module.cmp(&b.module));
            report.hash = Some(adapter.hash);
        }
    }
    report
}

fn pairs(adapter: &Adapter, sites: &SiteTable) -> Vec<PairRow> {
    let mut rows: Vec<PairRow> = Vec::new();
    for pair in &adapter.sites {
        let site = sites.get(pair.site);
        let (a, b) = (pair.a.dtype().to_string(), pair.b.dtype().to_string());
        let row = PairRow {
            name: last_component(&site.module).to_owned(),
            blocks: Vec::new(),
            rank: pair.rank,
            scale: pair.scale,
            in_features: site.in_features,
            out_features: site.out_features,
            dtype: if a == b { a } else { format!("{a} and {b}") },
            dora: pair.magnitude.is_some(),
            bias: pair.bias.is_some(),
        };
        // Alike but for the blocks, of which both have some.
        let alike = |other: &&mut PairRow| {
            let in_blocks = site.block.is_some() && !other.blocks.is_empty();
            in_blocks && **other == PairRow { blocks: other.blocks.clone(), ..row.clone() }
        };
        match rows.iter_mut().find(alike) {
            Some(other) => other.blocks.extend(site.block),
            None => rows.push(PairRow { blocks: site.block.into_iter().collect(), ..row }),
        }
    }
    rows
}

/// The module that a tensor belongs to.
fn module_of(tensor: &str) -> Option<&str> {
    let path = tensor.strip_prefix(PREFIX)?;
    match PARTS.iter().filter_map(|part| path.find(part)).min() {
        Some(end) => Some(&path[..end]),
        None => path.strip_suffix(".weight").or_else(|| path.strip_suffix(".bias")),
    }
}

/// The sites that the tensors of a file speak of, with the widths they have there.
fn sites_of(file: &SafetensorsFile) -> SiteTable {
    let mut sites: Vec<Site> = Vec::new();
    let mut by_module: HashMap<&str, usize> = HashMap::new();
    for name in file.names() {
        let Some(module) = module_of(name) else { continue };
        let index = *by_module.entry(module).or_insert_with(|| {
            let is_embedding = last_component(module) == "embed_tokens";
            let kind = if is_embedding { SiteKind::Embedding } else { SiteKind::Linear };
            let block = block_of(module);
            sites.push(Site {
                module: module.to_owned(),
                block,
                kind,
                in_features: 0,
                out_features: 0,
                bias: false,
            });
            sites.len() - 1
        });
        let site = &mut sites[index];
        let part = &name[PREFIX.len() + module.len()..];
        if part.starts_with(".lora_embedding_") {
            site.kind = SiteKind::Embedding;
        }
        if let (".bias" | ".base_layer.bias", Some(&[width])) = (part, file.shape(name)) {
            site.bias = true;
            site.out_features = width;
        }
        let Some(&[rows, columns]) = file.shape(name) else { continue };
        if part.starts_with(".lora_A") || part.starts_with(".lora_embedding_A") {
            site.in_features = columns;
        } else if part.starts_with(".lora_B") || part.starts_with(".lora_embedding_B") {
            site.out_features = rows;
        } else if part.ends_with(".weight") && !part.starts_with(".lora_") && site.in_features == 0 {
            let is_embedding = site.kind == SiteKind::Embedding;
            (site.in_features, site.out_features) =
                if is_embedding { (rows, columns) } else { (columns, rows) };
        }
    }
    sites.sort_by_key(|site| (site.block.is_none(), site.block));
    SiteTable::new(sites)
}

/// The number in a module's path.
fn block_of(module: &str) -> Option<usize> {
    module.split('.').find_map(|component| component.parse().ok())
}

/// No base at hand: the copies of its weights that a file may hold are taken for what they say they are.
struct Copies<'a> {
    file: &'a SafetensorsFile,
    sites: &'a SiteTable,
}

impl BaseWeights for Copies<'_> {
    fn weight(&self, site: usize) -> Tensor {
        let module = &self.sites.get(site).module;
        let copies = ["base_layer.weight", "original_module.weight", "weight"];
        let stored =
            copies.iter().find_map(|part| self.file.tensor(&format!("{PREFIX}{module}.{part}")).ok());
        stored.unwrap_or_else(|| Tensor::from_f32(vec![0], &[]))
    }
}

/// The weights of a base without sites.
struct NoWeights;

impl BaseWeights for NoWeights {
    fn weight(&self, _site: usize) -> Tensor {
        Tensor::from_f32(vec![0], &[])
    }
}

impl AdapterReport {
    /// The fields of the configuration that are set, those that make the adapter first.
    fn settings(&self) -> Vec<(String, String)> {
        const FIRST: [&str; 5] = ["peft_type", "r", "lora_alpha", "use_rslora", "use_dora"];
        let Value::Object(config) = &self.config else { return Vec::new() };
        let is_set = |value: &Value| match value {
            Value::Null | Value::Bool(false) => false,
            Value::Array(items) => !items.is_empty(),
            Value::Object(entries) => !entries.is_empty(),
            Value::String(text) => !text.is_empty(),
            Value::Bool(true) | Value::Number(_) => true,
        };
        let place = |name: &str| FIRST.iter().position(|first| *first == name).unwrap_or(FIRST.len());
        let mut set: Vec<(&String, &Value)> = config
            .iter()
            .filter(|(name, value)| FIRST.contains(&name.as_str()) || is_set(value))
            .filter(|(name, _)| *name != "base_model_name_or_path")
            .collect();
        set.sort_by_key(|(name, _)| place(name));
        let shown = |value: &Value| match value {
            Value::String(text) => text.clone(),
            Value::Array(items) if items.iter().all(Value::is_string) => {
                items.iter().filter_map(Value::as_str).collect::<Vec<_>>().join(", ")
            }
            other => other.to_string(),
        };
        set.into_iter().map(|(name, value)| (name.clone(), shown(value))).collect()
    }
}

impl fmt::Display for AdapterReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut facts = Table::new(&[Align::Left, Align::Left]);
        facts.row(["adapter", &self.path]);
        facts.row(["base", self.base_model_name_or_path.as_deref().unwrap_or("not said")]);
        facts.row(["checked", self.checked_against.as_deref().unwrap_or("without a base")]);
        if let Some(hash) = &self.hash {
            facts.row(["hash", hash]);
        }
        facts.row(["parameters", &self.tensors.parameters.to_string()]);
        facts.row(["size", &bytes(self.bytes)]);
        facts.row(["dtypes", &describe_dtypes(&self.tensors.dtypes)]);
        facts.row(["not finite", &self.tensors.non_finite.to_string()]);
        for (name, value) in self.settings() {
            facts.row([name, value]);
        }
        if self.refused.is_some() {
            return write!(f, "{facts}\n{}", table(&self.tensors.tensors));
        }
        let ranks: Vec<String> = self.ranks.iter().map(usize::to_string).collect();
        facts.row(["ranks", &ranks.join(", ")]);
        write!(f, "{facts}")?;
        if !self.sites.is_empty() {
            let mut sites = Table::new(&[
                Align::Left,
                Align::Left,
                Align::Right,
                Align::Right,
                Align::Right,
                Align::Right,
                Align::Left,
                Align::Left,
            ]);
            sites.row(["site", "blocks", "rank", "scale", "in", "out", "dtype", ""]);
            for pair in &self.sites {
                let extras = [(pair.dora, "DoRA"), (pair.bias, "bias")];
                let extras: Vec<&str> =
                    extras.into_iter().filter_map(|(is_there, name)| is_there.then_some(name)).collect();
                sites.row([
                    pair.name.clone(),
                    ranges(&pair.blocks),
                    pair.rank.to_string(),
                    pair.scale.to_string(),
                    pair.in_features.to_string(),
                    pair.out_features.to_string(),
                    pair.dtype.clone(),
                    extras.join(", "),
                ]);
            }
            write!(f, "\n{sites}")?;
        }
        for (rows, title) in [(&self.saved_modules, "saved weight"), (&self.saved_biases, "saved bias")] {
            if !rows.is_empty() {
                let mut saved = Table::new(&[Align::Left, Align::Left]);
                saved.row([title, "shape"]);
                for row in rows {
                    saved.row([row.module.clone(), format!("{:?}", row.shape)]);
                }
                write!(f, "\n{saved}")?;
            }
        }
        Ok(())
    }
}
