//! Adapters on their way to a GPU: laid out in page-locked memory, on the thread that brings them.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;

use bytemuck::cast_slice;

use super::super::experts::StagedExpert;
use super::super::lora::{ArenaShape, LowRank};
use super::super::{CudaError, Device, Half};
use super::Weight;
use super::buffer::padded_values;
use crate::backend::{ExpertWeights, SiteChange, SitePlace};
use crate::tensor::Tensor;

/// Lays out adapters for a model's groups.
pub struct Loader {
    pub(super) device: Arc<Device>,
    /// By the transformer's numbers.
    pub(super) groups: Vec<GroupShapes>,
    pub(super) table: GroupShapes,
}

/// A group's number in the backend, and the arenas of its sites.
pub(super) struct GroupShapes {
    pub id: usize,
    pub sites: Vec<ArenaShape>,
}

/// An adapter as laid out.
pub struct StagedAdapter {
    /// Ranks and columns; none where whole weights are all that it changes.
    pub(super) ranks: Option<StagedExpert>,
    /// Weights in the place of a group's, on the device as long as the adapter is loaded.
    pub(super) replaced: Vec<(usize, Weight)>,
}

impl Loader {
    pub(super) fn lay_out(&self, changes: Vec<(SitePlace, SiteChange)>) -> Result<StagedAdapter, CudaError> {
        let mut ranks = StagedExpert::new(&self.device, 0);
        let mut replaced = Vec::new();
        let mut order = 0;
        for (place, change) in &changes {
            let (group, site) = match *place {
                SitePlace::Table => (&self.table, 0),
                SitePlace::Group(group, site) => (&self.groups[group], site),
            };
            match change {
                SiteChange::LowRank(weights) => {
                    order = add(&mut ranks, [group.id, site], &group.sites[site], weights, order)?;
                }
                SiteChange::Replace(_) if group.sites.len() > 1 => {
                    let what = "a whole weight for one of several layers that run together";
                    return Err(CudaError::Shape(what.to_owned()));
                }
                SiteChange::Replace(weight) => {
                    replaced.push((
                        group.id,
                        Weight::new(&self.device.stream()?, group.sites[site].element, weight)?,
                    ));
                }
            }
        }
        // An adapter that changes nothing at all has a seat, too: steps ask for it.
        let seated =
            replaced.is_empty() || changes.iter().any(|(_, change)| matches!(change, SiteChange::LowRank(_)));
        Ok(StagedAdapter { ranks: seated.then_some(ranks), replaced })
    }
}

/// Adds what an expert changes at a site, and returns its order: a hash of all that it has been made of so far.
fn add(
    expert: &mut StagedExpert,
    site: [usize; 2],
    shape: &ArenaShape,
    weights: &ExpertWeights,
    before: u64,
) -> Result<u64, CudaError> {
    let rank = weights.a.shape()[0];
    let values = |name: &str, tensor: &Tensor, stride: usize| {
        if rank == 0 {
            return Ok(Vec::new());
        }
        let what = format!("{name} of an adapter, of shape {:?},", tensor.shape());
        padded_values(shape.element, tensor, stride, &what)
    };
    let a = values("A", &weights.a, shape.in_features)?;
    let mut b = values("B", &weights.b, rank)?;
    // A lookup's rows are as wide as those of activations.
    b.resize(shape.out_features * rank, Half::ZERO);
    let mut hasher = DefaultHasher::new();
    (before, site, rank, weights.scale.to_bits()).hash(&mut hasher);
    hasher.write(cast_slice(&a));
    hasher.write(cast_slice(&b));
    for columns in [&weights.column_scale, &weights.bias].into_iter().flatten() {
        hasher.write(cast_slice(columns));
    }
    let order = hasher.finish();
    let pair = LowRank {
        rank,
        a: &a,
        b: &b,
        scale: weights.scale,
        column_scale: weights.column_scale.as_deref(),
        bias: weights.bias.as_deref(),
        order,
    };
    expert.add(site, shape, &pair)?;
    Ok(order)
}
