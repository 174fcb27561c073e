//! Causal attention over the paged cache: `y = softmax(q Kᵀ / √head_dim) V` for every row of a step, with grouped query
//! heads and sliding windows.
//!
//! An [`AttentionWork`] tells the device about a step's sequences: two copies a step, for all layers. Then
//! [`AttentionKernels::attention`] is two launches a layer, each over its own list: `attention` takes sequences with
//! many rows in tiles of 64 (row, head) pairs over all their keys, `attention_split` those with few rows in tiles of 16
//! pairs and splits of 512 keys. Everything between them can be captured in one graph that serves every step.
//!
//! # One result, two kernels
//!
//! Both kernels go through a pair's keys in the same blocks and splits, and merge splits in the same order
//! (`kernels/attention.cuh`): a row's bits depend on neither the kernel, nor how its prompt was cut into steps, nor the
//! other rows.
//!
//! # What a launch costs
//!
//! Counted, and predicted for an H100 SXM (3.0 TB/s, 132 SMs); bf16, 32 heads of 128, 8 key heads, one layer:
//!
//! | step | keys and values read | FLOP | bound by | predicted |
//! |---|---|---|---|---|
//! | 64 rows at 4096 | 1.07 GB of HBM | 4.3 G | HBM | 0.36 ms |
//! | 1 row at 4096 | 17 MB | 67 M | latency of 8 blocks of 64 keys on 64 SMs | 8 µs |
//! | a prompt of 8192 | 34 MB of HBM, 8.6 GB of L2 | 0.55 T | L2, at most 350 TFLOP/s, and shared memory, at most 470 | 1.8 ms |

use std::ops::Range;
use std::sync::Arc;

use bytemuck::Zeroable;

use super::params::{
    self, ATTENTION_NO_WINDOW, ATTENTION_PARTIAL_HEADER, ATTENTION_SPLIT, ATTENTION_THREADS,
    ATTENTION_TILE_16, AttentionParams, AttentionTile,
};
use super::{
    CudaError, Device, DeviceBuffer, DeviceSlice, Element, Event, Half, Kernel, Launch, Pinned, Stream,
};
use crate::backend::{AttentionShape, PAGE, Rows, SequenceRows};

const _: () = assert!(PAGE == params::PAGE);

/// Most pairs of a sequence whose keys are split over thread blocks.
const FEW_PAIRS: usize = 64;

/// Thread blocks of `attention_split` for each multiprocessor; more than it holds at once.
const SPLIT_BLOCKS: usize = 8;

/// A padded width of heads, and what its kernels need.
struct Width {
    dim: usize,
    tile_pairs: usize,
    shared_bytes: usize,
    split_shared_bytes: usize,
}

const fn width(dim: usize, tile_pairs: usize, shared_bytes: usize, split_shared_bytes: usize) -> Width {
    Width { dim, tile_pairs, shared_bytes, split_shared_bytes }
}

static WIDTHS: [Width; 7] = {
    use params::*;
    [
        width(16, ATTENTION_TILE_64, ATTENTION_16_SHARED_BYTES, ATTENTION_SPLIT_16_SHARED_BYTES),
        width(32, ATTENTION_TILE_64, ATTENTION_32_SHARED_BYTES, ATTENTION_SPLIT_32_SHARED_BYTES),
        width(64, ATTENTION_TILE_64, ATTENTION_64_SHARED_BYTES, ATTENTION_SPLIT_64_SHARED_BYTES),
        width(80, ATTENTION_TILE_64, ATTENTION_80_SHARED_BYTES, ATTENTION_SPLIT_80_SHARED_BYTES),
        width(96, ATTENTION_TILE_64, ATTENTION_96_SHARED_BYTES, ATTENTION_SPLIT_96_SHARED_BYTES),
        width(128, ATTENTION_TILE_64, ATTENTION_128_SHARED_BYTES, ATTENTION_SPLIT_128_SHARED_BYTES),
        width(256, ATTENTION_TILE_16, ATTENTION_256_SHARED_BYTES, ATTENTION_SPLIT_256_SHARED_BYTES),
    ]
};

/// The place in [`WIDTHS`] of a shape's heads.
fn width_of(shape: AttentionShape) -> Result<usize, CudaError> {
    let AttentionShape { heads, kv_heads, head_dim } = shape;
    if kv_heads == 0 || heads == 0 || !heads.is_multiple_of(kv_heads) {
        return Err(CudaError::Shape(format!("{heads} heads in groups of {kv_heads} key heads")));
    }
    if head_dim == 0 || !head_dim.is_multiple_of(2) {
        return Err(CudaError::Shape(format!("heads of {head_dim}, wanted an even width")));
    }
    WIDTHS.iter().position(|width| head_dim <= width.dim).ok_or_else(|| {
        CudaError::Shape(format!("heads of {head_dim}, at most {}", WIDTHS[WIDTHS.len() - 1].dim))
    })
}

/// How a sequence's attention is spread over the device. It decides the time, not the result.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AttentionPath {
    /// `attention`: a thread block for each tile and key head.
    Whole,
    /// `attention_split`: a thread block for each tile, key head and split of the keys.
    Split,
}

/// The most that a step can have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AttentionLimits {
    pub rows: usize,
    pub sequences: usize,
    /// Pages of all sequences of a step together.
    pub pages: usize,
    /// Pages of the cache: every page number is below this.
    pub cache_pages: usize,
}

impl AttentionLimits {
    /// Tiles of `Whole` sequences.
    fn tiles(&self, rows: usize, group: usize, tile_pairs: usize) -> usize {
        rows * group / tile_pairs + rows.min(self.sequences)
    }

    /// Splits of all sequences together, twice over: decode rows always fit, and other sequences with few rows as long
    /// as there is room.
    fn splits(&self) -> usize {
        2 * (self.pages.div_ceil(ATTENTION_SPLIT / PAGE) + self.sequences)
    }
}

/// A step's sequences, on the device.
#[derive(Debug)]
pub struct AttentionWork {
    shape: AttentionShape,
    limits: AttentionLimits,
    width: usize,
    /// `Whole` tiles and entries of the `Split` list, a count and a list each. Counts have an element of their own.
    whole: List,
    split: List,
    pages: DeviceBuffer<u32>,
    staged_pages: Pinned<u32>,
    /// `[slots][kv_heads][4 + width]`
    partials: DeviceBuffer<f32>,
    /// `[tiles][kv_heads]`
    arrived: DeviceBuffer<u32>,
    slots: usize,
    /// Rows of the step.
    rows: usize,
    event: Event,
}

/// A list of tiles with its length before it.
#[derive(Debug)]
struct List {
    /// `[1 + capacity]`: the length is the first element's `row`.
    entries: DeviceBuffer<AttentionTile>,
    staged: Pinned<AttentionTile>,
    len: usize,
}

impl List {
    fn new(device: &Arc<Device>, capacity: usize) -> Result<Self, CudaError> {
        Ok(Self {
            entries: DeviceBuffer::new(device, 1 + capacity, "tiles of attention")?,
            staged: Pinned::new(device, 1 + capacity, "tiles of attention")?,
            len: 0,
        })
    }

    fn capacity(&self) -> usize {
        self.staged.len() - 1
    }

    fn push(&mut self, tile: AttentionTile) {
        self.len += 1;
        self.staged[self.len] = tile;
    }

    /// Queues the copy.
    ///
    /// # Safety
    /// That of [`Stream::upload_async`].
    unsafe fn upload(&mut self, stream: &Stream) -> Result<(), CudaError> {
        self.staged[0] = AttentionTile { row: self.len as u32, ..Zeroable::zeroed() };
        let used = ..=self.len;
        // SAFETY: the caller's promise.
        unsafe { stream.upload_async(&self.staged[used], self.entries.slice(used)) }
    }
}

impl AttentionWork {
    /// Room for steps of heads of this shape.
    ///
    /// # Errors
    /// [`CudaError::Shape`] for heads that no kernel is for, and [`CudaError::OutOfMemory`].
    pub fn new(stream: &Stream, shape: AttentionShape, limits: AttentionLimits) -> Result<Self, CudaError> {
        let device = stream.device();
        let width = width_of(shape)?;
        let group = shape.heads / shape.kv_heads;
        let Width { dim, tile_pairs, .. } = WIDTHS[width];
        let entries = limits.splits() * group.div_ceil(ATTENTION_TILE_16);
        let slots = limits.splits() * group;
        let slot = shape.kv_heads * (ATTENTION_PARTIAL_HEADER + dim);
        let work = Self {
            whole: List::new(device, limits.tiles(limits.rows, group, tile_pairs))?,
            split: List::new(device, entries)?,
            pages: DeviceBuffer::new(device, limits.pages, "page numbers")?,
            staged_pages: Pinned::new(device, limits.pages, "page numbers")?,
            partials: DeviceBuffer::new(device, slots * slot, "partial results of attention")?,
            arrived: DeviceBuffer::new(device, entries * shape.kv_heads, "counters of partial results")?,
            slots,
            rows: 0,
            event: device.event()?,
            shape,
            limits,
            width,
        };
        stream.upload(&vec![0; work.arrived.len()], &work.arrived)?;
        Ok(work)
    }

    /// Takes the sequences of the next step: those with few pairs by splits, as long as there is room, others whole.
    ///
    /// Queues its copies and does not wait for them; waits for the copies of the step before, if they are not done.
    ///
    /// # Errors
    /// [`CudaError::Shape`] when the step has more than there is room for, or sequences have too few pages.
    pub fn set(&mut self, stream: &Stream, rows: &Rows) -> Result<(), CudaError> {
        let group = self.group();
        self.set_by(stream, rows, |sequence| {
            if sequence.rows.len() * group <= FEW_PAIRS.max(group) {
                AttentionPath::Split
            } else {
                AttentionPath::Whole
            }
        })
    }

    /// [`set`](Self::set) with a path of one's own for each sequence. One that finds no room by splits is taken whole.
    pub fn set_by(
        &mut self,
        stream: &Stream,
        rows: &Rows,
        path: impl Fn(&SequenceRows) -> AttentionPath,
    ) -> Result<(), CudaError> {
        self.check(rows)?;
        self.event.synchronize()?;
        self.rows = rows.len();
        self.staged_pages[..rows.pages.len()].copy_from_slice(&rows.pages);
        (self.whole.len, self.split.len) = (0, 0);
        let (mut slots, mut counters) = (0, 0);
        // Decode rows first: the room is made for them.
        for decode in [true, false] {
            for sequence in rows.sequences.iter().filter(|sequence| (sequence.rows.len() == 1) == decode) {
                let split = path(sequence) == AttentionPath::Split;
                if !(split && self.push_splits(sequence, &mut slots, &mut counters)) {
                    self.push_whole(sequence);
                }
            }
        }
        // The longest first, so that none is begun when the device is about to run empty.
        let tiles = &mut self.whole.staged[1..=self.whole.len];
        let group = self.shape.heads / self.shape.kv_heads;
        let keys = |tile: &AttentionTile| tile.position + (tile.first_pair + tile.pairs) / group as u32;
        tiles.sort_unstable_by_key(|tile| std::cmp::Reverse(keys(tile)));
        // SAFETY: page-locked memory of `self`, written next after the event behind the copies has been waited for.
        unsafe {
            self.whole.upload(stream)?;
            self.split.upload(stream)?;
            let pages = ..rows.pages.len();
            stream.upload_async(&self.staged_pages[pages], self.pages.slice(pages))?;
        }
        stream.record(&self.event)
    }

    /// The heads it was made for.
    pub fn shape(&self) -> AttentionShape {
        self.shape
    }

    /// Whether the step has sequences that are taken whole. A graph of launches without [`AttentionStep::whole`] serves
    /// only steps that have none.
    pub fn has_whole(&self) -> bool {
        self.whole.len > 0
    }

    fn group(&self) -> usize {
        self.shape.heads / self.shape.kv_heads
    }

    fn check(&self, rows: &Rows) -> Result<(), CudaError> {
        let found = [rows.len(), rows.sequences.len(), rows.pages.len()];
        let most = [self.limits.rows, self.limits.sequences, self.limits.pages];
        if found.iter().zip(&most).any(|(found, most)| found > most) {
            return Err(CudaError::Shape(format!(
                "a step of {found:?} rows, sequences and pages, with room for {most:?}"
            )));
        }
        let mut next = 0;
        for (index, sequence) in rows.sequences.iter().enumerate() {
            let SequenceRows { rows: own, start, pages, .. } = sequence;
            if own.start != next || own.end < next || own.end > rows.len() {
                return Err(CudaError::Shape(format!(
                    "sequence {index} has rows {own:?} of {}, wanted them from {next}",
                    rows.len()
                )));
            }
            next = own.end;
            let length = start + own.len();
            let Some(numbers) = rows.pages.get(pages.clone()) else {
                return Err(CudaError::Shape(format!(
                    "sequence {index} has pages {pages:?} of {}",
                    rows.pages.len()
                )));
            };
            if numbers.len() * PAGE < length || length > ATTENTION_NO_WINDOW {
                return Err(CudaError::Shape(format!(
                    "sequence {index} has {} pages for {length} positions",
                    numbers.len()
                )));
            }
            let used = &numbers[..length.div_ceil(PAGE)];
            if let Some(page) = used.iter().find(|&&page| page as usize >= self.limits.cache_pages) {
                let pages = self.limits.cache_pages;
                return Err(CudaError::Shape(format!("sequence {index} has page {page} of {pages}")));
            }
        }
        Ok(())
    }

    /// The tiles of a sequence, without split.
    fn tiles_of(&self, sequence: &SequenceRows, most: usize) -> impl Iterator<Item = AttentionTile> + use<> {
        let pairs = sequence.rows.len() * self.group();
        let first = AttentionTile {
            row: sequence.rows.start as u32,
            position: sequence.start as u32,
            page: sequence.pages.start as u32,
            ..Zeroable::zeroed()
        };
        (0..pairs).step_by(most).map(move |at| AttentionTile {
            first_pair: at as u32,
            pairs: most.min(pairs - at) as u32,
            ..first
        })
    }

    fn push_whole(&mut self, sequence: &SequenceRows) {
        for tile in self.tiles_of(sequence, WIDTHS[self.width].tile_pairs) {
            self.whole.push(tile);
        }
    }

    /// False, and nothing pushed, where there is no room.
    fn push_splits(&mut self, sequence: &SequenceRows, slots: &mut usize, counters: &mut usize) -> bool {
        let group = self.group();
        let pairs = sequence.rows.len() * group;
        let splits = |range: Range<usize>| range.end.div_ceil(ATTENTION_SPLIT);
        let most = splits(0..sequence.start + sequence.rows.len());
        let entries = pairs.div_ceil(ATTENTION_TILE_16) * most;
        if self.split.len + entries > self.split.capacity() || *slots + pairs * most > self.slots {
            return false;
        }
        for tile in self.tiles_of(sequence, ATTENTION_TILE_16) {
            let last_row = (tile.first_pair + tile.pairs - 1) as usize / group;
            let of_tile = splits(0..sequence.start + last_row + 1);
            for split in 0..of_tile {
                self.split.push(AttentionTile {
                    split: split as u32,
                    counter: *counters as u32,
                    partial: *slots as u32,
                    ..tile
                });
            }
            *counters += 1;
            *slots += of_tile * tile.pairs as usize;
        }
        true
    }
}

/// One layer's attention.
#[derive(Clone, Copy)]
pub struct AttentionInputs<'a> {
    /// `[rows, q_stride]`, the first `heads · head_dim` elements of a row used: the layer's `q | k | v`, rotated.
    pub q: DeviceSlice<'a, Half>,
    pub q_stride: usize,
    /// `[cache pages, kv_heads, 16, head_dim]`; keys and values of the step's rows are there already.
    pub keys: DeviceSlice<'a, Half>,
    pub values: DeviceSlice<'a, Half>,
    /// `[rows, y_stride]`, `heads · head_dim` written.
    pub y: DeviceSlice<'a, Half>,
    pub y_stride: usize,
    /// The row at position i sees the keys j > i − window.
    pub window: Option<usize>,
}

/// What the launches of a step have in common.
#[derive(Clone, Copy)]
pub struct AttentionStep<'a> {
    pub work: &'a AttentionWork,
    /// Most rows that the launches are made for. What the step has is read on the device.
    pub row_bound: usize,
    /// Whether there is a launch for sequences that are taken whole; see [`AttentionWork::has_whole`].
    pub whole: bool,
    /// Lets each launch begin before the one before it in the stream has ended (programmatic dependent launch).
    pub overlap: bool,
}

/// The attention kernels of a device.
#[derive(Clone, Debug)]
pub struct AttentionKernels {
    /// By the place in [`WIDTHS`].
    whole: Vec<Kernel<AttentionParams>>,
    split: Vec<Kernel<AttentionParams>>,
    multiprocessors: usize,
}

impl AttentionKernels {
    /// The kernels for queries and a cache of this type.
    ///
    /// # Errors
    /// [`CudaError::UnknownKernel`] when the device was opened without this build's kernels.
    pub fn new(device: &Arc<Device>, element: Element) -> Result<Self, CudaError> {
        let kernel = |name: String, bytes| element.kernel(device, &name)?.with_shared_memory(bytes as u32);
        let whole = |of: &Width| kernel(format!("attention_{}", of.dim), of.shared_bytes);
        let split = |of: &Width| kernel(format!("attention_split_{}", of.dim), of.split_shared_bytes);
        Ok(Self {
            whole: WIDTHS.iter().map(whole).collect::<Result<_, _>>()?,
            split: WIDTHS.iter().map(split).collect::<Result<_, _>>()?,
            multiprocessors: device.properties().multiprocessors as usize,
        })
    }

    /// Queues `y[row] = softmax(q Kᵀ / √head_dim) V` for every row of the step.
    ///
    /// # Errors
    /// [`CudaError::Shape`].
    pub fn attention(
        &self,
        stream: &Stream,
        inputs: &AttentionInputs<'_>,
        step: &AttentionStep<'_>,
    ) -> Result<(), CudaError> {
        let work = step.work;
        check_inputs(inputs, step)?;
        if step.row_bound == 0 {
            return Ok(());
        }
        let AttentionShape { kv_heads, head_dim, .. } = work.shape;
        let Width { tile_pairs, shared_bytes, split_shared_bytes, .. } = WIDTHS[work.width];
        let of_list = |list: &List| AttentionParams {
            q: inputs.q.address(),
            y: inputs.y.address(),
            keys: inputs.keys.address(),
            values: inputs.values.address(),
            pages: work.pages.address(),
            tiles: list.entries.slice(1..).address(),
            tile_count: list.entries.address(),
            partials: work.partials.address(),
            arrived: work.arrived.address(),
            q_stride: inputs.q_stride as u32,
            y_stride: inputs.y_stride as u32,
            kv_heads: kv_heads as u32,
            group: work.group() as u32,
            head_dim: head_dim as u32,
            window: inputs.window.unwrap_or(ATTENTION_NO_WINDOW).min(ATTENTION_NO_WINDOW) as u32,
            scale: std::f32::consts::LOG2_E / (head_dim as f32).sqrt(),
            ..Zeroable::zeroed()
        };
        let launch = |grid: [usize; 2], shared_bytes: usize| Launch {
            shared_bytes: shared_bytes as u32,
            overlap_previous: step.overlap,
            ..Launch::new([grid[0] as u32, grid[1] as u32, 1], ATTENTION_THREADS as u32)
        };
        let blocks = (work.split.capacity() * kv_heads).min(SPLIT_BLOCKS * self.multiprocessors);
        // SAFETY: `check_inputs` has checked all that the kernels index by rows and pages, `AttentionWork::set` every
        // row and page of its lists; the rest is sized by the work itself.
        unsafe {
            if step.whole {
                let tiles = work.limits.tiles(step.row_bound, work.group(), tile_pairs);
                let launch = launch([tiles, kv_heads], shared_bytes);
                stream.launch(&self.whole[work.width], &launch, &of_list(&work.whole))?;
            }
            let launch = launch([blocks, 1], split_shared_bytes);
            stream.launch(&self.split[work.width], &launch, &of_list(&work.split))
        }
    }
}

fn check_inputs(inputs: &AttentionInputs<'_>, step: &AttentionStep<'_>) -> Result<(), CudaError> {
    let AttentionWork { shape, limits, .. } = step.work;
    let AttentionShape { heads, kv_heads, head_dim } = *shape;
    if !(step.work.rows..=limits.rows).contains(&step.row_bound) {
        return Err(CudaError::Shape(format!(
            "launches for {} rows, with {} in the work list and room for {}",
            step.row_bound, step.work.rows, limits.rows
        )));
    }
    if step.work.has_whole() && !step.whole {
        return Err(CudaError::Shape(
            "no launch for sequences that are taken whole, which the step has".to_owned(),
        ));
    }
    let width = heads * head_dim;
    let matrices = [("q", inputs.q, inputs.q_stride), ("y", inputs.y, inputs.y_stride)];
    for (name, data, stride) in matrices {
        let wanted = if step.row_bound == 0 { 0 } else { (step.row_bound - 1) * stride + width };
        // Pieces of 16 bytes where heads are made of them, and pairs of values in any case.
        let unit = if head_dim.is_multiple_of(8) { 8 } else { 2 };
        let aligned = stride.is_multiple_of(unit) && data.address().is_multiple_of(2 * unit as u64);
        if stride < width || data.len() < wanted || !aligned {
            return Err(CudaError::Shape(format!(
                "{name} of {} elements, {stride} a row, for {} rows of {width}: wanted at least that, and a start and \
                 rows in multiples of {unit}",
                data.len(),
                step.row_bound
            )));
        }
    }
    let wanted = limits.cache_pages * kv_heads * PAGE * head_dim;
    for (name, data) in [("keys", inputs.keys), ("values", inputs.values)] {
        if data.len() < wanted || !data.address().is_multiple_of(16) {
            return Err(CudaError::Shape(format!(
                "{name} of {} elements at {:#x}, wanted {wanted} for {} pages, at a multiple of 16",
                data.len(),
                data.address(),
                limits.cache_pages
            )));
        }
    }
    if inputs.window == Some(0) {
        return Err(CudaError::Shape("a window of no keys".to_owned()));
    }
    Ok(())
}
