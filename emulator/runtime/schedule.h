// Who goes on when a thread waits: the queue of a block's warps that have lanes to run, and the order of those lanes.
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <source_location>
#include <vector>

namespace emulator {

struct Collective;
struct Thread;

struct Warp {
  // Lanes that have not exited, that can run, that wait in a collective, and that wait at the block's barrier.
  uint32_t live;
  uint32_t ready;
  uint32_t meeting;
  uint32_t at_barrier;
  // Lane 0.
  Thread* threads;
  // What the lanes that wait in a collective handed over.
  void* operands[32];
  // Whether all of them named the same collective and lanes as the first one.
  bool alike;
  const Collective* first_collective;
  uint32_t first_lanes;
  // Where the first lane waits at the barrier.
  std::source_location barrier_place;
  // The order in which ready lanes go on, and the position from which the next one is looked for.
  std::array<uint8_t, 32> order;
  unsigned position;
  bool queued;

  void start(uint32_t lanes);
};

class Schedule {
 public:
  void start_grid(uint64_t seed);
  // The order of `count` blocks; empty for 0, 1, 2, …
  std::vector<uint32_t> order_of(size_t count);
  // All lanes of these warps are ready.
  void start_block(Warp* warps, unsigned count);

  // Takes the next thread that can run; null if there is none.
  Thread* next();
  // These lanes, which waited, can run.
  void wake(Warp& warp, uint32_t lanes);
  // Draws a new order of the warps that can run.
  void shuffle();

 private:
  // Uniform in 0 .. bound.
  uint32_t draw(uint32_t bound);
  template <class Sequence>
  void permute(Sequence& sequence);

  uint64_t seed_ = 0;
  uint64_t state_ = 0;
  // Warps with ready lanes; the one that runs is at the front, whether it has any left or not.
  std::deque<Warp*> queue_;
};

}  // namespace emulator
