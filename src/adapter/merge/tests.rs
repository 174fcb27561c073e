//! Merging against PEFT's results (see scripts/reference/merge_cases.py) and against the formulas.

use std::path::{Path, PathBuf};

use serde_json::Value;

use super::tensors::delta;
use super::*;
use crate::adapter::{SavedBias, SavedModule, Site, SiteKind};
use crate::format::read_json;
use crate::format::safetensors::SafetensorsFile;

const HIDDEN: usize = 6;
const INNER: usize = 9;
const VOCABULARY: usize = 8;

fn sites() -> SiteTable {
    let site = |module: &str, block, kind, in_features| Site {
        module: module.to_owned(),
        block,
        kind,
        in_features,
        out_features: HIDDEN,
        bias: false,
    };
    SiteTable::new(vec![
        site("model.embed_tokens", None, SiteKind::Embedding, VOCABULARY),
        site("model.layers.0.self_attn.q_proj", Some(0), SiteKind::Linear, HIDDEN),
        site("model.layers.0.mlp.down_proj", Some(0), SiteKind::Linear, INNER),
    ])
}

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/merge").join(name)
}

fn load(name: &str, scales: &Value, file: &SafetensorsFile) -> Adapter {
    let sites = sites();
    let adapted = sites.iter().filter_map(|(site, Site { module, .. })| {
        let scale = scales[name].get(module)?.as_f64().unwrap() as f32;
        let tensor = |which: &str| file.tensor(&format!("{name}.{module}.{which}")).unwrap();
        let (a, b) = (tensor("A"), tensor("B"));
        Some(SiteAdapter { site, rank: a.shape()[0], scale, a, b, bias: None, magnitude: None })
    });
    Adapter { sites: adapted.collect(), base_name: Some("a/base".to_owned()), ..Adapter::default() }
}

/// The adapters of the golden file by name.
fn adapters() -> Vec<(String, Adapter)> {
    let cases = read_json(&golden("cases.json")).unwrap();
    let file = SafetensorsFile::open(&golden("cases.safetensors")).unwrap();
    let names = cases["scales"].as_object().unwrap().keys();
    names.map(|name| (name.clone(), load(name, &cases["scales"], &file))).collect()
}

fn parts<'a>(adapters: &'a [(String, Adapter)], weights: &[(&str, f64)]) -> Vec<Part<'a>> {
    let part = |&(name, weight): &(&str, f64)| {
        let (name, adapter) = adapters.iter().find(|(other, _)| other == name).unwrap();
        Part { name, adapter, weight }
    };
    weights.iter().map(part).collect()
}

fn largest_difference(one: &[f32], other: &[f32]) -> f32 {
    assert_eq!(one.len(), other.len());
    one.iter().zip(other).map(|(one, other)| (one - other).abs()).fold(0.0, f32::max)
}

#[test]
fn every_method_gives_what_peft_gives() {
    let adapters = adapters();
    let file = SafetensorsFile::open(&golden("cases.safetensors")).unwrap();
    let cases = read_json(&golden("cases.json")).unwrap();
    let mut methods = Vec::new();
    for (name, case) in cases["cases"].as_object().unwrap() {
        let method: Method = case["method"].as_str().unwrap().parse().unwrap();
        let weights = case["weights"].as_object().unwrap().iter();
        let weights: Vec<(&str, f64)> =
            weights.map(|(name, weight)| (name.as_str(), weight.as_f64().unwrap())).collect();
        let options = MergeOptions {
            rank: case["rank"].as_u64().map(|rank| rank as usize),
            density: case["density"].as_f64(),
            ..MergeOptions::new(method)
        };
        let merged = merge_adapters(&parts(&adapters, &weights), &sites(), &options).unwrap();
        assert_eq!(merged.sites.len(), 3, "{name}");
        for adapted in &merged.sites {
            let module = sites().get(adapted.site).module.clone();
            let wanted = file.tensor(&format!("{name}.{module}")).unwrap();
            let off = largest_difference(&delta(adapted), &wanted.to_f32());
            println!("{name} {module}: off by {off}");
            assert!(off < 2e-5, "{name} {module}: off by {off}");
            assert_eq!((adapted.scale, adapted.a.shape()[0]), (1.0, adapted.rank), "{name} {module}");
        }
        assert_eq!(merged.hash, content_hash(&merged, &sites()));
        assert_eq!(merged.base_name.as_deref(), Some("a/base"));
        methods.push(method);
    }
    for method in Method::ALL {
        assert!(methods.contains(&method), "no case of {method}");
    }
}

#[test]
fn a_chosen_rank_is_that_of_every_site_but_no_more_than_is_needed() {
    let adapters = adapters();
    let ranks = |rank, weights: &[(&str, f64)]| {
        let options = MergeOptions { rank, ..MergeOptions::new(Method::Svd) };
        let merged = merge_adapters(&parts(&adapters, weights), &sites(), &options).unwrap();
        merged.sites.iter().map(|adapted| adapted.rank).collect::<Vec<_>>()
    };
    assert_eq!(ranks(Some(2), &[("a", 1.0), ("wide", 1.0)]), [2, 2, 2]);
    assert_eq!(ranks(None, &[("a", 1.0), ("wide", 1.0)]), [5, 5, 5]);
    assert_eq!(ranks(Some(99), &[("a", 1.0), ("b", 1.0)]), [6, 6, 3]);
    assert_eq!(ranks(Some(1), &[("a", 1.0)]), [1, 1, 1], "one adapter's rank is lowered");
}

#[test]
fn dropping_is_seeded_and_its_mean_is_the_whole() {
    let adapters = adapters();
    let parts = parts(&adapters, &[("a", 0.7), ("b", 0.5), ("c", 1.0)]);
    let merge = |method, density, seed| {
        let options = MergeOptions { density: Some(density), seed, ..MergeOptions::new(method) };
        let merged = merge_adapters(&parts, &sites(), &options).unwrap();
        merged.sites.iter().flat_map(delta).collect::<Vec<f32>>()
    };
    for (method, whole) in [(Method::DareLinear, Method::Linear), (Method::DareLinearSvd, Method::Svd)] {
        let full_rank = |options: MergeOptions| MergeOptions {
            rank: options.method.decomposes().then_some(VOCABULARY),
            ..options
        };
        let dropped = |seed| {
            let options = MergeOptions { density: Some(0.5), seed, ..MergeOptions::new(method) };
            let merged = merge_adapters(&parts, &sites(), &full_rank(options)).unwrap();
            merged.sites.iter().flat_map(delta).collect::<Vec<f32>>()
        };
        assert_eq!(dropped(3), dropped(3));
        assert_ne!(dropped(3), dropped(4));
        let wanted = merge_adapters(&parts, &sites(), &full_rank(MergeOptions::new(whole))).unwrap();
        let wanted: Vec<f32> = wanted.sites.iter().flat_map(delta).collect();
        const DRAWS: u64 = 500;
        let mut mean = vec![0.0; wanted.len()];
        for seed in 0..DRAWS {
            mean.iter_mut().zip(dropped(seed)).for_each(|(mean, value)| *mean += f64::from(value));
        }
        let mean: Vec<f32> = mean.into_iter().map(|sum| (sum / DRAWS as f64) as f32).collect();
        let scale = wanted.iter().map(|value| value.abs()).fold(0.0, f32::max);
        let off = largest_difference(&mean, &wanted);
        assert!(off < 0.2 * scale, "{method}: the mean is off by {off} of {scale}");
    }
    let apart = largest_difference(&merge(Method::DareLinear, 0.5, 0), &merge(Method::DareLinear, 1.0, 0));
    assert!(apart > 0.1, "half of the elements are gone");
    // A and B, adapters and sites are drawn from streams of their own.
    let options = MergeOptions { density: Some(0.5), ..MergeOptions::new(Method::DareLinear) };
    let alone = |part: usize| {
        let merged = merge_adapters(&parts[part..=part], &sites(), &options).unwrap();
        let zeros = |tensor: &Tensor| tensor.to_f32().iter().map(|&value| value == 0.0).collect::<Vec<_>>();
        merged.sites.iter().flat_map(|adapted| [zeros(&adapted.a), zeros(&adapted.b)]).collect::<Vec<_>>()
    };
    let masks = alone(0);
    assert!((1..masks.len()).all(|index| masks[index][..16] != masks[0][..16]), "{masks:?}");
}

#[test]
fn biases_of_adapters_are_summed_and_a_site_without_one_has_zeros() {
    let mut adapters = adapters();
    let scale = adapters[0].1.sites[1].scale;
    adapters[0].1.sites[1].bias = Some(vec![1.0; HIDDEN]);
    adapters[2].1.sites[0].bias = Some(vec![2.0; HIDDEN]);
    let parts = parts(&adapters, &[("a", 0.5), ("c", 3.0)]);
    let merged = merge_adapters(&parts, &sites(), &MergeOptions::new(Method::Cat)).unwrap();
    let biases: Vec<_> = merged.sites.iter().map(|adapted| adapted.bias.clone().unwrap()[0]).collect();
    assert_eq!(biases, [0.0, 0.5 * scale + 3.0 * -2.0, 0.0]);
}

#[test]
fn what_cannot_be_merged_is_refused_by_name() {
    let adapters = adapters();
    let weights = [("a", 1.0), ("wide", 1.0)];
    let refusal = |adapters: &[(String, Adapter)], options: &MergeOptions| {
        merge_adapters(&parts(adapters, &weights), &sites(), options).unwrap_err().to_string()
    };
    let cat = MergeOptions::new(Method::Cat);
    let error = refusal(&adapters, &MergeOptions::new(Method::Ties));
    assert!(
        error.contains("`model.embed_tokens`: rank 3 in `a`, 5 in `wide`, but ties wants one"),
        "{error}"
    );

    type Damage = fn(&mut Adapter);
    let damages: [(Damage, &str); 3] = [
        (|a| a.sites[1].magnitude = Some(vec![1.0; HIDDEN]), "q_proj`: has a DoRA magnitude"),
        (
            |a| a.saved_modules = vec![SavedModule { site: 0, weight: Tensor::from_f32(vec![0], &[]) }],
            "embed_tokens`: is replaced whole",
        ),
        (|a| a.saved_biases = vec![SavedBias { site: 2, bias: vec![] }], "down_proj`: has its bias replaced"),
    ];
    for (damage, wanted) in damages {
        let mut adapters = adapters.clone();
        damage(&mut adapters[3].1);
        let error = refusal(&adapters, &cat);
        assert!(error.contains("adapter `wide`") && error.contains(wanted), "{error}");
    }
    for (options, wanted) in [
        (MergeOptions { rank: Some(4), ..cat }, "`rank` is 4; wanted none with the method cat"),
        (
            MergeOptions { rank: Some(0), ..MergeOptions::new(Method::TiesSvd) },
            "`rank` is 0; wanted at least 1",
        ),
        (
            MergeOptions { density: Some(0.5), ..MergeOptions::new(Method::Svd) },
            "`density` is 0.5; wanted none",
        ),
        (
            MergeOptions { density: Some(0.0), ..MergeOptions::new(Method::Ties) },
            "`density` is 0; wanted more",
        ),
        (MergeOptions { density: Some(1.5), ..MergeOptions::new(Method::Ties) }, "at most 1"),
        (MergeOptions { density: Some(f64::NAN), ..MergeOptions::new(Method::Ties) }, "`density` is NaN"),
    ] {
        let error = refusal(&adapters, &options);
        assert!(error.contains(wanted), "{error}");
    }
    assert_eq!(merge_adapters(&[], &sites(), &cat).unwrap_err(), MergeError::Nothing);
    let error = merge_adapters(&parts(&adapters, &[("a", f64::INFINITY)]), &sites(), &cat).unwrap_err();
    assert!(error.to_string().contains("a=inf"), "{error}");
}
