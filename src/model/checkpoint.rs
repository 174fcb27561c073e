//! The weights of a base: one safetensors file, or shards with an index, checked against the configuration.
//!
//! Opening resolves every tensor that the configuration calls for, so nothing about the files can fail later.
//! Tensors are windows into read-only maps of the files: nothing is copied, and nothing can be written.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs;
use std::io;
use std::path::{Component, Path, PathBuf};

use serde_json::Value;

use super::{ModelConfig, ModelError, ModelSites};
use crate::adapter::{Site, SiteKind};
use crate::format::safetensors::SafetensorsFile;
use crate::format::{FormatError, Sha256Hasher, read_json, sha256_file};
use crate::tensor::Tensor;

pub(super) const SINGLE_FILE: &str = "model.safetensors";
pub(super) const INDEX_FILE: &str = "model.safetensors.index.json";

/// An open checkpoint: every weight of the model that its configuration describes.
pub struct Checkpoint {
    folder: PathBuf,
    /// In order of file name.
    shards: Vec<SafetensorsFile>,
    /// Position in `shards` of the file that holds each tensor.
    by_name: HashMap<String, usize>,
    sites: ModelSites,
    /// Name of each site's weight.
    site_weights: Vec<String>,
    /// Names of all tensors that the model uses.
    used: HashSet<String>,
    unused: Vec<String>,
}

impl Checkpoint {
    /// Opens the weights in `folder`.
    ///
    /// # Errors
    /// When there are none in safetensors form, the index does not fit the shards, or a tensor that `config` calls
    /// for is absent or has another shape or an unsupported dtype.
    pub fn open(folder: &Path, config: &ModelConfig) -> Result<Self, ModelError> {
        let (shards, by_name) = open_shards(folder)?;
        let sites = ModelSites::new(config);
        let mut site_weights: Vec<String> =
            sites.table.iter().map(|(_, site)| format!("{}.weight", site.module)).collect();
        let mut expected: HashSet<String> = HashSet::new();
        if config.tie_word_embeddings {
            let (embedding, head) = (&site_weights[sites.embed_tokens], &site_weights[sites.lm_head]);
            expected.insert(head.clone());
            // Files that store a shared tensor once may keep it under either name.
            let stored = if by_name.contains_key(embedding) { embedding } else { head }.clone();
            if by_name.contains_key(&stored) {
                site_weights[sites.embed_tokens].clone_from(&stored);
                site_weights[sites.lm_head] = stored;
            }
        }
        let mut checkpoint = Self {
            folder: folder.to_owned(),
            shards,
            by_name,
            sites,
            site_weights,
            used: HashSet::new(),
            unused: Vec::new(),
        };
        checkpoint.used = checkpoint.resolve_all(config)?.into_iter().collect();
        expected.extend(checkpoint.used.iter().cloned());
        if config.tie_word_embeddings {
            checkpoint.check_tied_head()?;
        }
        let leftover = |name: &&str| !expected.contains(*name) && !name.ends_with(".rotary_emb.inv_freq");
        checkpoint.unused = (checkpoint.shards.iter())
            .flat_map(|shard| shard.names().filter(leftover).map(str::to_owned).collect::<Vec<_>>())
            .collect();
        checkpoint.unused.sort_unstable();
        Ok(checkpoint)
    }

    /// The base's sites and norms.
    pub fn sites(&self) -> &ModelSites {
        &self.sites
    }

    /// One tensor by name, which has to have this shape.
    ///
    /// # Errors
    /// When there is none, its shape is another, or its dtype is not F32, F16 or BF16.
    pub fn tensor(&self, name: &str, wanted: &[usize]) -> Result<Tensor, ModelError> {
        let Some(&shard) = self.by_name.get(name) else {
            return Err(ModelError::MissingTensor {
                place: self.folder.display().to_string(),
                tensor: name.to_owned(),
                wanted: wanted.to_vec(),
            });
        };
        let shard = &self.shards[shard];
        match shard.shape(name) {
            Some(found) if found != wanted => Err(ModelError::Shape {
                place: shard.path().display().to_string(),
                tensor: name.to_owned(),
                found: found.to_vec(),
                wanted: wanted.to_vec(),
            }),
            _ => Ok(shard.tensor(name)?),
        }
    }

    /// The weight of a site: `[out_features, in_features]`, for the embedding `[vocabulary, hidden]`. With tied
    /// embeddings, `lm_head` and `embed_tokens` have the same one.
    ///
    /// # Errors
    /// None after a successful [`Self::open`].
    ///
    /// # Panics
    /// When `site` is not an id of the table.
    pub fn site_weight(&self, site: usize) -> Result<Tensor, ModelError> {
        let Site { in_features, out_features, kind, .. } = self.sites.table.get(site);
        match kind {
            SiteKind::Linear => self.tensor(&self.site_weights[site], &[*out_features, *in_features]),
            SiteKind::Embedding => self.tensor(&self.site_weights[site], &[*in_features, *out_features]),
        }
    }

    /// The bias `[out_features]` of a site that has one.
    ///
    /// # Errors
    /// None after a successful [`Self::open`].
    ///
    /// # Panics
    /// When `site` is not an id of the table.
    pub fn site_bias(&self, site: usize) -> Result<Option<Tensor>, ModelError> {
        let site = self.sites.table.get(site);
        site.bias.then(|| self.tensor(&bias_name(site), &[site.out_features])).transpose()
    }

    /// The name under which a site's weight is stored.
    pub(super) fn site_weight_name(&self, site: usize) -> &str {
        &self.site_weights[site]
    }

    /// The files, each with the names of those of its tensors that the model uses, in the order of their data; files
    /// without any left out.
    pub(super) fn files(&self) -> Vec<(&SafetensorsFile, Vec<&str>)> {
        let used = |(number, shard): (usize, _)| {
            let is_used = |name: &&str| self.used.contains(*name) && self.by_name.get(*name) == Some(&number);
            let names: Vec<&str> = SafetensorsFile::names(shard).filter(is_used).collect();
            (!names.is_empty()).then_some((shard, names))
        };
        self.shards.iter().enumerate().filter_map(used).collect()
    }

    /// Names of stored tensors that the model does not use, sorted; those known to be redundant (rotary
    /// frequencies, the second copy of a tied weight) left out. A caller should show them: they are a sign that
    /// config.json and the weights are not quite of the same model.
    pub fn unused(&self) -> &[String] {
        &self.unused
    }

    /// SHA-256 of the weight files, in hex: of the one file, or of the lines `<sha256>  <file name>` of the shards
    /// in order of name (what `sha256sum *.safetensors | sha256sum` prints when the folder holds nothing else).
    ///
    /// # Errors
    /// When a file cannot be read any more.
    pub fn content_hash(&self) -> Result<String, ModelError> {
        if let [file] = self.shards.as_slice()
            && file.path().ends_with(SINGLE_FILE)
        {
            return Ok(sha256_file(file.path())?);
        }
        let mut hasher = Sha256Hasher::new();
        for shard in &self.shards {
            let name = shard.path().file_name().unwrap_or_default().to_string_lossy();
            hasher.update(format!("{}  {name}\n", sha256_file(shard.path())?).as_bytes());
        }
        Ok(hasher.finish())
    }

    /// Takes every tensor once; returns their names.
    fn resolve_all(&self, config: &ModelConfig) -> Result<Vec<String>, ModelError> {
        let mut names = self.site_weights.clone();
        for (id, site) in self.sites.table.iter() {
            self.site_weight(id)?;
            if self.site_bias(id)?.is_some() {
                names.push(bias_name(site));
            }
        }
        let mut norm = |name: &str, width: usize| {
            names.push(name.to_owned());
            self.tensor(name, &[width]).map(drop)
        };
        for norms in &self.sites.norms {
            norm(&norms.attention, config.hidden_size)?;
            norm(&norms.mlp, config.hidden_size)?;
            if let Some((query, key)) = &norms.query_key {
                norm(query, config.head_dim)?;
                norm(key, config.head_dim)?;
            }
        }
        norm(&self.sites.final_norm, config.hidden_size)?;
        Ok(names)
    }

    /// A tied checkpoint may store the head a second time, but only the same one: with two different weights it is
    /// not tied, whatever config.json says, and versions of transformers disagree on which of them to use.
    fn check_tied_head(&self) -> Result<(), ModelError> {
        let head = format!("{}.weight", self.sites.table.get(self.sites.lm_head).module);
        let Some(&shard) = self.by_name.get(&head) else { return Ok(()) };
        let embedding = self.site_weight(self.sites.embed_tokens)?;
        let stored = self.tensor(&head, embedding.shape())?;
        if stored.dtype() == embedding.dtype() && stored.bytes()[..] == embedding.bytes()[..] {
            return Ok(());
        }
        let problem = format!(
            "tensor `{head}` differs from `{}`, but config.json has `tie_word_embeddings` = true; set it to false \
             to use both",
            self.site_weights[self.sites.embed_tokens]
        );
        Err(ModelError::Weights { place: self.shards[shard].path().display().to_string(), problem })
    }
}

pub(super) fn bias_name(site: &Site) -> String {
    format!("{}.bias", site.module)
}

type Shards = (Vec<SafetensorsFile>, HashMap<String, usize>);

/// The files of a folder and which of them holds which tensor.
fn open_shards(folder: &Path) -> Result<Shards, ModelError> {
    let single = folder.join(SINGLE_FILE);
    if is_listed(&single) {
        let file = SafetensorsFile::open(&single)?;
        let by_name = file.names().map(|name| (name.to_owned(), 0)).collect();
        return Ok((vec![file], by_name));
    }
    let index = folder.join(INDEX_FILE);
    if is_listed(&index) { open_indexed(folder, &index) } else { Err(no_weights(folder)) }
}

fn open_indexed(folder: &Path, index: &Path) -> Result<Shards, ModelError> {
    let refuse = |problem: String| ModelError::Weights { place: index.display().to_string(), problem };
    let value = read_json(index)?;
    let Some(weight_map) = value.get("weight_map").and_then(Value::as_object) else {
        return Err(refuse("no `weight_map` object".to_owned()));
    };
    // By shard name, so that the order of shards is that of their names.
    let mut tensors_of: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for (tensor, shard) in weight_map {
        let shard = shard.as_str().ok_or_else(|| {
            refuse(format!("`weight_map` gives tensor `{tensor}` no file name but {shard}"))
        })?;
        tensors_of.entry(shard).or_default().push(tensor);
    }
    let (mut shards, mut by_name) = (Vec::new(), HashMap::new());
    for (name, tensors) in tensors_of {
        if !is_plain_file_name(name) {
            return Err(refuse(format!("shard `{name}` is not the name of a file in this folder")));
        }
        if !name.ends_with(".safetensors") {
            return Err(refuse(format!("shard `{name}` is not a safetensors file; convert to safetensors")));
        }
        let path = folder.join(name);
        if !is_listed(&path) {
            return Err(refuse(format!("shard `{name}` is not in the folder; download all shards")));
        }
        let shard = SafetensorsFile::open(&path)?;
        for tensor in tensors {
            if !shard.contains(tensor) {
                return Err(refuse(format!("shard `{name}` does not hold tensor `{tensor}`")));
            }
            by_name.insert(tensor.to_owned(), shards.len());
        }
        shards.push(shard);
    }
    Ok((shards, by_name))
}

/// Whether the folder lists this file. A link that leads nowhere counts: opening it then says what is wrong.
fn is_listed(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok()
}

/// Whether joining `name` to a folder stays directly in it, on every system.
fn is_plain_file_name(name: &str) -> bool {
    let mut components = Path::new(name).components();
    !name.contains(['/', '\\', ':', '\0'])
        && matches!(components.next(), Some(Component::Normal(_)))
        && components.next().is_none()
}

/// What to say about a folder with neither `model.safetensors` nor an index.
fn no_weights(folder: &Path) -> ModelError {
    let names = match weight_like_names(folder) {
        Ok(names) => names,
        Err(error) => return FormatError::io(folder, "list")(error).into(),
    };
    let (safetensors, others): (Vec<&String>, Vec<&String>) =
        names.iter().partition(|name| name.ends_with(".safetensors"));
    let listed = |names: &[&String]| names.iter().map(|name| name.as_str()).collect::<Vec<_>>().join(", ");
    let problem = if !safetensors.is_empty() {
        format!("found {}; wanted {SINGLE_FILE}, or shards with {INDEX_FILE}", listed(&safetensors))
    } else if !others.is_empty() {
        format!("found only {}; convert to safetensors", listed(&others))
    } else {
        format!("found no weights; wanted {SINGLE_FILE}, or shards with {INDEX_FILE}")
    };
    ModelError::Weights { place: folder.display().to_string(), problem }
}

/// The first few files that look like weights, by name.
fn weight_like_names(folder: &Path) -> io::Result<Vec<String>> {
    const LISTED: usize = 5;
    let mut names = Vec::new();
    for entry in fs::read_dir(folder)? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        if [".safetensors", ".bin", ".pt", ".pth", ".gguf"].iter().any(|ending| name.ends_with(ending)) {
            names.push(name);
        }
    }
    names.sort_unstable();
    names.truncate(LISTED);
    Ok(names)
}

#[cfg(test)]
mod tests;
