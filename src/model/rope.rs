//! Rotary position embedding: the table of angles.
//!
//! A head's first `rotary_dim` channels are rotated in pairs `(i, i + rotary_dim/2)` by `position · inv_freq[i]`:
//!
//! ```text
//! inv_freq[i] = theta^(−2i / rotary_dim)                       (Su et al. 2021)
//! x'[i]       = x[i] · cos − x[i + rotary_dim/2] · sin
//! x'[i + rotary_dim/2] = x[i + rotary_dim/2] · cos + x[i] · sin
//! ```
//!
//! The other types stretch a model to contexts longer than it was trained on by lowering frequencies: all of them
//! (`linear`), those whose wavelength exceeds the trained context (`llama3`, and `yarn`, Peng et al. 2023), or each
//! by its own searched factor (`longrope`, Ding et al. 2024). Some also scale cos and sin, which scales the
//! attention logits. The arithmetic is in f32 where Hugging Face transformers computes in f32, and in f64 where it
//! uses Python numbers, so that the tables agree to the last bits.

use std::f64::consts::PI;

use crate::backend::RotaryTables;

/// Rope settings of one model, validated.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeConfig {
    /// Base of the geometric row of wavelengths; above 1.
    pub theta: f64,
    /// Part of a head's channels that rotate, in (0, 1].
    pub partial_rotary_factor: f64,
    pub scaling: RopeScaling,
}

/// How frequencies are stretched beyond the context a model was first trained on.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    Default,
    /// Every frequency divided by `factor`.
    Linear { factor: f64 },
    /// Frequencies of wavelengths above `original_positions / low_freq_factor` divided by `factor`, those below
    /// `original_positions / high_freq_factor` kept, a smooth passage between.
    Llama3 { factor: f64, low_freq_factor: f64, high_freq_factor: f64, original_positions: usize },
    /// Between dimensions that turn `beta_fast` and `beta_slow` times within `original_positions`, a linear ramp
    /// from kept frequencies to frequencies divided by `factor`.
    Yarn {
        factor: f64,
        beta_fast: f64,
        beta_slow: f64,
        /// Round the ramp's ends outwards to whole dimensions.
        truncate: bool,
        original_positions: usize,
        /// Multiplies cos and sin.
        attention_factor: f64,
    },
    /// Each frequency divided by its own factor: `short` for sequences up to `original_positions`, `long` beyond.
    /// Both have `rotary_dim / 2` entries.
    LongRope { short: Vec<f64>, long: Vec<f64>, original_positions: usize, attention_factor: f64 },
}

impl RopeConfig {
    /// Channels of a head that rotate, from the start.
    pub fn rotary_dim(&self, head_dim: usize) -> usize {
        (head_dim as f64 * self.partial_rotary_factor) as usize
    }

    /// How many tables there are to choose from by sequence length: 2 for `longrope`, else 1.
    pub fn variants(&self) -> usize {
        match self.scaling {
            RopeScaling::LongRope { .. } => 2,
            _ => 1,
        }
    }

    /// The table for a sequence of this many tokens, all positions of which use the same one.
    ///
    /// A sequence that grows past the limit switches tables for all its positions, so its cached keys no longer
    /// fit: they have to be computed again.
    pub fn variant_for(&self, sequence_length: usize) -> usize {
        match &self.scaling {
            RopeScaling::LongRope { original_positions, .. } => {
                usize::from(sequence_length > *original_positions)
            }
            _ => 0,
        }
    }

    /// What cos and sin are multiplied by.
    pub fn attention_factor(&self) -> f64 {
        match self.scaling {
            RopeScaling::Yarn { attention_factor, .. } | RopeScaling::LongRope { attention_factor, .. } => {
                attention_factor
            }
            _ => 1.0,
        }
    }

    /// Radians per position, `[rotary_dim / 2]`.
    ///
    /// # Panics
    /// When `variant` is not below [`Self::variants`], or a `longrope` factor list is not `rotary_dim / 2` long
    /// (a [`super::ModelConfig`] has checked that).
    pub fn inverse_frequencies(&self, rotary_dim: usize, variant: usize) -> Vec<f32> {
        assert!(variant < self.variants(), "rope variant {variant} of {}", self.variants());
        let theta = self.theta as f32;
        let periods: Vec<f32> =
            (0..rotary_dim).step_by(2).map(|i| theta.powf(i as f32 / rotary_dim as f32)).collect();
        let unscaled = periods.iter().map(|period| 1.0 / period);
        match &self.scaling {
            RopeScaling::Default => unscaled.collect(),
            RopeScaling::Linear { factor } => unscaled.map(|frequency| frequency / *factor as f32).collect(),
            &RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_positions } => {
                let stretch =
                    Llama3Stretch::new(factor, low_freq_factor, high_freq_factor, original_positions);
                unscaled.map(|frequency| stretch.apply(frequency)).collect()
            }
            &RopeScaling::Yarn { factor, beta_fast, beta_slow, truncate, original_positions, .. } => {
                // The dimension that turns `rotations` times within the original context.
                let dimension = |rotations: f64| {
                    rotary_dim as f64 * (original_positions as f64 / (rotations * 2.0 * PI)).ln()
                        / (2.0 * self.theta.ln())
                };
                let (mut low, mut high) = (dimension(beta_fast), dimension(beta_slow));
                if truncate {
                    (low, high) = (low.floor(), high.ceil());
                }
                let (low, mut high) = (low.max(0.0), high.min(rotary_dim as f64 - 1.0));
                if low == high {
                    high += 0.001;
                }
                let interpolated_share =
                    |i: usize| ((i as f32 - low as f32) / (high - low) as f32).clamp(0.0, 1.0);
                let blend = |(i, period): (usize, &f32)| {
                    let kept_share = 1.0 - interpolated_share(i);
                    1.0 / (factor as f32 * period) * (1.0 - kept_share) + 1.0 / period * kept_share
                };
                periods.iter().enumerate().map(blend).collect()
            }
            RopeScaling::LongRope { short, long, .. } => {
                let factors = if variant == 0 { short } else { long };
                assert_eq!(factors.len(), periods.len(), "longrope factors for rotary_dim {rotary_dim}");
                periods.iter().zip(factors).map(|(period, &factor)| 1.0 / (factor as f32 * period)).collect()
            }
        }
    }
}

/// The `llama3` rule for one frequency.
struct Llama3Stretch {
    factor: f32,
    low_freq_factor: f32,
    band: f32,
    original_positions: f32,
    longest_kept: f32,
    shortest_divided: f32,
}

impl Llama3Stretch {
    fn new(factor: f64, low_freq_factor: f64, high_freq_factor: f64, original_positions: usize) -> Self {
        let original = original_positions as f64;
        Self {
            factor: factor as f32,
            low_freq_factor: low_freq_factor as f32,
            band: (high_freq_factor - low_freq_factor) as f32,
            original_positions: original as f32,
            longest_kept: (original / high_freq_factor) as f32,
            shortest_divided: (original / low_freq_factor) as f32,
        }
    }

    fn apply(&self, frequency: f32) -> f32 {
        let wavelength = (2.0 * PI) as f32 / frequency;
        if wavelength > self.shortest_divided {
            frequency / self.factor
        } else if wavelength < self.longest_kept {
            frequency
        } else {
            let kept_share = (self.original_positions / wavelength - self.low_freq_factor) / self.band;
            (1.0 - kept_share) * frequency / self.factor + kept_share * frequency
        }
    }
}

impl RopeConfig {
    /// Tables for positions `0..positions`, one pair per variant, times the attention factor.
    ///
    /// # Panics
    /// As [`RopeConfig::inverse_frequencies`].
    pub fn tables(&self, rotary_dim: usize, positions: usize) -> RotaryTables {
        let attention_factor = self.attention_factor() as f32;
        let table = |variant, function: fn(f32) -> f32| {
            let frequencies = self.inverse_frequencies(rotary_dim, variant);
            (0..positions)
                .flat_map(|position| frequencies.iter().map(move |frequency| position as f32 * frequency))
                .map(|angle| function(angle) * attention_factor)
                .collect()
        };
        let variants = 0..self.variants();
        RotaryTables {
            rotary_dim,
            cos: variants.clone().map(|variant| table(variant, f32::cos)).collect(),
            sin: variants.map(|variant| table(variant, f32::sin)).collect(),
        }
    }
}

#[cfg(test)]
mod tests;
