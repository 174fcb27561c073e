//! The lookup backward against finite differences, however its rows are cut.

use super::{assert_gradient, bits, to_f64};
use crate::backend::cpu::tests::{Random, backends};
use crate::backend::cpu::{Cpu, Site, Trainee};
use crate::backend::training::{Learning, Pair, PairValues, Part, Training};
use crate::backend::{Backend, ExpertWeights, Rows, SiteChange, SitePlace};
use crate::tensor::{DType, Tensor};

const VOCABULARY: usize = 23;
const WIDTH: usize = 37;
/// Tokens and experts.
type Sequence = (&'static [u32], &'static [(u32, f32)]);

/// Slots 0 and 1 are trained, slot 2 is loaded.
const SEQUENCES: [Sequence; 5] = [
    (&[3, 9, 3], &[(0, 1.0)]),
    (&[1], &[]),
    (&[9, 22, 0, 9], &[(0, 0.5), (1, -0.7)]),
    (&[22], &[(1, 0.0), (2, 0.3)]),
    (&[3, 3], &[(1, 1.0)]),
];

struct Problem {
    weight: Tensor,
    pairs: Vec<Pair>,
    loaded: ExpertWeights,
    dy: Vec<f32>,
}

fn rows_of(sequences: &[Sequence]) -> Rows {
    let mut rows = Rows::default();
    sequences.iter().for_each(|(tokens, entries)| rows.push_sequence(tokens, 0, 0, &[], entries));
    rows
}

impl Problem {
    fn new(random: &mut Random, ranks: [usize; 2]) -> Self {
        let pair = |random: &mut Random, rank| Pair {
            place: SitePlace::Table,
            rank,
            scale: 0.5 + random.value().abs(),
            weights: PairValues {
                a: random.values(rank * VOCABULARY),
                b: random.values(WIDTH * rank),
                magnitude: vec![],
            },
        };
        Self {
            weight: random.tensor([VOCABULARY, WIDTH], DType::BF16),
            pairs: ranks.map(|rank| pair(random, rank)).into(),
            loaded: ExpertWeights {
                a: random.tensor([5, VOCABULARY], DType::F32),
                b: random.tensor([WIDTH, 5], DType::F16),
                scale: 1.5,
                bias: None,
                column_scale: None,
            },
            dy: random.values(rows_of(&SEQUENCES).len() * WIDTH),
        }
    }

    fn set_up(&self, cpu: &mut Cpu) -> (Site, Vec<Option<Trainee>>) {
        let mut table = cpu.table(self.weight.clone()).unwrap();
        table.load(2, &SiteChange::LowRank(self.loaded.clone()));
        let trainees = (self.pairs.iter().enumerate())
            .map(|(slot, pair)| {
                Some(cpu.trainee(&mut [], &mut table, slot, std::slice::from_ref(pair), 0.4).unwrap())
            })
            .collect();
        (table, trainees)
    }

    /// The gradients of both pairs and of all gates, with the sequences in as many calls as there are numbers.
    fn run(&self, cpu: &mut Cpu, calls: &[usize]) -> (Vec<PairValues>, Vec<f32>) {
        let (table, mut trainees) = self.set_up(cpu);
        let (mut next, mut first_row, mut gates) = (0, 0, Vec::new());
        for count in calls {
            let rows = rows_of(&SEQUENCES[next..next + count]);
            let mut dy = cpu.buffer(rows.len(), WIDTH).unwrap();
            dy.write(&self.dy[first_row * WIDTH..(first_row + rows.len()) * WIDTH]);
            let mut gate_gradients = vec![0.0; rows.gates.values().len()];
            let mut learning = Learning {
                gates: &rows.gates,
                row_keys: &vec![7; rows.len()],
                trainees: &mut trainees,
                gate_gradients: Some(&mut gate_gradients),
            };
            cpu.embed_backward(&table, &rows, &dy, &mut learning).unwrap();
            gates.extend(gate_gradients);
            (next, first_row) = (next + count, first_row + rows.len());
        }
        let read =
            |trainee: &Option<Trainee>| cpu.read_part(trainee.as_ref().unwrap(), Part::Gradients).unwrap();
        (trainees.iter().flat_map(read).collect(), gates)
    }

    /// `Σ dy ⊙ y` with other numbers in place of the pairs' and the gates'.
    fn loss(&self, a: [&[f64]; 2], b: [&[f64]; 2], gates: &[f64]) -> f64 {
        let rows = rows_of(&SEQUENCES);
        let weight = to_f64(&self.weight.to_f32());
        let loaded = (to_f64(&self.loaded.a.to_f32()), to_f64(&self.loaded.b.to_f32()));
        let (mut sum, mut gate) = (0.0, 0);
        for run in rows.gates.runs() {
            for row in run.rows.clone() {
                let token = rows.tokens[row] as usize;
                let mut y = weight[token * WIDTH..(token + 1) * WIDTH].to_vec();
                for &slot in rows.gates.experts_of(run) {
                    let slot = slot as usize;
                    let (a, b, rank, scale) = match slot {
                        2 => (&loaded.0[..], &loaded.1[..], 5, self.loaded.scale),
                        _ => (a[slot], b[slot], self.pairs[slot].rank, self.pairs[slot].scale),
                    };
                    for (n, y) in y.iter_mut().enumerate() {
                        let product: f64 =
                            (0..rank).map(|r| b[n * rank + r] * a[r * VOCABULARY + token]).sum();
                        *y += gates[gate] * f64::from(scale) * product;
                    }
                    gate += 1;
                }
                sum += y.iter().zip(&self.dy[row * WIDTH..]).map(|(y, &dy)| y * f64::from(dy)).sum::<f64>();
            }
        }
        sum
    }
}

#[test]
fn lookup_gradients_match_finite_differences_however_the_batch_is_cut() {
    let mut random = Random(61);
    for ranks in [[1, 8], [16, 3], [17, 40]] {
        let problem = Problem::new(&mut random, ranks);
        let values: Vec<[Vec<f64>; 2]> =
            problem.pairs.iter().map(|pair| [to_f64(&pair.weights.a), to_f64(&pair.weights.b)]).collect();
        let [a, b] = [0, 1].map(|part| [&values[0][part][..], &values[1][part][..]]);
        let gates = to_f64(rows_of(&SEQUENCES).gates.values());
        for mut cpu in backends() {
            let (gradients, of_gates) = problem.run(&mut cpu, &[SEQUENCES.len()]);
            for slot in 0..2 {
                assert_gradient("A", &gradients[slot].a, a[slot], &mut random, |moved| {
                    let mut a = a;
                    a[slot] = moved;
                    problem.loss(a, b, &gates)
                });
                assert_gradient("B", &gradients[slot].b, b[slot], &mut random, |moved| {
                    let mut b = b;
                    b[slot] = moved;
                    problem.loss(a, b, &gates)
                });
            }
            assert_gradient("gates", &of_gates, &gates, &mut random, |gates| problem.loss(a, b, gates));
            for calls in [&[1, 4][..], &[2, 2, 1], &[1; 5]] {
                let (cut, cut_gates) = problem.run(&mut cpu, calls);
                for (cut, whole) in cut.iter().zip(&gradients) {
                    assert_eq!(bits(&cut.a), bits(&whole.a));
                    assert_eq!(bits(&cut.b), bits(&whole.b));
                }
                assert_eq!(bits(&cut_gates), bits(&of_gates));
            }
        }
    }
}
