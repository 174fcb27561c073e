//! AdamW, and that a slot always holds what its trainee has learnt.

use super::reference::{Change, GROUP, Problem, norms, random_pair};
use super::{bits, to_f64};
use crate::adapter::{Adapter, SiteAdapter};
use crate::backend::cpu::tests::{Random, backends};
use crate::backend::cpu::{Cpu, Group, Isa, Site, Trainee};
use crate::backend::training::{AdamW, PairValues, Part, Training};
use crate::backend::{Backend, SitePlace, Write};
use crate::tensor::Tensor;

const STEP: AdamW = AdamW {
    lr: 3e-3,
    lr_b: 12e-3,
    weight_decay: 0.05,
    betas: [0.9, 0.999],
    eps: 1e-8,
    step: 1,
    gradient_scale: 0.7,
};

/// One slot with pairs at all sites, some of them with a magnitude, and rows that use it.
fn problem(random: &mut Random, k: usize, widths: &[usize]) -> Problem {
    let weights: Vec<Tensor> = widths
        .iter()
        .map(|&out| {
            let dtype = random.dtype();
            random.tensor([out, k], dtype)
        })
        .collect();
    let pairs = weights.iter().enumerate().map(|(site, weight)| {
        let rank = [1, 3, 8, 16, 17, 40][random.below(6)];
        Some(Change::Trained(random_pair(random, weight, site, rank, site % 2 == 1)))
    });
    let slots = vec![pairs.collect()];
    let (rows, width) = (5, widths.iter().sum::<usize>());
    Problem {
        k,
        biases: vec![None; widths.len()],
        weights,
        slots,
        dropout: vec![0.0],
        entries: vec![vec![(0, 1.0)]; rows],
        row_keys: vec![1; rows],
        x: random.values(rows * k),
        dy: random.values(rows * width),
    }
}

fn random_values(random: &mut Random, like: &PairValues) -> PairValues {
    PairValues {
        a: random.values(like.a.len()),
        b: random.values(like.b.len()),
        magnitude: random.values(like.magnitude.len()),
    }
}

/// A trainee with the groups and the table that hold its slot.
struct Placed {
    groups: Vec<Group>,
    table: Site,
    trainee: Trainee,
}

impl Placed {
    fn new(cpu: &mut Cpu, problem: &Problem) -> Self {
        let (groups, table, mut trainees) = problem.set_up(cpu);
        Self { groups, table, trainee: trainees[0].take().unwrap() }
    }

    fn write(&mut self, cpu: &mut Cpu, part: Part, values: &[PairValues]) {
        let Self { groups, table, trainee } = self;
        cpu.scope(|cpu| cpu.write_part(groups, table, 0, trainee, part, values).unwrap());
    }

    fn step(&mut self, cpu: &mut Cpu, step: &AdamW) {
        let Self { groups, table, trainee } = self;
        cpu.scope(|cpu| cpu.adamw(groups, table, 0, trainee, step).unwrap());
    }

    fn outputs(&self, cpu: &mut Cpu, problem: &Problem) -> Vec<f32> {
        let mut x = cpu.buffer(problem.rows(), problem.k).unwrap();
        let mut y = cpu.buffer(problem.rows(), problem.width()).unwrap();
        x.write(&problem.x);
        cpu.linear(&self.groups[GROUP], &x, &problem.gates(), Write::Replace, &mut y).unwrap();
        cpu.read(&y, problem.rows()).unwrap().to_vec()
    }
}

/// torch.optim.AdamW on one number, in f64.
fn adamw(p: &mut f64, g: f64, m: &mut f64, v: &mut f64, step: &AdamW, lr: f64) {
    let [b1, b2] = step.betas;
    *p *= 1.0 - lr * step.weight_decay;
    *m = b1 * *m + (1.0 - b1) * g;
    *v = b2 * *v + (1.0 - b2) * g * g;
    let [c1, c2] = [b1, b2].map(|beta| 1.0 - beta.powi(step.step as i32));
    *p -= lr / c1 * *m / (v.sqrt() / c2.sqrt() + step.eps);
}

#[test]
fn adamw_follows_its_formula_step_by_step() {
    let mut random = Random(81);
    for betas in [[0.9, 0.999], [0.3, 0.95]] {
        let problem = problem(&mut random, 21, &[5, 33, 16]);
        let pairs = problem.pairs(0);
        for mut cpu in backends() {
            let mut placed = Placed::new(&mut cpu, &problem);
            let all = |values: &PairValues| to_f64(&[&values.a[..], &values.b, &values.magnitude].concat());
            let mut weights: Vec<Vec<f64>> = pairs.iter().map(|pair| all(&pair.weights)).collect();
            let mut first: Vec<Vec<f64>> = weights.iter().map(|w| vec![0.0; w.len()]).collect();
            let mut second = first.clone();
            for number in 1..=4 {
                let step = AdamW { step: number, betas, ..STEP };
                let gradients: Vec<_> =
                    pairs.iter().map(|p| random_values(&mut random, &p.weights)).collect();
                placed.write(&mut cpu, Part::Gradients, &gradients);
                placed.step(&mut cpu, &step);
                for (index, gradient) in gradients.iter().enumerate() {
                    let (a, b) = (gradient.a.len(), gradient.a.len() + gradient.b.len());
                    for (i, g) in all(gradient).into_iter().enumerate() {
                        let lr = if (a..b).contains(&i) { step.lr_b } else { step.lr };
                        let g = g * f64::from(step.gradient_scale);
                        let (p, m, v) = (&mut weights[index][i], &mut first[index][i], &mut second[index][i]);
                        adamw(p, g, m, v, &step, lr);
                    }
                }
                for (part, wanted) in
                    [(Part::Weights, &weights), (Part::FirstMoments, &first), (Part::SecondMoments, &second)]
                {
                    for (got, wanted) in cpu.read_part(&placed.trainee, part).unwrap().iter().zip(wanted) {
                        for (got, wanted) in all(got).iter().zip(wanted) {
                            assert!(
                                (got - wanted).abs() < 1e-6 * (0.1 + wanted.abs()),
                                "{part:?}: {got} for {wanted}"
                            );
                        }
                    }
                }
                let left = cpu.read_part(&placed.trainee, Part::Gradients).unwrap();
                assert!(
                    left.iter().all(|values| all(values).iter().all(|&g| g == 0.0)),
                    "gradients are 0 afterwards"
                );
            }
        }
    }
}

#[test]
fn parts_are_read_as_they_were_written() {
    let mut random = Random(82);
    let problem = problem(&mut random, 10, &[7, 20]);
    for mut cpu in backends() {
        let mut placed = Placed::new(&mut cpu, &problem);
        let at_first = cpu.read_part(&placed.trainee, Part::Weights).unwrap();
        let given: Vec<PairValues> = problem.pairs(0).iter().map(|pair| pair.weights.clone()).collect();
        assert_eq!(at_first, given);
        for part in [Part::Weights, Part::Gradients, Part::FirstMoments, Part::SecondMoments] {
            let values: Vec<_> = given.iter().map(|like| random_values(&mut random, like)).collect();
            placed.write(&mut cpu, part, &values);
            assert_eq!(cpu.read_part(&placed.trainee, part).unwrap(), values, "{part:?}");
        }
        cpu.clear_gradients(&mut placed.trainee).unwrap();
        let cleared = cpu.read_part(&placed.trainee, Part::Gradients).unwrap();
        assert!(cleared.iter().all(|values| values.a.iter().chain(&values.b).all(|&g| g == 0.0)));
    }
}

/// The slot's outputs are those of an adapter on disk with the same weights.
#[test]
fn a_slot_holds_what_its_trainee_has_learnt() {
    let mut random = Random(83);
    for _ in 0..4 {
        let problem = problem(&mut random, 50, &[40, 33, 17, 64]);
        for mut cpu in backends() {
            let mut placed = Placed::new(&mut cpu, &problem);
            for number in 0..4 {
                if number == 2 {
                    let like = cpu.read_part(&placed.trainee, Part::Weights).unwrap();
                    let values: Vec<_> = like.iter().map(|like| random_values(&mut random, like)).collect();
                    placed.write(&mut cpu, Part::Weights, &values);
                } else if number > 0 {
                    let like = cpu.read_part(&placed.trainee, Part::Weights).unwrap();
                    let gradients: Vec<_> =
                        like.iter().map(|like| random_values(&mut random, like)).collect();
                    placed.write(&mut cpu, Part::Gradients, &gradients);
                    placed.step(&mut cpu, &AdamW { step: number, ..STEP });
                }
                let weights = cpu.read_part(&placed.trainee, Part::Weights).unwrap();
                let got = placed.outputs(&mut cpu, &problem);
                let mut loaded = problem.set_up(&mut cpu).0;
                let widths = cpu.loader(&loaded, &placed.table).unwrap();
                let changes = Cpu::lay_out(&widths, as_changes(&problem, &weights)).unwrap();
                cpu.insert_expert(&mut loaded, &mut placed.table, 0, changes).unwrap();
                std::mem::swap(&mut loaded, &mut placed.groups);
                let wanted = placed.outputs(&mut cpu, &problem);
                std::mem::swap(&mut loaded, &mut placed.groups);
                let plain = problem.out(0);
                for (got, wanted) in got.chunks(problem.width()).zip(wanted.chunks(problem.width())) {
                    assert_eq!(
                        bits(&got[..plain]),
                        bits(&wanted[..plain]),
                        "without a magnitude bit for bit"
                    );
                    for (got, wanted) in got.iter().zip(wanted) {
                        assert!((got - wanted).abs() < 1e-5 * (1.0 + wanted.abs()), "{got} for {wanted}");
                    }
                }
            }
        }
    }
}

/// What an adapter with these weights changes, as it is read from disk.
fn as_changes(problem: &Problem, weights: &[PairValues]) -> Vec<(SitePlace, crate::backend::SiteChange)> {
    let pairs = problem.pairs(0);
    let sites = pairs.iter().zip(weights).enumerate().map(|(site, (pair, weights))| SiteAdapter {
        site,
        rank: pair.rank,
        scale: pair.scale,
        a: Tensor::from_f32(vec![pair.rank, problem.k], &weights.a),
        b: Tensor::from_f32(vec![problem.out(site), pair.rank], &weights.b),
        bias: None,
        magnitude: (!weights.magnitude.is_empty()).then(|| weights.magnitude.clone()),
    });
    let adapter = Adapter { sites: sites.collect(), ..Adapter::default() };
    let changes = adapter.changes(|site| Ok::<_, ()>(problem.weights[site].clone()), |_| Ok(None)).unwrap();
    changes.into_iter().map(|(site, change)| (SitePlace::Group(GROUP, site), change)).collect()
}

#[test]
fn norms_are_exact_to_the_last_bits() {
    let mut random = Random(84);
    let problem = problem(&mut random, 300, &[3, 70]);
    let pair = problem.pairs(0)[1];
    for mut cpu in backends() {
        let placed = Placed::new(&mut cpu, &problem);
        let dora = placed.trainee.pairs[1].dora.as_ref().unwrap();
        for (n, wanted) in norms(&problem.weights[1], pair).into_iter().enumerate() {
            assert!(
                (f64::from(dora.norms[n]) - wanted).abs() < 2e-7 * wanted,
                "{} for {wanted}",
                dora.norms[n]
            );
            let scale = f64::from(pair.weights.magnitude[n]) / wanted;
            assert!((f64::from(dora.column_scale[n]) - scale).abs() < 2e-7 * scale.abs());
        }
    }
}

#[test]
fn squared_gradients_are_summed_in_f64_pair_by_pair() {
    let mut random = Random(85);
    let problem = problem(&mut random, 19, &[7, 20]);
    for mut cpu in backends() {
        let mut placed = Placed::new(&mut cpu, &problem);
        let like = cpu.read_part(&placed.trainee, Part::Weights).unwrap();
        let mut gradients: Vec<_> = like.iter().map(|like| random_values(&mut random, like)).collect();
        placed.write(&mut cpu, Part::Gradients, &gradients);
        let got = cpu.squared_gradients(&placed.trainee).unwrap();
        assert_eq!(got.len(), 2);
        for (got, values) in got.iter().zip(&gradients) {
            let all = to_f64(&[&values.a[..], &values.b, &values.magnitude].concat());
            let wanted: f64 = all.iter().map(|g| g * g).sum();
            assert!((got - wanted).abs() < 1e-12 * wanted);
        }
        gradients[1].magnitude[3] = f32::NAN;
        gradients[0].b[2] = f32::INFINITY;
        placed.write(&mut cpu, Part::Gradients, &gradients);
        assert!(cpu.squared_gradients(&placed.trainee).unwrap().iter().all(|sum| !sum.is_finite()));
    }
}

#[test]
fn threads_change_no_bits_of_a_step() {
    let mut random = Random(86);
    let problem = problem(&mut random, 300, &[120, 200, 90]);
    let like: Vec<PairValues> = problem.pairs(0).iter().map(|pair| pair.weights.clone()).collect();
    let gradients: Vec<_> = like.iter().map(|like| random_values(&mut random, like)).collect();
    for isa in Isa::available() {
        let [one, two] = [1, 2].map(|threads| {
            let mut cpu = Cpu::with_isa(isa, Some(threads)).unwrap();
            let mut placed = Placed::new(&mut cpu, &problem);
            placed.write(&mut cpu, Part::Gradients, &gradients);
            let squares = cpu.scope(|cpu| cpu.squared_gradients(&placed.trainee).unwrap());
            placed.step(&mut cpu, &STEP);
            let weights = cpu.read_part(&placed.trainee, Part::Weights).unwrap();
            (squares, weights, bits(&placed.outputs(&mut cpu, &problem)))
        });
        assert!(one == two, "{}", isa.name());
    }
}
