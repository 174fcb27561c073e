//! Model families: what differs between Llama, Mistral, Qwen2, Qwen3 and Phi-3 decoders, as data.
//!
//! All of them are the same pre-norm decoder (RMSNorm, rotary attention with grouped keys and values, SwiGLU).
//! A family is one row of `Traits`: what its Hugging Face configuration class defaults to, which projections have
//! a bias, how they are fused, where sliding windows apply. A new family is one more row.

use std::fmt;

/// A supported decoder family, named by `model_type` in config.json.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Family {
    Llama,
    Mistral,
    Qwen2,
    Qwen3,
    Phi3,
}

impl Family {
    pub const ALL: [Family; 5] = [Family::Llama, Family::Mistral, Family::Qwen2, Family::Qwen3, Family::Phi3];

    /// The `model_type` of config.json.
    pub fn model_type(self) -> &'static str {
        self.traits().model_type
    }

    /// The family with this `model_type`.
    pub fn from_model_type(model_type: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|family| family.model_type() == model_type)
    }

    pub(super) fn traits(self) -> &'static Traits {
        match self {
            Family::Llama => &LLAMA,
            Family::Mistral => &MISTRAL,
            Family::Qwen2 => &QWEN2,
            Family::Qwen3 => &QWEN3,
            Family::Phi3 => &PHI3,
        }
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.model_type())
    }
}

/// Where a yes-or-no property of the architecture comes from.
#[derive(Clone, Copy)]
pub(super) enum Switch {
    /// Part of the architecture; the configuration cannot change it.
    Fixed(bool),
    /// Set by the configuration field, off when absent.
    Field,
}

/// Which blocks look only a window back.
#[derive(Clone, Copy)]
pub(super) enum WindowRule {
    /// None.
    Never,
    /// All, when `sliding_window` is set; the value is the class's default for an absent field.
    EveryBlock { default: Option<usize> },
    /// Those that `layer_types` names, or from `max_window_layers` on; only with `use_sliding_window`.
    ByLayer,
}

/// One family's row. Defaults are those of its Hugging Face configuration class for a field that is absent.
pub(super) struct Traits {
    pub model_type: &'static str,
    /// `None`: as many as query heads.
    pub default_kv_heads: Option<usize>,
    /// `None`: hidden size over heads.
    pub default_head_dim: Option<usize>,
    pub default_rms_norm_eps: f64,
    pub default_bos_token: Option<u32>,
    pub default_end_token: Option<u32>,
    /// Length before `longrope` stretching, where the class has a default of its own.
    pub default_original_positions: Option<usize>,
    /// `attention_bias` as it applies to q, k and v, and to the output projection.
    pub qkv_bias: Switch,
    pub output_bias: Switch,
    pub mlp_bias: Switch,
    pub qk_norm: bool,
    pub windows: WindowRule,
    /// Whether `partial_rotary_factor` below 1 has a meaning.
    pub partial_rotary: bool,
    /// Rope types that the family's class accepts.
    pub rope_types: &'static [&'static str],
    /// Old spellings of rope types in this family's checkpoints, with today's.
    pub rope_aliases: &'static [(&'static str, &'static str)],
    pub projections: &'static Projections,
}

const LLAMA: Traits = Traits {
    model_type: "llama",
    default_kv_heads: None,
    default_head_dim: None,
    default_rms_norm_eps: 1e-6,
    default_bos_token: Some(1),
    default_end_token: Some(2),
    default_original_positions: None,
    qkv_bias: Switch::Field,
    output_bias: Switch::Field,
    mlp_bias: Switch::Field,
    qk_norm: false,
    windows: WindowRule::Never,
    partial_rotary: false,
    rope_types: &["default", "linear", "llama3", "yarn", "longrope"],
    rope_aliases: &[],
    projections: &SEPARATE,
};

const MISTRAL: Traits = Traits {
    model_type: "mistral",
    default_kv_heads: Some(8),
    qkv_bias: Switch::Fixed(false),
    output_bias: Switch::Fixed(false),
    mlp_bias: Switch::Fixed(false),
    windows: WindowRule::EveryBlock { default: Some(4096) },
    ..LLAMA
};

const QWEN2: Traits = Traits {
    model_type: "qwen2",
    default_kv_heads: Some(32),
    default_bos_token: None,
    default_end_token: None,
    qkv_bias: Switch::Fixed(true),
    output_bias: Switch::Fixed(false),
    mlp_bias: Switch::Fixed(false),
    windows: WindowRule::ByLayer,
    ..LLAMA
};

const QWEN3: Traits = Traits {
    model_type: "qwen3",
    default_head_dim: Some(128),
    qkv_bias: Switch::Field,
    output_bias: Switch::Field,
    qk_norm: true,
    ..QWEN2
};

const PHI3: Traits = Traits {
    model_type: "phi3",
    default_rms_norm_eps: 1e-5,
    default_end_token: Some(32000),
    default_original_positions: Some(4096),
    qkv_bias: Switch::Fixed(false),
    output_bias: Switch::Fixed(false),
    mlp_bias: Switch::Fixed(false),
    windows: WindowRule::EveryBlock { default: None },
    partial_rotary: true,
    rope_types: &["default", "longrope"],
    rope_aliases: &[("su", "longrope"), ("yarn", "longrope")],
    projections: &FUSED,
    ..LLAMA
};

/// What one projection's output holds.
#[derive(Clone, Copy)]
pub(super) enum Part {
    Query,
    Key,
    Value,
    Gate,
    Up,
}

/// A module name and the parts that its output concatenates.
type Projection = (&'static str, &'static [Part]);

/// The input projections of attention and MLP, in module order.
pub(super) struct Projections {
    pub attention_in: &'static [Projection],
    pub mlp_in: &'static [Projection],
}

const SEPARATE: Projections = Projections {
    attention_in: &[("q_proj", &[Part::Query]), ("k_proj", &[Part::Key]), ("v_proj", &[Part::Value])],
    mlp_in: &[("gate_proj", &[Part::Gate]), ("up_proj", &[Part::Up])],
};

const FUSED: Projections = Projections {
    attention_in: &[("qkv_proj", &[Part::Query, Part::Key, Part::Value])],
    mlp_in: &[("gate_up_proj", &[Part::Gate, Part::Up])],
};
