//! The rows of a step on the device: tokens, positions, pages and the rows it goes on with.

use std::sync::Arc;

use bytemuck::Pod;

use super::super::params::StepRow;
use super::super::{CudaError, Device, DeviceBuffer, DeviceSlice, Event, Pinned, Stream};
use super::RowCount;
use crate::backend::{PAGE, Rows};

/// What steps may contain: how much there is room for, and what the numbers in it may say.
///
/// Everything that a kernel takes for an index is checked against these when a step is set, so that launches need only
/// check that their tables and caches are that large.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StepLimits {
    /// Most rows of a step.
    pub rows: usize,
    /// Most sequences of a step.
    pub sequences: usize,
    /// Most pages of all sequences of a step together.
    pub pages: usize,
    /// Most picked rows of a step.
    pub picked: usize,
    /// Token ids are below this.
    pub vocabulary: usize,
    /// Positions are below this.
    pub positions: usize,
    /// Rotary variants are below this.
    pub rotary_variants: usize,
    /// Page numbers are below this.
    pub cache_pages: usize,
}

/// Everything about a step's rows but their experts, for all kernels of the step.
///
/// A fixed place for each list, so that one graph serves every step within the limits: the kernels read the counts.
#[derive(Debug)]
pub struct StepRows {
    limits: StepLimits,
    /// `[1]`
    count: Staged<u32>,
    tokens: Staged<u32>,
    rows: Staged<StepRow>,
    /// `[1]`
    picked_count: Staged<u32>,
    picked: Staged<u32>,
    /// Behind the copies of the last step, and behind those of the rows picked last.
    copied: Event,
    picked_copied: Event,
}

impl StepRows {
    /// Room for steps within `limits`.
    ///
    /// # Errors
    /// [`CudaError::OutOfMemory`]; [`CudaError::Shape`] for more cache pages than slots can be numbered in.
    pub fn new(device: &Arc<Device>, limits: StepLimits) -> Result<Self, CudaError> {
        if limits.cache_pages > u32::MAX as usize / PAGE {
            return Err(CudaError::Shape(format!("{} pages of a cache: too many", limits.cache_pages)));
        }
        Ok(Self {
            count: Staged::new(device, 1, "the rows of a step")?,
            tokens: Staged::new(device, limits.rows, "tokens of a step")?,
            rows: Staged::new(device, limits.rows, "rows of a step")?,
            picked_count: Staged::new(device, 1, "the picked rows of a step")?,
            picked: Staged::new(device, limits.picked, "picked rows of a step")?,
            copied: device.event()?,
            picked_copied: device.event()?,
            limits,
        })
    }

    /// Takes the rows of the next step, and which of them it goes on with after its last block.
    ///
    /// Queues copies and does not wait for them; waits for those of the step before, if they are not done.
    ///
    /// # Errors
    /// [`CudaError::Shape`] for a step outside the limits; the step before is then still in place.
    pub fn set(&mut self, stream: &Stream, rows: &Rows, picked: &[u32]) -> Result<(), CudaError> {
        self.check(rows, picked)?;
        self.set_rows(stream, rows)?;
        self.set_picked(stream, picked)
    }

    /// [`set`](Self::set) without the rows that the step goes on with: [`set_picked`](Self::set_picked) follows.
    pub fn set_rows(&mut self, stream: &Stream, rows: &Rows) -> Result<(), CudaError> {
        self.check(rows, &[])?;
        self.copied.synchronize()?;
        self.count.host[0] = rows.len() as u32;
        self.tokens.host[..rows.len()].copy_from_slice(&rows.tokens);
        for (index, sequence) in rows.sequences.iter().enumerate() {
            let pages = &rows.pages[sequence.pages.clone()];
            for (row, position) in sequence.rows.clone().zip(sequence.start..) {
                self.rows.host[row] = StepRow {
                    sequence: index as u32,
                    position: position as u32,
                    rotary_variant: sequence.rotary_variant as u32,
                    cache_slot: pages[position / PAGE] * PAGE as u32 + (position % PAGE) as u32,
                };
            }
        }
        // SAFETY: `self` owns both sides, and writes the host's next after the event behind the copies.
        unsafe {
            self.count.send(stream, 1)?;
            self.tokens.send(stream, rows.len())?;
            self.rows.send(stream, rows.len())?;
        }
        stream.record(&self.copied)
    }

    /// Takes other tokens for the rows of the step that was [set](Self::set) last.
    ///
    /// # Errors
    /// [`CudaError::Shape`] unless there is one within the vocabulary for each row.
    pub fn set_tokens(&mut self, stream: &Stream, tokens: &[u32]) -> Result<(), CudaError> {
        if tokens.len() != self.count.host[0] as usize {
            return shape(format!("{} tokens for {} rows", tokens.len(), self.count.host[0]));
        }
        below("token", tokens, self.limits.vocabulary)?;
        self.copied.synchronize()?;
        self.tokens.host[..tokens.len()].copy_from_slice(tokens);
        // SAFETY: as in `set`.
        unsafe { self.tokens.send(stream, tokens.len()) }?;
        stream.record(&self.copied)
    }

    /// Goes on with these rows of the step that was [set](Self::set) last.
    ///
    /// Queues copies and does not wait for them; waits for those before, if they are not done.
    ///
    /// # Errors
    /// [`CudaError::Shape`] for more rows than there is room for, or that the step does not have.
    pub fn set_picked(&mut self, stream: &Stream, picked: &[u32]) -> Result<(), CudaError> {
        if picked.len() > self.limits.picked {
            return shape(format!("{} picked rows, there is room for {}", picked.len(), self.limits.picked));
        }
        below("picked row", picked, self.count.host[0] as usize)?;
        self.picked_copied.synchronize()?;
        self.picked_count.host[0] = picked.len() as u32;
        self.picked.host[..picked.len()].copy_from_slice(picked);
        // SAFETY: as in `set`.
        unsafe {
            self.picked_count.send(stream, 1)?;
            self.picked.send(stream, picked.len())?;
        }
        stream.record(&self.picked_copied)
    }

    /// What every step is within.
    pub fn limits(&self) -> &StepLimits {
        &self.limits
    }

    /// The number of rows, for launches made for up to `bound` of them.
    pub fn row_count(&self, bound: usize, overlap: bool) -> RowCount<'_> {
        RowCount { count: self.count.device.slice(..), bound, overlap }
    }

    /// The number of picked rows, for launches made for up to `bound` of them.
    pub fn picked_count(&self, bound: usize, overlap: bool) -> RowCount<'_> {
        RowCount { count: self.picked_count.device.slice(..), bound, overlap }
    }

    /// `[rows]`: token ids.
    pub fn tokens(&self) -> DeviceSlice<'_, u32> {
        self.tokens.device.slice(..)
    }

    /// `[rows]`
    pub fn rows(&self) -> DeviceSlice<'_, StepRow> {
        self.rows.device.slice(..)
    }

    /// `[picked]`: row numbers.
    pub fn picked(&self) -> DeviceSlice<'_, u32> {
        self.picked.device.slice(..)
    }

    fn check(&self, rows: &Rows, picked: &[u32]) -> Result<(), CudaError> {
        let limits = &self.limits;
        for (what, count, room) in [
            ("rows", rows.len(), limits.rows),
            ("sequences", rows.sequences.len(), limits.sequences),
            ("pages", rows.pages.len(), limits.pages),
            ("picked rows", picked.len(), limits.picked),
        ] {
            if count > room {
                return shape(format!("a step of {count} {what}, there is room for {room}"));
            }
        }
        below("token", &rows.tokens, limits.vocabulary)?;
        below("page", &rows.pages, limits.cache_pages)?;
        below("picked row", picked, rows.len())?;
        let mut next = 0;
        for (index, sequence) in rows.sequences.iter().enumerate() {
            let end = sequence.start + sequence.rows.len();
            if sequence.rows.start != next {
                return shape(format!(
                    "sequence {index} begins at row {}, wanted {next}",
                    sequence.rows.start
                ));
            }
            if end > limits.positions {
                return shape(format!("sequence {index} ends at position {end} of {}", limits.positions));
            }
            if sequence.rotary_variant >= limits.rotary_variants {
                let (variant, variants) = (sequence.rotary_variant, limits.rotary_variants);
                return shape(format!("sequence {index} has rotary variant {variant} of {variants}"));
            }
            if sequence.pages.end > rows.pages.len() || sequence.pages.len() < end.div_ceil(PAGE) {
                let pages = &sequence.pages;
                return shape(format!("sequence {index} has {end} tokens in pages {pages:?}"));
            }
            next = sequence.rows.end;
        }
        if next != rows.len() {
            return shape(format!("{} rows, {next} of them in sequences", rows.len()));
        }
        Ok(())
    }
}

fn shape(what: String) -> Result<(), CudaError> {
    Err(CudaError::Shape(what))
}

fn below(what: &str, values: &[u32], end: usize) -> Result<(), CudaError> {
    match values.iter().position(|&value| value as usize >= end) {
        Some(at) => shape(format!("{what} {} at {at}, wanted less than {end}", values[at])),
        None => Ok(()),
    }
}

/// A list on the device and the page-locked memory that it is copied from.
#[derive(Debug)]
struct Staged<T> {
    device: DeviceBuffer<T>,
    host: Pinned<T>,
}

impl<T: Pod> Staged<T> {
    fn new(device: &Arc<Device>, len: usize, purpose: &str) -> Result<Self, CudaError> {
        Ok(Self {
            device: DeviceBuffer::new(device, len, purpose)?,
            host: Pinned::new(device, len, purpose)?,
        })
    }

    /// Queues the copy of the first `len` elements.
    ///
    /// # Safety
    /// As [`Stream::upload_async`].
    unsafe fn send(&self, stream: &Stream, len: usize) -> Result<(), CudaError> {
        // SAFETY: passed on from the caller.
        unsafe { stream.upload_async(&self.host[..len], self.device.slice(..len)) }
    }
}
