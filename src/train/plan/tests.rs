//! Estimates against numbers that are known, and against each other.

use std::path::Path;

use serde_json::json;

use super::*;
use crate::engine::EngineOptions;
use crate::model::Recompute;
use crate::train::data::{Counts, Dataset, Question, Sample, Target};

/// Llama 2 7B in bf16.
fn llama_7b() -> BaseShape {
    let config = json!({
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "vocab_size": 32000, "max_position_embeddings": 4096, "tie_word_embeddings": false,
    });
    let config = ModelConfig::from_json(&config, "config.json").unwrap();
    let sites = ModelSites::new(&config);
    let elements: usize = sites.table.iter().map(|(_, site)| site.in_features * site.out_features).sum();
    BaseShape { config, sites, weights: BTreeMap::from([("BF16".to_owned(), 2 * elements as u64)]) }
}

fn example_base() -> (BaseShape, Checkpoint) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/base");
    let config = ModelConfig::read(&folder).unwrap();
    let checkpoint = Checkpoint::open(&folder, &config).unwrap();
    (BaseShape::new(&config, &checkpoint).unwrap(), checkpoint)
}

fn shape(base: &BaseShape, rank: usize) -> JobShape {
    let pairs = PairShape::fresh(&Targets::AllLinear, rank, false, &base.sites.table).unwrap();
    JobShape { name: format!("rank {rank}"), pairs, slots: 1, drops: false, keeps_best: false }
}

const STEP: Step = Step {
    limit: 4096,
    rows: 2048,
    labelled: 2048,
    mean_length: 64,
    recompute: Recompute::Block,
    concurrent: 16,
};

fn total(base: &BaseShape, step: Step, jobs: &[JobShape]) -> u64 {
    training(base, step, jobs, None).unwrap().total()
}

fn bytes_of(estimate: &Estimate, kind: &str, name: &str) -> u64 {
    let is_it = |item: &&Item| item.kind == kind && item.name.contains(name);
    let found: Vec<&Item> = estimate.items.iter().filter(is_it).collect();
    assert_eq!(found.len(), 1, "{kind} {name} in\n{estimate}");
    found[0].bytes
}

#[test]
fn a_7b_base_with_rank_16_takes_what_is_known_of_it() {
    let base = llama_7b();
    assert_eq!(base.weights["BF16"], 13_476_298_752, "6.74e9 parameters but for the norms");
    let job = shape(&base, 16);
    // 32 blocks of 4 × (4096 + 4096) and 3 × (4096 + 11008) by rank 16.
    assert_eq!(job.parameters(&base.sites.table), 39_976_960);
    // Weights, gradients and both moments are 0.64 GB. Beside them: what it began with, and B as the slot has it.
    let b: u64 = 32 * 16 * (5 * 4096 + 2 * 11008) * 4;
    assert_eq!(job.bytes(&base.sites.table), 5 * 39_976_960 * 4 + b);
    let estimate = training(&base, STEP, &[job], None).unwrap();
    assert_eq!(bytes_of(&estimate, "base", "weights, BF16"), 13_476_298_752);
    // Rows of 32 blocks' inputs alone are 33 × 4096 numbers.
    let activations = bytes_of(&estimate, "step", "activations of 2048 rows");
    assert!(activations > 2048 * 33 * 4096 * 4 && activations < 2048 * 66 * 4096 * 4, "{activations}");
    // V of all sites, dU of the widest group: q, k, v.
    assert_eq!(bytes_of(&estimate, "step", "ranks"), 2048 * (32 * 7 + 3) * 16 * 4);
}

#[test]
fn the_bundled_bases_weights_are_those_of_its_file() {
    let (base, _) = example_base();
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/base/model.safetensors");
    let size = std::fs::metadata(file).unwrap().len();
    let norms = (5 * 2 + 1) * 160 * 2;
    let weights = base.weights["BF16"];
    assert!(
        (weights + norms..weights + norms + 8192).contains(&size),
        "{weights} of {size}: but for the header"
    );
}

#[test]
fn what_is_not_kept_takes_nothing() {
    let base = llama_7b();
    let jobs = [shape(&base, 8)];
    let of = |recompute| total(&base, Step { recompute, ..STEP }, &jobs);
    assert!(of(Recompute::None) > of(Recompute::Mlp) && of(Recompute::Mlp) > of(Recompute::Block));
    // Gate and up of all blocks but the last, which only labelled rows pass, and the one that is worked on.
    let gate_up = 2048 * 30 * 2 * 11008 * 4;
    assert_eq!(of(Recompute::None) - of(Recompute::Mlp), gate_up);
}

#[test]
fn a_row_more_takes_the_same_wherever_it_is() {
    let base = llama_7b();
    let jobs = [shape(&base, 8)];
    // 16 sequences of two times 64 tokens, so that pages of the cache do not round.
    let of = |rows| total(&base, Step { rows, labelled: rows, ..STEP }, &jobs);
    assert_eq!(of(4096) - of(2048), of(16384) - of(14336));
    assert!(of(4096) > of(2048));
}

#[test]
fn jobs_that_wait_have_weights_alone() {
    let base = llama_7b();
    let jobs = [shape(&base, 4), shape(&base, 32), shape(&base, 8)];
    let step = Step { concurrent: 2, ..STEP };
    let estimate = training(&base, step, &jobs, None).unwrap();
    let table = &base.sites.table;
    for job in &jobs[1..] {
        assert_eq!(bytes_of(&estimate, "adapters", &job.name), job.bytes(table));
    }
    assert_eq!(bytes_of(&estimate, "adapters", "that wait"), jobs[0].parameters(table) * 4);
    assert_eq!(bytes_of(&estimate, "adapters", "saving"), 6 * jobs[1].parameters(table) * 4);
    assert!(total(&base, STEP, &jobs) > estimate.total());
}

#[test]
fn what_a_job_asks_for_takes_memory() {
    let base = llama_7b();
    let table = &base.sites.table;
    let plain = shape(&base, 8);
    let parameters = plain.parameters(table) * 4;
    let one = |job: JobShape| total(&base, STEP, &[job]);
    let b = plain.bytes(table) - 5 * parameters;
    // PCGrad: weights, gradients, moments and a slot for each task.
    assert_eq!(one(JobShape { slots: 3, ..plain.clone() }) - one(plain.clone()), 2 * (4 * parameters + b));
    // The best weights: kept, and saved.
    assert_eq!(one(JobShape { keeps_best: true, ..plain.clone() }) - one(plain.clone()), 3 * parameters);
    // Dropout: factors and products of the group with the widest input, which is q, k, v.
    assert_eq!(one(JobShape { drops: true, ..plain.clone() }) - one(plain.clone()), 2048 * 2 * 3 * 4096 * 4);
    // DoRA: a magnitude in all copies, norms and column scales; products of the group with the widest output.
    let pairs = PairShape::fresh(&Targets::AllLinear, 8, true, table).unwrap();
    let outputs = 32 * (5 * 4096 + 2 * 11008) * 4;
    let grown = (5 + 3 + 6) * outputs + 2048 * 2 * 2 * 11008 * 4;
    assert_eq!(one(JobShape { pairs, ..plain.clone() }) - one(plain), grown);
}

#[test]
fn a_targets_typo_names_the_job() {
    let (base, checkpoint) = example_base();
    let text = "[base]\nmodel = \"m\"\n[run]\nout = \"o\"\n[[job]]\nname = \"a\"\ntrain = \"t\"\ntargets = [\"q_poj\"]\n";
    let (config, _) = RunConfig::parse(Path::new("c.toml"), text.as_bytes()).unwrap();
    let error = jobs(&config, &checkpoint).unwrap_err().to_string();
    assert!(error.starts_with("job `a`: `q_poj` matches no module") && error.contains("`q_proj`"), "{error}");
    let (config, _) =
        RunConfig::parse(Path::new("c.toml"), text.replace("q_poj", "q_proj").as_bytes()).unwrap();
    let jobs = jobs(&config, &checkpoint).unwrap();
    assert_eq!(jobs[0].parameters(&base.sites.table), 5 * 8 * (160 + 160));
}

#[test]
fn a_folder_to_go_on_from_says_what_its_adapter_takes() {
    let (base, checkpoint) = example_base();
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/adapters/general");
    let text = format!(
        "[base]\nmodel = \"m\"\n[run]\nout = \"o\"\n[[job]]\nname = \"a\"\ntrain = \"t\"\ninit_from = {:?}\n",
        format!("adapter:{}", folder.display())
    );
    let (config, _) = RunConfig::parse(Path::new("c.toml"), text.as_bytes()).unwrap();
    let jobs = jobs(&config, &checkpoint).unwrap();
    let adapter = read_adapter(&folder, &base.sites.table, &checkpoint, Limits { max_rank: 512 }).unwrap();
    let elements: usize = adapter.sites.iter().map(|site| site.a.len() + site.b.len()).sum();
    assert_eq!(jobs[0].parameters(&base.sites.table), elements as u64);
}

#[test]
fn an_engine_has_buffers_adapters_and_a_cache() {
    let base = llama_7b();
    let options = EngineOptions { kv_cache_bytes: Some(1 << 30), ..EngineOptions::default() };
    let adapter = ServedAdapter { name: "a".to_owned(), pairs: shape(&base, 20).pairs, bytes: 12345 };
    let estimate = serving(&base, &options, &[adapter]).unwrap();
    assert_eq!(bytes_of(&estimate, "adapters", "`a`"), 12345);
    // A token's keys and values are 2 × 32 × 4096 numbers.
    assert_eq!(bytes_of(&estimate, "step", "keys and values of up to 1024 tokens"), 1 << 30);
    assert_eq!(bytes_of(&estimate, "step", "logits of 131 rows"), 131 * 32000 * 4);
    assert_eq!(bytes_of(&estimate, "step", "ranks"), 512 * 3 * 32 * 4);
    assert_eq!(bytes_of(&estimate, "base", "rotary"), ((65 * 4096 + 4096 * 128) * 4) as u64);
    let error = serving(&base, &EngineOptions { max_num_seqs: 0, ..options }, &[]).unwrap_err().to_string();
    assert!(error.contains("max-num-seqs"), "{error}");
}

#[test]
fn a_run_is_described_with_its_data_and_its_memory() {
    let (base, checkpoint) = example_base();
    let text = "[base]\nmodel = \"m\"\n[run]\nout = \"o\"\nmax_tokens_per_step = 256\n[[job]]\nname = \"a\"\nbatch_size = 2\n\
                steps = 7\n[[job.task]]\nname = \"x\"\ntrain = \"t\"\nvalid = \"v\"\n[[job.task]]\nname = \"guard\"\ntest = \"g\"\n\
                [[job]]\nname = \"b\"\ntargets = [\"q_proj\"]\nlr = 2e-4\nepochs = 2\ntrain = \"t\"\n";
    let (config, _) = RunConfig::parse(Path::new("c.toml"), text.as_bytes()).unwrap();
    let shapes = jobs(&config, &checkpoint).unwrap();
    let data = |path: &str, tokens: usize| {
        let sample = Sample {
            tokens: vec![0; tokens],
            targets: vec![Target { row: 0, token: 1 }; 3],
            question: Some(Question { tokens: vec![0; 9], answer: "yes".to_owned() }),
            ..Sample::default()
        };
        Dataset {
            path: path.into(),
            samples: vec![sample; 4],
            counts: Counts {
                read: 10,
                kept: 4,
                dropped_too_long: 2,
                dropped_without_target: 3,
                truncated: 1,
                duplicates: 5,
                tokens: 4 * tokens,
                targets: 12,
            },
            ..Dataset::default()
        }
    };
    let (train, valid, guard) = (data("t", 20), data("v", 15), data("g", 11));
    let tasks = [
        TaskData { train: Some(&train), valid: Some(&valid), test: None, leakage: [6, 0] },
        TaskData { train: None, valid: None, test: Some(&guard), leakage: [0, 0] },
    ];
    let alone = [TaskData { train: Some(&train), valid: None, test: None, leakage: [0, 0] }];
    let described = [
        JobData { config: &config.jobs[0], pairs: &shapes[0].pairs, steps: 7, tasks: &tasks },
        JobData { config: &config.jobs[1], pairs: &shapes[1].pairs, steps: 11, tasks: &alone },
    ];
    let machine = Some(Machine { total: 1 << 40, available: 1 << 39 });
    let text = describe(&config, &base, &described, &["odd\u{1b}".to_owned()], machine).unwrap();
    let cells = |line: &str| line.split_whitespace().collect::<Vec<_>>().join(" ");
    let lines: Vec<String> = text.lines().map(cells).collect();
    for wanted in [
        "base m",
        "output o",
        "step up to 256 rows of up to 2 jobs, recompute none",
        "a base 8 35 122240 0.001 2 512 7",
        "b base 8 5 12800 0.0002 16 512 2 11",
        "a x train 10 4 5 1 5 80 12",
        "a x valid 10 4 5 1 5 6 60 12",
        "a guard test 10 4 5 1 5 0 44 12",
        "b b train 10 4 5 1 5 80 12",
        "fits: about",
        "note: odd\\u{1b}",
    ] {
        assert!(lines.iter().any(|line| line.starts_with(wanted)), "{wanted:?} in\n{text}");
    }
    // 18 samples of 20 tokens would be 360 rows: a step has fewer.
    assert!(text.contains("activations of 256 rows"), "{text}");
    // Nine tokens and 64 of an answer, in whole pages, four times in each of two files.
    assert!(text.contains("keys and values of up to 640 tokens"), "{text}");
}

#[test]
fn a_verdict_says_what_is_wanted_and_what_is_there() {
    let mut estimate = Estimate::default();
    estimate.add("base", "weights", 3 << 30);
    estimate.add("base", "nothing", 0);
    assert_eq!(estimate.items.len(), 1);
    let of = |total: u64, available: u64| {
        verdict(&estimate, Some(Machine { total: total << 30, available: available << 30 }))
    };
    assert_eq!(of(8, 4), "fits: about 3.0 GiB of 8.0 GiB, of which 4.0 GiB are available");
    assert!(of(8, 2).starts_with("fits, with other programs out of the way: about 3.0 GiB of 8.0 GiB"));
    assert_eq!(of(2, 1), "does not fit: about 3.0 GiB, and this machine has 2.0 GiB");
    assert!(verdict(&estimate, None).contains("not known"));
}
