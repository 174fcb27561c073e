#include "runtime/device_memory.h"

#include <cstring>
#include <iterator>
#include <sys/mman.h>

namespace emulator {

DeviceMemory device_memory;

void DeviceMemory::reserve() {
  // Addresses cost nothing and are never used twice: take many, fewer where the process is limited.
  for (size_t bytes = size_t{1} << 40; bytes >= total_; bytes /= 2) {
    void* pages = mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (pages == MAP_FAILED) continue;
    low_ = static_cast<unsigned char*>(pages);
    high_ = low_ + bytes;
    next_ = low_ + page_bytes();
    return;
  }
}

void* DeviceMemory::allocate(size_t bytes) {
  if (low_ == nullptr) reserve();
  constexpr size_t alignment = 256;
  const size_t pages = round_up(round_up(bytes, alignment), page_bytes());
  if (used_ > total_ || bytes > total_ - used_ || pages + page_bytes() > static_cast<size_t>(high_ - next_)) return nullptr;
  unsigned char* guard = next_ + pages;
  const GuardedRange range = open_before(next_, guard, bytes, alignment);
  if (range.start == nullptr) return nullptr;
  next_ = guard + page_bytes();
  used_ += bytes;
  allocations_[reinterpret_cast<uintptr_t>(range.start)] = {range, ++count_};
  return range.start;
}

bool DeviceMemory::free(void* start) {
  const auto entry = allocations_.find(reinterpret_cast<uintptr_t>(start));
  if (entry == allocations_.end() || entry->second.freed) return false;
  close(entry->second.range);
  entry->second.freed = true;
  used_ -= entry->second.range.bytes;
  return true;
}

void DeviceMemory::free_all() {
  for (auto& [start, allocation] : allocations_) free(allocation.range.start);
}

const Allocation* DeviceMemory::find(const void* address) const {
  auto entry = allocations_.upper_bound(reinterpret_cast<uintptr_t>(address));
  if (entry == allocations_.begin()) return nullptr;
  const Allocation& allocation = std::prev(entry)->second;
  return !allocation.freed && allocation.range.contains(address, 1) ? &allocation : nullptr;
}

bool DeviceMemory::holds(const void* address, size_t bytes) const {
  const Allocation* allocation = find(address);
  return allocation != nullptr && allocation->range.contains(address, bytes);
}

bool DeviceMemory::reserved(const void* address) const { return address >= low_ && address < high_; }

std::string DeviceMemory::describe(const void* address) const {
  if (!reserved(address)) return "which is no address of this device";
  const auto at = reinterpret_cast<uintptr_t>(address);
  const auto after = allocations_.upper_bound(at);
  const Allocation* before = after == allocations_.begin() ? nullptr : &std::prev(after)->second;
  const auto named = [](const Allocation& allocation) {
    return "allocation " + std::to_string(allocation.number) + (allocation.freed ? ", freed, of " : " of ") +
           std::to_string(allocation.range.bytes) + " bytes";
  };
  if (before != nullptr && before->range.contains(address, 1)) {
    return "offset " + std::to_string(at - reinterpret_cast<uintptr_t>(before->range.start)) + " of " + named(*before);
  }
  const uintptr_t distance_before = before ? at - reinterpret_cast<uintptr_t>(before->range.end()) : UINTPTR_MAX;
  const uintptr_t distance_after = after != allocations_.end() ? after->first - at : UINTPTR_MAX;
  if (distance_before == UINTPTR_MAX && distance_after == UINTPTR_MAX) return "where nothing was ever allocated";
  if (distance_before <= distance_after) {
    return std::to_string(distance_before) + " bytes past the end of " + named(*before);
  }
  return std::to_string(distance_after) + " bytes before the start of " + named(after->second);
}

std::string DeviceMemory::check_red_zones() {
  std::string report;
  for (auto& [start, allocation] : allocations_) {
    if (allocation.freed) continue;
    const GuardedRange& range = allocation.range;
    while (const unsigned char* damaged = damaged_byte(range)) {
      if (report.empty()) report = "a thread wrote " + describe(damaged);
      *const_cast<unsigned char*>(damaged) = 0xff;
    }
  }
  return report;
}

}  // namespace emulator
