//! A row's product has the same bits with an expert that was brought as with one that was loaded.

use loramux::backend::Gates;
use loramux::backend::cuda::Stream;
use loramux::backend::cuda::lora::{
    ChunkLists, Epilogue, LoraKernels, Matrix, Scratch, SiteGroup, Step, WorkList,
};
use loramux::backend::cuda::{DeviceBuffer, Half};

use crate::cuda_device::under_thread_orders;
use crate::element::{element, in_both_types};
use crate::fixture::{Adapter, Fixture, groups};
use crate::random::Random;

const ROWS: usize = 6;
const WIDTH: usize = 64;

/// The outputs of the first group, as bits; `slots[i]` is the slot of the i-th expert that the rows use.
fn product(
    stream: &Stream,
    group: &SiteGroup,
    x: &[Half],
    gates: &[Vec<(usize, f32)>],
    slots: &[u32],
    orders: &[u64],
) -> Vec<u16> {
    let device = stream.device();
    let kernels = LoraKernels::new(device, element()).expect("kernels");
    let lists = ChunkLists::new(stream, &[group]).expect("lists");
    let scratch = Scratch::new(stream, &[group]).expect("scratch");
    let mut work = WorkList::new(device, 16, 16).expect("a work list");
    let mut by_slot = Gates::default();
    for row in gates {
        let entries: Vec<_> = row.iter().map(|&(expert, gate)| (slots[expert], gate)).collect();
        by_slot.push_rows(1, &entries);
    }
    let order_of = |slot| orders[slots.iter().position(|&of_expert| of_expert == slot).expect("in use")];
    work.set(stream, &by_slot, order_of).expect("a work list");
    let on_device = DeviceBuffer::new(device, x.len(), "x").expect("memory");
    stream.upload(x, &on_device).expect("a copy");
    let y = DeviceBuffer::new(device, ROWS * WIDTH, "y").expect("memory");
    let step = Step { work: &work, row_bound: ROWS, scratch: &scratch, overlap: true };
    lists.build(stream, &kernels, &work).expect("chunk lists");
    let from = Matrix { data: on_device.slice(..), stride: WIDTH };
    let to = Matrix { data: y.slice(..), stride: WIDTH };
    kernels.shrink_gate(stream, group, from, &step).expect("shrink_gate");
    kernels.product(stream, group, from, to, Epilogue::Store, &step).expect("the product");
    assert!(!lists.take_overflow(stream).expect("the flag"), "a list has overflowed");
    let mut values = vec![Half::ZERO; ROWS * WIDTH];
    stream.download(&y, &mut values).expect("the outputs");
    values.iter().map(|value| value.0).collect()
}

#[test]
fn experts_that_were_brought_compute_what_loaded_ones_do() {
    in_both_types(|| {
        under_thread_orders(2, compare);
    });
}

fn compare() {
    const EXPERTS: usize = 7;
    let random = &mut Random(41);
    let mut fixture = Fixture::new(3, 12);
    let adapters: Vec<_> = (0..EXPERTS).map(|_| Adapter::any(random)).collect();
    for (number, adapter) in adapters.iter().enumerate() {
        fixture.stage(number as u32, adapter);
    }
    let loaded = &mut groups(&fixture.stream, EXPERTS, 4 * EXPERTS)[0];
    for (slot, adapter) in adapters.iter().enumerate() {
        for (i, site) in loaded.sites_mut().iter_mut().enumerate() {
            let Some(pair) = adapter.pair([0, i]) else { continue };
            site.chunks.load(&fixture.stream, slot, &pair).expect("loaded");
        }
    }
    let x = random.values(ROWS * WIDTH, 1.0);
    let mut seen = std::collections::HashSet::new();
    for round in 0..20 {
        let mut experts: Vec<_> = (0..EXPERTS as u32).collect();
        for i in (1..EXPERTS).rev() {
            experts.swap(i, random.below(i + 1));
        }
        experts.truncate(3);
        fixture.bring_and_wait(&experts, &[]);
        // Every row has a mixture of those.
        let gates: Vec<Vec<_>> =
            (0..ROWS).map(|_| (0..random.below(4)).map(|i| (i, random.number())).collect()).collect();
        let orders: Vec<_> =
            experts.iter().map(|&number| fixture.memory.order(number).expect("staged")).collect();
        let seats: Vec<_> =
            experts.iter().map(|&number| fixture.memory.seat(number).expect("ready")).collect();
        let brought = product(&fixture.stream, &fixture.groups[0], &x, &gates, &seats, &orders);
        let wanted = product(&fixture.stream, loaded, &x, &gates, &experts, &orders);
        assert_eq!(brought, wanted, "round {round}");
        assert!(wanted.iter().any(|&bits| bits != 0), "experts have changed something");
        seen.extend(experts.iter().copied().zip(seats));
    }
    assert!(seen.len() > 2 * EXPERTS, "experts have had different seats");
}
