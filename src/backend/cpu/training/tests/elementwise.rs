//! Row-wise operations backward, and those that only move rows.

use super::{assert_gradient, bits, to_f64};
use crate::backend::cpu::tests::{Random, backends};
use crate::backend::cpu::{Buffer, Cpu};
use crate::backend::training::Training;
use crate::backend::{AttentionShape, Backend, HeadNorms, RotaryTables, Rows, Write};

fn buffer(cpu: &Cpu, width: usize, values: &[f32]) -> Buffer {
    let mut buffer = cpu.buffer(values.len() / width, width).unwrap();
    buffer.write(values);
    buffer
}

fn dot(one: impl IntoIterator<Item = f64>, other: &[f32]) -> f64 {
    one.into_iter().zip(other).map(|(a, &b)| a * f64::from(b)).sum()
}

/// `x / √(mean(x²) + ε) ⊙ weight`.
fn norm(x: &[f64], weight: &[f32], epsilon: f64) -> Vec<f64> {
    let mean = x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
    x.iter().zip(weight).map(|(x, &w)| x / (mean + epsilon).sqrt() * f64::from(w)).collect()
}

#[test]
fn norm_gradient_matches_finite_differences() {
    let mut random = Random(41);
    for width in [1, 5, 16, 37, 160] {
        let rows = 4;
        let (x, dy) = (random.values(rows * width), random.values(rows * width));
        let (weight, before) = (random.values(width), random.values(rows * width));
        for mut cpu in backends() {
            for write in [Write::Replace, Write::Add] {
                let [x_buffer, dy_buffer, mut dx] = [&x, &dy, &before].map(|v| buffer(&cpu, width, v));
                cpu.rms_norm_backward(&x_buffer, rows, &weight, 1e-2, &dy_buffer, write, &mut dx).unwrap();
                let mut got = cpu.read(&dx, rows).unwrap().to_vec();
                if write == Write::Add {
                    got.iter_mut().zip(&before).for_each(|(got, before)| *got -= before);
                }
                for row in 0..rows {
                    let own = row * width..(row + 1) * width;
                    let values = to_f64(&x[own.clone()]);
                    assert_gradient("norm", &got[own.clone()], &values, &mut random, |x| {
                        dot(norm(x, &weight, f64::from(1e-2f32)), &dy[own.clone()])
                    });
                }
            }
        }
    }
}

#[test]
fn rotation_gradient_matches_finite_differences() {
    let mut random = Random(42);
    for (head_dim, rotary_dim, with_norms) in [(8, 8, false), (20, 20, true), (24, 16, false), (32, 24, true)]
    {
        let shape = AttentionShape { heads: 4, kv_heads: 2, head_dim };
        let (width, half, epsilon) = (shape.qkv_width(), rotary_dim / 2, 1e-2);
        // The second variant is used, so that the first cannot stand in for it.
        let [cos, sin] = [f32::cos, f32::sin].map(|f| {
            let table = |scale: f32| {
                (0..8 * half).map(|i| f((i / half) as f32 * scale + (i % half) as f32)).collect()
            };
            vec![table(0.9), table(0.3)]
        });
        let tables = RotaryTables { rotary_dim, cos, sin };
        let mut rows = Rows::default();
        rows.push_sequence(&[0; 5], 0, 1, &[0], &[]);
        rows.push_sequence(&[0; 3], 0, 1, &[1], &[]);
        let (qkv, dy) = (random.values(8 * width), random.values(8 * width));
        let (q, k) = (random.values(head_dim), random.values(head_dim));
        for mut cpu in backends() {
            let input = buffer(&cpu, width, &qkv);
            let mut d = buffer(&cpu, width, &dy);
            let norms = with_norms.then_some(HeadNorms { q: &q, k: &k, epsilon });
            cpu.rope_backward(&input, shape, norms, &tables, &rows, &mut d).unwrap();
            let got = cpu.read(&d, 8).unwrap().to_vec();
            for row in 0..8 {
                let position = if row < 5 { row } else { row - 5 };
                let forward = |x: &[f64]| {
                    let mut y = x.to_vec();
                    for (head, y) in y.chunks_exact_mut(head_dim).take(6).enumerate() {
                        if with_norms {
                            let turned = norm(y, if head < 4 { &q } else { &k }, f64::from(epsilon));
                            y.copy_from_slice(&turned);
                        }
                        for i in 0..half {
                            let [cos, sin] =
                                [&tables.cos, &tables.sin].map(|t| f64::from(t[1][position * half + i]));
                            let (a, b) = (y[i], y[i + half]);
                            (y[i], y[i + half]) = (a * cos - b * sin, b * cos + a * sin);
                        }
                    }
                    y
                };
                let own = row * width..(row + 1) * width;
                let values = to_f64(&qkv[own.clone()]);
                assert_gradient("rotation", &got[own.clone()], &values, &mut random, |x| {
                    dot(forward(x), &dy[own.clone()])
                });
                assert_eq!(got[own.end - 2 * head_dim..own.end], dy[own.end - 2 * head_dim..own.end], "dv");
            }
            if with_norms {
                continue;
            }
            // Without norms the inputs are not looked at.
            let mut d = buffer(&cpu, width, &dy);
            let nothing = buffer(&cpu, width, &vec![f32::NAN; 8 * width]);
            cpu.rope_backward(&nothing, shape, None, &tables, &rows, &mut d).unwrap();
            assert_eq!(cpu.read(&d, 8).unwrap(), got);
        }
    }
}

#[test]
fn swiglu_gradient_matches_finite_differences() {
    let mut random = Random(43);
    for width in [1, 7, 16, 50] {
        let rows = 3;
        let mut gate_up = random.values(rows * 2 * width);
        gate_up.iter_mut().for_each(|x| *x *= 8.0);
        let dy = random.values(rows * width);
        for mut cpu in backends() {
            let (input, d_output) = (buffer(&cpu, 2 * width, &gate_up), buffer(&cpu, width, &dy));
            let mut d = buffer(&cpu, 2 * width, &vec![f32::NAN; rows * 2 * width]);
            cpu.swiglu_backward(&input, &d_output, rows, &mut d).unwrap();
            let got = cpu.read(&d, rows).unwrap().to_vec();
            for row in 0..rows {
                let own = row * 2 * width..(row + 1) * 2 * width;
                let values = to_f64(&gate_up[own.clone()]);
                assert_gradient("swiglu", &got[own], &values, &mut random, |x| {
                    let (gate, up) = x.split_at(width);
                    let y = gate.iter().zip(up).map(|(gate, up)| gate / (1.0 + (-gate).exp()) * up);
                    dot(y, &dy[row * width..(row + 1) * width])
                });
            }
        }
    }
}

#[test]
fn swiglu_gradient_is_finite_far_from_zero() {
    for mut cpu in backends() {
        let input = buffer(&cpu, 2, &[1e4, 3.0, -1e4, 3.0, f32::MAX, 1.0, f32::MIN, 1.0]);
        let dy = buffer(&cpu, 1, &[1.0; 4]);
        let mut d = cpu.buffer(4, 2).unwrap();
        cpu.swiglu_backward(&input, &dy, 4, &mut d).unwrap();
        assert_eq!(cpu.read(&d, 4).unwrap(), [3.0, 1e4, 0.0, 0.0, 1.0, f32::MAX, 0.0, 0.0]);
    }
}

#[test]
fn swiglu_has_the_bits_of_inference() {
    let mut random = Random(44);
    let (rows, k, width) = (9, 40, 33);
    let weight = random.tensor([2 * width, k], crate::tensor::DType::BF16);
    let x = random.values(rows * k);
    for mut cpu in backends() {
        let group =
            cpu.group(vec![crate::backend::FrozenLinear { weight: weight.clone(), bias: None }]).unwrap();
        let mut gates = crate::backend::Gates::default();
        gates.push_rows(rows, &[]);
        let input = buffer(&cpu, k, &x);
        let mut gate_up = cpu.buffer(rows, 2 * width).unwrap();
        let [mut fused, mut apart] = [0; 2].map(|_| cpu.buffer(rows, width).unwrap());
        cpu.linear_swiglu(&group, &input, &gates, &mut fused).unwrap();
        cpu.linear(&group, &input, &gates, Write::Replace, &mut gate_up).unwrap();
        cpu.swiglu(&gate_up, rows, &mut apart).unwrap();
        assert_eq!(bits(cpu.read(&apart, rows).unwrap()), bits(&fused.data));
    }
}

#[test]
fn rows_are_copied_and_scattered() {
    let mut random = Random(45);
    let width = 7;
    let x = random.values(3 * width);
    for mut cpu in backends() {
        let input = buffer(&cpu, width, &x);
        let mut y = buffer(&cpu, width, &vec![5.0; 6 * width]);
        cpu.copy(&input, 2, &mut y).unwrap();
        assert_eq!(y.data[..2 * width], x[..2 * width]);
        assert!(y.data[2 * width..].iter().all(|&v| v == 5.0), "no more than the rows asked for");
        cpu.scatter_rows(&input, &[2, 4], 1..5, &mut y).unwrap();
        let rows: Vec<&[f32]> = y.data.chunks_exact(width).collect();
        let zeros = vec![0.0; width];
        let wanted: [&[f32]; 6] = [&x[..width], &zeros, &x[..width], &zeros, &x[width..2 * width], &[5.0; 7]];
        assert_eq!(rows, wanted);
    }
}
