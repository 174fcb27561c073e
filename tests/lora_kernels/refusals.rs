//! What does not fit is refused by name before it becomes an address.

use half::bf16;

use loramux::backend::Gates;
use loramux::backend::cuda::lora::{
    ChunkArena, ChunkLists, Epilogue, LoraKernels, LowRank, Matrix, ProductKernel, Scratch, Site, SiteGroup,
    Step, WorkList,
};
use loramux::backend::cuda::{DeviceBuffer, Stream};

use crate::cuda_device::device;

fn stream() -> Stream {
    device().stream().expect("a stream")
}

fn buffer<T: bytemuck::Pod>(stream: &Stream, len: usize) -> DeviceBuffer<T> {
    DeviceBuffer::new(stream.device(), len, "a test").expect("memory")
}

fn site(stream: &Stream, input: usize, output: usize) -> Site {
    let chunks = ChunkArena::new(stream, [input, output], 4, 2, 32).expect("an arena");
    Site { weight: buffer(stream, input * output), bias: None, chunks }
}

#[test]
fn pairs_that_do_not_fit_an_arena() {
    let stream = stream();
    let mut arena = ChunkArena::new(&stream, [16, 8], 3, 2, 32).expect("an arena");
    let values = vec![bf16::ONE; 48 * 16];
    let pair = |rank: usize| LowRank {
        rank,
        a: &values[..rank * 16],
        b: &values[..rank * 8],
        scale: 1.0,
        column_scale: None,
        bias: None,
        order: 0,
    };
    let mut bad = vec![bf16::ONE; 16];
    bad[3] = bf16::INFINITY;
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
    let widths = "wanted the same input, and widths in multiples of 8";
    let sites = vec![site(&stream, 16, 8), site(&stream, 24, 8)];
    assert_eq!(group(sites), format!("a site from 24 to 8 in a group from 16: {widths}"));
    assert_eq!(
        group(vec![site(&stream, 16, 12)]),
        format!("a site from 16 to 12 in a group from 16: {widths}")
    );
    let short = Site { weight: buffer(&stream, 100), ..site(&stream, 16, 8) };
    assert_eq!(group(vec![short]), "weight of a site: 100 elements into 128");
    let short = Site { bias: Some(buffer(&stream, 7)), ..site(&stream, 16, 8) };
    assert_eq!(group(vec![short]), "bias of a site: 7 elements into 8");
}

#[test]
fn steps_that_do_not_fit() {
    let stream = stream();
    let device = stream.device();
    let kernels = LoraKernels::new(device).expect("kernels");
    let group =
        SiteGroup::new(device, vec![site(&stream, 16, 8), site(&stream, 16, 16)], 100, 8).expect("a group");
    let scratch = Scratch::new(&stream, &[&group]).expect("scratch");
    let mut work = WorkList::new(device, 100, 1).expect("a work list");
    let (x, y) = (buffer(&stream, 100 * 16), buffer(&stream, 100 * 24));
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
    let rows = "wanted at least that, and rows in multiples of 8";
    let narrow = Matrix { stride: 8, ..x };
    assert_eq!(
        product(RankExt, narrow, y, Epilogue::Store, &step),
        format!("x of 1600 elements, 8 a row, for 70 rows of 16: {rows}")
    );
    let short = Matrix { data: y.data.slice(..1000), ..y };
    assert_eq!(
        product(RankExt, x, short, Epilogue::Store, &step),
        format!("y of 1000 elements, 24 a row, for 70 rows of 24: {rows}")
    );
    assert_eq!(
        product(RankExt, x, y, Epilogue::AddResidual(y.data.slice(..8)), &step),
        format!("the residual of 8 elements, 24 a row, for 70 rows of 24: {rows}")
    );
    let long = Step { row_bound: 101, ..step };
    assert_eq!(
        product(RankExt, x, y, Epilogue::Store, &long),
        "a step of 101 rows, with a work list for 100 and a group for 100"
    );

    let mut gates = Gates::default();
    gates.push_rows(101, &[]);
    assert_eq!(work.set(&stream, &gates, |_| 0).unwrap_err().to_string(), "101 rows in a work list for 100");
    gates.clear();
    gates.push_rows(1, &[(0, 1.0), (1, 1.0)]);
    let error = work.set(&stream, &gates, |slot| slot.into()).unwrap_err();
    assert_eq!(error.to_string(), "more than 1 experts over the tiles of a step");
}

#[test]
fn a_list_that_does_not_fit_is_cut_off_and_said_to_be() {
    let stream = stream();
    let device = stream.device();
    let kernels = LoraKernels::new(device).expect("kernels");
    let mut of_site = site(&stream, 16, 8);
    let values = vec![bf16::ONE; 32 * 16];
    let pair = LowRank {
        rank: 32,
        a: &values,
        b: &values[..32 * 8],
        scale: 1.0,
        column_scale: None,
        bias: None,
        order: 0,
    };
    of_site.chunks.load(&stream, 0, &pair).expect("two chunks");
    let group = SiteGroup::new(device, vec![of_site], 16, 1).expect("a group");
    let lists = ChunkLists::new(&stream, &[&group]).expect("lists");
    let mut work = WorkList::new(device, 16, 1).expect("a work list");
    let mut gates = Gates::default();
    gates.push_rows(3, &[(0, 1.0)]);
    work.set(&stream, &gates, |_| 0).expect("one entry");
    lists.build(&stream, &kernels, &work).expect("a launch");
    assert!(lists.take_overflow(&stream).expect("the flag"));
    assert!(!lists.take_overflow(&stream).expect("the flag"), "taken");
    let (starts, _) = group.read_list(&stream).expect("the list");
    assert_eq!(starts, [0, 1]);
}
