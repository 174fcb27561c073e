//! Reading an adapter folder: its tensors, one by one, against its configuration and a base's sites.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::config::{Config, Plan, PlannedSite};
use super::{AdapterError, CONFIG_FILE, PREFIX, WEIGHTS_FILE, content_hash, file_in, weight_shape};
use crate::adapter::{Adapter, SavedBias, SavedModule, Site, SiteAdapter, SiteKind, SiteTable};
use crate::format::safetensors::SafetensorsFile;
use crate::tensor::{Bytes, DType, Tensor};

/// Bounds on what an adapter may ask for.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Largest rank at any site.
    pub max_rank: usize,
}

/// The frozen weights of a base, to compare the copies against that PEFT stores beside trained embeddings.
pub trait BaseWeights {
    /// Weight of a site: `[out_features, in_features]`, or `[vocabulary, hidden]` for an embedding.
    fn weight(&self, site: usize) -> Tensor;
}

/// Reads a PEFT LoRA folder for a base with these sites.
///
/// The tensors are read into memory: what was checked stays true if the folder changes.
///
/// # Errors
/// When a file is absent or malformed, a field is unsupported, or the tensors are not exactly those that the
/// configuration asks for, in shapes that fit the base and with finite values. Names file, field or tensor.
pub fn read_adapter(
    folder: &Path,
    sites: &SiteTable,
    base: &dyn BaseWeights,
    limits: Limits,
) -> Result<Adapter, AdapterError> {
    let weights_path = find_files(folder)?;
    let config = Config::read(folder)?;
    let plan = config.plan(sites, limits)?;
    let file = SafetensorsFile::read(&weights_path)?;
    let mut found = Found::sort(&file, sites, &plan.saved)?;

    found.check_copies(base)?;
    let adapted = plan.adapted.iter().map(|planned| found.take_site(planned, &config));
    let adapted: Vec<SiteAdapter> = adapted.collect::<Result<_, _>>()?;
    let saved = plan.saved.iter().map(|&site| found.take_saved(site, &config));
    let saved_modules: Vec<SavedModule> = saved.collect::<Result<_, _>>()?;
    let saved_biases = found.take_biases(&plan, &config)?;
    found.check_nothing_left()?;

    let base_name = config.base_name;
    let adapter = Adapter { hash: String::new(), sites: adapted, saved_modules, saved_biases, base_name };
    Ok(Adapter { hash: content_hash(&adapter, sites), ..adapter })
}

/// Checks that the folder has both files, and returns the path of the tensors.
fn find_files(folder: &Path) -> Result<PathBuf, AdapterError> {
    let refuse = |problem: String| AdapterError::Folder { path: folder.to_owned(), problem };
    if !folder.is_dir() {
        return Err(refuse("no such adapter folder".to_owned()));
    }
    if !file_in(folder, CONFIG_FILE).exists() {
        return Err(refuse(format!("not an adapter: it has no {CONFIG_FILE}")));
    }
    let weights = file_in(folder, WEIGHTS_FILE);
    if weights.exists() {
        return Ok(weights);
    }
    let entries = std::fs::read_dir(folder).map_err(|error| refuse(format!("cannot list it: {error}")))?;
    let pickled = entries.flatten().map(|entry| PathBuf::from(entry.file_name())).find(|name| {
        name.extension()
            .is_some_and(|extension| ["bin", "pt", "pth", "ckpt"].iter().any(|&known| extension == known))
    });
    Err(refuse(match pickled {
        Some(name) => format!(
            "`{}` is a pickle, which is not loaded because it can run code; convert to safetensors",
            name.display()
        ),
        None => format!("it has no {WEIGHTS_FILE}"),
    }))
}

/// What a tensor is to its module.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Part {
    A,
    B,
    Bias,
    Magnitude,
    /// A full weight that replaces the base's.
    Saved,
    /// A bias that replaces the base's.
    SavedBias,
    /// The base's own weight, stored once more.
    Copy,
}

impl Part {
    /// The usual spelling of its name, for messages.
    fn label(self, kind: SiteKind) -> &'static str {
        match (self, kind) {
            (Self::A, SiteKind::Linear) => "lora_A.weight",
            (Self::A, SiteKind::Embedding) => "lora_embedding_A",
            (Self::B, SiteKind::Linear) => "lora_B.weight",
            (Self::B, SiteKind::Embedding) => "lora_embedding_B",
            (Self::Bias, _) => "lora_B.bias",
            (Self::Magnitude, _) => "lora_magnitude_vector",
            (Self::Saved, _) => "weight",
            (Self::SavedBias, _) => "bias",
            (Self::Copy, _) => "base_layer.weight",
        }
    }

    /// Reads what follows the module path, and the adapter's name if it stands there (PEFT leaves it out when it
    /// saves; other programs do not).
    fn parse(suffix: &str, kind: SiteKind, is_saved: bool) -> Option<(Self, Option<&str>)> {
        let components: Vec<&str> = suffix.split('.').collect();
        let (part, adapter) = match (kind, components.as_slice()) {
            (SiteKind::Linear, ["lora_A", "weight"]) => (Self::A, None),
            (SiteKind::Linear, ["lora_A", adapter, "weight"]) => (Self::A, Some(*adapter)),
            (SiteKind::Linear, ["lora_B", "weight"]) => (Self::B, None),
            (SiteKind::Linear, ["lora_B", adapter, "weight"]) => (Self::B, Some(*adapter)),
            (SiteKind::Linear, ["lora_B", "bias"]) => (Self::Bias, None),
            (SiteKind::Linear, ["lora_B", adapter, "bias"]) => (Self::Bias, Some(*adapter)),
            (SiteKind::Linear, ["bias"] | ["base_layer", "bias"]) => (Self::SavedBias, None),
            (SiteKind::Embedding, ["lora_embedding_A"]) => (Self::A, None),
            (SiteKind::Embedding, ["lora_embedding_A", adapter]) => (Self::A, Some(*adapter)),
            (SiteKind::Embedding, ["lora_embedding_B"]) => (Self::B, None),
            (SiteKind::Embedding, ["lora_embedding_B", adapter]) => (Self::B, Some(*adapter)),
            (_, ["lora_magnitude_vector"] | ["lora_magnitude_vector", "weight"]) => (Self::Magnitude, None),
            (_, ["lora_magnitude_vector", adapter] | ["lora_magnitude_vector", adapter, "weight"]) => {
                (Self::Magnitude, Some(*adapter))
            }
            (_, ["weight"]) => (if is_saved { Self::Saved } else { Self::Copy }, None),
            (_, ["modules_to_save", "weight"]) => (Self::Saved, None),
            (_, ["modules_to_save", adapter, "weight"]) => (Self::Saved, Some(*adapter)),
            (_, ["base_layer" | "original_module", "weight"]) => (Self::Copy, None),
            _ => return None,
        };
        Some((part, adapter))
    }
}

/// The tensors of a file by site and part. Taking them out leaves what nobody asked for.
struct Found<'a> {
    sites: &'a SiteTable,
    file: &'a SafetensorsFile,
    /// Names in the file.
    names: BTreeMap<(usize, Part), String>,
}

impl<'a> Found<'a> {
    /// Finds out what every tensor is.
    fn sort(file: &'a SafetensorsFile, sites: &'a SiteTable, saved: &[usize]) -> Result<Self, AdapterError> {
        let mut found = Self { sites, file, names: BTreeMap::new() };
        let mut adapter = None;
        for name in file.names() {
            let path = name.strip_prefix(PREFIX).ok_or_else(|| {
                found.refuse(name, format!("unknown name; an adapter's tensors start with `{PREFIX}`"))
            })?;
            let (site, suffix) =
                find_site(path, sites).ok_or_else(|| found.refuse(name, unknown_module(path)))?;
            let kind = sites.get(site).kind;
            let (part, named) = Part::parse(suffix, kind, saved.contains(&site)).ok_or_else(|| {
                let module = &sites.get(site).module;
                found
                    .refuse(name, format!("unknown suffix `{suffix}` for the {} `{module}`", kind_name(kind)))
            })?;
            if let (Some(first), Some(other)) = (adapter, named)
                && first != other
            {
                return Err(
                    found.refuse(name, format!("of adapter `{other}`, but the file also holds `{first}`"))
                );
            }
            adapter = adapter.or(named);
            if let Some(other) = found.names.insert((site, part), name.to_owned()) {
                return Err(found.refuse(name, format!("the same part of the module as `{other}`")));
            }
        }
        Ok(found)
    }

    fn refuse(&self, tensor: &str, problem: String) -> AdapterError {
        AdapterError::Tensor { path: self.file.path().to_owned(), tensor: tensor.to_owned(), problem }
    }

    /// Takes a tensor out, checked for finite values, with its name.
    fn take(&mut self, site: usize, part: Part) -> Result<Option<(String, Tensor)>, AdapterError> {
        let Some(name) = self.names.remove(&(site, part)) else { return Ok(None) };
        let tensor = detach(&self.file.tensor(&name)?);
        match first_non_finite(&tensor) {
            Some((index, value)) => Err(self.refuse(&name, format!("element {index} is {value}"))),
            None => Ok(Some((name, tensor))),
        }
    }

    /// Takes everything that belongs to a planned site.
    fn take_site(&mut self, planned: &PlannedSite, config: &Config) -> Result<SiteAdapter, AdapterError> {
        let &PlannedSite { site: id, rank, scale, .. } = planned;
        let site = self.sites.get(id);
        let label = |part: Part| part.label(site.kind);
        let (a, b) = match (self.take(id, Part::A)?, self.take(id, Part::B)?) {
            (Some(a), Some(b)) => (a, b),
            (Some((name, _)), None) => {
                return Err(self.refuse(&name, format!("has no {} beside it", label(Part::B))));
            }
            (None, Some((name, _))) => {
                return Err(self.refuse(&name, format!("has no {} beside it", label(Part::A))));
            }
            (None, None) => return Err(self.missing(site, Part::A, "target_modules", config)),
        };
        self.check_pair(site, &a, &b, planned)?;

        let bias = self.take_vector(id, Part::Bias, config.lora_bias, "lora_bias", config)?;
        let magnitude = self.take_vector(id, Part::Magnitude, config.use_dora, "use_dora", config)?;
        Ok(SiteAdapter { site: id, rank, scale, a: a.1, b: b.1, bias, magnitude })
    }

    /// Takes a tensor of `[out_features]` that must be there if and only if `field` is true.
    fn take_vector(
        &mut self,
        id: usize,
        part: Part,
        is_wanted: bool,
        field: &str,
        config: &Config,
    ) -> Result<Option<Vec<f32>>, AdapterError> {
        let site = self.sites.get(id);
        match (self.take(id, part)?, is_wanted) {
            (None, false) => Ok(None),
            (None, true) => Err(self.missing(site, part, field, config)),
            (Some((name, _)), false) => {
                Err(self.refuse(&name, format!("present, but `{field}` is not true in {CONFIG_FILE}")))
            }
            (Some((name, tensor)), true) => {
                self.check_shape(&name, &tensor, &[site.out_features], site)?;
                Ok(Some(tensor.to_f32()))
            }
        }
    }

    fn take_saved(&mut self, id: usize, config: &Config) -> Result<SavedModule, AdapterError> {
        let site = self.sites.get(id);
        let Some((name, weight)) = self.take(id, Part::Saved)? else {
            return Err(self.missing(site, Part::Saved, "modules_to_save", config));
        };
        self.check_shape(&name, &weight, &weight_shape(site), site)?;
        Ok(SavedModule { site: id, weight })
    }

    /// Takes the biases that replace the base's: all that are in the file, and at least those that `bias` asks for.
    fn take_biases(&mut self, plan: &Plan, config: &Config) -> Result<Vec<SavedBias>, AdapterError> {
        let mut biases = Vec::new();
        for (id, site) in self.sites.iter() {
            let is_adapted = plan.adapted.iter().any(|planned| planned.site == id);
            match self.take(id, Part::SavedBias)? {
                Some((name, _)) if !site.bias => {
                    let problem =
                        format!("`{}` of this base has no bias; made for another base?", site.module);
                    return Err(self.refuse(&name, problem));
                }
                Some((name, tensor)) => {
                    self.check_shape(&name, &tensor, &[site.out_features], site)?;
                    biases.push(SavedBias { site: id, bias: tensor.to_f32() });
                }
                None if config.biases.include(site, is_adapted) => {
                    return Err(self.missing(site, Part::SavedBias, "bias", config));
                }
                None => {}
            }
        }
        Ok(biases)
    }

    fn missing(&self, site: &Site, part: Part, field: &str, config: &Config) -> AdapterError {
        let label = part.label(site.kind);
        config.refuse(field, format!("asks for `{}`, whose {label} is not in {WEIGHTS_FILE}", site.module))
    }

    fn check_shape(
        &self,
        name: &str,
        tensor: &Tensor,
        wanted: &[usize],
        site: &Site,
    ) -> Result<(), AdapterError> {
        if tensor.shape() == wanted {
            return Ok(());
        }
        let problem = format!(
            "shape {:?}, but `{}` of this base wants {wanted:?}; made for another base?",
            tensor.shape(),
            site.module
        );
        Err(self.refuse(name, problem))
    }

    /// Checks `A [rank, in_features]` and `B [out_features, rank]`.
    fn check_pair(
        &self,
        site: &Site,
        (a_name, a): &(String, Tensor),
        (b_name, b): &(String, Tensor),
        planned: &PlannedSite,
    ) -> Result<(), AdapterError> {
        let &PlannedSite { rank, rank_field, .. } = planned;
        let matrix = |name: &str, tensor: &Tensor| match *tensor.shape() {
            [rows, columns] => Ok((rows, columns)),
            ref shape => Err(self.refuse(name, format!("shape {shape:?} is not a matrix"))),
        };
        let (a_rank, a_width) = matrix(a_name, a)?;
        let (b_width, b_rank) = matrix(b_name, b)?;

        // (name, shape, its rank, its width, the width wanted, the shape wanted in words)
        let sides = [
            (a_name, a.shape(), a_rank, a_width, site.in_features, format!("[{rank}, {}]", site.in_features)),
            (
                b_name,
                b.shape(),
                b_rank,
                b_width,
                site.out_features,
                format!("[{}, {rank}]", site.out_features),
            ),
        ];
        for (name, shape, found_rank, width, wanted_width, wanted) in sides {
            if width == wanted_width {
                continue;
            }
            let module = &site.module;
            let problem = if (width, found_rank) == (rank, wanted_width) {
                format!("shape {shape:?} is transposed; `{module}` wants {wanted}")
            } else {
                format!(
                    "width {width} in shape {shape:?}, but `{module}` of this base has {wanted_width} (wanted \
                     {wanted}); made for another base?"
                )
            };
            return Err(self.refuse(name, problem));
        }
        if a_rank != b_rank {
            let problem = format!("rank {b_rank} (shape {:?}), but `{a_name}` has rank {a_rank}", b.shape());
            return Err(self.refuse(b_name, problem));
        }
        if a_rank != rank {
            let problem = format!("rank {a_rank}, but `{rank_field}` in {CONFIG_FILE} says {rank}");
            return Err(self.refuse(a_name, problem));
        }
        Ok(())
    }

    /// Takes out the copies of base weights, which must be the base's: an adapter cannot bring another base along.
    fn check_copies(&mut self, base: &dyn BaseWeights) -> Result<(), AdapterError> {
        let is_copy = |&(_, part): &(usize, Part)| part == Part::Copy;
        let copies: Vec<usize> =
            self.names.keys().filter(|key| is_copy(key)).map(|&(site, _)| site).collect();
        for id in copies {
            let Some(name) = self.names.remove(&(id, Part::Copy)) else { continue };
            let site = self.sites.get(id);
            let copy = self.file.tensor(&name)?;
            self.check_shape(&name, &copy, &weight_shape(site), site)?;
            if let Some((index, found, wanted)) = first_difference(&copy, &base.weight(id)) {
                let problem = format!(
                    "a copy of the base's `{}`, but element {index} is {found} and the base has {wanted}: the \
                     adapter was made for another base or trained this weight without `modules_to_save`",
                    site.module
                );
                return Err(self.refuse(&name, problem));
            }
        }
        Ok(())
    }

    fn check_nothing_left(&self) -> Result<(), AdapterError> {
        let Some((&(site, part), name)) = self.names.first_key_value() else { return Ok(()) };
        let field = if part == Part::Saved { "modules_to_save" } else { "target_modules" };
        let module = &self.sites.get(site).module;
        Err(self.refuse(name, format!("`{field}` in {CONFIG_FILE} does not ask for `{module}`")))
    }
}

/// Splits a tensor's path into its site and what follows.
fn find_site<'a>(path: &'a str, sites: &SiteTable) -> Option<(usize, &'a str)> {
    let dots = path.rmatch_indices('.').map(|(at, _)| at);
    dots.into_iter().find_map(|at| Some((sites.find(&path[..at])?, &path[at + 1..])))
}

fn unknown_module(path: &str) -> String {
    let module = path.split_once(".lora_").map_or(path, |(module, _)| module);
    format!("`{module}` is not an adaptable module of this base; made for another base?")
}

fn kind_name(kind: SiteKind) -> &'static str {
    match kind {
        SiteKind::Linear => "linear layer",
        SiteKind::Embedding => "embedding",
    }
}

/// The tensor with bytes of its own, so that keeping it does not keep the whole file (copies of embeddings can
/// make that a thousand times larger than the adapter).
fn detach(tensor: &Tensor) -> Tensor {
    Tensor::new(tensor.dtype(), tensor.shape().to_vec(), Bytes::new(tensor.bytes().to_vec()))
}

/// Elements converted at a time, to bound the memory that long tensors take.
const BLOCK: usize = 1 << 16;

/// The values of a tensor, block by block.
fn blocks(tensor: &Tensor) -> impl Iterator<Item = Vec<f32>> + '_ {
    let size = tensor.dtype().size();
    (0..tensor.len()).step_by(BLOCK).map(move |start| {
        let len = BLOCK.min(tensor.len() - start);
        let bytes = tensor.bytes().slice(start * size..(start + len) * size);
        Tensor::new(tensor.dtype(), vec![len], bytes).to_f32()
    })
}

/// Index and value of the first infinity or NaN.
pub(crate) fn first_non_finite(tensor: &Tensor) -> Option<(usize, f32)> {
    blocks(tensor).enumerate().find_map(|(block, values)| {
        let index = values.iter().position(|value| !value.is_finite())?;
        Some((block * BLOCK + index, values[index]))
    })
}

/// Index and both values where two tensors of one shape first differ once both are rounded to the coarser of
/// their dtypes.
fn first_difference(left: &Tensor, right: &Tensor) -> Option<(usize, f32, f32)> {
    let has = |dtype: DType| left.dtype() == dtype || right.dtype() == dtype;
    let coarser = [DType::BF16, DType::F16, DType::F32].into_iter().find(|&dtype| has(dtype))?;
    blocks(left).zip(blocks(right)).enumerate().find_map(|(block, (left, right))| {
        let index =
            left.iter().zip(&right).position(|(&l, &r)| round_to(coarser, l) != round_to(coarser, r))?;
        Some((block * BLOCK + index, left[index], right[index]))
    })
}

fn round_to(dtype: DType, value: f32) -> f32 {
    match dtype {
        DType::F32 => value,
        DType::F16 => half::f16::from_f32(value).to_f32(),
        DType::BF16 => half::bf16::from_f32(value).to_f32(),
    }
}
