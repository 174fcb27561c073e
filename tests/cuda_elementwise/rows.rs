//! `rms_norm`, `swiglu` and `pick_rows` against plain loops.

use loramux::backend::Rows;
use loramux::backend::cuda::Half;
use loramux::backend::cuda::elementwise::{StepLimits, StepRows};

use crate::SEEDS;
use crate::cuda_device::under_thread_orders;
use crate::element::{in_both_types, round};
use crate::harness::{
    OnDevice, Padded, ROWS, Random, WIDTHS, assert_close, bits, count_of, f, limits, matrix,
};

const EPSILON: f32 = 1e-5;

fn norm(on: &OnDevice, x: &Padded, rows: usize, weight: &[f32], stride: usize) -> Padded {
    let (input, weight) = (on.matrix_of(x), on.upload(weight));
    on.to_rows(rows, x.width, stride, |y, count| {
        on.kernels
            .rms_norm(&on.stream, matrix(&input), weight.slice(..), EPSILON, count, y)
            .expect("rms_norm");
    })
}

#[test]
fn rms_norm_is_within_its_error() {
    in_both_types(|| {
        let random = &mut Random(1);
        for (width, stride) in WIDTHS {
            for rows in ROWS {
                let values = random.values(rows * width, 3.0);
                let weight = random.floats(width);
                let x = Padded::new(&values, width, stride, 1);
                under_thread_orders(SEEDS, || {
                    let y = norm(&OnDevice::new(), &x, rows, &weight, stride);
                    for row in 0..rows {
                        let squares: f64 = x.row(row).iter().map(|&v| f(v) * f(v)).sum();
                        let factor = 1.0 / (squares / width as f64 + f64::from(EPSILON)).sqrt();
                        for (i, (&got, &v)) in y.row(row).iter().zip(x.row(row)).enumerate() {
                            let wanted = f(v) * factor * f64::from(weight[i]);
                            // Sums of positive terms: at most an ulp for each addition in a chain, of which a width of
                            // 4104 has 24 in a thread, 5 in a warp and 8 over warps; half of it behind the root.
                            assert_close(got, wanted, wanted.abs() * 2f64.powi(-18), || {
                                format!("width {width}, row {row}, column {i}")
                            });
                        }
                    }
                });
            }
        }
    });
}

#[test]
fn rms_norm_in_place_has_the_same_bits() {
    let random = &mut Random(2);
    for (width, stride) in [(4104, 4112), (77, 80)] {
        let x = Padded::new(&random.values(3 * width, 1.0), width, stride, 1);
        let weight = random.floats(width);
        under_thread_orders(SEEDS, || {
            let on = OnDevice::new();
            let apart = norm(&on, &x, 3, &weight, stride);
            let (data, weight) = (on.matrix_of(&x), on.upload(&weight));
            let count = on.upload(&[3]);
            on.kernels
                .rms_norm(
                    &on.stream,
                    matrix(&data),
                    weight.slice(..),
                    EPSILON,
                    count_of(&count, 3),
                    matrix(&data),
                )
                .expect("rms_norm");
            let in_place = on.download(&data.0);
            assert_eq!(bits(&in_place), bits(&apart.values));
        });
    }
}

#[test]
fn swiglu_is_within_its_error() {
    in_both_types(|| {
        let random = &mut Random(3);
        for (width, stride) in WIDTHS {
            for rows in ROWS {
                // Large negative gates, where exp(-x) overflows, among them; no product overflows.
                let mut values = random.values(rows * 2 * width, 8.0);
                for at in (0..values.len()).step_by(13) {
                    values[at] = round(30.0 * f(values[at]) as f32);
                }
                let x = Padded::new(&values, 2 * width, 2 * stride, 1);
                under_thread_orders(SEEDS, || {
                    let on = OnDevice::new();
                    let input = on.matrix_of(&x);
                    let y = on.to_rows(rows, width, stride, |y, count| {
                        on.kernels.swiglu(&on.stream, matrix(&input), width, count, y).expect("swiglu");
                    });
                    for row in 0..rows {
                        let (gate, up) = x.row(row).split_at(width);
                        for (i, (&gate, &up)) in gate.iter().zip(up).enumerate() {
                            let wanted = f(gate) / (1.0 + (-f(gate)).exp()) * f(up);
                            // exp, the division and two roundings, an ulp or two each; and what is below the smallest
                            // normal number of fp32, times up, may be lost.
                            let error =
                                wanted.abs() * 2f64.powi(-20) + 2f64.powi(-126) * 1024.0 * f(up).abs();
                            assert_close(y.row(row)[i], wanted, error, || {
                                format!("width {width}, row {row}, column {i}, silu({}) * {}", f(gate), f(up))
                            });
                        }
                    }
                });
            }
        }
    });
}

#[test]
fn picked_rows_are_copies() {
    in_both_types(|| {
        let random = &mut Random(4);
        for (width, stride) in WIDTHS {
            let rows = 6;
            let mut values = random.values(rows * width, 1.0);
            values[0] = Half(0x7fc1);
            let x = Padded::new(&values, width, stride, 0);
            for picked in [&[][..], &[5], &[0, 2, 3, 3, 0, 1, 5]] {
                under_thread_orders(SEEDS, || {
                    let on = OnDevice::new();
                    let limits = StepLimits { rows, picked: 8, ..limits() };
                    let mut steps = StepRows::new(on.device(), limits).expect("steps");
                    let mut step = Rows::default();
                    step.push_sequence(&[0; 6], 0, 0, &[0], &[]);
                    steps.set(&on.stream, &step, picked).expect("a step");
                    let input = on.matrix_of(&x);
                    let y = on.to_rows(picked.len(), width, stride, |y, _| {
                        let count = steps.picked_count(picked.len() + 1, true);
                        on.kernels
                            .pick_rows(&on.stream, matrix(&input), width, &steps, count, y)
                            .expect("pick_rows");
                    });
                    for (i, &row) in picked.iter().enumerate() {
                        assert_eq!(bits(y.row(i)), bits(x.row(row as usize)), "width {width}, row {row}");
                    }
                });
            }
        }
    });
}

/// Promise 3 for sums over a row: alone, at another place and among others, a row has the same bits.
#[test]
fn a_normalised_row_has_the_same_bits_in_every_batch() {
    let random = &mut Random(5);
    for width in [4104, 200, 77] {
        let rows = 9;
        let x = Padded::new(&random.values(rows * width, 1.0), width, width, 1);
        let weight = random.floats(width);
        let on = OnDevice::new();
        let all = norm(&on, &x, rows, &weight, width);
        under_thread_orders(SEEDS, || {
            for row in 0..rows {
                let alone = Padded::new(x.row(row), width, width, 1);
                let alone = norm(&on, &alone, 1, &weight, width);
                assert_eq!(bits(alone.row(0)), bits(all.row(row)), "width {width}, row {row}");
            }
        });
    }
}
