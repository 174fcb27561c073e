//! The sites of a base: every adaptable layer and every norm, by role.

use super::config::ModelConfig;
use super::family::Part;
use crate::adapter::{Site, SiteKind, SiteTable};

impl Part {
    fn width(self, config: &ModelConfig) -> usize {
        match self {
            Part::Query => config.query_width(),
            Part::Key | Part::Value => config.kv_width(),
            Part::Gate | Part::Up => config.intermediate_size,
        }
    }
}

/// Site ids of one block.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockSites {
    /// `[q, k, v]` or `[qkv]`: their outputs concatenate to `[rows, (heads + 2 · kv_heads) · head_dim]`, q then k then v.
    pub attention_in: Vec<usize>,
    /// `o_proj`.
    pub attention_out: usize,
    /// `[gate, up]` or `[gate_up]`: their outputs concatenate to `[rows, 2 · intermediate]`, gate then up.
    pub mlp_in: Vec<usize>,
    /// `down_proj`.
    pub mlp_out: usize,
}

/// Names of one block's RMSNorm weights.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockNorms {
    /// `[hidden]`, before attention.
    pub attention: String,
    /// `[hidden]`, before the MLP.
    pub mlp: String,
    /// `[head_dim]`, over each query head and each key head before the rotation, where the family has them.
    pub query_key: Option<(String, String)>,
}

/// Every adaptable layer and every norm of a base, by role.
#[derive(Clone, Debug)]
pub struct ModelSites {
    pub table: SiteTable,
    /// Site id of the token embedding.
    pub embed_tokens: usize,
    pub blocks: Vec<BlockSites>,
    /// Site id of the output layer. It is a site of its own also where it shares the embedding's weight.
    pub lm_head: usize,
    /// Per block.
    pub norms: Vec<BlockNorms>,
    /// `[hidden]`, before `lm_head`.
    pub final_norm: String,
}

impl ModelSites {
    /// The sites of the model that `config` describes.
    pub fn new(config: &ModelConfig) -> Self {
        let traits = config.family.traits();
        let mut sites = SiteList::default();
        let embed_tokens = sites.push(Site {
            module: "model.embed_tokens".to_owned(),
            block: None,
            kind: SiteKind::Embedding,
            in_features: config.vocab_size,
            out_features: config.hidden_size,
            bias: false,
        });
        let (mut blocks, mut norms) = (Vec::new(), Vec::new());
        for block in 0..config.num_layers {
            let path = format!("model.layers.{block}");
            let mut linear = |module: &str, in_features, out_features, bias| {
                sites.push(Site {
                    module: format!("{path}.{module}"),
                    block: Some(block),
                    kind: SiteKind::Linear,
                    in_features,
                    out_features,
                    bias,
                })
            };
            let width = |parts: &[Part]| parts.iter().map(|part| part.width(config)).sum();
            let hidden = config.hidden_size;
            blocks.push(BlockSites {
                attention_in: (traits.projections.attention_in.iter())
                    .map(|(name, parts)| {
                        linear(&format!("self_attn.{name}"), hidden, width(parts), config.qkv_bias)
                    })
                    .collect(),
                attention_out: linear("self_attn.o_proj", config.query_width(), hidden, config.output_bias),
                mlp_in: (traits.projections.mlp_in.iter())
                    .map(|(name, parts)| {
                        linear(&format!("mlp.{name}"), hidden, width(parts), config.mlp_bias)
                    })
                    .collect(),
                mlp_out: linear("mlp.down_proj", config.intermediate_size, hidden, config.mlp_bias),
            });
            norms.push(BlockNorms {
                attention: format!("{path}.input_layernorm.weight"),
                mlp: format!("{path}.post_attention_layernorm.weight"),
                query_key: config.qk_norm.then(|| {
                    let name = |which| format!("{path}.self_attn.{which}_norm.weight");
                    (name("q"), name("k"))
                }),
            });
        }
        let lm_head = sites.push(Site {
            module: "lm_head".to_owned(),
            block: None,
            kind: SiteKind::Linear,
            in_features: config.hidden_size,
            out_features: config.vocab_size,
            bias: false,
        });
        Self {
            table: SiteTable::new(sites.0),
            embed_tokens,
            blocks,
            lm_head,
            norms,
            final_norm: "model.norm.weight".to_owned(),
        }
    }
}

/// Sites in the order they are added; a site's id is its position.
#[derive(Default)]
struct SiteList(Vec<Site>);

impl SiteList {
    fn push(&mut self, site: Site) -> usize {
        self.0.push(site);
        self.0.len() - 1
    }
}
