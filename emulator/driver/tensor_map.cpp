// Tensor maps for bulk copies: the checks that the driver documents, and the stand-in's own encoding.
#include <cstring>

#include "driver/state.h"
#include "runtime/tensor_map.h"

using namespace emulator;

namespace {

// By CUtensorMapDataType.
constexpr uint8_t element_sizes[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4};
constexpr unsigned first_float_type = 6;
// By CUtensorMapSwizzle.
constexpr uint8_t swizzle_spans[] = {0, 32, 64, 128};

}  // namespace

DRIVER_API cuTensorMapEncodeTiled(void* map, unsigned type, uint32_t rank, void* start, const uint64_t* sizes,
                                  const uint64_t* strides, const uint32_t* box, const uint32_t* element_strides,
                                  unsigned interleave, unsigned swizzle, unsigned promotion, unsigned fill) {
  return with_driver([&] {
    if (map == nullptr || reinterpret_cast<uintptr_t>(map) % 64 != 0) return CUDA_ERROR_INVALID_VALUE;
    if (type >= sizeof element_sizes || swizzle >= sizeof swizzle_spans) return CUDA_ERROR_INVALID_VALUE;
    if (promotion > 3 || fill > 1 || (fill == 1 && type < first_float_type)) return CUDA_ERROR_INVALID_VALUE;
    if (interleave > 2) return CUDA_ERROR_INVALID_VALUE;
    if (interleave != 0) return CUDA_ERROR_NOT_SUPPORTED;
    if (rank < 1 || rank > 5) return CUDA_ERROR_INVALID_VALUE;
    if (start == nullptr || reinterpret_cast<uintptr_t>(start) % 16 != 0) return CUDA_ERROR_INVALID_VALUE;
    if (sizes == nullptr || box == nullptr || element_strides == nullptr || (rank > 1 && strides == nullptr)) {
      return CUDA_ERROR_INVALID_VALUE;
    }
    TensorMap record = {};
    record.start = static_cast<unsigned char*>(start);
    record.rank = static_cast<uint8_t>(rank);
    record.element_bytes = element_sizes[type];
    record.swizzle_bytes = swizzle_spans[swizzle];
    record.fill_nan = fill == 1;
    record.marked = TensorMap::mark;
    for (uint32_t i = 0; i < rank; ++i) {
      if (sizes[i] == 0 || sizes[i] > uint64_t{1} << 32) return CUDA_ERROR_INVALID_VALUE;
      if (box[i] == 0 || box[i] > 256) return CUDA_ERROR_INVALID_VALUE;
      if (element_strides[i] == 0 || element_strides[i] > 8) return CUDA_ERROR_INVALID_VALUE;
      record.sizes[i] = sizes[i];
      record.box[i] = static_cast<uint16_t>(box[i]);
      record.element_strides[i] = static_cast<uint8_t>(element_strides[i]);
    }
    for (uint32_t i = 0; i + 1 < rank; ++i) {
      if (strides[i] % 16 != 0 || strides[i] >= uint64_t{1} << 40) return CUDA_ERROR_INVALID_VALUE;
      record.strides[i] = strides[i];
    }
    // The innermost rows of a box are copied in 16-byte chunks, all within one swizzle span.
    const uint32_t row_bytes = box[0] * record.element_bytes;
    if (row_bytes % 16 != 0) return CUDA_ERROR_INVALID_VALUE;
    if (swizzle != 0 && row_bytes > swizzle_spans[swizzle]) return CUDA_ERROR_INVALID_VALUE;
    memcpy(map, &record, sizeof record);
    return CUDA_SUCCESS;
  });
}
