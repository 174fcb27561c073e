//! Graphs: a sequence of launches, captured once and replayed as one.

use std::ptr;
use std::sync::Arc;

use cudarc::driver::sys::{self, CUresult, CUstreamCaptureMode as Mode};

use super::error::check;
use super::{CudaError, Device, ResultCode, Stream};

/// Work that was captured from a stream.
///
/// A replay uses the addresses and parameters of the capture: what differs from step to step is read from memory on the
/// device. May move to another thread, but is replayed by one at a time, since the driver does not lock graphs.
#[derive(Debug)]
pub struct Graph {
    device: Arc<Device>,
    handle: sys::CUgraphExec,
    name: Arc<str>,
}

// SAFETY: the handle names an object of the driver that is not tied to a thread; without `Sync`, one uses it at a time.
unsafe impl Send for Graph {}

impl Stream {
    /// Captures what `work` queues on this stream, without running it.
    ///
    /// Within `work`, this thread can neither wait, nor allocate, nor free memory: such a call fails, and with it the
    /// capture. Whatever happens, the stream is not capturing afterwards.
    ///
    /// # Errors
    /// The error of `work`; or the driver's, when the capture has been spoilt.
    pub fn capture(&self, work: impl FnOnce() -> Result<(), CudaError>) -> Result<Graph, CudaError> {
        let capture = self.start_capture()?;
        let worked = work();
        let captured = capture.finish(self);
        worked?;
        captured
    }

    /// Captures what is queued on this stream until [`Capture::finish`]; see [`capture`](Self::capture).
    pub(super) fn start_capture(&self) -> Result<Capture, CudaError> {
        self.device().bind()?;
        // Only this thread is held to the rules of captures: others may allocate meanwhile.
        let mode = Mode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream is alive.
        let result = unsafe { sys::cuStreamBeginCapture_v2(self.handle(), mode) };
        self.check(result, "starting a capture")?;
        let device = Arc::clone(self.device());
        Ok(Capture { device, stream: self.handle(), open: true, before: self.launches() })
    }
}

impl Graph {
    /// Queues a replay on `stream`.
    ///
    /// # Safety
    /// What was promised for each captured launch and copy holds again: their memory is alive until the stream has
    /// passed this replay.
    pub unsafe fn launch(&self, stream: &Stream) -> Result<(), CudaError> {
        self.device.bind()?;
        // SAFETY: both handles are alive; the rest is the caller's promise.
        let result = unsafe { sys::cuGraphLaunch(self.handle, stream.handle()) };
        check(result, || format!("launch of {}", self.name))?;
        stream.launched(&self.name);
        Ok(())
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        if self.device.bind().is_ok() {
            // SAFETY: made by `capture`; replays under way run to their end.
            unsafe { sys::cuGraphExecDestroy(self.handle) };
        }
    }
}

/// A stream that is capturing. Dropped, also by a panic, it ends the capture; it must not outlive the stream.
pub(super) struct Capture {
    device: Arc<Device>,
    stream: sys::CUstream,
    open: bool,
    before: usize,
}

impl Capture {
    /// The graph of what was queued on `stream`, the one that is capturing, since the start.
    pub fn finish(mut self, stream: &Stream) -> Result<Graph, CudaError> {
        assert_eq!(self.stream, stream.handle(), "a capture of another stream");
        let (result, template) = self.end();
        stream.check(result, "ending a capture")?;
        let mut handle = ptr::null_mut();
        // SAFETY: writes one handle; the template is alive.
        let result = unsafe { sys::cuGraphInstantiateWithFlags(&mut handle, template.0, 0) };
        check(result, || "making a graph".to_owned())?;
        let name = format!("a graph of {} kernels", stream.launches() - self.before).into();
        let graph = Graph { device: Arc::clone(&self.device), handle, name };
        // SAFETY: both handles are alive.
        stream.check(unsafe { sys::cuGraphUpload(graph.handle, stream.handle()) }, "uploading a graph")?;
        Ok(graph)
    }

    fn end(&mut self) -> (CUresult, Template) {
        self.open = false;
        let mut template = Template(ptr::null_mut());
        if let Err(error) = self.device.bind() {
            return (error.code().map_or(CUresult::CUDA_ERROR_INVALID_CONTEXT, ResultCode::raw), template);
        }
        // SAFETY: writes one handle, null where the capture is spoilt; the stream is alive.
        let result = unsafe { sys::cuStreamEndCapture(self.stream, &mut template.0) };
        (result, template)
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        if self.open {
            // An error or a panic is on its way, which says more than this could.
            let _ = self.end();
        }
    }
}

/// What a capture leaves: graphs that can be launched are made of it.
struct Template(sys::CUgraph);

impl Drop for Template {
    fn drop(&mut self) {
        if !self.0.is_null() {
            // SAFETY: made by `Capture::end`, with the context current since.
            unsafe { sys::cuGraphDestroy(self.0) };
        }
    }
}
