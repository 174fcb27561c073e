//! Adapter folders that PEFT wrote are read as PEFT means them, and what is written is read back the same.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use loramux::adapter::peft::{
    AdapterError, BaseWeights, CONFIG_FILE, Limits, WEIGHTS_FILE, WriteOptions, content_hash, read_adapter,
    write_adapter,
};
use loramux::adapter::{Adapter, SavedBias, SavedModule, Site, SiteAdapter, SiteKind, SiteTable};
use loramux::format::read_json;
use loramux::format::safetensors::SafetensorsFile;
use loramux::tensor::{Bytes, DType, Tensor};
use proptest::prelude::*;
use serde_json::Value;

const FAMILIES: [&str; 6] = ["llama", "llama-tied", "qwen2", "qwen3", "mistral", "phi3"];
const LIMITS: Limits = Limits { max_rank: 64 };

fn golden(family: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(family)
}

/// The sites of a golden model, from the numbers in its config.json.
fn sites_of(config: &Value) -> SiteTable {
    let number = |name: &str| config[name].as_u64().map(|number| number as usize);
    let (hidden, vocabulary) = (number("hidden_size").unwrap(), number("vocab_size").unwrap());
    let heads = number("num_attention_heads").unwrap();
    let head = number("head_dim").unwrap_or(hidden / heads);
    let (queries, keys) = (heads * head, number("num_key_value_heads").unwrap() * head);
    let inner = number("intermediate_size").unwrap();
    let projections = if config["model_type"] == "phi3" {
        vec![
            ("self_attn.qkv_proj", hidden, queries + 2 * keys),
            ("self_attn.o_proj", queries, hidden),
            ("mlp.gate_up_proj", hidden, 2 * inner),
            ("mlp.down_proj", inner, hidden),
        ]
    } else {
        vec![
            ("self_attn.q_proj", hidden, queries),
            ("self_attn.k_proj", hidden, keys),
            ("self_attn.v_proj", hidden, keys),
            ("self_attn.o_proj", queries, hidden),
            ("mlp.gate_proj", hidden, inner),
            ("mlp.up_proj", hidden, inner),
            ("mlp.down_proj", inner, hidden),
        ]
    };
    let site = |module: &str, block, kind, in_features, out_features| Site {
        module: module.to_owned(),
        block,
        kind,
        in_features,
        out_features,
        bias: false,
    };
    let mut sites = vec![site("model.embed_tokens", None, SiteKind::Embedding, vocabulary, hidden)];
    for block in 0..number("num_hidden_layers").unwrap() {
        for &(name, input, output) in &projections {
            sites.push(site(
                &format!("model.layers.{block}.{name}"),
                Some(block),
                SiteKind::Linear,
                input,
                output,
            ));
        }
    }
    sites.push(site("lm_head", None, SiteKind::Linear, hidden, vocabulary));
    SiteTable::new(sites)
}

/// A golden model's sites and weights.
struct Base {
    sites: SiteTable,
    files: Vec<SafetensorsFile>,
}

impl Base {
    fn open(family: &str) -> Self {
        let folder = golden(family).join("model");
        let sites = sites_of(&read_json(&folder.join("config.json")).unwrap());
        let paths = std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path());
        let shards =
            paths.filter(|path| path.extension().is_some_and(|extension| extension == "safetensors"));
        Self { sites, files: shards.map(|path| SafetensorsFile::open(&path).unwrap()).collect() }
    }

    fn read(&self, folder: &Path) -> Result<Adapter, AdapterError> {
        read_adapter(folder, &self.sites, self, LIMITS)
    }
}

impl BaseWeights for Base {
    fn weight(&self, site: usize) -> Tensor {
        let name = format!("{}.weight", self.sites.get(site).module);
        self.files.iter().find(|file| file.contains(&name)).unwrap().tensor(&name).unwrap()
    }
}

/// Rank and scale by the last component of the module, of every adapted site.
fn summary(base: &Base, adapter: &Adapter) -> BTreeMap<String, Vec<(usize, f32)>> {
    let mut summary = BTreeMap::<_, Vec<_>>::new();
    for adapted in &adapter.sites {
        let name = base.sites.get(adapted.site).name().to_owned();
        summary.entry(name).or_default().push((adapted.rank, adapted.scale));
    }
    summary
}

fn golden_adapters(family: &str) -> Vec<(String, PathBuf)> {
    let mut adapters: Vec<_> = std::fs::read_dir(golden(family).join("adapters"))
        .unwrap()
        .map(|entry| entry.unwrap())
        .map(|entry| (entry.file_name().into_string().unwrap(), entry.path()))
        .collect();
    adapters.sort();
    adapters
}

#[test]
fn every_golden_adapter_is_read_with_its_ranks_and_scales() {
    for family in FAMILIES {
        let base = Base::open(family);
        let blocks = base.sites.iter().filter_map(|(_, site)| site.block).max().unwrap() + 1;
        let projections = (base.sites.len() - 2) / blocks;
        let query = if family == "phi3" { "qkv_proj" } else { "q_proj" };
        for (name, folder) in golden_adapters(family) {
            let adapter = base.read(&folder).unwrap_or_else(|error| panic!("{family}/{name}: {error}"));
            assert_eq!(adapter.base_name.as_deref(), Some(format!("golden/{family}").as_str()));
            let found = summary(&base, &adapter);
            let all = |rank: usize, scale: f32| {
                assert!(
                    found.values().flatten().all(|&pair| pair == (rank, scale)),
                    "{family}/{name}: {found:?}"
                );
            };
            match name.as_str() {
                "small-qv" => all(4, 2.0),
                "all-r8" | "dora-r8" => {
                    all(8, 2.0);
                    assert_eq!(found.len(), projections);
                }
                "rslora-r16" => all(16, 3.0),
                "odd-r3-mlp" => all(3, 5.0 / 3.0),
                "last-layer" => {
                    all(5, 2.0);
                    let is_last = |site: usize| base.sites.get(site).block == Some(blocks - 1);
                    assert!(adapter.sites.iter().all(|adapted| is_last(adapted.site)));
                }
                "pattern" => {
                    assert_eq!(found[query], vec![(3, 3.0); blocks]);
                    assert_eq!(found["down_proj"], vec![(12, 0.5); blocks]);
                    assert_eq!(found["o_proj"], vec![(6, 1.0); blocks]);
                }
                "head" => {
                    all(4, 1.0);
                    assert!(found.contains_key("lm_head") && found.contains_key("embed_tokens"));
                }
                "saved-head" => {
                    all(4, 2.0);
                    let saved: Vec<_> = adapter.saved_modules.iter().map(|saved| saved.site).collect();
                    assert_eq!(saved, [base.sites.find("lm_head").unwrap()]);
                }
                other => panic!("an adapter without expectations: {other}"),
            }
            let has_magnitudes = adapter.sites.iter().all(|adapted| adapted.magnitude.is_some());
            assert_eq!(has_magnitudes, name == "dora-r8");
            assert_eq!(adapter.saved_modules.len(), usize::from(name == "saved-head"));
        }
    }
}

#[test]
fn the_tensors_of_a_golden_adapter_are_those_of_its_file() {
    let base = Base::open("llama");
    let folder = golden("llama").join("adapters/head");
    let file = SafetensorsFile::open(&folder.join(WEIGHTS_FILE)).unwrap();
    for adapted in &base.read(&folder).unwrap().sites {
        let site = base.sites.get(adapted.site);
        let (a, b) = match site.kind {
            SiteKind::Linear => ("lora_A.weight", "lora_B.weight"),
            SiteKind::Embedding => ("lora_embedding_A", "lora_embedding_B"),
        };
        for (suffix, tensor) in [(a, &adapted.a), (b, &adapted.b)] {
            let stored = file.tensor(&format!("base_model.model.{}.{suffix}", site.module)).unwrap();
            assert_eq!((stored.shape(), stored.to_f32()), (tensor.shape(), tensor.to_f32()));
        }
    }
}

#[test]
fn every_golden_adapter_belongs_to_its_base_only() {
    for (family, other) in
        [("llama", "qwen2"), ("qwen3", "llama-tied"), ("mistral", "phi3"), ("phi3", "llama")]
    {
        let base = Base::open(other);
        for (name, folder) in golden_adapters(family) {
            let error = base.read(&folder).expect_err(&name).to_string();
            assert!(error.contains("base"), "{family}/{name} on {other}: {error}");
        }
    }
}

#[test]
fn a_golden_adapter_written_again_is_the_same_adapter() {
    for family in FAMILIES {
        let base = Base::open(family);
        for (name, folder) in golden_adapters(family) {
            let adapter = base.read(&folder).unwrap();
            for use_rslora in [false, true] {
                let copy = tempfile::tempdir().unwrap();
                write_adapter(copy.path(), &adapter, &base.sites, WriteOptions { use_rslora }).unwrap();
                assert_same(&base.read(copy.path()).unwrap(), &adapter);
                let config = read_json(&copy.path().join(CONFIG_FILE)).unwrap();
                assert_eq!(config["use_rslora"], use_rslora);
                if name == "pattern" && !use_rslora {
                    assert_eq!(config["r"], 6, "{config}");
                    assert_eq!(config["lora_alpha"], 6, "{config}");
                    assert_eq!(config["rank_pattern"]["down_proj"], 12, "{config}");
                }
            }
        }
    }
}

fn assert_same(read: &Adapter, written: &Adapter) {
    assert_eq!(read.hash, written.hash);
    assert_eq!(read.base_name, written.base_name);
    assert_eq!(
        (read.sites.len(), read.saved_modules.len()),
        (written.sites.len(), written.saved_modules.len())
    );
    for (left, right) in read.sites.iter().zip(&written.sites) {
        assert_eq!((left.site, left.rank, left.scale), (right.site, right.rank, right.scale));
        assert_eq!((&left.bias, &left.magnitude), (&right.bias, &right.magnitude));
        assert_same_tensor(&left.a, &right.a);
        assert_same_tensor(&left.b, &right.b);
    }
    assert_eq!(read.saved_biases, written.saved_biases);
    for (left, right) in read.saved_modules.iter().zip(&written.saved_modules) {
        assert_eq!(left.site, right.site);
        assert_same_tensor(&left.weight, &right.weight);
    }
}

fn assert_same_tensor(left: &Tensor, right: &Tensor) {
    assert_eq!((left.dtype(), left.shape()), (right.dtype(), right.shape()));
    assert_eq!(&left.bytes()[..], &right.bytes()[..]);
}

/// A base whose attention has biases.
fn small_base() -> Base {
    let config = serde_json::json!({
        "model_type": "llama", "hidden_size": 6, "vocab_size": 9, "num_attention_heads": 3, "head_dim": 2,
        "num_key_value_heads": 1, "intermediate_size": 5, "num_hidden_layers": 3,
    });
    let sites = sites_of(&config);
    let with_biases =
        sites.iter().map(|(_, site)| Site { bias: site.module.contains("self_attn"), ..site.clone() });
    Base { sites: SiteTable::new(with_biases.collect()), files: Vec::new() }
}

/// A tensor of small finite values in any dtype.
fn tensor(shape: Vec<usize>, dtype: DType, seed: u64) -> Tensor {
    let value = |i: usize| ((seed.wrapping_mul(31).wrapping_add(i as u64 * 17) % 97) as f32 - 48.0) / 16.0;
    let values = (0..shape.iter().product()).map(value);
    let bytes: Vec<u8> = match dtype {
        DType::F32 => values.flat_map(f32::to_le_bytes).collect(),
        DType::F16 => values.flat_map(|value| half::f16::from_f32(value).to_le_bytes()).collect(),
        DType::BF16 => values.flat_map(|value| half::bf16::from_f32(value).to_le_bytes()).collect(),
    };
    Tensor::new(dtype, shape, Bytes::new(bytes))
}

/// The base's biases replaced where `is_replaced` says so of a site and whether it is adapted.
fn with_biases(mut adapter: Adapter, base: &Base, is_replaced: impl Fn(usize, bool) -> bool) -> Adapter {
    for (id, site) in base.sites.iter().filter(|(_, site)| site.bias) {
        if is_replaced(id, adapter.sites.iter().any(|adapted| adapted.site == id)) {
            let bias = tensor(vec![site.out_features], DType::F32, id as u64 + 5).to_f32();
            adapter.saved_biases.push(SavedBias { site: id, bias });
        }
    }
    adapter.hash = content_hash(&adapter, &base.sites);
    adapter
}

/// What a random adapter does with one site.
#[derive(Clone, Debug)]
enum Choice {
    Leave,
    Adapt { rank: usize, scale: f32, dtype: DType },
    Save(DType),
}

fn choices(count: usize) -> impl Strategy<Value = Vec<Choice>> {
    let dtype = || prop_oneof![Just(DType::F32), Just(DType::F16), Just(DType::BF16)];
    let scale = prop_oneof![
        Just(2.0f32),
        (-40..40i32, 1..17u16).prop_map(|(alpha, rank)| (f64::from(alpha) / f64::from(rank)) as f32 + 0.0),
        (1..64u16, 1..17u16).prop_map(|(alpha, rank)| (f64::from(alpha) / f64::from(rank).sqrt()) as f32),
        1e-6..1e6f32,
    ];
    let adapt = (prop_oneof![Just(4usize), 1..17usize], scale, dtype())
        .prop_map(|(rank, scale, dtype)| Choice::Adapt { rank, scale, dtype });
    let choice = prop_oneof![3 => Just(Choice::Leave), 6 => adapt, 1 => dtype().prop_map(Choice::Save)];
    prop::collection::vec(choice, count)
}

fn build(base: &Base, choices: &[Choice], use_dora: bool, lora_bias: bool) -> Adapter {
    let (mut adapted, mut saved_modules) = (Vec::new(), Vec::new());
    for ((id, site), choice) in base.sites.iter().zip(choices) {
        let is_embedding = site.kind == SiteKind::Embedding;
        let vector = |wanted: bool, seed: u64| {
            wanted.then(|| tensor(vec![site.out_features], DType::F32, id as u64 + seed).to_f32())
        };
        match *choice {
            Choice::Adapt { rank, scale, dtype } if !(is_embedding && (use_dora || lora_bias)) => {
                adapted.push(SiteAdapter {
                    site: id,
                    rank,
                    scale,
                    a: tensor(vec![rank, site.in_features], dtype, id as u64),
                    b: tensor(vec![site.out_features, rank], dtype, id as u64 + 1),
                    bias: vector(lora_bias, 2),
                    magnitude: vector(use_dora, 3),
                });
            }
            Choice::Save(dtype) if site.block.is_none() => {
                let (rows, columns) = if is_embedding {
                    (site.in_features, site.out_features)
                } else {
                    (site.out_features, site.in_features)
                };
                saved_modules.push(SavedModule { site: id, weight: tensor(vec![rows, columns], dtype, 4) });
            }
            _ => {}
        }
    }
    let saved_biases = Vec::new();
    let base_name = Some("a/base".to_owned());
    let adapter = Adapter { hash: String::new(), sites: adapted, saved_modules, saved_biases, base_name };
    Adapter { hash: content_hash(&adapter, &base.sites), ..adapter }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_adapter_survives_writing_and_reading(
        choices in choices(small_base().sites.len()),
        vectors in 0..3u8,
        use_rslora in any::<bool>(),
        biases in 0..4u8,
    ) {
        let base = small_base();
        let adapter = build(&base, &choices, vectors == 1, vectors == 2);
        let adapter = with_biases(adapter, &base, |id, is_adapted| match biases {
            0 => false,
            1 => true,
            2 => is_adapted,
            _ => id % 3 == 1,
        });
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("new/adapter");
        let written = write_adapter(&target, &adapter, &base.sites, WriteOptions { use_rslora });
        if adapter.sites.is_empty() && adapter.saved_modules.is_empty() {
            prop_assert!(written.is_err());
        } else {
            written.unwrap();
            assert_same(&base.read(&target).unwrap(), &adapter);
        }
    }
}

/// An adapter of rank 4 at every linear layer of every block.
fn plain_adapter(base: &Base) -> Adapter {
    let choice = |site: &Site| match site.block {
        Some(_) => Choice::Adapt { rank: 4, scale: 2.0, dtype: DType::F32 },
        None => Choice::Leave,
    };
    let choices: Vec<Choice> = base.sites.iter().map(|(_, site)| choice(site)).collect();
    build(base, &choices, false, false)
}

#[test]
fn the_field_bias_says_which_biases_a_folder_holds() {
    let base = small_base();
    for (is_replaced, field, suffix) in [
        ((|_, _| false) as fn(usize, bool) -> bool, "none", None),
        (|_, _| true, "all", Some("bias")),
        (|_, is_adapted| is_adapted, "lora_only", None),
        (|id, _| id == 1, "none", None),
    ] {
        let mut adapter = plain_adapter(&base);
        adapter.sites.retain(|adapted| base.sites.get(adapted.site).name() == "q_proj");
        let adapter = with_biases(adapter, &base, is_replaced);
        let folder = tempfile::tempdir().unwrap();
        write_adapter(folder.path(), &adapter, &base.sites, WriteOptions::default()).unwrap();
        assert_eq!(read_json(&folder.path().join(CONFIG_FILE)).unwrap()["bias"], field);
        let file = SafetensorsFile::open(&folder.path().join(WEIGHTS_FILE)).unwrap();
        let of_key = file.names().find(|name| name.contains("k_proj"));
        let key = "base_model.model.model.layers.0.self_attn.k_proj";
        assert_eq!(of_key.map(str::to_owned), suffix.map(|suffix| format!("{key}.{suffix}")));
        for saved in &adapter.saved_biases {
            let module = &base.sites.get(saved.site).module;
            let suffix = if module.ends_with("q_proj") { "base_layer.bias" } else { "bias" };
            assert!(file.contains(&format!("base_model.model.{module}.{suffix}")), "{field}: {module}");
        }
        assert_same(&base.read(folder.path()).unwrap(), &adapter);
    }
}

#[test]
fn writing_over_another_adapter_is_refused_and_over_the_same_is_not() {
    let base = small_base();
    let folder = tempfile::tempdir().unwrap();
    let write =
        |adapter: &Adapter| write_adapter(folder.path(), adapter, &base.sites, WriteOptions::default());
    let mut adapter = plain_adapter(&base);
    write(&adapter).unwrap();

    adapter.sites[0].a = tensor(adapter.sites[0].a.shape().to_vec(), DType::F32, 99);
    adapter.hash = content_hash(&adapter, &base.sites);
    write(&adapter).unwrap();
    assert_same(&base.read(folder.path()).unwrap(), &adapter);

    let mut other = adapter.clone();
    other.sites[0].scale = 1.0;
    let error = write(&other).unwrap_err().to_string();
    assert!(error.contains("holds a different adapter"), "{error}");
    assert_same(&base.read(folder.path()).unwrap(), &adapter);
}

#[test]
fn a_folder_left_by_a_crash_is_no_adapter_and_can_be_written_again() {
    let base = small_base();
    let folder = tempfile::tempdir().unwrap();
    let adapter = plain_adapter(&base);
    write_adapter(folder.path(), &adapter, &base.sites, WriteOptions::default()).unwrap();
    std::fs::remove_file(folder.path().join(CONFIG_FILE)).unwrap();
    assert!(base.read(folder.path()).unwrap_err().to_string().contains("no adapter_config.json"));
    write_adapter(folder.path(), &adapter, &base.sites, WriteOptions::default()).unwrap();
    assert_same(&base.read(folder.path()).unwrap(), &adapter);
}

#[test]
fn an_adapter_that_peft_could_not_read_back_is_not_written() {
    let base = small_base();
    type Damage = fn(&mut Adapter);
    let damages: [(Damage, &str); 11] = [
        (
            |a| a.sites[1].a = Tensor::from_f32(vec![4, 6], &[f32::NAN; 24]),
            "element 0 of lora_A.weight is NaN",
        ),
        (|a| a.sites[1].a = Tensor::from_f32(vec![3, 6], &[0.0; 18]), "shape [3, 6]"),
        (|a| a.sites[1].scale = f32::INFINITY, "scale is inf"),
        (|a| a.sites[1].magnitude = Some(vec![1.0; 2]), "has no DoRA magnitude"),
        (|a| a.sites[1].bias = Some(vec![1.0; 2]), "has no bias"),
        (|a| a.sites.swap(0, 1), "ascending order"),
        (|a| a.sites[1] = a.sites[0].clone(), "once each"),
        (|a| a.sites[1].site = 999, "site 999"),
        (
            |a| {
                a.saved_modules =
                    vec![SavedModule { site: 1, weight: Tensor::from_f32(vec![6, 6], &[0.0; 36]) }]
            },
            "only lm_head and embed_tokens",
        ),
        (|a| a.saved_biases = vec![SavedBias { site: 5, bias: vec![0.0; 5] }], "no bias there to replace"),
        (|a| a.saved_biases = vec![SavedBias { site: 1, bias: vec![0.0; 5] }], "bias has shape [5], not [6]"),
    ];
    for (damage, wanted) in damages {
        let mut adapter = plain_adapter(&base);
        damage(&mut adapter);
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("adapter");
        let error = write_adapter(&target, &adapter, &base.sites, WriteOptions::default()).unwrap_err();
        assert!(error.to_string().contains(wanted), "{wanted:?} is not in: {error}");
        assert!(!target.exists(), "{wanted}: something was written");
    }
}

#[test]
fn the_example_adapters_are_read_for_the_example_base() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples");
    let sites = sites_of(&read_json(&folder.join("base/config.json")).unwrap());
    let base =
        Base { sites, files: vec![SafetensorsFile::open(&folder.join("base/model.safetensors")).unwrap()] };
    let mut hashes = std::collections::BTreeSet::new();
    for entry in std::fs::read_dir(folder.join("adapters")).unwrap() {
        let path = entry.unwrap().path();
        let adapter = base.read(&path).unwrap();
        assert!(!adapter.sites.is_empty());
        assert!(hashes.insert(adapter.hash), "{} has another's content", path.display());
    }
    assert!(hashes.len() > 1);
}
