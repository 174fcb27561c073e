//! Attention over the paged cache against plain loops, and its promise: a row's bits depend on its own sequence alone.
//!
//! Runs on the emulator, under several orders of threads, or with `LORAMUX_TEST_DEVICE=cuda` on a GPU.
#![cfg(feature = "cuda")]

#[path = "../common/cuda_device.rs"]
mod cuda_device;
#[path = "../common/element.rs"]
mod element;
mod graph;
mod harness;
#[path = "../common/random.rs"]
mod random;
mod refusals;

use crate::element::in_both_types;
use cuda_device::under_thread_orders;
use harness::{OnDevice, Piece, Random, Sequence, assert_close, bits};
use loramux::backend::cuda::attention::AttentionLimits;
use loramux::backend::cuda::attention::AttentionPath::{self, Split, Whole};
use loramux::backend::{AttentionShape, Rows};

const SEEDS: u64 = 3;

const LIMITS: AttentionLimits = AttentionLimits { rows: 1600, sequences: 4000, pages: 400, cache_pages: 150 };

fn shape(heads: usize, kv_heads: usize, head_dim: usize) -> AttentionShape {
    AttentionShape { heads, kv_heads, head_dim }
}

fn sequences(random: &mut Random, shape: AttentionShape, lengths: &[usize]) -> Vec<Sequence> {
    lengths.iter().map(|&length| Sequence::new(random, shape, length)).collect()
}

/// Computes sequences in one piece each, and the last rows of each alone, on both paths: all agree with the plain loop,
/// and with each other to the bit.
fn check(random: &mut Random, shape: AttentionShape, window: Option<usize>, lengths: &[usize]) {
    let sequences = sequences(random, shape, lengths);
    let pieces = |path| (0..lengths.len()).map(|i| Piece::all(&sequences, i, path)).collect::<Vec<_>>();
    let tails = |path| {
        let tail = |piece: Piece| {
            let rows = piece.rows.min(3);
            Piece { start: piece.rows - rows, rows, ..piece }
        };
        pieces(path).into_iter().map(tail).collect::<Vec<_>>()
    };
    let width = shape.heads * shape.head_dim;
    let mut checked = false;
    under_thread_orders(SEEDS, || {
        let on_device = OnDevice::new(shape, LIMITS);
        let whole = on_device.run(random, &sequences, window, &pieces(Whole));
        if !std::mem::replace(&mut checked, true) {
            for (piece, outputs) in pieces(Whole).iter().zip(&whole) {
                assert_close(shape, &sequences[piece.sequence], window, piece, outputs);
            }
        }
        for step in [pieces(Split), tails(Whole), tails(Split)] {
            let outputs = on_device.run(random, &sequences, window, &step);
            for (piece, outputs) in step.iter().zip(&outputs) {
                let wanted = &whole[piece.sequence][piece.start * width..];
                assert_eq!(
                    bits(outputs),
                    bits(wanted),
                    "{piece:?} must agree with the whole sequence to the bit"
                );
            }
        }
    });
}

#[test]
fn every_width_of_heads() {
    in_both_types(|| {
        let random = &mut Random(1);
        for head_dim in [2, 8, 10, 16, 24, 32, 42, 64, 80, 96, 128, 160, 256] {
            check(random, shape(4, 2, head_dim), None, &[7, 70]);
        }
    });
}

#[test]
fn groups_of_query_heads() {
    in_both_types(|| {
        let random = &mut Random(2);
        for (heads, kv_heads) in [(1, 1), (3, 3), (4, 1), (8, 2), (8, 1), (7, 1), (20, 1), (71, 1)] {
            check(random, shape(heads, kv_heads, 16), None, &[1, 20, 66]);
        }
    });
}

#[test]
fn lengths_around_pages_blocks_and_splits() {
    let random = &mut Random(3);
    check(random, shape(2, 1, 16), None, &[1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 200]);
    for length in [511, 512, 513, 575, 577, 700] {
        check(random, shape(2, 1, 16), None, &[length]);
    }
    check(random, shape(2, 1, 64), None, &[1100]);
}

#[test]
fn sliding_windows() {
    let random = &mut Random(4);
    for window in [1, 2, 16, 63, 64, 65, 100, 511, 512, 600, 5000] {
        check(random, shape(2, 1, 16), Some(window), &[700, 90]);
    }
}

#[test]
fn a_step_without_rows() {
    let random = &mut Random(5);
    check(random, shape(2, 1, 16), None, &[]);
    check(random, shape(2, 1, 16), None, &[0, 5, 0]);
}

/// Promise 3, for attention: however a sequence is cut into steps, on either path, alone or among others, wherever its
/// pages are, every row has the same bits.
#[test]
fn a_row_has_the_same_bits_in_every_step() {
    in_both_types(|| {
        let random = &mut Random(6);
        let cases = [
            (shape(4, 1, 32), None),
            (shape(2, 2, 16), Some(90)),
            (shape(8, 1, 24), None),
            (shape(6, 2, 10), Some(513)),
        ];
        for (shape, window) in cases {
            let sequences = sequences(random, shape, &[560, 40, 130, 1]);
            let on_device = OnDevice::new(shape, LIMITS);
            let width = shape.heads * shape.head_dim;
            let alone: Vec<Vec<_>> = (0..sequences.len())
                .map(|i| {
                    on_device.run(random, &sequences, window, &[Piece::all(&sequences, i, Whole)]).remove(0)
                })
                .collect();
            let mut done = vec![0; sequences.len()];
            while done.iter().zip(&sequences).any(|(done, sequence)| *done < sequence.length) {
                let mut step = Vec::new();
                for (i, done) in done.iter_mut().enumerate() {
                    let left = sequences[i].length - *done;
                    let most = [0, 1, 1, 5, 70, 150][random.below(6)];
                    let path: AttentionPath = [Whole, Split][random.below(2)];
                    let piece = Piece { sequence: i, start: *done, rows: left.min(most), path };
                    *done += piece.rows;
                    step.insert(random.below(step.len() + 1), piece);
                }
                let outputs = on_device.run(random, &sequences, window, &step);
                for (piece, outputs) in step.iter().zip(&outputs) {
                    let wanted = &alone[piece.sequence][piece.start * width..][..outputs.len()];
                    assert_eq!(bits(outputs), bits(wanted), "{piece:?} of {step:?}");
                }
            }
        }
    });
}

/// Decode rows always find room by splits, several rows of a sequence only while there is some.
#[test]
fn sequences_without_room_for_splits_are_taken_whole() {
    let limits = AttentionLimits { rows: 64, sequences: 2, pages: 44, cache_pages: 44 };
    let on_device = OnDevice::new(shape(2, 1, 16), limits);
    let pages: Vec<u32> = (0..22).collect();
    for (rows, whole) in [([1, 1], false), ([1, 3], false), ([3, 1], false), ([1, 30], true), ([30, 1], true)]
    {
        let mut step = Rows::default();
        for rows in rows {
            step.push_sequence(&vec![0; rows], 352 - rows, 0, &pages, &[]);
        }
        let mut work = on_device.work();
        work.set(&on_device.stream, &step).expect("a step");
        assert_eq!(work.has_whole(), whole, "{rows:?} rows");
    }
}
