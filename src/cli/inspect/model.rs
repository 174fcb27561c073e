//! A model folder: what its configuration says, and the weights by site.

use std::collections::BTreeSet;
use std::fmt;
use std::path::Path;

use serde::Serialize;
use serde_json::{Map, Value, json};

use super::tensors::{DtypeTotal, DtypeTotals, describe_dtypes};
use super::{last_component, ranges};
use crate::adapter::{Site, SiteKind};
use crate::cli::Failure;
use crate::cli::output::{Align, Table};
use crate::model::{Base, Checkpoint, ModelConfig, ModelError, RopeConfig, RopeScaling, Tokenizer};
use crate::tensor::Tensor;

#[derive(Serialize)]
pub(super) struct ModelReport {
    kind: &'static str,
    path: String,
    name: String,
    family: &'static str,
    /// SHA-256 of the weights.
    hash: String,
    /// Elements of all weights that the model uses; a tied weight counts once.
    parameters: u64,
    bytes: u64,
    dtypes: Vec<DtypeTotal>,
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: usize,
    head_dim: usize,
    vocab_size: usize,
    max_position_embeddings: usize,
    rms_norm_eps: f32,
    rope: Map<String, Value>,
    /// Per block; null sees everything before it.
    windows: Vec<Option<usize>>,
    tie_word_embeddings: bool,
    qk_norm: bool,
    bos_token: Option<Token>,
    end_tokens: Vec<Token>,
    tokenizer: TokenizerFacts,
    sites: Vec<SiteRow>,
    unused_tensors: Vec<String>,
}

#[derive(Serialize)]
struct Token {
    id: u32,
    text: String,
}

#[derive(Serialize)]
struct TokenizerFacts {
    tokens: usize,
    chat_templates: Vec<String>,
}

/// Sites of one name, shape and dtype.
#[derive(Serialize)]
struct SiteRow {
    name: String,
    /// Empty for a site outside the blocks.
    blocks: Vec<usize>,
    kind: &'static str,
    in_features: usize,
    out_features: usize,
    bias: bool,
    dtype: String,
}

/// Opens a base as serving would, and describes it.
pub(super) fn report(folder: &Path) -> Result<ModelReport, Failure> {
    let base = Base::open(folder).map_err(Failure::failed)?;
    let Base { config, checkpoint, tokenizer, .. } = &base;
    let mut totals = DtypeTotals::default();
    let (mut parameters, mut size) = (0, 0);
    for tensor in weights(config, checkpoint).map_err(Failure::failed)? {
        let stored = tensor.bytes().len() as u64;
        totals.add(tensor.dtype().to_string(), tensor.len() as u64, stored);
        parameters += tensor.len() as u64;
        size += stored;
    }
    Ok(ModelReport {
        kind: "model",
        path: folder.display().to_string(),
        name: base.name.clone(),
        family: config.family.model_type(),
        hash: checkpoint.content_hash().map_err(Failure::failed)?,
        parameters,
        bytes: size,
        dtypes: totals.finish(),
        hidden_size: config.hidden_size,
        intermediate_size: config.intermediate_size,
        num_hidden_layers: config.num_layers,
        num_attention_heads: config.num_heads,
        num_key_value_heads: config.num_kv_heads,
        head_dim: config.head_dim,
        vocab_size: config.vocab_size,
        max_position_embeddings: config.max_position_embeddings,
        rms_norm_eps: config.rms_norm_eps,
        rope: rope(&config.rope),
        windows: config.windows.clone(),
        tie_word_embeddings: config.tie_word_embeddings,
        qk_norm: config.qk_norm,
        bos_token: config.bos_token.map(|id| token(tokenizer, id)),
        end_tokens: config.end_tokens.iter().map(|&id| token(tokenizer, id)).collect(),
        tokenizer: TokenizerFacts {
            tokens: tokenizer.vocab_size(),
            chat_templates: tokenizer.chat_templates().iter().map(|source| source.name.clone()).collect(),
        },
        sites: sites(checkpoint).map_err(Failure::failed)?,
        unused_tensors: checkpoint.unused().to_vec(),
    })
}

fn token(tokenizer: &Tokenizer, id: u32) -> Token {
    Token { id, text: tokenizer.decode_token(id) }
}

/// Every weight of the model once.
fn weights(config: &ModelConfig, checkpoint: &Checkpoint) -> Result<Vec<Tensor>, ModelError> {
    let model = checkpoint.sites();
    let mut tensors = Vec::new();
    for (id, _) in model.table.iter() {
        if id != model.lm_head || !config.tie_word_embeddings {
            tensors.push(checkpoint.site_weight(id)?);
        }
        tensors.extend(checkpoint.site_bias(id)?);
    }
    for norms in &model.norms {
        tensors.push(checkpoint.tensor(&norms.attention, &[config.hidden_size])?);
        tensors.push(checkpoint.tensor(&norms.mlp, &[config.hidden_size])?);
        for name in norms.query_key.iter().flat_map(|(query, key)| [query, key]) {
            tensors.push(checkpoint.tensor(name, &[config.head_dim])?);
        }
    }
    tensors.push(checkpoint.tensor(&model.final_norm, &[config.hidden_size])?);
    Ok(tensors)
}

fn sites(checkpoint: &Checkpoint) -> Result<Vec<SiteRow>, ModelError> {
    let mut rows: Vec<SiteRow> = Vec::new();
    for (id, site) in checkpoint.sites().table.iter() {
        let &Site { ref module, block, kind, in_features, out_features, bias } = site;
        let dtype = checkpoint.site_weight(id)?.dtype().to_string();
        let name = last_component(module);
        let same = |row: &&mut SiteRow| {
            block.is_some() && row.name == name && row.dtype == dtype && !row.blocks.is_empty()
        };
        match rows.iter_mut().find(same) {
            Some(row) => row.blocks.extend(block),
            None => rows.push(SiteRow {
                name: name.to_owned(),
                blocks: block.into_iter().collect(),
                kind: match kind {
                    SiteKind::Linear => "linear",
                    SiteKind::Embedding => "embedding",
                },
                in_features,
                out_features,
                bias,
                dtype,
            }),
        }
    }
    Ok(rows)
}

/// The settings with their names in config.json.
fn rope(rope: &RopeConfig) -> Map<String, Value> {
    let (kind, settings) = match &rope.scaling {
        RopeScaling::Default => ("default", json!({})),
        RopeScaling::Linear { factor } => ("linear", json!({"factor": factor})),
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_positions } => (
            "llama3",
            json!({
                "factor": factor,
                "low_freq_factor": low_freq_factor,
                "high_freq_factor": high_freq_factor,
                "original_max_position_embeddings": original_positions,
            }),
        ),
        RopeScaling::Yarn {
            factor,
            beta_fast,
            beta_slow,
            truncate,
            original_positions,
            attention_factor,
        } => (
            "yarn",
            json!({
                "factor": factor,
                "beta_fast": beta_fast,
                "beta_slow": beta_slow,
                "truncate": truncate,
                "original_max_position_embeddings": original_positions,
                "attention_factor": attention_factor,
            }),
        ),
        RopeScaling::LongRope { short, long, original_positions, attention_factor } => (
            "longrope",
            json!({
                "original_max_position_embeddings": original_positions,
                "attention_factor": attention_factor,
                "short_factor": short,
                "long_factor": long,
            }),
        ),
    };
    let mut fields = Map::new();
    fields.insert("rope_type".to_owned(), kind.into());
    fields.insert("rope_theta".to_owned(), rope.theta.into());
    fields.insert("partial_rotary_factor".to_owned(), rope.partial_rotary_factor.into());
    if let Value::Object(settings) = settings {
        fields.extend(settings);
    }
    fields
}

/// The settings on one line; lists by their length, and nothing about what is as usual.
fn describe_rope(rope: &Map<String, Value>) -> String {
    let parts = rope.iter().filter_map(|(name, value)| match (name.as_str(), value) {
        ("rope_type", Value::String(kind)) => Some(kind.clone()),
        ("partial_rotary_factor", value) if value.as_f64() == Some(1.0) => None,
        (_, Value::Array(items)) => Some(format!("{name} of {}", items.len())),
        (_, value) => Some(format!("{name} {value}")),
    });
    parts.collect::<Vec<_>>().join(", ")
}

fn describe_windows(windows: &[Option<usize>]) -> String {
    let sizes: BTreeSet<usize> = windows.iter().flatten().copied().collect();
    let each = sizes.into_iter().map(|size| {
        let blocks: Vec<usize> = (0..windows.len()).filter(|&block| windows[block] == Some(size)).collect();
        format!("{size} tokens in blocks {}", ranges(&blocks))
    });
    let text = each.collect::<Vec<_>>().join("; ");
    if text.is_empty() { "none".to_owned() } else { text }
}

impl fmt::Display for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} `{}`", self.id, self.text)
    }
}

impl fmt::Display for ModelReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let listed = |tokens: &[Token]| tokens.iter().map(Token::to_string).collect::<Vec<_>>().join(", ");
        let or_none = |text: String| if text.is_empty() { "none".to_owned() } else { text };
        let yes = |flag: bool| if flag { "yes" } else { "no" }.to_owned();
        let mut facts = Table::new(&[Align::Left, Align::Left]);
        for (name, fact) in [
            ("model", self.path.clone()),
            ("family", self.family.to_owned()),
            ("parameters", self.parameters.to_string()),
            ("weights", describe_dtypes(&self.dtypes)),
            ("hash", self.hash.clone()),
            ("blocks", self.num_hidden_layers.to_string()),
            ("hidden size", self.hidden_size.to_string()),
            ("MLP size", self.intermediate_size.to_string()),
            (
                "heads",
                format!(
                    "{} of {} ({} of keys and values)",
                    self.num_attention_heads, self.head_dim, self.num_key_value_heads
                ),
            ),
            ("context", format!("{} tokens", self.max_position_embeddings)),
            ("rope", describe_rope(&self.rope)),
            ("windows", describe_windows(&self.windows)),
            ("norm epsilon", format!("{:e}", self.rms_norm_eps)),
            ("head norms", yes(self.qk_norm)),
            ("tied", yes(self.tie_word_embeddings)),
            ("vocabulary", format!("{}, {} in the tokenizer", self.vocab_size, self.tokenizer.tokens)),
            ("begin token", or_none(listed(self.bos_token.as_slice()))),
            ("end tokens", or_none(listed(&self.end_tokens))),
            ("chat templates", or_none(self.tokenizer.chat_templates.join(", "))),
            ("unused tensors", or_none(self.unused_tensors.join(", "))),
        ] {
            facts.row([name, &fact]);
        }
        let mut sites = Table::new(&[Align::Left; 5]);
        sites.row(["site", "blocks", "weight", "dtype", "bias"]);
        for row in &self.sites {
            let shape = match row.kind {
                "embedding" => [row.in_features, row.out_features],
                _ => [row.out_features, row.in_features],
            };
            sites.row([
                row.name.clone(),
                ranges(&row.blocks),
                format!("{shape:?}"),
                row.dtype.clone(),
                yes(row.bias),
            ]);
        }
        write!(f, "{facts}\n{sites}")
    }
}
