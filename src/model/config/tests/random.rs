//! Random edits of real configurations: no panic, and whatever is accepted keeps its promises.

use proptest::prelude::*;
use serde_json::{Map, Value, json};

use super::{edited, golden_json};
use crate::model::{ModelConfig, ModelSites};

const NAMES: [&str; 6] = ["llama", "llama-tied", "mistral", "qwen2", "qwen3", "phi3"];

/// Field names that are read, so that random edits hit something.
const FIELDS: &[&str] = &[
    "model_type",
    "architectures",
    "hidden_act",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "partial_rotary_factor",
    "original_max_position_embeddings",
    "tie_word_embeddings",
    "attention_bias",
    "mlp_bias",
    "sliding_window",
    "use_sliding_window",
    "max_window_layers",
    "layer_types",
    "eos_token_id",
    "bos_token_id",
    "is_causal",
    "quantization_config",
    "logit_scale",
];
const ROPE_FIELDS: &[&str] = &[
    "rope_type",
    "type",
    "rope_theta",
    "factor",
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
    "truncate",
    "low_freq_factor",
    "high_freq_factor",
    "short_factor",
    "long_factor",
    "original_max_position_embeddings",
    "partial_rotary_factor",
];

fn any_json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        (0u64..70).prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        (0.0..2.0f64).prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        prop::sample::select(vec![
            "default",
            "linear",
            "llama3",
            "yarn",
            "longrope",
            "su",
            "dynamic",
            "silu",
            "full_attention",
            "sliding_attention",
            "llama",
            "mistral",
            "qwen2",
            "qwen3",
            "phi3",
            "é"
        ])
        .prop_map(Value::from),
    ];
    leaf.prop_recursive(2, 16, 8, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..9).prop_map(Value::from),
            prop::collection::vec((prop::sample::select(ROPE_FIELDS), inner), 0..6).prop_map(|fields| {
                Value::from(fields.into_iter().map(|(k, v)| (k.to_owned(), v)).collect::<Map<_, _>>())
            }),
        ]
    })
}

/// A rope object that is often valid.
fn any_rope() -> impl Strategy<Value = Value> {
    let kind = prop::sample::select(vec!["default", "linear", "llama3", "yarn", "longrope"]);
    let magnitude = || prop_oneof![1.0..64.0f64, (-7.0..13.0f64).prop_map(|exponent| 10f64.powf(exponent))];
    let numbers = prop::collection::vec(magnitude(), 12);
    (kind, numbers, prop::collection::vec(magnitude(), 8), any::<[bool; 8]>()).prop_map(
        |(kind, n, list, given)| {
            let mut rope = json!({"rope_type": kind});
            let mut put = |given: bool, name: &str, value: Value| {
                if given {
                    rope[name] = value;
                }
            };
            put(given[0], "rope_theta", json!(n[0]));
            put(kind != "default", "factor", json!(n[1]));
            put(kind == "llama3", "low_freq_factor", json!(n[2]));
            put(kind == "llama3", "high_freq_factor", json!(n[2] + n[3]));
            put(given[1] && kind != "default", "original_max_position_embeddings", json!(n[4].ceil() as u64));
            put(kind == "yarn" && given[2], "beta_fast", json!(n[5]));
            put(kind == "yarn" && given[3], "beta_slow", json!(n[6]));
            put(kind == "yarn" && given[4], "mscale", json!(n[7]));
            put(kind == "yarn" && given[5], "mscale_all_dim", json!(n[8]));
            put(kind == "yarn" && given[6], "truncate", json!(given[7]));
            put(kind == "longrope", "short_factor", json!(list));
            put(kind == "longrope", "long_factor", json!(list));
            rope
        },
    )
}

/// What every accepted configuration promises the rest of the crate.
fn assert_sound(config: &ModelConfig) {
    assert!(config.num_heads.is_multiple_of(config.num_kv_heads));
    assert_eq!(config.windows.len(), config.num_layers);
    assert!(config.end_tokens.iter().all(|&token| (token as usize) < config.vocab_size));
    let sites = ModelSites::new(config);
    assert_eq!(sites.blocks.len(), config.num_layers);
    assert_eq!(sites.lm_head + 1, sites.table.len());
    let rotary_dim = config.rotary_dim();
    assert!(rotary_dim > 0 && rotary_dim.is_multiple_of(2) && rotary_dim <= config.head_dim);
    let tables = config.rope.tables(rotary_dim, 3);
    for variant in 0..config.rope.variants() {
        let values = tables.cos[variant].iter().chain(&tables.sin[variant]);
        assert!(values.clone().all(|value| value.is_finite()), "{:?}", config.rope);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

    #[test]
    fn random_edits_never_panic_and_what_is_accepted_is_sound(
        name in prop::sample::select(NAMES.to_vec()),
        edits in prop::collection::vec((prop::sample::select(FIELDS), prop::option::of(any_json())), 0..4),
    ) {
        let mut config = golden_json(name);
        let object = config.as_object_mut().unwrap();
        for (field, value) in edits {
            match value {
                Some(value) => drop(object.insert(field.to_owned(), value)),
                None => drop(object.shift_remove(field)),
            }
        }
        if let Ok(config) = ModelConfig::from_json(&config, "config.json") {
            assert_sound(&config);
        }
    }

    #[test]
    fn any_accepted_rope_gives_finite_tables(
        name in prop::sample::select(vec!["llama", "phi3"]),
        rope in any_rope(),
    ) {
        if let Ok(config) = edited(name, json!({"rope_parameters": rope})) {
            assert_sound(&config);
        }
    }
}
