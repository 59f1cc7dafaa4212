// BlockCover's two large kernels on cards of compute capability 9.0, the host's half.
// The kernels: select_cover_sm90_asks.cuh, select_cover_sm90_map.cuh.
#include "select/select_cover_sm90.h"

#include <algorithm>
#include <numeric>

#include "cuda/tensor_map.cuh"
#include "select/select_cover_sm90_tiles.cuh"
#include "select/select_sm90_shapes.h"

namespace flexprefill {

void cover_asks_sm90(const Problem& problem, const SelectProblem& select, const CoverParams& cover,
                     void* stream) {
  CoverSm90Params params{};
  params.select = select;
  params.cover = cover;
  params.box_rows = problem.page_table == nullptr ? 128 : std::gcd(select.problem.page_size, 128);
  params.kv_packed = problem.k_view.rank == 3 ? 1 : 0;
  params.keys = sm90::make_tensor_map(problem.k_view, problem.d_qk, params.box_rows);
  const int64_t heads = problem.b() * problem.h_q;
  dispatch_sm90(problem, [&]<typename Element, int kDim> {
    launch_cover_asks_sm90<CoverShape<Element, kDim>>(
        params, grid_of(heads * cover.memory.max_chunks), stream);
  });
}

void cover_map_sm90(const Problem& problem, const SelectProblem& select, const CoverParams& cover,
                    void* stream) {
  CoverSm90Params params{};
  params.select = select;
  params.cover = cover;
  const auto map_of = [&](const std::byte* means, int64_t rows) {
    return sm90::make_rows_map(means, problem.dtype, rows, problem.d_qk, 128);
  };
  params.key_means = map_of(cover.memory.k_means, cover.memory.key_means);
  params.query_means = map_of(cover.memory.q_means, cover.memory.query_means);
  params.queries = sm90::make_tensor_map(problem.q_view, problem.d_qk, 128);
  params.q_packed = problem.q_view.rank == 3 ? 1 : 0;
  dispatch_sm90(problem, [&]<typename Element, int kDim> {
    const int64_t ctas = std::min<int64_t>(cover.memory.ctas, cover.tasks);
    launch_cover_map_sm90<CoverShape<Element, kDim>>(params, grid_of(ctas), stream);
  });
}

}  // namespace flexprefill
