// One table of cases for the tests of every backend and stage, and the data of a case.
#ifndef FLEXPREFILL_TESTS_CASE_TABLE_H_
#define FLEXPREFILL_TESTS_CASE_TABLE_H_

#include <cstdint>
#include <string>
#include <vector>

#include "flexprefill/flexprefill.h"

namespace flexprefill::testing {

// kStrided: heads and sequences in other orders, K and V side by side; kOdd: rows that start at any
// element, so that none is aligned to more than one.
enum class Layout { kBatch, kPacked, kPaged, kStrided, kOdd };

// What the numbers look like.
enum class Fill {
  kRandom,      // normal(0, 1)
  kStructured,  // a sink, local decay, heavy columns
  kHuge,        // logits of several hundred
  kEqual,       // all queries and all keys the same: flat scores
  kZeroMass,    // logits so far apart that probabilities underflow to exact zeros
  kRising,      // up to key 4096 each 64 keys several powers of e above those before, 0 from there
};

struct Case {
  std::string name;
  std::vector<SequenceLengths>
      lengths;  // one length but for kPacked and kPaged: all sequences alike
  int32_t h_q = 2, h_kv = 1, d_qk = 64, d_v = 64;
  DType dtype = DType::kFloat32;
  int32_t block_size = 64;
  bool gqa_interleave = false;
  Layout layout = Layout::kBatch;
  Fill fill = Fill::kRandom;
  uint32_t seed = 1;
};

std::vector<Case> all_cases();

// Owns the memory of a case. `input` may be changed by a test; the buffers keep their size.
class CaseData {
 public:
  explicit CaseData(const Case& c);
  // The same numbers as fp32, so that a result is not rounded to the element type.
  CaseData as_float32() const;

  Case c;
  AttentionInput input;
  TensorView out;  // poisoned with NaN
  TensorView lse;
  std::vector<SequenceLengths> lengths;

  // Element of q, k, v or out by (sequence, row, head, column).
  float q(int64_t s, int64_t i, int32_t h, int32_t col) const;
  float k(int64_t s, int64_t j, int32_t h, int32_t col) const;
  float v(int64_t s, int64_t j, int32_t h, int32_t col) const;
  // A whole row: plain loops over single elements would spend their time in finding them.
  std::vector<double> q_row(int64_t s, int64_t i, int32_t h) const;
  std::vector<double> k_row(int64_t s, int64_t j, int32_t h) const;
  std::vector<double> v_row(int64_t s, int64_t j, int32_t h) const;
  void set_q(int64_t s, int64_t i, int32_t h, int32_t col, float value);
  void set_k(int64_t s, int64_t j, int32_t h, int32_t col, float value);
  void set_v(int64_t s, int64_t j, int32_t h, int32_t col, float value);
  float out_at(int64_t s, int64_t i, int32_t h, int32_t col) const;
  float lse_at(int64_t s, int32_t h, int64_t i) const;
  void poison();

 private:
  CaseData(const Case& c, DType dtype);
  std::byte* row(const TensorView& view, int64_t s, int64_t i, int32_t h) const;
  std::vector<double> numbers(const TensorView& view, int64_t s, int64_t i, int32_t h) const;
  void lay_out();
  void fill();

  std::vector<std::byte> q_memory_, kv_memory_, v_memory_, out_memory_;
  std::vector<float> lse_memory_;
  std::vector<int32_t> cu_q_, cu_kv_, page_table_, seqlens_kv_;
};

// Loops of oracles over rows that a test made itself: most of the time of many tests, and ten times
// as much with a sanitizer, which has nothing to find there.
#define FLEXPREFILL_TEST_LOOP __attribute__((no_sanitize("address"), no_sanitize("thread")))

template <typename Number>
FLEXPREFILL_TEST_LOOP Number dot(const Number* a, const Number* b, int64_t n) {
  Number sum = 0;
  for (int64_t c = 0; c < n; ++c) sum += a[c] * b[c];
  return sum;
}
// The same of the products' sizes.
FLEXPREFILL_TEST_LOOP inline double dot_of_sizes(const double* a, const double* b, int64_t n) {
  double sum = 0;
  for (int64_t c = 0; c < n; ++c) sum += a[c] * b[c] < 0 ? -a[c] * b[c] : a[c] * b[c];
  return sum;
}
template <typename Number>
FLEXPREFILL_TEST_LOOP void add_scaled(Number* to, Number factor, const Number* row, int64_t n) {
  for (int64_t c = 0; c < n; ++c) to[c] += factor * row[c];
}

// Every causal block with this probability, the diagonal always; with `empty_rows` some rows none.
BlockIndex random_index(const CaseData& data, double probability, uint32_t seed,
                        bool empty_rows = false);

}  // namespace flexprefill::testing

#endif  // FLEXPREFILL_TESTS_CASE_TABLE_H_
