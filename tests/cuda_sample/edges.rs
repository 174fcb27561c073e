//! Draws whose outcome is known, and draws that a launch has no room for.

use loramux::backend::sampling::{Draw, Drawn, Sampler, SamplingError, SamplingParams, TokenSource};

use crate::SEEDS;
use crate::cuda_device::under_thread_orders;
use crate::harness::{NONE, OnDevice, Rows, assert_same, next_tokens, on_cpu, sampler};
use crate::random::Random;

fn greedy() -> SamplingParams {
    SamplingParams { temperature: 0.0, ..SamplingParams::default() }
}

/// The outcome of one draw from one row.
fn draw(row: &[f32], sampler: &Sampler, banned: &[u32]) -> Drawn {
    let on = OnDevice::new();
    let rows = Rows::new(&[row.to_vec()], 0);
    let token = TokenSource::Sampler { sampler, position: 0, banned };
    let draws = [Draw { row: 0, token, logprobs: Some(2) }];
    let mut drawn = on.sample(&mut on.work(&rows, 1, 100), &rows, &draws).expect("a draw");
    drawn.remove(0)
}

#[test]
fn broken_logits_fail_with_the_first_token_and_its_value() {
    let drawn = |row: &[f32], params: &SamplingParams| {
        draw(row, &sampler(SamplingParams { temperature: 1.0, ..params.clone() }), &[]).token
    };
    let plain = SamplingParams::default();
    under_thread_orders(SEEDS, || {
        assert!(matches!(
            drawn(&[0.0, f32::NAN, f32::INFINITY], &plain),
            Err(SamplingError::NotFinite { token: 1, value }) if value.is_nan()
        ));
        let mut row = vec![1.0; 3000];
        row[2999] = f32::INFINITY;
        row[1500] = f32::INFINITY;
        assert_eq!(drawn(&row, &plain), Err(SamplingError::NotFinite { token: 1500, value: f32::INFINITY }));
        let biased = SamplingParams { logit_bias: vec![(1, f32::MAX)], ..SamplingParams::default() };
        assert_eq!(
            drawn(&[0.0, f32::MAX], &biased),
            Err(SamplingError::NotFinite { token: 1, value: f32::INFINITY })
        );
        assert_eq!(drawn(&[NONE; 70], &plain), Err(SamplingError::NoTokenLeft));
    });
    let banned = draw(&[1.0, 2.0], &sampler(greedy()), &[0, 1]);
    assert_eq!(banned, Drawn { token: Err(SamplingError::NoTokenLeft), logprobs: None });
}

#[test]
fn the_most_likely_token_has_the_lowest_id_and_log_probabilities_are_of_raw_logits() {
    let params = SamplingParams { logit_bias: vec![(2, 1.0), (1, -9.0)], ..greedy() };
    under_thread_orders(SEEDS, || {
        let drawn = draw(&[1.0, 2.0, 1.0, 2.0], &sampler(params.clone()), &[]);
        assert_eq!(drawn.token, Ok(2), "2.0 twice");
        let logprobs = drawn.logprobs.expect("asked for");
        let likely = 1.0f32 / (2.0 + 2.0 * (-1.0f32).exp());
        assert!((logprobs.logprob - (likely.ln() - 1.0)).abs() < 1e-5, "{logprobs:?}");
        assert_eq!(logprobs.rank, 4);
        let ids: Vec<u32> = logprobs.top.iter().map(|top| top.0).collect();
        assert_eq!(ids, [1, 3]);
        assert!(logprobs.top.iter().all(|top| (top.1 - likely.ln()).abs() < 1e-5), "{logprobs:?}");
    });
}

/// A draw changes from one of two tokens to the other between two neighbouring logits. Both backends must agree on which
/// these are: there, nothing less than equal weights gives equal tokens.
#[test]
fn draws_change_at_the_same_logit() {
    let random = &mut Random(7);
    let (mut rows, mut samplers) = (Vec::new(), Vec::new());
    for seed in 0..60 {
        let temperature = 0.3 + random.number().abs();
        let params = SamplingParams { temperature, ..SamplingParams::default() };
        let sampler = Sampler::new(&params, &[], seed, 0, 0);
        let largest = random.number();
        let second = |logit: f32| {
            let rows = Rows::new(&[vec![largest, logit]], 0);
            let token = TokenSource::Sampler { sampler: &sampler, position: 0, banned: &[] };
            on_cpu(&rows, &[Draw { row: 0, token, logprobs: None }])[0].token == Ok(1)
        };
        // The second token's weight is less than the first's: it is drawn above a random fraction of more than a half.
        let (mut low, mut high) = (largest - 20.0, largest);
        if !second(high) {
            continue;
        }
        while low.next_up() < high {
            let middle = low + (high - low) / 2.0;
            *(if second(middle) { &mut high } else { &mut low }) = middle;
        }
        let mut logit = high;
        (0..4).for_each(|_| logit = logit.next_down());
        for _ in 0..8 {
            rows.push(vec![largest, logit]);
            samplers.push(sampler.clone());
            logit = logit.next_up();
        }
    }
    let mut draws = next_tokens(&samplers, &[], 0);
    for draw in &mut draws {
        let TokenSource::Sampler { sampler, banned, .. } = draw.token else { unreachable!("as made") };
        draw.token = TokenSource::Sampler { sampler, position: 0, banned };
        draw.logprobs = None;
    }
    let rows = Rows::new(&rows, 0);
    let wanted = on_cpu(&rows, &draws);
    assert!(draws.len() > 100, "{} draws", draws.len());
    let on = OnDevice::new();
    let drawn = on.sample(&mut on.work(&rows, draws.len(), 0), &rows, &draws).expect("draws");
    assert_same(&drawn, &wanted, |index| format!("{:?}", rows.row(index)));
}

/// The largest sum there is, and a tie of everything.
#[test]
fn a_flat_row_is_cut_in_order_of_id() {
    let vocabulary = 262_144;
    let rows = Rows::new(&[vec![0.25; vocabulary]], 0);
    let on = OnDevice::new();
    for (top_k, top_p, end) in
        [(Some(1000), 1.0, 1000), (None, 0.25, vocabulary / 4), (Some(4000), 0.5, 2000)]
    {
        let params = SamplingParams { top_k, top_p, ..SamplingParams::default() };
        let samplers: Vec<Sampler> = (0..4).map(|seed| Sampler::new(&params, &[], seed, 0, 0)).collect();
        let mut draws = next_tokens(&samplers, &[], 3);
        draws.iter_mut().for_each(|draw| draw.row = 0);
        let drawn = on.sample(&mut on.work(&rows, 4, 0), &rows, &draws).expect("draws");
        assert_same(&drawn, &on_cpu(&rows, &draws), |index| format!("{top_k:?}, {top_p}, draw {index}"));
        for drawn in &drawn {
            let token = *drawn.token.as_ref().expect("a token") as usize;
            assert!(token < end, "{token} of {end} kept");
        }
        assert!(drawn.iter().any(|other| other.token != drawn[0].token), "draws differ");
    }
}

/// Promise 3: a draw gives the same alone, in any company and in any launch.
#[test]
fn a_draw_gives_the_same_alone_and_among_others() {
    let random = &mut Random(8);
    let count = 13;
    let rows: Vec<Vec<f32>> =
        (0..count).map(|_| random.floats(1500).iter().map(|logit| logit * 6.0).collect()).collect();
    let rows = Rows::new(&rows, 1);
    let params = SamplingParams {
        top_k: Some(300),
        top_p: 0.9,
        repetition_penalty: 1.2,
        logit_bias: vec![(7, 1.0)],
        ..SamplingParams::default()
    };
    let samplers: Vec<Sampler> =
        (0..count).map(|seed| Sampler::new(&params, &[1, 2, 3, 1499], seed as u64, 0, 0)).collect();
    let draws = next_tokens(&samplers, &[5], 4);
    let on = OnDevice::new();
    let wanted = on_cpu(&rows, &draws);
    // Six entries a draw: all at once, by room for draws, by room for entries, one by one, and none at all.
    for (most_draws, entries) in [(13, 78), (4, 78), (13, 20), (1, 6), (13, 5)] {
        let mut work = on.work(&rows, most_draws, entries);
        for _ in 0..2 {
            let drawn = on.sample(&mut work, &rows, &draws).expect("draws");
            assert_same(&drawn, &wanted, |index| {
                format!("draw {index} of at most {most_draws} a launch with {entries} entries")
            });
        }
    }
}

/// What there is no room for on the device is computed by the host, between draws that are not.
#[test]
fn more_alternatives_than_the_device_reports() {
    let random = &mut Random(9);
    let rows: Vec<Vec<f32>> = (0..4).map(|_| random.floats(100)).collect();
    let rows = Rows::new(&rows, 2);
    let samplers: Vec<Sampler> = (0..4).map(|_| sampler(SamplingParams::default())).collect();
    let mut draws = next_tokens(&samplers, &[], 32);
    draws[1].logprobs = Some(33);
    draws[2].logprobs = Some(usize::MAX);
    draws[3].token = TokenSource::Given(42);
    let on = OnDevice::new();
    let drawn = on.sample(&mut on.work(&rows, 4, 0), &rows, &draws).expect("draws");
    assert_same(&drawn, &on_cpu(&rows, &draws), |index| format!("draw {index}"));
    let counts: Vec<usize> = drawn.iter().map(|drawn| drawn.logprobs.as_ref().unwrap().top.len()).collect();
    assert_eq!(counts, [32, 33, 100, 32]);
}

#[test]
fn no_draws_give_nothing() {
    let on = OnDevice::new();
    let rows = Rows::new(&[vec![0.0; 3]], 0);
    assert_eq!(on.sample(&mut on.work(&rows, 2, 0), &rows, &[]).expect("nothing"), []);
}
