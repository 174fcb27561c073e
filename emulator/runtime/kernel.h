// The table of kernels: every `KERNEL` of every translation unit, by name.
#pragma once
#include <cstddef>

namespace emulator {

struct Kernel {
  // Enters the kernel in the table; a second kernel of the same name ends the process. Kernels are static objects.
  Kernel(const char* name, size_t params_bytes, unsigned max_threads, unsigned min_blocks, const char* file,
         void (*run)(const void* params));

  const char* const name;
  const size_t params_bytes;
  // The launch bounds: threads of a block, and blocks that a multiprocessor must hold.
  const unsigned max_threads;
  const unsigned min_blocks;
  const char* const file;
  // One CUDA thread.
  void (*const run)(const void* params);
  // CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
  unsigned max_dynamic_shared = 48 << 10;
};

// Null when there is none of that name.
Kernel* find_kernel(const char* name);

}  // namespace emulator
