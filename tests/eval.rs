//! Evaluation: `loramux eval` on the bundled tasks, and the library under it on a golden model.

mod common;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use common::forward::{entries, load, logits};
use common::program::{Ran, command, copy_folder, finish, read_lines};
use common::training::TrainingRun;
use common::{Case, repository};
use loramux::backend::cpu::Cpu;
use loramux::engine::{Engine, EngineOptions};
use loramux::format::read_json;
use loramux::model::Base;
use loramux::train::data::{Question, Sample, Target};
use loramux::train::evaluate::{Measures, Subject, answer, evaluate, requests};
use serde_json::{Value, json};

/// `loramux eval` on the bundled base with two of its adapters.
fn eval(tasks: &Path, limit: &str, more: &[&str]) -> Ran {
    let examples = repository().join("examples");
    let mut command = command(&["eval", "--limit", limit]);
    command.arg("--model").arg(examples.join("base")).arg("--tasks").arg(tasks).arg("--lora-modules");
    for name in ["headline-sentiment", "ticket-routing"] {
        command.arg(format!("{name}={}", examples.join("adapters").join(name).display()));
    }
    command.args(more);
    finish(command)
}

/// A folder with some of the bundled tasks.
fn tasks(names: &[&str]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for name in names {
        copy_folder(&repository().join("examples/tasks").join(name), &folder.path().join(name));
    }
    folder
}

/// Cells by line of the first table of an output.
fn table(stdout: &str) -> Vec<Vec<String>> {
    let lines = stdout.lines().take_while(|line| !line.is_empty());
    lines.map(|line| line.split_whitespace().map(str::to_owned).collect()).collect()
}

#[test]
fn every_adapter_is_scored_on_every_task_as_the_reference_scores_it() {
    let tasks = tasks(&["headline-sentiment", "ticket-routing"]);
    let report = tasks.path().join("report.json");
    let ran = eval(tasks.path(), "20", &["-v", "--output", report.to_str().unwrap()]);
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    let table = table(&ran.stdout);
    assert_eq!(table[0][4..], ["base", "headline-sentiment", "ticket-routing"]);
    // What PEFT's own generation gives for the first twenty questions; of other tasks an adapter knows nothing.
    for (row, (task, own, accuracy)) in
        table[1..].iter().zip([("headline-sentiment", 1, "75.0"), ("ticket-routing", 2, "100.0")])
    {
        assert_eq!((row[0].as_str(), row[1].as_str()), (task, "20"));
        for (column, cell) in row[2..].iter().enumerate() {
            let wanted = if column == own { accuracy } else { "0.0" };
            assert_eq!(cell, wanted, "{task}, column {column}");
        }
    }
    assert!(ran.stdout.contains("macro F1 %"), "{}", ran.stdout);

    let report = read_json(&report).unwrap();
    let results = report["results"].as_array().unwrap();
    assert_eq!((results.len(), report["adapters"].as_array().unwrap().len()), (6, 2));
    let entry = |task: &str, adapter: Value| {
        results.iter().find(|entry| entry["task"] == task && entry["adapter"] == adapter).unwrap()
    };
    let own = entry("headline-sentiment", "headline-sentiment".into());
    let number = |entry: &Value, field: &str| entry[field].as_f64().unwrap();
    assert_eq!((number(own, "exact_match"), number(own, "label_accuracy")), (0.75, 0.75));
    assert!(number(own, "f1") > 0.5 && own["samples"] == 20 && own["split"] == "test");
    let given =
        own["confusion"].as_object().unwrap().values().flat_map(|row| row.as_object().unwrap().values());
    assert_eq!(given.map(|count| count.as_u64().unwrap()).sum::<u64>(), 20);
    let base = entry("headline-sentiment", Value::Null);
    assert!(number(own, "loss") < 1.0 && number(base, "loss") > 2.0, "{own} {base}");
    assert!((number(own, "perplexity") - number(own, "loss").exp()).abs() < 1e-9);
}

#[test]
fn an_adapter_may_be_asked_its_own_task_alone() {
    let tasks = tasks(&["headline-sentiment", "ticket-routing"]);
    let ran = eval(tasks.path(), "5", &["--own", "--split", "valid", "--limit", "10"]);
    assert_eq!(ran.code, Some(2), "a flag twice");
    let ran = eval(tasks.path(), "5", &["--own", "--split", "valid"]);
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    let table = table(&ran.stdout);
    let cell = |row: usize, column: usize| table[row][2 + column].as_str();
    assert!(cell(1, 0) != "-" && cell(1, 1) != "-" && cell(2, 2) == "100.0", "{}", ran.stdout);
    assert_eq!((cell(1, 2), cell(2, 1)), ("-", "-"));
}

#[test]
fn what_is_not_there_is_named() {
    let tasks = tasks(&["ticket-routing"]);
    std::fs::create_dir(tasks.path().join("empty")).unwrap();
    let ran = eval(tasks.path(), "1", &["--split", "nosuch"]);
    assert_eq!((ran.code, ran.stdout.as_str()), (Some(2), ""));
    assert!(ran.stderr.contains("no folder with nosuch.jsonl in it"), "{}", ran.stderr);
    let ran = eval(tasks.path(), "1", &[]);
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    assert!(ran.stderr.contains("empty: no test.jsonl in it; it is passed over"), "{}", ran.stderr);

    std::fs::write(tasks.path().join("empty/test.jsonl"), "{\"messages\": 1}\n").unwrap();
    let ran = eval(tasks.path(), "1", &[]);
    assert_eq!((ran.code, ran.stdout.as_str()), (Some(2), ""));
    assert!(ran.stderr.contains("empty/test.jsonl:1: "), "{}", ran.stderr);
    std::fs::remove_dir_all(tasks.path().join("empty")).unwrap();
    let ran = eval(tasks.path(), "1", &["absent=/nosuch"]);
    assert_eq!((ran.code, ran.stdout.lines().count()), (Some(3), 2), "the others are scored: {}", ran.stdout);
    assert!(ran.stderr.contains("adapter `absent` is not served"), "{}", ran.stderr);
}

/// Answers with reasoning are judged by what follows it, and as one of the classes of the training data: the test file
/// with its one line tells neither of them.
#[test]
fn a_job_reads_answers_as_its_training_data_has_them() {
    let mut run = TrainingRun::new(&Case::open("llama").model());
    let line = |prompt: &str, completion: &str| json!({"prompt": prompt, "completion": completion});
    let (yes, no) = (line("A:", "<think>no?</think> yes"), line("B:", "<think>hm</think> no"));
    run.data("train.jsonl", &[&yes, &yes, &no, &no]);
    run.data("test.jsonl", &[line("A:", "yes")]);
    let data = "train = \"train.jsonl\"\ntest = \"test.jsonl\"";
    run.job("a", &format!("{data}\nsteps = 60\nlr = 1e-2\nbatch_size = 4\nwarmup_steps = 0"));
    let lines = read_lines(&run.finish(&[]).out("a").join("metrics.jsonl"));
    let eval = &lines.iter().rfind(|line| line.get("eval").is_some()).unwrap()["eval"];
    assert_eq!((&eval["exact_match"], &eval["label_accuracy"]), (&json!(1.0), &json!(1.0)), "{eval}");
    assert_eq!(eval["confusion"], json!({"yes": {"yes": 1}}));
}

// The library.

/// Samples whose targets are all but their first token, with a question of their first tokens.
fn samples(prompts: &[Vec<u32>]) -> Vec<Sample> {
    let sample = |tokens: &Vec<u32>| {
        let targets = (1..tokens.len()).map(|next| Target { row: next as u32 - 1, token: tokens[next] });
        let question = Question { tokens: tokens[..2].to_vec(), answer: "never".to_owned() };
        Sample {
            tokens: tokens.clone(),
            targets: targets.collect(),
            question: Some(question),
            ..Sample::default()
        }
    };
    prompts.iter().map(sample).collect()
}

struct Setup {
    case: Case,
    engine: Engine,
    samples: Vec<Sample>,
    classes: BTreeMap<String, usize>,
}

impl Setup {
    fn new() -> Self {
        let case = Case::open("qwen3");
        let base = Arc::new(Base::open(&case.model()).unwrap());
        let options = EngineOptions { max_num_seqs: 7, threads: Some(2), ..EngineOptions::default() };
        let engine = Engine::start(base, options).unwrap();
        for name in ["all-r8", "dora-r8"] {
            engine.load_adapter(name, &case.adapter_folder(name)).unwrap();
        }
        let mut prompts = case.prompts();
        prompts.iter_mut().for_each(|prompt| prompt.extend([3, 4, 5]));
        let samples = samples(&prompts);
        Self { case, engine, samples, classes: BTreeMap::new() }
    }

    fn subject<'a>(&'a self, adapter: Option<&'a str>) -> Subject<'a> {
        Subject { adapter, samples: &self.samples, classes: &self.classes }
    }
}

const BOTH: Measures = Measures { max_tokens: 6, loss: true };

#[test]
fn the_loss_is_that_of_the_logits() {
    let setup = Setup::new();
    let mut backend = Cpu::new(Some(2)).unwrap();
    let transformer = load(&setup.case, &mut backend);
    let vocabulary = transformer.config().vocab_size;
    let subjects = [setup.subject(None), setup.subject(Some("dora-r8"))];
    let scores = evaluate(&setup.engine, &subjects, BOTH, || ()).unwrap();
    for (subject, scores) in subjects.iter().zip(scores) {
        let slot = |name| setup.case.adapters().iter().position(|other| other == name).unwrap();
        let (mut sum, mut count) = (0.0, 0);
        for sample in &setup.samples {
            let gates = entries(subject.adapter.map_or(0, slot));
            let rows = logits(&mut backend, &transformer, &[(&gates, &sample.tokens)]).remove(0);
            for target in &sample.targets {
                let row = &rows[target.row as usize * vocabulary..][..vocabulary];
                let normaliser: f64 = row.iter().map(|&logit| f64::from(logit).exp()).sum();
                sum += normaliser.ln() - f64::from(row[target.token as usize]);
                count += 1;
            }
        }
        let (found, wanted) = (scores.loss.unwrap(), sum / f64::from(count));
        assert!((found - wanted).abs() < 1e-5 * wanted, "{found}, not {wanted}");
        assert!((scores.perplexity.unwrap() - found.exp()).abs() < 1e-9);
        assert_eq!((scores.samples, scores.exact_match), (setup.samples.len(), Some(0.0)));
    }
}

#[test]
fn adapters_score_together_as_they_score_alone() {
    let setup = Setup::new();
    let subjects = [setup.subject(Some("all-r8")), setup.subject(None), setup.subject(Some("dora-r8"))];
    let mut done = 0;
    let together = evaluate(&setup.engine, &subjects, BOTH, || done += 1).unwrap();
    assert_eq!(done, requests(&subjects, BOTH));
    assert_eq!(done, 2 * 3 * setup.samples.len());
    let answers = answer(&setup.engine, &subjects, 6).unwrap();
    for (index, subject) in subjects.iter().enumerate() {
        let alone = std::slice::from_ref(subject);
        assert_eq!(evaluate(&setup.engine, alone, BOTH, || ()).unwrap()[0], together[index]);
        assert_eq!(answer(&setup.engine, alone, 6).unwrap()[0], answers[index]);
    }
    assert!(together[0].loss != together[1].loss && together[1].loss != together[2].loss);
    assert!(answers[0] != answers[1] && answers[1] != answers[2]);

    // Only what is asked for is measured.
    let silent = Measures { max_tokens: 0, loss: false };
    let nothing = &evaluate(&setup.engine, &subjects[..1], silent, || unreachable!()).unwrap()[0];
    assert_eq!((nothing.exact_match, nothing.loss, nothing.samples), (None, None, setup.samples.len()));
}

#[test]
fn a_sample_that_cannot_be_asked_fails_by_itself() {
    let mut setup = Setup::new();
    let whole = evaluate(&setup.engine, &[setup.subject(None)], BOTH, || ()).unwrap().remove(0);
    let endless = vec![2; setup.engine.max_model_len()];
    setup.samples.insert(1, samples(std::slice::from_ref(&endless)).remove(0));
    setup.samples[1].question.as_mut().unwrap().tokens = endless;
    let scores = evaluate(&setup.engine, &[setup.subject(None)], BOTH, || ()).unwrap().remove(0);
    assert_eq!((scores.failed, scores.loss), (2, whole.loss));
    let answers = answer(&setup.engine, &[setup.subject(None)], 4).unwrap().remove(0);
    assert!(answers[1].as_ref().unwrap().as_ref().unwrap_err().contains("prompt"), "{answers:?}");
    assert!(answers[0].as_ref().unwrap().is_ok() && answers[2].as_ref().unwrap().is_ok());

    // A label that is not the next token has a probability that the engine does not tell.
    setup.samples.remove(1);
    setup.samples[0].targets[0].token += 1;
    let scores = evaluate(&setup.engine, &[setup.subject(None)], BOTH, || ()).unwrap().remove(0);
    assert_eq!((scores.loss, scores.failed), (None, 0));

    let unknown = evaluate(&setup.engine, &[setup.subject(Some("nosuch"))], BOTH, || ()).unwrap_err();
    assert!(unknown.to_string().contains("`nosuch`"), "{unknown}");
}
