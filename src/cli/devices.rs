//! `loramux devices`: what can run a model here, and why the rest cannot.

use super::output::print;
use super::{Failure, Outcome};
use crate::backend::cpu::Isa;

#[derive(clap::Args)]
pub(crate) struct Args {}

pub(crate) fn run(_args: &Args) -> Result<Outcome, Failure> {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let sets: Vec<&str> = Isa::available().into_iter().map(Isa::name).collect();
    line("cpu", &format!("{threads} threads, {} (of {})", sets[0], sets.join(", ")))?;
    cuda()?;
    Ok(Outcome::Done)
}

fn line(device: &str, about: &str) -> Result<(), Failure> {
    print(&format!("{device:<7}  {about}\n"))
}

#[cfg(feature = "cuda")]
fn cuda() -> Result<(), Failure> {
    use crate::backend::cuda::{CudaError, Device, KERNELS_BUILT};

    let count = match Device::count() {
        Ok(0) => return line("cuda", "the CUDA driver finds no device"),
        Ok(count) => count,
        Err(error) => return line("cuda", &error.to_string()),
    };
    for ordinal in 0..count {
        let about = describe(ordinal).unwrap_or_else(|error| {
            error.end_process_if_lost();
            error.to_string()
        });
        line(&format!("cuda:{ordinal}"), &about)?;
    }
    if !KERNELS_BUILT {
        line("cuda", &CudaError::KernelsNotBuilt.to_string())?;
    }
    Ok(())
}

#[cfg(feature = "cuda")]
fn describe(ordinal: usize) -> Result<String, crate::backend::cuda::CudaError> {
    use super::output::{bytes, clean};

    // Without kernels: a device is there whether this build can use it or not.
    let device = crate::backend::cuda::Device::open_with_images(ordinal, &[])?;
    let (properties, free) = (device.properties(), device.free_bytes()?);
    Ok(format!(
        "{}, compute capability {}.{}, {} SMs, {} free of {}",
        clean(&properties.name),
        properties.capability.0,
        properties.capability.1,
        properties.multiprocessors,
        bytes(free as u64),
        bytes(properties.total_bytes as u64),
    ))
}

#[cfg(not(feature = "cuda"))]
fn cuda() -> Result<(), Failure> {
    line("cuda", &crate::engine::EngineError::WithoutCuda.to_string())
}
