//! The device that tests of kernels run on: the emulator, or with `LORAMUX_TEST_DEVICE=cuda` a GPU.
#![allow(dead_code, reason = "every test binary uses its own part")]

use std::sync::Arc;

use loramux::backend::cuda::Device;

/// Whether tests run on a GPU.
pub fn on_gpu() -> bool {
    match std::env::var("LORAMUX_TEST_DEVICE").as_deref() {
        Err(_) | Ok("emulator") => false,
        Ok("cuda") => true,
        Ok(other) => panic!("LORAMUX_TEST_DEVICE is {other:?}, wanted emulator or cuda"),
    }
}

/// The device, with all kernels.
pub fn device() -> Arc<Device> {
    if on_gpu() {
        return Device::open(0).expect("LORAMUX_TEST_DEVICE asks for a GPU");
    }
    loramux_emulator::install();
    // The emulator has its kernels already; it takes any image for all of them.
    Device::open_with_images(0, &[b"emulator"]).expect("the emulator is a device")
}

/// Runs `test` under several thread orders; on a GPU, which has its own, once.
pub fn under_thread_orders(seeds: u64, mut test: impl FnMut()) {
    if on_gpu() {
        return test();
    }
    for seed in 0..seeds {
        loramux_emulator::set_seed(seed);
        test();
    }
}
