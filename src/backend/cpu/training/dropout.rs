//! Dropout of a pair's input (Srivastava et al. 2014), the same in whatever step a row is computed.
//!
//! Element `k` of a row is dropped when word `k mod 4` of the Philox block of the row's key at the counter
//! `(place, k / 4, 0, 0)` is below `p · 2³²`; the others grow by `1 / (1 − p)`.

use crate::backend::SitePlace;
use crate::backend::cpu::Isa;
use crate::backend::cpu::simd::multiversion;
use crate::backend::sampling::Philox;

/// Philox blocks computed side by side.
const BLOCKS: usize = 16;

/// The counter's first word: another one for every place.
pub(super) fn place_number(place: SitePlace) -> u32 {
    match place {
        SitePlace::Table => 0,
        SitePlace::Group(group, site) => 1 + (group << 8 | site) as u32,
    }
}

/// Fills in what each element of a row is multiplied with, 0 or `1 / (1 − p)`, and the row's elements times that.
pub(super) fn drop_row(
    isa: Isa,
    key: u64,
    place: u32,
    dropout: f32,
    x: &[f32],
    factors: &mut [f32],
    dropped: &mut [f32],
) {
    // SAFETY: plain code, compiled for the instruction set.
    unsafe { drop_row_with(isa, Philox::new(key), place, dropout, x, factors, dropped) };
}

multiversion! {
    fn drop_row_with(
        random: Philox,
        place: u32,
        dropout: f32,
        x: &[f32],
        factors: &mut [f32],
        dropped: &mut [f32],
    ) => drop_row_body
}

#[inline(always)]
fn drop_row_body(
    random: Philox,
    place: u32,
    dropout: f32,
    x: &[f32],
    factors: &mut [f32],
    dropped: &mut [f32],
) {
    let threshold = (f64::from(dropout) * 2f64.powi(32)) as u32;
    let kept = 1.0 / (1.0 - dropout);
    let mut counters = [[place; BLOCKS], std::array::from_fn(|i| i as u32), [0; BLOCKS], [0; BLOCKS]];
    for factors in factors.chunks_mut(4 * BLOCKS) {
        let words = random.blocks(counters);
        let mut chunk = [[0f32; 4]; BLOCKS];
        for (i, chunk) in chunk.iter_mut().enumerate() {
            for (to, words) in chunk.iter_mut().zip(words) {
                *to = if words[i] < threshold { 0.0 } else { kept };
            }
        }
        factors.copy_from_slice(&chunk.as_flattened()[..factors.len()]);
        counters[1].iter_mut().for_each(|counter| *counter += BLOCKS as u32);
    }
    for ((to, x), factor) in dropped.iter_mut().zip(x).zip(factors) {
        *to = x * *factor;
    }
}
