//! Peak resident memory of serving, over the size of the mapped checkpoint (Linux).
//!
//! Writes a random model in the shape of Llama 3.2 1B to a temporary folder, then serves it in a process of its own:
//! 16 sequences of 128 + 16 tokens, through the base alone and through 8 adapters of rank 16. Prints one JSON object, or writes it to a path given
//! as argument.

use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use loramux::engine::request::Request;
use loramux::engine::{Engine, EngineOptions};
use loramux::format::safetensors::write_safetensors;
use loramux::model::Base;
use loramux_benches::{RandomWeights, commit, device, llama_1b, llama_1b_json, random_adapter};
use serde_json::json;

const BLOCKS: usize = 16;
const ADAPTERS: u64 = 8;
const RANK: usize = 16;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|argument| argument != "--bench").collect();
    match arguments.first().map(String::as_str) {
        Some("serve") => serve(Path::new(&arguments[1]), arguments[2].parse().expect("a number")),
        report => measure(report),
    }
}

fn measure(report: Option<&str>) {
    let folder = std::env::temp_dir().join(format!("loramux-memory-{}", std::process::id()));
    std::fs::create_dir_all(&folder).expect("a temporary folder");
    let config = llama_1b(BLOCKS);
    let tokenizer = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/base");
    for file in ["tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(tokenizer.join(file), folder.join(file)).expect("the bundled tokenizer");
    }
    std::fs::write(folder.join("config.json"), llama_1b_json(BLOCKS).to_string()).expect("config.json");
    let weights = folder.join("model.safetensors");
    let tensors = RandomWeights::new(&config).tensors(&config);
    write_safetensors(&weights, &tensors, &Default::default()).expect("room for the weights");
    drop(tensors);
    let mapped = std::fs::metadata(&weights).expect("just written").len();
    let peaks = [0, ADAPTERS].map(|adapters| {
        let own = std::env::current_exe().expect("own path");
        let child = Command::new(own).arg("serve").arg(&folder).arg(adapters.to_string()).output();
        let output = child.expect("the serving process starts");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let peak: u64 = String::from_utf8_lossy(&output.stdout).trim().parse().expect("a number of bytes");
        json!({
            "adapters": adapters, "rank": RANK,
            "peak_resident_bytes": peak, "ratio": peak as f64 / mapped as f64,
        })
    });
    std::fs::remove_dir_all(&folder).ok();
    let result = json!({
        "bench": "memory", "command": "cargo bench -p loramux-benches --bench memory -- FILE", "device": device(),
        "commit": commit(),
        "model": "llama-3.2-1b shape, bf16, random weights", "mapped_bytes": mapped, "results": peaks,
    });
    match report {
        Some(path) => std::fs::write(path, format!("{result:#}\n")).expect("the report can be written"),
        None => println!("{result:#}"),
    }
}

/// Serves the model in `folder` through so many adapters; prints this process's peak resident bytes.
fn serve(folder: &Path, adapters: u64) {
    let base = Arc::new(Base::open(folder).expect("the model opens"));
    let sites = base.checkpoint.sites().clone();
    let engine = Engine::start(base, EngineOptions::default()).expect("the engine starts");
    for seed in 0..adapters {
        let adapter = random_adapter(&sites, RANK, seed + 1);
        engine.insert_adapter(&format!("adapter-{seed}"), adapter).expect("the adapter is taken");
    }
    let streams: Vec<_> = (0..16u32)
        .map(|sequence| {
            let mut request = Request::new((0..128).map(|i| (i * 7919 + sequence * 31) % 100_000).collect());
            if adapters > 0 {
                request.adapters = vec![(format!("adapter-{}", u64::from(sequence) % adapters), 1.0)];
            }
            request.stop.ignore_eos = true;
            engine.submit(request).expect("a valid request")
        })
        .collect();
    for stream in streams {
        stream.wait().expect("an answer");
    }
    let status = std::fs::read_to_string("/proc/self/status").expect("a Linux system");
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("VmHWM");
    let kib: u64 = line.trim().trim_end_matches(" kB").parse().expect("a number of KiB");
    println!("{}", kib * 1024);
}
