// The CUDA execution model: a grid's blocks one after another, and within a block one fiber per thread.
//
// A thread runs until it has to wait for others, in a collective of its warp or at a barrier of its block; then another
// thread runs. There is no preemption: what a schedule decides is the order in which threads, warps and blocks go on.
// Seed 0 is their natural order, one warp until it waits for the block, then the next. Any other seed draws the order
// of blocks, of warps and of lanes, and lets warps overtake each other.
#pragma once
#include <cstddef>
#include <cstdint>
#include <source_location>
#include <string>

#include "include/vector_types.h"
#include "runtime/async_copy.h"
#include "runtime/fault.h"
#include "runtime/fiber.h"
#include "runtime/kernel.h"

namespace emulator {

inline constexpr unsigned warp_lanes = 32;
inline constexpr unsigned most_threads = 1024;

// What the lanes of a warp do together, such as a shuffle.
struct Collective {
  const char* name;
  // Runs once, when every lane of `lanes` has come. operands[lane] is what that lane handed over, on its own stack:
  // results go back the same way.
  void (*combine)(void* const* operands, uint32_t lanes);
};

struct Warp;

// One CUDA thread.
struct Thread {
  Fiber fiber;
  uint3 index;
  unsigned lane;
  Warp* warp;
  AsyncCopies copies;
  // The fiber waits to be given its next thread; if not, it has to be started.
  bool idle = false;
  bool exited;
  // What it waits for, and where: null while it can run.
  const char* waits_for;
  std::source_location where;
  // The lanes and the collective it waits for; null at a barrier of the block.
  uint32_t lanes;
  const Collective* collective;
};

// The thread that runs; null outside of kernels.
extern Thread* running;

// Called by a CUDA thread, with the other lanes of `lanes`. Returns after `collective` has been combined.
void meet(const Collective& collective, uint32_t lanes, void* operand, const std::source_location& where);

// Called by a CUDA thread: waits for all threads of the block that have not exited. Returns for how many of them
// `predicate` holds.
unsigned meet_block(const char* name, bool predicate, const std::source_location& where);

struct Launch {
  const Kernel* kernel;
  const void* params;
  dim3 grid;
  dim3 block;
  size_t shared_bytes;
  uint64_t seed;
};

// Runs all blocks, or up to the first fault.
Fault run_grid(const Launch& launch);

// "kernel k, block (x, y, z), thread (x, y, z)": what runs.
std::string describe_running();

// "file.cu:12"
std::string describe_place(const std::source_location& where);

// Ends the launch that `running` is part of. For the signal handler, which has no fiber of its own.
[[noreturn]] void abandon_launch(Fault fault);

}  // namespace emulator

// CUDA's built-in variables. The scheduler writes them whenever another thread goes on.
extern uint3 threadIdx;
extern uint3 blockIdx;
extern dim3 blockDim;
extern dim3 gridDim;
inline constexpr int warpSize = emulator::warp_lanes;
