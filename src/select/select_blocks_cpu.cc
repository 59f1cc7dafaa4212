// Scores of single blocks on the CPU. A task is a few query blocks of one head; its scores live in
// the worker's memory, are summed to one float for each key block, and block_rules.h decides by
// them at once: no map of a head is ever in memory.
//
//   XAttention    queries and keys are taken in groups of `stride` tokens, a group of queries in a
//                 vector lane. The product of two groups is `stride` products of rows, each a tile
//                 of TileOps: 1 / stride of the products of dense attention.
//   FlashPrefill  a query block times the means of the keys, fp32: 1 / B of dense attention.
//   block-sparse  a mean of queries times the means of the keys.
#include "select/select_blocks_cpu.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <numbers>
#include <variant>

#include "cpu/parallel.h"
#include "math.h"
#include "select/block_rules.h"

namespace flexprefill {
namespace {

constexpr int64_t kTile = TileOps::kMaxKeys;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

}  // namespace

void mean_rows(const SelectOps& ops, const RowView& view, RowRange range, int32_t d, DType dtype,
               float* mean) {
  std::fill_n(mean, d, 0.0f);
  for (int64_t i = range.begin; i < range.end;) {
    const int64_t run = view.run(i, range.end - i);
    ops.add_rows(view.row(i), view.row_stride, run, d, dtype, mean);
    i += run;
  }
  const float inverse = 1.0f / static_cast<float>(range.end - range.begin);
  for (int32_t c = 0; c < d; ++c) mean[c] *= inverse;
}

struct BlockScoreSelector::Worker {
  std::byte* rows;    // gathered rows: [kTile or panel, d] elements, or [B, d] floats
  std::byte* packed;  // panels of TileOps
  std::byte* keys;    // TileOps' operand
  float* tile;        // [kTile, panel]
  float* scores;      // XAttention: [groups of keys, lanes]
  double* sums;       // [blocks of the task, n_kv]
  float* greatest;    // FlashPrefill: [n_kv]
  float* row;         // [n_kv]
  Histogram* histogram;
};

struct BlockScoreSelector::Rows {
  int64_t sequence;
  int32_t head;
  int64_t first_block, n_blocks;  // absolute number of the first
  SequenceLengths lengths;
  int64_t n_kv;

  int64_t first_position() const { return lengths.s_kv - lengths.s_q; }
};

BlockScoreSelector::BlockScoreSelector(Arena& arena, const Problem& problem, const Pattern& pattern,
                                       CpuTarget cpu_target, int workers)
    : problem_(problem),
      pattern_(pattern),
      tiles_(tile_ops(cpu_target, problem.dtype)),
      tiles32_(tile_ops(cpu_target, DType::kFloat32)),
      ops_(select_ops(tiles_.target)),
      workers_(workers) {
  bool any = false;
  for (int32_t h = 0; h < problem.h_q; ++h) any |= by_block_scores(pattern, h);
  int64_t n_kv = 0, s_kv = 0;
  for (int64_t s = 0; any && s < problem.b(); ++s) {
    if (stays_dense(problem.lengths[s], problem.block_size, pattern)) continue;
    n_kv = std::max(n_kv, problem.grids[s].n_kv);
    s_kv = std::max(s_kv, problem.lengths[s].s_kv);
  }
  if (n_kv == 0) return;
  needed_ = true;
  const auto* antidiagonal = std::get_if<XAttention>(&pattern);
  const TileOps& tiles = antidiagonal != nullptr ? tiles_ : tiles32_;
  const int64_t stride = antidiagonal != nullptr ? antidiagonal->stride : 1;
  const int64_t groups = problem.block_size / stride;  // of a query block
  if (antidiagonal != nullptr) {
    blocks_per_task_ = std::max<int64_t>(1, tiles_.panel / groups);
  }
  const int64_t panels = ceil_div(blocks_per_task_ * groups + 1, tiles.panel);
  const int64_t lanes = panels * tiles.panel;
  const int64_t key_groups = ceil_div(ceil_div(s_kv, stride), kTile) * kTile;
  const auto d = static_cast<int64_t>(problem.d_qk);

  has_nan_ = arena.take<uint8_t>(problem.h_q);
  if (antidiagonal == nullptr) k_means_ = arena.take<float>(problem.h_kv * n_kv * d);
  per_worker_ = arena.take<Worker>(workers);
  for (int w = 0; w < workers; ++w) {
    const Worker worker{
        .rows = arena.take<std::byte>(std::max(kTile, lanes) * d * sizeof(float)),
        .packed = arena.take<std::byte>(stride * panels * tiles.packed_q_bytes(problem.d_qk)),
        .keys = arena.take<std::byte>(tiles.key_bytes(problem.d_qk)),
        .tile = arena.take<float>(kTile * tiles.panel),
        .scores = arena.take<float>(antidiagonal != nullptr ? key_groups * lanes : 0),
        .sums = arena.take<double>(blocks_per_task_ * n_kv),
        .greatest = arena.take<float>(n_kv),
        .row = arena.take<float>(n_kv),
        .histogram = arena.take<Histogram>(1)};
    if (!arena.counting()) per_worker_[w] = worker;
  }
}

void BlockScoreSelector::pool_keys(int64_t sequence) const {
  const int64_t n_kv = problem_.grids[sequence].n_kv;
  parallel_tasks(workers_, problem_.h_kv * n_kv, [&](int, int64_t task) {
    const int64_t begin = task % n_kv * problem_.block_size;
    const int64_t end =
        std::min<int64_t>(begin + problem_.block_size, problem_.lengths[sequence].s_kv);
    mean_rows(ops_, problem_.k(sequence, static_cast<int32_t>(task / n_kv)), {begin, end},
              problem_.d_qk, problem_.dtype, k_means_ + task * problem_.d_qk);
  });
}

void BlockScoreSelector::select(int64_t sequence, const BlockBits& bits) const {
  const BlockGrid& grid = problem_.grids[sequence];
  const auto* heads = std::get_if<MInference>(&pattern_);
  const auto* antidiagonal = std::get_if<XAttention>(&pattern_);
  const auto* flash = std::get_if<FlashPrefill>(&pattern_);
  if (antidiagonal == nullptr) pool_keys(sequence);
  std::fill_n(has_nan_, problem_.h_q, uint8_t{0});
  const SequenceLengths lengths = problem_.lengths[sequence];
  const FlashPrefillRule rule = flash != nullptr
                                    ? flash_prefill_rule(*flash, lengths.s_kv, problem_.block_size)
                                    : FlashPrefillRule{};

  // Long rows first, the heads of one query block one after another: they share K.
  const int64_t tasks = ceil_div(grid.n_q, blocks_per_task_);
  parallel_tasks(workers_, tasks * problem_.h_q, [&](int w, int64_t task) {
    const auto head = static_cast<int32_t>(task % problem_.h_q);
    if (!by_block_scores(pattern_, head)) return;
    const int64_t first = (tasks - 1 - task / problem_.h_q) * blocks_per_task_;
    const Worker& worker = per_worker_[w];
    const Rows rows{sequence,
                    head,
                    grid.first_q_block + first,
                    std::min(blocks_per_task_, grid.n_q - first),
                    lengths,
                    grid.n_kv};
    const bool good = antidiagonal != nullptr ? score_antidiagonals(worker, rows)
                      : flash != nullptr      ? score_means(worker, rows)
                                              : score_pooled(worker, rows);
    if (!good) {
      std::atomic_ref<uint8_t>(has_nan_[head]).store(1, std::memory_order_relaxed);
      return;
    }
    for (int64_t r = 0; r < rows.n_blocks; ++r) {
      const int64_t i = rows.first_block + r;
      for (int64_t j = 0; j <= i; ++j) {
        worker.row[j] = static_cast<float>(worker.sums[r * grid.n_kv + j]);
      }
      uint64_t* row = bits.row(problem_, sequence, head, first + r);
      if (antidiagonal != nullptr) {
        keep_reaching(worker.row, i, grid.n_kv, antidiagonal->threshold, worker.histogram, row);
      } else if (flash != nullptr) {
        keep_above(worker.row, i, grid.n_kv, rule, row);
      } else {
        const int64_t count = whole_blocks(heads->heads[head].vertical_size, problem_.block_size);
        keep_best(worker.row, i, grid.n_kv, count, worker.histogram, row);
      }
    }
  });
  for (int32_t h = 0; h < problem_.h_q; ++h) {
    if (has_nan_[h] != 0) HeadRows{problem_, bits, sequence, h}.write_dense();
  }
}

// Rows first, first + step, ... (n of them), zeros for those that are not in `valid`.
void BlockScoreSelector::gather(const RowView& view, int64_t first, int64_t step, int64_t n,
                                RowRange valid, std::byte* to) const {
  const size_t bytes = problem_.d_qk * element_size(problem_.dtype);
  for (int64_t e = 0; e < n; ++e, to += bytes) {
    const int64_t i = first + e * step;
    if (i >= valid.begin && i < valid.end) {
      std::memcpy(to, view.row(i), bytes);
    } else {
      std::memset(to, 0, bytes);
    }
  }
}

// sums[r][j]: mean over the query groups of block r of the softmax over groups of keys, summed over
// key block j. False if a score is NaN or an infinity leaves no softmax.
bool BlockScoreSelector::score_antidiagonals(const Worker& worker, const Rows& rows) const {
  const int64_t stride = std::get<XAttention>(pattern_).stride;
  const int64_t block = problem_.block_size, per_block = block / stride;
  const int64_t position = rows.first_position(), s_kv = rows.lengths.s_kv;
  const int64_t first_group = std::max(rows.first_block * block, position) / stride;
  const int64_t last_position = std::min((rows.first_block + rows.n_blocks) * block, s_kv) - 1;
  const int64_t n_groups = last_position / stride - first_group + 1;
  const int panel = tiles_.panel;
  const int64_t panels = ceil_div(n_groups, panel);
  const auto row_bytes = static_cast<int64_t>(problem_.d_qk * element_size(problem_.dtype));
  const auto panel_bytes = static_cast<int64_t>(tiles_.packed_q_bytes(problem_.d_qk));
  const RowView q = problem_.q(rows.sequence, rows.head);
  const RowView k = problem_.k(rows.sequence, problem_.kv_head(rows.head));

  for (int64_t p = 0; p < panels; ++p) {
    const int64_t n = std::min<int64_t>(panel, n_groups - p * panel);
    for (int64_t t = 0; t < stride; ++t) {
      const int64_t first = (first_group + p * panel) * stride + stride - 1 - t;
      gather(q, first - position, stride, n, {0, rows.lengths.s_q}, worker.rows);
      tiles_.pack_q(worker.rows, row_bytes, static_cast<int>(n), problem_.d_qk,
                    worker.packed + (p * stride + t) * panel_bytes);
    }
  }
  const int64_t n_keys = first_group + n_groups;  // groups of keys that the last query group sees
  const int64_t panel_scores = n_keys * panel;    // of one panel
  for (int64_t at = 0; at < n_keys; at += kTile) {
    const int64_t n = std::min(kTile, n_keys - at);
    for (int64_t t = 0; t < stride; ++t) {
      gather(k, at * stride + t, stride, n, {0, s_kv}, worker.rows);
      tiles_.load_keys(worker.rows, row_bytes, static_cast<int>(n), 0, problem_.d_qk, worker.keys);
      for (int64_t p = 0; p < panels; ++p) {
        tiles_.scores(worker.packed + (p * stride + t) * panel_bytes, worker.keys, 0,
                      static_cast<int>(n), problem_.d_qk, worker.tile);
        float* scores = worker.scores + p * panel_scores + at * panel;
        if (t == 0) {
          std::copy_n(worker.tile, n * panel, scores);
        } else {
          for (int64_t e = 0; e < n * panel; ++e) scores[e] += worker.tile[e];
        }
      }
    }
  }

  const float scale = problem_.scale * std::numbers::log2e_v<float> / static_cast<float>(stride);
  std::fill_n(worker.sums, rows.n_blocks * rows.n_kv, 0.0);
  for (int64_t g = 0; g < n_groups; ++g) {  // a lane
    float* scores = worker.scores + g / panel * panel_scores + g % panel;
    const int64_t group = first_group + g;
    float max = -kInfinity;
    for (int64_t e = 0; e <= group; ++e) max = std::max(max, scores[e * panel] * scale);
    double sum = 0;
    for (int64_t e = 0; e <= group; ++e) {
      const float p = std::exp2(scores[e * panel] * scale - max);
      scores[e * panel] = p;
      sum += static_cast<double>(p);
    }
    if (!(sum > 0)) return false;
    const int64_t r = group / per_block - rows.first_block;
    const int64_t begin = std::max((rows.first_block + r) * per_block, first_group);
    const int64_t end = std::min((rows.first_block + r + 1) * per_block, first_group + n_groups);
    const double weight = 1 / (sum * static_cast<double>(end - begin));
    double* sums = worker.sums + r * rows.n_kv;
    for (int64_t e = 0; e <= group; ++e) {
      sums[e / per_block] += static_cast<double>(scores[e * panel]) * weight;
    }
  }
  return true;
}

// sums[0][j]: sum over the queries of exp(scale q . mean(k block j) - the greatest of all).
bool BlockScoreSelector::score_means(const Worker& worker, const Rows& rows) const {
  const int64_t block = problem_.block_size, i = rows.first_block;
  const int64_t position = rows.first_position(), s_kv = rows.lengths.s_kv;
  const int64_t first = std::max(i * block, position);
  const int64_t n_rows = std::min((i + 1) * block, s_kv) - first;
  const int panel = tiles32_.panel;
  const int32_t d = problem_.d_qk;
  const RowView q = problem_.q(rows.sequence, rows.head);
  auto* floats = reinterpret_cast<float*>(worker.rows);
  for (int64_t r = 0; r < n_rows; ++r) {
    const std::byte* row = q.row(first - position + r);
    for (int32_t c = 0; c < d; ++c) {
      floats[r * d + c] = load_float(row + c * element_size(problem_.dtype), problem_.dtype);
    }
  }
  const auto row_bytes = static_cast<int64_t>(d * sizeof(float));
  const auto panel_bytes = static_cast<int64_t>(tiles32_.packed_q_bytes(d));
  const int64_t panels = ceil_div(n_rows, panel);
  for (int64_t p = 0; p < panels; ++p) {
    tiles32_.pack_q(worker.rows + p * panel * row_bytes, row_bytes,
                    static_cast<int>(std::min<int64_t>(panel, n_rows - p * panel)), d,
                    worker.packed + p * panel_bytes);
  }
  const float scale = problem_.scale * std::numbers::log2e_v<float>;
  const float* means = k_means_ + problem_.kv_head(rows.head) * rows.n_kv * d;
  // sums[j] is relative to greatest[j] until all are known.
  std::fill_n(worker.greatest, i + 1, -kInfinity);
  std::fill_n(worker.sums, i + 1, 0.0);
  for (int64_t at = 0; at <= i; at += kTile) {
    const int64_t n = std::min(kTile, i + 1 - at);
    tiles32_.load_keys(reinterpret_cast<const std::byte*>(means + at * d), row_bytes,
                       static_cast<int>(n), 0, d, worker.keys);
    for (int64_t p = 0; p < panels; ++p) {
      tiles32_.scores(worker.packed + p * panel_bytes, worker.keys, 0, static_cast<int>(n), d,
                      worker.tile);
      const int64_t lanes = std::min<int64_t>(panel, n_rows - p * panel);
      for (int64_t e = 0; e < n; ++e) {
        const int64_t j = at + e;
        // Queries before the block's last key do not see its mean: all but the last, at j = i.
        const int64_t last_key = std::min((j + 1) * block, s_kv) - 1;
        const int64_t begin = std::max<int64_t>(0, last_key - first - p * panel);
        const float* scores = worker.tile + e * panel;
        float max = worker.greatest[j];
        for (int64_t l = begin; l < lanes; ++l) max = std::max(max, scores[l] * scale);
        double sum = 0;
        for (int64_t l = begin; l < lanes; ++l) {
          const float x = scores[l] * scale;
          sum += x == -kInfinity ? 0.0 : static_cast<double>(std::exp2(x - max));
        }
        if (max > worker.greatest[j]) {
          worker.sums[j] *= static_cast<double>(std::exp2(worker.greatest[j] - max));
          worker.greatest[j] = max;
        }
        worker.sums[j] += sum;
      }
    }
  }
  const float greatest = *std::max_element(worker.greatest, worker.greatest + i + 1);
  bool good = std::isfinite(greatest);
  for (int64_t j = 0; j <= i; ++j) {
    worker.sums[j] *= static_cast<double>(std::exp2(worker.greatest[j] - greatest));
    good = good && !std::isnan(worker.sums[j]);
  }
  return good;
}

// sums[0][j]: softmax over j <= i of scale mean(q block i) . mean(k block j).
bool BlockScoreSelector::score_pooled(const Worker& worker, const Rows& rows) const {
  const BlockGrid& grid = problem_.grids[rows.sequence];
  const int32_t d = problem_.d_qk;
  auto* mean = reinterpret_cast<float*>(worker.rows);
  mean_rows(
      ops_, problem_.q(rows.sequence, rows.head),
      q_block_rows(rows.lengths, grid, problem_.block_size, rows.first_block - grid.first_q_block),
      d, problem_.dtype, mean);
  ops_.softmax_dots(mean, k_means_ + problem_.kv_head(rows.head) * rows.n_kv * d,
                    rows.first_block + 1, d, problem_.scale * std::numbers::log2e_v<float>, 1.0f,
                    worker.row);
  for (int64_t j = 0; j <= rows.first_block; ++j) {
    worker.sums[j] = static_cast<double>(worker.row[j]);
  }
  return !std::isnan(worker.row[0]);
}

}  // namespace flexprefill
