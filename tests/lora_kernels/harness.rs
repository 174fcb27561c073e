//! One product of a site group: its inputs, what the kernels make of them, and what a plain loop in f64 does.

use half::bf16;

use loramux::backend::Gates;
use loramux::backend::cuda::lora::{
    ChunkArena, ChunkLists, Epilogue, LoraKernels, LowRank, Matrix, Scratch, Site, SiteGroup, Step, WorkList,
};
use loramux::backend::cuda::{DeviceBuffer, Stream};

use crate::cuda_device::device;

/// Reproducible numbers (splitmix64, Steele et al. 2014).
#[derive(Clone)]
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, end: usize) -> usize {
        (self.next() % end as u64) as usize
    }

    /// In [-1, 1).
    pub fn number(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1 << 23) as f32 - 1.0
    }

    pub fn values(&mut self, count: usize, size: f32) -> Vec<bf16> {
        (0..count).map(|_| bf16::from_f32(self.number() * size)).collect()
    }
}

/// An adapter's pair at one site.
#[derive(Clone)]
pub struct Pair {
    pub rank: usize,
    a: Vec<bf16>,
    b: Vec<bf16>,
}

/// An adapter over the sites of the group; none where a site is no target.
#[derive(Clone)]
pub struct Expert {
    pub pairs: Vec<Option<Pair>>,
    scale: f32,
    order: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Output {
    Store,
    /// The residual is a buffer of its own.
    AddResidual,
    /// The residual is y.
    AddInPlace,
    SwiGlu,
}

/// A group of sites with their weights and adapters.
#[derive(Clone)]
pub struct Group {
    pub in_features: usize,
    pub widths: Vec<usize>,
    weights: Vec<Vec<bf16>>,
    biases: Option<Vec<Vec<f32>>>,
    pub experts: Vec<Expert>,
}

impl Group {
    /// `ranks[expert][site]`, 0 where the site is no target.
    pub fn new(random: &mut Random, in_features: usize, widths: &[usize], bias: bool, ranks: &[Vec<usize>]) -> Self {
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
    pub x: Vec<bf16>,
    pub residual: Vec<bf16>,
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
        let part = |values: &[bf16], width: usize| {
            rows.iter().flat_map(|&row| values[row * width..(row + 1) * width].to_vec()).collect()
        };
        Self {
            x: part(&self.x, group.in_features),
            residual: part(&self.residual, group.width(output)),
            gates: rows.iter().map(|&row| self.gates[row].clone()).collect(),
        }
    }
}

/// Which kernels compute a product.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Path {
    /// `shrink_gate_16` and `gemm_decode_*`.
    Decode,
    /// `shrink_gate_64` and `gemm_rank_ext*`.
    Large,
}

/// The kernels and a group on the device. Slots are given out in an order of their own.
pub struct OnDevice {
    stream: Stream,
    kernels: LoraKernels,
    group: SiteGroup,
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
        let max_rank = group.experts.iter().flat_map(|expert| expert.pairs.iter().flatten().map(|pair| pair.rank));
        let max_rank = max_rank.max().unwrap_or(16);
        let max_entries = (max_rows.div_ceil(128) * group.experts.len()).max(1);
        let mut capacity = 0;
        let mut sites = Vec::new();
        for (i, &width) in group.widths.iter().enumerate() {
            let pairs = || group.experts.iter().map(|expert| expert.pairs[i].as_ref());
            let chunks: usize = pairs().flatten().map(|pair| pair.rank.div_ceil(16)).sum();
            capacity += chunks * max_rows.div_ceil(128);
            let features = [group.in_features, width];
            let mut arena = ChunkArena::new(&stream, features, chunks, slot_count, max_rank).expect("an arena");
            for (&slot, (expert, pair)) in slots.iter().zip(group.experts.iter().zip(pairs())) {
                let Some(Pair { rank, a, b }) = pair else { continue };
                let pair = LowRank { rank: *rank, a, b, scale: expert.scale, order: expert.order };
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
            kernels: LoraKernels::new(&device).expect("kernels"),
            group: SiteGroup::new(&device, sites, max_rows, capacity).expect("a group"),
            stream,
            slots,
            max_rows,
            max_entries,
        }
    }

    pub fn slices(&self) -> usize {
        self.group.slices()
    }

    /// The whole path of a step: work list, chunk lists, shrink, product. Activations have padded rows.
    pub fn run(&self, group: &Group, batch: &Batch, output: Output, path: Path) -> Vec<bf16> {
        let device = self.stream.device();
        let (input, width, rows) = (group.in_features, group.width(output), batch.rows());
        let mut work = WorkList::new(device, self.max_rows, self.max_entries).expect("a work list");
        let lists = ChunkLists::new(&self.stream, &[&self.group]).expect("lists");
        let scratch = Scratch::new(&self.stream, &[&self.group]).expect("scratch");

        let mut gates = Gates::default();
        for row in &batch.gates {
            let entries: Vec<_> = row.iter().map(|&(expert, gate)| (self.slots[expert as usize], gate)).collect();
            gates.push_rows(1, &entries);
        }
        let order_of = |slot| {
            let expert = self.slots.iter().position(|&of_expert| of_expert == slot).expect("a loaded slot");
            group.experts[expert].order
        };
        work.set(&self.stream, &gates, order_of).expect("a work list");

        let (x_stride, y_stride) = (input + 8, width + 16);
        let x = self.padded(&batch.x, rows, input, x_stride);
        let residual = self.padded(&batch.residual, rows, width, y_stride);
        let y = DeviceBuffer::new(device, rows * y_stride, "y").expect("memory");
        let (epilogue, y) = match output {
            Output::Store => (Epilogue::Store, &y),
            Output::AddResidual => (Epilogue::AddResidual(residual.slice(..)), &y),
            Output::AddInPlace => (Epilogue::AddResidual(residual.slice(..)), &residual),
            Output::SwiGlu => (Epilogue::SwiGlu, &y),
        };
        let x = Matrix { data: x.slice(..), stride: x_stride };
        let to = Matrix { data: y.slice(..), stride: y_stride };
        let step = Step { work: &work, row_bound: rows, scratch: &scratch, overlap: true };

        lists.build(&self.stream, &self.kernels, &work).expect("chunk lists");
        self.kernels.shrink(&self.stream, &self.group, x, &step, path == Path::Decode).expect("shrink_gate");
        match path {
            Path::Decode => self.kernels.gemm_decode(&self.stream, &self.group, x, to, epilogue, &step),
            Path::Large => self.kernels.gemm_rank_ext(&self.stream, &self.group, x, to, epilogue, &step),
        }
        .expect("the product");
        assert!(!lists.take_overflow(&self.stream).expect("the flag"));

        let mut padded = vec![bf16::ZERO; rows * y_stride];
        self.stream.download(y, &mut padded).expect("the outputs");
        padded.chunks_exact(y_stride).flat_map(|row| row[..width].to_vec()).collect()
    }

    /// Rows with something between them that must not be read.
    fn padded(&self, values: &[bf16], rows: usize, width: usize, stride: usize) -> DeviceBuffer<bf16> {
        let mut padded = vec![bf16::NAN; rows * stride];
        for (to, from) in padded.chunks_exact_mut(stride).zip(values.chunks_exact(width)) {
            to[..width].copy_from_slice(from);
        }
        let buffer = DeviceBuffer::new(self.stream.device(), padded.len(), "activations").expect("memory");
        self.stream.upload(&padded, &buffer).expect("a copy");
        buffer
    }
}

/// An output and how far a correct kernel can be from it.
struct Bound {
    value: f64,
    error: f64,
}

/// The sum of one output in f64, before its epilogue.
fn sum(group: &Group, batch: &Batch, row: usize, site: usize, column: usize) -> Bound {
    let input = group.in_features;
    let f = |value: &bf16| f64::from(value.to_f32());
    let dot = |a: &[bf16], b: &[bf16]| {
        a.iter().zip(b).fold((0.0, 0.0), |(sum, size), (a, b)| (sum + f(a) * f(b), size + (f(a) * f(b)).abs()))
    };
    let x = &batch.x[row * input..(row + 1) * input];
    let (mut value, mut size) = dot(x, &group.weights[site][column * input..(column + 1) * input]);
    // V is rounded to bf16: half a unit in the last of 8 places, for each rank.
    let mut rounding = 0.0;
    for &(expert, gate) in &batch.gates[row] {
        let expert = &group.experts[expert as usize];
        let Some(Pair { rank, a, b }) = &expert.pairs[site] else { continue };
        for r in 0..*rank {
            let (product, product_size) = dot(x, &a[r * input..(r + 1) * input]);
            let factor = f64::from(gate) * f64::from(expert.scale) * f(&b[column * rank + r]);
            value += factor * product;
            size += factor.abs() * product_size;
            rounding += (factor * product).abs() / 512.0;
        }
    }
    if let Some(biases) = &group.biases {
        value += f64::from(biases[site][column]);
    }
    Bound { value, error: rounding + size * 2f64.powi(-20) }
}

/// Panics unless every output lies within the error that bf16 outputs, a bf16 V and fp32 sums explain.
pub fn assert_close(group: &Group, batch: &Batch, output: Output, y: &[bf16]) {
    let width = group.width(output);
    assert_eq!(y.len(), batch.rows() * width);
    for row in 0..batch.rows() {
        let mut at = 0;
        for (site, &columns) in group.widths.iter().enumerate() {
            for column in 0..columns {
                if output == Output::SwiGlu && site == 1 {
                    continue;
                }
                let mut wanted = sum(group, batch, row, site, column);
                match output {
                    Output::Store => {}
                    Output::AddResidual | Output::AddInPlace => {
                        wanted.value += f64::from(batch.residual[row * width + at].to_f32());
                    }
                    Output::SwiGlu => {
                        let up = sum(group, batch, row, 1, column);
                        let sigmoid = 1.0 / (1.0 + (-wanted.value).exp());
                        let silu = wanted.value * sigmoid;
                        // silu's slope is at most 1.1.
                        let error = 1.1 * wanted.error * (up.value.abs() + up.error) + silu.abs() * up.error;
                        wanted = Bound { value: silu * up.value, error: error + (silu * up.value).abs() * 1e-6 };
                    }
                }
                let error = wanted.error + (wanted.value.abs() + wanted.error) / 512.0;
                let got = f64::from(y[row * width + at].to_f32());
                assert!(
                    (got - wanted.value).abs() <= error * 1.001 + 1e-9,
                    "row {row}, site {site}, column {column}: {got}, wanted {} ± {error}",
                    wanted.value
                );
                at += 1;
            }
        }
    }
}
