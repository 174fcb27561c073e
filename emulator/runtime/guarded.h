// Memory between guard pages.
//
// A block of bytes ends, as far as its alignment permits, where a page that nobody may touch begins, so that the first
// access past the end faults. What alignment leaves over on either side is the red zone: filled with 0xff, which is NaN
// in every floating-point type, and compared after each launch.
#pragma once
#include <cstddef>
#include <cstdint>

namespace emulator {

size_t page_bytes();

inline uintptr_t round_up(uintptr_t value, size_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// A range of bytes inside accessible pages.
struct GuardedRange {
  unsigned char* start = nullptr;
  size_t bytes = 0;
  // Accessible pages around the range; a guard page lies before and behind.
  unsigned char* pages = nullptr;
  size_t pages_bytes = 0;

  unsigned char* end() const { return start + bytes; }
  bool contains(const void* address, size_t count) const {
    const auto at = reinterpret_cast<uintptr_t>(address);
    const auto first = reinterpret_cast<uintptr_t>(start);
    return at >= first && count <= bytes && at - first <= bytes - count;
  }
};

// Opens the last pages of the inaccessible range [low, high) for `bytes` bytes that begin at a multiple of `alignment`
// and fills them with 0xff. The page at `high` must be inaccessible, too. Returns a range of null without memory.
GuardedRange open_before(unsigned char* low, unsigned char* high, size_t bytes, size_t alignment);

// Makes the pages inaccessible again and gives their memory back.
void close(const GuardedRange& range);

// The first byte of the red zone that was written to, null if none was. Looks no further than 256 bytes before the
// range: what lies farther away is another array's overrun.
const unsigned char* damaged_byte(const GuardedRange& range);

}  // namespace emulator
