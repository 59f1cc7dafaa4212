// A call of select with its audit, and what tests ask of it.
#ifndef FLEXPREFILL_TESTS_SELECTION_H_
#define FLEXPREFILL_TESTS_SELECTION_H_

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "case_table.h"
#include "select_oracle.h"
#include "staged_call.h"

namespace flexprefill::testing {

struct Selection {
  BlockIndex index;
  std::vector<HeadAudit> audit;

  const HeadAudit& head(int64_t s, int32_t h) const { return audit[s * index.h_q + h]; }
  int64_t row_number(int64_t s, int32_t h, int64_t r) const {
    int64_t row = 0;
    for (int64_t t = 0; t < s; ++t) {
      row += index.h_q * block_grid(index.sequences[t], index.block_size).n_q;
    }
    return row + h * block_grid(index.sequences[s], index.block_size).n_q + r;
  }
  bool keeps(int64_t s, int32_t h, int64_t r, int64_t j) const {
    const int64_t row = row_number(s, h, r);
    return std::binary_search(index.indices.begin() + index.indptr[row],
                              index.indices.begin() + index.indptr[row + 1],
                              static_cast<int32_t>(j));
  }
  int64_t kept(int64_t s, int32_t h) const {
    const int64_t rows = block_grid(index.sequences[s], index.block_size).n_q;
    return index.indptr[row_number(s, h, 0) + rows] - index.indptr[row_number(s, h, 0)];
  }
  bool is_dense(int64_t s, int32_t h) const {
    return kept(s, h) == causal_blocks(block_grid(index.sequences[s], index.block_size));
  }
};

inline Selection run(const CaseData& data, const Pattern& pattern, const Execution& execution,
                     bool audited = true) {
  Selection selection;
  if (audited) selection.audit.resize(data.lengths.size() * data.c.h_q);
  StagedCall call(data.input, {}, {}, execution);
  const size_t bytes = select_workspace_size(call.input, pattern, execution);
  select(call.input, pattern, execution, call.workspace(bytes), selection.index, selection.audit);
  call.finish();
  selection.index.check();
  return selection;
}

inline void expect_equal(const Selection& a, const Selection& b) {
  EXPECT_EQ(a.index.indptr, b.index.indptr);
  EXPECT_EQ(a.index.indices, b.index.indices);
  ASSERT_EQ(a.audit.size(), b.audit.size());
  for (size_t h = 0; h < a.audit.size(); ++h) {
    EXPECT_EQ(std::memcmp(&a.audit[h], &b.audit[h], sizeof(HeadAudit)), 0) << "head " << h;
  }
}

// What a head kept, against what it must and may.
inline void check_blocks(const Selection& selection, const Oracle& oracle, int64_t s, int32_t h,
                         const Flags& must, const Flags& may) {
  for (int64_t r = 0; r < oracle.grid.n_q; ++r) {
    for (int64_t j = 0; j < oracle.grid.n_kv; ++j) {
      const bool keeps = selection.keeps(s, h, r, j);
      ASSERT_TRUE(keeps || !must[r][j]) << "left out: row " << r << " block " << j;
      ASSERT_TRUE(!keeps || may[r][j]) << "kept: row " << r << " block " << j;
    }
  }
}

// The same, and the audit against the kept blocks.
inline void check_head(const Selection& selection, const Oracle& oracle, int64_t s, int32_t h,
                       const Flags& must, const Flags& may) {
  ASSERT_NO_FATAL_FAILURE(check_blocks(selection, oracle, s, h, must, may));
  const HeadAudit& audit = selection.head(s, h);
  EXPECT_FLOAT_EQ(audit.density, static_cast<float>(selection.kept(s, h)) /
                                     static_cast<float>(causal_blocks(oracle.grid)));
  const auto kept = [&](int64_t r, int64_t j) { return selection.keeps(s, h, r, j); };
  EXPECT_NEAR(audit.kept_mass, oracle.mass_of_blocks(kept), 1e-5 + oracle.slack);
}

}  // namespace flexprefill::testing

#endif  // FLEXPREFILL_TESTS_SELECTION_H_
