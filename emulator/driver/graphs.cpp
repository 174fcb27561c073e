// Graphs: the commands of a capture, and their replay.
#include <set>

#include "driver/state.h"
#include "driver/streams.h"

struct GraphExec {
  std::vector<Command> commands;
};

using namespace emulator;

std::set<CUgraph> emulator::graphs;

namespace {

std::set<CUgraphExec> executables;

}  // namespace

DRIVER_API cuGraphGetNodes(CUgraph graph, CUgraphNode* nodes, size_t* count) {
  return with_context([&] {
    if (!graphs.contains(graph)) return CUDA_ERROR_INVALID_VALUE;
    if (nodes != nullptr) {
      for (size_t i = 0; i < *count; ++i) nodes[i] = i < graph->commands.size() ? &graph->commands[i] : nullptr;
    }
    *count = graph->commands.size();
    return CUDA_SUCCESS;
  });
}

DRIVER_API cuGraphNodeGetType(CUgraphNode node, CUgraphNodeType* type) {
  return with_context([&] {
    *type = node->type;
    return CUDA_SUCCESS;
  });
}

DRIVER_API cuGraphDestroy(CUgraph graph) {
  return with_context([&] {
    if (graphs.erase(graph) == 0) return CUDA_ERROR_INVALID_VALUE;
    delete graph;
    return CUDA_SUCCESS;
  });
}

DRIVER_API cuGraphInstantiateWithFlags(CUgraphExec* executable, CUgraph graph, unsigned long long) {
  return with_context([&] {
    if (executable == nullptr || !graphs.contains(graph)) return CUDA_ERROR_INVALID_VALUE;
    *executable = new GraphExec{graph->commands};
    executables.insert(*executable);
    return CUDA_SUCCESS;
  });
}

DRIVER_API cuGraphExecDestroy(CUgraphExec executable) {
  return with_context([&] {
    if (executables.erase(executable) == 0) return CUDA_ERROR_INVALID_VALUE;
    delete executable;
    return CUDA_SUCCESS;
  });
}

DRIVER_API cuGraphUpload(CUgraphExec executable, CUstream stream) {
  return with_context([&] {
    if (!executables.contains(executable)) return CUDA_ERROR_INVALID_VALUE;
    return find_stream(stream) == nullptr ? CUDA_ERROR_INVALID_HANDLE : CUDA_SUCCESS;
  });
}

// In a capture of its own the graph becomes part of the graph that is being captured.
DRIVER_API cuGraphLaunch(CUgraphExec executable, CUstream stream) {
  return with_context([&] {
    if (!executables.contains(executable)) return CUDA_ERROR_INVALID_VALUE;
    for (const Command& command : executable->commands) {
      if (const CUresult result = issue(stream, command); result != CUDA_SUCCESS) return result;
    }
    return CUDA_SUCCESS;
  });
}
