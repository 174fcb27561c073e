//! Random configurations and tensors: no panic, and what is accepted is sound.

use proptest::prelude::*;
use serde_json::Value;

use super::super::config::FIELDS;
use super::*;

/// JSON values of every type, with those that fields expect among them.
fn any_value() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        (-3..20i64).prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        "(q_proj|v_proj|lm_head|all-linear|layers|none|LORA|[.*()^$?a-z0-9]{0,6})".prop_map(Value::from),
    ];
    leaf.prop_recursive(2, 6, 3, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..3).prop_map(Value::from),
            prop::collection::hash_map("(q_proj|up_proj|[.*(a-z]{0,4})", inner, 0..3)
                .prop_map(|map| Value::Object(map.into_iter().collect())),
        ]
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_configuration_panics_and_an_accepted_one_stays_within_the_limits(
        changes in prop::collection::vec((prop::sample::select(FIELDS), any_value()), 1..4),
    ) {
        let mut config = Folder::new().config;
        for ((field, _), value) in &changes {
            config[*field] = value.clone();
        }
        let sites = base_sites();
        let plan = Config::from_json(Path::new("c"), &config).and_then(|config| config.plan(&sites, LIMITS));
        if let Ok(plan) = plan {
            prop_assert!(!plan.adapted.is_empty() || !plan.saved.is_empty());
            for site in &plan.adapted {
                prop_assert!((1..=LIMITS.max_rank).contains(&site.rank) && site.scale.is_finite());
                prop_assert!(!plan.saved.contains(&site.site));
            }
        }
    }
}

/// One tensor's name, shape or content replaced.
fn any_tensor() -> impl Strategy<Value = (usize, String, Tensor)> {
    let suffix = prop::sample::select(&[
        "lora_A.weight",
        "lora_B.weight",
        "lora_A.x.weight",
        "lora_B.bias",
        "bias",
        "lora_embedding_A",
        "weight",
        "lora_magnitude_vector",
        "base_layer.weight",
        "modules_to_save.weight",
        "",
        "lora_A",
        "weight.weight",
    ]);
    let module = prop::sample::select(&[Q0, V1, EMBED, "lm_head", "model.norm", "model", ""]);
    let tensor = (prop::collection::vec(0..13usize, 0..4), any::<bool>())
        .prop_map(|(shape, finite)| values(&shape, if finite { 1.0 } else { f32::NAN }));
    let fitting =
        prop::sample::select(&[[4usize, 8], [8, 4], [4, 4], [10, 8]]).prop_map(|shape| values(&shape, 1.0));
    (
        0..8usize,
        (module, suffix).prop_map(|(module, suffix)| key(module, suffix)),
        prop_oneof![tensor, fitting],
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_set_of_tensors_panics_and_an_accepted_one_fits_the_base(
        changes in prop::collection::vec(any_tensor(), 1..3),
    ) {
        let mut folder = Folder::new();
        for (at, name, tensor) in changes {
            folder.tensors.retain(|(other, _)| *other != name);
            let at = at % folder.tensors.len();
            folder.tensors[at] = (name, tensor);
        }
        if let Ok(adapter) = folder.read() {
            let sites = base_sites();
            for adapted in &adapter.sites {
                let site = sites.get(adapted.site);
                prop_assert_eq!(adapted.a.shape(), &[adapted.rank, site.in_features]);
                prop_assert_eq!(adapted.b.shape(), &[site.out_features, adapted.rank]);
                prop_assert!(adapted.a.to_f32().iter().chain(&adapted.b.to_f32()).all(|value| value.is_finite()));
            }
        }
    }
}
