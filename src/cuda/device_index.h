// Between the bits that the stages share and the CSR arrays of a DeviceBlockIndex, on the device.
#ifndef FLEXPREFILL_SRC_CUDA_DEVICE_INDEX_H_
#define FLEXPREFILL_SRC_CUDA_DEVICE_INDEX_H_

#include <cstdint>

#include "arena.h"
#include "cuda/device_problem.h"
#include "flexprefill/block_index.h"

namespace flexprefill {

// Working memory of bits_to_csr; nullptr when the arena counts.
int64_t* lay_out_csr_sums(int64_t index_rows, Arena& arena);
// bits [words]; index.indices has room for every causal block.
void bits_to_csr(const DeviceProblem& problem, const uint64_t* bits, int64_t words, int64_t* sums,
                 const DeviceBlockIndex& index, void* stream);
// Entries that are no causal block of their row, or lie beyond the capacity, are left out.
void csr_to_bits(const DeviceProblem& problem, const DeviceBlockIndex& index, uint64_t* bits,
                 void* stream);

}  // namespace flexprefill

#endif  // FLEXPREFILL_SRC_CUDA_DEVICE_INDEX_H_
