// select in double precision: the specification that every other backend is checked against.
// Scores become float where they enter the decisions of pattern.h, which all backends share. Slow
// on purpose; allocates.
#include <algorithm>
#include <cmath>
#include <limits>
#include <span>
#include <variant>
#include <vector>

#include "backend.h"
#include "math.h"
#include "select/block_rules.h"
#include "select/pattern.h"
#include "select/select_rows.h"

namespace flexprefill {
namespace {

using Vector = std::vector<double>;

std::vector<float> to_float(const Vector& x) { return {x.begin(), x.end()}; }

bool has_nan(const Vector& x) {
  return std::any_of(x.begin(), x.end(), [](double value) { return std::isnan(value); });
}

Vector load_row(const std::byte* row, int32_t d, DType dtype) {
  Vector x(d);
  for (int32_t c = 0; c < d; ++c) x[c] = load_float(row + c * element_size(dtype), dtype);
  return x;
}

double dot(const Vector& a, const Vector& b) {
  double sum = 0;
  for (size_t c = 0; c < a.size(); ++c) sum += a[c] * b[c];
  return sum;
}

// logits becomes weights * exp(logits), divided by its sum.
void softmax(Vector& logits, const Vector& weights) {
  const double max = *std::max_element(logits.begin(), logits.end());
  double sum = 0;
  for (size_t j = 0; j < logits.size(); ++j) {
    logits[j] = weights[j] * std::exp(logits[j] - max);
    sum += logits[j];
  }
  for (double& p : logits) p /= sum;
}

Vector mean_row(const Problem& problem, const RowView& rows, RowRange range) {
  Vector mean(problem.d_qk, 0.0);
  for (int64_t i = range.begin; i < range.end; ++i) {
    const Vector row = load_row(rows.row(i), problem.d_qk, problem.dtype);
    for (size_t c = 0; c < mean.size(); ++c) mean[c] += row[c];
  }
  for (double& x : mean) x /= static_cast<double>(range.end - range.begin);
  return mean;
}

// One query head of one sequence.
struct Head {
  const Problem& problem;
  int64_t sequence;
  int32_t head;

  SequenceLengths lengths = problem.lengths[sequence];
  BlockGrid grid = problem.grids[sequence];
  int64_t block_size = problem.block_size;
  int64_t pool_tokens = cover_pool(block_size, lengths.s_kv);  // of a mean of BlockCover
  Probe probe = Probe(lengths, block_size);
  RowView q = problem.q(sequence, head);
  RowView k = problem.k(sequence, problem.kv_head(head));

  Vector q_row(int64_t i) const { return load_row(q.row(i), problem.d_qk, problem.dtype); }
  Vector k_row(int64_t j) const { return load_row(k.row(j), problem.d_qk, problem.dtype); }
};

struct ProbeScores {
  Vector vertical, slash;      // [s_kv]
  std::array<Vector, 2> mass;  // [n] of the probe's first and second query block; sum to 1
  double window_mass = 0;      // inside the token window
};

// Step 1: A = softmax(scale * q_probe k^T) row by row, and its sums.
ProbeScores probe_scores(const Head& head, TokenWindow window) {
  const int64_t s_kv = head.lengths.s_kv;
  const Vector zero_keys(s_kv, 0.0);
  const Vector zero_blocks(head.grid.n_kv, 0.0);
  ProbeScores scores{zero_keys, zero_keys, {zero_blocks, zero_blocks}, 0};
  std::vector<Vector> keys;
  for (int64_t j = 0; j < s_kv; ++j) keys.push_back(head.k_row(j));
  for (int64_t i = 0; i < head.probe.rows; ++i) {
    const int64_t position = head.probe.position + i;
    const Vector q = head.q_row(head.probe.first_row + i);
    Vector a(position + 1);
    for (int64_t j = 0; j <= position; ++j) a[j] = head.problem.scale * dot(q, keys[j]);
    softmax(a, Vector(a.size(), 1.0));
    for (int64_t j = 0; j <= position; ++j) {
      const double mass = a[j] / static_cast<double>(head.probe.rows);
      scores.vertical[j] += mass;
      scores.slash[position - j] += mass;
      scores.mass[i < head.probe.split ? 0 : 1][j / head.block_size] += mass;
      if (window.sees(position, j)) scores.window_mass += mass;
    }
  }
  return scores;
}

std::vector<Vector> key_block_means(const Head& head) {
  std::vector<Vector> means;
  for (int64_t begin = 0; begin < head.lengths.s_kv; begin += head.block_size) {
    const RowRange keys{begin, std::min(begin + head.block_size, head.lengths.s_kv)};
    means.push_back(mean_row(head.problem, head.k, keys));
  }
  return means;
}

// softmax over the first n key blocks of scale * q_mean . mean(k block j), block j counting as
// much as its share of a whole block.
Vector pooled_row(const Head& head, const Vector& q_mean, const std::vector<Vector>& k_means,
                  int64_t n) {
  Vector row(n), share(n);
  for (int64_t j = 0; j < n; ++j) {
    row[j] = head.problem.scale * dot(q_mean, k_means[j]);
    share[j] = key_share(head.lengths.s_kv, head.block_size, j);
  }
  softmax(row, share);
  return row;
}

// The map of step 6, row after row.
Vector pooled_map(const Head& head, const std::vector<Vector>& k_means) {
  Vector map;
  for (int64_t r = 0; r < head.grid.n_q; ++r) {
    const RowRange rows = q_block_rows(head.lengths, head.grid, head.block_size, r);
    const Vector row = pooled_row(head, mean_row(head.problem, head.q, rows), k_means,
                                  head.grid.first_q_block + r + 1);
    map.insert(map.end(), row.begin(), row.end());
  }
  return map;
}

// BlockChoice with memory of its own.
struct ChoiceBuffer {
  explicit ChoiceBuffer(int64_t n)
      : vertical_block(n),
        slash_block(n),
        vertical_bits((n + 63) / 64),
        slash_bits((n + 63) / 64) {}
  BlockChoice view() {
    return {vertical_block.data(), slash_block.data(), vertical_bits.data(), slash_bits.data()};
  }
  std::vector<float> vertical_block, slash_block;
  std::vector<uint64_t> vertical_bits, slash_bits;
  Histogram histogram;
};

double kept_mass(const Head& head, const ProbeScores& scores, const HeadRows& rows) {
  double kept = 0;
  for (int64_t block = 0; block < head.probe.blocks(); ++block) {
    const uint64_t* row = rows.block_row(head.probe.first_block + block);
    for (int64_t j = 0; j < head.grid.n_kv; ++j) {
      if (has_bit(row, j)) kept += scores.mass[block][j];
    }
  }
  return kept;
}

// Each selector writes the head's rows and says what it decided; a NaN keeps everything.
HeadAudit keep_everything(const HeadRows& rows) {
  rows.write_dense();
  return {};
}

HeadAudit select_flex_prefill(const Head& head, const FlexPrefill& pattern, const HeadRows& rows) {
  const ProbeScores scores = probe_scores(head, {});
  const std::vector<Vector> k_means = key_block_means(head);
  const RowRange probe_rows{head.probe.first_row, head.lengths.s_q};
  const Vector pooled =
      pooled_row(head, mean_row(head.problem, head.q, probe_rows), k_means, head.grid.n_kv);
  if (has_nan(scores.vertical) || has_nan(pooled)) return keep_everything(rows);

  ChoiceBuffer buffer(head.grid.n_kv);
  const FlexPrefillRule rule = flex_prefill_rule(pattern, head.block_size, head.grid.n_kv);
  const HeadChoice choice = choose_flex_prefill(
      to_float(scores.vertical).data(), to_float(scores.slash).data(), to_float(pooled).data(),
      head.lengths.s_kv, head.block_size, rule, buffer.view(), &buffer.histogram);
  rows.write_choice(buffer.view());
  if (choice.pattern == HeadPattern::kQueryAware) {
    const Vector map = pooled_map(head, k_means);
    if (has_nan(map)) return keep_everything(rows);
    rows.keep_map(to_float(map).data(), static_cast<int64_t>(map.size()), rule.gamma,
                  &buffer.histogram);
  }
  return make_audit(choice, kept_mass(head, scores, rows), rows.density());
}

HeadAudit select_vertical_slash(const Head& head, const VerticalSlash& pattern,
                                const HeadRows& rows) {
  const ProbeScores scores = probe_scores(head, {});
  if (has_nan(scores.vertical)) return keep_everything(rows);
  ChoiceBuffer buffer(head.grid.n_kv);
  const HeadChoice choice = choose_fixed_sizes(
      to_float(scores.vertical).data(), to_float(scores.slash).data(), head.lengths.s_kv,
      head.block_size, pattern, buffer.view(), &buffer.histogram);
  rows.write_choice(buffer.view());
  return make_audit(choice, kept_mass(head, scores, rows), rows.density());
}

// ---- By block scores: rows of scores, one decision each ----

// XAttention: mean over the groups of query block r (absolute) of the softmax over groups of keys,
// summed over each key block. Rows that do not exist count as zeros.
Vector antidiagonal_row(const Head& head, int64_t stride, int64_t block) {
  const int64_t first = head.lengths.s_kv - head.lengths.s_q;
  const int64_t begin = std::max(block * head.block_size, first) / stride;
  const int64_t end = ceil_div(std::min((block + 1) * head.block_size, head.lengths.s_kv), stride);
  Vector row(block + 1, 0.0);
  for (int64_t group = begin; group < end; ++group) {
    Vector logits(group + 1, 0.0);
    for (int64_t t = 0; t < stride; ++t) {
      const int64_t position = group * stride + stride - 1 - t;
      if (position < first || position >= head.lengths.s_kv) continue;
      const Vector q = head.q_row(position - first);
      for (int64_t e = 0; e <= group; ++e) {
        const int64_t key = e * stride + t;
        if (key < head.lengths.s_kv) logits[e] += dot(q, head.k_row(key));
      }
    }
    for (double& x : logits) x *= head.problem.scale / static_cast<double>(stride);
    softmax(logits, Vector(logits.size(), 1.0));
    for (int64_t e = 0; e <= group; ++e) {
      row[e * stride / head.block_size] += logits[e] / static_cast<double>(end - begin);
    }
  }
  return row;
}

// FlashPrefill: sum over the queries of exp(scale q . mean(k block j) - the greatest of all), each
// query over the blocks whose last key it sees.
Vector mean_score_row(const Head& head, const std::vector<Vector>& k_means, int64_t block) {
  const int64_t first = head.lengths.s_kv - head.lengths.s_q;
  const RowRange rows =
      q_block_rows(head.lengths, head.grid, head.block_size, block - head.grid.first_q_block);
  std::vector<Vector> logits;
  double greatest = -std::numeric_limits<double>::infinity();
  for (int64_t i = rows.begin; i < rows.end; ++i) {
    const Vector q = head.q_row(i);
    logits.emplace_back();
    for (int64_t j = 0; j <= block; ++j) {
      const int64_t last = std::min((j + 1) * head.block_size, head.lengths.s_kv) - 1;
      if (last > first + i) break;
      logits.back().push_back(head.problem.scale * dot(q, k_means[j]));
      greatest = std::max(greatest, logits.back().back());
    }
  }
  Vector row(block + 1, 0.0);
  for (const Vector& query : logits) {
    for (size_t j = 0; j < query.size(); ++j) row[j] += std::exp(query[j] - greatest);
  }
  return row;
}

// Block-sparse: softmax over j of scale mean(q block) . mean(k block j).
Vector pooled_score_row(const Head& head, const std::vector<Vector>& k_means, int64_t block) {
  const RowRange rows =
      q_block_rows(head.lengths, head.grid, head.block_size, block - head.grid.first_q_block);
  const Vector q_mean = mean_row(head.problem, head.q, rows);
  Vector row;
  for (int64_t j = 0; j <= block; ++j) row.push_back(head.problem.scale * dot(q_mean, k_means[j]));
  softmax(row, Vector(row.size(), 1.0));
  return row;
}

HeadAudit select_by_blocks(const Head& head, const Pattern& pattern, const HeadRows& rows,
                           bool audited) {
  const auto* antidiagonal = std::get_if<XAttention>(&pattern);
  const auto* flash = std::get_if<FlashPrefill>(&pattern);
  std::vector<Vector> k_means;
  if (antidiagonal == nullptr) k_means = key_block_means(head);
  Histogram histogram;
  for (int64_t r = 0; r < head.grid.n_q; ++r) {
    const int64_t i = head.grid.first_q_block + r, n = head.grid.n_kv;
    const Vector row = antidiagonal != nullptr ? antidiagonal_row(head, antidiagonal->stride, i)
                       : flash != nullptr      ? mean_score_row(head, k_means, i)
                                               : pooled_score_row(head, k_means, i);
    if (has_nan(row)) return keep_everything(rows);
    const std::vector<float> scores = to_float(row);
    if (antidiagonal != nullptr) {
      keep_reaching(scores.data(), i, n, antidiagonal->threshold, &histogram, rows.row(r));
    } else if (flash != nullptr) {
      const FlashPrefillRule rule = flash_prefill_rule(*flash, head.lengths.s_kv, head.block_size);
      keep_above(scores.data(), i, n, rule, rows.row(r));
    } else {
      const int64_t tokens = std::get<MInference>(pattern).heads[head.head].vertical_size;
      keep_best(scores.data(), i, n, whole_blocks(tokens, head.block_size), &histogram,
                rows.row(r));
    }
  }
  if (!audited) return {};
  return make_audit({.pattern = HeadPattern::kBlockSparse},
                    kept_mass(head, probe_scores(head, {}), rows), rows.density());
}

// ---- BlockCover: a map of the head from means, exact rows where the last queries are ----

// X[k][j]: softmax mass of asking row k in key block j.
std::vector<Vector> asking_masses(const Head& head, const AskingRows& asking) {
  std::vector<Vector> keys, masses;
  for (int64_t j = 0; j < head.lengths.s_kv; ++j) keys.push_back(head.k_row(j));
  for (int64_t k = 0; k < asking.count; ++k) {
    const int64_t position = head.lengths.s_kv - head.lengths.s_q + asking.row(k);
    const Vector q = head.q_row(asking.row(k));
    Vector p;
    for (int64_t j = 0; j <= position; ++j) p.push_back(head.problem.scale * dot(q, keys[j]));
    softmax(p, Vector(p.size(), 1.0));
    masses.emplace_back(head.grid.n_kv, 0.0);
    for (int64_t j = 0; j <= position; ++j) masses.back()[j / head.block_size] += p[j];
  }
  return masses;
}

// The mean of the tokens [pool * pool_tokens, ...) of a side, and how many there are.
struct Pool {
  Vector mean;
  double tokens = 0;
};
Pool pool_of(const Head& head, bool queries, int64_t pool) {
  const int64_t first = queries ? head.lengths.s_kv - head.lengths.s_q : 0;
  const int64_t begin = std::max(pool * head.pool_tokens, first);
  const int64_t end = std::min((pool + 1) * head.pool_tokens, head.lengths.s_kv);
  if (begin >= end) return {};
  return {mean_row(head.problem, queries ? head.q : head.k, {begin - first, end - first}),
          static_cast<double>(end - begin)};
}

// Row i of the map: of each pool of its queries the softmax over the pools of keys up to its own,
// which count by their tokens; summed to blocks, the pools of queries by their tokens.
Vector cover_map_row(const Head& head, const std::vector<Pool>& keys, int64_t i) {
  const int64_t per_block = head.block_size / head.pool_tokens;
  Vector row(i + 1, 0.0);
  double tokens = 0;
  for (int64_t a = i * per_block; a < (i + 1) * per_block; ++a) {
    const Pool q = pool_of(head, true, a);
    if (q.tokens == 0) continue;
    Vector p, weights;
    for (int64_t c = 0; c <= a; ++c) {
      p.push_back(head.problem.scale * dot(q.mean, keys[c].mean));
      weights.push_back(keys[c].tokens);
    }
    softmax(p, weights);
    for (int64_t c = 0; c <= a; ++c) row[c / per_block] += q.tokens * p[c];
    tokens += q.tokens;
  }
  for (double& x : row) x /= tokens;
  return row;
}

HeadAudit select_block_cover(const Head& head, const BlockCover& pattern, const HeadRows& rows) {
  const int64_t n = head.grid.n_kv, position = head.lengths.s_kv - head.lengths.s_q;
  const AskingRows asking(head.lengths.s_q);
  const std::vector<Vector> masses = asking_masses(head, asking);
  std::vector<float> most_asked(n, 0.0f), scratch(n);
  for (const Vector& row : masses) {
    if (has_nan(row)) return keep_everything(rows);
    for (int64_t j = 0; j < n; ++j) {
      most_asked[j] = std::max(most_asked[j], static_cast<float>(row[j]));
    }
  }
  std::vector<uint64_t> columns((n + 63) / 64), words(2 * columns.size());
  Histogram histogram;
  choose_columns(most_asked.data(), n, pattern.column_share, &histogram, columns.data());

  const BlockCoverRule rule = block_cover_rule(pattern, head.block_size);
  std::vector<Pool> keys;
  for (int64_t c = 0; c * head.pool_tokens < head.lengths.s_kv; ++c) {
    keys.push_back(pool_of(head, false, c));
  }
  HeadAudit audit{.pattern = HeadPattern::kBlockCover,
                  .vertical_blocks = static_cast<int32_t>(count_bits(columns.data(), n))};
  for (int64_t r = 0; r < head.grid.n_q; ++r) {
    const int64_t i = head.grid.first_q_block + r;
    const Vector map_row = cover_map_row(head, keys, i);
    if (has_nan(map_row)) return keep_everything(rows);
    const bool asks = i >= (position + asking.row(0)) / head.block_size;
    const RowMass mass =
        keep_cover(to_float(map_row).data(), i, n, rule, asks ? columns.data() : nullptr,
                   most_asked.data(), &histogram, scratch.data(), words.data(), rows.row(r));
    audit.least_row_mass = std::min(audit.least_row_mass, mass.share());
    audit.rows_below_gamma += mass.kept < mass.wanted ? 1 : 0;
  }
  double kept = 0;
  for (int64_t k = 0; k < asking.count; ++k) {
    const uint64_t* row = rows.block_row((position + asking.row(k)) / head.block_size);
    for (int64_t j = 0; j < n; ++j) kept += has_bit(row, j) ? masses[k][j] : 0;
  }
  audit.kept_mass = static_cast<float>(kept / static_cast<double>(asking.count));
  audit.density = rows.density();
  return audit;
}

// MInference's a-shape: a window in whole blocks.
HeadAudit select_a_shape(const Head& head, const StreamingLlm& window, const HeadRows& rows,
                         bool audited) {
  rows.write_window(window);
  if (!audited) return {};
  return make_audit({.pattern = HeadPattern::kStreaming},
                    kept_mass(head, probe_scores(head, {}), rows), rows.density());
}

HeadAudit select_window(const Head& head, const StreamingLlm& pattern, const HeadRows& rows,
                        bool audited) {
  rows.write_window(pattern);
  if (!audited) return {};
  const double mass = probe_scores(head, {pattern.global_window, pattern.local_window}).window_mass;
  return make_audit({.pattern = HeadPattern::kStreaming}, mass, rows.density());
}

}  // namespace

void select_reference(const Problem& problem, const Pattern& pattern, const Execution&,
                      Arena& arena, const BlockBits& bits, std::span<HeadAudit> audit) {
  if (arena.counting()) return;
  for (int64_t s = 0; s < problem.b(); ++s) {
    for (int32_t h = 0; h < problem.h_q; ++h) {
      const Head head{problem, s, h};
      const HeadRows rows{problem, bits, s, h};
      HeadAudit result;
      if (stays_dense(head.lengths, head.block_size, pattern)) {
        result = keep_everything(rows);
      } else if (const auto* flex = std::get_if<FlexPrefill>(&pattern)) {
        result = select_flex_prefill(head, *flex, rows);
      } else if (const auto* cover = std::get_if<BlockCover>(&pattern)) {
        result = select_block_cover(head, *cover, rows);
      } else if (by_probe(pattern, h)) {
        result = select_vertical_slash(head, fixed_sizes(pattern, h), rows);
      } else if (by_block_scores(pattern, h)) {
        result = select_by_blocks(head, pattern, rows, !audit.empty());
      } else if (const auto* heads = std::get_if<MInference>(&pattern)) {
        result = select_a_shape(head, a_shape_window(heads->heads[h]), rows, !audit.empty());
      } else {
        result = select_window(head, std::get<StreamingLlm>(pattern), rows, !audit.empty());
      }
      if (!audit.empty()) audit[s * problem.h_q + h] = result;
    }
  }
}

}  // namespace flexprefill
