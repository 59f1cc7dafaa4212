// What the CPU backend's parts and the whole of attend reach, on every target of this machine.
//
//   cpu_bench --benchmark_min_time=1 [--benchmark_filter=attend/amx] [--benchmark_format=json]
//
// fma_peak is the most that one core's vector units do (two operations an FMA), for comparison;
// `rate` counts the operations of a product, 2 * 128 * 128 * d for a block. docs/cpu.md reads it.
#include <benchmark/benchmark.h>

#include <algorithm>
#include <memory>
#include <random>
#include <string>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "cpu/tile_ops.h"
#include "flexprefill/flexprefill.h"
#include "math.h"
#include "problem.h"

namespace flexprefill {
namespace {

void count_operations(benchmark::State& state, double operations) {
  if (operations == 0) return;
  state.counters["rate"] = benchmark::Counter(operations * static_cast<double>(state.iterations()),
                                              benchmark::Counter::kIsRate);
}

#if defined(__x86_64__)
constexpr int kChains = 12;  // enough for 2 units of latency 4 to 5
#define FLEXPREFILL_FMA_CHAINS(load)                                                         \
  auto x = load(.999f), y = load(.001f);                                                     \
  auto a = x, b = x, c = x, d = x, e = x, f = x, g = x, h = x, i = x, j = x, k = x, l = x;   \
  for (auto _ : state) {                                                                     \
    for (int n = 0; n < 1000; ++n) {                                                         \
      asm volatile(                                                                          \
          "vfmadd213ps %13,%12,%0\n vfmadd213ps %13,%12,%1\n vfmadd213ps %13,%12,%2\n"       \
          "vfmadd213ps %13,%12,%3\n vfmadd213ps %13,%12,%4\n vfmadd213ps %13,%12,%5\n"       \
          "vfmadd213ps %13,%12,%6\n vfmadd213ps %13,%12,%7\n vfmadd213ps %13,%12,%8\n"       \
          "vfmadd213ps %13,%12,%9\n vfmadd213ps %13,%12,%10\n vfmadd213ps %13,%12,%11\n"     \
          : "+v"(a), "+v"(b), "+v"(c), "+v"(d), "+v"(e), "+v"(f), "+v"(g), "+v"(h), "+v"(i), \
            "+v"(j), "+v"(k), "+v"(l)                                                        \
          : "v"(x), "v"(y));                                                                 \
    }                                                                                        \
  }                                                                                          \
  count_operations(state, 2.0 * 1000 * kChains * sizeof(x) / sizeof(float))

__attribute__((target("avx2,fma"))) void fma_peak_avx2(benchmark::State& state) {
  FLEXPREFILL_FMA_CHAINS(_mm256_set1_ps);
}
__attribute__((target("avx512f"))) void fma_peak_avx512(benchmark::State& state) {
  FLEXPREFILL_FMA_CHAINS(_mm512_set1_ps);
}
#undef FLEXPREFILL_FMA_CHAINS
#endif

struct Free {
  void operator()(void* p) const { std::free(p); }
};
template <typename T>
using Buffer = std::unique_ptr<T[], Free>;

template <typename T>
Buffer<T> allocate(size_t n) {
  const size_t bytes = (n * sizeof(T) + 63) / 64 * 64;
  Buffer<T> buffer(static_cast<T*>(std::aligned_alloc(64, bytes)));
  std::fill_n(reinterpret_cast<std::byte*>(buffer.get()), bytes, std::byte{0});
  return buffer;
}

std::vector<std::byte> random_elements(int64_t n, DType dtype) {
  std::vector<std::byte> elements(n * element_size(dtype));
  std::mt19937 generator(1);
  std::normal_distribution<float> normal;
  for (int64_t i = 0; i < n; ++i) {
    store_float(elements.data() + i * element_size(dtype), dtype, normal(generator));
  }
  return elements;
}

// One block of 128 queries and 128 keys, with everything in the caches as a task has it.
struct Block {
  static constexpr int kSize = 128;
  const TileOps& ops;
  const int d, panels;
  const int64_t stride;
  std::vector<std::byte> rows;
  Buffer<std::byte> q, k, v;
  Buffer<float> s, o, max, sum;

  Block(const TileOps& table, DType dtype, int head_dim)
      : ops(table),
        d(head_dim),
        panels(kSize / table.panel),
        stride(2 * head_dim * static_cast<int64_t>(element_size(dtype))),
        rows(random_elements(2 * kSize * head_dim, dtype)),
        q(allocate<std::byte>(panels * table.packed_q_bytes(head_dim))),
        k(allocate<std::byte>(table.key_bytes(head_dim))),
        v(allocate<std::byte>(table.value_bytes(head_dim))),
        s(allocate<float>(kSize * table.panel)),
        o(allocate<float>(panels * TileOps::output_rows(head_dim) * table.panel)),
        max(allocate<float>(kSize)),
        sum(allocate<float>(kSize)) {
    for (int p = 0; p < panels; ++p) {
      ops.pack_q(rows.data() + p * ops.panel * stride, stride, ops.panel, d, packed_q(p));
    }
    std::fill_n(max.get(), kSize, 100.0f);
    load();
  }
  std::byte* packed_q(int p) { return q.get() + p * ops.packed_q_bytes(d); }
  void load() {
    ops.load_keys(rows.data(), stride, kSize, 0, d, k.get());
    ops.load_values(rows.data(), stride, kSize, 0, d, v.get());
  }
  void scores(int p) { ops.scores(packed_q(p), k.get(), 0, kSize, d, s.get()); }
  void weigh(int p) {
    ops.weigh(s.get(), kSize, 0.1f, d, max.get() + p * ops.panel, sum.get() + p * ops.panel,
              output(p));
  }
  void accumulate(int p) { ops.accumulate(s.get(), v.get(), kSize, d, output(p)); }
  float* output(int p) { return o.get() + p * TileOps::output_rows(d) * ops.panel; }
  double product() const { return 2.0 * kSize * kSize * d; }
};

void attend_dense(benchmark::State& state, CpuTarget target, DType dtype, int d, int threads) {
  const int64_t s = 4096, h_q = 8, h_kv = 2;
  auto q = random_elements(s * h_q * d, dtype), k = random_elements(s * h_kv * d, dtype);
  auto v = k, out = q;
  AttentionInput input;
  input.q = contiguous_view(q.data(), dtype, std::vector<int64_t>{1, s, h_q, d});
  input.k = contiguous_view(k.data(), dtype, std::vector<int64_t>{1, s, h_kv, d});
  input.v = contiguous_view(v.data(), dtype, std::vector<int64_t>{1, s, h_kv, d});
  const TensorView view = contiguous_view(out.data(), dtype, std::vector<int64_t>{1, s, h_q, d});
  const Execution execution{Backend::kCpu, target, threads};
  WorkspaceBuffer workspace;
  for (auto _ : state) {
    attend(input, nullptr, execution, workspace.reserve(attend_workspace_size(input, execution)),
           view);
  }
  count_operations(state, 2.0 * static_cast<double>(s * s * d * h_q));
}

void register_table(CpuTarget target, DType dtype, int d) {
  const TileOps* ops = &tile_ops(target, dtype);
  const std::string suffix = std::string("/") + cpu_target_name(target) + "/" + dtype_name(dtype) +
                             "/d" + std::to_string(d);
  const auto add = [&](const char* name, double products, auto&& step) {
    benchmark::RegisterBenchmark((name + suffix).c_str(), [=](benchmark::State& state) {
      Block block(*ops, dtype, d);
      for (auto _ : state) step(block);
      count_operations(state, products * block.product());
    });
  };
  const auto each_panel = [](auto operation) {
    return [=](Block& block) {
      for (int p = 0; p < block.panels; ++p) operation(block, p);
    };
  };
  add("load", 0, [](Block& block) { block.load(); });
  add("scores", 1, each_panel([](Block& block, int p) { block.scores(p); }));
  add("weigh", 0, each_panel([](Block& block, int p) { block.weigh(p); }));
  add("accumulate", 1, each_panel([](Block& block, int p) { block.accumulate(p); }));
  add("block", 2, [](Block& block) {
    block.load();
    for (int p = 0; p < block.panels; ++p) {
      block.scores(p);
      block.weigh(p);
      block.accumulate(p);
    }
  });
  if (ops->attend != nullptr) {
    add("attend", 2, each_panel([](Block& block, int p) {
          block.ops.attend(block.packed_q(p), block.k.get(), block.v.get(), Block::kSize,
                           Block::kSize, block.d, block.d, 0.1f, block.s.get(),
                           block.max.get() + p * block.ops.panel,
                           block.sum.get() + p * block.ops.panel, block.output(p));
        }));
  }
  for (const int threads : {1, 0}) {
    benchmark::RegisterBenchmark(
        ("attend" + suffix + (threads == 1 ? "/1" : "/all")).c_str(),
        [=](benchmark::State& state) { attend_dense(state, target, dtype, d, threads); })
        ->UseRealTime();
  }
}

void register_all() {
#if defined(__x86_64__)
  for (const CpuTarget target : supported_cpu_targets()) {
    if (target == CpuTarget::kAvx2) {
      benchmark::RegisterBenchmark("fma_peak/avx2", fma_peak_avx2);
    }
    if (target == CpuTarget::kAvx512) {
      benchmark::RegisterBenchmark("fma_peak/avx512", fma_peak_avx512);
    }
  }
#endif
  for (const CpuTarget target : supported_cpu_targets()) {
    for (const DType dtype : {DType::kBFloat16, DType::kFloat32}) {
      for (const int d : {64, 128}) register_table(target, dtype, d);
    }
  }
}

}  // namespace
}  // namespace flexprefill

int main(int argc, char** argv) {
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  flexprefill::register_all();
  benchmark::RunSpecifiedBenchmarks();
  return 0;
}
