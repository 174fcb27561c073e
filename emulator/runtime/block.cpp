#include "runtime/block.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "runtime/device_memory.h"
#include "runtime/schedule.h"
#include "runtime/shared_memory.h"

uint3 threadIdx;
uint3 blockIdx;
dim3 blockDim;
dim3 gridDim;

namespace emulator {

Thread* running = nullptr;

namespace {

// The block that runs. Its threads' stacks live on from block to block and from launch to launch.
struct Block {
  // The host thread.
  Fiber host;
  std::unique_ptr<Thread[]> threads{new Thread[most_threads]};
  std::array<Warp, most_threads / warp_lanes> warps;
  unsigned thread_count = 0;
  unsigned warp_count = 0;
  // Threads that have not exited, and how many of them wait at the barrier.
  unsigned live = 0;
  unsigned arrived = 0;
  // For how many of those the predicate holds, and what came out of the last barrier that was complete.
  unsigned predicates = 0;
  unsigned barrier_result = 0;
  const char* barrier_name = nullptr;
  Schedule schedule;
  const Launch* launch = nullptr;
  Fault fault;
};

Block block;

std::string coordinates(uint3 v) {
  return "(" + std::to_string(v.x) + ", " + std::to_string(v.y) + ", " + std::to_string(v.z) + ")";
}

std::string hexadecimal(uint32_t value) {
  char text[11];
  snprintf(text, sizeof text, "0x%08x", value);
  return text;
}

// "threads 0-63 wait at __syncthreads (kernel.cu:12)", one line for each group of threads that wait alike.
std::string describe_waits() {
  std::string text;
  std::vector<bool> named(block.thread_count);
  for (unsigned first = 0; first < block.thread_count; ++first) {
    const Thread& one = block.threads[first];
    if (named[first] || one.exited || one.waits_for == nullptr) continue;
    const auto alike = [&](const Thread& other) {
      return !other.exited && other.waits_for == one.waits_for && other.lanes == one.lanes &&
             describe_place(other.where) == describe_place(one.where);
    };
    text += "\n  threads ";
    for (unsigned i = first; i < block.thread_count; ++i) {
      if (!alike(block.threads[i])) continue;
      unsigned last = i;
      while (last + 1 < block.thread_count && alike(block.threads[last + 1])) ++last;
      text += (i == first ? "" : ", ") + std::to_string(i) + (last > i ? "-" + std::to_string(last) : "");
      std::fill(named.begin() + i, named.begin() + last + 1, true);
      i = last;
    }
    text += " wait at " + std::string(one.waits_for) + " (" + describe_place(one.where) + ")";
    if (one.collective != nullptr) text += " for the lanes " + hexadecimal(one.lanes);
  }
  const unsigned exited = block.thread_count - block.live;
  if (exited != 0) text += "\n  " + std::to_string(exited) + " threads have exited";
  return text;
}

// Goes on in the next thread that can run, or in the host thread if there is none.
void dispatch(Fiber& from) {
  Thread* next = block.schedule.next();
  running = next;
  if (next != nullptr) threadIdx = next->index;
  switch_fiber(from, next != nullptr ? next->fiber : block.host);
}

// Makes the running thread wait until something makes it ready again.
void wait(const char* name, const std::source_location& where, const Collective* collective, uint32_t lanes) {
  Thread& thread = *running;
  thread.waits_for = name;
  thread.where = where;
  thread.collective = collective;
  thread.lanes = lanes;
  dispatch(thread.fiber);
  thread.waits_for = nullptr;
}

void complete_barrier() {
  block.barrier_result = block.predicates;
  block.arrived = 0;
  block.predicates = 0;
  for (unsigned w = 0; w < block.warp_count; ++w) {
    Warp& warp = block.warps[w];
    if (warp.at_barrier != 0) block.schedule.wake(warp, std::exchange(warp.at_barrier, 0));
  }
  block.schedule.shuffle();
}

void exit_thread() {
  Thread& thread = *running;
  Warp& warp = *thread.warp;
  thread.copies.drop();
  thread.exited = true;
  warp.live &= ~(1u << thread.lane);
  --block.live;
  for (uint32_t rest = warp.meeting; rest != 0; rest &= rest - 1) {
    const Thread& other = warp.threads[__builtin_ctz(rest)];
    if ((other.lanes >> thread.lane & 1) != 0) {
      raise_fault(FaultCode::launch_failed, "exits while other lanes wait for it:" + describe_waits());
    }
  }
  if (block.live != 0 && block.arrived == block.live) complete_barrier();
  thread.idle = true;
  dispatch(thread.fiber);
}

// A fiber's life: one CUDA thread after another.
void run_threads() {
  fiber_entered();
  for (;;) {
    running->idle = false;
    block.launch->kernel->run(block.launch->params);
    exit_thread();
  }
}

void prepare_threads(const Launch& launch) {
  const dim3 size = launch.block;
  block.thread_count = size.x * size.y * size.z;
  block.warp_count = (block.thread_count + warp_lanes - 1) / warp_lanes;
  for (unsigned i = 0; i < block.thread_count; ++i) {
    Thread& thread = block.threads[i];
    thread.index = {i % size.x, i / size.x % size.y, i / size.x / size.y};
    thread.lane = i % warp_lanes;
    thread.warp = &block.warps[i / warp_lanes];
    thread.warp->threads = &block.threads[i - thread.lane];
  }
}

std::string describe_block() {
  return "kernel " + std::string(block.launch->kernel->name) + ", block " + coordinates(blockIdx);
}

void run_block(uint3 index) {
  blockIdx = index;
  block.live = block.thread_count;
  block.arrived = 0;
  block.predicates = 0;
  for (unsigned i = 0; i < block.thread_count; ++i) {
    Thread& thread = block.threads[i];
    thread.exited = false;
    thread.waits_for = nullptr;
    if (!thread.idle) {
      thread.copies.drop();
      thread.fiber.start(run_threads, i);
    }
  }
  for (unsigned w = 0; w < block.warp_count; ++w) {
    const unsigned lanes = std::min(warp_lanes, block.thread_count - w * warp_lanes);
    block.warps[w].start(lanes == warp_lanes ? ~0u : (1u << lanes) - 1);
  }
  block.schedule.start_block(block.warps.data(), block.warp_count);
  shared_memory.poison();

  dispatch(block.host);
  running = nullptr;
  if (block.fault.code != FaultCode::none) return;
  const std::string where = describe_block() + ": ";
  if (block.live != 0) {
    block.fault = {FaultCode::launch_failed, where + "deadlock:" + describe_waits()};
  } else if (const std::string damage = shared_memory.check_red_zone(); !damage.empty()) {
    block.fault = {FaultCode::illegal_address, where + damage};
  }
}

}  // namespace

void meet(const Collective& collective, uint32_t lanes, void* operand, const std::source_location& where) {
  Thread& thread = *running;
  Warp& warp = *thread.warp;
  const uint32_t own = 1u << thread.lane;
  if ((lanes & own) == 0 || (lanes & ~warp.live) != 0) [[unlikely]] {
    const std::string why = (lanes & own) == 0
                                ? ", which its own lane " + std::to_string(thread.lane) + " is not among"
                                : ", of which " + hexadecimal(lanes & ~warp.live) + " have exited";
    raise_fault(FaultCode::launch_failed, "calls " + std::string(collective.name) + " (" + describe_place(where) +
                                              ") for the lanes " + hexadecimal(lanes) + why);
  }
  warp.operands[thread.lane] = operand;
  if (warp.meeting == 0) {
    warp.first_collective = &collective;
    warp.first_lanes = lanes;
    warp.alike = true;
  }
  warp.alike &= warp.first_collective == &collective && warp.first_lanes == lanes;
  warp.meeting |= own;
  if ((warp.meeting & lanes) != lanes) {
    wait(collective.name, where, &collective, lanes);
    return;
  }
  if (!warp.alike) [[unlikely]] {
    for (uint32_t rest = lanes & ~own; rest != 0; rest &= rest - 1) {
      const Thread& other = warp.threads[__builtin_ctz(rest)];
      if (other.collective == &collective && other.lanes == lanes) continue;
      raise_fault(FaultCode::launch_failed, "calls " + std::string(collective.name) + " (" + describe_place(where) +
                                                ") for the lanes " + hexadecimal(lanes) +
                                                ", some of which wait elsewhere:" + describe_waits());
    }
  }
  collective.combine(warp.operands, lanes);
  warp.meeting &= ~lanes;
  block.schedule.wake(warp, lanes & ~own);
}

unsigned meet_block(const char* name, bool predicate, const std::source_location& where) {
  Thread& thread = *running;
  Warp& warp = *thread.warp;
  if (block.arrived == 0) block.barrier_name = name;
  if (warp.at_barrier == 0) warp.barrier_place = where;
  // bar.sync is an instruction of the whole warp: lanes must not execute different ones.
  if (warp.barrier_place.line() != where.line() || warp.barrier_place.column() != where.column() ||
      (block.barrier_name != name && strcmp(block.barrier_name, name) != 0)) [[unlikely]] {
    raise_fault(FaultCode::launch_failed, "is at " + std::string(name) + " (" + describe_place(where) +
                                              ") while others wait elsewhere:" + describe_waits());
  }
  ++block.arrived;
  block.predicates += predicate;
  if (block.arrived == block.live) {
    complete_barrier();
  } else {
    warp.at_barrier |= 1u << thread.lane;
    wait(name, where, nullptr, 0);
  }
  return block.barrier_result;
}

Fault run_grid(const Launch& launch) {
  block.launch = &launch;
  block.fault = {};
  gridDim = launch.grid;
  blockDim = launch.block;
  shared_memory.resize(launch.shared_bytes);
  prepare_threads(launch);
  block.schedule.start_grid(launch.seed);
  const SignalStack signal_stack;

  const size_t blocks = size_t{launch.grid.x} * launch.grid.y * launch.grid.z;
  const std::vector<uint32_t> order = block.schedule.order_of(blocks);
  for (size_t i = 0; i < blocks && block.fault.code == FaultCode::none; ++i) {
    const auto linear = static_cast<unsigned>(order.empty() ? i : order[i]);
    run_block({linear % launch.grid.x, linear / launch.grid.x % launch.grid.y, linear / launch.grid.x / launch.grid.y});
  }
  std::string damage = device_memory.check_red_zones();
  if (block.fault.code == FaultCode::none && !damage.empty()) {
    block.fault = {FaultCode::illegal_address, "kernel " + std::string(launch.kernel->name) + ": " + damage};
  }
  return std::exchange(block.fault, {});
}

std::string describe_place(const std::source_location& where) {
  const char* slash = strrchr(where.file_name(), '/');
  return std::string(slash != nullptr ? slash + 1 : where.file_name()) + ":" + std::to_string(where.line());
}

std::string describe_running() {
  return describe_block() + ", thread " + coordinates(running->index);
}

void abandon_launch(Fault fault) {
  block.fault = std::move(fault);
  switch_fiber(running->fiber, block.host);
  __builtin_unreachable();
}

void raise_fault(FaultCode code, std::string what) {
  abandon_launch({code, describe_running() + ": " + std::move(what)});
}

}  // namespace emulator
