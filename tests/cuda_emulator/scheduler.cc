// Fibers, meeting points and the shared memory of one CTA.
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <random>

#include "cuda_emulator/emulator.h"
#include "flexprefill/types.h"

#if !defined(__x86_64__)
#error "the emulator switches between threads in x86-64 assembly"
#endif

// Saves the callee's registers on the stack, leaves the stack pointer in *from and goes on at `to`.
extern "C" void cuda_emulator_switch(void** from, void* to);
asm(R"(
.text
.globl cuda_emulator_switch
.hidden cuda_emulator_switch
.type cuda_emulator_switch, @function
cuda_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size cuda_emulator_switch, .-cuda_emulator_switch
)");

namespace cuda_emulator {

Index3 thread_index, block_index, block_size, grid_size;

namespace {

constexpr size_t kStackBytes = 128 << 10;
constexpr size_t kPage = 4096;
constexpr int kMaxThreads = 1024;
constexpr int kMaxWarps = kMaxThreads / 32;
constexpr int kBarriers = 16;
struct Fiber {
  void* stack_pointer = nullptr;
  Index3 index;
  const char* what = "start";  // it waits in
  Where where;
  std::function<bool()> condition;  // of wait_until
  ThreadCopies copies, stores;
  bool awaited_previous = false;
};

struct Meeting {
  const char* what;
  Where where;
  uint32_t mask, arrived;
  std::array<void*, 32> arguments;
};

struct WarpgroupMeeting {
  const char* what;
  Where where;
  int missing;
  std::array<void*, 128> arguments;
};

struct Warp {
  uint32_t ready = 0;    // lanes that can go on
  uint32_t polling = 0;  // lanes in wait_until
  uint32_t exited = 0;
  uint64_t priority = 0;
  std::vector<Meeting> meetings;
};

struct Barrier {
  unsigned expected = 0, arrived = 0;  // expected 0: the whole block
  int predicates = 0;                  // of count_at_barrier
  std::vector<int> waiting;
  Races::Clock clock;  // of those that have arrived
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<std::unique_ptr<WarpgroupMeeting>> warpgroup_meetings;
  std::vector<std::shared_ptr<WarpgroupProducts>> products;
  std::array<Barrier, kBarriers> barriers;
  std::map<const uint64_t*, PhaseClocks> phase_clocks;
  std::vector<std::function<void()>> landing;
  int live = 0;
  int last_count = 0;  // of count_at_barrier
};

// Of `fail` outside of a thread.
struct Failure {};

// Everything of the one grid that runs.
struct Device {
  std::byte* stacks = nullptr;
  Block block;
  int current = 0;
  void* scheduler_stack_pointer = nullptr;
  const std::function<void()>* body = nullptr;
  std::string error;
  bool failed = false;
  bool in_thread = false;  // not in the scheduler
  std::mt19937_64 random;
  bool running = false;
};
Device device;
std::mutex one_grid;

std::string number3(Index3 index) {
  return "(" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " +
         std::to_string(index.z) + ")";
}

std::string place(const char* what, Where where) {
  const std::string file = where.file_name();
  const size_t slash = file.rfind('/');
  return std::string(what) + " (" + (slash == file.npos ? file : file.substr(slash + 1)) + ":" +
         std::to_string(where.line()) + ")";
}

// A wild access ends the process: say which thread made it.
void on_segmentation_fault(int, siginfo_t* info, void*) {
  std::array<char, 512> text;
  const int length =
      device.running
          ? std::snprintf(text.data(), text.size(),
                          "CUDA emulator: block %s thread %s accesses %p, which is no memory of "
                          "the device; it was last in %s\n",
                          number3(block_index).c_str(), number3(thread_index).c_str(),
                          info->si_addr,
                          place(device.block.fibers[device.current].what,
                                device.block.fibers[device.current].where)
                              .c_str())
          : std::snprintf(text.data(), text.size(),
                          "CUDA emulator: the host accesses %p, which is memory of the device or "
                          "none at all\n",
                          info->si_addr);
  if (write(2, text.data(), static_cast<size_t>(length)) < 0) _exit(1);
  signal(SIGSEGV, SIG_DFL);
}

// Back to the scheduler; returns when this thread is to go on.
void leave() {
  cuda_emulator_switch(&device.block.fibers[device.current].stack_pointer,
                       device.scheduler_stack_pointer);
}

void make_ready(int thread) { device.block.warps[thread / 32].ready |= 1u << (thread % 32); }

void stand_at(const char* what, Where where) {
  Fiber& fiber = device.block.fibers[device.current];
  fiber.what = what;
  fiber.where = where;
}

void release(Barrier& barrier) {
  if (&barrier == device.block.barriers.data()) device.block.last_count = barrier.predicates;
  for (const int thread : barrier.waiting) {
    make_ready(thread);
    if (barrier.expected != 0) races().acquire(thread, barrier.clock);
  }
  if (barrier.expected == 0) races().meet_block(barrier.waiting);
  barrier = {};
}

void release_meeting(Warp& warp, size_t number) {
  warp.ready |= warp.meetings[number].arrived;
  warp.meetings.erase(warp.meetings.begin() + static_cast<ptrdiff_t>(number));
}

[[noreturn]] void exit_thread() {
  Block& block = device.block;
  const int thread = device.current;
  Warp& warp = block.warps[thread / 32];
  warp.exited |= 1u << (thread % 32);
  --block.live;
  stand_at("exit", Where::current());
  Barrier& all = block.barriers[0];
  if (all.expected == 0 && all.arrived > 0 && all.arrived == static_cast<unsigned>(block.live)) {
    release(all);
  }
  leave();
  __builtin_unreachable();
}

void thread_main() {
  (*device.body)();
  exit_thread();
}

// A stack on which cuda_emulator_switch returns into thread_main.
void prepare_stack(Fiber& fiber, int thread) {
  // Not all at the same offset, where few of them would fit a cache: 64 lines, taken in turn.
  const size_t offset = static_cast<size_t>(thread * 9 % 64) * 64;
  auto* top = reinterpret_cast<void**>(device.stacks + (thread + 1) * kStackBytes - offset);
  *--top = nullptr;  // thread_main's return address: keeps the stack aligned as after a call
  *--top = reinterpret_cast<void*>(&thread_main);
  for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
  fiber.stack_pointer = top;
}

std::string where_all_wait() {
  const Block& block = device.block;
  std::string text;
  for (size_t w = 0; w < block.warps.size(); ++w) {
    for (uint32_t rest = 0xffffffffu; rest != 0;) {
      const int first = __builtin_ctz(rest);
      const size_t thread = w * 32 + static_cast<size_t>(first);
      if (thread >= block.fibers.size()) break;
      const std::string here = place(block.fibers[thread].what, block.fibers[thread].where);
      uint32_t lanes = 0;
      for (int lane = first; lane < 32 && w * 32 + lane < block.fibers.size(); ++lane) {
        const Fiber& fiber = block.fibers[w * 32 + lane];
        if (place(fiber.what, fiber.where) == here) lanes |= 1u << lane;
      }
      rest &= ~lanes;
      std::array<char, 32> mask;
      std::snprintf(mask.data(), mask.size(), "%08x", lanes);
      text += "\n  warp " + std::to_string(w) + ", lanes " + mask.data() + ": " + here;
    }
  }
  return text;
}

void land_one() {
  auto& landing = device.block.landing;
  std::swap(landing[random_below(static_cast<uint32_t>(landing.size()))], landing.back());
  const std::function<void()> land = std::move(landing.back());
  landing.pop_back();
  try {
    land();
  } catch (const Failure&) {
  }
}

// Runs the lanes of one warp that can go on, each to where it next waits.
void run_warp(int w) {
  Warp& warp = device.block.warps[w];
  uint32_t lanes = warp.ready;
  warp.ready = 0;
  const int turn = static_cast<int>(random_below(32));
  for (int i = 0; i < 32 && !device.failed; ++i) {
    const int lane = (i + turn) % 32;
    if ((lanes >> lane & 1) == 0) continue;
    device.current = w * 32 + lane;
    Fiber& fiber = device.block.fibers[device.current];
    thread_index = fiber.index;
    device.in_thread = true;
    cuda_emulator_switch(&device.scheduler_stack_pointer, fiber.stack_pointer);
    device.in_thread = false;
  }
}

void wake_polling(Warp& warp, int w) {
  for (uint32_t rest = warp.polling; rest != 0; rest &= rest - 1) {
    const int lane = __builtin_ctz(rest);
    if (device.block.fibers[w * 32 + lane].condition()) {
      warp.polling &= ~(1u << lane);
      warp.ready |= 1u << lane;
    }
  }
}

// The warp of the highest priority that can go on, or -1. Priorities change now and then: some
// warps run far ahead of others.
int pick_warp() {
  auto& warps = device.block.warps;
  if (random_below(64) == 0) {
    for (Warp& warp : warps) warp.priority = device.random();
  }
  int best = -1;
  for (int w = 0; w < static_cast<int>(warps.size()); ++w) {
    if (best >= 0 && warps[w].priority < warps[best].priority) continue;
    wake_polling(warps[w], w);
    if (warps[w].ready != 0) best = w;
  }
  return best;
}

void run_block() {
  Block& block = device.block;
  const auto threads = static_cast<int>(block_size.x * block_size.y * block_size.z);
  block = {};
  block.live = threads;
  block.fibers.resize(threads);
  block.warps.resize((threads + 31) / 32);
  block.warpgroup_meetings.resize((threads + 127) / 128);
  block.products.resize((threads + 127) / 128);
  for (int t = 0; t < threads; ++t) {
    const auto n = static_cast<unsigned>(t);
    block.fibers[t].index = {n % block_size.x, n / block_size.x % block_size.y,
                             n / (block_size.x * block_size.y)};
    prepare_stack(block.fibers[t], t);
    make_ready(t);
  }
  for (Warp& warp : block.warps) warp.priority = device.random();
  start_shared_memory(threads);
  while (block.live > 0 && !device.failed) {
    if (!block.landing.empty() && random_below(16) == 0) land_one();
    const int warp = pick_warp();
    if (warp >= 0) {
      run_warp(warp);
    } else if (!block.landing.empty()) {
      land_one();
    } else {
      device.failed = true;
      device.error = "block " + number3(block_index) + ": no thread can go on:" + where_all_wait();
    }
  }
  if (!device.failed && !shared_guards_are_whole()) {
    device.failed = true;
    device.error = "block " + number3(block_index) + " wrote beyond its shared memory";
  }
}

}  // namespace

Settings& settings() {
  static Settings instance = [] {
    Settings initial;
    if (const char* seed = std::getenv("FLEXPREFILL_EMULATOR_SEED")) {
      initial.seed = std::strtoull(seed, nullptr, 10);
    }
    if (const char* capability = std::getenv("FLEXPREFILL_EMULATOR_CAPABILITY")) {
      initial.major = capability[0] - '0';
      initial.minor = std::atoi(capability + 1);
    }
    return initial;
  }();
  return instance;
}

void set_up() {
  if (device.stacks != nullptr) return;
  device.stacks = map_memory(kMaxThreads * kStackBytes);
  for (int t = 0; t < kMaxThreads; ++t) {
    mprotect(device.stacks + t * kStackBytes, kPage, PROT_NONE);
  }
  stack_t alternate{};
  alternate.ss_sp = map_memory(1 << 16);
  alternate.ss_size = 1 << 16;
  sigaltstack(&alternate, nullptr);
  struct sigaction action{};
  action.sa_sigaction = on_segmentation_fault;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  sigaction(SIGSEGV, &action, nullptr);
}

bool running() { return device.running; }

uint32_t random_below(uint32_t bound) {
  return static_cast<uint32_t>((device.random() >> 32) * bound >> 32);
}

int thread_number() { return device.current; }

bool in_thread() { return device.in_thread; }

Where last_place() { return device.block.fibers[device.current].where; }

void run_grid(Index3 grid, Index3 block, size_t shared_bytes, const std::function<void()>& body) {
  const std::lock_guard<std::mutex> lock(one_grid);
  set_up();
  if (shared_bytes > shared_bytes_limit() || block.x * block.y * block.z > kMaxThreads ||
      block.x * block.y * block.z == 0 || grid.x == 0 || grid.y == 0 || grid.z == 0 ||
      grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) {
    throw flexprefill::Error(flexprefill::ErrorCode::kInternal,
                             "CUDA emulator: no device takes a launch of " + number3(grid) + " x " +
                                 number3(block) + " threads and " + std::to_string(shared_bytes) +
                                 " bytes of shared memory");
  }
  grid_size = grid;
  block_size = block;
  device.random.seed(settings().seed);
  reserve_shared_memory(shared_bytes);
  device.body = &body;
  device.failed = false;
  device.running = true;
  // Blocks in a random order too.
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  const uint64_t first = device.random() % blocks;
  for (uint64_t i = 0; i < blocks && !device.failed; ++i) {
    const uint64_t n = (first + i) % blocks;
    block_index = {static_cast<unsigned>(n % grid.x), static_cast<unsigned>(n / grid.x % grid.y),
                   static_cast<unsigned>(n / grid.x / grid.y)};
    run_block();
  }
  device.block = {};
  device.running = false;
  if (device.failed) {
    throw flexprefill::Error(flexprefill::ErrorCode::kInternal, "CUDA emulator: " + device.error);
  }
}

void begin_overlapped() { device.block.fibers[device.current].awaited_previous = false; }
void await_previous() { device.block.fibers[device.current].awaited_previous = true; }
void end_overlapped() {
  if (!device.block.fibers[device.current].awaited_previous) {
    fail("a thread that ends without await_previous_kernel()", Where::current());
  }
}

void fail(const std::string& message, Where where) {
  device.error = "block " + number3(block_index) + " thread " + number3(thread_index) + ": " +
                 place(message.c_str(), where);
  device.failed = true;
  if (!device.in_thread) throw Failure();
  leave();
  __builtin_unreachable();
}

void meet_warp(uint32_t mask, const char* what, void* argument, Perform perform, void* context,
               Where where) {
  const int lane = lane_number();
  Warp& warp = device.block.warps[device.current / 32];
  stand_at(what, where);
  if ((mask >> lane & 1) == 0)
    fail(std::string(what) + " by a lane that is not in its mask", where);
  if ((mask & warp.exited) != 0) {
    fail(std::string(what) + " with lanes that have left the kernel", where);
  }
  size_t number = 0;
  while (number < warp.meetings.size() &&
         (warp.meetings[number].mask != mask || (warp.meetings[number].arrived >> lane & 1) != 0)) {
    ++number;
  }
  if (number == warp.meetings.size()) {
    warp.meetings.push_back({what, where, mask, 0, {}});
  }
  Meeting& meeting = warp.meetings[number];
  if (meeting.what != what && std::strcmp(meeting.what, what) != 0) {
    fail("lanes of one warp stand at different instructions: " +
             place(meeting.what, meeting.where) + " and " + what,
         where);
  }
  meeting.arguments[lane] = argument;
  meeting.arrived |= 1u << lane;
  if (meeting.arrived != mask) return leave();
  perform(meeting.arguments.data(), context);
  release_meeting(warp, number);
  warp.ready &= ~(1u << lane);  // it is running
}

void sync_warp(uint32_t mask, Where where) {
  int thread = device.current;
  at_warp(
      mask, "__syncwarp", thread,
      [mask](int* const* threads) {
        if (mask == 0xffffffffu) return races().meet_warp(*threads[0] / 32);
        Races::Clock clock;
        for (uint32_t rest = mask; rest != 0; rest &= rest - 1) {
          races().release(*threads[__builtin_ctz(rest)], clock);
        }
        for (uint32_t rest = mask; rest != 0; rest &= rest - 1) {
          races().acquire(*threads[__builtin_ctz(rest)], clock);
        }
      },
      where);
}

void meet_warpgroup(const char* what, void* argument, Perform perform, void* context, Where where) {
  const int group = device.current / 128;
  const int member = device.current % 128;
  stand_at(what, where);
  if ((group + 1) * 128 > static_cast<int>(device.block.fibers.size())) {
    fail(std::string(what) + " outside of a whole warpgroup", where);
  }
  std::unique_ptr<WarpgroupMeeting>& meeting = device.block.warpgroup_meetings[group];
  if (meeting == nullptr) meeting.reset(new WarpgroupMeeting{what, where, 128, {}});
  if (meeting->what != what && std::strcmp(meeting->what, what) != 0) {
    fail("threads of one warpgroup stand at different instructions: " +
             place(meeting->what, meeting->where) + " and " + what,
         where);
  }
  meeting->arguments[member] = argument;
  if (--meeting->missing > 0) return leave();
  perform(meeting->arguments.data(), context);
  meeting.reset();
  for (int thread = group * 128; thread < group * 128 + 128; ++thread) {
    if (thread != device.current) make_ready(thread);
  }
}

void barrier(unsigned number, unsigned threads, bool wait, Where where) {
  stand_at(wait ? "barrier" : "arrival at a barrier", where);
  if (number >= kBarriers || threads % 32 != 0 || (threads == 0 && !wait)) {
    fail("barrier " + std::to_string(number) + " of " + std::to_string(threads) + " threads",
         where);
  }
  Barrier& barrier = device.block.barriers[number];
  if (barrier.arrived > 0 && barrier.expected != threads) {
    fail("barrier " + std::to_string(number) + " is used with " + std::to_string(threads) +
             " threads and with " + std::to_string(barrier.expected),
         where);
  }
  barrier.expected = threads;
  ++barrier.arrived;
  const bool whole_block = threads == 0;
  if (!whole_block) races().release(device.current, barrier.clock);
  if (wait) barrier.waiting.push_back(device.current);
  const bool complete =
      barrier.arrived == (whole_block ? static_cast<unsigned>(device.block.live) : threads);
  if (complete) {
    release(barrier);
    device.block.warps[device.current / 32].ready &= ~(1u << lane_number());  // it is running
  } else if (wait) {
    leave();
  }
}

int count_at_barrier(bool predicate, Where where) {
  // No later barrier of the block can complete before all have read the count: they meet twice.
  device.block.barriers[0].predicates += predicate ? 1 : 0;
  barrier(0, 0, true, where);
  const int count = device.block.last_count;
  barrier(0, 0, true, where);
  return count;
}

void wait_until(const char* what, std::function<bool()> condition, Where where) {
  stand_at(what, where);
  if (condition()) return;
  device.block.fibers[device.current].condition = std::move(condition);
  device.block.warps[device.current / 32].polling |= 1u << lane_number();
  leave();
}

void land_later(std::function<void()> land) { device.block.landing.push_back(std::move(land)); }

PhaseClocks& phase_clocks(const uint64_t* barrier) { return device.block.phase_clocks[barrier]; }

ThreadCopies& thread_copies() { return device.block.fibers[device.current].copies; }
ThreadCopies& thread_stores() { return device.block.fibers[device.current].stores; }

void ThreadCopies::commit() {
  groups.push_back(std::move(open));
  open.clear();
}

void ThreadCopies::wait(int pending) {
  const auto landed = groups.begin() + std::max<ptrdiff_t>(std::ssize(groups) - pending, 0);
  for (auto group = groups.begin(); group != landed; ++group) {
    for (const auto& land : *group) land();
  }
  groups.erase(groups.begin(), landed);
}

std::shared_ptr<WarpgroupProducts>& warpgroup_products() {
  return device.block.products[device.current / 128];
}

}  // namespace cuda_emulator
