//! What lies in page-locked memory, and what comes of it on the device.

use loramux::backend::cuda::CudaError;
use loramux::backend::cuda::experts::StagedExpert;
use loramux::backend::cuda::lora::{ArenaShape, ChunkArena, LowRank};

use crate::cuda_device::{device, on_gpu};
use crate::element::{NAN, element};
use crate::fixture::{Adapter, Fixture, sites};
use crate::random::Random;

#[test]
fn a_seat_holds_what_loading_a_slot_leaves() {
    let random = &mut Random(11);
    let mut fixture = Fixture::new(3, 12);
    for number in 0..30 {
        let adapter = match number % 6 {
            0 => Adapter::of_bias(random),
            1 => Adapter::of_rank(random, 64),
            _ => Adapter::any(random),
        };
        fixture.stage(number, &adapter);
        fixture.bring_and_wait(&[number], &[]);
        fixture.assert_holds(number, &adapter);
        assert_eq!(fixture.memory.order(number), Some(adapter.order));
    }
    let stats = fixture.memory.stats();
    assert_eq!((stats.staged, stats.resident, stats.moves), (30, 3, 30));
}

#[test]
fn bytes_that_moved() {
    let random = &mut Random(12);
    let mut fixture = Fixture::new(1, 4);
    fixture.stage(1, &Adapter::new(random, |_, site| (site == [1, 0]).then_some(20)));
    fixture.bring_and_wait(&[1], &[]);
    // Two chunks of 16 ranks from 40 to 64 features, their ids, and the slot's entry.
    assert_eq!(fixture.memory.stats().bytes, 2 * 16 * (40 + 64) * 2 + 2 * 4 + 32);
}

#[test]
fn what_is_staged_again_replaces_what_was_there() {
    let random = &mut Random(13);
    let mut fixture = Fixture::new(2, 8);
    let (first, second) = (Adapter::of_rank(random, 40), Adapter::of_rank(random, 16));
    fixture.stage(7, &first);
    fixture.bring_and_wait(&[7], &[]);
    let (third, fourth) = (Adapter::of_rank(random, 64), Adapter::of_rank(random, 50));
    for adapter in [&second, &first, &third, &fourth] {
        fixture.stage(7, adapter);
        assert_eq!((fixture.memory.seat(7), fixture.memory.stats().resident), (None, 0), "no seat any more");
        fixture.bring_and_wait(&[7], &[]);
        fixture.assert_holds(7, adapter);
        assert_eq!(fixture.memory.order(7), Some(adapter.order));
    }
    // At one site only; the others stay.
    let mut mixed = Adapter::of_rank(random, 8);
    fixture.stage(8, &mixed);
    let pair = Adapter::of_rank(random, 33);
    let staged = LowRank { scale: mixed.scale, order: mixed.order, ..pair.pair([1, 0]).expect("a pair") };
    // While its copies may be under way.
    fixture.bring(&[8], &[7]).expect("brought");
    fixture.memory.stage(&mut fixture.groups, 8, [1, 0], &staged).expect("staged");
    let at = mixed.pairs.iter().position(|pair| pair.site == [1, 0]).expect("a pair");
    mixed.pairs[at] = pair.pairs.into_iter().find(|pair| pair.site == [1, 0]).expect("a pair");
    fixture.bring_and_wait(&[8], &[7]);
    fixture.assert_holds(8, &mixed);
}

#[test]
fn an_expert_laid_out_on_another_thread() {
    let random = &mut Random(14);
    let mut fixture = Fixture::new(2, 8);
    for number in [1, 2, 1] {
        let adapter = Adapter::any(random);
        let shapes: Vec<_> = adapter.pairs.iter().map(|pair| *fixture.arena(pair.site).shape()).collect();
        let device = fixture.stream.device();
        let staged = std::thread::scope(|scope| {
            let work = scope.spawn(|| {
                let mut staged = StagedExpert::new(device, adapter.order);
                // Sites in any order.
                for (pair, shape) in adapter.pairs.iter().zip(&shapes).rev() {
                    staged.add(pair.site, shape, &adapter.low_rank(pair)).expect("laid out");
                }
                staged
            });
            work.join().expect("no panic")
        });
        fixture.memory.insert(&mut fixture.groups, number, staged).expect("inserted");
        fixture.bring_and_wait(&[number], &[]);
        fixture.assert_holds(number, &adapter);
    }
    // One that changes nothing has a seat like any other.
    let nothing = StagedExpert::new(fixture.stream.device(), 5);
    fixture.memory.insert(&mut fixture.groups, 3, nothing).expect("inserted");
    fixture.bring_and_wait(&[3], &[1]);
    fixture.assert_holds(3, &Adapter { pairs: Vec::new(), scale: 1.0, order: 5 });
    assert_eq!(fixture.memory.order(3), Some(5));
}

#[test]
fn small_experts_take_little_and_large_ones_few_slabs() {
    let random = &mut Random(15);
    let device = device();
    let shape = |in_features, chunks| ArenaShape {
        element: element(),
        in_features,
        out_features: 8,
        lookup: false,
        chunks,
        slots: 1,
        max_rank: chunks * 16,
    };
    let values = random.values((4 << 20) + 64, 1.0);
    let pair = |rank: usize, width: usize| LowRank {
        rank,
        a: &values[..rank * width],
        b: &values[..rank * 8],
        scale: 1.0,
        column_scale: None,
        bias: None,
        order: 0,
    };
    let mut small = StagedExpert::new(&device, 0);
    for group in 0..20 {
        small.add([group, 0], &shape(64, 1), &pair(8, 64)).expect("laid out");
    }
    assert_eq!(small.bytes(), 64 << 10);

    let before = allocations();
    let mut large = StagedExpert::new(&device, 0);
    for group in 0..200 {
        large.add([group, 0], &shape(16 << 10, 1), &pair(16, 16 << 10)).expect("laid out");
    }
    let used = 200 * (16 << 10) * 32;
    assert!((used..used * 5 / 4).contains(&large.bytes()), "{} bytes for {used}", large.bytes());
    let slabs = allocations() - before;
    assert!(slabs < 20, "{slabs} slabs");
    // More than a slab.
    large.add([200, 0], &shape(64 << 10, 5), &pair(64, 64 << 10)).expect("laid out");

    // In the same place, as long as it fits there.
    let bytes = small.bytes();
    for rank in [16, 3, 9, 16] {
        for group in 0..20 {
            small.add([group, 0], &shape(64, 1), &pair(rank, 64)).expect("laid out");
        }
    }
    assert_eq!(small.bytes(), bytes);
}

fn allocations() -> u64 {
    if on_gpu() { 0 } else { loramux_emulator::allocations_of_thread() }
}

#[test]
fn columns_take_memory_once_and_change_the_generation() {
    let random = &mut Random(16);
    let mut fixture = Fixture::new(2, 8);
    fixture.stage(1, &Adapter::of_rank(random, 16));
    let without = fixture.memory.generation();
    fixture.stage(2, &Adapter::of_rank(random, 16));
    assert_eq!(fixture.memory.generation(), without, "no columns");
    fixture.stage(3, &Adapter::of_bias(random));
    let with_biases = fixture.memory.generation();
    assert_ne!(with_biases, without);
    let before = allocations();
    fixture.stage(4, &Adapter::of_bias(random));
    assert_eq!(fixture.memory.generation(), with_biases);
    if !on_gpu() {
        assert_eq!(allocations() - before, 1, "its own slab, nothing on the device");
    }
    for number in [1, 2, 3, 4] {
        fixture.bring_and_wait(&[number], &[]);
    }
    fixture.remove(3);
    assert_eq!(fixture.memory.generation(), with_biases, "room for columns stays");
}

/// What the shape of an arena says it takes is what it allocates.
#[test]
fn bytes_of_an_arena() {
    let stream = device().stream().expect("a stream");
    let shape = ArenaShape {
        element: element(),
        in_features: 1 << 10,
        out_features: 3 << 10,
        lookup: false,
        chunks: 40,
        slots: 33,
        max_rank: 72,
    };
    assert_eq!(shape.bytes(), 40 * 16 * (4 << 10) * 2 + 33 * (32 + 5 * 4));
    assert_eq!(shape.column_bytes(), 33 * (3 << 10) * 4);
    if on_gpu() {
        // It hands out whole pages.
        return;
    }
    let columns = vec![1.0; 3 << 10];
    let pair =
        LowRank { rank: 0, a: &[], b: &[], scale: 1.0, column_scale: None, bias: Some(&columns), order: 0 };
    let taken = || {
        let free = || stream.device().free_bytes().expect("a number");
        let before = free();
        let taken = || before.wrapping_sub(free());
        let mut arena = ChunkArena::with_shape(&stream, shape).expect("an arena");
        let empty = taken();
        arena.load(&stream, 32, &pair).expect("loaded");
        let with_biases = taken();
        arena.load(&stream, 0, &LowRank { column_scale: Some(&columns), ..pair }).expect("loaded");
        [empty, with_biases, taken()]
    };
    let wanted = [0, 1, 2].map(|columns| shape.bytes() + columns * shape.column_bytes());
    // Tests that run beside this one take memory, too.
    assert!((0..100).any(|_| taken() == wanted), "{:?}, wanted {wanted:?}", taken());
}

#[test]
fn pairs_are_refused_as_an_arena_refuses_them() {
    let random = &mut Random(17);
    let mut fixture = Fixture::new(2, 3);
    let adapter = Adapter::of_rank(random, 48);
    fixture.stage(1, &adapter);
    fixture.bring_and_wait(&[1], &[]);
    let pair = adapter.pair([0, 0]).expect("a pair");
    let mut bad = pair.a.to_vec();
    bad[70] = NAN;
    let large = Adapter::of_rank(random, 49);
    let larger = Adapter::of_rank(random, 65);
    let shape = |what: &str| CudaError::Shape(what.to_owned());
    let before = fixture.memory.stats();
    for number in [1, 2] {
        for (site, pair, wanted) in [
            ([0, 0], LowRank { a: &bad, ..pair }, shape("A [rank, in] has NaN at 70, not a finite value")),
            (
                [0, 1],
                LowRank { b: &pair.b[..8], ..pair },
                shape("B [out, rank] has 8 values, wanted 48 x 24"),
            ),
            ([0, 0], LowRank { bias: Some(&[0.0; 3]), ..pair }, shape("the bias has 3 values, wanted 40")),
            ([0, 0], large.pair([0, 0]).expect("a pair"), CudaError::OutOfChunks { wanted: 4, available: 3 }),
            ([0, 0], larger.pair([0, 0]).expect("a pair"), shape("rank 65, at most 64 fit a slot")),
            ([0, 2], pair, shape("no site 2 of group 0")),
            ([3, 0], pair, shape("no site 0 of group 3")),
        ] {
            let error = fixture.memory.stage(&mut fixture.groups, number, site, &pair).unwrap_err();
            assert_eq!(error, wanted);
        }
    }
    assert_eq!(fixture.memory.stats(), before);
    fixture.assert_holds(1, &adapter);
    assert!(sites().all(|site| fixture.arena(site).free_chunks() == 0));
}
