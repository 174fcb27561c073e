//! Products as plain loops in f64, and how far from them a correct kernel can be.

use loramux::backend::cuda::Half;

use crate::element::{f, half_of_smallest, half_ulp};
use crate::harness::{Batch, Group, Output, Pair};

/// An output and how far a correct kernel can be from it.
struct Bound {
    value: f64,
    error: f64,
}

/// The sum of one output in f64, before its epilogue.
fn sum(group: &Group, batch: &Batch, row: usize, site: usize, column: usize) -> Bound {
    let input = group.in_features;
    let dot = |a: &[Half], b: &[Half]| {
        a.iter()
            .zip(b)
            .fold((0.0, 0.0), |(sum, size), (&a, &b)| (sum + f(a) * f(b), size + (f(a) * f(b)).abs()))
    };
    let x = &batch.x[row * input..(row + 1) * input];
    let (product, product_size) = dot(x, &group.weights[site][column * input..(column + 1) * input]);
    let (mut scale, mut value, mut size) = (1.0, 0.0, 0.0);
    // V is rounded, for each rank.
    let mut rounding = 0.0;
    for &(expert, gate) in &batch.gates[row] {
        let expert = &group.experts[expert as usize];
        let Some(Pair { rank, a, b, column_scale, bias }) = &expert.pairs[site] else { continue };
        let gate = f64::from(gate);
        if let Some(column_scale) = column_scale {
            scale += gate * (f64::from(column_scale[column]) - 1.0);
        }
        if let Some(bias) = bias {
            value += gate * f64::from(bias[column]);
            size += (gate * f64::from(bias[column])).abs();
        }
        for r in 0..*rank {
            let (product, product_size) = dot(x, &a[r * input..(r + 1) * input]);
            let b = f(b[column * rank + r]);
            let factor = gate * f64::from(expert.scale) * b;
            value += factor * product;
            size += factor.abs() * product_size;
            rounding += (factor * product).abs() * half_ulp() + b.abs() * half_of_smallest();
        }
    }
    value += scale * product;
    size += scale.abs() * product_size;
    if let Some(biases) = &group.biases {
        value += f64::from(biases[site][column]);
    }
    Bound { value, error: rounding + size * 2f64.powi(-20) }
}

/// Panics unless every output lies within the error that outputs and V in 16 bits and sums in fp32 explain.
pub fn assert_close(group: &Group, batch: &Batch, output: Output, y: &[f32]) {
    let width = group.width(output);
    assert_eq!(y.len(), batch.rows() * width);
    for row in 0..batch.rows() {
        let mut at = 0;
        for (site, &columns) in group.widths.iter().enumerate() {
            for column in 0..columns {
                if output == Output::SwiGlu && site == 1 {
                    continue;
                }
                let mut wanted = sum(group, batch, row, site, column);
                match output {
                    Output::Store | Output::StoreFp32 => {}
                    Output::AddResidual | Output::AddInPlace => {
                        wanted.value += f(batch.residual[row * width + at]);
                    }
                    Output::SwiGlu => {
                        let up = sum(group, batch, row, 1, column);
                        let sigmoid = 1.0 / (1.0 + (-wanted.value).exp());
                        let silu = wanted.value * sigmoid;
                        // silu's slope is at most 1.1.
                        let error = 1.1 * wanted.error * (up.value.abs() + up.error) + silu.abs() * up.error;
                        wanted =
                            Bound { value: silu * up.value, error: error + (silu * up.value).abs() * 1e-6 };
                    }
                }
                let rounding = if output == Output::StoreFp32 {
                    0.0
                } else {
                    (wanted.value.abs() + wanted.error) * half_ulp() + half_of_smallest()
                };
                let error = wanted.error + rounding;
                let got = f64::from(y[row * width + at]);
                assert!(
                    (got - wanted.value).abs() <= error * 1.001 + 1e-9,
                    "row {row}, site {site}, column {column}: {got}, wanted {} ± {error}",
                    wanted.value
                );
                at += 1;
            }
        }
    }
}
