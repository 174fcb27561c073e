//! The LoRA kernels: products of a site group in which the ranks of the rows' adapters are simply more K.
//!
//! ```text
//! Y = [X | V] · [W | B]ᵀ + bias          V = gate · scale · (X · Aᵀ), zero where a row does not use the adapter
//! ```
//!
//! An adapter's pair lies in the [`ChunkArena`] of each site, 16 ranks a chunk. Per step, a [`WorkList`] says which
//! experts each tile of 128 rows uses and with which gates; [`ChunkLists`] turns it into a list of rank chunks for
//! every [`SiteGroup`] of the model in one launch. From then on a group is one call, [`LoraKernels::linear`]: a single
//! launch for up to 64 rows, else [`LoraKernels::shrink_gate`], which leaves V, and [`LoraKernels::product`], which leaves
//! Y. Nothing here allocates or waits after construction, except loading an adapter; what a step needs beyond its
//! launches is two copies from page-locked memory, so everything between them can be captured in one graph that serves
//! every mix of adapters.
//!
//! # One sum, two kernels
//!
//! `gemm_decode` serves up to 64 rows, `gemm_rank_ext` any number. All compute each output by the same sequence of
//! additions, which [`k_slices`], [`shrink_slices`] and the adapter's `order` fix: a row's bits depend on neither the
//! kernel, nor its place in the batch, nor the other rows.

mod chunks;
mod group;
mod kernels;
mod layout;
mod product;
mod scratch;
mod work_list;

pub use chunks::{ChunkArena, SlotContent};
pub use group::{ChunkLists, Site, SiteGroup, k_slices, shrink_slices};
pub use kernels::{LoraKernels, ProductKernel, ShrinkKernel, Step};
pub use layout::{ArenaShape, LowRank};
pub use product::{Epilogue, FrozenLayer, Outputs};
pub use scratch::Scratch;
pub use work_list::{Seated, WorkList};

pub use super::Matrix;
pub use super::params::{GemmDecodeCounters, RankChunk};

pub(super) use layout::PairLayout;
