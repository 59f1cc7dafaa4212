#include "cuda_emulator/races.h"

#include <algorithm>
#include <utility>

namespace cuda_emulator {

void Races::DenseWords::start_block(size_t words) {
  ++block_;
  words_.resize(std::max(words_.size(), words));
  blocks_.resize(words_.size(), 0);
}

Races::Word& Races::DenseWords::operator[](size_t number) {
  if (std::exchange(blocks_[number], block_) != block_) words_[number] = {};
  return words_[number];
}

void Races::SparseWords::start_block() {
  ++block_;
  taken_ = 0;
}

// The word's slot, or the one that it would take.
size_t Races::SparseWords::find(size_t number) const {
  const size_t mask = slots_.size() - 1;
  size_t at = number * 0x9e3779b97f4a7c15 >> 20 & mask;
  while (slots_[at].block == block_ && slots_[at].number != number) at = (at + 1) & mask;
  return at;
}

Races::Word& Races::SparseWords::operator[](size_t number) {
  if (2 * taken_ >= slots_.size()) grow();
  const size_t at = find(number);
  if (slots_[at].block != block_) {
    slots_[at] = {number, block_};
    words_[at] = {};
    ++taken_;
  }
  return words_[at];
}

void Races::SparseWords::grow() {
  const size_t size = std::max<size_t>(1024, 2 * slots_.size());
  const std::vector<Slot> slots = std::exchange(slots_, std::vector<Slot>(size));
  const std::vector<Word> words = std::exchange(words_, std::vector<Word>(size));
  for (size_t i = 0; i < slots.size(); ++i) {
    if (slots[i].block != block_) continue;
    const size_t at = find(slots[i].number);
    slots_[at] = slots[i];
    words_[at] = words[i];
  }
}

void Races::join(Clock& to, const Clock& from) {
  if (to.size() < from.size()) to.resize(from.size(), 0);
  for (size_t i = 0; i < from.size(); ++i) to[i] = std::max(to[i], from[i]);
}

void Races::start_block(int threads, size_t shared_bytes) {
  threads_ = threads;
  const int warps = (threads + 31) / 32, all = threads + (threads + 127) / 128;
  const auto clear = [all](std::vector<Clock>& clocks, int n) {
    clocks.resize(n);
    for (Clock& clock : clocks) clock.assign(all, 0);
  };
  clear(warp_clocks_, warps);
  clear(clocks_, all);
  block_clock_.assign(all, 0);
  time_.assign(all, 0);
  std::fill_n(time_.begin(), threads, 1);
  warp_knows_more_.assign(warps, 0);
  knows_more_.assign(threads, 0);
  shared_.start_block((shared_bytes + 3) / 4);
  global_.start_block();
}

bool Races::access(int thread, Memory memory, size_t offset, size_t bytes, Kind kind,
                   uint32_t line) {
  const uint64_t mine = static_cast<uint64_t>(kind) | static_cast<uint64_t>(thread) << 6 |
                        uint64_t{line & 32767} << 17 | uint64_t{time_[thread]} << 32;
  const bool shared = memory == Memory::kShared;
  if (shared ? access_words(shared_, offset, bytes, mine)
             : access_words(global_, offset, bytes, mine)) {
    return true;
  }
  race_ = (shared ? "race on shared memory: " : "race on global memory: ") + race_;
  return false;
}

template <typename Words>
bool Races::access_words(Words& words, size_t offset, size_t bytes, uint64_t mine) {
  for (size_t byte = offset; byte < offset + bytes;) {
    const size_t end = std::min(byte / 4 * 4 + 4, offset + bytes);
    const uint64_t mask = ((1U << (end - byte)) - 1) << byte % 4;
    if (!access_word(words[byte / 4], {mine | mask << 2})) {
      race_ += ", byte " + std::to_string(byte);
      return false;
    }
    byte = end;
  }
  return true;
}

bool Races::access_word(Word& word, Access mine) {
  for (const Access& other : word.accesses) {
    if (other.same_but_for_line(mine)) return true;  // whatever came since was held against it
  }
  const int thread = mine.thread();
  const bool is_thread = thread < threads_;
  const uint32_t* all_know = is_thread ? block_clock_.data() : clocks_[thread].data();
  const uint32_t* warp_knows = is_thread ? warp_clocks_[thread / 32].data() : all_know;
  const uint32_t* it_knows =
      is_thread && knows_more_[thread] != 0 ? clocks_[thread].data() : all_know;
  int kept = 0;
  for (const Access other : word.accesses) {
    if (other.kind() == Kind::kNone) break;
    const int by = other.thread();
    const bool ordered = by == thread || other.time() <= all_know[by] ||
                         other.time() <= warp_knows[by] || other.time() <= it_knows[by];
    const bool alike = other.kind() == mine.kind() && mine.kind() != Kind::kWrite;
    if (!ordered && !alike && (other.bytes() & mine.bytes()) != 0) {
      describe(other, mine.kind());
      return false;
    }
    // What this access stands for from now on: all that comes after it comes after `other`.
    const bool covered = ordered && (other.bytes() & ~mine.bytes()) == 0 &&
                         (mine.kind() == Kind::kWrite || other.kind() == mine.kind());
    if (!covered) word.accesses[kept++] = other;
  }
  if (kept == kRemembered) {
    word.accesses[turn_++ % kRemembered] = mine;  // forgets one
    return true;
  }
  word.accesses[kept++] = mine;
  if (kept < kRemembered) word.accesses[kept] = {};
  return true;
}

void Races::describe(Access earlier, Kind kind) {
  const auto name = [](Kind what) {
    return what == Kind::kRead ? "read" : what == Kind::kWrite ? "write" : "atomic operation";
  };
  const int by = earlier.thread();
  race_ = std::string("a ") + name(kind) + " and a " + name(earlier.kind()) + " by " +
          (by < threads_ ? "thread " + std::to_string(by)
                         : "wgmma of warpgroup " + std::to_string(by - threads_)) +
          " after line " + std::to_string(earlier.line());
}

void Races::release(int thread, Clock& to) {
  join(to, block_clock_);
  if (warp_knows_more_[thread / 32] != 0) join(to, warp_clocks_[thread / 32]);
  if (knows_more_[thread] != 0) join(to, clocks_[thread]);
  to[thread] = time_[thread]++;
}

void Races::acquire(int thread, const Clock& from) {
  if (from.empty()) return;
  join(clocks_[thread], from);
  knows_more_[thread] = 1;
}

void Races::take_own(int thread, Clock& to) {
  if (knows_more_[thread] != 0) join(to, clocks_[thread]);
  knows_more_[thread] = 0;
}

void Races::take_warp(int warp, Clock& to) {
  if (warp_knows_more_[warp] != 0) join(to, warp_clocks_[warp]);
  warp_knows_more_[warp] = 0;
}

void Races::meet_block(std::span<const int> threads) {
  for (const int thread : threads) {
    take_warp(thread / 32, block_clock_);
    take_own(thread, block_clock_);
    block_clock_[thread] = time_[thread]++;
  }
}

void Races::meet_warp(int warp) {
  for (int thread = warp * 32; thread < warp * 32 + 32; ++thread) {
    take_own(thread, warp_clocks_[warp]);
    warp_clocks_[warp][thread] = time_[thread]++;
  }
  warp_knows_more_[warp] = 1;
}

void Races::acquire_products(int warp, int64_t product) {
  uint32_t& known = warp_clocks_[warp][warpgroup(warp * 32)];
  known = std::max(known, static_cast<uint32_t>(product));
  warp_knows_more_[warp] = 1;
}

void Races::start_product(int warpgroup) {
  const int first = (warpgroup - threads_) * 128;
  Clock& clock = clocks_[warpgroup];
  join(clock, block_clock_);
  for (int thread = first; thread < first + 128; ++thread) {
    if (thread % 32 == 0 && warp_knows_more_[thread / 32] != 0) {
      join(clock, warp_clocks_[thread / 32]);
    }
    if (knows_more_[thread] != 0) join(clock, clocks_[thread]);
    clock[thread] = time_[thread];
  }
  ++time_[warpgroup];
}

}  // namespace cuda_emulator
