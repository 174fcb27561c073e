//! Runs that are killed, and disks that fill up: nothing that was saved is lost, and no bit is another.
#![cfg(unix)]

use std::os::unix::process::ExitStatusExt;
use std::process::Stdio;
use std::time::{Duration, Instant};

use super::tasks::add_tasks;
use super::*;

/// Kills of each of the two tests below: 200 in all.
const KILLS: usize = 100;

/// Kills the program with SIGKILL at random moments and resumes it, until it ends by itself. Returns the kills, and how
/// many of them left a checkpoint to go on from.
fn train_under_fire(run: &TrainingRun, names: &[String], seed: u64, whole: Duration) -> (usize, usize) {
    let config = run.config();
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let (mut kills, mut begun) = (0, 0);
    loop {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        // From before the first file is touched to about the end.
        let patience = whole.mul_f64((state % 1000) as f64 / 1000.0);
        let mut command = common::program::command(&[
            "train",
            config.to_str().unwrap(),
            "--resume",
            "-q",
            "--threads",
            "1",
        ]);
        let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
        let started = Instant::now();
        let status = loop {
            if let Some(status) = child.try_wait().unwrap() {
                break status;
            }
            if started.elapsed() >= patience {
                child.kill().unwrap();
                break child.wait().unwrap();
            }
            std::thread::sleep(Duration::from_micros(500));
        };
        if status.signal().is_none() {
            let mut said = String::new();
            std::io::Read::read_to_string(&mut child.stderr.take().unwrap(), &mut said).unwrap();
            assert_eq!(status.code(), Some(0), "after {kills} kills: {said}");
            return (kills, begun);
        }
        kills += 1;
        let is_begun = names.iter().any(|name| run.out(name).join("checkpoint.safetensors").exists());
        begun += usize::from(is_begun);
    }
}

/// Compares runs under fire with one in peace, byte for byte, until there were [`KILLS`].
fn compare_under_fire(first_seed: u64, prepare: impl Fn() -> (TrainingRun, Vec<String>)) {
    let (run, names) = prepare();
    let started = Instant::now();
    run.finish(&["--threads", "1"]);
    let whole = started.elapsed();
    let wanted: Vec<_> = names.iter().map(|name| without_paths(run.results(name))).collect();
    let (mut kills, mut begun, mut seed) = (0, 0, first_seed);
    while kills < KILLS {
        let (run, names) = prepare();
        seed += 1;
        let fire = train_under_fire(&run, &names, seed, whole);
        (kills, begun) = (kills + fire.0, begun + fire.1);
        for (name, wanted) in names.iter().zip(&wanted) {
            let found = without_paths(run.results(name));
            assert_same_results(wanted, &found, &format!("{name} after kills (seed {seed})"));
            let files: Vec<String> = run.files(name).into_iter().map(|(file, _)| file).collect();
            let left = [
                "adapter_config.json",
                "adapter_model.safetensors",
                "manifest.json",
                "metrics.jsonl",
                "report.html",
            ];
            assert_eq!(files, left, "{name} after kills (seed {seed})");
        }
    }
    assert!(begun > KILLS / 4, "{begun} of {kills} kills fell between a checkpoint and the end");
}

#[test]
fn a_run_that_is_killed_anywhere_resumes_to_the_same_bits() {
    compare_under_fire(0, || {
        let mut run = TrainingRun::new(&golden_model());
        run.run_keys("max_tokens_per_step = 150");
        let names = [0, 3].map(|index| add_job(&mut run, index, &format!("save_every = {}", 1 + index % 2)));
        (run, names.into())
    });
}

/// Batches of several passes, several tasks in a job whose weights and shares follow evaluations, best weights to keep.
#[test]
fn a_run_of_jobs_with_several_tasks_that_is_killed_anywhere_resumes_to_the_same_bits() {
    compare_under_fire(1000, || {
        let mut run = TrainingRun::new(&golden_model());
        run.run_keys("max_tokens_per_step = 40");
        let shared = "rank = 4\nbatch_size = 6\nsteps = 6\nlr = 3e-3\ndropout = 0.1\nsave_every = 1";
        let hard = "sampling = \"even-then-hard\"\neval_every = 2\nearly_stop = 5\ncoba = true";
        add_tasks(&mut run, "hard", &[("big", 10, ""), ("small", 4, "")], 1, &format!("{shared}\n{hard}"));
        let projected = "sampling = \"annealed\"\npcgrad = true\neval_every = 3\nseed = 4";
        add_tasks(
            &mut run,
            "projected",
            &[("big", 10, ""), ("small", 4, "")],
            0,
            &format!("{shared}\n{projected}"),
        );
        (run, vec!["hard".to_owned(), "projected".to_owned()])
    });
}

/// Writes beyond a limit fail as they do on a full disk.
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
    assert_same_results(&wanted, &without_paths(run.results(&name)), "after full disks");
}
