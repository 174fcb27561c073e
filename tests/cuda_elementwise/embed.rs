//! `embed` against a plain loop, with and without adapters of the lookup.

use loramux::backend::cuda::Half;
use loramux::backend::cuda::elementwise::{EmbeddingTable, LookupExperts, StepRows};
use loramux::backend::cuda::lora::{
    ChunkArena, ChunkLists, LoraKernels, LowRank, RankChunk, Site, SiteGroup, WorkList,
};
use loramux::backend::{Rows, SequenceRows};

use crate::SEEDS;
use crate::cuda_device::under_thread_orders;
use crate::element::{element, in_both_types};
use crate::harness::{OnDevice, Padded, Random, assert_close, bits, f, limits};

const TILE: usize = 128;
const VOCABULARY: usize = 40;
/// Cells of a tile: chunks of an expert alternate between them, as they do between K slices.
const CELLS: usize = 2;

/// A table and experts, each of some chunks of 16 ranks.
struct Table {
    width: usize,
    weight: Vec<Half>,
    /// First chunk of each expert, and the end.
    first_chunks: Vec<usize>,
    scales: Vec<f32>,
    /// `[chunk][vocabulary][16]`
    a: Vec<Half>,
    /// `[chunk][width][16]`
    b: Vec<Half>,
}

impl Table {
    fn new(random: &mut Random, width: usize, chunks: &[usize]) -> Self {
        let mut first_chunks = vec![0];
        for count in chunks {
            first_chunks.push(first_chunks[first_chunks.len() - 1] + count);
        }
        let count = first_chunks[chunks.len()];
        Self {
            width,
            weight: random.values(VOCABULARY * width, 1.0),
            first_chunks,
            scales: random.floats(chunks.len()),
            a: random.values(count * VOCABULARY * 16, 1.0),
            b: random.values(count * width * 16, 0.5),
        }
    }
}

/// Token and `(expert, gate)` pairs of a row.
type Row = (u32, Vec<(usize, f32)>);

/// Chunk list, starts and gates, as the work list and `chunk_lists` leave them.
fn lists(table: &Table, rows: &[Row]) -> (Vec<RankChunk>, Vec<u32>, Vec<f32>) {
    let (mut chunks, mut starts, mut gates) = (Vec::new(), vec![0], Vec::new());
    for tile in rows.chunks(TILE) {
        let mut experts: Vec<_> = tile.iter().flat_map(|row| row.1.iter().map(|pair| pair.0)).collect();
        experts.sort_unstable();
        experts.dedup();
        let first_entry = gates.len() / TILE;
        for &expert in &experts {
            let mut of_entry = [0.0; TILE];
            for (gate, row) in of_entry.iter_mut().zip(tile) {
                *gate = row.1.iter().find(|pair| pair.0 == expert).map_or(0.0, |pair| pair.1);
            }
            gates.extend(of_entry);
        }
        for cell in 0..CELLS {
            for (i, &expert) in experts.iter().enumerate() {
                let ids = table.first_chunks[expert]..table.first_chunks[expert + 1];
                chunks.extend(ids.skip(cell).step_by(CELLS).map(|chunk| RankChunk {
                    chunk: chunk as u32,
                    entry: (first_entry + i) as u32,
                    site: 0,
                    scale: table.scales[expert],
                }));
            }
            starts.push(chunks.len() as u32);
        }
    }
    (chunks, starts, gates)
}

fn embed(table: &Table, rows: &[Row], stride: usize) -> Padded {
    let on = OnDevice::new();
    let mut steps = StepRows::new(on.device(), limits()).expect("steps");
    let mut step = Rows::default();
    let tokens: Vec<_> = rows.iter().map(|row| row.0).collect();
    for tokens in tokens.chunks(96) {
        step.push_sequence(tokens, 0, 0, &[0, 1, 2, 3, 4, 5], &[]);
    }
    steps.set(&on.stream, &step, &[]).expect("a step");
    // Lists of the tile behind the last row too: the launch is for a row more.
    let (chunks, mut starts, gates) = lists(table, rows);
    starts.extend([chunks.len() as u32; CELLS]);
    let (weight, a, b) = (on.upload(&table.weight), on.upload(&table.a), on.upload(&table.b));
    let (chunks, starts, gates) = (on.upload(&chunks), on.upload(&starts), on.upload(&gates));
    let experts = LookupExperts {
        a: a.slice(..),
        b: b.slice(..),
        chunks: chunks.slice(..),
        starts: starts.slice(..),
        cells: CELLS,
        gates: gates.slice(..),
    };
    let on_device = EmbeddingTable {
        weight: weight.slice(..),
        vocabulary: VOCABULARY,
        width: table.width,
        experts: (!table.scales.is_empty()).then_some(experts),
    };
    on.to_rows(rows.len(), table.width, stride, |y, _| {
        let count = steps.row_count(rows.len() + 1, true);
        on.kernels.embed(&on.stream, &on_device, &steps, count, y).expect("embed");
    })
}

fn assert_embedded(table: &Table, rows: &[Row], y: &Padded) {
    let (width, a, b) = (table.width, &table.a, &table.b);
    for (i, (token, experts)) in rows.iter().enumerate() {
        let token = *token as usize;
        let of_token = &table.weight[token * width..(token + 1) * width];
        if experts.is_empty() {
            assert_eq!(bits(y.row(i)), bits(of_token), "row {i} is a copy");
            continue;
        }
        for column in 0..width {
            let mut wanted = f(of_token[column]);
            let mut size = wanted.abs();
            for &(expert, gate) in experts {
                let factor = f64::from(gate) * f64::from(table.scales[expert]);
                for chunk in table.first_chunks[expert]..table.first_chunks[expert + 1] {
                    for rank in 0..16 {
                        let term = factor
                            * f(a[(chunk * VOCABULARY + token) * 16 + rank])
                            * f(b[(chunk * width + column) * 16 + rank]);
                        wanted += term;
                        size += term.abs();
                    }
                }
            }
            // At most 16 ranks of 6 chunks in a chain of sums.
            let got = y.row(i)[column];
            assert_close(got, wanted, size * 2f64.powi(-17), || format!("row {i}, column {column}"));
        }
    }
}

fn any_rows(random: &mut Random, count: usize, experts: usize) -> Vec<Row> {
    (0..count)
        .map(|_| {
            let (token, used) = (random.below(VOCABULARY) as u32, random.below(3).min(experts));
            let first = random.below(experts.max(1));
            (token, (0..used).map(|i| ((first + i) % experts, random.number())).collect())
        })
        .collect()
}

#[test]
fn rows_without_adapters_are_copies() {
    in_both_types(|| {
        let random = &mut Random(11);
        for (width, stride) in [(8, 8), (4104, 4112), (64, 67), (2077, 2080)] {
            let table = Table::new(random, width, &[]);
            for count in [0, 1, 7] {
                let rows = any_rows(random, count, 0);
                under_thread_orders(SEEDS, || assert_embedded(&table, &rows, &embed(&table, &rows, stride)));
            }
        }
    });
}

#[test]
fn adapters_of_the_lookup_are_within_their_error() {
    in_both_types(|| {
        let random = &mut Random(12);
        for (width, stride) in [(8, 16), (72, 80), (2312, 2312), (77, 80), (2051, 2053)] {
            let table = Table::new(random, width, &[1, 3, 0, 2]);
            for count in [0, 1, 9] {
                let rows = any_rows(random, count, 4);
                under_thread_orders(SEEDS, || assert_embedded(&table, &rows, &embed(&table, &rows, stride)));
            }
        }
    });
}

#[test]
fn several_tiles_and_lists_longer_than_a_warp() {
    let random = &mut Random(13);
    let table = Table::new(random, 24, &[2; 40]);
    let rows = any_rows(random, 260, 40);
    under_thread_orders(SEEDS, || assert_embedded(&table, &rows, &embed(&table, &rows, 24)));
}

/// Promise 3 for lookups: whatever else is in the tile's list, a row has the same bits.
#[test]
fn an_embedded_row_has_the_same_bits_in_every_batch() {
    let random = &mut Random(14);
    let table = Table::new(random, 72, &[2; 40]);
    let rows = any_rows(random, 150, 40);
    let all = embed(&table, &rows, 72);
    under_thread_orders(SEEDS, || {
        for (i, row) in rows.iter().enumerate().step_by(7) {
            let alone = embed(&table, std::slice::from_ref(row), 80);
            assert_eq!(bits(alone.row(0)), bits(all.row(i)), "row {i}");
        }
    });
}

/// Experts loaded into a lookup's arena, and the lists that its group builds.
#[test]
fn adapters_from_a_work_list() {
    in_both_types(|| {
        let random = &mut Random(15);
        let ranks = [5, 40, 16];
        for (width, row_count) in [(72, 9), (13, 140)] {
            let a: Vec<_> = ranks.iter().map(|&rank| random.values(rank * VOCABULARY, 1.0)).collect();
            let b: Vec<_> = ranks.iter().map(|&rank| random.values(width * rank, 0.5)).collect();
            let mut table = Table::new(random, width, &ranks.map(|rank: usize| rank.div_ceil(16)));
            table.a.fill(Half::ZERO);
            table.b.fill(Half::ZERO);
            for (expert, rank) in ranks.into_iter().enumerate() {
                for r in 0..rank {
                    let chunk = table.first_chunks[expert] + r / 16;
                    for token in 0..VOCABULARY {
                        table.a[(chunk * VOCABULARY + token) * 16 + r % 16] =
                            a[expert][r * VOCABULARY + token];
                    }
                    for column in 0..width {
                        table.b[(chunk * width + column) * 16 + r % 16] = b[expert][column * rank + r];
                    }
                }
            }
            let rows = any_rows(random, row_count, 3);
            under_thread_orders(SEEDS, || {
                let on = OnDevice::new();
                let mut chunks = ChunkArena::for_lookup(&on.stream, element(), [VOCABULARY, width], 6, 3, 48)
                    .expect("an arena");
                for (slot, rank) in ranks.into_iter().enumerate() {
                    let (a, b, scale) = (&a[slot], &b[slot], table.scales[slot]);
                    let pair =
                        LowRank { rank, a, b, scale, column_scale: None, bias: None, order: slot as u64 };
                    chunks.load(&on.stream, slot, &pair).expect("an expert");
                }
                let site = Site { weight: on.upload(&table.weight), bias: None, chunks };
                let group = SiteGroup::new(on.device(), vec![site], row_count, 12).expect("a group");
                let lists = ChunkLists::new(&on.stream, &[&group]).expect("lists");
                let mut work = WorkList::new(on.device(), row_count, 6).expect("a work list");
                let mut steps = StepRows::new(on.device(), limits()).expect("steps");
                let mut step = Rows::default();
                for (token, experts) in &rows {
                    step.tokens.push(*token);
                    let entries: Vec<_> =
                        experts.iter().map(|&(expert, gate)| (expert as u32, gate)).collect();
                    step.gates.push_rows(1, &entries);
                }
                step.sequences = (0..row_count.div_ceil(96))
                    .map(|i| SequenceRows {
                        rows: i * 96..row_count.min((i + 1) * 96),
                        start: 0,
                        rotary_variant: 0,
                        pages: 0..6,
                    })
                    .collect();
                step.pages = vec![0; 6];
                steps.set(&on.stream, &step, &[]).expect("a step");
                work.set(&on.stream, &step.gates, u64::from).expect("a work list");
                let lora = LoraKernels::new(on.device(), element()).expect("kernels");
                lists.build(&on.stream, &lora, &work).expect("chunk lists");
                let y = on.to_rows(row_count, width, width, |y, _| {
                    let lookup = group.lookup(&work).expect("a lookup");
                    let count = work.row_count(row_count, true);
                    on.kernels.embed(&on.stream, &lookup, &steps, count, y).expect("embed");
                });
                assert_embedded(&table, &rows, &y);
            });
        }
    });
}
