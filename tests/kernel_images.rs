//! The machine code of the kernels in this build, read with cuobjdump: the instructions that a kernel's speed rests
//! on are there, and those that a careless edit brings in are not. Needs no GPU.
#![cfg(kernels)]

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::Command;

use serde_json::Value;

/// Name and path of every image: the table of `build.rs`.
macro_rules! image {
    ($name:literal, $path:literal) => {
        ($name, $path)
    };
}
static IMAGES: &[(&str, &str)] = &include!(concat!(env!("OUT_DIR"), "/images.rs"));

/// Products on tensor cores with fp32 sums, 16x8x16: of bf16, and in kernels for fp16 of that.
const MMA: &str = "HMMA.16816.F32.BF16";
const MMA_F16: &str = "HMMA.16816.F32";
/// Four 8x8 matrices from shared memory.
const LOAD_MATRIX: &str = "LDSM.16.M88.4";
/// The same, each transposed.
const LOAD_TRANSPOSED: &str = "LDSM.16.MT88.4";
/// 2^x, without the scaling that subnormal numbers would need.
const EXP2: &str = "MUFU.EX2";
/// 16 bytes from global to shared memory, past registers and L1.
const COPY_ASYNC: &str = "LDGSTS.E.BYPASS.LTC128B.128";
/// 16 bytes between global memory and registers.
const LOAD: &str = "LDG.E.128";
const STORE: &str = "STG.E.128";
/// An addition in shared memory, by hardware: no loop of compare and exchange.
const ADD_SHARED: &str = "ATOMS.ADD";
/// What other thread blocks have written is visible from here on: a plain load would not say so.
const ACQUIRE: &str = "LDG.E.STRONG.GPU";

/// By the name of the kernel or of a family of them: what its code must contain. Kernels for fp16 are of the family of
/// their bf16 twins.
const REQUIRED: [(&str, &[&str]); 11] = [
    ("attention_", &[MMA, LOAD_MATRIX, LOAD_TRANSPOSED, COPY_ASYNC, EXP2]),
    ("chunk_lists", &[]),
    ("embed", &[LOAD, STORE]),
    ("gemm_decode_", &[MMA, LOAD_MATRIX, COPY_ASYNC, ACQUIRE]),
    ("gemm_rank_ext", &[MMA, LOAD_MATRIX, COPY_ASYNC]),
    ("pick_rows", &[LOAD, STORE]),
    ("rms_norm", &[LOAD, STORE]),
    ("rope_store", &[LOAD, STORE]),
    ("sample", &[ADD_SHARED]),
    ("shrink_gate_", &[MMA, LOAD_MATRIX, COPY_ASYNC]),
    ("swiglu", &[LOAD, STORE]),
];
/// The same of every kernel from sm_90: it waits for the grid before it late, and lets the next one start early.
const REQUIRED_FROM_SM_90: [&str; 2] = ["ACQBULK", "PREEXIT"];
/// Kernels without 16-bit values, which have no twin.
const OF_NEITHER: [&str; 2] = ["chunk_lists", "sample"];
/// Of no kernel: loads and stores of local memory.
const FORBIDDEN: [&str; 2] = ["LDL", "STL"];

/// Kernel and architecture (as in `sm_90a`).
type Code = (String, String);

/// The instructions of every kernel on every architecture, with modifiers and without operands.
fn disassembled() -> BTreeMap<Code, BTreeSet<String>> {
    let mut found: BTreeMap<Code, BTreeSet<String>> = BTreeMap::new();
    for (name, path) in IMAGES {
        let text = sass(name, path);
        let (mut arch, mut kernel) = ("", "");
        for line in text.lines().map(str::trim) {
            if let Some(name) = line.strip_prefix("arch = ") {
                arch = name;
            } else if let Some(name) = line.strip_prefix("Function : ") {
                kernel = name;
            } else if let Some(instruction) = instruction(line) {
                let code = (kernel.to_owned(), arch.to_owned());
                found.entry(code).or_default().insert(instruction.to_owned());
            }
        }
    }
    found
}

/// The instruction of `/*0040*/   @!P0 LDG.E.U16 R2, [R2.64] ;   /* 0x… */`.
fn instruction(line: &str) -> Option<&str> {
    let (address, code) = line.strip_prefix("/*")?.split_once("*/")?;
    // Lines of an encoding's second half have no instruction.
    address.bytes().all(|byte| byte.is_ascii_hexdigit()).then_some(())?;
    let mut words = code.split_whitespace();
    let first = words.next()?;
    let instruction = if first.starts_with('@') { words.next()? } else { first };
    Some(instruction.trim_end_matches(';'))
}

fn sass(name: &str, path: &str) -> String {
    let fetched = Path::new(env!("CARGO_MANIFEST_DIR")).join(".toolchain/bin/cuobjdump");
    let program = if fetched.exists() { fetched } else { "cuobjdump".into() };
    let output = Command::new(&program).arg("-sass").arg(path).output().unwrap_or_else(|error| {
        panic!("{}: {error}; scripts/get-nvcc.sh installs it, as does the CUDA toolkit", program.display())
    });
    assert!(output.status.success(), "{name}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn every_image_holds_machine_code_of_its_kernels_for_every_architecture() {
    let report: Value = serde_json::from_str(include_str!(env!("LORAMUX_KERNEL_REPORT"))).unwrap();
    let compiled: BTreeSet<Code> = report["kernels"]
        .as_array()
        .unwrap()
        .iter()
        .map(|entry| ["kernel", "arch"].map(|key| entry[key].as_str().unwrap().to_owned()).into())
        .collect();
    let disassembled = disassembled();
    assert_eq!(disassembled.keys().cloned().collect::<BTreeSet<_>>(), compiled);
    for (kernel, _) in &compiled {
        for arch in report["archs"].as_array().unwrap() {
            let code = (kernel.clone(), arch.as_str().unwrap().to_owned());
            assert!(compiled.contains(&code), "{kernel} was not compiled for {arch}");
        }
        let twin = match kernel.strip_suffix("_f16") {
            Some(of_bf16) => of_bf16.to_owned(),
            None => format!("{kernel}_f16"),
        };
        let has_twin = compiled.iter().any(|(kernel, _)| *kernel == twin);
        assert_eq!(has_twin, !OF_NEITHER.contains(&kernel.as_str()), "{kernel} and {twin}");
    }
}

#[test]
fn kernels_contain_the_instructions_that_their_speed_rests_on() {
    let mut missing = Vec::new();
    for ((kernel, arch), code) in disassembled() {
        let family = REQUIRED.iter().find(|(name, _)| kernel.starts_with(name));
        let (_, of_family) = family.unwrap_or_else(|| panic!("{kernel} is not in the list of this test"));
        let generation: u32 = arch.trim_matches(|c: char| !c.is_ascii_digit()).parse().unwrap();
        let of_generation = if generation >= 90 { &REQUIRED_FROM_SM_90[..] } else { &[] };
        let of_type = |&wanted: &&'static str| match wanted {
            MMA if kernel.ends_with("_f16") => MMA_F16,
            _ => wanted,
        };
        let wanted = of_family.iter().chain(of_generation).map(of_type);
        for wanted in wanted.filter(|wanted| !code.contains(*wanted)) {
            missing.push(format!("{kernel} on {arch} has no {wanted}"));
        }
    }
    assert!(missing.is_empty(), "{}", missing.join("\n"));
}

#[test]
fn no_kernel_uses_local_memory() {
    for ((kernel, arch), code) in disassembled() {
        for instruction in code {
            let operation = instruction.split('.').next().unwrap();
            assert!(!FORBIDDEN.contains(&operation), "{kernel} on {arch} has {instruction}");
        }
    }
}
