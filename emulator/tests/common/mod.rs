//! A device for one test: what it needs of the driver, in few words.

#![allow(dead_code, reason = "each test file uses its own part")]

use std::ffi::{CString, c_void};
use std::sync::{Mutex, MutexGuard, PoisonError};

use cudarc::driver::sys::{self, CUresult};

/// The stand-in, as after a restart. Tests of one process take turns.
pub struct Device {
    pub stream: sys::CUstream,
    module: sys::CUmodule,
    _turn: MutexGuard<'static, ()>,
}

/// Device memory that nobody frees: the next test's restart does.
#[derive(Clone, Copy)]
pub struct Buffer {
    pub address: u64,
    pub bytes: usize,
}

pub fn ok(result: CUresult) {
    if result != CUresult::CUDA_SUCCESS {
        panic!("{result:?}: {:?}", loramux_emulator::last_report());
    }
}

impl Device {
    /// Threads go on in their natural order, until the test asks for another.
    pub fn open() -> Self {
        let device = Self::open_with_current_seed();
        loramux_emulator::set_seed(0);
        device
    }

    pub fn open_with_current_seed() -> Self {
        static TURN: Mutex<()> = Mutex::new(());
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        loramux_emulator::install();
        loramux_emulator::reset();
        let (mut context, mut module, mut stream) =
            (std::ptr::null_mut(), std::ptr::null_mut(), std::ptr::null_mut());
        // SAFETY: every call gets pointers to what it fills.
        unsafe {
            ok(sys::cuInit(0));
            ok(sys::cuDevicePrimaryCtxRetain(&mut context, 0));
            ok(sys::cuCtxSetCurrent(context));
            ok(sys::cuModuleLoadData(&mut module, b"no image".as_ptr().cast()));
            ok(sys::cuStreamCreate(&mut stream, 1));
        }
        Self { stream, module, _turn: turn }
    }

    pub fn function(&self, name: &str) -> sys::CUfunction {
        let name = CString::new(name).unwrap();
        let mut function = std::ptr::null_mut();
        // SAFETY: the module is loaded.
        ok(unsafe { sys::cuModuleGetFunction(&mut function, self.module, name.as_ptr()) });
        function
    }

    pub fn allocate(&self, bytes: usize) -> Buffer {
        let mut address = 0;
        // SAFETY: fills `address`.
        ok(unsafe { sys::cuMemAlloc_v2(&mut address, bytes) });
        Buffer { address, bytes }
    }

    pub fn upload<T: Copy>(&self, values: &[T]) -> Buffer {
        let buffer = self.allocate(size_of_val(values));
        // SAFETY: the buffer is as long as the slice.
        ok(unsafe { sys::cuMemcpyHtoD_v2(buffer.address, values.as_ptr().cast(), buffer.bytes) });
        buffer
    }

    /// The buffer as numbers, for which any bytes are valid.
    pub fn download<T: Copy + Default>(&self, buffer: Buffer) -> Vec<T> {
        let mut values = vec![T::default(); buffer.bytes / size_of::<T>()];
        // SAFETY: the buffer is at least as long as the vector.
        ok(unsafe {
            sys::cuMemcpyDtoH_v2(values.as_mut_ptr().cast(), buffer.address, size_of_val(&values[..]))
        });
        values
    }

    pub fn free(&self, buffer: Buffer) {
        // SAFETY: the buffer came from `allocate`.
        ok(unsafe { sys::cuMemFree_v2(buffer.address) });
    }

    /// Launches a kernel that takes one `P`.
    pub fn launch<P>(&self, name: &str, grid: u32, block: u32, shared: u32, mut params: P) -> CUresult {
        let mut arguments = [(&raw mut params).cast::<c_void>()];
        let (function, null) = (self.function(name), std::ptr::null_mut());
        // SAFETY: the kernel takes a struct of this layout; what it accesses is what the test is about.
        unsafe {
            let arguments = arguments.as_mut_ptr();
            sys::cuLaunchKernel(function, grid, 1, 1, block, 1, 1, shared, self.stream, arguments, null)
        }
    }

    pub fn begin_capture(&self) {
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream exists.
        ok(unsafe { sys::cuStreamBeginCapture_v2(self.stream, mode) });
    }

    pub fn end_capture(&self) -> Result<sys::CUgraph, CUresult> {
        let mut graph = std::ptr::null_mut();
        // SAFETY: the stream exists.
        match unsafe { sys::cuStreamEndCapture(self.stream, &mut graph) } {
            CUresult::CUDA_SUCCESS => Ok(graph),
            error => Err(error),
        }
    }
}

/// The report of a kernel that failed with `code`, after which every call fails alike.
pub fn report(result: CUresult, code: CUresult) -> String {
    assert_eq!(result, code, "{:?}", loramux_emulator::last_report());
    let mut address = 0;
    // SAFETY: fills `address`.
    assert_eq!(unsafe { sys::cuMemAlloc_v2(&mut address, 4) }, code, "the context is lost");
    let report = loramux_emulator::last_report().unwrap();
    loramux_emulator::reset();
    assert_eq!(loramux_emulator::last_report(), None);
    report
}

/// Asserts that `report` has all of these parts.
pub fn assert_names(report: &str, parts: &[&str]) {
    for part in parts {
        assert!(report.contains(part), "{part:?} is missing in: {report}");
    }
}
