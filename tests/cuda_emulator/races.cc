#include "cuda_emulator/races.h"

#include <algorithm>

namespace cuda_emulator {
void Races::join(Clock& to, const Clock& from) {
  to.resize(std::max(to.size(), from.size()), 0);
  for (size_t i = 0; i < from.size(); ++i) to[i] = std::max(to[i], from[i]);
}

void Races::start_block(int threads, size_t shared_bytes) {
  threads_ = threads;
  ++block_;
  const int all = threads + (threads + 127) / 128;
  clocks_.resize(all);
  for (int i = 0; i < all; ++i) {
    clocks_[i].assign(all, 0);
    clocks_[i][i] = i < threads ? 1 : 0;
  }
  changed_.assign(threads, true);
  words_.resize(std::max(words_.size(), (shared_bytes + 3) / 4));
}

std::string Races::access(int thread, size_t offset, size_t bytes, Kind kind, uint32_t line) {
  for (size_t byte = offset; byte < offset + bytes;) {
    const size_t end = std::min(byte / 4 * 4 + 4, offset + bytes);
    const auto mask = static_cast<uint8_t>(((1u << (end - byte)) - 1) << byte % 4);
    Word& word = words_[byte / 4];
    if (word.block != block_) word = {.block = block_, .accesses = {}};
    Access* place = nullptr;
    for (Access& other : word.accesses) {
      if (other.kind == Kind::kNone) {
        place = &other;  // and none after it
        break;
      }
      const bool ordered = other.thread == thread || before(other, thread);
      const bool reads = other.kind == Kind::kRead && kind == Kind::kRead;
      const bool atomics = other.kind == Kind::kAtomic && kind == Kind::kAtomic;
      if (!ordered && !reads && !atomics && (other.bytes & mask) != 0) {
        const auto name = [](Kind what) {
          return what == Kind::kRead ? "read" : what == Kind::kWrite ? "write" : "atomic operation";
        };
        return std::string("race on shared memory: a ") + name(kind) + " of byte " +
               std::to_string(byte) + " and a " + name(other.kind) + " by " +
               (other.thread < threads_
                    ? "thread " + std::to_string(other.thread)
                    : "wgmma of warpgroup " + std::to_string(other.thread - threads_)) +
               " after line " + std::to_string(other.line);
      }
      // What this access stands for from now on: all that comes after it comes after `other`.
      if (ordered && (other.bytes & ~mask) == 0 && (kind == Kind::kWrite || other.kind == kind)) {
        place = &other;
      }
    }
    if (place == nullptr) {
      place = &word.accesses[turn_++ % kRemembered];  // forgets one
    }
    *place = {.clock = clocks_[thread][thread],
              .line = line,
              .thread = static_cast<uint16_t>(thread),
              .bytes = mask,
              .kind = kind};
    byte = end;
  }
  return "";
}

void Races::release(int thread, Clock& to) {
  join(to, clocks_[thread]);
  ++clocks_[thread][thread];
  changed_[thread] = true;
}

void Races::acquire(int thread, const Clock& from) {
  join(clocks_[thread], from);
  changed_[thread] = true;
}

void Races::acquire_products(int thread, int64_t product) {
  uint32_t& known = clocks_[thread][warpgroup(thread)];
  known = std::max(known, static_cast<uint32_t>(product));
}

void Races::start_product(int warpgroup) {
  const int first = (warpgroup - threads_) * 128;
  for (int thread = first; thread < first + 128; ++thread) {
    if (!changed_[thread]) continue;
    join(clocks_[warpgroup], clocks_[thread]);
    changed_[thread] = false;
  }
  ++clocks_[warpgroup][warpgroup];
}

}  // namespace cuda_emulator
