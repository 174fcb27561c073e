//! Kernels and their launches.

use std::ffi::{CString, c_int, c_void};
use std::fmt;
use std::marker::PhantomData;
use std::mem::size_of;
use std::ptr;
use std::sync::Arc;

use bytemuck::Pod;
use cudarc::driver::sys::{self, CUresult};

use super::error::{check, code};
use super::{CudaError, Device, Stream};

/// Most bytes of a kernel's parameters.
const PARAMETER_BYTES: usize = 4096;

/// Compute capability that knows programmatic dependent launch; earlier, a grid starts after the one before it anyway.
const OVERLAP_CAPABILITY: (u32, u32) = (9, 0);

/// A kernel that takes one `P` by value. Cheap to clone; keeps its device open.
pub struct Kernel<P> {
    device: Arc<Device>,
    name: Arc<str>,
    handle: sys::CUfunction,
    params: PhantomData<fn(P)>,
}

// SAFETY: the handle names an object of the driver, which is not tied to a thread.
unsafe impl<P> Send for Kernel<P> {}
// SAFETY: as above; launches only read it.
unsafe impl<P> Sync for Kernel<P> {}

impl<P> Clone for Kernel<P> {
    fn clone(&self) -> Self {
        let (device, name) = (Arc::clone(&self.device), Arc::clone(&self.name));
        Self { device, name, handle: self.handle, params: PhantomData }
    }
}

impl<P> fmt::Debug for Kernel<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Kernel({})", self.name)
    }
}

impl<P: Pod> Kernel<P> {
    pub(super) fn find(device: &Arc<Device>, name: &str) -> Result<Self, CudaError> {
        let unknown = || CudaError::UnknownKernel { name: name.to_owned() };
        let symbol = CString::new(name).map_err(|_| unknown())?;
        device.bind()?;
        for &module in device.modules() {
            let mut handle = ptr::null_mut();
            // SAFETY: writes one handle; the module is alive and the name is terminated.
            let result = unsafe { sys::cuModuleGetFunction(&mut handle, module, symbol.as_ptr()) };
            if result != CUresult::CUDA_ERROR_NOT_FOUND {
                check(result, || format!("looking for kernel {name}"))?;
                let device = Arc::clone(device);
                return Ok(Self { device, name: name.into(), handle, params: PhantomData });
            }
        }
        Err(unknown())
    }

    /// Lets its blocks have up to `bytes` bytes of dynamic shared memory; without this it is 48 KiB.
    ///
    /// # Errors
    /// [`CudaError::Driver`] when that is more than a block of this device can have.
    pub fn with_shared_memory(self, bytes: u32) -> Result<Self, CudaError> {
        use sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES as SHARED_BYTES;
        self.device.bind()?;
        // SAFETY: the handle is alive.
        let result = unsafe {
            sys::cuFuncSetAttribute(self.handle, SHARED_BYTES, c_int::try_from(bytes).unwrap_or(c_int::MAX))
        };
        check(result, || {
            let most = self.device.properties().shared_bytes_per_block;
            format!("allowing {} {bytes} bytes of shared memory, of {most}", self.name)
        })?;
        Ok(self)
    }

    /// The name it was found by.
    pub fn name(&self) -> &str {
        &self.name
    }
}

/// The shape of a launch. `Launch { shared_bytes: 4096, ..Launch::new([64, 1, 1], 128) }`
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Launch {
    /// Blocks in x, y and z.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub block: u32,
    /// Dynamic shared memory of a block; over 48 KiB the kernel must have been [allowed to](Kernel::with_shared_memory).
    pub shared_bytes: u32,
    /// Blocks of a cluster, for kernels that do not fix it themselves; needs compute capability 9.0.
    pub cluster: Option<[u32; 3]>,
    /// Programmatic dependent launch: blocks may start before the previous kernel of the stream has ended. The kernel
    /// itself waits before it touches anything of that one's.
    pub overlap_previous: bool,
}

impl Launch {
    /// Blocks without dynamic shared memory and clusters, after the previous kernel has ended.
    pub fn new(grid: [u32; 3], block: u32) -> Self {
        Self { grid, block, shared_bytes: 0, cluster: None, overlap_previous: false }
    }
}

impl Stream {
    /// Queues a launch of `kernel`. Allocates nothing.
    ///
    /// # Errors
    /// [`CudaError::Launch`], with the kernel's name and the shape. Faults of the kernel surface later: from
    /// [`synchronize`](Self::synchronize) at the latest.
    ///
    /// # Safety
    /// The kernel takes one `P`, and every address in `params` is one it may use as it does under this shape. What is at
    /// those addresses lives until the stream has passed the launch, and every replay of a graph that captured it.
    pub unsafe fn launch<P: Pod>(
        &self,
        kernel: &Kernel<P>,
        launch: &Launch,
        params: &P,
    ) -> Result<(), CudaError> {
        const { assert!(size_of::<P>() <= PARAMETER_BYTES, "too many parameters for a kernel") };
        use sys::{CUlaunchAttributeID as Id, CUlaunchAttributeValue as Value};
        self.device().bind()?;

        let attribute = |id, value| sys::CUlaunchAttribute { id, pad: [0; 4], value };
        let none = attribute(Id::CU_LAUNCH_ATTRIBUTE_IGNORE, Value { pad: [0; 64] });
        let mut attributes = [none; 2];
        let mut count = 0;
        if let Some([x, y, z]) = launch.cluster {
            let cluster = Value { clusterDim: sys::CUlaunchAttributeValue_union__bindgen_ty_1 { x, y, z } };
            attributes[count] = attribute(Id::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION, cluster);
            count += 1;
        }
        if launch.overlap_previous && self.device().properties().capability >= OVERLAP_CAPABILITY {
            let overlap = Value { programmaticStreamSerializationAllowed: 1 };
            attributes[count] = attribute(Id::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION, overlap);
            count += 1;
        }
        let [grid_x, grid_y, grid_z] = launch.grid;
        let config = sys::CUlaunchConfig {
            gridDimX: grid_x,
            gridDimY: grid_y,
            gridDimZ: grid_z,
            blockDimX: launch.block,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: launch.shared_bytes,
            hStream: self.handle(),
            attrs: attributes.as_mut_ptr(),
            numAttrs: count as u32,
        };
        let mut arguments = [ptr::from_ref(params).cast_mut().cast::<c_void>()];
        // SAFETY: the driver copies the parameters during the call; what they point at is the caller's promise.
        let result =
            unsafe { sys::cuLaunchKernelEx(&config, kernel.handle, arguments.as_mut_ptr(), ptr::null_mut()) };
        if let Some(code) = code(result) {
            return Err(CudaError::Launch {
                kernel: kernel.name.to_string(),
                grid: launch.grid,
                block: launch.block,
                shared_bytes: launch.shared_bytes,
                code,
            });
        }
        self.launched(&kernel.name);
        Ok(())
    }
}
