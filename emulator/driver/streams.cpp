#include "driver/streams.h"

#include <algorithm>
#include <set>
#include <utility>

#include "driver/state.h"

namespace emulator {
namespace {

Stream default_stream;
std::set<CUstream> streams;
std::vector<std::shared_ptr<Capture>> captures;

CUresult invalidate(Capture& capture, CUresult reason) {
  capture.invalidated = true;
  return reason;
}

// Ends the captures for which `forbids` holds.
template <class Predicate>
CUresult refuse_if(Predicate forbids) {
  CUresult result = CUDA_SUCCESS;
  for (const auto& capture : captures) {
    if (forbids(*capture)) result = invalidate(*capture, CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
  }
  return result;
}

void end_capture(const std::shared_ptr<Capture>& capture) {
  capture->ended = true;
  std::erase(captures, capture);
  for (Stream* stream : streams) {
    if (stream->capture != capture) continue;
    stream->capture = nullptr;
    stream->progress.clear();
  }
}

}  // namespace

Stream* find_stream(CUstream handle) {
  // Null, CU_STREAM_LEGACY and CU_STREAM_PER_THREAD.
  if (reinterpret_cast<uintptr_t>(handle) <= 2) return &default_stream;
  return streams.contains(handle) ? handle : nullptr;
}

CUresult issue(CUstream handle, Command command) {
  Stream* stream = find_stream(handle);
  if (stream == nullptr) return CUDA_ERROR_INVALID_HANDLE;
  if (stream->capture != nullptr) {
    Capture& capture = *stream->capture;
    if (capture.invalidated) return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
    capture.graph.commands.push_back(std::move(command));
    ++stream->progress[stream];
    return CUDA_SUCCESS;
  }
  if (stream == &default_stream) {
    // The default stream waits for all others, but for those that ask not to be waited for.
    for (const auto& capture : captures) {
      if ((capture->origin->flags & CU_STREAM_NON_BLOCKING) == 0) {
        return invalidate(*capture, CUDA_ERROR_STREAM_CAPTURE_IMPLICIT);
      }
    }
  }
  return command.run();
}

CUresult refuse_during_capture() {
  return refuse_if([](const Capture& capture) {
    return capture.mode == CU_STREAM_CAPTURE_MODE_GLOBAL ||
           (capture.mode == CU_STREAM_CAPTURE_MODE_THREAD_LOCAL && capture.thread == std::this_thread::get_id());
  });
}

CUresult refuse_during_any_capture() {
  return refuse_if([](const Capture&) { return true; });
}

CUresult refuse_during_capture(Stream& stream) {
  if (stream.capture == nullptr) return CUDA_SUCCESS;
  return invalidate(*stream.capture, CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
}

CUresult join_capture(Stream& stream, const std::shared_ptr<Capture>& capture, const Progress& progress) {
  if (stream.capture == nullptr) stream.capture = capture;
  if (stream.capture != capture) {
    stream.capture->invalidated = true;
    return invalidate(*capture, CUDA_ERROR_STREAM_CAPTURE_MERGE);
  }
  for (const auto& [other, commands] : progress) {
    size_t& known = stream.progress[other];
    known = std::max(known, commands);
  }
  return CUDA_SUCCESS;
}

}  // namespace emulator

using namespace emulator;

DRIVER_API cuStreamCreateWithPriority(CUstream* stream, unsigned flags, int priority) {
  return with_context([&] {
    if (stream == nullptr || flags > CU_STREAM_NON_BLOCKING) return CUDA_ERROR_INVALID_VALUE;
    *stream = new Stream{flags, priority, nullptr, {}};
    streams.insert(*stream);
    return CUDA_SUCCESS;
  });
}

DRIVER_API cuStreamCreate(CUstream* stream, unsigned flags) { return cuStreamCreateWithPriority(stream, flags, 0); }

DRIVER_API cuStreamDestroy_v2(CUstream stream) {
  return with_context([&] {
    if (!streams.contains(stream)) return CUDA_ERROR_INVALID_HANDLE;
    if (stream->capture != nullptr) {
      stream->capture->invalidated = true;
      if (stream->capture->origin == stream) end_capture(stream->capture);
    }
    streams.erase(stream);
    delete stream;
    return CUDA_SUCCESS;
  });
}

DRIVER_API cuStreamSynchronize(CUstream handle) {
  return with_context([&] {
    Stream* stream = find_stream(handle);
    if (stream == nullptr) return CUDA_ERROR_INVALID_HANDLE;
    count_synchronization();
    return refuse_during_capture(*stream);
  });
}

DRIVER_API cuStreamQuery(CUstream handle) {
  return with_context([&] {
    Stream* stream = find_stream(handle);
    return stream == nullptr ? CUDA_ERROR_INVALID_HANDLE : refuse_during_capture(*stream);
  });
}

DRIVER_API cuStreamGetPriority(CUstream handle, int* priority) {
  return with_context([&] {
    const Stream* stream = find_stream(handle);
    if (stream == nullptr) return CUDA_ERROR_INVALID_HANDLE;
    *priority = stream->priority;
    return CUDA_SUCCESS;
  });
}

DRIVER_API cuLaunchHostFunc(CUstream stream, CUhostFn function, void* argument) {
  return with_context([&] {
    return issue(stream, {CU_GRAPH_NODE_TYPE_HOST, [=] {
                            function(argument);
                            return CUDA_SUCCESS;
                          }});
  });
}

// ---- capture ----

DRIVER_API cuStreamBeginCapture_v2(CUstream handle, CUstreamCaptureMode mode) {
  return with_context([&] {
    Stream* stream = find_stream(handle);
    if (stream == nullptr) return CUDA_ERROR_INVALID_HANDLE;
    if (stream == &default_stream) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
    if (mode > CU_STREAM_CAPTURE_MODE_RELAXED) return CUDA_ERROR_INVALID_VALUE;
    if (stream->capture != nullptr) return CUDA_ERROR_ILLEGAL_STATE;
    stream->capture = std::make_shared<Capture>();
    stream->capture->origin = stream;
    stream->capture->mode = mode;
    stream->capture->thread = std::this_thread::get_id();
    captures.push_back(stream->capture);
    return CUDA_SUCCESS;
  });
}

DRIVER_API cuStreamEndCapture(CUstream handle, CUgraph* graph) {
  return with_context([&]() -> CUresult {
    Stream* stream = find_stream(handle);
    if (stream == nullptr) return CUDA_ERROR_INVALID_HANDLE;
    const std::shared_ptr<Capture> capture = stream->capture;
    if (capture == nullptr) return CUDA_ERROR_ILLEGAL_STATE;
    *graph = nullptr;
    if (capture->origin != stream) return invalidate(*capture, CUDA_ERROR_STREAM_CAPTURE_UNMATCHED);
    if (capture->mode != CU_STREAM_CAPTURE_MODE_RELAXED && capture->thread != std::this_thread::get_id()) {
      return invalidate(*capture, CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD);
    }
    const bool unjoined = std::ranges::any_of(streams, [&](Stream* other) {
      return other->capture == capture && other->progress[other] > stream->progress[other];
    });
    end_capture(capture);
    if (capture->invalidated) return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
    if (unjoined) return CUDA_ERROR_STREAM_CAPTURE_UNJOINED;
    *graph = new Graph{std::move(capture->graph)};
    graphs.insert(*graph);
    return CUDA_SUCCESS;
  });
}

DRIVER_API cuStreamIsCapturing(CUstream handle, CUstreamCaptureStatus* status) {
  return with_context([&] {
    const Stream* stream = find_stream(handle);
    if (stream == nullptr) return CUDA_ERROR_INVALID_HANDLE;
    *status = stream->capture == nullptr         ? CU_STREAM_CAPTURE_STATUS_NONE
              : stream->capture->invalidated ? CU_STREAM_CAPTURE_STATUS_INVALIDATED
                                             : CU_STREAM_CAPTURE_STATUS_ACTIVE;
    return CUDA_SUCCESS;
  });
}
