//! Dropout of a pair's input (Srivastava et al. 2014), the same in whatever step a row is computed.
//!
//! Element `k` of a row is dropped when word `k mod 4` of the Philox block of the row's key at the counter
//! `(place, k / 4, 0, 0)` is below `p · 2³²`; the others grow by `1 / (1 − p)`.

use crate::backend::SitePlace;
use crate::backend::sampling::Philox;

/// The counter's first word: another one for every place.
pub(super) fn place_number(place: SitePlace) -> u32 {
    match place {
        SitePlace::Table => 0,
        SitePlace::Group(group, site) => 1 + (group << 8 | site) as u32,
    }
}

/// What each element of a row is multiplied with: 0 or `1 / (1 − p)`.
pub(super) fn factors(key: u64, place: u32, dropout: f32, to: &mut [f32]) {
    let random = Philox::new(key);
    let threshold = (f64::from(dropout) * 2f64.powi(32)) as u32;
    let kept = 1.0 / (1.0 - dropout);
    for (index, to) in to.chunks_mut(4).enumerate() {
        let words = random.block([place, index as u32, 0, 0]);
        for (to, word) in to.iter_mut().zip(words) {
            *to = if word < threshold { 0.0 } else { kept };
        }
    }
}
