//! What the product promises, one test per promise. Promise 1 (the base is frozen) is held in `golden.rs`, promise 7
//! (decoding allocates nothing) in `steady_state.rs`.

mod common;

use std::cell::Cell;
use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::Case;
use common::traffic::{self, Batch, CONTEXT, Room, Traffic};
use loramux::adapter::peft::{
    AdapterError, CONFIG_FILE, Limits, WEIGHTS_FILE, read_adapter, validate_adapter_name,
};
use loramux::engine::request::Request;
use loramux::engine::{Engine, EngineError, EngineOptions};
use loramux::format::read_json;
use loramux::model::chat_template::{ChatOptions, ChatTemplate, ChatTemplateError};
use loramux::model::{Base, BaseError};
use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};
use serde_json::{Value, json};

/// Runs `test` on `cases` batches. The same batches every time, so that a failure is one tomorrow too;
/// `PROPTEST_CASES` asks for more.
fn on_batches(cases: u32, traffic: &Traffic, test: impl Fn(Batch) -> Result<(), TestCaseError>) {
    let wanted = std::env::var("PROPTEST_CASES").ok().and_then(|text| text.parse().ok());
    let config = Config { cases: wanted.unwrap_or(cases), failure_persistence: None, ..Config::default() };
    let mut runner = TestRunner::new_with_rng(config, TestRng::deterministic_rng(RngAlgorithm::ChaCha));
    runner.run(&traffic.batches(), test).unwrap();
}

#[test]
fn promise_2_rows_computed_are_tokens_given() {
    let traffic = Traffic::open("qwen3");
    let engine = traffic.engine(Room { sequences: 5, rows: 16, pages: 64 });
    on_batches(40, &traffic, |batch| {
        let before = engine.stats().rows();
        let mut wanted = 0;
        for completion in traffic::run(&engine, &batch) {
            let prompt = completion.prompt_token_ids.len();
            // The last token of a choice is never fed back.
            wanted += completion.choices.iter().map(|c| prompt + c.token_ids.len() - 1).sum::<usize>();
        }
        prop_assert_eq!(engine.stats().rows() - before, wanted as u64);
        Ok(())
    });
}

/// A request gets the same bits with the engine to itself and among any neighbours, in steps of any size, with pages
/// so few that sequences are thrown out and computed again.
fn bit_equal_alone_or_among_others(family: &str) {
    let traffic = Traffic::open(family);
    let alone = traffic.engine(Room { sequences: 1, rows: 512, pages: 64 });
    let crowded: Vec<Engine> = [(8, 1, 64), (2, 3, 64), (5, 7, 8), (16, 64, 64), (16, 64, CONTEXT / 16)]
        .into_iter()
        .map(|(sequences, rows, pages)| traffic.engine(Room { sequences, rows, pages }))
        .collect();
    let next = Cell::new(0);
    on_batches(120, &traffic, |batch| {
        let engine = &crowded[next.get() % crowded.len()];
        next.set(next.get() + 1);
        let together = traffic::run(engine, &batch);
        for (arrival, together) in batch.iter().zip(together) {
            let solo = alone.submit(arrival.request.clone()).unwrap().wait().unwrap();
            prop_assert_eq!(traffic::bits(&solo), traffic::bits(&together), "{:?}", engine.options());
        }
        Ok(())
    });
}

#[test]
fn promise_3_a_request_gives_bit_equal_output_alone_or_among_others_llama() {
    bit_equal_alone_or_among_others("llama");
}

#[test]
fn promise_3_a_request_gives_bit_equal_output_alone_or_among_others_mistral() {
    bit_equal_alone_or_among_others("mistral");
}

#[test]
fn promise_3_a_request_gives_bit_equal_output_alone_or_among_others_phi3() {
    bit_equal_alone_or_among_others("phi3");
}

#[test]
fn promise_3_a_request_gives_bit_equal_output_alone_or_among_others_qwen3() {
    bit_equal_alone_or_among_others("qwen3");
}

#[test]
fn promise_3_holds_when_sequences_are_preempted() {
    let traffic = Traffic::open("mistral");
    let roomy = traffic.engine(Room { sequences: 8, rows: 64, pages: 128 });
    let tight = traffic.engine(Room { sequences: 8, rows: 64, pages: CONTEXT / 16 });
    // Eight sequences of up to 5 pages each for a cache of 6 pages.
    let requests: Vec<Request> = (0..8)
        .map(|index| {
            let mut request = Request::new((0..40).map(|token| 3 + (token * 7 + index * 31) % 500).collect());
            request.sampling.seed = Some(index.into());
            request.stop.max_tokens = Some(30);
            request.stop.ignore_eos = true;
            request.logprobs = Some(2);
            request.prompt_logprobs = Some(1);
            let name = &traffic.adapters[index as usize % traffic.adapters.len()];
            request.adapters = vec![(name.clone(), 1.0)];
            request
        })
        .collect();
    let answers = |engine: &Engine| -> Vec<_> {
        let streams: Vec<_> =
            requests.iter().map(|request| engine.submit(request.clone()).unwrap()).collect();
        streams.into_iter().map(|stream| traffic::bits(&stream.wait().unwrap())).collect()
    };
    assert_eq!(answers(&roomy), answers(&tight));
    let needed = 8 * (40 + 30 - 1);
    assert_eq!(roomy.stats().rows(), needed, "nothing is computed twice where there is room");
    assert!(tight.stats().rows() > needed, "the tight cache threw nobody out: the test does not test");
}

#[test]
fn promise_5_bad_adapters_and_requests_fail_by_themselves() {
    let traffic = Traffic::open("llama");
    let room = Room { sequences: 6, rows: 16, pages: 24 };
    let (quiet, disturbed) = (traffic.engine(room), traffic.engine(room));
    let broken = broken_adapters(&traffic.case);
    let passed = Cell::new(0);
    on_batches(20, &traffic, |batch| {
        // A failed case leaves its adapter behind; the next one must not fail because of that.
        let visitor = format!("visitor-{}", passed.replace(passed.get() + 1));
        let wanted: Vec<_> = traffic::run(&quiet, &batch).iter().map(traffic::bits).collect();
        let streams: Vec<_> =
            batch.iter().map(|arrival| disturbed.submit(arrival.request.clone()).unwrap()).collect();
        for (name, folder, complaint) in &broken {
            let message = disturbed.load_adapter(name, folder.path()).unwrap_err().to_string();
            prop_assert!(message.contains(complaint), "{}: {}", name, message);
            prop_assert!(!disturbed.has_adapter(name));
        }
        disturbed.load_adapter(&visitor, &traffic.case.adapter_folder("all-r8")).unwrap();
        for (request, complaint) in bad_requests(&visitor) {
            let failure = disturbed.submit(request).and_then(|stream| stream.wait()).unwrap_err();
            prop_assert!(failure.to_string().contains(complaint), "{}", failure);
        }
        // The adapter leaves while two requests use it, one of which nobody waits for.
        let mut passing = Request::new(vec![5; 20]);
        passing.adapters = vec![(visitor.clone(), 1.0)];
        drop(disturbed.submit(passing.clone()).unwrap());
        let passing = disturbed.submit(passing).unwrap();
        disturbed.unload_adapter(&visitor).unwrap();
        prop_assert!(passing.wait().is_ok());
        for (stream, wanted) in streams.into_iter().zip(wanted) {
            prop_assert_eq!(traffic::bits(&stream.wait().unwrap()), wanted);
        }
        Ok(())
    });
}

/// Requests that cannot run beside an adapter that is `resident`, each with a part of the message it gets.
fn bad_requests(resident: &str) -> Vec<(Request, &'static str)> {
    let with = |change: &dyn Fn(&mut Request)| {
        let mut request = Request::new(vec![3, 4, 5]);
        change(&mut request);
        request
    };
    vec![
        (with(&|r| r.prompt.clear()), "prompt"),
        (with(&|r| r.prompt = vec![9; CONTEXT]), "prompt"),
        (with(&|r| r.prompt = vec![512]), "512"),
        (with(&|r| r.sampling.temperature = f32::NAN), "temperature"),
        (with(&|r| r.adapters = vec![("nobody".to_owned(), 1.0)]), "nobody"),
        (with(&|r| r.adapters = vec![(resident.to_owned(), f32::INFINITY)]), "wanted a finite"),
        // This one fails in a step that it shares with others: token 3 stands in the prompt, its logit doubles.
        (
            with(&|r| {
                r.sampling.logit_bias = vec![(3, f32::MAX)];
                r.sampling.repetition_penalty = 0.5;
            }),
            "the logit of token 3 is inf",
        ),
    ]
}

/// Adapter folders that must not load, each with a name and a part of the message.
fn broken_adapters(case: &Case) -> Vec<(&'static str, tempfile::TempDir, &'static str)> {
    let source = case.adapter_folder("all-r8");
    let cut = copy_of(&source);
    let weights = cut.path().join(WEIGHTS_FILE);
    let bytes = std::fs::read(&weights).unwrap();
    std::fs::write(&weights, &bytes[..bytes.len() - 3]).unwrap();
    let empty = tempfile::tempdir().unwrap();
    let foreign = copy_of(&Case::open("qwen3").adapter_folder("all-r8"));
    vec![
        ("cut", cut, WEIGHTS_FILE),
        ("empty", empty, CONFIG_FILE),
        ("unknown-field", with_field(&source, "lora_alhpa", &json!(3)), "lora_alhpa"),
        ("foreign", foreign, "q_proj"),
    ]
}

fn copy_of(folder: &Path) -> tempfile::TempDir {
    let copy = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, copy.path().join(path.file_name().unwrap())).unwrap();
    }
    copy
}

/// A copy of an adapter folder with one field of its configuration set.
fn with_field(folder: &Path, field: &str, value: &Value) -> tempfile::TempDir {
    let copy = copy_of(folder);
    let path = copy.path().join(CONFIG_FILE);
    let mut config = read_json(&path).unwrap();
    config[field] = value.clone();
    std::fs::write(&path, config.to_string()).unwrap();
    copy
}

/// What setting a field of `adapter_config.json` must do.
enum Effect {
    /// The adapter is another one, or does not fit its tensors any more.
    Applied,
    /// Refused with a message that names the field.
    Refused,
    /// The same adapter: the field is about training, origin or storage.
    None,
}

/// Every field that PEFT 0.21 writes, with a value that sets it.
fn peft_fields() -> Vec<(&'static str, Value, Effect)> {
    use Effect::{Applied, None, Refused};
    vec![
        ("alora_invocation_tokens", json!([5]), Refused),
        ("alpha_pattern", json!({"q_proj": 3}), Applied),
        ("arrow_config", json!({"top_k": 2}), Refused),
        ("auto_mapping", json!({"base_model_class": "x"}), None),
        ("base_model_name_or_path", json!("another/name"), Applied),
        ("bias", json!("some"), Refused),
        ("corda_config", json!({"corda_method": "kpm"}), None),
        ("ensure_weight_tying", json!(true), Refused),
        ("eva_config", json!({"rho": 2.0}), None),
        ("exclude_modules", json!(["q_proj"]), Applied),
        ("fan_in_fan_out", json!(true), None),
        ("inference_mode", json!(false), None),
        ("init_lora_weights", json!("pissa"), Refused),
        ("kasa_config", json!({"beta": 1}), Refused),
        ("layer_replication", json!([[0, 2], [1, 2]]), Refused),
        ("layers_pattern", json!("layers"), Applied),
        ("layers_to_transform", json!([0]), Applied),
        ("loftq_config", json!({"loftq_bits": 4}), None),
        ("lora_alpha", json!(17), Applied),
        ("lora_bias", json!(true), Applied),
        ("lora_dropout", json!(0.1), None),
        ("lora_ga_config", json!({"direction": "x"}), None),
        ("megatron_config", json!({"x": 1}), Refused),
        ("megatron_core", json!("elsewhere"), None),
        ("modules_to_save", json!(["lm_head"]), Applied),
        ("monteclora_config", json!({"x": 1}), Refused),
        ("peft_type", json!("LOHA"), Refused),
        ("peft_version", json!("0.1.0"), None),
        ("qalora_group_size", json!(32), None),
        ("r", json!(4), Applied),
        ("rank_pattern", json!({"q_proj": 4}), Applied),
        ("revision", json!("main"), None),
        ("target_modules", json!(["q_proj"]), Applied),
        ("target_parameters", json!(["mlp.experts"]), Refused),
        ("task_type", json!("SEQ_CLS"), None),
        ("trainable_token_indices", json!([3]), Refused),
        ("use_bdlora", json!({"x": 1}), Refused),
        ("use_dora", json!(true), Applied),
        ("use_qalora", json!(true), Refused),
        ("use_rslora", json!(true), Applied),
        ("velora_config", json!({"x": 1}), Refused),
    ]
}

#[test]
fn promise_6_every_peft_field_is_applied_or_refused() {
    let case = Case::open("llama");
    let base = Base::open(&case.model()).unwrap();
    let source = case.adapter_folder("all-r8");
    let read = |folder: &Path| {
        let limits = Limits { max_rank: 64 };
        read_adapter(folder, &base.checkpoint.sites().table, &base.checkpoint, limits)
            .map(|adapter| (adapter.hash, adapter.base_name))
    };
    let unchanged = read(&source).unwrap();
    let fields = peft_fields();
    let known: BTreeSet<&str> = fields.iter().map(|(field, ..)| *field).collect();
    let written = read_json(&source.join(CONFIG_FILE)).unwrap();
    let written: BTreeSet<&str> = written.as_object().unwrap().keys().map(String::as_str).collect();
    assert_eq!(known, written, "the table above against what PEFT wrote");

    for (field, value, effect) in fields {
        let folder = with_field(&source, field, &value);
        let result = read(folder.path());
        match effect {
            Effect::None => assert_eq!(result.unwrap(), unchanged, "{field}"),
            Effect::Applied => assert!(result.map_or(true, |read| read != unchanged), "{field} is ignored"),
            Effect::Refused => {
                let message = result.map(|_| ()).unwrap_err().to_string();
                assert!(message.contains(&format!("`{field}`")), "{field}: {message}");
                assert!(message.contains(CONFIG_FILE), "{field}: {message}");
            }
        }
    }
    let unknown = read(with_field(&source, "lora_gamma", &json!(0.5)).path());
    let Err(AdapterError::Field { field, .. }) = unknown else { panic!("taken: {unknown:?}") };
    assert_eq!(field, "lora_gamma");
}

#[test]
fn promise_8_no_pickle_is_loaded() {
    let case = Case::open("llama");
    let base = Arc::new(Base::open(&case.model()).unwrap());
    let engine = Engine::start(base, EngineOptions::default()).unwrap();
    for name in ["adapter_model.bin", "adapter_model.pt"] {
        let folder = copy_of(&case.adapter_folder("small-qv"));
        std::fs::rename(folder.path().join(WEIGHTS_FILE), folder.path().join(name)).unwrap();
        let message = engine.load_adapter("a", folder.path()).unwrap_err().to_string();
        assert!(message.contains(name) && message.contains("convert to safetensors"), "{message}");
    }
    // A pickle under the name of a safetensors file: the protocol byte is no header length.
    let folder = copy_of(&case.adapter_folder("small-qv"));
    std::fs::write(folder.path().join(WEIGHTS_FILE), b"\x80\x02cos\nsystem\nq\x00X\x02\x00\x00\x00lsq\x01")
        .unwrap();
    let refused = engine.load_adapter("a", folder.path());
    assert!(matches!(refused, Err(EngineError::Adapter(_))), "{refused:?}");

    for name in ["pytorch_model.bin", "model.pt"] {
        let folder = copy_of(&case.model());
        std::fs::rename(folder.path().join("model.safetensors"), folder.path().join(name)).unwrap();
        let message = Base::open(folder.path()).map(|_| ()).unwrap_err().to_string();
        assert!(message.contains("safetensors"), "{message}");
    }
}

#[test]
fn promise_8_a_chat_template_ends_within_its_fuel() {
    let loops = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}";
    let doubling = "{% set ns = namespace(s='x') %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}{{ ns.s }}";
    let recursion = "{% macro f(x) %}{{ f(x) }}{{ f(x) }}{% endmacro %}{{ f(1) }}";
    for source in [loops, doubling, recursion] {
        let started = Instant::now();
        let template = ChatTemplate::new(source, &Default::default()).unwrap();
        let result = template.render(&messages(), &ChatOptions::default());
        assert!(matches!(result, Err(ChatTemplateError::Limit { .. })), "{source}: {result:?}");
        assert!(started.elapsed() < Duration::from_secs(20), "{source}: {:?}", started.elapsed());
    }

    // The same in a model's folder: opening it and asking it for a prompt.
    let folder = copy_of(&Case::open("llama").model());
    std::fs::write(folder.path().join("chat_template.jinja"), loops).unwrap();
    let base = Base::open(folder.path()).unwrap();
    let result = base.render_chat(&messages(), &ChatOptions::default());
    assert!(matches!(result, Err(BaseError::ChatTemplate(ChatTemplateError::Limit { .. }))), "{result:?}");
}

#[test]
fn promise_8_a_chat_template_reaches_nothing_but_its_variables() {
    for source in [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__init__.__globals__ }}",
        "{% include '/etc/hostname' %}",
        "{% import '/etc/hostname' as x %}",
        "{% extends 'other' %}",
        "{{ lipsum.__globals__['os'].popen('id').read() }}",
    ] {
        let rendered = ChatTemplate::new(source, &Default::default())
            .and_then(|template| template.render(&messages(), &ChatOptions::default()));
        assert!(rendered.as_ref().map_or(true, |text| text.trim().is_empty()), "{source}: {rendered:?}");
    }
}

fn messages() -> Value {
    json!([{"role": "user", "content": "hello"}])
}

#[test]
fn a_name_that_could_be_a_path_is_no_adapter_name() {
    for name in ["../x", "a/b", "", " a", "a,b", "a\"", "base", "auto"] {
        assert!(validate_adapter_name(name, "base").is_err(), "{name:?}");
    }
}

#[test]
fn adapters_beyond_the_most_that_may_be_loaded_are_refused() {
    let case = Case::open("llama");
    let base = Arc::new(Base::open(&case.model()).unwrap());
    let options = EngineOptions { max_cpu_loras: Some(2), ..EngineOptions::default() };
    let engine = Engine::start(base, options).unwrap();
    engine.load_adapter("a", &case.adapter_folder("all-r8")).unwrap();
    engine.load_adapter("b", &case.adapter_folder("small-qv")).unwrap();
    let message = engine.load_adapter("c", &case.adapter_folder("pattern")).unwrap_err().to_string();
    assert!(message.contains("`max-cpu-loras` is 2") && message.contains("`c`"), "{message}");
    engine.unload_adapter("a").unwrap();
    engine.load_adapter("c", &case.adapter_folder("pattern")).unwrap();
}
