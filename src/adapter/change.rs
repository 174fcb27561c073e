//! From an adapter's tensors to what a backend loads at each site.
//!
//! A backend adds to the frozen bias, so a bias that replaces it becomes the difference of the two. Where nothing
//! else changes, the site's pair has rank 0.

use rayon::prelude::*;

use super::{Adapter, SavedBias, SiteAdapter};
use crate::backend::{ExpertWeights, SiteChange};
use crate::tensor::Tensor;

impl Adapter {
    /// What this adapter changes, by site id, each site once. `base_weight` and `base_bias` give a site's frozen
    /// tensors, where DoRA's norm and the difference of biases need them.
    ///
    /// # Errors
    /// Those of `base_weight` and `base_bias`.
    pub fn changes<E>(
        &self,
        base_weight: impl Fn(usize) -> Result<Tensor, E>,
        base_bias: impl Fn(usize) -> Result<Option<Tensor>, E>,
    ) -> Result<Vec<(usize, SiteChange)>, E> {
        let mut changes = Vec::new();
        for site in &self.sites {
            let mut weights = site.weights();
            if let Some(magnitude) = &site.magnitude {
                weights = site.fold_magnitude(weights, magnitude, &base_weight(site.site)?);
            }
            changes.push((site.site, weights));
        }
        for saved in &self.saved_biases {
            let difference = saved.difference(base_bias(saved.site)?);
            match changes.iter_mut().find(|(site, _)| *site == saved.site) {
                Some((_, weights)) => add_bias(weights, difference),
                None => {
                    let in_features = base_weight(saved.site)?.shape()[1];
                    changes.push((saved.site, bias_alone(in_features, difference)));
                }
            }
        }
        let low_rank = changes.into_iter().map(|(site, weights)| (site, SiteChange::LowRank(weights)));
        let replaced =
            self.saved_modules.iter().map(|module| (module.site, SiteChange::Replace(module.weight.clone())));
        Ok(low_rank.chain(replaced).collect())
    }
}

impl SavedBias {
    /// What is to be added to the base's bias to arrive at this one.
    fn difference(&self, base: Option<Tensor>) -> Vec<f32> {
        match base {
            Some(base) => self.bias.iter().zip(base.to_f32()).map(|(new, old)| new - old).collect(),
            None => self.bias.clone(),
        }
    }
}

fn add_bias(weights: &mut ExpertWeights, more: Vec<f32>) {
    weights.bias = Some(match weights.bias.take() {
        Some(own) => own.iter().zip(more).map(|(own, more)| own + more).collect(),
        None => more,
    });
}

fn bias_alone(in_features: usize, bias: Vec<f32>) -> ExpertWeights {
    ExpertWeights {
        a: Tensor::from_f32(vec![0, in_features], &[]),
        b: Tensor::from_f32(vec![bias.len(), 0], &[]),
        scale: 1.0,
        bias: Some(bias),
        column_scale: None,
    }
}

impl SiteAdapter {
    fn weights(&self) -> ExpertWeights {
        let bias = self.bias.as_ref().map(|bias| bias.iter().map(|value| self.scale * value).collect());
        ExpertWeights { a: self.a.clone(), b: self.b.clone(), scale: self.scale, bias, column_scale: None }
    }

    /// DoRA (Liu et al. 2024): `y = c ⊙ (W x + scale · B A x)` with `c = m / ‖W + scale · B A‖` over rows. The low-rank
    /// part of `c` goes into B; the frozen part stays a column scale.
    fn fold_magnitude(&self, plain: ExpertWeights, magnitude: &[f32], weight: &Tensor) -> ExpertWeights {
        let (a, b, weight) = (self.a.to_f32(), self.b.to_f32(), RowsOf(weight));
        let in_features = self.a.shape()[1];
        let column_scale: Vec<f32> = (0..magnitude.len())
            .into_par_iter()
            .map(|row| {
                let mut sum: Vec<f64> = weight.row(row).iter().map(|&w| f64::from(w)).collect();
                for (rank, a) in a.chunks_exact(in_features).enumerate() {
                    let factor = f64::from(self.scale) * f64::from(b[row * self.rank + rank]);
                    for (sum, a) in sum.iter_mut().zip(a) {
                        *sum += factor * f64::from(*a);
                    }
                }
                let norm = sum.iter().map(|value| value * value).sum::<f64>().sqrt();
                (f64::from(magnitude[row]) / norm) as f32
            })
            .collect();
        let scaled: Vec<f32> = b
            .chunks_exact(self.rank)
            .zip(&column_scale)
            .flat_map(|(row, scale)| row.iter().map(move |value| value * scale))
            .collect();
        let b = Tensor::from_f32(self.b.shape().to_vec(), &scaled);
        ExpertWeights { b, column_scale: Some(column_scale), ..plain }
    }
}

/// Rows of a stored matrix, widened one at a time: a large weight is never copied whole.
pub(super) struct RowsOf<'a>(pub &'a Tensor);

impl RowsOf<'_> {
    pub fn row(&self, row: usize) -> Vec<f32> {
        let width = self.0.shape()[1];
        let size = width * self.0.dtype().size();
        let bytes = self.0.bytes().slice(row * size..(row + 1) * size);
        Tensor::new(self.0.dtype(), vec![width], bytes).to_f32()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::DType;

    fn site(site: usize, bias: Option<Vec<f32>>) -> SiteAdapter {
        let (a, b) = (Tensor::from_f32(vec![1, 3], &[1.0; 3]), Tensor::from_f32(vec![2, 1], &[1.0; 2]));
        SiteAdapter { site, rank: 1, scale: 2.0, a, b, bias, magnitude: None }
    }

    /// Bias and rank by site, on a base whose biases are all 10.
    fn biases(adapter: &Adapter) -> Vec<(usize, usize, Option<Vec<f32>>)> {
        let weight = |_| Ok::<_, ()>(Tensor::from_f32(vec![2, 3], &[0.5; 6]));
        let bias = |_| Ok(Some(Tensor::from_f32(vec![2], &[10.0; 2])));
        let changes = adapter.changes(weight, bias).unwrap();
        let low_rank = |change| match change {
            SiteChange::LowRank(weights) => weights,
            SiteChange::Replace(_) => panic!("nothing is replaced whole"),
        };
        let changes = changes.into_iter().map(|(site, change)| (site, low_rank(change)));
        changes.map(|(site, weights)| (site, weights.a.shape()[0], weights.bias)).collect()
    }

    #[test]
    fn a_saved_bias_becomes_the_difference_beside_what_else_the_site_adds() {
        let adapter = Adapter {
            sites: vec![site(4, None), site(5, Some(vec![1.0, 2.0])), site(6, None)],
            saved_biases: [3, 4, 5].map(|site| SavedBias { site, bias: vec![11.0, 7.0] }).into(),
            ..Adapter::default()
        };
        let wanted = [
            (4, 1, Some(vec![1.0, -3.0])),
            (5, 1, Some(vec![3.0, 1.0])),
            (6, 1, None),
            (3, 0, Some(vec![1.0, -3.0])),
        ];
        assert_eq!(biases(&adapter), wanted);
    }

    #[test]
    fn a_frozen_tensor_that_cannot_be_read_stops_the_change() {
        let mut adapter = Adapter { sites: vec![site(0, None)], ..Adapter::default() };
        let weight = Tensor::new(DType::F32, vec![0, 3], crate::tensor::Bytes::new(vec![]));
        assert!(adapter.changes(|_| Err(()), |_| Err(())).is_ok(), "nothing of the base is needed");
        adapter.saved_biases = vec![SavedBias { site: 1, bias: vec![1.0; 2] }];
        assert!(adapter.changes(|_| Ok(weight.clone()), |_| Err(())).is_err());
        assert!(adapter.changes(|_| Err(()), |_| Ok(None)).is_err());
        adapter.sites[0].magnitude = Some(vec![1.0; 2]);
        adapter.saved_biases.clear();
        assert!(adapter.changes(|_| Err(()), |_| Ok(None)).is_err());
    }
}
