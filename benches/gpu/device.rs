//! What a GPU is measured with, and what it should reach.

use std::sync::Arc;

use loramux::backend::cuda::{CudaError, Device, DeviceBuffer, Element, Event, Half, Stream};
use rayon::prelude::*;

/// Times between two waits.
const EVENTS: usize = 64;

/// Events that time work on a stream.
pub struct Stopwatch {
    events: Vec<Event>,
}

impl Stopwatch {
    /// # Errors
    /// What the device has refused.
    pub fn new(device: &Arc<Device>) -> Result<Self, CudaError> {
        Ok(Self { events: (0..=EVENTS).map(|_| device.timing_event()).collect::<Result<_, _>>()? })
    }

    /// Seconds between the ends of neighbouring calls of `work`, which queues on `stream`.
    ///
    /// # Errors
    /// Those of `work`, and of the work itself.
    pub fn time(
        &self,
        stream: &Stream,
        times: usize,
        mut work: impl FnMut() -> Result<(), CudaError>,
    ) -> Result<Vec<f64>, CudaError> {
        let mut seconds = Vec::with_capacity(times);
        while seconds.len() < times {
            let count = EVENTS.min(times - seconds.len());
            stream.record(&self.events[0])?;
            for event in &self.events[1..=count] {
                work()?;
                stream.record(event)?;
            }
            stream.synchronize()?;
            for pair in self.events[..=count].windows(2) {
                seconds.push(f64::from(pair[0].elapsed_ms(&pair[1])?) / 1e3);
            }
        }
        Ok(seconds)
    }
}

/// Bytes per second that a copy within the device reads and writes: the floor of whatever memory bounds.
///
/// # Errors
/// What the device has refused.
pub fn copy_bandwidth(stream: &Stream, bytes: usize) -> Result<f64, CudaError> {
    let device = stream.device();
    let from = DeviceBuffer::new(device, bytes / 2, "a copy")?;
    let into = DeviceBuffer::new(device, bytes / 2, "a copy")?;
    stream.upload(&random(bytes / 2, 1.0, 1), &from)?;
    let stopwatch = Stopwatch::new(device)?;
    // SAFETY: both buffers outlive the wait in `time`.
    let mut times = stopwatch.time(stream, 20, || unsafe { stream.copy_async(&from, &into) })?;
    Ok(2.0 * bytes as f64 / median(&mut times[2..]))
}

/// The dense bf16 peak of a GPU, in FLOP/s, by its maker's data sheet.
pub fn peak(name: &str) -> Option<f64> {
    let peaks =
        [("H100 PCIe", 756e12), ("H100 NVL", 835e12), ("H100", 989e12), ("H200", 989e12), ("A100", 312e12)];
    peaks.into_iter().find(|(known, _)| name.contains(known)).map(|(_, peak)| peak)
}

/// The middle of `values`, which it sorts.
pub fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Uniform numbers in (-scale, scale), the same for the same seed.
pub fn random(len: usize, scale: f32, seed: u64) -> Vec<Half> {
    let mut values = vec![Half::ZERO; len];
    values.par_chunks_mut(1 << 16).enumerate().for_each(|(chunk, values)| {
        let mut state = (seed << 32 ^ chunk as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        for value in values {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            *value = Element::Bf16.round(((state >> 40) as f32 / (1u64 << 23) as f32 - 1.0) * scale);
        }
    });
    values
}
