//! The operations of a forward pass on a GPU: the launches of this module's kernels behind the trait that the
//! transformer is written for.
//!
//! Activations, weights and the cache have one 16-bit type ([`Element`]), sums and logits are fp32. All work goes to one
//! stream, and nothing waits for it but sampling and reading logits. What a step says about its rows and their experts is
//! copied to fixed places first (`steps`); the launches of the blocks read it there, so those of a step without long
//! prompts are captured once for each of some numbers of rows, and replayed for every mix of adapters.
//!
//! # Launches
//!
//! A decoder block of a replayed step is eight: norm, `q·k·v`, rotation and store, attention, `o` with the residual,
//! norm, `gate·up` with SwiGLU (two where the checkpoint has both in one layer), `down` with the residual. Up to 64 rows
//! a product computes V itself, LoRA included; for more rows each of the four has a shrink launch before it. A step
//! begins with one launch for the chunk lists, where its experts are not those of the step before, and one for the
//! embeddings; it ends with rows, norm, `lm_head` and sampling.

mod buffer;
mod loader;
mod steps;

use std::collections::HashMap;
use std::collections::btree_map::{BTreeMap, Entry};
use std::sync::Arc;

use super::attention::{AttentionInputs, AttentionKernels};
use super::elementwise::{BlockPages, ElementwiseKernels, EmbeddingTable, HeadNormWeights, Rotary};
use super::experts::ExpertMemory;
use super::lora::{ChunkArena, Epilogue, FrozenLayer, LoraKernels, Seated, Site, SiteGroup};
use super::sample::SampleKernels;
use super::{CudaError, Device, DeviceBuffer, Element, Graph, Half, Matrix, Stream, TracedLaunch};
use crate::backend::sampling::{Draw, Drawn};
use crate::backend::{
    AttentionShape, Backend, BackendError, FrozenLinear, Gates, HeadNorms, RotaryTables, Rows, SiteChange,
    SitePlace, StepLimits, Write,
};
use crate::tensor::Tensor;
use loader::GroupShapes;
use steps::Steps;

pub use buffer::{Buffer, KvCache, Weight};
pub use loader::{Loader, StagedAdapter};

/// The part of what is left for a cache that goes to the lists and partial results of steps.
const LISTS_SHARE: usize = 16;

/// How a GPU's memory is divided.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MemoryOptions {
    /// Share of the whole memory that may be taken, 0 to 1.
    pub utilization: f32,
    /// Adapters that are on the device at a time.
    pub seats: usize,
    /// Largest rank of an adapter at a site.
    pub max_rank: usize,
    /// Rank chunks of each site, for all seats together.
    pub chunks: usize,
}

/// A GPU as a place for one model.
pub struct Cuda {
    // Dropped first: it waits for copies into the groups' arenas.
    experts: ExpertMemory,
    device: Arc<Device>,
    element: Element,
    stream: Stream,
    lora: LoraKernels,
    elementwise: ElementwiseKernels,
    attention: AttentionKernels,
    sample: SampleKernels,
    memory: MemoryOptions,
    groups: Vec<SiteGroup>,
    /// Weights that an expert puts in the place of a frozen one, by expert and group.
    replaced: HashMap<(u32, usize), Weight>,
    steps: Option<Steps>,
    /// Counts calls of `reserve`: launches that were recorded before the last are of no use.
    reserved: u64,
    /// Where logits are read.
    host: Vec<f32>,
    wanted: Vec<u32>,
}

/// The number of a site group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GroupId(usize);

/// Graphs by the number of rows that they serve.
#[derive(Debug, Default)]
pub struct Recorded {
    /// What the graphs were captured under.
    state: [u64; 2],
    graphs: BTreeMap<usize, Graph>,
}

impl Cuda {
    /// Opens a device with the kernels of this build, for a model in `element`: weights and adapters that are stored
    /// otherwise are rounded to it.
    ///
    /// # Errors
    /// Those of [`Device::open`].
    pub fn open(ordinal: usize, memory: MemoryOptions, element: Element) -> Result<Self, BackendError> {
        Ok(Self::on(&Device::open(ordinal)?, memory, element)?)
    }

    /// On a device that is open.
    ///
    /// # Errors
    /// [`CudaError::UnknownKernel`] when it was opened without this build's kernels.
    pub fn on(device: &Arc<Device>, memory: MemoryOptions, element: Element) -> Result<Self, CudaError> {
        Ok(Self {
            stream: device.stream()?,
            lora: LoraKernels::new(device, element)?,
            elementwise: ElementwiseKernels::new(device, element)?,
            attention: AttentionKernels::new(device, element)?,
            sample: SampleKernels::new(device)?,
            element,
            memory,
            groups: Vec::new(),
            experts: ExpertMemory::new(device, memory.seats)?,
            replaced: HashMap::new(),
            steps: None,
            reserved: 0,
            host: Vec::new(),
            wanted: Vec::new(),
            device: Arc::clone(device),
        })
    }

    /// The experts of the model, on the device and beside it.
    pub fn experts(&self) -> &ExpertMemory {
        &self.experts
    }

    /// Blocks until everything queued so far is done.
    ///
    /// # Errors
    /// What a kernel has failed with.
    pub fn synchronize(&self) -> Result<(), CudaError> {
        self.stream.synchronize()
    }

    /// Runs `work` without graphs and overlap, and says how long each of its launches took: for benches and tools.
    ///
    /// # Errors
    /// Those of `work`, and when the device has no room for 16 MiB.
    pub fn trace<T>(
        &mut self,
        work: impl FnOnce(&mut Self) -> Result<T, BackendError>,
    ) -> Result<(T, Vec<TracedLaunch>), BackendError> {
        self.stream.start_trace()?;
        let worked = work(self);
        let launches = self.stream.finish_trace();
        Ok((worked?, launches?))
    }

    /// An arena for the experts of a site.
    fn arena(&self, in_features: usize, out_features: usize, lookup: bool) -> Result<ChunkArena, CudaError> {
        let MemoryOptions { seats, max_rank, chunks, .. } = self.memory;
        let arena = if lookup { ChunkArena::for_lookup } else { ChunkArena::new };
        arena(&self.stream, self.element, [in_features, out_features], chunks, seats, max_rank)
    }

    fn add_group(&mut self, sites: Vec<Site>) -> Result<GroupId, BackendError> {
        // Made for no rows as yet: `reserve` knows how many there can be.
        let chunks_per_tile = sites.len() * self.memory.chunks;
        self.groups.push(SiteGroup::new(&self.device, sites, 0, chunks_per_tile)?);
        Ok(GroupId(self.groups.len() - 1))
    }

    fn steps(&self) -> Result<&Steps, CudaError> {
        self.steps.as_ref().ok_or_else(|| CudaError::Shape("an operation before any step".to_owned()))
    }

    /// The product of a group for the rows in hand, and then again for those whose expert replaces its weight.
    fn product(
        &self,
        &GroupId(index): &GroupId,
        x: &Buffer,
        gates: &Gates,
        epilogue: Epilogue<'_>,
        y: &Buffer,
    ) -> Result<(), CudaError> {
        let (steps, group) = (self.steps()?, &self.groups[index]);
        self.lora.linear(&self.stream, group, x.matrix()?, y.outputs(0), epilogue, &steps.products())?;
        for (weight, first, rows) in self.replaced_rows(index, gates) {
            let site = &group.sites()[0];
            let layer = FrozenLayer {
                weight: weight.data.slice(..),
                bias: site.bias.as_ref().map(|bias| bias.slice(..)),
                in_features: weight.stride,
                out_features: weight.rows,
            };
            let x = x.matrix()?.from_row(first);
            let rows = steps.count_of(rows);
            self.lora.frozen_product(&self.stream, layer, x, y.outputs(first), rows, steps.scratch())?;
        }
        Ok(())
    }

    /// Runs of rows whose expert replaces a group's weight: that weight, the first row, and how many they are.
    fn replaced_rows(&self, group: usize, gates: &Gates) -> impl Iterator<Item = (&Weight, usize, usize)> {
        let runs = if self.replaced.is_empty() { &[] } else { gates.runs() };
        runs.iter().filter_map(move |run| match *gates.experts_of(run) {
            // Such an adapter is never one of several.
            [expert] => {
                let weight = self.replaced.get(&(expert, group))?;
                Some((weight, run.rows.start, run.rows.len()))
            }
            _ => None,
        })
    }

    /// That steps find every expert of these gates.
    fn check_brought(&self, gates: &Gates) -> Result<(), CudaError> {
        let mut experts = gates.runs().iter().flat_map(|run| gates.experts_of(run));
        let missing = experts.find(|&&expert| match self.experts.order(expert) {
            Some(_) => self.experts.seat(expert).is_none(),
            // Whole weights are there as long as it is loaded.
            None => !self.replaced.keys().any(|&(of, _)| of == expert),
        });
        match missing {
            Some(expert) => {
                Err(CudaError::Shape(format!("a step of expert {expert}, which has not been brought")))
            }
            None => Ok(()),
        }
    }

    /// A slot has another content: lists of the step before say nothing about the next.
    fn forget_lists(&mut self) {
        if let Some(steps) = &mut self.steps {
            steps.forget_lists();
        }
    }

    /// What captured launches were made for: they serve no other state.
    fn state(&self) -> [u64; 2] {
        [self.reserved, self.experts.generation()]
    }
}

impl Drop for Cuda {
    fn drop(&mut self) {
        // What is queued uses memory that goes now; an error has nobody left to hear of it.
        let _ = self.stream.synchronize();
    }
}

/// Where steps find an expert; nowhere where it changes nothing by ranks or columns.
fn seat_of(experts: &ExpertMemory, expert: u32) -> Option<Seated> {
    Some(Seated { seat: experts.seat(expert)?, order: experts.order(expert)? })
}

impl Backend for Cuda {
    const CACHE_ELEMENT_BYTES: usize = size_of::<Half>();
    // The weights of `lm_head` are read anew for every part of a step.
    const LOGITS_BYTES: usize = 256 << 20;
    const QUEUES: bool = true;

    type Weight = Weight;
    type Vector = DeviceBuffer<f32>;
    type Buffer = Buffer;
    type Group = GroupId;
    type Table = GroupId;
    type Rotary = Rotary;
    type KvCache = KvCache;
    type Loader = Loader;
    type Expert = StagedAdapter;
    type Recorded = Recorded;

    fn weight(&self, tensor: &Tensor) -> Result<Weight, BackendError> {
        Ok(Weight::new(&self.stream, self.element, tensor)?)
    }

    fn vector(&self, values: Vec<f32>) -> Result<DeviceBuffer<f32>, BackendError> {
        let buffer = DeviceBuffer::new(&self.device, values.len(), "a vector of weights")?;
        self.stream.upload(&values, &buffer)?;
        Ok(buffer)
    }

    fn buffer(&self, rows: usize, width: usize) -> Result<Buffer, BackendError> {
        Ok(Buffer::half(&self.stream, rows, width)?)
    }

    fn logits_buffer(&self, rows: usize, width: usize) -> Result<Buffer, BackendError> {
        Ok(Buffer::single(&self.device, rows, width)?)
    }

    fn group(&mut self, sites: Vec<FrozenLinear<Self>>) -> Result<GroupId, BackendError> {
        let site = |FrozenLinear { weight, bias }: FrozenLinear<Self>| {
            let chunks = self.arena(weight.stride, weight.rows, false)?;
            Ok(Site { weight: weight.data, bias, chunks })
        };
        let sites = sites.into_iter().map(site).collect::<Result<_, CudaError>>()?;
        self.add_group(sites)
    }

    fn table(&mut self, weight: Weight) -> Result<GroupId, BackendError> {
        let chunks = self.arena(weight.rows, weight.stride, true)?;
        self.add_group(vec![Site { weight: weight.data, bias: None, chunks }])
    }

    fn rotary(&self, tables: RotaryTables) -> Result<Rotary, BackendError> {
        Ok(Rotary::new(&self.stream, &tables)?)
    }

    fn kv_cache(&self, blocks: usize, pages: usize, shape: AttentionShape) -> Result<KvCache, BackendError> {
        Ok(KvCache::new(&self.device, blocks, pages, shape)?)
    }

    fn cache_room(&self, _limits: &StepLimits) -> Result<Option<usize>, BackendError> {
        let total = self.device.properties().total_bytes as f64;
        let spared = (total * (1.0 - f64::from(self.memory.utilization))) as usize;
        let room = self.device.free_bytes()?.saturating_sub(spared);
        Ok(Some(room - room / LISTS_SHARE))
    }

    fn reserve(&mut self, limits: &StepLimits) -> Result<(), BackendError> {
        // What is there now goes first: both need not fit beside each other.
        self.stream.synchronize()?;
        self.steps = None;
        self.reserved += 1;
        for group in &mut self.groups {
            group.reserve(limits.rows.max(limits.picked))?;
        }
        self.steps = Some(Steps::new(&self.stream, &self.groups, limits, self.memory.seats)?);
        Ok(())
    }

    fn loader(&self, groups: &[GroupId], table: &GroupId) -> Result<Loader, BackendError> {
        let shapes = |group: &GroupId| {
            let sites = self.groups[group.0].sites();
            GroupShapes { id: group.0, sites: sites.iter().map(|site| *site.chunks.shape()).collect() }
        };
        Ok(Loader {
            device: Arc::clone(&self.device),
            groups: groups.iter().map(shapes).collect(),
            table: shapes(table),
        })
    }

    fn lay_out(
        loader: &Loader,
        changes: Vec<(SitePlace, SiteChange)>,
    ) -> Result<StagedAdapter, BackendError> {
        Ok(loader.lay_out(changes)?)
    }

    fn insert_expert(
        &mut self,
        _groups: &mut [GroupId],
        _table: &mut GroupId,
        slot: usize,
        adapter: StagedAdapter,
    ) -> Result<(), BackendError> {
        let expert = slot as u32;
        self.forget_lists();
        self.replaced.extend(adapter.replaced.into_iter().map(|(group, weight)| ((expert, group), weight)));
        if let Some(ranks) = adapter.ranks {
            self.experts.insert(&mut self.groups, expert, ranks)?;
        }
        Ok(())
    }

    fn unload_expert(
        &mut self,
        _groups: &mut [GroupId],
        _table: &mut GroupId,
        slot: usize,
    ) -> Result<(), BackendError> {
        let expert = slot as u32;
        self.forget_lists();
        if self.replaced.keys().any(|&(of, _)| of == expert) {
            // Memory is not freed under what is queued.
            self.stream.synchronize()?;
            self.replaced.retain(|&(of, _), _| of != expert);
        }
        Ok(self.experts.remove(&mut self.groups, expert)?)
    }

    fn bring_experts(&mut self, wanted: &[u32], kept: &[u32]) -> Result<bool, BackendError> {
        let Self { experts, wanted: staged, .. } = self;
        // One that only replaces whole weights has nothing to bring.
        staged.clear();
        staged.extend(wanted.iter().filter(|&&expert| experts.order(expert).is_some()));
        Ok(experts.bring(&mut self.groups, staged, kept, &self.stream)?)
    }

    fn begin_step(&mut self, rows: &Rows) -> Result<(), BackendError> {
        self.check_brought(&rows.gates)?;
        let Self { stream, lora, steps, experts, .. } = self;
        let steps =
            steps.as_mut().ok_or_else(|| CudaError::Shape("a step without a workspace".to_owned()))?;
        let moves = experts.stats().moves;
        Ok(steps.begin(stream, lora, rows, moves, |expert| seat_of(experts, expert))?)
    }

    fn set_tokens(&mut self, tokens: &[u32]) -> Result<(), BackendError> {
        let Self { stream, steps, .. } = self;
        let steps = steps.as_mut().ok_or_else(|| CudaError::Shape("tokens of no step".to_owned()))?;
        Ok(steps.rows.set_tokens(stream, tokens)?)
    }

    fn record(
        &mut self,
        recorded: &mut Recorded,
        work: impl FnOnce(&mut Self) -> Result<(), BackendError>,
    ) -> Result<(), BackendError> {
        let Some(rows) = self.steps()?.graph_rows().filter(|_| !self.stream.is_traced()) else {
            return work(self);
        };
        let state = self.state();
        if recorded.state != state {
            *recorded = Recorded { state, graphs: BTreeMap::new() };
        }
        let graph = match recorded.graphs.entry(rows) {
            Entry::Occupied(graph) => graph.into_mut(),
            Entry::Vacant(place) => {
                let capture = self.stream.start_capture()?;
                let worked = work(self);
                let graph = capture.finish(&self.stream);
                worked?;
                place.insert(graph?)
            }
        };
        // SAFETY: what was captured is the model's own memory and that of its workspace, which owns `recorded`; the rest
        // belongs to `self`, and has not changed since `state`.
        Ok(unsafe { graph.launch(&self.stream) }?)
    }

    fn embed(&mut self, table: &GroupId, rows: &Rows, y: &mut Buffer) -> Result<(), BackendError> {
        let (steps, y) = (self.steps()?, y.matrix()?);
        let table_of = self.groups[table.0].lookup(steps.work())?;
        self.elementwise.embed(&self.stream, &table_of, &steps.rows, steps.count(), y)?;
        for (weight, first, count) in self.replaced_rows(table.0, &rows.gates) {
            let own = EmbeddingTable { weight: weight.data.slice(..), experts: None, ..table_of };
            let (count, y) = (steps.count_of(count), y.from_row(first));
            self.elementwise.embed_from(first, &self.stream, &own, &steps.rows, count, y)?;
        }
        Ok(())
    }

    fn rms_norm(
        &mut self,
        x: &Buffer,
        _rows: usize,
        weight: &DeviceBuffer<f32>,
        epsilon: f32,
        y: &mut Buffer,
    ) -> Result<(), BackendError> {
        let (x, count, y) = (x.matrix()?, self.steps()?.count(), y.matrix()?);
        Ok(self.elementwise.rms_norm(&self.stream, x, weight.slice(..), epsilon, count, y)?)
    }

    fn linear(
        &mut self,
        group: &GroupId,
        x: &Buffer,
        gates: &Gates,
        write: Write,
        y: &mut Buffer,
    ) -> Result<(), BackendError> {
        let epilogue = match write {
            Write::Replace => Epilogue::Store,
            Write::Add => Epilogue::AddResidual(y.matrix()?.data),
        };
        Ok(self.product(group, x, gates, epilogue, y)?)
    }

    fn linear_swiglu(
        &mut self,
        group: &GroupId,
        x: &Buffer,
        gates: &Gates,
        y: &mut Buffer,
    ) -> Result<(), BackendError> {
        if self.groups[group.0].sites().len() == 2 {
            return Ok(self.product(group, x, gates, Epilogue::SwiGlu, y)?);
        }
        let steps = self.steps()?;
        let gate_up = &steps.gate_up;
        self.product(group, x, gates, Epilogue::Store, gate_up)?;
        let (from, count, to) = (gate_up.matrix()?, steps.count(), y.matrix()?);
        Ok(self.elementwise.swiglu(&self.stream, from, y.width, count, to)?)
    }

    fn rope_store(
        &mut self,
        qkv: &mut Buffer,
        shape: AttentionShape,
        norms: Option<HeadNorms<'_, Self>>,
        tables: &Rotary,
        _rows: &Rows,
        cache: &mut KvCache,
        block: usize,
    ) -> Result<(), BackendError> {
        let steps = self.steps()?;
        let [keys, values] = cache.block(block);
        let norms = norms.map(|HeadNorms { q, k, epsilon }| {
            let (q, k) = (q.slice(..), k.slice(..));
            HeadNormWeights { q, k, epsilon }
        });
        let (qkv, pages) = (qkv.matrix()?, BlockPages { keys, values });
        let count = steps.count();
        Ok(self.elementwise.rope_store(&self.stream, qkv, shape, norms, tables, pages, &steps.rows, count)?)
    }

    fn attention(
        &mut self,
        qkv: &Buffer,
        window: Option<usize>,
        _rows: &Rows,
        cache: &KvCache,
        block: usize,
        y: &mut Buffer,
    ) -> Result<(), BackendError> {
        let [keys, values] = cache.block(block);
        let (Matrix { data: q, stride: q_stride }, Matrix { data: y, stride: y_stride }) =
            (qkv.matrix()?, y.matrix()?);
        let inputs = AttentionInputs { q, q_stride, keys, values, y, y_stride, window };
        Ok(self.attention.attention(&self.stream, &inputs, &self.steps()?.attention())?)
    }

    fn pick_rows(
        &mut self,
        x: &Buffer,
        picked: &[u32],
        gates: &Gates,
        y: &mut Buffer,
    ) -> Result<(), BackendError> {
        let Self { stream, lora, steps, experts, elementwise, .. } = self;
        let steps = steps.as_mut().ok_or_else(|| CudaError::Shape("rows of no step".to_owned()))?;
        steps.pick(stream, lora, picked, gates, |expert| seat_of(experts, expert))?;
        let (count, width) = (steps.count(), x.width);
        Ok(elementwise.pick_rows(stream, x.matrix()?, width, &steps.rows, count, y.matrix()?)?)
    }

    fn sample(
        &mut self,
        logits: &Buffer,
        draws: &[Draw<'_>],
        drawn: &mut Vec<Drawn>,
    ) -> Result<(), BackendError> {
        let Self { stream, sample, steps, .. } = self;
        let steps = steps.as_mut().ok_or_else(|| CudaError::Shape("draws of no step".to_owned()))?;
        Ok(steps.draws.sample(stream, sample, logits.logits()?, logits.stride, draws, drawn)?)
    }

    fn read<'a>(&'a mut self, x: &'a Buffer, rows: usize) -> Result<&'a [f32], BackendError> {
        let logits = x.logits()?.slice(..rows * x.stride);
        self.host.resize(logits.len(), 0.0);
        self.stream.download(logits, &mut self.host)?;
        if self.steps()?.take_overflow(&self.stream)? {
            return Err(
                CudaError::Shape("a step used more rank chunks than there is room for".to_owned()).into()
            );
        }
        Ok(&self.host)
    }
}
