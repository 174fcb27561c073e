// From a row of logits to a token, and how likely it is (see src/backend/sampling).
//
// Nothing is sorted and no list of candidates is kept: a filter is a cutoff in the order of weights, found by radix
// selection, and a draw is a search for the place where a running sum passes a target. Weights are summed as whole
// numbers, which have no order: the atomic additions of any schedule give one result. All other arithmetic is spelled
// out in single roundings, as the CPU backend does it: both draw the same token.
//
// A pass over the vocabulary finds the row in L2. Their number: one for the most likely token, two more for a random
// one, three each for top_k and top_p, three for log-probabilities and four for the most likely tokens among them.
//
// Grid: (draws).
#include <device.cuh>
#include <params.h>
#include <ptx.cuh>

namespace {

constexpr uint32_t threads = LORAMUX_SAMPLE_THREADS, warps = threads / 32;
static_assert(warps == 32, "the lanes of a warp stand for the warps");
constexpr uint32_t bucket_bits = 11, all = ~0u;
// Values that a thread reads at a time: 32 KiB on their way to a multiprocessor hide the latency of L2.
constexpr uint32_t batch = 8;

struct Storage {
  uint64_t of_warp[warps];
  // The halves of a bucket's sum: shared memory adds 32 bits at a time.
  uint32_t low[1 << bucket_bits], high[1 << bucket_bits];
  uint64_t top[LORAMUX_SAMPLE_TOP];
  uint32_t top_count;
};
static_assert(sizeof(Storage) == LORAMUX_SAMPLE_SHARED_BYTES);

// exp(x) for x ≤ 0, within two units in the last place; 0 below −87 and for NaN.
//
// x = n ln 2 + r with whole n and |r| ≤ ln 2 / 2, so that exp(x) = 2ⁿ Σ rᵏ/k! needs eight terms.
__device__ __forceinline__ float exp_of_negative(float x) {
  constexpr float lowest = -87.0f, log2_e = 1.44269504f, ln2_high = 355.0f / 512.0f, ln2_low = -2.1219444e-4f;
  // Adding 1.5 · 2²³ rounds to a whole number and leaves it in the low bits.
  constexpr float round = 12582912.0f;
  constexpr float factors[] = {1.0f / 720.0f, 1.0f / 120.0f, 1.0f / 24.0f, 1.0f / 6.0f, 0.5f, 1.0f, 1.0f};
  const float bounded = x > lowest ? x : lowest;
  const float rounded = __fadd_rn(__fmul_rn(bounded, log2_e), round);
  const float n = __fsub_rn(rounded, round);
  const float r = __fsub_rn(__fsub_rn(bounded, __fmul_rn(n, ln2_high)), __fmul_rn(n, ln2_low));
  float series = 1.0f / 5040.0f;
#pragma unroll
  for (uint32_t i = 0; i < 7; ++i) series = __fadd_rn(__fmul_rn(series, r), factors[i]);
  const float power = __uint_as_float((__float_as_uint(rounded) << 23) + __float_as_uint(1.0f));
  return x > lowest ? __fmul_rn(series, power) : 0.0f;
}

// A weight in [0, 1] as a whole number, to the nearest, ties to even.
__device__ __forceinline__ uint64_t units(float weight) {
  return __float2ull_rn(__fmul_rn(weight, static_cast<float>(1ull << LORAMUX_SAMPLE_UNIT_BITS)));
}

// A number that orders as the logit does; 0 and −0 are one.
__device__ __forceinline__ uint32_t order_of(float logit) {
  const uint32_t bits = logit == 0.0f ? 0 : __float_as_uint(logit);
  return bits >> 31 != 0 ? ~bits : bits | 1u << 31;
}

__device__ __forceinline__ float logit_of(uint32_t order) {
  return __uint_as_float(order >> 31 != 0 ? order & ~(1u << 31) : ~order);
}

// NaN counts as −inf: log-probabilities report, a draw refuses.
__device__ __forceinline__ uint32_t order_of_raw(float logit) { return order_of(logit == logit ? logit : -INFINITY); }

// What has no place among logits stands above all.
__device__ __forceinline__ uint32_t order_of_checked(float logit) { return logit < INFINITY ? order_of(logit) : all; }

// Of two tokens the one with the larger order has the larger number, and on a tie the one with the lower id.
__device__ __forceinline__ uint64_t ranked(uint32_t order, uint32_t token) { return uint64_t{order} << 32 | ~token; }
__device__ __forceinline__ uint32_t token_of(uint64_t ranked) { return ~static_cast<uint32_t>(ranked); }

template <class Operation>
__device__ __forceinline__ uint64_t combine_warp(uint64_t value, Operation operation) {
#pragma unroll
  for (uint32_t distance = 16; distance > 0; distance /= 2)
    value = operation(value, __shfl_xor_sync(~0u, value, distance));
  return value;
}

// A prefix of all tokens, ordered by key and then by id: those with larger keys than `key`, and those with the same up
// to the id `last`.
struct Cutoff {
  uint32_t key, last;
  __device__ __forceinline__ bool keeps(uint32_t other, uint32_t token) const {
    return other > key || (other == key && token <= last);
  }
};

// Where a running sum passes a target.
struct Place {
  uint32_t index;
  // The target, less the sum before the index; and what the index adds to the sum.
  uint64_t left, value;
};

class Sampling {
 public:
  __device__ __forceinline__ Sampling(const SampleParams& p)
      : p_(p), draw_(p.draws[blockIdx.x]), result_(p.results[blockIdx.x]), storage_(shared_storage<Storage>()),
        logits_(p.logits + size_t(draw_.row) * p.stride), scratch_(p.scratch + size_t(blockIdx.x) * p.vocabulary) {}

  __device__ __forceinline__ void run() {
    if (draw_.reports != 0) report_row();
    uint32_t token = draw_.token;
    if (draw_.mode != LORAMUX_GIVEN && !choose(token)) return;
    if (draw_.reports != 0) report_token(token);
    if (threadIdx.x == 0) {
      result_.status = LORAMUX_SAMPLED;
      result_.token = token;
    }
  }

 private:
  // Largest logit, sum and most likely tokens.
  __device__ __forceinline__ void report_row() const {
    const float largest = logit_of(static_cast<uint32_t>(largest_ranked(logits_, order_of_raw) >> 32));
    const uint64_t sum = sum_of_row([&](float logit) {
      return units(exp_of_negative(logit == largest ? 0.0f : __fsub_rn(logit, largest)));
    });
    if (threadIdx.x == 0) {
      result_.largest = largest;
      result_.sum = sum;
    }
    if (draw_.top == 0) return;

    Cutoff cutoff = {0, all};
    shorten(
        cutoff, logits_, [](uint32_t, float logit) { return order_of_raw(logit); },
        [](uint32_t) { return uint64_t{1}; }, [&](uint64_t) { return uint64_t{draw_.top} - 1; });
    if (threadIdx.x == 0) storage_.top_count = 0;
    __syncthreads();
    for_tokens(logits_, [&](uint32_t token, float logit) {
      const uint32_t order = order_of_raw(logit);
      if (cutoff.keeps(order, token)) storage_.top[atomicAdd(&storage_.top_count, 1)] = ranked(order, token);
    });
    __syncthreads();
    // They came in any order: each goes to where as many are before it.
    if (threadIdx.x >= 32) return;
    const uint64_t own = threadIdx.x < draw_.top ? storage_.top[threadIdx.x] : 0;
    uint32_t before = 0;
#pragma unroll
    for (uint32_t lane = 0; lane < 32; ++lane) before += __shfl_sync(~0u, own, lane) > own;
    if (threadIdx.x < draw_.top) result_.top[before] = {token_of(own), logits_[token_of(own)]};
  }

  // The token's own logit and its rank.
  __device__ __forceinline__ void report_token(uint32_t token) const {
    const float own = token < p_.vocabulary ? logits_[token] : -INFINITY;
    const uint32_t order = order_of_raw(own);
    const uint64_t rank = sum_of_row([&](float logit) { return uint64_t{order_of_raw(logit) >= order}; });
    if (threadIdx.x == 0) {
      result_.logit = own;
      result_.rank = static_cast<uint32_t>(rank);
    }
  }

  // The next token, or the reason why there is none.
  __device__ __forceinline__ bool choose(uint32_t& token) const {
    const float* logits = changed_logits();
    const uint64_t best = largest_ranked(logits, order_of_checked);
    const auto order = static_cast<uint32_t>(best >> 32);
    token = token_of(best);
    if (order == all || order == order_of(-INFINITY)) {
      if (threadIdx.x == 0) {
        result_.status = order == all ? LORAMUX_NOT_FINITE : LORAMUX_NO_TOKEN_LEFT;
        result_.token = token;
        result_.value = logits[token];
      }
      return false;
    }
    if (draw_.mode == LORAMUX_RANDOM) {
      weigh(logits, logit_of(order));
      token = draw_from_kept();
    }
    return true;
  }

  // Applies biases, the ban and penalties.
  __device__ __forceinline__ const float* changed_logits() const {
    if (draw_.biases + draw_.banned + draw_.seen == 0) return logits_;
    for_tokens(logits_, [&](uint32_t token, float logit) { scratch_[token] = logit; });
    __syncthreads();
    const SampleEntry* entries = p_.entries + draw_.first_entry;
    for (uint32_t i = threadIdx.x; i < draw_.biases; i += threads) {
      float& logit = scratch_[entries[i].token];
      logit = __fadd_rn(logit, __uint_as_float(entries[i].value));
    }
    __syncthreads();
    entries += draw_.biases;
    for (uint32_t i = threadIdx.x; i < draw_.banned; i += threads) scratch_[entries[i].token] = -INFINITY;
    __syncthreads();
    entries += draw_.banned;
    for (uint32_t i = threadIdx.x; i < draw_.seen; i += threads) {
      float& logit = scratch_[entries[i].token];
      const float penalty = draw_.repetition_penalty;
      float changed = logit > 0.0f ? __fdiv_rn(logit, penalty) : __fmul_rn(logit, penalty);
      if (const uint32_t count = entries[i].value; count > 0) {
        const float frequency = __fmul_rn(draw_.frequency_penalty, __uint2float_rn(count));
        changed = __fsub_rn(changed, __fadd_rn(frequency, draw_.presence_penalty));
      }
      logit = changed;
    }
    __syncthreads();
    return scratch_;
  }

  __device__ __forceinline__ void weigh(const float* logits, float largest) const {
    for_tokens(logits, [&](uint32_t token, float logit) {
      scratch_[token] = exp_of_negative(__fdiv_rn(__fsub_rn(logit, largest), draw_.temperature));
    });
    __syncthreads();
  }

  // Filters the weights and draws from what they keep.
  __device__ __forceinline__ uint32_t draw_from_kept() const {
    // The bits of weights order as they do. A weight of 0 is never kept.
    Cutoff cutoff = {draw_.min_p > 0.0f ? __float_as_uint(draw_.min_p) : 1, all};
    const auto kept = [&](uint32_t token, float weight) {
      const uint32_t bits = __float_as_uint(weight);
      return cutoff.keeps(bits, token) ? bits : 0;
    };
    const auto units_of = [](uint32_t bits) { return units(__uint_as_float(bits)); };
    if (draw_.top_k != all) {
      shorten(
          cutoff, scratch_, kept, [](uint32_t) { return uint64_t{1}; },
          [&](uint64_t) { return uint64_t{draw_.top_k} - 1; });
    }
    if (draw_.top_p != ~uint64_t{0}) {
      shorten(cutoff, scratch_, kept, units_of, [&](uint64_t total) {
        // The least sum is rounded up, and at least one unit; it is reached where one unit less is passed.
        const uint64_t below = __umul64hi(draw_.top_p, total);
        return draw_.top_p * total != 0 || below == 0 ? below : below - 1;
      });
    }
    const auto target_of = [&](uint64_t total) { return __umul64hi(draw_.fraction, total); };
    return find(p_.vocabulary, target_of, [&](uint32_t token) { return units_of(kept(token, scratch_[token])); }).index;
  }

  // Shortens a prefix to end where the running sum of `value_of(key)` passes a target; leaves it where the sum never
  // does. `key_of(token, row[token])` is 0 for tokens outside of the prefix, and `target_of` is given the whole sum.
  //
  // Three passes narrow down the last key by 11, 11 and 10 bits, each with a sum for every value of those bits.
  template <class KeyOf, class ValueOf, class TargetOf>
  __device__ __forceinline__ void shorten(Cutoff& cutoff, const float* row, KeyOf key_of, ValueOf value_of,
                                          TargetOf target_of) const {
    uint32_t key = 0, shift = 32;
    Place place = {0, 0, 0};
#pragma unroll 1
    for (uint32_t pass = 0; pass < 3; ++pass) {
      const uint32_t bits = pass < 2 ? bucket_bits : 32 - 2 * bucket_bits, last = (1u << bits) - 1;
      shift -= bits;
      for (uint32_t i = threadIdx.x; i <= last; i += threads) storage_.low[i] = storage_.high[i] = 0;
      __syncthreads();
      for_tokens(row, [&](uint32_t token, float of_row) {
        const uint32_t of_token = key_of(token, of_row);
        // Only tokens that share the bits found so far.
        if (of_token != 0 && uint64_t{of_token ^ key} >> (shift + bits) == 0)
          add_to_bucket(of_token >> shift & last, value_of(of_token));
      });
      __syncthreads();
      place = find(
          last + 1, [&](uint64_t total) { return pass == 0 ? target_of(total) : place.left; },
          [&](uint32_t i) { return bucket(last - i); });
      if (place.index > last) return;
      key |= (last - place.index) << shift;
    }
    // Of the tokens with this key those up to some id belong to the prefix: all of them, if nobody ties for the place.
    const uint64_t value = value_of(key), before = place.left / value;
    uint32_t id = key == cutoff.key ? cutoff.last : all;
    if ((before + 1) * value < place.value) {
      const auto target = [&](uint64_t) { return before; };
      const auto ties = [&](uint32_t token) { return uint64_t{key_of(token, row[token]) == key}; };
      id = find(p_.vocabulary, target, ties).index;
    }
    cutoff = {key, id};
  }

  // The first index at which the running sum of `value_of(index)` passes a target; `length` where it never does.
  // `target_of` is given the whole sum.
  //
  // Each warp sums a part; the part in which the target lies is divided among the warps in turn.
  template <class TargetOf, class ValueOf>
  __device__ __forceinline__ Place find(uint32_t length, TargetOf target_of, ValueOf value_of) const {
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    uint32_t first = 0, rest = length;
    uint64_t target = 0, value = 0;
#pragma unroll 1
    do {
      const uint32_t part = (rest + warps - 1) / warps, end = min((warp + 1) * part, rest);
      uint64_t sum = 0;
#pragma unroll 8
      for (uint32_t i = warp * part + lane; i < end; i += 32) sum += value_of(first + i);
      sum = combine_warp(sum, [](uint64_t a, uint64_t b) { return a + b; });
      if (lane == 0) storage_.of_warp[warp] = sum;
      __syncthreads();
      const uint64_t of_part = storage_.of_warp[lane];
      uint64_t up_to = of_part;
#pragma unroll
      for (uint32_t distance = 1; distance < 32; distance *= 2) {
        const uint64_t before = __shfl_up_sync(~0u, up_to, distance);
        if (lane >= distance) up_to += before;
      }
      if (rest == length) {
        const uint64_t total = __shfl_sync(~0u, up_to, 31);
        target = target_of(total);
        if (target >= total) {
          __syncthreads();
          return {length, target, 0};
        }
      }
      const int chosen = __ffs(__ballot_sync(~0u, up_to > target)) - 1;
      target -= __shfl_sync(~0u, up_to - of_part, chosen);
      value = __shfl_sync(~0u, of_part, chosen);
      first += chosen * part;
      rest = min(part, rest - chosen * part);
      __syncthreads();
    } while (rest > 1);
    return {first, target, value};
  }

  template <class OrderOf>
  __device__ __forceinline__ uint64_t largest_ranked(const float* row, OrderOf order_of_logit) const {
    uint64_t largest = 0;
    for_tokens(row, [&](uint32_t token, float logit) { largest = max(largest, ranked(order_of_logit(logit), token)); });
    return combine_block(largest, [](uint64_t a, uint64_t b) { return max(a, b); });
  }

  template <class ValueOf>
  __device__ __forceinline__ uint64_t sum_of_row(ValueOf value_of) const {
    uint64_t sum = 0;
    for_tokens(logits_, [&](uint32_t, float logit) { sum += value_of(logit); });
    return combine_block(sum, [](uint64_t a, uint64_t b) { return a + b; });
  }

  template <class Operation>
  __device__ __forceinline__ uint64_t combine_block(uint64_t value, Operation operation) const {
    value = combine_warp(value, operation);
    if (threadIdx.x % 32 == 0) storage_.of_warp[threadIdx.x / 32] = value;
    __syncthreads();
    value = combine_warp(storage_.of_warp[threadIdx.x % 32], operation);
    __syncthreads();
    return value;
  }

  __device__ __forceinline__ void add_to_bucket(uint32_t index, uint64_t value) const {
    const auto low = static_cast<uint32_t>(value);
    // Whoever carries adds the carry: in the end it does not matter who did.
    const uint32_t carry = atomicAdd(&storage_.low[index], low) + low < low;
    if (const uint32_t high = static_cast<uint32_t>(value >> 32) + carry; high != 0)
      atomicAdd(&storage_.high[index], high);
  }

  __device__ __forceinline__ uint64_t bucket(uint32_t index) const {
    return uint64_t{storage_.high[index]} << 32 | storage_.low[index];
  }

  // Visits every token with its value in `row`. Values are read ahead of what the visits of others write.
  template <class Visit>
  __device__ __forceinline__ void for_tokens(const float* row, Visit visit) const {
#pragma unroll 1
    for (uint32_t first = threadIdx.x; first < p_.vocabulary; first += threads * batch) {
      float values[batch];
#pragma unroll
      for (uint32_t i = 0; i < batch; ++i)
        if (const uint32_t token = first + i * threads; token < p_.vocabulary) values[i] = row[token];
#pragma unroll
      for (uint32_t i = 0; i < batch; ++i)
        if (const uint32_t token = first + i * threads; token < p_.vocabulary) visit(token, values[i]);
    }
  }

  const SampleParams& p_;
  const SampleDraw& draw_;
  SampleResult& result_;
  Storage& storage_;
  const float* const logits_;
  float* const scratch_;
};

}  // namespace

KERNEL(sample, SampleParams, threads, 1) {
  ptx::allow_next_grid();
  ptx::wait_for_previous_grid();
  Sampling(p).run();
}
