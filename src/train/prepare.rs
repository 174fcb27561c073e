//! What jobs need before they start: their data, read once for all of them, and the adapters that they begin with.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::Value;

use super::config::{AdapterConfig, JobConfig, Targets};
use super::data::{self, DataOptions, Dataset};
use super::job::TaskData;
use super::{TrainError, folder};
use crate::adapter::peft::{Limits, read_adapter};
use crate::adapter::{Adapter, Fresh, all_linear, fresh_adapter, named_sites};
use crate::model::Base;

/// A job with its data and the adapter that it begins with.
pub struct PreparedJob {
    pub config: JobConfig,
    pub data: Vec<TaskData>,
    pub template: Adapter,
    pub lineage: Vec<Value>,
    /// All keys of its configuration.
    pub resolved: Value,
}

/// Reads data, each file once.
pub(super) struct Reader<'a> {
    base: &'a Base,
    read: HashMap<(PathBuf, String), Arc<Dataset>>,
    /// What is odd about the data, with file and line.
    pub warnings: Vec<String>,
}

impl<'a> Reader<'a> {
    pub fn new(base: &'a Base) -> Self {
        Self { base, read: HashMap::new(), warnings: Vec::new() }
    }

    /// # Errors
    /// When a file of the job cannot be trained on, or the adapter that it begins with cannot be read.
    pub fn prepare(&mut self, config: &JobConfig, resolved: Value) -> Result<PreparedJob, TrainError> {
        let mut tasks = Vec::new();
        for task in &config.tasks {
            let options = DataOptions {
                format: task.format,
                max_length: config.max_length.min(self.base.config.max_position_embeddings),
                on_overlong: config.on_overlong,
                packing: config.packing,
            };
            let mut file = |path: &Option<PathBuf>| -> Result<Option<Arc<Dataset>>, TrainError> {
                path.as_ref().map(|path| self.file(path, &options)).transpose()
            };
            let (train, valid, test) = (file(&task.train)?, file(&task.valid)?, file(&task.test)?);
            let leaked = |split: &Option<Arc<Dataset>>| match (&train, split) {
                (Some(train), Some(split)) => data::leakage(train, split).samples,
                _ => 0,
            };
            let leakage = [leaked(&valid), leaked(&test)];
            for (count, split) in leakage.into_iter().zip([&task.valid, &task.test]) {
                if let (1.., Some(path)) = (count, split) {
                    self.warnings
                        .push(format!("{}: {count} samples are in the training data too", path.display()));
                }
            }
            tasks.push(TaskData { name: task.name.clone(), train, valid, test, leakage });
        }
        let (template, lineage) = self.template(config)?;
        Ok(PreparedJob { config: config.clone(), data: tasks, template, lineage, resolved })
    }

    fn file(&mut self, path: &Path, options: &DataOptions) -> Result<Arc<Dataset>, TrainError> {
        let key = (path.to_owned(), format!("{options:?}"));
        if let Some(data) = self.read.get(&key) {
            return Ok(Arc::clone(data));
        }
        let (data, warnings) = data::read_dataset(path, self.base, options)?;
        self.warnings.extend(warnings.iter().map(ToString::to_string));
        let data = Arc::new(data);
        self.read.insert(key, Arc::clone(&data));
        Ok(data)
    }

    fn template(&self, config: &JobConfig) -> Result<(Adapter, Vec<Value>), TrainError> {
        let checkpoint = &self.base.checkpoint;
        let table = &checkpoint.sites().table;
        let mut adapter = match &config.adapter {
            &AdapterConfig::Fresh { rank, alpha, ref targets, use_rslora, use_dora, .. } => {
                let sites = match targets {
                    Targets::AllLinear => all_linear(table),
                    Targets::Named(names) => named_sites(table, names)?,
                };
                let fresh = Fresh { rank, alpha, use_rslora, use_dora, seed: config.seed };
                fresh_adapter(table, &sites, &fresh, checkpoint)?
            }
            AdapterConfig::From { folder, .. } => {
                read_adapter(folder, table, checkpoint, Limits { max_rank: usize::MAX })?
            }
        };
        adapter.base_name = Some(self.base.name.clone());
        let lineage = match &config.adapter {
            AdapterConfig::From { folder, .. } => folder::lineage_of(folder)?,
            AdapterConfig::Fresh { .. } => Vec::new(),
        };
        Ok((adapter, lineage))
    }
}
