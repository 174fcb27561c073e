//! The CPU backend: f32 arithmetic on weights as stored. The reference for every other backend.

mod attention;
mod elementwise;
mod experts;
pub mod gemm;
mod kv_cache;
mod linear;
mod parallel;
pub(super) mod sampling;
pub mod simd;
mod training;

use std::sync::Arc;

use crate::backend::sampling::{Draw, Drawn};
use crate::backend::{
    AttentionShape, Backend, BackendError, FrozenLinear, Gates, HeadNorms, RotaryTables, Rows, SiteChange,
    SitePlace, Write,
};
use crate::tensor::Tensor;

pub use experts::Expert;
use experts::Experts;
pub use kv_cache::KvCache;
pub use simd::Isa;
pub use training::{Ranks, Trainee};

/// A processor: its instruction set and a pool of threads.
pub struct Cpu {
    isa: Isa,
    pool: Arc<rayon::ThreadPool>,
    workspace: linear::Workspace,
    gate_up: Buffer,
    pieces: attention::Pieces,
    training: training::Workspace,
}

impl Cpu {
    /// The best instruction set this processor has, on `threads` threads (all cores for `None`).
    pub fn new(threads: Option<usize>) -> Result<Self, BackendError> {
        let best = Isa::available()[0];
        Self::with_isa(best, threads)
    }

    /// # Panics
    /// When this processor lacks `isa`.
    pub fn with_isa(isa: Isa, threads: Option<usize>) -> Result<Self, BackendError> {
        assert!(Isa::available().contains(&isa), "this processor lacks {}", isa.name());
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads.unwrap_or(0))
            .thread_name(|index| format!("loramux-cpu-{index}"))
            .build()
            .map_err(|error| BackendError::Threads(error.to_string()))?;
        Ok(Self {
            isa,
            pool: Arc::new(pool),
            workspace: Default::default(),
            gate_up: Buffer::default(),
            pieces: Vec::new(),
            training: Default::default(),
        })
    }

    pub fn isa(&self) -> Isa {
        self.isa
    }

    pub fn threads(&self) -> usize {
        self.pool.current_num_threads()
    }
}

/// A frozen layer or table and its experts.
pub struct Site {
    weight: Tensor,
    bias: Option<Vec<f32>>,
    experts: Experts,
}

impl Site {
    /// Makes `change` the content of `slot`.
    pub fn load(&mut self, slot: usize, change: &SiteChange) {
        let expert = Expert::new(change, self.experts.out_features);
        self.experts.insert(slot, expert);
    }
}

/// The sites of a group.
pub struct Group(Vec<Site>);

impl Group {
    /// A site of the group.
    pub fn site_mut(&mut self, site: usize) -> &mut Site {
        &mut self.0[site]
    }
}

/// Output widths of all sites: what an expert is laid out by.
pub struct Widths {
    groups: Vec<Vec<usize>>,
    table: usize,
}

/// Activations `[capacity, width]` in f32.
#[derive(Default)]
pub struct Buffer {
    data: Vec<f32>,
    width: usize,
}

impl Buffer {
    /// Fills the first elements.
    pub fn write(&mut self, values: &[f32]) {
        self.data[..values.len()].copy_from_slice(values);
    }
}

impl Backend for Cpu {
    const CACHE_ELEMENT_BYTES: usize = size_of::<f32>();
    const LOGITS_BYTES: usize = 16 << 20;
    const QUEUES: bool = false;

    type Weight = Tensor;
    type Vector = Vec<f32>;
    type Buffer = Buffer;
    type Group = Group;
    type Table = Site;
    type Rotary = RotaryTables;
    type KvCache = KvCache;
    type Loader = Widths;
    type Expert = Vec<(SitePlace, Expert)>;
    type Recorded = ();

    fn scope<R: Send>(&mut self, work: impl FnOnce(&mut Self) -> R + Send) -> R {
        let pool = Arc::clone(&self.pool);
        pool.install(|| work(self))
    }

    fn weight(&self, tensor: &Tensor) -> Result<Tensor, BackendError> {
        assert_eq!(tensor.shape().len(), 2, "a weight is a matrix");
        Ok(tensor.clone())
    }

    fn vector(&self, values: Vec<f32>) -> Result<Vec<f32>, BackendError> {
        Ok(values)
    }

    fn buffer(&self, rows: usize, width: usize) -> Result<Buffer, BackendError> {
        Ok(Buffer { data: vec![0.0; rows * width], width })
    }

    fn group(&mut self, sites: Vec<FrozenLinear<Self>>) -> Result<Group, BackendError> {
        let sites = sites.into_iter().map(|FrozenLinear { weight, bias }| {
            let [out_features, in_features] = [weight.shape()[0], weight.shape()[1]];
            Site { weight, bias, experts: Experts::new(in_features, out_features) }
        });
        Ok(Group(sites.collect()))
    }

    fn table(&mut self, weight: Tensor) -> Result<Site, BackendError> {
        let [vocabulary, width] = [weight.shape()[0], weight.shape()[1]];
        Ok(Site { weight, bias: None, experts: Experts::new(vocabulary, width) })
    }

    fn loader(&self, groups: &[Group], table: &Site) -> Result<Widths, BackendError> {
        let widths = |site: &Site| site.experts.out_features;
        Ok(Widths {
            groups: groups.iter().map(|group| group.0.iter().map(widths).collect()).collect(),
            table: widths(table),
        })
    }

    fn lay_out(
        widths: &Widths,
        changes: Vec<(SitePlace, SiteChange)>,
    ) -> Result<Vec<(SitePlace, Expert)>, BackendError> {
        let laid_out = changes.into_iter().map(|(place, change)| {
            let out_features = match place {
                SitePlace::Table => widths.table,
                SitePlace::Group(group, site) => widths.groups[group][site],
            };
            (place, Expert::new(&change, out_features))
        });
        Ok(laid_out.collect())
    }

    fn insert_expert(
        &mut self,
        groups: &mut [Group],
        table: &mut Site,
        slot: usize,
        expert: Vec<(SitePlace, Expert)>,
    ) -> Result<(), BackendError> {
        for (place, expert) in expert {
            let site = match place {
                SitePlace::Table => &mut *table,
                SitePlace::Group(group, site) => &mut groups[group].0[site],
            };
            site.experts.insert(slot, expert);
        }
        Ok(())
    }

    fn unload_expert(
        &mut self,
        groups: &mut [Group],
        table: &mut Site,
        slot: usize,
    ) -> Result<(), BackendError> {
        for site in groups.iter_mut().flat_map(|group| &mut group.0).chain([table]) {
            site.experts.unload(slot);
        }
        Ok(())
    }

    fn rotary(&self, tables: RotaryTables) -> Result<RotaryTables, BackendError> {
        Ok(tables)
    }

    fn kv_cache(&self, blocks: usize, pages: usize, shape: AttentionShape) -> Result<KvCache, BackendError> {
        Ok(KvCache::new(blocks, pages, shape))
    }

    fn embed(&mut self, table: &Site, rows: &Rows, y: &mut Buffer) -> Result<(), BackendError> {
        linear::embed(table, rows, y);
        Ok(())
    }

    fn rms_norm(
        &mut self,
        x: &Buffer,
        rows: usize,
        weight: &Vec<f32>,
        epsilon: f32,
        y: &mut Buffer,
    ) -> Result<(), BackendError> {
        elementwise::rms_norm(self.isa, x, rows, weight, epsilon, y);
        Ok(())
    }

    fn linear(
        &mut self,
        group: &Group,
        x: &Buffer,
        gates: &Gates,
        write: Write,
        y: &mut Buffer,
    ) -> Result<(), BackendError> {
        linear::linear(self, &group.0, x, gates, write, y);
        Ok(())
    }

    fn linear_swiglu(
        &mut self,
        group: &Group,
        x: &Buffer,
        gates: &Gates,
        y: &mut Buffer,
    ) -> Result<(), BackendError> {
        // Both outputs side by side, in memory that is kept from step to step.
        let mut gate_up = std::mem::take(&mut self.gate_up);
        gate_up.width = 2 * y.width;
        gate_up.data.resize(gate_up.data.len().max(gates.rows() * gate_up.width), 0.0);
        linear::linear(self, &group.0, x, gates, Write::Replace, &mut gate_up);
        elementwise::swiglu(self.isa, &gate_up, gates.rows(), y);
        self.gate_up = gate_up;
        Ok(())
    }

    fn rope_store(
        &mut self,
        qkv: &mut Buffer,
        shape: AttentionShape,
        norms: Option<HeadNorms<'_, Self>>,
        tables: &RotaryTables,
        rows: &Rows,
        cache: &mut KvCache,
        block: usize,
    ) -> Result<(), BackendError> {
        let norms =
            norms.map(|norms| elementwise::NormWeights { q: norms.q, k: norms.k, epsilon: norms.epsilon });
        elementwise::rope_store(self.isa, qkv, shape, norms, tables, rows, cache, block);
        Ok(())
    }

    fn attention(
        &mut self,
        qkv: &Buffer,
        window: Option<usize>,
        rows: &Rows,
        cache: &KvCache,
        block: usize,
        y: &mut Buffer,
    ) -> Result<(), BackendError> {
        attention::attention(self.isa, &mut self.pieces, qkv, window, rows, cache, block, y);
        Ok(())
    }

    fn pick_rows(
        &mut self,
        x: &Buffer,
        picked: &[u32],
        _gates: &Gates,
        y: &mut Buffer,
    ) -> Result<(), BackendError> {
        let width = x.width;
        for (to, &row) in y.data.chunks_exact_mut(width).zip(picked) {
            to.copy_from_slice(&x.data[row as usize * width..(row as usize + 1) * width]);
        }
        Ok(())
    }

    fn sample(
        &mut self,
        logits: &Buffer,
        draws: &[Draw<'_>],
        drawn: &mut Vec<Drawn>,
    ) -> Result<(), BackendError> {
        sampling::sample(logits, draws, drawn);
        Ok(())
    }

    fn read<'a>(&'a mut self, x: &'a Buffer, rows: usize) -> Result<&'a [f32], BackendError> {
        Ok(&x.data[..rows * x.width])
    }
}

#[cfg(test)]
mod tests;
