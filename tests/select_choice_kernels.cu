#include <cuda_runtime_api.h>

#include <bit>
#include <numbers>

#include "cuda/cuda_check.h"
#include "select/choose_cuda.cuh"
#include "select/map_cuda.cuh"
#include "select/select_cover_cuda_rows.cuh"
#include "select/select_rows.h"
#include "select_choice.h"

namespace flexprefill::testing {
namespace {

constexpr int32_t kHeadDim = 16;

// Device memory that goes with its owner.
class DeviceArrays {
 public:
  DeviceArrays() = default;
  DeviceArrays(const DeviceArrays&) = delete;
  DeviceArrays& operator=(const DeviceArrays&) = delete;
  ~DeviceArrays() {
    for (void* array : arrays_) static_cast<void>(cudaFree(array));
  }
  // Poisoned.
  template <typename T>
  T* take(size_t n) {
    void* array = nullptr;
    cuda_check(cudaMalloc(&array, n * sizeof(T)), "memory of a test");
    arrays_.push_back(array);
    cuda_check(cudaMemset(array, 0xff, n * sizeof(T)), "memory of a test");
    return static_cast<T*>(array);
  }
  template <typename T>
  T* put(const std::vector<T>& from) {
    T* to = take<T>(from.size());
    cuda_check(cudaMemcpy(to, from.data(), from.size() * sizeof(T), cudaMemcpyHostToDevice),
               "memory of a test");
    return to;
  }
  template <typename T>
  static std::vector<T> get(const T* from, size_t n) {
    std::vector<T> to(n);
    cuda_check(cudaMemcpy(to.data(), from, n * sizeof(T), cudaMemcpyDeviceToHost),
               "memory of a test");
    return to;
  }

 private:
  std::vector<void*> arrays_;
};

template <int kEntries>
__device__ void keep_best_of(const float* scores, int32_t i, int32_t n, int64_t count,
                             uint64_t* row) {
  float x[kEntries];
#pragma unroll
  for (int e = 0; e < kEntries; ++e) {
    const int32_t j = lane_here() + 32 * e;
    x[e] = j <= i ? scores[j] : 0;
  }
  keep_best_entries(x, i, n, count, row);
}

static __global__ void keep_row_kernel(RowRule rule, const float* scores, int64_t i, int64_t n,
                                       float threshold, FlashPrefillRule above, int64_t count,
                                       uint64_t* row) {
  if (rule == RowRule::kReaching) {
    keep_reaching_warp(scores, i, n, threshold, row);
  } else if (rule == RowRule::kAbove) {
    keep_above_warp(scores, i, n, above, row);
  } else if (rule == RowRule::kBestEntries) {
    const auto blocks = static_cast<int32_t>(n), last = static_cast<int32_t>(i);
    if (i < 32 * 8) {
      keep_best_of<8>(scores, last, blocks, count, row);
    } else {
      keep_best_of<32>(scores, last, blocks, count, row);
    }
  } else {
    keep_best_warp(scores, i, n, count, row);
  }
}

static __global__ void keep_cover_kernel(const __half* scores, int32_t i, int32_t n,
                                         BlockCoverRule rule, const uint64_t* columns,
                                         const float* most_asked, uint64_t* row, RowMass* mass) {
  auto& shared = *reinterpret_cast<CoverSharedWarp*>(shared_memory());
  for (int k = 0; k < 8; ++k) {
    for (int e = 0; e < 4; ++e) shared.bins[k][threadIdx.x][e] = 0;
  }
  __syncwarp();
  // Twice: the shared memory is as it was.
  for (int turn = 0; turn < 2; ++turn) {
    const RowMass kept =
        keep_cover_warp(scores, i, n, rule, columns, most_asked, true, shared, row);
    if (threadIdx.x == 0) *mass = kept;
  }
}

static __global__ void __launch_bounds__(kChooseThreads, 1)  // without the 1 it spills
    take_kernel(const float* x, int64_t size, Weight weight, uint64_t limit, Taken* taken,
                uint64_t* bits) {
  auto& shared = *reinterpret_cast<ChooseShared*>(shared_memory());
  const Taken result = take_largest_cta<kChooseThreads>(x, size, weight, limit, shared.take);
  if (threadIdx.x == 0) *taken = result;
  const auto value = [&](int64_t e) { return x[e]; };
  for (int32_t reversed = 0; reversed < 2; ++reversed) {  // over a list: in local memory
    write_taken_bits<kChooseThreads>(size, result, reversed != 0, value, shared.ties,
                                     bits + reversed * ((size + 63) / 64));
  }
}

}  // namespace

bool has_device() {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) == cudaSuccess && devices > 0) return true;
  static_cast<void>(cudaGetLastError());
  return false;
}

TakenOnDevice take_on_device(const std::vector<float>& x, Weight weight, uint64_t limit) {
  DeviceArrays arrays;
  const auto size = static_cast<int64_t>(x.size()), words = (size + 63) / 64;
  auto* taken = arrays.take<Taken>(1);
  auto* bits = arrays.take<uint64_t>(2 * words);
  launch(take_kernel, dim3(1), dim3(kChooseThreads), sizeof(ChooseShared), nullptr, arrays.put(x),
         size, weight, limit, taken, bits);
  return {DeviceArrays::get(taken, 1)[0], DeviceArrays::get(bits, words),
          DeviceArrays::get(bits + words, words)};
}

ChoiceResult choose_on_device(const ChoiceInput& input) {
  DeviceArrays arrays;
  const BlockGrid grid = block_grid(input.lengths, input.block_size);
  const int64_t words = BlockBits::words_per_row(grid);
  const Probe probe(input.lengths, input.block_size);
  const FlexPrefillRule rule = flex_prefill_rule(input.pattern, input.block_size, grid.n_kv);
  const auto narrow = [](int64_t x) { return static_cast<int32_t>(x); };
  DeviceSequence sequence{};
  sequence.s_q = narrow(input.lengths.s_q);
  sequence.s_kv = narrow(input.lengths.s_kv);
  sequence.first_q_block = narrow(grid.first_q_block);
  sequence.n_q = narrow(grid.n_q);
  sequence.n_kv = narrow(grid.n_kv);
  sequence.words_per_row = narrow(words);
  SelectSequence plan{};
  plan.chunks = 1;
  plan.slices = narrow((input.lengths.s_kv + kSliceEntries - 1) / kSliceEntries);
  plan.probe_rows = narrow(probe.rows);
  plan.probe_first_row = narrow(probe.first_row);
  plan.probe_position = narrow(probe.position);
  plan.vertical_low = plan.slash_low = narrow(rule.min_blocks);
  plan.vertical_high = plan.slash_high = narrow(rule.max_blocks);
  plan.probed = 1;

  SelectProblem select{};
  DeviceProblem& problem = select.problem;
  // Rows of one query block are alike.
  std::vector<uint16_t> q(input.lengths.s_q * kHeadDim);
  for (int64_t i = 0; i < input.lengths.s_q; ++i) {
    const int64_t position = input.lengths.s_kv - input.lengths.s_q + i;
    const int64_t row = position / input.block_size - grid.first_q_block;
    for (int64_t c = 0; c < kHeadDim; ++c) {
      const float x = input.q.empty() ? 0.5f : input.q[row * kHeadDim + c];
      q[i * kHeadDim + c] = static_cast<uint16_t>(std::bit_cast<uint32_t>(x) >> 16);
    }
  }
  problem.q = {.data = reinterpret_cast<std::byte*>(arrays.put(q)),
               .sequence_stride = 0,
               .row_stride = kHeadDim,
               .head_stride = 0,
               .element_bytes = 2};
  problem.b = problem.h_q = problem.h_kv = 1;
  problem.d_qk = problem.d_v = kHeadDim;
  problem.block_size = input.block_size;
  problem.dtype = DType::kBFloat16;
  problem.sequences = arrays.put(std::vector<DeviceSequence>{sequence});
  problem.max_n_q = sequence.n_q;
  problem.max_n_kv = sequence.n_kv;
  select.sequences = arrays.put(std::vector<SelectSequence>{plan});
  select.chunk_keys = narrow((input.lengths.s_kv + 127) / 128 * 128);
  select.max_chunks = 1;
  select.scale_log2 = std::numbers::log2e_v<float>;
  select.q_aligned = select.k_aligned = select.by_blocks = true;
  select.gamma = input.pattern.gamma;
  select.tau = input.pattern.tau;
  select.slash_tails = arrays.take<float>(128);
  select.dead = arrays.put(std::vector<uint8_t>{0});
  select.vertical = arrays.put(input.vertical);
  select.slash = arrays.put(input.slash);
  select.vertical_block = arrays.take<float>(grid.n_kv);
  select.slash_block = arrays.take<float>(grid.n_kv);
  select.pooled = arrays.put(input.pooled);
  select.k_means = arrays.put(input.k_means);
  select.choices = arrays.take<HeadChoice>(1);
  select.parts = arrays.take<CoverPart>(2 * plan.slices);
  select.vertical_bits = arrays.take<uint64_t>(words);
  select.slash_bits = arrays.take<uint64_t>(words);
  select.map_heads = arrays.take<int32_t>(1);
  select.map_count = arrays.put(std::vector<int32_t>{0});
  select.map_states = arrays.take<MapState>(1);
  select.map_sums = arrays.take<MapSums>(1);
  select.map_room = causal_blocks(grid);
  select.maps = arrays.take<float>(select.map_room);
  select.bits = arrays.take<uint64_t>(grid.n_q * words);

  if (select.by_blocks) {
    launch(patterns_kernel, dim3(1), dim3(kChooseThreads), sizeof(ChooseShared), nullptr, select);
  }
  if (plan.slices > 1) {
    launch(slices_kernel, dim3(static_cast<uint32_t>(2 * plan.slices)), dim3(kChooseThreads),
           sizeof(ChooseShared), nullptr, select, plan.slices);
  }
  launch(plan.slices > 1 ? choose_kernel<true> : choose_kernel<false>, dim3(2),
         dim3(kChooseThreads), sizeof(ChooseShared), nullptr, select);
  ChoiceResult result;
  result.choice = DeviceArrays::get(select.choices, 1)[0];
  result.vertical_block = DeviceArrays::get(select.vertical_block, grid.n_kv);
  result.slash_block = DeviceArrays::get(select.slash_block, grid.n_kv);
  result.pooled = DeviceArrays::get(select.pooled, grid.n_kv);
  result.vertical_bits = DeviceArrays::get(select.vertical_bits, words);
  result.slash_bits = DeviceArrays::get(select.slash_bits, words);
  if (result.choice.pattern != HeadPattern::kQueryAware) return result;

  const auto strips = narrow((grid.n_q + kMapRows - 1) / kMapRows);
  const bool small = grid.n_kv <= input.small_map;
  launch(map_rows_kernel<__nv_bfloat16>, dim3(3), dim3(kMapThreads), sizeof(MapShared), nullptr,
         select, 0, strips, small, false);
  if (!small) {
    const auto pieces = narrow((select.map_room + kMapPiece - 1) / kMapPiece);
    for (const int32_t level : {1, 2}) {
      launch(map_level_kernel, dim3(2), dim3(kMapThreads), sizeof(MapShared), nullptr, select, 0,
             level, pieces);
    }
  }
  launch(map_keep_kernel, dim3(2), dim3(kKeepThreads), sizeof(KeepShared), nullptr, select, 0,
         narrow((grid.n_q + kMapKeepRows - 1) / kMapKeepRows));
  result.kept = DeviceArrays::get(select.bits, grid.n_q * words);
  result.map = DeviceArrays::get(select.maps, select.map_room);
  return result;
}

std::vector<uint64_t> keep_row_on_device(const RowInput& input, RowMass* mass) {
  DeviceArrays arrays;
  const size_t words = static_cast<size_t>((input.n + 63) / 64);
  const float* scores = arrays.put(input.scores);
  auto* row = arrays.take<uint64_t>(words);
  if (input.rule == RowRule::kCover) {
    auto* kept = arrays.take<RowMass>(1);
    const uint64_t* columns = input.columns.empty() ? nullptr : arrays.put(input.columns);
    std::vector<uint16_t> halves((input.scores.size() + 7) / 8 * 8, 0xffff);
    for (size_t j = 0; j < input.scores.size(); ++j) {
      const __half entry = __float2half_rn(input.scores[j] * kMapUnits);
      halves[j] = std::bit_cast<__half_raw>(entry).x;
    }
    launch(keep_cover_kernel, dim3(1), dim3(32), sizeof(CoverSharedWarp), nullptr,
           reinterpret_cast<const __half*>(arrays.put(halves)),
           static_cast<int32_t>(input.scores.size()) - 1, static_cast<int32_t>(input.n),
           input.cover, columns, static_cast<const float*>(arrays.put(input.most_asked)), row,
           kept);
    cuda_check(cudaDeviceSynchronize(), "a row");
    if (mass != nullptr) *mass = DeviceArrays::get(kept, 1)[0];
    return DeviceArrays::get(row, words);
  }
  launch(keep_row_kernel, dim3(1), dim3(32), 0, nullptr, input.rule, scores,
         static_cast<int64_t>(input.scores.size()) - 1, input.n, input.threshold, input.above,
         input.count, row);
  cuda_check(cudaDeviceSynchronize(), "a row");
  return DeviceArrays::get(row, words);
}

}  // namespace flexprefill::testing
