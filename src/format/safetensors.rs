//! The check layer in front of safetensors files, and their writer.
//!
//! A file is `N` (u64, little-endian), `N` bytes of JSON, then the data:
//!
//! ```text
//! {"__metadata__": {string: string}, name: {"dtype": …, "shape": […], "data_offsets": [begin, end]}, …}
//! ```
//!
//! with offsets counted from the first byte after the header. The [format description][format] asks for more than
//! the `safetensors` crate verifies (it keeps one of two equal keys and takes a header with a leading space), and
//! the crate's errors name no file and seldom a tensor. So the header is parsed here, keys seen one by one, and
//! the ranges must tile the data exactly; the crate contributes its dtypes, and in the tests its second opinion.
//!
//! [format]: https://github.com/huggingface/safetensors#format

mod header;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::io::{Read, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};

use memmap2::Mmap;
use safetensors::Dtype;
use serde_json::json;

use super::{FormatError, open_regular, write_atomic};
use crate::tensor::{Bytes, DType, Tensor};
use header::{Entry, Header};

/// Largest header, the reference implementation's limit too.
const MAX_HEADER_BYTES: usize = 100_000_000;
/// Bytes of the header's length.
const LENGTH_BYTES: usize = 8;

/// A checked safetensors file. Tensors taken from it share its bytes.
#[derive(Clone)]
pub struct SafetensorsFile {
    path: PathBuf,
    bytes: Bytes,
    /// In the order of their data.
    tensors: Vec<StoredTensor>,
    by_name: HashMap<String, usize>,
    metadata: BTreeMap<String, String>,
}

#[derive(Clone, Debug)]
struct StoredTensor {
    name: String,
    dtype: Dtype,
    shape: Vec<usize>,
    /// Within the file's bytes.
    range: Range<usize>,
}

impl SafetensorsFile {
    /// Maps a file read-only and checks it. For files that nobody writes into while they are in use, such as a
    /// base model; for others [`Self::read`] takes a copy.
    ///
    /// # Errors
    /// When the file cannot be opened or is not a valid safetensors file.
    pub fn open(path: &Path) -> Result<Self, FormatError> {
        let file = open_regular(path)?;
        // SAFETY: the map is read-only, and this crate replaces files by renaming, never by writing into them, so
        // the mapped file keeps its bytes. A foreign process that truncates it gets this process a bus error,
        // which is the known price of mapping; no reference outlives the map, since `Bytes` owns it.
        let map = unsafe { Mmap::map(&file) }.map_err(FormatError::io(path, "map"))?;
        Self::parse(path, Bytes::new(map))
    }

    /// Reads a file into memory and checks it: what was checked stays true whatever happens to the file.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn read(path: &Path) -> Result<Self, FormatError> {
        let mut bytes = Vec::new();
        open_regular(path)?.read_to_end(&mut bytes).map_err(FormatError::io(path, "read"))?;
        Self::parse(path, Bytes::new(bytes))
    }

    /// Checks the bytes of a safetensors file; `path` is for messages.
    ///
    /// # Errors
    /// When the bytes are not a valid safetensors file, naming the tensor where there is one.
    pub fn parse(path: &Path, bytes: Bytes) -> Result<Self, FormatError> {
        let invalid = |problem: String| FormatError::Safetensors { path: path.to_owned(), problem };
        let header_range = header_range(&bytes).map_err(invalid)?;
        let data_start = header_range.end;
        let Header { tensors: entries, metadata } = Header::parse(&bytes[header_range]).map_err(invalid)?;
        let tensors = tile(path, entries, data_start, bytes.len() - data_start)?;
        let by_name =
            tensors.iter().enumerate().map(|(index, tensor)| (tensor.name.clone(), index)).collect();
        Ok(Self { path: path.to_owned(), bytes, tensors, by_name, metadata })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Tensor names in the order of their data.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.iter().map(|tensor| tensor.name.as_str())
    }

    pub fn contains(&self, name: &str) -> bool {
        self.by_name.contains_key(name)
    }

    /// Shape of a tensor of any dtype.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        self.find(name).map(|tensor| tensor.shape.as_slice())
    }

    /// Dtype of a tensor as stored, also one that [`Self::tensor`] refuses.
    pub fn dtype(&self, name: &str) -> Option<Dtype> {
        self.find(name).map(|tensor| tensor.dtype)
    }

    /// Bytes of a tensor's data.
    pub fn data_len(&self, name: &str) -> Option<usize> {
        self.find(name).map(|tensor| tensor.range.len())
    }

    /// Bytes of the whole file, header included.
    pub fn file_len(&self) -> usize {
        self.bytes.len()
    }

    /// The `__metadata__` strings.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    /// One tensor, sharing the file's bytes.
    ///
    /// # Errors
    /// When there is no such tensor, or its dtype is not F32, F16 or BF16.
    pub fn tensor(&self, name: &str) -> Result<Tensor, FormatError> {
        let refuse = |problem: String| FormatError::Tensor {
            path: self.path.clone(),
            tensor: name.to_owned(),
            problem,
        };
        let stored = self.find(name).ok_or_else(|| refuse("not in this file".to_owned()))?;
        let dtype = match stored.dtype {
            Dtype::F32 => DType::F32,
            Dtype::F16 => DType::F16,
            Dtype::BF16 => DType::BF16,
            other => return Err(refuse(format!("dtype {other} is not supported (F32, F16 and BF16 are)"))),
        };
        Ok(Tensor::new(dtype, stored.shape.clone(), self.bytes.slice(stored.range.clone())))
    }

    fn find(&self, name: &str) -> Option<&StoredTensor> {
        self.by_name.get(name).map(|&index| &self.tensors[index])
    }
}

impl fmt::Debug for SafetensorsFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SafetensorsFile({}, {} tensors)", self.path.display(), self.tensors.len())
    }
}

/// Where the header's JSON lies.
fn header_range(bytes: &[u8]) -> Result<Range<usize>, String> {
    let Some((length, rest)) = bytes.split_first_chunk::<LENGTH_BYTES>() else {
        return Err(format!("{} bytes are too short for a header length of {LENGTH_BYTES}", bytes.len()));
    };
    let length = u64::from_le_bytes(*length);
    if length > MAX_HEADER_BYTES as u64 {
        return Err(format!("a header of {length} bytes is over the limit of {MAX_HEADER_BYTES}"));
    }
    let length = length as usize;
    if length > rest.len() {
        return Err(format!("a header of {length} bytes reaches past the end; {} bytes follow", rest.len()));
    }
    Ok(LENGTH_BYTES..LENGTH_BYTES + length)
}

/// Puts tensors into the order of their data and checks that they tile it: each range as long as its shape and
/// dtype say, the first at 0, each at the end of the one before, the last at the end of the file.
fn tile(
    path: &Path,
    mut entries: Vec<(String, Entry)>,
    data_start: usize,
    data_len: usize,
) -> Result<Vec<StoredTensor>, FormatError> {
    entries.sort_by_key(|(_, entry)| entry.data_offsets);
    let mut tensors: Vec<StoredTensor> = Vec::with_capacity(entries.len());
    let mut end_of_previous = 0;
    for (name, entry) in entries {
        let problem = misfit(&entry, data_len).or_else(|| {
            let begin = entry.data_offsets.0;
            let previous = tensors.last().map_or("the header", |tensor| &tensor.name);
            if begin > end_of_previous {
                Some(format!("a hole: bytes {end_of_previous}..{begin} before it belong to no tensor"))
            } else if begin < end_of_previous {
                Some(format!("overlap: starts at {begin}, before `{previous}` ends at {end_of_previous}"))
            } else {
                None
            }
        });
        if let Some(problem) = problem {
            return Err(FormatError::Tensor { path: path.to_owned(), tensor: name, problem });
        }
        let (begin, end) = entry.data_offsets;
        end_of_previous = end;
        let range = data_start + begin..data_start + end;
        tensors.push(StoredTensor { name, dtype: entry.dtype, shape: entry.shape, range });
    }
    if end_of_previous != data_len {
        let last =
            tensors.last().map_or_else(|| "no tensor".to_owned(), |tensor| format!("`{}`", tensor.name));
        let problem = format!("{} trailing bytes after the last tensor ({last})", data_len - end_of_previous);
        return Err(FormatError::Safetensors { path: path.to_owned(), problem });
    }
    Ok(tensors)
}

/// What is wrong with one entry by itself.
fn misfit(entry: &Entry, data_len: usize) -> Option<String> {
    let (begin, end) = entry.data_offsets;
    let Entry { dtype, shape, .. } = entry;
    if end < begin {
        return Some(format!("reversed data_offsets [{begin}, {end}]"));
    }
    if end > data_len {
        return Some(format!("data_offsets [{begin}, {end}] reach past the {data_len} bytes of data"));
    }
    let bits = shape.iter().try_fold(1usize, |product, &size| product.checked_mul(size));
    let Some(bits) = bits.and_then(|elements| elements.checked_mul(dtype.bitsize())) else {
        return Some(format!("shape {shape:?} of {dtype} overflows"));
    };
    if bits % 8 != 0 {
        return Some(format!("shape {shape:?} of {dtype} is no whole number of bytes"));
    }
    if bits / 8 != end - begin {
        return Some(format!(
            "shape {shape:?} of {dtype} takes {} bytes, but data_offsets [{begin}, {end}] hold {}",
            bits / 8,
            end - begin
        ));
    }
    None
}

/// Writes a safetensors file atomically (see [`write_atomic`]).
///
/// Tensors lie widest dtype first, then by name, as the reference writer puts them, which keeps each aligned to
/// its element size; the same tensors and metadata give the same bytes.
///
/// # Errors
/// When a name occurs twice or is `__metadata__`, the header exceeds 100 MB, or the file cannot be written.
pub fn write_safetensors(
    path: &Path,
    tensors: &[(String, Tensor)],
    metadata: &BTreeMap<String, String>,
) -> Result<(), FormatError> {
    let mut ordered: Vec<&(String, Tensor)> = tensors.iter().collect();
    ordered.sort_by_key(|(name, tensor)| (std::cmp::Reverse(tensor.dtype().size()), name));

    let mut header = serde_json::Map::new();
    if !metadata.is_empty() {
        header.insert(header::METADATA_KEY.to_owned(), json!(metadata));
    }
    let mut offset = 0;
    for (name, tensor) in &ordered {
        let refuse = |problem: &str| FormatError::Tensor {
            path: path.to_owned(),
            tensor: name.clone(),
            problem: problem.to_owned(),
        };
        if name == header::METADATA_KEY {
            return Err(refuse("this name is reserved"));
        }
        let end = offset + tensor.bytes().len();
        let entry = json!({
            "dtype": tensor.dtype().to_string(),
            "shape": tensor.shape(),
            "data_offsets": [offset, end],
        });
        if header.insert(name.clone(), entry).is_some() {
            return Err(refuse("occurs twice among the tensors to write"));
        }
        offset = end;
    }
    let mut header = serde_json::Value::Object(header).to_string();
    // The data starts at a multiple of 8 when the header is padded to one.
    let padding = header.len().next_multiple_of(LENGTH_BYTES) - header.len();
    header.extend(std::iter::repeat_n(' ', padding));
    if header.len() > MAX_HEADER_BYTES {
        let problem = format!("its header would be over {MAX_HEADER_BYTES} bytes");
        return Err(FormatError::Safetensors { path: path.to_owned(), problem });
    }

    write_atomic(path, |file| {
        file.write_all(&(header.len() as u64).to_le_bytes())?;
        file.write_all(header.as_bytes())?;
        ordered.iter().try_for_each(|(_, tensor)| file.write_all(tensor.bytes()))
    })
}
