//! `loramux inspect` says what is in a folder or file, as text and as JSON, and refuses what serving would refuse.

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use common::program::{Ran, copy_folder, loramux};
use common::{Case, FAMILIES};
use loramux::adapter::peft::{CONFIG_FILE, Limits, WEIGHTS_FILE, read_adapter};
use loramux::format::safetensors::{SafetensorsFile, write_safetensors};
use loramux::format::sha256_file;
use loramux::model::Base;
use loramux::tensor::Tensor;
use serde_json::{Value, json};

fn inspect(path: &Path, arguments: &[&str]) -> Ran {
    let path = path.to_str().unwrap();
    loramux(&[&["inspect", path], arguments].concat())
}

fn report(path: &Path, arguments: &[&str]) -> Value {
    let ran = inspect(path, &[&["--json"], arguments].concat());
    assert_eq!((ran.code, ran.stderr.as_str()), (Some(0), ""));
    serde_json::from_str(&ran.stdout).unwrap()
}

/// The rest of the line that begins with `name`.
fn fact<'a>(ran: &'a Ran, name: &str) -> &'a str {
    let line = ran.stdout.lines().find(|line| line.starts_with(name));
    line.unwrap_or_else(|| panic!("no {name} in:\n{}", ran.stdout))[name.len()..].trim()
}

#[test]
fn a_model_folder_is_described_as_its_config_says() {
    for family in FAMILIES {
        let case = Case::open(family);
        let config: Value =
            serde_json::from_slice(&fs::read(case.model().join("config.json")).unwrap()).unwrap();
        let found = report(&case.model(), &[]);
        assert_eq!(found["kind"], "model");
        assert_eq!(found["family"], config["model_type"]);
        for field in [
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "vocab_size",
            "max_position_embeddings",
        ] {
            assert_eq!(found[field], config[field], "{family} {field}");
        }
        let base = Base::open(&case.model()).unwrap();
        assert_eq!(found["hash"], base.checkpoint.content_hash().unwrap(), "{family}");
        assert_eq!(found["tie_word_embeddings"], base.config.tie_word_embeddings, "{family}");
        let sites: u64 = found["sites"]
            .as_array()
            .unwrap()
            .iter()
            .map(|row| row["blocks"].as_array().unwrap().len().max(1) as u64)
            .sum();
        assert_eq!(sites, base.checkpoint.sites().table.len() as u64, "{family}");
        let ends: Vec<u64> =
            found["end_tokens"].as_array().unwrap().iter().map(|end| end["id"].as_u64().unwrap()).collect();
        assert_eq!(ends, base.config.end_tokens.iter().map(|&end| u64::from(end)).collect::<Vec<_>>());
        assert_eq!(
            found["bytes"].as_u64().unwrap(),
            4 * found["parameters"].as_u64().unwrap(),
            "{family}: F32"
        );
        assert_eq!(found["unused_tensors"], json!([]), "{family}");
    }
}

#[test]
fn the_bundled_base_is_described_in_text() {
    let ran = inspect(&Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/base"), &[]);
    assert_eq!((ran.code, ran.stderr.as_str()), (Some(0), ""));
    for (name, wanted) in [
        ("family", "llama"),
        ("parameters", "1714400"),
        ("weights", "BF16 3.3 MiB in 47 tensors"),
        ("blocks", "5"),
        ("heads", "5 of 32 (5 of keys and values)"),
        ("context", "512 tokens"),
        ("rope", "default, rope_theta 10000.0"),
        ("windows", "none"),
        ("tied", "yes"),
        ("end tokens", "2 `<|end|>`"),
        ("chat templates", "default"),
        ("unused tensors", "none"),
        ("down_proj", "0-4     [160, 432]   BF16   no"),
    ] {
        assert_eq!(fact(&ran, name), wanted);
    }
    let mistral = inspect(&Case::open("mistral").model(), &[]);
    assert_eq!(fact(&mistral, "windows"), "13 tokens in blocks 0-1");
}

#[test]
fn an_adapter_is_described_the_same_with_its_base_and_without() {
    let case = Case::open("llama");
    let (base, model) = (Base::open(&case.model()).unwrap(), case.model());
    let sites = &base.checkpoint.sites().table;
    for name in case.adapters().iter().filter(|name| *name != "base") {
        let folder = case.adapter_folder(name);
        let adapter = read_adapter(&folder, sites, &base.checkpoint, Limits { max_rank: 512 }).unwrap();
        let alone = report(&folder, &[]);
        let checked = report(&folder, &["--model", model.to_str().unwrap()]);
        assert_eq!(alone["hash"], adapter.hash, "{name}");
        assert_eq!(alone["checked_against"], Value::Null);
        assert_eq!(checked["checked_against"], model.to_str().unwrap());
        for field in [
            "kind",
            "hash",
            "refused",
            "ranks",
            "saved_modules",
            "saved_biases",
            "tensors",
            "config",
            "bytes",
        ] {
            assert_eq!(alone[field], checked[field], "{name} {field}");
        }
        let by_name = |found: &Value| -> BTreeMap<String, Value> {
            let rows = found["sites"].as_array().unwrap().iter();
            rows.map(|row| (format!("{} {}", row["name"], row["blocks"]), row.clone())).collect()
        };
        assert_eq!(by_name(&alone), by_name(&checked), "{name}: order aside");

        let mut ranks: Vec<usize> = adapter.sites.iter().map(|pair| pair.rank).collect();
        ranks.sort_unstable();
        ranks.dedup();
        assert_eq!(alone["ranks"], json!(ranks), "{name}");
        for row in by_name(&checked).values() {
            let blocks = row["blocks"].as_array().unwrap();
            let is_in = |block: Option<usize>| match block {
                Some(block) => blocks.contains(&json!(block)),
                None => blocks.is_empty(),
            };
            let pairs = adapter.sites.iter().filter(|pair| {
                let site = sites.get(pair.site);
                site.name() == row["name"] && is_in(site.block)
            });
            let pairs: Vec<_> = pairs.collect();
            assert_eq!(pairs.len(), blocks.len().max(1), "{name} {row}");
            for pair in pairs {
                assert_eq!(row["rank"], pair.rank, "{name} {row}");
                assert_eq!(row["scale"].as_f64().unwrap() as f32, pair.scale, "{name} {row}");
                assert_eq!(row["dora"], pair.magnitude.is_some(), "{name} {row}");
                assert_eq!(row["in_features"], sites.get(pair.site).in_features, "{name} {row}");
                assert_eq!(row["out_features"], sites.get(pair.site).out_features, "{name} {row}");
            }
        }
    }
    let ran = inspect(&case.adapter_folder("pattern"), &[]);
    assert_eq!(fact(&ran, "base"), "golden/llama");
    assert_eq!(fact(&ran, "ranks"), "3, 6, 12");
    assert_eq!(fact(&ran, "lora_alpha"), "6");
    let cells = |name: &str| fact(&ran, name).split_whitespace().map(str::to_owned).collect::<Vec<_>>();
    assert_eq!(cells("q_proj"), ["0-2", "3", "3", "64", "64", "F32"]);
    assert_eq!(cells("down_proj"), ["0-2", "12", "0.5", "160", "64", "F32"]);
    let saved = inspect(&case.adapter_folder("saved-head"), &[]);
    assert_eq!(fact(&saved, "lm_head"), "[512, 64]");
    assert!(inspect(&case.adapter_folder("dora-r8"), &[]).stdout.contains("DoRA"));
}

#[test]
fn biases_that_an_adapter_brings_along_are_listed() {
    let case = Case::open("qwen2");
    let folder = tempfile::tempdir().unwrap();
    copy_folder(&case.adapter_folder("small-qv"), folder.path());
    let path = folder.path().join(WEIGHTS_FILE);
    let weights = SafetensorsFile::read(&path).unwrap();
    let mut tensors: Vec<(String, Tensor)> =
        weights.names().map(|name| (name.to_owned(), weights.tensor(name).unwrap())).collect();
    // One of an adapted module, one of another.
    for (module, width) in [("1.self_attn.q_proj.base_layer", 64), ("0.self_attn.k_proj", 32)] {
        let name = format!("base_model.model.model.layers.{module}.bias");
        tensors.push((name, Tensor::from_f32(vec![width], &vec![0.25; width])));
    }
    write_safetensors(&path, &tensors, &BTreeMap::new()).unwrap();
    let (alone, checked) =
        (report(folder.path(), &[]), report(folder.path(), &["--model", case.model().to_str().unwrap()]));
    assert_eq!(alone["saved_biases"], checked["saved_biases"]);
    assert_eq!(alone["hash"], checked["hash"]);
    let wanted = json!([
        {"module": "model.layers.0.self_attn.k_proj", "shape": [32]},
        {"module": "model.layers.1.self_attn.q_proj", "shape": [64]},
    ]);
    assert_eq!(alone["saved_biases"], wanted);
    let ran = inspect(folder.path(), &[]);
    assert_eq!(fact(&ran, "model.layers.0.self_attn.k_proj"), "[32]");
}

#[test]
fn an_adapter_of_another_base_is_refused_with_the_readers_words() {
    let (llama, tied) = (Case::open("llama"), Case::open("llama-tied"));
    let ran = inspect(&llama.adapter_folder("all-r8"), &["--model", tied.model().to_str().unwrap()]);
    assert_eq!((ran.code, ran.stdout.as_str()), (Some(1), ""));
    assert!(
        ran.stderr.contains(WEIGHTS_FILE) && ran.stderr.contains("made for another base?"),
        "{}",
        ran.stderr
    );
    let limited = inspect(&llama.adapter_folder("all-r8"), &["--max-lora-rank", "4"]);
    assert_eq!(limited.code, Some(1));
    assert!(limited.stderr.contains("over the limit of 4"), "{}", limited.stderr);
}

/// A copy of a golden adapter to damage.
fn copy_of(name: &str, folder: &Path) {
    copy_folder(&Case::open("llama").adapter_folder(name), folder);
}

fn set_field(folder: &Path, field: &str, value: Value) {
    let path = folder.join(CONFIG_FILE);
    let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    config[field] = value;
    fs::write(&path, config.to_string()).unwrap();
}

#[test]
fn a_damaged_adapter_is_shown_with_what_is_wrong() {
    let folder = tempfile::tempdir().unwrap();
    let bad = folder.path().join("bad");
    copy_of("small-qv", &bad);
    let name = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight";
    let weights = SafetensorsFile::read(&bad.join(WEIGHTS_FILE)).unwrap();
    let tensors: Vec<(String, Tensor)> = (weights.names())
        .map(|other| {
            let tensor = weights.tensor(other).unwrap();
            let mut values = tensor.to_f32();
            if other == name {
                (values[3], values[7]) = (f32::NAN, f32::INFINITY);
            }
            (other.to_owned(), Tensor::from_f32(tensor.shape().to_vec(), &values))
        })
        .collect();
    write_safetensors(&bad.join(WEIGHTS_FILE), &tensors, &BTreeMap::new()).unwrap();
    let ran = inspect(&bad, &[]);
    assert_eq!(ran.code, Some(1));
    assert_eq!(fact(&ran, "not finite"), "2");
    let row = ran.stdout.lines().find(|line| line.contains("layers.*.self_attn.q_proj.lora_A")).unwrap();
    assert!(row.contains("0-2") && row.contains("[4, 64]") && row.ends_with(" 2"), "{row}");
    assert!(ran.stderr.contains(name) && ran.stderr.contains("element 3 is NaN"), "{}", ran.stderr);
    let ran = inspect(&bad, &["--json"]);
    assert_eq!(ran.code, Some(1));
    let found: Value = serde_json::from_str(&ran.stdout).unwrap();
    assert!(found["refused"].as_str().unwrap().contains("element 3 is NaN"));
    assert_eq!((&found["non_finite"], &found["hash"]), (&json!(2), &Value::Null));
    let damaged = found["tensors"].as_array().unwrap().iter().find(|tensor| tensor["name"] == name).unwrap();
    assert_eq!(damaged["non_finite"], 2);

    for (field, value, reason) in [
        ("peft_type", json!("LOHA"), "field `peft_type`: \"LOHA\" is not supported"),
        ("r", json!(5), "rank 4, but `r` in adapter_config.json says 5"),
        ("lora_alpah", json!(3), "unknown field"),
        ("use_dora", json!(true), "use_dora"),
    ] {
        let bad = folder.path().join(field);
        copy_of("small-qv", &bad);
        set_field(&bad, field, value);
        let ran = inspect(&bad, &[]);
        assert_eq!(ran.code, Some(1), "{field}");
        assert!(ran.stderr.contains(reason), "{field}: {}", ran.stderr);
        assert!(ran.stdout.contains("lora_A.weight"), "{field}: the tensors are listed all the same");
    }
}

#[test]
fn a_file_that_cannot_be_read_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let no_weights = path("no-weights");
    copy_of("small-qv", &no_weights);
    fs::rename(no_weights.join(WEIGHTS_FILE), no_weights.join("adapter_model.bin")).unwrap();
    let bad_json = path("bad-json");
    copy_of("small-qv", &bad_json);
    fs::write(bad_json.join(CONFIG_FILE), "{\"r\": 4, \"r\": 8}").unwrap();
    let torn = path("torn");
    copy_of("small-qv", &torn);
    let bytes = fs::read(torn.join(WEIGHTS_FILE)).unwrap();
    fs::write(torn.join(WEIGHTS_FILE), &bytes[..bytes.len() - 4]).unwrap();
    let model = path("model");
    copy_folder(&Case::open("llama").model(), &model);
    fs::remove_file(model.join("tokenizer.json")).unwrap();
    let file = path("x.safetensors");
    fs::write(&file, b"short").unwrap();
    for (bad, reason) in [
        (&no_weights, "convert to safetensors"),
        (&bad_json, "adapter_config.json: not valid JSON: key `r` occurs twice"),
        (&torn, "adapter_model.safetensors: tensor `base_model"),
        (&model, "no tokenizer.json"),
        (&file, "x.safetensors: not a valid safetensors file"),
    ] {
        for arguments in [&[][..], &["--json"]] {
            let ran = inspect(bad, arguments);
            assert_eq!((ran.code, ran.stdout.as_str()), (Some(1), ""), "{}", bad.display());
            assert!(ran.stderr.contains(reason), "{}: {}", bad.display(), ran.stderr);
        }
    }
}

#[test]
fn what_is_neither_kind_is_a_usage_error_that_says_what_was_looked_for() {
    let folder = tempfile::tempdir().unwrap();
    let other = folder.path().join("notes.txt");
    fs::write(&other, "x").unwrap();
    for (path, found) in [
        (folder.path(), "a folder without either file"),
        (&other, "a file of another kind"),
        (&folder.path().join("nowhere"), "no such file or folder"),
    ] {
        let ran = inspect(path, &[]);
        assert_eq!((ran.code, ran.stdout.as_str()), (Some(2), ""));
        for part in [found, "config.json", "adapter_config.json", ".safetensors"] {
            assert!(ran.stderr.contains(part), "{}", ran.stderr);
        }
    }
    assert_eq!(loramux(&["inspect"]).code, Some(2));
}

#[test]
fn a_safetensors_file_is_listed_whatever_it_holds() {
    let path = Case::open("llama").adapter_folder("dora-r8").join(WEIGHTS_FILE);
    let found = report(&path, &[]);
    assert_eq!(found["kind"], "safetensors");
    assert_eq!(found["hash"], sha256_file(&path).unwrap());
    assert_eq!(found["bytes"], fs::metadata(&path).unwrap().len());
    let tensors = found["tensors"].as_array().unwrap();
    assert_eq!(tensors.len(), 63);
    let data: u64 = tensors.iter().map(|tensor| tensor["bytes"].as_u64().unwrap()).sum();
    assert_eq!(
        found["dtypes"],
        json!([{"dtype": "F32", "tensors": 63, "parameters": data / 4, "bytes": data}])
    );

    // A dtype that no model here has, and a name that would clear a screen.
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("odd.safetensors");
    let header =
        json!({"counts\u{1b}[2J": {"dtype": "I64", "shape": [2], "data_offsets": [0, 16]}}).to_string();
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.extend([0; 16]);
    fs::write(&path, bytes).unwrap();
    let ran = inspect(&path, &[]);
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    assert!(!ran.stdout.contains('\u{1b}'));
    assert!(fact(&ran, "counts").ends_with("not read"), "{}", ran.stdout);
}
