//! How much each labelled token of a batch counts, and what is done where tasks pull apart.
//!
//! A batch's loss is `Σ w_t · loss_t` over its labelled tokens, with weights that are known before the batch runs: its
//! gradient needs no rescaling however the batch is cut into steps.

use super::config::Balance;

/// One sample of a batch, as far as its weight goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Weighed {
    pub task: usize,
    /// Labelled tokens.
    pub labels: usize,
}

/// The weight of every labelled token of each sample. `factors` multiply tasks' weights (CoBa); none is 1 for all.
///
/// With `token` every token counts alike, with `sample` every sample, with `task` every task that is in the batch.
pub fn token_weights(samples: &[Weighed], balance: Balance, factors: Option<&[f64]>) -> Vec<f32> {
    let labels_of = |task: usize| -> usize {
        samples.iter().filter(|sample| sample.task == task).map(|sample| sample.labels).sum()
    };
    let all: usize = samples.iter().map(|sample| sample.labels).sum();
    let mut tasks: Vec<usize> = samples.iter().map(|sample| sample.task).collect();
    tasks.sort_unstable();
    tasks.dedup();
    let labels: Vec<usize> = tasks.iter().map(|&task| labels_of(task)).collect();
    let weight = |sample: &Weighed| {
        let share = match balance {
            Balance::Token => all as f64,
            Balance::Sample => (samples.len() * sample.labels) as f64,
            Balance::Task => {
                let own = tasks.binary_search(&sample.task).map_or(0, |index| labels[index]);
                (tasks.len() * own) as f64
            }
        };
        (factors.map_or(1.0, |factors| factors[sample.task]) / share) as f32
    };
    samples.iter().map(weight).collect()
}

/// Task weights from the slopes of validation losses (CoBa: Gong et al. 2024, section 3).
///
/// `history[i]` are task `i`'s validation losses over its first, oldest first. The slope `α_i(t)` is fitted by least
/// squares over the last ten of them, at every evaluation `t`. With `K` tasks and `N` evaluations:
/// `RCS_i = softmax_i(K α_i / Σ_j |α_j|)` favours tasks that converge slowly, `ACS_i = softmax_i(−N α_i / Σ_t |α_i(t)|)`
/// those that still converge rather than diverge, and
/// `DF = min(1, N · softmax_t(−τ N α_max(t) / Σ_t |α_max(t)|))`, `α_max` the slope of the largest loss, goes from the
/// one to the other as the worst task starts to diverge. The weights `DF · RCS + (1 − DF) · ACS` are scaled to the mean 1.
/// Fewer than two evaluations give 1 to all, as does a loss that is not finite: slopes say nothing there.
pub fn coba_weights(history: &[Vec<f64>]) -> Vec<f64> {
    let tasks = history.len();
    let evaluations = history.iter().map(Vec::len).min().unwrap_or(0);
    if evaluations < 2 || history.iter().flatten().any(|loss| !loss.is_finite()) {
        return vec![1.0; tasks];
    }
    let slopes_of = |losses: &[f64]| -> Vec<f64> {
        (2..=evaluations).map(|end| slope(&losses[end.saturating_sub(COBA_WINDOW)..end])).collect()
    };
    let slopes: Vec<Vec<f64>> = history.iter().map(|losses| slopes_of(losses)).collect();
    let largest: Vec<f64> =
        (0..evaluations).map(|t| history.iter().map(|losses| losses[t]).fold(f64::MIN, f64::max)).collect();
    let largest = slopes_of(&largest);
    let count = largest.len() as f64;
    let absolute =
        |values: &mut dyn Iterator<Item = f64>| values.map(f64::abs).sum::<f64>().max(f64::MIN_POSITIVE);

    let last: Vec<f64> = slopes.iter().map(|slopes| slopes[slopes.len() - 1]).collect();
    let across = absolute(&mut last.iter().copied());
    let relative = softmax(last.iter().map(|slope| tasks as f64 * slope / across).collect());
    let own = |slopes: &Vec<f64>| -count * slopes[slopes.len() - 1] / absolute(&mut slopes.iter().copied());
    let still = softmax(slopes.iter().map(own).collect());
    let over_time = absolute(&mut largest.iter().copied());
    let divergence = softmax(largest.iter().map(|slope| -COBA_TAU * count * slope / over_time).collect());
    let factor = (count * divergence[divergence.len() - 1]).min(1.0);

    let weights =
        relative.iter().zip(&still).map(|(relative, still)| factor * relative + (1.0 - factor) * still);
    weights.map(|weight| weight * tasks as f64).collect()
}

/// Evaluations that a slope is fitted over.
const COBA_WINDOW: usize = 10;
/// Temperature of the divergence factor, as its authors suggest.
const COBA_TAU: f64 = 5.0;

/// Least-squares slope of values at 0, 1, 2, …
fn slope(values: &[f64]) -> f64 {
    let count = values.len() as f64;
    let (mean_x, mean_y) = ((count - 1.0) / 2.0, values.iter().sum::<f64>() / count);
    let (mut above, mut below) = (0.0, 0.0);
    for (x, y) in values.iter().enumerate() {
        let distance = x as f64 - mean_x;
        above += distance * (y - mean_y);
        below += distance * distance;
    }
    above / below
}

fn softmax(mut values: Vec<f64>) -> Vec<f64> {
    let largest = values.iter().copied().fold(f64::MIN, f64::max);
    let mut sum = 0.0;
    for value in &mut values {
        *value = (*value - largest).exp();
        sum += *value;
    }
    values.iter_mut().for_each(|value| *value /= sum);
    values
}

/// Gradient surgery (PCGrad: Yu et al. 2020, algorithm 1): from each task's gradient, its component against every
/// conflicting one (negative inner product with that task's own gradient) is taken away, one after another in the order
/// that `order` gives for it; the results are summed.
///
/// All gradients have the same length. Also returns the cosines between the gradients as they came, `[tasks, tasks]`
/// (`None` where one is zero, as a task's that is not in the batch, or not finite).
pub fn pcgrad(
    gradients: &[Vec<f32>],
    order: impl Fn(usize) -> Vec<usize>,
) -> (Vec<f32>, Vec<Vec<Option<f64>>>) {
    let dot =
        |a: &[f32], b: &[f32]| -> f64 { a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum() };
    let squares: Vec<f64> = gradients.iter().map(|gradient| dot(gradient, gradient)).collect();
    let cosine = |i: usize, j: usize| {
        let norms = (squares[i] * squares[j]).sqrt();
        Some(dot(&gradients[i], &gradients[j]) / norms).filter(|cosine| cosine.is_finite())
    };
    let cosines =
        (0..gradients.len()).map(|i| (0..gradients.len()).map(|j| cosine(i, j)).collect()).collect();
    let mut sum = vec![0f32; gradients.first().map_or(0, Vec::len)];
    for (task, gradient) in gradients.iter().enumerate() {
        let mut own = gradient.clone();
        for other in order(task).into_iter().filter(|&other| other != task) {
            let inner = dot(&own, &gradients[other]);
            if inner < 0.0 {
                let factor = inner / squares[other];
                for (value, other) in own.iter_mut().zip(&gradients[other]) {
                    *value = (f64::from(*value) - factor * f64::from(*other)) as f32;
                }
            }
        }
        sum.iter_mut().zip(own).for_each(|(sum, own)| *sum += own);
    }
    (sum, cosines)
}

#[cfg(test)]
mod tests {
    use super::*;

    const BATCH: [Weighed; 3] =
        [Weighed { task: 0, labels: 2 }, Weighed { task: 2, labels: 6 }, Weighed { task: 0, labels: 8 }];

    #[test]
    fn weights_are_means_over_tokens_samples_or_tasks() {
        assert_eq!(token_weights(&BATCH, Balance::Token, None), [1.0 / 16.0; 3]);
        assert_eq!(token_weights(&BATCH, Balance::Sample, None), [1.0 / 6.0, 1.0 / 18.0, 1.0 / 24.0]);
        assert_eq!(token_weights(&BATCH, Balance::Task, None), [1.0 / 20.0, 1.0 / 12.0, 1.0 / 20.0]);
        for balance in [Balance::Token, Balance::Sample, Balance::Task] {
            let weights = token_weights(&BATCH, balance, None);
            let sum: f32 =
                BATCH.iter().zip(weights).map(|(sample, weight)| sample.labels as f32 * weight).sum();
            assert!((sum - 1.0).abs() < 1e-6, "{balance:?}");
        }
    }

    #[test]
    fn factors_multiply_the_weights_of_their_task() {
        let weights = token_weights(&BATCH, Balance::Token, Some(&[2.0, 9.0, 0.5]));
        assert_eq!(weights, [2.0 / 16.0, 0.5 / 16.0, 2.0 / 16.0]);
    }

    #[test]
    fn slow_tasks_weigh_more_and_diverging_ones_less() {
        assert_eq!(coba_weights(&[vec![1.0], vec![1.0]]), [1.0, 1.0], "nothing is known yet");
        let falling = |rate: f64| (0..8).map(|t| 1.0 - rate * f64::from(t)).collect::<Vec<f64>>();
        let weights = coba_weights(&[falling(0.1), falling(0.01)]);
        assert!(weights[1] > weights[0], "{weights:?}");
        assert!((weights.iter().sum::<f64>() - 2.0).abs() < 1e-12);
        let turning = [1.0, 0.9, 0.8, 0.8, 0.9, 1.1, 1.4, 1.8].to_vec();
        let weights = coba_weights(&[turning, falling(0.05)]);
        assert!(weights[1] > weights[0], "{weights:?}");
    }

    #[test]
    fn conflicting_gradients_are_projected_and_others_summed() {
        let (sum, cosines) = pcgrad(&[vec![1.0, 0.0], vec![0.0, 2.0]], |_| vec![0, 1]);
        assert_eq!((sum, cosines[0][1], cosines[1][1]), (vec![1.0, 2.0], Some(0.0), Some(1.0)));
        let (sum, cosines) = pcgrad(&[vec![1.0, 0.0], vec![-1.0, 1.0]], |_| vec![1, 0]);
        // (1, 0) without its part against (−1, 1) is (½, ½); (−1, 1) without its part against (1, 0) is (0, 1).
        assert_eq!(sum, [0.5, 1.5]);
        assert!((cosines[0][1].unwrap() + 0.5f64.sqrt()).abs() < 1e-12);
    }

    #[test]
    fn a_gradient_that_is_zero_or_not_finite_has_no_cosine() {
        for other in [[0.0, 0.0], [f32::INFINITY, 1.0], [f32::NAN, 1.0]] {
            let (_, cosines) = pcgrad(&[vec![1.0, 0.0], other.to_vec()], |_| vec![0, 1]);
            assert_eq!((cosines[0][0], cosines[0][1], cosines[1][1]), (Some(1.0), None, None), "{other:?}");
        }
    }

    #[test]
    fn a_loss_that_is_not_finite_weighs_no_task() {
        for loss in [f64::INFINITY, f64::NAN] {
            assert_eq!(coba_weights(&[vec![1.0, 0.9, loss], vec![1.0, 0.9, 0.8]]), [1.0, 1.0]);
        }
    }
}
