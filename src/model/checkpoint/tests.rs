//! Checkpoints: every bundled model resolves, and files that do not belong together are refused.

use std::path::{Path, PathBuf};

use serde_json::json;

use super::*;
use crate::format::safetensors::{SafetensorsFile, write_safetensors};
use crate::tensor::DType;

fn bundled() -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let golden = ["llama", "llama-tied", "mistral", "phi3", "qwen2", "qwen3"]
        .map(|name| root.join("tests/golden").join(name).join("model"));
    golden.into_iter().chain([root.join("examples/base")]).collect()
}

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name).join("model")
}

fn open(folder: &Path) -> Result<Checkpoint, ModelError> {
    Checkpoint::open(folder, &ModelConfig::read(folder).unwrap())
}

#[track_caller]
fn assert_refused(folder: &Path, wanted: &str) {
    match open(folder) {
        Ok(_) => panic!("accepted; wanted a refusal with: {wanted}"),
        Err(error) => assert!(error.to_string().contains(wanted), "found  {error}\nwanted {wanted}"),
    }
}

/// A copy of a golden model that a test may spoil.
fn copy(name: &str) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(golden(name)).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), folder.path().join(entry.file_name())).unwrap();
    }
    folder
}

/// Rewrites a safetensors file with some tensors added, replaced or (`None`) removed.
fn rewrite(path: &Path, changes: &[(&str, Option<Tensor>)]) {
    let file = SafetensorsFile::read(path).unwrap();
    let mut tensors: BTreeMap<String, Tensor> =
        file.names().map(|name| (name.to_owned(), file.tensor(name).unwrap())).collect();
    for (name, tensor) in changes {
        match tensor {
            Some(tensor) => drop(tensors.insert((*name).to_owned(), tensor.clone())),
            None => drop(tensors.remove(*name)),
        }
    }
    let tensors: Vec<(String, Tensor)> = tensors.into_iter().collect();
    write_safetensors(path, &tensors, &BTreeMap::new()).unwrap();
}

fn rewrite_index(folder: &Path, tensor: &str, shard: Value) {
    let path = folder.join(INDEX_FILE);
    let mut index = read_json(&path).unwrap();
    index["weight_map"][tensor] = shard;
    fs::write(path, index.to_string()).unwrap();
}

#[test]
fn every_bundled_model_resolves_all_its_tensors() {
    for folder in bundled() {
        let config = ModelConfig::read(&folder).unwrap();
        let checkpoint = Checkpoint::open(&folder, &config).unwrap();
        assert!(checkpoint.unused().is_empty(), "{}: {:?}", folder.display(), checkpoint.unused());
        let sites = checkpoint.sites();
        for (id, site) in sites.table.iter() {
            let weight = checkpoint.site_weight(id).unwrap();
            let bias = checkpoint.site_bias(id).unwrap();
            let wanted = match site.kind {
                SiteKind::Linear => [site.out_features, site.in_features],
                SiteKind::Embedding => [config.vocab_size, config.hidden_size],
            };
            assert_eq!(weight.shape(), wanted, "{}", site.module);
            assert_eq!(bias.map(|bias| bias.shape().to_vec()), site.bias.then(|| vec![site.out_features]));
        }
        for block in &sites.blocks {
            let width = |ids: &[usize]| ids.iter().map(|&id| sites.table.get(id).out_features).sum::<usize>();
            assert_eq!(width(&block.attention_in), config.query_width() + 2 * config.kv_width());
            assert_eq!(width(&block.mlp_in), 2 * config.intermediate_size);
            assert_eq!(sites.table.get(block.attention_out).in_features, config.query_width());
            assert_eq!(sites.table.get(block.mlp_out).in_features, config.intermediate_size);
        }
        assert_eq!(sites.norms.len(), config.num_layers);
        let head = checkpoint.site_weight(sites.lm_head).unwrap();
        let embedding = checkpoint.site_weight(sites.embed_tokens).unwrap();
        assert_eq!(head.bytes().as_ptr() == embedding.bytes().as_ptr(), config.tie_word_embeddings);
    }
}

#[test]
fn sites_are_in_module_order() {
    let names = |name: &str, count: usize| -> Vec<String> {
        let sites = ModelSites::new(&ModelConfig::read(&golden(name)).unwrap());
        assert_eq!(sites.table.len() - 1, sites.lm_head);
        sites.table.iter().take(count).map(|(_, site)| site.module.clone()).collect()
    };
    assert_eq!(
        names("qwen3", 9),
        [
            "model.embed_tokens",
            "model.layers.0.self_attn.q_proj",
            "model.layers.0.self_attn.k_proj",
            "model.layers.0.self_attn.v_proj",
            "model.layers.0.self_attn.o_proj",
            "model.layers.0.mlp.gate_proj",
            "model.layers.0.mlp.up_proj",
            "model.layers.0.mlp.down_proj",
            "model.layers.1.self_attn.q_proj",
        ]
    );
    assert_eq!(
        names("phi3", 6),
        [
            "model.embed_tokens",
            "model.layers.0.self_attn.qkv_proj",
            "model.layers.0.self_attn.o_proj",
            "model.layers.0.mlp.gate_up_proj",
            "model.layers.0.mlp.down_proj",
            "model.layers.1.self_attn.qkv_proj",
        ]
    );
}

#[test]
fn biases_and_norms_are_those_of_the_family() {
    let sites = |name: &str| ModelSites::new(&ModelConfig::read(&golden(name)).unwrap());
    let biased = |sites: &ModelSites| -> Vec<String> {
        (sites.table.iter())
            .filter(|(_, site)| site.bias && site.block == Some(1))
            .map(|(_, site)| site.name().to_owned())
            .collect()
    };
    assert_eq!(biased(&sites("qwen2")), ["q_proj", "k_proj", "v_proj"]);
    assert_eq!(biased(&sites("llama-tied")).len(), 7);
    assert!(biased(&sites("mistral")).is_empty());
    let qwen3 = sites("qwen3");
    let query_key = qwen3.norms[1].query_key.clone().unwrap();
    assert_eq!(query_key.0, "model.layers.1.self_attn.q_norm.weight");
    assert_eq!(query_key.1, "model.layers.1.self_attn.k_norm.weight");
    assert_eq!(qwen3.norms[0].attention, "model.layers.0.input_layernorm.weight");
    assert_eq!(qwen3.norms[0].mlp, "model.layers.0.post_attention_layernorm.weight");
    assert_eq!(sites("phi3").norms[0].query_key, None);
}

#[test]
fn shards_hold_the_values_that_the_index_says() {
    let checkpoint = open(&golden("mistral")).unwrap();
    let shard = SafetensorsFile::open(&golden("mistral").join("model-00003-of-00006.safetensors")).unwrap();
    let name = "model.layers.0.mlp.down_proj.weight";
    let id = checkpoint.sites().table.find("model.layers.0.mlp.down_proj").unwrap();
    assert_eq!(checkpoint.site_weight(id).unwrap().to_f32(), shard.tensor(name).unwrap().to_f32());
}

#[test]
fn folders_without_safetensors_are_refused() {
    let folder = copy("llama");
    fs::remove_file(folder.path().join(SINGLE_FILE)).unwrap();
    assert_refused(
        folder.path(),
        "found no weights; wanted model.safetensors, or shards with model.safetensors.index.json",
    );
    fs::write(folder.path().join("pytorch_model.bin"), b"x").unwrap();
    assert_refused(folder.path(), "found only pytorch_model.bin; convert to safetensors");
    fs::write(folder.path().join("model-00001-of-00002.safetensors"), b"x").unwrap();
    assert_refused(
        folder.path(),
        "found model-00001-of-00002.safetensors; wanted model.safetensors, or shards",
    );
    fs::write(folder.path().join(SINGLE_FILE), b"x").unwrap();
    assert_refused(folder.path(), "model.safetensors: not a valid safetensors file");
}

#[test]
fn an_index_that_does_not_fit_its_shards_is_refused() {
    let folder = copy("mistral");
    let tensor = "lm_head.weight";
    for (shard, wanted) in [
        (
            json!("../model.safetensors"),
            "shard `../model.safetensors` is not the name of a file in this folder",
        ),
        (json!("/etc/passwd"), "shard `/etc/passwd` is not the name"),
        (json!(".."), "shard `..` is not the name"),
        (json!("."), "shard `.` is not the name"),
        (json!(""), "shard `` is not the name"),
        (json!("sub\\x.safetensors"), "is not the name of a file in this folder"),
        (json!("C:x.safetensors"), "is not the name of a file in this folder"),
        (json!("x.bin"), "shard `x.bin` is not a safetensors file; convert to safetensors"),
        (json!("x.safetensors"), "shard `x.safetensors` is not in the folder; download all shards"),
        (
            json!("model-00001-of-00006.safetensors"),
            "shard `model-00001-of-00006.safetensors` does not hold tensor `lm_head.weight`",
        ),
        (json!(5), "`weight_map` gives tensor `lm_head.weight` no file name but 5"),
    ] {
        rewrite_index(folder.path(), tensor, shard);
        assert_refused(folder.path(), wanted);
    }
    fs::write(folder.path().join(INDEX_FILE), "{}").unwrap();
    assert_refused(folder.path(), "model.safetensors.index.json: no `weight_map` object");
    fs::write(folder.path().join(INDEX_FILE), r#"{"weight_map": {}}"#).unwrap();
    assert_refused(
        folder.path(),
        "no tensor `model.embed_tokens.weight`; config.json calls for one of shape [512, 64]",
    );
}

#[test]
fn tensors_that_do_not_fit_the_configuration_are_refused() {
    let folder = copy("qwen2");
    let file = folder.path().join(SINGLE_FILE);
    let whole = fs::read(&file).unwrap();
    let zeros = |shape: &[usize]| Some(Tensor::from_f32(shape.to_vec(), &vec![0.0; shape.iter().product()]));
    for (changes, wanted) in [
        (
            ("model.norm.weight", None),
            "no tensor `model.norm.weight`; config.json calls for one of shape [64]",
        ),
        (("model.layers.1.self_attn.k_proj.bias", None), "no tensor `model.layers.1.self_attn.k_proj.bias`"),
        (
            ("model.layers.0.self_attn.k_proj.weight", zeros(&[64, 32])),
            "model.safetensors: tensor `model.layers.0.self_attn.k_proj.weight` has shape [64, 32]; config.json calls for [32, 64]",
        ),
        (
            ("model.embed_tokens.weight", zeros(&[511, 64])),
            "has shape [511, 64]; config.json calls for [512, 64]",
        ),
        (
            ("model.layers.0.input_layernorm.weight", zeros(&[1, 64])),
            "has shape [1, 64]; config.json calls for [64]",
        ),
    ] {
        fs::write(&file, &whole).unwrap();
        rewrite(&file, &[changes]);
        assert_refused(folder.path(), wanted);
    }
}

#[test]
fn unused_tensors_are_named_and_redundant_ones_are_not() {
    let folder = copy("qwen2");
    let file = folder.path().join(SINGLE_FILE);
    let small = Some(Tensor::from_f32(vec![2], &[1.0, 2.0]));
    rewrite(
        &file,
        &[
            ("model.layers.0.self_attn.rotary_emb.inv_freq", small.clone()),
            ("model.layers.0.self_attn.o_proj.bias", small.clone()),
            ("model.layers.2.mlp.up_proj.weight", small),
        ],
    );
    let wanted = ["model.layers.0.self_attn.o_proj.bias", "model.layers.2.mlp.up_proj.weight"];
    assert_eq!(open(folder.path()).unwrap().unused(), wanted);
}

#[test]
fn a_tied_head_may_be_stored_twice_or_under_its_own_name_but_not_differ() {
    let folder = copy("llama-tied");
    let file = folder.path().join(SINGLE_FILE);
    let (embedding_name, head_name) = ("model.embed_tokens.weight", "lm_head.weight");
    let embedding = SafetensorsFile::read(&file).unwrap().tensor(embedding_name).unwrap();

    rewrite(&file, &[(head_name, Some(embedding.clone()))]);
    let twice = open(folder.path()).unwrap();
    assert!(twice.unused().is_empty());

    rewrite(&file, &[(embedding_name, None)]);
    let renamed = open(folder.path()).unwrap();
    for site in [renamed.sites().embed_tokens, renamed.sites().lm_head] {
        assert_eq!(renamed.site_weight(site).unwrap().to_f32(), embedding.to_f32());
    }

    let mut other = embedding.to_f32();
    other[77] += 0.5;
    let other = Tensor::from_f32(embedding.shape().to_vec(), &other);
    rewrite(&file, &[(embedding_name, Some(embedding)), (head_name, Some(other))]);
    assert_refused(
        folder.path(),
        "tensor `lm_head.weight` differs from `model.embed_tokens.weight`, but config.json has `tie_word_embeddings` = true",
    );
}

#[test]
fn the_content_hash_is_that_of_the_files() {
    for name in ["llama", "mistral"] {
        let folder = copy(name);
        let checkpoint = open(folder.path()).unwrap();
        let hash = checkpoint.content_hash().unwrap();
        assert_eq!(hash, open(&golden(name)).unwrap().content_hash().unwrap());
        let mut names: Vec<String> = weight_like_names(folder.path()).unwrap();
        names.sort();
        let file = folder.path().join(names.last().unwrap());
        if names.len() == 1 {
            assert_eq!(hash, sha256_file(&file).unwrap());
        }
        drop(checkpoint);
        let mut bytes = fs::read(&file).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        fs::write(&file, bytes).unwrap();
        assert_ne!(open(folder.path()).unwrap().content_hash().unwrap(), hash, "{name}");
    }
}

#[test]
fn weights_keep_the_dtype_they_are_stored_in() {
    let base = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/base");
    let checkpoint = open(&base).unwrap();
    assert_eq!(checkpoint.site_weight(checkpoint.sites().embed_tokens).unwrap().dtype(), DType::BF16);
}

#[test]
fn dtypes_that_are_no_floats_are_refused() {
    let folder = copy("llama");
    let file = folder.path().join(SINGLE_FILE);
    let mut bytes = fs::read(&file).unwrap();
    let at = bytes.windows(5).position(|window| window == b"\"F32\"").unwrap();
    bytes[at..at + 5].copy_from_slice(b"\"I32\"");
    fs::write(&file, bytes).unwrap();
    assert_refused(folder.path(), "dtype I32 is not supported (F32, F16 and BF16 are)");
}

#[cfg(unix)]
#[test]
fn a_link_that_leads_nowhere_is_named() {
    let folder = copy("llama");
    let file = folder.path().join(SINGLE_FILE);
    fs::remove_file(&file).unwrap();
    std::os::unix::fs::symlink("absent", &file).unwrap();
    assert_refused(folder.path(), "model.safetensors: cannot open");
}
