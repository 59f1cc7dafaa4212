// A validated call: what the backends see. Nothing here is checked again.
#ifndef FLEXPREFILL_SRC_PROBLEM_H_
#define FLEXPREFILL_SRC_PROBLEM_H_

#include <cstddef>
#include <cstdint>
#include <vector>

#include "flexprefill/attend.h"
#include "flexprefill/block_index.h"
#include "flexprefill/flexprefill.h"
#include "flexprefill/select.h"
#include "flexprefill/types.h"

namespace flexprefill {

// The rows of one head of one sequence: row i lies at base + i * row_stride, or, if paged, at row
// i % page_size of page pages[i / page_size]. Strides here are bytes.
struct RowView {
  std::byte* base = nullptr;
  int64_t row_stride = 0;
  const int32_t* pages = nullptr;
  int64_t page_stride = 0;
  int64_t page_size = 0;

  std::byte* row(int64_t i) const {
    if (pages == nullptr) return base + i * row_stride;
    return base + pages[i / page_size] * page_stride + (i % page_size) * row_stride;
  }
  // Rows from i on that lie row_stride apart: as many as `limit`, or to the end of i's page.
  int64_t run(int64_t i, int64_t limit) const {
    if (pages == nullptr) return limit;
    const int64_t left = page_size - i % page_size;
    return left < limit ? left : limit;
  }
};

struct Problem {
  DType dtype = DType::kFloat32;
  int32_t h_q = 0, h_kv = 0, d_qk = 0, d_v = 0;
  int32_t block_size = 128;
  float scale = 1;  // softmax scale
  bool gqa_interleave = false;
  std::vector<SequenceLengths> lengths;  // [b]
  std::vector<BlockGrid> grids;          // [b]
  std::vector<int64_t> first_row;        // [b + 1]: first index row of each sequence

  int64_t b() const { return static_cast<int64_t>(lengths.size()); }
  int32_t group() const { return h_q / h_kv; }  // query heads per K/V head
  int32_t kv_head(int32_t h) const { return gqa_interleave ? h % h_kv : h / group(); }
  // The g-th query head that reads K/V head `kv`.
  int32_t q_head(int32_t kv, int32_t g) const {
    return gqa_interleave ? g * h_kv + kv : kv * group() + g;
  }
  int64_t index_row(int64_t sequence, int32_t head, int64_t q_row) const {
    return first_row[sequence] + head * grids[sequence].n_q + q_row;
  }

  RowView q(int64_t sequence, int32_t head) const { return rows(q_view, sequence, head, q_start); }
  RowView k(int64_t sequence, int32_t kv) const { return kv_rows(k_view, sequence, kv); }
  RowView v(int64_t sequence, int32_t kv) const { return kv_rows(v_view, sequence, kv); }
  RowView out(int64_t sequence, int32_t head) const {
    return rows(out_view, sequence, head, q_start);
  }
  // lse of (sequence, head, row 0), contiguous over rows; nullptr if not asked for.
  float* lse(int64_t sequence, int32_t head) const;

  TensorView q_view, k_view, v_view;
  TensorView out_view, lse_view;  // data == nullptr where not given
  std::vector<int64_t> q_start;   // packed: first row of each sequence; empty: batch
  std::vector<int64_t> kv_start;  // packed: likewise
  const int32_t* page_table = nullptr;
  int64_t page_table_stride = 0;

 private:
  static RowView rows(const TensorView& view, int64_t sequence, int32_t head,
                      const std::vector<int64_t>& start);
  RowView kv_rows(const TensorView& view, int64_t sequence, int32_t kv) const;
};

size_t element_size(DType dtype);
const char* dtype_name(DType dtype);

// Whether a backend's tensors and workspace are device memory.
inline bool is_cuda(Backend backend) {
  return backend == Backend::kCuda || backend == Backend::kSm80 || backend == Backend::kSm90;
}

// What a problem is made for. Size queries need no data pointers (but the page table); select
// needs no v.
enum class Purpose { kSelect, kAttend, kSelectSize, kAttendSize };

// Checks everything that can be checked on the host and lays the call out; looks at no device
// memory. `out` is given for kAttend, `lse` if wanted.
Problem make_problem(const AttentionInput& input, Purpose purpose, Backend backend,
                     const TensorView* out = nullptr, const TensorView* lse = nullptr);
void validate_pattern(const Pattern& pattern);
// A pattern of per-head choices must have one for each query head.
void validate_pattern_heads(const Problem& problem, const Pattern& pattern);
void validate_audit(const Problem& problem, std::span<HeadAudit> audit);
void validate_audit(const Problem& problem, const PrefillAudit& audit, Backend backend);
// The index must be of this problem's lengths, heads and block size, and well formed.
void validate_index(const Problem& problem, const BlockIndex& index);

}  // namespace flexprefill

#endif  // FLEXPREFILL_SRC_PROBLEM_H_
