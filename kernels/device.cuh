// How a kernel is declared. The emulator has a file of the same name that registers the kernel for its driver.
#pragma once
#include <element_type.h>
#include <stdint.h>

// Defines the kernel `name`, found by that name (see KERNEL_NAME) on the host, which takes one `Params` by value as `p`.
// `threads` is its block size, `blocks` how many blocks an SM must be able to hold.
#define KERNEL(name, Params, threads, blocks) \
  extern "C" __global__ void __launch_bounds__(threads, blocks) KERNEL_NAME(name)(const __grid_constant__ Params p)

// The block's dynamic shared memory as the one struct that describes all of it.
template <class Storage>
__device__ __forceinline__ Storage& shared_storage() {
  extern __shared__ __align__(1024) unsigned char shared_bytes[];
  return *reinterpret_cast<Storage*>(shared_bytes);
}
