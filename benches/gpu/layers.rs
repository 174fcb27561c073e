//! Layers of random weights and adapters on a GPU, and the graphs of launches that are timed.
//!
//! There are several layers, one after the other in every graph: together each group's weights are at least four times
//! the size of the L2 cache, so that no launch finds its weights, adapters or inputs there because of the bench.

use std::sync::Arc;

use loramux::backend::Gates;
use loramux::backend::cuda::lora::{
    ChunkArena, ChunkLists, Epilogue, LoraKernels, LowRank, Matrix, Scratch, Site, SiteGroup, Step, WorkList,
};
use loramux::backend::cuda::params::{RANK_CHUNK, ROW_TILE};
use loramux::backend::cuda::{CudaError, Device, DeviceBuffer, Element, Graph, Half, Stream};

use super::cases::{Case, Group, Mix, Part, Ranks, Set};
use super::device::{Stopwatch, random};

/// Times one batch of rows runs through the layers in a graph: short graphs would time the gaps between them.
fn rounds(rows: usize) -> usize {
    if rows <= 256 { 4 } else { 1 }
}

/// Most of everything that the cases need.
#[derive(Clone, Copy, Default)]
struct Bounds {
    rows: usize,
    adapters: usize,
    chunks_per_adapter: usize,
    entries: usize,
    chunks_of_tile: usize,
}

impl Bounds {
    fn of(cases: &[Case]) -> Self {
        let mut most = Self::default();
        for Case { batch, .. } in cases {
            let tiles = batch.tiles(ROW_TILE);
            let adapters = batch.segments.len();
            let chunks = (0..adapters).map(|adapter| batch.chunks_of(adapter)).max().unwrap_or(0);
            most.rows = most.rows.max(batch.rows);
            most.adapters = most.adapters.max(adapters);
            most.chunks_per_adapter = most.chunks_per_adapter.max(chunks);
            most.entries = most.entries.max(tiles.iter().map(ExactSizeIterator::len).sum());
            let of_tiles = tiles.into_iter().map(|adapters| batch.chunks(adapters));
            most.chunks_of_tile = of_tiles.fold(most.chunks_of_tile, usize::max);
        }
        most
    }
}

struct Layer {
    groups: Vec<SiteGroup>,
    /// Inputs of each group, and behind them the outputs of the last. The layer's own input is never written to, so a
    /// layer computes the same however often it runs.
    activations: Vec<DeviceBuffer<Half>>,
}

/// Everything on the GPU.
pub struct Layers {
    device: Arc<Device>,
    stream: Stream,
    kernels: LoraKernels,
    groups: Vec<Group>,
    layers: Vec<Layer>,
    lists: ChunkLists,
    scratch: Scratch,
    work: WorkList,
    bounds: Bounds,
    stopwatch: Stopwatch,
}

impl Layers {
    /// Layers for `cases`, which are of `set`.
    ///
    /// # Errors
    /// What the device has refused.
    pub fn new(set: Set, cases: &[Case]) -> Result<Self, CudaError> {
        let device = Device::open(0)?;
        let stream = device.stream()?;
        let groups = set.shapes().groups();
        let bounds = Bounds::of(cases);
        let smallest = groups.iter().map(Group::weight_bytes).min().expect("a layer has groups");
        let copies = match set {
            Set::Tiny => 2,
            Set::Short | Set::Full => (4 * device.properties().l2_bytes).div_ceil(smallest).max(2),
        };
        let mut layers: Vec<Layer> = Vec::new();
        for _ in 0..copies {
            let layer = Layer::new(&stream, &groups, bounds, layers.first())?;
            layers.push(layer);
        }
        let all: Vec<_> = layers.iter().flat_map(|layer| &layer.groups).collect();
        Ok(Self {
            kernels: LoraKernels::new(&device, Element::Bf16)?,
            lists: ChunkLists::new(&stream, &all)?,
            scratch: Scratch::new(&stream, &all)?,
            work: WorkList::new(&device, bounds.rows, bounds.entries.max(1))?,
            stopwatch: Stopwatch::new(&device)?,
            groups,
            layers,
            bounds,
            stream,
            device,
        })
    }

    pub fn device(&self) -> &Arc<Device> {
        &self.device
    }

    pub fn copies(&self) -> usize {
        self.layers.len()
    }

    /// The stream that everything is timed on.
    pub fn stream(&self) -> &Stream {
        &self.stream
    }

    /// Fills all slots of all layers with adapters of these ranks.
    pub fn load_adapters(&mut self, ranks: Ranks) -> Result<(), CudaError> {
        let widest = self.groups.iter().map(|group| group.in_features.max(group.widths[0])).max();
        let most = self.bounds.chunks_per_adapter * RANK_CHUNK * widest.expect("a layer has groups");
        // Every adapter starts elsewhere in the same random numbers.
        let numbers = random(most + self.bounds.adapters * 8, 0.02, 1);
        for site in self.layers.iter_mut().flat_map(|layer| &mut layer.groups).flat_map(SiteGroup::sites_mut)
        {
            let arena = &mut site.chunks;
            for slot in 0..self.bounds.adapters {
                arena.unload(&self.stream, slot)?;
            }
            for slot in 0..self.bounds.adapters {
                let rank = ranks.of(slot);
                let pair = LowRank {
                    rank,
                    a: &numbers[slot * 8..][..rank * arena.in_features()],
                    b: &numbers[slot * 8..][..rank * arena.out_features()],
                    scale: 2.0,
                    order: order_of(slot as u32),
                    column_scale: None,
                    bias: None,
                };
                arena.load(&self.stream, slot, &pair)?;
            }
        }
        Ok(())
    }

    /// Makes the batch of `case` the one that all launches work on.
    ///
    /// # Errors
    /// What the device has refused; [`CudaError::Shape`] when the layers were made for other cases.
    pub fn set_batch(&mut self, case: &Case) -> Result<(), CudaError> {
        let mut gates = Gates::default();
        for (adapter, &rows) in case.batch.segments.iter().enumerate() {
            gates.push_rows(rows, &[(adapter as u32, 0.75)]);
        }
        gates.push_rows(case.batch.rows - gates.rows(), &[]);
        self.work.set(&self.stream, &gates, order_of)?;
        self.lists.build(&self.stream, &self.kernels, &self.work)?;
        if self.lists.take_overflow(&self.stream)? {
            return Err(CudaError::Shape("a chunk list that is too small for the case".to_owned()));
        }
        Ok(())
    }

    /// Fills every activation with outputs of the layers themselves, and looks at the last of them.
    ///
    /// # Errors
    /// What the device has refused; [`CudaError::Shape`] for outputs that are zero or not finite.
    pub fn prepare(&mut self, case: &Case) -> Result<(), CudaError> {
        self.set_batch(case)?;
        for layer in &self.layers {
            for at in 0..self.groups.len() {
                self.launch(layer, at, case.batch.rows, Part::Whole)?;
            }
            let outputs = layer.activations.last().expect("outputs follow the inputs");
            let mut values = vec![Half::ZERO; outputs.len()];
            self.stream.download(outputs, &mut values)?;
            let wrong = values.iter().filter(|&&value| !Element::Bf16.to_f32(value).is_finite()).count();
            let zeros = values.iter().filter(|value| **value == Half::ZERO).count();
            if wrong > 0 || zeros > values.len() / 100 {
                return Err(CudaError::Shape(format!(
                    "outputs of a layer: of {} values, {wrong} are not finite and {zeros} are zero",
                    values.len()
                )));
            }
        }
        Ok(())
    }

    /// A graph of the case's launches, and how many times it does what the case is.
    pub fn capture(&self, case: &Case) -> Result<(Graph, usize), CudaError> {
        let rounds = rounds(case.batch.rows);
        let launches = match case.part {
            Part::Whole if case.mix == Mix::None => Part::Product,
            part => part,
        };
        let graph = self.stream.capture(|| {
            for layer in (0..rounds).flat_map(|_| &self.layers) {
                for at in case.group_range.clone() {
                    self.launch(layer, at, case.batch.rows, launches)?;
                }
            }
            Ok(())
        })?;
        Ok((graph, rounds * self.layers.len()))
    }

    /// Seconds of each of `replays` replays of a graph of this object's.
    pub fn replay(&self, graph: &Graph, replays: usize) -> Result<Vec<f64>, CudaError> {
        // SAFETY: everything that was captured lives in `self`, longer than the wait in `time`.
        self.stopwatch.time(&self.stream, replays, || unsafe { graph.launch(&self.stream) })
    }

    /// Queues the launches of one group.
    fn launch(&self, layer: &Layer, at: usize, rows: usize, launches: Part) -> Result<(), CudaError> {
        let group = &self.groups[at];
        let step = Step { work: &self.work, row_bound: rows, scratch: &self.scratch, overlap: true };
        // A group reads the first columns of what the one before it has left: q in place of the attention's output.
        let before = at.checked_sub(1).map_or(group.in_features, |before| self.groups[before].width());
        let x = Matrix { data: layer.activations[at].slice(..rows * before), stride: before };
        let y =
            Matrix { data: layer.activations[at + 1].slice(..rows * group.width()), stride: group.width() };
        // The layer's input stands for both residuals.
        let residual = layer.activations[0].slice(..);
        let epilogue = match group.output {
            super::cases::Output::Store => Epilogue::Store,
            super::cases::Output::AddResidual => Epilogue::AddResidual(residual),
            super::cases::Output::SwiGlu => Epilogue::SwiGlu,
        };
        let (kernels, stream, group) = (&self.kernels, &self.stream, &layer.groups[at]);
        match launches {
            Part::Whole => kernels.linear(stream, group, x, y, epilogue, &step),
            Part::Shrink => kernels.shrink_gate(stream, group, x, &step),
            Part::Product => kernels.product(stream, group, x, y, epilogue, &step),
        }
    }
}

impl Layer {
    /// Random weights, or at other places those of the `first` layer.
    fn new(
        stream: &Stream,
        groups: &[Group],
        bounds: Bounds,
        first: Option<&Layer>,
    ) -> Result<Self, CudaError> {
        let device = stream.device();
        let numbers =
            |len: usize, scale: f32, seed: u64, purpose: &str, same: Option<&DeviceBuffer<Half>>| {
                let buffer = DeviceBuffer::new(device, len, purpose)?;
                match same {
                    // SAFETY: both buffers outlive the wait.
                    Some(same) => {
                        unsafe { stream.copy_async(same, &buffer) }.and_then(|()| stream.synchronize())?
                    }
                    None => stream.upload(&random(len, scale, seed), &buffer)?,
                }
                Ok::<_, CudaError>(buffer)
            };
        let mut of_layer = Vec::new();
        for (at, group) in groups.iter().enumerate() {
            let mut sites = Vec::new();
            for (site, &width) in group.widths.iter().enumerate() {
                let same = first.map(|layer| &layer.groups[at].sites()[site].weight);
                let scale = 1.7 / (group.in_features as f32).sqrt();
                let seed = (at * 10 + site + 2) as u64;
                sites.push(Site {
                    weight: numbers(width * group.in_features, scale, seed, "a weight", same)?,
                    bias: None,
                    chunks: ChunkArena::new(
                        stream,
                        Element::Bf16,
                        [group.in_features, width],
                        bounds.adapters * bounds.chunks_per_adapter,
                        bounds.adapters,
                        bounds.chunks_per_adapter * RANK_CHUNK,
                    )?,
                });
            }
            let chunks_of_tile = bounds.chunks_of_tile * group.widths.len();
            of_layer.push(SiteGroup::new(device, sites, bounds.rows, chunks_of_tile)?);
        }
        let same = first.map(|layer| &layer.activations[0]);
        let mut activations = vec![numbers(bounds.rows * groups[0].in_features, 1.0, 1, "inputs", same)?];
        for group in groups {
            activations.push(DeviceBuffer::new(device, bounds.rows * group.width(), "activations")?);
        }
        Ok(Self { groups: of_layer, activations })
    }
}

/// Any order of the adapters that is not the one of their slots.
fn order_of(slot: u32) -> u64 {
    (u64::from(slot) + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}
