//! Attention backward against finite differences, and a sequence alone against the sequence among others.

use super::{assert_gradient, bits, to_f64};
use crate::backend::cpu::tests::{Random, backends};
use crate::backend::cpu::{Cpu, Isa};
use crate::backend::training::Training;
use crate::backend::{AttentionShape, Backend, Rows};

/// Attention of a whole sequence of rows `q | k | v`.
fn forward(shape: AttentionShape, window: Option<usize>, qkv: &[f64]) -> Vec<f64> {
    let AttentionShape { heads, kv_heads, head_dim } = shape;
    let width = shape.qkv_width();
    let mut y = Vec::new();
    for i in 0..qkv.len() / width {
        let first = window.map_or(0, |window| (i + 1).saturating_sub(window));
        for head in 0..heads {
            let kv_head = head / (heads / kv_heads);
            let vector = |row: usize, head: usize| &qkv[row * width + head * head_dim..][..head_dim];
            let q = vector(i, head);
            let score = |j: usize| {
                let dot: f64 = q.iter().zip(vector(j, heads + kv_head)).map(|(q, k)| q * k).sum();
                dot / (head_dim as f64).sqrt()
            };
            let maximum = (first..=i).map(score).fold(f64::NEG_INFINITY, f64::max);
            let weights: Vec<f64> = (first..=i).map(|j| (score(j) - maximum).exp()).collect();
            let sum: f64 = weights.iter().sum();
            y.extend((0..head_dim).map(|d| {
                let value = |j: usize| vector(first + j, heads + kv_heads + kv_head)[d];
                weights.iter().enumerate().map(|(j, w)| w * value(j)).sum::<f64>() / sum
            }));
        }
    }
    y
}

/// The gradients of some sequences, each `[length, q | k | v]`, in one step.
fn backward(
    cpu: &mut Cpu,
    shape: AttentionShape,
    window: Option<usize>,
    sequences: &[(&[f32], &[f32])],
) -> Vec<Vec<f32>> {
    let (width, out) = (shape.qkv_width(), shape.heads * shape.head_dim);
    let mut rows = Rows::default();
    let (mut qkv, mut dy, mut y) = (Vec::new(), Vec::new(), Vec::new());
    for (input, d_output) in sequences {
        rows.push_sequence(&vec![0; input.len() / width], 0, 0, &[], &[]);
        qkv.extend_from_slice(input);
        dy.extend_from_slice(d_output);
        y.extend(forward(shape, window, &to_f64(input)).iter().map(|&y| y as f32));
    }
    let buffers = [(&qkv, width), (&y, out), (&dy, out)].map(|(values, width)| {
        let mut buffer = cpu.buffer(rows.len(), width).unwrap();
        buffer.write(values);
        buffer
    });
    let mut d_qkv = cpu.buffer(rows.len(), width).unwrap();
    d_qkv.write(&vec![f32::NAN; qkv.len()]);
    let [qkv, y, dy] = &buffers;
    cpu.scope(|cpu| cpu.attention_backward(qkv, shape, window, &rows, y, dy, &mut d_qkv).unwrap());
    let d = cpu.read(&d_qkv, rows.len()).unwrap();
    rows.sequences.iter().map(|s| d[s.rows.start * width..s.rows.end * width].to_vec()).collect()
}

#[test]
fn attention_gradients_match_finite_differences_and_depend_on_their_sequence_alone() {
    let mut random = Random(51);
    for case in 0..12 {
        let kv_heads = 1 + random.below(3);
        let head_dim = [5, 8, 16, 20, 40][random.below(5)];
        let shape = AttentionShape { heads: kv_heads * (1 + random.below(4)), kv_heads, head_dim };
        let window = (random.below(2) == 0).then(|| 1 + random.below(20));
        let lengths: Vec<usize> =
            (0..1 + random.below(3)).map(|_| [1, 2, 9, 33, 70][random.below(5)]).collect();
        let out = shape.heads * head_dim;
        let sequences: Vec<(Vec<f32>, Vec<f32>)> =
            lengths.iter().map(|n| (random.values(n * shape.qkv_width()), random.values(n * out))).collect();
        let all: Vec<(&[f32], &[f32])> = sequences.iter().map(|(a, b)| (&a[..], &b[..])).collect();
        for mut cpu in backends() {
            let together = backward(&mut cpu, shape, window, &all);
            for (index, (qkv, dy)) in all.iter().enumerate() {
                let what = format!("case {case}, sequence of {}, {}", lengths[index], cpu.isa().name());
                assert_gradient(&what, &together[index], &to_f64(qkv), &mut random, |qkv| {
                    let y = forward(shape, window, qkv);
                    y.iter().zip(*dy).map(|(y, &dy)| y * f64::from(dy)).sum()
                });
                let alone = backward(&mut cpu, shape, window, &all[index..index + 1]);
                assert_eq!(bits(&alone[0]), bits(&together[index]), "{what} alone");
            }
        }
    }
}

#[test]
fn scores_far_apart_have_finite_gradients() {
    let shape = AttentionShape { heads: 1, kv_heads: 1, head_dim: 4 };
    let mut random = Random(52);
    let mut qkv = random.values(6 * 12);
    qkv.iter_mut().for_each(|x| *x *= 300.0);
    let dy = random.values(6 * 4);
    for mut cpu in backends() {
        let d = backward(&mut cpu, shape, None, &[(&qkv, &dy)]);
        assert!(d[0].iter().all(|d| d.is_finite()));
    }
}

#[test]
fn threads_change_no_bits_of_attention() {
    let shape = AttentionShape { heads: 8, kv_heads: 4, head_dim: 20 };
    let mut random = Random(53);
    let sequences: Vec<(Vec<f32>, Vec<f32>)> =
        (0..4).map(|_| (random.values(90 * shape.qkv_width()), random.values(90 * 160))).collect();
    let all: Vec<(&[f32], &[f32])> = sequences.iter().map(|(a, b)| (&a[..], &b[..])).collect();
    for isa in Isa::available() {
        let [one, two] = [1, 2]
            .map(|threads| backward(&mut Cpu::with_isa(isa, Some(threads)).unwrap(), shape, None, &all));
        assert!(one == two, "{}", isa.name());
    }
}
