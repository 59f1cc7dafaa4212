// The emulator's side of src/cuda/sm80.cuh, from the PTX ISA's description of the instructions.
#ifndef FLEXPREFILL_SRC_CUDA_SM80_CUH_
#define FLEXPREFILL_SRC_CUDA_SM80_CUH_

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "cuda_emulator/emulator.h"
#include "cuda_emulator/instructions.h"

namespace flexprefill {

using cuda_emulator::Where;

inline int32_t fresh_thread() { return static_cast<int32_t>(cuda_emulator::thread_index.x); }

inline uint32_t shared_address(const void* pointer, Where where = Where::current()) {
  return cuda_emulator::shared_address(pointer, 0, 1, "shared_address", where);
}

inline void store_relaxed(uint8_t* to, uint32_t value) {
  cuda_emulator::instrumented_access(to, 1, cuda_emulator::Races::Kind::kAtomic);
  const auto byte = static_cast<uint8_t>(value);
  cuda_emulator::atomic_store(to, &byte, 1);
}

template <int kBytes>
void cp_async(uint32_t shared, const void* global, int32_t bytes = kBytes,
              Where where = Where::current()) {
  static_assert(kBytes == 16 || kBytes == 8 || kBytes == 4);
  cuda_emulator::cp_async(shared, global, kBytes, bytes, where);
}
inline void cp_async_commit() { cuda_emulator::cp_async_commit(); }
template <int kPending>
void cp_async_wait() {
  cuda_emulator::cp_async_wait(kPending);
}

inline void ldmatrix_x4(uint32_t (&registers)[4], uint32_t row, Where where = Where::current()) {
  cuda_emulator::ldmatrix(registers, 4, false, row, where);
}
inline void ldmatrix_x2(uint32_t (&registers)[2], uint32_t row, Where where = Where::current()) {
  cuda_emulator::ldmatrix(registers, 2, false, row, where);
}
inline void ldmatrix_x4_trans(uint32_t (&registers)[4], uint32_t row,
                              Where where = Where::current()) {
  cuda_emulator::ldmatrix(registers, 4, true, row, where);
}
inline void ldmatrix_x2_trans(uint32_t (&registers)[2], uint32_t row,
                              Where where = Where::current()) {
  cuda_emulator::ldmatrix(registers, 2, true, row, where);
}

template <typename T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                  Where where = Where::current()) {
  static_assert(std::is_same_v<T, __nv_bfloat16> || std::is_same_v<T, __half>);
  constexpr auto kType = std::is_same_v<T, __half> ? cuda_emulator::Element::kFloat16
                                                   : cuda_emulator::Element::kBFloat16;
  cuda_emulator::mma_m16n8k16(kType, d, a, b0, b1, where);
}

template <typename T>
uint32_t pack(float low, float high) {
  const T halves[2] = {T(low), T(high)};
  return std::bit_cast<uint32_t>(halves);
}

}  // namespace flexprefill

#endif  // FLEXPREFILL_SRC_CUDA_SM80_CUH_
