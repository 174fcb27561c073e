//! Which experts the rows of a group use, and the copies of rows that dropout and DoRA ask for.

use std::ops::Range;

use super::linear::Workspace;
use super::{Trainee, dropout, grow};
use crate::backend::cpu::experts::{Change, LowRank};
use crate::backend::cpu::parallel::{Shared, parallel_for};
use crate::backend::cpu::{Buffer, Isa, Site};
use crate::backend::{CHUNK, Gates, SitePlace};

/// A low-rank expert at a site, for the rows of a run.
pub(super) struct Use<'a> {
    pub site: usize,
    /// Where the site's outputs start in a row.
    pub column: usize,
    pub out_features: usize,
    pub slot: usize,
    pub rows: Range<usize>,
    /// Index of the first row's gate, and the distance to the next row's.
    pub gate: usize,
    pub gate_stride: usize,
    pub expert: &'a LowRank,
    /// Index in V and dU of the first row's ranks, and the distance to the next row's.
    pub v: usize,
    pub v_stride: usize,
    /// The trainee's pair at this place.
    pub pair: Option<usize>,
    /// Where the rows as dropout left them start.
    pub dropped: Option<usize>,
    /// Where the rows' output gradients times this expert's column scale start, for pairs with a magnitude.
    pub scaled: Option<usize>,
}

/// All uses at a group's sites, site after site and run after run: the order of V.
pub(super) fn list_uses<'a>(
    sites: &'a [Site],
    number: usize,
    gates: &Gates,
    trainees: &[Option<Trainee>],
) -> Vec<Use<'a>> {
    let mut uses = Vec::new();
    let (mut v, mut column, mut dropped) = (0, 0, 0);
    for (index, site) in sites.iter().enumerate() {
        let out_features = site.experts.out_features;
        for run in gates.runs() {
            let (first, mut chunks) = (uses.len(), 0);
            let experts = gates.experts_of(run);
            for (expert, &slot) in experts.iter().enumerate() {
                let Some(Change::LowRank(low_rank)) = site.experts.get(slot) else { continue };
                let trainee = trainees.get(slot as usize).and_then(Option::as_ref);
                let pair = trainee.and_then(|trainee| trainee.find(SitePlace::Group(number, index)));
                let drops = pair.is_some() && trainee.is_some_and(|trainee| trainee.dropout > 0.0);
                uses.push(Use {
                    site: index,
                    column,
                    out_features,
                    slot: slot as usize,
                    rows: run.rows.clone(),
                    gate: gates.first_value(run) + expert,
                    gate_stride: experts.len(),
                    expert: low_rank,
                    v: v + chunks * CHUNK,
                    v_stride: 0,
                    pair,
                    dropped: drops.then_some(dropped),
                    scaled: None,
                });
                chunks += low_rank.chunks();
                dropped += if drops { run.rows.len() * site.experts.in_features } else { 0 };
            }
            for user in &mut uses[first..] {
                user.v_stride = chunks * CHUNK;
            }
            v += run.rows.len() * chunks * CHUNK;
        }
        column += out_features;
    }
    uses
}

/// Fills in what dropout leaves of the input of every use.
pub(super) fn drop_inputs(
    isa: Isa,
    uses: &[Use<'_>],
    number: usize,
    x: &Buffer,
    row_keys: &[u64],
    trainees: &[Option<Trainee>],
    workspace: &mut Workspace,
) {
    let k = x.width;
    let end = |user: &Use<'_>| user.dropped.map_or(0, |start| start + user.rows.len() * k);
    let len = uses.iter().map(end).max().unwrap_or(0);
    if len == 0 {
        return;
    }
    grow(&mut workspace.factors, len);
    grow(&mut workspace.dropped, len);
    let factors = Shared::new(workspace.factors.as_mut_ptr());
    let dropped = Shared::new(workspace.dropped.as_mut_ptr());
    for user in uses {
        let Some(start) = user.dropped else { continue };
        let probability = trainees[user.slot].as_ref().expect("a trainee drops").dropout;
        let place = dropout::place_number(SitePlace::Group(number, user.site));
        // A random number takes about as long as sixteen multiply-adds.
        parallel_for(user.rows.len(), 16 * user.rows.len() * k, |index| {
            let row = user.rows.start + index;
            // SAFETY: the row of this use, in vectors that have been grown to hold it.
            let (factors, dropped) = unsafe {
                let row = |all: Shared| all.get().add(start + index * k);
                (
                    std::slice::from_raw_parts_mut(row(factors), k),
                    std::slice::from_raw_parts_mut(row(dropped), k),
                )
            };
            let x = &x.data[row * k..(row + 1) * k];
            dropout::drop_row(isa, row_keys[row], place, probability, x, factors, dropped);
        });
    }
}

/// Fills in the output gradients of pairs with a magnitude times their column scale.
pub(super) fn scale_outputs(
    uses: &mut [Use<'_>],
    dy: &Buffer,
    trainees: &[Option<Trainee>],
    scaled: &mut Vec<f32>,
) {
    let mut len = 0;
    let has_magnitude = |user: &Use<'_>| {
        let trainee = trainees.get(user.slot).and_then(Option::as_ref);
        trainee.zip(user.pair).is_some_and(|(trainee, pair)| trainee.pairs[pair].dora.is_some())
    };
    for user in uses.iter_mut().filter(|user| has_magnitude(user)) {
        user.scaled = Some(len);
        len += user.rows.len() * user.out_features;
    }
    grow(scaled, len);
    let scaled = Shared::new(scaled.as_mut_ptr());
    for user in uses {
        let (Some(start), Some(scales)) = (user.scaled, &user.expert.column_scale) else { continue };
        let out = user.out_features;
        parallel_for(user.rows.len(), user.rows.len() * out, |index| {
            let from = &dy.data[(user.rows.start + index) * dy.width + user.column..];
            // SAFETY: this piece's row of what has been grown to hold all.
            let to = unsafe { std::slice::from_raw_parts_mut(scaled.get().add(start + index * out), out) };
            for ((to, from), scale) in to.iter_mut().zip(from).zip(scales) {
                *to = from * scale;
            }
        });
    }
}
