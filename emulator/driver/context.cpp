// The driver itself, its one device and that device's primary context.
#include <cstdio>
#include <cstring>

#include "driver/state.h"
#include "driver/streams.h"
#include "runtime/device_memory.h"
#include "runtime/shared_memory.h"

struct Context {};
struct MemoryPool {};

namespace emulator {
namespace {

Context primary_context;
MemoryPool default_pool;
thread_local CUcontext current = nullptr;

bool is_device(CUdevice device) { return device == 0; }

// The value of an attribute; 0 for features that the stand-in does not have.
int attribute_value(CUdevice_attribute attribute) {
  switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK:
    case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_X:
    case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Y:
      return 1024;
    case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Z:
      return 64;
    case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_X:
      return 0x7fffffff;
    case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Y:
    case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Z:
      return 65535;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK:
      return 48 << 10;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN:
      return SharedMemory::most_bytes;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR:
      return 228 << 10;
    case CU_DEVICE_ATTRIBUTE_RESERVED_SHARED_MEMORY_PER_BLOCK:
      return 1 << 10;
    case CU_DEVICE_ATTRIBUTE_TOTAL_CONSTANT_MEMORY:
      return 64 << 10;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE:
      return 32;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK:
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_MULTIPROCESSOR:
      return 64 << 10;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT:
      return static_cast<int>(state().multiprocessors);
    case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_MULTIPROCESSOR:
      return 2048;
    case CU_DEVICE_ATTRIBUTE_MAX_BLOCKS_PER_MULTIPROCESSOR:
      return 32;
    case CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE:
      return 50 << 20;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR:
      return 9;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR:
      return 0;
    case CU_DEVICE_ATTRIBUTE_CAN_MAP_HOST_MEMORY:
    case CU_DEVICE_ATTRIBUTE_CONCURRENT_KERNELS:
    case CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING:
    case CU_DEVICE_ATTRIBUTE_STREAM_PRIORITIES_SUPPORTED:
    case CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED:
    case CU_DEVICE_ATTRIBUTE_CLUSTER_LAUNCH:
    case CU_DEVICE_ATTRIBUTE_TENSOR_MAP_ACCESS_SUPPORTED:
      return 1;
  }
  return 0;
}

}  // namespace

thread_local uint64_t Counters::allocations_of_thread = 0;
thread_local uint64_t Counters::synchronizations_of_thread = 0;
thread_local bool events_look_pending = false;

void count_synchronization() {
  ++state().counters.synchronizations;
  ++Counters::synchronizations_of_thread;
}

State& state() {
  static State the_state;
  return the_state;
}

CUcontext current_context() { return current; }

CUresult lose_context(Fault fault) {
  state().lost = static_cast<CUresult>(fault.code);
  state().report = std::move(fault.report);
  fprintf(stderr, "loramux emulator: %s\n", state().report.c_str());
  return state().lost;
}

CUresult refuse(CUresult error, std::string report) {
  state().report = std::move(report);
  return error;
}

}  // namespace emulator

using namespace emulator;

DRIVER_API cuInit(unsigned flags) {
  if (flags != 0) return CUDA_ERROR_INVALID_VALUE;
  const std::lock_guard lock(state().mutex);
  install_signal_handler();
  state().initialized = true;
  return CUDA_SUCCESS;
}

DRIVER_API cuDriverGetVersion(int* version) {
  if (version == nullptr) return CUDA_ERROR_INVALID_VALUE;
  *version = 13000;
  return CUDA_SUCCESS;
}

DRIVER_API cuDeviceGetCount(int* count) {
  return with_driver([&] {
    *count = 1;
    return CUDA_SUCCESS;
  });
}

DRIVER_API cuDeviceGet(CUdevice* device, int ordinal) {
  return with_driver([&] {
    if (!is_device(ordinal)) return CUDA_ERROR_INVALID_DEVICE;
    *device = ordinal;
    return CUDA_SUCCESS;
  });
}

DRIVER_API cuDeviceGetName(char* name, int bytes, CUdevice device) {
  return with_driver([&] {
    if (!is_device(device)) return CUDA_ERROR_INVALID_DEVICE;
    if (name == nullptr || bytes <= 0) return CUDA_ERROR_INVALID_VALUE;
    snprintf(name, static_cast<size_t>(bytes), "loramux emulator");
    return CUDA_SUCCESS;
  });
}

DRIVER_API cuDeviceGetUuid_v2(CUuuid* uuid, CUdevice device) {
  return with_driver([&] {
    if (!is_device(device)) return CUDA_ERROR_INVALID_DEVICE;
    memcpy(uuid->bytes, "loramux-emulator", sizeof uuid->bytes);
    return CUDA_SUCCESS;
  });
}

DRIVER_API cuDeviceTotalMem_v2(size_t* bytes, CUdevice device) {
  return with_driver([&] {
    if (!is_device(device)) return CUDA_ERROR_INVALID_DEVICE;
    *bytes = device_memory.total();
    return CUDA_SUCCESS;
  });
}

DRIVER_API cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
  return with_driver([&] {
    if (!is_device(device)) return CUDA_ERROR_INVALID_DEVICE;
    *value = attribute_value(attribute);
    return CUDA_SUCCESS;
  });
}

DRIVER_API cuDeviceGetDefaultMemPool(CUmemoryPool* pool, CUdevice device) {
  return with_driver([&] {
    if (!is_device(device)) return CUDA_ERROR_INVALID_DEVICE;
    *pool = &default_pool;
    return CUDA_SUCCESS;
  });
}

DRIVER_API cuDeviceGetMemPool(CUmemoryPool* pool, CUdevice device) { return cuDeviceGetDefaultMemPool(pool, device); }

// A release threshold and the like: the stand-in keeps no freed memory.
DRIVER_API cuMemPoolSetAttribute(CUmemoryPool pool, unsigned, void*) {
  return with_context([&] { return pool == &default_pool ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE; });
}

DRIVER_API cuMemPoolTrimTo(CUmemoryPool pool, size_t) {
  return with_context([&] { return pool == &default_pool ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE; });
}

DRIVER_API cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
  return with_driver([&] {
    if (!is_device(device)) return CUDA_ERROR_INVALID_DEVICE;
    ++state().references;
    *context = &primary_context;
    return CUDA_SUCCESS;
  });
}

DRIVER_API cuDevicePrimaryCtxRelease_v2(CUdevice device) {
  return with_driver([&] {
    if (!is_device(device)) return CUDA_ERROR_INVALID_DEVICE;
    if (state().references == 0) return CUDA_ERROR_INVALID_CONTEXT;
    --state().references;
    return CUDA_SUCCESS;
  });
}

DRIVER_API cuCtxGetCurrent(CUcontext* context) {
  return with_driver([&] {
    *context = current;
    return CUDA_SUCCESS;
  });
}

DRIVER_API cuCtxSetCurrent(CUcontext context) {
  return with_driver([&] {
    if (context != nullptr && context != &primary_context) return CUDA_ERROR_INVALID_CONTEXT;
    current = context;
    return CUDA_SUCCESS;
  });
}

DRIVER_API cuCtxGetDevice(CUdevice* device) {
  return with_context([&] {
    *device = 0;
    return CUDA_SUCCESS;
  });
}

// How the host waits: it never does.
DRIVER_API cuCtxSetFlags(unsigned) {
  return with_context([] { return CUDA_SUCCESS; });
}

DRIVER_API cuCtxSynchronize() {
  return with_context([] {
    if (const CUresult refused = refuse_during_any_capture(); refused != CUDA_SUCCESS) return refused;
    count_synchronization();
    return CUDA_SUCCESS;
  });
}

DRIVER_API cuCtxGetStreamPriorityRange(int* least, int* greatest) {
  return with_context([&] {
    if (least != nullptr) *least = 0;
    if (greatest != nullptr) *greatest = -5;
    return CUDA_SUCCESS;
  });
}

// Limits are kept and not enforced.
static size_t limits[11];

DRIVER_API cuCtxSetLimit(unsigned limit, size_t value) {
  return with_context([&] {
    if (limit >= sizeof limits / sizeof *limits) return CUDA_ERROR_UNSUPPORTED_LIMIT;
    limits[limit] = value;
    return CUDA_SUCCESS;
  });
}

DRIVER_API cuCtxGetLimit(size_t* value, unsigned limit) {
  return with_context([&] {
    if (limit >= sizeof limits / sizeof *limits) return CUDA_ERROR_UNSUPPORTED_LIMIT;
    *value = limits[limit];
    return CUDA_SUCCESS;
  });
}
