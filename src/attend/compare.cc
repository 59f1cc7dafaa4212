// Dense attention in double precision on a sample of rows, beside what was kept and computed.
#include "flexprefill/compare.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "attend/compare_rows.h"
#include "cpu/parallel.h"
#include "math.h"
#include "select/pattern.h"

namespace flexprefill {
namespace {

void load_row(const std::byte* row, int32_t d, DType dtype, double* to) {
  for (int32_t c = 0; c < d; ++c) to[c] = load_float(row + c * element_size(dtype), dtype);
}

class HeadComparison {
 public:
  HeadComparison(const Problem& problem, const BlockRows& rows, int64_t sequence, int32_t head)
      : problem_(problem),
        rows_(rows),
        sequence_(sequence),
        head_(head),
        k_(problem.k(sequence, problem.kv_head(head))),
        v_(problem.v(sequence, problem.kv_head(head))),
        position_(problem.lengths[sequence].s_kv - problem.lengths[sequence].s_q),
        row_(std::max(problem.d_qk, problem.d_v)),
        query_(problem.d_qk),
        exact_(problem.d_v),
        weights_(problem.lengths[sequence].s_kv),
        blocks_(problem.grids[sequence].n_kv) {}

  DenseComparison run(int64_t rows) {
    const int64_t s_q = problem_.lengths[sequence_].s_q;
    const int64_t n = std::min(rows, s_q);
    DenseComparison result{.rows = static_cast<int32_t>(n)};
    double mass = 0;
    for (int64_t r = 0; r < n; ++r) {
      const double kept = compare((r + 1) * s_q / n - 1);
      mass += kept;
      if (!(kept >= static_cast<double>(result.least_kept_mass))) {
        result.least_kept_mass = static_cast<float>(kept);
      }
    }
    result.kept_mass = static_cast<float>(mass / static_cast<double>(n));
    result.error = static_cast<float>(difference_ == 0 ? 0 : std::sqrt(difference_ / size_));
    return result;
  }

 private:
  // One row; returns the kept mass.
  double compare(int64_t i) {
    const int64_t keys = position_ + i + 1;
    load_row(problem_.q(sequence_, head_).row(i), problem_.d_qk, problem_.dtype, query_.data());
    double max = -std::numeric_limits<double>::infinity();
    for (int64_t j = 0; j < keys; ++j) {
      load_row(k_.row(j), problem_.d_qk, problem_.dtype, row_.data());
      double dot = 0;
      for (int32_t c = 0; c < problem_.d_qk; ++c) dot += query_[c] * row_[c];
      weights_[j] = problem_.scale * dot;
      max = std::max(max, weights_[j]);
    }
    const int64_t block = problem_.block_size;
    const int64_t q_row = (keys - 1) / block - problem_.grids[sequence_].first_q_block;
    const int64_t n = rows_.decode(problem_, sequence_, head_, q_row, blocks_.data());
    std::fill(exact_.begin(), exact_.end(), 0.0);
    double sum = 0, kept = 0;
    for (int64_t j = 0, e = 0; j < keys; ++j) {
      const double p = std::exp(weights_[j] - max);
      while (e < n && blocks_[e] < j / block) ++e;
      sum += p;
      if (e < n && blocks_[e] == j / block && rows_.window.sees(keys - 1, j)) kept += p;
      load_row(v_.row(j), problem_.d_v, problem_.dtype, row_.data());
      for (int32_t c = 0; c < problem_.d_v; ++c) exact_[c] += p * row_[c];
    }
    load_row(problem_.out(sequence_, head_).row(i), problem_.d_v, problem_.dtype, row_.data());
    for (int32_t c = 0; c < problem_.d_v; ++c) {
      const double exact = exact_[c] / sum;
      difference_ += (row_[c] - exact) * (row_[c] - exact);
      size_ += exact * exact;
    }
    return kept / sum;
  }

  const Problem& problem_;
  const BlockRows& rows_;
  const int64_t sequence_;
  const int32_t head_;
  const RowView k_, v_;
  const int64_t position_;  // of query row 0
  std::vector<double> row_, query_, exact_, weights_;
  std::vector<int32_t> blocks_;
  double difference_ = 0, size_ = 0;  // sums of squares
};

}  // namespace

void compare_rows(const Problem& problem, const BlockRows& kept, int64_t rows,
                  const Execution& execution, std::span<DenseComparison> heads) {
  std::vector<DenseComparison> found(heads.size());
  parallel_tasks(worker_count(execution), static_cast<int64_t>(heads.size()),
                 [&](int, int64_t task) {
                   HeadComparison head(problem, kept, task / problem.h_q,
                                       static_cast<int32_t>(task % problem.h_q));
                   found[task] = head.run(rows);
                 });
  std::copy(found.begin(), found.end(), heads.begin());
}

void compare_with_dense(const AttentionInput& input, const BlockIndex& index, const TensorView& out,
                        int64_t rows, const Execution& execution,
                        std::span<DenseComparison> heads) {
  if (is_cuda(execution.backend)) {
    throw Error(ErrorCode::kUnsupported,
                "compare_with_dense: runs on host memory and host backends only");
  }
  const auto refuse = [](const char* what, int64_t expected, int64_t got) {
    throw Error(ErrorCode::kInvalidArgument,
                std::string(what) + std::to_string(expected) + ", got " + std::to_string(got));
  };
  if (rows < 1) refuse("rows: expected at least ", 1, rows);
  if (execution.num_threads < 0)
    refuse("num_threads: expected at least ", 0, execution.num_threads);
  const Problem problem = make_problem(input, Purpose::kAttend, execution.backend, &out);
  validate_index(problem, index);
  const int64_t n = problem.b() * problem.h_q;
  if (static_cast<int64_t>(heads.size()) != n) {
    refuse("heads: expected entries for [b * h_q] = ", n, static_cast<int64_t>(heads.size()));
  }
  const BlockRows kept{.csr = &index,
                       .window = TokenWindow::of(index.global_window, index.local_window)};
  compare_rows(problem, kept, rows, execution, heads);
}

}  // namespace flexprefill
