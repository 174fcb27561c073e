//! Every bad folder is refused, and the message names the field or tensor.

use serde_json::{Value, json};

use super::super::config::{FIELDS, Treatment};
use super::*;

type Row = (&'static str, fn(&mut Folder), &'static [&'static str]);

#[test]
fn every_bad_folder_is_refused_with_its_field_or_tensor() {
    const CONFIG: &str = "adapter_config.json: field";
    const TENSOR: &str = "adapter_model.safetensors: tensor";
    let rows: &[Row] = &[
        ("r of zero", |f| f.set("r", json!(0)), &[CONFIG, "`r`", "0 is not a rank"]),
        ("negative r", |f| f.set("r", json!(-4)), &[CONFIG, "`r`", "-4"]),
        ("fractional r", |f| f.set("r", json!(4.5)), &[CONFIG, "`r`", "4.5"]),
        ("r as text", |f| f.set("r", json!("4")), &[CONFIG, "`r`"]),
        ("no r", |f| f.set("r", Value::Null), &[CONFIG, "`r`", "missing"]),
        ("r over the limit", |f| f.set("r", json!(17)), &[CONFIG, "`r`", "17", "limit of 16"]),
        ("no alpha", |f| f.set("lora_alpha", Value::Null), &[CONFIG, "`lora_alpha`", "missing"]),
        ("alpha as text", |f| f.set("lora_alpha", json!("inf")), &[CONFIG, "`lora_alpha`", "finite number"]),
        ("alpha beyond f32", |f| f.set("lora_alpha", json!(1e300)), &[CONFIG, "`lora_alpha`", "not finite"]),
        (
            "rank pattern of zero",
            |f| f.set("rank_pattern", json!({"q_proj": 0})),
            &[CONFIG, "`rank_pattern`"],
        ),
        (
            "rank pattern over the limit",
            |f| f.set("rank_pattern", json!({"q_proj": 99})),
            &[CONFIG, "`rank_pattern`", "99", "limit of 16"],
        ),
        ("broken pattern", |f| f.set("alpha_pattern", json!({"(": 3})), &[CONFIG, "`alpha_pattern`", "`(`"]),
        ("pattern as list", |f| f.set("alpha_pattern", json!([3])), &[CONFIG, "`alpha_pattern`"]),
        ("other type", |f| f.set("peft_type", json!("LOHA")), &[CONFIG, "`peft_type`", "LOHA", "LORA"]),
        ("no type", |f| f.set("peft_type", Value::Null), &[CONFIG, "`peft_type`", "missing"]),
        ("unknown field", |f| f.set("lora_gamma", json!(2)), &[CONFIG, "`lora_gamma`", "unknown field"]),
        ("flag as text", |f| f.set("use_rslora", json!("yes")), &[CONFIG, "`use_rslora`"]),
        ("another kind of biases", |f| f.set("bias", json!("boft_only")), &[CONFIG, "`bias`", "boft_only"]),
        (
            "trained biases that are not there",
            |f| f.set("bias", json!("all")),
            &[CONFIG, "`bias`", "v_proj`, whose bias is not in"],
        ),
        (
            "trained biases of adapted modules that are not there",
            |f| f.set("bias", json!("lora_only")),
            &[CONFIG, "`bias`", "v_proj`, whose bias is not in"],
        ),
        (
            "an initialisation that changes the base",
            |f| f.set("init_lora_weights", json!("pissa_niter_16")),
            &[CONFIG, "`init_lora_weights`", "pissa_niter_16", "path_initial_model_for_weight_conversion"],
        ),
        (
            "DoRA with lora_bias",
            |f| {
                f.set("use_dora", json!(true));
                f.set("lora_bias", json!(true));
            },
            &[CONFIG, "`lora_bias`", "use_dora"],
        ),
        (
            "DoRA on an embedding",
            |f| {
                target_embedding(f);
                f.set("use_dora", json!(true));
            },
            &[CONFIG, "`use_dora`", "embedding `model.embed_tokens`"],
        ),
        ("no targets", |f| f.set("target_modules", Value::Null), &[CONFIG, "`target_modules`", "missing"]),
        (
            "unknown target",
            |f| f.set("target_modules", json!(["q_proj", "v_proj", "Wqkv"])),
            &[CONFIG, "`target_modules`", "`Wqkv`", "q_proj, v_proj, up_proj"],
        ),
        (
            "nothing selected",
            |f| f.set("exclude_modules", json!(["q_proj", "v_proj"])),
            &[CONFIG, "`target_modules`", "selects no module"],
        ),
        (
            "target without tensors",
            |f| f.set("target_modules", json!(["q_proj", "v_proj", "up_proj"])),
            &[CONFIG, "`target_modules`", "model.layers.0.mlp.up_proj", "not in adapter_model.safetensors"],
        ),
        (
            "tensors without target",
            |f| f.set("target_modules", json!(["q_proj"])),
            &[TENSOR, "model.layers.0.self_attn.v_proj", "does not ask for"],
        ),
        (
            "tensors of an excluded layer",
            |f| f.set("layers_to_transform", json!([1])),
            &[TENSOR, "layers.0.self_attn.q_proj", "does not ask for"],
        ),
        (
            "layer beyond the base",
            |f| f.set("layers_to_transform", json!([0, 7])),
            &[CONFIG, "`layers_to_transform`", "layer 7", "has 2"],
        ),
        (
            "negative layer",
            |f| f.set("layers_to_transform", json!(-1)),
            &[CONFIG, "`layers_to_transform`", "-1"],
        ),
        (
            "layers with an expression",
            |f| {
                f.set("target_modules", json!(".*(q|v)_proj"));
                f.set("layers_to_transform", json!([0]));
            },
            &[CONFIG, "`layers_to_transform`"],
        ),
        (
            "layers_pattern alone",
            |f| f.set("layers_pattern", json!("layers")),
            &[CONFIG, "`layers_pattern`", "layers_to_transform"],
        ),
        (
            "another module to save",
            |f| f.set("modules_to_save", json!(["norm"])),
            &[CONFIG, "`modules_to_save`", "`norm`", "lm_head"],
        ),
        (
            "saved module without tensor",
            |f| f.set("modules_to_save", json!(["lm_head"])),
            &[CONFIG, "`modules_to_save`", "`lm_head`", "not in adapter_model.safetensors"],
        ),
        (
            "saved module of another vocabulary",
            |f| {
                f.set("modules_to_save", json!(["lm_head"]));
                f.add("lm_head", "weight", values(&[VOCABULARY + 1, HIDDEN], 0.0));
            },
            &[TENSOR, "lm_head.weight", "[11, 8]", "[10, 8]"],
        ),
        (
            "saved tensor that nothing asks for",
            |f| f.add("lm_head", "modules_to_save.weight", values(&[VOCABULARY, HIDDEN], 0.0)),
            &[TENSOR, "`modules_to_save`", "does not ask for `lm_head`"],
        ),
        (
            "A without B",
            |f| f.remove(Q0, "lora_B.weight"),
            &[TENSOR, "q_proj.lora_A.weight", "no lora_B.weight"],
        ),
        (
            "B without A",
            |f| f.remove(V1, "lora_A.weight"),
            &[TENSOR, "v_proj.lora_B.weight", "no lora_A.weight"],
        ),
        (
            "ranks differ",
            |f| *f.tensor(Q0, "lora_B.weight") = values(&[8, 3], 0.0),
            &[TENSOR, "q_proj.lora_B.weight", "rank 3", "rank 4"],
        ),
        (
            "rank against r",
            |f| f.set("r", json!(2)),
            &[TENSOR, "q_proj.lora_A.weight", "rank 4", "`r` in adapter_config.json says 2"],
        ),
        (
            "rank against the pattern",
            |f| f.set("rank_pattern", json!({"v_proj": 2})),
            &[TENSOR, "v_proj.lora_A.weight", "`rank_pattern` in adapter_config.json says 2"],
        ),
        (
            "A transposed",
            |f| *f.tensor(Q0, "lora_A.weight") = values(&[8, 4], 0.0),
            &[TENSOR, "q_proj.lora_A.weight", "[8, 4] is transposed", "[4, 8]"],
        ),
        (
            "B transposed",
            |f| *f.tensor(Q0, "lora_B.weight") = values(&[4, 8], 0.0),
            &[TENSOR, "q_proj.lora_B.weight", "[4, 8] is transposed", "[8, 4]"],
        ),
        (
            "A of another width",
            |f| *f.tensor(Q0, "lora_A.weight") = values(&[4, 16], 0.0),
            &[TENSOR, "q_proj.lora_A.weight", "width 16", "has 8", "made for another base?"],
        ),
        (
            "B of another width",
            |f| *f.tensor(V1, "lora_B.weight") = values(&[8, 4], 0.0),
            &[TENSOR, "v_proj.lora_B.weight", "width 8", "has 4", "made for another base?"],
        ),
        (
            "A of three dimensions",
            |f| *f.tensor(Q0, "lora_A.weight") = values(&[4, 8, 1], 0.0),
            &[TENSOR, "q_proj.lora_A.weight", "not a matrix"],
        ),
        (
            "a module beyond the base",
            |f| f.add_pair("model.layers.2.self_attn.q_proj", 4, 8, 8),
            &[
                TENSOR,
                "`model.layers.2.self_attn.q_proj` is not an adaptable module",
                "made for another base?",
            ],
        ),
        ("no prefix", |f| f.rename("base_model.model.", ""), &[TENSOR, "start with `base_model.model.`"]),
        (
            "unknown suffix",
            |f| f.add(Q0, "lora_C.weight", values(&[4, 8], 0.0)),
            &[TENSOR, "unknown suffix `lora_C.weight`", Q0],
        ),
        (
            "a trained bias that the base does not have",
            |f| f.add(Q0, "base_layer.bias", values(&[8], 0.0)),
            &[TENSOR, "base_layer.bias", "`model.layers.0.self_attn.q_proj` of this base has no bias"],
        ),
        (
            "a trained bias of another width",
            |f| f.add(V1, "bias", values(&[8], 0.0)),
            &[TENSOR, "v_proj.bias", "shape [8]", "wants [4]"],
        ),
        (
            "a trained bias twice",
            |f| {
                f.add(V1, "bias", values(&[4], 0.0));
                f.add(V1, "base_layer.bias", values(&[4], 0.0));
            },
            &[TENSOR, "the same part of the module"],
        ),
        (
            "a trained bias that is not finite",
            |f| f.add(V1, "bias", values(&[4], f32::NAN)),
            &[TENSOR, "v_proj.bias", "element 0 is NaN"],
        ),
        (
            "embedding tensors on a linear layer",
            |f| f.rename("lora_A.weight", "lora_embedding_A"),
            &[TENSOR, "unknown suffix `lora_embedding_A`", "linear layer"],
        ),
        (
            "the same part twice",
            |f| f.add(Q0, "lora_A.default.weight", values(&[4, 8], 0.0)),
            &[TENSOR, "same part", "q_proj.lora_A"],
        ),
        (
            "two adapters in one file",
            |f| {
                f.rename("q_proj.lora_A.weight", "q_proj.lora_A.first.weight");
                f.rename("v_proj.lora_A.weight", "v_proj.lora_A.second.weight");
            },
            &[TENSOR, "`second`", "`first`"],
        ),
        (
            "NaN in B",
            |f| *f.tensor(V1, "lora_B.weight") = Tensor::from_f32(vec![4, 4], &[f32::NAN; 16]),
            &[TENSOR, "v_proj.lora_B.weight", "element 0 is NaN"],
        ),
        (
            "infinity in A of half precision",
            |f| {
                let mut bytes = vec![0u8; 64];
                bytes[2..4].copy_from_slice(&0x7c00u16.to_le_bytes());
                *f.tensor(Q0, "lora_A.weight") = Tensor::new(DType::F16, vec![4, 8], Bytes::new(bytes));
            },
            &[TENSOR, "q_proj.lora_A.weight", "element 1 is inf"],
        ),
        (
            "magnitude without DoRA",
            |f| f.add(Q0, "lora_magnitude_vector", values(&[8], 0.0)),
            &[TENSOR, "lora_magnitude_vector", "`use_dora` is not true"],
        ),
        (
            "DoRA without magnitude",
            |f| f.set("use_dora", json!(true)),
            &[CONFIG, "`use_dora`", "lora_magnitude_vector is not in"],
        ),
        (
            "bias without lora_bias",
            |f| f.add(Q0, "lora_B.bias", values(&[8], 0.0)),
            &[TENSOR, "lora_B.bias", "`lora_bias` is not true"],
        ),
        (
            "lora_bias without bias",
            |f| f.set("lora_bias", json!(true)),
            &[CONFIG, "`lora_bias`", "lora_B.bias"],
        ),
        (
            "a copy that is not the base's",
            |f| f.add("lm_head", "base_layer.weight", values(&[VOCABULARY, HIDDEN], 99.0)),
            &[TENSOR, "lm_head.base_layer.weight", "element 0", "another base"],
        ),
        (
            "a trained embedding outside modules_to_save",
            |f| f.add(EMBED, "weight", values(&[VOCABULARY, HIDDEN], 99.0)),
            &[TENSOR, "embed_tokens.weight", "modules_to_save"],
        ),
        (
            "an embedding resized",
            |f| f.add(EMBED, "weight", values(&[VOCABULARY + 2, HIDDEN], 0.0)),
            &[TENSOR, "embed_tokens.weight", "[12, 8]", "[10, 8]"],
        ),
    ];
    for (what, change, wanted) in rows {
        let mut folder = Folder::new();
        change(&mut folder);
        let error = folder.read().map(|adapter| adapter.hash).expect_err(what).to_string();
        for part in *wanted {
            assert!(error.contains(part), "{what}: {part:?} is not in: {error}");
        }
    }
}

#[test]
fn every_field_that_would_change_the_result_is_refused_when_set() {
    for &(field, treatment) in FIELDS {
        for value in [json!(true), json!({"a": 1}), json!([1]), json!("x")] {
            let mut folder = Folder::new();
            folder.set(field, value.clone());
            let result = folder.read();
            match treatment {
                Treatment::Unsupported | Treatment::UnsupportedUnlessNull => {
                    let error = result.expect_err(field).to_string();
                    assert!(error.contains(&format!("field `{field}`: {value} is not supported")), "{error}");
                }
                Treatment::NoEffect => assert_eq!(result.unwrap().hash, Folder::new().read().unwrap().hash),
                Treatment::Applied => {}
            }
        }
        if treatment == Treatment::Unsupported {
            for unset in [Value::Null, json!(false), json!([]), json!({})] {
                let mut folder = Folder::new();
                folder.set(field, unset);
                folder.read().expect(field);
            }
        }
    }
    let mut folder = Folder::new();
    folder.set("alora_invocation_tokens", json!([]));
    assert!(folder.read().unwrap_err().to_string().contains("`alora_invocation_tokens`"));
}

#[test]
fn a_folder_without_its_files_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    let error = |path: &Path| read(path).unwrap_err().to_string();
    assert!(error(&path.join("absent")).contains("no such adapter folder"));
    assert!(error(path).contains("no adapter_config.json"));
    std::fs::write(path.join(CONFIG_FILE), Folder::new().config.to_string()).unwrap();
    assert!(error(path).contains("no adapter_model.safetensors"));
    for pickled in ["adapter_model.bin", "weights.pt"] {
        std::fs::write(path.join(pickled), b"").unwrap();
        let error = error(path);
        assert!(error.contains(pickled) && error.contains("convert to safetensors"), "{error}");
        std::fs::remove_file(path.join(pickled)).unwrap();
    }
    std::fs::write(path.join(WEIGHTS_FILE), b"").unwrap();
    assert!(error(path).contains("adapter_model.safetensors: not a valid safetensors file"));
    std::fs::write(path.join(CONFIG_FILE), br#"{"peft_type": "LORA", "r": 4, "r": 8}"#).unwrap();
    assert!(error(path).contains("adapter_config.json: not valid JSON: key `r` occurs twice"));
    std::fs::write(path.join(CONFIG_FILE), br#"{"peft_type": "LORA", "lora_alpha": NaN}"#).unwrap();
    assert!(error(path).contains("in `lora_alpha`"));
    std::fs::write(path.join(CONFIG_FILE), b"[]").unwrap();
    assert!(error(path).contains("not a JSON object"));
}

#[test]
fn names_that_could_be_misread_are_refused() {
    for (name, wanted) in [
        ("", "empty"),
        (" a", "space"),
        ("a\u{a0}", "space"),
        ("a/b", "slash"),
        ("a\\b", "slash"),
        ("..", "`..`"),
        ("a..b", "`..`"),
        ("a,b", "comma"),
        ("a\"b", "quote"),
        ("a'b", "quote"),
        ("a\nb", "control"),
        ("a\0b", "control"),
        ("base", "base model's name"),
        ("auto", "reserved"),
    ] {
        let error = validate_adapter_name(name, "base").expect_err(name).to_string();
        assert!(error.contains(wanted) && error.contains(&format!("{name:?}")), "{error}");
    }
    for name in ["a", "tweet-sentiment", "v1.2", "née", "two words", "a:b"] {
        validate_adapter_name(name, "base").expect(name);
    }
}
