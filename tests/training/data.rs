//! What becomes of data on its way into a run.

use super::*;

#[test]
fn packed_documents_are_joined_and_cut_and_no_token_is_lost() {
    let mut run = TrainingRun::new(&golden_model());
    let text = |index: usize| json!({"text": "many words of one document ".repeat(1 + index % 3)});
    let one = run.data("one.jsonl", &(0..9).map(text).collect::<Vec<_>>());
    let tagged = |index: usize| json!({"text": "a b c d e f", "task": if index < 3 { "x" } else { "y" }});
    let two = run.data("two.jsonl", &(0..6).map(tagged).collect::<Vec<_>>());
    for (name, file) in [("one", &one), ("two", &two)] {
        for packing in [true, false] {
            let keys = format!(
                "train = \"{file}\"\nrank = 2\nepochs = 1\nbatch_size = 2\nmax_length = 64\npacking = {packing}"
            );
            run.job(&format!("{name}-{packing}"), &keys);
        }
    }
    run.finish(&[]);
    let counts = |job: &str| run.manifest(job)["data"][0]["counts"].clone();
    for name in ["one", "two"] {
        let (packed, apart) = (counts(&format!("{name}-true")), counts(&format!("{name}-false")));
        assert_eq!((&packed["read"], &packed["tokens"]), (&apart["read"], &apart["tokens"]), "{name}");
        assert_eq!(packed["truncated"], 0);
        // Every token but the first of a sequence is learned.
        let learned = packed["tokens"].as_u64().unwrap() - packed["kept"].as_u64().unwrap();
        assert_eq!(packed["targets"], learned);
        let computed: u64 =
            run.steps(&format!("{name}-true")).iter().map(|line| line["tokens"].as_u64().unwrap()).sum();
        assert_eq!(packed["tokens"], computed, "{name}");
    }
    let packed = counts("one-true");
    assert_eq!(packed["kept"], packed["tokens"].as_u64().unwrap().div_ceil(64));
    assert!(packed["kept"].as_u64() < counts("one-false")["kept"].as_u64());
    // Documents of different tasks share no sequence.
    assert_eq!(counts("two-true")["kept"], 2);
}

#[test]
fn what_is_odd_about_data_is_said_with_its_line_and_trained_on() {
    let mut run = TrainingRun::new(&golden_model());
    let asked = |text: &str, label: &str| json!({"text": text, "label": label});
    run.data("same.jsonl", &["".to_owned(), asked("a", "yes").to_string(), asked("b", "yes").to_string()]);
    run.job("same", "train = \"same.jsonl\"\nsteps = 1\nrank = 2\neval_max_tokens = 0");
    let labels = |label: i64| json!({"input_ids": [5, 6, 7], "labels": [label, label, label]});
    run.data("some.jsonl", &[labels(5), labels(-100), labels(6), labels(-100)]);
    run.job("some", "train = \"some.jsonl\"\nvalid = \"some.jsonl\"\nsteps = 1\nrank = 2");
    let ran = run.train(&[]);
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    let path = |name: &str| run.folder.path().join(name).display().to_string();
    let warnings: Vec<&str> = ran.stderr.lines().filter_map(|line| line.strip_prefix("warning: ")).collect();
    for wanted in [
        format!(
            "{}:2: all 2 samples have the answer \"yes\": there is nothing to tell apart",
            path("same.jsonl")
        ),
        format!("{}:2: 2 samples with no token to learn dropped (lines 2, 4)", path("some.jsonl")),
        format!("{}: 2 samples are in the training data too", path("some.jsonl")),
    ] {
        assert!(warnings.contains(&wanted.as_str()), "{wanted}\n{}", ran.stderr);
    }
    assert_eq!(run.manifest("same")["data"][0]["classes"], json!({"yes": 2}));
    assert_eq!(run.manifest("some")["data"][1]["leakage"], 2);
    // Quiet is quiet.
    assert_eq!(run.train(&["--force", "-q"]).stderr, "");
}

/// The first thing that is wrong with a configuration, with its line; nothing is read or written.
#[test]
fn a_configuration_that_cannot_be_is_refused_with_its_line() {
    for (name, keys, wanted) in [
        ("a", "", "7: job `a` has no data; wanted `train` or [[job.task]]"),
        ("a", "task = []", "7: job `a` has no data; wanted `train` or [[job.task]]"),
        ("a", "[[job.task]]\nname = \"t\"", "7: job `a` has no data; wanted `train` or [[job.task]]"),
        (
            "a",
            "[[job.task]]\nname = \"t\"\nvalid = \"v\"\n[[job.task]]\nname = \"u\"\nvalid = \"v\"",
            "7: job `a` has tasks that are only evaluated; wanted `train` in at least one",
        ),
        (
            "a",
            "train = \"t\"\nformat = \"mesages\"",
            "10: `format` is \"mesages\"; wanted one of \"messages\", \"prompt-completion\", \"alpaca\", \"sharegpt\", \
             \"text\", \"tokens\", \"labelled\"",
        ),
        (
            "a",
            "train = \"t\"\n[[job]]\nname = \"a\"\ntrain = \"t\"",
            "11: job name `a` is given twice, first in line 8",
        ),
        (
            "a",
            "train = \"t\"\n[[job]]\nname = \"A\"\ntrain = \"t\"",
            "11: jobs `A` and `a` (line 8) may write the same folder: some file systems take no notice of case",
        ),
        (
            "report.html",
            "train = \"t\"",
            "8: `name` is \"report.html\": a file of the run is called that; wanted a name for the job's folder",
        ),
    ] {
        let mut run = TrainingRun::new(&golden_model());
        run.job(name, keys);
        let ran = run.train(&[]);
        assert_eq!(ran.code, Some(2), "{}", ran.stderr);
        assert_eq!(ran.stderr, format!("error: {}:{wanted}\n", run.config().display()));
        assert!(!run.folder.path().join("out").exists());
    }
}
