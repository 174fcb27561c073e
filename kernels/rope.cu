// Rotary positions (Su et al. 2021) and the store into the KV cache, in one pass over q | k | v.
//
// Eight lanes serve a head: those of q and k are normalised where the model does so, and rotated in place; those of k
// and v go to the page and place of their row. A lane holds pairs of accesses, elements i and i + rotary_dim / 2, so
// that a rotation stays within it; the elements that are not rotated form pairs in the same way.
//
// Grid: (rows, blocks of LORAMUX_ROPE_HEADS heads of q | k | v).
#include <device.cuh>
#include <params.h>
#include <values.cuh>

namespace {

constexpr uint32_t threads = LORAMUX_ROPE_THREADS, heads_of_block = LORAMUX_ROPE_HEADS, lanes = 8;
static_assert(threads == heads_of_block * lanes);

// One head of one row.
template <uint32_t access>
class Head {
 public:
  __device__ __forceinline__ Head(const RopeStoreParams& p, uint32_t row, uint32_t head)
      : p_(p), step_row_(p.step_rows[row]), head_(head), lane_(threadIdx.x % lanes),
        data_(p.qkv + size_t(row) * p.stride + size_t(head) * p.head_dim) {}

  __device__ __forceinline__ void run() const {
    if (head_ < p_.heads + p_.kv_heads) {
      const bool is_key = head_ >= p_.heads;
      turn(is_key ? p_.k_norm : p_.q_norm, is_key ? cached(p_.keys, head_ - p_.heads) : nullptr);
    } else {
      copy_to(cached(p_.values, head_ - p_.heads - p_.kv_heads));
    }
  }

 private:
  // Where the row's vector of this kv head lies in the cache.
  __device__ __forceinline__ element* cached(element* pages, uint32_t kv_head) const {
    const size_t page = step_row_.cache_slot / LORAMUX_PAGE;
    const uint32_t place = step_row_.cache_slot % LORAMUX_PAGE;
    return pages + ((page * p_.kv_heads + kv_head) * LORAMUX_PAGE + place) * p_.head_dim;
  }

  __device__ __forceinline__ void copy_to(element* to) const {
    for (uint32_t i = lane_ * access; i < p_.head_dim; i += lanes * access) copy<access>(to + i, data_ + i);
  }

  // Normalises by `norm` and rotates; writes the result in place, and to `cache` where there is one.
  __device__ __forceinline__ void turn(const float* norm, element* cache) const {
    const float factor = norm == nullptr ? 1.0f : norm_factor();
    const uint32_t half = p_.rotary_dim / 2, rest = (p_.head_dim - p_.rotary_dim) / 2;
    const size_t angles = (size_t(step_row_.rotary_variant) * p_.positions + step_row_.position) * half;
    for (uint32_t i = lane_ * access; i < p_.head_dim / 2; i += lanes * access) {
      const bool rotated = i < half;
      // Past the rotated half, i − half counts elements from rotary_dim on.
      const uint32_t at_low = rotated ? i : i + half, at_high = at_low + (rotated ? half : rest);
      Values<access> low = load<access>(data_ + at_low), high = load<access>(data_ + at_high);
      if (norm != nullptr) {
        scale(low, factor, norm + at_low);
        scale(high, factor, norm + at_high);
      }
      if (rotated) rotate(low, high, load<access>(p_.cos + angles + i), load<access>(p_.sin + angles + i));
      store<access>(data_ + at_low, low);
      store<access>(data_ + at_high, high);
      if (cache != nullptr) {
        store<access>(cache + at_low, low);
        store<access>(cache + at_high, high);
      }
    }
  }

  // 1 / √(mean(x²) + ε) of the head: each lane's squares, then over the lanes.
  __device__ __forceinline__ float norm_factor() const {
    float squares = 0.0f;
    for (uint32_t i = lane_ * access; i < p_.head_dim; i += lanes * access) {
      const Values<access> values = load<access>(data_ + i);
#pragma unroll
      for (uint32_t j = 0; j < access; ++j) squares = fmaf(values.at[j], values.at[j], squares);
    }
    const uint32_t of_head = 0xffu << (threadIdx.x % 32 / lanes * lanes);
#pragma unroll
    for (uint32_t distance = lanes / 2; distance > 0; distance /= 2)
      squares += __shfl_xor_sync(of_head, squares, distance);
    return rsqrtf(squares / static_cast<float>(p_.head_dim) + p_.epsilon);
  }

  static __device__ __forceinline__ void scale(Values<access>& values, float factor, const float* norm) {
    const Values<access> weight = load<access>(norm);
#pragma unroll
    for (uint32_t j = 0; j < access; ++j) values.at[j] = values.at[j] * factor * weight.at[j];
  }

  static __device__ __forceinline__ void rotate(Values<access>& low, Values<access>& high, const Values<access>& cos,
                                                const Values<access>& sin) {
#pragma unroll
    for (uint32_t j = 0; j < access; ++j) {
      const float x = low.at[j], y = high.at[j];
      low.at[j] = x * cos.at[j] - y * sin.at[j];
      high.at[j] = y * cos.at[j] + x * sin.at[j];
    }
  }

  const RopeStoreParams& p_;
  const StepRow step_row_;
  const uint32_t head_, lane_;
  element* const data_;
};

}  // namespace

KERNEL(rope_store, RopeStoreParams, threads, 8) {
  ptx::allow_next_grid();
  ptx::wait_for_previous_grid();
  const uint32_t head = blockIdx.y * heads_of_block + threadIdx.x / lanes;
  if (blockIdx.x >= *p.rows || head >= p.heads + 2 * p.kv_heads) return;
  if (p.access == 8)
    Head<8>(p, blockIdx.x, head).run();
  else
    Head<1>(p, blockIdx.x, head).run();
}
