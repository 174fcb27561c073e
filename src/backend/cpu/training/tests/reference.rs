//! Linear layers with experts: the same problem on a backend and in f64.

use crate::backend::cpu::tests::Random;
use crate::backend::cpu::{Buffer, Cpu, Group, Ranks, Site, Trainee};
use crate::backend::sampling::Philox;
use crate::backend::training::{Learning, Pair, PairValues, Part, Training};
use crate::backend::{Backend, ExpertWeights, FrozenLinear, Gates, SiteChange, SitePlace, Write};
use crate::tensor::Tensor;

use super::to_f64;

/// The number of the group under test.
pub const GROUP: usize = 3;

/// What a slot changes at a site.
#[derive(Clone)]
pub enum Change {
    Trained(Pair),
    Loaded(ExpertWeights),
    Replaced(Tensor),
}

/// A group, what its slots change, and some rows.
#[derive(Clone)]
pub struct Problem {
    pub k: usize,
    pub weights: Vec<Tensor>,
    pub biases: Vec<Option<Vec<f32>>>,
    /// By slot, then by site.
    pub slots: Vec<Vec<Option<Change>>>,
    /// By slot.
    pub dropout: Vec<f32>,
    /// By row.
    pub entries: Vec<Vec<(u32, f32)>>,
    pub row_keys: Vec<u64>,
    /// `[rows, k]`.
    pub x: Vec<f32>,
    /// `[rows, Σ out]`.
    pub dy: Vec<f32>,
}

/// What a backend computes of it.
#[derive(Clone, Default)]
pub struct Results {
    pub y: Vec<f32>,
    pub dx: Vec<f32>,
    /// By slot: those of the slot's trained sites.
    pub gradients: Vec<Vec<PairValues>>,
    /// Row by row.
    pub gates: Vec<f32>,
}

impl Problem {
    pub fn out(&self, site: usize) -> usize {
        self.weights[site].shape()[0]
    }

    pub fn width(&self) -> usize {
        (0..self.weights.len()).map(|site| self.out(site)).sum()
    }

    pub fn rows(&self) -> usize {
        self.entries.len()
    }

    /// The same problem with some of its rows.
    pub fn pick(&self, rows: &[usize]) -> Self {
        let pick = |values: &[f32], width: usize| {
            rows.iter().flat_map(|row| values[row * width..(row + 1) * width].to_vec()).collect()
        };
        Self {
            entries: rows.iter().map(|&row| self.entries[row].clone()).collect(),
            row_keys: rows.iter().map(|&row| self.row_keys[row]).collect(),
            x: pick(&self.x, self.k),
            dy: pick(&self.dy, self.width()),
            ..self.clone()
        }
    }

    pub fn gates(&self) -> Gates {
        let mut gates = Gates::default();
        for entries in &self.entries {
            gates.push_rows(1, entries);
        }
        gates
    }

    /// The pairs that a slot trains.
    pub fn pairs(&self, slot: usize) -> Vec<&Pair> {
        let trained = |change: &'_ Option<Change>| matches!(change, Some(Change::Trained(_)));
        let trained = self.slots[slot].iter().filter(|change| trained(change));
        trained
            .map(|change| if let Some(Change::Trained(pair)) = change { pair } else { unreachable!() })
            .collect()
    }

    /// A group with all that is loaded, and the trainees.
    pub fn set_up(&self, cpu: &mut Cpu) -> (Vec<Group>, Site, Vec<Option<Trainee>>) {
        let frozen = self
            .weights
            .iter()
            .zip(&self.biases)
            .map(|(weight, bias)| FrozenLinear { weight: weight.clone(), bias: bias.clone() });
        let mut groups: Vec<Group> = (0..GROUP).map(|_| cpu.group(vec![]).unwrap()).collect();
        groups.push(cpu.group(frozen.collect()).unwrap());
        let mut table = cpu.table(Tensor::from_f32(vec![1, 1], &[0.0])).unwrap();
        let mut trainees = Vec::new();
        for (slot, changes) in self.slots.iter().enumerate() {
            for (site, change) in changes.iter().enumerate() {
                match change {
                    Some(Change::Loaded(weights)) => {
                        groups[GROUP].site_mut(site).load(slot, &SiteChange::LowRank(weights.clone()));
                    }
                    Some(Change::Replaced(weight)) => {
                        groups[GROUP].site_mut(site).load(slot, &SiteChange::Replace(weight.clone()));
                    }
                    _ => {}
                }
            }
            let pairs: Vec<Pair> = self.pairs(slot).into_iter().cloned().collect();
            trainees
                .push((!pairs.is_empty()).then(|| {
                    cpu.trainee(&mut groups, &mut table, slot, &pairs, self.dropout[slot]).unwrap()
                }));
        }
        (groups, table, trainees)
    }

    /// Forward and backward over all rows, `cuts` (ascending) between calls.
    pub fn run(&self, cpu: &mut Cpu, cuts: &[usize], wants_gates: bool) -> Results {
        let (groups, _, mut trainees) = self.set_up(cpu);
        let mut results = Results::default();
        let mut start = 0;
        for &end in cuts.iter().chain([&self.rows()]) {
            let rows: Vec<usize> = (start..end).collect();
            self.pick(&rows).run_rows(cpu, &groups[GROUP], &mut trainees, wants_gates, &mut results);
            start = end;
        }
        let gradients = |trainee: &Option<Trainee>| match trainee {
            Some(trainee) => cpu.read_part(trainee, Part::Gradients).unwrap(),
            None => vec![],
        };
        results.gradients = trainees.iter().map(gradients).collect();
        results
    }

    fn run_rows(
        &self,
        cpu: &mut Cpu,
        group: &Group,
        trainees: &mut [Option<Trainee>],
        wants_gates: bool,
        results: &mut Results,
    ) {
        let (rows, width, gates) = (self.rows(), self.width(), self.gates());
        let buffer = |cpu: &Cpu, width: usize, values: &[f32]| -> Buffer {
            let mut buffer = cpu.buffer(rows, width).unwrap();
            buffer.write(values);
            buffer
        };
        let (x, dy) = (buffer(cpu, self.k, &self.x), buffer(cpu, width, &self.dy));
        // What lies in outputs before must not matter.
        let mut y = buffer(cpu, width, &vec![f32::NAN; rows * width]);
        let mut dx = buffer(cpu, self.k, &vec![f32::NAN; rows * self.k]);
        let mut ranks = Ranks::default();
        let mut gate_gradients = vec![0f32; gates.values().len()];
        let mut learning = Learning {
            gates: &gates,
            row_keys: &self.row_keys,
            trainees,
            gate_gradients: wants_gates.then_some(&mut gate_gradients[..]),
        };
        cpu.scope(|cpu| {
            cpu.linear_kept(group, GROUP, &x, &learning, Write::Replace, &mut y, &mut ranks).unwrap();
            cpu.linear_backward(group, GROUP, &x, &ranks, &dy, &mut learning, Some(&mut dx)).unwrap();
        });
        results.y.extend(cpu.read(&y, rows).unwrap());
        results.dx.extend(cpu.read(&dx, rows).unwrap());
        results.gates.extend(gate_gradients);
    }
}

/// The problem in f64, every number of which can be changed.
#[derive(Clone)]
pub struct Exact {
    pub k: usize,
    sites: Vec<Frozen>,
    /// By slot, then by site.
    pub slots: Vec<Vec<Option<ExactChange>>>,
    pub entries: Vec<Vec<(u32, f64)>>,
    pub x: Vec<f64>,
    dy: Vec<f64>,
    /// By slot, then by site, `[rows, k]`: what dropout multiplies the input with.
    masks: Vec<Vec<Vec<f64>>>,
}

#[derive(Clone)]
struct Frozen {
    weight: Vec<f64>,
    bias: Option<Vec<f64>>,
    out: usize,
}

#[derive(Clone)]
pub enum ExactChange {
    LowRank(ExactPair),
    Replaced(Vec<f64>),
}

#[derive(Clone)]
pub struct ExactPair {
    pub a: Vec<f64>,
    pub b: Vec<f64>,
    pub magnitude: Vec<f64>,
    rank: usize,
    scale: f64,
    bias: Option<Vec<f64>>,
    /// Of a loaded expert: its B holds them already.
    column_scale: Option<Vec<f64>>,
    /// Of a trained pair with a magnitude, as they were at first: constants of the backward pass.
    norms: Vec<f64>,
}

impl ExactPair {
    fn column_scale(&self, n: usize) -> Option<f64> {
        match &self.column_scale {
            Some(scales) => Some(scales[n]),
            None => self.magnitude.get(n).map(|m| m / self.norms[n]),
        }
    }

    /// `scale · (B (A x))[n]` times what stands before the pair.
    fn low_rank(&self, n: usize, ax: &[f64]) -> f64 {
        let product: f64 = ax.iter().enumerate().map(|(r, v)| self.b[n * self.rank + r] * v).sum();
        let folded = if self.column_scale.is_some() { None } else { self.column_scale(n) };
        self.scale * product * folded.unwrap_or(1.0)
    }
}

/// `‖W + scale · B A‖` of every output.
pub fn norms(weight: &Tensor, pair: &Pair) -> Vec<f64> {
    let (w, k) = (to_f64(&weight.to_f32()), weight.shape()[1]);
    let (a, b) = (to_f64(&pair.weights.a), to_f64(&pair.weights.b));
    let element = |n: usize, i: usize| {
        let product: f64 = (0..pair.rank).map(|r| b[n * pair.rank + r] * a[r * k + i]).sum();
        w[n * k + i] + f64::from(pair.scale) * product
    };
    (0..weight.shape()[0]).map(|n| (0..k).map(|i| element(n, i).powi(2)).sum::<f64>().sqrt()).collect()
}

impl Exact {
    pub fn new(problem: &Problem) -> Self {
        let sites = problem.weights.iter().zip(&problem.biases).map(|(weight, bias)| Frozen {
            weight: to_f64(&weight.to_f32()),
            bias: bias.as_deref().map(to_f64),
            out: weight.shape()[0],
        });
        let change = |site: usize, change: &Change| match change {
            Change::Replaced(weight) => ExactChange::Replaced(to_f64(&weight.to_f32())),
            Change::Loaded(weights) => ExactChange::LowRank(ExactPair {
                a: to_f64(&weights.a.to_f32()),
                b: to_f64(&weights.b.to_f32()),
                magnitude: vec![],
                rank: weights.a.shape()[0],
                scale: f64::from(weights.scale),
                bias: weights.bias.as_deref().map(to_f64),
                column_scale: weights.column_scale.as_deref().map(to_f64),
                norms: vec![],
            }),
            Change::Trained(pair) => ExactChange::LowRank(ExactPair {
                a: to_f64(&pair.weights.a),
                b: to_f64(&pair.weights.b),
                magnitude: to_f64(&pair.weights.magnitude),
                rank: pair.rank,
                scale: f64::from(pair.scale),
                bias: None,
                column_scale: None,
                norms: norms(&problem.weights[site], pair),
            }),
        };
        let slots = problem.slots.iter().map(|changes| {
            changes.iter().enumerate().map(|(site, c)| c.as_ref().map(|c| change(site, c))).collect()
        });
        let mask = |slot: usize, site: usize| {
            let drops = matches!(problem.slots[slot][site], Some(Change::Trained(_)));
            let dropout = if drops { problem.dropout[slot] } else { 0.0 };
            let place = 1 + (GROUP as u32 * 256) + site as u32;
            problem.row_keys.iter().flat_map(|&key| mask(key, place, dropout, problem.k)).collect()
        };
        let masks = (0..problem.slots.len())
            .map(|slot| (0..problem.weights.len()).map(|site| mask(slot, site)).collect());
        Self {
            k: problem.k,
            sites: sites.collect(),
            slots: slots.collect(),
            entries: problem
                .entries
                .iter()
                .map(|entries| entries.iter().map(|&(slot, gate)| (slot, f64::from(gate))).collect())
                .collect(),
            x: to_f64(&problem.x),
            dy: to_f64(&problem.dy),
            masks: masks.collect(),
        }
    }

    /// One row of the output.
    pub fn row(&self, row: usize) -> Vec<f64> {
        let x = &self.x[row * self.k..(row + 1) * self.k];
        let mut y = Vec::new();
        for (site, frozen) in self.sites.iter().enumerate() {
            let experts: Vec<_> = self.entries[row]
                .iter()
                .filter_map(|&(slot, gate)| {
                    Some((slot as usize, gate, self.slots[slot as usize][site].as_ref()?))
                })
                .collect();
            let weight = experts.iter().find_map(|(.., change)| match change {
                ExactChange::Replaced(weight) => Some(weight),
                ExactChange::LowRank(_) => None,
            });
            let weight = weight.unwrap_or(&frozen.weight);
            let pairs: Vec<_> = experts
                .iter()
                .filter_map(|&(slot, gate, change)| match change {
                    ExactChange::LowRank(pair) => {
                        let mask = &self.masks[slot][site][row * self.k..];
                        let ax = (0..pair.rank).map(|r| {
                            (0..self.k).map(|i| pair.a[r * self.k + i] * mask[i] * x[i]).sum::<f64>()
                        });
                        Some((gate, pair, ax.collect::<Vec<_>>()))
                    }
                    ExactChange::Replaced(_) => None,
                })
                .collect();
            for n in 0..frozen.out {
                let product: f64 = (0..self.k).map(|i| weight[n * self.k + i] * x[i]).sum();
                let mut scale = 1.0;
                let mut value = frozen.bias.as_ref().map_or(0.0, |bias| bias[n]);
                for (gate, pair, ax) in &pairs {
                    scale += gate * (pair.column_scale(n).unwrap_or(1.0) - 1.0);
                    value += gate * pair.low_rank(n, ax);
                    value += gate * pair.bias.as_ref().map_or(0.0, |bias| bias[n]);
                }
                y.push(scale * product + value);
            }
        }
        y
    }

    /// `Σ dy ⊙ y` over some rows.
    pub fn loss(&self, rows: impl Iterator<Item = usize>) -> f64 {
        let width = self.dy.len() / self.entries.len();
        rows.map(|row| {
            let dy = &self.dy[row * width..(row + 1) * width];
            self.row(row).iter().zip(dy).map(|(y, dy)| y * dy).sum::<f64>()
        })
        .sum()
    }
}

/// What dropout multiplies a row with, as its definition says.
pub fn mask(key: u64, place: u32, dropout: f32, k: usize) -> Vec<f64> {
    let random = Philox::new(key);
    let word = |i: usize| random.block([place, i as u32 / 4, 0, 0])[i % 4];
    let dropped = |i: usize| f64::from(word(i)) < f64::from(dropout) * 2f64.powi(32);
    (0..k).map(|i| if dropped(i) { 0.0 } else { 1.0 / (1.0 - f64::from(dropout)) }).collect()
}

/// A pair to be trained at one of the group's sites.
pub fn random_pair(random: &mut Random, weight: &Tensor, site: usize, rank: usize, magnitude: bool) -> Pair {
    let (out, k) = (weight.shape()[0], weight.shape()[1]);
    Pair {
        place: SitePlace::Group(GROUP, site),
        rank,
        scale: 0.5 + random.value().abs(),
        weights: PairValues {
            a: random.values(rank * k),
            b: random.values(out * rank),
            magnitude: if magnitude { random.values(out) } else { vec![] },
        },
    }
}
