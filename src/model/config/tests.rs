//! Configurations: the bundled ones, defaults, both spellings, and what is refused and how.

mod random;

use std::path::{Path, PathBuf};

use serde_json::json;

use super::*;
use crate::model::RopeScaling;

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name).join("model")
}

fn golden_json(name: &str) -> Value {
    read_json(&golden(name).join("config.json")).unwrap()
}

/// A golden configuration with fields set; a field set to the string "absent" is removed.
fn edited(name: &str, edits: Value) -> Result<ModelConfig, ModelError> {
    let mut config = golden_json(name);
    let object = config.as_object_mut().unwrap();
    for (field, value) in edits.as_object().unwrap().clone() {
        if value == "absent" {
            object.shift_remove(&field);
        } else {
            object.insert(field, value);
        }
    }
    ModelConfig::from_json(&config, "config.json")
}

#[track_caller]
fn accepted(name: &str, edits: Value) -> ModelConfig {
    edited(name, edits).unwrap_or_else(|error| panic!("{name}: {error}"))
}

#[track_caller]
fn assert_refused(name: &str, edits: Value, wanted: &str) {
    match edited(name, edits.clone()) {
        Ok(_) => panic!("{name} with {edits} was accepted"),
        Err(error) => {
            let message = error.to_string();
            assert!(message.starts_with("config.json: "), "{message}");
            assert!(message.contains(wanted), "{name} with {edits}:\nfound  {message}\nwanted {wanted}");
        }
    }
}

#[test]
fn bundled_models_are_read() {
    let llama = ModelConfig::read(&golden("llama")).unwrap();
    assert_eq!(llama.family, Family::Llama);
    assert_eq!((llama.hidden_size, llama.intermediate_size, llama.num_layers), (64, 160, 3));
    assert_eq!((llama.num_heads, llama.num_kv_heads, llama.head_dim), (4, 2, 16));
    assert_eq!((llama.vocab_size, llama.max_position_embeddings, llama.rms_norm_eps), (512, 512, 1e-5));
    assert_eq!((llama.end_tokens, llama.bos_token), (vec![1], Some(0)));
    assert_eq!(llama.windows, [None; 3]);
    assert!(!llama.tie_word_embeddings && !llama.qkv_bias && !llama.output_bias && !llama.mlp_bias);
    assert_eq!(
        llama.rope,
        RopeConfig {
            theta: 50_000.0,
            partial_rotary_factor: 1.0,
            scaling: RopeScaling::Llama3 {
                factor: 8.0,
                low_freq_factor: 1.0,
                high_freq_factor: 4.0,
                original_positions: 64
            }
        }
    );

    let tied = ModelConfig::read(&golden("llama-tied")).unwrap();
    assert_eq!((tied.num_heads, tied.num_kv_heads, tied.head_dim, tied.query_width()), (3, 1, 24, 72));
    assert!(tied.tie_word_embeddings && tied.qkv_bias && tied.output_bias && tied.mlp_bias && !tied.qk_norm);
    assert_eq!((tied.rope.theta, &tied.rope.scaling), (10_000.0, &RopeScaling::Default));

    let mistral = ModelConfig::read(&golden("mistral")).unwrap();
    assert_eq!((mistral.family, mistral.windows), (Family::Mistral, vec![Some(13); 2]));

    let qwen2 = ModelConfig::read(&golden("qwen2")).unwrap();
    assert!(qwen2.qkv_bias && !qwen2.output_bias && !qwen2.mlp_bias && qwen2.tie_word_embeddings);
    assert_eq!((qwen2.family, qwen2.head_dim, qwen2.windows), (Family::Qwen2, 16, vec![None; 2]));

    let qwen3 = ModelConfig::read(&golden("qwen3")).unwrap();
    assert!(qwen3.qk_norm && !qwen3.qkv_bias && !qwen3.output_bias);
    assert_eq!((qwen3.family, qwen3.head_dim, qwen3.kv_width()), (Family::Qwen3, 32, 64));

    let phi3 = ModelConfig::read(&golden("phi3")).unwrap();
    assert_eq!((phi3.family, phi3.head_dim, phi3.rotary_dim()), (Family::Phi3, 16, 16));
    assert_eq!((phi3.rope.variants(), phi3.windows), (1, vec![None; 2]));

    let base = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/base");
    let base = ModelConfig::read(&base).unwrap();
    assert_eq!((base.num_layers, base.head_dim, base.end_tokens), (5, 32, vec![2]));
}

#[test]
fn absent_fields_take_the_defaults_of_their_class() {
    let llama = accepted(
        "llama",
        json!({"rms_norm_eps": "absent", "num_key_value_heads": "absent", "head_dim": "absent",
            "hidden_act": "absent", "tie_word_embeddings": "absent", "eos_token_id": "absent",
            "bos_token_id": "absent", "rope_parameters": "absent", "attention_bias": "absent"}),
    );
    assert_eq!((llama.rms_norm_eps, llama.num_kv_heads, llama.head_dim), (1e-6, 4, 16));
    assert_eq!((llama.end_tokens, llama.bos_token, llama.rope.theta), (vec![2], Some(1), 10_000.0));

    let mistral = accepted("mistral", json!({"sliding_window": "absent", "num_key_value_heads": "absent"}));
    assert_eq!((mistral.windows, mistral.num_kv_heads), (vec![Some(4096); 2], 8));
    assert_eq!(accepted("mistral", json!({"sliding_window": null})).windows, [None; 2]);
    assert_eq!(accepted("mistral", json!({"num_key_value_heads": null})).num_kv_heads, 8);

    let qwen3 = accepted("qwen3", json!({"head_dim": "absent", "eos_token_id": "absent"}));
    assert_eq!((qwen3.head_dim, qwen3.end_tokens), (128, vec![]));

    // 32000 lies beyond this vocabulary.
    let phi3 = accepted("phi3", json!({"rms_norm_eps": "absent", "eos_token_id": "absent"}));
    assert_eq!((phi3.rms_norm_eps, phi3.end_tokens), (1e-5, vec![]));
    assert_eq!(accepted("phi3", json!({"sliding_window": 7})).windows, [Some(7); 2]);
}

#[test]
fn windows_follow_layer_types_or_max_window_layers() {
    let on = |extra: Value| {
        let mut edits = json!({"use_sliding_window": true, "sliding_window": 9});
        edits.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        edits
    };
    for family in ["qwen2", "qwen3"] {
        let by_types = on(json!({"layer_types": ["sliding_attention", "full_attention"]}));
        assert_eq!(accepted(family, by_types).windows, [Some(9), None]);
        let by_count = on(json!({"layer_types": "absent", "max_window_layers": 1}));
        assert_eq!(accepted(family, by_count).windows, [None, Some(9)]);
        let default_count = on(json!({"layer_types": "absent", "max_window_layers": "absent"}));
        assert_eq!(accepted(family, default_count).windows, [None, None]);
        let off = json!({"sliding_window": 9, "layer_types": "absent", "max_window_layers": 0});
        assert_eq!(accepted(family, off).windows, [None, None]);
        let default_size = json!({"use_sliding_window": true, "sliding_window": "absent", "layer_types": "absent",
            "max_window_layers": 1});
        assert_eq!(accepted(family, default_size).windows, [None, Some(4096)]);
    }
    assert_eq!(accepted("llama", json!({"sliding_window": 512})).windows, [None; 3]);
}

#[test]
fn both_spellings_of_rope_say_the_same() {
    let new = json!({"rope_theta": 5000.0, "rope_type": "yarn", "factor": 4.0,
        "original_max_position_embeddings": 128});
    let new = accepted("llama", json!({"rope_parameters": new}));
    let old = json!({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128});
    let old = json!({"rope_parameters": "absent", "rope_theta": 5000, "rope_scaling": old});
    let old = accepted("llama", old);
    assert_eq!(new, old);
    assert_eq!(
        new.rope.scaling,
        RopeScaling::Yarn {
            factor: 4.0,
            beta_fast: 32.0,
            beta_slow: 1.0,
            truncate: true,
            original_positions: 128,
            attention_factor: 0.1 * 4f64.ln() + 1.0,
        }
    );
    let twice = json!({"rope_theta": 7.0, "rope_type": "linear", "type": "linear", "factor": 2});
    let twice = accepted("qwen2", json!({"rope_theta": 7, "rope_scaling": twice, "rope_parameters": twice}));
    assert_eq!((twice.rope.theta, twice.rope.scaling), (7.0, RopeScaling::Linear { factor: 2.0 }));
    let empty = accepted("llama", json!({"rope_parameters": {}, "rope_scaling": {"type": null}}));
    assert_eq!((empty.rope.theta, empty.rope.scaling), (10_000.0, RopeScaling::Default));
}

#[test]
fn yarn_infers_what_is_left_out() {
    let attention = |rope: Value| {
        let mut parameters = json!({"rope_type": "yarn", "original_max_position_embeddings": 128});
        parameters.as_object_mut().unwrap().extend(rope.as_object().unwrap().clone());
        accepted("llama", json!({"rope_parameters": parameters})).rope.attention_factor()
    };
    let close = |found: f64, wanted: f64| assert!((found - wanted).abs() < 1e-12, "{found} {wanted}");
    close(attention(json!({"factor": null})), 1.138629436111989);
    close(attention(json!({"factor": 40, "mscale": 0.707, "mscale_all_dim": 1.0})), 0.9210423553163399);
    close(attention(json!({"factor": 4, "mscale": 0.707, "mscale_all_dim": 0})), 1.138629436111989);
    close(attention(json!({"factor": 4, "attention_factor": 0.5})), 0.5);
    close(attention(json!({"factor": 1.0})), 1.0);
}

#[test]
fn phi3_stretches_by_longrope() {
    let factors = json!([1.0, 1.5, 2, 2.5, 3.0, 3.5, 4.0, 4.5]);
    let rope = json!({"type": "su", "short_factor": factors, "long_factor": factors});
    let edits = json!({"rope_parameters": "absent", "rope_scaling": rope, "rope_theta": 10000.0,
        "max_position_embeddings": 131072, "original_max_position_embeddings": 4096});
    let config = accepted("phi3", edits.clone());
    assert_eq!((config.rope.variants(), config.rope.variant_for(4097)), (2, 1));
    assert!((config.rope.attention_factor() - 1.1902380714238083).abs() < 1e-12);
    let mut inside = edits.clone();
    inside["original_max_position_embeddings"] = json!("absent");
    inside["rope_scaling"]["original_max_position_embeddings"] = json!(4096);
    assert_eq!(accepted("phi3", inside.clone()), config);
    inside["rope_scaling"]["original_max_position_embeddings"] = json!(2048);
    assert_refused(
        "phi3",
        inside.clone(),
        "`rope_scaling.original_max_position_embeddings` = 2048 is not supported: phi3 reads it beside",
    );
    inside["rope_scaling"].as_object_mut().unwrap().shift_remove("original_max_position_embeddings");
    assert_eq!(accepted("phi3", inside), config, "4096 is the class's default");

    let mut partial = edits;
    partial["rope_scaling"]["type"] = json!("yarn");
    partial["partial_rotary_factor"] = json!(0.75);
    for name in ["short_factor", "long_factor"] {
        partial["rope_scaling"][name] = json!([1, 1, 1, 1, 1, 1]);
    }
    assert_eq!(accepted("phi3", partial).rotary_dim(), 12);
}

#[test]
fn end_tokens_of_both_files_are_united() {
    let folder = tempfile::tempdir().unwrap();
    let read = |config: Value, generation: Option<Value>| {
        let mut whole = golden_json("llama");
        whole.as_object_mut().unwrap().shift_remove("eos_token_id");
        whole.as_object_mut().unwrap().extend(config.as_object().unwrap().clone());
        std::fs::write(folder.path().join("config.json"), whole.to_string()).unwrap();
        let path = folder.path().join("generation_config.json");
        match generation {
            Some(generation) => std::fs::write(path, generation.to_string()).unwrap(),
            None => drop(std::fs::remove_file(path)),
        }
        ModelConfig::read(folder.path())
    };
    let tokens = |config, generation| read(config, generation).unwrap().end_tokens;
    assert_eq!(tokens(json!({"eos_token_id": 9}), Some(json!({"eos_token_id": [7, 9, 3]}))), [3, 7, 9]);
    assert_eq!(tokens(json!({"eos_token_id": [5, 4]}), None), [4, 5]);
    assert_eq!(tokens(json!({}), Some(json!({"eos_token_id": 8}))), [8]);
    assert_eq!(tokens(json!({}), Some(json!({}))), [2]);
    assert!(tokens(json!({"eos_token_id": null}), None).is_empty());

    let error = read(json!({}), Some(json!({"eos_token_id": [3, 512]}))).unwrap_err().to_string();
    assert!(
        error.contains("generation_config.json: `eos_token_id[1]` is 512; wanted a token id below"),
        "{error}"
    );
    let error = read(json!({}), Some(json!([]))).unwrap_err().to_string();
    assert!(error.contains("generation_config.json: found []; wanted a JSON object"), "{error}");
    let error = ModelConfig::read(&folder.path().join("absent")).unwrap_err().to_string();
    assert!(error.contains("config.json: cannot open"), "{error}");
}

#[test]
fn bad_sizes_are_refused() {
    for (edits, wanted) in [
        (
            json!({"model_type": "absent"}),
            "`model_type` is missing; wanted one of llama, mistral, qwen2, qwen3, phi3",
        ),
        (
            json!({"model_type": "gemma2"}),
            "`model_type` = \"gemma2\" is not supported: supported are llama, mistral",
        ),
        (json!({"model_type": 3}), "`model_type` is 3; wanted a string"),
        (json!({"hidden_size": "absent"}), "`hidden_size` is missing; wanted an integer from 1 to"),
        (json!({"hidden_size": 64.0}), "`hidden_size` is 64.0; wanted an integer"),
        (json!({"hidden_size": -64}), "`hidden_size` is -64"),
        (json!({"vocab_size": 0}), "`vocab_size` is 0"),
        (
            json!({"num_hidden_layers": 1_000_000_000}),
            "`num_hidden_layers` is 1000000000; wanted an integer from 1 to",
        ),
        (json!({"num_attention_heads": "4"}), "`num_attention_heads` is \"4\""),
        (
            json!({"num_key_value_heads": 3}),
            "`num_key_value_heads` is 3; wanted a divisor of num_attention_heads (4)",
        ),
        (
            json!({"num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": null}),
            "`hidden_size` is 64; wanted a multiple of num_attention_heads (3)",
        ),
        (json!({"head_dim": 15}), "`head_dim` is 15 rotating channels of 15; wanted an even number"),
        (json!({"rms_norm_eps": "1e-5"}), "`rms_norm_eps` is \"1e-5\"; wanted a number from 0.0 to 1.0"),
        (json!({"max_position_embeddings": 1}), "`max_position_embeddings` is 1"),
        (json!({"tie_word_embeddings": 1}), "`tie_word_embeddings` is 1; wanted true or false"),
        (json!({"eos_token_id": -1}), "`eos_token_id` is -1; wanted a token id below vocab_size (512)"),
        (json!({"eos_token_id": [1, "</s>"]}), "`eos_token_id[1]` is \"</s>\""),
        (json!({"bos_token_id": 512}), "`bos_token_id` is 512; wanted a token id below vocab_size (512)"),
    ] {
        assert_refused("llama", edits, wanted);
    }
    let error = ModelConfig::from_json(&json!([1]), "config.json").unwrap_err();
    assert_eq!(error.to_string(), "config.json: found [1]; wanted a JSON object");
    let long = edited("llama", json!({"hidden_size": "é".repeat(4000)})).unwrap_err().to_string();
    assert!(long.len() < 400 && long.contains('…'), "{long}");
}

#[test]
fn features_that_would_change_the_result_are_refused() {
    for (family, edits, wanted) in [
        (
            "llama",
            json!({"hidden_act": "gelu"}),
            "`hidden_act` = \"gelu\" is not supported: the supported activation is silu",
        ),
        (
            "llama",
            json!({"quantization_config": {"quant_method": "gptq"}}),
            "`quantization_config` = {\"quant_method\":\"gptq\"} is not supported: weights have to be",
        ),
        (
            "qwen2",
            json!({"attn_logit_softcapping": 50.0}),
            "`attn_logit_softcapping` = 50.0 is not supported",
        ),
        ("llama", json!({"embedding_multiplier": 12.0}), "`embedding_multiplier` = 12.0"),
        ("llama", json!({"is_causal": false}), "`is_causal` = false"),
        ("mistral", json!({"num_local_experts": 8}), "`num_local_experts` = 8"),
        (
            "llama",
            json!({"architectures": ["LlamaForSequenceClassification"]}),
            "`architectures` = [\"LlamaForSequenceClassification\"]",
        ),
        (
            "mistral",
            json!({"attention_bias": true}),
            "`attention_bias` = true is not supported: mistral has it fixed at false",
        ),
        (
            "qwen2",
            json!({"attention_bias": false}),
            "`attention_bias` = false is not supported: qwen2 has it fixed at true",
        ),
        ("phi3", json!({"mlp_bias": true}), "`mlp_bias` = true"),
        (
            "llama",
            json!({"sliding_window": 100}),
            "`sliding_window` = 100 is not supported: llama has no sliding windows",
        ),
        ("mistral", json!({"sliding_window": 0}), "`sliding_window` is 0"),
        (
            "mistral",
            json!({"layer_types": ["full_attention", "sliding_attention"]}),
            "`layer_types` = [\"full_attention\",\"sliding_attention\"] is not supported: with this sliding_window, mistral blocks are all alike",
        ),
        (
            "qwen3",
            json!({"layer_types": ["full_attention", "sliding_attention"]}),
            "no sliding window is set and used",
        ),
        (
            "qwen3",
            json!({"layer_types": ["full_attention", "linear_attention"]}),
            "`layer_types[1]` is \"linear_attention\"; wanted \"full_attention\" or",
        ),
        (
            "qwen3",
            json!({"layer_types": ["full_attention"]}),
            "`layer_types` is a list of 1; wanted one entry for each of the 2 blocks",
        ),
        (
            "llama",
            json!({"partial_rotary_factor": 0.5}),
            "`partial_rotary_factor` = 0.5 is not supported: llama rotates whole heads",
        ),
    ] {
        assert_refused(family, edits, wanted);
    }
    // The same fields at the values that change nothing.
    let harmless = json!({"quantization_config": null, "attn_logit_softcapping": null, "embedding_multiplier": 1.0,
        "is_causal": true, "num_local_experts": 0, "partial_rotary_factor": 1.0, "pretraining_tp": 4,
        "hidden_act": "swish", "architectures": ["LLaMAForCausalLM"], "unheard_of": {"x": 1},
        "layer_types": ["full_attention", "full_attention", "full_attention"]});
    assert_eq!(accepted("llama", harmless), accepted("llama", json!({})));
}

#[test]
fn bad_rope_settings_are_refused() {
    let types = "supported rope types are default, linear, llama3, yarn, longrope";
    for (family, rope, wanted) in [
        (
            "llama",
            json!({"rope_type": "dynamic", "factor": 2.0}),
            format!("`rope_parameters.rope_type` = \"dynamic\" is not supported: {types}"),
        ),
        (
            "llama",
            json!({"type": "mrope"}),
            format!("`rope_parameters.type` = \"mrope\" is not supported: {types}"),
        ),
        (
            "phi3",
            json!({"rope_type": "linear", "factor": 2.0}),
            "phi3 allows the rope types default, longrope".to_owned(),
        ),
        ("llama", json!({"rope_type": "su"}), "`rope_parameters.rope_type` = \"su\"".to_owned()),
        (
            "llama",
            json!({"rope_type": "linear", "type": "yarn", "factor": 2.0}),
            "`rope_parameters.type` = \"yarn\" is not supported: rope_type is set too and says \"linear\""
                .to_owned(),
        ),
        (
            "llama",
            json!({"rope_type": "linear"}),
            "`rope_parameters.factor` is missing; wanted a number from 1.0".to_owned(),
        ),
        (
            "llama",
            json!({"rope_type": "linear", "factor": 0}),
            "`rope_parameters.factor` is 0; wanted a number".to_owned(),
        ),
        (
            "llama",
            json!({"rope_type": "default", "factor": 2.0}),
            "`rope_parameters.factor` = 2.0 is not supported: rope type default has no such field".to_owned(),
        ),
        (
            "llama",
            json!({"rope_theta": 0.0}),
            "`rope_parameters.rope_theta` is 0.0; wanted a number".to_owned(),
        ),
        (
            "llama",
            json!({"full_attention": {"rope_type": "default"}}),
            "`rope_parameters.full_attention` = ".to_owned(),
        ),
        (
            "llama",
            json!({"rope_type": "default", "mrope_section": [1, 2]}),
            "`rope_parameters.mrope_section` = [1,2]".to_owned(),
        ),
        (
            "llama",
            json!({"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4}),
            "`rope_parameters.high_freq_factor` is 4; wanted more than low_freq_factor (4.0)".to_owned(),
        ),
        (
            "llama",
            json!({"rope_type": "yarn", "factor": 4, "beta_fast": 1, "beta_slow": 2}),
            "`rope_parameters.beta_fast` is 1; wanted at least beta_slow (2.0)".to_owned(),
        ),
        (
            "llama",
            json!({"rope_type": "yarn", "factor": 4, "truncate": 1}),
            "`rope_parameters.truncate` is 1; wanted true or false".to_owned(),
        ),
        (
            "phi3",
            json!({"rope_type": "longrope", "long_factor": [1, 1, 1, 1, 1, 1, 1, 1]}),
            "`rope_parameters.short_factor` is missing; wanted a list of 8 values".to_owned(),
        ),
        (
            "phi3",
            json!({"rope_type": "longrope", "short_factor": [1, 2], "long_factor": []}),
            "`rope_parameters.short_factor` is a list of 2; wanted a list of 8 values".to_owned(),
        ),
        (
            "phi3",
            json!({"rope_type": "longrope", "short_factor": [1, 1, 0, 1, 1, 1, 1, 1]}),
            "`rope_parameters.short_factor[2]` is 0; wanted a number".to_owned(),
        ),
        (
            "phi3",
            json!({"partial_rotary_factor": 0.45}),
            "`partial_rotary_factor` is 7 rotating channels of 16; wanted an even number".to_owned(),
        ),
        (
            "phi3",
            json!({"partial_rotary_factor": 1.5}),
            "`rope_parameters.partial_rotary_factor` is 1.5".to_owned(),
        ),
        (
            "phi3",
            json!({"original_max_position_embeddings": 77}),
            "`original_max_position_embeddings` = 4096 is not supported: the rope settings say 77".to_owned(),
        ),
    ] {
        assert_refused(family, json!({"rope_parameters": rope}), &wanted);
    }
    assert_refused(
        "llama",
        json!({"rope_theta": 1e4}),
        "`rope_theta` = 10000.0 is not supported: the rope settings say 50000.0",
    );
    let other = json!({"rope_scaling": {"type": "linear", "factor": 2.0}});
    assert_refused(
        "llama",
        other,
        "`rope_scaling` = {\"type\":\"linear\",\"factor\":2.0} is not supported: rope_parameters is set too",
    );
    assert_refused("llama", json!({"rope_parameters": [1]}), "`rope_parameters` is [1]; wanted an object");
}
