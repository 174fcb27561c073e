// Events. Work is done when its call returns, so a recorded event has always happened.
#include <chrono>
#include <optional>
#include <set>

#include "driver/state.h"
#include "driver/streams.h"

struct Event {
  unsigned flags;
  // When it was recorded outside of a capture.
  std::optional<std::chrono::steady_clock::time_point> time;
  // The capture that it was recorded in, and what preceded it there.
  std::shared_ptr<emulator::Capture> capture;
  emulator::Progress progress;
};

using namespace emulator;

namespace {

std::set<CUevent> events;

// The host may not wait for what a capture only recorded.
CUresult refuse_captured(Event& event) {
  if (event.capture == nullptr) return CUDA_SUCCESS;
  event.capture->invalidated = true;
  return CUDA_ERROR_CAPTURED_EVENT;
}

}  // namespace

DRIVER_API cuEventCreate(CUevent* event, unsigned flags) {
  return with_context([&] {
    if (event == nullptr || flags > 7) return CUDA_ERROR_INVALID_VALUE;
    *event = new Event{flags, {}, nullptr, {}};
    events.insert(*event);
    return CUDA_SUCCESS;
  });
}

DRIVER_API cuEventDestroy_v2(CUevent event) {
  return with_context([&] {
    if (events.erase(event) == 0) return CUDA_ERROR_INVALID_HANDLE;
    delete event;
    return CUDA_SUCCESS;
  });
}

DRIVER_API cuEventRecord(CUevent event, CUstream handle) {
  return with_context([&] {
    Stream* stream = find_stream(handle);
    if (stream == nullptr || !events.contains(event)) return CUDA_ERROR_INVALID_HANDLE;
    if (stream->capture != nullptr && stream->capture->invalidated) return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
    event->capture = stream->capture;
    event->progress = stream->progress;
    event->time.reset();
    if (event->capture == nullptr) event->time = std::chrono::steady_clock::now();
    return CUDA_SUCCESS;
  });
}

DRIVER_API cuEventQuery(CUevent event) {
  return with_context([&] {
    if (!events.contains(event)) return CUDA_ERROR_INVALID_HANDLE;
    const CUresult refused = refuse_captured(*event);
    return refused == CUDA_SUCCESS && events_look_pending ? CUDA_ERROR_NOT_READY : refused;
  });
}

DRIVER_API cuEventSynchronize(CUevent event) {
  return with_context([&] {
    if (!events.contains(event)) return CUDA_ERROR_INVALID_HANDLE;
    count_synchronization();
    return refuse_captured(*event);
  });
}

DRIVER_API cuEventElapsedTime_v2(float* milliseconds, CUevent start, CUevent end) {
  return with_context([&] {
    if (!events.contains(start) || !events.contains(end)) return CUDA_ERROR_INVALID_HANDLE;
    if (((start->flags | end->flags) & CU_EVENT_DISABLE_TIMING) != 0) return CUDA_ERROR_INVALID_HANDLE;
    if (!start->time || !end->time) return CUDA_ERROR_INVALID_HANDLE;
    *milliseconds = std::chrono::duration<float, std::milli>(*end->time - *start->time).count();
    return CUDA_SUCCESS;
  });
}

DRIVER_API cuEventElapsedTime(float* milliseconds, CUevent start, CUevent end) {
  return cuEventElapsedTime_v2(milliseconds, start, end);
}

DRIVER_API cuStreamWaitEvent(CUstream handle, CUevent event, unsigned) {
  return with_context([&] {
    Stream* stream = find_stream(handle);
    if (stream == nullptr || !events.contains(event)) return CUDA_ERROR_INVALID_HANDLE;
    if (event->capture != nullptr) {
      if (event->capture->ended) return CUDA_ERROR_CAPTURED_EVENT;
      return join_capture(*stream, event->capture, event->progress);
    }
    if (stream->capture != nullptr && event->time) {
      stream->capture->invalidated = true;
      return CUDA_ERROR_STREAM_CAPTURE_ISOLATION;
    }
    return CUDA_SUCCESS;
  });
}
