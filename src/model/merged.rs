//! A base with adapters merged into its weights, written as a Hugging Face folder.
//!
//! Weights are merged when they are written, one file of the checkpoint at a time, in f64 and rounded once. Where the
//! base ties its embeddings and an adapter changes either side, the two become tensors of their own.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use serde_json::json;

use super::checkpoint::{INDEX_FILE, SINGLE_FILE, bias_name};
use super::{Base, ModelError, ModelSites};
use crate::adapter::merge::weights::{Change, convert, merge};
use crate::adapter::peft::first_non_finite;
use crate::adapter::{Adapter, SavedBias};
use crate::format::safetensors::{SafetensorsFile, write_safetensors};
use crate::format::{FormatError, read_json, write_text};
use crate::tensor::{DType, Tensor};

const CONFIG_FILE: &str = "config.json";

/// A base and the adapters that are to be merged into it, one after another.
pub struct MergedBase<'a> {
    base: &'a Base,
    parts: Vec<Merged<'a>>,
}

struct Merged<'a> {
    name: String,
    adapter: &'a Adapter,
    weight: f64,
}

impl<'a> MergedBase<'a> {
    /// The base as it is.
    pub fn new(base: &'a Base) -> Self {
        Self { base, parts: Vec::new() }
    }

    /// Adds `weight` times what the adapter changes: low-rank products, DoRA's scaling, replaced modules and biases.
    /// `name` is for messages.
    ///
    /// # Errors
    /// When the adapter has a bias (`lora_bias`) where the base has none to hold it.
    pub fn add(&mut self, name: &str, adapter: &'a Adapter, weight: f64) -> Result<(), ModelError> {
        let table = &self.sites().table;
        let homeless = |site: usize| !table.get(site).bias;
        let biased = adapter.sites.iter().filter(|adapted| adapted.bias.is_some());
        if let Some(site) = biased.map(|adapted| adapted.site).find(|&site| homeless(site)) {
            let module = &table.get(site).module;
            return Err(ModelError::Weights {
                place: format!("adapter `{name}`"),
                problem: format!("`{module}` has a `lora_B.bias`, but the base no bias to merge it into"),
            });
        }
        self.parts.push(Merged { name: name.to_owned(), adapter, weight });
        Ok(())
    }

    /// Whether the base's tied embeddings come apart.
    pub fn unties(&self) -> bool {
        let sites = self.sites();
        let ends = [sites.embed_tokens, sites.lm_head];
        self.base.config.tie_word_embeddings && ends.iter().any(|&site| !self.changes(site).is_empty())
    }

    /// The merged weight of a site, in `dtype`, or in that which the base has stored.
    ///
    /// # Errors
    /// When a value is not finite.
    ///
    /// # Panics
    /// When `site` is not an id of the table.
    pub fn weight(&self, site: usize, dtype: Option<DType>) -> Result<Tensor, ModelError> {
        let weight = self.base.checkpoint.site_weight(site)?;
        let (dtype, changes) = (dtype.unwrap_or(weight.dtype()), self.changes(site));
        if changes.is_empty() {
            return self.checked(site, convert(&weight, dtype));
        }
        self.checked(site, merge(&weight, self.sites().table.get(site).kind, &changes, dtype).0)
    }

    /// The merged bias of a site that has one, as [`weight`](Self::weight).
    ///
    /// # Errors
    /// When a value is not finite.
    ///
    /// # Panics
    /// When `site` is not an id of the table.
    pub fn bias(&self, site: usize, dtype: Option<DType>) -> Result<Option<Tensor>, ModelError> {
        let Some(stored) = self.base.checkpoint.site_bias(site)? else { return Ok(None) };
        let mut values: Vec<f64> = stored.to_f32().into_iter().map(f64::from).collect();
        for Merged { adapter, weight, .. } in &self.parts {
            let saved = adapter.saved_biases.iter().find(|saved| saved.site == site);
            if let Some(SavedBias { bias, .. }) = saved {
                values
                    .iter_mut()
                    .zip(bias)
                    .for_each(|(value, new)| *value += weight * (f64::from(*new) - *value));
            }
            let adapted = adapter.sites.iter().find(|adapted| adapted.site == site);
            if let Some((bias, scale)) = adapted.and_then(|a| Some((a.bias.as_ref()?, f64::from(a.scale)))) {
                values
                    .iter_mut()
                    .zip(bias)
                    .for_each(|(value, more)| *value += weight * scale * f64::from(*more));
            }
        }
        let values: Vec<f32> = values.into_iter().map(|value| value as f32).collect();
        let merged = Tensor::from_f32(stored.shape().to_vec(), &values);
        self.checked(site, convert(&merged, dtype.unwrap_or(stored.dtype()))).map(Some)
    }

    /// Writes the merged model into `folder`, which must be empty or absent: weights in files of the same names as the
    /// base's, in `dtype` or as the base has stored them, then everything else that belongs to the model, config.json
    /// last. Tensors that the base's configuration does not call for are left out.
    ///
    /// # Errors
    /// When the folder has something in it, a merged value is not finite, or a file cannot be written.
    pub fn write(&self, folder: &Path, dtype: Option<DType>) -> Result<(), ModelError> {
        fs::create_dir_all(folder).map_err(FormatError::io(folder, "create the folder"))?;
        let mut entries = fs::read_dir(folder).map_err(FormatError::io(folder, "list"))?;
        if entries.next().is_some() {
            let problem = "the folder is not empty; remove what is in it or choose another".to_owned();
            return Err(ModelError::Weights { place: folder.display().to_string(), problem });
        }
        self.write_weights(folder, dtype)?;
        self.copy_files(folder)?;
        self.write_config(folder, dtype)
    }

    fn sites(&self) -> &ModelSites {
        self.base.checkpoint.sites()
    }

    /// What happens to a site's weight, in order.
    fn changes(&self, site: usize) -> Vec<(Change<'_>, f64)> {
        let of_part = |Merged { adapter, weight, .. }: &'_ Merged<'a>| {
            let adapted = adapter.sites.iter().find(|adapted| adapted.site == site).map(Change::Add);
            let saved = adapter.saved_modules.iter().find(|saved| saved.site == site);
            let change = adapted.or_else(|| saved.map(|saved| Change::Replace(&saved.weight)))?;
            Some((change, *weight))
        };
        self.parts.iter().filter_map(of_part).collect()
    }

    /// A merged tensor, all of whose values have to be finite.
    fn checked(&self, site: usize, tensor: Tensor) -> Result<Tensor, ModelError> {
        let Some((index, value)) = first_non_finite(&tensor) else { return Ok(tensor) };
        let names: Vec<&str> = self.parts.iter().map(|part| part.name.as_str()).collect();
        let module = &self.sites().table.get(site).module;
        Err(ModelError::Weights {
            place: format!("adapters {} merged into the base", names.join(", ")),
            problem: format!("`{module}`: element {index} is {value} in {}", tensor.dtype()),
        })
    }

    fn write_weights(&self, folder: &Path, dtype: Option<DType>) -> Result<(), ModelError> {
        let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
        let mut weight_map = BTreeMap::new();
        let (mut total_size, mut total_parameters) = (0, 0);
        let files = self.base.checkpoint.files();
        for (file, names) in &files {
            let mut tensors = Vec::new();
            for name in names {
                tensors.extend(self.tensors(file, name, dtype)?);
            }
            let path = folder.join(file.path().file_name().unwrap_or_default());
            write_safetensors(&path, &tensors, &metadata)?;
            for (name, tensor) in tensors {
                total_size += tensor.bytes().len();
                total_parameters += tensor.len();
                weight_map.insert(name, path.file_name().map(|name| name.to_string_lossy().into_owned()));
            }
        }
        if let [(file, _)] = files.as_slice()
            && file.path().ends_with(SINGLE_FILE)
        {
            return Ok(());
        }
        let metadata = json!({"total_parameters": total_parameters, "total_size": total_size});
        let index = json!({"metadata": metadata, "weight_map": weight_map});
        Ok(write_text(&folder.join(INDEX_FILE), &format!("{index:#}\n"))?)
    }

    /// What becomes of a stored tensor: itself, merged; or both ends of the model, where it was theirs and no more is.
    fn tensors(
        &self,
        file: &SafetensorsFile,
        name: &str,
        dtype: Option<DType>,
    ) -> Result<Vec<(String, Tensor)>, ModelError> {
        let (sites, checkpoint) = (self.sites(), &self.base.checkpoint);
        let weight_of: Vec<usize> =
            (0..sites.table.len()).filter(|&site| checkpoint.site_weight_name(site) == name).collect();
        match weight_of.as_slice() {
            [site] => Ok(vec![(name.to_owned(), self.weight(*site, dtype)?)]),
            [site, ..] if !self.unties() => Ok(vec![(name.to_owned(), self.weight(*site, dtype)?)]),
            [_, ..] => {
                let named = |&site: &usize| {
                    Ok((format!("{}.weight", sites.table.get(site).module), self.weight(site, dtype)?))
                };
                weight_of.iter().map(named).collect()
            }
            [] => {
                let mut biased = sites.table.iter().filter(|(_, site)| site.bias);
                let bias_of = biased.find(|(_, site)| bias_name(site) == name).map(|(id, _)| id);
                let tensor = match bias_of.map(|site| self.bias(site, dtype)).transpose()?.flatten() {
                    Some(bias) => bias,
                    None => {
                        let stored = file.tensor(name)?;
                        convert(&stored, dtype.unwrap_or(stored.dtype()))
                    }
                };
                Ok(vec![(name.to_owned(), tensor)])
            }
        }
    }

    /// Tokenizer, chat template, generation settings, licence: what is neither weights nor config.json.
    fn copy_files(&self, to: &Path) -> Result<(), ModelError> {
        copy_matching(&self.base.folder, to, |name| {
            let is_text = [".json", ".jinja", ".txt", ".model"].iter().any(|ending| name.ends_with(ending));
            let is_licence = ["LICENSE", "LICENCE", "NOTICE"].iter().any(|start| name.starts_with(start));
            (is_text || is_licence) && name != CONFIG_FILE && !name.ends_with(".index.json")
        })?;
        for templates in ["chat_templates", "additional_chat_templates"] {
            if self.base.folder.join(templates).is_dir() {
                let (from, to) = (self.base.folder.join(templates), to.join(templates));
                fs::create_dir_all(&to).map_err(FormatError::io(&to, "create the folder"))?;
                copy_matching(&from, &to, |name| name.ends_with(".jinja"))?;
            }
        }
        Ok(())
    }

    /// The base's configuration with what is different now.
    fn write_config(&self, folder: &Path, dtype: Option<DType>) -> Result<(), ModelError> {
        let mut config = read_json(&self.base.folder.join(CONFIG_FILE))?;
        if let Some(dtype) = dtype {
            // transformers 5 writes `dtype`, older versions and many programs `torch_dtype`.
            let field = if config.get("dtype").is_some() { "dtype" } else { "torch_dtype" };
            config[field] = json!(match dtype {
                DType::F32 => "float32",
                DType::F16 => "float16",
                DType::BF16 => "bfloat16",
            });
        }
        if self.unties() {
            config["tie_word_embeddings"] = json!(false);
        }
        Ok(write_text(&folder.join(CONFIG_FILE), &format!("{config:#}\n"))?)
    }
}

/// Copies the files of a folder whose names are wanted.
fn copy_matching(from: &Path, to: &Path, is_wanted: impl Fn(&str) -> bool) -> Result<(), FormatError> {
    for entry in fs::read_dir(from).map_err(FormatError::io(from, "list"))? {
        let path = entry.map_err(FormatError::io(from, "list"))?.path();
        let Some(name) = path.file_name().and_then(|name| name.to_str()) else { continue };
        if is_wanted(name) && path.is_file() {
            fs::copy(&path, to.join(name)).map_err(FormatError::io(&path, "copy"))?;
        }
    }
    Ok(())
}
