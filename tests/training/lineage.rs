//! Sequential training: an adapter that begins where another ended.

use loramux::format::sha256_file;

use super::*;

const KEYS: &str = "rank = 4\nsteps = 2\nbatch_size = 4\nlr = 3e-3";

/// The same but for the shape, which the adapter itself has.
fn from(folder: &str) -> String {
    format!("init_from = \"adapter:{folder}\"\n{}", KEYS.replace("rank = 4\n", ""))
}

fn started() -> TrainingRun {
    let mut run = TrainingRun::new(&golden_model());
    run.data("train.jsonl", &token_lines(8, 500, 1));
    run.job("first", &format!("train = \"train.jsonl\"\n{KEYS}"));
    run.finish(&[]);
    run
}

#[test]
fn a_job_begins_with_the_result_of_another_and_says_so() {
    let mut run = started();
    for (name, from_job) in [("second", "first"), ("third", "second")] {
        let keys = format!("train = \"train.jsonl\"\nsave_every = 1\n{}", from(&format!("out/{from_job}")));
        run.without_jobs().job(name, &keys).finish(&[]);
    }
    let ancestor = |run: &TrainingRun, name: &str| {
        let folder = run.out(name);
        json!({"adapter": folder, "sha256": sha256_file(&folder.join("adapter_model.safetensors")).unwrap()})
    };
    assert_eq!(run.manifest("first")["lineage"], json!([]));
    assert_eq!(run.manifest("second")["lineage"], json!([ancestor(&run, "first")]));
    assert_eq!(run.manifest("third")["lineage"], json!([ancestor(&run, "first"), ancestor(&run, "second")]));
    let shape = |name: &str| run.results(name)[0].1.clone();
    assert_eq!(shape("third"), shape("first"), "rank, alpha and targets stay");
    // It goes on from there: the first loss is that of the weights it began with.
    let first_loss = |name: &str| run.steps(name)[0]["loss"].as_f64().unwrap();
    assert!(first_loss("second") < first_loss("first") && first_loss("third") < first_loss("second"));

    // A job in the midst of training does not go on from another beginning.
    let start = run.folder.path().join("start");
    std::fs::create_dir(&start).unwrap();
    let begin_with = |name: &str| {
        for file in ["adapter_config.json", "adapter_model.safetensors"] {
            std::fs::copy(run.out(name).join(file), start.join(file)).unwrap();
        }
    };
    begin_with("second");
    let mut later = TrainingRun::new(&golden_model());
    later.data("train.jsonl", &token_lines(8, 500, 1));
    let keys = format!("train = \"train.jsonl\"\nsave_every = 1\n{}", from(start.to_str().unwrap()));
    later.job("fourth", &keys).stop_after("fourth", 2);
    begin_with("third");
    let ran = later.train(&["--resume"]);
    assert_eq!(ran.code, Some(3), "{}", ran.stderr);
    let wanted =
        format!("the adapter that it begins with, {:?}, has other weights", start.display().to_string());
    assert!(ran.stderr.contains(&wanted), "{}", ran.stderr);
    begin_with("second");
    later.finish(&["--resume"]);
}

#[test]
fn a_damaged_beginning_is_refused() {
    let mut run = started();
    let weights = run.out("first").join("adapter_model.safetensors");
    let whole = std::fs::read(&weights).unwrap();
    let keys = format!("train = \"train.jsonl\"\n{}", from("out/first"));
    run.without_jobs().job("second", &keys);
    for bytes in [whole[..whole.len() / 2].to_vec(), {
        let mut flipped = whole.clone();
        *flipped.last_mut().unwrap() ^= 1;
        flipped
    }] {
        std::fs::write(&weights, bytes).unwrap();
        let ran = run.train(&[]);
        assert_eq!(ran.code, Some(2), "{}", ran.stderr);
        let wanted = format!("error: job `second`: {}: ", weights.display());
        assert!(ran.stderr.contains(&wanted), "{}", ran.stderr);
        assert!(!run.out("second").exists());
    }
    std::fs::write(&weights, whole).unwrap();
    run.finish(&[]);
}

/// Jobs of a run are trained side by side: what one begins with is there before. The order in the file does not matter.
#[test]
fn a_job_that_begins_with_another_of_its_run_is_refused_by_name() {
    let first = ("first", format!("train = \"train.jsonl\"\n{KEYS}"));
    let second = ("second", format!("train = \"train.jsonl\"\n{}", from("out/first")));
    let circular = ("first", format!("train = \"train.jsonl\"\n{}", from("out/../out/second")));
    let own = ("second", format!("train = \"train.jsonl\"\n{}", from("out/second")));
    for (jobs, line, job, folder, writer) in [
        ([&first, &second], 17, "second", "out/first", "first"),
        ([&second, &first], 10, "second", "out/first", "first"),
        ([&circular, &second], 10, "first", "out/../out/second", "second"),
        ([&second, &circular], 10, "second", "out/first", "first"),
        ([&first, &own], 17, "second", "out/second", "second"),
    ] {
        let mut run = TrainingRun::new(&golden_model());
        run.data("train.jsonl", &token_lines(8, 500, 1));
        for (name, keys) in jobs {
            run.job(name, keys);
        }
        let ran = run.train(&[]);
        assert_eq!(ran.code, Some(2), "{}", ran.stderr);
        let wanted = format!(
            "error: {}:{line}: job `{job}` starts from {folder:?}, which job `{writer}` of this run writes; wanted a folder \
             that is there before the run, or a run of its own for each\n",
            run.config().display()
        );
        assert_eq!(ran.stderr, wanted);
    }
}
