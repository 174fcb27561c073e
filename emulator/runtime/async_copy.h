// A thread's asynchronous copies from global to shared memory, as late as the rules allow: the destination turns to NaN
// when the copy begins, and the bytes land only at the wait that covers the copy.
#pragma once
#include <cstddef>
#include <cstring>
#include <vector>

namespace emulator {

class AsyncCopies {
 public:
  static constexpr size_t copy_bytes = 16;

  // `global` null: zeros.
  void begin(void* shared, const void* global) {
    Copy& copy = under_way_.emplace_back();
    copy.shared = shared;
    if (global != nullptr) {
      memcpy(copy.bytes, global, copy_bytes);
    } else {
      memset(copy.bytes, 0, copy_bytes);
    }
    memset(shared, 0xff, copy_bytes);
  }

  void commit() { group_ends_.push_back(under_way_.size()); }

  // Completes all but the `newest` groups. Copies that no group holds yet stay under way.
  void wait(size_t newest) {
    if (group_ends_.size() <= newest) return;
    const size_t groups = group_ends_.size() - newest;
    const size_t copies = group_ends_[groups - 1];
    for (size_t i = 0; i < copies; ++i) memcpy(under_way_[i].shared, under_way_[i].bytes, copy_bytes);
    under_way_.erase(under_way_.begin(), under_way_.begin() + static_cast<ptrdiff_t>(copies));
    group_ends_.erase(group_ends_.begin(), group_ends_.begin() + static_cast<ptrdiff_t>(groups));
    for (size_t& end : group_ends_) end -= copies;
  }

  // A thread that ends leaves its copies behind.
  void drop() {
    under_way_.clear();
    group_ends_.clear();
  }

 private:
  struct Copy {
    void* shared;
    unsigned char bytes[copy_bytes];
  };
  std::vector<Copy> under_way_;
  // How many of `under_way_` belong to this group or an older one.
  std::vector<size_t> group_ends_;
};

}  // namespace emulator
