//! The compiled kernels, part of this library: one image per file of `kernels/`, made by `build.rs`. An image holds
//! machine code for every architecture of the build; the driver takes the one for its GPU.

/// Whether this build has kernels.
pub const BUILT: bool = cfg!(kernels);

/// What to tell a user who asks for a GPU when it has not.
pub const NOT_BUILT: &str =
    "this build has no CUDA kernels: install nvcc 13 (`scripts/get-nvcc.sh`) and build again";

/// The kernels of `kernels/<name>.cu`.
pub(crate) struct Image {
    pub name: &'static str,
    /// A fatbin, 64-byte aligned as the driver wants it.
    pub bytes: &'static [u8],
}

/// All images, by name; none where [`BUILT`] is false.
pub(crate) fn images() -> &'static [Image] {
    IMAGES
}

static IMAGES: &[Image] = &include!(concat!(env!("OUT_DIR"), "/images.rs"));

#[cfg(kernels)]
#[repr(C, align(64))]
struct Aligned<Bytes: ?Sized>(Bytes);

/// An entry of the table that `build.rs` writes.
#[cfg(kernels)]
macro_rules! image {
    ($name:literal, $path:literal) => {{
        static IMAGE: &Aligned<[u8]> = &Aligned(*include_bytes!($path));
        Image { name: $name, bytes: &IMAGE.0 }
    }};
}
#[cfg(kernels)]
use image;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_build_has_either_all_kernels_or_none() {
        assert_eq!(images().is_empty(), !BUILT);
    }

    #[test]
    fn images_are_fatbins_on_64_byte_boundaries() {
        // The first word of `fatBinaryHeader` in fatbinary_section.h of the toolkit.
        const MAGIC: [u8; 4] = 0xba55_ed50_u32.to_le_bytes();
        for image in images() {
            assert_eq!(image.bytes.as_ptr() as usize % 64, 0, "{}", image.name);
            assert_eq!(image.bytes[..4], MAGIC, "{}", image.name);
        }
    }
}
