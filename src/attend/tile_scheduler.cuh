// Which row of the index a CTA of attend works on next. Long rows come first, so that the
// last ones to finish are short; rows are taken section by section, a section being as many K/V
// heads of a sequence as the L2 cache holds, and within a section the heads of one K/V head and
// near rows stay together.
//
// A persistent CTA starts with item `blockIdx.x` and draws the next ones from a counter.
#ifndef FLEXPREFILL_SRC_ATTEND_TILE_SCHEDULER_CUH_
#define FLEXPREFILL_SRC_ATTEND_TILE_SCHEDULER_CUH_

#include <algorithm>
#include <cstdint>

#include "arena.h"
#include "cuda/device_problem.h"
#include "cuda/launch.cuh"

namespace flexprefill {

// One row of the index: a query block of a query head.
struct alignas(16) WorkItem {
  int32_t sequence, head;
  int32_t q_row;   // counts from the sequence's first query block
  int32_t blocks;  // kept key blocks
};

struct WorkOrder {
  WorkItem* items = nullptr;     // [count]; nullptr: every causal block, order by formula
  uint32_t* counter = nullptr;   // items drawn beyond the first of each CTA
  uint32_t count = 0;            // items, some of them gaps where the order is by formula
  int32_t section_kv_heads = 1;  // K/V heads of a section; the last of a sequence may have fewer
  int32_t sections = 1;          // of a sequence
};

// The i-th item of a section if rows were as long as they can be; false where there is none.
// `blocks` counts every causal block.
__device__ inline bool section_item(const DeviceProblem& problem, const WorkOrder& order,
                                    int32_t sequence_index, int32_t section, uint32_t i,
                                    WorkItem& item) {
  const DeviceSequence& sequence = problem.sequences[sequence_index];
  const int32_t first_kv = section * order.section_kv_heads;
  const uint32_t heads = min(order.section_kv_heads, problem.h_kv - first_kv) * problem.group();
  const uint32_t from_last = i / heads, head = i % heads;
  if (from_last >= static_cast<uint32_t>(sequence.n_q)) return false;
  item.sequence = sequence_index;
  item.head = problem.q_head(first_kv + static_cast<int32_t>(head) / problem.group(),
                             static_cast<int32_t>(head) % problem.group());
  item.q_row = sequence.n_q - 1 - static_cast<int32_t>(from_last);
  item.blocks = sequence.first_q_block + item.q_row + 1;
  return true;
}

// Item t < order.count; false: a gap.
__device__ inline bool work_item(const DeviceProblem& problem, const WorkOrder& order, uint32_t t,
                                 WorkItem& item) {
  if (order.items != nullptr) {
    const int4 packed = *reinterpret_cast<const int4*>(order.items + t);
    item = {packed.x, packed.y, packed.z, packed.w};
    return true;
  }
  const uint32_t section_size = problem.max_n_q * order.section_kv_heads * problem.group();
  const uint32_t section = t / section_size;
  return section_item(problem, order, section / order.sections, section % order.sections,
                      t % section_size, item);
}

constexpr int kOrderThreads = 512;
constexpr int kOrderBuckets = 256;

// One CTA a section: a counting sort of its rows by their number of kept blocks.
template <int kThreads>
__global__ void __launch_bounds__(kThreads)
    order_rows(DeviceProblem problem, DeviceRows rows, WorkOrder order) {
  await_previous_kernel();
  start_next_kernel();
  const int32_t s = static_cast<int32_t>(blockIdx.x) / order.sections;
  const int32_t section = static_cast<int32_t>(blockIdx.x) % order.sections;
  const DeviceSequence sequence = problem.sequences[s];
  const int32_t first_head = section * order.section_kv_heads * problem.group();
  const uint32_t n_rows =
      min(order.section_kv_heads * problem.group(), problem.h_q - first_head) * sequence.n_q;
  auto* size = reinterpret_cast<uint32_t*>(shared_memory());  // [buckets]
  uint32_t* next = size + kOrderBuckets;                      // [buckets]

  const auto counted_item = [&](uint32_t i) {
    WorkItem item{};
    section_item(problem, order, s, section, i, item);
    const uint64_t* words = rows.row(sequence, item.head, item.q_row);
    item.blocks = 0;
    for (int32_t w = 0; w < sequence.words_per_row; ++w) item.blocks += __popcll(words[w]);
    return item;
  };
  const auto bucket_of = [&](const WorkItem& item) {  // the longest rows in bucket 0
    const int64_t share = static_cast<int64_t>(item.blocks) * (kOrderBuckets - 1) / sequence.n_kv;
    return kOrderBuckets - 1 - static_cast<int32_t>(share);
  };

  if (blockIdx.x == 0 && threadIdx.x == 0) *order.counter = 0;
  for (uint32_t b = threadIdx.x; b < kOrderBuckets; b += kThreads) size[b] = 0;
  __syncthreads();
  for (uint32_t i = threadIdx.x; i < n_rows; i += kThreads) {
    atomicAdd(&size[bucket_of(counted_item(i))], 1u);
  }
  __syncthreads();
  if (threadIdx.x < 32) {  // one warp: running sums of eight buckets a lane
    constexpr uint32_t kEach = kOrderBuckets / 32;
    const uint32_t first = threadIdx.x * kEach;
    uint32_t own = 0;
    for (uint32_t b = first; b < first + kEach; ++b) own += size[b];
    uint32_t through = own;
    for (uint32_t lanes = 1; lanes < 32; lanes *= 2) {
      const uint32_t lower = __shfl_up_sync(0xffffffff, through, lanes);
      if (threadIdx.x >= lanes) through += lower;
    }
    uint32_t before = through - own;
    for (uint32_t b = first; b < first + kEach; ++b) {
      next[b] = before;
      before += size[b];
    }
  }
  __syncthreads();
  WorkItem* items =
      order.items + sequence.first_row + static_cast<int64_t>(first_head) * sequence.n_q;
  for (uint32_t i = threadIdx.x; i < n_rows; i += kThreads) {
    const WorkItem item = counted_item(i);
    items[atomicAdd(&next[bucket_of(item)], 1u)] = item;
  }
}

// Where the order is by formula, all that there is to do. A template because this is a header.
template <typename Counter>
__global__ void clear_counter(Counter* counter) {
  await_previous_kernel();
  start_next_kernel();
  *counter = 0;
}

// Takes the order's memory; `bits` says whether rows are given by bits (`items` are then made).
// `l2_bytes`: of the device.
inline WorkOrder take_work_order(const DeviceProblem& problem, bool bits, int64_t l2_bytes,
                                 Arena& arena) {
  WorkOrder order;
  const int64_t kv_head_bytes =
      int64_t{2} * problem.max_n_kv * problem.block_size * (int64_t{problem.d_qk} + problem.d_v);
  const int64_t fit = std::clamp<int64_t>(l2_bytes / 4 / std::max<int64_t>(kv_head_bytes, 1), 1,
                                          std::max(problem.h_kv, 1));
  order.sections = static_cast<int32_t>((problem.h_kv + fit - 1) / fit);
  order.section_kv_heads = (problem.h_kv + order.sections - 1) / std::max(order.sections, 1);
  const int64_t count = bits ? problem.index_rows
                             : int64_t{problem.b} * order.sections * problem.max_n_q *
                                   order.section_kv_heads * problem.group();
  if (count > INT32_MAX) {
    throw Error(ErrorCode::kUnsupported, "attend on CUDA takes fewer than 2^31 rows of blocks");
  }
  order.count = static_cast<uint32_t>(count);
  order.counter = arena.take<uint32_t>(1);
  // A size query does not know whether there will be bits.
  if (bits || arena.counting()) order.items = arena.take<WorkItem>(problem.index_rows);
  return order;
}

// Fills the order on the stream; `rows` are those it was taken for.
inline void make_work_order(const DeviceProblem& problem, const DeviceRows& rows,
                            const WorkOrder& order, void* stream) {
  if (order.items == nullptr) {
    launch_overlapped(clear_counter<uint32_t>, dim3(1), dim3(1), 0, stream, order.counter);
    return;
  }
  launch_overlapped(order_rows<kOrderThreads>, dim3(problem.b * order.sections),
                    dim3(kOrderThreads), 2 * kOrderBuckets * sizeof(uint32_t), stream, problem,
                    rows, order);
}

}  // namespace flexprefill

#endif  // FLEXPREFILL_SRC_ATTEND_TILE_SCHEDULER_CUH_
