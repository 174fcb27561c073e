//! Attention as part of a graph.

use loramux::backend::cuda::attention::AttentionPath::{Split, Whole};
use loramux::backend::cuda::attention::{AttentionInputs, AttentionLimits, AttentionStep};
use loramux::backend::cuda::{DeviceBuffer, Half};

use crate::cuda_device::on_gpu;
use crate::element::NAN;
use crate::harness::{OnDevice, Piece, Random, bits};
use crate::{sequences, shape};

/// Both launches are captured once; later steps copy their inputs and their row lists. Nothing is allocated.
#[test]
fn one_graph_serves_every_mix_of_sequences() {
    let random = &mut Random(31);
    let shape = shape(4, 2, 24);
    let window = Some(200);
    let limits = AttentionLimits { rows: 200, sequences: 8, pages: 150, cache_pages: 120 };
    let on_device = OnDevice::new(shape, limits);
    let OnDevice { stream, kernels, .. } = &on_device;
    let device = stream.device();
    let sequences = sequences(random, shape, &[600, 150, 90, 3]);
    let buffer = |len| DeviceBuffer::<Half>::new(device, len, "activations").expect("memory");
    let q = buffer(limits.rows * on_device.q_stride());
    let y = buffer(limits.rows * on_device.y_stride());
    let cache = limits.cache_pages * 16 * shape.kv_heads * shape.head_dim;
    let (keys, values) = (buffer(cache), buffer(cache));
    let mut work = on_device.work();
    let inputs = AttentionInputs {
        q: q.slice(..),
        q_stride: on_device.q_stride(),
        keys: keys.slice(..),
        values: values.slice(..),
        y: y.slice(..),
        y_stride: on_device.y_stride(),
        window,
    };
    let step = AttentionStep { work: &work, row_bound: limits.rows, whole: true, overlap: true };
    let graph = stream.capture(|| kernels.attention(stream, &inputs, &step)).expect("a graph");

    // The paths that `set` takes.
    let piece = |sequence, start, rows, path| Piece { sequence, start, rows, path };
    let steps = [
        vec![piece(0, 590, 10, Split), piece(1, 0, 150, Whole), piece(2, 89, 1, Split)],
        vec![piece(0, 599, 1, Split), piece(3, 0, 3, Split), piece(1, 149, 1, Split)],
        vec![],
        vec![piece(0, 300, 200, Whole)],
        vec![piece(2, 0, 90, Whole), piece(0, 512, 1, Split)],
    ];
    for pieces in steps {
        let inputs = on_device.inputs(random, &sequences, window, &pieces);
        stream.upload(&inputs.keys, &keys).expect("a copy");
        stream.upload(&inputs.values, &values).expect("a copy");
        stream.upload(&inputs.q, q.slice(..inputs.q.len())).expect("a copy");
        let outputs = y.slice(..inputs.rows.len() * on_device.y_stride());
        let mut padded = vec![NAN; outputs.len()];
        stream.upload(&padded, outputs).expect("a copy");
        let before = (!on_gpu()).then(loramux_emulator::allocations_of_thread);
        work.set(stream, &inputs.rows).expect("a work list");
        assert_eq!(work.has_whole(), pieces.iter().any(|piece| piece.path == Whole));
        // SAFETY: all buffers of the capture are alive.
        unsafe { graph.launch(stream) }.expect("a replay");
        if let Some(before) = before {
            assert_eq!(loramux_emulator::allocations_of_thread(), before, "a step must not allocate");
        }
        stream.download(outputs, &mut padded).expect("the outputs");
        let got = on_device.unpadded(&padded, &pieces);
        let wanted = on_device.run(random, &sequences, window, &pieces);
        for ((piece, got), wanted) in pieces.iter().zip(&got).zip(&wanted) {
            assert_eq!(bits(got), bits(wanted), "{piece:?}");
        }
    }
}
