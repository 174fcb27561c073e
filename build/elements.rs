//! The 16-bit types that kernels are compiled for: shared with the emulator's build script.

/// One build of a source.
pub struct Build {
    /// What the names of its kernels and of its image end in.
    pub suffix: &'static str,
    pub flags: &'static [&'static str],
}

pub const BF16: Build = Build { suffix: "", flags: &[] };
const F16: Build = Build { suffix: "_f16", flags: &["-DLORAMUX_F16"] };

/// Sources without 16-bit values: one build serves both types.
const OF_NEITHER: [&str; 2] = ["chunk_lists", "sample"];

/// The builds of the source of this name, without `.cu`.
pub fn builds(source: &str) -> &'static [Build] {
    if OF_NEITHER.contains(&source) { &[BF16] } else { &[BF16, F16] }
}
