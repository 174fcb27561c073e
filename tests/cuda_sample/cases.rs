//! Thousands of random draws.

use half::bf16;

use loramux::backend::sampling::{Draw, Sampler, SamplingParams, TokenSource};

use crate::cuda_device::on_gpu;
use crate::harness::{NONE, OnDevice, Rows, assert_same, on_cpu};
use crate::random::Random;

/// One of these.
fn one<T: Clone>(random: &mut Random, of: &[T]) -> T {
    of[random.below(of.len())].clone()
}

/// Nothing, or up to `most` tokens, repeated ones and some outside the vocabulary among them.
fn tokens(random: &mut Random, vocabulary: usize, most: usize) -> Vec<u32> {
    let count = if random.below(2) == 0 { 0 } else { random.below(most + 1) };
    (0..count).map(|_| random.below(vocabulary + vocabulary / 8 + 1) as u32).collect()
}

fn logits(random: &mut Random, vocabulary: usize) -> Vec<f32> {
    let scale = one(random, &[0.0, 0.1, 3.0, 12.0, 60.0, 3e38]);
    let shift = one(random, &[0.0, 0.0, 40.0, -90.0]);
    let mut row: Vec<f32> = match random.below(3) {
        // A peak, as models have.
        0 => (0..vocabulary).map(|_| scale * random.number() * random.number().abs() + shift).collect(),
        // Ties, as bf16 has.
        1 => (0..vocabulary).map(|_| bf16::from_f32(scale * random.number()).to_f32()).collect(),
        // A few values, of which each is often.
        _ => (0..vocabulary).map(|_| (random.number() * 4.0).round() * scale / 8.0).collect(),
    };
    let masked = one(random, &[0, 0, 2, 40]);
    if masked > 0 {
        row.iter_mut().filter(|_| random.below(masked) > 0).for_each(|logit| *logit = NONE);
    }
    if random.below(16) == 0 {
        for _ in 0..=random.below(3) {
            row[random.below(vocabulary)] = one(random, &[f32::NAN, f32::INFINITY]);
        }
    }
    row
}

fn sampler(random: &mut Random, vocabulary: usize) -> Sampler {
    let penalised = random.below(2) == 0;
    let penalty = |random: &mut Random| if penalised { random.number() } else { 0.0 };
    let params = SamplingParams {
        temperature: one(random, &[0.0, 1e-30, 0.3, 0.7, 1.0, 1.0, 1.5, 100.0]),
        top_p: one(random, &[1.0, 1.0, 0.999_999, 0.95, 0.9, 0.5, 0.1, 1e-7, 1e-30]),
        top_k: one(
            random,
            &[None, None, Some(1), Some(2), Some(7), Some(50), Some(vocabulary), Some(usize::MAX)],
        ),
        min_p: one(random, &[0.0, 0.0, -0.0, 1e-30, 0.02, 0.3, 1.0]),
        presence_penalty: penalty(random),
        frequency_penalty: penalty(random),
        repetition_penalty: if penalised { one(random, &[1.0, 1.3, 0.7]) } else { 1.0 },
        logit_bias: (tokens(random, vocabulary, 20).into_iter())
            .map(|token| (token, one(random, &[100.0, -100.0, 0.5, 2.0, -3.0])))
            .collect(),
        seed: None,
    };
    let prompt = tokens(random, vocabulary, 60);
    let mut sampler = Sampler::new(&params, &prompt, random.next(), random.below(3), 40);
    tokens(random, vocabulary, 40).into_iter().for_each(|token| sampler.record(token));
    sampler
}

/// Compares `count` draws, some of which share a row.
fn compare(random: &mut Random, vocabulary: usize, count: usize) {
    let rows: Vec<Vec<f32>> = (0..count.div_ceil(2)).map(|_| logits(random, vocabulary)).collect();
    let rows = Rows::new(&rows, random.below(3));
    let samplers: Vec<Sampler> = (0..count).map(|_| sampler(random, vocabulary)).collect();
    let banned: Vec<Vec<u32>> = (0..count).map(|_| tokens(random, vocabulary, 5)).collect();
    let draws: Vec<Draw<'_>> = (samplers.iter().zip(&banned).enumerate())
        .map(|(index, (sampler, banned))| Draw {
            row: random.below(count.div_ceil(2)),
            token: match random.below(8) {
                0 => TokenSource::Given(random.below(vocabulary + vocabulary / 8 + 1) as u32),
                _ => TokenSource::Sampler { sampler, position: index, banned },
            },
            logprobs: one(random, &[None, None, Some(0), Some(1), Some(5), Some(32)]),
        })
        .collect();
    let wanted = on_cpu(&rows, &draws);
    // A thread order of its own for each batch: what an order brings to light, one of many finds.
    if !on_gpu() {
        loramux_emulator::set_seed(random.next());
    }
    let on = OnDevice::new();
    let mut work = on.work(&rows, count, 200 * count);
    let got = on.sample(&mut work, &rows, &draws).expect("draws");
    assert_same(&got, &wanted, |index| format!("vocabulary {vocabulary}, {:?}", draws[index]));
}

#[test]
fn small_vocabularies() {
    let random = &mut Random(1);
    for vocabulary in [1, 2, 3, 31, 32, 33, 40] {
        for _ in 0..8 {
            compare(random, vocabulary, 25);
        }
    }
}

#[test]
fn vocabularies_around_the_block() {
    let random = &mut Random(2);
    for vocabulary in [200, 1000, 1023, 1024, 1025, 2100] {
        for _ in 0..8 {
            compare(random, vocabulary, 25);
        }
    }
}

#[test]
fn vocabularies_of_models() {
    let random = &mut Random(3);
    for (vocabulary, count) in [(32_000, 40), (50_257, 24), (128_256, 12), (262_144, 6)] {
        compare(random, vocabulary, count);
    }
}
