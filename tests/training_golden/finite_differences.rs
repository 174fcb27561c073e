//! Gradients against differences of losses, for every tensor of adapters that change everything there is.
//!
//! With `d` of norm 1, `(L(θ + h d) − L(θ − h d)) / 2h` is the derivative along `d`, the gradient's product with `d`.

use loramux::adapter::peft::BaseWeights;
use loramux::adapter::{Adapter, Fresh, all_linear, fresh_adapter, named_sites};
use loramux::backend::cpu::Isa;
use loramux::backend::sampling::Philox;
use loramux::backend::training::{PairValues, Part};
use loramux::tensor::Tensor;

use crate::case::{Case, Sample, cases};
use crate::trainer::{StepRows, Trainer, WHOLE};

/// Of the gradient's norm. Rounding of the losses moves the quotient by about 1e-3 of it, the curvature by less.
const TOLERANCE: f64 = 1e-2;

/// What a step changes the loss by along the gradient, about.
const CHANGE: f64 = 1e-3;

/// Numbers in (−1, 1) by stream.
struct Random(Philox);

impl Random {
    fn numbers(&self, stream: u64, count: usize) -> Vec<f32> {
        let number = |position| (self.0.bits(stream, position) >> 40) as f32 / (1 << 23) as f32 - 1.0;
        (0..count as u64).map(number).collect()
    }
}

/// A fresh adapter with random numbers in place of the zeros, and other magnitudes than the base's norms.
fn adapter(case: &Case, sites: &[usize], use_dora: bool) -> Adapter {
    let table = &case.base.checkpoint.sites().table;
    let fresh = Fresh { rank: 3, alpha: 4.5, use_rslora: true, use_dora, seed: 5 };
    let mut adapter = fresh_adapter(table, sites, &fresh, &case.base.checkpoint).unwrap();
    let random = Random(Philox::new(9));
    for (stream, site) in adapter.sites.iter_mut().enumerate() {
        for (part, values) in [&mut site.a, &mut site.b].into_iter().enumerate() {
            let mut random = random.numbers((2 * stream + part) as u64, values.len());
            random.iter_mut().for_each(|value| *value *= 0.3);
            let sum: Vec<f32> =
                values.to_f32().iter().zip(random).map(|(one, more)| 0.3 * one + more).collect();
            *values = Tensor::from_f32(values.shape().to_vec(), &sum);
        }
        if let Some(magnitude) = &mut site.magnitude {
            let random = random.numbers(1000 + stream as u64, magnitude.len());
            magnitude.iter_mut().zip(random).for_each(|(value, random)| *value *= 1.0 + 0.3 * random);
        }
    }
    adapter
}

/// `‖W + s B A‖` of every row.
fn norms(weight: &Tensor, scale: f32, rank: usize, values: &PairValues) -> Vec<f64> {
    let width = weight.shape()[1];
    let row = |(row, weight): (usize, &[f32])| {
        let element = |(column, weight): (usize, &f32)| {
            let terms = (0..rank)
                .map(|r| f64::from(values.b[row * rank + r]) * f64::from(values.a[r * width + column]));
            (f64::from(*weight) + f64::from(scale) * terms.sum::<f64>()).powi(2)
        };
        weight.iter().enumerate().map(element).sum::<f64>().sqrt()
    };
    weight.to_f32().chunks_exact(width).enumerate().map(row).collect()
}

/// The tensor `part` of a pair: A, B or the magnitude.
fn tensor(values: &mut PairValues, part: usize) -> &mut Vec<f32> {
    [&mut values.a, &mut values.b, &mut values.magnitude].into_iter().nth(part).unwrap()
}

/// Checks every tensor of an adapter that trains beside another.
fn check(case: &Case, adapter: &Adapter, beside: &Adapter, label: &str) {
    let samples: Vec<&Sample> = case.jobs[0].steps[0].samples.iter().take(2).collect();
    let labelled: usize = samples.iter().map(|sample| sample.targets().count()).sum();
    let weight = 1.0 / labelled as f32;
    let batch: Vec<_> =
        [0, 1].into_iter().flat_map(|slot| samples.iter().map(move |&s| (slot, 0, weight, s))).collect();
    let rows = 2 * samples.iter().map(|sample| sample.tokens.len()).sum::<usize>();
    let mut trainer = Trainer::new(&case.base, rows, batch.len(), WHOLE, Isa::available()[0]);
    trainer.start(beside, 0.0);
    trainer.start(adapter, 0.0);
    trainer.learn(&batch);
    let gradients = trainer.read(1, Part::Gradients);
    let weights = trainer.read(1, Part::Weights);
    let own = StepRows::new(&trainer.transformer, &batch[samples.len()..]);
    let mut loss = |values: &[PairValues]| {
        let Trainer { backend, transformer, tape, trainees, .. } = &mut trainer;
        let trainee = trainees[1].as_mut().unwrap();
        transformer.write_part(backend, 1, trainee, Part::Weights, values).unwrap();
        let mut losses = Vec::new();
        transformer.assess(backend, &own.batch(), tape, &mut losses).unwrap();
        losses.iter().map(|&loss| f64::from(loss) * f64::from(weight)).sum::<f64>()
    };
    let random = Random(Philox::new(17));
    for (pair, site) in adapter.sites.iter().enumerate() {
        let module = &case.base.checkpoint.sites().table.get(site.site).module;
        for part in 0..if site.magnitude.is_some() { 3 } else { 2 } {
            let gradient = tensor(&mut gradients[pair].clone(), part).clone();
            let dot = |one: &[f32], other: &[f32]| {
                one.iter().zip(other).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>()
            };
            let norm = dot(&gradient, &gradient).sqrt();
            assert!(norm > 1e-4, "{label} {module}: a gradient of {norm} says nothing");
            // Half along the gradient, so that the derivative is not small.
            let random = random.numbers((3 * pair + part) as u64, gradient.len());
            let size = dot(&random, &random).sqrt();
            let both = gradient.iter().zip(&random);
            let mut direction: Vec<f32> =
                both.map(|(g, r)| (f64::from(*g) / norm + f64::from(*r) / size) as f32).collect();
            let size = dot(&direction, &direction).sqrt() as f32;
            direction.iter_mut().for_each(|value| *value /= size);

            let h = (CHANGE / norm).min(0.03);
            let mut moved = |h: f64| {
                let mut values = weights.clone();
                for (value, d) in tensor(&mut values[pair], part).iter_mut().zip(&direction) {
                    *value += h as f32 * d;
                }
                // DoRA takes the norm for a constant: the magnitude keeps `m / ‖W + s B A‖` as it is.
                if site.magnitude.is_some() && part < 2 {
                    let base = case.base.checkpoint.weight(site.site);
                    let before = norms(&base, site.scale, site.rank, &weights[pair]);
                    let after = norms(&base, site.scale, site.rank, &values[pair]);
                    for (value, (before, after)) in
                        values[pair].magnitude.iter_mut().zip(before.iter().zip(after))
                    {
                        *value = (f64::from(*value) * after / before) as f32;
                    }
                }
                loss(&values)
            };
            let quotient = (moved(h) - moved(-h)) / (2.0 * h);
            let wanted = dot(&gradient, &direction);
            let off = (quotient - wanted).abs() / norm;
            assert!(
                off < TOLERANCE,
                "{label} {module} part {part}: {quotient} along a direction, not {wanted}"
            );
        }
    }
}

#[test]
fn gradients_are_the_derivatives_of_losses() {
    cases(|case| {
        let table = &case.base.checkpoint.sites().table;
        let names = ["embed_tokens", "lm_head"].map(str::to_owned);
        let mut everything = named_sites(table, &names).unwrap();
        everything.extend(all_linear(table));
        everything.sort_unstable();
        let linear: Vec<usize> = everything[1..].to_vec();
        assert_eq!(everything.len(), table.len(), "{}", case.family);
        let (lora, dora) = (adapter(case, &everything, false), adapter(case, &linear, true));
        check(case, &lora, &dora, &format!("{} LoRA", case.family));
        check(case, &dora, &lora, &format!("{} DoRA", case.family));
    });
}
