//! Steps within fixed limits: one graph for all of them, and errors for those outside.

use loramux::backend::cuda::elementwise::{
    BlockPages, EmbeddingTable, Matrix, Rotary, RowCount, StepLimits, StepRows,
};
use loramux::backend::cuda::{CudaError, DeviceBuffer, Half};
use loramux::backend::{AttentionShape, PAGE, RotaryTables, Rows};

use crate::SEEDS;
use crate::cuda_device::{on_gpu, under_thread_orders};
use crate::harness::{OnDevice, Random, UNTOUCHED, bits, limits};

const SHAPE: AttentionShape = AttentionShape { heads: 2, kv_heads: 1, head_dim: 64 };
/// Of rows of q | k | v, which the whole step works on.
const WIDTH: usize = 4 * 64;

/// The tensors of a step that runs every kernel once.
struct Step {
    on: OnDevice,
    steps: StepRows,
    table: DeviceBuffer<Half>,
    weight: DeviceBuffer<f32>,
    rotary: Rotary,
    keys: DeviceBuffer<Half>,
    values: DeviceBuffer<Half>,
    x: DeviceBuffer<Half>,
    activated: DeviceBuffer<Half>,
    y: DeviceBuffer<Half>,
}

impl Step {
    fn new() -> Self {
        let random = &mut Random(31);
        let on = OnDevice::new();
        let limits = limits();
        let angles = random.floats(limits.positions * 32);
        let tables = RotaryTables { rotary_dim: 64, cos: vec![angles.clone(); 2], sin: vec![angles; 2] };
        let pages = vec![UNTOUCHED; limits.cache_pages * PAGE * SHAPE.head_dim];
        Self {
            steps: StepRows::new(on.device(), limits).expect("steps"),
            table: on.upload(&random.values(limits.vocabulary * WIDTH, 1.0)),
            weight: on.upload(&random.floats(WIDTH)),
            rotary: Rotary::new(&on.stream, &tables).expect("tables"),
            keys: on.upload(&pages),
            values: on.upload(&pages),
            x: on.upload(&vec![UNTOUCHED; limits.rows * WIDTH]),
            activated: on.upload(&vec![UNTOUCHED; limits.rows * WIDTH / 2]),
            y: on.upload(&vec![UNTOUCHED; limits.picked * WIDTH / 2]),
            on,
        }
    }

    fn queue(&self, rows: usize, picked: usize) -> Result<(), CudaError> {
        let OnDevice { stream, kernels } = &self.on;
        let table = EmbeddingTable {
            weight: self.table.slice(..),
            vocabulary: limits().vocabulary,
            width: WIDTH,
            experts: None,
        };
        let count = self.steps.row_count(rows, true);
        let x = Matrix { data: self.x.slice(..), stride: WIDTH };
        let activated = Matrix { data: self.activated.slice(..), stride: WIDTH / 2 };
        let pages = BlockPages { keys: self.keys.slice(..), values: self.values.slice(..) };
        kernels.embed(stream, &table, &self.steps, count, x)?;
        kernels.rms_norm(stream, x, self.weight.slice(..), 1e-5, count, x)?;
        kernels.rope_store(stream, x, SHAPE, None, &self.rotary, pages, &self.steps, count)?;
        kernels.swiglu(stream, x, WIDTH / 2, count, activated)?;
        let y = Matrix { data: self.y.slice(..), stride: WIDTH / 2 };
        let picked = self.steps.picked_count(picked, true);
        kernels.pick_rows(stream, activated, WIDTH / 2, &self.steps, picked, y)
    }

    fn outputs(&self, picked: usize) -> Vec<u16> {
        bits(&self.on.download(&self.y)[..picked * WIDTH / 2])
    }
}

fn step_of(random: &mut Random, count: usize) -> Rows {
    let mut rows = Rows::default();
    let mut left = count;
    while left > 0 {
        let of_sequence = left.min(50);
        let tokens: Vec<_> = (0..of_sequence).map(|_| random.below(limits().vocabulary) as u32).collect();
        let pages: Vec<_> = (0..5).map(|_| random.below(limits().cache_pages) as u32).collect();
        rows.push_sequence(&tokens, random.below(20), random.below(2), &pages, &[]);
        left -= of_sequence;
    }
    rows
}

/// All kernels of a step are captured once; every later step only sets its rows. Nothing is allocated, and the host
/// waits for nothing but the outputs.
#[test]
fn one_graph_serves_every_step() {
    under_thread_orders(SEEDS, || {
        let random = &mut Random(32);
        let (mut step, mut alone) = (Step::new(), Step::new());
        let graph = step.on.stream.capture(|| step.queue(limits().rows, limits().picked)).expect("a graph");
        for rows in [limits().rows, 1, 0, 77, 130] {
            let of_step = step_of(random, rows);
            let picked: Vec<_> = (0..rows.min(8)).map(|_| random.below(rows) as u32).collect();
            let before = (!on_gpu()).then(loramux_emulator::allocations_of_thread);
            step.steps.set(&step.on.stream, &of_step, &picked).expect("a step");
            // SAFETY: all buffers of the capture are alive.
            unsafe { graph.launch(&step.on.stream) }.expect("a replay");
            if let Some(before) = before {
                assert_eq!(loramux_emulator::allocations_of_thread(), before, "a step must not allocate");
            }
            alone.steps.set(&alone.on.stream, &of_step, &picked).expect("a step");
            alone.queue(rows, picked.len()).expect("launches");
            assert_eq!(step.outputs(picked.len()), alone.outputs(picked.len()), "{rows} rows");
        }
    });
}

#[test]
fn steps_outside_the_limits_are_refused_by_name() {
    let on = OnDevice::new();
    let limits = StepLimits { rows: 40, sequences: 2, pages: 6, picked: 2, ..limits() };
    let mut steps = StepRows::new(on.device(), limits).expect("steps");
    let step = |tokens: &[u32], start, variant, pages: &[u32]| {
        let mut rows = Rows::default();
        rows.push_sequence(tokens, start, variant, pages, &[]);
        rows
    };
    let good = step(&[1, 2], 3, 1, &[0]);
    let mut three = good.clone();
    three.push_sequence(&[1], 0, 0, &[1], &[]);
    three.push_sequence(&[1], 0, 0, &[2], &[]);
    let mut gap = good.clone();
    gap.tokens.push(0);
    let mut late = good.clone();
    late.sequences[0].rows = 1..2;
    for (rows, picked, named) in [
        (step(&[1; 41], 0, 0, &[0, 1, 2]), &[][..], "41 rows"),
        (three, &[], "3 sequences"),
        (step(&[1], 0, 0, &[0; 7]), &[], "7 pages"),
        (good.clone(), &[0, 0, 0], "3 picked rows"),
        (step(&[1, 40], 0, 0, &[0]), &[], "token 40 at 1"),
        (step(&[1], 0, 0, &[24]), &[], "page 24 at 0"),
        (good.clone(), &[2], "picked row 2 at 0"),
        (step(&[1], 100, 0, &[0; 6]), &[], "ends at position 101 of 100"),
        (step(&[1], 0, 2, &[0]), &[], "rotary variant 2 of 2"),
        (step(&[1, 1], 15, 0, &[0]), &[], "17 tokens in pages 0..1"),
        (gap, &[], "3 rows, 2 of them in sequences"),
        (late, &[], "begins at row 1"),
    ] {
        match steps.set(&on.stream, &rows, picked) {
            Err(CudaError::Shape(what)) => assert!(what.contains(named), "{what:?} names {named:?}"),
            other => panic!("{named}: {other:?}"),
        }
    }
    steps.set(&on.stream, &good, &[1]).expect("a step within the limits");
}

#[test]
fn launches_on_buffers_that_are_too_small_are_refused_by_name() {
    let step = Step::new();
    let OnDevice { stream, kernels } = &step.on;
    let count = step.steps.row_count(4, false);
    let matrix = |len: usize, stride| Matrix { data: step.x.slice(..len), stride };
    let (x, weight) = (matrix(4 * WIDTH, WIDTH), step.weight.slice(..));
    let table = |weight, vocabulary| EmbeddingTable { weight, vocabulary, width: WIDTH, experts: None };
    let (whole, part) = (step.table.slice(..), step.table.slice(..39 * WIDTH));
    let pages = BlockPages { keys: step.keys.slice(..), values: step.values.slice(..) };
    let few = BlockPages { keys: step.keys.slice(..), values: step.values.slice(1..) };
    let short =
        RotaryTables { rotary_dim: 64, cos: vec![vec![0.0; 32 * 99]; 2], sin: vec![vec![0.0; 32 * 99]; 2] };
    let short = Rotary::new(stream, &short).expect("tables");
    let rope = |x, shape, rotary, pages, count| {
        kernels.rope_store(stream, x, shape, None, rotary, pages, &step.steps, count)
    };
    let many = step.steps.row_count(301, false);
    let no_count = RowCount { count: step.steps.tokens(), ..count };
    let narrow = AttentionShape { heads: 6, kv_heads: 1, head_dim: 32 };
    for (result, named) in [
        (kernels.rms_norm(stream, matrix(4 * WIDTH - 1, WIDTH), weight, 0.0, count, x), "x of 1023"),
        (kernels.rms_norm(stream, x, weight, 0.0, count, matrix(4 * WIDTH, WIDTH - 1)), "y of 1024"),
        (kernels.rms_norm(stream, x, weight, 0.0, no_count, x), "300 counts"),
        (kernels.swiglu(stream, x, WIDTH / 2 + 1, count, x), "gate | up of 1024"),
        (kernels.swiglu(stream, x, WIDTH / 2, count, matrix(3, WIDTH)), "y of 3"),
        (kernels.pick_rows(stream, x, WIDTH, &step.steps, count, x), "for 300 rows"),
        (kernels.embed(stream, &table(part, 40), &step.steps, count, x), "for 40 tokens"),
        (kernels.embed(stream, &table(part, 39), &step.steps, count, x), "for 39 tokens"),
        (kernels.embed(stream, &table(whole, 40), &step.steps, many, matrix(301 * WIDTH - WIDTH, 4)), "y of"),
        (rope(x, narrow, &step.rotary, pages, count), "64 rotated elements of heads of 32"),
        (rope(x, SHAPE, &short, pages, count), "99 positions"),
        (rope(x, SHAPE, &step.rotary, few, count), "24575 values"),
        (rope(matrix(4 * WIDTH - 1, WIDTH), SHAPE, &step.rotary, pages, count), "q | k | v of 1023"),
    ] {
        match result {
            Err(CudaError::Shape(what)) => assert!(what.contains(named), "{what:?} names {named:?}"),
            other => panic!("{named}: {other:?}"),
        }
    }
}

#[test]
fn rotary_tables_of_different_sizes_are_refused() {
    let on = OnDevice::new();
    let tables = |rotary_dim, cos: &[usize], sin: &[usize]| RotaryTables {
        rotary_dim,
        cos: cos.iter().map(|&len| vec![0.0; len]).collect(),
        sin: sin.iter().map(|&len| vec![0.0; len]).collect(),
    };
    for wrong in [
        tables(8, &[40, 36], &[40, 40]),
        tables(8, &[40], &[40, 40]),
        tables(7, &[30], &[30]),
        tables(8, &[39], &[39]),
        tables(0, &[0], &[0]),
    ] {
        assert!(matches!(Rotary::new(&on.stream, &wrong), Err(CudaError::Shape(_))));
    }
    Rotary::new(&on.stream, &tables(8, &[40, 40], &[40, 40])).expect("tables of one size");
}
