//! What can never fit is said at once, and changes nothing.

use loramux::backend::cuda::CudaError;
use loramux::backend::cuda::experts::{ExpertMemory, StagedExpert};
use loramux::backend::cuda::lora::ArenaShape;

use crate::fixture::{Adapter, Fixture};
use crate::random::Random;

fn shape(what: &str) -> CudaError {
    CudaError::Shape(what.to_owned())
}

#[test]
fn requests_that_can_never_run() {
    let random = &mut Random(21);
    let mut fixture = Fixture::new(2, 5);
    for number in 1..=4 {
        fixture.stage(number, &Adapter::of_rank(random, 48));
    }
    fixture.stage(5, &Adapter::of_rank(random, 16));
    fixture.bring_and_wait(&[1, 5], &[]);
    let before = fixture.memory.stats();
    assert_eq!(fixture.bring(&[1, 9], &[]), Err(shape("expert 9 is not staged")));
    assert_eq!(fixture.bring(&[5, 1, 2], &[]), Err(shape("3 experts at once, on a device with 2 seats")));
    assert_eq!(fixture.bring(&[2, 3], &[]), Err(CudaError::OutOfChunks { wanted: 6, available: 5 }));
    assert_eq!((fixture.memory.stats(), fixture.ready(1..=5)), (before, vec![1, 5]), "nothing has changed");
    // While others run it may be for their sake.
    assert_eq!(fixture.bring(&[2, 3], &[5]), Ok(false));
    // Naming one twice is no more than naming it once.
    fixture.memory.wait(2).expect("a seat");
    assert_eq!(fixture.bring(&[2, 2, 5, 2], &[5]), Ok(true));
    fixture.bring_and_wait(&[3, 3, 3], &[]);
    assert_eq!(fixture.bring(&[], &[]), Ok(true));
}

#[test]
fn experts_that_are_not_there() {
    let random = &mut Random(22);
    let mut fixture = Fixture::new(1, 4);
    assert_eq!(fixture.memory.wait(1), Err(shape("expert 1 has no seat to wait for")));
    fixture.stage(1, &Adapter::of_rank(random, 16));
    assert_eq!(fixture.memory.wait(1), Err(shape("expert 1 has no seat to wait for")));
    assert_eq!((fixture.memory.seat(1), fixture.memory.seat(2)), (None, None));
    fixture.remove(2);
    // Nobody is kept by a number that nobody has.
    fixture.bring_and_wait(&[1], &[2]);
}

#[test]
fn content_for_other_arenas() {
    let random = &mut Random(23);
    let mut fixture = Fixture::new(2, 4);
    let adapter = Adapter::of_rank(random, 16);
    fixture.stage(1, &adapter);
    fixture.bring_and_wait(&[1], &[]);
    let pair = adapter.pair([0, 0]).expect("a pair");
    let of_arena = *fixture.arena([0, 0]).shape();
    let mut staged = StagedExpert::new(fixture.stream.device(), 0);
    let other = ArenaShape { max_rank: 16, ..of_arena };
    staged.add([0, 0], &other, &pair).expect("laid out");
    let error = fixture.memory.insert(&mut fixture.groups, 1, staged).unwrap_err();
    let wanted = format!("an adapter laid out for {other:?} at site 0 of group 0, which has {of_arena:?}");
    assert_eq!(error, CudaError::Shape(wanted));
    let mut staged = StagedExpert::new(fixture.stream.device(), 0);
    staged.add([0, 2], &of_arena, &pair).expect("laid out");
    let error = fixture.memory.insert(&mut fixture.groups, 1, staged).unwrap_err();
    assert_eq!(error, shape("no site 2 of group 0"));
    fixture.assert_holds(1, &adapter);

    let mut more_seats = ExpertMemory::new(fixture.stream.device(), 3).expect("a memory");
    let error = more_seats.stage(&mut fixture.groups, 1, [0, 0], &pair).unwrap_err();
    assert_eq!(error, shape("an arena of 2 slots for 3 seats"));
}
