#include <cuda_runtime_api.h>

#include <algorithm>
#include <numbers>

#include "cuda/cuda_check.h"
#include "select/choose_cuda.cuh"
#include "select/map_cuda.cuh"
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

static __global__ void __launch_bounds__(kChooseThreads)
    take_kernel(const float* x, int64_t size, Weight weight, uint64_t limit, Taken* taken) {
  auto& shared = *reinterpret_cast<TakeShared<kChooseThreads>*>(shared_memory());
  const Taken result = take_largest_cta<kChooseThreads>(x, size, weight, limit, shared);
  if (threadIdx.x == 0) *taken = result;
}

static __global__ void flag_taken_kernel(const float* x, int64_t size, const Taken* taken,
                                         uint8_t* flags) {
  for_each_taken_warp(x, size, *taken, [&](int64_t e) { flags[e - 1] = 1; });
}

// The map whose masses the sweeps see: [n_q, n_kv].
static __global__ void __launch_bounds__(kMapThreads)
    read_map_kernel(const SelectProblem select, int32_t row_tiles, int32_t words, float* map) {
  auto& shared = *reinterpret_cast<MapShared*>(shared_memory());
  const DeviceSequence& sequence = select.problem.sequences[0];
  const MapTile tile(select, blockIdx.x, row_tiles, words);
  float scores[4][4] = {};
  map_scores(select, tile, sequence, shared, scores);
  map_masses(select, tile, sequence, last_share(select, sequence), scores);
  const auto thread = static_cast<int32_t>(threadIdx.x);
  for (int32_t a = 0; a < 4; ++a) {
    for (int32_t b = 0; b < 4; ++b) {
      const int32_t r = tile.q_block + thread / 16 + 16 * a;
      const int32_t j = tile.k_word * kMapTile + thread % 16 + 16 * b;
      if (r < sequence.n_q && j < sequence.n_kv) {
        map[static_cast<int64_t>(r) * sequence.n_kv + j] = scores[a][b];
      }
    }
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
  const float* scores = arrays.put(x);
  const auto size = static_cast<int64_t>(x.size());
  auto* taken = arrays.take<Taken>(2);
  uint8_t* flags = arrays.put(std::vector<uint8_t>(x.size(), 0));
  const size_t shared = sizeof(TakeShared<kChooseThreads>);
  launch(take_kernel, dim3(1), dim3(kChooseThreads), shared, nullptr, scores, size, weight, limit,
         taken);
  launch(take_kernel, dim3(1), dim3(kChooseThreads), shared, nullptr, scores + 1, size - 1, weight,
         limit, taken + 1);
  launch(flag_taken_kernel, dim3(1), dim3(32), 0, nullptr, scores, size, taken + 1, flags);
  TakenOnDevice result{DeviceArrays::get(taken, 1)[0], DeviceArrays::get(flags, x.size())};
  result.entries.pop_back();
  return result;
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
  plan.probe_rows = narrow(probe.rows);
  plan.probe_first_row = narrow(probe.first_row);
  plan.probe_position = narrow(probe.position);
  plan.vertical_low = plan.slash_low = narrow(rule.min_blocks);
  plan.vertical_high = plan.slash_high = narrow(rule.max_blocks);
  plan.probed = 1;

  SelectProblem select{};
  DeviceProblem& problem = select.problem;
  // Queries of 1/2 in every column.
  const std::vector<uint16_t> q(input.lengths.s_q * kHeadDim, 0x3f00);
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
  select.pooled = arrays.take<float>(2 * grid.n_kv);
  select.k_means = arrays.put(input.k_means);
  select.choices = arrays.take<HeadChoice>(1);
  select.vertical_bits = arrays.take<uint64_t>(words);
  select.slash_bits = arrays.take<uint64_t>(words);
  select.map_heads = arrays.take<int32_t>(1);
  select.map_count = arrays.put(std::vector<int32_t>{0});
  select.map_states = arrays.take<MapState>(1);
  select.histograms = arrays.take<Histogram>(1);
  select.row_offsets = arrays.take<float>(grid.n_q);
  select.tile_stats = arrays.take<float2>(grid.n_q * words);
  select.tile_ties = arrays.take<uint8_t>(grid.n_q * words);
  select.bits = arrays.put(std::vector<uint64_t>(grid.n_q * words, 0));

  const auto pieces = narrow((input.lengths.s_kv + kFinishEntries - 1) / kFinishEntries);
  launch(finish_scores_kernel, dim3(2 * pieces), dim3(kFinishThreads), kFinishSharedBytes, nullptr,
         select, pieces);
  launch(choose_kernel<__nv_bfloat16>, dim3(2), dim3(kChooseThreads), sizeof(ChooseShared), nullptr,
         select);
  ChoiceResult result;
  result.choice = DeviceArrays::get(select.choices, 1)[0];
  result.vertical_block = DeviceArrays::get(select.vertical_block, grid.n_kv);
  result.slash_block = DeviceArrays::get(select.slash_block, grid.n_kv);
  result.pooled = DeviceArrays::get(select.pooled, grid.n_kv);
  result.vertical_bits = DeviceArrays::get(select.vertical_bits, words);
  result.slash_bits = DeviceArrays::get(select.slash_bits, words);
  if (result.choice.pattern != HeadPattern::kQueryAware) return result;

  // The means of the queries are made, then the test's own put in their place.
  select.q_means = arrays.take<float>(grid.n_q * kHeadDim);
  launch(map_means_kernel<__nv_bfloat16>, dim3(2), dim3(kMapThreads),
         kMapThreads * 8 * sizeof(float), nullptr, select);
  select.q_means = arrays.put(input.q_means);
  const auto row_tiles = narrow((grid.n_q + kMapTile - 1) / kMapTile);
  for (const MapSweep sweep : {MapSweep::kStats, MapSweep::kLevel0, MapSweep::kLevel1,
                               MapSweep::kLevel2, MapSweep::kTies, MapSweep::kKeep}) {
    launch(map_sweep_kernel, dim3(3), dim3(kMapThreads), sizeof(MapShared), nullptr, select, sweep,
           row_tiles, narrow(words));
  }
  result.kept = DeviceArrays::get(select.bits, grid.n_q * words);
  auto* map = arrays.take<float>(grid.n_q * grid.n_kv);
  launch(read_map_kernel, dim3(static_cast<uint32_t>(row_tiles * words)), dim3(kMapThreads),
         sizeof(MapShared), nullptr, select, row_tiles, narrow(words), map);
  const std::vector<float> square = DeviceArrays::get(map, grid.n_q * grid.n_kv);
  for (int64_t r = 0; r < grid.n_q; ++r) {
    const auto row = square.begin() + r * grid.n_kv;
    result.map.insert(result.map.end(), row, row + grid.first_q_block + r + 1);
  }
  return result;
}

}  // namespace flexprefill::testing
