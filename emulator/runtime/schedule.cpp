#include "runtime/schedule.h"

#include <numeric>
#include <utility>

#include "runtime/block.h"

namespace emulator {

void Warp::start(uint32_t lanes) {
  live = ready = lanes;
  meeting = at_barrier = 0;
  queued = false;
}

// xorshift64*
uint32_t Schedule::draw(uint32_t bound) {
  state_ ^= state_ >> 12;
  state_ ^= state_ << 25;
  state_ ^= state_ >> 27;
  const auto high = static_cast<uint32_t>(state_ * 0x2545f4914f6cdd1d >> 32);
  return static_cast<uint32_t>(uint64_t{high} * bound >> 32);
}

template <class Sequence>
void Schedule::permute(Sequence& sequence) {
  for (size_t i = sequence.size(); i > 1; --i) {
    std::swap(sequence[i - 1], sequence[draw(static_cast<uint32_t>(i))]);
  }
}

void Schedule::start_grid(uint64_t seed) {
  seed_ = seed;
  // Neighbouring seeds shall differ in many bits; the state must not be zero.
  state_ = seed * 0x9e3779b97f4a7c15 | 1;
}

std::vector<uint32_t> Schedule::order_of(size_t count) {
  std::vector<uint32_t> order;
  if (seed_ == 0) return order;
  order.resize(count);
  std::iota(order.begin(), order.end(), 0u);
  permute(order);
  return order;
}

void Schedule::start_block(Warp* warps, unsigned count) {
  queue_.clear();
  for (unsigned i = 0; i < count; ++i) {
    Warp& warp = warps[i];
    std::iota(warp.order.begin(), warp.order.end(), uint8_t{0});
    if (seed_ != 0) permute(warp.order);
    warp.position = 0;
    warp.queued = true;
    queue_.push_back(&warp);
  }
  shuffle();
}

Thread* Schedule::next() {
  while (!queue_.empty()) {
    Warp& warp = *queue_.front();
    if (warp.ready == 0) {
      queue_.pop_front();
      warp.queued = false;
      continue;
    }
    unsigned position = warp.position;
    while ((warp.ready >> warp.order[position] & 1) == 0) position = (position + 1) % 32;
    const unsigned lane = warp.order[position];
    warp.position = (position + 1) % 32;
    warp.ready &= ~(1u << lane);
    return &warp.threads[lane];
  }
  return nullptr;
}

void Schedule::wake(Warp& warp, uint32_t lanes) {
  warp.ready |= lanes;
  if (!warp.queued) {
    warp.queued = true;
    queue_.push_back(&warp);
  } else if (seed_ != 0 && queue_.size() > 1 && queue_.front() == &warp && draw(4) == 0) {
    // Another warp overtakes this one.
    queue_.pop_front();
    queue_.push_back(&warp);
  }
}

void Schedule::shuffle() {
  if (seed_ != 0) permute(queue_);
}

}  // namespace emulator
