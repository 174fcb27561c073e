//! Streams: queues of work on a device.

use std::cell::{Cell, RefCell, RefMut};
use std::mem::size_of_val;
use std::ptr;
use std::sync::Arc;

use bytemuck::Pod;
use cudarc::driver::sys::{self, CUresult, CUstream_flags as Flags};

use super::error::{check, code};
use super::trace::Trace;
use super::{CudaError, Device, DeviceSlice, Event};

/// A queue of work: what is put into it runs in that order, beside the work of other streams.
///
/// A stream may move to another thread, but is fed by one at a time.
#[derive(Debug)]
pub struct Stream {
    device: Arc<Device>,
    handle: sys::CUstream,
    /// What was launched last: a fault that surfaces later has no better name.
    last: RefCell<Option<Arc<str>>>,
    launches: Cell<usize>,
    /// Times launches, where somebody has asked for that.
    trace: RefCell<Option<Trace>>,
}

// SAFETY: the handle names an object of the driver, which is not tied to a thread.
unsafe impl Send for Stream {}

impl Stream {
    pub(super) fn new(device: &Arc<Device>) -> Result<Self, CudaError> {
        device.bind()?;
        let mut handle = ptr::null_mut();
        // SAFETY: writes one handle.
        let result = unsafe { sys::cuStreamCreate(&mut handle, Flags::CU_STREAM_NON_BLOCKING as u32) };
        check(result, || "making a stream".to_owned())?;
        Ok(Self {
            device: Arc::clone(device),
            handle,
            last: RefCell::default(),
            launches: Cell::new(0),
            trace: RefCell::default(),
        })
    }

    /// The device it runs on.
    pub fn device(&self) -> &Arc<Device> {
        &self.device
    }

    /// Blocks until everything queued so far is done. Faults of kernels surface here at the latest.
    pub fn synchronize(&self) -> Result<(), CudaError> {
        self.device.bind()?;
        // SAFETY: the handle is alive.
        self.check(unsafe { sys::cuStreamSynchronize(self.handle) }, "waiting for a stream")
    }

    /// Work queued from now on starts after `event`, as it was last recorded.
    pub fn wait(&self, event: &Event) -> Result<(), CudaError> {
        self.device.bind()?;
        // SAFETY: both handles are alive.
        let result = unsafe { sys::cuStreamWaitEvent(self.handle, event.handle(), 0) };
        self.check(result, "making a stream wait for an event")
    }

    /// Puts `event` behind everything queued so far.
    pub fn record(&self, event: &Event) -> Result<(), CudaError> {
        self.device.bind()?;
        // SAFETY: both handles are alive.
        self.check(unsafe { sys::cuEventRecord(event.handle(), self.handle) }, "recording an event")
    }

    /// Copies `from` to the device, and waits until that is done.
    ///
    /// # Errors
    /// [`CudaError::Length`] unless both have the same number of elements.
    pub fn upload<'a, T: Pod>(
        &self,
        from: &[T],
        into: impl Into<DeviceSlice<'a, T>>,
    ) -> Result<(), CudaError> {
        // SAFETY: `from` is borrowed until the stream has passed the copy.
        let queued = unsafe { self.upload_async(from, into) };
        queued.and_then(|()| self.synchronize())
    }

    /// Copies `from` to the host, and waits until that is done.
    ///
    /// # Errors
    /// [`CudaError::Length`] unless both have the same number of elements.
    pub fn download<'a, T: Pod>(
        &self,
        from: impl Into<DeviceSlice<'a, T>>,
        into: &mut [T],
    ) -> Result<(), CudaError> {
        // SAFETY: `into` is borrowed until the stream has passed the copy.
        let queued = unsafe { self.download_async(from, into) };
        queued.and_then(|()| self.synchronize())
    }

    /// Queues a copy of `from` to the device. Only memory that is [`Pinned`](super::Pinned) is copied without waiting.
    ///
    /// # Errors
    /// [`CudaError::Length`] unless both have the same number of elements.
    ///
    /// # Safety
    /// Until the stream has passed the copy, and every replay of a graph that captured it, `from` is neither freed nor
    /// written to, and the device memory is alive.
    pub unsafe fn upload_async<'a, T: Pod>(
        &self,
        from: &[T],
        into: impl Into<DeviceSlice<'a, T>>,
    ) -> Result<(), CudaError> {
        let into = into.into();
        same_length("copy to the device", from.len(), into.len())?;
        if from.is_empty() {
            return Ok(());
        }
        self.device.bind()?;
        // SAFETY: as many bytes on both sides; the caller keeps both alive.
        let result = unsafe {
            sys::cuMemcpyHtoDAsync_v2(into.address(), from.as_ptr().cast(), size_of_val(from), self.handle)
        };
        self.check(result, "copying to the device")
    }

    /// Queues a copy of `from` to the host. Only memory that is [`Pinned`](super::Pinned) is copied without waiting.
    ///
    /// # Errors
    /// [`CudaError::Length`] unless both have the same number of elements.
    ///
    /// # Safety
    /// Until the stream has passed the copy, and every replay of a graph that captured it, `into` is neither freed, read
    /// nor written to, and the device memory is alive.
    pub unsafe fn download_async<'a, T: Pod>(
        &self,
        from: impl Into<DeviceSlice<'a, T>>,
        into: &mut [T],
    ) -> Result<(), CudaError> {
        let from = from.into();
        same_length("copy to the host", from.len(), into.len())?;
        if into.is_empty() {
            return Ok(());
        }
        self.device.bind()?;
        // SAFETY: as many bytes on both sides; the caller keeps both alive.
        let result = unsafe {
            sys::cuMemcpyDtoHAsync_v2(
                into.as_mut_ptr().cast(),
                from.address(),
                size_of_val(into),
                self.handle,
            )
        };
        self.check(result, "copying to the host")
    }

    /// Queues a copy within the device.
    ///
    /// # Errors
    /// [`CudaError::Length`] unless both have the same number of elements.
    ///
    /// # Safety
    /// Both sides are alive until the stream has passed the copy, and every replay of a graph that captured it.
    pub unsafe fn copy_async<'a, 'b, T: Pod>(
        &self,
        from: impl Into<DeviceSlice<'a, T>>,
        into: impl Into<DeviceSlice<'b, T>>,
    ) -> Result<(), CudaError> {
        let (from, into) = (from.into(), into.into());
        same_length("copy within the device", from.len(), into.len())?;
        if from.is_empty() {
            return Ok(());
        }
        self.device.bind()?;
        // SAFETY: as many bytes on both sides; the caller keeps both alive.
        let result =
            unsafe { sys::cuMemcpyDtoDAsync_v2(into.address(), from.address(), from.bytes(), self.handle) };
        self.check(result, "copying within the device")
    }

    /// Queues setting every byte of `memory` to `byte`.
    ///
    /// # Safety
    /// `memory` is alive until the stream has passed this, and every replay of a graph that captured it.
    pub unsafe fn fill_async<'a, T: Pod>(
        &self,
        memory: impl Into<DeviceSlice<'a, T>>,
        byte: u8,
    ) -> Result<(), CudaError> {
        let memory = memory.into();
        if memory.is_empty() {
            return Ok(());
        }
        self.device.bind()?;
        // SAFETY: that many bytes start at the address, and the caller keeps them alive.
        let result = unsafe { sys::cuMemsetD8Async(memory.address(), byte, memory.bytes(), self.handle) };
        self.check(result, "filling device memory")
    }

    /// The result of a call on this stream. A fault names the last launch, which it may be of.
    pub(super) fn check(&self, result: CUresult, operation: &str) -> Result<(), CudaError> {
        check(result, || match &*self.last.borrow() {
            Some(last) if code(result).is_some_and(|code| code.is_lost()) => {
                format!("{operation}, last launched: {last}")
            }
            _ => operation.to_owned(),
        })
    }

    /// Notes what was launched.
    pub(super) fn launched(&self, name: &Arc<str>) {
        self.last.replace(Some(Arc::clone(name)));
        self.launches.set(self.launches.get() + 1);
        self.trace_launch(name);
    }

    pub(super) fn trace_mut(&self) -> RefMut<'_, Option<Trace>> {
        self.trace.borrow_mut()
    }

    /// Launches so far.
    pub(super) fn launches(&self) -> usize {
        self.launches.get()
    }

    pub(super) fn handle(&self) -> sys::CUstream {
        self.handle
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if self.device.bind().is_ok() {
            // SAFETY: made by `new`; what is still queued runs to its end.
            unsafe { sys::cuStreamDestroy_v2(self.handle) };
        }
    }
}

fn same_length(operation: &'static str, from: usize, into: usize) -> Result<(), CudaError> {
    if from == into { Ok(()) } else { Err(CudaError::Length { operation, from, into }) }
}
