//! Sampling on the device: the same tokens as the CPU backend's, without the logits leaving the device.
//!
//! A [`SampleWork`] takes a step's draws: one copy to the device, one launch with a thread block for each draw, one copy
//! back, and it waits for nothing else of the stream's. The host keeps what it is better at: random bits, logarithms,
//! and the few draws that there is no room for on the device, which it computes itself from the downloaded row.
//!
//! # What a launch costs
//!
//! Counted, and predicted for an H100 SXM, which runs the blocks of up to 132 draws side by side. Of a vocabulary of
//! 131072, one multiprocessor reads a row from L2 at about 50 bytes a clock: 6 µs a pass. The exponential is 45
//! instructions a token, division and all, of which it issues 4 · 32 a clock: 25 µs. Additions that meet in one bucket
//! of a selection are not counted.
//!
//! | draw | passes | exponentials | predicted |
//! |---|---|---|---|
//! | most likely token | 1 | 0 | 6 µs |
//! | random token | 3 | 1 | 40 µs |
//! | random token, `top_k` and `top_p` | 9 | 1 | 80 µs |
//! | its log-probability, besides | 3 | 1 | 35 µs |
//! | the most likely tokens, besides | 4 | 0 | 25 µs |

use std::sync::Arc;

use super::params::{
    SAMPLE_SHARED_BYTES, SAMPLE_THREADS, SAMPLE_TOP, SAMPLE_UNIT_BITS, SampleDraw, SampleEntry, SampleMode,
    SampleParams, SampleResult, SampleStatus,
};
use super::{CudaError, Device, DeviceBuffer, DeviceSlice, Event, Kernel, Launch, Pinned, Stream};
use crate::backend::cpu::sampling::sample_row;
use crate::backend::sampling::{Draw, Drawn, Normaliser, SamplingError, TokenLogprobs, TokenSource, UNIT};

const _: () = assert!(UNIT == 1 << SAMPLE_UNIT_BITS);

/// Most tokens of a vocabulary: the sum of their weights fits a u64.
const MOST_TOKENS: usize = 1 << 24;

/// Biases, banned tokens and tokens seen of all draws of a launch: 1 MiB.
const ENTRIES: usize = 1 << 17;

/// Words of 8 bytes of a draw in the upload; an entry has one.
const DRAW_WORDS: usize = size_of::<SampleDraw>() / 8;

/// The kernel of this module.
#[derive(Clone, Debug)]
pub struct SampleKernels {
    sample: Kernel<SampleParams>,
}

impl SampleKernels {
    /// # Errors
    /// [`CudaError::UnknownKernel`] when the device was opened without this build's kernels.
    pub fn new(device: &Arc<Device>) -> Result<Self, CudaError> {
        Ok(Self { sample: device.kernel("sample")? })
    }
}

/// Room for the draws of a launch, made once: a call allocates nothing but the lists that it returns.
#[derive(Debug)]
pub struct SampleWork {
    vocabulary: usize,
    draws: usize,
    entries: usize,
    /// Draws, and behind the last that there is room for their entries.
    staged: Pinned<u64>,
    upload: DeviceBuffer<u64>,
    /// `[draws, vocabulary]`
    scratch: DeviceBuffer<f32>,
    results: DeviceBuffer<SampleResult>,
    downloaded: Pinned<SampleResult>,
    /// `[vocabulary]`: logits for the host.
    row: Pinned<f32>,
    /// Behind the last copy back.
    done: Event,
}

impl SampleWork {
    /// Room for launches of up to `draws` draws from rows of `vocabulary` logits. Calls may have more draws.
    ///
    /// # Errors
    /// [`CudaError::OutOfMemory`]; [`CudaError::Shape`] for no draws and for vocabularies of no token or over 2²⁴.
    pub fn new(device: &Arc<Device>, draws: usize, vocabulary: usize) -> Result<Self, CudaError> {
        Self::with_entries(device, draws, vocabulary, ENTRIES)
    }

    /// The same, with room for so many biases, banned tokens and tokens seen of all draws of a launch together.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn with_entries(
        device: &Arc<Device>,
        draws: usize,
        vocabulary: usize,
        entries: usize,
    ) -> Result<Self, CudaError> {
        if draws == 0 || !(1..=MOST_TOKENS).contains(&vocabulary) {
            return Err(CudaError::Shape(format!(
                "{draws} draws from a vocabulary of {vocabulary}: wanted some, from 1 to {MOST_TOKENS} tokens"
            )));
        }
        let words = draws * DRAW_WORDS + entries;
        Ok(Self {
            vocabulary,
            draws,
            entries,
            staged: Pinned::new(device, words, "draws")?,
            upload: DeviceBuffer::new(device, words, "draws")?,
            scratch: DeviceBuffer::new(device, draws * vocabulary, "weights of draws")?,
            results: DeviceBuffer::new(device, draws, "drawn tokens")?,
            downloaded: Pinned::new(device, draws, "drawn tokens")?,
            row: Pinned::new(device, vocabulary, "a row of logits")?,
            done: device.event()?,
        })
    }

    /// One result in `drawn` for each of `draws`, from rows of `logits` `[rows, stride]`: what the CPU backend gives for
    /// the same logits, whatever the other draws.
    ///
    /// Queues on `stream` and waits until the results are there. A draw that fails is its own result.
    ///
    /// # Errors
    /// [`CudaError::Shape`] for a row that is not in `logits`, and before anything is queued.
    pub fn sample(
        &mut self,
        stream: &Stream,
        kernels: &SampleKernels,
        logits: DeviceSlice<'_, f32>,
        stride: usize,
        draws: &[Draw<'_>],
        drawn: &mut Vec<Drawn>,
    ) -> Result<(), CudaError> {
        self.check(logits, stride, draws)?;
        drawn.clear();
        let mut rest = draws;
        while let Some(first) = rest.first() {
            let count = self.stage(rest);
            if count == 0 {
                let row = logits.slice(first.row * stride..).slice(..self.vocabulary);
                // SAFETY: `self` and `logits` own both sides, and `wait` waits for the copy.
                let queued = unsafe { stream.download_async(row, &mut self.row) };
                self.wait(stream, queued)?;
                drawn.push(sample_row(&self.row, first));
                rest = &rest[1..];
                continue;
            }
            let queued = self.queue(stream, kernels, logits, stride, count);
            self.wait(stream, queued)?;
            let (now, later) = rest.split_at(count);
            drawn.extend(now.iter().zip(&*self.downloaded).map(|(draw, result)| self.read(draw, result)));
            rest = later;
        }
        Ok(())
    }

    fn check(
        &self,
        logits: DeviceSlice<'_, f32>,
        stride: usize,
        draws: &[Draw<'_>],
    ) -> Result<(), CudaError> {
        let within = |row: usize| {
            let end = row.saturating_mul(stride).saturating_add(self.vocabulary);
            stride >= self.vocabulary && end <= logits.len() && row.max(stride) <= u32::MAX as usize
        };
        match draws.iter().find(|draw| !within(draw.row)) {
            None => Ok(()),
            Some(draw) => Err(CudaError::Shape(format!(
                "a draw from row {} of {} logits, {stride} a row, for a vocabulary of {}",
                draw.row,
                logits.len(),
                self.vocabulary
            ))),
        }
    }

    /// Stages the first of these draws, as many as there is room for; none where there is no room for the first alone.
    fn stage(&mut self, draws: &[Draw<'_>]) -> usize {
        let (words, entries) = self.staged.split_at_mut(self.draws * DRAW_WORDS);
        let mut entries =
            Entries { list: bytemuck::cast_slice_mut(entries), used: 0, vocabulary: self.vocabulary };
        let staged = bytemuck::cast_slice_mut::<u64, SampleDraw>(words);
        let mut count = 0;
        for (draw, to) in draws.iter().zip(staged) {
            let top = draw.logprobs.unwrap_or(0).min(self.vocabulary);
            if top > SAMPLE_TOP || most_entries(draw) > self.entries - entries.used {
                break;
            }
            *to = SampleDraw {
                row: draw.row as u32,
                reports: draw.logprobs.is_some().into(),
                top: top as u32,
                ..entries.source(&draw.token)
            };
            count += 1;
        }
        count
    }

    /// Queues the copies and the launch for `count` staged draws.
    fn queue(
        &mut self,
        stream: &Stream,
        kernels: &SampleKernels,
        logits: DeviceSlice<'_, f32>,
        stride: usize,
        count: usize,
    ) -> Result<(), CudaError> {
        let draws = bytemuck::cast_slice::<u64, SampleDraw>(&self.staged[..count * DRAW_WORDS]);
        let last = &draws[count - 1];
        let entries = (last.first_entry + last.biases + last.banned + last.seen) as usize;
        // Without entries what lies before them need not move.
        let words = if entries > 0 { self.draws * DRAW_WORDS + entries } else { count * DRAW_WORDS };
        let params = SampleParams {
            logits: logits.address(),
            draws: self.upload.address(),
            entries: self.upload.slice(self.draws * DRAW_WORDS..).address(),
            scratch: self.scratch.address(),
            results: self.results.address(),
            vocabulary: self.vocabulary as u32,
            stride: stride as u32,
        };
        let launch = Launch {
            shared_bytes: SAMPLE_SHARED_BYTES as u32,
            ..Launch::new([count as u32, 1, 1], SAMPLE_THREADS as u32)
        };
        // SAFETY: `self` owns both sides of the copies and touches the host's no more before `wait` has returned. The
        // draws' rows are in `logits`, their entries in the upload, and the tokens of those in the vocabulary.
        unsafe {
            stream.upload_async(&self.staged[..words], self.upload.slice(..words))?;
            stream.launch(&kernels.sample, &launch, &params)?;
            stream.download_async(self.results.slice(..count), &mut self.downloaded[..count])
        }
    }

    /// What a draw gives, from what the kernel left.
    fn read(&self, draw: &Draw<'_>, result: &SampleResult) -> Drawn {
        let SampleResult { token, value, .. } = *result;
        if result.status == SampleStatus::NotFinite as u32 {
            return Drawn { token: Err(SamplingError::NotFinite { token, value }), logprobs: None };
        }
        if result.status == SampleStatus::NoTokenLeft as u32 {
            return Drawn { token: Err(SamplingError::NoTokenLeft), logprobs: None };
        }
        let normaliser = Normaliser::new(result.largest, result.sum);
        let logprobs = draw.logprobs.map(|top| TokenLogprobs {
            token,
            logprob: normaliser.logprob(result.logit),
            rank: result.rank as usize,
            top: (result.top[..top.min(self.vocabulary)].iter())
                .map(|top| (top.token, normaliser.logprob(top.logit)))
                .collect(),
        });
        Drawn { token: Ok(token), logprobs }
    }

    /// Waits for what was queued, be it all or the part before an error.
    fn wait(&self, stream: &Stream, queued: Result<(), CudaError>) -> Result<(), CudaError> {
        stream.record(&self.done)?;
        self.done.synchronize()?;
        queued
    }
}

/// Entries that a draw cannot have more of.
fn most_entries(draw: &Draw<'_>) -> usize {
    match draw.token {
        TokenSource::Given(_) => 0,
        TokenSource::Sampler { sampler, banned, .. } => {
            sampler.bias().len() + banned.len() + sampler.history().len()
        }
    }
}

/// The entries of a launch.
struct Entries<'a> {
    list: &'a mut [SampleEntry],
    used: usize,
    vocabulary: usize,
}

impl Entries<'_> {
    /// All of a draw that its source decides.
    fn source(&mut self, source: &TokenSource<'_>) -> SampleDraw {
        let first_entry = self.used as u32;
        match *source {
            TokenSource::Given(token) => {
                SampleDraw { mode: SampleMode::Given as u32, token, first_entry, ..SampleDraw::default() }
            }
            TokenSource::Sampler { sampler, position, banned } => {
                let params = sampler.params();
                let mode = if sampler.is_greedy() { SampleMode::MostLikely } else { SampleMode::Random };
                SampleDraw {
                    mode: mode as u32,
                    fraction: sampler.fraction(position),
                    top_p: sampler.top_p().unwrap_or(u64::MAX),
                    top_k: sampler.top_k().unwrap_or(u32::MAX),
                    min_p: sampler.min_p(),
                    temperature: params.temperature,
                    repetition_penalty: params.repetition_penalty,
                    frequency_penalty: params.frequency_penalty,
                    presence_penalty: params.presence_penalty,
                    first_entry,
                    biases: self.push(sampler.bias().iter().map(|&(token, bias)| (token, bias.to_bits()))),
                    banned: self.push(banned.iter().map(|&token| (token, 0))),
                    seen: self.push(sampler.history().iter().map(|seen| (seen.token, seen.count))),
                    ..SampleDraw::default()
                }
            }
        }
    }

    /// Appends those within the vocabulary; how many they are.
    fn push(&mut self, entries: impl Iterator<Item = (u32, u32)>) -> u32 {
        let first = self.used;
        for (token, value) in entries.filter(|&(token, _)| (token as usize) < self.vocabulary) {
            self.list[self.used] = SampleEntry { token, value };
            self.used += 1;
        }
        (self.used - first) as u32
    }
}
