// BlockIndex: the grid, the checks, conversion and storage.
#include "flexprefill/block_index.h"

#include <bit>
#include <cstring>
#include <string>

#include "index/block_row.h"
#include "math.h"

namespace flexprefill {
namespace {

[[noreturn]] void refuse(const std::string& message) {
  throw Error(ErrorCode::kInvalidArgument, "index: " + message);
}

bool block_size_offered(int32_t block_size) {
  return block_size == 32 || block_size == 64 || block_size == 128;
}

// Version 2 has flags after the sizes; an index without flags is stored as version 1.
constexpr char kMagic[7] = {'F', 'P', 'I', 'N', 'D', 'E', 'X'};
constexpr int32_t kMeanCorrectionFlag = 1;
constexpr int64_t kMostTokens = (int64_t{1} << 31) - 1;

template <typename T>
void put(std::string& bytes, const T* values, size_t n) {
  static_assert(std::endian::native == std::endian::little);
  bytes.append(reinterpret_cast<const char*>(values), n * sizeof(T));
}

// Reads little-endian values and refuses to read past the end.
class Reader {
 public:
  explicit Reader(std::span<const char> bytes) : left_(bytes) {}
  template <typename T>
  void get(T* values, int64_t n) {
    expect<T>(n);
    std::memcpy(values, left_.data(), n * sizeof(T));
    left_ = left_.subspan(n * sizeof(T));
  }
  template <typename T>
  std::vector<T> get_vector(int64_t n) {
    expect<T>(n);  // before anything of that size is allocated
    std::vector<T> values(static_cast<size_t>(n));
    if (n > 0) get(values.data(), n);
    return values;
  }
  size_t left() const { return left_.size(); }

 private:
  template <typename T>
  void expect(int64_t n) const {
    if (n < 0 || static_cast<uint64_t>(n) > left_.size() / sizeof(T)) {
      refuse("stored form ends early: expected " + std::to_string(n) + " more values of " +
             std::to_string(sizeof(T)) + " bytes, got " + std::to_string(left_.size()) + " bytes");
    }
  }

  std::span<const char> left_;
};

// Checks all but the arrays; returns the number of rows.
int64_t check_sizes(const BlockIndex& index) {
  if (!block_size_offered(index.block_size)) {
    refuse("expected block_size 32, 64 or 128, got " + std::to_string(index.block_size));
  }
  if (index.h_q < 1) refuse("expected h_q of at least 1, got " + std::to_string(index.h_q));
  if (index.global_window < 0 || index.local_window < 0) {
    refuse("expected windows of at least 0 tokens");
  }
  if (index.mean_correction && (index.global_window > 0 || index.local_window > 0)) {
    refuse("expected mean_correction or windows, got both");
  }
  int64_t rows = 0;
  for (const SequenceLengths& lengths : index.sequences) {
    if (lengths.s_q < 1 || lengths.s_q > lengths.s_kv || lengths.s_kv > kMostTokens) {
      refuse("expected 1 <= s_q <= s_kv < 2^31, got s_q = " + std::to_string(lengths.s_q) +
             ", s_kv = " + std::to_string(lengths.s_kv));
    }
    if (__builtin_add_overflow(rows, index.h_q * block_grid(lengths, index.block_size).n_q,
                               &rows)) {
      refuse("expected fewer than 2^63 rows");
    }
  }
  return rows;
}

}  // namespace

BlockGrid block_grid(SequenceLengths lengths, int32_t block_size) {
  BlockGrid grid;
  grid.first_q_block = (lengths.s_kv - lengths.s_q) / block_size;
  grid.n_kv = ceil_div(lengths.s_kv, block_size);
  grid.n_q = grid.n_kv - grid.first_q_block;
  return grid;
}

int64_t causal_blocks(const BlockGrid& grid) {
  return grid.n_q * (grid.first_q_block + 1) + grid.n_q * (grid.n_q - 1) / 2;
}

int64_t BlockIndex::row_count() const {
  int64_t rows = 0;
  for (const SequenceLengths& lengths : sequences)
    rows += h_q * block_grid(lengths, block_size).n_q;
  return rows;
}

void BlockIndex::check() const {
  const int64_t rows = check_sizes(*this);
  if (static_cast<uint64_t>(rows) + 1 != indptr.size()) {
    refuse("indptr: expected rows + 1 = " + std::to_string(rows + 1) + " entries, got " +
           std::to_string(indptr.size()));
  }
  if (indptr[0] != 0 || indptr.back() != static_cast<int64_t>(indices.size())) {
    refuse("indptr: expected to run from 0 to the number of indices " +
           std::to_string(indices.size()) + ", got " + std::to_string(indptr[0]) + " to " +
           std::to_string(indptr.back()));
  }
  int64_t r = 0;
  for (const SequenceLengths& lengths : sequences) {
    const BlockGrid grid = block_grid(lengths, block_size);
    for (int32_t head = 0; head < h_q; ++head) {
      for (int64_t i = 0; i < grid.n_q; ++i, ++r) {
        const auto row = [r] { return "row " + std::to_string(r) + ": "; };
        if (indptr[r + 1] < indptr[r] || indptr[r + 1] > static_cast<int64_t>(indices.size())) {
          refuse(row() + "expected indptr to ascend up to the number of indices, got " +
                 std::to_string(indptr[r + 1]) + " after " + std::to_string(indptr[r]));
        }
        const int64_t last = grid.first_q_block + i;
        int64_t before = -1;
        for (int64_t e = indptr[r]; e < indptr[r + 1]; ++e) {
          if (indices[e] <= before) {
            refuse(row() + "expected ascending blocks from 0, got " + std::to_string(indices[e]) +
                   (before < 0 ? "" : " after " + std::to_string(before)));
          }
          if (indices[e] > last) {
            refuse(row() + "expected blocks up to the diagonal " + std::to_string(last) + ", got " +
                   std::to_string(indices[e]));
          }
          before = indices[e];
        }
      }
    }
  }
}

double BlockIndex::density() const {
  int64_t causal = 0;
  for (const SequenceLengths& lengths : sequences) {
    causal += h_q * causal_blocks(block_grid(lengths, block_size));
  }
  return causal == 0 ? 1 : static_cast<double>(indices.size()) / static_cast<double>(causal);
}

std::string BlockIndex::serialize() const {
  check();
  std::string bytes(kMagic, sizeof(kMagic));
  bytes += mean_correction ? '2' : '1';
  const int32_t sizes[2] = {block_size, h_q};
  put(bytes, sizes, 2);
  if (mean_correction) put(bytes, &kMeanCorrectionFlag, 1);
  const int64_t counts[4] = {global_window, local_window, static_cast<int64_t>(sequences.size()),
                             static_cast<int64_t>(indices.size())};
  put(bytes, counts, 4);
  for (const SequenceLengths& lengths : sequences) {
    const int64_t pair[2] = {lengths.s_q, lengths.s_kv};
    put(bytes, pair, 2);
  }
  put(bytes, indptr.data(), indptr.size());
  put(bytes, indices.data(), indices.size());
  return bytes;
}

BlockIndex BlockIndex::deserialize(std::span<const char> bytes) {
  Reader reader(bytes);
  char magic[sizeof(kMagic) + 1];
  reader.get(magic, sizeof(magic));
  const char stored_version = magic[sizeof(kMagic)];
  if (std::memcmp(magic, kMagic, sizeof(kMagic)) != 0 ||
      (stored_version != '1' && stored_version != '2')) {
    refuse("stored form: expected to begin with FPINDEX1 or FPINDEX2");
  }
  BlockIndex index;
  int32_t sizes[2];
  int64_t counts[4];
  reader.get(sizes, 2);
  if (stored_version == '2') {
    int32_t flags;
    reader.get(&flags, 1);
    if (flags != kMeanCorrectionFlag) {
      refuse("stored form: expected flags 1, got " + std::to_string(flags));
    }
    index.mean_correction = true;
  }
  reader.get(counts, 4);
  index.block_size = sizes[0];
  index.h_q = sizes[1];
  index.global_window = counts[0];
  index.local_window = counts[1];
  const auto pairs = reader.get_vector<SequenceLengths>(counts[2]);
  index.sequences.assign(pairs.begin(), pairs.end());
  const int64_t rows = check_sizes(index);
  index.indptr = reader.get_vector<int64_t>(rows + 1);
  index.indices = reader.get_vector<int32_t>(counts[3]);
  if (reader.left() != 0) {
    refuse("stored form: expected to end, got " + std::to_string(reader.left()) + " more bytes");
  }
  index.check();
  return index;
}

BlockIndex dense_block_index(std::span<const SequenceLengths> sequences, int32_t h_q,
                             int32_t block_size) {
  BlockIndex index;
  index.block_size = block_size;
  index.h_q = h_q;
  index.sequences.assign(sequences.begin(), sequences.end());
  check_sizes(index);
  for (const SequenceLengths& lengths : sequences) {
    const BlockGrid grid = block_grid(lengths, block_size);
    for (int32_t head = 0; head < h_q; ++head) {
      for (int64_t i = 0; i < grid.n_q; ++i) {
        for (int32_t j = 0; j <= grid.first_q_block + i; ++j) index.indices.push_back(j);
        index.indptr.push_back(static_cast<int64_t>(index.indices.size()));
      }
    }
  }
  index.check();
  return index;
}

BlockIndex to_block_index(const Problem& problem, const BlockBits& bits, TokenWindow window,
                          bool mean_correction) {
  BlockIndex index;
  index.mean_correction = mean_correction;
  index.block_size = problem.block_size;
  index.h_q = problem.h_q;
  index.global_window = window.global_window;
  index.local_window = window.local_window;
  index.sequences = problem.lengths;
  int64_t kept = 0;
  for (int64_t w = 0; w < bits.word_count(); ++w) kept += std::popcount(bits.words[w]);
  index.indices.resize(kept);
  index.indptr.resize(problem.first_row.back() + 1);
  const BlockRows rows{.csr = nullptr, .bits = &bits, .window = window};
  int64_t r = 0;
  for (int64_t s = 0; s < problem.b(); ++s) {
    for (int32_t head = 0; head < problem.h_q; ++head) {
      for (int64_t i = 0; i < problem.grids[s].n_q; ++i, ++r) {
        int32_t* row = index.indices.data() + index.indptr[r];
        index.indptr[r + 1] = index.indptr[r] + rows.decode(problem, s, head, i, row);
      }
    }
  }
  return index;
}

}  // namespace flexprefill
