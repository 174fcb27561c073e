//! What tells signal from noise: smoothed curves, intervals around shares.

use crate::backend::sampling::Philox;

/// A point of a curve: step and value.
pub type Point = (f64, f64);

/// Resamplings of a bootstrap.
const RESAMPLINGS: u64 = 10_000;
/// Of the normal distribution: 95 % lie within so many standard deviations.
const Z_95: f64 = 1.959_963_984_540_054;

/// Points over which a curve of `count` points is smoothed, always odd.
pub fn window(count: usize) -> usize {
    2 * (count / 40).min(50) + 1
}

/// The mean of the `window` points around each point, of fewer at the ends.
pub fn smooth(points: &[Point], window: usize) -> Vec<Point> {
    let reach = window / 2;
    let mut smoothed = Vec::with_capacity(points.len());
    for (index, &(step, _)) in points.iter().enumerate() {
        let around = &points[index.saturating_sub(reach)..(index + reach + 1).min(points.len())];
        let mean = around.iter().map(|(_, value)| value).sum::<f64>() / around.len() as f64;
        smoothed.push((step, mean));
    }
    smoothed
}

/// At most about `most` points that look the same: the lowest and the highest of each stretch, in their order.
pub fn thin(points: &[Point], most: usize) -> Vec<Point> {
    if points.len() <= most {
        return points.to_vec();
    }
    let stretch = (2 * points.len()).div_ceil(most);
    let mut thinned = Vec::with_capacity(most + 2);
    for stretch in points.chunks(stretch) {
        let by_value = |a: &&Point, b: &&Point| a.1.total_cmp(&b.1);
        let ends = stretch.iter().min_by(by_value).zip(stretch.iter().max_by(by_value));
        let Some((&low, &high)) = ends else { continue };
        let (first, second) = if low.0 <= high.0 { (low, high) } else { (high, low) };
        thinned.push(first);
        if second != first {
            thinned.push(second);
        }
    }
    // A curve ends where its job did.
    if let (Some(&last), Some(&drawn)) = (points.last(), thinned.last())
        && last != drawn
    {
        thinned.push(last);
    }
    thinned
}

/// Wilson's interval around a share that was seen in `samples` samples, with 95 % confidence.
///
/// E. B. Wilson, "Probable inference, the law of succession, and statistical inference" (1927).
pub fn wilson(share: f64, samples: u64) -> (f64, f64) {
    let n = samples as f64;
    let z2 = Z_95 * Z_95;
    let centre = (share + z2 / (2.0 * n)) / (1.0 + z2 / n);
    let reach = Z_95 / (1.0 + z2 / n) * (share * (1.0 - share) / n + z2 / (4.0 * n * n)).sqrt();
    ((centre - reach).max(0.0), (centre + reach).min(1.0))
}

/// So many of so many samples are right.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hits {
    pub right: u64,
    pub samples: u64,
}

impl Hits {
    pub fn of_share(share: f64, samples: u64) -> Self {
        Self { right: (share * samples as f64).round() as u64, samples }
    }

    pub fn share(self) -> f64 {
        self.right as f64 / self.samples as f64
    }
}

/// `(new − old) / old` of two shares, with the middle 95 % of it under the bootstrap.
///
/// Both sets of samples are drawn anew, with replacement and independently: the files keep how many answers were
/// right, not which, so nothing is paired. Drawing `n` of `n` answers with replacement, of which a share `p` is right,
/// gives a binomial number of right ones; so this draws that number, seeded.
pub fn relative_change(new: Hits, old: Hits) -> (f64, f64, f64) {
    let (new_counts, old_counts) = (Binomial::new(new), Binomial::new(old));
    let generator = Philox::new(0);
    let mut changes: Vec<f64> = (0..RESAMPLINGS)
        .map(|resampling| {
            let draw = |counts: &Binomial, stream| counts.draw(generator.bits(stream, resampling));
            relative(draw(&new_counts, 0) / new.samples as f64, draw(&old_counts, 1) / old.samples as f64)
        })
        .collect();
    changes.sort_by(f64::total_cmp);
    let quantile = |q: f64| changes[(q * (changes.len() - 1) as f64).round() as usize];
    (relative(new.share(), old.share()), quantile(0.025), quantile(0.975))
}

/// From nothing to something is endlessly more; from nothing to nothing is no change.
fn relative(new: f64, old: f64) -> f64 {
    match old {
        0.0 if new == 0.0 => 0.0,
        0.0 => f64::INFINITY,
        _ => (new - old) / old,
    }
}

/// The distribution of the number of right answers among as many as there were.
struct Binomial {
    /// Chance of at most so many, by number.
    cumulative: Vec<f64>,
}

impl Binomial {
    fn new(hits: Hits) -> Self {
        let (n, share) = (hits.samples as usize, hits.share());
        let mut mass = vec![0.0; n + 1];
        // From the likeliest number outwards, so that nothing underflows that matters; the scale does not.
        let mode = hits.right as usize;
        mass[mode] = 1.0;
        for k in mode..n {
            mass[k + 1] = mass[k] * (n - k) as f64 / (k + 1) as f64 * share / (1.0 - share);
        }
        for k in (0..mode).rev() {
            mass[k] = mass[k + 1] * (k + 1) as f64 / (n - k) as f64 * (1.0 - share) / share;
        }
        // With all or none right there is one outcome, and the other side of it was divided by 0.
        if hits.right == 0 || hits.right == hits.samples {
            mass.fill(0.0);
            mass[mode] = 1.0;
        }
        let total: f64 = mass.iter().sum();
        let mut sum = 0.0;
        for mass in &mut mass {
            sum += *mass / total;
            *mass = sum;
        }
        Self { cumulative: mass }
    }

    /// The number that 64 random bits stand for.
    fn draw(&self, bits: u64) -> f64 {
        // The upper 53 bits, as a fraction of 1.
        let fraction = (bits >> 11) as f64 / (1u64 << 53) as f64;
        self.cumulative.partition_point(|&chance| chance <= fraction).min(self.cumulative.len() - 1) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn near(found: f64, wanted: f64, within: f64) {
        assert!((found - wanted).abs() <= within, "{found} is not {wanted} ± {within}");
    }

    #[test]
    fn smoothing_keeps_a_line_and_averages_noise() {
        let line: Vec<Point> = (0..9).map(|i| (f64::from(i), 3.0 * f64::from(i))).collect();
        assert_eq!(smooth(&line, 3)[1..8], line[1..8]);
        assert_eq!(smooth(&line, 1), line);
        let noise: Vec<Point> = (0..6).map(|i| (f64::from(i), f64::from(i % 2))).collect();
        near(smooth(&noise, 5)[2].1, 0.4, 1e-12);
        near(smooth(&noise, 5)[0].1, 1.0 / 3.0, 1e-12);
    }

    #[test]
    fn a_thinned_curve_keeps_its_peaks_and_its_end() {
        let mut points: Vec<Point> = (0..10_000).map(|i| (f64::from(i), 1.0)).collect();
        points[1234].1 = 9.0;
        points[8765].1 = -9.0;
        let thinned = thin(&points, 400);
        assert!(thinned.len() <= 401, "{}", thinned.len());
        assert!(thinned.contains(&points[1234]) && thinned.contains(&points[8765]));
        assert_eq!(thinned.last(), points.last());
        assert!(thinned.is_sorted_by(|a, b| a.0 < b.0));
        assert_eq!(thin(&points[..5], 400), points[..5]);
    }

    /// Values of statsmodels 0.15, `proportion_confint(method="wilson")`.
    #[test]
    fn wilson_intervals_are_the_published_ones() {
        for (right, samples, low, high) in
            [(8.0, 10, 0.490_162, 0.943_318), (0.0, 20, 0.0, 0.161_125), (50.0, 100, 0.403_832, 0.596_168)]
        {
            let (found_low, found_high) = wilson(right / f64::from(samples), samples as u64);
            near(found_low, low, 1e-6);
            near(found_high, high, 1e-6);
        }
    }

    #[test]
    fn draws_have_the_mean_and_the_spread_of_the_samples() {
        for (right, samples) in [(30, 100), (1, 2000), (1999, 2000), (5000, 10_000)] {
            let hits = Hits { right, samples };
            let counts = Binomial::new(hits);
            let draws: Vec<f64> = (0..20_000).map(|i| counts.draw(Philox::new(7).bits(0, i))).collect();
            let mean = draws.iter().sum::<f64>() / draws.len() as f64;
            let variance = draws.iter().map(|draw| (draw - mean).powi(2)).sum::<f64>() / draws.len() as f64;
            let wanted = right as f64 * (1.0 - hits.share());
            near(mean, right as f64, 4.0 * (wanted / 20_000.0).sqrt());
            near(variance, wanted, 0.05 * wanted);
        }
        assert_eq!(Binomial::new(Hits { right: 0, samples: 9 }).draw(u64::MAX), 0.0);
        assert_eq!(Binomial::new(Hits { right: 9, samples: 9 }).draw(0), 9.0);
    }

    /// The delta method gives the same interval for large samples.
    #[test]
    fn the_bootstrap_agrees_with_the_delta_method() {
        let (new, old) = (Hits { right: 6300, samples: 10_000 }, Hits { right: 7000, samples: 10_000 });
        let (change, low, high) = relative_change(new, old);
        near(change, -0.1, 1e-12);
        let variance = |hits: Hits| (1.0 - hits.share()) / (hits.share() * hits.samples as f64);
        let reach = Z_95 * 0.9 * (variance(new) + variance(old)).sqrt();
        near(low, -0.1 - reach, 0.05 * reach);
        near(high, -0.1 + reach, 0.05 * reach);
        assert_eq!(relative_change(new, old), relative_change(new, old));
    }

    #[test]
    fn a_change_from_nothing_has_no_bound() {
        let none = Hits { right: 0, samples: 10 };
        assert_eq!(relative_change(none, none), (0.0, 0.0, 0.0));
        assert_eq!(relative_change(Hits { right: 5, samples: 10 }, none).0, f64::INFINITY);
    }
}
