//! Cross-entropy and its gradient.

use super::{assert_gradient, bits, to_f64};
use crate::backend::Backend;
use crate::backend::cpu::tests::{Random, backends};
use crate::backend::cpu::{Cpu, Isa};
use crate::backend::training::Training;

fn run(cpu: &mut Cpu, logits: &[f32], targets: &[u32], weights: Option<&[f32]>) -> (Vec<f32>, Vec<f32>) {
    let rows = targets.len();
    let mut buffer = cpu.buffer(rows, logits.len() / rows).unwrap();
    buffer.write(logits);
    let mut losses = vec![9.0];
    cpu.scope(|cpu| cpu.cross_entropy(&mut buffer, targets, weights, &mut losses).unwrap());
    assert_eq!(losses[0], 9.0, "losses are appended");
    (losses[1..].to_vec(), cpu.read(&buffer, rows).unwrap().to_vec())
}

fn exact(logits: &[f64], target: usize) -> f64 {
    let maximum = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = logits.iter().map(|logit| (logit - maximum).exp()).sum();
    sum.ln() + maximum - logits[target]
}

#[test]
fn losses_and_gradients_match_their_formula() {
    let mut random = Random(71);
    for vocabulary in [1, 5, 16, 77, 1000] {
        let rows = 6;
        let mut logits = random.values(rows * vocabulary);
        logits.iter_mut().for_each(|logit| *logit *= 10.0);
        let targets: Vec<u32> = (0..rows).map(|_| random.below(vocabulary) as u32).collect();
        let weights = random.values(rows);
        for mut cpu in backends() {
            let (losses, gradients) = run(&mut cpu, &logits, &targets, Some(&weights));
            let (only_losses, _) = run(&mut cpu, &logits, &targets, None);
            assert_eq!(bits(&losses), bits(&only_losses));
            for row in 0..rows {
                let own = row * vocabulary..(row + 1) * vocabulary;
                let (values, target) = (to_f64(&logits[own.clone()]), targets[row] as usize);
                let wanted = exact(&values, target);
                assert!((f64::from(losses[row]) - wanted).abs() < 1e-6 * (1.0 + wanted), "{vocabulary}");
                assert_gradient("logits", &gradients[own.clone()], &values, &mut random, |logits| {
                    f64::from(weights[row]) * exact(logits, target)
                });
                let alone =
                    run(&mut cpu, &logits[own.clone()], &targets[row..row + 1], Some(&weights[row..row + 1]));
                assert_eq!(alone.0[0].to_bits(), losses[row].to_bits());
                assert_eq!(bits(&alone.1), bits(&gradients[own]));
            }
        }
    }
}

#[test]
fn huge_logits_have_exact_losses() {
    for mut cpu in backends() {
        let logits = [3e38, 0.0, -3e38, f32::NEG_INFINITY, 1000.0, 1000.0, 999.0, -1e30];
        let (losses, gradients) = run(&mut cpu, &logits, &[0, 0], Some(&[1.0, 2.0]));
        let wanted = (2.0 + (-1f64).exp()).ln();
        assert_eq!(losses[0], 0.0);
        assert!((f64::from(losses[1]) - wanted).abs() < 1e-7);
        assert_eq!(gradients[..4], [0.0; 4]);
        assert!((f64::from(gradients[4]) - 2.0 * ((-wanted).exp() - 1.0)).abs() < 1e-6);
        let (losses, _) = run(&mut cpu, &logits[..4], &[1], None);
        assert_eq!(losses, [3e38]);
    }
}

#[test]
fn a_row_that_is_no_number_spoils_no_other() {
    for mut cpu in backends() {
        let (losses, gradients) =
            run(&mut cpu, &[f32::NAN, 1.0, 1.0, 1.0, 1.0, f32::NAN], &[0, 0, 0], Some(&[1.0; 3]));
        assert!(losses[0].is_nan() && losses[2].is_nan(), "{losses:?}");
        assert!(gradients[..2].iter().chain(&gradients[4..]).all(|g| g.is_nan()), "{gradients:?}");
        assert!((losses[1] - 2f32.ln()).abs() < 1e-6 && gradients[2..4] == [-0.5, 0.5]);
    }
}

#[test]
fn threads_change_no_bits_of_a_loss() {
    let mut random = Random(72);
    let logits = random.values(64 * 5000);
    let targets: Vec<u32> = (0..64).map(|_| random.below(5000) as u32).collect();
    for isa in Isa::available() {
        let [one, two] = [1, 2].map(|threads| {
            run(&mut Cpu::with_isa(isa, Some(threads)).unwrap(), &logits, &targets, Some(&[0.1; 64]))
        });
        assert!(one == two);
    }
}
