//! What adapter folders mean, on a small base; `refusals` holds the folders that must not be read.

mod properties;
mod refusals;

use std::path::Path;

use serde_json::{Value, json};

use super::config::Config;
use super::*;
use crate::adapter::Adapter;
use crate::format::safetensors::write_safetensors;
use crate::tensor::{Bytes, DType};

const LIMITS: Limits = Limits { max_rank: 16 };
const HIDDEN: usize = 8;
const VOCABULARY: usize = 10;

/// A base of two blocks with q (8 → 8), v (8 → 4, with bias) and up (8 → 12), and untied embeddings.
fn base_sites() -> SiteTable {
    let linear = |module: String, block, out_features| Site {
        bias: module.ends_with("v_proj"),
        module,
        block,
        kind: SiteKind::Linear,
        in_features: HIDDEN,
        out_features,
    };
    let mut sites = vec![Site {
        module: "model.embed_tokens".into(),
        block: None,
        kind: SiteKind::Embedding,
        in_features: VOCABULARY,
        out_features: HIDDEN,
        bias: false,
    }];
    for block in 0..2 {
        for (name, width) in [("self_attn.q_proj", 8), ("self_attn.v_proj", 4), ("mlp.up_proj", 12)] {
            sites.push(linear(format!("model.layers.{block}.{name}"), Some(block), width));
        }
    }
    sites.push(linear("lm_head".into(), None, VOCABULARY));
    SiteTable::new(sites)
}

struct Base(SiteTable);

impl BaseWeights for Base {
    fn weight(&self, site: usize) -> Tensor {
        values(&weight_shape(self.0.get(site)), 0.25 + site as f32)
    }
}

fn values(shape: &[usize], salt: f32) -> Tensor {
    let len = shape.iter().product::<usize>();
    let values: Vec<f32> = (0..len).map(|i| ((i as f32 + salt) * 0.7).sin()).collect();
    Tensor::from_f32(shape.to_vec(), &values)
}

/// A folder in the making; by default rank 4 on q_proj and v_proj of both blocks.
#[derive(Clone)]
struct Folder {
    config: Value,
    tensors: Vec<(String, Tensor)>,
}

fn key(module: &str, suffix: &str) -> String {
    format!("base_model.model.{module}.{suffix}")
}

const Q0: &str = "model.layers.0.self_attn.q_proj";
const V1: &str = "model.layers.1.self_attn.v_proj";
const EMBED: &str = "model.embed_tokens";

impl Folder {
    fn new() -> Self {
        let config = json!({
            "peft_type": "LORA",
            "base_model_name_or_path": "some/base",
            "r": 4,
            "lora_alpha": 8,
            "lora_dropout": 0.1,
            "target_modules": ["q_proj", "v_proj"],
        });
        let mut folder = Self { config, tensors: Vec::new() };
        for block in 0..2 {
            folder.add_pair(&format!("model.layers.{block}.self_attn.q_proj"), 4, 8, 8);
            folder.add_pair(&format!("model.layers.{block}.self_attn.v_proj"), 4, 8, 4);
        }
        folder
    }

    fn add(&mut self, module: &str, suffix: &str, tensor: Tensor) {
        self.tensors.push((key(module, suffix), tensor));
    }

    fn add_pair(&mut self, module: &str, rank: usize, input: usize, output: usize) {
        self.add(module, "lora_A.weight", values(&[rank, input], 1.0));
        self.add(module, "lora_B.weight", values(&[output, rank], 2.0));
    }

    fn set(&mut self, field: &str, value: Value) {
        self.config[field] = value;
    }

    fn tensor(&mut self, module: &str, suffix: &str) -> &mut Tensor {
        let name = key(module, suffix);
        &mut self.tensors.iter_mut().find(|(other, _)| *other == name).unwrap().1
    }

    fn rename(&mut self, from: &str, to: &str) {
        for (name, _) in &mut self.tensors {
            *name = name.replace(from, to);
        }
    }

    fn remove(&mut self, module: &str, suffix: &str) {
        self.tensors.retain(|(name, _)| *name != key(module, suffix));
    }

    fn read(&self) -> Result<Adapter, AdapterError> {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join(CONFIG_FILE), self.config.to_string()).unwrap();
        write_safetensors(&folder.path().join(WEIGHTS_FILE), &self.tensors, &Default::default()).unwrap();
        read(folder.path())
    }
}

fn read(folder: &Path) -> Result<Adapter, AdapterError> {
    read_adapter(folder, &base_sites(), &Base(base_sites()), LIMITS)
}

/// Adds a copy of a base weight as PEFT stores it.
fn add_copy(folder: &mut Folder, module: &str, suffix: &str) {
    let sites = base_sites();
    let id = sites.find(module).unwrap();
    folder.add(module, suffix, Base(sites).weight(id));
}

fn target_embedding(folder: &mut Folder) {
    folder.set("target_modules", json!(["q_proj", "v_proj", "embed_tokens"]));
    folder.add(EMBED, "lora_embedding_A", values(&[4, VOCABULARY], 1.0));
    folder.add(EMBED, "lora_embedding_B", values(&[HIDDEN, 4], 2.0));
}

#[test]
fn other_spellings_of_tensor_names_give_the_same_adapter() {
    let mut plain = Folder::new();
    plain.set("use_dora", json!(true));
    for block in 0..2 {
        for (name, width) in [("q", 8), ("v", 4)] {
            let module = format!("model.layers.{block}.self_attn.{name}_proj");
            plain.add(&module, "lora_magnitude_vector", values(&[width], 3.0));
        }
    }
    let wanted = plain.read().unwrap();
    assert_eq!(wanted.sites[0].magnitude, Some(values(&[8], 3.0).to_f32()));
    for (vector, infix) in [
        ("lora_magnitude_vector.weight", ""),
        ("lora_magnitude_vector.default", ".default"),
        ("lora_magnitude_vector.default.weight", ".default"),
    ] {
        let mut other = plain.clone();
        other.rename("lora_magnitude_vector", vector);
        other.rename("lora_A.weight", &format!("lora_A{infix}.weight"));
        other.rename("lora_B.weight", &format!("lora_B{infix}.weight"));
        assert_eq!(other.read().unwrap().hash, wanted.hash, "{vector}");
    }
}

#[test]
fn copies_that_equal_the_base_are_accepted_also_in_lower_precision() {
    let mut folder = Folder::new();
    target_embedding(&mut folder);
    let wanted = folder.read().unwrap();
    add_copy(&mut folder, EMBED, "base_layer.weight");
    add_copy(&mut folder, "lm_head", "weight");
    let adapter = folder.read().unwrap();
    assert_eq!(adapter.hash, wanted.hash);
    assert!(adapter.saved_modules.is_empty());

    let copy = folder.tensor("lm_head", "weight");
    let rounded: Vec<half::bf16> = copy.to_f32().into_iter().map(half::bf16::from_f32).collect();
    *copy = Tensor::new(
        DType::BF16,
        vec![VOCABULARY, HIDDEN],
        Bytes::new(bytemuck::cast_slice(&rounded).to_vec()),
    );
    assert_eq!(folder.read().unwrap().hash, wanted.hash);
}

#[test]
fn saved_modules_replace_whole_weights_and_are_not_adapted() {
    for name in ["lm_head", "embed_tokens", "model.embed_tokens"] {
        let mut folder = Folder::new();
        folder.set("modules_to_save", json!([name]));
        folder.set("target_modules", json!(["q_proj", "v_proj", "embed_tokens", "lm_head"]));
        let sites = base_sites();
        let (saved, adapted) = if name == "lm_head" { ("lm_head", EMBED) } else { (EMBED, "lm_head") };
        if adapted == EMBED {
            target_embedding(&mut folder);
            folder.set("target_modules", json!(["q_proj", "v_proj", "embed_tokens", "lm_head"]));
        } else {
            folder.add_pair("lm_head", 4, HIDDEN, VOCABULARY);
        }
        for suffix in ["weight", "modules_to_save.weight", "modules_to_save.default.weight"] {
            let mut folder = folder.clone();
            folder.add(saved, suffix, values(&[VOCABULARY, HIDDEN], 5.0));
            let adapter = folder.read().unwrap();
            let id = sites.find(saved).unwrap();
            assert_eq!(adapter.saved_modules.len(), 1);
            assert_eq!(adapter.saved_modules[0].site, id);
            assert_eq!(adapter.saved_modules[0].weight.to_f32(), values(&[VOCABULARY, HIDDEN], 5.0).to_f32());
            assert!(adapter.sites.iter().all(|adapted| adapted.site != id));
            assert!(adapter.sites.iter().any(|site| site.site == sites.find(adapted).unwrap()));
        }
    }
}

#[test]
fn biases_in_the_file_replace_the_bases_whatever_bias_says() {
    let sites = base_sites();
    for (bias, blocks) in [("none", 0..0), ("none", 1..2), ("lora_only", 0..2), ("all", 0..2)] {
        for suffix in ["bias", "base_layer.bias"] {
            let mut folder = Folder::new();
            folder.set("bias", json!(bias));
            for block in blocks.clone() {
                let salt = block as f32;
                folder.add(&format!("model.layers.{block}.self_attn.v_proj"), suffix, values(&[4], salt));
            }
            let adapter = folder.read().unwrap();
            let wanted: Vec<SavedBias> = blocks
                .clone()
                .map(|block| SavedBias {
                    site: sites.find(&format!("model.layers.{block}.self_attn.v_proj")).unwrap(),
                    bias: values(&[4], block as f32).to_f32(),
                })
                .collect();
            assert_eq!(adapter.saved_biases, wanted);
            assert_eq!(adapter.hash == Folder::new().read().unwrap().hash, blocks.is_empty());
        }
    }
}

/// Modules and (rank, scale) that a configuration plans.
fn planned(change: Value) -> Vec<(String, usize, f32)> {
    let mut config = Folder::new().config;
    for (field, value) in change.as_object().unwrap() {
        config[field] = value.clone();
    }
    let sites = base_sites();
    let plan = Config::from_json(Path::new("c"), &config).unwrap().plan(&sites, LIMITS).unwrap();
    plan.adapted.iter().map(|site| (sites.get(site.site).module.clone(), site.rank, site.scale)).collect()
}

fn planned_modules(change: Value) -> Vec<String> {
    planned(change)
        .into_iter()
        .map(|(module, ..)| module.replace("model.layers.", "").replace("self_attn.", ""))
        .collect()
}

#[test]
fn targets_are_found_as_peft_finds_them() {
    let linear = ["0.q_proj", "0.v_proj", "0.mlp.up_proj", "1.q_proj", "1.v_proj", "1.mlp.up_proj"];
    assert_eq!(planned_modules(json!({"target_modules": "all-linear"})), linear);
    assert_eq!(planned_modules(json!({"target_modules": ["lm_head"]})), ["lm_head"]);
    assert_eq!(planned_modules(json!({"target_modules": ["self_attn.v_proj"]})), ["0.v_proj", "1.v_proj"]);
    assert_eq!(planned_modules(json!({"target_modules": r"model\.layers\.1\..*_proj"})), linear[3..]);
    assert_eq!(planned_modules(json!({"target_modules": r"(?!.*mlp).*\.1\..*"})), ["1.q_proj", "1.v_proj"]);
    assert_eq!(
        planned_modules(json!({"exclude_modules": ["layers.0.self_attn.q_proj", "v_proj"]})),
        ["1.q_proj"]
    );
    assert_eq!(planned_modules(json!({"exclude_modules": ".*layers.1.*"})), ["0.q_proj", "0.v_proj"]);
    assert_eq!(planned_modules(json!({"layers_to_transform": 1})), ["1.q_proj", "1.v_proj"]);
    assert_eq!(planned_modules(json!({"layers_to_transform": []})).len(), 4);
    let listed = json!({"layers_to_transform": [0], "layers_pattern": ["blocks", "layers"]});
    assert_eq!(planned_modules(listed), ["0.q_proj", "0.v_proj"]);
    let whole =
        json!({"layers_to_transform": [1], "target_modules": ["q_proj", "model.layers.0.mlp.up_proj"]});
    assert_eq!(
        planned_modules(whole),
        ["0.mlp.up_proj", "1.q_proj"],
        "a whole path is exempt from the layers"
    );
}

#[test]
fn ranks_and_scales_follow_the_patterns() {
    let by_name = planned(json!({
        "rank_pattern": {"q_proj": 2, ".*": 16},
        "alpha_pattern": {"layers.1.self_attn.v_proj": 3},
        "target_modules": ["q_proj", "v_proj"],
    }));
    let values: Vec<_> = by_name.iter().map(|&(_, rank, scale)| (rank, scale)).collect();
    assert_eq!(values, [(2, 4.0), (16, 0.5), (2, 4.0), (16, 3.0 / 16.0)]);
    let stabilised = planned(json!({"use_rslora": true}));
    assert!(stabilised.iter().all(|&(_, _, scale)| scale == 4.0), "8 / √4");
}

#[test]
fn the_hash_is_of_content_and_not_of_spelling() {
    let folder = Folder::new();
    let wanted = folder.read().unwrap().hash;

    let mut respelled = folder.clone();
    respelled.tensors.reverse();
    respelled.set("target_modules", json!(r".*_attn.*"));
    respelled.set("task_type", json!("CAUSAL_LM"));
    respelled.set("base_model_name_or_path", json!("another/name"));
    respelled.set("r", json!(16));
    respelled.set("rank_pattern", json!({"q_proj": 4, "v_proj": 4}));
    assert_eq!(respelled.read().unwrap().hash, wanted);

    let mut rescaled = folder.clone();
    rescaled.set("alpha_pattern", json!({"layers.1.self_attn.v_proj": 8.001}));
    assert_ne!(rescaled.read().unwrap().hash, wanted);

    let mut retrained = folder.clone();
    *retrained.tensor(V1, "lora_B.weight") = values(&[4, 4], 2.5);
    assert_ne!(retrained.read().unwrap().hash, wanted);

    let mut narrowed = folder.clone();
    let a = narrowed.tensor(Q0, "lora_A.weight");
    let halves: Vec<half::f16> = a.to_f32().into_iter().map(half::f16::from_f32).collect();
    *a = Tensor::new(DType::F16, vec![4, 8], Bytes::new(bytemuck::cast_slice(&halves).to_vec()));
    let narrowed = narrowed.read().unwrap();
    assert_eq!(narrowed.sites[0].a.dtype(), DType::F16, "dtypes stay as stored");
    assert_ne!(narrowed.hash, wanted);
}
