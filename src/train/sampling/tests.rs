//! Shares, order, resuming and refusals.

use proptest::prelude::*;

use super::*;

fn plan(sampling: Sampling, sizes: &[usize]) -> SamplingPlan {
    SamplingPlan {
        sampling,
        batch_tasks: BatchTasks::Mixed,
        sizes: sizes.to_vec(),
        ratios: vec![None; sizes.len()],
        batch_size: 16,
        length: Length::Steps(1000),
        shuffle: true,
        seed: 7,
    }
}

fn batches(plan: SamplingPlan) -> Vec<Vec<Draw>> {
    let mut sampler = Sampler::new(plan).unwrap();
    let batches: Vec<_> = std::iter::from_fn(|| sampler.next_batch()).collect();
    assert_eq!(batches.len() as u64, sampler.steps());
    batches
}

/// How many of the draws are of each task.
fn counts(draws: impl IntoIterator<Item = Draw>, tasks: usize) -> Vec<f64> {
    let mut counts = vec![0.0; tasks];
    draws.into_iter().for_each(|draw| counts[draw.task] += 1.0);
    counts
}

/// Five standard deviations of a binomial count: one seed in two million is outside.
#[track_caller]
fn assert_shares(counts: &[f64], shares: &[f64]) {
    let (draws, whole): (f64, f64) = (counts.iter().sum(), shares.iter().sum());
    for (task, (count, share)) in counts.iter().zip(shares).enumerate() {
        let p = share / whole;
        let bound = 5.0 * (draws * p * (1.0 - p)).sqrt();
        assert!((count - draws * p).abs() <= bound, "task {task}: {count} of {draws} draws, wanted {p}");
    }
}

fn error(change: impl FnOnce(&mut SamplingPlan)) -> String {
    let mut plan = plan(Sampling::Proportional, &[10, 20]);
    change(&mut plan);
    Sampler::new(plan).expect_err("the plan is refused").to_string()
}

#[test]
fn each_strategy_has_its_shares() {
    let sizes = [4000, 1000, 0, 250];
    for (sampling, shares) in [
        (Sampling::Proportional, [4000.0, 1000.0, 0.0, 250.0]),
        (Sampling::Uniform, [1.0, 1.0, 0.0, 1.0]),
        (Sampling::Temperature(2.0), [63.2456, 31.6228, 0.0, 15.8114]),
        (Sampling::Temperature(1e-3), [1.0, 0.0, 0.0, 0.0]),
        (Sampling::EvenThenHard, [1.0, 1.0, 0.0, 1.0]),
    ] {
        assert_shares(&counts(batches(plan(sampling, &sizes)).concat(), 4), &shares);
    }
}

#[test]
fn round_robin_takes_turns() {
    let draws = batches(plan(Sampling::RoundRobin, &[40, 0, 10, 30])).concat();
    assert!(draws.iter().zip([0, 2, 3].iter().cycle()).all(|(draw, task)| draw.task == *task));
    let one = SamplingPlan { batch_tasks: BatchTasks::One, ..plan(Sampling::RoundRobin, &[40, 0, 10, 30]) };
    for (batch, task) in batches(one).iter().zip([0, 2, 3].iter().cycle()) {
        assert!(batch.iter().all(|draw| draw.task == *task));
    }
}

#[test]
fn tasks_with_a_ratio_take_their_share_and_the_others_the_rest() {
    for sampling in [Sampling::Proportional, Sampling::RoundRobin] {
        for batch_tasks in [BatchTasks::Mixed, BatchTasks::One] {
            let ratios = vec![None, Some(0.1), None, Some(0.3), Some(0.5)];
            let length = Length::Steps(8000);
            let wanted = if sampling == Sampling::RoundRobin { [0.3, 0.3] } else { [0.45, 0.15] };
            let plan = SamplingPlan {
                ratios,
                batch_tasks,
                length,
                batch_size: 2,
                ..plan(sampling, &[600, 5, 200, 9000, 0])
            };
            // One draw for each choice of a task.
            let chosen = batches(plan).into_iter().flat_map(|batch| match batch_tasks {
                BatchTasks::Mixed => batch,
                BatchTasks::One => vec![batch[0]],
            });
            assert_shares(&counts(chosen, 5), &[wanted[0], 0.1, wanted[1], 0.3, 0.0]);
        }
    }
}

#[test]
fn ratios_alone_divide_everything() {
    let ratios = vec![Some(0.2), Some(0.2)];
    let draws = batches(SamplingPlan { ratios, ..plan(Sampling::Proportional, &[600, 5]) }).concat();
    assert_shares(&counts(draws, 2), &[1.0, 1.0]);
}

#[test]
fn annealing_goes_from_proportional_towards_even() {
    let sizes = [8000, 500];
    let annealed = |epochs| SamplingPlan {
        length: Length::Epochs(epochs),
        batch_size: 10,
        ..plan(Sampling::Annealed, &sizes)
    };
    let draws = batches(annealed(5.0)).concat();
    for (epoch, draws) in draws.chunks(8500).enumerate() {
        let alpha = 1.0 - 0.8 * epoch as f64 / 4.0;
        assert_shares(&counts(draws.to_vec(), 2), &[8000f64.powf(alpha), 500f64.powf(alpha)]);
    }
    // A single epoch has nowhere to go to; a part of one neither.
    for epochs in [1.0, 0.5] {
        assert_shares(&counts(batches(annealed(epochs)).concat(), 2), &[8000.0, 500.0]);
    }
    // In steps, the epochs are counted from them.
    let steps = SamplingPlan { length: Length::Steps(4250), ..annealed(1.0) };
    let last = batches(steps).concat().split_off(4 * 8500);
    assert_shares(&counts(last, 2), &[8000f64.powf(0.2), 500f64.powf(0.2)]);
}

#[test]
fn hard_tasks_are_drawn_more_once_difficulties_are_known() {
    let mut sampler = Sampler::new(plan(Sampling::EvenThenHard, &[500, 0, 20, 300])).unwrap();
    let mut draws = |difficulties: &[f64]| {
        sampler.set_difficulties(difficulties);
        counts((0..300).flat_map(|_| sampler.next_batch().unwrap()), 4)
    };
    assert_shares(&draws(&[0.1, 5.0, 0.3, 0.6]), &[1.0, 0.0, 3.0, 6.0]);
    assert_shares(&draws(&[0.0; 4]), &[1.0, 0.0, 1.0, 1.0]);
    // Without a number a task is as hard as at its start.
    assert_shares(&draws(&[0.5, 0.0, f64::NAN]), &[0.5, 0.0, 1.0, 1.0]);
}

#[test]
fn one_task_is_seen_once_per_epoch() {
    for shuffle in [true, false] {
        let plan = SamplingPlan {
            length: Length::Epochs(2.5),
            shuffle,
            ..plan(Sampling::Proportional, &[0, 101, 0])
        };
        let batches = batches(plan.clone());
        assert_eq!(batches.len(), 16, "253 samples in batches of 16");
        assert!(batches[..15].iter().all(|batch| batch.len() == 16));
        let draws: Vec<usize> = batches.concat().iter().map(|draw| draw.sample).collect();
        assert_eq!(draws.len(), 253);
        let passes: Vec<&[usize]> = draws.chunks(101).collect();
        for pass in &passes {
            let mut sorted = pass.to_vec();
            sorted.sort_unstable();
            sorted.dedup();
            assert_eq!(sorted.len(), pass.len(), "a sample twice within a pass");
        }
        let in_order: Vec<usize> = (0..101).collect();
        assert_eq!(passes[0] == in_order && passes[1] == in_order, !shuffle);
        assert_eq!(passes[0] == passes[1], !shuffle, "every pass has its own order");
    }
}

#[test]
fn within_a_pass_no_sample_of_any_task_comes_twice() {
    let mut passes = [vec![0u64; 70], vec![0; 30]];
    for draw in batches(plan(Sampling::Uniform, &[70, 30])).concat() {
        passes[draw.task][draw.sample] += 1;
        let (least, most) = passes[draw.task]
            .iter()
            .fold((u64::MAX, 0), |(least, most), &count| (least.min(count), most.max(count)));
        assert!(most - least <= 1);
    }
}

#[test]
fn first_places_are_uniform() {
    let mut first = [0.0; 10];
    for seed in 0..5000 {
        let plan = SamplingPlan { seed, ..plan(Sampling::Proportional, &[10]) };
        first[Sampler::new(plan).unwrap().next_batch().unwrap()[0].sample] += 1.0;
    }
    assert_shares(&first, &[1.0; 10]);
}

#[test]
fn draws_depend_on_the_seed_alone() {
    let draws = |seed| batches(SamplingPlan { seed, ..plan(Sampling::Uniform, &[70, 30]) }).concat();
    assert_eq!(draws(1), draws(1));
    assert_ne!(draws(1), draws(2));
    // The first draws of a seed, worked out apart from this code: they are the same on every machine.
    let first: Vec<_> = draws(0)[..6].iter().map(|draw| (draw.task, draw.sample)).collect();
    assert_eq!(first, [(1, 18), (1, 26), (0, 22), (0, 59), (1, 8), (0, 33)]);
}

#[test]
fn a_guard_is_never_drawn() {
    for sampling in [Sampling::Proportional, Sampling::Uniform, Sampling::RoundRobin, Sampling::Annealed] {
        for batch_tasks in [BatchTasks::Mixed, BatchTasks::One] {
            let plan = SamplingPlan {
                batch_tasks,
                ratios: vec![Some(0.9), None, None],
                ..plan(sampling, &[0, 3, 5])
            };
            assert!(batches(plan).concat().iter().all(|draw| draw.task != 0));
        }
    }
}

#[test]
fn a_batch_of_one_task_is_of_one_task() {
    let one = |sampling| SamplingPlan { batch_tasks: BatchTasks::One, ..plan(sampling, &[30, 10, 20]) };
    let batches = batches(one(Sampling::Proportional));
    assert!(batches.iter().all(|batch| batch.iter().all(|draw| draw.task == batch[0].task)));
    assert_shares(&counts(batches.iter().map(|batch| batch[0]), 3), &[3.0, 1.0, 2.0]);
}

#[test]
fn epochs_and_repeats_are_counted() {
    let mut sampler = Sampler::new(plan(Sampling::RoundRobin, &[40, 0, 4])).unwrap();
    assert_eq!(sampler.epoch(), 0.0);
    sampler.next_batch();
    assert_eq!(sampler.epoch(), 16.0 / 44.0);
    let seen = [
        Seen { draws: 8, distinct: 8, repeats: 0 },
        Seen::default(),
        Seen { draws: 8, distinct: 4, repeats: 4 },
    ];
    assert_eq!(sampler.seen(), seen);
    // Several tasks have full batches: 3 · 44 draws would end within the ninth.
    let epochs = SamplingPlan { length: Length::Epochs(3.0), ..plan(Sampling::Proportional, &[40, 0, 4]) };
    assert_eq!(batches(epochs).concat().len(), 144);
}

#[test]
fn bad_plans_say_what_is_wrong() {
    assert_eq!(error(|plan| plan.sizes = vec![0, 0]), "no task has samples to train on");
    assert_eq!(error(|plan| plan.batch_size = 0), "batch_size is 0; wanted at least 1");
    assert_eq!(error(|plan| plan.length = Length::Steps(0)), "steps is 0; wanted at least 1");
    for epochs in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        assert!(error(|plan| plan.length = Length::Epochs(epochs)).contains("wanted a number above 0"));
    }
    assert!(error(|plan| plan.sampling = Sampling::Temperature(0.0)).starts_with("temperature is 0"));
    assert!(error(|plan| plan.ratios = vec![]).contains("wanted one for each task"));
    assert!(error(|plan| plan.ratios = vec![Some(1.5), None]).starts_with("ratio is 1.5"));
    assert!(error(|plan| plan.ratios = vec![Some(1.0), None]).starts_with("the sum of ratios is 1"));
    assert!(error(|plan| plan.sizes[1] = 1 << 32).starts_with("task 1 has 4294967296 samples"));
}

#[test]
fn a_state_of_another_job_is_refused() {
    let mut sampler = Sampler::new(plan(Sampling::Uniform, &[5, 0, 8])).unwrap();
    let state = |steps, draws: &[u64]| SamplerState { steps, draws: draws.to_vec(), difficulties: None };
    sampler.restore(state(1, &[10, 0, 6])).unwrap();
    for wrong in [
        state(1, &[16, 0]),
        state(1, &[10, 1, 5]),
        state(1, &[10, 0, 7]),
        state(2, &[10, 0, 6]),
        state(u64::MAX, &[u64::MAX, 0, u64::MAX]),
        SamplerState { difficulties: Some(vec![1]), ..state(1, &[10, 0, 6]) },
    ] {
        let error = sampler.restore(wrong).unwrap_err().to_string();
        assert!(error.starts_with("the state to resume from is not of this job"), "{error}");
    }
}

fn samplings() -> impl Strategy<Value = Sampling> {
    prop_oneof![
        Just(Sampling::Proportional),
        Just(Sampling::Uniform),
        Just(Sampling::RoundRobin),
        (0.5..4.0).prop_map(Sampling::Temperature),
        Just(Sampling::Annealed),
        Just(Sampling::EvenThenHard),
    ]
}

fn plans() -> impl Strategy<Value = SamplingPlan> {
    let length = prop_oneof![(0.3..4.0).prop_map(Length::Epochs), (1u64..20).prop_map(Length::Steps)];
    let tasks = prop::collection::vec((0usize..12, prop::option::of(0.05..0.3)), 0..3);
    let rest = (samplings(), any::<[bool; 2]>(), 1usize..9, length, any::<u64>());
    (tasks, 1usize..12, rest).prop_map(
        |(tasks, size, (sampling, [one, shuffle], batch_size, length, seed))| {
            let (sizes, ratios) = tasks.into_iter().chain([(size, None)]).unzip();
            let batch_tasks = if one { BatchTasks::One } else { BatchTasks::Mixed };
            SamplingPlan { sampling, batch_tasks, sizes, ratios, batch_size, length, shuffle, seed }
        },
    )
}

proptest! {
    #[test]
    fn a_run_resumed_after_any_batch_goes_on_the_same(plan in plans(), difficulty in 0.1f64..2.0) {
        let next = |sampler: &mut Sampler| {
            if sampler.state().steps == 3 {
                sampler.set_difficulties(&[difficulty]);
            }
            sampler.next_batch()
        };
        let mut whole = Sampler::new(plan.clone()).unwrap();
        let (mut states, mut batches) = (Vec::new(), Vec::new());
        loop {
            states.push(serde_json::to_string(whole.state()).unwrap());
            let Some(batch) = next(&mut whole) else { break };
            batches.push(batch);
        }
        prop_assert_eq!(batches.len() as u64, whole.steps());
        for (done, state) in states.iter().enumerate() {
            let mut resumed = Sampler::new(plan.clone()).unwrap();
            resumed.restore(serde_json::from_str(state).unwrap()).unwrap();
            let rest: Vec<_> = std::iter::from_fn(|| next(&mut resumed)).collect();
            prop_assert_eq!(&rest, &batches[done..]);
            prop_assert_eq!(resumed.seen(), whole.seen());
        }
    }

    #[test]
    fn batches_are_full_and_of_trained_samples(plan in plans()) {
        let batches = batches(plan.clone());
        let single = plan.sizes.iter().filter(|size| **size > 0).count() == 1;
        for (index, batch) in batches.iter().enumerate() {
            prop_assert!(batch.len() == plan.batch_size || single && index + 1 == batches.len());
            prop_assert!(batch.iter().all(|draw| draw.sample < plan.sizes[draw.task]));
        }
    }
}
