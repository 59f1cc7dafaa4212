// The asynchronous instructions of compute capability 9.0, from the PTX ISA: "mbarrier",
// "cp.async.bulk.tensor", "Asynchronous warpgroup level matrix instructions".
#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <deque>
#include <memory>
#include <vector>

#include "cuda_emulator/instructions.h"

namespace cuda_emulator {

// ---- mbarrier

namespace {

constexpr uint64_t kMaxArrivals = (1 << 20) - 1;
constexpr int64_t kMaxBytes = (1 << 20) - 1;

struct BarrierState {
  uint64_t parity : 1;
  uint64_t pending : 20;   // arrivals of this phase still to come
  uint64_t arrivals : 20;  // of every phase
  int64_t bytes : 22;      // still to come
  uint64_t invalid : 1;    // poison has it set
};
static_assert(sizeof(BarrierState) == 8);

BarrierState load(const uint64_t* barrier, const char* what, Where where) {
  shared_address(barrier, 8, 8, what, where);
  const auto state = std::bit_cast<BarrierState>(*barrier);
  if (state.invalid != 0 || state.arrivals == 0) {
    fail(std::string(what) + " of what is no mbarrier", where);
  }
  return state;
}

void store(uint64_t* barrier, BarrierState state) {
  if (state.pending == 0 && state.bytes == 0) {
    phase_clocks(barrier).ended = phase_clocks(barrier).running;
    state.parity ^= 1;
    state.pending = state.arrivals;
  }
  *barrier = std::bit_cast<uint64_t>(state);
}

void add_bytes(uint64_t* barrier, int64_t bytes, const char* what, Where where) {
  BarrierState state = load(barrier, what, where);
  const int64_t sum = state.bytes + bytes;
  if (sum > kMaxBytes || sum < -kMaxBytes) fail(std::string(what) + ": too many bytes", where);
  state.bytes = sum;
  store(barrier, state);
}

}  // namespace

void mbarrier_init(uint64_t* barrier, uint32_t arrivals, Where where) {
  shared_address(barrier, 8, 8, "mbarrier.init", where);
  if (arrivals == 0 || arrivals > kMaxArrivals) fail("mbarrier.init: count out of range", where);
  phase_clocks(barrier) = {};
  store(barrier,
        {.parity = 0, .pending = arrivals, .arrivals = arrivals, .bytes = 0, .invalid = 0});
}

void mbarrier_expect(uint64_t* barrier, uint32_t bytes, Where where) {
  add_bytes(barrier, bytes, "mbarrier.expect_tx", where);
}

void mbarrier_arrive(uint64_t* barrier, Where where) {
  BarrierState state = load(barrier, "mbarrier.arrive", where);
  if (state.pending == 0) fail("mbarrier.arrive: more arrivals than the barrier counts", where);
  state.pending -= 1;
  races().release(thread_number(), phase_clocks(barrier).running);
  store(barrier, state);
}

void mbarrier_wait(uint64_t* barrier, uint32_t parity, Where where) {
  load(barrier, "mbarrier.try_wait", where);
  wait_until(
      "mbarrier.try_wait", [=] { return std::bit_cast<BarrierState>(*barrier).parity != parity; },
      where);
  races().acquire(thread_number(), phase_clocks(barrier).ended);
}

// ---- TMA

namespace {

// The swizzle permutes the 16-byte units of 32, 64 or 128 bytes by address bits 7 and up.
uint32_t swizzled(uint32_t address, uint32_t swizzle_bytes) {
  return swizzle_bytes == 0 ? address : address ^ (address >> 3 & (swizzle_bytes - 16));
}

}  // namespace

const char* check_tensor_map(const TensorMap& map) {
  if (map.rank < 1 || map.rank > TensorMap::kMaxRank) return "rank";
  if (reinterpret_cast<uintptr_t>(map.data) % 16 != 0) return "address is no multiple of 16";
  for (int i = 0; i < map.rank; ++i) {
    if (map.sizes[i] == 0 || map.sizes[i] > uint64_t{1} << 32) return "size of a dimension";
    if (map.box[i] == 0 || map.box[i] > 256) return "size of the box";
    if (i > 0 && (map.strides[i - 1] % 16 != 0 || map.strides[i - 1] >= uint64_t{1} << 40)) {
      return "stride is no multiple of 16 or too large";
    }
  }
  const uint32_t row_bytes = map.box[0] * map.element_bytes;
  if (row_bytes % 16 != 0) return "rows of the box are no multiple of 16 bytes";
  if (map.swizzle_bytes != 0 && row_bytes > map.swizzle_bytes) {
    return "rows of the box are longer than the swizzle";
  }
  return nullptr;
}

namespace {

using BoxStart = std::array<int64_t, TensorMap::kMaxRank>;

BoxStart box_start(const TensorMap& map, const int32_t* coordinates) {
  BoxStart start{};
  std::copy_n(coordinates, map.rank, start.begin());
  return start;
}

// Of 16 bytes, of a box.
uint32_t box_units(const TensorMap& map) {
  uint32_t units = map.element_bytes;
  for (int i = 0; i < map.rank; ++i) units *= map.box[i];
  return units / 16;
}

// function(unit, byte, element): of the box's elements that the tensor has, where each lies in its
// unit of 16 bytes, and in the tensor.
template <typename Function>
void for_each_element(const TensorMap& map, const BoxStart& start, Function function) {
  const uint32_t row_units = map.box[0] * map.element_bytes / 16;
  const int unit_elements = 16 / map.element_bytes;
  for (uint32_t unit = 0; unit < box_units(map); ++unit) {
    // The row of the box that the unit is in, and whether the tensor has it.
    const std::byte* row = map.data;
    bool inside = true;
    uint32_t rest = unit / row_units;
    for (int i = 1; i < map.rank; ++i) {
      const int64_t at = start[i] + rest % map.box[i];
      rest /= map.box[i];
      inside = inside && at >= 0 && at < static_cast<int64_t>(map.sizes[i]);
      if (inside) row += at * static_cast<int64_t>(map.strides[i - 1]);
    }
    for (int e = 0; e < unit_elements && inside; ++e) {
      const int64_t at = start[0] + unit % row_units * unit_elements + e;
      if (at < 0 || at >= static_cast<int64_t>(map.sizes[0])) continue;
      function(unit, e * map.element_bytes, row + at * map.element_bytes);
    }
  }
}

// The box's address in shared memory.
uint32_t checked_box(const TensorMap& map, const void* shared, const char* what, Where where) {
  if (const char* problem = check_tensor_map(map))
    fail(std::string("tensor map: ") + problem, where);
  return shared_address(shared, box_units(map) * 16, 128, what, where);
}

std::byte* unit_at(const TensorMap& map, uint32_t box, uint32_t unit, Where where) {
  return shared_pointer(swizzled(box + unit * 16, map.swizzle_bytes), 16, 16, "TMA", where);
}

}  // namespace

void tma_load(const TensorMap& map, uint64_t* barrier, void* shared, const int32_t* coordinates,
              Where where) {
  const uint32_t address = checked_box(map, shared, "TMA load", where), units = box_units(map);
  load(barrier, "TMA load", where);
  check_access(shared, units * 16, Races::Kind::kWrite, where);
  Races::Clock issued;
  races().release(thread_number(), issued);
  std::fill_n(static_cast<std::byte*>(shared), units * 16, kPoison);
  async_wrote(static_cast<std::byte*>(shared), units * 16);
  const BoxStart start = box_start(map, coordinates);
  land_later([=] {
    std::byte* const box = shared_pointer(address, units * 16, 128, "TMA load", where);
    std::fill_n(box, units * 16, std::byte{0});
    for_each_element(map, start, [&](uint32_t unit, int byte, const std::byte* element) {
      std::memcpy(unit_at(map, address, unit, where) + byte, element, map.element_bytes);
    });
    async_wrote(box, units * 16);
    Races::join(phase_clocks(barrier).running, issued);
    add_bytes(barrier, -static_cast<int64_t>(units) * 16, "TMA load", where);
  });
}

// As late as may be: a thread that does not wait finds nothing stored.
void tma_store(const TensorMap& map, const void* shared, const int32_t* coordinates, Where where) {
  const uint32_t address = checked_box(map, shared, "TMA store", where), units = box_units(map);
  check_access(shared, units * 16, Races::Kind::kRead, where);
  async_reads(static_cast<const std::byte*>(shared), units * 16, "TMA store", where);
  const BoxStart start = box_start(map, coordinates);
  for_each_element(map, start, [&](uint32_t, int, const std::byte* element) {
    check_access(element, map.element_bytes, Races::Kind::kWrite, where);
  });
  thread_stores().open.emplace_back([=] {
    for_each_element(map, start, [&](uint32_t unit, int byte, const std::byte* element) {
      std::memcpy(const_cast<std::byte*>(element), unit_at(map, address, unit, where) + byte,
                  map.element_bytes);
    });
  });
}

void tma_store_commit() { thread_stores().commit(); }

void tma_store_wait_read() { thread_stores().wait(0); }

// ---- wgmma

namespace {

// What registers of a product hold while it is under way: a NaN that nothing else makes.
const float kInFlight = std::bit_cast<float>(0x7fc0deadU);

// Accumulators [64, n] of products under way.
struct Accumulators {
  std::array<float*, 128> registers;  // n / 2 of each thread
  int n;
  std::vector<float> values;
  int64_t last_product;
  std::array<bool, 4> delivered{};  // to which warps
};

struct QueuedProduct {
  Product product;
  std::shared_ptr<Accumulators> accumulators;
  std::vector<float> a;  // [64, 16], where it comes from registers
  Where where;
};

// Element i of thread t's accumulators of a product.
int row_of(int t, int i) { return t / 32 * 16 + t % 32 / 4 + i / 2 % 2 * 8; }
int column_of(int t, int i) { return i / 4 * 8 + t % 4 * 2 + i % 2; }

}  // namespace

struct WarpgroupProducts {
  std::deque<QueuedProduct> queue;  // not yet computed, in order
  std::vector<std::shared_ptr<Accumulators>> in_flight;
  int64_t issued = 0, computed = 0;  // numbers of products, from 1
  struct OfWarp {
    std::vector<int64_t> groups;  // the number of products that were issued at each commit
    bool fenced = false;
  };
  std::array<OfWarp, 4> warps;
};

namespace {

WarpgroupProducts& products() {
  std::shared_ptr<WarpgroupProducts>& mine = warpgroup_products();
  if (mine == nullptr) mine = std::make_shared<WarpgroupProducts>();
  return *mine;
}

// The 16-byte units of an operand [extent, 16] in shared memory, extent being M or N:
// function(data, row, column) of the first of 8 elements along the contiguous dimension.
template <typename Function>
void for_each_unit(uint64_t descriptor, int extent, bool transposed, Where where,
                   Function function) {
  constexpr std::array<uint32_t, 4> kSwizzles = {0, 128, 64, 32};
  const uint32_t start = static_cast<uint32_t>(descriptor & 0x3fff) << 4;
  const uint32_t leading = static_cast<uint32_t>(descriptor >> 16 & 0x3fff) << 4;
  const uint32_t stride = static_cast<uint32_t>(descriptor >> 32 & 0x3fff) << 4;
  const uint32_t swizzle = kSwizzles[descriptor >> 62];
  if ((descriptor & 0x3fffc000c000c000U) != 0) {
    fail("wgmma: a descriptor with a base offset or bits that mean nothing", where);
  }
  // A unit is 8 elements along the contiguous dimension. Without swizzle a row of the 8 x 16 byte
  // core matrix is one unit, with it a row has `swizzle` bytes.
  const uint32_t row_bytes = std::max(swizzle, 16U);
  const uint32_t row_units = row_bytes / 16;
  const int contiguous = transposed ? extent : 16, other = transposed ? 16 : extent;
  for (int row = 0; row < other; ++row) {
    for (int unit = 0; unit < contiguous / 8; ++unit) {
      const uint32_t in_row = unit % row_units * 16, beyond = unit / row_units;
      uint32_t address = start + row % 8 * row_bytes + in_row;
      if (transposed) {
        address += beyond * (swizzle == 0 ? stride : leading) +
                   row / 8 * (swizzle == 0 ? leading : stride);
      } else {
        address = start + row % 8 * row_bytes + row / 8 * stride +
                  (swizzle == 0 ? unit * leading : unit * 16);
      }
      function(shared_pointer(swizzled(address, swizzle), 16, 16, "wgmma", where),
               transposed ? unit * 8 : row, transposed ? row : unit * 8);
    }
  }
}

std::vector<float> load_operand(uint64_t descriptor, int extent, bool transposed, Element type,
                                Where where) {
  std::vector<float> operand(static_cast<size_t>(extent) * 16);
  for_each_unit(descriptor, extent, transposed, where,
                [&](const std::byte* data, int row, int column) {
                  async_reads(data, 16, "wgmma", where);
                  for (int e = 0; e < 8; ++e) {
                    uint16_t bits;
                    std::memcpy(&bits, data + e * 2, 2);
                    operand[row * 16 + column + e * (transposed ? 16 : 1)] = to_float(type, bits);
                  }
                });
  return operand;
}

void check_operand(uint64_t descriptor, int extent, bool transposed, Where where) {
  for_each_unit(descriptor, extent, transposed, where, [&](const std::byte* data, int, int) {
    check_access(data, 16, Races::Kind::kRead, where, By::kProducts);
  });
}

void compute_next(WarpgroupProducts& group) {
  const QueuedProduct next = std::move(group.queue.front());
  group.queue.pop_front();
  ++group.computed;
  const Product& product = next.product;
  const int n = product.n;
  const std::vector<float> a =
      product.a_registers != nullptr
          ? next.a
          : load_operand(product.a, 64, product.a_transposed, product.type, next.where);
  const std::vector<float> b =
      load_operand(product.b, n, product.b_transposed, product.type, next.where);
  std::vector<float> b_rows(b.size());  // [16, n]
  for (int j = 0; j < n; ++j) {
    for (int k = 0; k < 16; ++k) b_rows[k * n + j] = b[j * 16 + k];
  }
  std::vector<float>& d = next.accumulators->values;
  if (!product.accumulate) std::fill(d.begin(), d.end(), 0.0F);
  for (int i = 0; i < 64; ++i) {
    for (int k = 0; k < 16; ++k) {
      const float factor = a[i * 16 + k];
      for (int j = 0; j < n; ++j) d[i * n + j] += factor * b_rows[k * n + j];
    }
  }
}

// The accumulators of these registers: those under way, or taken from the registers now.
std::shared_ptr<Accumulators> take_registers(WarpgroupProducts& group,
                                             const Product* const* threads, Where where) {
  const int n = threads[0]->n;
  for (const auto& accumulators : group.in_flight) {
    int same = 0, delivered = 0;
    for (int t = 0; t < 128; ++t) {
      if (accumulators->registers[t] != threads[t]->d) continue;
      ++same;
      if (accumulators->delivered[t / 32]) ++delivered;
    }
    if (same == 0 || delivered == same) continue;
    if (same != 128 || delivered != 0 || accumulators->n != n) {
      fail("wgmma: registers are under way in part, or as those of another shape", where);
    }
    return accumulators;
  }
  auto taken = std::make_shared<Accumulators>();
  taken->n = n;
  taken->values.resize(static_cast<size_t>(64) * n);
  for (int t = 0; t < 128; ++t) {
    if (!group.warps[t / 32].fenced) fail("wgmma without wgmma.fence before it", where);
    taken->registers[t] = threads[t]->d;
    for (int i = 0; i < n / 2; ++i) {
      taken->values[row_of(t, i) * n + column_of(t, i)] = threads[t]->d[i];
    }
    std::fill_n(threads[t]->d, n / 2, kInFlight);
  }
  group.in_flight.push_back(taken);
  return taken;
}

void deliver(WarpgroupProducts& group, int warp, int64_t through, Where where) {
  for (const auto& accumulators : group.in_flight) {
    if (accumulators->last_product > through || accumulators->delivered[warp]) continue;
    for (int t = warp * 32; t < warp * 32 + 32; ++t) {
      float* registers = accumulators->registers[t];
      for (int i = 0; i < accumulators->n / 2; ++i) {
        if (std::bit_cast<uint32_t>(registers[i]) != std::bit_cast<uint32_t>(kInFlight)) {
          fail("wgmma: a register of d was written while the product was under way", where);
        }
        registers[i] = accumulators->values[row_of(t, i) * accumulators->n + column_of(t, i)];
      }
    }
    accumulators->delivered[warp] = true;
  }
  std::erase_if(group.in_flight, [](const auto& accumulators) {
    return accumulators->delivered == std::array<bool, 4>{true, true, true, true};
  });
}

constexpr uint32_t kAllLanes = 0xffffffffu;

// `function(products, the warp's number in its warpgroup)`, once a warp.
template <typename Function>
void once_a_warp(const char* what, Function function, Where where) {
  int warp = thread_number() % 128 / 32;
  at_warp(
      kAllLanes, what, warp, [&](int* const* lanes) { function(products(), *lanes[0]); }, where);
}

}  // namespace

void wgmma(const Product& product, Where where) {
  Product mine = product;
  at_warpgroup(
      "wgmma", mine,
      [where](Product* const* threads) {
        WarpgroupProducts& group = products();
        const Product& first = *threads[0];
        QueuedProduct queued{first, nullptr, {}, where};
        if (first.a_registers != nullptr) queued.a.resize(64 * 16);
        for (int t = 0; t < 128; ++t) {
          const Product& own = *threads[t];
          if (own.a != first.a || own.b != first.b || own.n != first.n ||
              own.accumulate != first.accumulate) {
            fail("wgmma: threads of the warpgroup give different descriptors", where);
          }
          for (int i = 0; i < 8 && own.a_registers != nullptr; ++i) {
            const int row = t / 32 * 16 + t % 32 / 4 + i / 2 % 2 * 8;
            const int column = t % 4 * 2 + i / 4 * 8 + i % 2;
            queued.a[row * 16 + column] =
                to_float(own.type, own.a_registers[i / 2] >> i % 2 * 16 & 0xffff);
          }
        }
        queued.accumulators = take_registers(group, threads, where);
        queued.accumulators->last_product = ++group.issued;
        races().start_product(races().warpgroup(thread_number()));
        if (first.a_registers == nullptr) check_operand(first.a, 64, first.a_transposed, where);
        check_operand(first.b, first.n, first.b_transposed, where);
        group.queue.push_back(std::move(queued));
        while (!group.queue.empty() && random_below(4) == 0) compute_next(group);
      },
      where);
}

void wgmma_fence(Where where) {
  once_a_warp(
      "wgmma.fence", [](WarpgroupProducts& group, int warp) { group.warps[warp].fenced = true; },
      where);
}

void wgmma_commit(Where where) {
  once_a_warp(
      "wgmma.commit_group",
      [](WarpgroupProducts& group, int warp) { group.warps[warp].groups.push_back(group.issued); },
      where);
}

void wgmma_wait(int groups, Where where) {
  once_a_warp(
      "wgmma.wait_group",
      [groups, where](WarpgroupProducts& group, int warp) {
        auto& own = group.warps[warp];
        const ptrdiff_t finished = std::ssize(own.groups) - groups;
        if (finished <= 0) return;
        const int64_t through = own.groups[finished - 1];
        own.groups.erase(own.groups.begin(), own.groups.begin() + finished);
        while (group.computed < through) compute_next(group);
        deliver(group, warp, through, where);
        races().acquire_products(thread_number() / 32, through);
        own.fenced = false;
      },
      where);
}

}  // namespace cuda_emulator
