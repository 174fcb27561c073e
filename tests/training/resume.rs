//! Going on: what is there already is kept, whole, and never mixed with something else.

use std::sync::LazyLock;

use super::*;

/// What job 1 leaves that nobody interrupts.
static WHOLE: LazyLock<Vec<(&'static str, Vec<u8>)>> = LazyLock::new(|| alone(1, "save_every = 2"));

/// A run whose first job is in its third checkpoint's neighbourhood, and whose second has not come to its end either.
fn interrupted() -> TrainingRun {
    let mut run = TrainingRun::new(&golden_model());
    add_job(&mut run, 1, "save_every = 2");
    add_job(&mut run, 0, "save_every = 1");
    run.stop_after("job-1", 5);
    run
}

/// Goes on, with one job that must not: everything of it stays. Returns what is said of it.
#[track_caller]
fn refused(run: &TrainingRun, job: &str) -> String {
    let before = run.files(job);
    let ran = run.train(&["--resume"]);
    assert_eq!(ran.code, Some(3), "{}", ran.stderr);
    assert!(run.files(job) == before, "something of {job} is not as it was");
    let errors: Vec<&str> = ran.stderr.lines().filter(|line| line.starts_with("error: ")).collect();
    let [error] = errors[..] else { panic!("{}", ran.stderr) };
    let said = error.strip_prefix(&format!("error: job {job}: "));
    said.unwrap_or_else(|| panic!("{error}")).to_owned()
}

#[test]
fn results_are_kept_unless_told_otherwise() {
    let mut run = TrainingRun::new(&golden_model());
    let name = add_job(&mut run, 0, "");
    let first = run.finish(&[]).results(&name);
    let files = run.files(&name);
    let again = run.train(&[]);
    assert_eq!(again.code, Some(2), "{}", again.stderr);
    assert!(again.stderr.contains("--resume") && again.stderr.contains("--force"), "{}", again.stderr);
    run.finish(&["--resume"]);
    assert!(run.files(&name) == files, "nothing is left to do");
    assert_eq!(run.finish(&["--force"]).results(&name), first, "the same again");
}

#[test]
fn a_checkpoint_of_another_configuration_is_refused_by_key() {
    let mut run = interrupted();
    let other = "job-0";
    let folder = run.out("job-1").display().to_string();
    let root = run.folder.path().to_owned();
    let data = |name: &str| root.join(name).display().to_string();
    let (train, valid) = (data("train-1.jsonl"), data("valid-1.jsonl"));
    let again = "; change it back, or replace the results with --force";
    let keys = "train = \"train-1.jsonl\"\nvalid = \"valid-1.jsonl\"\nepochs = 2\nseed = 1\nwarmup_steps = 2\n\
                eval_every = 2\nsave_every = 2\nbatch_size = 5\nrank = 8\nlr = 1e-3\nweight_decay = 0.1\n\
                schedule = \"linear\"\ndropout = 0.2";
    let train_lines = std::fs::read_to_string(&train).unwrap();
    let mut first = None;
    for (from, to, wanted) in [
        ("lr = 1e-3", "lr = 2e-3", "`lr` was 0.001 and is 0.002"),
        ("rank = 8", "rank = 9", "`rank` was 8 and is 9"),
        ("seed = 1", "seed = 7", "`seed` was 1 and is 7"),
        ("epochs = 2", "epochs = 3", "`epochs` was 2.0 and is 3.0"),
        ("epochs = 2", "steps = 6", "`steps` was absent and is 6"),
        ("eval_every = 2", "eval_every = 3", "`eval_every` was 2 and is 3"),
        (
            "\"valid-1.jsonl\"",
            "\"train-1.jsonl\"",
            &format!("`valid` of task \"job-1\", {train:?}, has another content"),
        ),
        (
            "valid = \"valid-1.jsonl\"\n",
            "",
            &format!("`valid` of task \"job-1\" was {valid:?} and is absent"),
        ),
        (
            "valid = \"valid-1.jsonl\"",
            "test = \"train-1.jsonl\"\nvalid = \"valid-1.jsonl\"",
            &format!("`test` of task \"job-1\" was absent and is {train:?}"),
        ),
    ] {
        assert!(keys.contains(from), "{from}");
        run.job("job-1", &keys.replace(from, to));
        let said = refused(&run, "job-1");
        assert_eq!(said, format!("{folder}: its checkpoint is another configuration's: {wanted}{again}"));
        // The job beside it went on to its end, and stays there.
        first = first.or_else(|| Some(run.results(other)));
        assert_eq!(run.results(other), *first.as_ref().unwrap(), "{wanted}");
    }
    // Another word in one sample.
    run.job("job-1", keys);
    std::fs::write(&train, train_lines.replacen("]", ", 9]", 2)).unwrap();
    let said = refused(&run, "job-1");
    assert!(said.contains(&format!("`train` of task \"job-1\", {train:?}, has another content")), "{said}");
    std::fs::write(&train, &train_lines).unwrap();
    // Another base.
    let model =
        std::mem::replace(&mut run.model, Path::new("tests/golden/llama-tied/model").canonicalize().unwrap());
    let ran = run.train(&["--resume"]);
    assert_eq!(ran.code, Some(3), "{}", ran.stderr);
    assert!(
        ran.stderr
            .contains(&format!("{folder}: its checkpoint is another configuration's: the base had the hash"))
    );
    run.model = model;

    // What changes nothing may change: passes, seats, threads, how often it is saved, where the files are.
    std::fs::rename(&train, data("moved.jsonl")).unwrap();
    run.run_keys("max_tokens_per_step = 33\nmax_concurrent_jobs = 1\nrecompute = \"mlp\"");
    run.job("job-1", &keys.replace("save_every = 2", "save_every = 3").replace("train-1", "moved"));
    run.finish(&["--resume", "--threads", "1"]);
    let (found, wanted) = (run.results("job-1"), &WHOLE[..]);
    assert_same_results(&wanted[..3], &found[..3], "after all those refusals");
    assert_eq!(run.manifest("job-1")["steps"], 6);
}

#[test]
fn results_of_another_configuration_are_refused_by_key() {
    let mut run = TrainingRun::new(&golden_model());
    let name = add_job(&mut run, 0, "");
    run.finish(&[]);
    add_job(&mut run, 0, "alpha = 3");
    let said = refused(&run, &name);
    let folder = run.out(&name).display().to_string();
    let wanted =
        "its results are another configuration's: `alpha` was 16.0 and is 3.0; change it back, or replace";
    assert!(said.starts_with(&format!("{folder}: {wanted}")), "{said}");
    run.finish(&["--force"]);
    assert_eq!(run.manifest(&name)["config"]["alpha"], 3.0);
}

#[test]
fn a_damaged_checkpoint_is_named_and_not_gone_on_from() {
    let run = interrupted();
    let path = run.out("job-1").join("checkpoint.safetensors");
    let whole = std::fs::read(&path).unwrap();
    let mut damaged: Vec<Vec<u8>> =
        [0, 7, 100, whole.len() / 2, whole.len() - 1].map(|length| whole[..length].to_vec()).into();
    for place in [0, 20, whole.len() / 2, whole.len() - 1] {
        let mut flipped = whole.clone();
        flipped[place] ^= 1;
        damaged.push(flipped);
    }
    damaged.push([&whole[..], b"x"].concat());
    for bytes in damaged {
        std::fs::write(&path, &bytes).unwrap();
        let said = refused(&run, "job-1");
        let remedy = format!("; put back a copy, or remove {} and the job starts anew", path.display());
        let named = said.starts_with(&format!("{}: damaged: ", path.display()));
        assert!(named && said.ends_with(&remedy), "{said}");
    }
    // Half a write is a file of another name.
    std::fs::write(&path, &whole).unwrap();
    let torn = run.out("job-1").join(".checkpoint.safetensors.1-0.tmp");
    std::fs::write(&torn, &whole[..whole.len() / 2]).unwrap();
    run.finish(&["--resume"]);
    assert_same_results(&WHOLE, &without_paths(run.results("job-1")), "from the whole one");
    assert!(!torn.exists());
}

#[test]
fn without_its_checkpoint_a_job_starts_anew() {
    let run = interrupted();
    std::fs::remove_file(run.out("job-1").join("checkpoint.safetensors")).unwrap();
    run.finish(&["--resume"]);
    assert_same_results(&WHOLE, &without_paths(run.results("job-1")), "anew");
}

#[test]
fn metrics_shorter_than_the_checkpoint_are_refused() {
    let run = interrupted();
    let path = run.out("job-1").join("metrics.jsonl");
    let whole = std::fs::read(&path).unwrap();
    std::fs::write(&path, &whole[..100]).unwrap();
    let said = refused(&run, "job-1");
    let wanted = format!("{}: cannot resume: 100 bytes, but the checkpoint was made after ", path.display());
    assert!(said.starts_with(&wanted), "{said}");
}

#[test]
fn damaged_results_are_named_and_not_taken_for_finished() {
    let mut run = TrainingRun::new(&golden_model());
    let name = add_job(&mut run, 1, "save_every = 2");
    let other = add_job(&mut run, 0, "");
    run.finish(&[]);
    let untouched = run.files(&other);
    let manifest = run.out(&name).join("manifest.json");
    let remedy = format!("; put back a copy, or remove {} and the job starts anew", manifest.display());
    for file in ["adapter_model.safetensors", "adapter_config.json", "metrics.jsonl", "manifest.json"] {
        let path = run.out(&name).join(file);
        let whole = std::fs::read(&path).unwrap();
        let mut flipped = whole.clone();
        let middle = whole.len() / 2;
        flipped[middle] ^= 0x80;
        for bytes in [&whole[..middle], &flipped] {
            std::fs::write(&path, bytes).unwrap();
            let said = refused(&run, &name);
            let named = said.starts_with(&format!("{}: damaged: ", path.display()));
            assert!(named && said.ends_with(&remedy), "{file}: {said}");
        }
        std::fs::remove_file(&path).unwrap();
        if file != "manifest.json" {
            let said = refused(&run, &name);
            assert!(said.contains(&format!("{}: cannot open", path.display())), "{file}: {said}");
        }
        std::fs::write(&path, &whole).unwrap();
    }
    // What the program says to do helps.
    std::fs::write(run.out(&name).join("adapter_model.safetensors"), "torn").unwrap();
    std::fs::remove_file(&manifest).unwrap();
    run.finish(&["--resume"]);
    assert_same_results(&WHOLE, &without_paths(run.results(&name)), "anew");
    assert!(run.files(&other) == untouched);
}

#[test]
fn a_job_that_was_interrupted_after_its_manifest_is_completed() {
    let mut run = TrainingRun::new(&golden_model());
    let name = add_job(&mut run, 0, "");
    let files = run.finish(&[]).files(&name);
    std::fs::remove_file(run.out(&name).join("report.html")).unwrap();
    std::fs::write(run.out(&name).join("checkpoint.safetensors"), "what was not removed any more").unwrap();
    assert!(run.finish(&["--resume"]).files(&name) == files);
}

#[test]
fn a_folder_is_one_runs_at_a_time() {
    let mut run = TrainingRun::new(&golden_model());
    add_job(&mut run, 0, "");
    let out = run.folder.path().join("out");
    let lock = loramux::train::folder::Lock::take(&out).unwrap();
    let ran = run.train(&[]);
    assert_eq!(ran.code, Some(2), "{}", ran.stderr);
    assert!(
        ran.stderr.ends_with(&format!("error: {}: another run is writing there\n", out.display())),
        "{}",
        ran.stderr
    );
    drop(lock);
    run.finish(&[]);
}

#[test]
fn what_cannot_be_written_to_is_named() {
    let mut run = TrainingRun::new(&golden_model());
    add_job(&mut run, 0, "");
    let out = run.folder.path().join("out");
    std::fs::write(&out, "a file").unwrap();
    let ran = run.train(&[]);
    assert_eq!(ran.code, Some(1), "{}", ran.stderr);
    assert!(
        ran.stderr.contains(&format!("error: {}: cannot create the folder", out.display())),
        "{}",
        ran.stderr
    );
    assert_eq!(std::fs::read(&out).unwrap(), b"a file");
}
