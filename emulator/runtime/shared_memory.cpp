#include "runtime/shared_memory.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <sys/mman.h>

namespace emulator {

SharedMemory shared_memory;

void SharedMemory::resize(size_t bytes) {
  if (low_ == nullptr) {
    // Accesses past the end are usually one tile off: a guard as wide as the memory itself catches them.
    const size_t guard = round_up(most_bytes, page_bytes());
    const size_t all = 3 * guard;
    void* pages = mmap(nullptr, all, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (pages == MAP_FAILED) {
      perror("loramux emulator: no memory for shared memory");
      abort();
    }
    low_ = static_cast<unsigned char*>(pages);
    high_ = low_ + all;
  }
  if (range_.start != nullptr && range_.bytes == bytes) return;
  unsigned char* end = low_ + (high_ - low_) / 3 * 2;
  close(range_);
  range_ = open_before(low_ + (high_ - low_) / 3, end, bytes, alignment);
}

void SharedMemory::poison() { memset(range_.pages, 0xff, range_.pages_bytes); }

std::string SharedMemory::check_red_zone() const {
  const unsigned char* damaged = damaged_byte(range_);
  return damaged == nullptr ? "" : "a thread wrote " + describe(damaged);
}

std::string SharedMemory::describe(const void* address) const {
  const auto at = reinterpret_cast<uintptr_t>(address);
  const auto start = reinterpret_cast<uintptr_t>(range_.start);
  const std::string memory = "the block's " + std::to_string(range_.bytes) + " bytes of shared memory";
  if (at < start) return std::to_string(start - at) + " bytes before " + memory;
  if (at - start < range_.bytes) return "offset " + std::to_string(at - start) + " of " + memory;
  return std::to_string(at - start - range_.bytes) + " bytes past the end of " + memory;
}

}  // namespace emulator
