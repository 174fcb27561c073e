//! What merging does to tensors, element by element.

use rayon::prelude::*;

use crate::adapter::SiteAdapter;
use crate::backend::sampling::Philox;

/// `s B A`, `[out_features, in_features]`.
pub(super) fn delta(adapted: &SiteAdapter) -> Vec<f32> {
    let (a, b, scale) = (adapted.a.to_f32(), adapted.b.to_f32(), f64::from(adapted.scale));
    let in_features = adapted.a.shape()[1];
    let mut delta = vec![0.0; in_features * adapted.b.shape()[0]];
    delta.par_chunks_exact_mut(in_features).zip(b.par_chunks_exact(adapted.rank)).for_each(|(row, b)| {
        let mut sum = vec![0.0; in_features];
        for (b, a) in b.iter().zip(a.chunks_exact(in_features)) {
            let factor = scale * f64::from(*b);
            sum.iter_mut().zip(a).for_each(|(sum, a)| *sum += factor * f64::from(*a));
        }
        row.iter_mut().zip(sum).for_each(|(value, sum)| *value = sum as f32);
    });
    delta
}

/// Keeps the `⌊density · n⌋` values of largest magnitude, the first of them on a tie, and makes the others 0.
pub(super) fn keep_largest(values: &mut [f32], density: f64) {
    let kept = (density * values.len() as f64) as usize;
    if density >= 1.0 || kept >= values.len() {
        return;
    }
    if kept == 0 {
        return values.fill(0.0);
    }
    let mut magnitudes: Vec<f32> = values.iter().map(|value| value.abs()).collect();
    let descending = |one: &f32, other: &f32| other.total_cmp(one);
    let threshold = *magnitudes.select_nth_unstable_by(kept - 1, descending).1;
    let larger = values.iter().filter(|value| value.abs() > threshold).count();
    let mut equal = kept - larger;
    for value in values {
        if value.abs() == threshold && equal > 0 {
            equal -= 1;
        } else if value.abs() <= threshold {
            *value = 0.0;
        }
    }
}

/// Keeps each value with probability `density` and divides it by that; the others become 0. Element `i` depends on the
/// seed, the stream and `i` alone.
pub(super) fn drop_random(values: &mut [f32], density: f64, random: Philox, stream: u64) {
    if density >= 1.0 {
        return;
    }
    values.par_iter_mut().enumerate().for_each(|(index, value)| {
        // 53 bits: the fractions that f64 has between 0 and 1.
        let fraction = (random.bits(stream, index as u64) >> 11) as f64 / (1u64 << 53) as f64;
        *value = if fraction < density { (f64::from(*value) / density) as f32 } else { 0.0 };
    });
}

/// `Σ u_i t_i`.
pub(super) fn weighted_sum(tensors: &[Vec<f32>], weights: &[f64]) -> Vec<f32> {
    let element = |index: usize| {
        let terms = tensors.iter().zip(weights).map(|(tensor, weight)| weight * f64::from(tensor[index]));
        terms.sum::<f64>() as f32
    };
    (0..tensors[0].len()).into_par_iter().map(element).collect()
}

/// The mean of `u_i t_i` over those tensors whose element has the elected sign: that of `Σ t_i`, plus where it is 0.
/// Where no element has it, 0.
pub(super) fn elected_mean(tensors: &[Vec<f32>], weights: &[f64]) -> Vec<f32> {
    let element = |index: usize| {
        let elected =
            if tensors.iter().map(|tensor| f64::from(tensor[index])).sum::<f64>() < 0.0 { -1.0 } else { 1.0 };
        let (mut sum, mut count) = (0.0, 0.0);
        for (tensor, weight) in tensors.iter().zip(weights) {
            let value = f64::from(tensor[index]);
            if value * elected > 0.0 {
                sum += weight * value;
                count += 1.0;
            }
        }
        (sum / f64::max(count, 1.0)) as f32
    };
    (0..tensors[0].len()).into_par_iter().map(element).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kept(values: &[f32], density: f64) -> Vec<f32> {
        let mut values = values.to_vec();
        keep_largest(&mut values, density);
        values
    }

    #[test]
    fn the_largest_magnitudes_are_kept_and_as_many_as_the_density_says() {
        let values = [1.0, -5.0, 0.5, 4.0, -2.0];
        assert_eq!(kept(&values, 1.0), values);
        assert_eq!(kept(&values, 0.99), [1.0, -5.0, 0.0, 4.0, -2.0]);
        assert_eq!(kept(&values, 0.4), [0.0, -5.0, 0.0, 4.0, 0.0]);
        assert_eq!(kept(&values, 0.19), [0.0; 5]);
        assert_eq!(kept(&[2.0, -2.0, 2.0, 1.0], 0.5), [2.0, -2.0, 0.0, 0.0], "the first on a tie");
        assert_eq!(kept(&[0.0; 4], 0.5), [0.0; 4]);
    }

    #[test]
    fn random_dropping_keeps_the_share_and_the_expectation() {
        const COUNT: usize = 40_000;
        let mean_of = |density: f64, seed: u64| {
            let mut values = vec![1.0; COUNT];
            drop_random(&mut values, density, Philox::new(seed), 7);
            let kept = values.iter().filter(|&&value| value != 0.0).count() as f64 / COUNT as f64;
            // Five standard deviations of a share.
            let allowed = 5.0 * (density * (1.0 - density) / COUNT as f64).sqrt();
            assert!((kept - density).abs() < allowed, "{kept} of {density}");
            assert!(values.iter().all(|&value| value == 0.0 || value == (1.0 / density) as f32));
            values
        };
        for density in [0.1, 0.5, 0.9] {
            let (one, again, other) = (mean_of(density, 1), mean_of(density, 1), mean_of(density, 2));
            assert_eq!(one, again);
            let alike =
                one.iter().zip(&other).filter(|(one, other)| (**one == 0.0) == (**other == 0.0)).count();
            let wanted = density * density + (1.0 - density) * (1.0 - density);
            assert!((alike as f64 / COUNT as f64 - wanted).abs() < 0.02, "seeds draw apart");
        }
        let mut all = vec![3.0; 5];
        drop_random(&mut all, 1.0, Philox::new(0), 0);
        assert_eq!(all, [3.0; 5]);
    }

    #[test]
    fn the_elected_sign_is_that_of_the_larger_mass_and_the_mean_is_over_those_that_have_it() {
        let tensors =
            [vec![1.0, 1.0, 0.0, -1.0, 2.0], vec![3.0, -3.0, 0.0, 1.0, 0.0], vec![-1.0, 1.0, 0.0, 0.0, 4.0]];
        // By hand: 3 elects +, of 1 and 3; -1 elects -, of -3 alone; all zero; 0 elects +, of 1; zeros do not count.
        assert_eq!(elected_mean(&tensors, &[1.0, 2.0, 10.0]), [3.5, -6.0, 0.0, 2.0, 21.0]);
        assert_eq!(weighted_sum(&tensors, &[1.0, 2.0, 10.0]), [-3.0, 5.0, 0.0, 1.0, 42.0]);
    }
}
