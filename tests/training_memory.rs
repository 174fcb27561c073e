//! What a tape takes is known before anything is loaded. This binary counts the bytes that a thread allocates.

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use common::{FAMILIES, repository};
use loramux::backend::cpu::Cpu;
use loramux::model::{Base, Recompute, TapeSize, Transformer};

/// The system's allocator, and how many more bytes each thread has taken than given back.
struct Counting;

thread_local! {
    static TAKEN: Cell<usize> = const { Cell::new(0) };
}

fn count(taken: usize, given_back: usize) {
    TAKEN.set(TAKEN.get().wrapping_add(taken).wrapping_sub(given_back));
}

// SAFETY: every call is passed on to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size(), 0);
        // SAFETY: as above.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(layout.size(), 0);
        // SAFETY: as above.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count(size, layout.size());
        // SAFETY: as above.
        unsafe { System.realloc(pointer, layout, size) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        count(0, layout.size());
        // SAFETY: as above.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

#[test]
fn a_tape_takes_the_bytes_that_were_announced() {
    for family in FAMILIES {
        let base = Base::open(&repository().join("tests/golden").join(family).join("model")).unwrap();
        let mut backend = Cpu::new(Some(1)).unwrap();
        let transformer = Transformer::new(&mut backend, &base.config, &base.checkpoint, 64).unwrap();
        let mut all = Vec::new();
        for recompute in [Recompute::None, Recompute::Mlp, Recompute::Block] {
            for (rows, sequences, logit_rows) in [(1000, 10, 64), (512, 100, 10_000)] {
                let size = TapeSize { rows, sequences, logit_rows };
                let announced = size.bytes(&base.config, recompute, size_of::<f32>());
                let before = TAKEN.get();
                let tape = transformer.tape(&mut backend, size, recompute).unwrap();
                let taken = TAKEN.get() - before;
                drop(tape);
                // The lists of buffers themselves.
                let lists = 8192;
                assert!(
                    (announced..announced + lists).contains(&taken),
                    "{family} {recompute:?}: {announced} announced, {taken} taken"
                );
                all.push(announced);
            }
        }
        // Of two blocks there is only one that all rows pass whole.
        let more_than_two = base.config.num_layers > 2;
        assert_eq!(all[0] > all[2], more_than_two, "{family}: less is kept, less is taken: {all:?}");
        assert!(all[0] >= all[2] && all[2] > all[4], "{family}: less is kept, less is taken: {all:?}");
    }
}
