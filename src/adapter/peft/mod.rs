//! PEFT LoRA folders: `adapter_config.json` and `adapter_model.safetensors`, in and out.
//!
//! A folder is read against the sites of a base. Its configuration says which modules it adapts, with which rank
//! and scale; its tensors must be exactly those modules' tensors, in shapes that fit the base. Whatever PEFT
//! would do with a field or tensor is either done here too or refused by name; nothing is passed over.
//!
//! The reference is PEFT 0.21: `peft/tuners/lora/config.py` for the fields, `check_target_module_exists` for which
//! modules match, `get_pattern_key` for the patterns, `save_and_load.py` for the tensor names.

mod config;
mod modules;
mod read;
#[cfg(test)]
mod tests;
mod write;

use std::path::{Path, PathBuf};

use super::{Adapter, SavedBias, SavedModule, Site, SiteAdapter, SiteKind, SiteTable};
use crate::format::{FormatError, Sha256Hasher};
use crate::tensor::Tensor;

pub(super) use modules::is_path_suffix;
pub(crate) use read::first_non_finite;
pub use read::{BaseWeights, Limits, read_adapter};
pub use write::{WriteOptions, write_adapter};

/// The configuration file of an adapter folder.
pub const CONFIG_FILE: &str = "adapter_config.json";
/// The tensors of an adapter folder.
pub const WEIGHTS_FILE: &str = "adapter_model.safetensors";

/// Why an adapter was refused or could not be written.
#[derive(Debug, thiserror::Error)]
pub enum AdapterError {
    #[error(transparent)]
    Format(#[from] FormatError),
    /// The folder as a whole.
    #[error("{}: {problem}", path.display())]
    Folder { path: PathBuf, problem: String },
    /// One field of `adapter_config.json`.
    #[error("{}: field `{field}`: {problem}", path.display())]
    Field { path: PathBuf, field: String, problem: String },
    /// One tensor of `adapter_model.safetensors`.
    #[error("{}: tensor `{tensor}`: {problem}", path.display())]
    Tensor { path: PathBuf, tensor: String, problem: String },
    /// An adapter in memory that a PEFT folder cannot express.
    #[error("{}: cannot write module `{module}`: {problem}", path.display())]
    Module { path: PathBuf, module: String, problem: String },
    /// A name under which an adapter cannot be served.
    #[error("adapter name {name:?}: {problem}")]
    Name { name: String, problem: &'static str },
}

/// Checks the name under which an adapter is to be served beside a base called `base_name`.
///
/// # Errors
/// When the name is empty, has spaces at an edge, could be read as a path, a list or a quotation, holds a control
/// character, or is the base's name or `auto`, which asks for the router.
pub fn validate_adapter_name(name: &str, base_name: &str) -> Result<(), AdapterError> {
    let problem = if name.is_empty() {
        "it is empty"
    } else if name.trim() != name {
        "it starts or ends with a space"
    } else if name.contains(['/', '\\']) {
        "it contains a slash"
    } else if name.contains("..") {
        "it contains `..`"
    } else if name.contains(',') {
        "it contains a comma"
    } else if name.contains(['"', '\'', '`']) {
        "it contains a quote"
    } else if name.contains(char::is_control) {
        "it contains a control character"
    } else if name == base_name {
        "it is the base model's name"
    } else if name == "auto" {
        "`auto` is reserved for the router"
    } else {
        return Ok(());
    };
    Err(AdapterError::Name { name: name.to_owned(), problem })
}

/// The identity of an adapter: SHA-256 over its modules, ranks, scales and tensors, in hex.
///
/// The order of sites, the order of tensors in a file and the way a configuration is written do not enter it.
pub fn content_hash(adapter: &Adapter, sites: &SiteTable) -> String {
    let module = |site: usize| sites.get(site).module.as_str();
    let mut hasher = Sha256Hasher::new();
    hasher.field(b"loramux adapter 1");

    let mut adapted: Vec<&SiteAdapter> = adapter.sites.iter().collect();
    adapted.sort_by_key(|adapter| module(adapter.site));
    for adapter in adapted {
        hasher.field(module(adapter.site).as_bytes());
        hasher.field(&(adapter.rank as u64).to_le_bytes());
        hasher.field(&adapter.scale.to_bits().to_le_bytes());
        hash_tensor(&mut hasher, &adapter.a);
        hash_tensor(&mut hasher, &adapter.b);
        for vector in [&adapter.bias, &adapter.magnitude] {
            // An absent vector must not look like an empty one.
            hasher.field(&[u8::from(vector.is_some())]);
            hasher.field(bytemuck::cast_slice(vector.as_deref().unwrap_or_default()));
        }
    }

    let mut saved: Vec<&SavedModule> = adapter.saved_modules.iter().collect();
    saved.sort_by_key(|saved| module(saved.site));
    for saved in saved {
        hasher.field(b"saved");
        hasher.field(module(saved.site).as_bytes());
        hash_tensor(&mut hasher, &saved.weight);
    }

    let mut biases: Vec<&SavedBias> = adapter.saved_biases.iter().collect();
    biases.sort_by_key(|saved| module(saved.site));
    for saved in biases {
        hasher.field(b"saved bias");
        hasher.field(module(saved.site).as_bytes());
        hasher.field(bytemuck::cast_slice(&saved.bias));
    }
    hasher.finish()
}

fn hash_tensor(hasher: &mut Sha256Hasher, tensor: &Tensor) {
    hasher.field(tensor.dtype().to_string().as_bytes());
    for &size in tensor.shape() {
        hasher.update(&(size as u64).to_le_bytes());
    }
    hasher.field(tensor.bytes());
}

/// Shape of a site's own weight.
fn weight_shape(site: &Site) -> [usize; 2] {
    match site.kind {
        SiteKind::Linear => [site.out_features, site.in_features],
        SiteKind::Embedding => [site.in_features, site.out_features],
    }
}

/// Whether `modules_to_save` may name this site: the two that stand outside the blocks.
fn can_be_saved(site: &Site) -> bool {
    site.block.is_none()
}

/// PEFT's prefix of every tensor name.
const PREFIX: &str = "base_model.model.";

/// Joins a folder and a file name for messages and access.
fn file_in(folder: &Path, name: &str) -> PathBuf {
    folder.join(name)
}
