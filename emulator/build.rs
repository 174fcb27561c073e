//! Builds the stand-in driver: the runtime, the driver functions and the kernels, by the host's C++ compiler, into
//! one shared object.
//!
//! `CXX` names the compiler, `LORAMUX_EMULATOR_SANITIZE` what `-fsanitize` gets.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::time::SystemTime;
use std::{env, fs, thread};

/// Bits must not depend on the compiler's mood: no contraction to fused multiply-adds, no assumptions on aliasing, which
/// device code does not make either.
const FLAGS: &[&str] = &[
    "-std=c++20",
    "-O2",
    "-g1",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-strict-aliasing",
    "-ffp-contract=off",
    "-U_FORTIFY_SOURCE",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-I.",
];

/// Kernels see the emulator's `device.cuh` and `ptx.cuh` first, and pragmas that only nvcc knows.
const KERNEL_FLAGS: &[&str] =
    &["-Iinclude", "-I../kernels", "-include", "include/cuda_names.h", "-Wno-unknown-pragmas", "-x", "c++"];

/// Everything that goes into the shared object, relative to this crate.
const SOURCES: &[(&str, &str, &[&str])] = &[
    ("runtime", "cpp", &[]),
    ("driver", "cpp", &[]),
    ("../kernels", "cu", KERNEL_FLAGS),
    ("tests/kernels", "cu", KERNEL_FLAGS),
];

#[path = "../build/elements.rs"]
mod elements;

fn main() {
    println!("cargo::rerun-if-env-changed=CXX");
    println!("cargo::rerun-if-env-changed=LORAMUX_EMULATOR_SANITIZE");
    for directory in ["include", "runtime", "driver", "../kernels", "tests/kernels", "build.rs", "../build"] {
        println!("cargo::rerun-if-changed={directory}");
    }
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    if let Err(message) = build(&out) {
        for line in message.lines() {
            println!("cargo::error={line}");
        }
    }
}

/// One translation unit.
struct Unit {
    source: PathBuf,
    object: PathBuf,
    flags: Vec<String>,
}

fn build(out: &Path) -> Result<(), String> {
    let compiler = env::var("CXX").unwrap_or_else(|_| "c++".to_owned());
    let version = compiler_version(&compiler)?;
    let mut common: Vec<String> = FLAGS.iter().map(|&flag| flag.to_owned()).collect();
    let sanitize = env::var("LORAMUX_EMULATOR_SANITIZE").unwrap_or_default();
    if !sanitize.is_empty() {
        // Null is an address like any other outside of the device's memory: a fault that the emulator reports.
        common.push(format!("-fsanitize={sanitize}"));
        common.extend(["-fno-sanitize=null", "-fno-omit-frame-pointer"].map(str::to_owned));
    }
    let mut units = Vec::new();
    for &(directory, extension, flags) in SOURCES {
        for source in files(Path::new(directory), extension)? {
            let builds: &[_] =
                if extension == "cu" { elements::builds(&stem(&source)) } else { &[elements::BF16] };
            for build in builds {
                let name =
                    format!("{}-{}{}.o", directory.replace(['.', '/'], ""), stem(&source), build.suffix);
                let flags = common.iter().map(String::as_str).chain(flags.iter().chain(build.flags).copied());
                let flags = flags.map(str::to_owned).collect();
                units.push(Unit { object: out.join(name), source: source.clone(), flags });
            }
        }
    }
    compile_all(&compiler, &version, &units)?;

    let mut link = Command::new(&compiler);
    link.args(["-shared", "-Wl,-soname,libcuda.so", "-Wl,--version-script=driver/exports.map", "-pthread"]);
    if !sanitize.is_empty() {
        link.arg(format!("-fsanitize={sanitize}"));
    }
    link.args(units.iter().map(|unit| &unit.object)).arg("-o").arg(out.join("libcuda.so"));
    run(&mut link, "link the emulator")
}

fn compiler_version(compiler: &str) -> Result<String, String> {
    match Command::new(compiler).arg("--version").output() {
        Ok(output) if output.status.success() => Ok(String::from_utf8_lossy(&output.stdout).into_owned()),
        Ok(output) => Err(format!("`{compiler} --version` failed: {}", output.status)),
        Err(error) => Err(format!(
            "cannot run the C++ compiler `{compiler}`: {error}\nThe tests of the CUDA kernels run on a CPU through a \
             C++20 compiler: install g++ 12 or clang++ 16 or newer (Debian: apt-get install g++), or name one in CXX."
        )),
    }
}

/// Compiles what has changed, on as many threads as Cargo allows.
fn compile_all(compiler: &str, version: &str, units: &[Unit]) -> Result<(), String> {
    let jobs = env::var("NUM_JOBS").ok().and_then(|jobs| jobs.parse().ok()).unwrap_or(1);
    let queue = Mutex::new(units.iter());
    let failures = Mutex::new(Vec::new());
    thread::scope(|scope| {
        for _ in 0..units.len().min(jobs) {
            scope.spawn(|| {
                loop {
                    let Some(unit) = queue.lock().expect("no thread panics").next() else { break };
                    if let Err(message) = compile(compiler, version, unit) {
                        failures.lock().expect("no thread panics").push(message);
                    }
                }
            });
        }
    });
    let failures = failures.into_inner().expect("no thread panics");
    if failures.is_empty() { Ok(()) } else { Err(failures.join("\n")) }
}

/// Compiles one unit, unless its object is newer than all it was made from and by the same command.
fn compile(compiler: &str, version: &str, unit: &Unit) -> Result<(), String> {
    let dependencies = unit.object.with_extension("d");
    let stamp = unit.object.with_extension("command");
    let command = format!("{version}\n{compiler} {}", unit.flags.join(" "));
    if fs::read_to_string(&stamp).is_ok_and(|last| last == command) && is_current(&unit.object, &dependencies)
    {
        return Ok(());
    }
    // A failed attempt must not be taken for a finished one.
    let _ = fs::remove_file(&stamp);
    let mut compile = Command::new(compiler);
    compile.args(&unit.flags).arg("-MD").arg("-MF").arg(&dependencies);
    compile.arg("-c").arg(&unit.source).arg("-o").arg(&unit.object);
    run(&mut compile, &format!("compile {}", unit.source.display()))?;
    fs::write(&stamp, command).map_err(|error| format!("{}: {error}", stamp.display()))
}

/// Whether `object` is newer than every file of its make-style dependency list.
fn is_current(object: &Path, dependencies: &Path) -> bool {
    let (Some(built), Ok(list)) = (modified(object), fs::read_to_string(dependencies)) else { return false };
    let list = list.split_once(':').map_or("", |(_, list)| list);
    list.split_whitespace()
        .filter(|&word| word != "\\")
        .all(|path| modified(Path::new(path)).is_some_and(|time| time <= built))
}

fn modified(path: &Path) -> Option<SystemTime> {
    path.metadata().and_then(|metadata| metadata.modified()).ok()
}

fn run(command: &mut Command, what: &str) -> Result<(), String> {
    let output = command.output().map_err(|error| format!("cannot {what}: {error}"))?;
    if output.status.success() {
        return Ok(());
    }
    Err(format!(
        "cannot {what}:\n{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    ))
}

/// The files of a directory with this extension, in order of their names.
fn files(directory: &Path, extension: &str) -> Result<Vec<PathBuf>, String> {
    let entries = fs::read_dir(directory).map_err(|error| format!("{}: {error}", directory.display()))?;
    let mut files: Vec<PathBuf> = entries
        .filter_map(|entry| entry.ok().map(|entry| entry.path()))
        .filter(|path| path.extension().is_some_and(|found| found == extension))
        .collect();
    files.sort();
    Ok(files)
}

fn stem(path: &Path) -> String {
    path.file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default()
}
