#include "runtime/guarded.h"

#include <algorithm>
#include <cstring>
#include <sys/mman.h>
#include <unistd.h>

namespace emulator {

size_t page_bytes() {
  static const size_t bytes = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  return bytes;
}

GuardedRange open_before(unsigned char* low, unsigned char* high, size_t bytes, size_t alignment) {
  const size_t span = round_up(bytes, alignment);
  const size_t pages_bytes = round_up(span, page_bytes());
  GuardedRange range;
  if (pages_bytes > static_cast<size_t>(high - low)) return range;
  unsigned char* pages = high - pages_bytes;
  if (pages_bytes != 0 && mprotect(pages, pages_bytes, PROT_READ | PROT_WRITE) != 0) return range;
  memset(pages, 0xff, pages_bytes);
  range.start = high - span;
  range.bytes = bytes;
  range.pages = pages;
  range.pages_bytes = pages_bytes;
  return range;
}

void close(const GuardedRange& range) {
  if (range.pages_bytes == 0) return;
  mmap(range.pages, range.pages_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
}

// The first byte of [begin, end) that is not 0xff, or null.
static const unsigned char* first_written(const unsigned char* begin, const unsigned char* end) {
  // Equal to itself shifted by one: all bytes are alike.
  if (begin == end || (*begin == 0xff && memcmp(begin, begin + 1, static_cast<size_t>(end - begin) - 1) == 0)) {
    return nullptr;
  }
  return std::find_if(begin, end, [](unsigned char byte) { return byte != 0xff; });
}

const unsigned char* damaged_byte(const GuardedRange& range) {
  if (const unsigned char* behind = first_written(range.end(), range.pages + range.pages_bytes)) return behind;
  return first_written(range.start - std::min<ptrdiff_t>(256, range.start - range.pages), range.start);
}

}  // namespace emulator
