//! Jobs that end before their last step, and losses that are no numbers.

use super::tasks::add_tasks;
use super::*;

/// A job that learns its few samples by heart, and gets worse on others soon. A guard only gets better.
fn overfitted(keys: &str, guard: bool) -> TrainingRun {
    let mut run = TrainingRun::new(&golden_model());
    let train = run.data("train.jsonl", &token_lines(6, 500, 5));
    let valid = run.data("valid.jsonl", &token_lines(4, 500, 6));
    let mut text = format!(
        "rank = 4\nlr = 2e-3\nschedule = \"constant\"\nwarmup_steps = 0\nbatch_size = 3\neval_every = 2\n{keys}\n\
         [[job.task]]\nname = \"a\"\ntrain = \"{train}\"\nvalid = \"{valid}\"\ntest = \"{valid}\"\n"
    );
    if guard {
        text += &format!("[[job.task]]\nname = \"guard\"\nvalid = \"{train}\"\n");
    }
    run.job("a", &text);
    run
}

const STOPPING: &str = "steps = 60\nearly_stop = 3";

#[test]
fn a_job_stops_when_it_gets_worse_and_keeps_its_best_weights() {
    let run = overfitted(STOPPING, false);
    run.finish(&[]);
    let manifest = run.manifest("a");
    assert_eq!(manifest["outcome"], "stopped early");
    let steps = manifest["steps"].as_u64().unwrap();
    assert!(steps < 60);
    let valid = run.metrics("a", "eval").into_iter().filter(|line| line["eval"]["split"] == "valid");
    let mut valid: Vec<(u64, f64)> =
        valid.map(|line| (line["step"].as_u64().unwrap(), line["eval"]["loss"].as_f64().unwrap())).collect();
    let last = valid.pop().unwrap();
    let best = *valid.iter().min_by(|one, other| one.1.total_cmp(&other.1)).unwrap();
    assert_eq!(manifest["best_step"], best.0);
    // Three evaluations later, none of them better.
    assert_eq!(steps, best.0 + 3 * 2);
    assert_eq!(run.steps("a").len() as u64, steps);
    assert!(best.0 > 0, "nothing was learned");
    // The last evaluation is of what is kept: the weights of the best one.
    assert_eq!(last, (steps, best.1));
    assert_ne!(valid.last().unwrap().1, best.1);

    // They are the weights of a run that ends there, and a guard has no say.
    let short = overfitted(&format!("steps = {}", best.0), false);
    let guarded = overfitted(STOPPING, true);
    for other in [short, guarded] {
        other.finish(&[]);
        assert!(other.results("a")[1].1 == run.results("a")[1].1);
    }

    // Stopped is ended: nothing is trained or written again.
    let (files, times) = (run.files("a"), modified(&run));
    run.finish(&["--resume"]);
    assert!(run.files("a") == files && modified(&run) == times);

    // Interrupted before the best step, between it and the stop, and at the stop.
    for stop in [best.0 - 1, best.0 + 3, steps] {
        let resumed = overfitted(&format!("{STOPPING}\nsave_every = 1"), false);
        resumed.stop_after("a", stop).finish(&["--resume"]);
        let (found, wanted) = (resumed.results("a"), run.results("a"));
        assert_same_results(&wanted[..3], &found[..3], &format!("resumed after step {stop}"));
        assert_eq!(resumed.manifest("a")["best_step"], best.0);
        assert_eq!(resumed.manifest("a")["outcome"], "stopped early");
    }
}

/// When the files of job `a` were written.
fn modified(run: &TrainingRun) -> Vec<std::time::SystemTime> {
    let names = run.files("a").into_iter().map(|(name, _)| name);
    names.map(|name| run.out("a").join(name).metadata().unwrap().modified().unwrap()).collect()
}

/// Losses and gradients that are no numbers, in everything that follows them: what is saved can be read again.
#[test]
fn a_job_that_diverges_is_resumed_like_any_other() {
    let tasks = [("one", 6, ""), ("two", 6, "")];
    let prepare = || {
        let mut run = TrainingRun::new(&golden_model());
        for (name, keys) in [
            ("diverging", "coba = true\npcgrad = true\nmax_bad_steps = 6"),
            ("hard", "sampling = \"even-then-hard\"\nearly_stop = 4\nmax_bad_steps = 100"),
        ] {
            let shared = "rank = 4\nlr = 1e18\nmax_grad_norm = 0\nwarmup_steps = 0\nsteps = 12\nbatch_size = 4\n\
                          eval_every = 1\nsave_every = 1";
            add_tasks(&mut run, name, &tasks, 1, &format!("{shared}\n{keys}"));
        }
        // Answers of weights that can no longer say anything.
        let asked = |index: usize| json!({"text": format!("number {index}"), "label": if index < 3 { "a" } else { "b" }});
        let file = run.data("asked.jsonl", &(0..6).map(asked).collect::<Vec<_>>());
        let keys = format!(
            "train = \"{file}\"\nvalid = \"{file}\"\nrank = 4\nlr = 1e18\nmax_grad_norm = 0\nwarmup_steps = 0\n\
             steps = 12\nbatch_size = 4\neval_every = 3\neval_max_tokens = 3\nmax_bad_steps = 100\nsave_every = 1"
        );
        run.job("asked", &keys);
        add_job(&mut run, 0, "");
        run
    };
    let run = prepare();
    let ran = run.train(&[]);
    assert_eq!(ran.code, Some(3), "{}", ran.stderr);
    assert_eq!(run.manifest("diverging")["outcome"], "failed");
    assert!(
        run.metrics("diverging", "eval").iter().any(|line| line["eval"]["loss"].is_null()),
        "it did not diverge"
    );
    assert!(
        ran.stderr.contains("error: job diverging: 6 steps had a gradient that is not finite, the last in ")
    );
    for stop in [1, 2, 4] {
        let resumed = prepare();
        let ran = resumed.stop_after("diverging", stop).train(&["--resume"]);
        assert_eq!(ran.code, Some(3), "{}", ran.stderr);
        for job in ["diverging", "hard", "asked", "job-0"] {
            let wanted = without_paths(run.results(job));
            assert_same_results(
                &wanted,
                &without_paths(resumed.results(job)),
                &format!("{job} resumed after {stop}"),
            );
        }
    }
    // What failed stays failed, and says so again.
    let files = run.files("diverging");
    let ran = run.train(&["--resume"]);
    assert_eq!(ran.code, Some(3), "{}", ran.stderr);
    assert!(ran.stderr.contains("error: job diverging: it failed in an earlier run"), "{}", ran.stderr);
    assert!(run.files("diverging") == files);
}
