//! The tensors of a safetensors file: listed, summed by dtype, and grouped for reading.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use rayon::iter::{IntoParallelRefIterator, ParallelIterator};
use serde::Serialize;

use super::ranges;
use crate::cli::Failure;
use crate::cli::output::{Align, Table, bytes, clean};
use crate::format::safetensors::SafetensorsFile;
use crate::format::sha256_file;
use crate::tensor::Tensor;

/// Elements looked at together.
const BLOCK: usize = 1 << 16;

/// A safetensors file.
#[derive(Serialize)]
pub(super) struct FileReport {
    kind: &'static str,
    path: String,
    /// SHA-256 of the file.
    hash: String,
    bytes: u64,
    #[serde(flatten)]
    tensors: Tensors,
}

/// The tensors of one or more files.
#[derive(Serialize)]
pub(super) struct Tensors {
    /// Elements of all tensors.
    pub parameters: u64,
    pub dtypes: Vec<DtypeTotal>,
    /// Infinities and NaNs in all tensors.
    pub non_finite: u64,
    pub metadata: BTreeMap<String, String>,
    pub tensors: Vec<TensorEntry>,
}

/// One tensor.
#[derive(Serialize)]
pub(super) struct TensorEntry {
    pub name: String,
    pub dtype: String,
    pub shape: Vec<usize>,
    pub bytes: u64,
    /// Infinities and NaNs; `None` for a dtype that is not read.
    pub non_finite: Option<u64>,
}

/// What is stored in one dtype.
#[derive(Serialize)]
pub(super) struct DtypeTotal {
    dtype: String,
    tensors: u64,
    parameters: u64,
    bytes: u64,
}

/// Sums by dtype; the first to come is listed first.
#[derive(Default)]
pub(super) struct DtypeTotals(Vec<DtypeTotal>);

impl DtypeTotals {
    pub fn add(&mut self, dtype: String, elements: u64, bytes: u64) {
        let index = self.0.iter().position(|total| total.dtype == dtype).unwrap_or_else(|| {
            self.0.push(DtypeTotal { dtype, tensors: 0, parameters: 0, bytes: 0 });
            self.0.len() - 1
        });
        let total = &mut self.0[index];
        total.tensors += 1;
        total.parameters += elements;
        total.bytes += bytes;
    }

    pub fn finish(self) -> Vec<DtypeTotal> {
        self.0
    }
}

/// Reads and checks a safetensors file.
pub(super) fn report(path: &Path) -> Result<FileReport, Failure> {
    let file = SafetensorsFile::open(path).map_err(Failure::failed)?;
    Ok(FileReport {
        kind: "safetensors",
        path: path.display().to_string(),
        hash: sha256_file(path).map_err(Failure::failed)?,
        bytes: file.file_len() as u64,
        tensors: Tensors::of(&file),
    })
}

impl Tensors {
    pub fn of(file: &SafetensorsFile) -> Self {
        let names: Vec<&str> = file.names().collect();
        let tensors: Vec<TensorEntry> = names.par_iter().map(|name| entry(file, name)).collect();
        let mut dtypes = DtypeTotals::default();
        for tensor in &tensors {
            dtypes.add(tensor.dtype.clone(), elements(&tensor.shape), tensor.bytes);
        }
        Self {
            parameters: tensors.iter().map(|tensor| elements(&tensor.shape)).sum(),
            dtypes: dtypes.finish(),
            non_finite: tensors.iter().filter_map(|tensor| tensor.non_finite).sum(),
            metadata: file.metadata().clone(),
            tensors,
        }
    }
}

fn entry(file: &SafetensorsFile, name: &str) -> TensorEntry {
    TensorEntry {
        name: name.to_owned(),
        dtype: file.dtype(name).map(|dtype| dtype.to_string()).unwrap_or_default(),
        shape: file.shape(name).unwrap_or_default().to_vec(),
        bytes: file.data_len(name).unwrap_or(0) as u64,
        non_finite: file.tensor(name).ok().map(|tensor| count_non_finite(&tensor)),
    }
}

fn elements(shape: &[usize]) -> u64 {
    shape.iter().map(|&size| size as u64).product()
}

/// Counts block by block, so that a large tensor is never there twice.
fn count_non_finite(tensor: &Tensor) -> u64 {
    let size = tensor.dtype().size();
    let blocks = (0..tensor.len()).step_by(BLOCK).map(|start| {
        let len = BLOCK.min(tensor.len() - start);
        let bytes = tensor.bytes().slice(start * size..(start + len) * size);
        let values = Tensor::new(tensor.dtype(), vec![len], bytes).to_f32();
        values.iter().filter(|value| !value.is_finite()).count() as u64
    });
    blocks.sum()
}

/// `2.1 MiB in 70 tensors: F32 …` for each dtype.
pub(super) fn describe_dtypes(totals: &[DtypeTotal]) -> String {
    let each = totals.iter().map(|total| {
        let count = if total.tensors == 1 { "tensor" } else { "tensors" };
        format!("{} {} in {} {count}", total.dtype, bytes(total.bytes), total.tensors)
    });
    each.collect::<Vec<_>>().join(", ")
}

/// A row per name, where names that differ in their block's number only share one.
pub(super) fn table(tensors: &[TensorEntry]) -> Table {
    let mut groups: Vec<(String, Vec<usize>, &TensorEntry, u64)> = Vec::new();
    for tensor in tensors {
        let (name, block) = split_block(&tensor.name);
        let non_finite = tensor.non_finite.unwrap_or(0);
        let same = |(other, _, first, _): &&mut (String, Vec<usize>, &TensorEntry, u64)| {
            *other == name
                && first.dtype == tensor.dtype
                && first.shape == tensor.shape
                && first.non_finite.is_some() == tensor.non_finite.is_some()
        };
        match groups.iter_mut().find(same) {
            Some((_, blocks, _, count)) if block.is_some() => {
                blocks.extend(block);
                *count += non_finite;
            }
            _ => groups.push((name, block.into_iter().collect(), tensor, non_finite)),
        }
    }
    let mut table = Table::new(&[Align::Left, Align::Left, Align::Left, Align::Left, Align::Right]);
    table.row(["tensor", "blocks", "dtype", "shape", "not finite"]);
    for (name, mut blocks, tensor, non_finite) in groups {
        blocks.sort_unstable();
        let count = if tensor.non_finite.is_some() { non_finite.to_string() } else { "not read".to_owned() };
        table.row([name, ranges(&blocks), tensor.dtype.clone(), format!("{:?}", tensor.shape), count]);
    }
    table
}

/// A name with `*` for its first component that is a number, and that number.
fn split_block(name: &str) -> (String, Option<usize>) {
    let mut block = None;
    let components = name.split('.').map(|component| match component.parse() {
        Ok(number) if block.is_none() && component == usize::to_string(&number) => {
            block = Some(number);
            "*"
        }
        _ => component,
    });
    (components.collect::<Vec<_>>().join("."), block)
}

impl fmt::Display for FileReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut facts = Table::new(&[Align::Left, Align::Left]);
        facts.row(["file", &self.path]);
        facts.row(["size", &bytes(self.bytes)]);
        facts.row(["parameters", &self.tensors.parameters.to_string()]);
        facts.row(["dtypes", &describe_dtypes(&self.tensors.dtypes)]);
        facts.row(["not finite", &self.tensors.non_finite.to_string()]);
        facts.row(["hash", &self.hash]);
        for (key, value) in &self.tensors.metadata {
            facts.row(["metadata", &format!("{} = {}", clean(key), clean(value))]);
        }
        write!(f, "{facts}\n{}", table(&self.tensors.tensors))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_number_of_a_name_is_its_block() {
        assert_eq!(split_block("model.layers.12.mlp.0.w"), ("model.layers.*.mlp.0.w".to_owned(), Some(12)));
        assert_eq!(split_block("lm_head.weight"), ("lm_head.weight".to_owned(), None));
        assert_eq!(split_block("a.007.b"), ("a.007.b".to_owned(), None));
    }

    #[test]
    fn every_infinity_and_nan_is_counted() {
        let mut values = vec![0.5; 3 * BLOCK + 7];
        (values[0], values[BLOCK], values[3 * BLOCK + 6]) = (f32::NAN, f32::INFINITY, f32::NEG_INFINITY);
        assert_eq!(count_non_finite(&Tensor::from_f32(vec![values.len()], &values)), 3);
        assert_eq!(count_non_finite(&Tensor::from_f32(vec![0], &[])), 0);
    }
}
