//! Fresh adapters: which sites get a pair, and the numbers that training starts from.
//!
//! As PEFT draws them: A uniform in `±1/√in` (Kaiming with `a = √5`), B zero; at an embedding A zero and B standard
//! normal. DoRA's magnitude is `‖W‖` of every output row. Either way a fresh adapter changes nothing.

use std::f64::consts::TAU;

use rayon::prelude::*;

use super::change::RowsOf;
use super::peft::{BaseWeights, content_hash, is_path_suffix};
use super::{Adapter, Site, SiteAdapter, SiteKind, SiteTable};
use crate::backend::sampling::Philox;
use crate::format::nearest;
use crate::tensor::Tensor;

/// Why there is no fresh adapter.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum FreshError {
    #[error("`{name}` matches no module of this base, which has {known}{hint}")]
    UnknownTarget { name: String, known: String, hint: String },
    #[error("DoRA is not supported on the embedding `{0}`")]
    DoraOnEmbedding(String),
    #[error("alpha {alpha} with rank {rank} gives no finite scale")]
    Scale { alpha: f64, rank: usize },
}

/// The shape of a fresh adapter, and its seed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Fresh {
    pub rank: usize,
    pub alpha: f64,
    /// Scale `alpha / √rank` instead of `alpha / rank` (Kalajdzievski 2023).
    pub use_rslora: bool,
    pub use_dora: bool,
    pub seed: u64,
}

/// Ids of all linear sites of all blocks: PEFT's `all-linear`, which leaves the output head out.
pub fn all_linear(sites: &SiteTable) -> Vec<usize> {
    let chosen = sites.iter().filter(|(_, site)| site.kind == SiteKind::Linear && site.block.is_some());
    chosen.map(|(id, _)| id).collect()
}

/// Ids of the sites that a list of PEFT's `target_modules` names: by whole module path or its last components.
///
/// # Errors
/// When a name matches no site.
pub fn named_sites(sites: &SiteTable, names: &[String]) -> Result<Vec<usize>, FreshError> {
    let matches = |name: &str, site: &Site| is_path_suffix(name, &site.module);
    if let Some(name) = names.iter().find(|name| !sites.iter().any(|(_, site)| matches(name, site))) {
        let mut known: Vec<&str> = Vec::new();
        for (_, site) in sites.iter() {
            if !known.contains(&site.name()) {
                known.push(site.name());
            }
        }
        let hint =
            nearest(name, &known).map_or_else(String::new, |known| format!("; did you mean `{known}`?"));
        return Err(FreshError::UnknownTarget { name: name.clone(), known: known.join(", "), hint });
    }
    let chosen = sites.iter().filter(|(_, site)| names.iter().any(|name| matches(name, site)));
    Ok(chosen.map(|(id, _)| id).collect())
}

/// An adapter with one pair for each of the `chosen` sites (ascending). Its numbers at a site depend on the site and the
/// seed alone, not on what else is chosen. `base` is asked for weights where DoRA needs their norms.
///
/// # Errors
/// When there is no finite scale, or DoRA is asked for at an embedding.
pub fn fresh_adapter(
    sites: &SiteTable,
    chosen: &[usize],
    fresh: &Fresh,
    base: &dyn BaseWeights,
) -> Result<Adapter, FreshError> {
    let &Fresh { rank, alpha, use_rslora, use_dora, seed } = fresh;
    let divisor = if use_rslora { (rank as f64).sqrt() } else { rank as f64 };
    let scale = (alpha / divisor) as f32;
    if !scale.is_finite() {
        return Err(FreshError::Scale { alpha, rank });
    }
    let adapted = |&id: &usize| {
        let site = sites.get(id);
        let numbers = Numbers { random: Philox::new(seed), site: id as u32 };
        let (a_len, b_len) = (rank * site.in_features, site.out_features * rank);
        let (a, b) = match site.kind {
            SiteKind::Linear => {
                (numbers.uniform(a_len, 1.0 / (site.in_features as f64).sqrt()), vec![0.0; b_len])
            }
            SiteKind::Embedding => (vec![0.0; a_len], numbers.normal(b_len)),
        };
        if use_dora && site.kind == SiteKind::Embedding {
            return Err(FreshError::DoraOnEmbedding(site.module.clone()));
        }
        Ok(SiteAdapter {
            site: id,
            rank,
            scale,
            a: Tensor::from_f32(vec![rank, site.in_features], &a),
            b: Tensor::from_f32(vec![site.out_features, rank], &b),
            bias: None,
            magnitude: use_dora.then(|| row_norms(&base.weight(id))),
        })
    };
    let adapted: Vec<_> = chosen.iter().map(adapted).collect::<Result<_, _>>()?;
    let adapter = Adapter { sites: adapted, ..Adapter::default() };
    Ok(Adapter { hash: content_hash(&adapter, sites), ..adapter })
}

/// The random numbers of one site.
struct Numbers {
    random: Philox,
    site: u32,
}

impl Numbers {
    /// Sets these numbers apart from others that are drawn with the same seed: "init" in ASCII.
    const PURPOSE: u32 = 0x696e_6974;

    /// Two numbers in `(0, 1)` for each position.
    fn pair(&self, position: usize) -> [f64; 2] {
        let position = position as u64;
        let words = self.random.block([position as u32, (position >> 32) as u32, self.site, Self::PURPOSE]);
        [[words[0], words[1]], [words[2], words[3]]].map(|[low, high]| {
            let bits = (u64::from(high) << 32 | u64::from(low)) >> 12;
            (bits as f64 + 0.5) / 2f64.powi(52)
        })
    }

    /// Uniform in `(−bound, bound)`.
    fn uniform(&self, count: usize, bound: f64) -> Vec<f32> {
        let pairs = (0..count.div_ceil(2)).flat_map(|position| self.pair(position));
        pairs.take(count).map(|unit| ((2.0 * unit - 1.0) * bound) as f32).collect()
    }

    /// Standard normal (Box & Muller 1958).
    fn normal(&self, count: usize) -> Vec<f32> {
        let pairs = (0..count.div_ceil(2)).flat_map(|position| {
            let [one, two] = self.pair(position);
            let (radius, (sin, cos)) = ((-2.0 * one.ln()).sqrt(), (TAU * two).sin_cos());
            [radius * cos, radius * sin]
        });
        pairs.take(count).map(|value| value as f32).collect()
    }
}

/// `‖W‖` of every row of a stored matrix.
fn row_norms(weight: &Tensor) -> Vec<f32> {
    let square = |&value: &f32| f64::from(value) * f64::from(value);
    let norm = |row| RowsOf(weight).row(row).iter().map(square).sum::<f64>().sqrt() as f32;
    (0..weight.shape()[0]).into_par_iter().map(norm).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const EMBEDDING: usize = 0;
    const QUERY: usize = 1;
    const DOWN: usize = 2;

    struct Base;

    impl BaseWeights for Base {
        fn weight(&self, _: usize) -> Tensor {
            Tensor::from_f32(vec![2, 3], &[3.0, 0.0, 4.0, 0.0, -5.0, 12.0])
        }
    }

    fn sites() -> SiteTable {
        let site = |module: &str, block, in_features| Site {
            module: module.to_owned(),
            block,
            kind: if module.ends_with("embed_tokens") { SiteKind::Embedding } else { SiteKind::Linear },
            in_features,
            out_features: 2500,
            bias: false,
        };
        SiteTable::new(vec![
            site("model.embed_tokens", None, 12),
            site("model.layers.0.self_attn.q_proj", Some(0), 1000),
            site("model.layers.0.mlp.down_proj", Some(0), 1000),
            site("lm_head", None, 1000),
        ])
    }

    const FRESH: Fresh = Fresh { rank: 4, alpha: 6.0, use_rslora: false, use_dora: false, seed: 11 };

    fn make(chosen: &[usize], fresh: Fresh) -> Vec<SiteAdapter> {
        fresh_adapter(&sites(), chosen, &fresh, &Base).unwrap().sites
    }

    #[test]
    fn a_linear_pair_starts_as_pefts() {
        let pair = &make(&[QUERY], FRESH)[0];
        assert_eq!(
            (pair.rank, pair.scale, pair.a.shape(), pair.b.shape()),
            (4, 1.5, &[4, 1000][..], &[2500, 4][..])
        );
        assert!(pair.b.to_f32().iter().all(|&b| b == 0.0));
        let (a, bound) = (pair.a.to_f32(), 1.0 / 1000f32.sqrt());
        assert!(a.iter().all(|a| a.abs() < bound));
        let mut tenths = [0; 10];
        for a in &a {
            tenths[((a / bound + 1.0) * 5.0) as usize] += 1;
        }
        // A count's standard deviation is 19.
        assert!(tenths.iter().all(|count| (310..490).contains(count)), "{tenths:?}");
        assert_eq!(make(&[QUERY], Fresh { use_rslora: true, ..FRESH })[0].scale, 3.0);
    }

    #[test]
    fn an_embeddings_pair_starts_as_pefts() {
        let pair = &make(&[EMBEDDING], FRESH)[0];
        assert!(pair.a.to_f32().iter().all(|&a| a == 0.0));
        let b = pair.b.to_f32();
        let share = |within: f32| b.iter().filter(|b| b.abs() < within).count() as f64 / b.len() as f64;
        // The standard deviation of a share of 10000 is at most 0.005.
        for (within, wanted) in [(0.5, 0.3829), (1.0, 0.6827), (2.0, 0.9545), (3.0, 0.9973)] {
            assert!((share(within) - wanted).abs() < 0.02, "{} within {within}", share(within));
        }
        let below = b.iter().filter(|&&b| b < 0.0).count();
        assert!((4800..5200).contains(&below), "{below} below 0");
    }

    #[test]
    fn numbers_depend_on_site_and_seed_alone() {
        let bytes = |adapters: &[SiteAdapter], index: usize| adapters[index].a.bytes().to_vec();
        let (alone, all) = (make(&[DOWN], FRESH), make(&[EMBEDDING, QUERY, DOWN], FRESH));
        assert_eq!(bytes(&alone, 0), bytes(&all, 2));
        assert_ne!(bytes(&all, 1), bytes(&all, 2));
        assert_ne!(bytes(&alone, 0), bytes(&make(&[DOWN], Fresh { seed: 12, ..FRESH }), 0));
    }

    #[test]
    fn a_magnitude_starts_as_the_norms_of_the_bases_rows() {
        let dora = Fresh { use_dora: true, ..FRESH };
        assert_eq!(make(&[QUERY], dora)[0].magnitude, Some(vec![5.0, 13.0]));
        assert_eq!(make(&[QUERY], FRESH)[0].magnitude, None);
        let refused = fresh_adapter(&sites(), &[EMBEDDING], &dora, &Base).unwrap_err();
        assert_eq!(refused.to_string(), "DoRA is not supported on the embedding `model.embed_tokens`");
    }

    #[test]
    fn a_scale_that_is_not_finite_is_refused() {
        for (rank, alpha) in [(0, 1.0), (0, 0.0), (4, f64::NAN), (1, 1e39)] {
            let fresh = Fresh { rank, alpha, ..FRESH };
            let refused = fresh_adapter(&sites(), &[QUERY], &fresh, &Base);
            assert!(matches!(refused, Err(FreshError::Scale { .. })), "{rank} {alpha}");
        }
    }

    #[test]
    fn targets_are_chosen_as_by_peft() {
        let named = |names: &[&str]| {
            let names: Vec<String> = names.iter().map(|&name| name.to_owned()).collect();
            named_sites(&sites(), &names)
        };
        assert_eq!(all_linear(&sites()), [QUERY, DOWN]);
        assert_eq!(named(&["lm_head", "q_proj"]), Ok(vec![1, 3]));
        assert_eq!(named(&["self_attn.q_proj", "q_proj", "model.embed_tokens"]), Ok(vec![0, 1]));
        let refused = named(&["q_proj", "dwn_proj"]).unwrap_err().to_string();
        let wanted = "`dwn_proj` matches no module of this base, which has embed_tokens, q_proj, down_proj, lm_head; \
                      did you mean `down_proj`?";
        assert_eq!(refused, wanted);
        assert!(named(&["proj"]).is_err(), "names match whole components");
    }
}
