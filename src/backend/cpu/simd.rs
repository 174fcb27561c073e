//! Vectors of f32 lanes: AVX-512, AVX2 and a portable array, behind one trait.
//!
//! Kernels are written once, generic over [`Simd`], and instantiated per instruction set by `multiversion`, which
//! picks one at run time. Stored bf16 and f16 are widened in registers (exactly).
//!
//! Whatever calls an intrinsic must be inlined into the function that has the instruction set. So generic kernels are
//! `#[inline(always)]` and compute in no closure: one that passes through a function of the standard library would be
//! compiled without the set, and every intrinsic in it would be a call.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

/// The instruction set a backend runs on. Results are equal bit for bit on one instruction set, not across them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Isa {
    Avx512,
    Avx2,
    Portable,
}

impl Isa {
    /// The sets this processor has, best first.
    pub fn available() -> Vec<Isa> {
        let mut sets = Vec::new();
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 = is_x86_feature_detected!("avx2")
                && is_x86_feature_detected!("fma")
                && is_x86_feature_detected!("f16c");
            if avx2
                && is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512vl")
                && is_x86_feature_detected!("avx512dq")
            {
                sets.push(Isa::Avx512);
            }
            if avx2 {
                sets.push(Isa::Avx2);
            }
        }
        sets.push(Isa::Portable);
        sets
    }

    pub fn name(self) -> &'static str {
        match self {
            Isa::Avx512 => "avx512",
            Isa::Avx2 => "avx2+fma",
            Isa::Portable => "portable",
        }
    }
}

/// A vector of [`Simd::LANES`] f32.
///
/// # Safety
/// Every function needs the instruction set to be present; loads and stores need their pointers to cover what they
/// touch. Nothing needs alignment.
#[expect(clippy::missing_safety_doc, reason = "said above, once for all functions")]
pub trait Simd: Copy {
    type V: Copy;
    const ISA: Isa;
    const LANES: usize;
    /// Rows of the register tile of a matrix product (its columns are [`super::gemm::TILE_COLUMNS`]).
    const TILE_ROWS: usize;

    unsafe fn zero() -> Self::V;
    unsafe fn splat(value: f32) -> Self::V;
    unsafe fn load(from: *const f32) -> Self::V;
    unsafe fn load_bf16(from: *const u16) -> Self::V;
    unsafe fn load_f16(from: *const u16) -> Self::V;
    unsafe fn store(to: *mut f32, v: Self::V);
    /// `a · b + c`
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V;
    /// The sum of all lanes, in one fixed tree.
    unsafe fn sum(v: Self::V) -> f32;
    /// Exchanges lanes and vectors of the first `LANES` vectors.
    unsafe fn transpose(v: &mut [Self::V; 16]);

    /// The first `count < LANES` elements, zero behind them.
    #[inline(always)]
    unsafe fn load_partial(from: *const f32, count: usize) -> Self::V {
        let mut padded = [0f32; 16];
        // SAFETY: `count` elements are readable and fewer than the lanes of any set.
        unsafe {
            std::ptr::copy_nonoverlapping(from.cast::<u8>(), padded.as_mut_ptr().cast::<u8>(), count * 4);
            Self::load(padded.as_ptr())
        }
    }

    /// Stores the first `count < LANES` lanes.
    #[inline(always)]
    unsafe fn store_partial(to: *mut f32, v: Self::V, count: usize) {
        let mut padded = [0f32; 16];
        // SAFETY: `count` elements are writable and fewer than the lanes of any set.
        unsafe {
            Self::store(padded.as_mut_ptr(), v);
            std::ptr::copy_nonoverlapping(padded.as_ptr().cast::<u8>(), to.cast::<u8>(), count * 4);
        }
    }
}

/// How one stored element type is loaded into a vector.
///
/// # Safety
/// As for [`Simd`].
#[expect(clippy::missing_safety_doc, reason = "said above, once for all functions")]
pub trait Element {
    const SIZE: usize;
    /// What a product with few rows reads: the type itself, or f32 where widening in the inner loop is not worth its
    /// code.
    type Direct: Element;
    unsafe fn load<S: Simd>(from: *const u8) -> S::V;

    #[inline(always)]
    unsafe fn load_partial<S: Simd>(from: *const u8, count: usize) -> S::V {
        let mut padded = [0u8; 64];
        // SAFETY: `count` elements are readable and fewer than the lanes of any set.
        unsafe {
            std::ptr::copy_nonoverlapping(from, padded.as_mut_ptr(), count * Self::SIZE);
            Self::load::<S>(padded.as_ptr())
        }
    }
}

pub struct F32;
pub struct BF16;
pub struct F16;

impl Element for F32 {
    const SIZE: usize = 4;
    type Direct = F32;
    #[inline(always)]
    unsafe fn load<S: Simd>(from: *const u8) -> S::V {
        // SAFETY: passed on to the caller.
        unsafe { S::load(from.cast()) }
    }
    #[inline(always)]
    unsafe fn load_partial<S: Simd>(from: *const u8, count: usize) -> S::V {
        // SAFETY: passed on to the caller.
        unsafe { S::load_partial(from.cast(), count) }
    }
}

impl Element for BF16 {
    const SIZE: usize = 2;
    type Direct = BF16;
    #[inline(always)]
    unsafe fn load<S: Simd>(from: *const u8) -> S::V {
        // SAFETY: passed on to the caller.
        unsafe { S::load_bf16(from.cast()) }
    }
}

impl Element for F16 {
    const SIZE: usize = 2;
    type Direct = F32;
    #[inline(always)]
    unsafe fn load<S: Simd>(from: *const u8) -> S::V {
        // SAFETY: passed on to the caller.
        unsafe { S::load_f16(from.cast()) }
    }
}

#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
pub struct Avx512;

// SAFETY (every block): the trait's contract.
#[cfg(target_arch = "x86_64")]
impl Simd for Avx512 {
    type V = __m512;
    const ISA: Isa = Isa::Avx512;
    const LANES: usize = 16;
    const TILE_ROWS: usize = 4;

    #[inline(always)]
    unsafe fn zero() -> __m512 {
        unsafe { _mm512_setzero_ps() }
    }
    #[inline(always)]
    unsafe fn splat(value: f32) -> __m512 {
        unsafe { _mm512_set1_ps(value) }
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> __m512 {
        unsafe { _mm512_loadu_ps(from) }
    }
    #[inline(always)]
    unsafe fn load_bf16(from: *const u16) -> __m512 {
        unsafe {
            let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide))
        }
    }
    #[inline(always)]
    unsafe fn load_f16(from: *const u16) -> __m512 {
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(from.cast())) }
    }
    #[inline(always)]
    unsafe fn store(to: *mut f32, v: __m512) {
        unsafe { _mm512_storeu_ps(to, v) }
    }
    #[inline(always)]
    unsafe fn fma(a: __m512, b: __m512, c: __m512) -> __m512 {
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    unsafe fn add(a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_add_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn mul(a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_mul_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn sum(v: __m512) -> f32 {
        unsafe {
            let upper = _mm512_extractf32x8_ps::<1>(v);
            Avx2::sum(_mm256_add_ps(_mm512_castps512_ps256(v), upper))
        }
    }
    #[inline(always)]
    unsafe fn transpose(v: &mut [__m512; 16]) {
        unsafe {
            // Within each quarter of 4 lanes: 4 vectors against 4 lanes.
            let mut quarters = [_mm512_setzero_ps(); 16];
            for i in (0..16).step_by(4) {
                let [a, b, c, d] = [v[i], v[i + 1], v[i + 2], v[i + 3]];
                let pairs = [
                    _mm512_unpacklo_ps(a, b),
                    _mm512_unpacklo_ps(c, d),
                    _mm512_unpackhi_ps(a, b),
                    _mm512_unpackhi_ps(c, d),
                ]
                .map(|pair| _mm512_castps_pd(pair));
                quarters[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(pairs[0], pairs[1]));
                quarters[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(pairs[0], pairs[1]));
                quarters[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(pairs[2], pairs[3]));
                quarters[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(pairs[2], pairs[3]));
            }
            // Then the quarters: 0 and 2, or 1 and 3, of two vectors, and the same of what that gives.
            for j in 0..4 {
                let [a, b, c, d] = [quarters[j], quarters[4 + j], quarters[8 + j], quarters[12 + j]];
                let (even, odd) = (_mm512_shuffle_f32x4::<0x88>(a, b), _mm512_shuffle_f32x4::<0xdd>(a, b));
                let (even_2, odd_2) =
                    (_mm512_shuffle_f32x4::<0x88>(c, d), _mm512_shuffle_f32x4::<0xdd>(c, d));
                v[j] = _mm512_shuffle_f32x4::<0x88>(even, even_2);
                v[4 + j] = _mm512_shuffle_f32x4::<0x88>(odd, odd_2);
                v[8 + j] = _mm512_shuffle_f32x4::<0xdd>(even, even_2);
                v[12 + j] = _mm512_shuffle_f32x4::<0xdd>(odd, odd_2);
            }
        }
    }
    #[inline(always)]
    unsafe fn load_partial(from: *const f32, count: usize) -> __m512 {
        unsafe { _mm512_maskz_loadu_ps((1 << count) - 1, from) }
    }
    #[inline(always)]
    unsafe fn store_partial(to: *mut f32, v: __m512, count: usize) {
        unsafe { _mm512_mask_storeu_ps(to, (1 << count) - 1, v) }
    }
}

#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
pub struct Avx2;

// SAFETY (every block): the trait's contract.
#[cfg(target_arch = "x86_64")]
impl Simd for Avx2 {
    type V = __m256;
    const ISA: Isa = Isa::Avx2;
    const LANES: usize = 8;
    const TILE_ROWS: usize = 2;

    #[inline(always)]
    unsafe fn zero() -> __m256 {
        unsafe { _mm256_setzero_ps() }
    }
    #[inline(always)]
    unsafe fn splat(value: f32) -> __m256 {
        unsafe { _mm256_set1_ps(value) }
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> __m256 {
        unsafe { _mm256_loadu_ps(from) }
    }
    #[inline(always)]
    unsafe fn load_bf16(from: *const u16) -> __m256 {
        unsafe {
            let wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast()));
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide))
        }
    }
    #[inline(always)]
    unsafe fn load_f16(from: *const u16) -> __m256 {
        unsafe { _mm256_cvtph_ps(_mm_loadu_si128(from.cast())) }
    }
    #[inline(always)]
    unsafe fn store(to: *mut f32, v: __m256) {
        unsafe { _mm256_storeu_ps(to, v) }
    }
    #[inline(always)]
    unsafe fn fma(a: __m256, b: __m256, c: __m256) -> __m256 {
        unsafe { _mm256_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    unsafe fn add(a: __m256, b: __m256) -> __m256 {
        unsafe { _mm256_add_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn mul(a: __m256, b: __m256) -> __m256 {
        unsafe { _mm256_mul_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn sum(v: __m256) -> f32 {
        unsafe {
            let four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
        }
    }
    #[inline(always)]
    unsafe fn transpose(v: &mut [__m256; 16]) {
        unsafe {
            let mut halves = [_mm256_setzero_ps(); 8];
            for i in [0, 4] {
                let [a, b, c, d] = [v[i], v[i + 1], v[i + 2], v[i + 3]];
                let (low, low_2) = (_mm256_unpacklo_ps(a, b), _mm256_unpacklo_ps(c, d));
                let (high, high_2) = (_mm256_unpackhi_ps(a, b), _mm256_unpackhi_ps(c, d));
                halves[i] = _mm256_shuffle_ps::<0x44>(low, low_2);
                halves[i + 1] = _mm256_shuffle_ps::<0xee>(low, low_2);
                halves[i + 2] = _mm256_shuffle_ps::<0x44>(high, high_2);
                halves[i + 3] = _mm256_shuffle_ps::<0xee>(high, high_2);
            }
            for j in 0..4 {
                v[j] = _mm256_permute2f128_ps::<0x20>(halves[j], halves[4 + j]);
                v[4 + j] = _mm256_permute2f128_ps::<0x31>(halves[j], halves[4 + j]);
            }
        }
    }
    #[inline(always)]
    unsafe fn load_partial(from: *const f32, count: usize) -> __m256 {
        unsafe { _mm256_maskload_ps(from, first_lanes(count)) }
    }
    #[inline(always)]
    unsafe fn store_partial(to: *mut f32, v: __m256, count: usize) {
        unsafe { _mm256_maskstore_ps(to, first_lanes(count), v) }
    }
}

/// A mask of the first `count` of eight lanes.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
unsafe fn first_lanes(count: usize) -> __m256i {
    // SAFETY: passed on to the caller.
    unsafe {
        let lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
        _mm256_cmpgt_epi32(_mm256_set1_epi32(count as i32), lanes)
    }
}

#[derive(Clone, Copy)]
pub struct Portable;

// SAFETY (every block): the trait's contract; reads and writes go through unaligned accesses.
impl Simd for Portable {
    type V = [f32; 8];
    const ISA: Isa = Isa::Portable;
    const LANES: usize = 8;
    const TILE_ROWS: usize = 1;

    #[inline(always)]
    unsafe fn zero() -> [f32; 8] {
        [0.0; 8]
    }
    #[inline(always)]
    unsafe fn splat(value: f32) -> [f32; 8] {
        [value; 8]
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> [f32; 8] {
        unsafe { from.cast::<[f32; 8]>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn load_bf16(from: *const u16) -> [f32; 8] {
        unsafe { from.cast::<[u16; 8]>().read_unaligned().map(|bits| f32::from_bits(u32::from(bits) << 16)) }
    }
    #[inline(always)]
    unsafe fn load_f16(from: *const u16) -> [f32; 8] {
        unsafe { from.cast::<[u16; 8]>().read_unaligned().map(|bits| half::f16::from_bits(bits).to_f32()) }
    }
    #[inline(always)]
    unsafe fn store(to: *mut f32, v: [f32; 8]) {
        unsafe { to.cast::<[f32; 8]>().write_unaligned(v) }
    }
    #[inline(always)]
    unsafe fn fma(a: [f32; 8], b: [f32; 8], c: [f32; 8]) -> [f32; 8] {
        // Two roundings: a fused multiply-add without the instruction is a library call per lane.
        std::array::from_fn(|i| a[i] * b[i] + c[i])
    }
    #[inline(always)]
    unsafe fn add(a: [f32; 8], b: [f32; 8]) -> [f32; 8] {
        std::array::from_fn(|i| a[i] + b[i])
    }
    #[inline(always)]
    unsafe fn mul(a: [f32; 8], b: [f32; 8]) -> [f32; 8] {
        std::array::from_fn(|i| a[i] * b[i])
    }
    #[inline(always)]
    unsafe fn sum(v: [f32; 8]) -> f32 {
        ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]))
    }
    #[inline(always)]
    unsafe fn transpose(v: &mut [[f32; 8]; 16]) {
        let rows = *v;
        for (i, vector) in v.iter_mut().enumerate().take(8) {
            *vector = std::array::from_fn(|j| rows[j][i]);
        }
    }
}

/// Defines `fn $name(isa, …)` that runs the generic `$body::<S>` compiled for the instruction set `isa`; with `=>` a body
/// of plain loops, which the compiler turns into vectors of that set.
///
/// The function is unsafe: it passes on the contract of `$body`, and `isa` must be one of [`Isa::available`].
macro_rules! multiversion {
    ($(#[$doc:meta])* $visibility:vis fn $name:ident($($argument:ident: $type:ty),* $(,)?) = $body:ident) => {
        $crate::backend::cpu::simd::multiversion! {
            @define [$(#[$doc])* $visibility] $name [$($argument: $type),*]
                [$body::<$crate::backend::cpu::simd::Avx512>]
                [$body::<$crate::backend::cpu::simd::Avx2>]
                [$body::<$crate::backend::cpu::simd::Portable>]
        }
    };
    ($(#[$doc:meta])* $visibility:vis fn $name:ident($($argument:ident: $type:ty),* $(,)?) => $body:ident) => {
        $crate::backend::cpu::simd::multiversion! {
            @define [$(#[$doc])* $visibility] $name [$($argument: $type),*] [$body] [$body] [$body]
        }
    };
    (@define [$($head:tt)*] $name:ident [$($argument:ident: $type:ty),*]
        [$($avx512:tt)*] [$($avx2:tt)*] [$($portable:tt)*]) => {
        #[allow(clippy::too_many_arguments)]
        $($head)* unsafe fn $name(isa: $crate::backend::cpu::simd::Isa, $($argument: $type),*) {
            use $crate::backend::cpu::simd::Isa;
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")]
                #[allow(clippy::too_many_arguments, unused_unsafe)]
                unsafe fn avx512($($argument: $type),*) {
                    // SAFETY: passed on.
                    unsafe { $($avx512)*($($argument),*) }
                }
                #[target_feature(enable = "avx2,fma,f16c")]
                #[allow(clippy::too_many_arguments, unused_unsafe)]
                unsafe fn avx2($($argument: $type),*) {
                    // SAFETY: passed on.
                    unsafe { $($avx2)*($($argument),*) }
                }
                // SAFETY: `isa` was detected; the rest is passed on.
                match isa {
                    Isa::Avx512 => return unsafe { avx512($($argument),*) },
                    Isa::Avx2 => return unsafe { avx2($($argument),*) },
                    Isa::Portable => {}
                }
            }
            let _ = isa;
            // SAFETY: passed on.
            #[allow(unused_unsafe)]
            unsafe {
                $($portable)*($($argument),*)
            }
        }
    };
}

pub(crate) use multiversion;
