//! Jobs against each other: their names, and the folders that they read and write.

use std::path::{Component, Path, PathBuf};

use super::ConfigError;
use super::document::{Document, Given};
use super::job::Job;
use super::keys::InitFrom;
use crate::adapter::peft::{AdapterError, validate_adapter_name};

/// What a run writes beside the folders of its jobs.
const RUN_FILES: &[&str] = &["report.html"];

/// Every name is one that an adapter can be served under and a folder can have, and no two are the same folder.
pub(super) fn check_names(
    document: &Document,
    names: &[&Given<String>],
    model: &Path,
) -> Result<(), ConfigError> {
    let model = resolve(model);
    let base = model.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    for (index, name) in names.iter().enumerate() {
        let problem = match validate_adapter_name(name, &base) {
            Err(AdapterError::Name { problem, .. }) => Some(problem),
            _ if name.value == "." => Some("it is the folder that holds the jobs' folders"),
            _ if RUN_FILES.contains(&name.to_lowercase().as_str()) => {
                Some("a file of the run is called that")
            }
            _ => None,
        };
        if let Some(problem) = problem {
            let problem =
                format!("`name` is {:?}: {problem}; wanted a name for the job's folder", name.value);
            return Err(document.refuse(name.line, problem));
        }
        // Some file systems take no notice of case.
        let is_same = |other: &&&Given<String>| other.to_lowercase() == name.to_lowercase();
        if let Some(other) = names[..index].iter().find(is_same) {
            let line = other.line;
            let problem = if other.value == name.value {
                format!("job name `{}` is given twice, first in line {line}", name.value)
            } else {
                format!(
                    "jobs `{}` and `{}` (line {line}) may write the same folder: some file systems take no notice \
                         of case",
                    name.value, other.value
                )
            };
            return Err(document.refuse(name.line, problem));
        }
    }
    Ok(())
}

/// No job writes into the base, or reads what the run writes.
pub(super) fn check_folders(
    document: &Document,
    jobs: &[Job],
    model: &Given<String>,
    out: &Given<String>,
    folder: &Path,
) -> Result<(), ConfigError> {
    let base = resolve(&folder.join(&model.value));
    let root = resolve(&folder.join(&out.value));
    if root.starts_with(&base) {
        let problem =
            format!("`out` is {:?}, in the base's folder (line {}); wanted another", out.value, model.line);
        return Err(document.refuse(out.line, problem));
    }
    let folders: Vec<PathBuf> = jobs.iter().map(|job| resolve(&root.join(&job.name.value))).collect();
    for (job, folder) in jobs.iter().zip(&folders) {
        if base.starts_with(folder) {
            let problem = format!(
                "job `{}` would write into the folder {:?} (line {}), which holds the base; wanted another name or `out`",
                job.name.value,
                folder.display(),
                out.line
            );
            return Err(document.refuse(job.name.line, problem));
        }
    }
    for job in jobs {
        let Some(Given { value: InitFrom::Adapter(start), line }) = &job.keys.init_from else { continue };
        let start_folder = resolve(&folder.join(start));
        if let Some(writer) = folders.iter().position(|folder| *folder == start_folder) {
            let problem = format!(
                "job `{}` starts from {start:?}, which job `{}` of this run writes; wanted a folder that is there before \
                 the run, or a run of its own for each",
                job.name.value, jobs[writer].name.value
            );
            return Err(document.refuse(*line, problem));
        }
    }
    Ok(())
}

/// A path without links and `..`; what does not exist yet is taken as it is written.
fn resolve(path: &Path) -> PathBuf {
    let full = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    let mut resolved = PathBuf::new();
    for component in full.components() {
        match component {
            Component::ParentDir => drop(resolved.pop()),
            component => resolved.push(component),
        }
        if let Ok(real) = resolved.canonicalize() {
            resolved = real;
        }
    }
    resolved
}
