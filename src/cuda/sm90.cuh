// Hopper's instructions (compute capability 9.0a): barriers in shared memory, the tensor copy
// engine (TMA), warpgroup matrix products (wgmma), and what orders them.
//
// Layout of a tile in shared memory, for TMA and wgmma alike: chunks of 64 columns (128 bytes); a
// chunk is [rows][64 columns] with the 16-byte units of a row permuted by the 128-byte swizzle:
// unit u of row r lies at unit u ^ (r % 8). Every chunk starts at a multiple of 1024 bytes.
#ifndef FLEXPREFILL_SRC_CUDA_SM90_CUH_
#define FLEXPREFILL_SRC_CUDA_SM90_CUH_

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "cuda/launch.cuh"

namespace flexprefill::sm90 {

constexpr int kChunkColumns = 64;
constexpr int kChunkRowBytes = 128;
constexpr int kWarpgroupThreads = 128;

// ---- barriers in shared memory ---------------------------------------------------------------
// A phase of a barrier ends when `arrivals` threads have arrived and all bytes that were expected
// have come. Phases count from 0; waiting names the parity of the phase to wait for.

using Barrier = uint64_t;

__device__ inline uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

__device__ inline void barrier_init(Barrier* barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals)
               : "memory");
}

// After the inits and before the block's __syncthreads: TMA sees the barriers.
__device__ inline void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ inline void barrier_arrive(Barrier* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
}

// Arrives and adds `bytes` to what the running phase expects.
__device__ inline void barrier_arrive_expect(Barrier* barrier, uint32_t bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}

// Until the phase of this parity has ended. On a fresh barrier parity 1 does not wait.
__device__ inline void barrier_wait(Barrier* barrier, uint32_t parity) {
  // A loop in C++ would have the compiler think of threads that leave it one by one.
  asm volatile(
      "{\n.reg .pred done;\nWAIT:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra DONE;\nbra WAIT;\nDONE:\n}\n" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// ---- named barriers (id 1 to 15) ---------------------------------------------------------------

// `threads` (a multiple of 32) counts those that sync and those that only arrive.
__device__ inline void named_barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

__device__ inline void named_barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Stores 8 x 8 matrices of 16-bit elements, as ldmatrix_x4 (sm80.cuh) loads them.
__device__ inline void stmatrix_x4(const uint32_t (&registers)[4], uint32_t row) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row),
               "r"(registers[0]), "r"(registers[1]), "r"(registers[2]), "r"(registers[3])
               : "memory");
}

// ---- TMA ---------------------------------------------------------------------------------------

using TensorMap = CUtensorMap;

// A tensor of 16-bit elements, [sizes[3], sizes[2], sizes[1], sizes[0]] with a contiguous last
// dimension, and the box that one load brings: [1, 1, box_rows, 64].
struct TensorMapShape {
  const void* data;     // 16-byte aligned
  uint64_t sizes[4];    // elements, innermost first
  uint64_t strides[3];  // bytes, of dimensions 1 to 3; multiples of 16
  uint32_t box_rows;    // 1 to 256, a multiple of 8
  bool bfloat16;
};

inline TensorMap make_tensor_map(const TensorMapShape& shape) {
  using Encode =
      CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                   const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                   CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
  static const Encode encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
    cuda_check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                                cudaEnableDefault, &found),
               "look-up of cuTensorMapEncodeTiled");
    if (found != cudaDriverEntryPointSuccess || function == nullptr) {
      throw Error(ErrorCode::kUnsupported, "this CUDA driver has no cuTensorMapEncodeTiled");
    }
    return reinterpret_cast<Encode>(function);
  }();
  TensorMap map{};
  const cuuint32_t box[4] = {kChunkColumns, shape.box_rows, 1, 1};
  const cuuint32_t element_strides[4] = {1, 1, 1, 1};
  const CUresult result = encode(
      &map, shape.bfloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 4,
      const_cast<void*>(shape.data), shape.sizes, shape.strides, box, element_strides,
      CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    throw Error(ErrorCode::kInternal,
                "cuTensorMapEncodeTiled: CUDA driver error " + std::to_string(result));
  }
  return map;
}

__device__ inline void tma_prefetch_map(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(reinterpret_cast<uint64_t>(map)) : "memory");
}

// The box at these coordinates (column, row, dimension 2, dimension 3; may be negative or beyond
// the tensor: those elements are zero, and count as bytes) to `shared`; box_rows * 128 bytes are
// reported to `barrier`. One thread.
__device__ inline void tma_load(const TensorMap* map, Barrier* barrier, void* shared, int32_t c0,
                                int32_t c1, int32_t c2, int32_t c3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(shared_address(shared)),
      "l"(reinterpret_cast<uint64_t>(map)), "r"(shared_address(barrier)), "r"(c0), "r"(c1), "r"(c2),
      "r"(c3)
      : "memory");
}

// The box in `shared` to the tensor at these coordinates, but for what lies outside of it. One
// thread; what stored to `shared` was followed by fence_proxy_async. Done when the kernel ends.
__device__ inline void tma_store(const TensorMap* map, const void* shared, int32_t c0, int32_t c1,
                                 int32_t c2, int32_t c3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(
          reinterpret_cast<uint64_t>(map)),
      "r"(shared_address(shared)), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
      : "memory");
}
// To follow a thread's calls of tma_store.
__device__ inline void tma_store_commit() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
// Until what this thread stores by TMA was read from shared memory.
__device__ inline void tma_store_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}

// Between a thread's ordinary stores to shared memory and wgmma or TMA that read them (after a
// barrier that the storing threads arrive at).
__device__ inline void fence_proxy_async() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// ---- registers of a warpgroup ------------------------------------------------------------------

template <int kRegisters>
__device__ inline void registers_grow() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ inline void registers_shrink() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// ---- wgmma -------------------------------------------------------------------------------------
// A warpgroup multiplies [64, 16] by [16, N] into [64, N] fp32. Thread t of the warpgroup (warp w,
// lane l) holds rows 16 w + l / 4 and 8 below: d[4 g + e] is column 8 g + 2 (l % 4) + e % 2 of row
// 16 w + l / 4 + 8 (e / 2). A in registers: a[0..3] hold, two elements each, columns
// 2 (l % 4) + {0, 1} of the two rows, then columns 8 + 2 (l % 4) + {0, 1} of the two rows.

// Of an operand K-major without a swizzle: groups of 8 rows of 16 bytes; `leading_bytes` lie
// between both halves of [.., 16], `stride_bytes` between groups of 8 rows.
__device__ inline uint64_t wgmma_descriptor_plain(const void* shared, uint32_t leading_bytes,
                                                  uint32_t stride_bytes) {
  return static_cast<uint64_t>((shared_address(shared) & 0x3ffff) >> 4) |
         static_cast<uint64_t>(leading_bytes >> 4) << 16 |
         static_cast<uint64_t>(stride_bytes >> 4) << 32;
}

// Of a tile with the swizzle above. An operand whose contiguous dimension is the one summed over
// ("K-major": A, and B stored as [N, 16]): `stride_bytes` lies between groups of 8 rows,
// `leading_bytes` is not used. B stored as [16, N] ("MN-major"): `leading_bytes` between chunks
// of 64 columns, `stride_bytes` between groups of 8 rows. Steps within a row of a chunk go by
// adding bytes to the address.
__device__ inline uint64_t wgmma_descriptor(const void* shared, uint32_t leading_bytes,
                                            uint32_t stride_bytes) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  return kSwizzle128 | wgmma_descriptor_plain(shared, leading_bytes, stride_bytes);
}

// The same tile `bytes` further on. The address never carries, so that the upper half stays a
// constant.
__device__ inline uint64_t wgmma_descriptor_at(uint64_t descriptor, uint32_t bytes) {
  const uint32_t low = static_cast<uint32_t>(descriptor) + (bytes >> 4);
  return (descriptor & 0xffffffff00000000) | low;
}

// Before the first wgmma, and after ordinary code touched registers of d or a.
__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ inline void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Until at most kGroups committed groups are still running.
template <int kGroups>
__device__ inline void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kGroups) : "memory");
}

// Keeps the compiler from moving or copying registers of a product that is running, or, for a
// descriptor, from keeping many sums with it in registers.
template <typename T, int kN>
__device__ inline void wgmma_pin(T (&registers)[kN]) {
#pragma unroll
  for (int i = 0; i < kN; ++i) {
    if constexpr (std::is_same_v<T, float>) {
      asm volatile("" : "+f"(registers[i])::"memory");
    } else if constexpr (sizeof(T) == 8) {
      asm volatile("" : "+l"(registers[i])::"memory");
    } else {
      asm volatile("" : "+r"(registers[i])::"memory");
    }
  }
}

#define FLEXPREFILL_D8(d, i)                                                                      \
  "+f"((d)[(i)]), "+f"((d)[(i) + 1]), "+f"((d)[(i) + 2]), "+f"((d)[(i) + 3]), "+f"((d)[(i) + 4]), \
      "+f"((d)[(i) + 5]), "+f"((d)[(i) + 6]), "+f"((d)[(i) + 7])
#define FLEXPREFILL_D32(d, i)                                                    \
  FLEXPREFILL_D8(d, i), FLEXPREFILL_D8(d, (i) + 8), FLEXPREFILL_D8(d, (i) + 16), \
      FLEXPREFILL_D8(d, (i) + 24)
#define FLEXPREFILL_D64(d, i) FLEXPREFILL_D32(d, i), FLEXPREFILL_D32(d, (i) + 32)
#define FLEXPREFILL_D128(d, i) FLEXPREFILL_D64(d, i), FLEXPREFILL_D64(d, (i) + 64)
#define FLEXPREFILL_R32                                                                    \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23," \
  "%24,%25,%26,%27,%28,%29,%30,%31"
#define FLEXPREFILL_R64                                                       \
  FLEXPREFILL_R32                                                             \
  ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49," \
  "%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define FLEXPREFILL_R128                                                          \
  FLEXPREFILL_R64                                                                 \
  ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,"     \
  "%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95,%96,%97,%98,%99,%100," \
  "%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112,%113,%114,%115,"   \
  "%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
// SHAPE: "n128k16.f32.bf16.bf16"; A, B, P: the numbers of the operands after d; TRANSPOSED: B.
#define FLEXPREFILL_WGMMA_SS(SHAPE, R, D, A, B, P, TRANSPOSED)                      \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " P                                \
               ", 0;\nwgmma.mma_async.sync.aligned.m64" SHAPE " {" R "}, " A ", " B \
               ", p, 1, 1, 0, " TRANSPOSED ";\n}\n"                                 \
               : D                                                                  \
               : "l"(a), "l"(b), "r"(static_cast<int32_t>(accumulate)))
#define FLEXPREFILL_WGMMA_RS(SHAPE, R, D, A, B, P, TRANSPOSED)                                    \
  asm volatile(                                                                                   \
      "{\n.reg .pred p;\nsetp.ne.b32 p, " P ", 0;\nwgmma.mma_async.sync.aligned.m64" SHAPE " {" R \
      "}, {" A "}, " B ", p, 1, 1, " TRANSPOSED ";\n}\n"                                          \
      : D                                                                                         \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int32_t>(accumulate)))

// d = a b^T, or d += a b^T: a [64, 16] and b [N, 16] K-major in shared memory. Element is
// __nv_bfloat16 or __half, N 64 or 128.
template <typename Element, int kN>
__device__ inline void wgmma_ss(float (&d)[kN / 2], uint64_t a, uint64_t b, bool accumulate) {
  static_assert(kN == 64 || kN == 128);
  constexpr bool kBf16 = std::is_same_v<Element, __nv_bfloat16>;
  if constexpr (kN == 64 && kBf16) {
    FLEXPREFILL_WGMMA_SS("n64k16.f32.bf16.bf16", FLEXPREFILL_R32, FLEXPREFILL_D32(d, 0), "%32",
                         "%33", "%34", "0");
  } else if constexpr (kN == 64) {
    FLEXPREFILL_WGMMA_SS("n64k16.f32.f16.f16", FLEXPREFILL_R32, FLEXPREFILL_D32(d, 0), "%32", "%33",
                         "%34", "0");
  } else if constexpr (kBf16) {
    FLEXPREFILL_WGMMA_SS("n128k16.f32.bf16.bf16", FLEXPREFILL_R64, FLEXPREFILL_D64(d, 0), "%64",
                         "%65", "%66", "0");
  } else {
    FLEXPREFILL_WGMMA_SS("n128k16.f32.f16.f16", FLEXPREFILL_R64, FLEXPREFILL_D64(d, 0), "%64",
                         "%65", "%66", "0");
  }
}

// d = a b^T, or d += a b^T: a [64, 16] in registers, b [N, 16] K-major in shared memory. N 64 or
// 128.
template <typename Element, int kN>
__device__ inline void wgmma_rs(float (&d)[kN / 2], const uint32_t* a, uint64_t b,
                                bool accumulate) {
  static_assert(kN == 64 || kN == 128);
  constexpr bool kBf16 = std::is_same_v<Element, __nv_bfloat16>;
  if constexpr (kN == 64 && kBf16) {
    FLEXPREFILL_WGMMA_RS("n64k16.f32.bf16.bf16", FLEXPREFILL_R32, FLEXPREFILL_D32(d, 0),
                         "%32,%33,%34,%35", "%36", "%37", "0");
  } else if constexpr (kN == 64) {
    FLEXPREFILL_WGMMA_RS("n64k16.f32.f16.f16", FLEXPREFILL_R32, FLEXPREFILL_D32(d, 0),
                         "%32,%33,%34,%35", "%36", "%37", "0");
  } else if constexpr (kBf16) {
    FLEXPREFILL_WGMMA_RS("n128k16.f32.bf16.bf16", FLEXPREFILL_R64, FLEXPREFILL_D64(d, 0),
                         "%64,%65,%66,%67", "%68", "%69", "0");
  } else {
    FLEXPREFILL_WGMMA_RS("n128k16.f32.f16.f16", FLEXPREFILL_R64, FLEXPREFILL_D64(d, 0),
                         "%64,%65,%66,%67", "%68", "%69", "0");
  }
}

// d = a b, or d += a b: a [64, 16] in registers, b [16, N] MN-major in shared memory. N 64, 128
// or 256.
template <typename Element, int kN>
__device__ inline void wgmma_rs_mn(float (&d)[kN / 2], const uint32_t* a, uint64_t b,
                                   bool accumulate) {
  static_assert(kN == 64 || kN == 128 || kN == 256);
  constexpr bool kBf16 = std::is_same_v<Element, __nv_bfloat16>;
  if constexpr (kN == 64 && kBf16) {
    FLEXPREFILL_WGMMA_RS("n64k16.f32.bf16.bf16", FLEXPREFILL_R32, FLEXPREFILL_D32(d, 0),
                         "%32,%33,%34,%35", "%36", "%37", "1");
  } else if constexpr (kN == 64) {
    FLEXPREFILL_WGMMA_RS("n64k16.f32.f16.f16", FLEXPREFILL_R32, FLEXPREFILL_D32(d, 0),
                         "%32,%33,%34,%35", "%36", "%37", "1");
  } else if constexpr (kN == 128 && kBf16) {
    FLEXPREFILL_WGMMA_RS("n128k16.f32.bf16.bf16", FLEXPREFILL_R64, FLEXPREFILL_D64(d, 0),
                         "%64,%65,%66,%67", "%68", "%69", "1");
  } else if constexpr (kN == 128) {
    FLEXPREFILL_WGMMA_RS("n128k16.f32.f16.f16", FLEXPREFILL_R64, FLEXPREFILL_D64(d, 0),
                         "%64,%65,%66,%67", "%68", "%69", "1");
  } else if constexpr (kBf16) {
    FLEXPREFILL_WGMMA_RS("n256k16.f32.bf16.bf16", FLEXPREFILL_R128, FLEXPREFILL_D128(d, 0),
                         "%128,%129,%130,%131", "%132", "%133", "1");
  } else {
    FLEXPREFILL_WGMMA_RS("n256k16.f32.f16.f16", FLEXPREFILL_R128, FLEXPREFILL_D128(d, 0),
                         "%128,%129,%130,%131", "%132", "%133", "1");
  }
}

// d += a b: a [64, 16] K-major and b [16, 64] MN-major, both in shared memory.
template <typename Element>
__device__ inline void wgmma_ss_mn(float (&d)[32], uint64_t a, uint64_t b) {
  constexpr bool accumulate = true;
  if constexpr (std::is_same_v<Element, __nv_bfloat16>) {
    FLEXPREFILL_WGMMA_SS("n64k16.f32.bf16.bf16", FLEXPREFILL_R32, FLEXPREFILL_D32(d, 0), "%32",
                         "%33", "%34", "1");
  } else {
    FLEXPREFILL_WGMMA_SS("n64k16.f32.f16.f16", FLEXPREFILL_R32, FLEXPREFILL_D32(d, 0), "%32", "%33",
                         "%34", "1");
  }
}

#undef FLEXPREFILL_D8
#undef FLEXPREFILL_D32
#undef FLEXPREFILL_D64
#undef FLEXPREFILL_D128
#undef FLEXPREFILL_R32
#undef FLEXPREFILL_R64
#undef FLEXPREFILL_R128
#undef FLEXPREFILL_WGMMA_SS
#undef FLEXPREFILL_WGMMA_RS

}  // namespace flexprefill::sm90

#endif  // FLEXPREFILL_SRC_CUDA_SM90_CUH_
