//! Products that compute V themselves: `linear` for up to 64 rows.

use loramux::backend::cuda::lora::{
    ChunkLists, Epilogue, GemmDecodeCounters, Matrix, ProductKernel, Scratch, ShrinkKernel, Step, WorkList,
};
use loramux::backend::cuda::{DeviceBuffer, Half};

use crate::cuda_device::{device, on_gpu, under_thread_orders};
use crate::element::{NAN, in_both_types};
use crate::harness::{Batch, Group, Launches, OnDevice, Output, Path, Random, counters};
use crate::{bits, in_order, runs, same_ranks};

/// V and Y in one launch, then in two, bit for bit.
fn check(random: &mut Random, group: &Group, output: Output, gates: Vec<Vec<(u32, f32)>>) {
    let batch = Batch::new(random, group, output, gates);
    let slots = || in_order(group.experts.len());
    under_thread_orders(4, || {
        let on_device = OnDevice::new(group, slots(), batch.rows());
        let two = on_device.run(group, &batch, output, ProductKernel::Decode);
        let one = Path { launches: Launches::Linear, padding: 16 };
        let one = on_device.run(group, &batch, output, one);
        assert_eq!(bits(&one), bits(&two), "{} rows", batch.rows());

        let wanted = on_device.lists(group, &batch, ShrinkKernel::Rows16);
        on_device.in_step(group, &batch, None, |x, step| {
            let width = group.widths.iter().sum::<usize>();
            let y = on_device.upload(&vec![NAN; batch.rows() * width]);
            let y = Matrix { data: y.slice(..), stride: width };
            let OnDevice { stream, kernels, group, .. } = &on_device;
            kernels.linear(stream, group, x, y, Epilogue::Store, step).expect("a product");
            let mut v = vec![Half::ZERO; step.scratch.v().len()];
            stream.download(step.scratch.v(), &mut v).expect("V");
            let rows = v.chunks_exact(16).zip(wanted.v.chunks_exact(16));
            for (i, (got, wanted)) in rows.enumerate().filter(|(i, _)| i % 128 < batch.rows()) {
                assert_eq!(got, wanted, "row {} of v block {}", i % 128, i / 128);
            }
        });
    });
}

/// More K slices of V than one, and of the product; none; ranks that fill no chunk and many.
#[test]
fn one_launch_has_the_bits_of_two() {
    let random = &mut Random(51);
    for (input, widths, output, rows) in [
        (2056, vec![72], Output::AddResidual, 16),
        (64, vec![72, 64, 10], Output::Store, 31),
        (1032, vec![40, 40], Output::SwiGlu, 64),
        (136, vec![203], Output::StoreFp32, 50),
    ] {
        let ranks: Vec<_> = [1, 16, 17, 130, 0, 40].iter().map(|&rank| vec![rank; widths.len()]).collect();
        let group = Group::new(random, input, &widths, true, &ranks);
        check(random, &group, output, runs(&[(None, rows)]));
        check(random, &group, output, runs(&[(Some(1), 1)]));
        check(random, &group, output, runs(&[(Some(3), rows)]));
        // Mixtures, experts side by side in 16 rows, and experts beyond.
        let gates = (0..rows)
            .map(|row| {
                let experts = [(row / 7 % 6) as u32, 5 - (row / 11 % 3) as u32];
                let count = if experts[0] == experts[1] { 1 } else { random.below(3) };
                experts[..count].iter().map(|&expert| (expert, random.number())).collect()
            })
            .collect();
        check(random, &group, output, gates);
    }
}

/// Fewer units of V than thread blocks, and more: then one is for all rows.
#[test]
fn units_of_v_for_16_rows_and_for_all() {
    in_both_types(|| {
        let random = &mut Random(52);
        let group = Group::new(random, 64, &[64, 136], false, &same_ranks(&[8; 64], 2));
        for experts in [1, 2, 5, 64] {
            let each =
                runs(&(0..experts).map(|expert| (Some(expert), 64 / experts as usize)).collect::<Vec<_>>());
            check(random, &group, Output::Store, each);
        }
    });
}

/// The same scratch memory serves groups one after the other, whatever their steps.
#[test]
fn counters_are_as_before_after_every_launch() {
    let random = &mut Random(53);
    let groups = [(2048, 72), (64, 136)].map(|(input, width)| {
        let group = Group::new(random, input, &[width], false, &same_ranks(&[16, 33, 8], 1));
        let on_device = OnDevice::new(&group, in_order(3), 64);
        (group, on_device)
    });
    let OnDevice { stream, kernels, .. } = &groups[0].1;
    let of_device = groups.each_ref().map(|(_, on_device)| &on_device.group);
    let scratch = Scratch::new(stream, &of_device).expect("scratch");
    let lists = ChunkLists::new(stream, &of_device).expect("lists");
    let mut work = WorkList::new(stream.device(), 64, 3).expect("a work list");
    for (round, rows) in [64, 5, 0, 17, 64, 33, 1, 16].into_iter().enumerate() {
        if !on_gpu() {
            loramux_emulator::set_seed(round as u64);
        }
        let gates = (0..rows).map(|_| vec![(random.below(3) as u32, random.number())]);
        let gates: Vec<_> = gates.map(|gates| if round == 4 { vec![] } else { gates }).collect();
        for (group, on_device) in &groups {
            let batch = Batch::new(random, group, Output::Store, gates.clone());
            work.set(stream, &on_device.gates(&batch), on_device.order_of(group)).expect("a step");
            lists.build(stream, kernels, &work).expect("lists");
            let step = Step { work: &work, row_bound: rows, scratch: &scratch, overlap: true };
            let (input, width) = (group.in_features, group.widths[0]);
            let x = on_device.padded(&batch.x, rows, input, input);
            let y: DeviceBuffer<Half> =
                DeviceBuffer::new(stream.device(), rows * width, "y").expect("memory");
            let x = Matrix { data: x.slice(..), stride: input };
            let to = Matrix { data: y.slice(..), stride: width };
            kernels.linear(stream, &on_device.group, x, to, Epilogue::Store, &step).expect("a product");
            assert_eq!(counters(stream, &scratch), [0; 3], "{rows} rows");
            let wanted = on_device.run(group, &batch, Output::Store, ProductKernel::RankExt);
            let got = on_device.rows_of(&y, width, width);
            assert_eq!(bits(&got), bits(&wanted), "{rows} rows");
        }
    }
}

/// Where a unit of V has been taken and is not done, whoever needs V waits. The emulator, whose thread blocks run one
/// after another, says that it waits for nothing; a GPU would wait for ever.
#[test]
fn rank_blocks_wait_for_v() {
    const CHILD: &str = "LORAMUX_TEST_WAIT";
    if on_gpu() {
        return;
    }
    if std::env::var_os(CHILD).is_none() {
        // In a process of its own: a fault ends all work on a device.
        let mut command = std::process::Command::new(std::env::current_exe().expect("this test"));
        let command = command.args(["--exact", "fused::rank_blocks_wait_for_v", "--nocapture"]);
        let ran = command.env(CHILD, "1").output().expect("a process");
        assert!(ran.status.success(), "{}", String::from_utf8_lossy(&ran.stderr));
        return;
    }
    let random = &mut Random(54);
    let _device = device();
    let group = Group::new(random, 64, &[64], false, &same_ranks(&[16], 1));
    let batch = Batch::new(random, &group, Output::Store, runs(&[(Some(0), 3)]));
    let on_device = OnDevice::new(&group, in_order(1), 3);
    on_device.in_step(&group, &batch, None, |x, step| {
        let OnDevice { stream, kernels, group, .. } = &on_device;
        let taken = GemmDecodeCounters { taken: 1, ..Default::default() };
        stream.upload(&[taken], step.scratch.counters()).expect("a counter");
        let y = on_device.upload(&[NAN; 3 * 64]);
        let y = Matrix { data: y.slice(..), stride: 64 };
        let launched = kernels.linear(stream, group, x, y, Epilogue::Store, step);
        assert!(launched.and_then(|()| stream.synchronize()).is_err());
        let report = loramux_emulator::last_report().expect("a fault");
        assert!(report.contains("waits for a count of 1 with no block left to add to 0"), "{report}");
        std::process::exit(0);
    });
}
