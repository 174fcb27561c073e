// Names and descriptions of error codes.
#include "driver/api.h"

namespace {

struct Description {
  CUresult code;
  const char* name;
  const char* text;
};

#define DESCRIBE(code, text) {code, #code, text}

constexpr Description descriptions[] = {
    DESCRIBE(CUDA_SUCCESS, "no error"),
    DESCRIBE(CUDA_ERROR_INVALID_VALUE, "invalid argument"),
    DESCRIBE(CUDA_ERROR_OUT_OF_MEMORY, "out of memory"),
    DESCRIBE(CUDA_ERROR_NOT_INITIALIZED, "cuInit has not been called"),
    DESCRIBE(CUDA_ERROR_INVALID_DEVICE, "no such device"),
    DESCRIBE(CUDA_ERROR_INVALID_IMAGE, "no device code"),
    DESCRIBE(CUDA_ERROR_INVALID_CONTEXT, "no context is current on this thread"),
    DESCRIBE(CUDA_ERROR_UNSUPPORTED_LIMIT, "no such limit"),
    DESCRIBE(CUDA_ERROR_INVALID_HANDLE, "invalid handle"),
    DESCRIBE(CUDA_ERROR_ILLEGAL_STATE, "not in a state that permits this"),
    DESCRIBE(CUDA_ERROR_NOT_FOUND, "no such name"),
    DESCRIBE(CUDA_ERROR_NOT_READY, "not ready"),
    DESCRIBE(CUDA_ERROR_ILLEGAL_ADDRESS, "a kernel accessed an illegal address"),
    DESCRIBE(CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES, "the launch asks for more than the kernel can have"),
    DESCRIBE(CUDA_ERROR_ASSERT, "an assertion failed in a kernel"),
    DESCRIBE(CUDA_ERROR_MISALIGNED_ADDRESS, "a kernel accessed a misaligned address"),
    DESCRIBE(CUDA_ERROR_LAUNCH_FAILED, "a kernel failed"),
    DESCRIBE(CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE, "the blocks of a cooperative launch do not fit the device"),
    DESCRIBE(CUDA_ERROR_NOT_SUPPORTED, "not supported by the emulator"),
    DESCRIBE(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, "not permitted while a stream is being captured"),
    DESCRIBE(CUDA_ERROR_STREAM_CAPTURE_INVALIDATED, "an earlier error ended the capture"),
    DESCRIBE(CUDA_ERROR_STREAM_CAPTURE_MERGE, "two captures would become one"),
    DESCRIBE(CUDA_ERROR_STREAM_CAPTURE_UNMATCHED, "the capture was not begun on this stream"),
    DESCRIBE(CUDA_ERROR_STREAM_CAPTURE_UNJOINED, "a captured stream was not joined to the first one"),
    DESCRIBE(CUDA_ERROR_STREAM_CAPTURE_ISOLATION, "a captured stream would depend on work outside of the capture"),
    DESCRIBE(CUDA_ERROR_STREAM_CAPTURE_IMPLICIT, "a captured stream would depend on the default stream"),
    DESCRIBE(CUDA_ERROR_CAPTURED_EVENT, "the event was recorded in a capture"),
    DESCRIBE(CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD, "the capture was begun by another thread"),
    DESCRIBE(CUDA_ERROR_INVALID_CLUSTER_SIZE, "invalid cluster size"),
};

const Description* find(CUresult code) {
  for (const Description& description : descriptions) {
    if (description.code == code) return &description;
  }
  return nullptr;
}

}  // namespace

DRIVER_API cuGetErrorName(CUresult code, const char** name) {
  const Description* description = find(code);
  *name = description == nullptr ? nullptr : description->name;
  return description == nullptr ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}

DRIVER_API cuGetErrorString(CUresult code, const char** text) {
  const Description* description = find(code);
  *text = description == nullptr ? nullptr : description->text;
  return description == nullptr ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}
