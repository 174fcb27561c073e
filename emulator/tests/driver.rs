//! The driver's side: launches and their limits, graphs, events, memory, tensor maps.

mod common;

use std::ffi::c_void;
use std::ptr::null_mut;

use common::{Buffer, Device, assert_names, ok};
use cudarc::driver::sys::{self, CUresult};
use half::{bf16, f16};

const INVALID_VALUE: CUresult = CUresult::CUDA_ERROR_INVALID_VALUE;

#[repr(C)]
#[derive(Clone, Copy)]
struct Axpy {
    y: u64,
    x: u64,
    a: f32,
    count: u32,
}

fn axpy(y: Buffer, x: Buffer, a: f32) -> Axpy {
    Axpy { y: y.address, x: x.address, a, count: (y.bytes / 4) as u32 }
}

// ---- launches ----

#[test]
fn kernels_are_found_by_name() {
    let device = Device::open();
    assert!(!device.function("test_axpy").is_null());
    let (mut module, mut function) = (null_mut(), null_mut());
    // SAFETY: every call gets pointers to what it fills.
    unsafe {
        ok(sys::cuModuleLoadData(&mut module, [0u8].as_ptr().cast()));
        let found = sys::cuModuleGetFunction(&mut function, module, c"no_such_kernel".as_ptr());
        assert_eq!(found, CUresult::CUDA_ERROR_NOT_FOUND);
        assert_eq!(sys::cuModuleLoadData(&mut module, std::ptr::null()), INVALID_VALUE);
    }
}

#[test]
fn a_launch_keeps_to_the_launch_bounds() {
    let device = Device::open();
    let (x, y) = (device.upload(&[1.0f32; 512]), device.upload(&[0.0f32; 512]));
    ok(device.launch("test_axpy", 2, 256, 0, axpy(y, x, 1.0)));
    assert_eq!(device.launch("test_axpy", 2, 257, 0, axpy(y, x, 1.0)), INVALID_VALUE);
    let report = loramux_emulator::last_report().unwrap();
    assert_names(&report, &["launch of test_axpy refused: 257 threads, more than its launch bound of 256"]);
    assert_eq!(device.launch("test_axpy", 0, 256, 0, axpy(y, x, 1.0)), INVALID_VALUE);
    assert_eq!(device.launch("test_axpy", 2, 0, 0, axpy(y, x, 1.0)), INVALID_VALUE);
    assert_eq!(device.download::<f32>(y), [1.0; 512], "a launch that is refused does nothing");
}

#[test]
fn more_than_48_kilobytes_of_shared_memory_need_the_kernels_attribute() {
    use sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES as MOST;
    let device = Device::open();
    let (x, y) = (device.upload(&[1.0f32; 256]), device.upload(&[0.0f32; 256]));
    let launch = |shared| device.launch("test_axpy", 1, 256, shared, axpy(y, x, 1.0));
    let function = device.function("test_axpy");
    ok(launch(48 << 10));
    assert_eq!(launch((48 << 10) + 1), INVALID_VALUE);
    // SAFETY: the function exists.
    unsafe {
        assert_eq!(sys::cuFuncSetAttribute(function, MOST, (227 << 10) + 1), INVALID_VALUE);
        ok(sys::cuFuncSetAttribute(function, MOST, 227 << 10));
        ok(launch(227 << 10));
        assert_eq!(launch((227 << 10) + 1), INVALID_VALUE);
        ok(sys::cuFuncSetAttribute(function, MOST, 48 << 10));
    }
}

#[test]
fn a_cluster_divides_the_grid() {
    let device = Device::open();
    let (x, y) = (device.upload(&[1.0f32; 1024]), device.upload(&[0.0f32; 1024]));
    let launch = |blocks: u32, cluster: u32| {
        let mut params = axpy(y, x, 1.0);
        let mut arguments = [(&raw mut params).cast::<c_void>()];
        // SAFETY: an attribute is plain numbers; the kernel takes an `Axpy`.
        unsafe {
            let mut attributes: [sys::CUlaunchAttribute; 2] = std::mem::zeroed();
            attributes[0].id = sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION;
            attributes[0].value.clusterDim.x = cluster;
            attributes[0].value.clusterDim.y = 1;
            attributes[0].value.clusterDim.z = 1;
            attributes[1].id =
                sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
            attributes[1].value.programmaticStreamSerializationAllowed = 1;
            let config = sys::CUlaunchConfig {
                gridDimX: blocks,
                gridDimY: 1,
                gridDimZ: 1,
                blockDimX: 256,
                blockDimY: 1,
                blockDimZ: 1,
                sharedMemBytes: 0,
                hStream: device.stream,
                attrs: attributes.as_mut_ptr(),
                numAttrs: 2,
            };
            sys::cuLaunchKernelEx(&config, device.function("test_axpy"), arguments.as_mut_ptr(), null_mut())
        }
    };
    ok(launch(4, 2));
    assert_eq!(device.download::<f32>(y), [1.0; 1024]);
    assert_eq!(launch(3, 2), INVALID_VALUE);
    assert_eq!(launch(32, 16), CUresult::CUDA_ERROR_INVALID_CLUSTER_SIZE);
}

#[test]
fn occupancy_follows_from_threads_and_shared_memory() {
    let device = Device::open();
    let function = device.function("test_axpy");
    let blocks = |threads, shared| {
        let mut blocks = 0;
        // SAFETY: fills `blocks`.
        ok(unsafe {
            sys::cuOccupancyMaxActiveBlocksPerMultiprocessor(&mut blocks, function, threads, shared)
        });
        blocks
    };
    assert_eq!(blocks(32, 48 << 10), 4);
    assert_eq!(blocks(257, 0), 0);
    assert!((1..=8).contains(&blocks(256, 0)));
}

// ---- what lanes do together ----

#[repr(C)]
struct Mma {
    a: u64,
    b: u64,
    sums: u64,
    repeats: u32,
}

#[test]
fn tensor_cores_multiply_as_a_loop_does_in_both_types() {
    let device = Device::open();
    // Small numbers that both types hold exactly.
    let a: Vec<f32> = (0..16 * 16).map(|i| ((i * 37 % 61) as f32 - 30.0) / 8.0).collect();
    let b: Vec<f32> = (0..8 * 16).map(|i| ((i * 29 % 53) as f32 - 26.0) / 16.0).collect();
    let of_bf16: fn(&f32) -> u16 = |&value| bf16::from_f32(value).to_bits();
    let of_f16: fn(&f32) -> u16 = |&value| f16::from_f32(value).to_bits();
    for seed in 0..4 {
        loramux_emulator::set_seed(seed);
        for (kernel, bits) in [("test_mma", of_bf16), ("test_mma_f16", of_f16)] {
            let bits = |values: &[f32]| values.iter().map(bits).collect::<Vec<_>>();
            let (a_bits, b_bits) = (device.upload(&bits(&a)), device.upload(&bits(&b)));
            let sums = device.allocate(16 * 8 * 4);
            let params = Mma { a: a_bits.address, b: b_bits.address, sums: sums.address, repeats: 3 };
            ok(device.launch(kernel, 1, 32, (16 + 8) * 24 * 2, params));
            let expected: Vec<f32> = (0..16 * 8)
                .map(|i| 3.0 * (0..16).map(|k| a[i / 8 * 16 + k] * b[i % 8 * 16 + k]).sum::<f32>())
                .collect();
            assert_eq!(device.download::<f32>(sums), expected, "{kernel}");
        }
    }
}

#[repr(C)]
struct Round {
    values: u64,
    pairs: u64,
    rounded: u64,
    count: u32,
}

#[test]
fn elements_are_rounded_as_their_type_says() {
    let device = Device::open();
    // Every fp16 value, its neighbours among floats, and the ties between it and the next one; all powers of two.
    let mut values = vec![f32::MAX, f32::MIN_POSITIVE, f32::INFINITY, f32::NEG_INFINITY, 65519.996, 65520.0];
    for bits in 0..=u16::MAX {
        let [value, next] = [bits, bits.wrapping_add(1)].map(|bits| f16::from_bits(bits).to_f32());
        if value.is_finite() {
            values.extend([value, value.next_up(), value.next_down(), (value + next) / 2.0]);
        }
    }
    values.extend((0..255).map(|exponent| f32::from_bits(exponent << 23)));
    values.extend(values.clone().iter().map(|value| value * 1.000_213));
    values.retain(|value| !value.is_nan());
    values.push(f32::NAN);
    let count = values.len();
    let on_device = device.upload(&values);
    type Rounding = fn(f32) -> (u16, f32);
    let of_bf16: Rounding = |value| (bf16::from_f32(value).to_bits(), bf16::from_f32(value).to_f32());
    let of_f16: Rounding = |value| (f16::from_f32(value).to_bits(), f16::from_f32(value).to_f32());
    for (kernel, rounding) in [("test_round", of_bf16), ("test_round_f16", of_f16)] {
        let (pairs, rounded) = (device.allocate(count * 4), device.allocate(count * 8));
        let params = Round {
            values: on_device.address,
            pairs: pairs.address,
            rounded: rounded.address,
            count: count as u32,
        };
        ok(device.launch(kernel, count.div_ceil(256) as u32, 256, 0, params));
        let (pairs, rounded) = (device.download::<u32>(pairs), device.download::<f32>(rounded));
        for (i, &value) in values.iter().enumerate() {
            let (bits, float) = rounding(value);
            // Every NaN becomes the same.
            let bits = if value.is_nan() { 0x7fff } else { u32::from(bits) };
            assert_eq!(pairs[i], bits << 16 | bits, "{value} in {kernel}");
            for float_of_half in [rounded[i * 2], rounded[i * 2 + 1]] {
                let same = float_of_half.to_bits() == float.to_bits();
                assert!(same || value.is_nan() && float_of_half.is_nan(), "{value} in {kernel}");
            }
        }
    }
}

#[test]
fn lanes_exchange_what_cuda_says() {
    let device = Device::open();
    for seed in 0..4 {
        loramux_emulator::set_seed(seed);
        let out = device.allocate(17 * 64 * 4);
        ok(device.launch("test_exchange", 1, 64, 0, out.address));
        let out = device.download::<u32>(out);
        for t in 0..64 {
            let (lane, warp) = (t % 32, t / 32 * 32);
            let shifted = |partner: Option<u32>| warp + partner.unwrap_or(lane);
            let of_warp = || warp..warp + 32;
            let expected = [
                warp + 3,
                warp + lane / 8 * 8 + 3,
                shifted(lane.checked_sub(5)),
                shifted(lane.checked_sub(5).filter(|partner| partner / 16 == lane / 16)),
                shifted(Some(lane + 5).filter(|&partner| partner < 32)),
                shifted(Some(lane + 5).filter(|partner| partner / 16 == lane / 16)),
                warp + (lane ^ 9),
                // Partners in a lower segment are read, those in a higher one are not.
                shifted(Some(lane ^ 9).filter(|partner| partner / 8 <= lane / 8)),
                of_warp().filter(|t| t % 3 == 0).map(|t| 1 << (t % 32)).sum(),
                u32::from(warp == 32),
                u32::from(warp == 0),
                of_warp().sum(),
                warp + 31,
                if lane < 16 { (warp..warp + 16).sum() } else { 16 },
                13,
                1,
                0,
            ];
            let found: Vec<u32> = (0..17).map(|function| out[function * 64 + t as usize]).collect();
            assert_eq!(found, expected, "thread {t}, seed {seed}");
        }
    }
}

// ---- streams, events, graphs ----

fn instantiate(graph: sys::CUgraph) -> sys::CUgraphExec {
    let mut executable = null_mut();
    // SAFETY: the graph exists; what it was made from lives on in the executable.
    unsafe {
        ok(sys::cuGraphInstantiateWithFlags(&mut executable, graph, 0));
        ok(sys::cuGraphDestroy(graph));
    }
    executable
}

#[test]
fn a_graph_replays_what_was_captured_by_value() {
    let device = Device::open();
    let host: Vec<f32> = (0..100).map(|i| i as f32).collect();
    let (x, y, copy) = (device.allocate(400), device.allocate(400), device.allocate(400));
    let waits = loramux_emulator::synchronizations();
    device.begin_capture();
    {
        let mut params = axpy(y, x, 2.0);
        // SAFETY: `host` outlives the graph.
        unsafe {
            ok(sys::cuMemcpyHtoDAsync_v2(x.address, host.as_ptr().cast(), 400, device.stream));
            ok(sys::cuMemsetD32Async(y.address, 1.0f32.to_bits(), 100, device.stream));
        }
        ok(device.launch("test_axpy", 1, 128, 0, params));
        // What the caller does with its parameters later is none of the graph's business.
        params.a = 100.0;
        std::hint::black_box(params);
        // SAFETY: both buffers have 400 bytes.
        ok(unsafe { sys::cuMemcpyDtoDAsync_v2(copy.address, y.address, 400, device.stream) });
    }
    let graph = device.end_capture().unwrap();
    let executable = instantiate(graph);
    assert!(device.download::<f32>(copy).iter().all(|value| value.is_nan()), "capturing runs nothing");
    for _ in 0..3 {
        // SAFETY: the executable exists.
        unsafe {
            ok(sys::cuMemsetD8_v2(copy.address, 0, 400));
            ok(sys::cuGraphUpload(executable, device.stream));
            ok(sys::cuGraphLaunch(executable, device.stream));
            ok(sys::cuStreamSynchronize(device.stream));
        }
        let expected: Vec<f32> = host.iter().map(|x| 1.0 + 2.0 * x).collect();
        assert_eq!(device.download::<f32>(copy), expected);
    }
    // Downloads and fills that are not asynchronous wait, too.
    assert_eq!(loramux_emulator::synchronizations() - waits, 1 + 3 * 3);
    // SAFETY: the executable exists, and then no more.
    unsafe {
        ok(sys::cuGraphExecDestroy(executable));
        assert_eq!(sys::cuGraphLaunch(executable, device.stream), INVALID_VALUE);
    }
}

#[test]
fn calls_that_a_capture_forbids_end_it() {
    let device = Device::open();
    let unsupported = CUresult::CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
    let x = device.allocate(4);
    let mut word = 0u32;
    let mut pinned = null_mut();
    let mut address = 0;
    // SAFETY: every call gets pointers to what it fills, and is refused.
    let forbidden: [&mut dyn FnMut() -> CUresult; 6] = unsafe {
        [
            &mut || sys::cuMemAlloc_v2(&mut address, 4),
            &mut || sys::cuMemFree_v2(x.address),
            &mut || sys::cuMemHostAlloc(&mut pinned, 4, 0),
            &mut || sys::cuMemcpyDtoH_v2((&raw mut word).cast(), x.address, 4),
            &mut || sys::cuStreamSynchronize(device.stream),
            &mut || sys::cuCtxSynchronize(),
        ]
    };
    for call in forbidden {
        device.begin_capture();
        assert_eq!(call(), unsupported);
        let invalidated = CUresult::CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
        assert_eq!(device.launch("test_axpy", 1, 1, 0, axpy(x, x, 1.0)), invalidated);
        assert_eq!(device.end_capture(), Err(invalidated));
        // The stream is as before.
        device.begin_capture();
        ok(device.launch("test_axpy", 1, 1, 0, axpy(x, x, 1.0)));
        // SAFETY: the graph exists.
        ok(unsafe { sys::cuGraphDestroy(device.end_capture().unwrap()) });
    }
}

#[test]
fn a_capture_forks_and_joins_over_events() {
    let device = Device::open();
    let (x, y) = (device.upload(&[1.0f32; 4]), device.upload(&[0.0f32; 4]));
    let (mut side, mut fork, mut join, mut outside) = (null_mut(), null_mut(), null_mut(), null_mut());
    // SAFETY: every handle comes from the call that makes it.
    unsafe {
        ok(sys::cuStreamCreate(&mut side, 1));
        for event in [&mut fork, &mut join, &mut outside] {
            ok(sys::cuEventCreate(event, 2));
        }
        let launch_on_side = || {
            let mut params = axpy(y, x, 2.0);
            let mut arguments = [(&raw mut params).cast::<c_void>()];
            let function = device.function("test_axpy");
            ok(sys::cuLaunchKernel(function, 1, 1, 1, 4, 1, 1, 0, side, arguments.as_mut_ptr(), null_mut()));
        };
        for joined in [true, false] {
            device.begin_capture();
            ok(sys::cuEventRecord(fork, device.stream));
            ok(sys::cuStreamWaitEvent(side, fork, 0));
            launch_on_side();
            ok(sys::cuEventRecord(join, side));
            if joined {
                ok(sys::cuStreamWaitEvent(device.stream, join, 0));
                let executable = instantiate(device.end_capture().unwrap());
                assert_eq!(device.download::<f32>(y), [0.0; 4]);
                ok(sys::cuGraphLaunch(executable, device.stream));
                assert_eq!(device.download::<f32>(y), [2.0; 4]);
                ok(sys::cuGraphExecDestroy(executable));
            } else {
                assert_eq!(device.end_capture(), Err(CUresult::CUDA_ERROR_STREAM_CAPTURE_UNJOINED));
            }
        }
        ok(sys::cuEventRecord(outside, device.stream));
        device.begin_capture();
        let isolation = CUresult::CUDA_ERROR_STREAM_CAPTURE_ISOLATION;
        assert_eq!(sys::cuStreamWaitEvent(device.stream, outside, 0), isolation);
        assert_eq!(device.end_capture(), Err(CUresult::CUDA_ERROR_STREAM_CAPTURE_INVALIDATED));
        device.begin_capture();
        ok(sys::cuEventRecord(fork, device.stream));
        assert_eq!(sys::cuEventSynchronize(fork), CUresult::CUDA_ERROR_CAPTURED_EVENT);
        assert_eq!(device.end_capture(), Err(CUresult::CUDA_ERROR_STREAM_CAPTURE_INVALIDATED));
        ok(sys::cuStreamDestroy_v2(side));
        assert_eq!(sys::cuStreamSynchronize(side), CUresult::CUDA_ERROR_INVALID_HANDLE);
    }
}

#[test]
fn events_measure_time_unless_they_were_told_not_to() {
    let device = Device::open();
    let (mut start, mut end, mut untimed) = (null_mut(), null_mut(), null_mut());
    let mut milliseconds = -1.0f32;
    // SAFETY: every handle comes from the call that makes it.
    unsafe {
        let invalid = CUresult::CUDA_ERROR_INVALID_HANDLE;
        ok(sys::cuEventCreate(&mut start, 0));
        ok(sys::cuEventCreate(&mut end, 0));
        ok(sys::cuEventCreate(&mut untimed, 2));
        assert_eq!(
            sys::cuEventElapsedTime_v2(&mut milliseconds, start, end),
            invalid,
            "nothing was recorded"
        );
        ok(sys::cuEventRecord(start, device.stream));
        ok(sys::cuEventRecord(untimed, device.stream));
        ok(sys::cuEventRecord(end, device.stream));
        ok(sys::cuEventQuery(end));
        ok(sys::cuEventSynchronize(end));
        let waits = loramux_emulator::synchronizations_of_thread();
        loramux_emulator::hold_events(true);
        assert_eq!(sys::cuEventQuery(end), CUresult::CUDA_ERROR_NOT_READY, "held");
        ok(sys::cuEventSynchronize(end));
        loramux_emulator::hold_events(false);
        ok(sys::cuEventQuery(end));
        assert_eq!(loramux_emulator::synchronizations_of_thread() - waits, 1);
        let elsewhere = std::thread::spawn(loramux_emulator::synchronizations_of_thread).join();
        assert_eq!(elsewhere.expect("a number"), 0, "another thread has not waited");
        ok(sys::cuEventElapsedTime_v2(&mut milliseconds, start, end));
        assert!((0.0..1000.0).contains(&milliseconds));
        assert_eq!(sys::cuEventElapsedTime_v2(&mut milliseconds, start, untimed), invalid);
        ok(sys::cuEventDestroy_v2(end));
        assert_eq!(sys::cuEventQuery(end), invalid);
    }
}

// ---- memory ----

#[test]
fn memory_is_counted_and_runs_out() {
    let device = Device::open();
    let info = || {
        let (mut free, mut total) = (0, 0);
        // SAFETY: fills both.
        ok(unsafe { sys::cuMemGetInfo_v2(&mut free, &mut total) });
        (free, total)
    };
    loramux_emulator::set_memory(1 << 20);
    assert_eq!(info(), (1 << 20, 1 << 20));
    let before = [loramux_emulator::allocations(), loramux_emulator::allocations_of_thread()];
    let half = device.allocate(1 << 19);
    assert_eq!(half.address % 256, 0);
    assert_eq!(info().0, 1 << 19);
    let mut address = 0;
    // SAFETY: fills `address`.
    unsafe {
        assert_eq!(sys::cuMemAlloc_v2(&mut address, (1 << 19) + 1), CUresult::CUDA_ERROR_OUT_OF_MEMORY);
        assert_eq!(sys::cuMemAlloc_v2(&mut address, 0), INVALID_VALUE);
        ok(sys::cuMemAllocAsync(&mut address, 1 << 19, device.stream));
        ok(sys::cuMemFreeAsync(address, device.stream));
    }
    device.free(half);
    assert_eq!(info().0, 1 << 20);
    assert_eq!(loramux_emulator::allocations() - before[0], 3);
    assert_eq!(loramux_emulator::allocations_of_thread() - before[1], 3);
    let elsewhere = std::thread::spawn(loramux_emulator::allocations_of_thread).join();
    assert_eq!(elsewhere.expect("a number"), 0, "another thread has allocated nothing");
    loramux_emulator::set_memory(2 << 30);
}

#[test]
fn attributes_describe_the_device() {
    use sys::CUdevice_attribute::*;
    let _device = Device::open();
    loramux_emulator::set_multiprocessors(6);
    let attribute = |attribute| {
        let mut value = -1;
        // SAFETY: fills `value`.
        ok(unsafe { sys::cuDeviceGetAttribute(&mut value, attribute, 0) });
        value
    };
    assert_eq!(attribute(CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT), 6);
    assert_eq!(attribute(CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN), 227 << 10);
    assert_eq!(attribute(CU_DEVICE_ATTRIBUTE_WARP_SIZE), 32);
    loramux_emulator::set_multiprocessors(4);
    let (mut name, mut text) = (std::ptr::null(), std::ptr::null());
    // SAFETY: both answers are strings that live as long as the driver.
    unsafe {
        ok(sys::cuGetErrorName(CUresult::CUDA_ERROR_NOT_FOUND, &mut name));
        ok(sys::cuGetErrorString(CUresult::CUDA_ERROR_NOT_FOUND, &mut text));
        assert_eq!(std::ffi::CStr::from_ptr(name), c"CUDA_ERROR_NOT_FOUND");
        assert!(!std::ffi::CStr::from_ptr(text).is_empty());
    }
}

#[test]
fn a_thread_without_a_context_is_refused() {
    let _device = Device::open();
    let elsewhere = std::thread::spawn(|| {
        let mut address = 0;
        // SAFETY: fills `address`.
        unsafe { sys::cuMemAlloc_v2(&mut address, 4) }
    });
    assert_eq!(elsewhere.join().unwrap(), CUresult::CUDA_ERROR_INVALID_CONTEXT);
}

// ---- tensor maps ----

/// The arguments of a tensor map over `[rows, columns]` bfloat16 values.
#[derive(Clone, Copy)]
struct Tiled {
    address: u64,
    sizes: [u64; 2],
    stride: u64,
    box_sizes: [u32; 2],
    element_strides: [u32; 2],
    swizzle: sys::CUtensorMapSwizzle,
}

fn encode(tiled: Tiled) -> CUresult {
    use sys::{
        CUtensorMapDataType as Type, CUtensorMapFloatOOBfill as Fill, CUtensorMapInterleave as Interleave,
    };
    let mut map = std::mem::MaybeUninit::<sys::CUtensorMap>::uninit();
    // SAFETY: the arrays have as many elements as the rank says.
    unsafe {
        sys::cuTensorMapEncodeTiled(
            map.as_mut_ptr(),
            Type::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
            2,
            tiled.address as *mut c_void,
            tiled.sizes.as_ptr(),
            &tiled.stride,
            tiled.box_sizes.as_ptr(),
            tiled.element_strides.as_ptr(),
            Interleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
            tiled.swizzle,
            sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            Fill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    }
}

#[test]
fn tensor_maps_are_checked_as_documented() {
    use sys::CUtensorMapSwizzle::*;
    let device = Device::open();
    let right = Tiled {
        address: device.allocate(1 << 16).address,
        sizes: [100, 64],
        stride: 208,
        box_sizes: [64, 32],
        element_strides: [1, 1],
        swizzle: CU_TENSOR_MAP_SWIZZLE_128B,
    };
    ok(encode(right));
    ok(encode(Tiled { box_sizes: [32, 256], swizzle: CU_TENSOR_MAP_SWIZZLE_64B, ..right }));
    ok(encode(Tiled { box_sizes: [256, 1], swizzle: CU_TENSOR_MAP_SWIZZLE_NONE, ..right }));
    let wrong = [
        Tiled { address: right.address + 8, ..right },
        Tiled { address: 0, ..right },
        Tiled { sizes: [100, 0], ..right },
        Tiled { sizes: [(1 << 32) + 1, 64], ..right },
        Tiled { stride: 200, ..right },
        Tiled { stride: 1 << 40, ..right },
        Tiled { box_sizes: [64, 257], ..right },
        Tiled { box_sizes: [64, 0], ..right },
        // 72 bytes are no multiple of 16, and 144 more than the swizzle's span.
        Tiled { box_sizes: [36, 32], ..right },
        Tiled { box_sizes: [72, 32], ..right },
        Tiled { swizzle: CU_TENSOR_MAP_SWIZZLE_64B, ..right },
        Tiled { element_strides: [1, 9], ..right },
        Tiled { element_strides: [0, 1], ..right },
    ];
    for (case, &tiled) in wrong.iter().enumerate() {
        assert_eq!(encode(tiled), INVALID_VALUE, "case {case}");
    }
}
