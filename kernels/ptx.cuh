// Every PTX instruction the kernels use, one named function each; no other file has inline assembly. The emulator has
// a file of the same name with the host's version of each. Numbers are sections of the PTX ISA 9.0.
#pragma once
#include <element_type.h>
#include <stdint.h>

// The element type as instructions spell it.
#if defined(LORAMUX_F16)
#define PTX_ELEMENT "f16"
#else
#define PTX_ELEMENT "bf16"
#endif

namespace ptx {
inline namespace ELEMENT {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// ---- asynchronous copies, global to shared (9.7.9.25.3) ----

// 16 bytes, past L1; zeros where `valid` is false, and then `global` is not read.
__device__ __forceinline__ void copy_async_16(void* shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;"
               :
               : "r"(shared_address(shared)), "l"(global), "r"(valid ? 16 : 0)
               : "memory");
}

// An L2 policy for data that is read once: it is evicted before everything else.
__device__ __forceinline__ uint64_t evict_first_policy() {
  uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// copy_async_16 under an L2 policy.
__device__ __forceinline__ void copy_async_16(void* shared, const void* global, bool valid, uint64_t policy) {
  asm volatile("cp.async.cg.shared.global.L2::cache_hint.L2::128B [%0], [%1], 16, %2, %3;"
               :
               : "r"(shared_address(shared)), "l"(global), "r"(valid ? 16 : 0), "l"(policy)
               : "memory");
}

// Closes the group of copies that this thread began since the last commit.
__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most `newest` of this thread's groups are under way. Other threads' copies need a barrier besides.
template <int newest>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(newest) : "memory");
}

// ---- tensor cores (9.7.14.5) ----

// Four 8x8 matrices of 16-bit values. Lane l gives the address of row l % 8 of matrix l / 8, 16 bytes; it receives in
// fragment[i] the values 2·(l % 4) and 2·(l % 4) + 1 of row l / 4 of matrix i.
__device__ __forceinline__ void load_matrix_x4(uint32_t (&fragment)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
               : "r"(shared_address(row))
               : "memory");
}

// The same with each matrix transposed: the lane receives rows 2·(l % 4) and 2·(l % 4) + 1 of column l / 4.
__device__ __forceinline__ void load_matrix_x4_transposed(uint32_t (&fragment)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
               : "r"(shared_address(row))
               : "memory");
}

// D[16x8] += A[16x16] · B[16x8], elements in, fp32 sums. With g = lane / 4 and q = 2·(lane % 4):
// a: A[g][q..], A[g+8][q..], A[g][q+8..], A[g+8][q+8..], pairs along k; b: B[q..][g], B[q+8..][g], pairs along k;
// sum: D[g][q], D[g][q+1], D[g+8][q], D[g+8][q+1].
__device__ __forceinline__ void mma_16x8x16(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32." PTX_ELEMENT "." PTX_ELEMENT ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// ---- arithmetic (9.7.3.21) ----

// 2^x to 2 ulp; subnormal numbers are zeros.
__device__ __forceinline__ float exp2(float x) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
  return power;
}

// ---- conversion (9.7.9.21) ----

// Two floats rounded to nearest even, `low` first in memory. In fp16, what is too large becomes infinite.
__device__ __forceinline__ uint32_t pack(float low, float high) {
  uint32_t pair;
  asm("cvt.rn." PTX_ELEMENT "x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

// The bits of an fp16 value; exact.
__device__ __forceinline__ float float_of_f16(uint16_t bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}

// ---- prefetch (9.7.9.17) ----

// Asks for the cache line of `global` to be brought into L2.
__device__ __forceinline__ void prefetch_l2(const void* global) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(global));
}

// ---- between thread blocks and grids (9.7.13) ----

// Adds to a counter in global memory and returns what it held. What this thread wrote before is visible to whoever
// sees the new value; what others wrote before they added is visible to this thread.
__device__ __forceinline__ uint32_t fetch_add_acquire_release(uint32_t* counter, uint32_t value) {
  uint32_t before;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(counter), "r"(value)
               : "memory");
  return before;
}

// The same where nothing but the number matters: neither waits for this thread's copies nor orders them.
__device__ __forceinline__ uint32_t fetch_add_relaxed(uint32_t* counter, uint32_t value) {
  uint32_t before;
  asm volatile("atom.relaxed.gpu.global.add.u32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(counter), "r"(value)
               : "memory");
  return before;
}

// Waits until a counter in global memory has reached `count`. What others wrote before they added is visible to this
// thread then.
__device__ __forceinline__ void wait_for_count(const uint32_t* counter, uint32_t count) {
  uint32_t now;
  do asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(now) : "l"(counter) : "memory");
  while (now < count);
}

// Programmatic dependent launch: waits for the grids this one depends on, and for their writes. Without the launch
// attribute, and before sm_90, a grid starts after them anyway.
__device__ __forceinline__ void wait_for_previous_grid() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the next grid start as soon as every block of this one has said so or ended.
__device__ __forceinline__ void allow_next_grid() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

}  // inline namespace ELEMENT
}  // namespace ptx
