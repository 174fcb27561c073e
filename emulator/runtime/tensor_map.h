// What cuTensorMapEncodeTiled leaves in the 128 bytes of a tensor map: the stand-in's own record, for whatever emulates
// bulk tensor copies to read.
#pragma once
#include <cstdint>

namespace emulator {

struct alignas(64) TensorMap {
  // Tells a record from other bytes.
  static constexpr uint32_t mark = 0x50414d54;

  // The innermost dimension comes first; its stride is one element.
  unsigned char* start;
  uint64_t sizes[5];
  // In bytes, of dimension i + 1.
  uint64_t strides[4];
  uint16_t box[5];
  uint8_t element_strides[5];
  uint8_t rank;
  uint8_t element_bytes;
  // Bytes of the span within which 16-byte chunks are permuted; 0 without a swizzle.
  uint8_t swizzle_bytes;
  // Elements outside of the tensor are NaN instead of zero.
  bool fill_nan;
  uint32_t marked;
};

static_assert(sizeof(TensorMap) == 128);

}  // namespace emulator
