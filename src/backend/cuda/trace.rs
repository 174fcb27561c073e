//! How long single launches take: for benches and tools.
//!
//! While a stream is traced, an event stands behind every launch. Launches then neither overlap nor are replayed as graphs,
//! so their sum is more than a step takes. The host is slower than short kernels: a delay at the start keeps the device
//! from running empty.

use std::sync::Arc;

use super::{CudaError, DeviceBuffer, Event, Stream};

/// Memory that is filled for a delay, and how often: some milliseconds of a large GPU.
const DELAY_BYTES: usize = 16 << 20;
const DELAY_FILLS: usize = 400;

/// A launch, and the time from the end of the launch before it to its own: copies between them included.
#[derive(Clone, Debug)]
pub struct TracedLaunch {
    pub kernel: Arc<str>,
    pub seconds: f64,
}

/// Events behind launches.
#[derive(Debug)]
pub(super) struct Trace {
    start: Event,
    launches: Vec<(Arc<str>, Event)>,
    failed: Option<CudaError>,
    _delay: DeviceBuffer<u8>,
}

impl Trace {
    fn mark(&mut self, stream: &Stream, kernel: &Arc<str>) {
        let marked = stream.device().timing_event().and_then(|event| {
            stream.record(&event)?;
            self.launches.push((Arc::clone(kernel), event));
            Ok(())
        });
        if let Err(error) = marked {
            self.failed.get_or_insert(error);
        }
    }
}

impl Stream {
    /// Times launches from now on.
    pub(super) fn start_trace(&self) -> Result<(), CudaError> {
        let delay = DeviceBuffer::new(self.device(), DELAY_BYTES, "a delay")?;
        for _ in 0..DELAY_FILLS {
            // SAFETY: the buffer lives until `finish_trace`, which waits for the stream.
            unsafe { self.fill_async(&delay, 0) }?;
        }
        let start = self.device().timing_event()?;
        self.record(&start)?;
        let trace = Trace { start, launches: Vec::new(), failed: None, _delay: delay };
        *self.trace_mut() = Some(trace);
        Ok(())
    }

    /// Whether launches are timed.
    pub(super) fn is_traced(&self) -> bool {
        self.trace_mut().is_some()
    }

    /// Notes a launch where launches are timed.
    pub(super) fn trace_launch(&self, kernel: &Arc<str>) {
        if let Some(trace) = self.trace_mut().as_mut() {
            trace.mark(self, kernel);
        }
    }

    /// The launches since [`start_trace`](Self::start_trace), waited for.
    pub(super) fn finish_trace(&self) -> Result<Vec<TracedLaunch>, CudaError> {
        let trace = self.trace_mut().take();
        self.synchronize()?;
        let Some(Trace { start, launches, failed, .. }) = trace else { return Ok(Vec::new()) };
        if let Some(error) = failed {
            return Err(error);
        }
        let mut before = &start;
        let mut traced = Vec::with_capacity(launches.len());
        for (kernel, event) in &launches {
            let seconds = f64::from(before.elapsed_ms(event)?) / 1e3;
            traced.push(TracedLaunch { kernel: Arc::clone(kernel), seconds });
            before = event;
        }
        Ok(traced)
    }
}
