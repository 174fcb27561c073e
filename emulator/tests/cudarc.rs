//! The product's way to a device: cudarc finds the stand-in and works on it.

use std::ffi::c_void;
use std::sync::Arc;

use cudarc::driver::{CudaContext, CudaSlice, CudaStream, DevicePtr, result, sys};

#[repr(C)]
struct Axpy {
    y: u64,
    x: u64,
    a: f32,
    count: u32,
}

fn launch(
    stream: &Arc<CudaStream>,
    function: sys::CUfunction,
    y: &CudaSlice<f32>,
    x: &CudaSlice<f32>,
    a: f32,
) {
    let count = u32::try_from(y.len()).unwrap();
    let mut params = Axpy { y: y.device_ptr(stream).0, x: x.device_ptr(stream).0, a, count };
    let mut arguments = [(&raw mut params).cast::<c_void>()];
    let grid = (count.div_ceil(256), 1, 1);
    // SAFETY: the kernel takes one `Axpy` and stays within the `count` elements of both slices.
    unsafe { result::launch_kernel(function, grid, (256, 1, 1), 0, stream.cu_stream(), &mut arguments) }
        .unwrap();
}

#[test]
fn cudarc_runs_a_kernel_and_replays_a_graph() {
    loramux_emulator::install();
    // SAFETY: looks for a library by name.
    assert!(unsafe { sys::is_culib_present() });
    let context = CudaContext::new(0).unwrap();
    // SAFETY: one stream does all the work.
    unsafe { context.disable_event_tracking() };
    assert_eq!(context.name().unwrap(), "loramux emulator");
    assert_eq!(context.compute_capability().unwrap(), (9, 0));
    assert!(context.has_async_alloc());

    // SAFETY: the stand-in does not look at images.
    let module = unsafe { result::module::load_data(b"no image".as_ptr().cast()) }.unwrap();
    // SAFETY: `module` was just loaded.
    let function = unsafe { result::module::get_function(module, c"test_axpy".to_owned()) }.unwrap();

    let stream = context.new_stream().unwrap();
    let numbers: Vec<f32> = (0..1000).map(|i| i as f32).collect();
    let x = stream.clone_htod(&numbers).unwrap();
    let y = stream.alloc_zeros::<f32>(1000).unwrap();
    let start = stream.record_event(Some(sys::CUevent_flags::CU_EVENT_DEFAULT)).unwrap();
    launch(&stream, function, &y, &x, 1.0);
    let end = stream.record_event(Some(sys::CUevent_flags::CU_EVENT_DEFAULT)).unwrap();
    assert!(start.elapsed_ms(&end).unwrap() > 0.0);
    assert_eq!(stream.clone_dtoh(&y).unwrap(), numbers);

    stream.begin_capture(sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).unwrap();
    launch(&stream, function, &y, &x, 2.0);
    launch(&stream, function, &y, &x, 3.0);
    let graph = stream.end_capture(sys::CUgraphInstantiate_flags(0)).unwrap().unwrap();
    graph.upload().unwrap();
    assert_eq!(stream.clone_dtoh(&y).unwrap(), numbers, "a captured kernel does not run");
    let before = loramux_emulator::launches();
    for _ in 0..3 {
        graph.launch().unwrap();
    }
    stream.synchronize().unwrap();
    assert_eq!(loramux_emulator::launches() - before, 6);
    let expected: Vec<f32> = numbers.iter().map(|x| x * 16.0).collect();
    assert_eq!(stream.clone_dtoh(&y).unwrap(), expected);
    drop((graph, x, y, stream));
    context.check_err().unwrap();
    // SAFETY: nothing of the module is in use.
    unsafe { result::module::unload(module) }.unwrap();
}
