//! A GPU: its primary context, its properties and the kernels loaded into it.

use std::ffi::{CStr, c_char, c_int};
use std::ptr;
use std::sync::{Arc, OnceLock};

use cudarc::driver::sys::{self, CUdevice_attribute as Attribute, CUresult};

use super::error::check;
use super::{CudaError, Event, Kernel, Stream, images};

/// The first driver that runs what nvcc 13 makes, as the driver counts: 1000 · major + 10 · minor.
const DRIVER_VERSION: u32 = 13_000;

/// Older GPUs have neither bf16 tensor cores nor asynchronous copies.
const CAPABILITY: (u32, u32) = (8, 0);

/// What a GPU is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Properties {
    /// As its maker calls it.
    pub name: String,
    /// Compute capability: (9, 0) is Hopper.
    pub capability: (u32, u32),
    /// Streaming multiprocessors.
    pub multiprocessors: u32,
    /// Size of the L2 cache: what a benchmark must write between two timings.
    pub l2_bytes: usize,
    /// Most shared memory of a block, when its kernel [asks for it](Kernel::with_shared_memory).
    pub shared_bytes_per_block: u32,
    /// Size of its memory.
    pub total_bytes: usize,
}

/// A GPU with the kernels of this build.
///
/// Its context is the device's primary one, shared with every other library of the process. Every call makes it current
/// on the calling thread, so a device may be used from any of them.
#[derive(Debug)]
pub struct Device {
    ordinal: usize,
    handle: sys::CUdevice,
    context: sys::CUcontext,
    modules: Vec<sys::CUmodule>,
    properties: Properties,
}

// SAFETY: the handles name objects of the driver, which locks them; none is tied to a thread.
unsafe impl Send for Device {}
// SAFETY: as above; nothing in here changes after `open`.
unsafe impl Sync for Device {}

impl Device {
    /// How many devices the driver shows; 0 also where it finds none at all.
    ///
    /// # Errors
    /// [`CudaError::NoDriver`], [`CudaError::DriverTooOld`], or what the driver says when it cannot start.
    pub fn count() -> Result<usize, CudaError> {
        // Every other call into the bindings panics when there is no library.
        static PRESENT: OnceLock<bool> = OnceLock::new();
        // SAFETY: loads the driver library, whose initialisers are the driver's.
        if !PRESENT.get_or_init(|| unsafe { sys::is_culib_present() }) {
            return Err(CudaError::NoDriver);
        }
        // SAFETY: takes no pointers.
        let started = unsafe { sys::cuInit(0) };
        if started == CUresult::CUDA_ERROR_NO_DEVICE {
            return Ok(0);
        }
        check(started, || "starting the CUDA driver".to_owned())?;
        let (mut version, mut count) = (0, 0);
        // SAFETY: writes one int.
        let result = unsafe { sys::cuDriverGetVersion(&mut version) };
        check(result, || "asking for the driver's version".to_owned())?;
        let found = version.unsigned_abs();
        if found < DRIVER_VERSION {
            return Err(CudaError::DriverTooOld { found, wanted: DRIVER_VERSION });
        }
        // SAFETY: writes one int.
        let result = unsafe { sys::cuDeviceGetCount(&mut count) };
        check(result, || "counting devices".to_owned())?;
        Ok(usize::try_from(count).unwrap_or(0))
    }

    /// Opens a device with the kernels of this build.
    ///
    /// # Errors
    /// As [`open_with_images`](Self::open_with_images), and [`CudaError::KernelsNotBuilt`] where there is a driver to
    /// run kernels and this build has none.
    pub fn open(ordinal: usize) -> Result<Arc<Self>, CudaError> {
        Self::count()?;
        if !images::BUILT {
            return Err(CudaError::KernelsNotBuilt);
        }
        Self::open_with(ordinal, images::images().iter().map(|image| (image.name, image.bytes)))
    }

    /// Opens a device and loads `images` into it, each a fat binary or cubin.
    ///
    /// Images without code for this device are passed over. No images at all are fine for memory and streams. Tests on
    /// the emulator pass any bytes: its kernels are found without them.
    ///
    /// # Errors
    /// See [`Device::count`]; [`CudaError::NoSuchDevice`]; [`CudaError::DeviceTooOld`];
    /// [`CudaError::NoKernelsForDevice`] when no image has code for the device.
    pub fn open_with_images(ordinal: usize, images: &[&[u8]]) -> Result<Arc<Self>, CudaError> {
        Self::open_with(ordinal, images.iter().map(|image| ("an image", *image)))
    }

    fn open_with<'a>(
        ordinal: usize,
        images: impl ExactSizeIterator<Item = (&'a str, &'a [u8])>,
    ) -> Result<Arc<Self>, CudaError> {
        let count = Self::count()?;
        if ordinal >= count {
            return Err(CudaError::NoSuchDevice { ordinal, count });
        }
        let mut handle = 0;
        // SAFETY: writes one int. The ordinal is below a count that was an int.
        let result = unsafe { sys::cuDeviceGet(&mut handle, ordinal as c_int) };
        check(result, || format!("opening device {ordinal}"))?;
        let properties = Properties::of(handle)?;
        if properties.capability < CAPABILITY {
            return Err(CudaError::DeviceTooOld { name: properties.name, capability: properties.capability });
        }
        let mut context = ptr::null_mut();
        // SAFETY: writes one handle, given back by `drop`.
        let result = unsafe { sys::cuDevicePrimaryCtxRetain(&mut context, handle) };
        check(result, || format!("making a context on device {ordinal}"))?;
        let mut device = Self { ordinal, handle, context, modules: Vec::new(), properties };
        device.bind()?;
        let without_images = images.len() == 0;
        for (name, image) in images {
            device.load(name, image)?;
        }
        if device.modules.is_empty() && !without_images {
            let Properties { name, capability, .. } = device.properties.clone();
            return Err(CudaError::NoKernelsForDevice { name, capability });
        }
        Ok(Arc::new(device))
    }

    fn load(&mut self, name: &str, image: &[u8]) -> Result<(), CudaError> {
        let mut module = ptr::null_mut();
        // SAFETY: an image says itself how long it is, and is only read during the call.
        let result = unsafe { sys::cuModuleLoadData(&mut module, image.as_ptr().cast()) };
        if result == CUresult::CUDA_ERROR_NO_BINARY_FOR_GPU {
            return Ok(());
        }
        check(result, || format!("loading the kernels of {name} into device {}", self.ordinal))?;
        self.modules.push(module);
        Ok(())
    }

    /// Its place in the driver's list.
    pub fn ordinal(&self) -> usize {
        self.ordinal
    }

    /// What it is.
    pub fn properties(&self) -> &Properties {
        &self.properties
    }

    /// Memory that is free now, in bytes; others may take it.
    pub fn free_bytes(&self) -> Result<usize, CudaError> {
        self.bind()?;
        let (mut free, mut total) = (0, 0);
        // SAFETY: writes two sizes.
        let result = unsafe { sys::cuMemGetInfo_v2(&mut free, &mut total) };
        check(result, || format!("asking for the free memory of device {}", self.ordinal))?;
        Ok(free)
    }

    /// The kernel of this name, which takes one `P` by value.
    ///
    /// Look kernels up once, before any capture: the driver may load their code now.
    ///
    /// # Errors
    /// [`CudaError::UnknownKernel`].
    pub fn kernel<P: bytemuck::Pod>(self: &Arc<Self>, name: &str) -> Result<Kernel<P>, CudaError> {
        Kernel::find(self, name)
    }

    /// A new stream; it does not wait for the default stream, nor that for it.
    pub fn stream(self: &Arc<Self>) -> Result<Stream, CudaError> {
        Stream::new(self)
    }

    /// A new event to order streams by, and to wait for.
    pub fn event(self: &Arc<Self>) -> Result<Event, CudaError> {
        Event::new(self, false)
    }

    /// A new event that notes the time it is reached: see [`Event::elapsed_ms`].
    pub fn timing_event(self: &Arc<Self>) -> Result<Event, CudaError> {
        Event::new(self, true)
    }

    /// Makes this device's context current on this thread.
    pub(super) fn bind(&self) -> Result<(), CudaError> {
        // SAFETY: the context lives as long as `self`.
        let result = unsafe { sys::cuCtxSetCurrent(self.context) };
        check(result, || format!("switching to device {}", self.ordinal))
    }

    pub(super) fn modules(&self) -> &[sys::CUmodule] {
        &self.modules
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        // What fails here has nobody left to hear of it, and the driver remembers none of it.
        if self.bind().is_ok() {
            for &module in &self.modules {
                // SAFETY: loaded by `open`; kernels hold the device, so none of them is left.
                unsafe { sys::cuModuleUnload(module) };
            }
        }
        // SAFETY: retained once by `open`.
        unsafe { sys::cuDevicePrimaryCtxRelease_v2(self.handle) };
    }
}

impl Properties {
    fn of(device: sys::CUdevice) -> Result<Self, CudaError> {
        let attribute = |which: Attribute| {
            let mut value: c_int = 0;
            // SAFETY: writes one int.
            let result = unsafe { sys::cuDeviceGetAttribute(&mut value, which, device) };
            check(result, || format!("asking for {which:?}"))?;
            Ok(value.unsigned_abs())
        };
        let mut name: [c_char; 256] = [0; 256];
        // SAFETY: writes at most the given length, terminated.
        let result = unsafe { sys::cuDeviceGetName(name.as_mut_ptr(), name.len() as c_int, device) };
        check(result, || "asking for a device's name".to_owned())?;
        let mut total_bytes = 0;
        // SAFETY: writes one size.
        let result = unsafe { sys::cuDeviceTotalMem_v2(&mut total_bytes, device) };
        check(result, || "asking for a device's memory".to_owned())?;
        let name = CStr::from_bytes_until_nul(bytemuck::cast_slice(&name)).unwrap_or_default();
        Ok(Self {
            name: name.to_string_lossy().into_owned(),
            capability: (
                attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
                attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
            ),
            multiprocessors: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
            l2_bytes: attribute(Attribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE)? as usize,
            shared_bytes_per_block: attribute(
                Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN,
            )?,
            total_bytes,
        })
    }
}
