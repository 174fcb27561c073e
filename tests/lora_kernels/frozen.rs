//! Products of a layer that an adapter puts in the place of a whole one, over a run of a step's rows.

use loramux::backend::cuda::elementwise::RowCount;
use loramux::backend::cuda::lora::{FrozenLayer, Matrix, Outputs, ProductKernel, Scratch};
use loramux::backend::cuda::{DeviceSlice, Half};

use crate::cuda_device::under_thread_orders;
use crate::element::Value;
use crate::harness::{Batch, Group, OnDevice, Output, Random};
use crate::{bits, runs};

/// A run of rows by `frozen_product`: row `first` on, `count` of them in a launch for `bound`.
struct Run {
    first: usize,
    count: usize,
    bound: usize,
}

/// Outputs `[rows, stride]` of nothing but a run.
fn outputs<T: Value>(
    group: &Group,
    batch: &Batch,
    run: &Run,
    padding: usize,
    as_outputs: impl for<'a> Fn(DeviceSlice<'a, T>, usize) -> Outputs<'a>,
) -> Vec<f32> {
    let on_device = OnDevice::new(group, vec![], batch.rows());
    let (width, input) = (group.widths[0], group.in_features);
    let (x_stride, stride) = (input + 8, width + padding);
    let x = on_device.padded(&batch.x, batch.rows(), input, x_stride);
    let y = on_device.upload(&vec![T::NAN; batch.rows() * stride]);
    let count = on_device.upload(&[run.count as u32]);
    let site = &on_device.group.sites()[0];
    let layer = FrozenLayer {
        weight: site.weight.slice(..),
        bias: site.bias.as_ref().map(|bias| bias.slice(..)),
        in_features: input,
        out_features: width,
    };
    let scratch = Scratch::new(&on_device.stream, &[&on_device.group]).expect("scratch");
    let from = |stride| run.first * stride..;
    let x = Matrix { data: x.slice(from(x_stride)), stride: x_stride };
    let to = as_outputs(y.slice(from(stride)), stride);
    let rows = RowCount { count: count.slice(..), bound: run.bound, overlap: true };
    on_device.kernels.frozen_product(&on_device.stream, layer, x, to, rows, &scratch).expect("a product");
    on_device.rows_of(&y, width, stride)
}

/// The run's rows have the bits that they have in a group of this layer alone; no other row is written.
#[test]
fn a_run_has_the_bits_of_a_group_without_adapters() {
    let random = &mut Random(41);
    let runs_of_rows = [(0, 3, 16), (7, 64, 64), (100, 0, 20), (30, 150, 150), (200, 1, 10), (9, 100, 200)];
    for (input, width, bias) in [(64, 72, true), (1024, 67, false), (136, 264, true)] {
        let group = Group::new(random, input, &[width], bias, &[]);
        let batch = Batch::new(random, &group, Output::Store, runs(&[(None, 210)]));
        let on_device = OnDevice::new(&group, vec![], batch.rows());
        for (first, count, bound) in runs_of_rows {
            let run = Run { first, count, bound };
            under_thread_orders(2, || {
                for output in [Output::Store, Output::StoreFp32] {
                    let wanted = on_device.run(&group, &batch, output, ProductKernel::RankExt);
                    let got = if output == Output::StoreFp32 {
                        outputs::<f32>(&group, &batch, &run, 1, |data, stride| Matrix { data, stride }.into())
                    } else {
                        outputs::<Half>(&group, &batch, &run, 16, |data, stride| {
                            Matrix { data, stride }.into()
                        })
                    };
                    let of_run = first * width..(first + count) * width;
                    assert_eq!(bits(&got[of_run.clone()]), bits(&wanted[of_run.clone()]));
                    let others = got[..of_run.start].iter().chain(&got[of_run.end..]);
                    assert!(others.copied().all(f32::is_nan), "rows {first}.. {count} of {bound}");
                }
            });
        }
    }
}
