// CUDA's names for a host compiler, included before every kernel's own text. What is missing here is not emulated:
// using it fails to compile.
#pragma once
#include <assert.h>
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <bit>
#include <source_location>
#include <type_traits>

#include "include/vector_types.h"
#include "runtime/block.h"

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(bytes) alignas(bytes)
// A block's memory is the launch's: it is poisoned, bounded and guarded there.
#define __shared__ emulator_has_no_static_shared_memory_use_shared_storage

#include "include/atomics.h"
#include "include/intrinsics.h"
#include "include/warp.h"
