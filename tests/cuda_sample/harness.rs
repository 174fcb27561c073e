//! Both backends on the same logits.

use loramux::backend::Backend;
use loramux::backend::cpu::Cpu;
use loramux::backend::cuda::sample::{SampleKernels, SampleWork};
use loramux::backend::cuda::{CudaError, DeviceBuffer, Stream};
use loramux::backend::sampling::{Draw, Drawn, Sampler, SamplingError, SamplingParams, TokenSource};

use crate::cuda_device::device;

pub const NONE: f32 = f32::NEG_INFINITY;

/// Rows of logits with something between them that is never read.
pub struct Rows {
    pub vocabulary: usize,
    pub stride: usize,
    values: Vec<f32>,
}

impl Rows {
    pub fn new(rows: &[Vec<f32>], gap: usize) -> Self {
        let vocabulary = rows[0].len();
        let stride = vocabulary + gap;
        let mut values = Vec::with_capacity(rows.len() * stride);
        for row in rows {
            values.extend_from_slice(row);
            // Would be the largest, and an error.
            values.resize(values.len() + gap, f32::INFINITY);
        }
        values.truncate(values.len() - gap);
        Self { vocabulary, stride, values }
    }

    pub fn row(&self, row: usize) -> &[f32] {
        &self.values[row * self.stride..][..self.vocabulary]
    }
}

/// A stream and what draws on it.
pub struct OnDevice {
    pub stream: Stream,
    pub kernels: SampleKernels,
}

impl OnDevice {
    pub fn new() -> Self {
        let device = device();
        Self {
            stream: device.stream().expect("a stream"),
            kernels: SampleKernels::new(&device).expect("kernels"),
        }
    }

    /// What `work` gives. The logits are as before afterwards.
    pub fn sample(
        &self,
        work: &mut SampleWork,
        rows: &Rows,
        draws: &[Draw<'_>],
    ) -> Result<Vec<Drawn>, CudaError> {
        let Self { stream, kernels } = self;
        let logits = DeviceBuffer::new(stream.device(), rows.values.len(), "logits")?;
        stream.upload(&rows.values, &logits)?;
        let mut drawn = Vec::new();
        work.sample(stream, kernels, logits.slice(..), rows.stride, draws, &mut drawn)?;
        let mut after = vec![0.0; rows.values.len()];
        stream.download(&logits, &mut after)?;
        let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(&after), bits(&rows.values), "logits are only read");
        Ok(drawn)
    }

    /// Room for `draws` and `entries` over the rows' vocabulary.
    pub fn work(&self, rows: &Rows, draws: usize, entries: usize) -> SampleWork {
        SampleWork::with_entries(self.stream.device(), draws, rows.vocabulary, entries).expect("memory")
    }
}

/// What the CPU backend gives.
pub fn on_cpu(rows: &Rows, draws: &[Draw<'_>]) -> Vec<Drawn> {
    let mut cpu = Cpu::new(Some(1)).expect("threads");
    let count = draws.iter().map(|draw| draw.row + 1).max().unwrap_or(0);
    let mut logits = cpu.buffer(count, rows.vocabulary).expect("memory");
    let values: Vec<f32> = (0..count).flat_map(|row| rows.row(row)).copied().collect();
    logits.write(&values);
    let mut drawn = Vec::new();
    cpu.sample(&logits, draws, &mut drawn).expect("the CPU samples");
    drawn
}

/// Panics unless both backends give the same.
#[track_caller]
pub fn assert_same(got: &[Drawn], wanted: &[Drawn], what: impl Fn(usize) -> String) {
    assert_eq!(got.len(), wanted.len());
    for (index, (got, wanted)) in got.iter().zip(wanted).enumerate() {
        let same = match (&got.token, &wanted.token) {
            // NaN is no equal of itself.
            (
                Err(SamplingError::NotFinite { token, value }),
                Err(SamplingError::NotFinite { token: wanted_token, value: wanted_value }),
            ) => token == wanted_token && (value == wanted_value || value.is_nan() && wanted_value.is_nan()),
            (token, wanted) => token == wanted,
        };
        assert!(same && got.logprobs == wanted.logprobs, "{got:?}, wanted {wanted:?}: {}", what(index));
    }
}

/// Draws each row's next token, the row's number its position, with log-probabilities and `top` alternatives.
pub fn next_tokens<'a>(samplers: &'a [Sampler], banned: &'a [u32], top: usize) -> Vec<Draw<'a>> {
    (samplers.iter().enumerate())
        .map(|(row, sampler)| Draw {
            row,
            token: TokenSource::Sampler { sampler, position: row, banned },
            logprobs: Some(top),
        })
        .collect()
}

pub fn sampler(params: SamplingParams) -> Sampler {
    Sampler::new(&params, &[], 11, 0, 0)
}
