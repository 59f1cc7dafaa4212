// Every check of a call, once, on the host, before any work.
#include <algorithm>
#include <cmath>
#include <limits>
#include <string>

#include "problem.h"

namespace flexprefill {
namespace {

[[noreturn]] void refuse(const std::string& message) {
  throw Error(ErrorCode::kInvalidArgument, message);
}

std::string shape_text(const TensorView& view) {
  std::string text = "[";
  for (int32_t i = 0; i < std::clamp(view.rank, 0, 4); ++i) {
    text += (i ? ", " : "") + std::to_string(view.shape[i]);
  }
  return text + "]";
}

void expect_shape(const TensorView& view, const char* name, const std::string& expected,
                  bool matches) {
  if (!matches) {
    refuse(std::string(name) + ": expected shape " + expected + ", got " + shape_text(view));
  }
}

// Elements from the first to one past the last that the view reaches, and the offset of the first
// (below 0 with negative strides). Refuses what does not fit an int64 of bytes.
struct Extent {
  int64_t first = 0;
  int64_t last = 0;  // one past; == first when empty
};

Extent extent_of(const TensorView& view, const char* name) {
  Extent extent{0, 1};
  for (int32_t i = 0; i < view.rank; ++i) {
    if (view.shape[i] == 0) return {0, 0};
    int64_t reach = 0;
    int64_t* end = view.strides[i] < 0 ? &extent.first : &extent.last;
    if (__builtin_mul_overflow(view.shape[i] - 1, view.strides[i], &reach) ||
        __builtin_add_overflow(*end, reach, end)) {
      refuse(std::string(name) + ": shape " + shape_text(view) +
             " and strides reach beyond 2^63 elements");
    }
  }
  constexpr int64_t kMost = std::numeric_limits<int64_t>::max() / 8;
  if (extent.last > kMost || extent.first < -kMost) {
    refuse(std::string(name) + ": strides reach beyond 2^60 elements");
  }
  return extent;
}

void check_view(const TensorView& view, const char* name, const std::string& layout, int32_t rank,
                bool needs_data) {
  if (view.rank != rank) {
    refuse(std::string(name) + ": expected rank " + std::to_string(rank) + " " + layout +
           ", got rank " + std::to_string(view.rank));
  }
  bool empty = false;
  for (int32_t i = 0; i < rank; ++i) {
    if (view.shape[i] < 0) {
      refuse(std::string(name) + ": expected sizes of at least 0, got " + shape_text(view));
    }
    empty |= view.shape[i] == 0;
  }
  if (needs_data && !empty && view.data == nullptr)
    refuse(std::string(name) + ": expected data, got nullptr");
  if (view.shape[rank - 1] > 1 && view.strides[rank - 1] != 1) {
    refuse(std::string(name) + ": expected a contiguous last dimension (stride 1), got stride " +
           std::to_string(view.strides[rank - 1]));
  }
  if (!empty && reinterpret_cast<uintptr_t>(view.data) % element_size(view.dtype) != 0) {
    refuse(std::string(name) + ": expected data aligned to its element type");
  }
  extent_of(view, name);
}

void check_dtype(DType dtype) {
  if (dtype != DType::kFloat32 && dtype != DType::kFloat16 && dtype != DType::kBFloat16) {
    refuse("q: expected element type float32, float16 or bfloat16, got number " +
           std::to_string(static_cast<int32_t>(dtype)));
  }
}

void check_same_dtype(const TensorView& view, const char* name, DType dtype) {
  if (view.dtype != dtype) {
    refuse(std::string(name) + ": expected the element type of q (" + dtype_name(dtype) +
           "), got " + dtype_name(view.dtype));
  }
}

void check_head_dim(int64_t dim, const char* name) {
  if (dim < 16 || dim > 256 || dim % 8 != 0) {
    refuse(std::string(name) + ": expected a head dim from 16 to 256 in steps of 8, got " +
           std::to_string(dim));
  }
}

// Starts of packed sequences: begins at 0, ascends, ends at `total`.
std::vector<int64_t> check_cu_seqlens(std::span<const int32_t> cu, const char* name,
                                      int64_t total) {
  if (cu.empty()) refuse(std::string(name) + ": expected [b + 1] starts, got none");
  if (cu[0] != 0) {
    refuse(std::string(name) + ": expected to begin with 0, got " + std::to_string(cu[0]));
  }
  for (size_t i = 1; i < cu.size(); ++i) {
    if (cu[i] < cu[i - 1]) {
      refuse(std::string(name) + ": expected ascending starts, got " + std::to_string(cu[i]) +
             " after " + std::to_string(cu[i - 1]) + " at entry " + std::to_string(i));
    }
  }
  if (cu.back() != total) {
    refuse(std::string(name) + ": expected to end with the number of rows " +
           std::to_string(total) + ", got " + std::to_string(cu.back()));
  }
  return {cu.begin(), cu.end()};
}

void check_paged(const AttentionInput& input, const TensorView& k, int64_t b, bool on_device) {
  const int64_t page_size = k.shape[1];
  if (page_size < 16 || page_size % 16 != 0) {
    refuse("k: expected pages of a multiple of 16 rows, got " + std::to_string(page_size));
  }
  if (static_cast<int64_t>(input.seqlens_kv.size()) != b) {
    refuse("seqlens_kv: expected [b] = [" + std::to_string(b) + "] lengths, got " +
           std::to_string(input.seqlens_kv.size()));
  }
  if (input.max_pages < 1) {
    refuse("max_pages: expected at least 1, got " + std::to_string(input.max_pages));
  }
  if (input.page_table_stride < input.max_pages ||
      input.page_table_stride > std::numeric_limits<int64_t>::max() / std::max<int64_t>(b, 1)) {
    refuse("page_table: expected a row stride of at least max_pages = " +
           std::to_string(input.max_pages) + " that reaches less than 2^63 entries, got " +
           std::to_string(input.page_table_stride));
  }
  for (int64_t s = 0; s < b; ++s) {
    const int64_t length = std::max<int64_t>(input.seqlens_kv[s], 0);
    const int64_t pages = length / page_size + (length % page_size != 0);
    if (pages > input.max_pages) {
      refuse("seqlens_kv: expected at most max_pages * page_size = " +
             std::to_string(input.max_pages * page_size) + " keys, got " +
             std::to_string(input.seqlens_kv[s]) + " in sequence " + std::to_string(s));
    }
    for (int64_t p = 0; p < pages && !on_device; ++p) {
      const int32_t page = input.page_table[s * input.page_table_stride + p];
      if (page < 0 || page >= k.shape[0]) {
        refuse("page_table: expected pages from 0 to " + std::to_string(k.shape[0] - 1) + ", got " +
               std::to_string(page) + " at [" + std::to_string(s) + ", " + std::to_string(p) + "]");
      }
    }
  }
}

// Lengths of every sequence, and where packed rows start.
void lay_out_sequences(const AttentionInput& input, Problem& problem, bool on_device) {
  const bool packed_q = problem.q_view.rank == 3;
  const bool paged = input.page_table != nullptr;
  if (packed_q) {
    problem.q_start = check_cu_seqlens(input.cu_seqlens_q, "cu_seqlens_q", problem.q_view.shape[0]);
  } else if (!input.cu_seqlens_q.empty()) {
    refuse("cu_seqlens_q: expected packed q [t_q, h_q, d_qk], got rank 4 q");
  }
  const int64_t b =
      packed_q ? static_cast<int64_t>(problem.q_start.size()) - 1 : problem.q_view.shape[0];
  const TensorView& k = problem.k_view;
  if (paged) {
    if (!input.cu_seqlens_kv.empty()) {
      refuse("cu_seqlens_kv: expected none with a page_table (lengths are seqlens_kv)");
    }
    check_paged(input, k, b, on_device);
  } else if (packed_q) {
    problem.kv_start = check_cu_seqlens(input.cu_seqlens_kv, "cu_seqlens_kv", k.shape[0]);
    if (problem.kv_start.size() != problem.q_start.size()) {
      refuse("cu_seqlens_kv: expected " + std::to_string(problem.q_start.size()) +
             " entries as cu_seqlens_q, got " + std::to_string(problem.kv_start.size()));
    }
  } else {
    if (!input.cu_seqlens_kv.empty()) refuse("cu_seqlens_kv: expected packed q and k");
    expect_shape(k, "k", "[b = " + std::to_string(b) + ", s_kv, h_kv, d_qk]", k.shape[0] == b);
  }
  for (int64_t s = 0; s < b; ++s) {
    SequenceLengths lengths;
    lengths.s_q = packed_q ? problem.q_start[s + 1] - problem.q_start[s] : problem.q_view.shape[1];
    lengths.s_kv = paged      ? input.seqlens_kv[s]
                   : packed_q ? problem.kv_start[s + 1] - problem.kv_start[s]
                              : k.shape[1];
    if (lengths.s_q < 1 || lengths.s_q > lengths.s_kv) {
      refuse("sequence " + std::to_string(s) + ": expected 1 <= s_q <= s_kv, got s_q = " +
             std::to_string(lengths.s_q) + ", s_kv = " + std::to_string(lengths.s_kv));
    }
    if (lengths.s_kv > std::numeric_limits<int32_t>::max()) {
      refuse("sequence " + std::to_string(s) + ": expected at most 2^31 - 1 keys, got " +
             std::to_string(lengths.s_kv));
    }
    problem.lengths.push_back(lengths);
  }
}

void check_output(const Problem& problem, const TensorView& out, bool same_dtype, const char* name,
                  std::initializer_list<int64_t> shape, const std::string& layout) {
  check_view(out, name, layout, static_cast<int32_t>(shape.size()), true);
  expect_shape(out, name, layout, std::equal(shape.begin(), shape.end(), out.shape.begin()));
  const DType dtype = same_dtype ? problem.dtype : DType::kFloat32;
  if (out.dtype != dtype) {
    refuse(std::string(name) + ": expected element type " + dtype_name(dtype) + ", got " +
           dtype_name(out.dtype));
  }
  // Every element must have a place of its own: going from the smallest stride up, each stride
  // must pass what the dimensions below it reach.
  struct Dimension {
    int64_t stride, size;
  };
  std::array<Dimension, 4> ascending{};
  int32_t n = 0;
  for (int32_t i = 0; i < out.rank; ++i) {
    if (out.shape[i] == 0) return;
    if (out.shape[i] == 1) continue;
    const Dimension dimension{std::abs(out.strides[i]), out.shape[i]};
    int32_t at = n++;
    for (; at > 0 && ascending[at - 1].stride > dimension.stride; --at) {
      ascending[at] = ascending[at - 1];
    }
    ascending[at] = dimension;
  }
  int64_t reach = 0;
  for (int32_t i = 0; i < n; ++i) {
    if (ascending[i].stride <= reach) {
      refuse(std::string(name) + ": expected strides that give every element its own place");
    }
    reach += (ascending[i].size - 1) * ascending[i].stride;
  }
}

struct Bytes {
  uintptr_t first, last;
};

Bytes bytes_of(const TensorView& view, const char* name) {
  const Extent extent = extent_of(view, name);
  const auto base = reinterpret_cast<uintptr_t>(view.data);
  const auto size = static_cast<int64_t>(element_size(view.dtype));
  return {base + static_cast<uintptr_t>(extent.first * size),
          base + static_cast<uintptr_t>(extent.last * size)};
}

void check_alias(const TensorView& out, const char* out_name, const TensorView& other,
                 const char* other_name) {
  if (out.data == nullptr || other.data == nullptr) return;
  const Bytes a = bytes_of(out, out_name), b = bytes_of(other, other_name);
  if (a.first < b.last && b.first < a.last) {
    refuse(std::string(out_name) + ": expected memory of its own, got memory that overlaps " +
           other_name);
  }
}

}  // namespace

size_t element_size(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

const char* dtype_name(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return "float32";
    case DType::kFloat16:
      return "float16";
    case DType::kBFloat16:
      return "bfloat16";
  }
  return "unknown";
}

TensorView contiguous_view(void* data, DType dtype, std::span<const int64_t> shape) {
  if (shape.empty() || shape.size() > 4) {
    refuse("contiguous_view: expected rank 1 to 4, got " + std::to_string(shape.size()));
  }
  TensorView view;
  view.data = data;
  view.dtype = dtype;
  view.rank = static_cast<int32_t>(shape.size());
  int64_t stride = 1;
  for (int32_t i = view.rank - 1; i >= 0; --i) {
    view.shape[i] = shape[i];
    view.strides[i] = stride;
    if (__builtin_mul_overflow(stride, std::max<int64_t>(shape[i], 1), &stride)) {
      refuse("contiguous_view: shape reaches beyond 2^63 elements");
    }
  }
  return view;
}

Problem make_problem(const AttentionInput& input, Purpose purpose, Backend backend,
                     const TensorView* out, const TensorView* lse) {
  const bool on_device = is_cuda(backend);
  const bool needs_data = purpose == Purpose::kSelect || purpose == Purpose::kAttend;
  const bool needs_v = purpose == Purpose::kAttend || purpose == Purpose::kAttendSize;
  Problem problem;
  problem.q_view = input.q;
  problem.k_view = input.k;
  problem.v_view = input.v;
  problem.gqa_interleave = input.gqa_interleave;
  check_dtype(input.q.dtype);
  problem.dtype = input.q.dtype;
  if (on_device && problem.dtype == DType::kFloat32) {
    throw Error(ErrorCode::kUnsupported,
                "q: the CUDA backends take element type float16 or bfloat16, got float32");
  }
  if (input.block_size != 32 && input.block_size != 64 && input.block_size != 128) {
    refuse("block_size: expected 32, 64 or 128, got " + std::to_string(input.block_size));
  }
  problem.block_size = input.block_size;

  if (input.q.rank != 3 && input.q.rank != 4) {
    refuse("q: expected rank 4 [b, s_q, h_q, d_qk] or packed rank 3 [t_q, h_q, d_qk], got rank " +
           std::to_string(input.q.rank));
  }
  check_view(input.q, "q", "[.., h_q, d_qk]", input.q.rank, needs_data);
  const bool paged = input.page_table != nullptr;
  const int32_t kv_rank = paged ? 4 : input.q.rank;
  const std::string kv_layout = paged          ? "[pages, page_size, h_kv, d]"
                                : kv_rank == 4 ? "[b, s_kv, h_kv, d]"
                                               : "[t_kv, h_kv, d]";
  check_same_dtype(input.k, "k", problem.dtype);
  check_view(input.k, "k", kv_layout, kv_rank, needs_data);

  const int64_t h_q = input.q.shape[input.q.rank - 2], h_kv = input.k.shape[kv_rank - 2];
  constexpr int64_t kMostHeads = 1 << 20;
  if (h_kv < 1 || h_q < 1 || h_q > kMostHeads || h_q % h_kv != 0) {
    refuse("q: expected a number of heads h_q that is a multiple of h_kv = " +
           std::to_string(h_kv) + ", got h_q = " + std::to_string(h_q));
  }
  problem.h_q = static_cast<int32_t>(h_q);
  problem.h_kv = static_cast<int32_t>(h_kv);
  const int64_t d_qk = input.q.shape[input.q.rank - 1];
  check_head_dim(d_qk, "q");
  expect_shape(input.k, "k", "[.., h_kv, d_qk = " + std::to_string(d_qk) + "]",
               input.k.shape[kv_rank - 1] == d_qk);
  problem.d_qk = static_cast<int32_t>(d_qk);

  if (needs_v) {
    check_same_dtype(input.v, "v", problem.dtype);
    check_view(input.v, "v", kv_layout, kv_rank, needs_data);
    check_head_dim(input.v.shape[kv_rank - 1], "v");
    expect_shape(input.v, "v", "as k " + shape_text(input.k) + " but for the last dimension",
                 std::equal(input.v.shape.begin(), input.v.shape.begin() + kv_rank - 1,
                            input.k.shape.begin()));
    problem.d_v = static_cast<int32_t>(input.v.shape[kv_rank - 1]);
  }

  problem.scale = input.softmax_scale.value_or(1.0f / std::sqrt(static_cast<float>(d_qk)));
  if (!std::isfinite(problem.scale)) {
    refuse("softmax_scale: expected a finite number, got " + std::to_string(problem.scale));
  }
  problem.page_table = input.page_table;
  problem.page_table_stride = input.page_table_stride;
  lay_out_sequences(input, problem, on_device);

  problem.first_row.assign(1, 0);
  for (const SequenceLengths& lengths : problem.lengths) {
    problem.grids.push_back(block_grid(lengths, problem.block_size));
    problem.first_row.push_back(problem.first_row.back() + problem.h_q * problem.grids.back().n_q);
  }

  const TensorView& q = input.q;
  if (out != nullptr) {
    const std::string layout = "the shape of q with d_v = " + std::to_string(problem.d_v);
    if (q.rank == 4) {
      check_output(problem, *out, true, "out", {q.shape[0], q.shape[1], h_q, problem.d_v}, layout);
    } else {
      check_output(problem, *out, true, "out", {q.shape[0], h_q, problem.d_v}, layout);
    }
    problem.out_view = *out;
    check_alias(*out, "out", input.q, "q");
    check_alias(*out, "out", input.k, "k");
    check_alias(*out, "out", input.v, "v");
  }
  if (lse != nullptr && lse->data != nullptr) {
    if (q.rank == 4) {
      check_output(problem, *lse, false, "lse", {q.shape[0], h_q, q.shape[1]}, "[b, h_q, s_q]");
    } else {
      check_output(problem, *lse, false, "lse", {h_q, q.shape[0]}, "[h_q, t_q]");
    }
    problem.lse_view = *lse;
    check_alias(*lse, "lse", input.q, "q");
    check_alias(*lse, "lse", input.k, "k");
    check_alias(*lse, "lse", input.v, "v");
    if (out != nullptr) check_alias(*lse, "lse", *out, "out");
  }
  return problem;
}

void validate_audit(const Problem& problem, std::span<HeadAudit> audit) {
  const int64_t expected = problem.b() * problem.h_q;
  if (!audit.empty() && static_cast<int64_t>(audit.size()) != expected) {
    refuse("audit: expected [b * h_q] = [" + std::to_string(expected) + "] entries, got " +
           std::to_string(audit.size()));
  }
}

void validate_audit(const Problem& problem, const PrefillAudit& audit, Backend backend) {
  validate_audit(problem, audit.heads);
  if (audit.min_kept_mass && !(*audit.min_kept_mass >= 0 && *audit.min_kept_mass <= 1)) {
    refuse("min_kept_mass: expected a number in [0, 1], got " +
           std::to_string(*audit.min_kept_mass));
  }
  if (audit.compared_rows < 0) {
    refuse("compared_rows: expected at least 0, got " + std::to_string(audit.compared_rows));
  }
  const int64_t expected = audit.compared_rows == 0 ? 0 : problem.b() * problem.h_q;
  if (static_cast<int64_t>(audit.comparison.size()) != expected) {
    refuse("comparison: expected " + std::to_string(expected) + " entries for " +
           std::to_string(audit.compared_rows) + " compared rows, got " +
           std::to_string(audit.comparison.size()));
  }
  if (audit.compared_rows > 0 && is_cuda(backend)) {
    throw Error(ErrorCode::kUnsupported,
                "compared_rows: the comparison with dense attention runs on host memory only, so "
                "a CUDA backend takes 0");
  }
}

void validate_index(const Problem& problem, const BlockIndex& index) {
  if (index.block_size != problem.block_size) {
    refuse("index: expected block_size " + std::to_string(problem.block_size) + ", got " +
           std::to_string(index.block_size));
  }
  if (index.h_q != problem.h_q) {
    refuse("index: expected h_q = " + std::to_string(problem.h_q) + ", got " +
           std::to_string(index.h_q));
  }
  if (static_cast<int64_t>(index.sequences.size()) != problem.b()) {
    refuse("index: expected " + std::to_string(problem.b()) + " sequences, got " +
           std::to_string(index.sequences.size()));
  }
  for (int64_t s = 0; s < problem.b(); ++s) {
    const SequenceLengths &want = problem.lengths[s], &got = index.sequences[s];
    if (want.s_q != got.s_q || want.s_kv != got.s_kv) {
      refuse("index: sequence " + std::to_string(s) + ": expected (s_q, s_kv) = (" +
             std::to_string(want.s_q) + ", " + std::to_string(want.s_kv) + "), got (" +
             std::to_string(got.s_q) + ", " + std::to_string(got.s_kv) + ")");
    }
  }
  index.check();
}

RowView Problem::rows(const TensorView& view, int64_t sequence, int32_t head,
                      const std::vector<int64_t>& start) {
  const auto size = static_cast<int64_t>(element_size(view.dtype));
  auto* base = static_cast<std::byte*>(view.data);
  RowView out;
  if (view.rank == 4) {
    out.base = base + (sequence * view.strides[0] + head * view.strides[2]) * size;
    out.row_stride = view.strides[1] * size;
  } else {
    out.base = base + (start[sequence] * view.strides[0] + head * view.strides[1]) * size;
    out.row_stride = view.strides[0] * size;
  }
  return out;
}

RowView Problem::kv_rows(const TensorView& view, int64_t sequence, int32_t kv) const {
  if (page_table == nullptr) return rows(view, sequence, kv, kv_start);
  RowView out = rows(view, 0, kv, kv_start);
  out.pages = page_table + sequence * page_table_stride;
  out.page_size = view.shape[1];
  out.page_stride = view.strides[0] * static_cast<int64_t>(element_size(view.dtype));
  return out;
}

float* Problem::lse(int64_t sequence, int32_t head) const {
  if (lse_view.data == nullptr) return nullptr;
  auto* base = static_cast<float*>(lse_view.data);
  if (lse_view.rank == 3) {
    return base + sequence * lse_view.strides[0] + head * lse_view.strides[1];
  }
  return base + head * lse_view.strides[0] + q_start[sequence];
}

}  // namespace flexprefill
