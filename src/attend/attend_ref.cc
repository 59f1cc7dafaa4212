// attend in double precision, one query row at a time: the specification that every other backend
// is checked against. Slow on purpose; allocates.
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "backend.h"
#include "math.h"

namespace flexprefill {
namespace {

struct Row {
  std::vector<double> out;  // [d_v]
  double lse = 0;
};

// Rows [0, n) of a head as doubles, [n, d].
std::vector<double> to_double(RowView rows, int64_t n, int32_t d, DType dtype) {
  std::vector<double> values;
  values.reserve(n * d);
  for (int64_t i = 0; i < n; ++i) {
    const std::byte* row = rows.row(i);
    for (int32_t c = 0; c < d; ++c)
      values.push_back(load_float(row + c * element_size(dtype), dtype));
  }
  return values;
}

// Means of the whole blocks of x [n, d], rounded to the element type: [n / block, d].
std::vector<double> block_means(const std::vector<double>& x, int64_t n, int32_t d, int64_t block,
                                DType dtype) {
  std::vector<double> means(n / block * d, 0.0);
  for (int64_t i = 0; i < n / block * block; ++i) {
    for (int32_t c = 0; c < d; ++c) means[i / block * d + c] += x[i * d + c];
  }
  std::byte element[4];
  for (double& mean : means) {
    store_float(element, dtype, static_cast<float>(mean / static_cast<double>(block)));
    mean = load_float(element, dtype);
  }
  return means;
}

// What a query row sees: keys, and blocks through their means, whose logits get `bias`.
struct Keys {
  std::vector<int64_t> exact, means;
  double bias = 0;
};

// One query row: softmax(scale * q k^T) v. q [d_qk], k [s_kv, d_qk], v [s_kv, d_v], means of the
// blocks likewise.
Row attend_row(const Problem& problem, const double* q, const double* k, const double* v,
               const double* k_means, const double* v_means, const Keys& seen) {
  Row row{std::vector<double>(problem.d_v, 0.0), -std::numeric_limits<double>::infinity()};
  const size_t n_exact = seen.exact.size(), n = n_exact + seen.means.size();
  if (n == 0) return row;
  std::vector<double> logits;
  double max = -std::numeric_limits<double>::infinity();
  for (size_t e = 0; e < n; ++e) {
    const bool exact = e < n_exact;
    const double* key =
        exact ? k + seen.exact[e] * problem.d_qk : k_means + seen.means[e - n_exact] * problem.d_qk;
    logits.push_back(problem.scale * std::inner_product(q, q + problem.d_qk, key, 0.0) +
                     (exact ? 0 : seen.bias));
    if (logits.back() > max) max = logits.back();
  }
  double sum = 0;
  for (size_t e = 0; e < n; ++e) {
    const double p = std::exp(logits[e] - max);
    const double* value = e < n_exact ? v + seen.exact[e] * problem.d_v
                                      : v_means + seen.means[e - n_exact] * problem.d_v;
    sum += p;
    for (int32_t c = 0; c < problem.d_v; ++c) row.out[c] += p * value[c];
  }
  for (double& element : row.out) element /= sum;
  row.lse = max + std::log(sum);
  return row;
}

}  // namespace

void attend_reference(const Problem& problem, const BlockRows& rows, const Execution&,
                      Arena& arena) {
  if (arena.counting()) return;
  const int64_t block = problem.block_size;
  for (int64_t s = 0; s < problem.b(); ++s) {
    const SequenceLengths lengths = problem.lengths[s];
    const BlockGrid& grid = problem.grids[s];
    std::vector<int32_t> blocks(grid.n_kv), dropped(grid.n_kv);
    for (int32_t head = 0; head < problem.h_q; ++head) {
      const int32_t kv = problem.kv_head(head);
      const auto as_double = [&](RowView view, int64_t n, int32_t d) {
        return to_double(view, n, d, problem.dtype);
      };
      const std::vector<double> q = as_double(problem.q(s, head), lengths.s_q, problem.d_qk);
      const std::vector<double> k = as_double(problem.k(s, kv), lengths.s_kv, problem.d_qk);
      const std::vector<double> v = as_double(problem.v(s, kv), lengths.s_kv, problem.d_v);
      std::vector<double> k_means, v_means;
      if (rows.mean_correction) {
        k_means = block_means(k, lengths.s_kv, problem.d_qk, block, problem.dtype);
        v_means = block_means(v, lengths.s_kv, problem.d_v, block, problem.dtype);
      }
      for (int64_t i = 0; i < lengths.s_q; ++i) {
        const int64_t position = lengths.s_kv - lengths.s_q + i;
        const int64_t q_row = position / block - grid.first_q_block;
        const int64_t n = rows.decode(problem, s, head, q_row, blocks.data());
        Keys keys{.bias = std::log(static_cast<double>(block))};
        for (int64_t e = 0; e < n; ++e) {
          for (int64_t j = blocks[e] * block; j < (blocks[e] + 1) * block; ++j) {
            if (rows.window.sees(position, j)) keys.exact.push_back(j);
          }
        }
        if (rows.mean_correction) {
          const int64_t left = dropped_blocks(blocks.data(), n, position / block, dropped.data());
          keys.means.assign(dropped.begin(), dropped.begin() + left);
        }
        const Row row = attend_row(problem, q.data() + i * problem.d_qk, k.data(), v.data(),
                                   k_means.data(), v_means.data(), keys);
        std::byte* out = problem.out(s, head).row(i);
        for (int32_t c = 0; c < problem.d_v; ++c) {
          store_float(out + c * element_size(problem.dtype), problem.dtype,
                      static_cast<float>(row.out[c]));
        }
        if (float* lse = problem.lse(s, head)) lse[i] = static_cast<float>(row.lse);
      }
    }
  }
}

}  // namespace flexprefill
