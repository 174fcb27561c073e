// The dynamic shared memory of the block that runs: filled with NaN before every block, a guard page behind it.
#pragma once
#include <cstddef>
#include <string>

#include "runtime/guarded.h"

namespace emulator {

class SharedMemory {
 public:
  // What one block of compute capability 9.0 may have.
  static constexpr size_t most_bytes = 227 << 10;
  static constexpr size_t alignment = 1024;

  // Before a launch.
  void resize(size_t bytes);
  // Before a block.
  void poison();
  // After a block: the report of a write that no guard page stopped, or nothing.
  std::string check_red_zone() const;

  unsigned char* start() const { return range_.start; }
  size_t bytes() const { return range_.bytes; }
  bool contains(const void* address, size_t count) const { return range_.contains(address, count); }
  // Whether `address` lies in the memory or in the guards around it.
  bool reserved(const void* address) const { return address >= low_ && address < high_; }
  std::string describe(const void* address) const;

 private:
  unsigned char* low_ = nullptr;
  unsigned char* high_ = nullptr;
  GuardedRange range_;
};

extern SharedMemory shared_memory;

}  // namespace emulator
