//! Mixtures: which experts a row uses, and how strongly.
//!
//! For a row `x`, `y = W x + bias + Σ_e g_e · s_e · B_e (A_e x)` over the experts `e` of its mixture. A mixture is a
//! row of the sparse gate matrix that backends take as [`Gates`](crate::backend::Gates): empty for the base alone, one
//! entry for one adapter, several for a weighted set.

use crate::adapter::AdapterStore;

/// The experts of one request, constant over its rows.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Mixture {
    /// Slots with their gates, ascending by slot.
    entries: Vec<(u32, f32)>,
}

/// Why a set of adapters is no mixture.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum MixtureError {
    #[error("no adapter named `{0}` is loaded")]
    Unknown(String),
    #[error("adapter `{0}` stands twice in the mixture")]
    Twice(String),
    #[error("the weight of adapter `{name}` is {weight}; wanted a finite number")]
    NotFinite { name: String, weight: f32 },
    #[error(
        "adapter `{0}` replaces whole modules (modules_to_save) and can only be used alone, with weight 1"
    )]
    NotMixable(String),
}

impl Mixture {
    /// The fixed mixture of named adapters. Entries of weight 0 drop out.
    ///
    /// # Errors
    /// When an adapter is unknown, stands twice, has a weight that is not finite, or replaces whole modules and is not
    /// alone with weight 1.
    pub fn fixed(adapters: &[(String, f32)], store: &AdapterStore) -> Result<Self, MixtureError> {
        let mut entries: Vec<(u32, f32)> = Vec::with_capacity(adapters.len());
        let alone = adapters.len() == 1 && adapters[0].1 == 1.0;
        for (name, weight) in adapters {
            let slot = store.find(name).ok_or_else(|| MixtureError::Unknown(name.clone()))?;
            if !weight.is_finite() {
                return Err(MixtureError::NotFinite { name: name.clone(), weight: *weight });
            }
            if entries.iter().any(|&(taken, _)| taken as usize == slot) {
                return Err(MixtureError::Twice(name.clone()));
            }
            if !alone && !store.is_mixable(slot) {
                return Err(MixtureError::NotMixable(name.clone()));
            }
            entries.push((slot as u32, *weight));
        }
        entries.retain(|&(_, weight)| weight != 0.0);
        entries.sort_unstable_by_key(|&(slot, _)| slot);
        Ok(Self { entries })
    }

    /// `(slot, gate)` pairs, ascending by slot.
    pub fn entries(&self) -> &[(u32, f32)] {
        &self.entries
    }

    /// Expert slots, ascending.
    pub fn slots(&self) -> impl Iterator<Item = u32> + '_ {
        self.entries.iter().map(|&(slot, _)| slot)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn store() -> AdapterStore {
        let mut store = AdapterStore::default();
        store.insert("a", true).unwrap();
        store.insert("b", true).unwrap();
        store.insert("head", false).unwrap();
        store
    }

    fn fixed(adapters: &[(&str, f32)]) -> Result<Vec<(u32, f32)>, MixtureError> {
        let named: Vec<(String, f32)> =
            adapters.iter().map(|&(name, weight)| (name.to_owned(), weight)).collect();
        Mixture::fixed(&named, &store()).map(|mixture| mixture.entries().to_vec())
    }

    #[test]
    fn entries_are_sorted_and_zero_weights_drop_out() {
        assert_eq!(fixed(&[]).unwrap(), []);
        assert_eq!(fixed(&[("b", 0.5), ("a", 2.0)]).unwrap(), [(0, 2.0), (1, 0.5)]);
        assert_eq!(fixed(&[("b", 0.0), ("a", 2.0)]).unwrap(), [(0, 2.0)]);
        assert_eq!(fixed(&[("head", 1.0)]).unwrap(), [(2, 1.0)]);
    }

    #[test]
    fn sets_that_are_no_mixture_are_refused() {
        assert_eq!(fixed(&[("x", 1.0)]), Err(MixtureError::Unknown("x".into())));
        assert_eq!(fixed(&[("a", 1.0), ("a", 1.0)]), Err(MixtureError::Twice("a".into())));
        assert!(matches!(fixed(&[("a", f32::NAN)]), Err(MixtureError::NotFinite { .. })));
        assert_eq!(fixed(&[("head", 0.5)]), Err(MixtureError::NotMixable("head".into())));
        assert_eq!(fixed(&[("a", 1.0), ("head", 1.0)]), Err(MixtureError::NotMixable("head".into())));
    }
}
