// attend on cards of compute capability 9.0, the host's half: which calls TMA can address, tensor
// maps, and the choice of a kernel. The kernel and its schedule: attend_sm90_kernel.cuh.
#include <cmath>
#include <numeric>

#include "attend/attend_sm90_plan.cuh"
#include "cuda/backend_cuda.h"
#include "cuda/tensor_map.cuh"

namespace flexprefill {
namespace {

constexpr float kLog2E = 1.44269504088896340736f;

// Of the means of every block, one row after another.
sm90::TensorMap mean_map(void* means, const DeviceProblem& problem, int32_t d, DType dtype,
                         int32_t box_rows) {
  const TensorView view{.data = means,
                        .dtype = dtype,
                        .rank = 3,
                        .shape = {problem.mean_rows, 1, d, 0},
                        .strides = {d, d, 1, 0}};
  return sm90::make_tensor_map(view, d, box_rows);
}

// Calls f.operator()<Shape>() with the kernel for the call's element type, head dims and blocks.
template <typename F>
void dispatch_shape(const DeviceProblem& problem, F&& f) {
  const auto with_block = [&]<typename Element, int kDimQk, int kDimV> {
    if (problem.block_size == 128) {
      f.template operator()<AttendShape<Element, kDimQk, kDimV, 128>>();
    } else {
      f.template operator()<AttendShape<Element, kDimQk, kDimV, 64>>();
    }
  };
  const auto with_dims = [&]<typename Element> {
    if (problem.d_qk <= 64 && problem.d_v <= 64) {
      with_block.template operator()<Element, 64, 64>();
    } else if (problem.d_qk <= 128 && problem.d_v <= 128) {
      with_block.template operator()<Element, 128, 128>();
    } else if (problem.d_qk <= 192 && problem.d_v <= 128) {
      with_block.template operator()<Element, 192, 128>();
    } else {
      with_block.template operator()<Element, 256, 256>();
    }
  };
  if (problem.dtype == DType::kBFloat16) {
    with_dims.template operator()<__nv_bfloat16>();
  } else {
    with_dims.template operator()<__half>();
  }
}

}  // namespace

bool attend_sm90_takes(const Problem& problem) {
  return (problem.block_size == 64 || problem.block_size == 128) &&
         sm90::can_address(problem.q_view) && sm90::can_address(problem.k_view) &&
         sm90::can_address(problem.v_view) && sm90::can_address(problem.out_view);
}

void attend_sm90(const DeviceProblem& device_problem, const Problem& problem,
                 const DeviceRows& rows, const Execution& execution, Arena& arena) {
  const DeviceInfo& device = device_info();
  AttendSm90Params params{};
  params.problem = device_problem;
  params.rows = rows;
  params.order = take_work_order(device_problem, rows.bits != nullptr, device.l2_bytes, arena);
  const MeanRows means = take_mean_rows(device_problem, rows, arena);
  if (arena.counting() || device_problem.index_rows == 0) return;
  params.mask = TokenMask::of(rows.window);
  // The softmax takes the maximum before it scales, which needs a positive scale.
  const float scale = device_problem.scale;
  params.scores_scale = scale > 0 ? 1 : scale;
  params.scale_log2 = scale > 0 ? scale * kLog2E : kLog2E;
  params.mean_bias = std::log2(static_cast<float>(problem.block_size)) / params.scale_log2;
  params.q_packed = problem.q_view.rank == 3 ? 1 : 0;
  params.kv_packed = problem.k_view.rank == 3 ? 1 : 0;
  dispatch_shape(device_problem, [&]<typename Shape> {
    params.kv_box_rows = problem.page_table == nullptr
                             ? Shape::kTileKv
                             : std::gcd(device_problem.page_size, Shape::kTileKv);
    params.q_map = sm90::make_tensor_map(problem.q_view, problem.d_qk, Shape::kQBoxRows);
    params.k_map = sm90::make_tensor_map(problem.k_view, problem.d_qk, params.kv_box_rows);
    params.v_map = sm90::make_tensor_map(problem.v_view, problem.d_v, params.kv_box_rows);
    params.out_map = sm90::make_tensor_map(problem.out_view, problem.d_v, Shape::kOutBoxRows);
    if (means.k != nullptr) {
      params.k_mean_map =
          mean_map(means.k, device_problem, problem.d_qk, problem.dtype, Shape::kTileKv);
      params.v_mean_map =
          mean_map(means.v, device_problem, problem.d_v, problem.dtype, Shape::kTileKv);
    }
    make_work_order(device_problem, rows, params.order, execution.stream);
    make_mean_rows(device_problem, means, execution.stream);
    launch_attend_sm90<Shape>(params, device.multiprocessors, execution.stream);
  });
}

}  // namespace flexprefill
