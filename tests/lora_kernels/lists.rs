//! What comes before a product: the chunk lists, and V.

use loramux::backend::cuda::lora::{ShrinkKernel, shrink_slices};

use crate::cuda_device::under_thread_orders;
use crate::element::{f, half_of_smallest, half_ulp, in_both_types};
use crate::harness::{Batch, Group, Lists, OnDevice, Output, Random};
use crate::{in_order, runs};

const TILE: usize = 128;

/// A chunk as the list should name it: expert, chunk of the expert, site.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Wanted {
    expert: usize,
    chunk: usize,
    site: usize,
}

/// The list of each cell (row tile, K slice, site), by plain loops.
fn wanted_cells(group: &Group, batch: &Batch, slices: usize) -> Vec<Vec<Wanted>> {
    let mut cells = Vec::new();
    for tile in batch.gates.chunks(TILE) {
        let mut experts: Vec<usize> = tile.iter().flatten().map(|&(expert, _)| expert as usize).collect();
        experts.sort_by_key(|&expert| group.experts[expert].order);
        experts.dedup();
        for slice in 0..slices {
            for site in 0..group.widths.len() {
                let of_cell = experts.iter().flat_map(|&expert| {
                    let order = group.experts[expert].order;
                    let rank = group.experts[expert].pairs[site].as_ref().map_or(0, |pair| pair.rank);
                    let chunks = (0..rank.div_ceil(16)).map(move |chunk| Wanted { expert, chunk, site });
                    chunks.filter(move |of| (order as u32 as usize + of.chunk) % slices == slice)
                });
                cells.push(of_cell.collect());
            }
        }
    }
    cells
}

/// Panics unless the list names the chunks that plain loops name.
fn assert_lists(group: &Group, batch: &Batch, slices: usize, lists: &Lists) {
    let cells = wanted_cells(group, batch, slices);
    let cells_of_tile = slices * group.widths.len();
    let mut chunk_of = std::collections::HashMap::new();
    let mut start = 0;
    for (cell, wanted) in cells.iter().enumerate() {
        assert_eq!(lists.starts[cell] as usize, start, "cell {cell}");
        for (i, wanted) in wanted.iter().enumerate() {
            let got = lists.chunks[start + i];
            assert_eq!(got.site as usize, wanted.site);
            assert_eq!(got.scale, group.experts[wanted.expert].scale);
            let of_site = chunk_of.entry((wanted.site, got.chunk)).or_insert((wanted.expert, wanted.chunk));
            assert_eq!(*of_site, (wanted.expert, wanted.chunk), "a chunk belongs to one expert");
        }
        start += wanted.len();
        if (cell + 1) % cells_of_tile == 0 {
            assert_eq!(lists.starts[cell + 1] as usize, start, "the end of a tile");
        }
    }
}

/// Panics unless V is `gate · scale · (x · aᵀ)`, and zero where a row does not use the expert.
fn assert_v(group: &Group, batch: &Batch, slices: usize, lists: &Lists) {
    let input = group.in_features;
    let cells = wanted_cells(group, batch, slices);
    let tile_of = |cell: usize| cell / (slices * group.widths.len());
    let entries =
        cells.iter().enumerate().flat_map(|(cell, wanted)| wanted.iter().map(move |of| (tile_of(cell), of)));
    for (v_block, (tile, wanted)) in entries.enumerate() {
        let expert = &group.experts[wanted.expert];
        let pair = expert.pairs[wanted.site].as_ref().expect("a target");
        for row in tile * TILE..batch.rows().min((tile + 1) * TILE) {
            let gate = batch.gates[row].iter().find(|(of, _)| *of as usize == wanted.expert);
            for rank in 0..16 {
                let got = lists.v[(v_block * TILE + row % TILE) * 16 + rank];
                let r = wanted.chunk * 16 + rank;
                let Some((_, gate)) = gate.filter(|_| r < pair.rank) else {
                    assert_eq!(got.0 & 0x7fff, 0, "row {row} does not use rank {r} of {wanted:?}");
                    continue;
                };
                let factor = f64::from(*gate) * f64::from(expert.scale);
                let terms =
                    (0..input).map(|k| factor * f(batch.x[row * input + k]) * f(pair.a[r * input + k]));
                let (sum, size) = terms.fold((0.0, 0.0), |(sum, size), term| (sum + term, size + term.abs()));
                let error = size * 2f64.powi(-20) + sum.abs() * half_ulp() + half_of_smallest();
                assert!(
                    (f(got) - sum).abs() <= error,
                    "row {row}, rank {r} of {wanted:?}: {}, wanted {sum}",
                    f(got)
                );
            }
        }
    }
}

fn check(random: &mut Random, group: &Group, gates: Vec<Vec<(u32, f32)>>) {
    let batch = Batch::new(random, group, Output::Store, gates);
    under_thread_orders(3, || {
        let on_device = OnDevice::new(group, in_order(group.experts.len()), batch.rows());
        let few = on_device.lists(group, &batch, ShrinkKernel::Rows16);
        assert_lists(group, &batch, on_device.slices(), &few);
        assert_v(group, &batch, on_device.slices(), &few);
        let many = on_device.lists(group, &batch, ShrinkKernel::Rows64);
        assert_v(group, &batch, on_device.slices(), &many);
        let cells = on_device.slices() * group.widths.len();
        for row in 0..batch.rows() {
            let tile = row / TILE * cells;
            for v_block in few.starts[tile] as usize..few.starts[tile + cells] as usize {
                let at = (v_block * TILE + row % TILE) * 16;
                assert_eq!(few.v[at..at + 16], many.v[at..at + 16], "both kernels have the same bits");
            }
        }
    });
}

#[test]
fn a_chunk_list_for_every_tile_slice_and_site() {
    let random = &mut Random(21);
    let ranks: Vec<Vec<usize>> = (0..36).map(|_| (0..3).map(|_| random.below(40)).collect()).collect();
    // Two K slices; more experts in a tile than a warp has lanes.
    let group = Group::new(random, 1024, &[40, 16, 8], false, &ranks);
    let gates = (0..150).map(|_| vec![(random.below(36) as u32, random.number())]).collect();
    check(random, &group, gates);
}

#[test]
fn v_is_zero_where_a_row_does_not_use_an_expert() {
    in_both_types(|| {
        let random = &mut Random(22);
        // One K slice, two, and the most there are.
        for (input, slices) in [(200, 1), (2056, 2), (8200, 8)] {
            assert_eq!(shrink_slices(input), slices);
            let group = Group::new(random, input, &[16, 24], false, &[vec![16, 5], vec![33, 0], vec![0, 8]]);
            let mut gates = runs(&[(Some(0), 70), (None, 20), (Some(1), 50), (Some(2), 9)]);
            gates[3] = vec![(0, 0.5), (2, -0.25), (1, 2.0)];
            gates.drain(5..if slices > 2 { 135 } else { 5 });
            check(random, &group, gates);
        }
    });
}
