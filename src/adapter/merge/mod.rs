//! Merging adapters: several into one here, into the base's weights in [`weights`].
//!
//! [`merge_adapters`] follows PEFT 0.21's `add_weighted_adapter`, method by method and name by name. Every site is
//! merged by itself, over the adapters that have it. With the weights `w`, scales `s` and factors `A`, `B` of adapter
//! `i`, the result has scale 1 and
//!
//! | method | result |
//! |---|---|
//! | `cat` | `A = [w_1 s_1 A_1; w_2 s_2 A_2; …]`, `B = [B_1, B_2, …]`: exactly `Σ w_i s_i B_i A_i`, of the sum of the ranks |
//! | `linear`, `magnitude_prune`, `ties`, `dare_linear`, `dare_ties` | `A` and `B` merged each by itself: of `t_i = A_i` with `u_i = ±√abs(w_i s_i)`, and of `t_i = B_i` with `u_i = √abs(w_i s_i)`; the sign of `w_i s_i` is A's |
//! | `svd`, and the same names with `_svd` | `t_i = s_i B_i A_i` with `u_i = w_i` merged, and `B A` its best approximation of the wanted rank (Eckart & Young 1936), the singular values in `B` |
//!
//! where merging gives
//!
//! | method | of tensors `t_i` with weights `u_i` |
//! |---|---|
//! | `linear`, `svd` | `Σ u_i t_i` (task arithmetic, Ilharco et al. 2023) |
//! | `magnitude_prune` | `Σ u_i top(t_i)` |
//! | `ties` | `Σ u_i m_i top(t_i) / max(1, Σ m_i)`, by element, where `m_i` is 1 if `top(t_i)` has the elected sign, that of `Σ top(t_j)`, else 0 (Yadav et al. 2023) |
//! | `dare_linear`, short `dare` | `Σ u_i drop(t_i)` (Yu et al. 2024) |
//! | `dare_ties` | as `ties` with `drop` for `top` |
//!
//! `top` keeps the `⌊density · n⌋` of `n` elements that are largest in magnitude. `drop` keeps each element with
//! probability `density` and divides it by that.
//!
//! Four things are not PEFT's: elements dropped are drawn by [`Philox`] from a seed; an adapter with rsLoRA in the
//! first place gives a result of scale 1 (PEFT 0.21 writes `√r`); one adapter alone is merged by the method too, so that
//! `svd` lowers its rank (PEFT takes `linear` instead); and `lora_bias` is merged along as `Σ w_i s_i b_i` (PEFT leaves
//! zeros).

mod linalg;
mod methods;
mod tensors;
#[cfg(test)]
mod tests;
pub mod weights;

use std::collections::BTreeSet;

use super::peft::content_hash;
use super::{Adapter, SiteAdapter, SiteTable};
use crate::backend::sampling::Philox;
use crate::tensor::Tensor;
use linalg::Matrix;

pub use methods::{Method, UnknownMethod};

/// Share of elements kept where nothing is said.
pub const DEFAULT_DENSITY: f64 = 0.5;

/// Why adapters could not be merged.
#[derive(Debug, PartialEq, thiserror::Error)]
pub enum MergeError {
    #[error("no adapter to merge")]
    Nothing,
    #[error("`{option}` is {found}; wanted {wanted}")]
    Option { option: &'static str, found: String, wanted: String },
    /// An adapter that has no meaning among others.
    #[error("adapter `{adapter}`: module `{module}`: {problem}")]
    Adapter { adapter: String, module: String, problem: &'static str },
    /// Adapters that do not fit each other.
    #[error(
        "module `{module}`: rank {} in `{}`, {} in `{}`, but {method} wants one rank; merge by cat or by svd",
        ranks[0], adapters[0], ranks[1], adapters[1]
    )]
    Ranks { module: String, adapters: [String; 2], ranks: [usize; 2], method: Method },
}

/// One adapter of a merge.
#[derive(Clone, Copy, Debug)]
pub struct Part<'a> {
    /// For messages.
    pub name: &'a str,
    pub adapter: &'a Adapter,
    pub weight: f64,
}

/// How adapters are merged.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MergeOptions {
    pub method: Method,
    /// Rank of the result at every site, where it is chosen: with `svd` methods. The largest of the adapters' ranks
    /// where nothing is said; less where less is enough.
    pub rank: Option<usize>,
    /// Share of elements kept, above 0 and at most 1, where some are dropped. [`DEFAULT_DENSITY`] where nothing is said.
    pub density: Option<f64>,
    /// Of the elements that `dare` drops.
    pub seed: u64,
}

impl MergeOptions {
    pub fn new(method: Method) -> Self {
        Self { method, rank: None, density: None, seed: 0 }
    }

    /// # Errors
    /// When an option is out of range, or has no meaning with the method.
    pub fn check(&self) -> Result<(), MergeError> {
        let refuse =
            |option, found: String, wanted: String| Err(MergeError::Option { option, found, wanted });
        match self.rank {
            Some(rank) if !self.method.decomposes() => {
                let wanted = format!("none with the method {}, which does not choose it", self.method);
                return refuse("rank", rank.to_string(), wanted);
            }
            Some(0) => return refuse("rank", "0".to_owned(), "at least 1".to_owned()),
            _ => {}
        }
        match self.density {
            Some(density) if !self.method.drops() => {
                let wanted = format!("none with the method {}, which drops nothing", self.method);
                refuse("density", density.to_string(), wanted)
            }
            Some(density) if !(density > 0.0 && density <= 1.0) => {
                refuse("density", density.to_string(), "more than 0, at most 1".to_owned())
            }
            _ => Ok(()),
        }
    }
}

/// Merges adapters of one base into one, whose tensors are F32.
///
/// # Errors
/// When an option or a weight is out of range, when an adapter has a DoRA magnitude or replaces a module or bias, which
/// no sum of others can, or when the method wants equal ranks and finds others. Names adapter and module.
pub fn merge_adapters(
    parts: &[Part<'_>],
    sites: &SiteTable,
    options: &MergeOptions,
) -> Result<Adapter, MergeError> {
    options.check()?;
    let Some(first) = parts.first() else { return Err(MergeError::Nothing) };
    parts.iter().try_for_each(|part| part.check(sites))?;
    let merged: BTreeSet<usize> =
        parts.iter().flat_map(|part| part.adapter.sites.iter().map(|adapted| adapted.site)).collect();
    let ranks = parts.iter().flat_map(|part| part.adapter.sites.iter().map(|adapted| adapted.rank));
    let rank = options.rank.or_else(|| ranks.max()).unwrap_or(1);
    let merge = SiteMerge { sites, options, rank };
    let mut adapted =
        merged.iter().map(|&site| merge.site(site, &at_site(parts, site))).collect::<Result<Vec<_>, _>>()?;
    // A folder says of all sites or of none that they have a bias.
    if adapted.iter().any(|adapted| adapted.bias.is_some()) {
        for adapted in &mut adapted {
            let out_features = sites.get(adapted.site).out_features;
            adapted.bias.get_or_insert_with(|| vec![0.0; out_features]);
        }
    }
    let base_name = first.adapter.base_name.clone();
    let adapter = Adapter { sites: adapted, base_name, ..Adapter::default() };
    Ok(Adapter { hash: content_hash(&adapter, sites), ..adapter })
}

impl Part<'_> {
    fn check(&self, sites: &SiteTable) -> Result<(), MergeError> {
        if !self.weight.is_finite() {
            return Err(MergeError::Option {
                option: "weights",
                found: format!("{}={}", self.name, self.weight),
                wanted: "finite numbers".to_owned(),
            });
        }
        let refuse = |site: usize, problem| {
            let module = sites.get(site).module.clone();
            Err(MergeError::Adapter { adapter: self.name.to_owned(), module, problem })
        };
        let Adapter { sites: adapted, saved_modules, saved_biases, .. } = self.adapter;
        if let Some(dora) = adapted.iter().find(|adapted| adapted.magnitude.is_some()) {
            return refuse(
                dora.site,
                "has a DoRA magnitude, which is no sum of products; merge it into the base instead",
            );
        }
        if let Some(saved) = saved_modules.first() {
            return refuse(
                saved.site,
                "is replaced whole (`modules_to_save`); merge the adapter into the base instead",
            );
        }
        match saved_biases.first() {
            Some(saved) => {
                refuse(saved.site, "has its bias replaced (`bias`); merge the adapter into the base instead")
            }
            None => Ok(()),
        }
    }
}

/// An adapter's pair at one site.
struct Pair<'a> {
    /// Number and name of the adapter.
    part: usize,
    name: &'a str,
    weight: f64,
    adapted: &'a SiteAdapter,
}

/// The pairs of those adapters that have a site.
fn at_site<'a>(parts: &[Part<'a>], site: usize) -> Vec<Pair<'a>> {
    let pair = |(part, &Part { name, adapter, weight }): (usize, &Part<'a>)| {
        let adapted = adapter.sites.iter().find(|adapted| adapted.site == site)?;
        Some(Pair { part, name, weight, adapted })
    };
    parts.iter().enumerate().filter_map(pair).collect()
}

/// One of the tensors that are merged at a site, for its random numbers.
#[derive(Clone, Copy)]
enum Which {
    A,
    B,
    Delta,
}

/// A merge as every site needs it.
struct SiteMerge<'a> {
    sites: &'a SiteTable,
    options: &'a MergeOptions,
    /// Of `svd` methods.
    rank: usize,
}

impl SiteMerge<'_> {
    fn site(&self, site: usize, pairs: &[Pair<'_>]) -> Result<SiteAdapter, MergeError> {
        let (a, b) = match self.options.method {
            Method::Cat => concatenate(pairs),
            Method::Svd => self.decompose_product(pairs),
            method if method.decomposes() => self.decompose(pairs),
            _ => self.factors(site, pairs)?,
        };
        let rank = a.shape()[0];
        Ok(SiteAdapter { site, rank, scale: 1.0, a, b, bias: merged_bias(pairs), magnitude: None })
    }

    /// A and B, each merged by itself.
    fn factors(&self, site: usize, pairs: &[Pair<'_>]) -> Result<(Tensor, Tensor), MergeError> {
        let first = &pairs[0];
        if let Some(other) = pairs.iter().find(|pair| pair.adapted.rank != first.adapted.rank) {
            return Err(MergeError::Ranks {
                module: self.sites.get(site).module.clone(),
                adapters: [first, other].map(|pair| pair.name.to_owned()),
                ranks: [first, other].map(|pair| pair.adapted.rank),
                method: self.options.method,
            });
        }
        let root = |pair: &Pair<'_>| pair.factor().abs().sqrt();
        let signed_root = |pair: &Pair<'_>| root(pair).copysign(pair.factor());
        let a = self.merge(pairs, Which::A, signed_root, |adapted| adapted.a.to_f32());
        let b = self.merge(pairs, Which::B, root, |adapted| adapted.b.to_f32());
        let shaped = |like: &Tensor, values: &[f32]| Tensor::from_f32(like.shape().to_vec(), values);
        Ok((shaped(&first.adapted.a, &a), shaped(&first.adapted.b, &b)))
    }

    /// `Σ w s B A` at a lower rank: nothing of the size of the weight is formed.
    fn decompose_product(&self, pairs: &[Pair<'_>]) -> (Tensor, Tensor) {
        let (a, b) = concatenate(pairs);
        let [rank, in_features] = [a.shape()[0], a.shape()[1]];
        let a = Matrix::from_columns(in_features, rank, a.to_f32());
        let b = Matrix::from_rows(b.shape()[0], rank, b.to_f32());
        factors_of(linalg::truncated_product(b, a, self.rank))
    }

    /// The changes of the whole weight, merged and decomposed.
    fn decompose(&self, pairs: &[Pair<'_>]) -> (Tensor, Tensor) {
        let merged = self.merge(pairs, Which::Delta, |pair| pair.weight, tensors::delta);
        let (out_features, in_features) = (pairs[0].adapted.b.shape()[0], pairs[0].adapted.a.shape()[1]);
        factors_of(linalg::truncated(&merged, out_features, in_features, self.rank))
    }

    /// One tensor of every adapter, merged as the method says.
    fn merge(
        &self,
        pairs: &[Pair<'_>],
        which: Which,
        weight: impl Fn(&Pair<'_>) -> f64,
        values: impl Fn(&SiteAdapter) -> Vec<f32>,
    ) -> Vec<f32> {
        let density = self.options.density.unwrap_or(DEFAULT_DENSITY);
        let mut thinned = Vec::with_capacity(pairs.len());
        for pair in pairs {
            let mut values = values(pair.adapted);
            match self.options.method.thinning() {
                methods::Thinning::None => {}
                methods::Thinning::Magnitude => tensors::keep_largest(&mut values, density),
                methods::Thinning::Random => {
                    let stream = (pair.part as u64) << 32 | (pair.adapted.site as u64) << 2 | which as u64;
                    tensors::drop_random(&mut values, density, Philox::new(self.options.seed), stream);
                }
            }
            thinned.push(values);
        }
        let weights: Vec<f64> = pairs.iter().map(weight).collect();
        if self.options.method.elects_sign() {
            tensors::elected_mean(&thinned, &weights)
        } else {
            tensors::weighted_sum(&thinned, &weights)
        }
    }
}

impl Pair<'_> {
    /// What the product B A counts.
    fn factor(&self) -> f64 {
        self.weight * f64::from(self.adapted.scale)
    }
}

/// `[w_1 s_1 A_1; w_2 s_2 A_2; …]` and `[B_1, B_2, …]`.
fn concatenate(pairs: &[Pair<'_>]) -> (Tensor, Tensor) {
    let rank: usize = pairs.iter().map(|pair| pair.adapted.rank).sum();
    let first = pairs[0].adapted;
    let (out_features, in_features) = (first.b.shape()[0], first.a.shape()[1]);
    let scaled = |pair: &Pair<'_>| {
        let factor = pair.factor();
        pair.adapted.a.to_f32().into_iter().map(move |value| (factor * f64::from(value)) as f32)
    };
    let a: Vec<f32> = pairs.iter().flat_map(scaled).collect();
    let columns: Vec<(usize, Vec<f32>)> =
        pairs.iter().map(|pair| (pair.adapted.rank, pair.adapted.b.to_f32())).collect();
    let row = |row: usize| columns.iter().flat_map(move |(rank, b)| &b[row * rank..(row + 1) * rank]);
    let b: Vec<f32> = (0..out_features).flat_map(row).copied().collect();
    (Tensor::from_f32(vec![rank, in_features], &a), Tensor::from_f32(vec![out_features, rank], &b))
}

/// `B [out_features, rank]` and `Aᵀ [in_features, rank]` as an adapter stores them.
fn factors_of((b, a): (Matrix, Matrix)) -> (Tensor, Tensor) {
    let [out_features, rank, in_features] = [b.rows(), b.columns(), a.rows()];
    (
        Tensor::from_f32(vec![rank, in_features], &a.by_column()),
        Tensor::from_f32(vec![out_features, rank], &b.by_row()),
    )
}

/// `Σ w s bias`, where there is one.
fn merged_bias(pairs: &[Pair<'_>]) -> Option<Vec<f32>> {
    let biases: Vec<(f64, &Vec<f32>)> =
        pairs.iter().filter_map(|pair| Some((pair.factor(), pair.adapted.bias.as_ref()?))).collect();
    let len = biases.first()?.1.len();
    let sum = |index: usize| biases.iter().map(|(factor, bias)| factor * f64::from(bias[index])).sum::<f64>();
    Some((0..len).map(|index| sum(index) as f32).collect())
}
