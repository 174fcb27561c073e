//! Learning rates over a job's steps.

use super::config::{OptimizerConfig, Schedule, Warmup};

impl OptimizerConfig {
    /// Steps of warmup in a job of `total` steps.
    pub fn warmup_steps(&self, total: u64) -> u64 {
        match self.warmup {
            Warmup::Steps(steps) => steps.min(total),
            Warmup::Ratio(ratio) => (ratio * total as f64).round() as u64,
        }
    }

    /// The learning rate of step `step` (from 1) of `total`.
    ///
    /// With `W` steps of warmup it is `lr · t / W` up to step `W`; the step after that has the full rate, and the decay
    /// is such that the first rate of 0 would be that of step `total + 1`.
    pub fn lr_at(&self, step: u64, total: u64) -> f64 {
        let warmup = self.warmup_steps(total);
        if step <= warmup {
            return self.lr * step as f64 / warmup as f64;
        }
        let done = (step - 1 - warmup) as f64 / (total - warmup).max(1) as f64;
        self.lr
            * match self.schedule {
                Schedule::Constant => 1.0,
                Schedule::Linear => (1.0 - done).max(0.0),
                Schedule::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * done.min(1.0)).cos()),
            }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn optimizer(schedule: Schedule, warmup: Warmup) -> OptimizerConfig {
        OptimizerConfig {
            lr: 2.0,
            lr_b_ratio: 1.0,
            weight_decay: 0.0,
            betas: [0.9, 0.999],
            eps: 1e-8,
            schedule,
            warmup,
            max_grad_norm: 0.0,
        }
    }

    #[test]
    fn a_constant_rate_is_constant_from_the_first_step() {
        let constant = optimizer(Schedule::Constant, Warmup::Steps(0));
        assert!((1..=9).all(|step| constant.lr_at(step, 9) == 2.0));
    }

    #[test]
    fn warmup_rises_to_the_peak_and_the_decay_starts_there() {
        for schedule in [Schedule::Constant, Schedule::Linear, Schedule::Cosine] {
            let rates = optimizer(schedule, Warmup::Steps(4));
            assert_eq!([1, 2, 3, 4].map(|step| rates.lr_at(step, 12)), [0.5, 1.0, 1.5, 2.0]);
            assert_eq!(rates.lr_at(5, 12), 2.0);
        }
    }

    #[test]
    fn decays_end_above_zero_and_would_reach_it_next() {
        let linear = optimizer(Schedule::Linear, Warmup::Ratio(0.2));
        assert_eq!(linear.warmup_steps(10), 2);
        assert_eq!([3, 7, 10].map(|step| linear.lr_at(step, 10)), [2.0, 1.0, 0.25]);
        assert_eq!(linear.lr_at(11, 10), 0.0);
        let cosine = optimizer(Schedule::Cosine, Warmup::Steps(0));
        assert!((cosine.lr_at(6, 10) - 1.0).abs() < 1e-12, "half of the way, half of the rate");
        assert!(cosine.lr_at(10, 10) > 0.0 && cosine.lr_at(11, 10) < 1e-12);
    }

    #[test]
    fn a_job_shorter_than_its_warmup_only_rises() {
        let rates = optimizer(Schedule::Linear, Warmup::Steps(100));
        assert_eq!([1, 2, 3].map(|step| rates.lr_at(step, 4)), [0.5, 1.0, 1.5]);
    }
}
