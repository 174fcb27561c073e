#include "runtime/device_memory.h"

#include <iterator>
#include <sys/mman.h>
#include <utility>

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
  if (used_ > total_ || bytes > total_ - used_) return nullptr;
  if (pages + page_bytes() > static_cast<size_t>(high_ - next_)) return nullptr;
  unsigned char* guard = next_ + pages;
  const GuardedRange range = open_before(next_, guard, bytes, alignment);
  if (range.start == nullptr) return nullptr;
  next_ = guard + page_bytes();
  used_ += bytes;
  live_[reinterpret_cast<uintptr_t>(range.start)] = {range, ++count_};
  return range.start;
}

bool DeviceMemory::free(void* start) {
  auto entry = live_.extract(reinterpret_cast<uintptr_t>(start));
  if (entry.empty()) return false;
  close(entry.mapped().range);
  used_ -= entry.mapped().range.bytes;
  freed_.insert(std::move(entry));
  return true;
}

void DeviceMemory::free_all() {
  while (!live_.empty()) free(live_.begin()->second.range.start);
}

// The last allocation of `allocations` that starts at `address` or before; null if there is none.
static const Allocation* last_before(const std::map<uintptr_t, Allocation>& allocations, const void* address) {
  const auto after = allocations.upper_bound(reinterpret_cast<uintptr_t>(address));
  return after == allocations.begin() ? nullptr : &std::prev(after)->second;
}

const Allocation* DeviceMemory::find(const void* address) const {
  const Allocation* allocation = last_before(live_, address);
  return allocation != nullptr && allocation->range.contains(address, 1) ? allocation : nullptr;
}

bool DeviceMemory::holds(const void* address, size_t bytes) const {
  const Allocation* allocation = find(address);
  return allocation != nullptr && allocation->range.contains(address, bytes);
}

bool DeviceMemory::reserved(const void* address) const { return address >= low_ && address < high_; }

std::string DeviceMemory::describe(const void* address) const {
  if (!reserved(address)) return "which is no address of this device";
  const auto at = reinterpret_cast<uintptr_t>(address);
  std::string nearest = "where nothing was ever allocated";
  uintptr_t distance = UINTPTR_MAX;
  const auto consider = [&](const Allocation& allocation, const char* state) {
    const auto start = reinterpret_cast<uintptr_t>(allocation.range.start);
    const auto end = start + allocation.range.bytes;
    const uintptr_t away = at < start ? start - at : at < end ? 0 : at - end + 1;
    if (away >= distance) return;
    distance = away;
    const std::string place = at < start ? std::to_string(start - at) + " bytes before the start of"
                              : at < end ? "offset " + std::to_string(at - start) + " of"
                                         : std::to_string(at - end) + " bytes past the end of";
    nearest = place + " allocation " + std::to_string(allocation.number) + state + " of " +
              std::to_string(allocation.range.bytes) + " bytes";
  };
  for (const auto& [allocations, state] : {std::pair{&live_, ""}, std::pair{&freed_, ", freed,"}}) {
    if (const Allocation* before = last_before(*allocations, address)) consider(*before, state);
    const auto after = allocations->upper_bound(at);
    if (after != allocations->end()) consider(after->second, state);
  }
  return nearest;
}

std::string DeviceMemory::check_red_zones() {
  std::string report;
  for (const auto& [start, allocation] : live_) {
    while (const unsigned char* damaged = damaged_byte(allocation.range)) {
      if (report.empty()) report = "a thread wrote " + describe(damaged);
      *const_cast<unsigned char*>(damaged) = 0xff;
    }
  }
  return report;
}

}  // namespace emulator
