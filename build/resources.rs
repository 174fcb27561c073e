//! What a kernel needs of an SM, read from the report of `ptxas -v`.

use std::path::Path;

/// A kernel on one architecture.
#[derive(Default)]
pub struct Kernel {
    pub name: String,
    /// As in `sm_90a`.
    pub arch: String,
    /// Per thread.
    registers: u32,
    barriers: u32,
    /// Bytes of a block.
    static_shared: u32,
    /// Bytes that a launch adds, by params.h.
    dynamic_shared: u32,
    /// Bytes per thread, with the next two: zero in what a build accepts.
    stack: u32,
    spill_stores: u32,
    spill_loads: u32,
}

/// Adds what launches of `kernels` ask for: `LORAMUX_<NAME>_SHARED_BYTES` of `params`, the text of params.h, is for the
/// kernels whose names begin with that name.
pub fn add_dynamic_shared(kernels: &mut [Kernel], params: &str) {
    let defined = params.lines().filter_map(|line| {
        let (name, value) = line.strip_prefix("#define LORAMUX_")?.split_once("_SHARED_BYTES ")?;
        Some((name.to_lowercase(), value.trim().parse().ok()?))
    });
    for (prefix, bytes) in defined {
        for kernel in kernels.iter_mut().filter(|kernel| kernel.name.starts_with(&prefix)) {
            kernel.dynamic_shared = bytes;
        }
    }
}

/// The kernels of `source` by ptxas' `log`. Refused are spills, stack frames and performance warnings (`C75xx`).
pub fn read(source: &Path, log: &str) -> Result<Vec<Kernel>, String> {
    // The number before `unit`, as in "Used 12 registers, used 1 barriers, 1024 bytes smem".
    let amount = |line: &str, unit: &str| -> u32 {
        let before = line.find(unit).map_or("", |end| line[..end].trim_end());
        before
            .rsplit(|c: char| !c.is_ascii_digit())
            .next()
            .and_then(|digits| digits.parse().ok())
            .unwrap_or(0)
    };
    let source = source.display();
    let mut kernels: Vec<Kernel> = Vec::new();
    let mut refused = String::new();
    // Warnings and functions of an architecture: the report names the architecture with the next kernel.
    let mut function = "";
    let mut warnings: Vec<&str> = Vec::new();
    for line in log.lines().map(str::trim) {
        if let Some((_, entry)) = line.split_once("Compiling entry function '") {
            let mut quoted = entry.split('\'');
            let name = quoted.next().unwrap_or_default().to_owned();
            let arch = quoted.nth(1).unwrap_or_default().to_owned();
            for warning in warnings.drain(..) {
                refused += &format!("{source} on {arch}: {warning}\n");
            }
            kernels.push(Kernel { name, arch, ..Kernel::default() });
        } else if let Some((_, name)) = line.split_once("Function properties for ") {
            function = name;
        } else if line.contains("(C75") {
            warnings.push(line);
        } else if line.contains("bytes stack frame") {
            let [stack, spill_stores, spill_loads] =
                ["bytes stack frame", "bytes spill stores", "bytes spill loads"]
                    .map(|unit| amount(line, unit));
            if let Some(kernel) = kernels.last_mut().filter(|kernel| kernel.name == function) {
                (kernel.stack, kernel.spill_stores, kernel.spill_loads) = (stack, spill_stores, spill_loads);
            }
            if stack + spill_stores + spill_loads > 0 {
                let arch = kernels.last().map_or("the first architecture", |kernel| &kernel.arch);
                refused += &format!("{source}: `{function}` on {arch}: {line}\n");
            }
        } else if let (true, Some(kernel)) = (line.contains(": Used "), kernels.last_mut()) {
            kernel.registers = amount(line, "registers");
            kernel.barriers = amount(line, "barriers");
            kernel.static_shared = amount(line, "bytes smem");
        }
    }
    if kernels.iter().all(|kernel| kernel.registers == 0) || !warnings.is_empty() {
        return Err(format!("{source}: no kernel in it, or a new form of ptxas' report:\n{log}\n"));
    }
    if refused.is_empty() { Ok(kernels) } else { Err(refused) }
}

/// All kernels as JSON, one line for each on each architecture, in this order.
pub fn to_json(nvcc: &str, archs: &[String], kernels: &[Kernel]) -> String {
    let archs: Vec<String> = archs.iter().map(|arch| format!("\"sm_{arch}\"")).collect();
    let lines: Vec<String> = kernels
        .iter()
        .map(|kernel| {
            let Kernel { name, arch, registers, barriers, static_shared, dynamic_shared, .. } = kernel;
            let Kernel { stack, spill_stores, spill_loads, .. } = kernel;
            format!(
                "\n    {{\"kernel\": {name:?}, \"arch\": {arch:?}, \"registers\": {registers}, \
                 \"barriers\": {barriers}, \"static_shared\": {static_shared}, \
                 \"dynamic_shared\": {dynamic_shared}, \"stack\": {stack}, \
                 \"spill_stores\": {spill_stores}, \"spill_loads\": {spill_loads}}}"
            )
        })
        .collect();
    let (archs, lines) = (archs.join(", "), lines.join(","));
    format!("{{\n  \"nvcc\": {nvcc:?},\n  \"archs\": [{archs}],\n  \"kernels\": [{lines}\n  ]\n}}\n")
}
