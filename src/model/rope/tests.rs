//! The expected frequencies were worked out in f64 from the papers' formulas, outside this crate.

use super::*;

fn config(theta: f64, scaling: RopeScaling) -> RopeConfig {
    RopeConfig { theta, partial_rotary_factor: 1.0, scaling }
}

fn assert_close(found: f64, wanted: f64, tolerance: f64, what: &str) {
    assert!((found - wanted).abs() <= tolerance, "{what}: found {found}, wanted {wanted}");
}

/// Relative agreement of some of the frequencies.
fn assert_frequencies(config: &RopeConfig, rotary_dim: usize, variant: usize, wanted: &[(usize, f64)]) {
    let frequencies = config.inverse_frequencies(rotary_dim, variant);
    assert_eq!(frequencies.len(), rotary_dim / 2);
    for &(i, wanted) in wanted {
        assert_close(f64::from(frequencies[i]) / wanted, 1.0, 5e-7, &format!("inv_freq[{i}]"));
    }
}

/// Both tables against f64 angles of the given f64 frequencies.
fn assert_tables(config: &RopeConfig, rotary_dim: usize, variant: usize, frequencies: &[f64], factor: f64) {
    let positions = 48;
    let tables = config.tables(rotary_dim, positions);
    assert_eq!(tables.cos[variant].len(), positions * frequencies.len());
    assert_eq!(tables.sin[variant].len(), positions * frequencies.len());
    for position in 0..positions {
        for (i, frequency) in frequencies.iter().enumerate() {
            let angle = position as f64 * frequency;
            let at = position * frequencies.len() + i;
            // One unit in the last place of an angle of 48 is 4e-6.
            let tolerance = 1e-6_f64.max(angle * 2.5e-7);
            let what = format!("position {position}, pair {i}");
            assert_close(f64::from(tables.cos[variant][at]), angle.cos() * factor, tolerance, &what);
            assert_close(f64::from(tables.sin[variant][at]), angle.sin() * factor, tolerance, &what);
        }
    }
}

fn plain_frequencies(theta: f64, rotary_dim: usize) -> Vec<f64> {
    (0..rotary_dim / 2).map(|i| theta.powf(-2.0 * i as f64 / rotary_dim as f64)).collect()
}

#[test]
fn default_tables_follow_the_formula() {
    let config = config(10_000.0, RopeScaling::Default);
    let known = [(0, 1.0), (1, 0.825404185), (24, 0.01), (47, 0.000121152766)];
    assert_frequencies(&config, 96, 0, &known);
    assert_tables(&config, 96, 0, &plain_frequencies(10_000.0, 96), 1.0);
    assert_eq!((config.variants(), config.variant_for(1 << 20)), (1, 0));
}

#[test]
fn linear_divides_every_frequency() {
    let config = config(10_000.0, RopeScaling::Linear { factor: 2.5 });
    let frequencies: Vec<f64> = plain_frequencies(10_000.0, 64).iter().map(|f| f / 2.5).collect();
    assert_tables(&config, 64, 0, &frequencies, 1.0);
}

#[test]
fn llama3_keeps_short_wavelengths_and_divides_long_ones() {
    let scaling = |original_positions| RopeScaling::Llama3 {
        factor: 8.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_positions,
    };
    let known = [
        (0, 1.0),
        (1, 0.814617234),
        (20, 0.0165604401),
        (28, 0.00321144599),
        (30, 0.00137189357),
        (33, 0.00031269375),
        (35, 9.55621235e-05),
        (36, 7.78465527e-05),
        (48, 6.64786987e-06),
        (63, 3.06892599e-07),
    ];
    assert_frequencies(&config(500_000.0, scaling(8192)), 128, 0, &known);
    let small = [
        1.0,
        0.155575518,
        0.00835925381,
        0.00216170418,
        0.000559016994,
        0.000144561871,
        3.73837195e-05,
        9.66743497e-06,
    ];
    assert_tables(&config(50_000.0, scaling(64)), 16, 0, &small, 1.0);
}

#[test]
fn yarn_ramps_between_kept_and_divided_frequencies() {
    let attention_factor = 1.138629436111989;
    let yarn = |factor, original_positions, truncate| RopeScaling::Yarn {
        factor,
        beta_fast: 32.0,
        beta_slow: 1.0,
        truncate,
        original_positions,
        attention_factor,
    };
    let truncated = [
        (0, 1.0),
        (1, 0.805842188),
        (20, 0.0133352143),
        (24, 0.00537532149),
        (30, 0.00106436098),
        (36, 0.000179841156),
        (40, 4.44569853e-05),
        (45, 1.51074098e-05),
        (63, 3.1023444e-07),
    ];
    let config_4 = config(1e6, yarn(4.0, 32_768, true));
    assert_frequencies(&config_4, 128, 0, &truncated);
    let exact = [
        (0, 1.0),
        (8, 0.1),
        (12, 0.0278613169),
        (16, 0.0056962144),
        (20, 0.000816470623),
        (24, 6.25e-05),
        (31, 8.33450895e-06),
    ];
    assert_frequencies(&config(1e4, yarn(16.0, 4096, false)), 64, 0, &exact);
    let tables = config_4.tables(128, 2);
    assert_close(f64::from(tables.cos[0][0]), attention_factor, 1e-6, "cos 0 is the attention factor");
    assert_close(f64::from(tables.sin[0][64]), 1f64.sin() * attention_factor, 1e-6, "sin 1");
}

#[test]
fn yarn_stays_finite_where_its_ramp_has_no_length() {
    let scaling = RopeScaling::Yarn {
        factor: 2.0,
        beta_fast: 1.0,
        beta_slow: 1.0,
        truncate: false,
        original_positions: 64,
        attention_factor: 1.0,
    };
    let frequencies = config(10_000.0, scaling).inverse_frequencies(8, 0);
    assert!(frequencies.iter().all(|frequency| frequency.is_finite()), "{frequencies:?}");
}

#[test]
fn longrope_changes_tables_past_the_original_length() {
    let short = vec![1.0, 1.25, 1.5, 2.0];
    let long = vec![1.0, 4.0, 8.0, 32.0];
    let attention_factor = 1.1902380714238083;
    let scaling = RopeScaling::LongRope {
        short: short.clone(),
        long: long.clone(),
        original_positions: 4096,
        attention_factor,
    };
    let config = config(10_000.0, scaling);
    assert_eq!(config.variants(), 2);
    assert_eq!([1, 4096, 4097, 100_000].map(|length| config.variant_for(length)), [0, 0, 1, 1]);
    for (variant, factors) in [short, long].iter().enumerate() {
        let frequencies: Vec<f64> =
            plain_frequencies(10_000.0, 8).iter().zip(factors).map(|(f, factor)| f / factor).collect();
        assert_tables(&config, 8, variant, &frequencies, attention_factor);
    }
}

#[test]
fn a_part_of_the_head_rotates_as_python_truncates() {
    let partial =
        |factor| RopeConfig { theta: 10_000.0, partial_rotary_factor: factor, scaling: RopeScaling::Default };
    assert_eq!(partial(0.75).rotary_dim(128), 96);
    assert_eq!(partial(0.4).rotary_dim(80), 32);
    assert_eq!(partial(1.0).rotary_dim(24), 24);
    assert_eq!(partial(0.3).rotary_dim(96), 28);
}
