//! A step as one graph.

use loramux::backend::cuda::lora::{ChunkLists, Epilogue, Matrix, ProductKernel, Scratch, Step, WorkList};
use loramux::backend::cuda::{DeviceBuffer, Half, Pinned};

use crate::cuda_device::on_gpu;
use crate::element::Value;
use crate::harness::{Batch, Group, OnDevice, Output, Random};
use crate::{bits, in_order, same_ranks};

const EXPERTS: usize = 5;

/// Rows of random experts: none, one or two each.
fn any_mix(random: &mut Random, rows: usize) -> Vec<Vec<(u32, f32)>> {
    let row = |random: &mut Random| {
        let first = random.below(EXPERTS) as u32;
        let count = random.below(3) as u32;
        (0..count).map(|i| ((first + i) % EXPERTS as u32, random.number())).collect()
    };
    (0..rows).map(|_| row(random)).collect()
}

/// Lists and products, with V in the same launch and in one of its own, are captured once; every later step only copies its inputs and its work list. Nothing is
/// allocated, and the host waits for nothing but the outputs.
#[test]
fn one_graph_serves_every_mix_of_adapters() {
    let random = &mut Random(31);
    for (bound, input, width) in [(16, 2048, 72), (64, 128, 40), (200, 136, 72)] {
        let group = Group::new(random, input, &[width], true, &same_ranks(&[16, 4, 33, 8, 64], 1));
        let on_device = OnDevice::new(&group, in_order(EXPERTS), bound);
        let OnDevice { stream, kernels, group: sites, .. } = &on_device;
        let device = stream.device();
        let x = DeviceBuffer::<Half>::new(device, bound * input, "x").expect("memory");
        let ys = [(); 2].map(|()| DeviceBuffer::<Half>::new(device, bound * width, "y").expect("memory"));
        let mut inputs = Pinned::new(device, bound * input, "inputs").expect("memory");
        let mut outputs = Pinned::new(device, 2 * bound * width, "outputs").expect("memory");
        let mut work = WorkList::new(device, bound, bound.div_ceil(128) * EXPERTS).expect("a work list");
        let lists = ChunkLists::new(stream, &[sites]).expect("lists");
        let scratch = Scratch::new(stream, &[sites]).expect("scratch");

        let step = Step { work: &work, row_bound: bound, scratch: &scratch, overlap: true };
        let captured = stream.capture(|| {
            lists.build(stream, kernels, &work)?;
            let x = Matrix { data: x.slice(..), stride: input };
            let [by_one, by_two] = ys.each_ref().map(|y| Matrix { data: y.slice(..), stride: width });
            kernels.linear(stream, sites, x, by_one, Epilogue::Store, &step)?;
            kernels.shrink_gate(stream, sites, x, &step)?;
            kernels.product(stream, sites, x, by_two, Epilogue::Store, &step)
        });
        let graph = captured.expect("a graph");

        for rows in [bound, 1, bound / 2 + 1, 0, bound - 3] {
            let gates = any_mix(random, rows);
            let batch = Batch::new(random, &group, Output::Store, gates);
            let before = (!on_gpu()).then(loramux_emulator::allocations_of_thread);
            inputs[..batch.x.len()].copy_from_slice(&batch.x);
            work.set(stream, &on_device.gates(&batch), on_device.order_of(&group)).expect("a work list");
            // SAFETY: `inputs` is next written after the outputs of this step have been waited for.
            unsafe { stream.upload_async(&inputs[..batch.x.len()], x.slice(..batch.x.len())) }
                .expect("a copy");
            // SAFETY: all buffers of the capture are alive.
            unsafe { graph.launch(stream) }.expect("a replay");
            let count = rows * width;
            for (y, outputs) in ys.iter().zip(outputs.chunks_exact_mut(bound * width)) {
                stream.download(y.slice(..count), &mut outputs[..count]).expect("the outputs");
            }
            if let Some(before) = before {
                assert_eq!(loramux_emulator::allocations_of_thread(), before, "a step must not allocate");
            }
            let wanted = on_device.run(&group, &batch, Output::Store, ProductKernel::RankExt);
            for outputs in outputs.chunks_exact(bound * width) {
                let got: Vec<f32> = outputs[..count].iter().map(|&value| value.to_f32()).collect();
                assert_eq!(bits(&got), bits(&wanted), "{rows} rows of at most {bound}");
            }
        }
    }
}
