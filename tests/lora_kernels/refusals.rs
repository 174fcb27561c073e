//! What does not fit is refused by name before it becomes an address.

use loramux::backend::Gates;
use loramux::backend::cuda::elementwise::RowCount;
use loramux::backend::cuda::lora::{
    ChunkArena, ChunkLists, Epilogue, FrozenLayer, LoraKernels, LowRank, Matrix, ProductKernel, Scratch,
    ShrinkKernel, Site, SiteGroup, Step, WorkList,
};
use loramux::backend::cuda::{DeviceBuffer, Half, Stream};

use crate::cuda_device::device;
use crate::element::{element, round};

fn stream() -> Stream {
    device().stream().expect("a stream")
}

fn buffer<T: bytemuck::Pod>(stream: &Stream, len: usize) -> DeviceBuffer<T> {
    DeviceBuffer::new(stream.device(), len, "a test").expect("memory")
}

fn site(stream: &Stream, input: usize, output: usize) -> Site {
    let chunks = ChunkArena::new(stream, element(), [input, output], 4, 2, 32).expect("an arena");
    Site { weight: buffer(stream, input * output), bias: None, chunks }
}

#[test]
fn pairs_that_do_not_fit_an_arena() {
    let stream = stream();
    let mut arena = ChunkArena::new(&stream, element(), [16, 8], 3, 2, 32).expect("an arena");
    let values = vec![round(1.0); 48 * 16];
    let pair = |rank: usize| LowRank {
        rank,
        a: &values[..rank * 16],
        b: &values[..rank * 8],
        scale: 1.0,
        column_scale: None,
        bias: None,
        order: 0,
    };
    let mut bad = vec![round(1.0); 16];
    bad[3] = round(f32::INFINITY);
    for (slot, pair, wanted) in [
        (2, pair(8), "slot 2 of an arena with 2"),
        (0, pair(33), "rank 33, at most 32 fit a slot"),
        (0, LowRank { a: &values[..15], ..pair(1) }, "A [rank, in] has 15 values, wanted 1 x 16"),
        (0, LowRank { b: &values[..9], ..pair(1) }, "B [out, rank] has 9 values, wanted 1 x 8"),
        (0, LowRank { a: &bad, ..pair(1) }, "A [rank, in] has inf at 3, not a finite value"),
        (0, LowRank { scale: f32::NAN, ..pair(1) }, "scale NaN is not finite"),
        (0, LowRank { bias: Some(&[1.0; 9]), ..pair(1) }, "the bias has 9 values, wanted 8"),
        (
            0,
            LowRank { column_scale: Some(&[f32::NAN; 8]), ..pair(1) },
            "the column scale has NaN at 0, not a finite value",
        ),
    ] {
        assert_eq!(arena.load(&stream, slot, &pair).unwrap_err().to_string(), wanted);
    }
    assert_eq!(arena.free_chunks(), 3, "a refused pair takes nothing");

    arena.load(&stream, 0, &pair(20)).expect("two chunks");
    let error = arena.load(&stream, 1, &pair(17)).unwrap_err();
    assert_eq!(error.to_string(), "no room for an adapter: 2 rank chunks wanted, 1 are free");
    // What a slot holds makes room for what it is to hold.
    arena.load(&stream, 0, &pair(32)).expect("two chunks again");
    assert_eq!((arena.chunks_of(0), arena.free_chunks()), (2, 1));
    arena.unload(&stream, 0).expect("nothing to wait for");
    assert_eq!((arena.chunks_of(0), arena.free_chunks()), (0, 3));
}

#[test]
fn sites_that_do_not_make_a_group() {
    let stream = stream();
    let group = |sites| SiteGroup::new(stream.device(), sites, 16, 8).unwrap_err().to_string();
    assert_eq!(group(vec![]), "a group of 0 sites, wanted 1 to 4");
    let inputs = "wanted the same input, in multiples of 8";
    let sites = vec![site(&stream, 16, 8), site(&stream, 24, 8)];
    assert_eq!(group(sites), format!("a site from 24 to 8 in a group from 16: {inputs}"));
    assert_eq!(
        group(vec![site(&stream, 12, 8)]),
        format!("a site from 12 to 8 in a group from 12: {inputs}")
    );
    assert_eq!(group(vec![site(&stream, 16, 0)]), "a layer from 16 to 0");
    let short = Site { weight: buffer(&stream, 100), ..site(&stream, 16, 8) };
    assert_eq!(group(vec![short]), "weight of a site: 100 elements into 128");
    let short = Site { bias: Some(buffer(&stream, 7)), ..site(&stream, 16, 8) };
    assert_eq!(group(vec![short]), "bias of a site: 7 elements into 8");
}

#[test]
fn steps_that_do_not_fit() {
    let stream = stream();
    let device = stream.device();
    let kernels = LoraKernels::new(device, element()).expect("kernels");
    let group =
        SiteGroup::new(device, vec![site(&stream, 16, 8), site(&stream, 16, 16)], 600, 8).expect("a group");
    let scratch = Scratch::new(&stream, &[&group]).expect("scratch");
    let mut work = WorkList::new(device, 100, 1).expect("a work list");
    let (x, y) = (buffer(&stream, 600 * 16), buffer(&stream, 600 * 24));
    let (x, y) = (Matrix { data: x.slice(..), stride: 16 }, Matrix { data: y.slice(..), stride: 24 });
    let step = Step { work: &work, row_bound: 70, scratch: &scratch, overlap: false };
    let product = |kernel, x, y, epilogue, step: &Step<'_>| {
        kernels.product_by(kernel, &stream, &group, x, y, epilogue, step).unwrap_err().to_string()
    };
    use ProductKernel::{Decode, RankExt};
    assert_eq!(product(Decode, x, y, Epilogue::Store, &step), "70 rows to decode, at most 64");
    assert_eq!(
        product(RankExt, x, y, Epilogue::SwiGlu, &step),
        "SwiGLU of outputs [8, 16], wanted two of equal width"
    );
    let logits = buffer(&stream, 100 * 24);
    let logits = Matrix::<f32> { data: logits.slice(..), stride: 24 };
    let residual = Epilogue::AddResidual(y.data);
    let error = kernels.product(&stream, &group, x, logits, residual, &step).unwrap_err().to_string();
    assert_eq!(error, "fp32 outputs with an epilogue other than to store");
    let narrow = Matrix { stride: 8, ..x };
    assert_eq!(
        product(RankExt, narrow, y, Epilogue::Store, &step),
        "x of 9600 elements, 8 a row, for 70 rows of 16"
    );
    let odd = Matrix { stride: 17, ..x };
    let error = product(RankExt, odd, y, Epilogue::Store, &step);
    assert!(error.ends_with("17 elements a row: wanted multiples of 16 and of 8"), "{error}");
    let odd = Matrix { data: x.data.slice(1..), ..x };
    let error = product(RankExt, odd, y, Epilogue::Store, &step);
    assert!(error.ends_with("16 elements a row: wanted multiples of 16 and of 8"), "{error}");
    let short = Matrix { data: y.data.slice(..1000), ..y };
    assert_eq!(
        product(RankExt, x, short, Epilogue::Store, &step),
        "y of 1000 elements, 24 a row, for 70 rows of 24"
    );
    assert_eq!(
        product(RankExt, x, y, Epilogue::AddResidual(y.data.slice(..8)), &step),
        "the residual of 8 elements, 24 a row, for 70 rows of 24"
    );
    let long = Step { row_bound: 101, ..step };
    assert_eq!(
        product(RankExt, x, y, Epilogue::Store, &long),
        "a step of 101 rows, with a work list for 100 and a group for 600"
    );
    let long_work = WorkList::new(device, 600, 1).expect("a work list");
    let long = Step { work: &long_work, row_bound: 513, ..step };
    let error = kernels.shrink_gate_by(ShrinkKernel::Rows16, &stream, &group, x, &long).unwrap_err();
    assert_eq!(error.to_string(), "V of 513 rows in K slices, at most 512");
    let other = SiteGroup::new(device, vec![site(&stream, 16, 8)], 100, 4).expect("a group of fewer chunks");
    let small = Scratch::new(&stream, &[&other]).expect("scratch");
    let small = Step { scratch: &small, ..step };
    assert_eq!(
        product(RankExt, x, y, Epilogue::Store, &small),
        "scratch memory that was made for smaller groups"
    );

    let mut gates = Gates::default();
    gates.push_rows(101, &[]);
    assert_eq!(work.set(&stream, &gates, |_| 0).unwrap_err().to_string(), "101 rows in a work list for 100");
    gates.clear();
    gates.push_rows(1, &[(0, 1.0), (1, 1.0)]);
    let error = work.set(&stream, &gates, |slot| slot.into()).unwrap_err();
    assert_eq!(error.to_string(), "more than 1 experts over the tiles of a step");
}

/// What a frozen product takes besides a group's.
#[test]
fn frozen_layers_that_do_not_fit() {
    let stream = stream();
    let device = stream.device();
    let kernels = LoraKernels::new(device, element()).expect("kernels");
    let group = SiteGroup::new(device, vec![site(&stream, 16, 8)], 64, 8).expect("a group");
    let scratch = Scratch::new(&stream, &[&group]).expect("scratch");
    let (weight, x) = (buffer::<Half>(&stream, 2048 * 16), buffer::<Half>(&stream, 64 * 2048));
    let counts = buffer::<u32>(&stream, 2);
    let product = |in_features, out_features, first, counts| {
        let weight = weight.slice(first..first + in_features * out_features);
        let layer = FrozenLayer { weight, bias: None, in_features, out_features };
        let rows = RowCount { count: counts, bound: 3, overlap: false };
        let (x, y) = (x.slice(..3 * 2048), x.slice(3 * 2048..));
        let (x, y) = (Matrix { data: x, stride: 2048 }, Matrix { data: y, stride: 64 });
        kernels.frozen_product(&stream, layer, x, y, rows, &scratch).unwrap_err().to_string()
    };
    let whole = |error: String, from| {
        assert!(error.starts_with(&format!("a frozen layer from {from} at ")), "{error}");
        assert!(error.ends_with("wanted multiples of 8 and of 16, and one"), "{error}");
    };
    whole(product(12, 8, 0, counts.slice(..1)), 12);
    whole(product(16, 8, 4, counts.slice(..1)), 16);
    whole(product(16, 8, 0, counts.slice(..2)), 16);
    assert_eq!(product(16, 0, 0, counts.slice(..1)), "a layer from 16 to 0");
    assert_eq!(product(16, 65, 0, counts.slice(..1)), "y of 124928 elements, 64 a row, for 3 rows of 65");
    // Its K is in slices, the group's is not.
    assert_eq!(product(1024, 16, 0, counts.slice(..1)), "scratch memory that was made for smaller groups");
}

#[test]
fn a_list_that_does_not_fit_is_cut_off_and_said_to_be() {
    let stream = stream();
    let device = stream.device();
    let kernels = LoraKernels::new(device, element()).expect("kernels");
    let mut of_site = site(&stream, 16, 8);
    let values = vec![round(1.0); 32 * 16];
    let pair = |rank: usize| LowRank {
        rank,
        a: &values[..rank * 16],
        b: &values[..rank * 8],
        scale: 1.0,
        column_scale: None,
        bias: None,
        order: 0,
    };
    of_site.chunks.load(&stream, 0, &pair(32)).expect("two chunks");
    of_site.chunks.load(&stream, 1, &pair(16)).expect("a chunk");
    let group = SiteGroup::new(device, vec![of_site], 384, 1).expect("a group");
    let lists = ChunkLists::new(&stream, &[&group]).expect("lists");
    let mut work = WorkList::new(device, 384, 3).expect("a work list");
    let mut starts_of = |slots: [u32; 3]| {
        let mut gates = Gates::default();
        for slot in slots {
            gates.push_rows(128, &[(slot, 1.0)]);
        }
        work.set(&stream, &gates, |_| 0).expect("an entry for each tile");
        lists.build(&stream, &kernels, &work).expect("a launch");
        let cut = lists.take_overflow(&stream).expect("the flag");
        assert!(!lists.take_overflow(&stream).expect("the flag"), "taken");
        let (starts, chunks) = group.read_list(&stream).expect("the list");
        let entries: Vec<_> = chunks.iter().map(|chunk| chunk.entry).collect();
        (starts, entries, cut)
    };
    assert_eq!(starts_of([1, 1, 1]), (vec![0, 1, 2, 3], vec![0, 1, 2], false));
    // A tile's chunks are cut off, whatever room other tiles leave.
    assert_eq!(starts_of([1, 0, 1]), (vec![0, 1, 2, 3], vec![0, 1, 2], true));
}
