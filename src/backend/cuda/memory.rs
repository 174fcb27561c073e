//! Memory: on the device, in one piece or carved from an arena, and page-locked on the host.

use std::fmt;
use std::marker::PhantomData;
use std::mem::{align_of, size_of};
use std::ops::{Bound, Deref, DerefMut, RangeBounds};
use std::ptr::{self, NonNull};
use std::slice;
use std::sync::Arc;

use bytemuck::Pod;
use cudarc::driver::sys::{self, CUresult};

use super::error::check;
use super::{CudaError, Device};

/// Alignment of what an [`Arena`] hands out: as `cuMemAlloc` aligns, and what tensor maps and wide loads want.
const ALIGNMENT: usize = 256;

/// A piece of device memory, freed with its last owner.
struct Allocation {
    device: Arc<Device>,
    address: u64,
}

impl Allocation {
    fn new(device: &Arc<Device>, bytes: usize, purpose: &str) -> Result<Arc<Self>, CudaError> {
        device.bind()?;
        let mut address = 0;
        let result = if bytes > device.properties().total_bytes {
            CUresult::CUDA_ERROR_OUT_OF_MEMORY
        } else {
            // SAFETY: writes one address. The driver refuses to allocate nothing, but empty buffers are buffers.
            unsafe { sys::cuMemAlloc_v2(&mut address, bytes.max(1)) }
        };
        if result == CUresult::CUDA_ERROR_OUT_OF_MEMORY {
            let available = device.free_bytes()?;
            return Err(CudaError::OutOfMemory { wanted: bytes, available, purpose: purpose.to_owned() });
        }
        check(result, || format!("allocating {bytes} bytes for {purpose}"))?;
        Ok(Arc::new(Self { device: Arc::clone(device), address }))
    }
}

impl Drop for Allocation {
    fn drop(&mut self) {
        if self.device.bind().is_ok() {
            // SAFETY: allocated by `new`, and nobody else holds it.
            unsafe { sys::cuMemFree_v2(self.address) };
        }
    }
}

/// `len` elements in device memory, not initialised. A clone is the same memory, which is freed with the last: not while
/// work that uses it is queued, and not within a capture.
#[derive(Clone)]
pub struct DeviceBuffer<T> {
    allocation: Arc<Allocation>,
    address: u64,
    len: usize,
    element: PhantomData<T>,
}

impl<T: Pod> DeviceBuffer<T> {
    /// An allocation of its own.
    ///
    /// # Errors
    /// [`CudaError::OutOfMemory`], which says what for.
    pub fn new(device: &Arc<Device>, len: usize, purpose: &str) -> Result<Self, CudaError> {
        let allocation = Allocation::new(device, len.saturating_mul(size_of::<T>()), purpose)?;
        Ok(Self { address: allocation.address, allocation, len, element: PhantomData })
    }

    /// Where it starts: what goes into parameter structs.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has no elements.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The device it is on.
    pub fn device(&self) -> &Arc<Device> {
        &self.allocation.device
    }

    /// A part of it.
    ///
    /// # Panics
    /// When the range is not within the buffer.
    pub fn slice(&self, range: impl RangeBounds<usize>) -> DeviceSlice<'_, T> {
        DeviceSlice::from(self).slice(range)
    }
}

impl<T> fmt::Debug for DeviceBuffer<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DeviceBuffer({} x {} at {:#x})", self.len, std::any::type_name::<T>(), self.address)
    }
}

/// Part of a [`DeviceBuffer`].
pub struct DeviceSlice<'a, T> {
    address: u64,
    len: usize,
    buffer: PhantomData<&'a DeviceBuffer<T>>,
}

impl<T> Clone for DeviceSlice<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for DeviceSlice<'_, T> {}

impl<'a, T: Pod> DeviceSlice<'a, T> {
    /// Where it starts.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has no elements.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub(super) fn bytes(&self) -> usize {
        self.len * size_of::<T>()
    }

    /// A part of it.
    ///
    /// # Panics
    /// When the range is not within the slice.
    pub fn slice(&self, range: impl RangeBounds<usize>) -> DeviceSlice<'a, T> {
        let start = match range.start_bound() {
            Bound::Included(&start) => start,
            Bound::Excluded(&before) => before + 1,
            Bound::Unbounded => 0,
        };
        let end = match range.end_bound() {
            Bound::Included(&last) => last + 1,
            Bound::Excluded(&end) => end,
            Bound::Unbounded => self.len,
        };
        assert!(start <= end && end <= self.len, "{start}..{end} of a device slice of {}", self.len);
        let address = self.address + (start * size_of::<T>()) as u64;
        DeviceSlice { address, len: end - start, buffer: PhantomData }
    }
}

impl<'a, T: Pod> From<&'a DeviceBuffer<T>> for DeviceSlice<'a, T> {
    fn from(buffer: &'a DeviceBuffer<T>) -> Self {
        Self { address: buffer.address, len: buffer.len, buffer: PhantomData }
    }
}

/// One reservation of device memory that is handed out from front to back, so that a running engine allocates nothing.
///
/// The reservation lives until the arena and all its buffers are gone; nothing is handed out twice.
pub struct Arena {
    allocation: Arc<Allocation>,
    bytes: usize,
    used: usize,
}

impl Arena {
    /// Reserves `bytes` bytes.
    ///
    /// # Errors
    /// [`CudaError::OutOfMemory`].
    pub fn new(device: &Arc<Device>, bytes: usize, purpose: &str) -> Result<Self, CudaError> {
        Ok(Self { allocation: Allocation::new(device, bytes, purpose)?, bytes, used: 0 })
    }

    /// The next `len` elements, aligned to 256 bytes.
    ///
    /// # Errors
    /// [`CudaError::OutOfMemory`], with what is left and what it was wanted for.
    pub fn take<T: Pod>(&mut self, len: usize, purpose: &str) -> Result<DeviceBuffer<T>, CudaError> {
        const { assert!(align_of::<T>() <= ALIGNMENT) };
        let (wanted, available) = (len.saturating_mul(size_of::<T>()), self.available());
        if wanted > available {
            return Err(CudaError::OutOfMemory { wanted, available, purpose: purpose.to_owned() });
        }
        let address = self.allocation.address + (self.bytes - available) as u64;
        self.used = self.bytes - available + wanted;
        Ok(DeviceBuffer { allocation: Arc::clone(&self.allocation), address, len, element: PhantomData })
    }

    /// Bytes that the next buffer may have.
    pub fn available(&self) -> usize {
        self.bytes.saturating_sub(self.used.next_multiple_of(ALIGNMENT))
    }
}

impl fmt::Debug for Arena {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Arena({} of {} bytes used at {:#x})", self.used, self.bytes, self.allocation.address)
    }
}

/// Page-locked host memory, zeros at first: the only host memory that copies do not wait for.
///
/// It is cached as other memory is, so the host may read it at full speed.
pub struct Pinned<T> {
    device: Arc<Device>,
    start: NonNull<T>,
    len: usize,
}

// SAFETY: owns its memory, as a Vec does; page-locked memory is not tied to a thread.
unsafe impl<T: Send> Send for Pinned<T> {}
// SAFETY: as above.
unsafe impl<T: Sync> Sync for Pinned<T> {}

impl<T: Pod> Pinned<T> {
    /// `len` zeros.
    ///
    /// # Errors
    /// [`CudaError::Driver`], which says what for: page-locked memory is short long before memory is.
    pub fn new(device: &Arc<Device>, len: usize, purpose: &str) -> Result<Self, CudaError> {
        // Pages are what is locked, and their alignment is what one gets.
        const { assert!(align_of::<T>() <= 4096) };
        device.bind()?;
        let bytes = len.saturating_mul(size_of::<T>());
        let mut start = ptr::null_mut();
        // SAFETY: writes one pointer. No flags: write-combined memory would be slow to read.
        let result = unsafe { sys::cuMemHostAlloc(&mut start, bytes.max(1), 0) };
        check(result, || format!("page-locking {bytes} bytes for {purpose}"))?;
        // SAFETY: a call that succeeded has allocated that many bytes.
        let start = unsafe {
            ptr::write_bytes(start.cast::<u8>(), 0, bytes);
            NonNull::new_unchecked(start.cast())
        };
        Ok(Self { device: Arc::clone(device), start, len })
    }
}

impl<T> Deref for Pinned<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // SAFETY: `len` elements, written by `new`, of a type any bytes are a value of; freed by `drop` only.
        unsafe { slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

impl<T> DerefMut for Pinned<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as above, and borrowed mutably.
        unsafe { slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}

impl<T> Drop for Pinned<T> {
    fn drop(&mut self) {
        if self.device.bind().is_ok() {
            // SAFETY: allocated by `new`, and nobody else holds it.
            unsafe { sys::cuMemFreeHost(self.start.as_ptr().cast()) };
        }
    }
}

impl<T> fmt::Debug for Pinned<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Pinned({} x {})", self.len, std::any::type_name::<T>())
    }
}
