//! Events: marks on a stream that other streams and the host can wait for.

use std::ptr;
use std::sync::Arc;

use cudarc::driver::sys::{self, CUevent_flags as Flags, CUresult};

use super::error::check;
use super::{CudaError, Device};

/// A mark that [`Stream::record`](super::Stream::record) puts behind the work queued so far.
///
/// Recording it again moves it; an event that was never recorded counts as reached.
#[derive(Debug)]
pub struct Event {
    device: Arc<Device>,
    handle: sys::CUevent,
}

// SAFETY: the handle names an object of the driver, which locks it; it is not tied to a thread.
unsafe impl Send for Event {}
// SAFETY: as above.
unsafe impl Sync for Event {}

impl Event {
    pub(super) fn new(device: &Arc<Device>, timing: bool) -> Result<Self, CudaError> {
        device.bind()?;
        let flags = if timing { Flags::CU_EVENT_DEFAULT } else { Flags::CU_EVENT_DISABLE_TIMING };
        let mut handle = ptr::null_mut();
        // SAFETY: writes one handle.
        let result = unsafe { sys::cuEventCreate(&mut handle, flags as u32) };
        check(result, || "making an event".to_owned())?;
        Ok(Self { device: Arc::clone(device), handle })
    }

    /// Blocks until the event is reached; where it is, only asks.
    pub fn synchronize(&self) -> Result<(), CudaError> {
        if self.is_reached()? {
            return Ok(());
        }
        // SAFETY: the handle is alive.
        check(unsafe { sys::cuEventSynchronize(self.handle) }, || "waiting for an event".to_owned())
    }

    /// Whether the event is reached.
    pub fn is_reached(&self) -> Result<bool, CudaError> {
        self.device.bind()?;
        // SAFETY: the handle is alive.
        let result = unsafe { sys::cuEventQuery(self.handle) };
        if result == CUresult::CUDA_ERROR_NOT_READY {
            return Ok(false);
        }
        check(result, || "asking for an event".to_owned())?;
        Ok(true)
    }

    /// Milliseconds from `self` to `end`, both timing events that are reached.
    pub fn elapsed_ms(&self, end: &Event) -> Result<f32, CudaError> {
        self.device.bind()?;
        let mut milliseconds = 0.0;
        // SAFETY: writes one float; both handles are alive.
        let result = unsafe { sys::cuEventElapsedTime_v2(&mut milliseconds, self.handle, end.handle) };
        check(result, || "taking the time between two events".to_owned())?;
        Ok(milliseconds)
    }

    pub(super) fn handle(&self) -> sys::CUevent {
        self.handle
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        if self.device.bind().is_ok() {
            // SAFETY: made by `new`; the driver keeps it until the work that waits for it is done.
            unsafe { sys::cuEventDestroy_v2(self.handle) };
        }
    }
}
