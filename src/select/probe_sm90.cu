// The probe of select on cards of compute capability 9.0, the host's half: which calls TMA can
// address, how keys are cut into chunks, and the choice of a kernel. The kernels:
// probe_sm90_kernel.cuh.
#include <algorithm>
#include <numbers>
#include <numeric>
#include <string>

#include "cuda/backend_cuda.h"
#include "cuda/tensor_map.cuh"
#include "math.h"
#include "select/probe_sm90.h"
#include "select/probe_sm90_plan.cuh"
#include "select/select_sm90_shapes.h"

namespace flexprefill {
namespace {

// What a CTA costs beside its tiles, in tiles of one stream (with all its heads): launch, probes,
// first keys, and the end.
constexpr int64_t kCtaCost = 1;

// Calls f.operator()<Shape>() with the kernels for the call's element type, head dim and group.
template <typename F>
void dispatch_shape(const Problem& problem, F&& f) {
  dispatch_sm90(problem, [&]<typename Element, int kDim> {
    if (kDim == 256 || problem.group() == 1) {
      f.template operator()<ProbeShape<Element, kDim, 1>>();
    } else {
      f.template operator()<ProbeShape<Element, kDim, kDim == 256 ? 1 : 2>>();
    }
  });
}

// CTAs beside each other that a K/V head's query heads need, at most.
template <typename Shape>
int64_t most_slices(const ProbeWork& work) {
  const int32_t most = *std::max_element(work.heads.begin(), work.heads.end());
  return std::max<int64_t>(ceil_div(most, Shape::kHeads), 1);
}

}  // namespace

bool probe_sm90_takes(const Problem& problem) {
  return sm90::can_address(problem.q_view) && sm90::can_address(problem.k_view);
}

int64_t probe_sm90_chunk(const Problem& problem, const ProbeWork& work) {
  int64_t keys = 0;
  dispatch_shape(problem, [&]<typename Shape> {
    int64_t slices = 0;
    for (const int32_t heads : work.heads) slices += ceil_div(heads, Shape::kHeads);
    int64_t most_tiles = 1;
    for (int64_t s = 0; s < problem.b(); ++s) {
      if (work.sequences[s])
        most_tiles = std::max(most_tiles, ceil_div(problem.lengths[s].s_kv, 128));
    }
    // Chunks of so many tiles take so long, in waves of one CTA a multiprocessor.
    const auto cost = [&](int64_t tiles) {
      int64_t ctas = 0;
      for (int64_t s = 0; s < problem.b(); ++s) {
        if (!work.sequences[s]) continue;
        ctas += slices * ceil_div(problem.lengths[s].s_kv, tiles * 128 * Shape::kStreams);
      }
      return ceil_div(ctas, device_info().multiprocessors) * (tiles + kCtaCost);
    };
    constexpr int64_t kTried = 96;
    const int64_t least = ceil_div(most_tiles, kMostProbeChunks);
    const int64_t most = std::max(least, ceil_div(most_tiles, Shape::kStreams));
    int64_t best = least;
    for (int64_t i = 0; i <= kTried; ++i) {
      const int64_t tiles = least + (most - least) * i / kTried;
      if (cost(tiles) < cost(best)) best = tiles;
    }
    keys = best * 128;
  });
  return keys;
}

void probe_sm90(const SelectProblem& select, const Problem& problem, const ProbeWork& work,
                void* stream) {
  dispatch_shape(problem, [&]<typename Shape> {
    ProbeSm90Params params{};
    params.select = select;
    // The softmax takes the maximum before it scales, which needs a positive scale.
    const float scale = problem.scale;
    params.scores_scale = scale > 0 ? 1 : scale;
    params.scale_log2 = scale > 0 ? select.scale_log2 : std::numbers::log2e_v<float>;
    params.box_rows = problem.page_table == nullptr ? 128 : std::gcd(select.problem.page_size, 128);
    params.q_packed = problem.q_view.rank == 3 ? 1 : 0;
    params.kv_packed = problem.k_view.rank == 3 ? 1 : 0;
    params.q_map = sm90::make_tensor_map(problem.q_view, problem.d_qk, 128);
    params.k_map = sm90::make_tensor_map(problem.k_view, problem.d_qk, params.box_rows);
    params.slices = static_cast<int32_t>(most_slices<Shape>(work));
    const int64_t ctas =
        params.slices * problem.h_kv * problem.b() * ceil_div(select.max_chunks, Shape::kStreams);
    if (ctas > std::numeric_limits<int32_t>::max()) {
      throw Error(ErrorCode::kUnsupported,
                  "select: expected at most 2^31 - 1 CTAs, got " + std::to_string(ctas));
    }
    launch_probe_sm90<Shape>(params, static_cast<uint32_t>(ctas), stream);
  });
}

}  // namespace flexprefill
