//! What is timed: models by their shapes, decode and prefill steps, and the adapters that their sequences use.

use std::env;

use loramux::model::{BlockSites, ModelConfig, ModelSites};
use serde_json::{Value, json};

use super::super::cases::{Batch, Group, Output, Ranks, Set};

/// A model by its shape; weights are random.
#[derive(Clone, Debug)]
pub struct Model {
    pub name: &'static str,
    /// As in its config.json.
    pub json: Value,
    pub config: ModelConfig,
    sites: ModelSites,
}

impl Model {
    fn new(name: &'static str, json: Value) -> Self {
        let config = ModelConfig::from_json(&json, name).expect("a valid configuration");
        Self { name, sites: ModelSites::new(&config), json, config }
    }

    pub fn sites(&self) -> &ModelSites {
        &self.sites
    }

    /// The site groups of a block, in the order in which it runs them.
    pub fn groups(&self) -> Vec<Group> {
        let BlockSites { attention_in, attention_out, mlp_in, mlp_out } = &self.sites.blocks[0];
        // One site with both halves leaves them side by side.
        let gated = if mlp_in.len() == 2 { Output::SwiGlu } else { Output::Store };
        vec![
            self.group("qkv", attention_in, Output::Store),
            self.group("o", &[*attention_out], Output::AddResidual),
            self.group("gate_up", mlp_in, gated),
            self.group("down", &[*mlp_out], Output::AddResidual),
        ]
    }

    /// The output layer.
    pub fn lm_head(&self) -> Group {
        self.group("lm_head", &[self.sites.lm_head], Output::Store)
    }

    fn group(&self, name: &'static str, sites: &[usize], output: Output) -> Group {
        let site = |id: usize| self.sites.table.get(id);
        let widths = sites.iter().map(|&id| site(id).out_features).collect();
        Group { name, in_features: site(sites[0]).in_features, widths, output }
    }

    /// Values of the linear layers of all blocks.
    pub fn block_values(&self) -> usize {
        let linear = self.sites.table.iter().filter(|(_, site)| site.block.is_some());
        linear.map(|(_, site)| site.in_features * site.out_features).sum()
    }

    /// Inputs and outputs of all layers that adapters change: the linear ones of the blocks.
    pub fn adapted_values(&self) -> usize {
        let linear = self.sites.table.iter().filter(|(_, site)| site.block.is_some());
        linear.map(|(_, site)| site.in_features + site.out_features).sum()
    }

    /// Bytes that a token takes in the cache, of all blocks.
    pub fn cache_bytes(&self) -> usize {
        self.config.num_layers * 2 * self.config.kv_width() * 2
    }

    /// Values of the largest matrix.
    pub fn largest_matrix(&self) -> usize {
        let sizes = self.sites.table.iter().map(|(_, site)| site.in_features * site.out_features);
        sizes.max().unwrap_or(0)
    }
}

/// The models of a set, of which `LORAMUX_BENCH_MODELS` may name some by parts of their names, with commas between.
///
/// # Errors
/// When it names none.
pub fn models(set: Set) -> Result<Vec<Model>, String> {
    let mut models = all_models(set);
    if let Ok(wanted) = env::var("LORAMUX_BENCH_MODELS") {
        let known: Vec<_> = models.iter().map(|model| model.name).collect();
        models.retain(|model| wanted.split(',').any(|part| model.name.contains(part.trim())));
        if models.is_empty() {
            return Err(format!("LORAMUX_BENCH_MODELS is {wanted:?}, wanted parts of {known:?}"));
        }
    }
    Ok(models)
}

/// All models of a set, the most wanted first.
pub fn all_models(set: Set) -> Vec<Model> {
    if set == Set::Tiny {
        let tiny = |family: &str, kv_heads: usize| {
            json!({
                "model_type": family, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2,
                "num_attention_heads": 4, "num_key_value_heads": kv_heads, "vocab_size": 320,
                "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
                "tie_word_embeddings": false, "hidden_act": "silu", "bos_token_id": 1, "eos_token_id": 2,
                "pad_token_id": 0,
            })
        };
        return vec![Model::new("tiny llama", tiny("llama", 2)), Model::new("tiny phi3", tiny("phi3", 4))];
    }
    let phi_3_mini = json!({
        "model_type": "phi3", "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32064,
        // The published one has a sliding window of 2047: here every model reads its whole context.
        "max_position_embeddings": 4096, "sliding_window": null,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": false, "hidden_act": "silu",
        "bos_token_id": 1, "eos_token_id": 32000, "pad_token_id": 32000,
    });
    let llama_3_8b = json!({
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256,
        "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
        "tie_word_embeddings": false, "hidden_act": "silu", "bos_token_id": 128000, "eos_token_id": 128001,
    });
    vec![
        Model::new("Llama 3 8B", llama_3_8b),
        Model::new("Llama 3.2 1B", crate::llama_1b_json(16)),
        Model::new("Phi-3-mini", phi_3_mini),
    ]
}

/// A step of sequences that are all alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// One row of each sequence; with it a sequence has `context` tokens.
    Decode { sequences: usize, context: usize },
    /// Whole prompts.
    Prefill { sequences: usize, tokens: usize },
}

impl Step {
    pub fn name(self) -> &'static str {
        match self {
            Self::Decode { .. } => "decode",
            Self::Prefill { .. } => "prefill",
        }
    }

    pub fn sequences(self) -> usize {
        match self {
            Self::Decode { sequences, .. } | Self::Prefill { sequences, .. } => sequences,
        }
    }

    /// Tokens of a sequence with this step.
    pub fn context(self) -> usize {
        match self {
            Self::Decode { context, .. } => context,
            Self::Prefill { tokens, .. } => tokens,
        }
    }

    /// Rows of each sequence.
    pub fn tokens(self) -> usize {
        match self {
            Self::Decode { .. } => 1,
            Self::Prefill { tokens, .. } => tokens,
        }
    }

    pub fn rows(self) -> usize {
        self.sequences() * self.tokens()
    }
}

/// The adapters of a step. Each changes all linear layers of the blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Adapters {
    /// A model without memory for adapters.
    Absent,
    /// Memory for adapters, which no sequence uses.
    Unused,
    /// Sequences use so many in turn, of one rank.
    Used { count: usize, rank: usize },
}

/// As many as the device has seats for, and the rank chunks of each site.
pub const MOST_ADAPTERS: usize = 64;

/// Ranks of the adapters that are loaded, and how many there are of each: 64 rank chunks hold either.
pub const LOADED: [(usize, usize); 2] = [(16, MOST_ADAPTERS), (64, 8)];

/// Adapters of steps. Fewer sequences use fewer.
const ADAPTERS: [Adapters; 6] = [
    Adapters::Absent,
    Adapters::Unused,
    Adapters::Used { count: 1, rank: 16 },
    Adapters::Used { count: 8, rank: 16 },
    Adapters::Used { count: MOST_ADAPTERS, rank: 16 },
    Adapters::Used { count: 8, rank: 64 },
];

impl Adapters {
    /// As in `none`, `unused`, `8 × r16`.
    pub fn name(self) -> String {
        match self {
            Self::Absent => "none".to_owned(),
            Self::Unused => "unused".to_owned(),
            Self::Used { count, rank } => format!("{count} × r{rank}"),
        }
    }

    pub fn count(self) -> usize {
        if let Self::Used { count, .. } = self { count } else { 0 }
    }

    pub fn rank(self) -> usize {
        if let Self::Used { rank, .. } = self { rank } else { 0 }
    }

    fn of_sequences(self, sequences: usize) -> Self {
        match self {
            Self::Used { count, rank } => Self::Used { count: count.min(sequences), rank },
            other => other,
        }
    }
}

/// One thing to time, of every model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Case {
    pub step: Step,
    pub adapters: Adapters,
}

impl Case {
    /// The rows of the blocks and their adapters.
    pub fn batch(&self) -> Batch {
        let (count, sequences) = (self.adapters.count(), self.step.sequences());
        let of_adapter = |i: usize| (sequences + count - 1 - i) / count * self.step.tokens();
        Batch {
            rows: self.step.rows(),
            segments: (0..count).map(of_adapter).collect(),
            ranks: Ranks::Equal(self.adapters.rank()),
        }
    }
}

/// The cases of a set, those without memory for adapters first.
pub fn cases(set: Set) -> Vec<Case> {
    let decode = |sequences, context| Step::Decode { sequences, context };
    let prefill = |sequences, tokens| Step::Prefill { sequences, tokens };
    let mut steps = match set {
        Set::Tiny => vec![decode(3, 20), prefill(2, 70)],
        Set::Short | Set::Full => vec![decode(1, 512), decode(16, 512), decode(64, 512)],
    };
    if set == Set::Full {
        steps.push(decode(256, 512));
        steps.extend([1, 16, 64, 256].map(|sequences| decode(sequences, 4096)));
    }
    if set != Set::Tiny {
        steps.extend([(4, 512), (1, 2048), (64, 128), (16, 512), (4, 2048)].map(|(n, t)| prefill(n, t)));
    }
    let mut cases: Vec<Case> = Vec::new();
    for adapters in ADAPTERS {
        for &step in &steps {
            let case = Case { step, adapters: adapters.of_sequences(step.sequences()) };
            if !cases.contains(&case) {
                cases.push(case);
            }
        }
    }
    cases
}

/// Models and cases, for programs that time other libraries.
///
/// # Errors
/// Those of [`models`].
pub fn to_json(set: Set) -> Result<Value, String> {
    let model = |model: Model| json!({ "name": model.name, "config": model.json });
    let models: Vec<_> = models(set)?.into_iter().map(model).collect();
    let cases: Vec<_> = cases(set).iter().map(case_to_json).collect();
    Ok(json!({ "set": set.name(), "models": models, "cases": cases }))
}

/// What tells a case from others of its model.
pub fn case_to_json(case: &Case) -> Value {
    json!({
        "step": case.step.name(), "sequences": case.step.sequences(), "tokens": case.step.tokens(),
        "context": case.step.context(), "adapters": case.adapters.name(),
        "distinct_adapters": case.adapters.count(), "rank": case.adapters.rank(),
    })
}
