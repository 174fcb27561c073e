//! Nobody waits for an expert that moves: no call makes the host wait, none allocates.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use crate::cuda_device::on_gpu;
use crate::fixture::{Adapter, Fixture};
use crate::random::Random;

/// The system's allocator, which counts what each thread allocates.
struct Counting;

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

// SAFETY: every call is passed on to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.set(ALLOCATIONS.get() + 1);
        // SAFETY: as above.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn counts() -> [u64; 3] {
    [
        ALLOCATIONS.get(),
        loramux_emulator::allocations_of_thread(),
        loramux_emulator::synchronizations_of_thread(),
    ]
}

#[test]
fn bringing_experts_neither_waits_nor_allocates() {
    if on_gpu() {
        return;
    }
    const EXPERTS: u32 = 9;
    let random = &mut Random(31);
    let mut fixture = Fixture::new(4, 9);
    let adapters: Vec<_> = (0..EXPERTS).map(|_| Adapter::any(random)).collect();
    for (number, adapter) in adapters.iter().enumerate() {
        fixture.stage(number as u32, adapter);
    }
    // Warm: every seat has been used, and every list has been as long as it gets.
    for number in 0..EXPERTS {
        fixture.bring(&[number, (number + 1) % EXPERTS], &[]).expect("brought");
    }
    let (moves, before) = (fixture.memory.stats().moves, counts());
    for round in 0..200 {
        // Some calls find copies under way.
        loramux_emulator::hold_events(random.below(3) == 0);
        let wanted = [random.below(9) as u32, random.below(9) as u32];
        let kept = [round % EXPERTS];
        fixture.bring(&wanted, &kept).expect("brought");
    }
    assert_eq!(counts(), before);
    loramux_emulator::hold_events(false);
    assert!(fixture.memory.stats().moves > moves + 50, "experts have moved");
    drop(std::hint::black_box(Box::new(0)));
    assert_eq!(counts()[0], before[0] + 1, "allocations are counted");
    fixture.bring_and_wait(&[0], &[]);
}
