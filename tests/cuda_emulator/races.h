// Finds data races on shared memory: two accesses, one of them a write, that no barrier, __syncwarp
// or mbarrier puts in an order, whatever order the threads happened to run in. Every thread has a
// vector clock, as has every warpgroup for what its wgmma read; every word of shared memory
// remembers its latest accesses. Plain loads and stores come from the compiler's instrumentation
// (-fsanitize=thread, without its run-time library).
#ifndef FLEXPREFILL_TESTS_CUDA_EMULATOR_RACES_H_
#define FLEXPREFILL_TESTS_CUDA_EMULATOR_RACES_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace cuda_emulator {

class Races {
 public:
  enum class Kind : uint8_t { kNone, kRead, kWrite, kAtomic };
  using Clock = std::vector<uint32_t>;  // of every thread, then of every warpgroup's products

  void start_block(int threads, size_t shared_bytes);
  int warpgroup(int thread) const { return threads_ + thread / 128; }

  // "" or what it races with. `line`: where the thread last was, for the message.
  std::string access(int thread, size_t offset, size_t bytes, Kind kind, uint32_t line);

  // What the thread did so far happened before whatever acquires `to` from now on.
  void release(int thread, Clock& to);
  void acquire(int thread, const Clock& from);
  // What this warpgroup's products read until its product `product` (1 for the first).
  void acquire_products(int thread, int64_t product);
  static void join(Clock& to, const Clock& from);
  // Its next product comes after all that its threads did.
  void start_product(int warpgroup);

 private:
  struct Access {
    uint32_t clock = 0;
    uint32_t line = 0;
    uint16_t thread = 0;
    uint8_t bytes = 0;  // a mask
    Kind kind = Kind::kNone;
  };
  static constexpr int kRemembered = 8;
  struct Word {
    uint32_t block = 0;
    Access accesses[kRemembered];
  };

  bool before(const Access& earlier, int thread) const {
    return earlier.clock <= clocks_[thread][earlier.thread];
  }

  int threads_ = 0;
  uint32_t block_ = 0;
  uint32_t turn_ = 0;
  std::vector<Clock> clocks_;
  std::vector<bool> changed_;  // since the warpgroup's last product
  std::vector<Word> words_;
};

}  // namespace cuda_emulator

#endif  // FLEXPREFILL_TESTS_CUDA_EMULATOR_RACES_H_
