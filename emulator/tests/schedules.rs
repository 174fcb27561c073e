//! Mistakes of synchronisation: each shows as a wrong result under some of eight schedules, and the right kernel is
//! right under all of them.

mod common;

use common::{Device, ok};

const SEEDS: std::ops::Range<u64> = 0..8;

#[repr(C)]
struct Rotate {
    out: u64,
    x: u64,
    rounds: u32,
    mistake: u32,
}

/// Under how many seeds the kernel is right.
fn right_rotations(mistake: u32) -> usize {
    let device = Device::open();
    let x: Vec<f32> = (0..128).map(|i| (i * i % 37) as f32).collect();
    let expected: Vec<f32> = (0..128).map(|t| (1..=3).map(|round| x[(t + round) % 128]).sum()).collect();
    let input = device.upload(&x);
    let is_right = |&seed: &u64| {
        loramux_emulator::set_seed(seed);
        let out = device.allocate(128 * 4);
        let params = Rotate { out: out.address, x: input.address, rounds: 3, mistake };
        ok(device.launch("test_rotate", 1, 128, 128 * 4, params));
        device.download::<f32>(out) == expected
    };
    SEEDS.filter(is_right).count()
}

#[test]
fn barriers_make_every_schedule_right() {
    assert_eq!(right_rotations(0), 8);
}

#[test]
fn a_missing_barrier_before_reads_shows() {
    assert!(right_rotations(1) < 8);
}

#[test]
fn a_missing_barrier_after_reads_shows() {
    assert!(right_rotations(2) < 8);
}

#[test]
fn a_race_between_warps_shows() {
    assert!(right_rotations(3) < 8);
}

#[repr(C)]
struct Copy {
    out: u64,
    x: u64,
    valid: u32,
    newest: u32,
    misaligned: u32,
}

fn copied(valid: u32, newest: u32) -> (Vec<u32>, Vec<u32>) {
    let device = Device::open();
    // No more than the kernel may read: what is not valid must not be looked at.
    let x: Vec<u32> = (0..valid * 4).map(|i| i + 1).collect();
    let input = device.upload(&x);
    let out = device.allocate(64 * 16);
    let params = Copy { out: out.address, x: input.address, valid, newest, misaligned: 0 };
    ok(device.launch("test_copy", 1, 32, 64 * 16, params));
    (x, device.download(out))
}

#[test]
fn copies_land_at_their_wait_and_zeros_where_nothing_is_valid() {
    let (x, out) = copied(64, 0);
    assert_eq!(out, x);
    // 64 groups of 16 bytes fill their pages: the 40 of this input end where the next page faults.
    let (x, out) = copied(16, 0);
    assert_eq!(out[..64], x);
    assert!(out[64..].iter().all(|&word| word == 0));
}

#[test]
fn a_missing_wait_shows() {
    let (x, out) = copied(64, 1);
    assert_eq!(out[..128], x[..128], "the older group has landed");
    assert!(out[128..].iter().all(|&word| word == u32::MAX), "the newest group is under way");
    let (_, out) = copied(64, 2);
    assert!(out.iter().all(|&word| word == u32::MAX), "without a wait everything is under way");
}

/// The order in which the 256 threads of four blocks come under a seed.
fn order(device: &Device, seed: u64) -> Vec<u32> {
    loramux_emulator::set_seed(seed);
    order_now(device)
}

fn order_now(device: &Device) -> Vec<u32> {
    let buffer = device.upload(&[0u32; 257]);
    ok(device.launch("test_order", 4, 64, 0, buffer.address));
    device.download(buffer)[1..].to_vec()
}

#[test]
fn a_seed_draws_the_order_of_threads_warps_and_blocks() {
    let device = Device::open();
    let natural: Vec<u32> = (0..256).collect();
    assert_eq!(order(&device, 0), natural);
    let drawn = order(&device, 1);
    assert_eq!(drawn, order(&device, 1), "the same seed, the same order");
    assert_ne!(drawn, order(&device, 2));
    let mut sorted = drawn.clone();
    sorted.sort_unstable();
    assert_eq!(sorted, natural);
    let of_blocks = |order: &[u32]| order.chunks(64).map(|chunk| chunk[0] / 64).collect::<Vec<_>>();
    let of_warps = |order: &[u32]| order.chunks(32).map(|chunk| chunk[0] / 32 % 2).collect::<Vec<_>>();
    let orders: Vec<_> = (1..9).map(|seed| order(&device, seed)).collect();
    assert!(orders.iter().any(|order| of_blocks(order) != [0, 1, 2, 3]));
    assert!(orders.iter().any(|order| of_warps(order)[0] == 1));
    assert!(orders.iter().all(|order| order[..32] != natural[..32]));
}

#[test]
fn the_environment_names_the_first_seed() {
    if std::env::var_os("LORAMUX_EMULATOR_SEED").is_some() {
        println!("order: {:?}", order_now(&Device::open_with_current_seed()));
        return;
    }
    let device = Device::open();
    let mut again = std::process::Command::new(std::env::current_exe().unwrap());
    again.args(["--exact", "the_environment_names_the_first_seed", "--nocapture"]);
    let output = again.env("LORAMUX_EMULATOR_SEED", "3").output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.contains(&format!("order: {:?}", order(&device, 3))), "{text}");
}
