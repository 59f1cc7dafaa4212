// FlashPrefill's scores on cards of compute capability 9.0, the host's half. The kernel:
// select_blocks_sm90_means.cuh.
#include "select/select_blocks_sm90.h"

#include "cuda/tensor_map.cuh"
#include "math.h"
#include "select/select_blocks_sm90_means.cuh"
#include "select/select_sm90_shapes.h"

namespace flexprefill {
namespace {

// Calls f.operator()<Shape>() with the kernel for the call's element type and head dim.
template <typename F>
void dispatch_shape(const Problem& problem, F&& f) {
  dispatch_sm90(problem, [&]<typename Element, int kDim> {
    f.template operator()<MeansShape<Element, kDim>>();
  });
}

}  // namespace

bool mean_scores_sm90_takes(const Problem& problem) { return sm90::can_address(problem.q_view); }

int32_t mean_scores_sm90_rows(const Problem& problem) {
  int32_t rows = 0;
  dispatch_shape(problem, [&]<typename Shape> { rows = Shape::kRows; });
  return rows;
}

int32_t mean_scores_sm90_pitch(int64_t n_kv) {
  return static_cast<int32_t>(ceil_div(n_kv, kStripMeans) * kStripMeans);
}

int64_t mean_scores_sm90_scratch(const Problem& problem, int32_t pitch) {
  const int64_t blocks = mean_scores_sm90_rows(problem) / problem.block_size;
  return 2 * blocks * (pitch + pitch / kBaseMeans);
}

void mean_scores_sm90(const Problem& problem, const SelectProblem& select,
                      const BlockScores& scores, int64_t ctas, void* stream) {
  MeansSm90Params params{};
  params.select = select;
  params.scores = scores;
  params.q_packed = problem.q_view.rank == 3 ? 1 : 0;
  params.queries = sm90::make_tensor_map(problem.q_view, problem.d_qk, 128);
  params.means = sm90::make_rows_map(scores.k_means, problem.dtype, select.problem.mean_rows,
                                     problem.d_qk, kStripMeans);
  dispatch_shape(problem, [&]<typename Shape> {
    static_assert(sizeof(MeansShared<Shape>) <= 232448);
    launch_overlapped(mean_scores_sm90_kernel<Shape>, dim3(grid_of(ctas)), dim3(Shape::kThreads),
                      sizeof(MeansShared<Shape>), stream, params);
  });
}

}  // namespace flexprefill
