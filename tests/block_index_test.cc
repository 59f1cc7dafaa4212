// BlockIndex: the grid, every check, and the stored form.
#include "flexprefill/block_index.h"

#include <gtest/gtest.h>

#include <cstring>
#include <functional>

namespace flexprefill {
namespace {

BlockIndex small_index() {
  BlockIndex index;
  index.block_size = 64;
  index.h_q = 2;
  index.sequences = {{100, 200}, {64, 64}};
  // Sequence 0: blocks 1, 2, 3 of queries for two heads; sequence 1: block 0.
  index.indptr = {0, 2, 3, 6, 6, 8, 9, 10, 11};
  index.indices = {0, 1, 2, 0, 1, 3, 0, 2, 3, 0, 0};
  return index;
}

TEST(BlockGrid, IsAnchoredAtTokenZero) {
  const BlockGrid grid = block_grid({100, 200}, 64);
  EXPECT_EQ(grid.first_q_block, 1);  // row 0 stands at position 100
  EXPECT_EQ(grid.n_q, 3);
  EXPECT_EQ(grid.n_kv, 4);
  EXPECT_EQ(causal_blocks(grid), 2 + 3 + 4);
}

TEST(BlockIndex, AcceptsAGoodOne) {
  const BlockIndex index = small_index();
  index.check();
  EXPECT_EQ(index.row_count(), 8);
  EXPECT_DOUBLE_EQ(index.density(), 11.0 / (2 * 9 + 2 * 1));
}

TEST(BlockIndex, DenseHasDensityOne) {
  const SequenceLengths lengths[] = {{100, 200}, {64, 64}};
  EXPECT_DOUBLE_EQ(dense_block_index(lengths, 3, 32).density(), 1);
}

TEST(BlockIndex, RefusesBadOnes) {
  const std::vector<std::pair<std::function<void(BlockIndex&)>, const char*>> spoils{
      {[](BlockIndex& x) { x.block_size = 48; }, "expected block_size 32, 64 or 128, got 48"},
      {[](BlockIndex& x) { x.h_q = 0; }, "expected h_q of at least 1"},
      {[](BlockIndex& x) { x.local_window = -1; }, "windows of at least 0"},
      {[](BlockIndex& x) { x.sequences[0].s_q = 201; }, "expected 1 <= s_q <= s_kv"},
      {[](BlockIndex& x) { x.sequences[0].s_kv = int64_t{1} << 40; }, "expected 1 <= s_q <= s_kv"},
      {[](BlockIndex& x) { x.indptr.pop_back(); }, "indptr: expected rows + 1 = 9 entries, got 8"},
      {[](BlockIndex& x) { x.indptr.clear(); }, "indptr: expected rows + 1"},
      {[](BlockIndex& x) { x.indptr[0] = 1; }, "indptr: expected to run from 0"},
      {[](BlockIndex& x) { x.indices.push_back(0); }, "indptr: expected to run from 0"},
      {[](BlockIndex& x) { x.indptr[2] = 100; }, "row 1: expected indptr to ascend"},
      {[](BlockIndex& x) { x.indptr[3] = 1; }, "row 2: expected indptr to ascend"},
      {[](BlockIndex& x) { x.indices[1] = 0; },
       "row 0: expected ascending blocks from 0, got 0 after 0"},
      {[](BlockIndex& x) { x.indices[0] = -3; }, "row 0: expected ascending blocks from 0, got -3"},
      {[](BlockIndex& x) { x.indices[2] = 3; },
       "row 1: expected blocks up to the diagonal 2, got 3"},
  };
  for (const auto& [spoil, expected] : spoils) {
    BlockIndex index = small_index();
    spoil(index);
    try {
      index.check();
      ADD_FAILURE() << "accepted: " << expected;
    } catch (const Error& error) {
      EXPECT_NE(std::string(error.what()).find(expected), std::string::npos) << error.what();
    }
  }
}

TEST(BlockIndex, StoredFormComesBack) {
  BlockIndex index = small_index();
  index.global_window = 5;
  index.local_window = 77;
  const std::string bytes = index.serialize();
  const BlockIndex back = BlockIndex::deserialize(bytes);
  EXPECT_EQ(back.indptr, index.indptr);
  EXPECT_EQ(back.indices, index.indices);
  EXPECT_EQ(back.local_window, 77);
  EXPECT_EQ(back.global_window, 5);
  EXPECT_EQ(back.sequences[0].s_kv, 200);
}

// Every shortened or lengthened form is refused, and no changed byte is read as a bad index.
TEST(BlockIndex, StoredFormIsChecked) {
  const std::string bytes = small_index().serialize();
  for (size_t n = 0; n < bytes.size(); ++n) {
    EXPECT_THROW(BlockIndex::deserialize({bytes.data(), n}), Error) << n;
  }
  EXPECT_THROW(BlockIndex::deserialize(bytes + "x"), Error);
  int accepted = 0;
  for (size_t n = 0; n < bytes.size(); ++n) {
    for (const int flip : {1, 0x80}) {
      std::string changed = bytes;
      changed[n] = static_cast<char>(changed[n] ^ flip);
      try {
        BlockIndex::deserialize(changed).check();
        ++accepted;
      } catch (const Error&) {
      }
    }
  }
  EXPECT_LT(accepted, static_cast<int>(bytes.size()));
}

}  // namespace
}  // namespace flexprefill
