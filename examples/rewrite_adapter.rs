//! Reads a PEFT adapter for a base and writes it again: `rewrite_adapter BASE ADAPTER OUT`.
//!
//! Reading checks every field and tensor against the base, so this also tells whether an adapter belongs to it. What
//! is written means the same to PEFT, and has the same hash when read again.

use std::error::Error;
use std::path::PathBuf;

use loramux::adapter::peft::{Limits, WriteOptions, read_adapter, write_adapter};
use loramux::model::Base;

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<PathBuf> = std::env::args_os().skip(1).map(PathBuf::from).collect();
    let [base, adapter, out] = arguments.as_slice() else {
        return Err("usage: rewrite_adapter BASE ADAPTER OUT".into());
    };
    let base = Base::open(base)?;
    let sites = &base.checkpoint.sites().table;
    let adapter = read_adapter(adapter, sites, &base.checkpoint, Limits { max_rank: 512 })?;
    write_adapter(out, &adapter, sites, WriteOptions::default())?;
    println!("{} for {}: {} sites adapted", adapter.hash, base.name, adapter.sites.len());
    Ok(())
}
