//! `loramux demo` gives the accuracies that PEFT's own generation gives for the bundled adapters.

mod common;

use std::collections::BTreeMap;
use std::path::Path;

use common::program::{Ran, command, copy_folder, finish, loramux};

/// Right answers in percent, by task: of the base and of the adapter.
fn accuracies(stdout: &str) -> BTreeMap<String, (f64, f64)> {
    let table = stdout.split("\n\n").find(|part| part.contains("adapter %")).unwrap();
    let rows = table.lines().skip(1).map(|line| {
        let cells: Vec<&str> = line.split_whitespace().collect();
        assert_eq!(cells.len(), 4, "{line}");
        (cells[0].to_owned(), (cells[2].parse().unwrap(), cells[3].parse().unwrap()))
    });
    rows.collect()
}

fn number_before(text: &str, word: &str) -> u64 {
    let words: Vec<&str> = text.split_whitespace().collect();
    let at = words.iter().position(|other| *other == word).unwrap();
    words[at - 1].parse().unwrap()
}

fn assert_done(ran: &Ran) {
    assert_eq!((ran.code, ran.stderr.as_str()), (Some(0), ""), "no terminal, no progress");
}

#[test]
fn the_first_twenty_questions_of_each_task_have_the_reference_accuracies() {
    let ran = loramux(&["demo", "--bundled", "--limit", "20"]);
    assert_done(&ran);
    let wanted = [
        ("clause-summary", (0.0, 0.0)),
        ("entity-extraction", (0.0, 100.0)),
        ("filing-qa", (0.0, 30.0)),
        ("general", (90.0, 95.0)),
        ("headline-sentiment", (0.0, 75.0)),
        ("ticket-routing", (0.0, 100.0)),
        ("tweet-sentiment", (0.0, 70.0)),
    ];
    let wanted: BTreeMap<String, (f64, f64)> =
        wanted.into_iter().map(|(task, both)| (task.to_owned(), both)).collect();
    assert_eq!(accuracies(&ran.stdout), wanted);
    assert!(ran.stdout.contains("7 adapters, 280 requests in one batch"), "{}", ran.stdout);
    // 280 requests one after another would take more than two thousand steps.
    assert!(number_before(&ran.stdout, "steps;") < 60, "{}", ran.stdout);
    assert_eq!(
        number_before(&ran.stdout, "rows"),
        number_before(&ran.stdout, "tokens"),
        "no padding: {}",
        ran.stdout
    );
    let widths: Vec<usize> = ran.stdout.lines().map(|line| line.chars().count()).collect();
    assert!(widths.iter().all(|&width| width <= 120), "{}", ran.stdout);
}

#[test]
fn fresh_adapters_are_trained_side_by_side_and_served() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples");
    let folder = tempfile::tempdir().unwrap();
    let (examples, out) = (folder.path().join("examples"), folder.path().join("out"));
    for part in ["base", "tasks/general", "tasks/ticket-routing", "adapters/general"] {
        copy_folder(&root.join(part), &examples.join(part));
    }
    std::fs::copy(root.join("train.toml"), examples.join("train.toml")).unwrap();
    let mut demo = command(&["demo", "--steps", "40", "--limit", "30", "-q", "--examples"]);
    demo.arg(&examples).arg("--output").arg(&out);
    let ran = finish(demo);
    assert_done(&ran);
    // A fifth of the usual training is enough for an easy task, and for another not to be forgotten.
    let accuracies = accuracies(&ran.stdout);
    let (base, adapter) = accuracies["ticket-routing"];
    assert!(base < 10.0 && adapter > 80.0, "{base} % before, {adapter} % after");
    assert!(accuracies["general"].1 > 70.0, "{accuracies:?}");
    assert!(out.join("report.html").exists() && out.join("general/adapter_model.safetensors").exists());
}

#[test]
fn the_answers_do_not_depend_on_how_the_batch_is_cut_into_steps() {
    let examples = |ran: &Ran| {
        assert_done(ran);
        ran.stdout.split("rows computed").next().map(str::to_owned)
    };
    let wide = loramux(&["demo", "--bundled", "--limit", "3"]);
    let narrow = loramux(&[
        "demo",
        "--bundled",
        "--limit",
        "3",
        "--max-num-seqs",
        "5",
        "--max-num-batched-tokens",
        "16",
        "--max-loras",
        "2",
        "--threads",
        "1",
    ]);
    assert_eq!(examples(&wide), examples(&narrow));
}

#[test]
fn the_examples_are_found_from_anywhere_in_the_source_or_where_a_flag_says() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut inside = command(&["demo", "--bundled", "--limit", "1"]);
    inside.current_dir(root.join("tests/golden"));
    assert_done(&finish(inside));

    let elsewhere = tempfile::tempdir().unwrap();
    let mut told = command(&["demo", "--bundled", "--limit", "1", "--examples"]);
    told.arg(root.join("examples")).current_dir(elsewhere.path());
    assert_done(&finish(told));

    let mut wrong = command(&["demo", "--examples", "."]);
    wrong.current_dir(elsewhere.path());
    let ran = finish(wrong);
    assert_eq!(ran.code, Some(2));
    assert!(ran.stderr.contains("no folder `base` in it"), "{}", ran.stderr);
}

#[test]
fn a_task_without_its_adapter_and_a_broken_question_are_named() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples");
    let folder = tempfile::tempdir().unwrap();
    let examples = folder.path();
    copy_folder(&root.join("base"), &examples.join("base"));
    copy_folder(&root.join("adapters/general"), &examples.join("adapters/general"));
    copy_folder(&root.join("tasks/general"), &examples.join("tasks/general"));
    copy_folder(&root.join("tasks/filing-qa"), &examples.join("tasks/filing-qa"));
    let run = || {
        let mut command = command(&["demo", "--bundled", "--limit", "2", "--examples"]);
        command.arg(examples);
        finish(command)
    };
    let ran = run();
    assert_eq!((ran.code, ran.stdout.as_str()), (Some(2), ""));
    assert!(ran.stderr.contains("filing-qa: no such adapter folder"), "{}", ran.stderr);

    copy_folder(&root.join("adapters/filing-qa"), &examples.join("adapters/filing-qa"));
    assert_eq!(accuracies(&run().stdout).len(), 2);

    std::fs::write(examples.join("tasks/general/test.jsonl"), "\n{\"messages\": []}\n").unwrap();
    let ran = run();
    assert_eq!((ran.code, ran.stdout.as_str()), (Some(2), ""));
    assert!(ran.stderr.contains("test.jsonl:2: `messages` is empty"), "{}", ran.stderr);
}
