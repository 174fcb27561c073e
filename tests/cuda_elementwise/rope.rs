//! `rope_store` against a plain loop, and the pages that it leaves.

use loramux::backend::cuda::Half;
use loramux::backend::cuda::elementwise::{BlockPages, HeadNormWeights, Rotary, StepRows};
use loramux::backend::{AttentionShape, PAGE, RotaryTables, Rows};

use crate::SEEDS;
use crate::cuda_device::under_thread_orders;
use crate::element::in_both_types;
use crate::harness::{OnDevice, Padded, Random, UNTOUCHED, assert_close, bits, f, limits, matrix};

const EPSILON: f32 = 1e-6;

/// A layer's widths, tables and norms.
struct Layer {
    shape: AttentionShape,
    tables: RotaryTables,
    /// Weights of q and k heads.
    norms: Option<[Vec<f32>; 2]>,
}

impl Layer {
    fn new(random: &mut Random, widths: [usize; 4], norms: bool) -> Self {
        let [heads, kv_heads, head_dim, rotary_dim] = widths;
        let (variants, len) = (limits().rotary_variants, limits().positions * rotary_dim / 2);
        let mut tables = RotaryTables { rotary_dim, ..RotaryTables::default() };
        for _ in 0..variants {
            let angles: Vec<f32> = (0..len).map(|_| random.number() * 4.0).collect();
            tables.cos.push(angles.iter().map(|angle| angle.cos()).collect());
            tables.sin.push(angles.iter().map(|angle| angle.sin()).collect());
        }
        Self {
            shape: AttentionShape { heads, kv_heads, head_dim },
            tables,
            norms: norms.then(|| [random.floats(head_dim), random.floats(head_dim)]),
        }
    }
}

/// Three sequences, one of them far into its pages, on pages of no order.
fn three_sequences() -> Rows {
    let mut rows = Rows::default();
    rows.push_sequence(&[1; 3], 0, 0, &[7], &[]);
    rows.push_sequence(&[2; 1], 67, 1, &[3, 0, 9, 5, 23], &[]);
    rows.push_sequence(&[3; 18], 14, 1, &[4, 2], &[]);
    rows
}

/// Rows after the launch, keys and values.
struct Result {
    qkv: Padded,
    keys: Vec<Half>,
    values: Vec<Half>,
}

fn rope_store(layer: &Layer, rows: &Rows, qkv: &Padded) -> Result {
    let on = OnDevice::new();
    let mut steps = StepRows::new(on.device(), limits()).expect("steps");
    steps.set(&on.stream, rows, &[]).expect("a step");
    let rotary = Rotary::new(&on.stream, &layer.tables).expect("tables");
    let AttentionShape { kv_heads, head_dim, .. } = layer.shape;
    let pages = vec![UNTOUCHED; limits().cache_pages * kv_heads * PAGE * head_dim];
    let (data, keys, values) = (on.matrix_of(qkv), on.upload(&pages), on.upload(&pages));
    let norms = layer.norms.as_ref().map(|norms| [on.upload(&norms[0]), on.upload(&norms[1])]);
    let norms =
        norms.as_ref().map(|[q, k]| HeadNormWeights { q: q.slice(..), k: k.slice(..), epsilon: EPSILON });
    let pages = BlockPages { keys: keys.slice(..), values: values.slice(..) };
    let count = steps.row_count(rows.len() + 1, true);
    on.kernels
        .rope_store(&on.stream, matrix(&data), layer.shape, norms, &rotary, pages, &steps, count)
        .expect("rope_store");
    let qkv = Padded { values: on.download(&data.0), ..qkv.clone() };
    qkv.assert_untouched_past(rows.len());
    Result { qkv, keys: on.download(&keys), values: on.download(&values) }
}

/// A head after normalisation and rotation, with the error of each element.
fn turned(
    layer: &Layer,
    head: &[Half],
    norm: Option<&Vec<f32>>,
    variant: usize,
    at: usize,
) -> Vec<(f64, f64)> {
    let mut x: Vec<f64> = head.iter().map(|&v| f(v)).collect();
    let mut error = 0.0;
    if let Some(norm) = norm {
        let squares: f64 = x.iter().map(|v| v * v).sum();
        let factor = 1.0 / (squares / x.len() as f64 + f64::from(EPSILON)).sqrt();
        x.iter_mut().zip(norm).for_each(|(v, w)| *v *= factor * f64::from(*w));
        // As of rms_norm, whose chains are longer.
        error = 2f64.powi(-18);
    }
    let half = layer.tables.rotary_dim / 2;
    let mut sizes: Vec<f64> = x.iter().map(|v| v.abs()).collect();
    for i in 0..half {
        let cos = f64::from(layer.tables.cos[variant][at * half + i]);
        let sin = f64::from(layer.tables.sin[variant][at * half + i]);
        let (low, high) = (x[i], x[i + half]);
        (x[i], x[i + half]) = (low * cos - high * sin, high * cos + low * sin);
        sizes[i] = (low * cos).abs() + (high * sin).abs();
        sizes[i + half] = (high * cos).abs() + (low * sin).abs();
    }
    let error = error + 2f64.powi(-22);
    x.into_iter().zip(sizes).map(|(v, size)| (v, size * error)).collect()
}

fn check(layer: &Layer, rows: &Rows, before: &Padded, after: &Result) {
    let AttentionShape { heads, kv_heads, head_dim } = layer.shape;
    let mut pages = vec![UNTOUCHED; after.keys.len()];
    let mut value_pages = pages.clone();
    for sequence in &rows.sequences {
        for row in sequence.rows.clone() {
            let position = sequence.start + row - sequence.rows.start;
            let page = rows.pages[sequence.pages.start + position / PAGE] as usize;
            for head in 0..heads + 2 * kv_heads {
                let columns = head * head_dim..(head + 1) * head_dim;
                let (was, is) = (&before.row(row)[columns.clone()], &after.qkv.row(row)[columns]);
                if head < heads + kv_heads {
                    let norm = layer.norms.as_ref().map(|norms| &norms[usize::from(head >= heads)]);
                    let wanted = turned(layer, was, norm, sequence.rotary_variant, position);
                    for (i, (&got, (wanted, error))) in is.iter().zip(wanted).enumerate() {
                        assert_close(got, wanted, error, || format!("row {row}, head {head}, element {i}"));
                    }
                } else {
                    assert_eq!(bits(is), bits(was), "v stays as it is");
                }
                if head >= heads {
                    let (to, kv_head) = match head - heads {
                        k if k < kv_heads => (&mut pages, k),
                        v => (&mut value_pages, v - kv_heads),
                    };
                    let at = (page * kv_heads + kv_head) * PAGE + position % PAGE;
                    to[at * head_dim..(at + 1) * head_dim].copy_from_slice(is);
                }
            }
        }
    }
    assert_eq!(bits(&after.keys), bits(&pages), "keys of the rows and nothing else");
    assert_eq!(bits(&after.values), bits(&value_pages), "values of the rows and nothing else");
}

#[test]
fn heads_are_turned_and_stored() {
    in_both_types(|| {
        let random = &mut Random(21);
        for (widths, padding) in [
            ([4, 2, 64, 64], 8),
            ([3, 1, 128, 128], 0),
            ([17, 3, 256, 64], 16),
            ([2, 1, 80, 32], 8),
            ([2, 2, 96, 96], 0),
            // One value at a time: halves that are no accesses of 16 bytes, and rows that do not start on one.
            ([3, 1, 24, 24], 8),
            ([2, 1, 20, 6], 4),
            ([2, 1, 64, 64], 1),
        ] {
            for norms in [false, true] {
                let layer = Layer::new(random, widths, norms);
                let width = layer.shape.qkv_width();
                for rows in [Rows::default(), three_sequences()] {
                    let values = random.values(rows.len() * width, 2.0);
                    let qkv = Padded::new(&values, width, width + padding, 1);
                    under_thread_orders(SEEDS, || {
                        check(&layer, &rows, &qkv, &rope_store(&layer, &rows, &qkv))
                    });
                }
            }
        }
    });
}

/// Promise 3: a row alone has the bits that it has among others.
#[test]
fn a_turned_row_has_the_same_bits_in_every_batch() {
    let random = &mut Random(22);
    for widths in [[4, 2, 64, 64], [2, 1, 20, 6]] {
        let layer = Layer::new(random, widths, true);
        let width = layer.shape.qkv_width();
        let rows = three_sequences();
        let qkv = Padded::new(&random.values(rows.len() * width, 1.0), width, width, 1);
        let all = rope_store(&layer, &rows, &qkv);
        under_thread_orders(SEEDS, || {
            for sequence in &rows.sequences {
                let row = sequence.rows.end - 1;
                let mut alone = Rows::default();
                let position = sequence.start + sequence.rows.len() - 1;
                let pages = [11, 12, 13, 14, 15];
                alone.push_sequence(&[0], position, sequence.rotary_variant, &pages, &[]);
                let of_row = Padded::new(qkv.row(row), width, width, 1);
                let got = rope_store(&layer, &alone, &of_row);
                assert_eq!(bits(got.qkv.row(0)), bits(all.qkv.row(row)), "row {row}");
            }
        });
    }
}
