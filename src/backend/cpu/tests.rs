//! The CPU operations against plain loops in f64, and every row alone against the row in a batch.

use super::*;
use crate::backend::{ExpertWeights, PAGE};
use crate::tensor::{Bytes, DType};

/// A small generator of test data (xorshift64*): reproducible and free of dependencies.
pub(super) struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }

    pub fn below(&mut self, end: usize) -> usize {
        (self.next() >> 33) as usize % end
    }

    pub fn value(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }

    pub fn values(&mut self, count: usize) -> Vec<f32> {
        (0..count).map(|_| self.value()).collect()
    }

    pub fn tensor(&mut self, shape: [usize; 2], dtype: DType) -> Tensor {
        let values = self.values(shape[0] * shape[1]);
        let bytes: Vec<u8> = match dtype {
            DType::F32 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
            DType::F16 => values.iter().flat_map(|&v| half::f16::from_f32(v).to_le_bytes()).collect(),
            DType::BF16 => values.iter().flat_map(|&v| half::bf16::from_f32(v).to_le_bytes()).collect(),
        };
        Tensor::new(dtype, shape.to_vec(), Bytes::new(bytes))
    }

    pub fn dtype(&mut self) -> DType {
        [DType::F32, DType::F16, DType::BF16][self.below(3)]
    }
}

pub(super) fn backends() -> Vec<Cpu> {
    Isa::available().into_iter().map(|isa| Cpu::with_isa(isa, Some(2)).unwrap()).collect()
}

/// What an expert computes at a site, in f64, for one row.
fn expert_output(expert: &ExpertWeights, x: &[f32]) -> Vec<f64> {
    let (a, b) = (expert.a.to_f32(), expert.b.to_f32());
    let (rank, k) = (expert.a.shape()[0], x.len());
    let v: Vec<f64> =
        (0..rank).map(|r| (0..k).map(|i| f64::from(a[r * k + i]) * f64::from(x[i])).sum()).collect();
    (0..expert.b.shape()[0])
        .map(|n| (0..rank).map(|r| f64::from(b[n * rank + r]) * v[r]).sum::<f64>() * f64::from(expert.scale))
        .collect()
}

/// `y` of one row by the formula of [`ExpertWeights`].
fn linear_reference(
    site: &Site,
    changes: &[Option<SiteChange>],
    x: &[f32],
    entries: &[(u32, f32)],
) -> Vec<f64> {
    let replaced = entries.iter().find_map(|&(slot, _)| match &changes[slot as usize] {
        Some(SiteChange::Replace(weight)) => Some(weight),
        _ => None,
    });
    let weight = replaced.unwrap_or(&site.weight).to_f32();
    let k = x.len();
    let mut y: Vec<f64> = weight
        .chunks_exact(k)
        .map(|row| row.iter().zip(x).map(|(w, x)| f64::from(*w) * f64::from(*x)).sum())
        .collect();
    let mut scales = vec![1f64; y.len()];
    let mut added = vec![0f64; y.len()];
    for &(slot, gate) in entries {
        let Some(SiteChange::LowRank(expert)) = &changes[slot as usize] else { continue };
        for (n, value) in expert_output(expert, x).into_iter().enumerate() {
            added[n] += f64::from(gate) * value;
            added[n] += expert.bias.as_ref().map_or(0.0, |bias| f64::from(gate * bias[n]));
            scales[n] +=
                expert.column_scale.as_ref().map_or(0.0, |c| f64::from(gate) * (f64::from(c[n]) - 1.0));
        }
    }
    for (n, value) in y.iter_mut().enumerate() {
        *value = *value * scales[n] + added[n] + site.bias.as_ref().map_or(0.0, |bias| f64::from(bias[n]));
    }
    y
}

fn random_change(random: &mut Random, k: usize, n: usize) -> Option<SiteChange> {
    match random.below(8) {
        0 => None,
        1 => Some(SiteChange::Replace({
            let dtype = random.dtype();
            random.tensor([n, k], dtype)
        })),
        kind => {
            let rank = [1, 3, 4, 8, 16, 17, 40, 128][random.below(8)];
            let (a, b) = (random.dtype(), random.dtype());
            Some(SiteChange::LowRank(ExpertWeights {
                a: random.tensor([rank, k], a),
                b: random.tensor([n, rank], b),
                scale: 0.5 + random.value().abs(),
                bias: (kind == 2).then(|| random.values(n)),
                column_scale: (kind == 3).then(|| random.values(n)),
            }))
        }
    }
}

#[test]
fn linear_matches_an_f64_loop_and_rows_do_not_depend_on_neighbours() {
    let mut random = Random(7);
    for case in 0..60 {
        let k = [1, 7, 8, 24, 48, 64, 160, 769, 1600][random.below(9)];
        let widths: Vec<usize> = (0..1 + random.below(3)).map(|_| 1 + random.below(70)).collect();
        let width: usize = widths.iter().sum();
        let slots = 6;
        let changes: Vec<Vec<Option<SiteChange>>> =
            widths.iter().map(|&n| (0..slots).map(|_| random_change(&mut random, k, n)).collect()).collect();
        let weights: Vec<Tensor> = widths
            .iter()
            .map(|&n| {
                let dtype = random.dtype();
                random.tensor([n, k], dtype)
            })
            .collect();
        let biases: Vec<Option<Vec<f32>>> =
            widths.iter().map(|&n| (random.below(2) == 0).then(|| random.values(n))).collect();
        let mut gates = Gates::default();
        let mut entries = Vec::new();
        for _ in 0..1 + random.below(6) {
            let rows = [1, 2, 3, 5, 30, 70][random.below(6)];
            // A replaced weight serves rows that use it alone: other sets are made of the rest.
            let lone = random.below(slots) as u32;
            let low_rank = |slot: &u32| {
                changes.iter().all(|site| !matches!(site[*slot as usize], Some(SiteChange::Replace(_))))
            };
            let set: Vec<(u32, f32)> = match random.below(3) {
                0 => vec![],
                1 => vec![(lone, 1.0)],
                _ => (0..slots as u32).filter(low_rank).map(|slot| (slot, random.value())).collect(),
            };
            gates.push_rows(rows, &set);
            entries.extend(std::iter::repeat_n(set, rows));
        }
        let x = random.values(gates.rows() * k);
        let before = random.values(gates.rows() * width);
        let write = [Write::Replace, Write::Add][random.below(2)];
        for mut cpu in backends() {
            let frozen = (0..widths.len())
                .map(|site| FrozenLinear { weight: weights[site].clone(), bias: biases[site].clone() });
            let mut group = cpu.group(frozen.collect()).unwrap();
            for (site, changes) in changes.iter().enumerate() {
                for (slot, change) in changes.iter().enumerate() {
                    if let Some(change) = change {
                        group.site_mut(site).load(slot, change);
                    }
                }
            }
            let mut run = |gates: &Gates, x: &[f32], before: &[f32]| {
                let rows = gates.rows();
                let mut input = cpu.buffer(rows, k).unwrap();
                let mut output = cpu.buffer(rows, width).unwrap();
                input.write(x);
                output.write(before);
                cpu.linear(&group, &input, gates, write, &mut output).unwrap();
                cpu.read(&output, rows).unwrap().to_vec()
            };
            let together = run(&gates, &x, &before);
            for row in 0..gates.rows() {
                let x = &x[row * k..(row + 1) * k];
                let before = &before[row * width..(row + 1) * width];
                let mut wanted = Vec::new();
                for (site, changes) in group.0.iter().zip(&changes) {
                    wanted.extend(linear_reference(site, changes, x, &entries[row]));
                }
                let got = &together[row * width..(row + 1) * width];
                for n in 0..width {
                    let wanted = wanted[n] + if write == Write::Add { f64::from(before[n]) } else { 0.0 };
                    let size = 1.0 + wanted.abs() + (k as f64).sqrt();
                    let error = (f64::from(got[n]) - wanted).abs() / size;
                    assert!(error < 1e-5, "case {case} row {row} column {n}: {} for {wanted}", got[n]);
                }
                if row % 7 == 0 || gates.rows() < 20 {
                    let mut alone = Gates::default();
                    alone.push_rows(1, &entries[row]);
                    let alone = run(&alone, x, before);
                    let bits = |values: &[f32]| values.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
                    assert_eq!(bits(&alone), bits(got), "case {case} row {row} alone");
                }
            }
        }
    }
}

#[test]
fn embedding_adds_the_low_rank_lookup() {
    let mut random = Random(11);
    let (vocabulary, hidden, rank) = (40, 24, 18);
    let weight = random.tensor([vocabulary, hidden], DType::BF16);
    let expert = ExpertWeights {
        a: random.tensor([rank, vocabulary], DType::F32),
        b: random.tensor([hidden, rank], DType::F16),
        scale: 1.5,
        bias: None,
        column_scale: None,
    };
    let other = random.tensor([vocabulary, hidden], DType::F32);
    for mut cpu in backends() {
        let mut table = cpu.table(weight.clone()).unwrap();
        table.load(0, &SiteChange::LowRank(expert.clone()));
        table.load(1, &SiteChange::Replace(other.clone()));
        let mut rows = Rows::default();
        rows.push_sequence(&[3, 9], 0, 0, &[], &[]);
        rows.push_sequence(&[9], 0, 0, &[], &[(0, 0.5)]);
        rows.push_sequence(&[39], 0, 0, &[], &[(1, 1.0)]);
        let mut y = cpu.buffer(4, hidden).unwrap();
        cpu.embed(&table, &rows, &mut y).unwrap();
        let got = cpu.read(&y, 4).unwrap();
        let (weight, other) = (weight.to_f32(), other.to_f32());
        assert_eq!(got[hidden..2 * hidden], weight[9 * hidden..10 * hidden]);
        assert_eq!(got[3 * hidden..], other[39 * hidden..40 * hidden]);
        let mut one_hot = vec![0f32; vocabulary];
        one_hot[9] = 1.0;
        for (n, delta) in expert_output(&expert, &one_hot).into_iter().enumerate() {
            let wanted = f64::from(weight[9 * hidden + n]) + 0.5 * delta;
            assert!((f64::from(got[2 * hidden + n]) - wanted).abs() < 1e-5);
        }
    }
}

/// Attention of one row by definition, in f64. `qkv` holds the whole sequence, already rotated.
fn attention_reference(
    shape: AttentionShape,
    qkv: &[f32],
    position: usize,
    window: Option<usize>,
) -> Vec<f64> {
    let AttentionShape { heads, kv_heads, head_dim } = shape;
    let width = shape.qkv_width();
    let first = window.map_or(0, |window| (position + 1).saturating_sub(window));
    let mut y = Vec::new();
    for head in 0..heads {
        let kv_head = head / (heads / kv_heads);
        let q = &qkv[position * width + head * head_dim..][..head_dim];
        let part = |j: usize, offset: usize| &qkv[j * width + (offset + kv_head) * head_dim..][..head_dim];
        let scores: Vec<f64> = (first..=position)
            .map(|j| {
                let dot: f64 = q.iter().zip(part(j, heads)).map(|(q, k)| f64::from(*q) * f64::from(*k)).sum();
                (dot / (head_dim as f64).sqrt()).exp()
            })
            .collect();
        let sum: f64 = scores.iter().sum();
        for d in 0..head_dim {
            let weigh = |(i, score): (usize, &f64)| score * f64::from(part(first + i, heads + kv_heads)[d]);
            y.push(scores.iter().enumerate().map(weigh).sum::<f64>() / sum);
        }
    }
    y
}

#[test]
fn attention_matches_an_f64_loop_however_a_sequence_is_cut_into_steps() {
    let mut random = Random(5);
    for case in 0..24 {
        let kv_heads = 1 + random.below(3);
        let shape = AttentionShape {
            heads: kv_heads * (1 + random.below(5)),
            kv_heads,
            head_dim: [8, 16, 24, 40, 64, 80][random.below(6)],
        };
        let window = (random.below(2) == 0).then(|| 1 + random.below(20));
        let lengths: Vec<usize> = (0..1 + random.below(3)).map(|_| 1 + random.below(60)).collect();
        let width = shape.qkv_width();
        let sequences: Vec<Vec<f32>> = lengths.iter().map(|len| random.values(len * width)).collect();
        let tables = RotaryTables { rotary_dim: 0, cos: vec![vec![]], sin: vec![vec![]] };
        let pages_each = 60usize.div_ceil(PAGE);
        let pages = |sequence: usize| -> Vec<u32> {
            // Out of order, so that a page number is not a position.
            (0..pages_each).rev().map(|page| (page * lengths.len() + sequence) as u32).collect()
        };
        for mut cpu in backends() {
            let mut outputs = Vec::new();
            for cuts in [1, 7] {
                let mut cache = cpu.kv_cache(1, pages_each * lengths.len(), shape).unwrap();
                let mut output: Vec<Vec<f32>> = lengths.iter().map(|_| Vec::new()).collect();
                let longest = *lengths.iter().max().unwrap();
                let step = longest.div_ceil(cuts);
                for start in (0..longest).step_by(step) {
                    let mut rows = Rows::default();
                    let mut qkv = Vec::new();
                    for (sequence, &length) in lengths.iter().enumerate() {
                        let end = (start + step).min(length);
                        if start < end {
                            let tokens = vec![0; end - start];
                            rows.push_sequence(&tokens, start, 0, &pages(sequence), &[]);
                            qkv.extend_from_slice(&sequences[sequence][start * width..end * width]);
                        }
                    }
                    let mut input = cpu.buffer(rows.len(), width).unwrap();
                    let mut y = cpu.buffer(rows.len(), shape.heads * shape.head_dim).unwrap();
                    input.write(&qkv);
                    cpu.rope_store(&mut input, shape, None, &tables, &rows, &mut cache, 0).unwrap();
                    cpu.attention(&input, window, &rows, &cache, 0, &mut y).unwrap();
                    let y = cpu.read(&y, rows.len()).unwrap();
                    let mut present = lengths.iter().enumerate().filter(|(_, length)| start < **length);
                    for sequence in &rows.sequences {
                        let (index, _) = present.next().unwrap();
                        let per_row = shape.heads * shape.head_dim;
                        output[index].extend(&y[sequence.rows.start * per_row..sequence.rows.end * per_row]);
                    }
                }
                outputs.push(output);
            }
            assert!(outputs[0] == outputs[1], "case {case}: cutting a sequence into steps changed bits");
            for (sequence, output) in sequences.iter().zip(&outputs[0]) {
                for (position, got) in output.chunks_exact(shape.heads * shape.head_dim).enumerate() {
                    let wanted = attention_reference(shape, sequence, position, window);
                    for (got, wanted) in got.iter().zip(wanted) {
                        assert!((f64::from(*got) - wanted).abs() < 1e-5, "case {case}: {got} for {wanted}");
                    }
                }
            }
        }
    }
}

#[test]
fn norm_rotation_and_swiglu_match_their_formulas() {
    let mut random = Random(3);
    for mut cpu in backends() {
        let (rows, width) = (5, 37);
        let (x, weight) = (random.values(rows * width), random.values(width));
        let mut input = cpu.buffer(rows, width).unwrap();
        let mut output = cpu.buffer(rows, width).unwrap();
        input.write(&x);
        cpu.rms_norm(&input, rows, &weight, 1e-5, &mut output).unwrap();
        for (x, y) in x.chunks_exact(width).zip(cpu.read(&output, rows).unwrap().chunks_exact(width)) {
            let mean: f64 = x.iter().map(|x| f64::from(*x) * f64::from(*x)).sum::<f64>() / width as f64;
            for n in 0..width {
                let wanted = f64::from(x[n]) / (mean + 1e-5).sqrt() * f64::from(weight[n]);
                assert!((f64::from(y[n]) - wanted).abs() < 1e-5);
            }
        }
        let mut gate_up = cpu.buffer(rows, 2 * width).unwrap();
        let values = random.values(rows * 2 * width);
        gate_up.write(&values);
        super::elementwise::swiglu(cpu.isa, &gate_up, rows, &mut output);
        for (x, y) in values.chunks_exact(2 * width).zip(cpu.read(&output, rows).unwrap().chunks_exact(width))
        {
            for n in 0..width {
                let (gate, up) = (f64::from(x[n]), f64::from(x[width + n]));
                assert!((f64::from(y[n]) - gate / (1.0 + (-gate).exp()) * up).abs() < 1e-6);
            }
        }
        let shape = AttentionShape { heads: 2, kv_heads: 1, head_dim: 8 };
        let angle = |position: usize, i: usize| position as f32 * 0.3 + i as f32;
        let table = |f: fn(f32) -> f32| vec![(0..4 * 3).map(|i| f(angle(i / 3, i % 3))).collect::<Vec<_>>()];
        let tables = RotaryTables { rotary_dim: 6, cos: table(f32::cos), sin: table(f32::sin) };
        let mut rows = Rows::default();
        rows.push_sequence(&[0], 3, 0, &[0], &[]);
        let values = random.values(shape.qkv_width());
        let mut qkv = cpu.buffer(1, shape.qkv_width()).unwrap();
        qkv.write(&values);
        let mut cache = cpu.kv_cache(1, 1, shape).unwrap();
        cpu.rope_store(&mut qkv, shape, None, &tables, &rows, &mut cache, 0).unwrap();
        let turned = cpu.read(&qkv, 1).unwrap();
        for head in 0..3 {
            for i in 0..3 {
                let (x, y) = (values[head * 8 + i], values[head * 8 + i + 3]);
                let (sin, cos) = angle(3, i).sin_cos();
                assert!((turned[head * 8 + i] - (x * cos - y * sin)).abs() < 1e-6);
                assert!((turned[head * 8 + i + 3] - (y * cos + x * sin)).abs() < 1e-6);
            }
            assert_eq!(turned[head * 8 + 6..head * 8 + 8], values[head * 8 + 6..head * 8 + 8]);
        }
        assert_eq!(turned[24..], values[24..], "values are not rotated");
    }
}
