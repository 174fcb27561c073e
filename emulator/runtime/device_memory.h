// Global memory: allocations of one device, each between guard pages. A freed range is never used again, so every
// access to it faults.
#pragma once
#include <cstddef>
#include <cstdint>
#include <map>
#include <string>

#include "runtime/guarded.h"

namespace emulator {

struct Allocation {
  GuardedRange range;
  // Counts from 1, in order of allocation.
  size_t number;
};

class DeviceMemory {
 public:
  // A multiple of 256, filled with 0xff; null when the device has no `bytes` left.
  void* allocate(size_t bytes);

  // False if no allocation starts at `start`.
  bool free(void* start);

  void free_all();

  // The allocation that `address` lies in; null if there is none, or no more.
  const Allocation* find(const void* address) const;

  // Whether `bytes` bytes from `address` on lie within one allocation.
  bool holds(const void* address, size_t bytes) const;

  // Whether `address` is one that allocations, past or future, may have.
  bool reserved(const void* address) const;

  // Where `address` lies with respect to the nearest allocation, in words.
  std::string describe(const void* address) const;

  // The report of a write past an allocation that no guard page stopped; empty if there was none. Repairs the red zone.
  std::string check_red_zones();

  size_t total() const { return total_; }
  size_t used() const { return used_; }
  void set_total(size_t bytes) { total_ = bytes; }

 private:
  void reserve();

  // By start address.
  using Allocations = std::map<uintptr_t, Allocation>;
  Allocations live_;
  // For reports only.
  Allocations freed_;
  // The inaccessible address range that allocations open pages of, and how far it is used.
  unsigned char* low_ = nullptr;
  unsigned char* high_ = nullptr;
  unsigned char* next_ = nullptr;
  size_t total_ = size_t{2} << 30;
  size_t used_ = 0;
  size_t count_ = 0;
};

extern DeviceMemory device_memory;

}  // namespace emulator
