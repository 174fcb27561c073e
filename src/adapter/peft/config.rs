//! `adapter_config.json`: every field of PEFT's `LoraConfig`, applied, known to be without effect, or refused.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::modules::{Expression, Layers, Match, Selection, is_path_suffix};
use super::{AdapterError, CONFIG_FILE, Limits, can_be_saved, file_in};
use crate::adapter::{Site, SiteKind, SiteTable};
use crate::format::read_json;

/// What becomes of a field.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Treatment {
    /// Read below.
    Applied,
    /// Describes training, origin or storage; an adapter computes the same whatever it says.
    NoEffect,
    /// Would change what the adapter computes; refused unless it is null, false or empty.
    Unsupported,
    /// As `Unsupported`, but PEFT takes an empty list as set.
    UnsupportedUnlessNull,
}

use Treatment::{Applied, NoEffect, Unsupported, UnsupportedUnlessNull};

/// All fields of PEFT 0.21, those that earlier versions wrote, and what ms-swift adds.
pub(super) const FIELDS: &[(&str, Treatment)] = &[
    ("alora_invocation_tokens", UnsupportedUnlessNull),
    ("alpha_pattern", Applied),
    ("arrow_config", Unsupported),
    ("auto_mapping", NoEffect),
    ("base_model_name_or_path", Applied),
    ("bias", Applied),
    ("corda_config", NoEffect),
    ("enable_lora", Unsupported),
    ("ensure_weight_tying", Unsupported),
    ("eva_config", NoEffect),
    ("exclude_modules", Applied),
    // PEFT resets it to false for `nn.Linear` and does not read it for `nn.Embedding`, and every module of a
    // supported base is one of these: the stored A and B have the same layout either way.
    ("fan_in_fan_out", NoEffect),
    ("inference_mode", NoEffect),
    ("init_lora_weights", Applied),
    ("kasa_config", Unsupported),
    ("layer_replication", Unsupported),
    ("layers_pattern", Applied),
    ("layers_to_transform", Applied),
    ("loftq_config", NoEffect),
    ("lora_alpha", Applied),
    ("lora_bias", Applied),
    ("lora_dropout", NoEffect),
    ("lora_dtype", NoEffect),
    ("lora_ga_config", NoEffect),
    ("lorap_emb_lr", NoEffect),
    ("lorap_lr_ratio", NoEffect),
    ("megatron_config", Unsupported),
    ("megatron_core", NoEffect),
    ("merge_weights", NoEffect),
    ("modules_to_save", Applied),
    ("monteclora_config", Unsupported),
    ("peft_type", Applied),
    ("peft_version", NoEffect),
    ("qalora_group_size", NoEffect),
    ("r", Applied),
    ("rank_pattern", Applied),
    ("revision", NoEffect),
    ("runtime_config", NoEffect),
    ("target_modules", Applied),
    ("target_parameters", Unsupported),
    ("task_type", NoEffect),
    ("trainable_token_indices", Unsupported),
    ("use_bdlora", Unsupported),
    ("use_dora", Applied),
    ("use_qalora", Unsupported),
    ("use_rslora", Applied),
    ("velora_config", Unsupported),
];

/// Initialisations that leave the base as it is. The others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) subtract
/// something from the base's weights before training, so that the adapter belongs to a different base.
const PLAIN_INITS: &[&str] = &["eva", "gaussian", "mica", "orthogonal"];

/// Which biases of the base were trained along and replace the base's (`bias`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum TrainedBiases {
    /// `"none"`. PEFT still loads those that the file holds.
    None,
    /// `"all"`.
    All,
    /// `"lora_only"`: those of adapted modules.
    Adapted,
}

impl TrainedBiases {
    /// Whether the bias of `site` was trained.
    pub fn include(self, site: &Site, is_adapted: bool) -> bool {
        site.bias
            && match self {
                Self::None => false,
                Self::All => true,
                Self::Adapted => is_adapted,
            }
    }

    /// The value in a configuration.
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::All => "all",
            Self::Adapted => "lora_only",
        }
    }
}

/// A checked configuration.
#[derive(Debug)]
pub(super) struct Config {
    pub path: PathBuf,
    pub base_name: Option<String>,
    pub use_dora: bool,
    pub lora_bias: bool,
    pub biases: TrainedBiases,
    r: usize,
    alpha: f64,
    use_rslora: bool,
    rank_pattern: Vec<(Expression, usize)>,
    alpha_pattern: Vec<(Expression, f64)>,
    targets: Selection,
    exclude: Option<Selection>,
    layers: Option<Layers>,
    modules_to_save: Vec<String>,
}

/// What a configuration asks of a base.
#[derive(Debug, Default)]
pub(super) struct Plan {
    /// Adapted sites, by ascending id.
    pub adapted: Vec<PlannedSite>,
    /// Sites whose whole weight is replaced, by ascending id.
    pub saved: Vec<usize>,
}

#[derive(Debug, PartialEq)]
pub(super) struct PlannedSite {
    pub site: usize,
    pub rank: usize,
    pub scale: f32,
    /// The field that set the rank, for messages.
    pub rank_field: &'static str,
}

impl Config {
    /// Reads and checks the configuration in `folder`.
    ///
    /// # Errors
    /// When the file is absent or not JSON, or a field is unknown, unsupported or has a wrong value.
    pub fn read(folder: &Path) -> Result<Self, AdapterError> {
        let path = file_in(folder, CONFIG_FILE);
        let value = read_json(&path)?;
        Self::from_json(&path, &value)
    }

    /// Checks a configuration; `path` is for messages.
    ///
    /// # Errors
    /// As [`Self::read`], apart from reading.
    pub fn from_json(path: &Path, value: &Value) -> Result<Self, AdapterError> {
        let Value::Object(values) = value else {
            let problem = "the configuration is not a JSON object".to_owned();
            return Err(AdapterError::Folder { path: path.to_owned(), problem });
        };
        let fields = Fields { path, values };
        // The type comes first: another type's fields would be refused as unknown.
        match fields.get("peft_type").map(Value::as_str) {
            Some(Some("LORA")) => {}
            Some(_) => {
                let problem = format!("{} is not supported; \"LORA\" is", values["peft_type"]);
                return Err(fields.refuse("peft_type", problem));
            }
            None => return Err(fields.refuse("peft_type", "missing".to_owned())),
        }
        fields.refuse_unsupported()?;

        let config = Self {
            path: path.to_owned(),
            base_name: fields.string("base_model_name_or_path")?.map(str::to_owned),
            use_dora: fields.flag("use_dora")?,
            lora_bias: fields.flag("lora_bias")?,
            biases: fields.biases()?,
            r: fields.rank("r", fields.required("r")?)?,
            alpha: fields.finite("lora_alpha", fields.required("lora_alpha")?)?,
            use_rslora: fields.flag("use_rslora")?,
            rank_pattern: fields.pattern("rank_pattern", |value| fields.rank("rank_pattern", value))?,
            alpha_pattern: fields.pattern("alpha_pattern", |value| fields.finite("alpha_pattern", value))?,
            targets: fields.targets()?,
            exclude: fields.selection("exclude_modules")?,
            layers: fields.layers()?,
            modules_to_save: fields.names("modules_to_save")?.unwrap_or_default(),
        };
        if config.use_dora && config.lora_bias {
            return Err(fields.refuse("lora_bias", "not supported together with `use_dora`".to_owned()));
        }
        fields.check_initialisation()?;
        Ok(config)
    }

    /// Which sites of a base are adapted, how, and which are replaced.
    ///
    /// # Errors
    /// When a field names a module or layer that the base does not have or that cannot be adapted, when a rank
    /// exceeds the limit or a scale is not finite, or when nothing is left to adapt.
    pub fn plan(&self, sites: &SiteTable, limits: Limits) -> Result<Plan, AdapterError> {
        self.check_targets_exist(sites)?;
        let mut plan = Plan { adapted: Vec::new(), saved: self.saved_sites(sites)? };
        for (id, site) in sites.iter() {
            let is_linear = site.kind == SiteKind::Linear;
            let is_block_linear = is_linear && site.block.is_some();
            if plan.saved.contains(&id) || self.excludes(&site.module, is_block_linear)? {
                continue;
            }
            let selected = match self.targets.matches(&site.module, is_block_linear)? {
                Match::None => false,
                Match::Whole => true,
                Match::Partly => {
                    self.layers.as_ref().map_or(Ok(true), |layers| layers.contain(&site.module))?
                }
            };
            if selected {
                if !is_linear && (self.use_dora || self.lora_bias) {
                    let field = if self.use_dora { "use_dora" } else { "lora_bias" };
                    let problem = format!("not supported on the embedding `{}`", site.module);
                    return Err(self.refuse(field, problem));
                }
                plan.adapted.push(self.plan_site(id, &site.module, limits)?);
            }
        }
        if plan.adapted.is_empty() && plan.saved.is_empty() {
            let problem = "with the fields that narrow it, it selects no module of this base".to_owned();
            return Err(self.refuse("target_modules", problem));
        }
        Ok(plan)
    }

    fn plan_site(&self, site: usize, module: &str, limits: Limits) -> Result<PlannedSite, AdapterError> {
        let (rank_field, rank) = match first_match(&self.rank_pattern, module)? {
            Some(rank) => ("rank_pattern", rank),
            None => ("r", self.r),
        };
        if rank > limits.max_rank {
            let problem = format!("rank {rank} of `{module}` is over the limit of {}", limits.max_rank);
            return Err(self.refuse(rank_field, problem));
        }
        let (alpha_field, alpha) = match first_match(&self.alpha_pattern, module)? {
            Some(alpha) => ("alpha_pattern", alpha),
            None => ("lora_alpha", self.alpha),
        };
        let divisor = if self.use_rslora { (rank as f64).sqrt() } else { rank as f64 };
        let scale = (alpha / divisor) as f32;
        if !scale.is_finite() {
            let problem =
                format!("alpha {alpha:e} with rank {rank} gives `{module}` a scale that is not finite");
            return Err(self.refuse(alpha_field, problem));
        }
        Ok(PlannedSite { site, rank, scale, rank_field })
    }

    fn excludes(&self, module: &str, is_block_linear: bool) -> Result<bool, AdapterError> {
        match &self.exclude {
            Some(exclude) => Ok(exclude.matches(module, is_block_linear)? != Match::None),
            None => Ok(false),
        }
    }

    /// A listed target that the base does not have points to another base or to a slip of the pen.
    fn check_targets_exist(&self, sites: &SiteTable) -> Result<(), AdapterError> {
        if let Selection::Names(names) = &self.targets {
            let is_absent =
                |name: &&String| !sites.iter().any(|(_, site)| is_path_suffix(name, &site.module));
            if let Some(absent) = names.iter().find(is_absent) {
                let problem =
                    format!("`{absent}` matches no module of this base, which has {}", known(sites));
                return Err(self.refuse("target_modules", problem));
            }
        }
        if let Some(layers) = &self.layers {
            let blocks = sites.iter().filter_map(|(_, site)| site.block).max().map_or(0, |last| last + 1);
            if let Some(absent) = layers.indices.iter().find(|&&index| index >= blocks) {
                let problem = format!("layer {absent}, but this base has {blocks}; made for another base?");
                return Err(self.refuse("layers_to_transform", problem));
            }
        }
        Ok(())
    }

    fn saved_sites(&self, sites: &SiteTable) -> Result<Vec<usize>, AdapterError> {
        let mut saved = Vec::new();
        for name in &self.modules_to_save {
            let matching =
                sites.iter().filter(|(_, site)| can_be_saved(site) && is_path_suffix(name, &site.module));
            let before = saved.len();
            saved.extend(matching.map(|(id, _)| id));
            if saved.len() == before {
                let problem = format!("`{name}` is not supported; `lm_head` and `embed_tokens` are");
                return Err(self.refuse("modules_to_save", problem));
            }
        }
        saved.sort_unstable();
        saved.dedup();
        Ok(saved)
    }

    pub fn refuse(&self, field: &str, problem: String) -> AdapterError {
        AdapterError::Field { path: self.path.clone(), field: field.to_owned(), problem }
    }
}

/// The value of the first pattern that matches, as PEFT resolves patterns.
fn first_match<T: Copy>(patterns: &[(Expression, T)], module: &str) -> Result<Option<T>, AdapterError> {
    for (expression, value) in patterns {
        if expression.matches(module)? {
            return Ok(Some(*value));
        }
    }
    Ok(None)
}

/// The distinct last components of a base's modules, for messages.
fn known(sites: &SiteTable) -> String {
    let mut names: Vec<&str> = Vec::new();
    for (_, site) in sites.iter() {
        if !names.contains(&site.name()) {
            names.push(site.name());
        }
    }
    names.join(", ")
}

/// Typed access to the fields; null counts as absent.
struct Fields<'a> {
    path: &'a Path,
    values: &'a Map<String, Value>,
}

impl<'a> Fields<'a> {
    fn refuse(&self, field: &str, problem: String) -> AdapterError {
        AdapterError::Field { path: self.path.to_owned(), field: field.to_owned(), problem }
    }

    fn wrong_type(&self, field: &str, value: &Value, wanted: &str) -> AdapterError {
        self.refuse(field, format!("{value} is not {wanted}"))
    }

    fn get(&self, field: &str) -> Option<&'a Value> {
        self.values.get(field).filter(|value| !value.is_null())
    }

    fn required(&self, field: &str) -> Result<&'a Value, AdapterError> {
        self.get(field).ok_or_else(|| self.refuse(field, "missing".to_owned()))
    }

    fn refuse_unsupported(&self) -> Result<(), AdapterError> {
        for (field, value) in self.values {
            let treatment = FIELDS.iter().find(|(name, _)| name == field).map(|&(_, treatment)| treatment);
            match treatment {
                Some(Applied | NoEffect) => {}
                Some(Unsupported) if is_unset(value) => {}
                _ if value.is_null() => {}
                Some(_) => return Err(self.refuse(field, format!("{value} is not supported"))),
                None => return Err(self.refuse(field, format!("unknown field (its value is {value})"))),
            }
        }
        Ok(())
    }

    fn string(&self, field: &str) -> Result<Option<&'a str>, AdapterError> {
        match self.get(field) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(self.wrong_type(field, other, "a string")),
        }
    }

    fn flag(&self, field: &str) -> Result<bool, AdapterError> {
        match self.get(field) {
            None => Ok(false),
            Some(Value::Bool(flag)) => Ok(*flag),
            Some(other) => Err(self.wrong_type(field, other, "true or false")),
        }
    }

    fn biases(&self) -> Result<TrainedBiases, AdapterError> {
        const FIELD: &str = "bias";
        let Some(name) = self.string(FIELD)? else { return Ok(TrainedBiases::None) };
        [TrainedBiases::None, TrainedBiases::All, TrainedBiases::Adapted]
            .into_iter()
            .find(|biases| biases.name() == name)
            .ok_or_else(|| {
                self.refuse(FIELD, format!("\"{name}\" is not \"none\", \"all\" or \"lora_only\""))
            })
    }

    fn rank(&self, field: &str, value: &Value) -> Result<usize, AdapterError> {
        match value.as_u64().map(usize::try_from) {
            Some(Ok(rank)) if rank > 0 => Ok(rank),
            _ => Err(self.wrong_type(field, value, "a rank (a whole number above 0)")),
        }
    }

    fn finite(&self, field: &str, value: &Value) -> Result<f64, AdapterError> {
        match value.as_f64() {
            Some(number) if number.is_finite() => Ok(number),
            _ => Err(self.wrong_type(field, value, "a finite number")),
        }
    }

    fn pattern<T>(
        &self,
        field: &'static str,
        read: impl Fn(&Value) -> Result<T, AdapterError>,
    ) -> Result<Vec<(Expression, T)>, AdapterError> {
        match self.get(field) {
            None => Ok(Vec::new()),
            Some(Value::Object(entries)) => entries
                .iter()
                .map(|(key, value)| Ok((Expression::path_suffix(key, self.path, field)?, read(value)?)))
                .collect(),
            Some(other) => Err(self.wrong_type(field, other, "an object of patterns")),
        }
    }

    /// A list of strings.
    fn names(&self, field: &str) -> Result<Option<Vec<String>>, AdapterError> {
        let Some(value) = self.get(field) else { return Ok(None) };
        let names = value.as_array().map(|items| {
            items
                .iter()
                .map(|item| item.as_str().filter(|name| !name.is_empty()).map(str::to_owned))
                .collect()
        });
        match names {
            Some(Some(names)) => Ok(Some(names)),
            _ => Err(self.wrong_type(field, value, "a list of module names")),
        }
    }

    fn selection(&self, field: &'static str) -> Result<Option<Selection>, AdapterError> {
        match self.get(field) {
            Some(Value::String(source)) if source.is_empty() => Ok(None),
            Some(Value::String(source)) => {
                Ok(Some(Selection::Expression(Expression::full_match(source, self.path, field)?)))
            }
            _ => Ok(self.names(field)?.map(Selection::Names)),
        }
    }

    fn targets(&self) -> Result<Selection, AdapterError> {
        const FIELD: &str = "target_modules";
        match self.required(FIELD)? {
            Value::String(text) if text.eq_ignore_ascii_case("all-linear") => Ok(Selection::AllLinear),
            _ => self.selection(FIELD)?.ok_or_else(|| self.refuse(FIELD, "empty".to_owned())),
        }
    }

    fn layers(&self) -> Result<Option<Layers>, AdapterError> {
        const FIELD: &str = "layers_to_transform";
        const PATTERN_FIELD: &str = "layers_pattern";
        let patterns = match self.get(PATTERN_FIELD) {
            Some(Value::String(pattern)) if pattern.is_empty() => Vec::new(),
            Some(Value::String(pattern)) => vec![pattern.clone()],
            _ => self.names(PATTERN_FIELD)?.unwrap_or_default(),
        };
        let indices: Vec<usize> = match self.get(FIELD) {
            None => Vec::new(),
            Some(value) => {
                let items = value.as_array().map_or(std::slice::from_ref(value), Vec::as_slice);
                let index = |item: &Value| item.as_u64().and_then(|index| usize::try_from(index).ok());
                let indices: Option<_> = items.iter().map(index).collect();
                indices.ok_or_else(|| self.wrong_type(FIELD, value, "a layer index or a list of them"))?
            }
        };
        if indices.is_empty() {
            if !patterns.is_empty() {
                return Err(self.refuse(PATTERN_FIELD, "set without `layers_to_transform`".to_owned()));
            }
            return Ok(None);
        }
        if self.get("target_modules").is_some_and(Value::is_string) {
            let problem = "not allowed when `target_modules` is a string".to_owned();
            return Err(self.refuse(FIELD, problem));
        }
        let mut expressions = Vec::new();
        for pattern in &patterns {
            expressions.push(Expression::layer_index(pattern, self.path, PATTERN_FIELD)?);
        }
        if patterns.is_empty() {
            expressions.push(Expression::any_layer_index(self.path, PATTERN_FIELD)?);
        }
        Ok(Some(Layers { indices, expressions }))
    }

    fn check_initialisation(&self) -> Result<(), AdapterError> {
        const FIELD: &str = "init_lora_weights";
        match self.get(FIELD) {
            None | Some(Value::Bool(_)) => Ok(()),
            Some(Value::String(name)) if PLAIN_INITS.contains(&name.as_str()) => Ok(()),
            Some(other) => Err(self.refuse(
                FIELD,
                format!(
                    "{other} belongs to a base whose weights that initialisation changed; save the adapter with \
                     PEFT's `path_initial_model_for_weight_conversion` to use it with the original base"
                ),
            )),
        }
    }
}

/// Null, false, or a list, object or string without content.
fn is_unset(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Bool(flag) => !flag,
        Value::Array(items) => items.is_empty(),
        Value::Object(entries) => entries.is_empty(),
        Value::String(text) => text.is_empty(),
        Value::Number(_) => false,
    }
}
