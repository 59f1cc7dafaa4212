// The shared memory of the one CTA that runs, between guards; who may touch it when.
#include <sys/mman.h>

#include <algorithm>
#include <cstring>

#include "cuda_emulator/emulator.h"

namespace cuda_emulator {
namespace {

constexpr size_t kMaxBytes = 227 << 10;  // of any device
constexpr size_t kPage = 4096;
// Where shared memory starts in its 32-bit window: the device keeps the first KiB.
constexpr uint32_t kBase = 1024;
// Before and behind the kernel's shared memory; a write there is found when the block ends.
constexpr size_t kGuard = 1024;
constexpr size_t kRegion = (kMaxBytes + 2 * kGuard + kPage - 1) / kPage * kPage;

struct SharedMemory {
  std::byte* region = nullptr;  // kRegion bytes and a page without access on both sides
  std::byte* data = nullptr;
  size_t bytes = 0;
  std::vector<std::byte> async_view;  // as the asynchronous proxy sees it
  Races races;
};
SharedMemory shared;

}  // namespace

std::byte* map_memory(size_t bytes) {
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  return static_cast<std::byte*>(memory);
}

size_t shared_bytes_limit() {
  const int version = settings().major * 10 + settings().minor;
  return version == 90 ? kMaxBytes : version == 80 ? 163 << 10 : 99 << 10;
}

void reserve_shared_memory(size_t bytes) {
  if (shared.region == nullptr) {
    shared.region = map_memory(kRegion + 2 * kPage) + kPage;
    mprotect(shared.region - kPage, kPage, PROT_NONE);
    mprotect(shared.region + kRegion, kPage, PROT_NONE);
  }
  const size_t room = (bytes + 1023) / 1024 * 1024;
  shared.bytes = bytes;
  shared.data = shared.region + (kRegion - kGuard - room) / 1024 * 1024;
}

void start_shared_memory(int threads) {
  std::fill_n(shared.data - kGuard, shared.bytes + 2 * kGuard, kPoison);
  shared.async_view.assign(shared.bytes, kPoison);
  shared.races.start_block(threads, shared.bytes);
}

bool shared_guards_are_whole() {
  const auto untouched = [](std::byte byte) { return byte == kPoison; };
  return std::all_of(shared.data - kGuard, shared.data, untouched) &&
         std::all_of(shared.data + shared.bytes, shared.data + shared.bytes + kGuard, untouched);
}

std::byte* shared_memory() { return shared.data; }

uint32_t shared_address(const void* pointer, size_t bytes, size_t alignment, const char* what,
                        Where where) {
  const auto offset = static_cast<const std::byte*>(pointer) - shared.data;
  if (offset < 0 || static_cast<size_t>(offset) + bytes > shared.bytes) {
    fail(std::string(what) + ": byte " + std::to_string(offset) + " of " +
             std::to_string(shared.bytes) + " bytes of shared memory",
         where);
  }
  const auto address = static_cast<uint32_t>(offset) + kBase;
  if (address % alignment != 0) {
    fail(std::string(what) + ": shared address " + std::to_string(address) +
             " is not a multiple of " + std::to_string(alignment),
         where);
  }
  return address;
}

std::byte* shared_pointer(uint32_t address, size_t bytes, size_t alignment, const char* what,
                          Where where) {
  std::byte* pointer = shared.data + (static_cast<int64_t>(address) - kBase);
  shared_address(pointer, bytes, alignment, what, where);
  return pointer;
}

// ---- Races

Races& races() { return shared.races; }

void check_access(const void* data, size_t bytes, Races::Kind kind, Where where, By by) {
  if (!settings().find_races) return;
  const int thread = thread_number();
  Races& races = shared.races;
  const bool global = is_device_memory(data);
  const auto address = reinterpret_cast<uintptr_t>(data);
  if (!races.access(by == By::kThread ? thread : races.warpgroup(thread),
                    global ? Races::Memory::kGlobal : Races::Memory::kShared,
                    global ? address : address - reinterpret_cast<uintptr_t>(shared.data), bytes,
                    kind, last_place().line())) {
    fail(races.race() + "; this thread was last in", where);
  }
}

void instrumented_access(const void* data, size_t bytes, Races::Kind kind) {
  if (!in_thread()) return;
  const auto offset = reinterpret_cast<uintptr_t>(data) - reinterpret_cast<uintptr_t>(shared.data);
  if (offset < shared.bytes) {
    check_access(data, std::min(bytes, shared.bytes - offset), kind, last_place());
  } else if (is_device_memory(data)) {
    check_access(data, bytes, kind, last_place());
  }
}

void atomic_load(void* to, const void* address, size_t bytes) {
  instrumented_access(address, bytes, Races::Kind::kAtomic);
  std::memcpy(to, address, bytes);
}

void atomic_store(void* address, const void* from, size_t bytes) {
  std::memcpy(address, from, bytes);
}

// ---- The asynchronous proxy

void fence_async_proxy() { std::copy_n(shared.data, shared.bytes, shared.async_view.begin()); }

void async_wrote(const std::byte* data, size_t bytes) {
  std::copy_n(data, bytes, shared.async_view.begin() + (data - shared.data));
}

void async_reads(const std::byte* data, size_t bytes, const char* what, Where where) {
  const ptrdiff_t offset = data - shared.data;
  if (!std::equal(data, data + bytes, shared.async_view.begin() + offset)) {
    fail(std::string(what) + " reads shared memory from byte " + std::to_string(offset) +
             " on that was stored without fence.proxy.async",
         where);
  }
}

}  // namespace cuda_emulator
