#include "runtime/kernel.h"

#include <cstdio>
#include <cstdlib>
#include <map>
#include <string_view>

namespace emulator {
namespace {

// A function's static: kernels register themselves before this file's own statics may exist.
std::map<std::string_view, Kernel*>& table() {
  static std::map<std::string_view, Kernel*> kernels;
  return kernels;
}

}  // namespace

Kernel::Kernel(const char* name, size_t params_bytes, unsigned max_threads, unsigned min_blocks, const char* file,
               void (*run)(const void*))
    : name(name), params_bytes(params_bytes), max_threads(max_threads), min_blocks(min_blocks), file(file), run(run) {
  const auto [entry, inserted] = table().emplace(name, this);
  if (!inserted) {
    fprintf(stderr, "loramux emulator: kernel %s is defined in %s and in %s\n", name, entry->second->file, file);
    abort();
  }
}

Kernel* find_kernel(const char* name) {
  const auto entry = table().find(name);
  return entry == table().end() ? nullptr : entry->second;
}

}  // namespace emulator
