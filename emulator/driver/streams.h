// Streams, and the capture of what is issued to them. Work runs at once, in the order in which it is issued; a stream
// that is being captured records it in a graph instead.
#pragma once
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <thread>
#include <vector>

#include "driver/api.h"

// One piece of work, with everything it needs by value.
struct Command {
  CUgraphNodeType type;
  std::function<CUresult()> run;
};

struct Graph {
  std::vector<Command> commands;
};

namespace emulator {

// How many commands of each stream of a capture precede a point.
using Progress = std::map<CUstream, size_t>;

struct Capture {
  CUstream origin;
  CUstreamCaptureMode mode;
  std::thread::id thread;
  Graph graph;
  bool invalidated = false;
  bool ended = false;
};

}  // namespace emulator

struct Stream {
  unsigned flags = 0;
  int priority = 0;
  // The capture that the stream takes part in, and what its next command comes after.
  std::shared_ptr<emulator::Capture> capture;
  emulator::Progress progress;
};

namespace emulator {

// Runs the command or records it.
CUresult issue(CUstream stream, Command command);

// The stream of a handle: the null handles mean the default stream. Null for a handle that is no stream.
Stream* find_stream(CUstream handle);

// The answer to a call that a capture under way forbids, by its mode: CUDA_SUCCESS if none does. A forbidden call also
// invalidates the capture.
CUresult refuse_during_capture();
// Likewise for a call that every capture forbids, and for one that only a capture of `stream` does.
CUresult refuse_during_any_capture();
CUresult refuse_during_capture(Stream& stream);

// The graphs that exist.
extern std::set<CUgraph> graphs;

// Joins `stream` to a capture, after `progress`.
CUresult join_capture(Stream& stream, const std::shared_ptr<Capture>& capture, const Progress& progress);

}  // namespace emulator
