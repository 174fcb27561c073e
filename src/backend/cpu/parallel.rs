//! Threads: a loop over independent pieces of work.

use rayon::prelude::*;

/// Multiply-adds under which a loop is not worth waking a thread for.
const SERIAL_WORK: usize = 1 << 18;

/// Whether so many multiply-adds are worth waking threads for.
pub(super) fn pays(work: usize) -> bool {
    work >= SERIAL_WORK
}

/// Runs `body` for every index below `count`, on the pool's threads when `work` (multiply-adds in all) pays for it.
pub(super) fn parallel_for(count: usize, work: usize, body: impl Fn(usize) + Sync + Send) {
    if count <= 1 || !pays(work) {
        (0..count).for_each(body);
    } else {
        (0..count).into_par_iter().for_each(body);
    }
}

/// A pointer that the pieces of one loop share; each writes its own part.
#[derive(Clone, Copy)]
pub(super) struct Shared(*mut f32);

// SAFETY: every use states which part it touches.
unsafe impl Send for Shared {}
unsafe impl Sync for Shared {}

impl Shared {
    pub fn new(pointer: *mut f32) -> Self {
        Self(pointer)
    }

    pub fn get(&self) -> *mut f32 {
        self.0
    }
}
