// attend on the CPU. A task is one query block of one head, or of some that share K and V: its
// queries are packed once, then every kept key block goes through scores, online softmax and the
// product with V, panel by panel.
//
//   packed_q  [heads][panels][d_qk, panel]           once a task
//   keys      [block, d_qk], values [block, d_v]     loaded (converted) once a task and block
//   s         [block, panel]                         scores, then weights, of one panel
//   o         [heads][panels][d_v, panel]            fp32, with max and sum of the softmax
//
// Only blocks on the diagonal, at the end of the keys and at the edges of a token window are
// masked. There a key that some queries do not see may hold a NaN, which a weight of 0 would not
// keep out of their output: rows of V that are not finite are set aside and added query by query.
// With mean_correction the blocks that a row has dropped follow as one key each, the block's means,
// with log2(B) added to the score: tiles of up to kMaxKeys blocks, without a mask.
// What bounds it, and what was tried: docs/cpu.md.
#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <optional>
#include <vector>

#include "backend.h"
#include "cpu/parallel.h"
#include "cpu/tile_ops.h"
#include "math.h"
#include "select/select_blocks_cpu.h"

namespace flexprefill {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr double kLn2 = 0.69314718055994530942;
constexpr double kLog2E = 1.44269504088896340736;
constexpr int kMaxSharedHeads = 4;  // what they need besides K and V fits a second-level cache

// One worker's memory.
struct Scratch {
  std::byte* packed_q;
  std::byte* keys;
  std::byte* values;
  float* s;
  float* o;
  float* max;
  float* sum;
  int64_t n_kv;  // key blocks at most: the room of a head's blocks, and of those it has dropped
  int32_t* blocks;
  int32_t* dropped;
  float* mean;
};

int panels_of(int64_t n_queries, const TileOps& ops) {
  return static_cast<int>(ceil_div(n_queries, ops.panel));
}

Scratch take_scratch(const Problem& problem, const TileOps& ops, int heads, bool means,
                     Arena& arena) {
  const int panels = heads * panels_of(problem.block_size, ops);
  int64_t n_kv = 0;
  for (const BlockGrid& grid : problem.grids) n_kv = std::max(n_kv, grid.n_kv);
  return {.packed_q = arena.take<std::byte>(panels * ops.packed_q_bytes(problem.d_qk)),
          .keys = arena.take<std::byte>(ops.key_bytes(problem.d_qk)),
          .values = arena.take<std::byte>(ops.value_bytes(problem.d_v)),
          .s = arena.take<float>(TileOps::kMaxKeys * ops.panel),
          .o = arena.take<float>(panels * TileOps::output_rows(problem.d_v) * ops.panel),
          .max = arena.take<float>(panels * ops.panel),
          .sum = arena.take<float>(panels * ops.panel),
          .n_kv = n_kv,
          .blocks = arena.take<int32_t>(heads * n_kv),
          .dropped = arena.take<int32_t>(means ? heads * n_kv : 0),
          .mean = arena.take<float>(means ? std::max(problem.d_qk, problem.d_v) : 0)};
}

// Tasks that the heads of a group are divided into, for one query block. Heads of a task share the
// loaded blocks of K and V. More tasks than need be where workers would have few, and where the
// scratch of all workers would be more than a twentieth of q, k and v; a task has at least one
// head.
int tasks_a_group(const Problem& problem, const TileOps& ops, int workers, bool means) {
  constexpr int kTasksAWorker = 8;
  constexpr size_t kLittle = size_t{2} << 20;  // bytes that short prompts may have anyway
  size_t elements = 0;
  for (const SequenceLengths& lengths : problem.lengths) {
    elements += lengths.s_q * problem.h_q * problem.d_qk +
                lengths.s_kv * problem.h_kv * (problem.d_qk + problem.d_v);
  }
  const size_t room = std::max(elements * element_size(problem.dtype) / 20, kLittle);
  const int64_t groups = problem.first_row.back() / problem.group();
  const auto fits = [&](int tasks) {
    Arena arena;
    take_scratch(problem, ops, static_cast<int>(ceil_div(problem.group(), tasks)), means, arena);
    return tasks * groups >= kTasksAWorker * workers && arena.bytes() * workers <= room;
  };
  int tasks = static_cast<int>(ceil_div(problem.group(), kMaxSharedHeads));
  while (tasks < problem.group() && !fits(tasks)) ++tasks;
  return tasks;
}

// Means of the whole key blocks of every sequence and K/V head, in the element type.
class BlockMeans {
 public:
  BlockMeans(const Problem& problem, Arena& arena) : problem_(problem) {
    first_.assign(1, 0);
    for (const BlockGrid& grid : problem.grids) {
      first_.push_back(first_.back() + problem.h_kv * grid.n_kv);
    }
    k_ = arena.take<std::byte>(first_.back() * bytes(problem.d_qk));
    v_ = arena.take<std::byte>(first_.back() * bytes(problem.d_v));
  }
  // Of sequence s; one K/V head and block after the other. mean: scratch [d_qk or d_v].
  void fill(const SelectOps& ops, int64_t task, float* mean) const {
    const auto next = std::upper_bound(first_.begin(), first_.end(), task);
    const int64_t s = next - first_.begin() - 1;
    const int64_t n_kv = problem_.grids[s].n_kv, at = task - first_[s];
    const RowRange keys{at % n_kv * problem_.block_size, (at % n_kv + 1) * problem_.block_size};
    if (keys.end > problem_.lengths[s].s_kv) return;  // no row drops it
    const auto head = static_cast<int32_t>(at / n_kv);
    store(ops, problem_.k(s, head), keys, problem_.d_qk, mean, k_ + task * bytes(problem_.d_qk));
    store(ops, problem_.v(s, head), keys, problem_.d_v, mean, v_ + task * bytes(problem_.d_v));
  }
  int64_t tasks() const { return first_.back(); }
  RowView k(int64_t s, int32_t kv) const { return rows(k_, problem_.d_qk, s, kv); }
  RowView v(int64_t s, int32_t kv) const { return rows(v_, problem_.d_v, s, kv); }

 private:
  int64_t bytes(int32_t d) const { return static_cast<int64_t>(d * element_size(problem_.dtype)); }
  RowView rows(std::byte* base, int32_t d, int64_t s, int32_t kv) const {
    RowView view;
    view.row_stride = bytes(d);
    view.base = base + (first_[s] + kv * problem_.grids[s].n_kv) * view.row_stride;
    return view;
  }
  void store(const SelectOps& ops, const RowView& view, RowRange keys, int32_t d, float* mean,
             std::byte* to) const {
    mean_rows(ops, view, keys, d, problem_.dtype, mean);
    for (int32_t c = 0; c < d; ++c) {
      store_float(to + c * element_size(problem_.dtype), problem_.dtype, mean[c]);
    }
  }

  const Problem& problem_;
  std::vector<int64_t> first_;  // [b + 1]
  std::byte* k_ = nullptr;
  std::byte* v_ = nullptr;
};

// inf and NaN have all exponent bits set.
template <typename Bits>
bool is_finite_row(const std::byte* row, int d, Bits exponent) {
  const auto* bits = reinterpret_cast<const Bits*>(row);
  Bits found = 0;
  for (int c = 0; c < d; ++c) found |= static_cast<Bits>((bits[c] & exponent) == exponent);
  return found == 0;
}

bool is_finite_row(const std::byte* row, int d, DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return is_finite_row<uint32_t>(row, d, 0x7f800000);
    case DType::kFloat16:
      return is_finite_row<uint16_t>(row, d, 0x7c00);
    default:
      return is_finite_row<uint16_t>(row, d, 0x7f80);
  }
}

// The query heads [first_head, first_head + heads) of a group, counted within it.
class Task {
 public:
  // means: nullptr, or with rows.mean_correction
  Task(const Problem& problem, const BlockRows& rows, const TileOps& ops, const Scratch& scratch,
       const BlockMeans* means, int64_t sequence, int32_t kv, int32_t first_head, int heads,
       int64_t q_row)
      : problem_(problem),
        window_(rows.window),
        ops_(ops),
        scratch_(scratch),
        k_(problem.k(sequence, kv)),
        v_(problem.v(sequence, kv)),
        s_kv_(problem.lengths[sequence].s_kv),
        n_heads_(heads) {
    const int64_t offset = s_kv_ - problem.lengths[sequence].s_q;  // position of query row 0
    const int64_t block = problem.grids[sequence].first_q_block + q_row;
    first_ = std::max(block * problem.block_size, offset);
    n_queries_ = static_cast<int>(std::min((block + 1) * problem.block_size, s_kv_) - first_);
    first_row_ = first_ - offset;
    panels_ = panels_of(n_queries_, ops);
    for (int h = 0; h < heads; ++h) {
      Head& head = heads_[h];
      head.number = problem.q_head(kv, first_head + h);
      head.blocks = scratch.blocks + h * scratch.n_kv;
      head.n_blocks = rows.decode(problem, sequence, head.number, q_row, head.blocks);
      if (means == nullptr) continue;
      head.dropped = scratch.dropped + h * scratch.n_kv;
      head.n_dropped = dropped_blocks(head.blocks, head.n_blocks, block, head.dropped);
    }
    if (means != nullptr) {
      k_means_ = means->k(sequence, kv);
      v_means_ = means->v(sequence, kv);
    }
    const float scale = static_cast<float>(problem.scale * kLog2E);
    // `weigh` takes the maximum before it scales, which needs a positive scale.
    scores_scale_ = scale > 0 ? 1 : scale;
    weigh_scale_ = scale > 0 ? scale : 1;
  }

  void run(int64_t sequence) {
    for (int p = 0; p < n_heads_ * panels_; ++p) {
      begin_panel(p, problem_.q(sequence, heads_[p / panels_].number));
    }
    std::array<int64_t, kMaxSharedHeads> at{};  // the next entry of each head's row
    for (int32_t block = next_block(at); block != kNoBlock;) {
      load_block(block);
      std::array<int, kMaxSharedHeads> keeping;
      int n = 0;
      for (int h = 0; h < n_heads_; ++h) {
        if (at[h] == heads_[h].n_blocks || heads_[h].blocks[at[h]] != block) continue;
        ++at[h];
        keeping[n++] = h;
      }
      const int32_t next = next_block(at);
      for (int i = 0; i < n * panels_; ++i) {
        if (next != kNoBlock) prefetch(next, i, n * panels_);
        attend_panel(keeping[i / panels_] * panels_ + i % panels_);
      }
      block = next;
    }
    for (int h = 0; h < n_heads_; ++h) attend_dropped(h);
    for (int p = 0; p < n_heads_ * panels_; ++p) {
      const int32_t head = heads_[p / panels_].number;
      finish_panel(p, problem_.out(sequence, head), problem_.lse(sequence, head));
    }
  }

 private:
  struct Head {
    int32_t number = 0;
    int32_t* blocks = nullptr;
    int64_t n_blocks = 0;
    int32_t* dropped = nullptr;  // blocks that count through their means
    int64_t n_dropped = 0;
  };
  static constexpr int32_t kNoBlock = std::numeric_limits<int32_t>::max();

  // The least block that a head still has to attend to.
  int32_t next_block(const std::array<int64_t, kMaxSharedHeads>& at) const {
    int32_t block = kNoBlock;
    for (int h = 0; h < n_heads_; ++h) {
      if (at[h] < heads_[h].n_blocks) block = std::min(block, heads_[h].blocks[at[h]]);
    }
    return block;
  }

  // Panels are numbered through all heads; first_lane: of the panel's queries in the block.
  int first_lane(int p) const { return p % panels_ * ops_.panel; }
  int lanes(int p) const { return std::min(ops_.panel, n_queries_ - first_lane(p)); }
  int64_t first_position(int p) const { return first_ + first_lane(p); }
  std::byte* packed_q(int p) const {
    return scratch_.packed_q + p * ops_.packed_q_bytes(problem_.d_qk);
  }
  float* o(int p) const { return scratch_.o + p * TileOps::output_rows(problem_.d_v) * ops_.panel; }
  float* max(int p) const { return scratch_.max + p * ops_.panel; }
  float* sum(int p) const { return scratch_.sum + p * ops_.panel; }

  void begin_panel(int p, RowView q) {
    ops_.pack_q(q.row(first_row_ + first_lane(p)), q.row_stride, lanes(p), problem_.d_qk,
                packed_q(p));
    std::fill_n(o(p), TileOps::output_rows(problem_.d_v) * ops_.panel, 0.0f);
    std::fill_n(max(p), ops_.panel, TileOps::kNoMax);
    std::fill_n(sum(p), ops_.panel, 0.0f);
  }

  // The queries [begin, end) of panel p, by lane, that see `key`; a key past the last is seen by
  // none. Causality and the local window each cut off one side.
  struct Lanes {
    int begin, end;
  };
  Lanes seeing(int p, int64_t key) const {
    const int64_t first = first_position(p);
    if (key >= s_kv_) return {0, 0};
    const int64_t begin = std::max<int64_t>(key - first, 0);
    int64_t end = ops_.panel;
    if (window_.active() && key >= window_.global_window) {
      end = std::clamp<int64_t>(key + window_.local_window - first, 0, end);
    }
    return {static_cast<int>(std::min(begin, end)), static_cast<int>(end)};
  }

  // Whether every query of the task sees every key of the block.
  bool all_seen() const {
    const int64_t last_key = block_first_ + n_keys_ - 1, last_query = first_ + n_queries_ - 1;
    return last_key <= first_ && (!window_.active() || last_key < window_.global_window ||
                                  last_query - block_first_ < window_.local_window);
  }

  void load_block(int32_t block) {
    const int64_t size = problem_.block_size;
    block_first_ = block * size;
    n_keys_ = static_cast<int>(std::min(size, s_kv_ - block_first_));
    masked_ = !all_seen();
    n_aside_ = 0;
    for (int at = 0; at < n_keys_;) {
      const int64_t key = block_first_ + at;
      const int n = static_cast<int>(k_.run(key, n_keys_ - at));
      ops_.load_keys(k_.row(key), k_.row_stride, n, at, problem_.d_qk, scratch_.keys);
      ops_.load_values(v_.row(key), v_.row_stride, n, at, problem_.d_v, scratch_.values);
      at += n;
    }
    const int padded = pad(n_keys_);
    for (int at = n_keys_; at < padded; ++at) load_zero_value(at);
    if (masked_) set_aside();
  }

  // Brings part p of `parts` of a block's rows to the L2 cache, where load_block will look for
  // them.
  void prefetch(int32_t block, int p, int parts) const {
    const int64_t size = problem_.block_size;
    const int64_t first = block * size, n = std::min(size, s_kv_ - first);
    const auto lines = [&](const std::byte* row, int32_t d) {
      const auto bytes = static_cast<int64_t>(d * element_size(problem_.dtype));
      for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(row + b, 0, 2);
    };
    for (int64_t key = first + n * p / parts; key < first + n * (p + 1) / parts; ++key) {
      lines(k_.row(key), problem_.d_qk);
      lines(v_.row(key), problem_.d_v);
    }
  }

  int pad(int n) const { return (n + ops_.key_step - 1) / ops_.key_step * ops_.key_step; }

  void load_zero_value(int at) {
    alignas(4) static constexpr std::array<std::byte, 4 * TileOps::kMaxHeadDim> kZeros{};
    ops_.load_values(kZeros.data(), 0, 1, at, problem_.d_v, scratch_.values);
  }

  void set_aside() {
    for (int at = 0; at < n_keys_; ++at) {
      if (is_finite_row(v_.row(block_first_ + at), problem_.d_v, problem_.dtype)) continue;
      load_zero_value(at);
      aside_[n_aside_++] = at;
    }
  }

  void attend_panel(int p) {
    // Keys after the panel's last query are left out.
    const int64_t last = first_position(p) + lanes(p) - 1;
    const int n = static_cast<int>(std::min<int64_t>(n_keys_, last - block_first_ + 1));
    const int padded = pad(n);
    float* s = scratch_.s;
    if (ops_.attend != nullptr && scores_scale_ == 1 && n_aside_ == 0 &&
        !(masked_ && window_.active())) {
      const auto last_seen =
          static_cast<int>(std::min<int64_t>(first_position(p) - block_first_, TileOps::kMaxKeys));
      ops_.attend(packed_q(p), scratch_.keys, scratch_.values, padded, last_seen, problem_.d_qk,
                  problem_.d_v, weigh_scale_, s, max(p), sum(p), o(p));
      return;
    }
    ops_.scores(packed_q(p), scratch_.keys, 0, n, problem_.d_qk, s);
    if (scores_scale_ != 1) {
      for (int i = 0; i < n * ops_.panel; ++i) s[i] *= scores_scale_;
    }
    if (masked_ || n < padded) mask(p, padded);
    ops_.weigh(s, padded, weigh_scale_, problem_.d_v, max(p), sum(p), o(p));
    for (int e = 0; e < n_aside_ && aside_[e] < n; ++e) add_aside(p, aside_[e]);
    ops_.accumulate(s, scratch_.values, padded, problem_.d_v, o(p));
  }

  void attend_dropped(int h) {
    const Head& head = heads_[h];
    for (int64_t e = 0; e < head.n_dropped; e += TileOps::kMaxKeys) {
      const auto n = static_cast<int>(std::min<int64_t>(TileOps::kMaxKeys, head.n_dropped - e));
      load_means(head.dropped + e, n);
      for (int p = h * panels_; p < (h + 1) * panels_; ++p) attend_means(p, n);
    }
  }

  void load_means(const int32_t* blocks, int n) {
    for (int at = 0; at < n;) {
      int run = 1;
      while (at + run < n && blocks[at + run] == blocks[at] + run) ++run;
      ops_.load_keys(k_means_.row(blocks[at]), k_means_.row_stride, run, at, problem_.d_qk,
                     scratch_.keys);
      ops_.load_values(v_means_.row(blocks[at]), v_means_.row_stride, run, at, problem_.d_v,
                       scratch_.values);
      at += run;
    }
    for (int at = n; at < pad(n); ++at) load_zero_value(at);
  }

  void attend_means(int p, int n) {
    float* s = scratch_.s;
    ops_.scores(packed_q(p), scratch_.keys, 0, n, problem_.d_qk, s);
    const float bias = std::log2(static_cast<float>(problem_.block_size));
    const float scale = scores_scale_ * weigh_scale_;
    for (int i = 0; i < n * ops_.panel; ++i) s[i] = s[i] * scale + bias;
    std::fill(s + n * ops_.panel, s + pad(n) * ops_.panel, -kInfinity);
    ops_.weigh(s, pad(n), 1.0f, problem_.d_v, max(p), sum(p), o(p));
    ops_.accumulate(s, scratch_.values, pad(n), problem_.d_v, o(p));
  }

  void mask(int p, int padded) {
    // All see the keys up to the first query's own, but for a window.
    const int64_t first = window_.active() ? 0 : first_position(p) + 1 - block_first_;
    for (auto at = static_cast<int>(std::max<int64_t>(first, 0)); at < padded; ++at) {
      float* s = scratch_.s + at * ops_.panel;
      const Lanes seen = seeing(p, block_first_ + at);
      std::fill_n(s, seen.begin, -kInfinity);
      std::fill(s + seen.end, s + ops_.panel, -kInfinity);
    }
  }

  void add_aside(int p, int at) {
    const std::byte* row = v_.row(block_first_ + at);
    const size_t size = element_size(problem_.dtype);
    const float* weights = scratch_.s + at * ops_.panel;
    const Lanes seen = seeing(p, block_first_ + at);
    for (int c = 0; c < problem_.d_v; ++c) {
      const float value = load_float(row + c * size, problem_.dtype);
      float* to = o(p) + c * ops_.panel;
      for (int lane = seen.begin; lane < seen.end; ++lane) to[lane] += weights[lane] * value;
    }
  }

  bool sees_any(const Head& head, int64_t position) const {
    if (head.n_dropped > 0) return true;
    for (int64_t e = 0; e < head.n_blocks; ++e) {
      const int64_t first = head.blocks[e] * static_cast<int64_t>(problem_.block_size);
      for (int64_t key = first; key < std::min(first + problem_.block_size, s_kv_); ++key) {
        if (window_.sees(position, key)) return true;
      }
    }
    return false;
  }

  void finish_panel(int p, RowView out, float* lse) {
    const int n = lanes(p);
    float* sums = sum(p);
    const int64_t first_row = first_row_ + first_lane(p);
    for (int lane = 0; lane < n; ++lane) {
      double row_lse = max(p)[lane] * kLn2 + std::log(static_cast<double>(sums[lane]));
      // No weight at all: a query that sees no key gives 0, one whose scores are all -inf 0 / 0.
      if (sums[lane] == 0) {
        const bool nothing = !sees_any(heads_[p / panels_], first_position(p) + lane);
        row_lse = nothing ? -kInfinity : std::numeric_limits<float>::quiet_NaN();
        if (nothing) sums[lane] = 1;
      }
      if (lse != nullptr) lse[first_row + lane] = static_cast<float>(row_lse);
    }
    ops_.store(o(p), sums, n, problem_.d_v, out.row(first_row), out.row_stride);
  }

  const Problem& problem_;
  const TokenWindow window_;
  const TileOps& ops_;
  const Scratch& scratch_;
  const RowView k_, v_;
  const int64_t s_kv_;
  int64_t first_ = 0;      // position of the task's first query
  int64_t first_row_ = 0;  // its row in q, out and lse
  int n_queries_ = 0;
  int panels_ = 0;  // of a head
  int n_heads_;
  std::array<Head, kMaxSharedHeads> heads_;
  RowView k_means_, v_means_;
  float scores_scale_ = 1, weigh_scale_ = 1;
  // The key block in scratch.
  int64_t block_first_ = 0;
  int n_keys_ = 0;
  bool masked_ = false;
  std::array<int, TileOps::kMaxKeys> aside_;  // rows of V that are not finite
  int n_aside_ = 0;
};

}  // namespace

// Tasks are taken in this order: of a sequence, the long rows (its last query blocks) first, and
// the heads of one query block, which share K and V, one after another.
void attend_cpu(const Problem& problem, const BlockRows& rows, const Execution& execution,
                Arena& arena) {
  const TileOps& ops = tile_ops(execution.cpu_target, problem.dtype);
  const int most_workers = worker_count(execution);
  const int group_tasks = tasks_a_group(problem, ops, most_workers, rows.mean_correction);
  const int most_heads = static_cast<int>(ceil_div(problem.group(), group_tasks));
  const int64_t n_tasks = problem.first_row.back() / problem.group() * group_tasks;
  const auto workers = static_cast<int>(std::min<int64_t>(most_workers, n_tasks));
  std::vector<Scratch> scratch;
  for (int w = 0; w < workers; ++w) {
    scratch.push_back(take_scratch(problem, ops, most_heads, rows.mean_correction, arena));
  }
  std::optional<BlockMeans> means;
  if (rows.mean_correction) means.emplace(problem, arena);
  if (arena.counting()) return;
  if (means) {
    const SelectOps& select = select_ops(ops.target);
    parallel_tasks(workers, means->tasks(), [&](int worker, int64_t task) {
      means->fill(select, task, scratch[worker].mean);
    });
  }

  parallel_tasks(workers, n_tasks, [&](int worker, int64_t t) {
    const int64_t group_row = t / group_tasks;  // as rows, but one for all heads of a group
    const auto next = std::upper_bound(problem.first_row.begin(), problem.first_row.end(),
                                       group_row * problem.group());
    const int64_t sequence = next - problem.first_row.begin() - 1;
    const int64_t r = group_row - problem.first_row[sequence] / problem.group();
    const int64_t q_row = problem.grids[sequence].n_q - 1 - r / problem.h_kv;
    const auto part = static_cast<int32_t>(t % group_tasks);
    const int32_t first = part * problem.group() / group_tasks;
    const int32_t end = (part + 1) * problem.group() / group_tasks;
    Task task(problem, rows, ops, scratch[worker], means ? &*means : nullptr, sequence,
              static_cast<int32_t>(r % problem.h_kv), first, end - first, q_row);
    task.run(sequence);
  });
}

}  // namespace flexprefill
