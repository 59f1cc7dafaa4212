// Fuzz target of the index: stored bytes and a user's arrays must be refused or be an index.
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "flexprefill/c_api.h"
#include "fuzz_util.h"

namespace {

// The rules of a row, told once more, from the view.
void expect_well_formed(const flexprefill_block_index* index) {
  flexprefill_block_index_view view = flexprefill_block_index_view_default();
  FUZZ_EXPECT(flexprefill_block_index_get_view(index, &view) == FLEXPREFILL_OK);
  FUZZ_EXPECT(flexprefill_block_index_check(index) == FLEXPREFILL_OK);
  int64_t row = 0;
  for (int64_t s = 0; s < view.sequence_count; ++s) {
    int64_t first_q_block = 0, n_q = 0, n_kv = 0;
    FUZZ_EXPECT(flexprefill_block_grid(view.sequence_lengths[2 * s],
                                       view.sequence_lengths[2 * s + 1], view.block_size,
                                       &first_q_block, &n_q, &n_kv) == FLEXPREFILL_OK);
    FUZZ_EXPECT(first_q_block + n_q == n_kv);
    for (int64_t i = 0; i < view.h_q * n_q; ++i, ++row) {
      FUZZ_EXPECT(row + 1 < view.indptr_count && view.indptr[row] <= view.indptr[row + 1]);
      FUZZ_EXPECT(view.indptr[row] >= 0 && view.indptr[row + 1] <= view.indices_count);
      for (int64_t e = view.indptr[row]; e < view.indptr[row + 1]; ++e) {
        FUZZ_EXPECT(view.indices[e] >= 0 && view.indices[e] <= first_q_block + i % n_q);
        FUZZ_EXPECT(e == view.indptr[row] || view.indices[e] > view.indices[e - 1]);
      }
    }
  }
  FUZZ_EXPECT(row + 1 == view.indptr_count);
  double density = -1;
  FUZZ_EXPECT(flexprefill_block_index_density(index, &density) == FLEXPREFILL_OK);
  FUZZ_EXPECT(density >= 0 && density <= 1);
}

std::string stored(const flexprefill_block_index* index) {
  size_t size = 0;
  FUZZ_EXPECT(flexprefill_block_index_serialize(index, nullptr, 0, &size) == FLEXPREFILL_OK);
  std::string bytes(size, '\0');
  FUZZ_EXPECT(flexprefill_block_index_serialize(index, bytes.data(), size, &size) ==
              FLEXPREFILL_OK);
  return bytes;
}

// Reads n values of T from the front of the bytes; fewer if they end.
template <typename T>
std::vector<T> take(const uint8_t*& data, size_t& size, size_t n) {
  std::vector<T> values(std::min(n, size / sizeof(T)));
  if (values.empty()) return values;
  std::memcpy(values.data(), data, values.size() * sizeof(T));
  data += values.size() * sizeof(T);
  size -= values.size() * sizeof(T);
  return values;
}

// bytes: counts of sequences and rows, the fields of a view, its three arrays
flexprefill_block_index* from_arrays(const uint8_t* data, size_t size) {
  const std::vector<uint8_t> counts = take<uint8_t>(data, size, 4);
  if (counts.size() < 4) return nullptr;
  const std::vector<int32_t> fields = take<int32_t>(data, size, 2);
  const std::vector<int64_t> windows = take<int64_t>(data, size, 2);
  const std::vector<int64_t> lengths = take<int64_t>(data, size, 2 * (counts[0] % 8u));
  const std::vector<int64_t> indptr = take<int64_t>(data, size, counts[1]);
  const std::vector<int32_t> indices = take<int32_t>(data, size, size / sizeof(int32_t));
  if (fields.size() < 2 || windows.size() < 2) return nullptr;
  flexprefill_block_index_view view = flexprefill_block_index_view_default();
  view.block_size = fields[0];
  view.h_q = fields[1];
  view.global_window = windows[0];
  view.local_window = windows[1];
  view.sequence_lengths = lengths.data();
  view.sequence_count = static_cast<int64_t>(lengths.size() / 2);
  view.indptr = indptr.data();
  view.indptr_count = static_cast<int64_t>(indptr.size());
  view.indices = indices.data();
  view.indices_count = static_cast<int64_t>(indices.size());
  flexprefill_block_index* index = nullptr;
  flexprefill_block_index_from_view(&view, &index);
  return index;
}

template <typename T>
void append(std::string& bytes, std::initializer_list<T> values) {
  bytes.append(reinterpret_cast<const char*>(values.begin()), values.size() * sizeof(T));
}

}  // namespace

extern "C" int LLVMFuzzerInitialize(int* argc, char*** argv) {
  const int64_t lengths[4] = {64, 64, 33, 100};
  flexprefill_block_index* index = nullptr;
  FUZZ_EXPECT(flexprefill_block_index_dense(lengths, 2, 2, 32, &index) == FLEXPREFILL_OK);
  std::string arrays(1, '\1');  // one sequence of two blocks, rows {0}, {0, 1}
  append<uint8_t>(arrays, {1, 3, 0, 0});
  append<int32_t>(arrays, {32, 1});
  append<int64_t>(arrays, {0, 0, 64, 64, 0, 1, 3});
  append<int32_t>(arrays, {0, 0, 1});
  flexprefill::fuzz::write_seeds(*argc, *argv, {std::string(1, '\0') + stored(index), arrays});
  flexprefill_block_index_destroy(index);
  return 0;
}

// The first byte says whether the others are a stored index or arrays.
extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size == 0) return 0;
  flexprefill_block_index* index = nullptr;
  if (data[0] % 2 == 0) {
    const flexprefill_status status =
        flexprefill_block_index_deserialize(data + 1, size - 1, &index);
    FUZZ_EXPECT(status == FLEXPREFILL_OK || status == FLEXPREFILL_INVALID_ARGUMENT);
    FUZZ_EXPECT((status == FLEXPREFILL_OK) == (index != nullptr));
    if (index != nullptr) {  // there is one stored form of an index
      FUZZ_EXPECT(stored(index) == std::string(reinterpret_cast<const char*>(data + 1), size - 1));
    }
  } else {
    index = from_arrays(data + 1, size - 1);
  }
  if (index != nullptr) expect_well_formed(index);
  flexprefill_block_index_destroy(index);
  return 0;
}
