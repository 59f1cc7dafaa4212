// The prefill loop of an inference engine: a long prompt comes in chunks, K and V go into a paged
// cache, and every chunk's attention is computed by flexprefill in the engine's own scratch
// memory. Each chunk is checked against dense attention.
#include <flexprefill/flexprefill.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

namespace {

using namespace flexprefill;

constexpr int64_t kPromptTokens = 8192, kChunkTokens = 2048;
constexpr int64_t kQueryHeads = 8, kKvHeads = 2, kHeadDim = 64;
constexpr int64_t kPageSize = 64;

// A cache of pages [page, K or V, page_size, h_kv, d]: K and V of a page lie side by side. A
// sequence's pages come in any order; here every other one of the pool, from the end.
class PagedCache {
 public:
  explicit PagedCache(int64_t pages)
      : data_(2 * static_cast<size_t>(pages * kPageFloats * 2)), pages_(2 * pages) {}

  // Makes room for `tokens` more tokens of the sequence.
  void grow(int64_t tokens) {
    length_ += static_cast<int32_t>(tokens);
    while (static_cast<int64_t>(table_.size()) * kPageSize < length_) {
      table_.push_back(static_cast<int32_t>(pages_ - 1 - 2 * table_.size()));
    }
  }
  float* k(int64_t token) { return row(token, 0); }
  float* v(int64_t token) { return row(token, 1); }

  void describe(AttentionInput& input) {
    input.k = view(0);
    input.v = view(1);
    input.page_table = table_.data();
    input.max_pages = input.page_table_stride = static_cast<int64_t>(table_.size());
    input.seqlens_kv = {&length_, 1};
  }

 private:
  static constexpr int64_t kRowFloats = kKvHeads * kHeadDim;
  static constexpr int64_t kPageFloats = kPageSize * kRowFloats;  // of K or of V

  float* row(int64_t token, int64_t part) {
    return data_.data() + (2 * table_[token / kPageSize] + part) * kPageFloats +
           token % kPageSize * kRowFloats;
  }
  TensorView view(int64_t part) {
    return {.data = data_.data() + part * kPageFloats,
            .dtype = DType::kFloat32,
            .rank = 4,
            .shape = {pages_, kPageSize, kKvHeads, kHeadDim},
            .strides = {2 * kPageFloats, kRowFloats, kHeadDim, 1}};
  }

  std::vector<float> data_;
  int64_t pages_;
  std::vector<int32_t> table_;
  int32_t length_ = 0;
};

// Stands for the model's projections: queries and keys that attend as language models do, to the
// first tokens, to a heavy one and to what is near.
class Model {
 public:
  void project(int64_t token, float* q, float* k, float* v) {
    const bool heavy = token < 4 || token == 700;
    for (int64_t h = 0; h < kQueryHeads; ++h) fill(token, q + h * kHeadDim, true);
    for (int64_t h = 0; h < kKvHeads; ++h) {
      fill(token, k + h * kHeadDim, heavy);
      for (int64_t c = 0; c < kHeadDim; ++c) v[h * kHeadDim + c] = 1 + normal_(random_);
    }
  }

 private:
  void fill(int64_t token, float* x, bool heavy) {
    for (int64_t c = 0; c < kHeadDim; ++c) x[c] = 0.3f * normal_(random_);
    for (int64_t f = 0; f < 8; ++f) {  // their product decays with the distance
      const float angle =
          static_cast<float>(token) * 0.06f * std::pow(0.75f, static_cast<float>(f));
      x[2 * f] += 3.2f * std::cos(angle);
      x[2 * f + 1] += 3.2f * std::sin(angle);
    }
    if (heavy) x[20] += 9.5f;
  }

  std::mt19937 random_{7};
  std::normal_distribution<float> normal_;
};

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

double relative_error(const std::vector<float>& got, const std::vector<float>& want) {
  double difference = 0, norm = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    difference += (got[i] - want[i]) * (got[i] - want[i]);
    norm += want[i] * want[i];
  }
  return std::sqrt(difference / norm);
}

int run() {
  Model model;
  PagedCache cache(kPromptTokens / kPageSize);
  std::vector<float> q(kChunkTokens * kQueryHeads * kHeadDim), out(q.size()), dense(q.size());
  const int64_t shape[4] = {1, kChunkTokens, kQueryHeads, kHeadDim};

  AttentionInput input;
  input.q = contiguous_view(q.data(), DType::kFloat32, shape);
  const TensorView out_view = contiguous_view(out.data(), DType::kFloat32, shape);
  const TensorView dense_view = contiguous_view(dense.data(), DType::kFloat32, shape);
  const Pattern pattern = FlexPrefill{.gamma = 0.95f, .min_budget = 512};
  const Execution execution;
  std::vector<HeadAudit> audit(kQueryHeads);
  std::vector<std::byte> scratch;
  bool good = true;

  std::printf("flexprefill %s on %s\n", version().c_str(),
              cpu_target_name(supported_cpu_targets().front()));
  std::printf("%8s %8s %10s %10s %12s %10s\n", "keys", "density", "sparse ms", "dense ms",
              "scratch KiB", "error");
  for (int64_t start = 0; start < kPromptTokens; start += kChunkTokens) {
    cache.grow(kChunkTokens);
    for (int64_t i = 0; i < kChunkTokens; ++i) {
      model.project(start + i, q.data() + i * kQueryHeads * kHeadDim, cache.k(start + i),
                    cache.v(start + i));
    }
    cache.describe(input);

    scratch.resize(std::max(prefill_workspace_size(input, pattern, execution),
                            prefill_workspace_size(input, Dense{}, execution)));
    const Workspace workspace{scratch.data(), scratch.size()};
    auto clock = std::chrono::steady_clock::now();
    prefill(input, pattern, execution, workspace, out_view, {}, audit);
    const double sparse_seconds = seconds_since(clock);
    clock = std::chrono::steady_clock::now();
    prefill(input, Dense{}, execution, workspace, dense_view);
    const double dense_seconds = seconds_since(clock);

    double density = 0;
    for (const HeadAudit& head : audit) density += head.density / kQueryHeads;
    const double error = relative_error(out, dense);
    std::printf("%8ld %8.3f %10.1f %10.1f %12zu %10.4f\n", static_cast<long>(start + kChunkTokens),
                density, 1e3 * sparse_seconds, 1e3 * dense_seconds, scratch.size() >> 10, error);
    good &= error < 0.1 && density < 0.9;
  }
  std::puts(good ? "every chunk is within 10 % of dense attention, at less than 90 % of its work"
                 : "a chunk is further from dense attention than it should be, or not sparse");
  return good ? 0 : 1;
}

}  // namespace

int main() {
  try {
    return run();
  } catch (const Error& error) {
    std::fprintf(stderr, "flexprefill: %s\n", error.what());
    return 1;
  }
}
