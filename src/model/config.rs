//! Model configuration: config.json of every family in one family-neutral struct.
//!
//! Both spellings are read, that of transformers 5 and that of 4. An absent field takes the default of the family's
//! Hugging Face configuration class; the sizes that define a model have to be there. config.json files carry many
//! fields that do not concern a forward pass, so unknown ones are tolerated, except those in `CHANGES_THE_MODEL`
//! and those that contradict the family: such a model would load and compute something else.

mod fields;
mod rope;

use std::fs;
use std::path::Path;

use serde_json::Value;

use super::family::{Family, Switch, Traits, WindowRule};
use super::{ModelError, RopeConfig};
use crate::format::read_json;
use fields::Fields;

/// Upper bounds on sizes. All are above any real model; they keep products of sizes within an integer and refuse a
/// nonsensical file before it asks for memory.
const MAX_WIDTH: usize = 1 << 24;
const MAX_LAYERS: usize = 1 << 12;
const MAX_HEADS: usize = 1 << 14;
const MAX_POSITIONS: usize = 1 << 31;

/// Everything about a base that is not a weight.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    pub family: Family,
    pub hidden_size: usize,
    /// Width of the MLP.
    pub intermediate_size: usize,
    pub num_layers: usize,
    /// Query heads.
    pub num_heads: usize,
    /// Key and value heads; divides `num_heads`.
    pub num_kv_heads: usize,
    /// Width of one head; `num_heads · head_dim` need not equal `hidden_size`.
    pub head_dim: usize,
    pub vocab_size: usize,
    /// Longest sequence, in tokens.
    pub max_position_embeddings: usize,
    pub rms_norm_eps: f32,
    pub rope: RopeConfig,
    /// `lm_head` uses the weight of `embed_tokens`.
    pub tie_word_embeddings: bool,
    /// Whether the q, k and v projections have a bias.
    pub qkv_bias: bool,
    /// Whether the output projection of attention has one.
    pub output_bias: bool,
    /// Whether the MLP's projections have one.
    pub mlp_bias: bool,
    /// RMSNorm over each query and key head before the rotation.
    pub qk_norm: bool,
    /// Sliding window of each block: a query at position i sees keys j with `i − j < window`. `None` sees all.
    pub windows: Vec<Option<usize>>,
    /// Tokens that end a sequence: those of config.json and generation_config.json, ascending.
    pub end_tokens: Vec<u32>,
    pub bos_token: Option<u32>,
}

impl ModelConfig {
    /// Reads `config.json` and, where there is one, `generation_config.json` of a model folder.
    ///
    /// # Errors
    /// When a file cannot be read, or asks for a model that this crate does not compute exactly.
    pub fn read(folder: &Path) -> Result<Self, ModelError> {
        let path = folder.join("config.json");
        let config = read_json(&path)?;
        let generation_path = folder.join("generation_config.json");
        // A link that leads nowhere is listed too, and then fails to open: it must not pass for no file.
        let listed = fs::symlink_metadata(&generation_path).is_ok();
        let generation = listed.then(|| read_json(&generation_path)).transpose()?;
        let generation_path = generation_path.display().to_string();
        let generation = match &generation {
            Some(value) => Some(Fields::new(value, &generation_path)?),
            None => None,
        };
        Self::from_fields(Fields::new(&config, &path.display().to_string())?, generation)
    }

    /// Reads the content of a config.json; `place` names it in messages.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub fn from_json(config: &Value, place: &str) -> Result<Self, ModelError> {
        Self::from_fields(Fields::new(config, place)?, None)
    }

    /// `num_heads · head_dim`.
    pub fn query_width(&self) -> usize {
        self.num_heads * self.head_dim
    }

    /// `num_kv_heads · head_dim`, the width of keys and that of values.
    pub fn kv_width(&self) -> usize {
        self.num_kv_heads * self.head_dim
    }

    /// Channels of a head that rotate, from the start.
    pub fn rotary_dim(&self) -> usize {
        self.rope.rotary_dim(self.head_dim)
    }

    fn from_fields(fields: Fields, generation: Option<Fields>) -> Result<Self, ModelError> {
        let family = family(&fields)?;
        let traits = family.traits();
        refuse_foreign_features(&fields)?;
        check_activation(&fields)?;

        let hidden_size = fields.required_integer("hidden_size", 1..=MAX_WIDTH)?;
        let num_layers = fields.required_integer("num_hidden_layers", 1..=MAX_LAYERS)?;
        let num_heads = fields.required_integer("num_attention_heads", 1..=MAX_HEADS)?;
        let num_kv_heads = kv_heads(&fields, traits, num_heads)?;
        let head_dim = head_dim(&fields, traits, hidden_size, num_heads)?;
        let vocab_size = fields.required_integer("vocab_size", 1..=MAX_WIDTH)?;
        let max_position_embeddings =
            fields.required_integer("max_position_embeddings", 2..=MAX_POSITIONS)?;
        let eps = fields.number("rms_norm_eps", 0.0..=1.0)?.unwrap_or(traits.default_rms_norm_eps);
        Ok(Self {
            family,
            hidden_size,
            intermediate_size: fields.required_integer("intermediate_size", 1..=MAX_WIDTH)?,
            num_layers,
            num_heads,
            num_kv_heads,
            head_dim,
            vocab_size,
            max_position_embeddings,
            rms_norm_eps: eps as f32,
            rope: rope::read(&fields, traits, head_dim, max_position_embeddings)?,
            tie_word_embeddings: fields.boolean("tie_word_embeddings")?.unwrap_or(false),
            qkv_bias: switch(&fields, "attention_bias", traits.qkv_bias, traits)?,
            output_bias: output_bias(&fields, traits)?,
            mlp_bias: switch(&fields, "mlp_bias", traits.mlp_bias, traits)?,
            qk_norm: traits.qk_norm,
            windows: windows(&fields, traits, num_layers, max_position_embeddings)?,
            end_tokens: end_tokens(&fields, generation, traits, vocab_size)?,
            bos_token: bos_token(&fields, traits, vocab_size)?,
        })
    }
}

fn family(fields: &Fields) -> Result<Family, ModelError> {
    let supported = Family::ALL.map(Family::model_type).join(", ");
    let model_type = fields
        .text("model_type")?
        .ok_or_else(|| fields.missing("model_type", &format!("one of {supported}")))?;
    let family = Family::from_model_type(model_type)
        .ok_or_else(|| fields.unsupported("model_type", format!("supported are {supported}")))?;
    if let Some(architectures) = fields.texts("architectures")?
        && !architectures.is_empty()
        && !architectures.iter().any(|name| name.to_ascii_lowercase().ends_with("forcausallm"))
    {
        return Err(fields.unsupported("architectures", "only causal language models (…ForCausalLM) are"));
    }
    Ok(family)
}

/// The value with which a field of a related architecture changes nothing.
enum Neutral {
    /// `null`, `false`, 0 or an empty list.
    Off,
    /// 1 (a multiplier).
    One,
    /// `true`.
    On,
}

/// Fields by which related architectures, or patched checkpoints, compute something else than the supported
/// families, and the value with which they do not.
const CHANGES_THE_MODEL: &[(&str, Neutral)] = &[
    ("quantization_config", Neutral::Off),
    ("compression_config", Neutral::Off),
    ("attn_logit_softcapping", Neutral::Off),
    ("final_logit_softcapping", Neutral::Off),
    ("query_pre_attn_scalar", Neutral::Off),
    ("attention_multiplier", Neutral::Off),
    ("embedding_multiplier", Neutral::One),
    ("residual_multiplier", Neutral::One),
    ("logits_scaling", Neutral::One),
    ("logit_scale", Neutral::One),
    ("clip_qkv", Neutral::Off),
    ("qk_layernorm", Neutral::Off),
    ("attention_chunk_size", Neutral::Off),
    ("no_rope_layers", Neutral::Off),
    ("no_rope_layer_interval", Neutral::Off),
    ("rope_interleaved", Neutral::Off),
    ("rope_interleave", Neutral::Off),
    ("alibi", Neutral::Off),
    ("parallel_attn", Neutral::Off),
    ("use_parallel_residual", Neutral::Off),
    ("num_local_experts", Neutral::Off),
    ("num_experts", Neutral::Off),
    ("n_routed_experts", Neutral::Off),
    ("add_cross_attention", Neutral::Off),
    ("is_encoder_decoder", Neutral::Off),
    ("use_bidirectional_attention", Neutral::Off),
    ("lm_head_bias", Neutral::Off),
    ("is_causal", Neutral::On),
];

fn refuse_foreign_features(fields: &Fields) -> Result<(), ModelError> {
    for (name, neutral) in CHANGES_THE_MODEL {
        let Some(value) = fields.get(name) else { continue };
        let harmless = match neutral {
            Neutral::Off => match value {
                Value::Bool(on) => !on,
                Value::Number(number) => number.as_f64() == Some(0.0),
                Value::Array(list) => list.is_empty(),
                _ => false,
            },
            Neutral::One => value.as_f64() == Some(1.0),
            Neutral::On => value == &Value::Bool(true),
        };
        if !harmless {
            let reason = match *name {
                "quantization_config" | "compression_config" => {
                    "weights have to be F32, F16 or BF16; dequantize the checkpoint"
                }
                _ => "no supported family has this feature",
            };
            return Err(fields.unsupported(name, reason));
        }
    }
    Ok(())
}

fn check_activation(fields: &Fields) -> Result<(), ModelError> {
    for name in ["hidden_act", "hidden_activation"] {
        // The two names of one function.
        if !matches!(fields.text(name)?, None | Some("silu" | "swish")) {
            return Err(fields.unsupported(name, "the supported activation is silu"));
        }
    }
    Ok(())
}

fn kv_heads(fields: &Fields, traits: &Traits, num_heads: usize) -> Result<usize, ModelError> {
    let name = "num_key_value_heads";
    let default = if fields.mentions(name) { None } else { traits.default_kv_heads };
    let count = fields.integer(name, 1..=MAX_HEADS)?.or(default).unwrap_or(num_heads);
    if !num_heads.is_multiple_of(count) {
        let wanted = format!("a divisor of num_attention_heads ({num_heads})");
        return Err(fields.wrong_as(name, count.to_string(), &wanted));
    }
    Ok(count)
}

fn head_dim(
    fields: &Fields,
    traits: &Traits,
    hidden_size: usize,
    num_heads: usize,
) -> Result<usize, ModelError> {
    if let Some(stated) = fields.integer("head_dim", 1..=MAX_HEADS)?.or(traits.default_head_dim) {
        return Ok(stated);
    }
    if !hidden_size.is_multiple_of(num_heads) {
        let wanted = format!("a multiple of num_attention_heads ({num_heads}), as there is no head_dim");
        return Err(fields.wrong("hidden_size", &wanted));
    }
    Ok(hidden_size / num_heads)
}

/// A property of the architecture that some families let the configuration choose.
fn switch(fields: &Fields, name: &str, rule: Switch, traits: &Traits) -> Result<bool, ModelError> {
    let stated = fields.boolean(name)?;
    match (rule, stated) {
        (Switch::Field, stated) => Ok(stated.unwrap_or(false)),
        (Switch::Fixed(fixed), Some(stated)) if stated != fixed => {
            Err(fields.unsupported(name, format!("{} has it fixed at {fixed}", traits.model_type)))
        }
        (Switch::Fixed(fixed), _) => Ok(fixed),
    }
}

fn output_bias(fields: &Fields, traits: &Traits) -> Result<bool, ModelError> {
    match traits.output_bias {
        Switch::Fixed(fixed) => Ok(fixed),
        Switch::Field => switch(fields, "attention_bias", Switch::Field, traits),
    }
}

fn windows(
    fields: &Fields,
    traits: &Traits,
    num_layers: usize,
    max_position_embeddings: usize,
) -> Result<Vec<Option<usize>>, ModelError> {
    let stated = fields.integer("sliding_window", 1..=MAX_POSITIONS)?;
    let sliding_layers = sliding_layers(fields, num_layers)?;
    let windows = match traits.windows {
        WindowRule::Never => {
            // A window that no sequence outgrows changes nothing.
            if stated.is_some_and(|window| window < max_position_embeddings) {
                let reason = format!("{} has no sliding windows", traits.model_type);
                return Err(fields.unsupported("sliding_window", reason));
            }
            vec![None; num_layers]
        }
        WindowRule::EveryBlock { default } => {
            let default = if fields.mentions("sliding_window") { None } else { default };
            vec![stated.or(default); num_layers]
        }
        WindowRule::ByLayer => {
            let used = fields.boolean("use_sliding_window")?.unwrap_or(false);
            let default = if fields.mentions("sliding_window") { None } else { Some(4096) };
            let window = stated.or(default).filter(|_| used);
            let first = fields.integer("max_window_layers", 0..=MAX_POSITIONS)?.unwrap_or(28);
            match &sliding_layers {
                Some(layers) if window.is_none() && layers.contains(&true) => {
                    let reason = "it names sliding_attention, but no sliding window is set and used";
                    return Err(fields.unsupported("layer_types", reason));
                }
                Some(layers) => layers.iter().map(|&slides| window.filter(|_| slides)).collect(),
                None => (0..num_layers).map(|layer| window.filter(|_| layer >= first)).collect(),
            }
        }
    };
    if let Some(layers) = sliding_layers
        && layers.iter().zip(&windows).any(|(slides, window)| *slides != window.is_some())
    {
        let reason = format!("with this sliding_window, {} blocks are all alike", traits.model_type);
        return Err(fields.unsupported("layer_types", reason));
    }
    Ok(windows)
}

/// `layer_types`, as whether each block slides.
fn sliding_layers(fields: &Fields, num_layers: usize) -> Result<Option<Vec<bool>>, ModelError> {
    let Some(types) = fields.texts("layer_types")? else { return Ok(None) };
    if types.len() != num_layers {
        let wanted = format!("one entry for each of the {num_layers} blocks");
        return Err(fields.wrong_as("layer_types", format!("a list of {}", types.len()), &wanted));
    }
    let slides = |(layer, kind): (usize, &str)| match kind {
        "full_attention" => Ok(false),
        "sliding_attention" => Ok(true),
        other => {
            let (entry, found) = (format!("layer_types[{layer}]"), format!("\"{other}\""));
            Err(fields.wrong_as(&entry, found, "\"full_attention\" or \"sliding_attention\""))
        }
    };
    types.into_iter().enumerate().map(slides).collect::<Result<_, _>>().map(Some)
}

/// The end tokens of both files; the class's default only where neither file mentions any.
fn end_tokens(
    fields: &Fields,
    generation: Option<Fields>,
    traits: &Traits,
    vocab_size: usize,
) -> Result<Vec<u32>, ModelError> {
    let name = "eos_token_id";
    let files = [Some(*fields), generation];
    let mut tokens = Vec::new();
    for file in files.iter().flatten() {
        match file.get(name) {
            None => {}
            Some(Value::Array(list)) => {
                for (index, value) in list.iter().enumerate() {
                    tokens.push(token(file, &format!("{name}[{index}]"), value, vocab_size)?);
                }
            }
            Some(value) => tokens.push(token(file, name, value, vocab_size)?),
        }
    }
    if !files.iter().flatten().any(|file| file.mentions(name)) {
        tokens.extend(traits.default_end_token.filter(|&token| (token as usize) < vocab_size));
    }
    tokens.sort_unstable();
    tokens.dedup();
    Ok(tokens)
}

fn bos_token(fields: &Fields, traits: &Traits, vocab_size: usize) -> Result<Option<u32>, ModelError> {
    let name = "bos_token_id";
    match fields.get(name) {
        Some(value) => token(fields, name, value, vocab_size).map(Some),
        None if fields.mentions(name) => Ok(None),
        None => Ok(traits.default_bos_token.filter(|&token| (token as usize) < vocab_size)),
    }
}

fn token(fields: &Fields, name: &str, value: &Value, vocab_size: usize) -> Result<u32, ModelError> {
    let id = value.as_u64().filter(|&id| id < vocab_size as u64).and_then(|id| u32::try_from(id).ok());
    id.ok_or_else(|| {
        let wanted = format!("a token id below vocab_size ({vocab_size})");
        fields.wrong_as(name, fields::excerpt(value), &wanted)
    })
}

#[cfg(test)]
mod tests;
