//! The LoRA kernels against plain loops, and their promise: a row's bits depend on nothing but the row.
//!
//! Runs on the emulator, under several orders of threads, or with `LORAMUX_TEST_DEVICE=cuda` on a GPU.
#![cfg(feature = "cuda")]

#[path = "../common/cuda_device.rs"]
mod cuda_device;
#[path = "../common/element.rs"]
mod element;
mod frozen;
mod fused;
mod graph;
mod harness;
mod lists;
#[path = "../common/random.rs"]
mod random;
mod reference;
mod refusals;

use crate::element::in_both_types;
use cuda_device::under_thread_orders;
use harness::{Batch, Group, Launches, OnDevice, Output, Pair, Path, Random};
use loramux::backend::cuda::lora::ProductKernel;
use reference::assert_close;

const SEEDS: u64 = 3;

/// Gates of rows that use one expert each, in runs: `(expert, rows)`, none for the base.
fn runs(of: &[(Option<u32>, usize)]) -> Vec<Vec<(u32, f32)>> {
    let gates = |expert: &Option<u32>| expert.map_or(Vec::new(), |expert| vec![(expert, 1.0)]);
    of.iter().flat_map(|(expert, rows)| vec![gates(expert); *rows]).collect()
}

fn same_ranks(ranks: &[usize], sites: usize) -> Vec<Vec<usize>> {
    ranks.iter().map(|&rank| vec![rank; sites]).collect()
}

fn in_order(experts: usize) -> Vec<u32> {
    (0..experts as u32).collect()
}

/// Computes a batch on every path that takes it and compares with the plain loop, and the paths with each other.
fn check(random: &mut Random, group: &Group, output: Output, gates: Vec<Vec<(u32, f32)>>) {
    let batch = Batch::new(random, group, output, gates);
    under_thread_orders(SEEDS, || {
        let on_device = OnDevice::new(group, in_order(group.experts.len()), batch.rows().max(1));
        let large = on_device.run(group, &batch, output, ProductKernel::RankExt);
        assert_close(group, &batch, output, &large);
        for path in paths_for(random, batch.rows()) {
            let other = on_device.run(group, &batch, output, path);
            assert_eq!(bits(&other), bits(&large), "{path:?} must agree with RankExt to the bit");
        }
    });
}

/// The ways in which a product of so many rows can be made, with rows of outputs some of which begin anywhere.
fn paths_for(random: &mut Random, rows: usize) -> Vec<Path> {
    use ProductKernel::*;
    let kernels = if rows <= 64 { vec![Decode, RankExt, RankExtSplit] } else { vec![RankExt, RankExtSplit] };
    let ways = kernels.into_iter().map(Launches::ShrinkAnd).chain([Launches::Linear]);
    ways.map(|launches| Path { launches, padding: [16, 5][random.below(2)] }).collect()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

#[test]
fn ranks_from_1_to_128_in_one_batch() {
    let random = &mut Random(1);
    let ranks = [1, 3, 8, 16, 17, 31, 64, 100, 128];
    let group = Group::new(random, 192, &[136, 64, 64], true, &same_ranks(&ranks, 3));
    let rows: Vec<_> = (0..ranks.len()).map(|expert| (Some(expert as u32), 3 + expert)).collect();
    check(random, &group, Output::Store, runs(&rows));
}

#[test]
fn tiles_that_straddle_adapters_and_an_odd_number_of_rows() {
    let random = &mut Random(2);
    let group = Group::new(random, 128, &[72], false, &same_ranks(&[16, 40, 8], 1));
    let rows = [(Some(0), 50), (Some(1), 60), (None, 31), (Some(2), 119), (Some(0), 3)];
    check(random, &group, Output::Store, runs(&rows));
}

#[test]
fn an_adapter_without_one_of_the_sites() {
    let random = &mut Random(3);
    let ranks = [vec![16, 0, 8], vec![0, 24, 0], vec![0, 0, 0]];
    let group = Group::new(random, 64, &[64, 32, 32], false, &ranks);
    check(random, &group, Output::Store, runs(&[(Some(0), 5), (Some(1), 9), (Some(2), 4), (None, 3)]));
}

#[test]
fn rows_of_the_base_alone() {
    in_both_types(|| {
        let random = &mut Random(4);
        let group = Group::new(random, 96, &[48], true, &same_ranks(&[16], 1));
        check(random, &group, Output::Store, runs(&[(None, 37)]));
        let without_adapters = Group::new(random, 96, &[48], true, &[]);
        check(random, &without_adapters, Output::Store, runs(&[(None, 130)]));
    });
}

#[test]
fn an_empty_batch_and_a_single_row() {
    let random = &mut Random(5);
    let group = Group::new(random, 64, &[64], false, &same_ranks(&[8], 1));
    check(random, &group, Output::Store, Vec::new());
    check(random, &group, Output::Store, runs(&[(Some(0), 1)]));
}

#[test]
fn several_weighted_experts_a_row() {
    in_both_types(|| {
        let random = &mut Random(6);
        let group = Group::new(random, 128, &[64, 40], false, &same_ranks(&[16, 4, 33, 8], 2));
        let gates = (0..70)
            .map(|_| {
                let mut experts = in_order(4);
                for i in (1..4).rev() {
                    experts.swap(i, random.below(i + 1));
                }
                experts.truncate(random.below(5));
                experts.into_iter().map(|expert| (expert, random.number())).collect()
            })
            .collect();
        check(random, &group, Output::Store, gates);
    });
}

#[test]
fn sixty_four_adapters() {
    let random = &mut Random(7);
    let group = Group::new(random, 64, &[64], false, &same_ranks(&[8; 64], 1));
    let one_row_each: Vec<_> = (0..64).map(|expert| (Some(expert), 1)).collect();
    check(random, &group, Output::Store, runs(&one_row_each));
    let three_rows_each: Vec<_> = (0..64).map(|expert| (Some(expert), 3)).collect();
    check(random, &group, Output::Store, runs(&three_rows_each));
}

#[test]
fn residual_and_swiglu_epilogues() {
    in_both_types(|| {
        let random = &mut Random(8);
        for bias in [false, true] {
            let group = Group::new(random, 128, &[88], bias, &same_ranks(&[16, 20], 1));
            let rows = [(Some(0), 9), (None, 2), (Some(1), 22)];
            check(random, &group, Output::AddResidual, runs(&rows));
            check(random, &group, Output::AddInPlace, runs(&rows));
            let ranks = [vec![16, 16], vec![8, 0], vec![0, 40]];
            let group = Group::new(random, 128, &[104, 104], bias, &ranks);
            let rows = [(Some(0), 19), (Some(1), 8), (None, 3), (Some(2), 5)];
            check(random, &group, Output::SwiGlu, runs(&rows));
        }
    });
}

/// DoRA's column scale, and biases: alone with gate 1, in mixtures, beside adapters that have none; also at rank 0.
#[test]
fn experts_that_change_columns() {
    in_both_types(|| {
        let random = &mut Random(12);
        for (input, widths, output) in [
            (128, vec![72, 24], Output::Store),
            (136, vec![40, 40], Output::SwiGlu),
            (1024, vec![72], Output::AddResidual),
        ] {
            let ranks: Vec<_> = [16, 20, 3, 8].iter().map(|&rank| vec![rank; widths.len()]).collect();
            let mut group = Group::new(random, input, &widths, true, &ranks);
            for (expert, (scaled, biased)) in
                [(true, false), (true, true), (false, true)].into_iter().enumerate()
            {
                for (site, pair) in group.experts[expert].pairs.iter_mut().enumerate() {
                    let pair = pair.as_mut().expect("a target");
                    let values = (0..widths[site]).map(|_| random.number()).collect::<Vec<_>>();
                    pair.column_scale =
                        scaled.then(|| values.iter().map(|value| 1.0 + value / 2.0).collect());
                    pair.bias = biased.then_some(values);
                    if expert == 2 {
                        *pair = Pair { rank: 0, a: vec![], b: vec![], ..pair.clone() };
                    }
                }
            }
            let mut gates = runs(&[(Some(0), 5), (Some(1), 6), (Some(3), 4), (None, 2), (Some(2), 30)]);
            gates.extend((0..9).map(|i| (0..=i % 4).map(|expert| (expert, random.number())).collect()));
            check(random, &group, output, gates);
        }
    });
}

#[test]
fn widths_that_fill_no_tile() {
    let random = &mut Random(9);
    for (input, widths) in [(8, vec![8]), (72, vec![8, 136, 72]), (264, vec![200])] {
        let group = Group::new(random, input, &widths, true, &same_ranks(&[5, 16], widths.len()));
        check(random, &group, Output::Store, runs(&[(Some(0), 7), (Some(1), 7), (None, 3)]));
    }
}

/// Vocabularies, head widths and intermediate widths that are no multiples of anything.
#[test]
fn any_output_widths() {
    let random = &mut Random(14);
    for (input, widths, output) in [
        (64, vec![1], Output::Store),
        (72, vec![67, 5, 130], Output::Store),
        (136, vec![10, 10, 10, 9], Output::AddInPlace),
        (64, vec![101], Output::AddResidual),
        (72, vec![52, 52], Output::SwiGlu),
        (64, vec![51, 51], Output::SwiGlu),
        (1024, vec![65], Output::StoreFp32),
        (2048, vec![35, 35], Output::SwiGlu),
    ] {
        let ranks = same_ranks(&[5, 16, 20], widths.len());
        let mut group = Group::new(random, input, &widths, true, &ranks);
        for (site, pair) in group.experts[2].pairs.iter_mut().enumerate() {
            let pair = pair.as_mut().expect("a target");
            pair.column_scale = Some((0..widths[site]).map(|_| 1.0 + random.number() / 2.0).collect());
            pair.bias = Some(random.floats(widths[site]));
        }
        check(random, &group, output, runs(&[(Some(0), 7), (Some(2), 2), (Some(1), 7), (None, 3)]));
    }
}

/// Logits are compared where differences are small beside them.
#[test]
fn outputs_that_are_not_rounded() {
    in_both_types(|| {
        let random = &mut Random(15);
        for (input, widths) in [(128, vec![72]), (1024, vec![72]), (64, vec![16, 200])] {
            let group = Group::new(random, input, &widths, true, &same_ranks(&[16, 3], widths.len()));
            check(random, &group, Output::StoreFp32, runs(&[(Some(0), 20), (None, 5), (Some(1), 31)]));
        }
        let group = Group::new(random, 64, &[136], false, &same_ranks(&[16], 1));
        check(random, &group, Output::StoreFp32, runs(&[(Some(0), 100), (None, 80)]));
    });
}

#[test]
fn k_in_slices() {
    let random = &mut Random(10);
    for (input, widths, output, slices) in [
        (1024, vec![72], Output::AddResidual, 2),
        (1544, vec![40, 16], Output::Store, 3),
        (2048, vec![32, 32], Output::SwiGlu, 4),
    ] {
        let group = Group::new(random, input, &widths, true, &same_ranks(&[16, 50, 1, 128], widths.len()));
        assert_eq!(OnDevice::new(&group, in_order(4), 1).slices(), slices);
        let rows = [(Some(0), 3), (Some(1), 4), (Some(2), 2), (Some(3), 5), (None, 2)];
        check(random, &group, output, runs(&rows));
    }
}

/// Thread blocks that park the sums of slices take several tiles each: the emulator runs eight at once.
#[test]
fn more_tiles_than_thread_blocks() {
    let random = &mut Random(13);
    let group = Group::new(random, 1024, &[264, 264], false, &same_ranks(&[16, 33], 2));
    let batch = Batch::new(random, &group, Output::Store, runs(&[(Some(0), 60), (None, 10), (Some(1), 61)]));
    under_thread_orders(2, || {
        let on_device = OnDevice::new(&group, in_order(2), batch.rows());
        assert_eq!(on_device.slices(), 2);
        let y = on_device.run(&group, &batch, Output::Store, ProductKernel::RankExt);
        assert_close(&group, &batch, Output::Store, &y);
    });
}

/// Promise 3, for the kernels: rows in a batch, alone, at other places, among others and by the other kernel have the
/// same bits, wherever their adapters are loaded.
#[test]
fn a_row_has_the_same_bits_in_every_batch() {
    in_both_types(|| {
        let random = &mut Random(11);
        for (input, widths, output) in [
            (192, vec![72, 24], Output::Store),
            (136, vec![40, 40], Output::SwiGlu),
            (1088, vec![48], Output::AddResidual),
        ] {
            let ranks: Vec<_> = (0..6).map(|_| widths.iter().map(|_| random.below(50)).collect()).collect();
            let group = Group::new(random, input, &widths, true, &ranks);
            let gates: Vec<_> = (0..150)
                .map(|_| {
                    let count = random.below(4);
                    let first = random.below(6) as u32;
                    (0..count as u32).map(|i| ((first + i) % 6, random.number())).collect()
                })
                .collect();
            let batch = Batch::new(random, &group, output, gates);
            let all = OnDevice::new(&group, in_order(6), batch.rows()).run(
                &group,
                &batch,
                output,
                ProductKernel::RankExt,
            );
            let width = group.width(output);
            for round in 0..6 {
                let count = [1, 2, 16, 33, 64, 140][round];
                let rows: Vec<_> = (0..count).map(|_| random.below(batch.rows())).collect();
                let part = batch.pick(&group, output, &rows);
                let slots = vec![vec![5, 3, 4, 0, 2, 1], vec![9, 11, 2, 0, 7, 5]][round % 2].clone();
                let on_device = OnDevice::new(&group, slots, count);
                for path in paths_for(random, count) {
                    let got = on_device.run(&group, &part, output, path);
                    for (i, &row) in rows.iter().enumerate() {
                        assert_eq!(
                            bits(&got[i * width..(i + 1) * width]),
                            bits(&all[row * width..(row + 1) * width]),
                            "row {row} as row {i} of {count}, {path:?}"
                        );
                    }
                }
            }
        }
    });
}
