// Device memory, pinned host memory, copies and fills.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <set>

#include "driver/state.h"
#include "driver/streams.h"
#include "runtime/device_memory.h"

using namespace emulator;

namespace {

std::set<void*> pinned;

void* pointer(CUdeviceptr address) { return reinterpret_cast<void*>(address); }

void count_allocation() {
  ++state().counters.allocations;
  ++Counters::allocations_of_thread;
}

CUresult allocate(CUdeviceptr* address, size_t bytes) {
  if (address == nullptr || bytes == 0) return CUDA_ERROR_INVALID_VALUE;
  count_allocation();
  void* start = device_memory.allocate(bytes);
  *address = reinterpret_cast<CUdeviceptr>(start);
  return start == nullptr ? CUDA_ERROR_OUT_OF_MEMORY : CUDA_SUCCESS;
}

CUresult release(CUdeviceptr address) {
  return address == 0 || device_memory.free(pointer(address)) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

enum class Direction { to_device, to_host, on_device };

// A copy, which checks its device ranges when it runs.
Command copy(void* to, const void* from, size_t bytes, Direction direction) {
  return {CU_GRAPH_NODE_TYPE_MEMCPY, [=] {
            if (bytes == 0) return CUDA_SUCCESS;
            if (direction != Direction::to_host && !device_memory.holds(to, bytes)) return CUDA_ERROR_INVALID_VALUE;
            if (direction != Direction::to_device && !device_memory.holds(from, bytes)) return CUDA_ERROR_INVALID_VALUE;
            memmove(to, from, bytes);
            return CUDA_SUCCESS;
          }};
}

template <class T>
Command fill(CUdeviceptr address, T value, size_t count) {
  return {CU_GRAPH_NODE_TYPE_MEMSET, [=] {
            if (count == 0) return CUDA_SUCCESS;
            if (address % sizeof(T) != 0 || !device_memory.holds(pointer(address), count * sizeof(T))) {
              return CUDA_ERROR_INVALID_VALUE;
            }
            T* elements = static_cast<T*>(pointer(address));
            for (size_t i = 0; i < count; ++i) elements[i] = value;
            return CUDA_SUCCESS;
          }};
}

// A call that returns when its work is done: it waits for the device, which a capture forbids.
CUresult run_now(const Command& command) {
  return with_context([&] {
    if (const CUresult refused = refuse_during_capture(); refused != CUDA_SUCCESS) return refused;
    count_synchronization();
    return command.run();
  });
}

CUresult issue_to(CUstream stream, Command command) {
  return with_context([&] { return issue(stream, std::move(command)); });
}

}  // namespace

// ---- device memory ----

DRIVER_API cuMemAlloc_v2(CUdeviceptr* address, size_t bytes) {
  return with_context([&] {
    if (const CUresult refused = refuse_during_capture(); refused != CUDA_SUCCESS) return refused;
    return allocate(address, bytes);
  });
}

DRIVER_API cuMemFree_v2(CUdeviceptr address) {
  return with_context([&] {
    if (const CUresult refused = refuse_during_capture(); refused != CUDA_SUCCESS) return refused;
    return release(address);
  });
}

// In a capture these would become nodes that own memory: graphs of the stand-in have none.
DRIVER_API cuMemAllocAsync(CUdeviceptr* address, size_t bytes, CUstream handle) {
  return with_context([&] {
    Stream* stream = find_stream(handle);
    if (stream == nullptr) return CUDA_ERROR_INVALID_HANDLE;
    return stream->capture != nullptr ? CUDA_ERROR_NOT_SUPPORTED : allocate(address, bytes);
  });
}

DRIVER_API cuMemAllocFromPoolAsync(CUdeviceptr* address, size_t bytes, CUmemoryPool, CUstream handle) {
  return cuMemAllocAsync(address, bytes, handle);
}

DRIVER_API cuMemFreeAsync(CUdeviceptr address, CUstream handle) {
  return with_context([&] {
    Stream* stream = find_stream(handle);
    if (stream == nullptr) return CUDA_ERROR_INVALID_HANDLE;
    return stream->capture != nullptr ? CUDA_ERROR_NOT_SUPPORTED : release(address);
  });
}

DRIVER_API cuMemGetInfo_v2(size_t* free, size_t* total) {
  return with_context([&] {
    *total = device_memory.total();
    *free = *total - std::min(*total, device_memory.used());
    return CUDA_SUCCESS;
  });
}

DRIVER_API cuMemGetAddressRange_v2(CUdeviceptr* start, size_t* bytes, CUdeviceptr address) {
  return with_context([&] {
    const Allocation* allocation = device_memory.find(pointer(address));
    if (allocation == nullptr) return CUDA_ERROR_NOT_FOUND;
    if (start != nullptr) *start = reinterpret_cast<CUdeviceptr>(allocation->range.start);
    if (bytes != nullptr) *bytes = allocation->range.bytes;
    return CUDA_SUCCESS;
  });
}

// ---- pinned host memory ----

DRIVER_API cuMemHostAlloc(void** address, size_t bytes, unsigned) {
  return with_context([&] {
    if (address == nullptr || bytes == 0) return CUDA_ERROR_INVALID_VALUE;
    if (const CUresult refused = refuse_during_capture(); refused != CUDA_SUCCESS) return refused;
    count_allocation();
    *address = aligned_alloc(page_bytes(), round_up(bytes, page_bytes()));
    if (*address == nullptr) return CUDA_ERROR_OUT_OF_MEMORY;
    pinned.insert(*address);
    return CUDA_SUCCESS;
  });
}

DRIVER_API cuMemAllocHost_v2(void** address, size_t bytes) { return cuMemHostAlloc(address, bytes, 0); }

DRIVER_API cuMemFreeHost(void* address) {
  return with_context([&] {
    if (pinned.erase(address) == 0) return CUDA_ERROR_INVALID_VALUE;
    free(address);
    return CUDA_SUCCESS;
  });
}

DRIVER_API cuMemHostGetDevicePointer_v2(CUdeviceptr* address, void* host, unsigned) {
  return with_context([&] {
    *address = reinterpret_cast<CUdeviceptr>(host);
    return CUDA_SUCCESS;
  });
}

// ---- copies ----

DRIVER_API cuMemcpyHtoD_v2(CUdeviceptr to, const void* from, size_t bytes) {
  return run_now(copy(pointer(to), from, bytes, Direction::to_device));
}

DRIVER_API cuMemcpyDtoH_v2(void* to, CUdeviceptr from, size_t bytes) {
  return run_now(copy(to, pointer(from), bytes, Direction::to_host));
}

DRIVER_API cuMemcpyDtoD_v2(CUdeviceptr to, CUdeviceptr from, size_t bytes) {
  return run_now(copy(pointer(to), pointer(from), bytes, Direction::on_device));
}

DRIVER_API cuMemcpyHtoDAsync_v2(CUdeviceptr to, const void* from, size_t bytes, CUstream stream) {
  return issue_to(stream, copy(pointer(to), from, bytes, Direction::to_device));
}

DRIVER_API cuMemcpyDtoHAsync_v2(void* to, CUdeviceptr from, size_t bytes, CUstream stream) {
  return issue_to(stream, copy(to, pointer(from), bytes, Direction::to_host));
}

DRIVER_API cuMemcpyDtoDAsync_v2(CUdeviceptr to, CUdeviceptr from, size_t bytes, CUstream stream) {
  return issue_to(stream, copy(pointer(to), pointer(from), bytes, Direction::on_device));
}

// ---- fills ----

DRIVER_API cuMemsetD8_v2(CUdeviceptr address, unsigned char value, size_t count) {
  return run_now(fill(address, value, count));
}

DRIVER_API cuMemsetD16_v2(CUdeviceptr address, unsigned short value, size_t count) {
  return run_now(fill(address, value, count));
}

DRIVER_API cuMemsetD32_v2(CUdeviceptr address, unsigned value, size_t count) {
  return run_now(fill(address, value, count));
}

DRIVER_API cuMemsetD8Async(CUdeviceptr address, unsigned char value, size_t count, CUstream stream) {
  return issue_to(stream, fill(address, value, count));
}

DRIVER_API cuMemsetD16Async(CUdeviceptr address, unsigned short value, size_t count, CUstream stream) {
  return issue_to(stream, fill(address, value, count));
}

DRIVER_API cuMemsetD32Async(CUdeviceptr address, unsigned value, size_t count, CUstream stream) {
  return issue_to(stream, fill(address, value, count));
}
