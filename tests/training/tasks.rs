//! Several tasks in a job: what is drawn, how it weighs, what is only watched.

use std::collections::BTreeMap;

use loramux::train::balance::coba_weights;

use super::*;

/// Adds a job with tasks: their names, how many samples each has, and keys of their own. As many guards follow, which
/// are evaluated and never trained.
pub fn add_tasks(
    run: &mut TrainingRun,
    name: &str,
    tasks: &[(&str, usize, &str)],
    guards: usize,
    keys: &str,
) {
    let mut text = format!("{keys}\n");
    for (index, (task, samples, own)) in tasks.iter().enumerate() {
        let seed = 10 * index as u64;
        let train = run.data(&format!("{task}-train.jsonl"), &short_lines(*samples, seed + 1));
        // The first task is evaluated on what it learned, the others on what they did not: they become harder.
        let valid = short_lines(4, seed + if index == 0 { 1 } else { 2 });
        let valid = run.data(&format!("{task}-valid.jsonl"), &valid);
        text +=
            &format!("[[job.task]]\nname = \"{task}\"\ntrain = \"{train}\"\nvalid = \"{valid}\"\n{own}\n");
    }
    for guard in 0..guards {
        let valid = run.data(&format!("guard-{guard}.jsonl"), &short_lines(3, 77 + guard as u64));
        text += &format!("[[job.task]]\nname = \"guard-{guard}\"\nvalid = \"{valid}\"\ntest = \"{valid}\"\n");
    }
    run.job(name, &text);
}

/// Sequences of a few tokens, each task's from a part of the vocabulary of its own.
fn short_lines(count: usize, seed: u64) -> Vec<Value> {
    let first = 20 + 40 * (seed / 10 % 8);
    let line = |index: u64| {
        let ids: Vec<u64> =
            (0..4 + index % 3).map(|at| first + (7 * index + seed + at * at * (1 + index)) % 37).collect();
        json!({"input_ids": ids, "labels": ids})
    };
    (0..count as u64).map(line).collect()
}

/// Samples drawn from each task in each step.
fn drawn(run: &TrainingRun, job: &str) -> Vec<BTreeMap<String, u64>> {
    let samples = |line: Value| {
        let tasks = line["tasks"].as_object().unwrap().iter();
        tasks.map(|(task, step)| (task.clone(), step["samples"].as_u64().unwrap())).collect()
    };
    run.steps(job).into_iter().map(samples).collect()
}

/// A task's validation losses by step, in the file's order; the last is that of the end.
fn losses(run: &TrainingRun, job: &str, task: &str) -> Vec<(u64, f64)> {
    let lines = run.metrics(job, "eval").into_iter();
    let own = lines.filter(|line| line["eval"]["task"] == task && line["eval"]["split"] == "valid");
    own.map(|line| (line["step"].as_u64().unwrap(), line["eval"]["loss"].as_f64().unwrap())).collect()
}

/// Validation losses that a step knows: those of evaluations before it.
fn known(losses: &[(u64, f64)], step: u64) -> Vec<f64> {
    losses.iter().filter(|(at, _)| *at < step).map(|(_, loss)| *loss).collect()
}

/// The share of task `big`, of 24 samples, beside `small`, of 6, in the draws of a step.
type Share<'a> = &'a dyn Fn(&TrainingRun, u64) -> f64;

const STEPS: u64 = 40;
const BATCH: u64 = 16;

#[test]
fn samples_are_drawn_as_every_strategy_says_also_when_resumed() {
    let annealed = |_: &TrainingRun, step: u64| {
        // 640 draws of 30 samples: 22 epochs.
        let epoch = ((step - 1) * BATCH / 30) as f64;
        let exponent = 1.0 - 0.8 * epoch / 21.0;
        let (big, small) = (24f64.powf(exponent), 6f64.powf(exponent));
        big / (big + small)
    };
    let hard = |run: &TrainingRun, step: u64| {
        let relative = |task: &str| {
            let known = known(&losses(run, "even-then-hard", task), step);
            known[known.len() - 1] / known[0]
        };
        relative("big") / (relative("big") + relative("small"))
    };
    let cases: [(&str, &str, &str, Share<'_>); 9] = [
        ("proportional", "sampling = \"proportional\"", "", &|_, _| 0.8),
        ("uniform", "sampling = \"uniform\"", "", &|_, _| 0.5),
        ("round-robin", "sampling = \"round-robin\"", "", &|_, _| 0.5),
        ("temperature", "sampling = \"temperature\"\ntemperature = 2", "", &|_, _| 2.0 / 3.0),
        ("annealed", "sampling = \"annealed\"", "", &annealed),
        ("even-then-hard", "sampling = \"even-then-hard\"\neval_every = 10\nlr = 3e-2", "", &hard),
        ("one-task-a-batch", "batch_tasks = \"one\"\nsampling = \"uniform\"", "", &|_, _| 0.5),
        ("turns-by-batch", "batch_tasks = \"one\"\nsampling = \"round-robin\"", "", &|_, _| 0.5),
        ("mixed-in", "sampling = \"round-robin\"", "ratio = 0.1", &|_, _| 0.9),
    ];
    let prepare = || {
        let mut run = TrainingRun::new(&golden_model());
        for (name, keys, small, _) in &cases {
            let shared = "rank = 2\ntargets = [\"q_proj\", \"down_proj\"]\nbatch_size = 16\nsteps = 40\nsave_every = 10";
            add_tasks(
                &mut run,
                name,
                &[("big", 24, ""), ("small", 6, small)],
                1,
                &format!("{shared}\n{keys}"),
            );
        }
        run
    };
    let run = prepare();
    run.finish(&[]);
    for (name, _, _, share) in &cases {
        let steps = drawn(&run, name);
        assert_eq!(steps.len() as u64, STEPS, "{name}");
        let (mut big, mut wanted, mut variance) = (0.0, 0.0, 0.0);
        let by_batch = name.contains("batch");
        for (step, tasks) in (1..).zip(&steps) {
            assert_eq!(tasks.values().sum::<u64>(), BATCH, "{name} step {step}");
            assert!(tasks.keys().all(|task| task == "big" || task == "small"), "{name}: {tasks:?}");
            assert!(!by_batch || tasks.len() == 1, "{name}: {tasks:?}");
            let share = share(&run, step);
            big += tasks.get("big").copied().unwrap_or(0) as f64;
            wanted += share * BATCH as f64;
            // Draws of a batch are independent, or all the same.
            variance += share * (1.0 - share) * (BATCH * if by_batch { BATCH } else { 1 }) as f64;
        }
        // Three standard deviations; what takes turns is exact.
        let bound =
            if ["round-robin", "turns-by-batch"].contains(name) { 0.0 } else { 3.0 * variance.sqrt() };
        assert!((big - wanted).abs() <= bound, "{name}: {big} draws of `big`, wanted {wanted} ± {bound}");
    }
    // The strategy has something to follow: one task became easier than the other.
    assert!((hard(&run, STEPS) - 0.5).abs() > 0.03, "{}", hard(&run, STEPS));

    let resumed = prepare();
    resumed.stop_after("annealed", 25).finish(&["--resume"]);
    for (name, ..) in &cases {
        let whole = without_paths(run.results(name));
        assert_same_results(&whole, &without_paths(resumed.results(name)), &format!("{name} resumed"));
    }
}

#[test]
fn a_guard_task_is_measured_and_changes_nothing() {
    let mut run = TrainingRun::new(&golden_model());
    let tasks = [("big", 9, ""), ("small", 5, "")];
    let ways = [
        ("plain", ""),
        ("pcgrad", "pcgrad = true"),
        ("coba", "coba = true"),
        ("hard", "sampling = \"even-then-hard\""),
        ("early", "early_stop = 3"),
        ("balanced", "balance = \"task\""),
    ];
    for (name, keys) in ways {
        let keys = format!("rank = 4\nsteps = 7\nbatch_size = 4\neval_every = 2\nlr = 3e-3\n{keys}");
        add_tasks(&mut run, name, &tasks, 0, &keys);
        add_tasks(&mut run, &format!("{name}-guarded"), &tasks, 2, &keys);
    }
    run.finish(&[]);
    for (name, _) in ways {
        let guarded = format!("{name}-guarded");
        assert_eq!(run.steps(name).len(), 7);
        let weights = |job: &str| std::fs::read(run.out(job).join("adapter_model.safetensors")).unwrap();
        assert!(weights(name) == weights(&guarded), "{name}");
        for (line, with_guard) in run.steps(name).iter().zip(run.steps(&guarded)) {
            assert_eq!(line["tasks"], with_guard["tasks"], "{name}");
        }
        let evaluations = run.metrics(&guarded, "eval");
        for task in ["big", "small", "guard-0", "guard-1"] {
            let own = || evaluations.iter().filter(|line| line["eval"]["task"] == task);
            let valid = own().filter(|line| line["eval"]["split"] == "valid");
            assert_eq!(
                valid.map(|line| line["step"].as_u64().unwrap()).collect::<Vec<_>>(),
                [0, 2, 4, 6, 7],
                "{name}"
            );
            let is_guard = task.starts_with("guard");
            assert!(own().all(|line| line["eval"]["trained"] == !is_guard), "{name}");
            // Test data is for the beginning and the end.
            let test = own().filter(|line| line["eval"]["split"] == "test").count();
            assert_eq!(test, if is_guard { 2 } else { 0 }, "{name}");
        }
    }
    // Only tasks that are trained have gradients to compare.
    let affinity = run.metrics("pcgrad-guarded", "affinity");
    assert!(!affinity.is_empty());
    for line in affinity {
        assert!(
            line["affinity"].as_array().unwrap().iter().all(|pair| pair[0] == "big" && pair[1] == "small"),
            "{line}"
        );
    }
}

const BALANCED: [(&str, &str); 4] = [
    ("plain", ""),
    ("pcgrad", "pcgrad = true"),
    ("coba", "coba = true"),
    ("both", "pcgrad = true\ncoba = true\nbalance = \"task\"\nuse_dora = true"),
];

#[test]
fn balanced_jobs_say_what_they_do_and_have_the_same_bits_however_they_are_cut_and_resumed() {
    let tasks = [("one", 12, ""), ("two", 7, ""), ("three", 5, "")];
    let prepare = |run_keys: &str| {
        let mut run = TrainingRun::new(&golden_model());
        run.run_keys(run_keys);
        for (name, keys) in BALANCED {
            let shared = "rank = 4\nsteps = 12\nbatch_size = 6\neval_every = 3\nsave_every = 2\nlr = 1e-2\ndropout = 0.1";
            add_tasks(&mut run, name, &tasks, 0, &format!("{shared}\n{keys}"));
        }
        run
    };
    let whole = prepare("max_tokens_per_step = 4096");
    whole.finish(&[]);
    // Passes smaller than batches.
    let cut = prepare("max_tokens_per_step = 13\nmax_concurrent_jobs = 3\nrecompute = \"block\"");
    cut.finish(&["--threads", "2"]);
    let resumed = prepare("max_tokens_per_step = 64");
    resumed.stop_after("plain", 9).finish(&["--resume"]);
    for (name, keys) in BALANCED {
        let wanted = without_paths(whole.results(name));
        assert_same_results(&wanted, &without_paths(cut.results(name)), &format!("{name} in small passes"));
        assert_same_results(&wanted, &without_paths(resumed.results(name)), &format!("{name} resumed"));

        let affinity = whole.metrics(name, "affinity");
        assert_eq!(affinity.is_empty(), !keys.contains("pcgrad"), "{name}");
        for line in &affinity {
            let pairs = line["affinity"].as_array().unwrap();
            let names: Vec<_> =
                pairs.iter().map(|pair| (pair[0].as_str().unwrap(), pair[1].as_str().unwrap())).collect();
            assert_eq!(names, [("one", "two"), ("one", "three"), ("two", "three")], "{name}");
            let cosines: Vec<f64> = pairs.iter().map(|pair| pair[2].as_f64().unwrap()).collect();
            assert!(cosines.iter().all(|cosine| *cosine != 0.0 && cosine.abs() < 1.0), "{name}: {cosines:?}");
        }
        let steps: Vec<u64> = affinity.iter().map(|line| line["step"].as_u64().unwrap()).collect();
        assert!(steps.is_empty() || steps == [3, 6, 9, 12], "{name}: {steps:?}");

        // The weights are those of the evaluations before the step.
        let histories: Vec<_> = tasks.iter().map(|(task, ..)| losses(&whole, name, task)).collect();
        let mut differ = false;
        for line in whole.steps(name) {
            let history = |losses: &Vec<(u64, f64)>| {
                let known = known(losses, line["step"].as_u64().unwrap());
                known.iter().map(|loss| loss / known[0]).collect::<Vec<f64>>()
            };
            let wanted = coba_weights(&histories.iter().map(history).collect::<Vec<_>>());
            for ((task, ..), weight) in tasks.iter().zip(wanted) {
                let Some(own) = line["tasks"].get(*task) else { continue };
                let wanted = if keys.contains("coba") { json!(weight) } else { Value::Null };
                assert_eq!(own.get("weight").unwrap_or(&Value::Null), &wanted, "{name}: {line}");
                differ |= weight != 1.0;
            }
        }
        assert!(differ, "{name}");
    }
    let weights = |name: &str| whole.results(name)[1].1.clone();
    let all: Vec<_> = BALANCED.iter().map(|(name, _)| weights(name)).collect();
    assert!(all[1..].iter().all(|other| *other != all[0]), "nothing is balanced");
}

#[test]
fn balance_changes_nothing_where_there_is_nothing_to_balance() {
    let mut run = TrainingRun::new(&golden_model());
    let keys = "rank = 4\nsteps = 6\nbatch_size = 6\nlr = 1e-2\neval_every = 100";
    let tasks = [("one", 12, ""), ("two", 7, "")];
    add_tasks(&mut run, "plain", &tasks, 0, keys);
    // CoBa knows no slope before the second evaluation.
    add_tasks(&mut run, "coba", &tasks, 0, &format!("{keys}\ncoba = true"));
    run.finish(&[]);
    assert!(run.results("plain")[1].1 == run.results("coba")[1].1);

    // With one task that is trained, both are a mistake.
    for (key, line) in [("pcgrad", 10), ("coba", 10)] {
        let mut run = TrainingRun::new(&golden_model());
        add_tasks(&mut run, "single", &[("one", 4, "")], 1, &format!("eval_every = 1\n{key} = true"));
        let ran = run.train(&[]);
        assert_eq!(ran.code, Some(2), "{}", ran.stderr);
        let wanted = format!(
            "error: {}:{line}: job `single`: `{key}` is about several tasks, and `one` is the only one that is trained\n",
            run.config().display()
        );
        assert_eq!(ran.stderr, wanted);
    }
}
