// Instructions of compute capability 8.0 and up: cp.async, ldmatrix and mma.sync. Layouts are those
// of the PTX ISA (sections "cp.async", "ldmatrix" and "mma.m16n8k16"); all of a warp's 32 threads
// call the functions of whole warps together.
//
// Shared memory is named by its 32-bit address, which is cheap to add to.
#ifndef FLEXPREFILL_SRC_CUDA_SM80_CUH_
#define FLEXPREFILL_SRC_CUDA_SM80_CUH_

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace flexprefill {

// threadIdx.x, read anew by every call: a compiler keeps what follows from it over a loop where
// registers are better spent on something else.
__device__ inline int32_t fresh_thread() {
  int32_t thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
}

// The address of a pointer into shared memory.
__device__ inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// A store to global memory that others may make at the same time.
__device__ inline void store_relaxed(uint8_t* to, uint32_t value) {
  asm volatile("st.relaxed.gpu.global.u8 [%0], %1;" ::"l"(__cvta_generic_to_global(to)), "r"(value)
               : "memory");
}

// Starts a copy of kBytes (16, 8 or 4) from global to shared memory, both aligned to kBytes: the
// first `bytes` (0 to kBytes) are read, the rest of the kBytes become 0. What was written can be
// read by this thread after cp_async_wait, by others after a barrier that follows it. `global` must
// be aligned even where bytes is 0; nothing is read there then. 16 bytes go past L1.
template <int kBytes>
__device__ inline void cp_async(uint32_t shared, const void* global, int32_t bytes = kBytes) {
  static_assert(kBytes == 16 || kBytes == 8 || kBytes == 4);
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared),
                 "l"(__cvta_generic_to_global(global)), "r"(bytes)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared),
                 "l"(__cvta_generic_to_global(global)), "n"(kBytes), "r"(bytes)
                 : "memory");
  }
}

// Closes the group of this thread's copies since the last commit; a group may be empty.
__device__ inline void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most kPending of this thread's youngest groups are under way.
template <int kPending>
__device__ inline void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Loads 8 x 8 matrices of 16-bit elements. Lane 8 m + i gives the address of row i of matrix m
// (16 bytes, aligned to 16); lane 4 r + c gets in registers[m] columns 2 c (low half) and 2 c + 1
// of row r of matrix m.
__device__ inline void ldmatrix_x4(uint32_t (&registers)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
               : "r"(row)
               : "memory");
}

// As ldmatrix_x4 for two matrices; the addresses of lanes 16 to 31 are not looked at.
__device__ inline void ldmatrix_x2(uint32_t (&registers)[2], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(registers[0]), "=r"(registers[1])
               : "r"(row)
               : "memory");
}

// As ldmatrix_x4 with each matrix transposed: lane 4 r + c gets rows 2 c and 2 c + 1 of column r.
__device__ inline void ldmatrix_x4_trans(uint32_t (&registers)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
               : "r"(row)
               : "memory");
}

// As ldmatrix_x2 with each matrix transposed.
__device__ inline void ldmatrix_x2_trans(uint32_t (&registers)[2], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(registers[0]), "=r"(registers[1])
               : "r"(row)
               : "memory");
}

// d [16, 8] += a [16, 16] b [16, 8], T (__nv_bfloat16 or __half) to fp32. Lane 4 r + c holds
//   a   rows r, r + 8 by columns {2c, 2c + 1}, {2c + 8, 2c + 9}: a[0] is (r, 2c), a[1] (r + 8, 2c),
//       a[2] (r, 2c + 8), a[3] (r + 8, 2c + 8); the lower column in the low half
//   b   rows {2c, 2c + 1} (b0) and {2c + 8, 2c + 9} (b1) of column r
//   d   (r, 2c), (r, 2c + 1), (r + 8, 2c), (r + 8, 2c + 1)
template <typename T>
__device__ inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                    uint32_t b1) {
  static_assert(std::is_same_v<T, __nv_bfloat16> || std::is_same_v<T, __half>);
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// Two numbers rounded to T, `low` in the low half.
template <typename T>
__device__ inline uint32_t pack(float low, float high) {
  static_assert(std::is_same_v<T, __nv_bfloat16> || std::is_same_v<T, __half>);
  uint32_t pair;
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  }
  return pair;
}

}  // namespace flexprefill

#endif  // FLEXPREFILL_SRC_CUDA_SM80_CUH_
