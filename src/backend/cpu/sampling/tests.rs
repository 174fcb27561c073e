//! What a drawn token depends on, and how often each is drawn.

use proptest::prelude::*;

use super::*;
use crate::backend::sampling::SamplingParams;

const NONE: f32 = f32::NEG_INFINITY;

fn params() -> SamplingParams {
    SamplingParams::default()
}

fn greedy() -> SamplingParams {
    SamplingParams { temperature: 0.0, ..params() }
}

fn sampler(params: &SamplingParams, prompt: &[u32]) -> Sampler {
    Sampler::new(params, prompt, 1234, 0, 100)
}

/// The next token, recorded.
fn next(
    sampler: &mut Sampler,
    logits: &[f32],
    position: usize,
    banned: &[u32],
) -> Result<u32, SamplingError> {
    let source = TokenSource::Sampler { sampler, position, banned };
    let token = sample_row(logits, &Draw { row: 0, token: source, logprobs: None }).token;
    token.inspect(|&token| sampler.record(token))
}

/// The logits as bias, ban and penalties leave them.
fn adjusted<const N: usize>(sampler: &Sampler, mut logits: [f32; N]) -> [f32; N] {
    adjust(&mut logits, sampler, &[]);
    logits
}

/// Logits with these probabilities.
fn logits_of(probabilities: &[f32]) -> Vec<f32> {
    probabilities.iter().map(|probability| probability.ln() + 3.0).collect()
}

/// How often each token is drawn at `draws` positions.
fn counts(params: &SamplingParams, logits: &[f32], draws: usize) -> Vec<usize> {
    let mut sampler = sampler(params, &[]);
    let mut counts = vec![0; logits.len()];
    for position in 0..draws {
        counts[next(&mut sampler, logits, position, &[]).unwrap() as usize] += 1;
    }
    counts
}

/// The tokens that are ever drawn.
fn survivors(params: &SamplingParams, logits: &[f32]) -> Vec<usize> {
    let counts = counts(params, logits, 2000);
    (0..counts.len()).filter(|&token| counts[token] > 0).collect()
}

/// Pearson's statistic of counts against expected probabilities.
fn chi_square(counts: &[usize], probabilities: &[f64]) -> f64 {
    let draws: usize = counts.iter().sum();
    let terms = counts.iter().zip(probabilities).filter(|&(_, &p)| p > 0.0).map(|(&count, p)| {
        let expected = draws as f64 * p;
        (count as f64 - expected).powi(2) / expected
    });
    terms.sum()
}

#[test]
fn greedy_takes_the_largest_logit_and_the_lowest_id_on_a_tie() {
    let mut greedy = sampler(&greedy(), &[]);
    assert_eq!(next(&mut greedy, &[0.0, 3.0, -1.0, 3.0, 2.0], 0, &[]), Ok(1));
    assert_eq!(next(&mut greedy, &[-0.0, 0.0, NONE, -1.0, -1.0], 1, &[]), Ok(0));
    let mut one = sampler(&SamplingParams { top_k: Some(1), ..params() }, &[]);
    assert_eq!(next(&mut one, &[1.0, 2.0, 2.0], 0, &[]), Ok(1), "top_k = 1 is greedy, ties included");
}

#[test]
fn plain_sampling_follows_the_softmax() {
    let probabilities = [0.05, 0.4, 0.0, 0.25, 0.2, 0.1];
    let logits = logits_of(&probabilities);
    let counts = counts(&params(), &logits, 20_000);
    assert_eq!(counts[2], 0, "a token of probability zero is never drawn");
    // 99.9 % of true samples stay below 18.5 with 4 degrees of freedom.
    let statistic = chi_square(&counts, &probabilities.map(f64::from));
    assert!(statistic < 18.5, "{counts:?}: {statistic}");
}

#[test]
fn temperature_raises_probabilities_to_its_inverse() {
    let logits = logits_of(&[0.1, 0.2, 0.3, 0.4]);
    for temperature in [0.5, 2.0] {
        let powers = [0.1f64, 0.2, 0.3, 0.4].map(|p| p.powf(1.0 / f64::from(temperature)));
        let expected = powers.map(|power| power / powers.iter().sum::<f64>());
        let counts = counts(&SamplingParams { temperature, ..params() }, &logits, 20_000);
        let statistic = chi_square(&counts, &expected);
        assert!(statistic < 16.3, "temperature {temperature}: {counts:?}: {statistic}");
    }
    let coldest = SamplingParams { temperature: f32::MIN_POSITIVE, ..params() };
    assert_eq!(survivors(&coldest, &[1.0, 1.5, 1.5, 0.0]), [1, 2]);
}

#[test]
fn filtered_sampling_follows_the_softmax_of_what_is_kept() {
    let logits = logits_of(&[0.1, 0.4, 0.05, 0.3, 0.15]);
    let counts = counts(&SamplingParams { top_k: Some(3), ..params() }, &logits, 20_000);
    let statistic = chi_square(&counts, &[0.0, 0.4 / 0.85, 0.0, 0.3 / 0.85, 0.15 / 0.85]);
    assert_eq!((counts[0], counts[2]), (0, 0));
    assert!(statistic < 13.8, "{counts:?}: {statistic}");
}

#[test]
fn top_k_keeps_exactly_the_k_most_likely() {
    let logits = logits_of(&[0.1, 0.3, 0.2, 0.2, 0.15, 0.05]);
    let kept = |k| survivors(&SamplingParams { top_k: Some(k), ..params() }, &logits);
    assert_eq!(kept(1), [1]);
    assert_eq!(kept(2), [1, 2], "the lower id of a tie comes first");
    assert_eq!(kept(3), [1, 2, 3]);
    assert_eq!(kept(4), [1, 2, 3, 4]);
    assert_eq!(kept(6), [0, 1, 2, 3, 4, 5]);
    assert_eq!(kept(usize::MAX), [0, 1, 2, 3, 4, 5]);
}

#[test]
fn top_p_keeps_the_fewest_tokens_that_reach_it() {
    let logits = logits_of(&[0.1, 0.35, 0.2, 0.2, 0.15]);
    let kept = |top_p| survivors(&SamplingParams { top_p, ..params() }, &logits);
    assert_eq!(kept(1e-6), [1], "one token always stays");
    assert_eq!(kept(0.34), [1]);
    assert_eq!(kept(0.36), [1, 2]);
    assert_eq!(kept(0.54), [1, 2]);
    assert_eq!(kept(0.56), [1, 2, 3]);
    assert_eq!(kept(0.76), [1, 2, 3, 4]);
    assert_eq!(kept(0.91), [0, 1, 2, 3, 4]);
    assert_eq!(kept(1.0), [0, 1, 2, 3, 4]);
}

#[test]
fn min_p_keeps_tokens_relative_to_the_most_likely() {
    let logits = logits_of(&[0.4, 0.3, 0.19, 0.11]);
    let kept = |min_p| survivors(&SamplingParams { min_p, ..params() }, &logits);
    assert_eq!(kept(0.0), [0, 1, 2, 3]);
    assert_eq!(kept(0.27), [0, 1, 2, 3]);
    assert_eq!(kept(0.28), [0, 1, 2]);
    assert_eq!(kept(0.74), [0, 1]);
    assert_eq!(kept(0.76), [0]);
    assert_eq!(kept(1.0), [0]);
}

#[test]
fn top_p_looks_at_what_min_p_and_top_k_left() {
    // Of 0.4 and 0.3, the first alone has 4/7 = 0.571 of the probability that is left.
    let logits = logits_of(&[0.4, 0.3, 0.19, 0.11]);
    let kept = |top_p, top_k, min_p| survivors(&SamplingParams { top_p, top_k, min_p, ..params() }, &logits);
    assert_eq!(kept(0.56, Some(2), 0.0), [0]);
    assert_eq!(kept(0.58, Some(2), 0.0), [0, 1]);
    assert_eq!(kept(0.56, None, 0.6), [0]);
    assert_eq!(kept(0.56, None, 0.0), [0, 1]);
}

#[test]
fn a_draw_depends_on_seed_choice_and_position_alone() {
    let logits: Vec<f32> = (0..500).map(|token| (token as f32 * 0.7).sin()).collect();
    let draw = |seed, choice, position| {
        next(&mut Sampler::new(&params(), &[], seed, choice, 1), &logits, position, &[]).unwrap()
    };
    let mut running = Sampler::new(&params(), &[], 42, 3, 50);
    let run: Vec<u32> = (0..50).map(|p| next(&mut running, &logits, p, &[]).unwrap()).collect();
    // From a fresh sampler and in another order.
    let single: Vec<u32> = (0..50).rev().map(|position| draw(42, 3, position)).collect();
    assert!(run.iter().eq(single.iter().rev()));
    for (seed, choice) in [(43, 3), (42, 4), (42 | 1 << 40, 3)] {
        let other: Vec<u32> = (0..50).map(|position| draw(seed, choice, position)).collect();
        assert!(run.iter().zip(&other).filter(|(a, b)| a == b).count() < 10, "seed {seed}, choice {choice}");
    }
}

#[test]
fn bias_is_added_and_may_be_repeated() {
    let biased = SamplingParams { logit_bias: vec![(2, 1.5), (2, 1.0), (0, -4.0), (99, 5.0)], ..greedy() };
    let mut sampler = sampler(&biased, &[]);
    let logits = [5.0, 2.0, 0.0, 0.0];
    assert_eq!(adjusted(&sampler, logits), [1.0, 2.0, 2.5, 0.0]);
    assert_eq!(next(&mut sampler, &logits, 0, &[]), Ok(2));
}

#[test]
fn banned_tokens_are_never_drawn_whatever_their_bias() {
    let biased = SamplingParams { logit_bias: vec![(1, 100.0)], ..greedy() };
    let mut sampler = sampler(&biased, &[]);
    let logits = [0.0, 1.0, 0.5];
    assert_eq!(next(&mut sampler, &logits, 0, &[1, 77]), Ok(2));
    assert_eq!(next(&mut sampler, &logits, 1, &[]), Ok(1));
    assert_eq!(next(&mut sampler, &logits, 2, &[0, 1, 2]), Err(SamplingError::NoTokenLeft));
}

#[test]
fn repetition_penalty_scales_logits_of_prompt_and_output() {
    let penalised = SamplingParams { repetition_penalty: 2.0, ..greedy() };
    let mut sampler = sampler(&penalised, &[0, 0, 1, 900]);
    let logits = [3.0, -3.0, 2.0, -1.0];
    assert_eq!(adjusted(&sampler, logits), [1.5, -6.0, 2.0, -1.0]);
    assert_eq!(next(&mut sampler, &logits, 0, &[]), Ok(2));
    assert_eq!(adjusted(&sampler, logits), [1.5, -6.0, 1.0, -1.0]);
    assert_eq!(next(&mut sampler, &logits, 1, &[]), Ok(0));
}

#[test]
fn presence_and_frequency_penalties_count_the_output_only() {
    let penalised = SamplingParams { presence_penalty: 0.5, frequency_penalty: 0.25, ..greedy() };
    let mut sampler = sampler(&penalised, &[0, 1, 1]);
    let expected = [[4.0, 3.5, 0.0], [3.25, 3.5, 0.0], [3.25, 2.75, 0.0], [3.0, 2.75, 0.0]];
    for (position, (expected, token)) in expected.into_iter().zip([0, 1, 0, 0]).enumerate() {
        let logits = [4.0, 3.5, 0.0];
        assert_eq!(adjusted(&sampler, logits), expected, "position {position}");
        assert_eq!(next(&mut sampler, &logits, position, &[]), Ok(token));
    }
}

#[test]
fn repetition_comes_before_the_other_penalties() {
    let penalised =
        SamplingParams { repetition_penalty: 2.0, presence_penalty: 1.0, frequency_penalty: 0.5, ..greedy() };
    let mut sampler = sampler(&penalised, &[]);
    next(&mut sampler, &[4.0, 0.0], 0, &[]).unwrap();
    assert_eq!(adjusted(&sampler, [4.0, 0.0]), [0.5, 0.0]);
}

#[test]
fn broken_logits_fail_with_the_token_and_value() {
    for params in [greedy(), params()] {
        let mut sampler = sampler(&params, &[]);
        assert!(matches!(
            next(&mut sampler, &[0.0, f32::NAN, f32::INFINITY], 0, &[]),
            Err(SamplingError::NotFinite { token: 1, value }) if value.is_nan()
        ));
        assert_eq!(
            next(&mut sampler, &[0.0, 0.0, f32::INFINITY], 0, &[]),
            Err(SamplingError::NotFinite { token: 2, value: f32::INFINITY })
        );
        assert_eq!(next(&mut sampler, &[NONE; 3], 0, &[]), Err(SamplingError::NoTokenLeft));
        assert_eq!(next(&mut sampler, &[], 0, &[]), Err(SamplingError::NoTokenLeft));
        assert_eq!(next(&mut sampler, &[NONE, NONE, -7.0], 0, &[]), Ok(2), "the sampler still works");
    }
}

/// Promise 3: with or without threads, a row gives what it gives alone.
#[test]
fn a_row_gives_the_same_alone_and_among_others() {
    let width = 5000;
    let data: Vec<f32> = (0..8 * width).map(|i| (i as f32 * 0.37).sin() * 4.0).collect();
    let logits = Buffer { data, width };
    let params = SamplingParams { top_k: Some(40), top_p: 0.9, ..params() };
    let samplers: Vec<Sampler> = (0..8).map(|seed| Sampler::new(&params, &[], seed, 0, 1)).collect();
    let mut draws: Vec<Draw<'_>> = (samplers.iter().enumerate())
        .map(|(row, sampler)| Draw {
            row,
            token: TokenSource::Sampler { sampler, position: 0, banned: &[] },
            logprobs: Some(3),
        })
        .collect();
    draws.push(Draw { row: 3, token: TokenSource::Given(17), logprobs: Some(2) });
    draws.push(Draw { row: 3, token: TokenSource::Given(17), logprobs: None });
    assert!(pays(draws.len() * width * WORK), "the draws go to several threads");
    let mut drawn = Vec::new();
    sample(&logits, &draws, &mut drawn);
    assert_eq!(drawn.len(), draws.len());
    for (draw, drawn) in draws.iter().zip(&drawn) {
        assert_eq!(*drawn, sample_row(&logits.data[draw.row * width..][..width], draw));
    }
    assert_eq!(
        drawn[8].logprobs.as_ref().map(|logprobs| (logprobs.token, logprobs.top.len())),
        Some((17, 2))
    );
    assert_eq!(drawn[9], Drawn { token: Ok(17), logprobs: None });
}

/// What the filters keep, by sorting.
fn kept_by_sorting(weights: &[f32], params: &SamplingParams) -> Vec<u32> {
    let mut order: Vec<u32> = (0..weights.len() as u32).filter(|&t| weights[t as usize] > 0.0).collect();
    order.retain(|&token| weights[token as usize] >= params.min_p);
    order.sort_by(|&a, &b| weights[b as usize].total_cmp(&weights[a as usize]).then(a.cmp(&b)));
    order.truncate(params.top_k.unwrap_or(usize::MAX));
    let total: f64 = order.iter().map(|&token| f64::from(weights[token as usize])).sum();
    let mut reached = 0.0;
    let mut kept = Vec::new();
    for token in order {
        if reached >= total * f64::from(params.top_p) {
            break;
        }
        reached += f64::from(weights[token as usize]);
        kept.push(token);
    }
    kept.sort();
    kept
}

proptest! {
    /// Weights are multiples of 1/64 or powers of two, so that both ways of summing them are exact.
    #[test]
    fn filters_keep_what_sorting_keeps(
        coarse in prop::collection::vec(0u8..=64, 1..200),
        tiny in prop::collection::vec(0i32..=40, 0..50),
        top_k in prop::option::of(1usize..250),
        top_p in (1u32..=256).prop_map(|part| part as f32 / 256.0),
        min_p in prop::sample::select(vec![0.0f32, 0.015625, 0.1, 0.5, 1.0]),
    ) {
        let mut weights: Vec<f32> = coarse.iter().map(|&part| f32::from(part) / 64.0).collect();
        weights.extend(tiny.iter().map(|&power| 0.5f32.powi(power)));
        weights[0] = 1.0;
        let params = SamplingParams { top_k, top_p, min_p, ..params() };
        let expected = kept_by_sorting(&weights, &params);
        filter::apply(&sampler(&params, &[]), &mut weights, &mut Buckets::default());
        let kept: Vec<u32> = (0..weights.len() as u32).filter(|&t| weights[t as usize] > 0.0).collect();
        prop_assert_eq!(kept, expected);
    }

    #[test]
    fn any_row_of_floats_gives_an_allowed_token_or_an_error(
        bits in prop::collection::vec(any::<u32>(), 0..40),
        temperature in prop::sample::select(vec![0.0f32, 1e-30, 0.7, 1.0, 2.0]),
        top_k in prop::option::of(0usize..50),
        top_p in 0.001f32..=1.0,
        repetition_penalty in 0.01f32..3.0,
        seed in any::<u64>(),
    ) {
        let row: Vec<f32> = bits.iter().map(|&bits| f32::from_bits(bits)).collect();
        let params = SamplingParams { temperature, top_k, top_p, repetition_penalty, ..params() };
        let mut sampler = Sampler::new(&params, &[0, 3, u32::MAX], seed, 0, 3);
        for position in 0..3 {
            if let Ok(token) = next(&mut sampler, &row, position, &[1]) {
                prop_assert!(token != 1 && row[token as usize].is_finite());
            }
        }
        let logprobs = logprobs::token_logprobs(&row, 2, 5);
        prop_assert!(logprobs.logprob <= 1e-6 && logprobs.top.iter().all(|&(_, logprob)| logprob <= 1e-6));
    }
}
