// BlockCover's two large kernels on cards of compute capability 9.0, the host's half.
// The kernels: select_cover_sm90_asks.cuh, select_cover_sm90_map.cuh.
#include "select/select_cover_sm90.h"

#include <algorithm>
#include <numeric>

#include "cuda/tensor_map.cuh"
#include "select/select_cover_sm90_tiles.cuh"

namespace flexprefill {
namespace {

// Calls f.operator()<Shape>() with the kernels for the call's element type and head dim.
template <typename F>
void dispatch_shape(const Problem& problem, F&& f) {
  const auto with_type = [&]<typename Element> {
    if (problem.d_qk <= 64) {
      f.template operator()<CoverShape<Element, 64>>();
    } else if (problem.d_qk <= 128) {
      f.template operator()<CoverShape<Element, 128>>();
    } else if (problem.d_qk <= 192) {
      f.template operator()<CoverShape<Element, 192>>();
    } else {
      f.template operator()<CoverShape<Element, 256>>();
    }
  };
  if (problem.dtype == DType::kBFloat16) {
    with_type.template operator()<__nv_bfloat16>();
  } else {
    with_type.template operator()<__half>();
  }
}

// [rows, d], packed, in boxes of 128 rows.
sm90::TensorMap map_of_means(const Problem& problem, const std::byte* means, int64_t rows) {
  const uint64_t row_bytes = static_cast<uint64_t>(problem.d_qk) * 2;
  return sm90::make_tensor_map(
      {.data = means,
       .sizes = {static_cast<uint64_t>(problem.d_qk), static_cast<uint64_t>(rows), 1, 1},
       .strides = {row_bytes, row_bytes, row_bytes},
       .box_rows = 128,
       .bfloat16 = problem.dtype == DType::kBFloat16});
}

}  // namespace

void cover_asks_sm90(const Problem& problem, const SelectProblem& select, const CoverParams& cover,
                     void* stream) {
  CoverSm90Params params{};
  params.select = select;
  params.cover = cover;
  params.box_rows = problem.page_table == nullptr ? 128 : std::gcd(select.problem.page_size, 128);
  params.kv_packed = problem.k_view.rank == 3 ? 1 : 0;
  params.keys = sm90::make_tensor_map(problem.k_view, problem.d_qk, params.box_rows);
  const int64_t heads = problem.b() * problem.h_q;
  dispatch_shape(problem, [&]<typename Shape> {
    launch_cover_asks_sm90<Shape>(params, grid_of(heads * cover.memory.max_chunks), stream);
  });
}

void cover_map_sm90(const Problem& problem, const SelectProblem& select, const CoverParams& cover,
                    void* stream) {
  CoverSm90Params params{};
  params.select = select;
  params.cover = cover;
  params.key_means = map_of_means(problem, cover.memory.k_means, cover.memory.key_means);
  params.query_means = map_of_means(problem, cover.memory.q_means, cover.memory.query_means);
  dispatch_shape(problem, [&]<typename Shape> {
    const int64_t ctas = std::min<int64_t>(cover.memory.ctas, cover.tasks);
    launch_cover_map_sm90<Shape>(params, grid_of(ctas), stream);
  });
}

}  // namespace flexprefill
