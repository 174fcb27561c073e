//! Writing an adapter as a folder that PEFT loads.
//!
//! The tensors are written first and the configuration last, each whole or not at all: without a configuration
//! a folder is no adapter, so a crash leaves nothing that could be mistaken for one. A folder that already holds
//! this adapter (the same configuration, as from one checkpoint to the next) changes in a single rename.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Map, Value, json};

use super::config::{Config, TrainedBiases};
use super::read::first_non_finite;
use super::{AdapterError, CONFIG_FILE, Limits, PREFIX, WEIGHTS_FILE, can_be_saved, file_in, weight_shape};
use crate::adapter::{Adapter, Site, SiteAdapter, SiteKind, SiteTable};
use crate::format::safetensors::write_safetensors;
use crate::format::{FormatError, read_json, write_text};
use crate::tensor::Tensor;

/// How the configuration of a written adapter expresses its scales.
#[derive(Clone, Copy, Debug, Default)]
pub struct WriteOptions {
    /// Write `use_rslora = true` and `lora_alpha = scale · √r` instead of `scale · r`.
    pub use_rslora: bool,
}

/// Writes an adapter into `folder`, which is created if need be.
///
/// `r`, `lora_alpha`, their patterns and `target_modules` follow from the adapter's sites; reading the folder
/// gives the same adapter with the same hash.
///
/// # Errors
/// When the folder holds a different adapter, when the adapter is inconsistent, holds a value that is not finite
/// or cannot be expressed (DoRA or `lora_bias` at some sites only), or when a file cannot be written.
pub fn write_adapter(
    folder: &Path,
    adapter: &Adapter,
    sites: &SiteTable,
    options: WriteOptions,
) -> Result<(), AdapterError> {
    let writer = Writer { folder, adapter, sites };
    let tensors = writer.tensors()?;
    let config = writer.config(options)?;

    std::fs::create_dir_all(folder).map_err(FormatError::io(folder, "create the folder"))?;
    let config_path = file_in(folder, CONFIG_FILE);
    let is_there = config_path.exists();
    if is_there && read_json(&config_path)? != config {
        let problem = "the folder holds a different adapter; remove it or choose another folder".to_owned();
        return Err(AdapterError::Folder { path: folder.to_owned(), problem });
    }
    let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
    write_safetensors(&file_in(folder, WEIGHTS_FILE), &tensors, &metadata)?;
    if !is_there {
        write_text(&config_path, &format!("{config:#}\n"))?;
    }
    Ok(())
}

struct Writer<'a> {
    folder: &'a Path,
    adapter: &'a Adapter,
    sites: &'a SiteTable,
}

impl Writer<'_> {
    fn refuse(&self, module: &str, problem: impl Into<String>) -> AdapterError {
        AdapterError::Module {
            path: self.folder.to_owned(),
            module: module.to_owned(),
            problem: problem.into(),
        }
    }

    /// Every tensor under PEFT's name, checked against the sites.
    fn tensors(&self) -> Result<Vec<(String, Tensor)>, AdapterError> {
        let mut tensors = Vec::new();
        let mut add = |module: &str, suffix: &str, tensor: Tensor, wanted: &[usize]| {
            if tensor.shape() != wanted {
                let problem = format!("{suffix} has shape {:?}, not {wanted:?}", tensor.shape());
                return Err(self.refuse(module, problem));
            }
            if let Some((index, value)) = first_non_finite(&tensor) {
                return Err(self.refuse(module, format!("element {index} of {suffix} is {value}")));
            }
            tensors.push((format!("{PREFIX}{module}.{suffix}"), tensor));
            Ok(())
        };
        for adapted in &self.adapter.sites {
            let &SiteAdapter { site, rank, scale, ref a, ref b, .. } = adapted;
            let site = self.site(site)?;
            if !scale.is_finite() {
                return Err(self.refuse(&site.module, format!("its scale is {scale}")));
            }
            let (a_suffix, b_suffix) = match site.kind {
                SiteKind::Linear => ("lora_A.weight", "lora_B.weight"),
                SiteKind::Embedding => ("lora_embedding_A", "lora_embedding_B"),
            };
            add(&site.module, a_suffix, a.clone(), &[rank, site.in_features])?;
            add(&site.module, b_suffix, b.clone(), &[site.out_features, rank])?;
            let vectors = [("lora_B.bias", &adapted.bias), ("lora_magnitude_vector", &adapted.magnitude)];
            for (suffix, values) in vectors {
                if let Some(values) = values {
                    let tensor = Tensor::from_f32(vec![values.len()], values);
                    add(&site.module, suffix, tensor, &[site.out_features])?;
                }
            }
        }
        for saved in &self.adapter.saved_biases {
            let site = self.site(saved.site)?;
            if !site.bias {
                return Err(self.refuse(&site.module, "the base has no bias there to replace"));
            }
            let suffix = if self.is_adapted(saved.site) { "base_layer.bias" } else { "bias" };
            let tensor = Tensor::from_f32(vec![saved.bias.len()], &saved.bias);
            add(&site.module, suffix, tensor, &[site.out_features])?;
        }
        for saved in &self.adapter.saved_modules {
            let site = self.site(saved.site)?;
            if !can_be_saved(site) {
                return Err(self.refuse(&site.module, "only lm_head and embed_tokens can be replaced whole"));
            }
            add(&site.module, "weight", saved.weight.clone(), &weight_shape(site))?;
        }
        Ok(tensors)
    }

    fn site(&self, id: usize) -> Result<&Site, AdapterError> {
        if id < self.sites.len() {
            return Ok(self.sites.get(id));
        }
        Err(self.refuse(&format!("site {id}"), format!("the base has {} sites", self.sites.len())))
    }

    /// The configuration, checked by reading it back.
    fn config(&self, options: WriteOptions) -> Result<Value, AdapterError> {
        let adapted = &self.adapter.sites;
        let use_dora = self.all_or_none("DoRA magnitude", |adapter| adapter.magnitude.is_some())?;
        let lora_bias = self.all_or_none("bias", |adapter| adapter.bias.is_some())?;

        let ranks: Vec<usize> = adapted.iter().map(|adapter| adapter.rank).collect();
        let alphas: Vec<f64> = adapted.iter().map(|adapter| alpha_of(adapter, options)).collect();
        let r = most_common(&ranks).unwrap_or(1);
        let lora_alpha = most_common(&alphas).unwrap_or(1.0);
        let saved = self.adapter.saved_modules.iter().map(|saved| self.sites.get(saved.site).name());
        let saved: Vec<&str> = saved.collect();
        let config = json!({
            "alpha_pattern": self.pattern(&alphas, lora_alpha, alpha_json),
            "base_model_name_or_path": self.adapter.base_name,
            "bias": self.biases().name(),
            "fan_in_fan_out": false,
            "inference_mode": true,
            "init_lora_weights": true,
            "layers_pattern": null,
            "layers_to_transform": null,
            "lora_alpha": alpha_json(lora_alpha),
            "lora_bias": lora_bias,
            "lora_dropout": 0.0,
            "modules_to_save": if saved.is_empty() { Value::Null } else { json!(saved) },
            "peft_type": "LORA",
            "r": r,
            "rank_pattern": self.pattern(&ranks, r, |rank| json!(rank)),
            "revision": null,
            "target_modules": self.targets(),
            "task_type": "CAUSAL_LM",
            "use_dora": use_dora,
            "use_rslora": options.use_rslora,
        });
        self.check_expressed(&config)?;
        Ok(config)
    }

    /// Whether every site has something; a configuration can say it of all sites or of none.
    fn all_or_none(&self, what: &str, has: impl Fn(&SiteAdapter) -> bool) -> Result<bool, AdapterError> {
        let adapted = &self.adapter.sites;
        let any = adapted.iter().any(&has);
        match adapted.iter().find(|adapter| any && !has(adapter)) {
            Some(without) => {
                let problem = format!("it has no {what}, but others have: PEFT cannot express that");
                Err(self.refuse(&self.site(without.site)?.module, problem))
            }
            None => Ok(any),
        }
    }

    fn is_adapted(&self, site: usize) -> bool {
        self.adapter.sites.iter().any(|adapter| adapter.site == site)
    }

    /// The value of `bias` that asks for exactly the biases there are. Where none does it is `"none"`, with which
    /// PEFT loads them as well.
    fn biases(&self) -> TrainedBiases {
        let saved: Vec<usize> = self.adapter.saved_biases.iter().map(|saved| saved.site).collect();
        let candidates = [TrainedBiases::None, TrainedBiases::All, TrainedBiases::Adapted];
        let asks_for_them = |biases: &TrainedBiases| {
            let asked = self.sites.iter().filter(|(id, site)| biases.include(site, self.is_adapted(*id)));
            asked.map(|(id, _)| id).eq(saved.iter().copied())
        };
        candidates.into_iter().find(asks_for_them).unwrap_or(TrainedBiases::None)
    }

    /// Adapted modules: by last component where the adapter has all of that name, else by whole path.
    fn targets(&self) -> Vec<&str> {
        let mut targets: Vec<&str> = Vec::new();
        for adapter in &self.adapter.sites {
            let site = self.sites.get(adapter.site);
            let mut namesakes = self.sites.iter().filter(|(_, other)| other.name() == site.name());
            targets.push(if namesakes.all(|(id, _)| self.is_adapted(id)) {
                site.name()
            } else {
                &site.module
            });
        }
        targets.sort_unstable();
        targets.dedup();
        targets
    }

    /// The values that differ from `default`: by last component where all adapted sites of that name share one,
    /// else by whole path.
    fn pattern<T: Copy + PartialEq>(&self, values: &[T], default: T, to_json: fn(T) -> Value) -> Value {
        let mut entries = Map::new();
        let named = || self.adapter.sites.iter().map(|adapter| self.sites.get(adapter.site)).zip(values);
        for (site, &value) in named() {
            let mut namesakes = named().filter(|(other, _)| other.name() == site.name());
            let is_shared = namesakes.all(|(_, &other)| other == value);
            if value != default {
                let key = if is_shared { site.name() } else { &site.module };
                entries.insert(key.to_owned(), to_json(value));
            }
        }
        Value::Object(entries)
    }

    /// Reads the configuration as anybody else would and compares what it says with the adapter.
    fn check_expressed(&self, config: &Value) -> Result<(), AdapterError> {
        let path = file_in(self.folder, CONFIG_FILE);
        let plan = Config::from_json(&path, config)?.plan(self.sites, Limits { max_rank: usize::MAX })?;
        let wanted: Vec<_> =
            self.adapter.sites.iter().map(|adapter| (adapter.site, adapter.rank, adapter.scale)).collect();
        let expressed: Vec<_> =
            plan.adapted.iter().map(|planned| (planned.site, planned.rank, planned.scale)).collect();
        let saved: Vec<usize> = self.adapter.saved_modules.iter().map(|saved| saved.site).collect();
        let biases = self.adapter.saved_biases.iter().map(|saved| saved.site);
        if wanted == expressed && saved == plan.saved && biases.is_sorted_by(|one, next| one < next) {
            return Ok(());
        }
        let mut differing = wanted.iter().zip(&expressed).filter(|(wanted, expressed)| wanted != expressed);
        let module = match differing.next() {
            Some((&(site, ..), _)) => self.site(site)?.module.as_str(),
            None => "*",
        };
        let problem = "sites must be in ascending order, once each, and not replaced whole as well";
        Err(self.refuse(module, problem))
    }
}

/// The `lora_alpha` that gives a site's scale back: a whole number where one does.
fn alpha_of(adapter: &SiteAdapter, options: WriteOptions) -> f64 {
    let rank = adapter.rank as f64;
    let divisor = if options.use_rslora { rank.sqrt() } else { rank };
    let alpha = f64::from(adapter.scale) * divisor;
    let whole = alpha.round();
    if (whole / divisor) as f32 == adapter.scale { whole } else { alpha }
}

/// Whole numbers as JSON integers, which is what PEFT declares `lora_alpha` to be.
fn alpha_json(alpha: f64) -> Value {
    if alpha.fract() == 0.0 && alpha.abs() < 1e15 { json!(alpha as i64) } else { json!(alpha) }
}

/// The value that occurs most often, the first of them on a tie.
fn most_common<T: Copy + PartialEq>(values: &[T]) -> Option<T> {
    let count = |value: T| values.iter().filter(|&&other| other == value).count();
    values.iter().copied().rev().max_by_key(|&value| count(value))
}
