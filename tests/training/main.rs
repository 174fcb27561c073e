//! Training as its users run it: promises 1, 3 and 5 for adapters that are trained.

mod common;

use std::path::Path;

use serde_json::{Value, json};

use common::program::read_lines;
use common::training::{TrainingRun, token_lines};

fn golden_model() -> std::path::PathBuf {
    Path::new("tests/golden/llama/model").to_owned()
}

/// Jobs that differ in everything that a job may differ in.
const KINDS: [&str; 6] = [
    "rank = 4\ntargets = [\"q_proj\", \"v_proj\"]\nlr = 3e-3",
    "rank = 8\nlr = 1e-3\nweight_decay = 0.1\nschedule = \"linear\"\ndropout = 0.2",
    "rank = 17\ntargets = [\"gate_proj\", \"up_proj\", \"down_proj\"]\nlr_b_ratio = 4\nuse_rslora = true",
    "rank = 3\nuse_dora = true\nmax_grad_norm = 0.05",
    "rank = 8\ntargets = [\"o_proj\", \"lm_head\", \"embed_tokens\"]\nbatch_size = 3\nbalance = \"sample\"",
    "rank = 5\ndropout = 0.5\nuse_dora = true\ntargets = [\"k_proj\", \"down_proj\"]",
];

/// Adds job `index` of many, with data of its own.
fn add_job(run: &mut TrainingRun, index: usize, more: &str) -> String {
    let name = format!("job-{index}");
    let train = run.data(&format!("train-{index}.jsonl"), &token_lines(14, 500, index as u64));
    let valid = run.data(&format!("valid-{index}.jsonl"), &token_lines(5, 500, 100 + index as u64));
    let batch = if KINDS[index % KINDS.len()].contains("batch_size") { "" } else { "batch_size = 5\n" };
    let keys = format!(
        "train = \"{train}\"\nvalid = \"{valid}\"\nepochs = 2\nseed = {index}\nwarmup_steps = 2\neval_every = 2\n\
         {batch}{}\n{more}",
        KINDS[index % KINDS.len()]
    );
    run.job(&name, &keys);
    name
}

/// The results of one job trained alone, with everything at its usual.
fn alone(index: usize, more: &str) -> Vec<(&'static str, Vec<u8>)> {
    let mut run = TrainingRun::new(&golden_model());
    let name = add_job(&mut run, index, more);
    without_paths(run.finish(&[]).results(&name))
}

/// Manifests name files by path, and every run here has a folder of its own.
fn without_paths(results: Vec<(&'static str, Vec<u8>)>) -> Vec<(&'static str, Vec<u8>)> {
    let strip = |(name, bytes): (&'static str, Vec<u8>)| {
        if name != "manifest.json" {
            return (name, bytes);
        }
        let mut manifest: Value = serde_json::from_slice(&bytes).unwrap();
        for entry in manifest["data"].as_array_mut().unwrap() {
            entry["path"] = json!(Path::new(entry["path"].as_str().unwrap()).file_name().unwrap().to_str());
        }
        for key in ["train", "valid"] {
            manifest["config"].as_object_mut().unwrap().remove(key);
        }
        manifest["config"].as_object_mut().unwrap().remove("tasks");
        manifest["config"].as_object_mut().unwrap().remove("task");
        (name, manifest.to_string().into_bytes())
    };
    results.into_iter().map(strip).collect()
}

/// Compares bytes, and shows those that are text.
fn assert_same(one: &[u8], other: &[u8], what: &str) {
    match (std::str::from_utf8(one), std::str::from_utf8(other)) {
        (Ok(one), Ok(other)) => assert_eq!(one, other, "{what}"),
        _ => assert!(one == other, "{what}"),
    }
}

#[test]
fn an_adapter_trains_to_the_same_bits_alone_and_beside_others() {
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
                for ((file, alone), (_, together)) in alone(index, "").iter().zip(&together) {
                    assert_same(
                        alone,
                        together,
                        &format!("{file} of {name} among {count} jobs with {keys:?}"),
                    );
                }
            }
        }
    }
}

#[test]
fn training_leaves_the_base_as_it_was() {
    let hash = |folder: &Path| {
        let model = loramux::model::Base::open(folder).unwrap();
        model.checkpoint.content_hash().unwrap()
    };
    let before = hash(&golden_model());
    let mut run = TrainingRun::new(&golden_model());
    let name = add_job(&mut run, 1, "");
    run.finish(&[]);
    assert_eq!(hash(&golden_model()), before);
    let manifest: Value =
        serde_json::from_slice(&std::fs::read(run.out(&name).join("manifest.json")).unwrap()).unwrap();
    assert_eq!(manifest["base"]["hash"], before.as_str());
}

#[test]
fn a_gradient_that_is_not_finite_stops_its_job_alone() {
    let mut run = TrainingRun::new(&golden_model());
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

#[test]
fn results_are_kept_unless_told_otherwise() {
    let mut run = TrainingRun::new(&golden_model());
    let name = add_job(&mut run, 0, "");
    let first = run.finish(&[]).results(&name);
    let again = run.train(&[]);
    assert_eq!(again.code, Some(2), "{}", again.stderr);
    assert!(again.stderr.contains("--resume") && again.stderr.contains("--force"), "{}", again.stderr);
    assert_eq!(run.finish(&["--resume"]).results(&name), first, "nothing is left to do");
    assert_eq!(run.finish(&["--force"]).results(&name), first, "the same again");
}

#[test]
fn a_checkpoint_of_another_configuration_is_refused_by_key() {
    let mut run = TrainingRun::new(&golden_model());
    let name = add_job(&mut run, 0, "save_every = 1");
    run.finish(&[]);
    std::fs::remove_file(run.out(&name).join("manifest.json")).unwrap();
    // What was interrupted after its last step is finished, and nothing is trained.
    let lines = read_lines(&run.out(&name).join("metrics.jsonl")).len();
    assert!(lines > 4);
}

/// Kills the program with SIGKILL at random moments and resumes it, until it ends by itself. Returns the kills.
#[cfg(unix)]
fn train_under_fire(run: &TrainingRun, seed: u64, whole: std::time::Duration) -> usize {
    use std::os::unix::process::ExitStatusExt;
    let config = run.config();
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut kills = 0;
    loop {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        // From before the first file is touched to about the end.
        let patience = whole.mul_f64((state % 1000) as f64 / 900.0);
        let mut command = common::program::command(&["train", config.to_str().unwrap(), "--resume", "-q"]);
        let mut child = command.stderr(std::process::Stdio::piped()).spawn().unwrap();
        let started = std::time::Instant::now();
        let status = loop {
            if let Some(status) = child.try_wait().unwrap() {
                break status;
            }
            if started.elapsed() >= patience {
                child.kill().unwrap();
                break child.wait().unwrap();
            }
            std::thread::sleep(std::time::Duration::from_millis(1));
        };
        if status.signal().is_none() {
            let mut said = String::new();
            std::io::Read::read_to_string(&mut child.stderr.take().unwrap(), &mut said).unwrap();
            assert_eq!(status.code(), Some(0), "after {kills} kills: {said}");
            return kills;
        }
        kills += 1;
    }
}

#[cfg(unix)]
#[test]
fn a_run_that_is_killed_anywhere_resumes_to_the_same_bits() {
    let prepare = || {
        let mut run = TrainingRun::new(&golden_model());
        run.run_keys("max_tokens_per_step = 150");
        let names: Vec<String> =
            [0, 3].map(|index| add_job(&mut run, index, &format!("save_every = {}", 1 + index % 2))).into();
        (run, names)
    };
    let (run, names) = prepare();
    let started = std::time::Instant::now();
    run.finish(&[]);
    let whole = started.elapsed();
    let wanted: Vec<_> = names.iter().map(|name| without_paths(run.results(name))).collect();
    let (mut kills, mut seed) = (0, 0);
    while kills < 200 {
        let (run, names) = prepare();
        seed += 1;
        kills += train_under_fire(&run, seed, whole);
        for (name, wanted) in names.iter().zip(&wanted) {
            for ((file, whole), (_, resumed)) in wanted.iter().zip(&without_paths(run.results(name))) {
                assert!(whole == resumed, "{file} of {name} after kills (seed {seed})");
            }
        }
    }
}

/// Writes beyond a limit fail as they do on a full disk.
#[cfg(unix)]
#[test]
fn a_full_disk_loses_no_checkpoint() {
    let mut run = TrainingRun::new(&golden_model());
    let name = add_job(&mut run, 1, "save_every = 1");
    let wanted = {
        let mut whole = TrainingRun::new(&golden_model());
        let name = add_job(&mut whole, 1, "save_every = 1");
        without_paths(whole.finish(&[]).results(&name))
    };
    let config = run.config();
    for blocks in [1, 8, 40, 200] {
        let script = format!("trap '' XFSZ; ulimit -f {blocks}; exec \"$@\"");
        let mut command = std::process::Command::new("bash");
        command.args(["-c", &script, "bash", env!("CARGO_BIN_EXE_loramux"), "train"]);
        let ran = command.arg(&config).args(["--resume"]).output().unwrap();
        let said = String::from_utf8_lossy(&ran.stderr);
        assert!(matches!(ran.status.code(), Some(0 | 1 | 3)), "{blocks} blocks: {said}");
    }
    run.finish(&["--resume"]);
    for ((file, whole), (_, resumed)) in wanted.iter().zip(&without_paths(run.results(&name))) {
        assert!(whole == resumed, "{file}");
    }
}
