#include "case_table.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>

#include "math.h"
#include "problem.h"

namespace flexprefill::testing {
namespace {

constexpr int64_t kPageSize = 48;  // no power of two, so that pages and blocks do not line up

}  // namespace

std::vector<Case> all_cases() {
  using enum Layout;
  constexpr DType f32 = DType::kFloat32, f16 = DType::kFloat16, bf16 = DType::kBFloat16;
  std::vector<Case> cases{
      {.name = "one_token", .lengths = {{1, 1}}},
      {.name = "one_row_decode", .lengths = {{1, 300}}, .dtype = bf16},
      {.name = "one_block", .lengths = {{64, 64}}},
      {.name = "ragged_tail", .lengths = {{333, 333}}},
      {.name = "ragged_by_one", .lengths = {{257, 257}}, .dtype = bf16, .block_size = 128},
      {.name = "chunk_inside_block", .lengths = {{150, 431}}},
      {.name = "chunk_on_block", .lengths = {{128, 512}}, .dtype = f16},
      {.name = "block_and_one", .lengths = {{65, 400}}},
      {.name = "block_32", .lengths = {{300, 300}}, .block_size = 32},
      {.name = "block_128", .lengths = {{700, 700}}, .dtype = bf16, .block_size = 128},
      {.name = "one_head", .lengths = {{200, 200}}, .h_q = 1, .h_kv = 1},
      {.name = "mqa", .lengths = {{200, 260}}, .h_q = 5, .h_kv = 1, .dtype = bf16},
      {.name = "gqa", .lengths = {{290, 290}}, .h_q = 6, .h_kv = 2},
      {.name = "gqa_interleave",
       .lengths = {{290, 290}},
       .h_q = 6,
       .h_kv = 2,
       .gqa_interleave = true},
      {.name = "batch", .lengths = {{270, 300}, {270, 300}, {270, 300}}, .dtype = bf16},
      {.name = "strided",
       .lengths = {{210, 350}, {210, 350}},
       .h_q = 4,
       .h_kv = 2,
       .dtype = f16,
       .layout = kStrided},
      {.name = "odd",
       .lengths = {{210, 350}, {210, 350}},
       .h_q = 4,
       .h_kv = 2,
       .dtype = bf16,
       .layout = kOdd},
      {.name = "packed",
       .lengths = {{1, 1}, {300, 300}, {70, 333}, {128, 128}},
       .h_q = 4,
       .h_kv = 2,
       .dtype = bf16,
       .layout = kPacked},
      {.name = "paged", .lengths = {{300, 300}, {33, 500}, {150, 193}}, .layout = kPaged},
      {.name = "paged_bf16",
       .lengths = {{200, 400}},
       .h_q = 4,
       .h_kv = 2,
       .d_qk = 128,
       .d_v = 128,
       .dtype = bf16,
       .block_size = 128,
       .layout = kPaged},
      {.name = "mla_192_128",
       .lengths = {{260, 260}},
       .d_qk = 192,
       .d_v = 128,
       .dtype = bf16,
       .block_size = 128},
      {.name = "mla_block_64",
       .lengths = {{100, 230}},
       .d_qk = 192,
       .d_v = 128,
       .dtype = f16,
       .block_size = 64},
      {.name = "d256_block_128",
       .lengths = {{200, 300}},
       .d_qk = 256,
       .d_v = 256,
       .dtype = bf16,
       .block_size = 128},
      {.name = "gqa_block_128",
       .lengths = {{330, 460}},
       .h_q = 6,
       .h_kv = 2,
       .d_qk = 128,
       .d_v = 128,
       .dtype = f16,
       .block_size = 128,
       .gqa_interleave = true},
      {.name = "paged_block_64",
       .lengths = {{100, 100}, {33, 250}},
       .h_q = 2,
       .h_kv = 1,
       .d_qk = 80,
       .d_v = 64,
       .dtype = f16,
       .block_size = 64,
       .layout = kPaged},
      {.name = "d_v_larger", .lengths = {{150, 150}}, .d_qk = 40, .d_v = 104},
      {.name = "structured",
       .lengths = {{640, 640}},
       .h_q = 2,
       .h_kv = 1,
       .d_qk = 128,
       .d_v = 128,
       .block_size = 128,
       .fill = Fill::kStructured},
      {.name = "structured_bf16",
       .lengths = {{500, 500}},
       .h_q = 3,
       .h_kv = 3,
       .dtype = bf16,
       .fill = Fill::kStructured},
      {.name = "huge_logits", .lengths = {{300, 300}}, .fill = Fill::kHuge},
      {.name = "huge_logits_bf16", .lengths = {{300, 300}}, .dtype = bf16, .fill = Fill::kHuge},
      {.name = "all_equal", .lengths = {{400, 400}}, .fill = Fill::kEqual},
      {.name = "zero_mass", .lengths = {{400, 400}}, .fill = Fill::kZeroMass},
  };
  for (const int32_t d : {16, 24, 72, 80, 96, 256}) {
    for (const DType dtype : {f32, f16, bf16}) {
      cases.push_back({.name = "d" + std::to_string(d) + "_" + dtype_name(dtype),
                       .lengths = {{140, 170}},
                       .d_qk = d,
                       .d_v = d,
                       .dtype = dtype,
                       .block_size = 64});
    }
  }
  for (uint32_t i = 0; i < cases.size(); ++i) cases[i].seed = i + 1;
  return cases;
}

CaseData::CaseData(const Case& case_) : CaseData(case_, case_.dtype) {}

CaseData::CaseData(const Case& case_, DType dtype) : c(case_), lengths(case_.lengths) {
  c.dtype = dtype;
  lay_out();
  fill();
  poison();
}

void CaseData::lay_out() {
  const DType dtype = c.dtype;
  const size_t size = element_size(dtype);
  const auto b = static_cast<int64_t>(lengths.size());
  int64_t t_q = 0, t_kv = 0, pages = 1;
  cu_q_ = cu_kv_ = {0};
  for (const SequenceLengths& l : lengths) {
    cu_q_.push_back(static_cast<int32_t>(t_q += l.s_q));
    cu_kv_.push_back(static_cast<int32_t>(t_kv += l.s_kv));
    seqlens_kv_.push_back(static_cast<int32_t>(l.s_kv));
    pages += ceil_div(l.s_kv, kPageSize);
  }
  const auto make = [&](std::vector<std::byte>& memory, std::vector<int64_t> shape) {
    int64_t n = 1;
    for (const int64_t extent : shape) n *= extent;
    memory.resize(n * size);
    return contiguous_view(memory.data(), dtype, shape);
  };
  input = {};
  input.block_size = c.block_size;
  input.gqa_interleave = c.gqa_interleave;
  const int64_t s_q = lengths[0].s_q, s_kv = lengths[0].s_kv;
  if (c.layout == Layout::kBatch) {
    input.q = make(q_memory_, {b, s_q, c.h_q, c.d_qk});
    input.k = make(kv_memory_, {b, s_kv, c.h_kv, c.d_qk});
    input.v = make(v_memory_, {b, s_kv, c.h_kv, c.d_v});
    out = make(out_memory_, {b, s_q, c.h_q, c.d_v});
  } else if (c.layout == Layout::kStrided) {
    // q is head-major, K and V lie side by side in one row, out has gaps between rows.
    input.q = make(q_memory_, {b, c.h_q, s_q, c.d_qk});
    std::swap(input.q.shape[1], input.q.shape[2]);
    std::swap(input.q.strides[1], input.q.strides[2]);
    const TensorView kv = make(kv_memory_, {b, s_kv, c.h_kv, c.d_qk + c.d_v});
    input.k = input.v = kv;
    input.k.shape[3] = c.d_qk;
    input.v.shape[3] = c.d_v;
    input.v.data = static_cast<std::byte*>(kv.data) + c.d_qk * size;
    out = make(out_memory_, {b, s_q, c.h_q, c.d_v + 8});
    out.shape[3] = c.d_v;
  } else if (c.layout == Layout::kOdd) {
    const auto odd = [&](std::vector<std::byte>& memory, int64_t s, int64_t h, int64_t d) {
      TensorView view = make(memory, {b, s, h, d + 1});
      view.shape[3] = d;
      view.data = static_cast<std::byte*>(view.data) + size;
      return view;
    };
    input.q = odd(q_memory_, s_q, c.h_q, c.d_qk);
    input.k = odd(kv_memory_, s_kv, c.h_kv, c.d_qk);
    input.v = odd(v_memory_, s_kv, c.h_kv, c.d_v);
    out = odd(out_memory_, s_q, c.h_q, c.d_v);
  } else {
    input.q = make(q_memory_, {t_q, c.h_q, c.d_qk});
    out = make(out_memory_, {t_q, c.h_q, c.d_v});
    input.cu_seqlens_q = cu_q_;
    if (c.layout == Layout::kPacked) {
      input.k = make(kv_memory_, {t_kv, c.h_kv, c.d_qk});
      input.v = make(v_memory_, {t_kv, c.h_kv, c.d_v});
      input.cu_seqlens_kv = cu_kv_;
    } else {
      input.k = make(kv_memory_, {pages, kPageSize, c.h_kv, c.d_qk});
      input.v = make(v_memory_, {pages, kPageSize, c.h_kv, c.d_v});
      int64_t max_pages = 0;
      for (const SequenceLengths& l : lengths) {
        max_pages = std::max(max_pages, ceil_div(l.s_kv, kPageSize));
      }
      page_table_.assign(b * max_pages, -1);
      int32_t page = static_cast<int32_t>(pages);
      for (int64_t s = 0; s < b; ++s) {  // backwards: no page where one would expect it
        for (int64_t p = 0; p < ceil_div(lengths[s].s_kv, kPageSize); ++p) {
          page_table_[s * max_pages + p] = --page;
        }
      }
      input.page_table = page_table_.data();
      input.page_table_stride = input.max_pages = max_pages;
      input.seqlens_kv = seqlens_kv_;
    }
  }
  lse_memory_.resize(t_q * c.h_q);
  const bool packed = out.rank == 3;
  lse = packed ? contiguous_view(lse_memory_.data(), DType::kFloat32,
                                 std::array<int64_t, 2>{c.h_q, t_q})
               : contiguous_view(lse_memory_.data(), DType::kFloat32,
                                 std::array<int64_t, 3>{b, c.h_q, s_q});
}

void CaseData::fill() {
  std::mt19937 random(c.seed);
  std::normal_distribution<float> normal;
  const auto b = static_cast<int64_t>(lengths.size());
  // Rows that no sequence owns (unused pages, gaps) hold NaN, so that reading them shows.
  for (auto* memory : {&q_memory_, &kv_memory_, &v_memory_}) {
    const size_t size = element_size(c.dtype);
    for (size_t e = 0; e + size <= memory->size(); e += size) {
      store_float(memory->data() + e, c.dtype, std::numeric_limits<float>::quiet_NaN());
    }
  }
  const float gain = c.fill == Fill::kHuge ? 12.0f : c.fill == Fill::kZeroMass ? 8.0f : 1.0f;
  const auto value = [&](int64_t position, int32_t h, int32_t col, bool query) {
    const float noise = normal(random);
    if (c.fill == Fill::kEqual) return col % 2 ? 0.5f : -0.25f;
    if (c.fill == Fill::kRising) {
      if (col != 0) return 0.0f;
      return query ? 64.0f : position < 4096 ? 0.5f * static_cast<float>(position / 64) : 0.0f;
    }
    if (c.fill != Fill::kStructured) return noise * gain;
    const bool heavy = position < 4 || position % 301 == 7;
    const float angle = static_cast<float>(position) / (10.0f + 40.0f * static_cast<float>(h % 3));
    if (col == 0) return query ? 4.0f : heavy ? 6.0f : 0.0f;
    if (col < 3) return 3.0f * (col == 1 ? std::cos(angle) : std::sin(angle));
    return 0.6f * noise;
  };
  for (int64_t s = 0; s < b; ++s) {
    for (int64_t i = 0; i < lengths[s].s_q; ++i) {
      const int64_t position = lengths[s].s_kv - lengths[s].s_q + i;
      for (int32_t h = 0; h < c.h_q; ++h) {
        for (int32_t col = 0; col < c.d_qk; ++col) {
          set_q(s, i, h, col, value(position, h, col, true));
        }
      }
    }
    for (int64_t j = 0; j < lengths[s].s_kv; ++j) {
      for (int32_t h = 0; h < c.h_kv; ++h) {
        for (int32_t col = 0; col < c.d_qk; ++col) set_k(s, j, h, col, value(j, h, col, false));
        for (int32_t col = 0; col < c.d_v; ++col) set_v(s, j, h, col, normal(random));
      }
    }
  }
}

CaseData CaseData::as_float32() const {
  CaseData copy(c, DType::kFloat32);
  for (int64_t s = 0; s < static_cast<int64_t>(lengths.size()); ++s) {
    for (int64_t i = 0; i < lengths[s].s_q; ++i) {
      for (int32_t h = 0; h < c.h_q; ++h) {
        for (int32_t col = 0; col < c.d_qk; ++col) copy.set_q(s, i, h, col, q(s, i, h, col));
      }
    }
    for (int64_t j = 0; j < lengths[s].s_kv; ++j) {
      for (int32_t h = 0; h < c.h_kv; ++h) {
        for (int32_t col = 0; col < c.d_qk; ++col) copy.set_k(s, j, h, col, k(s, j, h, col));
        for (int32_t col = 0; col < c.d_v; ++col) copy.set_v(s, j, h, col, v(s, j, h, col));
      }
    }
  }
  copy.input.softmax_scale = input.softmax_scale;
  return copy;
}

void CaseData::poison() {
  const size_t size = element_size(c.dtype);
  for (size_t e = 0; e + size <= out_memory_.size(); e += size) {
    store_float(out_memory_.data() + e, c.dtype, std::numeric_limits<float>::quiet_NaN());
  }
  std::fill(lse_memory_.begin(), lse_memory_.end(), std::numeric_limits<float>::quiet_NaN());
}

std::byte* CaseData::row(const TensorView& view, int64_t s, int64_t i, int32_t h) const {
  const auto size = static_cast<int64_t>(element_size(view.dtype));
  auto* base = static_cast<std::byte*>(view.data);
  const bool keys = view.data == input.k.data || view.data == input.v.data;
  if (keys && c.layout == Layout::kPaged) {
    const int64_t page = page_table_[s * input.page_table_stride + i / kPageSize];
    return base +
           (page * view.strides[0] + i % kPageSize * view.strides[1] + h * view.strides[2]) * size;
  }
  if (view.rank == 3) {
    const int64_t start = keys ? cu_kv_[s] : cu_q_[s];
    return base + ((start + i) * view.strides[0] + h * view.strides[1]) * size;
  }
  return base + (s * view.strides[0] + i * view.strides[1] + h * view.strides[2]) * size;
}

float CaseData::q(int64_t s, int64_t i, int32_t h, int32_t col) const {
  return load_float(row(input.q, s, i, h) + col * element_size(c.dtype), c.dtype);
}
float CaseData::k(int64_t s, int64_t j, int32_t h, int32_t col) const {
  return load_float(row(input.k, s, j, h) + col * element_size(c.dtype), c.dtype);
}
float CaseData::v(int64_t s, int64_t j, int32_t h, int32_t col) const {
  return load_float(row(input.v, s, j, h) + col * element_size(c.dtype), c.dtype);
}
std::vector<double> CaseData::numbers(const TensorView& view, int64_t s, int64_t i,
                                      int32_t h) const {
  const std::byte* elements = row(view, s, i, h);
  const size_t size = element_size(c.dtype);
  std::vector<double> values(view.shape[view.rank - 1]);
  for (size_t col = 0; col < values.size(); ++col) {
    values[col] = static_cast<double>(load_float(elements + col * size, c.dtype));
  }
  return values;
}
std::vector<double> CaseData::q_row(int64_t s, int64_t i, int32_t h) const {
  return numbers(input.q, s, i, h);
}
std::vector<double> CaseData::k_row(int64_t s, int64_t j, int32_t h) const {
  return numbers(input.k, s, j, h);
}
std::vector<double> CaseData::v_row(int64_t s, int64_t j, int32_t h) const {
  return numbers(input.v, s, j, h);
}
void CaseData::set_q(int64_t s, int64_t i, int32_t h, int32_t col, float value) {
  store_float(row(input.q, s, i, h) + col * element_size(c.dtype), c.dtype, value);
}
void CaseData::set_k(int64_t s, int64_t j, int32_t h, int32_t col, float value) {
  store_float(row(input.k, s, j, h) + col * element_size(c.dtype), c.dtype, value);
}
void CaseData::set_v(int64_t s, int64_t j, int32_t h, int32_t col, float value) {
  store_float(row(input.v, s, j, h) + col * element_size(c.dtype), c.dtype, value);
}
float CaseData::out_at(int64_t s, int64_t i, int32_t h, int32_t col) const {
  return load_float(row(out, s, i, h) + col * element_size(c.dtype), c.dtype);
}
float CaseData::lse_at(int64_t s, int32_t h, int64_t i) const {
  const auto* base = static_cast<const float*>(lse.data);
  if (lse.rank == 2) return base[h * lse.strides[0] + cu_q_[s] + i];
  return base[s * lse.strides[0] + h * lse.strides[1] + i];
}

BlockIndex random_index(const CaseData& data, double probability, uint32_t seed, bool empty_rows) {
  std::mt19937 random(seed);
  std::uniform_real_distribution<double> uniform;
  BlockIndex index;
  index.block_size = data.c.block_size;
  index.h_q = data.c.h_q;
  index.sequences = data.lengths;
  for (const SequenceLengths& lengths : data.lengths) {
    const BlockGrid grid = block_grid(lengths, data.c.block_size);
    for (int32_t h = 0; h < data.c.h_q; ++h) {
      for (int64_t i = 0; i < grid.n_q; ++i) {
        const bool empty = empty_rows && uniform(random) < 0.25;
        for (int64_t j = 0; !empty && j <= grid.first_q_block + i; ++j) {
          const bool diagonal = !empty_rows && j == grid.first_q_block + i;
          if (uniform(random) < probability || diagonal) {
            index.indices.push_back(static_cast<int32_t>(j));
          }
        }
        index.indptr.push_back(static_cast<int64_t>(index.indices.size()));
      }
    }
  }
  return index;
}

}  // namespace flexprefill::testing
