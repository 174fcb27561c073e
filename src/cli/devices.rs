//! `loramux devices`: what can run a model here.

use super::{Failure, Outcome};
use crate::backend::cpu::Isa;

#[derive(clap::Args)]
pub(crate) struct Args {}

pub(crate) fn run(_args: &Args) -> Result<Outcome, Failure> {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let sets: Vec<&str> = Isa::available().into_iter().map(Isa::name).collect();
    println!("cpu      {threads} threads, {} (of {})", sets[0], sets.join(", "));
    println!("cuda     not in this build");
    Ok(Outcome::Done)
}
