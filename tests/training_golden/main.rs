//! Training against transformers + PEFT + torch.optim.AdamW, and against itself: every family, all its jobs in one batch.

mod adapters;
mod case;
#[path = "../common/mod.rs"]
mod common;
mod finite_differences;
mod trainer;

use case::{Case, Differences, Job, SIGNS, cases};
use loramux::adapter::Adapter;
use loramux::backend::cpu::Isa;
use loramux::backend::training::PairValues;
use loramux::model::Recompute;
use loramux::tensor::Tensor;
use trainer::{Run, Trained, WHOLE, Way, train};

const LOSS: f64 = 1e-5;
/// Of a gradient's norm.
const GRADIENT: f64 = 1e-5;
const GRADIENT_NORM: f64 = 1e-4;
const WEIGHT: f64 = 2e-5;
/// What rounding does to an element of a gradient, of the root mean square of all: PyTorch's own gradients of these
/// cases in f32 are off by 2.9e-6 to 8.2e-6 from those in f64, at the worst element of a job.
const ROUNDING: f64 = 5e-6;

fn all(case: &Case) -> Vec<Run<'_>> {
    case.jobs.iter().map(Run::from).collect()
}

fn norm(values: &[f32]) -> f64 {
    values.iter().map(|&value| f64::from(value) * f64::from(value)).sum::<f64>().sqrt()
}

/// How far rounding can move each element by AdamW. The first update is `lr · g / |g|`: an error of `g` counts as its
/// share of `g`, which is large where `g` happens to be nearly 0. Where such an element moves, the gradients of its rank
/// in the pair's other matrix change by as large a share as the element has of its own.
fn moved_by_rounding(adapter: &Adapter, trained: &Trained, lr: f64) -> Vec<PairValues> {
    let own = |gradient: &Vec<f32>| -> Vec<f32> {
        let error = ROUNDING * norm(gradient) / (gradient.len() as f64).sqrt();
        let share = |&g: &f32| if g == 0.0 { 0.0 } else { (error / f64::from(g.abs())).min(2.0) };
        gradient.iter().map(|g| (lr * share(g)) as f32).collect()
    };
    let largest = |moved: &[f32]| moved.iter().fold(0f64, |most, &moved| most.max(f64::from(moved)));
    let pairs = adapter.sites.iter().zip(&trained.first_gradients).zip(&trained.weights);
    pairs
        .map(|((site, gradients), weights)| {
            let rank = site.a.shape()[0];
            let column =
                |b: &[f32], r: usize| -> Vec<f32> { b.iter().skip(r).step_by(rank).copied().collect() };
            let [a, b, magnitude] = [&gradients.a, &gradients.b, &gradients.magnitude].map(own);
            let mut moved = PairValues { a: a.clone(), b: b.clone(), magnitude };
            let width = a.len() / rank;
            for r in 0..rank {
                let row = r * width..(r + 1) * width;
                let (of_a, of_b) = (largest(&a[row.clone()]), largest(&column(&b, r)));
                let share = |moved: f64, of: &[f32]| {
                    let size = norm(of) / (of.len() as f64).sqrt();
                    (lr * if moved == 0.0 { 0.0 } else { (moved / size).min(2.0) }) as f32
                };
                let by_b = share(of_b, &column(&weights.b, r));
                let by_a = share(of_a, &weights.a[row.clone()]);
                moved.a[row].iter_mut().for_each(|moved| *moved += by_b);
                moved.b.iter_mut().skip(r).step_by(rank).for_each(|moved| *moved += by_a);
            }
            moved
        })
        .collect()
}

#[test]
fn jobs_train_in_one_batch_as_each_alone_with_peft() {
    cases(|case| {
        for isa in Isa::available() {
            let trained = train(case, &all(case), 0.0, WHOLE, isa);
            let mut worst = [0f64; 4];
            for (job, trained) in case.jobs.iter().zip(&trained) {
                let label = format!("{} {} {isa:?}", case.family, job.name);
                assert_eq!(job.steps.len(), trained.losses.len(), "{label}");
                let moved = moved_by_rounding(&job.initial, trained, job.optimizer.lr);
                let moved = case.tensors(&job.initial, &moved);
                let found = trained.losses.iter().zip(&trained.grad_norms);
                for (index, (step, (loss, grad_norm))) in job.steps.iter().zip(found).enumerate() {
                    let off = [(step.loss - loss).abs(), (step.grad_norm - grad_norm).abs() / step.grad_norm];
                    worst[0] = worst[0].max(off[0]);
                    worst[1] = worst[1].max(off[1]);
                    let wanted = step.grad_norm;
                    assert!(off[0] <= LOSS, "{label} step {index}: loss {loss}, wanted {}", step.loss);
                    assert!(
                        off[1] <= GRADIENT_NORM,
                        "{label} step {index}: gradient norm {grad_norm}, wanted {wanted}"
                    );
                }
                let gradients = case.tensors(&job.initial, &trained.first_gradients);
                job.gradients.compare(&gradients, |name, ours, differences| {
                    let off = differences.norm() / norm(ours);
                    worst[2] = worst[2].max(off);
                    assert!(off <= GRADIENT, "{label} {name}: gradient off by {off} of its norm");
                });
                let weights = case.tensors(&job.initial, &trained.weights);
                job.weights.compare(&weights, |name, _, differences| {
                    let moved = moved[name].clone();
                    let (differences, moved) = match differences {
                        Differences::Elements(differences) => (differences, moved),
                        // As many signs are as likely one as the other.
                        Differences::Projections(differences) => {
                            (differences, vec![4.0 * norm(&moved) as f32; SIGNS])
                        }
                    };
                    for (index, (off, moved)) in differences.iter().zip(moved).enumerate() {
                        worst[3] = worst[3].max(off.abs());
                        assert!(
                            off.abs() <= WEIGHT + f64::from(moved),
                            "{label} {name} {index}: off by {off} after training"
                        );
                    }
                });
            }
            let [loss, grad_norm, gradient, weight] = worst;
            println!(
                "{} {isa:?}: at most off by loss {loss:.1e}, gradient norm {grad_norm:.1e}, gradients {gradient:.1e}, \
                 weights {weight:.1e}",
                case.family
            );
        }
    });
}

/// Trains all jobs of every case in some ways, with dropout, and compares every bit with the plain way.
fn assert_same_bits(ways: &[Way]) {
    cases(|case| {
        let isa = Isa::available()[0];
        let plain = train(case, &all(case), 0.1, WHOLE, isa);
        for &way in ways {
            let other = train(case, &all(case), 0.1, way, isa);
            for (job, (plain, other)) in case.jobs.iter().zip(plain.iter().zip(&other)) {
                plain.assert_same_bits(other, &format!("{} {} {way:?}", case.family, job.name));
            }
        }
    });
}

#[test]
fn what_is_computed_again_has_the_same_bits() {
    assert_same_bits(&[Recompute::Mlp, Recompute::Block].map(|recompute| Way { recompute, ..WHOLE }));
}

#[test]
fn steps_cut_into_several_passes_have_the_same_bits() {
    let few = Way { samples: 5, logit_rows: 7, recompute: Recompute::Block, ..WHOLE };
    assert_same_bits(&[Way { samples: 1, ..WHOLE }, few]);
}

#[test]
fn logits_of_few_rows_at_a_time_have_the_same_bits() {
    assert_same_bits(&[1, 13].map(|logit_rows| Way { logit_rows, ..WHOLE }));
}

#[test]
fn any_number_of_threads_has_the_same_bits() {
    assert_same_bits(&[1, 3].map(|threads| Way { threads, ..WHOLE }));
}

#[test]
fn promise_3_an_adapter_trains_to_the_same_bits_alone_and_beside_others() {
    cases(|case| {
        let isa = Isa::available()[0];
        let together = train(case, &all(case), 0.1, WHOLE, isa);
        for (job, together) in case.jobs.iter().zip(&together) {
            let alone = train(case, &[job.into()], 0.1, WHOLE, isa).remove(0);
            alone.assert_same_bits(together, &format!("{} {}", case.family, job.name));
        }
    });
}

#[test]
fn promise_5_a_job_that_is_not_finite_leaves_the_others_as_they_are() {
    let isa = Isa::available()[0];
    cases(|case| {
        for (value, part) in [(f32::NAN, 0), (f32::INFINITY, 1)] {
            let mut broken = case.jobs[1].initial.clone();
            for site in &mut broken.sites {
                let tensor = [&mut site.a, &mut site.b].into_iter().nth(part).unwrap();
                let mut values = tensor.to_f32();
                values[3] = value;
                *tensor = Tensor::from_f32(tensor.shape().to_vec(), &values);
            }
            let Job { name, optimizer, steps, .. } = &case.jobs[1];
            let broken = Run { adapter: &broken, optimizer, steps };
            let runs: Vec<Run> =
                case.jobs.iter().map(|job| if job.name == *name { broken } else { job.into() }).collect();
            let trained = train(case, &runs, 0.0, WHOLE, isa);
            let whole = train(case, &all(case), 0.0, WHOLE, isa);
            for (job, (one, other)) in case.jobs.iter().zip(trained.iter().zip(&whole)) {
                let label = format!("{} {}", case.family, job.name);
                if job.name == *name {
                    assert!(
                        one.grad_norms.iter().all(|norm| !norm.is_finite()),
                        "{label}: {:?}",
                        one.grad_norms
                    );
                } else {
                    one.assert_same_bits(other, &label);
                }
            }
        }
    });
}
