//! One product of a site group: its inputs, what the kernels make of them, and what a plain loop in f64 does.

use bytemuck::Pod;

use loramux::backend::Gates;
use loramux::backend::cuda::lora::{
    ChunkArena, ChunkLists, Epilogue, GemmDecodeCounters, LoraKernels, LowRank, Matrix, Outputs,
    ProductKernel, RankChunk, Scratch, ShrinkKernel, Site, SiteGroup, Step, WorkList,
};
use loramux::backend::cuda::{DeviceBuffer, Half, Stream};

use crate::cuda_device::device;
use crate::element::{NAN, Value, element};
pub use crate::random::Random;

/// An adapter's pair at one site.
#[derive(Clone)]
pub struct Pair {
    pub rank: usize,
    /// `[rank, in_features]`
    pub a: Vec<Half>,
    /// `[out_features, rank]`
    pub b: Vec<Half>,
    /// `[out_features]` each.
    pub column_scale: Option<Vec<f32>>,
    pub bias: Option<Vec<f32>>,
}

/// An adapter over the sites of the group; none where a site is no target.
#[derive(Clone)]
pub struct Expert {
    pub pairs: Vec<Option<Pair>>,
    pub scale: f32,
    pub order: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Output {
    Store,
    /// Not rounded.
    StoreFp32,
    /// The residual is a buffer of its own.
    AddResidual,
    /// The residual is y.
    AddInPlace,
    SwiGlu,
}

/// The launches of a product.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Launches {
    /// `shrink_gate` and `product`, the latter by a certain kernel.
    ShrinkAnd(ProductKernel),
    /// `linear`: those of its choice.
    Linear,
}

/// How a product is made, and the elements between its rows of outputs.
#[derive(Clone, Copy, Debug)]
pub struct Path {
    pub launches: Launches,
    pub padding: usize,
}

impl From<ProductKernel> for Path {
    fn from(kernel: ProductKernel) -> Self {
        Self { launches: Launches::ShrinkAnd(kernel), padding: 16 }
    }
}

/// A group of sites with their weights and adapters.
#[derive(Clone)]
pub struct Group {
    pub in_features: usize,
    pub widths: Vec<usize>,
    pub weights: Vec<Vec<Half>>,
    pub biases: Option<Vec<Vec<f32>>>,
    pub experts: Vec<Expert>,
}

impl Group {
    /// `ranks[expert][site]`, 0 where the site is no target.
    pub fn new(
        random: &mut Random,
        in_features: usize,
        widths: &[usize],
        bias: bool,
        ranks: &[Vec<usize>],
    ) -> Self {
        let size = 1.0 / (in_features as f32).sqrt();
        let experts = ranks.iter().map(|of_sites| Expert {
            pairs: of_sites
                .iter()
                .zip(widths)
                .map(|(&rank, &width)| {
                    (rank > 0).then(|| Pair {
                        rank,
                        a: random.values(rank * in_features, size),
                        b: random.values(width * rank, 0.5),
                        column_scale: None,
                        bias: None,
                    })
                })
                .collect(),
            scale: 0.25 + random.number().abs() * 2.0,
            order: random.next(),
        });
        let experts = experts.collect();
        Self {
            in_features,
            weights: widths.iter().map(|&width| random.values(width * in_features, size)).collect(),
            biases: bias
                .then(|| widths.iter().map(|&width| (0..width).map(|_| random.number()).collect()).collect()),
            widths: widths.to_vec(),
            experts,
        }
    }

    pub fn width(&self, output: Output) -> usize {
        if output == Output::SwiGlu { self.widths[0] } else { self.widths.iter().sum() }
    }
}

/// The rows of one step: inputs, residuals and the `(expert, gate)` pairs of each.
#[derive(Clone)]
pub struct Batch {
    pub x: Vec<Half>,
    pub residual: Vec<Half>,
    pub gates: Vec<Vec<(u32, f32)>>,
}

impl Batch {
    pub fn new(random: &mut Random, group: &Group, output: Output, gates: Vec<Vec<(u32, f32)>>) -> Self {
        Self {
            x: random.values(gates.len() * group.in_features, 1.0),
            residual: random.values(gates.len() * group.width(output), 1.0),
            gates,
        }
    }

    pub fn rows(&self) -> usize {
        self.gates.len()
    }

    /// Some of the rows, in that order.
    pub fn pick(&self, group: &Group, output: Output, rows: &[usize]) -> Self {
        let part = |values: &[Half], width: usize| {
            rows.iter().flat_map(|&row| values[row * width..(row + 1) * width].to_vec()).collect()
        };
        Self {
            x: part(&self.x, group.in_features),
            residual: part(&self.residual, group.width(output)),
            gates: rows.iter().map(|&row| self.gates[row].clone()).collect(),
        }
    }
}

/// A step's chunk list and V, read back.
pub struct Lists {
    /// `[tiles · slices · sites + 1]`
    pub starts: Vec<u32>,
    pub chunks: Vec<RankChunk>,
    /// `[chunks][128][16]`
    pub v: Vec<Half>,
}

/// What decode products count: zero between launches.
pub fn counters(stream: &Stream, scratch: &Scratch) -> [u32; 3] {
    let mut counters = [GemmDecodeCounters::default()];
    stream.download(scratch.counters(), &mut counters).expect("counters");
    bytemuck::cast(counters[0])
}

/// The kernels and a group on the device. Slots are given out in an order of their own.
pub struct OnDevice {
    pub stream: Stream,
    pub kernels: LoraKernels,
    pub group: SiteGroup,
    slots: Vec<u32>,
    max_rows: usize,
    max_entries: usize,
}

impl OnDevice {
    /// `slots[expert]`: where each expert is loaded.
    pub fn new(group: &Group, slots: Vec<u32>, max_rows: usize) -> Self {
        let device = device();
        let stream = device.stream().expect("a stream");
        let slot_count = slots.iter().max().map_or(1, |&slot| slot as usize + 1);
        let max_rank =
            group.experts.iter().flat_map(|expert| expert.pairs.iter().flatten().map(|pair| pair.rank));
        let max_rank = max_rank.max().unwrap_or(16);
        let max_entries = (max_rows.div_ceil(128) * group.experts.len()).max(1);
        let mut chunks_per_tile = 0;
        let mut sites = Vec::new();
        for (i, &width) in group.widths.iter().enumerate() {
            let pairs = || group.experts.iter().map(|expert| expert.pairs[i].as_ref());
            let chunks: usize = pairs().flatten().map(|pair| pair.rank.div_ceil(16)).sum();
            chunks_per_tile += chunks;
            let features = [group.in_features, width];
            let mut arena = ChunkArena::new(&stream, element(), features, chunks, slot_count, max_rank)
                .expect("an arena");
            for (&slot, (expert, pair)) in slots.iter().zip(group.experts.iter().zip(pairs())) {
                let Some(Pair { rank, a, b, column_scale, bias }) = pair else { continue };
                let pair = LowRank {
                    rank: *rank,
                    a,
                    b,
                    scale: expert.scale,
                    column_scale: column_scale.as_deref(),
                    bias: bias.as_deref(),
                    order: expert.order,
                };
                arena.load(&stream, slot as usize, &pair).expect("an expert");
            }
            let weight = DeviceBuffer::new(&device, width * group.in_features, "a weight").expect("memory");
            stream.upload(&group.weights[i], &weight).expect("a copy");
            let bias = group.biases.as_ref().map(|biases| {
                let bias = DeviceBuffer::new(&device, width, "a bias").expect("memory");
                stream.upload(&biases[i], &bias).expect("a copy");
                bias
            });
            sites.push(Site { weight, bias, chunks: arena });
        }
        Self {
            kernels: LoraKernels::new(&device, element()).expect("kernels"),
            group: SiteGroup::new(&device, sites, max_rows, chunks_per_tile).expect("a group"),
            stream,
            slots,
            max_rows,
            max_entries,
        }
    }

    pub fn slices(&self) -> usize {
        self.group.slices()
    }

    /// The outputs of a step. What lies between rows of activations is neither read nor written.
    pub fn run(&self, group: &Group, batch: &Batch, output: Output, path: impl Into<Path>) -> Vec<f32> {
        let Path { launches, padding } = path.into();
        let (width, rows) = (group.width(output), batch.rows());
        let stride = width + padding;
        let residual = self.padded(&batch.residual, rows, width, stride);
        let shrink = match launches {
            Launches::ShrinkAnd(ProductKernel::Decode) => Some(ShrinkKernel::Rows16),
            Launches::ShrinkAnd(ProductKernel::RankExt | ProductKernel::RankExtSplit) => {
                Some(ShrinkKernel::Rows64)
            }
            Launches::Linear => None,
        };
        let product = |y: Outputs<'_>, epilogue| {
            self.in_step(group, batch, shrink, |x, step| {
                let (kernels, stream, group) = (&self.kernels, &self.stream, &self.group);
                let product = match launches {
                    Launches::ShrinkAnd(kernel) => {
                        kernels.product_by(kernel, stream, group, x, y, epilogue, step)
                    }
                    Launches::Linear => kernels.linear(stream, group, x, y, epilogue, step),
                };
                product.expect("the product");
                assert_eq!(counters(stream, step.scratch), [0; 3]);
            });
        };
        if output == Output::StoreFp32 {
            let y = self.upload(&vec![f32::NAN; rows * stride]);
            product(Matrix { data: y.slice(..), stride }.into(), Epilogue::Store);
            return self.rows_of(&y, width, stride);
        }
        let y = self.padded(&vec![NAN; rows * width], rows, width, stride);
        let (epilogue, y) = match output {
            Output::Store | Output::StoreFp32 => (Epilogue::Store, &y),
            Output::AddResidual => (Epilogue::AddResidual(residual.slice(..)), &y),
            Output::AddInPlace => (Epilogue::AddResidual(residual.slice(..)), &residual),
            Output::SwiGlu => (Epilogue::SwiGlu, &y),
        };
        product(Matrix { data: y.slice(..), stride }.into(), epilogue);
        self.rows_of(y, width, stride)
    }

    /// What a step leaves for the products: the chunk list and V.
    pub fn lists(&self, group: &Group, batch: &Batch, kernel: ShrinkKernel) -> Lists {
        self.in_step(group, batch, Some(kernel), |_, step| {
            let (starts, chunks) = self.group.read_list(&self.stream).expect("the list");
            let v = step.scratch.v();
            let mut values = vec![Half::ZERO; v.len()];
            self.stream.download(v, &mut values).expect("V");
            Lists { starts, chunks, v: values }
        })
    }

    /// The rows' gates, by slot.
    pub fn gates(&self, batch: &Batch) -> Gates {
        let mut gates = Gates::default();
        for row in &batch.gates {
            let entries: Vec<_> =
                row.iter().map(|&(expert, gate)| (self.slots[expert as usize], gate)).collect();
            gates.push_rows(1, &entries);
        }
        gates
    }

    /// The order of the expert in a slot.
    pub fn order_of<'a>(&'a self, group: &'a Group) -> impl Fn(u32) -> u64 + 'a {
        |slot| {
            let expert = self.slots.iter().position(|&of_expert| of_expert == slot).expect("a loaded slot");
            group.experts[expert].order
        }
    }

    /// Runs `work_on` on the inputs of a step whose lists are built and whose V is there, where a kernel for it is named.
    pub fn in_step<R>(
        &self,
        group: &Group,
        batch: &Batch,
        shrink: Option<ShrinkKernel>,
        work_on: impl FnOnce(Matrix<'_>, &Step<'_>) -> R,
    ) -> R {
        let (device, rows) = (self.stream.device(), batch.rows());
        let mut work = WorkList::new(device, self.max_rows, self.max_entries).expect("a work list");
        let lists = ChunkLists::new(&self.stream, &[&self.group]).expect("lists");
        let scratch = Scratch::new(&self.stream, &[&self.group]).expect("scratch");

        work.set(&self.stream, &self.gates(batch), self.order_of(group)).expect("a work list");

        let stride = group.in_features + 8;
        let x = self.padded(&batch.x, rows, group.in_features, stride);
        let x = Matrix { data: x.slice(..), stride };
        let step = Step { work: &work, row_bound: rows, scratch: &scratch, overlap: true };
        lists.build(&self.stream, &self.kernels, &work).expect("chunk lists");
        if let Some(kernel) = shrink {
            self.kernels.shrink_gate_by(kernel, &self.stream, &self.group, x, &step).expect("shrink_gate");
        }
        let result = work_on(x, &step);
        assert!(!lists.take_overflow(&self.stream).expect("the flag"), "a list has overflowed");
        result
    }

    /// Rows with something between them that must not be read.
    pub fn padded(&self, values: &[Half], rows: usize, width: usize, stride: usize) -> DeviceBuffer<Half> {
        let mut padded = vec![NAN; rows * stride];
        for (to, from) in padded.chunks_exact_mut(stride).zip(values.chunks_exact(width)) {
            to[..width].copy_from_slice(from);
        }
        self.upload(&padded)
    }

    pub fn upload<T: Pod>(&self, values: &[T]) -> DeviceBuffer<T> {
        let buffer = DeviceBuffer::new(self.stream.device(), values.len(), "a test").expect("memory");
        self.stream.upload(values, &buffer).expect("a copy");
        buffer
    }

    /// The rows of a buffer. Panics where something has been written between them.
    pub fn rows_of<T: Value>(&self, y: &DeviceBuffer<T>, width: usize, stride: usize) -> Vec<f32> {
        let mut padded = vec![T::zeroed(); y.len()];
        self.stream.download(y, &mut padded).expect("the outputs");
        let rows = padded.chunks_exact(stride).map(|row| row.split_at(width));
        let rows = rows.flat_map(|(row, between)| {
            assert!(between.iter().all(|&value| value.to_f32().is_nan()), "written between rows");
            row.iter().map(|&value| value.to_f32())
        });
        rows.collect()
    }
}
