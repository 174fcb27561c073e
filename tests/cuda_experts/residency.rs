//! Who is on the device: the experts used last, and whoever is kept.

use std::collections::HashMap;

use loramux::backend::cuda::CudaError;

use crate::cuda_device::on_gpu;
use crate::fixture::{Adapter, Fixture, sites};
use crate::random::Random;

const NOBODY: [u32; 0] = [];

/// `count` experts of one rank everywhere, staged as 1, 2, …
fn staged(fixture: &mut Fixture, random: &mut Random, rank: usize, count: u32) {
    for number in 1..=count {
        fixture.stage(number, &Adapter::of_rank(random, rank));
    }
}

#[test]
fn the_expert_used_longest_ago_goes_first() {
    let random = &mut Random(1);
    let mut fixture = Fixture::new(3, 12);
    staged(&mut fixture, random, 16, 6);
    for number in [1, 2, 3] {
        fixture.bring_and_wait(&[number], &[]);
    }
    assert_eq!(fixture.bring(&[1], &[]), Ok(true), "used again");
    fixture.bring_and_wait(&[4], &[]);
    assert_eq!(fixture.ready(1..=6), [1, 3, 4]);
    // Kept experts count as used.
    assert_eq!(fixture.bring(&[4], &[3]), Ok(true));
    fixture.bring_and_wait(&[5], &[]);
    assert_eq!(fixture.ready(1..=6), [3, 4, 5]);
    // A larger set takes as many seats as it needs.
    fixture.bring_and_wait(&[6, 1], &[]);
    assert_eq!(fixture.ready(1..=6), [1, 5, 6]);
}

#[test]
fn kept_experts_stay() {
    let random = &mut Random(2);
    let mut fixture = Fixture::new(2, 8);
    staged(&mut fixture, random, 16, 4);
    fixture.bring_and_wait(&[1, 2], &[]);
    let before = fixture.memory.stats();
    assert_eq!(fixture.bring(&[3], &[1, 2]), Ok(false), "no room beside them");
    assert_eq!(fixture.memory.stats(), before);
    assert_eq!(fixture.ready(1..=4), [1, 2]);
    // Wanted experts keep each other, too.
    assert_eq!(fixture.bring(&[1, 3], &[2]), Ok(false));
    assert_eq!(fixture.ready(1..=4), [1, 2]);
    fixture.bring_and_wait(&[3], &[1]);
    assert_eq!(fixture.ready(1..=4), [1, 3]);
    assert_eq!(fixture.bring(&[3], &[1]), Ok(true));
}

#[test]
fn chunks_run_out_before_seats_do() {
    let random = &mut Random(3);
    let mut fixture = Fixture::new(8, 5);
    staged(&mut fixture, random, 32, 4);
    fixture.stage(9, &Adapter::of_bias(random));
    fixture.bring_and_wait(&[1, 2], &[]);
    assert_eq!(fixture.memory.stats().resident, 2);
    // One that needs no chunks fits where another does not.
    assert_eq!(fixture.bring(&[3, 9], &[1, 2]), Ok(false));
    fixture.memory.wait(9).expect("a seat");
    assert_eq!(fixture.ready(1..=9), [1, 2, 9]);
    fixture.bring_and_wait(&[3], &[9]);
    assert_eq!(fixture.ready(1..=9), [2, 3, 9]);
    assert!(sites().all(|site| fixture.arena(site).free_chunks() == 1));
}

/// A busy device: the copies of an expert are not done, so neither is it ready nor can it go.
#[test]
fn an_expert_on_its_way_keeps_its_seat() {
    if on_gpu() {
        return;
    }
    let random = &mut Random(4);
    let mut fixture = Fixture::new(1, 4);
    staged(&mut fixture, random, 16, 2);
    loramux_emulator::hold_events(true);
    assert_eq!(fixture.bring(&[1], &[]), Ok(false));
    assert_eq!(fixture.bring(&[1], &[]), Ok(false));
    assert_eq!(fixture.bring(&[2], &[]), Ok(false));
    assert_eq!(fixture.ready(1..=2), NOBODY);
    assert_eq!(fixture.memory.stats().moves, 1);
    loramux_emulator::hold_events(false);
    assert_eq!(fixture.bring(&[1], &[]), Ok(true));
    assert_eq!(fixture.bring(&[2], &[]), Ok(false), "begun");
    assert_eq!(fixture.ready(1..=2), NOBODY);
    assert_eq!(fixture.bring(&[2], &[]), Ok(true));
    assert_eq!((fixture.ready(1..=2), fixture.memory.stats().moves), (vec![2], 2));
}

#[test]
fn removed_experts_leave_room() {
    let random = &mut Random(5);
    let mut fixture = Fixture::new(2, 4);
    staged(&mut fixture, random, 32, 2);
    fixture.bring_and_wait(&[1, 2], &[]);
    fixture.remove(1);
    fixture.remove(1);
    assert_eq!((fixture.memory.seat(1), fixture.memory.order(1)), (None, None));
    let third = Adapter::of_rank(random, 20);
    fixture.stage(3, &third);
    fixture.bring_and_wait(&[3], &[2]);
    fixture.assert_holds(3, &third);

    // On its way: what is copied must not go before the copies are done, nor be in the way of the next.
    let fourth = Adapter::of_rank(random, 40);
    fixture.stage(4, &fourth);
    fixture.remove(2);
    fixture.remove(3);
    if !on_gpu() {
        loramux_emulator::hold_events(true);
    }
    fixture.stage(1, &Adapter::of_rank(random, 64));
    assert_eq!(fixture.bring(&[1], &[]), Ok(false));
    fixture.remove(1);
    assert_eq!(fixture.bring(&[4], &[]), Ok(false));
    if !on_gpu() {
        loramux_emulator::hold_events(false);
    }
    fixture.memory.wait(4).expect("a seat");
    fixture.assert_holds(4, &fourth);
    let stats = fixture.memory.stats();
    assert_eq!((stats.staged, stats.resident, stats.moves), (1, 1, 5));
}

/// What should be resident, worked out in another way: on a copy that is thrown away where an expert does not fit.
#[derive(Clone, Default)]
struct Reference {
    resident: Vec<u32>,
    used: HashMap<u32, u64>,
    clock: u64,
}

impl Reference {
    fn bring(
        &mut self,
        adapters: &[Adapter],
        [seats, chunks]: [usize; 2],
        wanted: &[u32],
        kept: &[u32],
    ) -> bool {
        let in_use: Vec<u32> = kept.iter().chain(wanted).copied().collect();
        let ready = wanted.iter().all(|number| self.resident.contains(number));
        for &number in &in_use {
            self.clock += 1;
            self.used.insert(number, self.clock);
        }
        for number in wanted {
            if self.resident.contains(number) {
                continue;
            }
            let mut after = self.clone();
            after.resident.push(*number);
            loop {
                let sum =
                    |site| after.resident.iter().map(|&n| adapters[n as usize].chunks(site)).sum::<usize>();
                if after.resident.len() <= seats && sites().all(|site| sum(site) <= chunks) {
                    *self = after;
                    break;
                }
                let others = after.resident.iter().filter(|number| !in_use.contains(number));
                let Some(&oldest) = others.min_by_key(|number| after.used[number]) else { break };
                after.resident.retain(|&number| number != oldest);
            }
        }
        ready
    }
}

#[test]
fn more_experts_than_room_in_any_order() {
    const EXPERTS: usize = 14;
    for (seed, seats, chunks) in [(6, 4, 40), (7, 10, 9), (8, 5, 11)] {
        let random = &mut Random(seed);
        let mut fixture = Fixture::new(seats, chunks);
        let mut reference = Reference::default();
        let mut adapters: Vec<_> = (0..EXPERTS).map(|_| Adapter::any(random)).collect();
        for (number, adapter) in adapters.iter().enumerate() {
            fixture.stage(number as u32, adapter);
        }
        let all = || 0..EXPERTS as u32;
        let (mut hits, mut full) = (0, 0);
        for round in 0..300 {
            let wanted: Vec<u32> = (0..1 + random.below(3)).map(|_| random.below(EXPERTS) as u32).collect();
            let resident = reference.resident.clone();
            let kept: Vec<u32> = resident.into_iter().filter(|_| random.below(3) == 0).collect();
            let before = reference.clone();
            let ready = reference.bring(&adapters, [seats, chunks], &wanted, &kept);
            match fixture.bring(&wanted, &kept) {
                Ok(all_there) => assert_eq!(all_there, ready, "round {round}"),
                Err(error) => {
                    assert!(matches!(error, CudaError::OutOfChunks { .. }) && kept.is_empty(), "{error}");
                    let fit = wanted.iter().all(|number| reference.resident.contains(number));
                    assert!(!fit, "round {round}: {error}");
                    reference = before;
                }
            }
            for &number in &reference.resident {
                fixture.memory.wait(number).expect("a seat");
            }
            let mut wanted_resident = reference.resident.clone();
            wanted_resident.sort_unstable();
            assert_eq!(fixture.ready(all()), wanted_resident, "round {round}");
            hits += usize::from(ready);
            full += usize::from(wanted.iter().any(|number| !reference.resident.contains(number)));

            let mut seats: Vec<_> = all().filter_map(|number| fixture.memory.seat(number)).collect();
            seats.sort_unstable();
            seats.dedup();
            assert_eq!(seats.len(), reference.resident.len(), "a seat each");
            for site in sites() {
                let held: usize = reference.resident.iter().map(|&n| adapters[n as usize].chunks(site)).sum();
                assert_eq!(fixture.arena(site).free_chunks(), chunks - held);
            }
            if let Some(&number) = reference.resident.get(random.below(seats.len().max(1))) {
                fixture.assert_holds(number, &adapters[number as usize]);
            }
            if round % 20 == 19 {
                let number = random.below(EXPERTS) as u32;
                adapters[number as usize] = Adapter::any(random);
                fixture.remove(number);
                fixture.stage(number, &adapters[number as usize]);
                reference.resident.retain(|&other| other != number);
            }
        }
        assert!(hits > 10 && full > 10, "{hits} hits, {full} rounds without room");
        for &number in &reference.resident {
            fixture.assert_holds(number, &adapters[number as usize]);
        }
    }
}
