// attend with mma.sync and cp.async, for every card of compute capability 8.0 and up.
#include "attend/attend_sm80_kernel.cuh"

#include <bit>
#include <cmath>

#include "cuda/backend_cuda.h"

namespace flexprefill {
namespace {

constexpr double kLog2E = 1.44269504088896340736;

// Whether every row of a tensor starts at a multiple of 16 bytes. Strides over one element count
// for nothing.
bool rows_aligned(const DeviceTensor& t, int64_t sequences, int64_t heads) {
  constexpr int64_t kBytes = 16;
  const auto multiple = [&](int64_t stride) { return stride * t.element_bytes % kBytes == 0; };
  return reinterpret_cast<uintptr_t>(t.data) % kBytes == 0 && multiple(t.row_stride) &&
         (sequences <= 1 || multiple(t.sequence_stride)) && (heads <= 1 || multiple(t.head_stride));
}

template <typename T, int kConfig>
void launch_attend(const sm80::Parameters& p, const Sm80Tile& tile, int64_t ctas, void* stream) {
  constexpr Sm80Config kC = kSm80Configs[kConfig];
  constexpr int kMaxWarps = 128 / kC.warp_rows;
  launch(sm80::attend_kernel<T, kC.d_qk, kC.d_v, kC.warp_rows / 16, kC.warps_per_sm / kMaxWarps>,
         dim3(static_cast<uint32_t>(ctas)), dim3(tile.threads(kC)), tile.shared_bytes, stream, p);
}

template <typename T>
void launch_attend(const sm80::Parameters& p, const Sm80Config& config, const Sm80Tile& tile,
                   int64_t ctas, void* stream) {
  switch (&config - kSm80Configs.data()) {
    case 0:
      return launch_attend<T, 0>(p, tile, ctas, stream);
    case 1:
      return launch_attend<T, 1>(p, tile, ctas, stream);
    case 2:
      return launch_attend<T, 2>(p, tile, ctas, stream);
    default:
      return launch_attend<T, 3>(p, tile, ctas, stream);
  }
}

}  // namespace

void attend_sm80(const DeviceProblem& problem, const Problem&, const DeviceRows& rows,
                 const Execution& execution, Arena& arena) {
  const bool bits = rows.bits != nullptr || arena.counting();
  const WorkOrder order = take_work_order(problem, bits, device_info().l2_bytes, arena);
  const MeanRows means = take_mean_rows(problem, rows, arena);
  if (arena.counting() || order.count == 0) return;

  const Sm80Config& config = sm80_config(problem.d_qk, problem.d_v);
  const Sm80Tile tile = sm80_tile(config, problem.block_size, device_info().shared_bytes);
  const int64_t kv_sequences = problem.page_table != nullptr ? 2 : problem.b;
  const float scale = static_cast<float>(problem.scale * kLog2E);
  const sm80::Parameters parameters{
      .problem = problem,
      .rows = rows,
      .mask = TokenMask::of(rows.window),
      .means = means,
      .order = order,
      .tile_rows = tile.rows,
      .slots = tile.slots,
      .log2_block_size = std::countr_zero(static_cast<uint32_t>(problem.block_size)),
      .q_aligned = rows_aligned(problem.q, problem.b, problem.h_q),
      .k_aligned = rows_aligned(problem.k, kv_sequences, problem.h_kv),
      .v_aligned = rows_aligned(problem.v, kv_sequences, problem.h_kv),
      .out_aligned = rows_aligned(problem.out, problem.b, problem.h_q),
      .scores_scale = scale > 0 ? 1.0f : scale,
      .weigh_scale = scale > 0 ? scale : 1.0f,
      .mean_bias = std::log2(static_cast<float>(problem.block_size)) / (scale > 0 ? scale : 1.0f)};
  const int64_t ctas = static_cast<int64_t>(order.count) * (problem.block_size / tile.rows);
  make_work_order(problem, rows, order, execution.stream);
  make_mean_rows(problem, means, execution.stream);
  if (problem.dtype == DType::kBFloat16) {
    launch_attend<__nv_bfloat16>(parameters, config, tile, ctas, execution.stream);
  } else {
    launch_attend<__half>(parameters, config, tile, ctas, execution.stream);
  }
}

}  // namespace flexprefill
