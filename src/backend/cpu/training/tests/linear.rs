//! Linear layers backward against finite differences.

use super::reference::{Change, Exact, ExactChange, ExactPair, Problem, mask, random_pair};
use super::{TOLERANCE, assert_gradient, to_f64};
use crate::backend::ExpertWeights;
use crate::backend::cpu::Isa;
use crate::backend::cpu::tests::{Random, backends};
use crate::backend::cpu::training::dropout;

const RANKS: [usize; 6] = [1, 3, 8, 16, 17, 40];

/// What the slots of a problem are.
#[derive(Clone, Copy, PartialEq)]
pub enum Kind {
    Trained,
    TrainedDora,
    Loaded,
    LoadedDora,
    Replaced,
    Empty,
}

/// A group of random widths; runs of rows that use no slot, one, or two with gates other than 1.
pub fn random_problem(
    random: &mut Random,
    kinds: &[Kind],
    sites: usize,
    dropout: f32,
    rows: usize,
) -> Problem {
    let k = [1, 7, 24, 33, 70, 130][random.below(6)];
    let weights: Vec<_> = (0..sites)
        .map(|_| {
            let (out, dtype) = ([1, 5, 16, 31, 49, 100][random.below(6)], random.dtype());
            random.tensor([out, k], dtype)
        })
        .collect();
    let biases =
        weights.iter().map(|w| (random.below(2) == 0).then(|| random.values(w.shape()[0]))).collect();
    let slots: Vec<Vec<Option<Change>>> = kinds
        .iter()
        .map(|&kind| (0..sites).map(|site| random_change(random, kind, &weights[site], site)).collect())
        .collect();
    let mut entries = Vec::new();
    while entries.len() < rows {
        let lone = random.below(kinds.len()) as u32;
        let mixable: Vec<u32> =
            (0..kinds.len() as u32).filter(|&slot| kinds[slot as usize] != Kind::Replaced).collect();
        let second = mixable[random.below(mixable.len())];
        let set: Vec<(u32, f32)> = match random.below(4) {
            0 => vec![],
            1 | 2 => vec![(lone, 1.0)],
            _ if kinds[lone as usize] == Kind::Replaced || lone == second => vec![(lone, 1.0)],
            _ => vec![(lone, random.value()), (second, [0.0, 0.7][random.below(2)])],
        };
        let count = [1, 2, 5, 9][random.below(4)].min(rows - entries.len());
        for _ in 0..count {
            // Rows of a run have gates of their own.
            let gate =
                |gate: f32| if gate == 1.0 || gate == 0.0 { gate } else { gate + 0.5 * random.value() };
            let (slots, gates): (Vec<u32>, Vec<f32>) = set.iter().copied().unzip();
            entries.push(slots.into_iter().zip(gates.into_iter().map(gate)).collect());
        }
    }
    let width: usize = weights.iter().map(|weight| weight.shape()[0]).sum();
    Problem {
        k,
        biases,
        slots,
        dropout: vec![dropout; kinds.len()],
        row_keys: (0..rows).map(|_| random.next()).collect(),
        x: random.values(rows * k),
        dy: random.values(rows * width),
        entries,
        weights,
    }
}

fn random_change(
    random: &mut Random,
    kind: Kind,
    weight: &crate::tensor::Tensor,
    site: usize,
) -> Option<Change> {
    let (out, k) = (weight.shape()[0], weight.shape()[1]);
    let rank = RANKS[random.below(RANKS.len())];
    match kind {
        // A slot need not change every site.
        _ if random.below(6) == 0 => None,
        Kind::Empty => None,
        Kind::Trained | Kind::TrainedDora => {
            Some(Change::Trained(random_pair(random, weight, site, rank, kind == Kind::TrainedDora)))
        }
        Kind::Loaded | Kind::LoadedDora => {
            let (a, b) = (random.dtype(), random.dtype());
            Some(Change::Loaded(ExpertWeights {
                a: random.tensor([rank, k], a),
                b: random.tensor([out, rank], b),
                scale: 0.5 + random.value().abs(),
                bias: (random.below(2) == 0).then(|| random.values(out)),
                column_scale: (kind == Kind::LoadedDora).then(|| random.values(out)),
            }))
        }
        Kind::Replaced => {
            let dtype = random.dtype();
            Some(Change::Replaced(random.tensor([out, k], dtype)))
        }
    }
}

fn pair_mut(exact: &mut Exact, slot: usize, site: usize) -> &mut ExactPair {
    match &mut exact.slots[slot][site] {
        Some(ExactChange::LowRank(pair)) => pair,
        _ => panic!("a pair is trained there"),
    }
}

/// Holds outputs and all gradients of a problem against its f64 twin, on every instruction set.
fn check(case: usize, problem: &Problem, random: &mut Random) {
    let exact = Exact::new(problem);
    let (rows, k, width) = (problem.rows(), problem.k, problem.width());
    for mut cpu in backends() {
        let results = problem.run(&mut cpu, &[], true);
        let what = |name: &str| format!("case {case}, {}: {name}", cpu.isa().name());
        let mut gate = 0;
        for row in 0..rows {
            for (n, wanted) in exact.row(row).into_iter().enumerate() {
                let error = (f64::from(results.y[row * width + n]) - wanted).abs() / (1.0 + wanted.abs());
                assert!(error < TOLERANCE, "{}", what(&format!("y of row {row}, column {n}: {error}")));
            }
            let mut moved = exact.clone();
            let own = row * k..(row + 1) * k;
            assert_gradient(&what("dx"), &results.dx[own.clone()], &exact.x[own.clone()], random, |x| {
                moved.x[own.clone()].copy_from_slice(x);
                moved.loss(row..row + 1)
            });
            let gates: Vec<f64> = exact.entries[row].iter().map(|entry| entry.1).collect();
            let got = &results.gates[gate..gate + gates.len()];
            gate += gates.len();
            let mut moved = exact.clone();
            assert_gradient(&what("gates"), got, &gates, random, |gates| {
                moved.entries[row].iter_mut().zip(gates).for_each(|(entry, gate)| entry.1 = *gate);
                moved.loss(row..row + 1)
            });
        }
        for (slot, gradients) in results.gradients.iter().enumerate() {
            let pairs = problem.pairs(slot);
            assert_eq!(pairs.len(), gradients.len());
            for (pair, gradient) in pairs.iter().zip(gradients) {
                let crate::backend::SitePlace::Group(_, site) = pair.place else { panic!("no table here") };
                let name = |part: &str| what(&format!("{part} of slot {slot}, site {site}"));
                let values = &pair.weights;
                let mut moved = exact.clone();
                assert_gradient(&name("A"), &gradient.a, &to_f64(&values.a), random, |a| {
                    pair_mut(&mut moved, slot, site).a.copy_from_slice(a);
                    moved.loss(0..rows)
                });
                let mut moved = exact.clone();
                assert_gradient(&name("B"), &gradient.b, &to_f64(&values.b), random, |b| {
                    pair_mut(&mut moved, slot, site).b.copy_from_slice(b);
                    moved.loss(0..rows)
                });
                let mut moved = exact.clone();
                let magnitude = to_f64(&values.magnitude);
                assert_gradient(&name("magnitude"), &gradient.magnitude, &magnitude, random, |m| {
                    pair_mut(&mut moved, slot, site).magnitude.copy_from_slice(m);
                    moved.loss(0..rows)
                });
            }
        }
    }
}

#[test]
fn linear_gradients_match_finite_differences() {
    let mut random = Random(21);
    for case in 0..8 {
        let kinds = [Kind::Trained, Kind::Loaded, Kind::Trained, Kind::Empty, Kind::Replaced];
        let problem = random_problem(&mut random, &kinds, 1 + case % 3, 0.0, 20);
        check(case, &problem, &mut random);
    }
}

#[test]
fn dora_gradients_match_finite_differences_with_a_constant_norm() {
    let mut random = Random(22);
    for case in 0..6 {
        let kinds = [Kind::TrainedDora, Kind::Trained, Kind::LoadedDora];
        let problem = random_problem(&mut random, &kinds, 1 + case % 2, 0.0, 16);
        check(case, &problem, &mut random);
    }
}

#[test]
fn dropout_has_the_same_mask_forward_and_backward() {
    let mut random = Random(23);
    for case in 0..6 {
        let kinds = [Kind::Trained, Kind::TrainedDora, Kind::Loaded];
        let problem = random_problem(&mut random, &kinds, 1 + case % 3, 0.3, 12);
        check(case, &problem, &mut random);
    }
}

#[test]
fn dropout_drops_its_share_at_every_place_by_another_mask() {
    let k = 4003;
    let factors = |key: u64, place: u32, probability: f32| {
        let [mut factors, mut dropped] = [0; 2].map(|_| vec![9f32; k]);
        let x: Vec<f32> = (0..k).map(|i| 1.0 + i as f32).collect();
        dropout::drop_row(Isa::available()[0], key, place, probability, &x, &mut factors, &mut dropped);
        assert!(dropped.iter().zip(&x).zip(&factors).all(|((dropped, x), factor)| *dropped == x * factor));
        factors
    };
    for probability in [0.05f32, 0.3, 0.75] {
        let drawn = factors(7, 5, probability);
        assert!(drawn.iter().all(|&f| f == 0.0 || f == 1.0 / (1.0 - probability)));
        let dropped = drawn.iter().filter(|&&f| f == 0.0).count() as f32;
        let deviation = (probability * (1.0 - probability) * k as f32).sqrt();
        assert!((dropped - probability * k as f32).abs() < 4.0 * deviation, "{dropped} at {probability}");
        for (got, wanted) in to_f64(&drawn).iter().zip(mask(7, 5, probability, k)) {
            assert!((got - wanted).abs() < 1e-6, "as defined");
        }
        assert_ne!(drawn, factors(7, 6, probability), "another place");
        assert_ne!(drawn, factors(8, 5, probability), "another row");
    }
    let place = |group, site| dropout::place_number(crate::backend::SitePlace::Group(group, site));
    let mut places: Vec<u32> =
        (0..600).flat_map(|group| (0..3).map(move |site| place(group, site))).collect();
    places.push(dropout::place_number(crate::backend::SitePlace::Table));
    places.sort_unstable();
    places.dedup();
    assert_eq!(places.len(), 1801);
}
