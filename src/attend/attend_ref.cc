// attend in double precision, one query row at a time: the specification that every other backend
// is checked against. Slow on purpose; allocates.
#include <cmath>
#include <limits>
#include <vector>

#include "backend.h"
#include "math.h"

namespace flexprefill {
namespace {

struct Row {
  std::vector<double> out;  // [d_v]
  double lse = 0;
};

double dot(const std::byte* a, const std::byte* b, int32_t d, DType dtype) {
  const size_t size = element_size(dtype);
  double sum = 0;
  for (int32_t c = 0; c < d; ++c) {
    sum += static_cast<double>(load_float(a + c * size, dtype)) *
           static_cast<double>(load_float(b + c * size, dtype));
  }
  return sum;
}

// One query row over the keys that it sees: softmax(scale * q k^T) v.
Row attend_row(const Problem& problem, const std::byte* q, RowView k, RowView v,
               const std::vector<int64_t>& keys) {
  Row row{std::vector<double>(problem.d_v, 0.0), -std::numeric_limits<double>::infinity()};
  if (keys.empty()) return row;
  std::vector<double> logits;
  double max = -std::numeric_limits<double>::infinity();
  for (const int64_t j : keys) {
    logits.push_back(static_cast<double>(problem.scale) *
                     dot(q, k.row(j), problem.d_qk, problem.dtype));
    if (logits.back() > max) max = logits.back();
  }
  double sum = 0;
  for (size_t e = 0; e < keys.size(); ++e) {
    const double p = std::exp(logits[e] - max);
    sum += p;
    const std::byte* value = v.row(keys[e]);
    for (int32_t c = 0; c < problem.d_v; ++c) {
      row.out[c] += p * static_cast<double>(
                            load_float(value + c * element_size(problem.dtype), problem.dtype));
    }
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
    std::vector<int32_t> blocks(grid.n_kv);
    for (int32_t head = 0; head < problem.h_q; ++head) {
      const int32_t kv = problem.kv_head(head);
      for (int64_t i = 0; i < lengths.s_q; ++i) {
        const int64_t position = lengths.s_kv - lengths.s_q + i;
        const int64_t q_row = position / block - grid.first_q_block;
        const int64_t n = rows.decode(problem, s, head, q_row, blocks.data());
        std::vector<int64_t> keys;
        for (int64_t e = 0; e < n; ++e) {
          for (int64_t j = blocks[e] * block; j < (blocks[e] + 1) * block; ++j) {
            if (rows.window.sees(position, j)) keys.push_back(j);
          }
        }
        const Row row = attend_row(problem, problem.q(s, head).row(i), problem.k(s, kv),
                                   problem.v(s, kv), keys);
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
