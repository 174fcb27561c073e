//! Promises 1, 3 and 5 for adapters that are trained.

use std::collections::HashMap;

use super::*;

#[test]
fn promise_1_training_leaves_the_base_as_it_was() {
    let bytes = |folder: &Path| std::fs::read(folder.join("model.safetensors")).unwrap();
    let hash = |folder: &Path| loramux::model::Base::open(folder).unwrap().checkpoint.content_hash().unwrap();
    let mut run = TrainingRun::new(&golden_model());
    // A copy that nobody can write: what wanted to would fail.
    let base = run.folder.path().join("base");
    common::program::copy_folder(&golden_model(), &base);
    for entry in std::fs::read_dir(&base).unwrap() {
        let path = entry.unwrap().path();
        let mut permissions = path.metadata().unwrap().permissions();
        permissions.set_readonly(true);
        std::fs::set_permissions(&path, permissions).unwrap();
    }
    run.model = base.clone();
    let names: Vec<String> = (0..KINDS.len()).map(|index| add_job(&mut run, index, "")).collect();
    let before =
        (bytes(&base), hash(&base), base.join("model.safetensors").metadata().unwrap().modified().unwrap());
    run.finish(&[]);
    let after =
        (bytes(&base), hash(&base), base.join("model.safetensors").metadata().unwrap().modified().unwrap());
    assert!(before == after);
    for name in names {
        assert_eq!(run.manifest(&name)["base"]["hash"], before.1.as_str(), "{name}");
    }
}

#[test]
fn promise_3_an_adapter_trains_to_the_same_bits_alone_and_beside_others() {
    let mut solo = HashMap::new();
    for count in [3, 12] {
        // Small passes cut batches anywhere; few seats make jobs wait for each other.
        for keys in [
            "max_tokens_per_step = 40\nmax_concurrent_jobs = 5",
            "max_tokens_per_step = 4000\nrecompute = \"block\"",
        ] {
            let mut run = TrainingRun::new(&golden_model());
            run.run_keys(keys);
            let names: Vec<String> = (0..count).map(|index| add_job(&mut run, index, "")).collect();
            run.finish(&["--threads", "2"]);
            for (index, name) in names.iter().enumerate() {
                let together = without_paths(run.results(name));
                let solo = solo.entry(index).or_insert_with(|| alone(index, ""));
                assert_same_results(solo, &together, &format!("{name} among {count} jobs with {keys:?}"));
            }
        }
    }
}

/// Generated answers are evaluated on another engine than the one that trains: they are the job's own all the same.
#[test]
fn promise_3_answers_in_evaluations_are_the_same_alone_beside_others_and_resumed() {
    let prepare = |beside: bool| {
        let mut run = TrainingRun::new(&golden_model());
        let asked = |index: usize| {
            let label = if index.is_multiple_of(3) { "yes" } else { "no" };
            json!({"text": format!("number {index} is odd?"), "label": label, "group": if index.is_multiple_of(2) { "a" } else { "b" }})
        };
        let train = run.data("asked.jsonl", &(0..9).map(asked).collect::<Vec<_>>());
        let test = run.data("asked-test.jsonl", &(20..25).map(asked).collect::<Vec<_>>());
        for (name, lr) in [("asked", 2e-2), ("another", 1e-2)].into_iter().take(1 + usize::from(beside)) {
            let keys = format!(
                "train = \"{train}\"\ntest = \"{test}\"\nvalid = \"{test}\"\nrank = 4\nlr = {lr}\nsteps = 5\n\
                 batch_size = 3\neval_every = 2\neval_max_tokens = 4\nsave_every = 1"
            );
            run.job(name, &keys);
        }
        run
    };
    let alone = prepare(false);
    alone.finish(&[]);
    let wanted = without_paths(alone.results("asked"));
    let beside = prepare(true);
    beside.finish(&["--threads", "2"]);
    assert_same_results(&wanted, &without_paths(beside.results("asked")), "beside another");
    let resumed = prepare(true);
    resumed.stop_after("asked", 3).finish(&["--resume"]);
    assert_same_results(&wanted, &without_paths(resumed.results("asked")), "resumed");
    let evaluations = alone.metrics("asked", "eval");
    assert_eq!(evaluations.len(), 2 + 2 + 2);
    for line in &evaluations {
        assert!(line["eval"]["exact_match"].is_f64() && line["eval"]["samples"] == 5, "{line}");
        assert!(
            line["eval"]["confusion"].is_object() && line["eval"]["groups"]["a"]["samples"] == 3,
            "{line}"
        );
    }
    assert_ne!(
        evaluations[0]["eval"]["confusion"], evaluations[5]["eval"]["confusion"],
        "it learned nothing"
    );
}

#[test]
fn promise_5_a_gradient_that_is_not_finite_stops_its_job_alone() {
    let mut run = TrainingRun::new(&golden_model());
    // Passes smaller than batches: the good job is in the midst of one when the bad one's is given up.
    run.run_keys("max_tokens_per_step = 40");
    let good = add_job(&mut run, 0, "");
    let bad = "bad";
    let train = run.data("bad.jsonl", &token_lines(14, 500, 3));
    let keys = format!(
        "train = \"{train}\"\nlr = 1e30\nmax_grad_norm = 0\nmax_bad_steps = 2\nsteps = 9\nbatch_size = 2"
    );
    run.job(bad, &keys);
    let ran = run.train(&[]);
    assert_eq!(ran.code, Some(3), "{}", ran.stderr);
    assert!(ran.stderr.contains("not finite") && ran.stderr.contains("lora_"), "{}", ran.stderr);
    let skipped: Vec<Value> =
        run.steps(bad).into_iter().filter(|line| line.get("skipped").is_some()).collect();
    assert_eq!(skipped.len(), 2);
    assert!(skipped[0]["grad_norm"].is_null());
    for ((file, alone), (_, beside)) in alone(0, "").iter().zip(&without_paths(run.results(&good))) {
        assert!(alone == beside, "{file}");
    }
}

/// Jobs that cannot start, with what is said of them: `DATA` stands for the data file, `OUT` for the job's folder.
const BAD: &[(&str, &str, &str, &str)] = &[
    ("empty", "", "", "DATA: found no samples"),
    ("blank", "\n  \n\n", "", "DATA: found no samples"),
    (
        "unlabelled",
        "{\"input_ids\": [5, 6], \"labels\": [-100, -100]}\n\n{\"input_ids\": [5], \"labels\": [5]}\n",
        "",
        "DATA: found no sample that can be used: 2 samples with no token to learn dropped (lines 1, 3)",
    ),
    (
        "not-json",
        "{\"input_ids\": [5, 6], \"labels\": [5, 6]}\n{\"input_ids\": [5,\n",
        "",
        "DATA:2: not valid JSON: in `input_ids`: EOF while parsing a value, at column 17",
    ),
    (
        "token",
        "{\"input_ids\": [5, 512], \"labels\": [5, 6]}\n",
        "",
        "DATA:1: found 512 for `input_ids[1]`, wanted a token id below 512",
    ),
    (
        "role",
        "{\"messages\": [{\"role\": \"robot\", \"content\": \"hi\"}]}\n",
        "",
        "DATA:1: found \"robot\" for `messages[0].role`, wanted one of system, developer, user, assistant, tool",
    ),
    (
        "keys",
        "{\"question\": \"a\", \"answer\": \"b\"}\n",
        "",
        "DATA:1: found keys `question`, `answer`, wanted those of one format: `messages`; or `prompt`, `completion`; or \
         `instruction`, `output`; or `conversations`; or `text`; or `input_ids`, `labels`; or `text`, `label`",
    ),
    (
        "another-format",
        "{\"text\": \"a\"}\n{\"prompt\": \"a\", \"completion\": \"b\"}\n",
        "",
        "DATA:2: found keys `prompt`, `completion`, wanted `text` and no others but `task`, `group`, `id`",
    ),
    (
        "too-long",
        "{\"input_ids\": [5, 6, 7], \"labels\": [5, 6, 7]}\n",
        "max_length = 2\non_overlong = \"error\"",
        "DATA:1: found 3 tokens, wanted at most max_length = 2",
    ),
    (
        "target",
        "{\"input_ids\": [5, 6], \"labels\": [5, 6]}\n",
        "targets = [\"q_projj\"]",
        "`q_projj` matches no module of this base, which has embed_tokens, q_proj, k_proj, v_proj, o_proj, gate_proj, \
         up_proj, down_proj, lm_head; did you mean `q_proj`?",
    ),
];

#[test]
fn promise_5_a_job_that_cannot_start_fails_by_itself() {
    let mut run = TrainingRun::new(&golden_model());
    let path = |run: &TrainingRun, name: &str| run.folder.path().join(name).display().to_string();
    let mut wanted = Vec::new();
    for (name, content, keys, message) in BAD {
        std::fs::write(path(&run, &format!("{name}.jsonl")), content).unwrap();
        run.job(name, &format!("train = \"{name}.jsonl\"\n{keys}"));
        wanted.push((*name, message.replace("DATA", &path(&run, &format!("{name}.jsonl")))));
    }
    let good = add_job(&mut run, 0, "");
    run.job("absent", "train = \"absent.jsonl\"");
    let absent =
        format!("{}: cannot open: No such file or directory (os error 2)", path(&run, "absent.jsonl"));
    wanted.push(("absent", absent));
    // A file where its folder should be: nothing can be written there, whoever runs this.
    run.job("no-folder", "train = \"train-0.jsonl\"");
    std::fs::create_dir(path(&run, "out")).unwrap();
    std::fs::write(run.out("no-folder"), "mine").unwrap();
    let obstructed = run.out("no-folder");
    wanted.push((
        "no-folder",
        format!("{}: cannot create the folder: File exists (os error 17)", obstructed.display()),
    ));

    let ran = run.train(&[]);
    assert_eq!(ran.code, Some(3), "{}", ran.stderr);
    let errors: Vec<&str> = ran.stderr.lines().filter(|line| line.starts_with("error: ")).collect();
    assert_eq!(errors.len(), wanted.len(), "{}", ran.stderr);
    for (name, message) in &wanted {
        assert!(
            errors.contains(&format!("error: job {name}: {message}").as_str()),
            "{message:?}\n{}",
            ran.stderr
        );
        // The last table has every job.
        let row = |line: &&str| line.split_whitespace().take(3).eq([name, "failed", "0"]);
        assert_eq!(ran.stderr.lines().filter(row).count(), 1, "{name}\n{}", ran.stderr);
    }
    let row = |line: &&str| line.split_whitespace().take(2).eq([good.as_str(), "finished"]);
    assert_eq!(ran.stderr.lines().filter(row).count(), 1, "{}", ran.stderr);
    assert_same_results(&alone(0, ""), &without_paths(run.results(&good)), "among jobs that cannot start");
    assert_eq!(std::fs::read(obstructed).unwrap(), b"mine");
    assert!(!run.out("empty").exists());

    // Mended, the others are trained and what is finished stays.
    let before = run.files(&good);
    run.without_jobs();
    let good = add_job(&mut run, 0, "");
    run.data("empty.jsonl", &token_lines(4, 500, 1));
    run.job("empty", "train = \"empty.jsonl\"\nsteps = 1");
    run.finish(&["--resume"]);
    assert_eq!(run.files(&good), before);
    assert_eq!(run.steps("empty").len(), 1);
}

#[test]
fn a_run_without_a_job_that_can_start_is_refused() {
    let mut run = TrainingRun::new(&golden_model());
    let train = run.data("bad.jsonl", &["{}"]);
    run.job("bad", &format!("train = \"{train}\""));
    for flags in [&[][..], &["--dry-run"]] {
        let ran = run.train(flags);
        assert_eq!(ran.code, Some(2), "{}", ran.stderr);
        assert!(
            ran.stderr.contains("bad.jsonl:1: found no keys, wanted those of one format"),
            "{}",
            ran.stderr
        );
    }
    // A plan names all that is wrong.
    add_job(&mut run, 0, "");
    run.job("absent", "train = \"absent.jsonl\"");
    let ran = run.train(&["--dry-run"]);
    assert_eq!(ran.code, Some(2), "{}", ran.stderr);
    let errors: Vec<&str> = ran.stderr.lines().filter(|line| line.starts_with("error: job ")).collect();
    assert!(
        errors.len() == 2 && errors[0].contains("job bad: ") && errors[1].contains("job absent: "),
        "{errors:?}"
    );
    assert!(!run.folder.path().join("out").exists());
}
