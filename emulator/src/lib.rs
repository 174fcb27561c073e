//! The CUDA execution model on a CPU, as a stand-in for the CUDA driver: `cargo test` runs loramux's kernels and its
//! whole CUDA backend on a machine without a GPU, without a driver and without CUDA headers.
//!
//! The build script compiles `kernels/*.cu` with the host's C++ compiler and links them with a runtime and some ninety
//! driver functions into a shared object whose soname is `libcuda.so`. [`install`] loads it; whoever then looks for a
//! driver, as `cudarc` does, finds this one:
//!
//! ```no_run
//! loramux_emulator::install();
//! // From here on `cudarc::driver::CudaContext::new(0)` is a device of compute capability 9.0.
//! ```
//!
//! # What it checks
//!
//! Threads of a block are fibers, which go on in an order drawn from a seed ([`set_seed`]). Results of asynchronous
//! copies appear at the wait that covers them and not before. Shared memory is NaN before every block, global memory
//! when it is allocated. Each allocation and each block's shared memory ends before a guard page. So these end a launch
//! with the error that a device would give, and [`last_report`] says what happened where:
//!
//! - accesses past an allocation or past shared memory, and to freed memory;
//! - barriers that not all threads of a warp reach, collectives that not all named lanes reach, deadlocks;
//! - misaligned `cp.async` and `ldmatrix` addresses, `__trap`, failed assertions;
//!
//! and these give wrong results under some seed: missing barriers, missing waits, reads of what was never written.
//!
//! It does not prove what depends on the hardware: the memory model between threads that run at the same time, proxy
//! fences, instruction encodings, speed. Streams run in the order in which work is issued, so that a missing dependency
//! between streams does not show.
//!
//! # Variables
//!
//! | variable | when | |
//! |---|---|---|
//! | `CXX` | build | the C++20 compiler, `c++` if unset |
//! | `LORAMUX_EMULATOR_SANITIZE` | build | for `-fsanitize`, such as `address,undefined`: stacks, arithmetic, alignment |
//! | `LORAMUX_EMULATOR_SEED` | run | the seed before the first [`set_seed`] |
//!
//! With sanitizers, their runtime has to come first in each test's process (and in no process of Cargo's own):
//!
//! ```sh
//! export LORAMUX_EMULATOR_SANITIZE=address,undefined
//! export CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUNNER="env LD_PRELOAD=$(c++ -print-file-name=libasan.so) \
//!     ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1"
//! cargo nextest run
//! ```
//!
//! Leaks are not looked for: the threads of a kernel that was ended leave what they had behind.
//!
//! # Without Rust
//!
//! The sources also make an ordinary C++ program, for work on a single kernel:
//!
//! ```sh
//! c++ -std=c++20 -O2 -ffp-contract=off -fno-strict-aliasing -Wno-unknown-pragmas \
//!     -Iemulator -Iemulator/include -Ikernels -include emulator/include/cuda_names.h \
//!     emulator/runtime/*.cpp emulator/driver/*.cpp main.cpp -x c++ kernels/some_kernel.cu
//! ```

use std::env;
use std::path::Path;
use std::sync::OnceLock;

use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_LOCAL, RTLD_NOW};

/// The shared object that the build script made.
const DRIVER: &str = concat!(env!("OUT_DIR"), "/libcuda.so");

/// Makes the stand-in the CUDA driver of this process. Calls after the first do nothing.
///
/// # Panics
///
/// When a real driver has been loaded before, or when the stand-in cannot be loaded.
pub fn install() {
    driver();
}

/// The order in which threads, warps and blocks of all later launches go on: 0 for their natural order, any other
/// number for one drawn from it. The same seed gives the same order.
pub fn set_seed(seed: u64) {
    // SAFETY: the stand-in defines this function with this signature, as all those below.
    unsafe { (driver().set_seed)(seed) }
}

/// How many multiprocessors the device has: 4 unless set.
pub fn set_multiprocessors(count: u32) {
    // SAFETY: as in `set_seed`.
    unsafe { (driver().set_multiprocessors)(count) }
}

/// How many bytes of memory the device has: 2 GiB unless set. What is allocated stays allocated.
pub fn set_memory(bytes: u64) {
    // SAFETY: as in `set_seed`.
    unsafe { (driver().set_memory)(bytes) }
}

/// What ended the last kernel that failed, or why the last launch was refused: which one, where, and why. `None` if
/// there was no such kernel.
pub fn last_report() -> Option<String> {
    let mut text = vec![0; 16 << 10];
    // SAFETY: as in `set_seed`; `text` has as many bytes as it is said to have.
    let length = unsafe { (driver().last_report)(text.as_mut_ptr(), text.len()) };
    text.truncate(length);
    (length > 0).then(|| String::from_utf8_lossy(&text).into_owned())
}

/// Kernels that have run, those of graphs included.
pub fn launches() -> u64 {
    // SAFETY: as in `set_seed`.
    unsafe { (driver().launches)() }
}

/// Calls that allocated device memory or pinned host memory.
pub fn allocations() -> u64 {
    // SAFETY: as in `set_seed`.
    unsafe { (driver().allocations)() }
}

/// Those that the calling thread made: what a test can count while others run beside it.
pub fn allocations_of_thread() -> u64 {
    // SAFETY: as in `set_seed`.
    unsafe { (driver().allocations_of_thread)() }
}

/// Calls that made the host wait for the device: synchronizing a stream, an event or the context, and copies and fills
/// that are not asynchronous.
pub fn synchronizations() -> u64 {
    // SAFETY: as in `set_seed`.
    unsafe { (driver().synchronizations)() }
}

/// Those that the calling thread made.
pub fn synchronizations_of_thread() -> u64 {
    // SAFETY: as in `set_seed`.
    unsafe { (driver().synchronizations_of_thread)() }
}

/// Whether `cuEventQuery`, on the calling thread, finds no event reached: as if the device were busy. Waiting for an
/// event ends at once all the same.
pub fn hold_events(hold: bool) {
    // SAFETY: as in `set_seed`.
    unsafe { (driver().hold_events)(hold) }
}

/// Makes the device forget a fault, after which every call fails, and frees all its memory. Only a test may do this: a
/// real context is lost until the process ends.
pub fn reset() {
    // SAFETY: as in `set_seed`.
    unsafe { (driver().reset)() }
}

/// The stand-in's controls; `driver/controls.cpp` defines them.
struct Driver {
    set_seed: unsafe extern "C" fn(u64),
    set_multiprocessors: unsafe extern "C" fn(u32),
    set_memory: unsafe extern "C" fn(u64),
    last_report: unsafe extern "C" fn(*mut u8, usize) -> usize,
    launches: unsafe extern "C" fn() -> u64,
    allocations: unsafe extern "C" fn() -> u64,
    allocations_of_thread: unsafe extern "C" fn() -> u64,
    synchronizations: unsafe extern "C" fn() -> u64,
    synchronizations_of_thread: unsafe extern "C" fn() -> u64,
    hold_events: unsafe extern "C" fn(bool),
    reset: unsafe extern "C" fn(),
}

fn driver() -> &'static Driver {
    static DRIVER: OnceLock<Driver> = OnceLock::new();
    DRIVER.get_or_init(Driver::load)
}

impl Driver {
    fn load() -> Self {
        let library = open(Path::new(DRIVER));
        let driver = Self {
            set_seed: symbol(&library, "loramux_emulator_set_seed"),
            set_multiprocessors: symbol(&library, "loramux_emulator_set_multiprocessors"),
            set_memory: symbol(&library, "loramux_emulator_set_memory"),
            last_report: symbol(&library, "loramux_emulator_last_report"),
            launches: symbol(&library, "loramux_emulator_launches"),
            allocations: symbol(&library, "loramux_emulator_allocations"),
            allocations_of_thread: symbol(&library, "loramux_emulator_allocations_of_thread"),
            synchronizations: symbol(&library, "loramux_emulator_synchronizations"),
            synchronizations_of_thread: symbol(&library, "loramux_emulator_synchronizations_of_thread"),
            hold_events: symbol(&library, "loramux_emulator_hold_events"),
            reset: symbol(&library, "loramux_emulator_reset"),
        };
        // The loader answers a name that has no path with a library that it has already loaded under that soname, even
        // where a real driver is installed; but not if that one came first.
        let found = open(Path::new("libcuda.so"));
        // SAFETY: only the address is used.
        let found = unsafe { found.get::<unsafe extern "C" fn(u64)>(b"loramux_emulator_set_seed") };
        assert!(
            found.is_ok_and(|found| std::ptr::fn_addr_eq(*found, driver.set_seed)),
            "another CUDA driver was loaded before loramux_emulator::install()"
        );
        // The driver lives as long as the process: others have its functions' addresses.
        std::mem::forget(library);
        if let Ok(seed) = env::var("LORAMUX_EMULATOR_SEED") {
            let seed =
                seed.parse().unwrap_or_else(|_| panic!("LORAMUX_EMULATOR_SEED={seed} is no whole number"));
            // SAFETY: as in the function `set_seed`.
            unsafe { (driver.set_seed)(seed) };
        }
        driver
    }
}

fn open(path: &Path) -> Library {
    // SAFETY: the stand-in's initialisers only fill its table of kernels.
    unsafe { Library::open(Some(path), RTLD_NOW | if path.is_absolute() { RTLD_GLOBAL } else { RTLD_LOCAL }) }
        .unwrap_or_else(|error| panic!("cannot load {}: {error}", path.display()))
}

fn symbol<T: Copy>(library: &Library, name: &str) -> T {
    // SAFETY: the fields of `Driver` have the types that driver/controls.cpp gives these names.
    *unsafe { library.get::<T>(name.as_bytes()) }
        .unwrap_or_else(|error| panic!("{DRIVER} lacks {name}: {error}"))
}
