//! Mistakes that end a launch: each with the error that a device gives, and a report of what happened where.

mod common;

use common::{Device, assert_names, ok, report};
use cudarc::driver::sys::{self, CUresult};

const ILLEGAL_ADDRESS: CUresult = CUresult::CUDA_ERROR_ILLEGAL_ADDRESS;
const MISALIGNED_ADDRESS: CUresult = CUresult::CUDA_ERROR_MISALIGNED_ADDRESS;
const LAUNCH_FAILED: CUresult = CUresult::CUDA_ERROR_LAUNCH_FAILED;

#[repr(C)]
struct Access {
    memory: u64,
    index: i64,
    write: u32,
    sink: u64,
}

/// Accesses word `index` of a buffer of `words` words.
fn access(device: &Device, words: usize, index: i64, write: bool) -> CUresult {
    let memory = device.allocate(words * 4);
    let sink = device.allocate(4).address;
    device.launch(
        "test_access",
        1,
        64,
        0,
        Access { memory: memory.address, index, write: write.into(), sink },
    )
}

#[test]
fn accesses_within_a_buffer_are_no_faults() {
    let device = Device::open();
    for words in [1, 64, 100, 1024, 5000] {
        for write in [false, true] {
            ok(access(&device, words, 0, write));
            ok(access(&device, words, words as i64 - 1, write));
        }
    }
    assert_eq!(loramux_emulator::last_report(), None);
}

#[test]
fn a_load_and_a_store_past_the_end_are_found() {
    let device = Device::open();
    // 64 words are 256 bytes, so that the very next word lies in the guard page.
    let text = report(access(&device, 64, 64, false), ILLEGAL_ADDRESS);
    assert_names(
        &text,
        &["kernel test_access, block (0, 0, 0), thread (5, 0, 0)", "read of", "0 bytes past the end"],
    );
    assert_names(&text, &["of 256 bytes"]);
    let text = report(access(&device, 1 << 20, (1 << 20) + 3, true), ILLEGAL_ADDRESS);
    assert_names(&text, &["write to", "12 bytes past the end", "of 4194304 bytes"]);
    let text = report(access(&device, 64, -1024, true), ILLEGAL_ADDRESS);
    assert_names(&text, &["write to", "bytes"]);
}

#[test]
fn a_store_between_the_end_and_the_guard_page_is_found_after_the_launch() {
    let device = Device::open();
    let text = report(access(&device, 65, 66, true), ILLEGAL_ADDRESS);
    assert_names(&text, &["kernel test_access: a thread wrote 4 bytes past the end", "of 260 bytes"]);
    let text = report(access(&device, 65, -1, true), ILLEGAL_ADDRESS);
    assert_names(&text, &["a thread wrote 4 bytes before the start", "of 260 bytes"]);
}

#[test]
fn addresses_of_nothing_are_found() {
    let device = Device::open();
    let access = |memory| {
        let sink = device.allocate(4).address;
        device.launch("test_access", 1, 64, 0, Access { memory, index: 0, write: 0, sink })
    };
    assert_names(&report(access(0), ILLEGAL_ADDRESS), &["read of", "no address of this device"]);
    assert_names(&report(access(1 << 62), MISALIGNED_ADDRESS), &["access to"]);
}

#[test]
fn use_after_free_is_found() {
    let device = Device::open();
    let memory = device.allocate(4096);
    let sink = device.allocate(4);
    let params = |write| Access { memory: memory.address, index: 10, write, sink: sink.address };
    ok(device.launch("test_access", 1, 64, 0, params(1)));
    device.free(memory);
    // What is allocated next must not take the place of what was freed.
    device.allocate(4096);
    let text = report(device.launch("test_access", 1, 64, 0, params(0)), ILLEGAL_ADDRESS);
    assert_names(&text, &["read of", "offset 40 of allocation", "freed"]);
}

#[test]
fn memory_that_was_never_written_is_nan() {
    let device = Device::open();
    assert!(device.download::<f32>(device.allocate(4096)).iter().all(|value| value.is_nan()));
    let (memory, sink) = (device.allocate(4096), device.upload(&[0.0f32]));
    let params = Access { memory: memory.address, index: 10, write: 0, sink: sink.address };
    ok(device.launch("test_access", 1, 64, 0, params));
    assert!(device.download::<f32>(sink)[0].is_nan());
    // Shared memory is new for every block.
    let sink = device.upload(&[0.0f32]);
    for write in [1, 0] {
        let params = SharedAccess { index: 7, write, matrix: 0, sink: sink.address };
        ok(device.launch("test_shared_access", 1, 32, 256, params));
    }
    assert!(device.download::<f32>(sink)[0].is_nan());
}

#[repr(C)]
struct SharedAccess {
    index: i64,
    write: u32,
    matrix: u32,
    sink: u64,
}

fn shared_access(device: &Device, shared: u32, index: i64, write: u32, matrix: u32) -> CUresult {
    let sink = device.allocate(128).address;
    device.launch("test_shared_access", 1, 32, shared, SharedAccess { index, write, matrix, sink })
}

#[test]
fn accesses_past_shared_memory_are_found() {
    let device = Device::open();
    ok(shared_access(&device, 256, 63, 1, 0));
    let text = report(shared_access(&device, 1024, 256, 0, 0), ILLEGAL_ADDRESS);
    assert_names(&text, &["read of", "0 bytes past the end of the block's 1024 bytes of shared memory"]);
    // The guard page begins at a multiple of 1024 bytes; writes before it are found when the block has ended.
    let text = report(shared_access(&device, 256, 64, 1, 0), ILLEGAL_ADDRESS);
    assert_names(&text, &["a thread wrote 0 bytes past the end of the block's 256 bytes of shared memory"]);
    let text = report(shared_access(&device, 256, 61, 0, 1), ILLEGAL_ADDRESS);
    assert_names(&text, &["load_matrix_x4", "offset 244 of"]);
    let text = report(shared_access(&device, 256, 64, 0, 1), ILLEGAL_ADDRESS);
    assert_names(&text, &["load_matrix_x4", "0 bytes past the end"]);
    let text = report(shared_access(&device, 256, 1, 0, 1), MISALIGNED_ADDRESS);
    assert_names(&text, &["load_matrix_x4", "offset 4 of", "no multiple of 16"]);
}

#[test]
fn a_launch_with_less_shared_memory_than_the_kernel_needs_is_found() {
    let device = Device::open();
    let text = report(shared_access(&device, 252, 0, 1, 0), ILLEGAL_ADDRESS);
    assert_names(&text, &["needs 256 bytes of shared memory; the launch gives 252"]);
}

#[repr(C)]
struct Copy {
    out: u64,
    x: u64,
    valid: u32,
    newest: u32,
    misaligned: u32,
}

#[test]
fn asynchronous_copies_check_their_addresses() {
    let device = Device::open();
    let launch = |words: usize, skip: u64, misaligned| {
        let x = device.upload(&vec![0u32; words]).address + skip;
        let out = device.allocate(64 * 16).address;
        device.launch("test_copy", 1, 32, 64 * 16, Copy { out, x, valid: 64, newest: 0, misaligned })
    };
    ok(launch(256, 0, 0));
    assert_names(&report(launch(256, 0, 4), MISALIGNED_ADDRESS), &["copy_async_16", "offset 4 of"]);
    assert_names(&report(launch(257, 4, 0), MISALIGNED_ADDRESS), &["copy_async_16", "no multiple of 16"]);
    assert_names(
        &report(launch(192, 0, 0), ILLEGAL_ADDRESS),
        &["read of", "0 bytes past the end", "of 768 bytes"],
    );
    // Past the end of shared memory, by threads of which the first is at fault.
    let x = device.upload(&[0u32; 256]).address;
    let params = Copy { out: x, x, valid: 64, newest: 0, misaligned: 1024 };
    let text = report(device.launch("test_copy", 1, 32, 64 * 16, params), ILLEGAL_ADDRESS);
    assert_names(&text, &["copy_async_16", "thread (0, 0, 0)", "0 bytes past the end of the block's"]);
}

#[repr(C)]
struct Diverge {
    out: u64,
    divergence: u32,
}

fn diverge(divergence: u32) -> (Device, CUresult) {
    let device = Device::open();
    let out = device.allocate(64 * 4).address;
    let result = device.launch("test_diverge", 1, 64, 0, Diverge { out, divergence });
    (device, result)
}

/// The place of the `nth` call of `name` in the kernel, as a report has it.
fn place(name: &str, nth: usize) -> String {
    let source = include_str!("kernels/broken.cu");
    let kernel = source.lines().position(|line| line.starts_with("KERNEL(test_diverge")).unwrap();
    let lines = source.lines().enumerate().skip(kernel);
    let line = lines.filter(|(_, line)| line.contains(name)).nth(nth).unwrap().0 + 1;
    format!("broken.cu:{line}")
}

#[test]
fn threads_that_meet_are_no_fault() {
    let (_device, result) = diverge(0);
    ok(result);
}

#[test]
fn a_divergent_barrier_is_found_and_both_places_named() {
    let (_device, result) = diverge(1);
    let text = report(result, LAUNCH_FAILED);
    assert_names(
        &text,
        &["__syncthreads", &place("__syncthreads", 1), &place("__syncthreads", 2), "threads 0-15"],
    );
}

#[test]
fn a_deadlock_is_found_and_everyone_who_waits_named() {
    let (_device, result) = diverge(2);
    let text = report(result, LAUNCH_FAILED);
    assert_names(&text, &["kernel test_diverge, block (0, 0, 0): deadlock"]);
    assert_names(
        &text,
        &[&format!("threads 0-15, 32-47 wait at __syncthreads ({})", place("__syncthreads", 3))],
    );
    assert_names(&text, &[&format!("threads 16-31, 48-63 wait at __syncwarp ({})", place("__syncwarp", 0))]);
}

#[test]
fn shuffles_with_wrong_masks_are_found() {
    let (_device, result) = diverge(3);
    let text = report(result, LAUNCH_FAILED);
    assert_names(
        &text,
        &["thread (16, 0, 0)", "__shfl_xor_sync", &place("__shfl", 1), "0x0000ffff", "own lane 16"],
    );
    drop(_device);
    let (_device, result) = diverge(4);
    assert_names(&report(result, LAUNCH_FAILED), &["__shfl_xor_sync", "of which 0x00000001 have exited"]);
    drop(_device);
    let (_device, result) = diverge(5);
    let text = report(result, LAUNCH_FAILED);
    assert_names(
        &text,
        &["deadlock", "threads 0-15, 32-47 wait at __shfl_xor_sync", "threads 16-31, 48-63 wait at"],
    );
    drop(_device);
    let (_device, result) = diverge(6);
    let text = report(result, LAUNCH_FAILED);
    assert_names(
        &text,
        &["thread (31, 0, 0): exits while other lanes wait", "threads 0-30 wait at __shfl_xor_sync"],
    );
    drop(_device);
    let (_device, result) = diverge(7);
    let text = report(result, LAUNCH_FAILED);
    assert_names(&text, &["__shfl_xor_sync", "0xffffffff", "0x00ff00ff"]);
}

#[test]
fn traps_assertions_and_exhausted_stacks_are_found() {
    let (_device, result) = diverge(8);
    assert_names(&report(result, LAUNCH_FAILED), &["thread (33, 0, 0): calls __trap"]);
    drop(_device);
    let (_device, result) = diverge(9);
    let text = report(result, CUresult::CUDA_ERROR_ASSERT);
    assert_names(&text, &["thread (33, 0, 0): assertion `t != 33` failed at", &place("assert(", 0)]);
    drop(_device);
    let (device, result) = diverge(10);
    assert_names(&report(result, LAUNCH_FAILED), &["thread (33, 0, 0): ran out of stack"]);
    // The next launch has whole stacks again.
    let out = device.allocate(64 * 4);
    ok(device.launch("test_diverge", 1, 64, 0, Diverge { out: out.address, divergence: 0 }));
    assert_eq!(device.download::<u32>(out)[..4], [1, 0, 3, 2]);
}

#[test]
fn a_fault_outside_of_kernels_is_none_of_the_emulators() {
    // The handler passes the signal on: the process ends as it would without the emulator.
    if std::env::var_os("LORAMUX_EMULATOR_TEST_CRASH").is_some() {
        let _device = Device::open();
        // SAFETY: none; this is the crash that the test is about.
        unsafe { std::ptr::null_mut::<u32>().write_volatile(1) };
    }
    let mut again = std::process::Command::new(std::env::current_exe().unwrap());
    again.args(["--exact", "a_fault_outside_of_kernels_is_none_of_the_emulators", "--nocapture"]);
    let output = again.env("LORAMUX_EMULATOR_TEST_CRASH", "1").output().unwrap();
    assert!(!output.status.success());
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(!text.contains("loramux emulator"), "{text}");
    // A sanitizer's handler, where there is one, makes an exit code of it.
    let signal = std::os::unix::process::ExitStatusExt::signal(&output.status);
    assert!(signal == Some(11) || text.contains("AddressSanitizer: SEGV"), "{signal:?} {text}");
}

#[test]
fn copies_outside_of_allocations_are_refused() {
    let device = Device::open();
    let buffer = device.allocate(100);
    let mut bytes = [0u8; 128];
    // SAFETY: the driver checks the device's side.
    unsafe {
        let invalid = CUresult::CUDA_ERROR_INVALID_VALUE;
        ok(sys::cuMemcpyHtoD_v2(buffer.address, bytes.as_ptr().cast(), 100));
        assert_eq!(sys::cuMemcpyHtoD_v2(buffer.address, bytes.as_ptr().cast(), 101), invalid);
        assert_eq!(sys::cuMemcpyDtoH_v2(bytes.as_mut_ptr().cast(), buffer.address + 50, 51), invalid);
        assert_eq!(sys::cuMemsetD8_v2(buffer.address, 0, 101), invalid);
        device.free(buffer);
        assert_eq!(sys::cuMemFree_v2(buffer.address), invalid);
        assert_eq!(sys::cuMemcpyDtoH_v2(bytes.as_mut_ptr().cast(), buffer.address, 1), invalid);
    }
}
