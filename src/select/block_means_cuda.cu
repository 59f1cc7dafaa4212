// Each element of K or V is read once, from memory, which bounds it. CTA: a block of a K/V head.
#include "select/block_means_cuda.h"

#include "cuda/launch.cuh"
#include "select/select_device.cuh"

namespace flexprefill {
namespace {

constexpr int kMeansThreads = 256;
constexpr int kMostColumns = 256;

struct MeansShared {
  float partial[kMeansThreads * 8];
  float mean[kMostColumns];
};

template <typename Element>
__global__ void __launch_bounds__(kMeansThreads, 4)
    block_means_kernel(const __grid_constant__ DeviceProblem problem, const DeviceTensor rows,
                       int32_t d, bool aligned, bool as_float, std::byte* to) {
  await_previous_kernel();
  start_next_kernel();
  auto& shared = *reinterpret_cast<MeansShared*>(shared_memory());
  const auto block = static_cast<int32_t>(blockIdx.x % problem.max_n_kv);
  const auto head = static_cast<int32_t>(blockIdx.x / problem.max_n_kv);
  const int32_t s = head / problem.h_kv, kv = head % problem.h_kv;
  const DeviceSequence& sequence = problem.sequences[s];
  if (block >= sequence.n_kv) return;
  const int64_t first = static_cast<int64_t>(block) * problem.block_size;
  const int64_t left = sequence.s_kv - first;
  const auto n = static_cast<int32_t>(left < problem.block_size ? left : problem.block_size);
  const int64_t at = (sequence.first_mean + static_cast<int64_t>(kv) * sequence.n_kv + block) * d;
  const bool paged = problem.page_table != nullptr;
  const std::byte* row = paged ? nullptr : problem.kv_row(rows, s, kv, first);
  mean_rows_cta<Element, kMeansThreads, 4>(
      n, d, aligned, shared.partial, as_float ? reinterpret_cast<float*>(to) + at : shared.mean,
      [&](int32_t i) {
        return paged ? problem.kv_row(rows, s, kv, first + i) : row + i * rows.row_stride * 2;
      });
  if (as_float) return;
  __syncthreads();
  for (auto c = static_cast<int32_t>(threadIdx.x); c < d / 2; c += kMeansThreads) {
    reinterpret_cast<uint32_t*>(to)[at / 2 + c] =
        pack<Element>(shared.mean[2 * c], shared.mean[2 * c + 1]);
  }
}

}  // namespace

void block_means(const DeviceProblem& problem, const DeviceTensor& rows, int32_t d, MeanType type,
                 std::byte* to, void* stream) {
  const int64_t ctas = int64_t{problem.b} * problem.h_kv * problem.max_n_kv;
  if (ctas == 0) return;
  const auto kernel = problem.dtype == DType::kBFloat16 ? block_means_kernel<__nv_bfloat16>
                                                        : block_means_kernel<__half>;
  launch_overlapped(kernel, dim3(grid_of(ctas)), dim3(kMeansThreads), sizeof(MeansShared), stream,
                    problem, rows, d, rows_on_16_bytes(rows), type == MeanType::kFloat, to);
}

}  // namespace flexprefill
