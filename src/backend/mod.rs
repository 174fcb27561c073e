//! The operations of a forward pass, and the places that can run them.
//!
//! A backend sees frozen matrices, low-rank experts, row lists and a paged cache; it has never heard of a model
//! family, a file format or a request. [`cpu`] is the reference that every other backend is held against.
//!
//! Every operation computes a row from that row's own inputs in an order that depends on nothing else, so a row's
//! bits are the same alone, in any batch and at any place in it.

pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
mod rows;
pub mod sampling;
pub mod training;

use thiserror::Error;

use crate::tensor::Tensor;
use sampling::{Draw, Drawn};

pub use rows::{GateRun, Gates, Rows, SequenceRows};

/// Ranks of a rank chunk: the tensor core's K step, the page of adapter memory, the entry of a work list.
pub const CHUNK: usize = 16;

/// Tokens of a page of the KV cache.
pub const PAGE: usize = 16;

/// What a backend can fail with.
#[derive(Debug, Error)]
pub enum BackendError {
    #[error("out of memory: {wanted} bytes for {purpose}")]
    OutOfMemory { wanted: usize, purpose: &'static str },
    #[error("could not start the worker threads: {0}")]
    Threads(String),
    #[cfg(feature = "cuda")]
    #[error(transparent)]
    Cuda(#[from] cuda::CudaError),
}

impl BackendError {
    /// Ends the process where nothing can succeed in it any more; see [`cuda::CudaError::end_process_if_lost`].
    pub fn end_process_if_lost(&self) {
        #[cfg(feature = "cuda")]
        if let Self::Cuda(error) = self {
            error.end_process_if_lost();
        }
    }
}

/// The low-rank change of one expert at one site, as handed to a backend.
///
/// For a row that uses it with gate `g`: `y = c ⊙ (W x) + bias + g · (scale · B (A x) + delta_bias)`, where the column
/// scale `c` is `1 + g · (column_scale − 1)`.
#[derive(Clone, Debug)]
pub struct ExpertWeights {
    /// `[rank, in]`; for a lookup `[rank, vocabulary]`. Rank 0 where only the bias changes.
    pub a: Tensor,
    /// `[out, rank]`.
    pub b: Tensor,
    pub scale: f32,
    /// `[out]`, added to the output times the gate.
    pub bias: Option<Vec<f32>>,
    /// `[out]`, what DoRA multiplies the frozen product with.
    pub column_scale: Option<Vec<f32>>,
}

/// Everything that an expert changes at one site.
#[derive(Clone, Debug)]
pub enum SiteChange {
    LowRank(ExpertWeights),
    /// A full weight in place of the frozen one, for rows that use this expert alone with gate 1.
    Replace(Tensor),
}

/// Where an expert changes something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SitePlace {
    /// The embedding table; an expert's A is `[rank, vocabulary]` there.
    Table,
    /// By the numbers of the group, and of the site in it.
    Group(usize, usize),
}

/// A frozen linear layer: weight `[out, in]` and optional bias `[out]`.
pub struct FrozenLinear<B: Backend> {
    pub weight: B::Weight,
    pub bias: Option<B::Vector>,
}

/// What [`Backend::linear`] does with its output buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Write {
    /// `y = …`
    Replace,
    /// `y += …`: the residual connection.
    Add,
}

/// Widths of an attention layer. Inputs are rows of `q | k | v`: `heads`, `kv_heads` and `kv_heads` vectors of `head_dim`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AttentionShape {
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
}

impl AttentionShape {
    /// Width of a row of `q | k | v`.
    pub fn qkv_width(&self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.head_dim
    }
}

/// Rotary position tables: `cos` and `sin` of `[positions, rotary_dim / 2]`, one pair per variant.
#[derive(Clone, Debug, Default)]
pub struct RotaryTables {
    /// How many leading elements of a head are rotated, element `i` together with `i + rotary_dim / 2`.
    pub rotary_dim: usize,
    pub cos: Vec<Vec<f32>>,
    pub sin: Vec<Vec<f32>>,
}

/// Normalisation of every q and k head before the rotation (Qwen3).
pub struct HeadNorms<'a, B: Backend> {
    pub q: &'a B::Vector,
    pub k: &'a B::Vector,
    pub epsilon: f32,
}

/// What the steps of one model may contain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StepLimits {
    /// Most rows of a step.
    pub rows: usize,
    /// Most sequences of a step.
    pub sequences: usize,
    /// Most rows that give logits at a time.
    pub picked: usize,
    /// Token ids are below this.
    pub vocabulary: usize,
    /// Positions are below this.
    pub positions: usize,
    /// Rotary variants are below this.
    pub rotary_variants: usize,
    /// Pages of the KV cache.
    pub cache_pages: usize,
    pub attention: AttentionShape,
    /// Width of what [`Backend::linear_swiglu`] leaves.
    pub gated_width: usize,
}

/// The operations. Activations are `[rows, width]` in buffers made once for the largest step.
///
/// A step begins with [`begin_step`](Self::begin_step); the operations up to the next one are about its rows, those
/// after [`pick_rows`](Self::pick_rows) about the picked ones. Operations may return before they are done: what is read
/// on the host is waited for.
pub trait Backend: Sized + Send + 'static {
    /// Bytes of a key's or value's element in the cache.
    const CACHE_ELEMENT_BYTES: usize;
    /// Bytes of logits that a step should hold at a time.
    const LOGITS_BYTES: usize;
    /// Whether operations return before they are done, so that the host has time for other things.
    const QUEUES: bool;

    /// A frozen matrix as stored. Clones share it.
    type Weight: Clone + Send + Sync;
    /// A vector of f32: a bias or a norm's weight.
    type Vector: Send + Sync;
    /// Activations `[capacity, width]`.
    type Buffer: Send;
    /// Linear layers that read the same rows and run as one product, with the resident experts of each, by slot.
    type Group: Send + Sync;
    /// A lookup table `[vocabulary, width]` with its resident experts.
    type Table: Send + Sync;
    /// Rotary tables where the backend reads them.
    type Rotary: Send + Sync;
    /// Keys and values of all blocks, in pages of [`PAGE`] tokens.
    type KvCache: Send;
    /// Lays experts out.
    type Loader: Send + Sync + 'static;
    /// An expert as laid out.
    type Expert: Send + 'static;
    /// Operations as [`record`](Self::record) keeps them.
    type Recorded: Default + Send;

    /// Runs `work` where this backend's threads are: operations inside start without waking anybody.
    fn scope<R: Send>(&mut self, work: impl FnOnce(&mut Self) -> R + Send) -> R {
        work(self)
    }

    /// A frozen `[out, in]` matrix. On the CPU this shares the tensor's bytes.
    fn weight(&self, tensor: &Tensor) -> Result<Self::Weight, BackendError>;
    fn vector(&self, values: Vec<f32>) -> Result<Self::Vector, BackendError>;
    /// A buffer of 16-bit or 32-bit floats, as the backend computes; zeros at first.
    fn buffer(&self, rows: usize, width: usize) -> Result<Self::Buffer, BackendError>;
    /// A buffer of f32, for logits.
    fn logits_buffer(&self, rows: usize, width: usize) -> Result<Self::Buffer, BackendError> {
        self.buffer(rows, width)
    }
    /// A group of frozen layers, without experts.
    fn group(&mut self, sites: Vec<FrozenLinear<Self>>) -> Result<Self::Group, BackendError>;
    /// A frozen table, without experts.
    fn table(&mut self, weight: Self::Weight) -> Result<Self::Table, BackendError>;
    fn rotary(&self, tables: RotaryTables) -> Result<Self::Rotary, BackendError>;
    fn kv_cache(
        &self,
        blocks: usize,
        pages: usize,
        shape: AttentionShape,
    ) -> Result<Self::KvCache, BackendError>;
    /// Bytes that the cache of such steps may take; `None` where that is for the caller to say.
    fn cache_room(&self, _limits: &StepLimits) -> Result<Option<usize>, BackendError> {
        Ok(None)
    }
    /// Makes room for the row lists of steps within `limits`: for those of the last caller.
    fn reserve(&mut self, _limits: &StepLimits) -> Result<(), BackendError> {
        Ok(())
    }

    /// What lays experts out for these groups and this table; it works on any thread.
    fn loader(&self, groups: &[Self::Group], table: &Self::Table) -> Result<Self::Loader, BackendError>;
    /// Lays out what an expert changes, each place once: all the work of loading it that steps need not wait for.
    ///
    /// # Errors
    /// When a change does not fit its place, or there is no memory.
    fn lay_out(
        loader: &Self::Loader,
        changes: Vec<(SitePlace, SiteChange)>,
    ) -> Result<Self::Expert, BackendError>;
    /// Makes what has been laid out for these groups and this table the content of `slot`, which is empty.
    fn insert_expert(
        &mut self,
        groups: &mut [Self::Group],
        table: &mut Self::Table,
        slot: usize,
        expert: Self::Expert,
    ) -> Result<(), BackendError>;
    /// Empties `slot` everywhere.
    fn unload_expert(
        &mut self,
        groups: &mut [Self::Group],
        table: &mut Self::Table,
        slot: usize,
    ) -> Result<(), BackendError>;
    /// Has the experts in `wanted` brought to where steps can use them, beside those in `kept`, and says whether they
    /// are there. Never waits: who gets `false` asks again before a later step.
    ///
    /// # Errors
    /// When `kept` is empty and yet there is not room for all of `wanted`.
    fn bring_experts(&mut self, _wanted: &[u32], _kept: &[u32]) -> Result<bool, BackendError> {
        Ok(true)
    }

    /// Takes the rows of the next step. All experts that they use have been brought.
    fn begin_step(&mut self, _rows: &Rows) -> Result<(), BackendError> {
        Ok(())
    }
    /// Takes the tokens of a step that has begun without knowing them.
    fn set_tokens(&mut self, _tokens: &[u32]) -> Result<(), BackendError> {
        Ok(())
    }

    /// Runs `work`, or what was recorded of it at an earlier step of the same shape.
    ///
    /// Between two calls with the same `recorded`, `work` may differ in the step's rows and experts alone.
    fn record(
        &mut self,
        _recorded: &mut Self::Recorded,
        work: impl FnOnce(&mut Self) -> Result<(), BackendError>,
    ) -> Result<(), BackendError> {
        work(self)
    }

    /// `y[row] = table[token[row]]` plus the low-rank part of the row's experts.
    fn embed(&mut self, table: &Self::Table, rows: &Rows, y: &mut Self::Buffer) -> Result<(), BackendError>;

    /// `y = x / √(mean(x²) + ε) ⊙ weight` for the first `rows` rows (Zhang & Sennrich 2019).
    fn rms_norm(
        &mut self,
        x: &Self::Buffer,
        rows: usize,
        weight: &Self::Vector,
        epsilon: f32,
        y: &mut Self::Buffer,
    ) -> Result<(), BackendError>;

    /// All sites of a group on one input: `y = [W₀ x | W₁ x | …]` with bias and experts, rows by `gates`.
    fn linear(
        &mut self,
        group: &Self::Group,
        x: &Self::Buffer,
        gates: &Gates,
        write: Write,
        y: &mut Self::Buffer,
    ) -> Result<(), BackendError>;

    /// `y = silu(gate) ⊙ up` for a group of those two sites, or of one with both side by side (Shazeer 2020).
    fn linear_swiglu(
        &mut self,
        group: &Self::Group,
        x: &Self::Buffer,
        gates: &Gates,
        y: &mut Self::Buffer,
    ) -> Result<(), BackendError>;

    /// Normalises (where `norms` are given) and rotates q and k in place, then stores k and v in the rows' pages.
    #[expect(clippy::too_many_arguments, reason = "one launch, and each argument is its own thing")]
    fn rope_store(
        &mut self,
        qkv: &mut Self::Buffer,
        shape: AttentionShape,
        norms: Option<HeadNorms<'_, Self>>,
        tables: &Self::Rotary,
        rows: &Rows,
        cache: &mut Self::KvCache,
        block: usize,
    ) -> Result<(), BackendError>;

    /// Causal attention of every row over its own sequence: `y[row] = softmax(q Kᵀ / √head_dim) V`, with a sliding
    /// window over the keys `j > i − window` where given.
    fn attention(
        &mut self,
        qkv: &Self::Buffer,
        window: Option<usize>,
        rows: &Rows,
        cache: &Self::KvCache,
        block: usize,
        y: &mut Self::Buffer,
    ) -> Result<(), BackendError>;

    /// `y[i] = x[picked[i]]`: the rows, ascending, that the operations after this are about. `gates` are theirs.
    fn pick_rows(
        &mut self,
        x: &Self::Buffer,
        picked: &[u32],
        gates: &Gates,
        y: &mut Self::Buffer,
    ) -> Result<(), BackendError>;

    /// One result in `drawn` for each of `draws`, from rows of `logits` `[rows, vocabulary]`; see [`sampling`].
    ///
    /// A draw that fails is its own result: neither the others nor the operation fail with it.
    fn sample(
        &mut self,
        logits: &Self::Buffer,
        draws: &[Draw<'_>],
        drawn: &mut Vec<Drawn>,
    ) -> Result<(), BackendError>;

    /// The first `rows` rows of a buffer of logits, on the host.
    fn read<'a>(&'a mut self, x: &'a Self::Buffer, rows: usize) -> Result<&'a [f32], BackendError>;
}
