// Modules, functions and launches.
#include <algorithm>
#include <cstring>
#include <string>

#include "driver/state.h"
#include "driver/streams.h"
#include "runtime/block.h"
#include "runtime/kernel.h"
#include "runtime/shared_memory.h"

struct Module {};

using namespace emulator;

namespace {

// All modules are this one: the kernels that were linked into the stand-in.
Module the_module;

Kernel& kernel_of(CUfunction function) { return *reinterpret_cast<Kernel*>(function); }

// Parameters as a kernel may ask for them: a tensor map wants 64 bytes.
struct alignas(128) ParameterBytes {
  unsigned char bytes[128];
};

// What __launch_bounds__ lets the compiler use.
unsigned registers(const Kernel& kernel) {
  const unsigned threads = kernel.max_threads * std::max(kernel.min_blocks, 1u);
  return std::min(255u, (64u << 10) / threads / 8 * 8);
}

unsigned blocks_per_multiprocessor(const Kernel& kernel, unsigned threads, size_t shared_bytes) {
  if (threads == 0 || threads > kernel.max_threads || shared_bytes > kernel.max_dynamic_shared) return 0;
  const unsigned by_threads = 2048 / static_cast<unsigned>(round_up(threads, 32));
  const unsigned by_registers = (64u << 10) / (registers(kernel) * static_cast<unsigned>(round_up(threads, 32)));
  // Each block has a kilobyte of shared memory that the system keeps.
  const auto by_shared = static_cast<unsigned>((228 << 10) / (shared_bytes + 1024));
  return std::min({32u, by_threads, by_registers, by_shared});
}

struct Attributes {
  dim3 cluster;
  bool cooperative = false;
};

std::string text(dim3 v) {
  return "(" + std::to_string(v.x) + ", " + std::to_string(v.y) + ", " + std::to_string(v.z) + ")";
}

CUresult check(const Kernel& kernel, const Launch& launch, const Attributes& attributes) {
  const dim3 grid = launch.grid;
  const dim3 block = launch.block;
  const dim3 cluster = attributes.cluster;
  const auto no = [&](CUresult error, const std::string& why) {
    return refuse(error, "launch of " + std::string(kernel.name) + " refused: " + why);
  };
  const auto is_empty = [](dim3 size) { return size.x == 0 || size.y == 0 || size.z == 0; };
  if (is_empty(grid) || grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535) {
    return no(CUDA_ERROR_INVALID_VALUE, "a grid of " + text(grid) + " blocks");
  }
  if (is_empty(block) || block.x > 1024 || block.y > 1024 || block.z > 64 ||
      block.x * block.y * block.z > most_threads) {
    return no(CUDA_ERROR_INVALID_VALUE, "a block of " + text(block) + " threads");
  }
  const unsigned threads = block.x * block.y * block.z;
  if (threads > kernel.max_threads) {
    return no(CUDA_ERROR_INVALID_VALUE, std::to_string(threads) + " threads, more than its launch bound of " +
                                            std::to_string(kernel.max_threads));
  }
  if (launch.shared_bytes > kernel.max_dynamic_shared) {
    return no(CUDA_ERROR_INVALID_VALUE, std::to_string(launch.shared_bytes) + " bytes of shared memory, more than the " +
                                            std::to_string(kernel.max_dynamic_shared) + " that its attribute permits");
  }
  if (is_empty(cluster) || grid.x % cluster.x != 0 || grid.y % cluster.y != 0 || grid.z % cluster.z != 0) {
    return no(CUDA_ERROR_INVALID_VALUE, "clusters of " + text(cluster) + " do not divide a grid of " + text(grid));
  }
  if (size_t{cluster.x} * cluster.y * cluster.z > 8) {
    return no(CUDA_ERROR_INVALID_CLUSTER_SIZE, "clusters of " + text(cluster) + " have more than 8 blocks");
  }
  const size_t resident =
      size_t{blocks_per_multiprocessor(kernel, threads, launch.shared_bytes)} * state().multiprocessors;
  if (attributes.cooperative && size_t{grid.x} * grid.y * grid.z > resident) {
    return no(CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE,
              "a grid of " + text(grid) + " blocks, of which " + std::to_string(resident) + " can run at a time");
  }
  return CUDA_SUCCESS;
}

CUresult launch(CUfunction function, Launch launch, const Attributes& attributes, CUstream stream, void** arguments,
                void** extra) {
  return with_context([&]() -> CUresult {
    if (function == nullptr) return CUDA_ERROR_INVALID_HANDLE;
    if (extra != nullptr) return CUDA_ERROR_NOT_SUPPORTED;
    const Kernel& kernel = kernel_of(function);
    if (const CUresult result = check(kernel, launch, attributes); result != CUDA_SUCCESS) return result;
    if (arguments == nullptr || arguments[0] == nullptr) return CUDA_ERROR_INVALID_VALUE;
    launch.kernel = &kernel;
    std::vector<ParameterBytes> parameters((kernel.params_bytes + sizeof(ParameterBytes) - 1) / sizeof(ParameterBytes));
    memcpy(parameters.data(), arguments[0], kernel.params_bytes);
    return issue(stream, {CU_GRAPH_NODE_TYPE_KERNEL, [launch, parameters = std::move(parameters)] {
                            Launch now = launch;
                            now.params = parameters.data();
                            now.seed = state().seed;
                            ++state().counters.launches;
                            Fault fault = run_grid(now);
                            return fault.code == FaultCode::none ? CUDA_SUCCESS : lose_context(std::move(fault));
                          }});
  });
}

}  // namespace

// ---- modules ----

// Any image will do: device code cannot be read here.
DRIVER_API cuModuleLoadData(CUmodule* module, const void* image) {
  return with_context([&] {
    if (module == nullptr || image == nullptr) return CUDA_ERROR_INVALID_VALUE;
    *module = &the_module;
    return CUDA_SUCCESS;
  });
}

DRIVER_API cuModuleLoadDataEx(CUmodule* module, const void* image, unsigned, void*, void**) {
  return cuModuleLoadData(module, image);
}

DRIVER_API cuModuleUnload(CUmodule module) {
  return with_context([&] { return module == &the_module ? CUDA_SUCCESS : CUDA_ERROR_INVALID_HANDLE; });
}

DRIVER_API cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
  return with_context([&] {
    if (module != &the_module) return CUDA_ERROR_INVALID_HANDLE;
    if (function == nullptr || name == nullptr) return CUDA_ERROR_INVALID_VALUE;
    Kernel* kernel = find_kernel(name);
    *function = reinterpret_cast<CUfunction>(kernel);
    return kernel == nullptr ? CUDA_ERROR_NOT_FOUND : CUDA_SUCCESS;
  });
}

DRIVER_API cuModuleGetGlobal_v2(CUdeviceptr*, size_t*, CUmodule, const char*) {
  return with_context([] { return CUDA_ERROR_NOT_FOUND; });
}

// ---- functions ----

DRIVER_API cuFuncGetName(const char** name, CUfunction function) {
  return with_context([&] {
    *name = kernel_of(function).name;
    return CUDA_SUCCESS;
  });
}

DRIVER_API cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction function) {
  return with_context([&] {
    const Kernel& kernel = kernel_of(function);
    switch (attribute) {
      case CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK:
        *value = static_cast<int>(kernel.max_threads);
        return CUDA_SUCCESS;
      case CU_FUNC_ATTRIBUTE_NUM_REGS:
        *value = static_cast<int>(registers(kernel));
        return CUDA_SUCCESS;
      case CU_FUNC_ATTRIBUTE_PTX_VERSION:
      case CU_FUNC_ATTRIBUTE_BINARY_VERSION:
        *value = 90;
        return CUDA_SUCCESS;
      case CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES:
        *value = static_cast<int>(kernel.max_dynamic_shared);
        return CUDA_SUCCESS;
      case CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES:
      case CU_FUNC_ATTRIBUTE_CONST_SIZE_BYTES:
      case CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES:
        *value = 0;
        return CUDA_SUCCESS;
      default:
        return CUDA_ERROR_INVALID_VALUE;
    }
  });
}

DRIVER_API cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
  return with_context([&] {
    switch (attribute) {
      case CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES:
        if (value < 0 || static_cast<size_t>(value) > SharedMemory::most_bytes) return CUDA_ERROR_INVALID_VALUE;
        kernel_of(function).max_dynamic_shared = static_cast<unsigned>(value);
        return CUDA_SUCCESS;
      case CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT:
        return value >= -1 && value <= 100 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
      default:
        return CUDA_ERROR_INVALID_VALUE;
    }
  });
}

DRIVER_API cuFuncSetCacheConfig(CUfunction, unsigned) {
  return with_context([] { return CUDA_SUCCESS; });
}

DRIVER_API cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, CUfunction function, int threads,
                                                                size_t shared_bytes, unsigned) {
  return with_context([&] {
    if (threads <= 0) return CUDA_ERROR_INVALID_VALUE;
    *blocks = static_cast<int>(
        blocks_per_multiprocessor(kernel_of(function), static_cast<unsigned>(threads), shared_bytes));
    return CUDA_SUCCESS;
  });
}

DRIVER_API cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, CUfunction function, int threads,
                                                       size_t shared_bytes) {
  return cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, function, threads, shared_bytes, 0);
}

// ---- launches ----

DRIVER_API cuLaunchKernel(CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                          unsigned block_y, unsigned block_z, unsigned shared_bytes, CUstream stream, void** arguments,
                          void** extra) {
  return launch(function, {nullptr, nullptr, {grid_x, grid_y, grid_z}, {block_x, block_y, block_z}, shared_bytes, 0}, {},
                stream, arguments, extra);
}

DRIVER_API cuLaunchCooperativeKernel(CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                                     unsigned block_x, unsigned block_y, unsigned block_z, unsigned shared_bytes,
                                     CUstream stream, void** arguments) {
  return launch(function, {nullptr, nullptr, {grid_x, grid_y, grid_z}, {block_x, block_y, block_z}, shared_bytes, 0},
                {{}, true}, stream, arguments, nullptr);
}

DRIVER_API cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction function, void** arguments, void** extra) {
  if (config == nullptr) return CUDA_ERROR_INVALID_VALUE;
  Attributes attributes;
  for (unsigned i = 0; i < config->attribute_count; ++i) {
    const CUlaunchAttribute& attribute = config->attributes[i];
    switch (attribute.id) {
      case CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION:
        attributes.cluster = {attribute.cluster.x, attribute.cluster.y, attribute.cluster.z};
        break;
      case CU_LAUNCH_ATTRIBUTE_COOPERATIVE:
        attributes.cooperative = attribute.cooperative != 0;
        break;
      // Grids run one after another whatever these say.
      case CU_LAUNCH_ATTRIBUTE_IGNORE:
      case CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION:
      case CU_LAUNCH_ATTRIBUTE_PRIORITY:
        break;
      default:
        return CUDA_ERROR_NOT_SUPPORTED;
    }
  }
  return launch(function,
                {nullptr,
                 nullptr,
                 {config->grid_x, config->grid_y, config->grid_z},
                 {config->block_x, config->block_y, config->block_z},
                 config->shared_bytes,
                 0},
                attributes, config->stream, arguments, extra);
}
