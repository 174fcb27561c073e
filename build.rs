//! Compiles each `kernels/*.cu` with nvcc into images (fatbins) that hold machine code for every architecture: one for
//! each 16-bit type that the kernels are for.
//!
//! Leaves in `OUT_DIR`: `<name>.fatbin` and `<name>_f16.fatbin`, the table `images.rs` of them for `backend::cuda::images`, and `kernels.json`
//! (its path is in the environment variable `LORAMUX_KERNEL_REPORT` of the crate and its tests) with what every
//! kernel needs of an SM. Code compiled beside images sees `cfg(kernels)`. Without nvcc, or without the feature
//! `cuda`, the crate builds with an empty table.
//!
//! Environment: `NVCC` (a path; `none` builds without), `NVCC_CCBIN` (the C++ compiler nvcc calls),
//! `LORAMUX_CUDA_ARCHS` (default `80,90a`).

use std::collections::hash_map::DefaultHasher;
use std::env;
use std::ffi::OsString;
use std::fmt::Write as _;
use std::fs;
use std::hash::Hasher;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::thread;

use resources::Kernel;

#[path = "build/elements.rs"]
mod elements;
#[path = "build/resources.rs"]
mod resources;

const DEFAULT_ARCHS: &str = "80,90a";
const FLAGS: [&str; 6] = ["-fatbin", "-std=c++20", "-O3", "-lineinfo", "-Werror=all-warnings", "-Xptxas=-v"];
/// The first release with the instructions and the C++ that the kernels use.
const OLDEST_RELEASE: u32 = 13;

fn main() {
    println!("cargo::rustc-check-cfg=cfg(kernels)");
    for name in ["NVCC", "NVCC_CCBIN", "CUDA_HOME", "CUDA_PATH", "VIRTUAL_ENV", "LORAMUX_CUDA_ARCHS"] {
        println!("cargo::rerun-if-env-changed={name}");
    }
    if let Err(message) = build() {
        for line in message.lines().filter(|line| !line.trim().is_empty()) {
            println!("cargo::error={line}");
        }
    }
}

fn build() -> Result<(), String> {
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    // New and removed kernels; cargo looks at the whole folder, so headers too.
    println!("cargo::rerun-if-changed=kernels");
    println!("cargo::rustc-env=LORAMUX_KERNEL_REPORT={}", out.join("kernels.json").display());

    let nvcc = if env::var_os("CARGO_FEATURE_CUDA").is_some() { Nvcc::find()? } else { None };
    let Some(nvcc) = nvcc else {
        return write(&out.join("images.rs"), "[]\n")
            .and_then(|()| write(&out.join("kernels.json"), &resources::to_json("none", &[], &[])));
    };
    if nvcc.path.is_file() {
        println!("cargo::rerun-if-changed={}", nvcc.path.display());
    }
    println!("cargo::rustc-cfg=kernels");

    let archs = archs()?;
    let units = units()?;
    let jobs = env::var("NUM_JOBS").ok().and_then(|jobs| jobs.parse().ok()).unwrap_or(1);
    let queue = Mutex::new(units.iter());
    let results = Mutex::new(Vec::new());
    thread::scope(|scope| {
        for _ in 0..units.len().min(jobs) {
            scope.spawn(|| {
                loop {
                    let next = queue.lock().expect("no worker panics").next();
                    let Some(unit) = next else { break };
                    let result = compile(&nvcc, unit, &archs, &out);
                    results.lock().expect("no worker panics").push(result);
                }
            });
        }
    });

    let mut kernels = Vec::new();
    let mut errors = String::new();
    for result in results.into_inner().expect("no worker panics") {
        match result {
            Ok(of_unit) => kernels.extend(of_unit),
            Err(message) => errors += &message,
        }
    }
    if !errors.is_empty() {
        return Err(errors);
    }
    kernels.sort_by(|a, b| (&a.name, &a.arch).cmp(&(&b.name, &b.arch)));
    resources::add_dynamic_shared(&mut kernels, &read(Path::new("kernels/params.h"))?);
    write(&out.join("kernels.json"), &resources::to_json(&nvcc.release, &archs, &kernels))?;

    let mut table = String::from("[\n");
    for Unit { name, .. } in &units {
        let image = out.join(name).with_extension("fatbin");
        writeln!(table, "    image!({name:?}, {image:?}),").expect("writing to a string");
    }
    table += "]\n";
    write(&out.join("images.rs"), &table)
}

struct Nvcc {
    path: PathBuf,
    /// As in `13.0.88`.
    release: String,
}

impl Nvcc {
    /// The one named by `NVCC`, which must work, or the first of the usual places that is new enough.
    fn find() -> Result<Option<Self>, String> {
        match env::var_os("NVCC") {
            Some(none) if none == "none" => return Ok(None),
            Some(path) => return Self::at(path.into()).map(Some).map_err(|why| format!("NVCC: {why}")),
            None => {}
        }
        let root = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets CARGO_MANIFEST_DIR"));
        let folder_of = |name: &str| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let mut folders = vec![root.join(".toolchain/bin")];
        folders.extend(
            ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(folder_of).map(|home| home.join("bin")),
        );
        // The wheel `nvidia-cuda-nvcc`.
        for python in folder_of("VIRTUAL_ENV")
            .and_then(|venv| fs::read_dir(venv.join("lib")).ok())
            .into_iter()
            .flatten()
        {
            folders.extend(python.map(|python| python.path().join("site-packages/nvidia/cu13/bin")));
        }
        folders.extend(env::split_paths(&env::var_os("PATH").unwrap_or_default()));
        folders.extend(["/usr/local/cuda/bin", "/opt/cuda/bin"].map(PathBuf::from));

        let mut unusable = String::new();
        for path in
            folders.into_iter().map(|folder| folder.join("nvcc").with_extension(env::consts::EXE_EXTENSION))
        {
            if path.is_file() {
                match Self::at(path) {
                    Ok(nvcc) => return Ok(Some(nvcc)),
                    Err(why) => unusable += &format!(" ({why})"),
                }
            }
        }
        println!("cargo::rerun-if-env-changed=PATH");
        println!(
            "cargo::warning=no nvcc {OLDEST_RELEASE} found{unusable}: this build has no CUDA kernels. \
             `scripts/get-nvcc.sh` installs one for this repository; NVCC names one; NVCC=none builds without"
        );
        Ok(None)
    }

    fn at(path: PathBuf) -> Result<Self, String> {
        let shown = path.display();
        let output =
            Command::new(&path).arg("--version").output().map_err(|error| format!("{shown}: {error}"))?;
        let text = String::from_utf8_lossy(&output.stdout);
        // "Cuda compilation tools, release 13.0, V13.0.88"
        let release = text.split(", V").nth(1).and_then(|rest| rest.split_whitespace().next());
        let Some(release) = release.filter(|_| output.status.success()) else {
            return Err(format!(
                "{shown} --version tells no release: {:?}",
                text.lines().next().unwrap_or("")
            ));
        };
        let major = release.split('.').next().and_then(|major| major.parse::<u32>().ok());
        if major.is_none_or(|major| major < OLDEST_RELEASE) {
            return Err(format!("{shown} is release {release}, wanted {OLDEST_RELEASE} or newer"));
        }
        Ok(Self { release: release.to_owned(), path })
    }
}

/// Architectures by nvcc's names without `sm_`, as in `90a`.
fn archs() -> Result<Vec<String>, String> {
    let list = env::var("LORAMUX_CUDA_ARCHS").unwrap_or_else(|_| DEFAULT_ARCHS.to_owned());
    let archs: Vec<String> = list.split(',').map(|arch| arch.trim().to_owned()).collect();
    for arch in &archs {
        let digits = arch.strip_suffix(['a', 'f']).unwrap_or(arch);
        if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
            return Err(format!(
                "LORAMUX_CUDA_ARCHS: {arch:?} is no architecture; wanted a list like {DEFAULT_ARCHS}"
            ));
        }
    }
    Ok(archs)
}

/// What becomes one image.
struct Unit {
    /// Of the image, as in `norm_f16`.
    name: String,
    source: PathBuf,
    flags: &'static [&'static str],
}

fn units() -> Result<Vec<Unit>, String> {
    let entries = fs::read_dir("kernels").map_err(|error| format!("kernels: {error}"))?;
    let mut units = Vec::new();
    for entry in entries {
        let path = entry.map_err(|error| format!("kernels: {error}"))?.path();
        if path.extension().is_some_and(|extension| extension == "cu") {
            let stem = path.file_stem().expect("a .cu file has a stem").to_string_lossy();
            units.extend(elements::builds(&stem).iter().map(|build| Unit {
                name: format!("{stem}{}", build.suffix),
                source: path.clone(),
                flags: build.flags,
            }));
        }
    }
    if units.is_empty() {
        return Err("kernels: no .cu file".into());
    }
    units.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(units)
}

/// Compiles `unit` unless its image is of the same command, compiler and bytes of source and headers.
fn compile(nvcc: &Nvcc, unit: &Unit, archs: &[String], out: &Path) -> Result<Vec<Kernel>, String> {
    let Unit { name, source, flags } = unit;
    let file = |extension| out.join(name).with_extension(extension);
    let (image, dependencies, log, stamp) = (file("fatbin"), file("d"), file("log"), file("stamp"));

    let mut arguments: Vec<OsString> = FLAGS.iter().chain(*flags).map(OsString::from).collect();
    arguments.extend(["-I", "kernels", "-MD", "-MF"].map(OsString::from));
    arguments.push(dependencies.clone().into());
    arguments.extend(archs.iter().map(|arch| format!("-gencode=arch=compute_{arch},code=sm_{arch}").into()));
    arguments.extend(["-o".into(), image.clone().into(), source.into()]);
    let command = format!("{} {:?} {arguments:?}", nvcc.release, env::var_os("NVCC_CCBIN"));

    let fresh = image.is_file()
        && fingerprint(&command, &dependencies).is_ok_and(|now| read(&stamp).is_ok_and(|then| now == then));
    if !fresh {
        // Whatever interrupts this: no stamp, no reuse.
        let _ = fs::remove_file(&stamp);
        let output = Command::new(&nvcc.path)
            .args(&arguments)
            .output()
            .map_err(|error| format!("{}: {error}", nvcc.path.display()))?;
        let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
        if !output.status.success() {
            let (source, nvcc) = (source.display(), nvcc.path.display());
            let missing = text.contains("host compiler");
            let hint =
                if missing { "nvcc calls g++ of PATH, or the compiler that NVCC_CCBIN names" } else { "" };
            return Err(format!("{source} does not compile with {nvcc}:\n{text}\n{hint}\n"));
        }
        write(&log, &text)?;
        write(&stamp, &fingerprint(&command, &dependencies)?)?;
    }
    resources::read(source, &read(&log)?)
}

/// The command and the hash of every file of this repository that `dependencies`, in make's syntax, names. The
/// toolkit's own headers come with the compiler's release.
fn fingerprint(command: &str, dependencies: &Path) -> Result<String, String> {
    let text = read(dependencies)?;
    let mut fingerprint = format!("{command}\n");
    for path in text.split_whitespace().map(Path::new).filter(|path| path.starts_with("kernels")) {
        let mut hasher = DefaultHasher::new();
        hasher.write(read(path)?.as_bytes());
        writeln!(fingerprint, "{} {:016x}", path.display(), hasher.finish()).expect("writing to a string");
    }
    Ok(fingerprint)
}

fn read(path: &Path) -> Result<String, String> {
    fs::read_to_string(path).map_err(|error| format!("{}: {error}", path.display()))
}

fn write(path: &Path, text: &str) -> Result<(), String> {
    fs::write(path, text).map_err(|error| format!("{}: {error}", path.display()))
}
