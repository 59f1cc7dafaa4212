// Warp instructions on registers and shared memory, called by the emulated src/cuda/*.cuh.
#ifndef FLEXPREFILL_TESTS_CUDA_EMULATOR_INSTRUCTIONS_H_
#define FLEXPREFILL_TESTS_CUDA_EMULATOR_INSTRUCTIONS_H_

#include <cstdint>

#include "cuda_emulator/emulator.h"

namespace cuda_emulator {

enum class Element { kBFloat16, kFloat16 };
// Of the 16 bits of one element.
float to_float(Element type, uint32_t bits);

// cp.async with src-size `source_bytes`: the destination is poison until cp_async_wait.
void cp_async(uint32_t shared, const void* global, int bytes, int source_bytes, Where where);
void cp_async_commit();
void cp_async_wait(int pending);

// ldmatrix.sync.aligned.m8n8.x{2,4}{.trans}.shared.b16
void ldmatrix(uint32_t* registers, int matrices, bool transposed, uint32_t row, Where where);

// stmatrix.sync.aligned.m8n8.x4.shared.b16
void stmatrix(const uint32_t* registers, uint32_t row, Where where);

// mma.sync.aligned.m16n8k16.row.col, d += a b
void mma_m16n8k16(Element type, float* d, const uint32_t* a, uint32_t b0, uint32_t b1, Where where);

// ---- Compute capability 9.0 (async.cc)

// mbarrier: its 64 bits hold the parity of the running phase, arrivals still to come, arrivals of a
// phase, and bytes still to come.
void mbarrier_init(uint64_t* barrier, uint32_t arrivals, Where where);
void mbarrier_expect(uint64_t* barrier, uint32_t bytes, Where where);
void mbarrier_arrive(uint64_t* barrier, Where where);
void mbarrier_wait(uint64_t* barrier, uint32_t parity, Where where);

// A tensor for TMA. Innermost dimension first; strides in bytes, from dimension 1.
struct TensorMap {
  static constexpr int kMaxRank = 5;
  int32_t rank, element_bytes;
  uint32_t swizzle_bytes;  // 0, 32, 64, 128
  const std::byte* data;
  uint64_t sizes[kMaxRank], strides[kMaxRank - 1];
  uint32_t box[kMaxRank];
};
// What cuTensorMapEncodeTiled refuses (element strides of 1, no interleave); nullptr: nothing.
const char* check_tensor_map(const TensorMap& map);
// cp.async.bulk.tensor: the box at `coordinates` to `shared`, its bytes to `barrier`.
void tma_load(const TensorMap& map, uint64_t* barrier, void* shared, const int32_t* coordinates,
              Where where);
// The way back: memory holds it, and `shared` has been read, after tma_store_wait_read.
void tma_store(const TensorMap& map, const void* shared, const int32_t* coordinates, Where where);
void tma_store_commit();
void tma_store_wait_read();

// wgmma.mma_async.m64nNk16: d = a b or d += a b; one call a thread. `a_registers` is nullptr where
// `a` is a descriptor. The transposed operand is stored with M or N contiguous. d is poison until
// wgmma_wait.
struct Product {
  Element type;
  int n;
  float* d;
  const uint32_t* a_registers;
  uint64_t a, b;
  bool a_transposed, b_transposed, accumulate;
};
void wgmma(const Product& product, Where where);
void wgmma_fence(Where where);
void wgmma_commit(Where where);
void wgmma_wait(int groups, Where where);

}  // namespace cuda_emulator

#endif  // FLEXPREFILL_TESTS_CUDA_EMULATOR_INSTRUCTIONS_H_
