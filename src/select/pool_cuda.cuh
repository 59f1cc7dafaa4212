// The estimate of step 4 of FlexPrefill from block means: the probe's logits.
#ifndef FLEXPREFILL_SRC_SELECT_POOL_CUDA_CUH_
#define FLEXPREFILL_SRC_SELECT_POOL_CUDA_CUH_

#include "cuda/launch.cuh"
#include "select/select_device.cuh"

namespace flexprefill {

// The logits of the probe's mean [d] by the means of key blocks [first, end): scale * q_mean .
// k_mean in units of log2, by kThreads threads numbered `thread`, a warp a block.
template <int kThreads>
__device__ void pool_blocks(const SelectProblem& select, const HeadView& head, int32_t first,
                            int32_t end, int32_t thread, const float* mean) {
  const DeviceProblem& problem = select.problem;
  const SelectSequence& plan = select.sequences[head.sequence];
  const int32_t n_kv = problem.sequences[head.sequence].n_kv, d = problem.d_qk;
  const float* means =
      select.k_means +
      (plan.first_kv_block + static_cast<int64_t>(problem.kv_head(head.head)) * n_kv) * d;
  float* pooled = select.pooled + plan.first_block + static_cast<int64_t>(head.head) * n_kv;
#pragma unroll 2
  for (int32_t j = first + thread / 32; j < end; j += kThreads / 32) {
    float dot = 0;
    for (int32_t c = thread % 32; c < d; c += 32) {
      dot = fmaf(mean[c], means[static_cast<int64_t>(j) * d + c], dot);
    }
    for (int lanes = 16; lanes > 0; lanes /= 2) dot += __shfl_xor_sync(0xffffffffu, dot, lanes);
    if (thread % 32 == 0) pooled[j] = dot * select.scale_log2;
  }
}

constexpr int kPoolThreads = 256;
constexpr int kPoolBlocks = 64;  // of a CTA
struct PoolShared {
  float partial[kPoolThreads * 8], mean[256];
};

// For the probe of probe_cuda.cuh, in which they would cost registers.
template <typename Element>
__global__ void __launch_bounds__(kPoolThreads)
    pool_kernel(const SelectProblem select, int32_t pieces) {
  await_previous_kernel();
  start_next_kernel();
  const DeviceProblem& problem = select.problem;
  const auto x = static_cast<int32_t>(blockIdx.x);
  const HeadView head = HeadView::of(select, x / pieces);
  const SelectSequence& plan = select.sequences[head.sequence];
  const int32_t first = x % pieces * kPoolBlocks;
  const int32_t n_kv = problem.sequences[head.sequence].n_kv;
  if (plan.probed == 0 || first >= n_kv) return;
  auto& shared = *reinterpret_cast<PoolShared*>(shared_memory());
  const std::byte* q = problem.q_row(problem.q, head.sequence, head.head, plan.probe_first_row);
  mean_rows_cta<Element, kPoolThreads>(plan.probe_rows, problem.d_qk, select.q_aligned,
                                       shared.partial, shared.mean,
                                       [&](int32_t i) { return q + i * problem.q.row_stride * 2; });
  __syncthreads();
  pool_blocks<kPoolThreads>(select, head, first, min(first + kPoolBlocks, n_kv),
                            static_cast<int32_t>(threadIdx.x), shared.mean);
}

}  // namespace flexprefill

#endif  // FLEXPREFILL_SRC_SELECT_POOL_CUDA_CUH_
