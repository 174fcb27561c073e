//! Files: checked safetensors in, safetensors out, strict JSON, atomic writes, hashes.
//!
//! Everything that comes from disk passes through here first, so that the rest of the crate may rely on it: a
//! file that is not exactly what its format says is refused with the file, the place and the value. Everything
//! that goes to disk appears whole or not at all.

mod atomic;
mod describe;
mod json;
pub mod safetensors;

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

pub use atomic::{write_atomic, write_text};
pub(crate) use describe::{describe, shorten, shorten_to};
pub use json::{parse_json, parse_text, read_json};

/// Why a file could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum FormatError {
    #[error("{}: cannot {action}: {source}", path.display())]
    Io { path: PathBuf, action: &'static str, source: io::Error },
    #[error("{}: not a regular file", path.display())]
    NotAFile { path: PathBuf },
    #[error("{}: not valid JSON: {problem}", path.display())]
    Json { path: PathBuf, problem: String },
    #[error("{}: not a valid safetensors file: {problem}", path.display())]
    Safetensors { path: PathBuf, problem: String },
    #[error("{}: tensor `{tensor}`: {problem}", path.display())]
    Tensor { path: PathBuf, tensor: String, problem: String },
}

impl FormatError {
    /// Wraps an I/O error; `action` completes "cannot …", e.g. `"open"`.
    pub fn io(path: &Path, action: &'static str) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { path, action, source }
    }
}

/// A running SHA-256.
#[derive(Clone, Default)]
pub struct Sha256Hasher(Sha256);

impl Sha256Hasher {
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds bytes as they are; where fields follow each other, [`Self::field`] keeps them apart.
    pub fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    /// Adds a length and then the bytes, so that no two sequences of fields hash alike.
    pub fn field(&mut self, bytes: &[u8]) {
        self.0.update((bytes.len() as u64).to_le_bytes());
        self.0.update(bytes);
    }

    /// The digest as 64 lower-case hex digits.
    pub fn finish(self) -> String {
        self.0.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

/// SHA-256 of a file's bytes, in hex.
///
/// # Errors
/// When the file cannot be read.
pub fn sha256_file(path: &Path) -> Result<String, FormatError> {
    let mut file = open_regular(path)?;
    let mut hasher = Sha256Hasher::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer) {
            Ok(0) => return Ok(hasher.finish()),
            Ok(read) => hasher.update(&buffer[..read]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(FormatError::io(path, "read")(error)),
        }
    }
}

/// Opens a regular file for reading; a folder, pipe or device is refused before it can block.
pub(crate) fn open_regular(path: &Path) -> Result<File, FormatError> {
    let metadata = std::fs::metadata(path).map_err(FormatError::io(path, "open"))?;
    if !metadata.is_file() {
        return Err(FormatError::NotAFile { path: path.to_owned() });
    }
    File::open(path).map_err(FormatError::io(path, "open"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sha256_is_the_standard_one() {
        let mut hasher = Sha256Hasher::new();
        hasher.update(b"a");
        hasher.update(b"bc");
        assert_eq!(hasher.finish(), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    }

    #[test]
    fn hashing_a_file_equals_hashing_its_bytes() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("data");
        let bytes: Vec<u8> = (0..3_000_000u32).map(|i| (i * 7) as u8).collect();
        std::fs::write(&path, &bytes).unwrap();
        let mut hasher = Sha256Hasher::new();
        hasher.update(&bytes);
        assert_eq!(sha256_file(&path).unwrap(), hasher.finish());
    }

    #[test]
    fn fields_do_not_run_into_each_other() {
        let digest = |fields: [&str; 2]| {
            let mut hasher = Sha256Hasher::new();
            fields.iter().for_each(|field| hasher.field(field.as_bytes()));
            hasher.finish()
        };
        assert_ne!(digest(["ab", "c"]), digest(["a", "bc"]));
    }

    #[test]
    fn a_folder_is_not_a_file() {
        let folder = tempfile::tempdir().unwrap();
        let error = sha256_file(folder.path()).unwrap_err();
        assert!(matches!(error, FormatError::NotAFile { .. }), "{error}");
    }
}
