// The emulator's side of src/cuda/sm90.cuh.
#ifndef FLEXPREFILL_SRC_CUDA_SM90_CUH_
#define FLEXPREFILL_SRC_CUDA_SM90_CUH_

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>
#include <type_traits>

#include "cuda/launch.cuh"
#include "cuda_emulator/instructions.h"

namespace flexprefill::sm90 {

using cuda_emulator::Where;

constexpr int kChunkColumns = 64;
constexpr int kChunkRowBytes = 128;
constexpr int kWarpgroupThreads = 128;

// ---- Barriers

using Barrier = uint64_t;

inline uint32_t shared_address(const void* p, Where where = Where::current()) {
  return cuda_emulator::shared_address(p, 0, 1, "shared_address", where);
}
inline void barrier_init(Barrier* barrier, uint32_t arrivals, Where where = Where::current()) {
  cuda_emulator::mbarrier_init(barrier, arrivals, where);
}
inline void barrier_init_fence() {}
inline void barrier_arrive(Barrier* barrier, Where where = Where::current()) {
  cuda_emulator::mbarrier_arrive(barrier, where);
}
inline void barrier_arrive_expect(Barrier* barrier, uint32_t bytes,
                                  Where where = Where::current()) {
  cuda_emulator::mbarrier_expect(barrier, bytes, where);
  cuda_emulator::mbarrier_arrive(barrier, where);
}
inline void barrier_wait(Barrier* barrier, uint32_t parity, Where where = Where::current()) {
  cuda_emulator::mbarrier_wait(barrier, parity, where);
}

inline void named_barrier_sync(int id, int threads, Where where = Where::current()) {
  cuda_emulator::barrier(id, threads, true, where);
}
inline void named_barrier_arrive(int id, int threads, Where where = Where::current()) {
  cuda_emulator::barrier(id, threads, false, where);
}

inline void stmatrix_x4(const uint32_t (&registers)[4], uint32_t row,
                        Where where = Where::current()) {
  cuda_emulator::stmatrix(registers, row, where);
}

// ---- TMA

using TensorMap = cuda_emulator::TensorMap;

struct TensorMapShape {
  const void* data;
  uint64_t sizes[4];
  uint64_t strides[3];
  uint32_t box_rows;
  bool bfloat16;
};

inline TensorMap make_tensor_map(const TensorMapShape& shape) {
  TensorMap map{.rank = 4,
                .element_bytes = 2,
                .swizzle_bytes = kChunkRowBytes,
                .data = static_cast<const std::byte*>(shape.data),
                .sizes = {},
                .strides = {},
                .box = {kChunkColumns, shape.box_rows, 1, 1}};
  std::copy_n(shape.sizes, 4, map.sizes);
  std::copy_n(shape.strides, 3, map.strides);
  if (const char* problem = cuda_emulator::check_tensor_map(map)) {
    throw Error(ErrorCode::kInternal, std::string("cuTensorMapEncodeTiled: ") + problem);
  }
  return map;
}

inline void tma_prefetch_map(const TensorMap*) {}

inline void tma_load(const TensorMap* map, Barrier* barrier, void* shared, int32_t c0, int32_t c1,
                     int32_t c2, int32_t c3, Where where = Where::current()) {
  const int32_t coordinates[4] = {c0, c1, c2, c3};
  cuda_emulator::tma_load(*map, barrier, shared, coordinates, where);
}

inline void tma_store(const TensorMap* map, const void* shared, int32_t c0, int32_t c1, int32_t c2,
                      int32_t c3, Where where = Where::current()) {
  const int32_t coordinates[4] = {c0, c1, c2, c3};
  cuda_emulator::tma_store(*map, shared, coordinates, where);
}
inline void tma_store_commit() { cuda_emulator::tma_store_commit(); }
inline void tma_store_wait_read() { cuda_emulator::tma_store_wait_read(); }

inline void fence_proxy_async() { cuda_emulator::fence_async_proxy(); }

// ---- wgmma

template <int kRegisters>
void registers_grow() {}
template <int kRegisters>
void registers_shrink() {}

inline uint64_t wgmma_descriptor_plain(const void* shared, uint32_t leading_bytes,
                                       uint32_t stride_bytes, Where where = Where::current()) {
  return static_cast<uint64_t>((shared_address(shared, where) & 0x3ffff) >> 4) |
         static_cast<uint64_t>(leading_bytes >> 4) << 16 |
         static_cast<uint64_t>(stride_bytes >> 4) << 32;
}
inline uint64_t wgmma_descriptor(const void* shared, uint32_t leading_bytes, uint32_t stride_bytes,
                                 Where where = Where::current()) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  return kSwizzle128 | wgmma_descriptor_plain(shared, leading_bytes, stride_bytes, where);
}
inline uint64_t wgmma_descriptor_at(uint64_t descriptor, uint32_t bytes) {
  const uint32_t low = static_cast<uint32_t>(descriptor) + (bytes >> 4);
  return (descriptor & 0xffffffff00000000) | low;
}
inline void wgmma_fence(Where where = Where::current()) { cuda_emulator::wgmma_fence(where); }
inline void wgmma_commit(Where where = Where::current()) { cuda_emulator::wgmma_commit(where); }
template <int kGroups>
void wgmma_wait(Where where = Where::current()) {
  cuda_emulator::wgmma_wait(kGroups, where);
}
template <typename T, int kN>
void wgmma_pin(T (&)[kN]) {}

template <typename Element>
constexpr cuda_emulator::Element kWgmmaElement =
    std::is_same_v<Element, __half> ? cuda_emulator::Element::kFloat16
                                    : cuda_emulator::Element::kBFloat16;

template <typename Element, int kN>
void wgmma_ss(float (&d)[kN / 2], uint64_t a, uint64_t b, bool accumulate,
              Where where = Where::current()) {
  static_assert(kN == 64 || kN == 128);
  cuda_emulator::wgmma({.type = kWgmmaElement<Element>,
                        .n = kN,
                        .d = d,
                        .a_registers = nullptr,
                        .a = a,
                        .b = b,
                        .a_transposed = false,
                        .b_transposed = false,
                        .accumulate = accumulate},
                       where);
}

template <typename Element, int kN>
void wgmma_rs(float (&d)[kN / 2], const uint32_t* a, uint64_t b, bool accumulate,
              Where where = Where::current()) {
  static_assert(kN == 64 || kN == 128);
  cuda_emulator::wgmma({.type = kWgmmaElement<Element>,
                        .n = kN,
                        .d = d,
                        .a_registers = a,
                        .a = 0,
                        .b = b,
                        .a_transposed = false,
                        .b_transposed = false,
                        .accumulate = accumulate},
                       where);
}

template <typename Element, int kN>
void wgmma_rs_mn(float (&d)[kN / 2], const uint32_t* a, uint64_t b, bool accumulate,
                 Where where = Where::current()) {
  static_assert(kN == 64 || kN == 128 || kN == 256);
  cuda_emulator::wgmma({.type = kWgmmaElement<Element>,
                        .n = kN,
                        .d = d,
                        .a_registers = a,
                        .a = 0,
                        .b = b,
                        .a_transposed = false,
                        .b_transposed = true,
                        .accumulate = accumulate},
                       where);
}

template <typename Element>
void wgmma_ss_mn(float (&d)[32], uint64_t a, uint64_t b, Where where = Where::current()) {
  cuda_emulator::wgmma({.type = kWgmmaElement<Element>,
                        .n = 64,
                        .d = d,
                        .a_registers = nullptr,
                        .a = a,
                        .b = b,
                        .a_transposed = false,
                        .b_transposed = true,
                        .accumulate = true},
                       where);
}

}  // namespace flexprefill::sm90

#endif  // FLEXPREFILL_SRC_CUDA_SM90_CUH_
