// Finds data races within a CTA, on shared and on global memory: two accesses, one of them a write,
// that no barrier, __syncwarp or mbarrier puts in an order, whatever order the threads happened to
// run in. Every thread has a vector clock, as has every warpgroup for what its wgmma read; every
// word of memory remembers its latest accesses. Plain loads and stores come from the compiler's
// instrumentation (-fsanitize=thread, without its run-time library).
#ifndef FLEXPREFILL_TESTS_CUDA_EMULATOR_RACES_H_
#define FLEXPREFILL_TESTS_CUDA_EMULATOR_RACES_H_

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

namespace cuda_emulator {

class Races {
 public:
  enum class Kind : uint8_t { kNone, kRead, kWrite, kAtomic };
  using Clock = std::vector<uint32_t>;  // of every thread, then of every warpgroup's products

  void start_block(int threads, size_t shared_bytes);
  int warpgroup(int thread) const { return threads_ + thread / 128; }

  enum class Memory : uint8_t { kShared, kGlobal };
  // False: in a race, which `race` describes. `offset`: in shared memory; of global memory the
  // address. `line`: where the thread last was, for the message.
  bool access(int thread, Memory memory, size_t offset, size_t bytes, Kind kind, uint32_t line);
  const std::string& race() const { return race_; }

  // What the thread did so far happened before whatever acquires `to` from now on.
  void release(int thread, Clock& to);
  void acquire(int thread, const Clock& from);
  // All threads of the block that have not ended come together.
  void meet_block(std::span<const int> threads);
  // All 32 of a warp.
  void meet_warp(int warp);
  // What the warp's warpgroup's products read until its product `product` (1 for the first).
  void acquire_products(int warp, int64_t product);
  static void join(Clock& to, const Clock& from);
  // Its next product comes after all that its threads did.
  void start_product(int warpgroup);

 private:
  // In 64 bits, so that a word's accesses fill one cache line: 2 bits of kind, 4 of the mask of
  // bytes, 11 of the thread, 15 of the line, 32 of its time.
  struct Access {
    uint64_t bits = 0;

    Kind kind() const { return static_cast<Kind>(bits & 3); }
    uint32_t bytes() const { return bits >> 2 & 15; }
    int thread() const { return static_cast<int>(bits >> 6 & 2047); }
    uint32_t line() const { return bits >> 17 & 32767; }
    uint32_t time() const { return static_cast<uint32_t>(bits >> 32); }
    bool same_but_for_line(Access other) const {
      return ((bits ^ other.bits) & ~(uint64_t{32767} << 17)) == 0;
    }
  };
  static constexpr int kRemembered = 8;
  struct alignas(64) Word {
    Access accesses[kRemembered];  // a kNone ends them
  };

  // Words of a CTA's shared memory, or of all addresses: those that it touched, by their number.
  class DenseWords {
   public:
    void start_block(size_t words);
    Word& operator[](size_t number);

   private:
    uint32_t block_ = 0;
    std::vector<Word> words_;
    std::vector<uint32_t> blocks_;  // the CTA that a word's accesses are from
  };
  class SparseWords {
   public:
    void start_block();
    Word& operator[](size_t number);

   private:
    struct Slot {
      size_t number = 0;
      uint32_t block = 0;
    };
    size_t find(size_t number) const;
    void grow();

    uint32_t block_ = 0;
    size_t taken_ = 0;
    std::vector<Slot> slots_;  // a power of two, of which half is taken at most
    std::vector<Word> words_;
  };

  template <typename Words>
  bool access_words(Words& words, size_t offset, size_t bytes, uint64_t mine);
  bool access_word(Word& word, Access mine);
  void describe(Access earlier, Kind kind);
  // What is in `clocks_[thread]` and `warp_clocks_` moves to `to`, which all that have it know.
  void take_own(int thread, Clock& to);
  void take_warp(int warp, Clock& to);

  int threads_ = 0;
  uint32_t turn_ = 0;
  // A thread's vector clock is the maximum of three, so that meetings of a warp or the block need
  // not touch a vector for each thread: what all threads know, what all of its warp know, and what
  // it alone knows; and at its own place its time. (With one vector a thread they took a quarter of
  // the time of select's tests.)
  std::vector<uint32_t> time_;  // of each thread; of a warpgroup, its products
  Clock block_clock_;
  std::vector<Clock> warp_clocks_;
  std::vector<Clock> clocks_;  // of threads; of a warpgroup, all that its products know
  std::vector<uint8_t> warp_knows_more_, knows_more_;  // than what is in the one before
  DenseWords shared_;
  SparseWords global_;
  std::string race_;
};

}  // namespace cuda_emulator

#endif  // FLEXPREFILL_TESTS_CUDA_EMULATOR_RACES_H_
