//! The layer over the CUDA driver, on the emulator: what comes back, in which order, and what its errors say.
#![cfg(feature = "cuda")]

#[path = "common/cuda_device.rs"]
mod cuda_device;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::process::{Command, Output};

use bytemuck::Zeroable;
use cuda_device::device;
use loramux::backend::cuda::params::{
    CHUNK_LISTS_THREADS, ChunkListGroup, ChunkListParams, ChunkListSite, RankChunk, SlotChunks,
};
use loramux::backend::cuda::{
    Arena, CudaError, Device, DeviceBuffer, Kernel, LOST_EXIT_CODE, Launch, MapElement, Pinned, Stream,
    Swizzle, TiledTensor,
};

/// The system's allocator, which counts what each thread allocates.
struct Counting;

thread_local! {
    static ALLOCATIONS: Cell<usize> = const { Cell::new(0) };
}

// SAFETY: every call is passed on to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.set(ALLOCATIONS.get() + 1);
        // SAFETY: as above.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Set in processes that a test starts to see how they end.
const CHILD: &str = "LORAMUX_TEST_CHILD";

/// This test again, in a process of its own.
fn child(test: &str) -> Output {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", test, "--nocapture", "--test-threads=1"]).env(CHILD, "1").output().unwrap()
}

fn is_child() -> bool {
    std::env::var_os(CHILD).is_some()
}

/// `chunk_lists` for one row, one site and one slot with `CHUNKS` chunks: it lists the slot's chunk ids.
struct Lists {
    kernel: Kernel<ChunkListParams>,
    params: ChunkListParams,
    chunk_ids: DeviceBuffer<u32>,
    chunks: DeviceBuffer<RankChunk>,
    _others: Vec<DeviceBuffer<u32>>,
    _slots: DeviceBuffer<SlotChunks>,
    _groups: DeviceBuffer<ChunkListGroup>,
}

const CHUNKS: usize = 3;
const LAUNCH: Launch = Launch {
    grid: [1, 1, 1],
    block: CHUNK_LISTS_THREADS as u32,
    shared_bytes: 0,
    cluster: None,
    overlap_previous: false,
};

impl Lists {
    fn new(stream: &Stream) -> Self {
        let device = stream.device();
        let numbers = |values: &[u32]| {
            let buffer = DeviceBuffer::new(device, values.len(), "numbers").unwrap();
            stream.upload(values, &buffer).unwrap();
            buffer
        };
        let chunk_ids = numbers(&[0; CHUNKS]);
        let chunks = DeviceBuffer::new(device, CHUNKS, "chunks").unwrap();
        let slots = DeviceBuffer::new(device, 1, "slots").unwrap();
        stream
            .upload(&[SlotChunks { count: CHUNKS as u32, scale: 0.5, ..Zeroable::zeroed() }], &slots)
            .unwrap();
        let (starts, rows, tile_entries, entry_slots, overflow) =
            (numbers(&[0; 2]), numbers(&[1]), numbers(&[0, 1]), numbers(&[0]), numbers(&[0]));
        let mut group = ChunkListGroup {
            starts: starts.address(),
            chunks: chunks.address(),
            sites: 1,
            slices: 1,
            tile_capacity: CHUNKS as u32,
            ..ChunkListGroup::zeroed()
        };
        group.site[0] = ChunkListSite {
            slots: slots.address(),
            chunk_ids: chunk_ids.address(),
            chunks_per_slot: CHUNKS as u64,
        };
        let groups = DeviceBuffer::new(device, 1, "groups").unwrap();
        stream.upload(&[group], &groups).unwrap();
        let params = ChunkListParams {
            groups: groups.address(),
            rows: rows.address(),
            tile_entries: tile_entries.address(),
            entry_slots: entry_slots.address(),
            overflow: overflow.address(),
        };
        Self {
            kernel: device.kernel("chunk_lists").unwrap(),
            params,
            chunk_ids,
            chunks,
            _others: vec![starts, rows, tile_entries, entry_slots, overflow],
            _slots: slots,
            _groups: groups,
        }
    }

    fn launch(&self, stream: &Stream, launch: &Launch) -> Result<(), CudaError> {
        // SAFETY: the addresses are those of `new`, and tests wait before they drop them.
        unsafe { stream.launch(&self.kernel, launch, &self.params) }
    }

    fn listed(&self, stream: &Stream) -> Vec<u32> {
        let mut chunks = [RankChunk::zeroed(); CHUNKS];
        stream.download(&self.chunks, &mut chunks).unwrap();
        chunks.iter().map(|chunk| chunk.chunk).collect()
    }
}

#[test]
fn a_device_says_what_it_is() {
    let device = device();
    assert!(Device::count().unwrap() >= 1);
    let properties = device.properties();
    assert!(!properties.name.is_empty());
    assert!(properties.capability >= (8, 0) && properties.multiprocessors > 0, "{properties:?}");
    assert!(properties.shared_bytes_per_block >= 99 << 10 && properties.l2_bytes > 0, "{properties:?}");
    assert!(device.free_bytes().unwrap() <= properties.total_bytes);

    let count = Device::count().unwrap();
    let error = Device::open_with_images(count, &[]).unwrap_err();
    assert_eq!(error.to_string(), format!("no CUDA device {count}: the driver finds {count}"));
}

#[test]
fn what_is_copied_to_the_device_comes_back() {
    let stream = device().stream().unwrap();
    let values: Vec<u32> = (0..1000).collect();
    let (first, second) = (buffer::<u32>(&stream, 1000), buffer::<u32>(&stream, 1000));
    let mut back = vec![0; 1000];
    stream.upload(&values, &first).unwrap();
    // SAFETY: both buffers live until the download has waited.
    unsafe { stream.copy_async(&first, &second) }.unwrap();
    stream.download(&second, &mut back).unwrap();
    assert_eq!(back, values);

    let part = second.slice(10..).slice(..=4);
    assert_eq!((part.address(), part.len()), (second.address() + 40, 5));
    stream.upload(&[7; 5], part).unwrap();
    // SAFETY: the buffer lives until the download has waited.
    unsafe { stream.fill_async(second.slice(990..1000), 0xff) }.unwrap();
    stream.download(&second, &mut back).unwrap();
    assert_eq!((&back[..10], &back[10..15], back[15]), (&values[..10], &[7; 5][..], 15));
    assert_eq!((back[989], &back[990..]), (989, &[u32::MAX; 10][..]));

    let nothing = buffer::<u32>(&stream, 0);
    stream.upload(&[], &nothing).unwrap();
    stream.download(&nothing, &mut []).unwrap();
}

#[test]
fn a_copy_between_different_lengths_is_refused_in_elements() {
    let stream = device().stream().unwrap();
    let memory = buffer::<f32>(&stream, 8);
    let mut host = [0.0; 9];
    let error = stream.upload(&host, &memory).unwrap_err();
    assert_eq!(error.to_string(), "copy to the device: 9 elements into 8");
    let error = stream.download(memory.slice(1..), &mut host).unwrap_err();
    assert_eq!(error.to_string(), "copy to the host: 7 elements into 9");
    // SAFETY: nothing is queued.
    let error = unsafe { stream.copy_async(&memory, memory.slice(..3)) }.unwrap_err();
    assert_eq!(error.to_string(), "copy within the device: 8 elements into 3");
    assert!(catch_unwind(AssertUnwindSafe(|| memory.slice(4..9).len())).is_err());
}

#[test]
fn an_arena_hands_out_every_byte_once_and_says_what_did_not_fit() {
    let device = device();
    let stream = device.stream().unwrap();
    let mut arena = Arena::new(&device, 1000, "test").unwrap();
    let bytes: DeviceBuffer<u8> = arena.take(10, "bytes").unwrap();
    let floats: DeviceBuffer<f32> = arena.take(64, "floats").unwrap();
    assert_eq!((bytes.address() % 256, floats.address()), (0, bytes.address() + 256));
    assert_eq!(arena.available(), 1000 - 512);
    let error = arena.take::<u32>(123, "the KV cache").unwrap_err();
    assert_eq!(error.to_string(), "out of GPU memory: 492 bytes for the KV cache, 488 are left");
    let rest: DeviceBuffer<u32> = arena.take(122, "rest").unwrap();
    assert_eq!((arena.available(), rest.address()), (0, bytes.address() + 512));
    assert!(arena.take::<u8>(0, "nothing").unwrap().is_empty());
    assert!(matches!(arena.take::<u8>(1, "more"), Err(CudaError::OutOfMemory { available: 0, .. })));
    let error = arena.take::<u64>(usize::MAX, "too much").unwrap_err();
    assert!(matches!(error, CudaError::OutOfMemory { wanted: usize::MAX, .. }), "{error}");

    // A buffer keeps the reservation.
    drop(arena);
    let mut back = [0; 122];
    stream.upload(&[5; 122], &rest).unwrap();
    drop((bytes, floats));
    stream.download(&rest, &mut back).unwrap();
    assert_eq!(back, [5; 122]);
}

#[test]
fn memory_that_the_device_does_not_have_is_refused_with_its_purpose() {
    let device = device();
    for (len, wanted) in [(1 << 50, 1 << 53), (usize::MAX, usize::MAX)] {
        let error = DeviceBuffer::<u64>::new(&device, len, "a very long context").unwrap_err();
        let CudaError::OutOfMemory { wanted: said, ref purpose, .. } = error else { panic!("{error}") };
        assert_eq!((said, purpose.as_str()), (wanted, "a very long context"));
    }
    assert_eq!(DeviceBuffer::<u64>::new(&device, 10, "numbers").unwrap().len(), 10);
}

#[test]
fn pinned_memory_is_copied_without_waiting() {
    let device = device();
    let stream = device.stream().unwrap();
    let mut from = Pinned::<u32>::new(&device, 100, "input").unwrap();
    let mut into = Pinned::<u32>::new(&device, 100, "output").unwrap();
    assert_eq!(*from, [0; 100]);
    for (index, value) in from.iter_mut().enumerate() {
        *value = index as u32;
    }
    let (memory, done) = (buffer::<u32>(&stream, 100), device.event().unwrap());
    // SAFETY: nothing of it is touched before the event is reached.
    unsafe {
        stream.upload_async(&from, &memory).unwrap();
        stream.download_async(&memory, &mut into).unwrap();
    }
    stream.record(&done).unwrap();
    done.synchronize().unwrap();
    assert!(done.is_reached().unwrap());
    assert_eq!(*into, *from);
}

#[test]
fn a_stream_continues_where_another_has_recorded_an_event() {
    let device = device();
    let (copies, compute) = (device.stream().unwrap(), device.stream().unwrap());
    let lists = Lists::new(&compute);
    let (start, end) = (device.timing_event().unwrap(), device.timing_event().unwrap());
    let ready = device.event().unwrap();
    assert!(ready.is_reached().unwrap(), "never recorded");
    for round in 0..10 {
        let mut ids = Pinned::<u32>::new(&device, CHUNKS, "chunk ids").unwrap();
        ids.copy_from_slice(&[round, round + 1, round + 2]);
        compute.record(&start).unwrap();
        // SAFETY: `ids` lives until `listed` has waited for `compute`, which waits for this.
        unsafe { copies.upload_async(&ids, &lists.chunk_ids) }.unwrap();
        copies.record(&ready).unwrap();
        compute.wait(&ready).unwrap();
        lists.launch(&compute, &LAUNCH).unwrap();
        compute.record(&end).unwrap();
        assert_eq!(lists.listed(&compute), [round, round + 1, round + 2]);
        assert!(start.elapsed_ms(&end).unwrap() >= 0.0);
    }
    let error = start.elapsed_ms(&ready).unwrap_err();
    assert!(error.to_string().starts_with("taking the time between two events: CUDA_ERROR_"), "{error}");
}

#[test]
fn a_graph_replays_on_what_the_memory_holds_then() {
    let stream = device().stream().unwrap();
    let lists = Lists::new(&stream);
    stream.upload(&[1, 2, 3], &lists.chunk_ids).unwrap();
    // SAFETY: the memory outlives the graph.
    unsafe { stream.fill_async(&lists.chunks, 0) }.unwrap();
    let graph = stream.capture(|| lists.launch(&stream, &LAUNCH)).unwrap();
    assert_eq!(lists.listed(&stream), [0; CHUNKS], "a capture runs nothing");
    for round in 0..5 {
        stream.upload(&[round, 40, 50], &lists.chunk_ids).unwrap();
        // SAFETY: the memory outlives the graph.
        unsafe { graph.launch(&stream) }.unwrap();
        assert_eq!(lists.listed(&stream), [round, 40, 50]);
    }
    let other = stream.device().stream().unwrap();
    stream.upload(&[8, 9, 10], &lists.chunk_ids).unwrap();
    // SAFETY: the memory outlives the graph.
    std::thread::scope(|scope| {
        scope.spawn(move || unsafe { graph.launch(&other) }.and_then(|()| other.synchronize())).join()
    })
    .unwrap()
    .unwrap();
    assert_eq!(lists.listed(&stream), [8, 9, 10]);
}

#[test]
fn a_capture_that_fails_leaves_a_stream_that_works() {
    let stream = device().stream().unwrap();
    let lists = Lists::new(&stream);
    let works = || {
        stream.upload(&[4, 5, 6], &lists.chunk_ids).unwrap();
        lists.launch(&stream, &LAUNCH).unwrap();
        assert_eq!(lists.listed(&stream), [4, 5, 6]);
    };

    let error = stream.capture(|| stream.synchronize()).unwrap_err();
    assert_eq!(error.to_string(), "waiting for a stream: CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED (900)");
    works();

    // An error that nobody has passed on spoils the capture all the same.
    let ignoring = || stream.synchronize().or(Ok(()));
    let error = stream.capture(ignoring).unwrap_err();
    assert_eq!(error.to_string(), "ending a capture: CUDA_ERROR_STREAM_CAPTURE_INVALIDATED (901)");
    works();

    let allocated = || DeviceBuffer::<u8>::new(stream.device(), 1, "a byte").map(drop);
    let error = stream.capture(allocated).unwrap_err();
    assert!(error.to_string().starts_with("allocating 1 bytes for a byte: "), "{error}");
    works();

    let own = CudaError::UnknownKernel { name: "own".to_owned() };
    let error = stream.capture(|| lists.launch(&stream, &LAUNCH).and(Err(own.clone()))).unwrap_err();
    assert_eq!(error, own);
    works();

    let panicked = catch_unwind(AssertUnwindSafe(|| stream.capture(|| panic!("within a capture"))));
    assert!(panicked.is_err());
    works();

    // The inner capture fails; the outer one is not ended by that.
    let graph = stream.capture(|| {
        assert!(stream.capture(|| Ok(())).is_err());
        lists.launch(&stream, &LAUNCH)
    });
    if let Err(error) = graph {
        assert!(error.to_string().starts_with("ending a capture"), "{error}");
    }
    works();
}

#[test]
fn a_launch_that_is_refused_names_the_kernel_its_shape_and_the_code() {
    let stream = device().stream().unwrap();
    let lists = Lists::new(&stream);
    let error = lists.launch(&stream, &Launch { shared_bytes: 64, ..Launch::new([3, 2, 1], 0) }).unwrap_err();
    assert_eq!(
        error.to_string(),
        "launch of chunk_lists (grid 3x2x1, block 0, 64 bytes of shared memory): CUDA_ERROR_INVALID_VALUE (1)"
    );
    assert_eq!(error.code().unwrap().number(), 1);
    assert!(!error.is_lost());
    error.end_process_if_lost();
    for wrong in [
        Launch { grid: [0, 1, 1], ..LAUNCH },
        Launch { block: 2048, ..LAUNCH },
        // More than any block can have, whatever the kernel has been allowed.
        Launch { shared_bytes: 300 << 10, ..LAUNCH },
    ] {
        let error = lists.launch(&stream, &wrong).unwrap_err();
        assert!(matches!(error, CudaError::Launch { .. }), "{error}");
    }
    stream.upload(&[7, 8, 9], &lists.chunk_ids).unwrap();
    lists.launch(&stream, &LAUNCH).unwrap();
    assert_eq!(lists.listed(&stream), [7, 8, 9]);
}

#[test]
fn what_a_step_queues_allocates_nothing() {
    let device = device();
    let stream = device.stream().unwrap();
    let lists = Lists::new(&stream);
    let mut arena = Arena::new(&device, 1 << 20, "test").unwrap();
    let (ids, ready) = (Pinned::<u32>::new(&device, CHUNKS, "chunk ids").unwrap(), device.event().unwrap());
    let mut chunks = Pinned::<RankChunk>::new(&device, CHUNKS, "chunks").unwrap();
    let graph = stream.capture(|| lists.launch(&stream, &LAUNCH)).unwrap();
    let launch = Launch { overlap_previous: true, ..LAUNCH };
    let mut step = || {
        // SAFETY: everything lives until the stream has been waited for.
        unsafe {
            stream.upload_async(&ids, &lists.chunk_ids).unwrap();
            lists.launch(&stream, &launch).unwrap();
            graph.launch(&stream).unwrap();
            stream.download_async(&lists.chunks, &mut chunks).unwrap();
        }
        stream.record(&ready).unwrap();
        stream.wait(&ready).unwrap();
        stream.synchronize().unwrap();
        arena.take::<u32>(100, "numbers").unwrap();
    };
    // The first call of each function looks for it in the driver.
    step();
    let before = ALLOCATIONS.get();
    for _ in 0..10 {
        step();
    }
    assert_eq!(ALLOCATIONS.get(), before);
    drop(std::hint::black_box(Box::new(0)));
    assert_eq!(ALLOCATIONS.get(), before + 1, "allocations are counted");
}

#[test]
fn a_kernel_that_is_not_there_is_named() {
    let device = device();
    for name in ["no_such_kernel", "", "nul\0"] {
        let error = device.kernel::<u32>(name).unwrap_err();
        assert_eq!(error, CudaError::UnknownKernel { name: name.to_owned() });
    }
    let bare = Device::open_with_images(0, &[]).unwrap();
    assert_eq!(
        bare.kernel::<ChunkListParams>("chunk_lists").unwrap_err().to_string(),
        "no kernel is called `chunk_lists`"
    );

    let kernel: Kernel<ChunkListParams> = device.kernel("chunk_lists").unwrap();
    assert_eq!(kernel.name(), "chunk_lists");
    let most = device.properties().shared_bytes_per_block;
    let error = kernel.clone().with_shared_memory(most + 1).unwrap_err();
    assert!(error.to_string().starts_with(&format!("allowing chunk_lists {} bytes", most + 1)), "{error}");
    kernel.with_shared_memory(most).unwrap();
}

#[test]
fn a_destructor_that_fails_is_not_heard_of_later() {
    let stream = device().stream().unwrap();
    let lists = Lists::new(&stream);
    let memory = buffer::<u8>(&stream, 1);
    // Freeing is not allowed within a capture.
    let freeing = || {
        drop(memory);
        Ok(())
    };
    let _ = stream.capture(freeing);
    stream.upload(&[1, 2, 3], &lists.chunk_ids).unwrap();
    lists.launch(&stream, &LAUNCH).unwrap();
    assert_eq!(lists.listed(&stream), [1, 2, 3]);
}

#[test]
fn a_kernel_that_faults_ends_the_process_with_exit_code_70() {
    if is_child() {
        let stream = device().stream().unwrap();
        let lists = Lists::new(&stream);
        let params = ChunkListParams { groups: 64, ..lists.params };
        lists.launch(&stream, &LAUNCH).unwrap();
        // SAFETY: none: nothing is at address 64, which is what is tested.
        let launched = unsafe { stream.launch(&lists.kernel, &LAUNCH, &params) };
        let error = launched.and_then(|()| stream.synchronize()).unwrap_err();
        assert!(error.is_lost(), "{error}");
        // Nothing works from here on.
        assert!(stream.upload(&[1, 2, 3], &lists.chunk_ids).unwrap_err().is_lost());
        assert_eq!(
            stream.synchronize().unwrap_err().to_string(),
            "waiting for a stream, last launched: chunk_lists: CUDA_ERROR_ILLEGAL_ADDRESS (700)"
        );
        error.end_process_if_lost();
        unreachable!("the process goes on");
    }
    let ran = child("a_kernel_that_faults_ends_the_process_with_exit_code_70");
    let stderr = String::from_utf8(ran.stderr).unwrap();
    assert_eq!(ran.status.code(), Some(LOST_EXIT_CODE.into()), "{stderr}");
    let said: Vec<&str> = stderr.lines().filter(|line| line.starts_with("error: GPU lost: ")).collect();
    assert_eq!(said.len(), 1, "{stderr}");
    assert!(
        said[0].contains("chunk_lists") && said[0].contains("CUDA_ERROR_ILLEGAL_ADDRESS (700)"),
        "{stderr}"
    );
}

#[test]
fn a_machine_without_a_driver_gets_an_error_and_no_panic() {
    if is_child() {
        println!(
            "{:?} {:?} {:?}",
            Device::count(),
            Device::open(0).map(drop),
            Device::open_with_images(0, &[]).map(drop)
        );
        return;
    }
    let ran = child("a_machine_without_a_driver_gets_an_error_and_no_panic");
    assert!(ran.status.success(), "{ran:?}");
    let said = String::from_utf8(ran.stdout).unwrap();
    let has_driver = Path::new("/proc/driver/nvidia/version").exists();
    assert_eq!(said.contains("Err(NoDriver) Err(NoDriver) Err(NoDriver)"), !has_driver, "{said}");
}

#[test]
fn a_tensor_map_is_made_or_refused_by_the_first_thing_that_is_wrong_with_it() {
    let stream = device().stream().unwrap();
    let memory = buffer::<u16>(&stream, 4096);
    let right = TiledTensor {
        element: MapElement::Bf16,
        address: memory.address(),
        extents: &[64, 64],
        strides: &[128],
        tile: &[64, 8],
        swizzle: Swizzle::Bytes128,
    };
    let map = right.encode().unwrap();
    let other = TiledTensor { address: right.address + 128, ..right }.encode().unwrap();
    assert_ne!(map, other);
    assert_ne!(bytemuck::bytes_of(&map), [0; 128]);

    for (wrong, reason) in [
        (TiledTensor { extents: &[], strides: &[], tile: &[], ..right }, "0 dimensions, wanted 1 to 5"),
        (TiledTensor { extents: &[64; 6], ..right }, "6 dimensions, wanted 1 to 5"),
        (
            TiledTensor { strides: &[2, 128], ..right },
            "2 strides and a box of 2 dimensions for 2 extents, wanted 1 and 2",
        ),
        (
            TiledTensor { tile: &[64], ..right },
            "1 strides and a box of 1 dimensions for 2 extents, wanted 1 and 2",
        ),
        (TiledTensor { address: 0, ..right }, "address 0x0, wanted a multiple of 16"),
        (TiledTensor { address: 0x1008, ..right }, "address 0x1008, wanted a multiple of 16"),
        (TiledTensor { extents: &[64, 0], ..right }, "extent 0 of dimension 1, wanted 1 to 2^32"),
        (
            TiledTensor { extents: &[(1 << 32) + 1, 2], ..right },
            "extent 4294967297 of dimension 0, wanted 1 to 2^32",
        ),
        (
            TiledTensor { strides: &[136], ..right },
            "stride 136 of dimension 1, wanted a multiple of 16 bytes below 2^40",
        ),
        (
            TiledTensor { strides: &[1 << 40], ..right },
            "stride 1099511627776 of dimension 1, wanted a multiple of 16 bytes below 2^40",
        ),
        (TiledTensor { tile: &[64, 257], ..right }, "a box of 257 along dimension 1, wanted 1 to 256"),
        (TiledTensor { tile: &[0, 8], ..right }, "a box of 0 along dimension 0, wanted 1 to 256"),
        (TiledTensor { tile: &[4, 8], ..right }, "8 bytes in a row of the box, wanted a multiple of 16"),
        (TiledTensor { tile: &[72, 8], ..right }, "144 bytes in a row of the box, at most 128 with Bytes128"),
        (
            TiledTensor { swizzle: Swizzle::Bytes32, ..right },
            "128 bytes in a row of the box, at most 32 with Bytes32",
        ),
    ] {
        let error = wrong.encode().unwrap_err();
        assert_eq!(error.to_string(), format!("tensor map: {reason}"));
    }
}

fn buffer<T: bytemuck::Pod>(stream: &Stream, len: usize) -> DeviceBuffer<T> {
    DeviceBuffer::new(stream.device(), len, "a test").unwrap()
}
