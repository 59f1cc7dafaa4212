// One call of the C API, with memory for all of it, for its tests.
#ifndef FLEXPREFILL_TESTS_C_API_CALL_H_
#define FLEXPREFILL_TESTS_C_API_CALL_H_

#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "flexprefill/c_api.h"

namespace flexprefill::testing {

struct DestroyIndex {
  void operator()(flexprefill_block_index* index) const { flexprefill_block_index_destroy(index); }
};
using IndexPointer = std::unique_ptr<flexprefill_block_index, DestroyIndex>;

inline std::string last_error() { return flexprefill_last_error(); }

// One batch of two sequences, 2 query heads over 1 K/V head, with memory for all of it.
struct Call {
  static constexpr int64_t kB = 2, kSq = 200, kSkv = 260, kHq = 2, kHkv = 1, kD = 16;
  std::vector<float> q = values(kB * kSq * kHq * kD), k = values(kB * kSkv * kHkv * kD);
  std::vector<float> v = values(kB * kSkv * kHkv * kD);
  std::vector<float> out = std::vector<float>(q.size(), 7.0f);
  flexprefill_input input = flexprefill_input_default();
  flexprefill_pattern pattern = flexprefill_pattern_default(FLEXPREFILL_PATTERN_VERTICAL_SLASH);
  flexprefill_execution execution = flexprefill_execution_default();
  flexprefill_tensor out_tensor{};
  std::vector<std::byte> workspace = std::vector<std::byte>(8 << 20);

  Call() {
    input.q = tensor(q, {kB, kSq, kHq, kD});
    input.k = tensor(k, {kB, kSkv, kHkv, kD});
    input.v = tensor(v, {kB, kSkv, kHkv, kD});
    input.block_size = 32;
    out_tensor = tensor(out, {kB, kSq, kHq, kD});
    pattern.vertical_size = pattern.slash_size = 64;
  }

  static std::vector<float> values(int64_t n) {
    std::vector<float> values(static_cast<size_t>(n));
    for (size_t i = 0; i < values.size(); ++i) values[i] = std::sin(0.37f * static_cast<float>(i));
    return values;
  }
  static flexprefill_tensor tensor(std::vector<float>& data, std::array<int64_t, 4> shape) {
    return flexprefill_tensor_contiguous(data.data(), FLEXPREFILL_FLOAT32, 4, shape.data());
  }
  flexprefill_status prefill() {
    return flexprefill_prefill(&input, &pattern, &execution, workspace.data(), workspace.size(),
                               &out_tensor, nullptr, nullptr, 0);
  }
  // The call must be refused with this status, a message with this word and `out` as it was.
  void expect_refused(flexprefill_status status, const std::string& word) {
    EXPECT_EQ(prefill(), status) << last_error();
    EXPECT_NE(last_error().find(word), std::string::npos) << last_error();
    EXPECT_EQ(out, std::vector<float>(out.size(), 7.0f));
  }
  IndexPointer select() {
    flexprefill_block_index* index = nullptr;
    EXPECT_EQ(flexprefill_block_index_create(&index), FLEXPREFILL_OK);
    EXPECT_EQ(flexprefill_select(&input, &pattern, &execution, workspace.data(), workspace.size(),
                                 index, nullptr, 0),
              FLEXPREFILL_OK)
        << last_error();
    return IndexPointer(index);
  }
};

}  // namespace flexprefill::testing

#endif  // FLEXPREFILL_TESTS_C_API_CALL_H_
