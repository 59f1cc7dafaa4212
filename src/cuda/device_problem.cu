// DeviceProblem from a Problem; the table of sequences is written by kernels from their parameters.
#include <algorithm>

#include "cuda/device_problem.h"
#include "cuda/launch.cuh"

namespace flexprefill {
namespace {

// As many sequences as the parameters of one launch hold (4 KB).
struct SequenceChunk {
  static constexpr int kSize = 55;
  DeviceSequence sequences[kSize];
};
static_assert(sizeof(SequenceChunk) <= 4000);
constexpr int kSequenceThreads = 64;

__global__ void write_sequences(const __grid_constant__ SequenceChunk chunk, int count,
                                DeviceSequence* to) {
  await_previous_kernel();
  start_next_kernel();
  const int i = static_cast<int>(threadIdx.x);
  if (i < count) to[i] = chunk.sequences[i];
}

DeviceTensor device_tensor(const TensorView& view) {
  DeviceTensor tensor{};
  tensor.data = static_cast<std::byte*>(view.data);
  tensor.element_bytes = static_cast<int32_t>(element_size(view.dtype));
  const bool packed = view.rank == 3;
  tensor.sequence_stride = packed ? 0 : view.strides[0];
  tensor.row_stride = view.strides[packed ? 0 : 1];
  tensor.head_stride = view.strides[packed ? 1 : 2];
  return tensor;
}

DeviceSequence device_sequence(const Problem& problem, const BlockBits& bits, int64_t first_mean,
                               int64_t s) {
  const SequenceLengths lengths = problem.lengths[s];
  const BlockGrid& grid = problem.grids[s];
  return {.q_start = problem.q_start.empty() ? 0 : problem.q_start[s],
          .kv_start = problem.kv_start.empty() ? 0 : problem.kv_start[s],
          .first_row = problem.first_row[s],
          .first_word = bits.first_word[s],
          .first_mean = first_mean,
          .s_q = static_cast<int32_t>(lengths.s_q),
          .s_kv = static_cast<int32_t>(lengths.s_kv),
          .first_q_block = static_cast<int32_t>(grid.first_q_block),
          .n_q = static_cast<int32_t>(grid.n_q),
          .n_kv = static_cast<int32_t>(grid.n_kv),
          .words_per_row = static_cast<int32_t>(BlockBits::words_per_row(grid)),
          .unused = 0};
}

}  // namespace

DeviceProblem make_device_problem(const Problem& problem, Arena& arena, void* stream) {
  DeviceProblem device{};
  device.q = device_tensor(problem.q_view);
  device.k = device_tensor(problem.k_view);
  device.v = device_tensor(problem.v_view);
  device.out = device_tensor(problem.out_view);
  if (problem.lse_view.data != nullptr) {
    const bool packed = problem.lse_view.rank == 2;
    device.lse = static_cast<float*>(problem.lse_view.data);
    device.lse_sequence_stride = packed ? 0 : problem.lse_view.strides[0];
    device.lse_head_stride = problem.lse_view.strides[packed ? 0 : 1];
  }
  device.page_table = problem.page_table;
  device.page_table_stride = problem.page_table_stride;
  if (problem.page_table != nullptr) {
    device.page_size = static_cast<int32_t>(problem.k_view.shape[1]);
  }
  device.b = static_cast<int32_t>(problem.b());
  device.h_q = problem.h_q;
  device.h_kv = problem.h_kv;
  device.d_qk = problem.d_qk;
  device.d_v = problem.d_v;
  device.block_size = problem.block_size;
  device.dtype = problem.dtype;
  device.gqa_interleave = problem.gqa_interleave;
  device.scale = problem.scale;
  device.index_rows = problem.first_row.back();
  for (const BlockGrid& grid : problem.grids) {
    device.max_n_q = std::max(device.max_n_q, static_cast<int32_t>(grid.n_q));
    device.max_n_kv = std::max(device.max_n_kv, static_cast<int32_t>(grid.n_kv));
    device.q_blocks += grid.n_q;
    device.mean_rows += problem.h_kv * grid.n_kv;
  }

  auto* sequences = arena.take<DeviceSequence>(problem.lengths.size());
  device.sequences = sequences;
  if (arena.counting()) return device;
  const BlockBits bits = BlockBits::layout(problem);
  int64_t first_mean = 0;
  for (int64_t first = 0; first < problem.b(); first += SequenceChunk::kSize) {
    SequenceChunk chunk{};
    const int64_t count = std::min<int64_t>(SequenceChunk::kSize, problem.b() - first);
    for (int64_t i = 0; i < count; ++i) {
      chunk.sequences[i] = device_sequence(problem, bits, first_mean, first + i);
      first_mean += problem.h_kv * problem.grids[first + i].n_kv;
    }
    launch_overlapped(write_sequences, dim3(1), dim3(kSequenceThreads), 0, stream, chunk,
                      static_cast<int>(count), sequences + first);
  }
  return device;
}

}  // namespace flexprefill
