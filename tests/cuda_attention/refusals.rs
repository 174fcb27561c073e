//! What does not fit is refused by name, before anything is launched.

use loramux::backend::cuda::attention::{AttentionInputs, AttentionLimits, AttentionStep, AttentionWork};
use loramux::backend::cuda::{CudaError, DeviceBuffer, Half};
use loramux::backend::{AttentionShape, Rows};

use crate::harness::OnDevice;
use crate::shape;

const LIMITS: AttentionLimits = AttentionLimits { rows: 20, sequences: 2, pages: 4, cache_pages: 4 };

#[track_caller]
fn assert_refused(result: Result<(), CudaError>, part: &str) {
    match result {
        Err(CudaError::Shape(message)) => assert!(message.contains(part), "{message:?} has no {part:?}"),
        other => panic!("wanted a shape error with {part:?}, found {other:?}"),
    }
}

#[test]
fn heads_that_no_kernel_is_for() {
    let on_device = OnDevice::new(shape(2, 1, 16), LIMITS);
    let refused = |shape: AttentionShape, part: &str| {
        assert_refused(AttentionWork::new(&on_device.stream, shape, LIMITS).map(drop), part);
    };
    refused(shape(3, 2, 16), "3 heads in groups of 2 key heads");
    refused(shape(2, 0, 16), "2 heads in groups of 0 key heads");
    refused(shape(2, 1, 0), "heads of 0, wanted an even width");
    refused(shape(2, 1, 15), "heads of 15, wanted an even width");
    refused(shape(2, 1, 258), "heads of 258, at most 256");
}

#[test]
fn steps_that_do_not_fit() {
    let on_device = OnDevice::new(shape(2, 1, 16), LIMITS);
    let refused = |build: &dyn Fn(&mut Rows), part: &str| {
        let mut rows = Rows::default();
        build(&mut rows);
        assert_refused(on_device.work().set(&on_device.stream, &rows), part);
    };
    refused(&|rows| rows.push_sequence(&[0; 21], 0, 0, &[0, 1], &[]), "a step of [21, 1, 2] rows");
    refused(&|rows| rows.push_sequence(&[0; 17], 0, 0, &[0], &[]), "sequence 0 has 1 pages for 17 positions");
    refused(&|rows| rows.push_sequence(&[0], 16, 0, &[0], &[]), "sequence 0 has 1 pages for 17 positions");
    refused(&|rows| rows.push_sequence(&[0], 0, 0, &[4], &[]), "sequence 0 has page 4 of 4");
    let two = |rows: &mut Rows| {
        rows.push_sequence(&[0; 2], 0, 0, &[0], &[]);
        rows.push_sequence(&[0; 2], 0, 0, &[1], &[]);
    };
    refused(
        &|rows| {
            two(rows);
            rows.sequences[1].rows = 1..4;
        },
        "sequence 1 has rows 1..4 of 4, wanted them from 2",
    );
    refused(
        &|rows| {
            two(rows);
            rows.sequences[1].pages = 1..3;
        },
        "sequence 1 has pages 1..3 of 2",
    );
}

#[test]
fn buffers_that_do_not_fit() {
    let on_device = OnDevice::new(shape(2, 1, 16), LIMITS);
    let OnDevice { stream, kernels, .. } = &on_device;
    let mut work = on_device.work();
    let mut rows = Rows::default();
    rows.push_sequence(&[0; 20], 0, 0, &[0, 1], &[]);
    work.set_by(stream, &rows, |_| loramux::backend::cuda::attention::AttentionPath::Whole).expect("a step");
    let buffer = |len| DeviceBuffer::<Half>::new(stream.device(), len, "a buffer").expect("memory");
    let (q, y, cache) = (buffer(20 * 64), buffer(20 * 32), buffer(4 * 16 * 16));
    let good = AttentionInputs {
        q: q.slice(..),
        q_stride: 64,
        keys: cache.slice(..),
        values: cache.slice(..),
        y: y.slice(..),
        y_stride: 32,
        window: None,
    };
    let run = |inputs: AttentionInputs<'_>, row_bound, whole| {
        kernels.attention(stream, &inputs, &AttentionStep { work: &work, row_bound, whole, overlap: false })
    };
    run(good, 20, true).expect("inputs that fit");
    assert_refused(run(good, 21, true), "launches for 21 rows, with 20 in the work list and room for 20");
    assert_refused(run(good, 19, true), "launches for 19 rows");
    assert_refused(run(good, 20, false), "no launch for sequences that are taken whole");
    assert_refused(run(AttentionInputs { q: q.slice(..1200), ..good }, 20, true), "q of 1200 elements");
    assert_refused(
        run(AttentionInputs { q: q.slice(1..), q_stride: 56, ..good }, 20, true),
        "q of 1279 elements",
    );
    assert_refused(run(AttentionInputs { y_stride: 24, ..good }, 20, true), "y of 640 elements, 24 a row");
    assert_refused(
        run(AttentionInputs { keys: cache.slice(8..), ..good }, 20, true),
        "keys of 1016 elements",
    );
    assert_refused(
        run(AttentionInputs { values: cache.slice(..16), ..good }, 20, true),
        "values of 16 elements",
    );
    assert_refused(run(AttentionInputs { window: Some(0), ..good }, 20, true), "a window of no keys");
}
