// A CUDA device in software: kernels compiled as C++ run on the CPU, one CTA after the
// other, every thread a fiber. Threads run in a seeded random order between meeting points
// (barriers and warp instructions), memory nobody wrote holds NaN, asynchronous copies and products
// land as late as the instruction set allows or any time before: what is missing in a kernel shows.
// What a kernel may not do: wait for another CTA.
#ifndef FLEXPREFILL_TESTS_CUDA_EMULATOR_EMULATOR_H_
#define FLEXPREFILL_TESTS_CUDA_EMULATOR_EMULATOR_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <source_location>
#include <string>
#include <vector>

#include "cuda_emulator/races.h"

namespace cuda_emulator {

struct Index3 {
  unsigned x = 0, y = 0, z = 0;
};
// Of the running thread.
extern Index3 thread_index, block_index, block_size, grid_size;

// What the emulated device says of itself, and the order in which it runs things. The environment's
// FLEXPREFILL_EMULATOR_SEED (a number) and FLEXPREFILL_EMULATOR_CAPABILITY (80, 86, 89, 90) set
// them from outside of a test.
struct Settings {
  int major = 9, minor = 0;
  int multiprocessors = 4;
  uint64_t seed = 1;
  bool find_races = true;
};
// To be changed between calls only.
Settings& settings();
size_t shared_bytes_limit();  // a CTA may opt in to

using Where = std::source_location;

// ---- Launches (scheduler.cc)

// Once, before anything else: stacks, and what says whose access was wild.
void set_up();

// Runs body() once a thread. Throws flexprefill::Error(kInternal) that says what went wrong where:
// a deadlock, a warp instruction that part of the warp does not reach, an address outside of
// shared memory. The kernel's threads are abandoned then.
void run_grid(Index3 grid, Index3 block, size_t shared_bytes, const std::function<void()>& body);
bool running();

// Around a thread of a kernel that may start before the one before it has ended: fails where the
// thread did not await it.
void begin_overlapped();
void await_previous();
void end_overlapped();

// Ends the running thread's grid with an error.
[[noreturn]] void fail(const std::string& message, Where where);

uint32_t random_below(uint32_t bound);

// The running thread.
int thread_number();  // in its block
bool in_thread();     // or else the scheduler or the host runs
Where last_place();   // the meeting point that it came to last
inline int lane_number() { return thread_number() % 32; }

// ---- Meeting points

// Waits until every lane of `mask` stands at the same instruction; the last to come runs `perform`
// on the arguments of all lanes (nullptr where a lane is not in the mask or has left the kernel).
using Perform = void (*)(void* const* arguments, void* context);
void meet_warp(uint32_t mask, const char* what, void* argument, Perform perform, void* context,
               Where where);
// The same for the 128 threads of an aligned warpgroup.
void meet_warpgroup(const char* what, void* argument, Perform perform, void* context, Where where);

template <typename Argument, typename Function>
void at_warp(uint32_t mask, const char* what, Argument& argument, Function function, Where where) {
  meet_warp(
      mask, what, &argument,
      [](void* const* arguments, void* context) {
        (*static_cast<Function*>(context))(reinterpret_cast<Argument* const*>(arguments));
      },
      &function, where);
}
template <typename Argument, typename Function>
void at_warpgroup(const char* what, Argument& argument, Function function, Where where) {
  meet_warpgroup(
      what, &argument,
      [](void* const* arguments, void* context) {
        (*static_cast<Function*>(context))(reinterpret_cast<Argument* const*>(arguments));
      },
      &function, where);
}

// A meeting of the warp that orders its accesses to memory.
void sync_warp(uint32_t mask, Where where);

// bar.sync, bar.arrive: `threads` of the block come together, those that only arrive do not wait.
// threads == 0: all of the block that have not left the kernel.
void barrier(unsigned number, unsigned threads, bool wait, Where where);
// Barrier 0 of the whole block; how many of its threads gave `predicate`.
int count_at_barrier(bool predicate, Where where);

// Waits until condition() holds; it is asked again whenever the thread could go on.
void wait_until(const char* what, std::function<bool()> condition, Where where);

// `land` runs at some later point, in random order with others; memory that it writes is to be
// poisoned by the caller.
void land_later(std::function<void()> land);

// ---- Memory (shared_memory.cc, runtime.cc)

bool is_device_memory(const void* pointer);

std::byte* map_memory(size_t bytes);
void reserve_shared_memory(size_t bytes);  // of a grid
void start_shared_memory(int threads);     // of a block
bool shared_guards_are_whole();

// Addresses are those that kernels see, 32 bits wide.
std::byte* shared_memory();
uint32_t shared_address(const void* pointer, size_t bytes, size_t alignment, const char* what,
                        Where where);
std::byte* shared_pointer(uint32_t address, size_t bytes, size_t alignment, const char* what,
                          Where where);
inline constexpr std::byte kPoison{0xff};

// Fails if an access by `by`, the running thread or its warpgroup's products, is in a race.
enum class By { kThread, kProducts };
void check_access(const void* data, size_t bytes, Races::Kind kind, Where where,
                  By by = By::kThread);
Races& races();
// What the compiler saw, anywhere in memory.
void instrumented_access(const void* data, size_t bytes, Races::Kind kind);
// For atomic operations, which do not race with each other; one thread runs at a time.
void atomic_load(void* to, const void* address, size_t bytes);
void atomic_store(void* address, const void* from, size_t bytes);

// What threads did before they arrived at an mbarrier, or TMA before it reported its bytes.
struct PhaseClocks {
  Races::Clock running, ended;
};
PhaseClocks& phase_clocks(const uint64_t* barrier);

// The state of shared memory as the asynchronous proxy (TMA, wgmma) sees it: ordinary stores reach
// it with fence.proxy.async.
void fence_async_proxy();
// Bytes that the proxy wrote.
void async_wrote(const std::byte* data, size_t bytes);
// Fails unless the proxy sees what ordinary loads see.
void async_reads(const std::byte* data, size_t bytes, const char* what, Where where);

// ---- What is in flight

// A thread's copies: their groups, oldest first, and those not yet in one.
struct ThreadCopies {
  std::vector<std::function<void()>> open;
  std::vector<std::vector<std::function<void()>>> groups;

  void commit();
  void wait(int pending);  // lands all but the youngest groups
};
ThreadCopies& thread_copies();  // by cp.async
ThreadCopies& thread_stores();  // by TMA, to memory

// A warpgroup's products by wgmma (wgmma.cc); made anew for every CTA.
struct WarpgroupProducts;
std::shared_ptr<WarpgroupProducts>& warpgroup_products();

}  // namespace cuda_emulator

#endif  // FLEXPREFILL_TESTS_CUDA_EMULATOR_EMULATOR_H_
