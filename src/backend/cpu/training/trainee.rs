//! An adapter in training: the numbers of its pairs, and the slot whose content they are.
//!
//! All numbers of a pair lie in one vector, `A [rank, in] | Bᵀ [rank, out] | magnitude [out]`, and so do its gradients
//! and moments. With B transposed both gradients are the same sum over rows, and what the backward pass multiplies
//! with B is a dot product. The slot shares A, and has B in the chunks of the forward product.

use std::ops::Range;
use std::sync::Arc;

use super::dora;
use super::optimizer::{Parameters, update};
use crate::backend::SitePlace;
use crate::backend::cpu::experts::{Change, Expert, LowRank};
use crate::backend::cpu::parallel::pays;
use crate::backend::cpu::{Group, Isa, Site};
use crate::backend::training::{AdamW, Pair, PairValues, Part};
use crate::tensor::{Bytes, DType, Tensor};

use rayon::prelude::*;

/// An adapter in training.
pub struct Trainee {
    pub(super) pairs: Vec<TrainedPair>,
    /// The probability with which an element of a pair's input is dropped.
    pub(super) dropout: f32,
}

/// A pair in training.
pub(super) struct TrainedPair {
    pub place: SitePlace,
    pub rank: usize,
    pub in_features: usize,
    pub out_features: usize,
    pub scale: f32,
    /// Shared with the slot, which reads its A there.
    pub weights: Arc<Vec<f32>>,
    pub gradients: Vec<f32>,
    first_moments: Vec<f32>,
    second_moments: Vec<f32>,
    /// DoRA's, of the weights as they are.
    pub dora: Option<Dora>,
    /// What the slot holds, while it is worked on.
    content: Option<LowRank>,
}

/// What DoRA's column scale `c = m / ‖W + s B A‖` is made of, `[out]` each.
#[derive(Default)]
pub(super) struct Dora {
    pub norms: Vec<f32>,
    pub column_scale: Vec<f32>,
}

/// The weights of a pair as the bytes of a tensor.
struct SharedWeights(Arc<Vec<f32>>);

impl AsRef<[u8]> for SharedWeights {
    fn as_ref(&self) -> &[u8] {
        bytemuck::cast_slice(&self.0)
    }
}

impl TrainedPair {
    fn new(pair: &Pair) -> Self {
        let [in_features, out_features] =
            [pair.weights.a.len() / pair.rank, pair.weights.b.len() / pair.rank];
        let mut new = Self {
            place: pair.place,
            rank: pair.rank,
            in_features,
            out_features,
            scale: pair.scale,
            weights: Arc::default(),
            gradients: Vec::new(),
            first_moments: Vec::new(),
            second_moments: Vec::new(),
            dora: (!pair.weights.magnitude.is_empty()).then(Dora::default),
            content: None,
        };
        assert!(new.dora.is_none() || new.place != SitePlace::Table, "a lookup has no magnitude");
        let len = new.magnitude_range().end;
        new.weights = Arc::new(vec![0.0; len]);
        for part in [&mut new.gradients, &mut new.first_moments, &mut new.second_moments] {
            *part = vec![0.0; len];
        }
        new.write(Part::Weights, &pair.weights);
        new
    }

    pub fn a_range(&self) -> Range<usize> {
        0..self.rank * self.in_features
    }

    /// Of B transposed, `[rank, out]`.
    pub fn b_range(&self) -> Range<usize> {
        let start = self.a_range().end;
        start..start + self.rank * self.out_features
    }

    pub fn magnitude_range(&self) -> Range<usize> {
        let start = self.b_range().end;
        start..start + if self.dora.is_some() { self.out_features } else { 0 }
    }

    fn part(&self, part: Part) -> &[f32] {
        match part {
            Part::Weights => &self.weights,
            Part::Gradients => &self.gradients,
            Part::FirstMoments => &self.first_moments,
            Part::SecondMoments => &self.second_moments,
        }
    }

    fn read(&self, part: Part) -> PairValues {
        let values = self.part(part);
        PairValues {
            a: values[self.a_range()].to_vec(),
            b: transpose(&values[self.b_range()], self.out_features),
            magnitude: values[self.magnitude_range()].to_vec(),
        }
    }

    fn write(&mut self, part: Part, values: &PairValues) {
        let (a, b, magnitude) = (self.a_range(), self.b_range(), self.magnitude_range());
        let rank = self.rank;
        let to = match part {
            Part::Weights => Arc::make_mut(&mut self.weights),
            Part::Gradients => &mut self.gradients,
            Part::FirstMoments => &mut self.first_moments,
            Part::SecondMoments => &mut self.second_moments,
        };
        to[a].copy_from_slice(&values.a);
        to[b].copy_from_slice(&transpose(&values.b, rank));
        to[magnitude].copy_from_slice(&values.magnitude);
    }

    /// Takes over what the slot holds, if it holds this pair, so that the weights are this pair's alone.
    fn take_content(&mut self, site: &mut Site, slot: usize) {
        self.content = match site.experts.take(slot) {
            Some(Change::LowRank(mut content)) if content.rank == self.rank => {
                content.a = Tensor::from_f32(vec![0, self.in_features], &[]);
                Some(content)
            }
            _ => None,
        };
    }

    /// Makes the slot's content from the weights.
    fn lay_out(&mut self, isa: Isa, site: &Site) {
        let values = Bytes::new(SharedWeights(Arc::clone(&self.weights)));
        let a = values.slice(0..self.a_range().end * DType::F32.size());
        let a = Tensor::new(DType::F32, vec![self.rank, self.in_features], a);
        let mut content = match self.content.take() {
            Some(mut content) => {
                content.a = a;
                content
            }
            None => LowRank::with_a(a, self.out_features, self.scale),
        };
        if self.dora.is_some() {
            let dora = dora::scales(isa, self, &site.weight);
            content.column_scale = Some(dora.column_scale.clone());
            self.dora = Some(dora);
        }
        let scales = self.dora.as_ref().map(|dora| &*dora.column_scale);
        content.set_b(&self.weights[self.b_range()], scales);
        self.content = Some(content);
    }
}

/// `[rows, columns]` as `[columns, rows]`.
fn transpose(values: &[f32], columns: usize) -> Vec<f32> {
    let rows = values.len() / columns;
    let mut to = vec![0.0; values.len()];
    for (row, values) in values.chunks_exact(columns).enumerate() {
        for (column, value) in values.iter().enumerate() {
            to[column * rows + row] = *value;
        }
    }
    to
}

impl Trainee {
    pub(super) fn new(pairs: &[Pair], dropout: f32) -> Self {
        assert!((0.0..1.0).contains(&dropout), "a dropout of {dropout}; wanted at least 0 and less than 1");
        Self { pairs: pairs.iter().map(TrainedPair::new).collect(), dropout }
    }

    /// The number of the pair at a place.
    pub(super) fn find(&self, place: SitePlace) -> Option<usize> {
        self.pairs.iter().position(|pair| pair.place == place)
    }

    pub(super) fn read(&self, part: Part) -> Vec<PairValues> {
        self.pairs.iter().map(|pair| pair.read(part)).collect()
    }

    /// Runs `work` on every pair while the slot is empty, then fills the slot anew.
    pub(super) fn change(
        &mut self,
        isa: Isa,
        groups: &mut [Group],
        table: &mut Site,
        slot: usize,
        work: impl Fn(usize, &mut TrainedPair) + Sync,
    ) {
        for pair in &mut self.pairs {
            pair.take_content(site_mut(groups, table, pair.place), slot);
        }
        let sites = (&*groups, &*table);
        let work = |(index, pair): (usize, &mut TrainedPair)| {
            work(index, pair);
            let site = match pair.place {
                SitePlace::Table => sites.1,
                SitePlace::Group(group, site) => &sites.0[group].0[site],
            };
            pair.lay_out(isa, site);
        };
        // A parameter takes about as long as sixteen multiply-adds.
        if pays(16 * self.parameters()) {
            self.pairs.par_iter_mut().enumerate().for_each(work);
        } else {
            self.pairs.iter_mut().enumerate().for_each(work);
        }
        for pair in &mut self.pairs {
            let content = pair.content.take().expect("just laid out");
            let site = site_mut(groups, table, pair.place);
            assert!(
                site.experts.in_features == pair.in_features
                    && site.experts.out_features == pair.out_features,
                "a pair of its place's widths"
            );
            site.experts.insert(slot, Expert(Change::LowRank(content)));
        }
    }

    pub(super) fn write(
        &mut self,
        isa: Isa,
        groups: &mut [Group],
        table: &mut Site,
        slot: usize,
        part: Part,
        values: &[PairValues],
    ) {
        assert_eq!(values.len(), self.pairs.len(), "values for every pair");
        match part {
            Part::Weights => {
                self.change(isa, groups, table, slot, |index, pair| pair.write(part, &values[index]));
            }
            _ => self.pairs.iter_mut().zip(values).for_each(|(pair, values)| pair.write(part, values)),
        }
    }

    pub(super) fn adamw(
        &mut self,
        isa: Isa,
        groups: &mut [Group],
        table: &mut Site,
        slot: usize,
        step: &AdamW,
    ) {
        self.change(isa, groups, table, slot, |_, pair| {
            let (b, len) = (pair.b_range(), pair.magnitude_range().end);
            let weights = Arc::make_mut(&mut pair.weights);
            for (range, lr) in [(0..b.start, step.lr), (b.clone(), step.lr_b), (b.end..len, step.lr)] {
                let parameters = Parameters {
                    weights: &mut weights[range.clone()],
                    gradients: &mut pair.gradients[range.clone()],
                    first_moments: &mut pair.first_moments[range.clone()],
                    second_moments: &mut pair.second_moments[range],
                };
                update(isa, parameters, step, lr);
            }
        });
    }

    pub(super) fn clear_gradients(&mut self) {
        for pair in &mut self.pairs {
            pair.gradients.fill(0.0);
        }
    }

    fn parameters(&self) -> usize {
        self.pairs.iter().map(|pair| pair.weights.len()).sum()
    }

    /// `Σ g²` of every pair.
    pub(super) fn squared_gradients(&self) -> Vec<f64> {
        let squares = |pair: &TrainedPair| super::optimizer::sum_of_squares(&pair.gradients);
        if pays(self.parameters()) {
            self.pairs.par_iter().map(squares).collect()
        } else {
            self.pairs.iter().map(squares).collect()
        }
    }
}

fn site_mut<'a>(groups: &'a mut [Group], table: &'a mut Site, place: SitePlace) -> &'a mut Site {
    match place {
        SitePlace::Table => table,
        SitePlace::Group(group, site) => &mut groups[group].0[site],
    }
}
