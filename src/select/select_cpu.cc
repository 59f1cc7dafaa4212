// select on the CPU. Each sequence is done in waves of K/V heads; in a wave
//   pack      probe rows of each query head into panels                         task: head
//   pass 1    row max and sum of the probe's softmax; means of the key blocks   task: K/V head,
//   chunk pass 2    vertical and slash scores, mass of each key block                 task: K/V
//   head, chunk choose    pattern.h decides by the scores and writes the rows               task:
//   head map       query-aware heads: the block map, one head at a time              task: map row
//   audit     density and kept mass                                             task: head
// A pass reads K once for all query heads of its group, in chunks of a fixed size that are put
// together in order, so that nothing depends on the number of threads. No P x s_kv matrix is ever
// in memory: the probe's scores live for one tile of 128 keys by one panel of queries.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numbers>
#include <span>
#include <variant>

#include "backend.h"
#include "cpu/parallel.h"
#include "cpu/tile_ops.h"
#include "math.h"
#include "select/block_rules.h"
#include "select/pattern.h"
#include "select/select_blocks_cpu.h"
#include "select/select_cover_cpu.h"
#include "select/select_ops.h"
#include "select/select_rows.h"

namespace flexprefill {
namespace {

constexpr int64_t kTile = TileOps::kMaxKeys;
// Keys of a task, a multiple of kTile: the finer, the more partial slash scores there are.
constexpr int64_t kChunk = 1024;
// A wave has at least this many tasks for each worker, if there are that many.
constexpr int64_t kTasksPerWorker = 4;

// What a sequence needs of the buffers.
struct WaveSize {
  WaveSize(const Problem& problem, int64_t sequence, int workers) {
    const SequenceLengths lengths = problem.lengths[sequence];
    const BlockGrid& grid = problem.grids[sequence];
    chunks = ceil_div(lengths.s_kv, kChunk);
    kv_heads = static_cast<int32_t>(
        std::clamp<int64_t>(ceil_div(kTasksPerWorker * workers, chunks), 1, problem.h_kv));
    heads = static_cast<int64_t>(kv_heads) * problem.group();
    s_kv = lengths.s_kv;
    n_kv = grid.n_kv;
    map = causal_blocks(grid);
  }
  int32_t kv_heads = 0;
  int64_t heads = 0, chunks = 0, s_kv = 0, n_kv = 0, map = 0;
};

// What each worker has for itself.
struct WorkerBuffers {
  std::byte* keys;       // TileOps' operand
  float* scores;         // [kTile, panel]
  float *below, *above;  // [kTile, SelectOps::kMaxLanes]
  float* unused_slash;   // [kTile + panel]
  float* mean;           // [d]
  float* pooled;         // [n_kv]
  BlockChoice choice;    // [n_kv], [words]
  Histogram* histogram;
};

// All scratch of a call, sized for its largest wave.
class Buffers {
 public:
  Buffers(Arena& arena, const Problem& problem, const Pattern& pattern, const TileOps& tiles,
          int workers_)
      : workers(workers_),
        panels(ceil_div(problem.block_size, tiles.panel)),
        lanes(panels * tiles.panel) {
    int64_t heads = 0, head_chunks = 0, head_keys = 0, head_blocks = 0, kv_blocks = 0, blocks = 0,
            map_size = 0;
    for (int64_t s = 0; s < problem.b(); ++s) {
      if (stays_dense(problem.lengths[s], problem.block_size, pattern)) continue;
      const WaveSize wave(problem, s, workers);
      heads = std::max(heads, wave.heads);
      head_chunks = std::max(head_chunks, wave.heads * wave.chunks);
      head_keys = std::max(head_keys, wave.heads * wave.s_kv);
      head_blocks = std::max(head_blocks, wave.heads * wave.n_kv);
      kv_blocks = std::max(kv_blocks, wave.kv_heads * wave.n_kv);
      blocks = std::max(blocks, wave.n_kv);
      map_size = std::max(map_size, wave.map);
    }
    if (heads == 0) return;
    const bool by_blocks = std::holds_alternative<FlexPrefill>(pattern);
    packed_head = panels * static_cast<int64_t>(tiles.packed_q_bytes(problem.d_qk));
    packed = arena.take<std::byte>(heads * packed_head);
    chunk_max = arena.take<float>(head_chunks * lanes);
    chunk_sum = arena.take<float>(head_chunks * lanes);
    max = arena.take<float>(heads * lanes);
    inverse = arena.take<float>(heads * lanes);
    has_nan = arena.take<bool>(heads);
    vertical = arena.take<float>(head_keys);
    slash = arena.take<float>(head_keys);
    chunk_slash = arena.take<float>(head_chunks * (kChunk + lanes));
    block_mass = arena.take<float>(2 * head_blocks);
    choices = arena.take<HeadChoice>(heads);
    k_means = arena.take<float>(by_blocks ? kv_blocks * problem.d_qk : 0);
    map = arena.take<float>(by_blocks ? map_size : 0);
    per_worker = arena.take<WorkerBuffers>(workers);
    for (int w = 0; w < workers; ++w) {
      const WorkerBuffers buffers{
          .keys = arena.take<std::byte>(tiles.key_bytes(problem.d_qk)),
          .scores = arena.take<float>(kTile * tiles.panel),
          .below = arena.take<float>(kTile * SelectOps::kMaxLanes),
          .above = arena.take<float>(kTile * SelectOps::kMaxLanes),
          .unused_slash = arena.take<float>(kTile + tiles.panel),
          .mean = arena.take<float>(problem.d_qk),
          .pooled = arena.take<float>(blocks),
          .choice = {.vertical_block = arena.take<float>(blocks),
                     .slash_block = arena.take<float>(blocks),
                     .vertical_bits = arena.take<uint64_t>(ceil_div(blocks, 64)),
                     .slash_bits = arena.take<uint64_t>(ceil_div(blocks, 64))},
          .histogram = arena.take<Histogram>(1)};
      if (!arena.counting()) per_worker[w] = buffers;
    }
  }

  int workers;
  int64_t panels;           // of the probe
  int64_t lanes;            // of all panels
  int64_t packed_head = 0;  // bytes of a head's panels

  // heads, kv: of a wave
  std::byte* packed = nullptr;    // [heads, packed_head]
  float* chunk_max = nullptr;     // [heads, chunks, lanes]
  float* chunk_sum = nullptr;     // [heads, chunks, lanes]
  float* max = nullptr;           // [heads, lanes], in units of log2
  float* inverse = nullptr;       // [heads, lanes], 1 / (sum * P)
  bool* has_nan = nullptr;        // [heads]
  float* vertical = nullptr;      // [heads, s_kv]
  float* slash = nullptr;         // [heads, s_kv]
  float* chunk_slash = nullptr;   // [heads, chunks, kChunk + lanes]
  float* block_mass = nullptr;    // [heads, 2, n_kv]: of the probe's two query blocks
  HeadChoice* choices = nullptr;  // [heads]
  float* k_means = nullptr;       // [kv, n_kv, d]
  float* map = nullptr;           // [causal blocks of a head]
  WorkerBuffers* per_worker = nullptr;
};

// One wave: query heads 0 .. heads - 1, group by group, of `kv_heads` K/V heads of a sequence.
class Wave {
 public:
  Wave(const Problem& problem, const Pattern& pattern, const TileOps& tiles, const SelectOps& ops,
       const Buffers& buffers, const BlockScoreSelector& by_blocks, const BlockBits& bits,
       int64_t sequence, int32_t first_kv)
      : problem_(problem),
        pattern_(pattern),
        tiles_(tiles),
        ops_(ops),
        buffers_(buffers),
        by_blocks_(by_blocks),
        bits_(bits),
        sequence_(sequence),
        first_kv_(first_kv),
        size_(problem, sequence, buffers.workers),
        lengths_(problem.lengths[sequence]),
        grid_(problem.grids[sequence]),
        probe_(lengths_, problem.block_size),
        scale_(problem.scale * std::numbers::log2e_v<float>) {
    size_.kv_heads = std::min(size_.kv_heads, problem.h_kv - first_kv);
    size_.heads = static_cast<int64_t>(size_.kv_heads) * problem.group();
    if (const auto* window = std::get_if<StreamingLlm>(&pattern)) {
      global_keys_ = std::min(window->global_window, lengths_.s_kv);
    }
  }

  // audit: of all query heads of the sequence, or empty.
  void run(std::span<HeadAudit> audit) {
    const int64_t passes = size_.kv_heads * size_.chunks;
    parallel(size_.heads, [&](int, int64_t h) { pack(h); });
    parallel(passes, [&](int w, int64_t task) { pass_1(buffers_.per_worker[w], task); });
    parallel(size_.heads, [&](int, int64_t h) { finish_softmax(h); });
    parallel(passes, [&](int w, int64_t task) { pass_2(buffers_.per_worker[w], task); });
    parallel(size_.heads, [&](int w, int64_t h) { choose(buffers_.per_worker[w], h); });
    for (int64_t h = 0; h < size_.heads; ++h) {
      if (buffers_.choices[h].pattern == HeadPattern::kQueryAware) keep_map(h);
    }
    if (audit.empty()) return;
    parallel(size_.heads, [&](int, int64_t h) { audit[q_head(h)] = audit_head(h); });
  }

 private:
  template <typename Task>
  void parallel(int64_t n, const Task& task) const {
    parallel_tasks(buffers_.workers, n, task);
  }

  int32_t kv_of(int64_t h) const { return static_cast<int32_t>(h / problem_.group()); }
  int32_t q_head(int64_t h) const {
    return problem_.q_head(first_kv_ + kv_of(h), static_cast<int32_t>(h % problem_.group()));
  }
  HeadRows rows(int64_t h) const { return {problem_, bits_, sequence_, q_head(h)}; }
  float* vertical(int64_t h) const { return buffers_.vertical + h * lengths_.s_kv; }
  float* slash(int64_t h) const { return buffers_.slash + h * lengths_.s_kv; }
  float* k_means(int64_t kv) const { return buffers_.k_means + kv * grid_.n_kv * problem_.d_qk; }
  int64_t chunk_end(int64_t chunk) const { return std::min((chunk + 1) * kChunk, lengths_.s_kv); }
  int64_t chunk_number(int64_t h, int64_t chunk) const { return h * size_.chunks + chunk; }
  bool pools_blocks() const { return std::holds_alternative<FlexPrefill>(pattern_); }

  // ---- The probe ----------------------------------------------------------------------------

  void pack(int64_t h) const {
    const RowView q = problem_.q(sequence_, q_head(h));
    const auto panel_bytes = static_cast<int64_t>(tiles_.packed_q_bytes(problem_.d_qk));
    for (int64_t p = 0; p < buffers_.panels; ++p) {
      const int64_t first = p * tiles_.panel;
      const int64_t n = std::clamp<int64_t>(probe_.rows - first, 0, tiles_.panel);
      std::byte* to = buffers_.packed + h * buffers_.packed_head + p * panel_bytes;
      if (n == 0) {
        std::memset(to, 0, panel_bytes);
      } else {
        tiles_.pack_q(q.row(probe_.first_row + first), q.row_stride, static_cast<int>(n),
                      problem_.d_qk, to);
      }
    }
  }

  // body(first key, keys) for the tiles of a chunk, each loaded into the worker's operand. A tile
  // lies within 128 aligned keys, so blocks do not cross tiles, and on one side of the last
  // global key.
  template <typename Body>
  void for_each_tile(const WorkerBuffers& worker, int64_t kv, int64_t chunk,
                     const Body& body) const {
    const RowView k = problem_.k(sequence_, static_cast<int32_t>(first_kv_ + kv));
    for (int64_t begin = chunk * kChunk; begin < chunk_end(chunk);) {
      int64_t end = std::min((begin / kTile + 1) * kTile, chunk_end(chunk));
      if (begin < global_keys_) end = std::min(end, global_keys_);
      for (int64_t j = begin; j < end;) {
        const int64_t run = k.run(j, end - j);
        tiles_.load_keys(k.row(j), k.row_stride, static_cast<int>(run), static_cast<int>(j - begin),
                         problem_.d_qk, worker.keys);
        j += run;
      }
      body(begin, end - begin);
      begin = end;
    }
  }

  // body(panel number, scores) for the panels of head h's probe over the loaded tile.
  template <typename Body>
  void for_each_panel(const WorkerBuffers& worker, int64_t h, int64_t begin, int64_t n,
                      const Body& body) const {
    const auto panel_bytes = static_cast<int64_t>(tiles_.packed_q_bytes(problem_.d_qk));
    for (int64_t p = 0; p < buffers_.panels; ++p) {
      tiles_.scores(buffers_.packed + h * buffers_.packed_head + p * panel_bytes, worker.keys, 0,
                    static_cast<int>(n), problem_.d_qk, worker.scores);
      float visible[TileOps::kMaxPanel];
      const int64_t first = p * tiles_.panel;
      const bool masked =
          begin + n - 1 > probe_.position + first || first + tiles_.panel > probe_.rows;
      for (int l = 0; masked && l < tiles_.panel; ++l) {
        const int64_t seen = probe_.position + first + l - begin + 1;
        visible[l] =
            first + l < probe_.rows ? static_cast<float>(std::clamp<int64_t>(seen, 0, n)) : 0.0f;
      }
      body(p, ScoreTile{.s = worker.scores,
                        .panel = tiles_.panel,
                        .n = static_cast<int>(n),
                        .scale = scale_,
                        .visible = masked ? visible : nullptr});
    }
  }

  void pass_1(const WorkerBuffers& worker, int64_t task) const {
    const int64_t kv = task / size_.chunks, chunk = task % size_.chunks;
    const int64_t first_head = kv * problem_.group();
    for (int64_t h = first_head; h < first_head + problem_.group(); ++h) {
      const int64_t at = chunk_number(h, chunk) * buffers_.lanes;
      std::fill_n(buffers_.chunk_max + at, buffers_.lanes, TileOps::kNoMax);
      std::fill_n(buffers_.chunk_sum + at, buffers_.lanes, 0.0f);
    }
    for_each_tile(worker, kv, chunk, [&](int64_t begin, int64_t n) {
      if (pools_blocks()) pool_keys(kv, begin, n);
      for (int64_t h = first_head; h < first_head + problem_.group(); ++h) {
        for_each_panel(worker, h, begin, n, [&](int64_t p, const ScoreTile& tile) {
          const int64_t at = chunk_number(h, chunk) * buffers_.lanes + p * tiles_.panel;
          ops_.row_stats(tile, buffers_.chunk_max + at, buffers_.chunk_sum + at);
        });
      }
    });
  }

  // Means of the key blocks of a tile.
  void pool_keys(int64_t kv, int64_t begin, int64_t n) const {
    const RowView k = problem_.k(sequence_, static_cast<int32_t>(first_kv_ + kv));
    for (int64_t first = begin; first < begin + n; first += problem_.block_size) {
      const int64_t last = std::min(first + problem_.block_size, begin + n);
      mean_rows(ops_, k, {first, last}, problem_.d_qk, problem_.dtype,
                k_means(kv) + first / problem_.block_size * problem_.d_qk);
    }
  }

  // The chunks' maxima and sums, put together in order.
  void finish_softmax(int64_t h) const {
    buffers_.has_nan[h] = false;
    for (int64_t l = 0; l < buffers_.lanes; ++l) {
      float max = TileOps::kNoMax;
      for (int64_t c = 0; c < size_.chunks; ++c) {
        max = std::max(max, buffers_.chunk_max[chunk_number(h, c) * buffers_.lanes + l]);
      }
      double sum = 0;
      for (int64_t c = 0; c < size_.chunks; ++c) {
        const int64_t at = chunk_number(h, c) * buffers_.lanes + l;
        sum += static_cast<double>(buffers_.chunk_sum[at]) *
               static_cast<double>(std::exp2(buffers_.chunk_max[at] - max));
      }
      const bool used = l < probe_.rows;
      // An infinite score makes the sum NaN, a row of nothing but -inf makes it 0.
      if (used && !(sum > 0)) buffers_.has_nan[h] = true;
      buffers_.max[h * buffers_.lanes + l] = used ? max : 0.0f;
      buffers_.inverse[h * buffers_.lanes + l] =
          used ? static_cast<float>(1 / (sum * static_cast<double>(probe_.rows))) : 0.0f;
    }
  }

  void pass_2(const WorkerBuffers& worker, int64_t task) const {
    const int64_t kv = task / size_.chunks, chunk = task % size_.chunks;
    const int64_t first_head = kv * problem_.group();
    const int64_t slash_size = kChunk + buffers_.lanes;
    for (int64_t h = first_head; h < first_head + problem_.group(); ++h) {
      std::fill_n(buffers_.chunk_slash + chunk_number(h, chunk) * slash_size, slash_size, 0.0f);
    }
    for_each_tile(worker, kv, chunk, [&](int64_t begin, int64_t n) {
      for (int64_t h = first_head; h < first_head + problem_.group(); ++h) {
        if (buffers_.has_nan[h]) continue;
        std::fill_n(worker.below, n * SelectOps::kMaxLanes, 0.0f);
        std::fill_n(worker.above, n * SelectOps::kMaxLanes, 0.0f);
        // Entry x of a chunk's slash scores is distance probe.position - (end - 1) + x.
        float* distance_0 = buffers_.chunk_slash + chunk_number(h, chunk) * slash_size +
                            (chunk_end(chunk) - 1 - begin);
        for_each_panel(worker, h, begin, n, [&](int64_t p, const ScoreTile& tile) {
          const int64_t first = p * tiles_.panel;
          const int64_t at = h * buffers_.lanes + first;
          float* slash = begin < global_keys_ ? worker.unused_slash + n : distance_0 + first;
          ops_.masses(tile, buffers_.max + at, buffers_.inverse + at,
                      static_cast<int>(probe_.split - first), slash, worker.below, worker.above);
        });
        finish_tile(worker, h, begin, n);
      }
    });
  }

  // Vertical scores and block masses from the lanes' sums of a tile.
  void finish_tile(const WorkerBuffers& worker, int64_t h, int64_t begin, int64_t n) const {
    float below[kTile], above[kTile];
    ops_.sum_lanes(worker.below, static_cast<int>(n), below);
    ops_.sum_lanes(worker.above, static_cast<int>(n), above);
    float* mass = buffers_.block_mass + 2 * h * grid_.n_kv;
    for (int64_t key = 0; key < n; ++key) {
      const int64_t block = (begin + key) / problem_.block_size;
      if ((begin + key) % problem_.block_size == 0) {
        mass[block] = mass[grid_.n_kv + block] = 0;
      }
      mass[block] += below[key];
      mass[grid_.n_kv + block] += above[key];
      vertical(h)[begin + key] = below[key] + above[key];
    }
  }

  void finish_slash(int64_t h) const {
    std::fill_n(slash(h), lengths_.s_kv, 0.0f);
    for (int64_t c = 0; c < size_.chunks; ++c) {
      const float* partial = buffers_.chunk_slash + chunk_number(h, c) * (kChunk + buffers_.lanes);
      const int64_t first = probe_.position - (chunk_end(c) - 1);
      const int64_t n = chunk_end(c) - c * kChunk + probe_.rows - 1;
      for (int64_t x = std::max<int64_t>(0, -first); x < n; ++x) slash(h)[first + x] += partial[x];
    }
  }

  // ---- The decisions ------------------------------------------------------------------------

  void choose(const WorkerBuffers& worker, int64_t h) const {
    HeadChoice& choice = buffers_.choices[h];
    choice = {};
    if (const auto* window = std::get_if<StreamingLlm>(&pattern_)) {
      choice.pattern = HeadPattern::kStreaming;
      rows(h).write_window(*window);
      finish_slash(h);
      return;
    }
    if (by_block_scores(pattern_, q_head(h))) {
      choice.pattern =
          by_blocks_.is_dense(q_head(h)) ? HeadPattern::kDense : HeadPattern::kBlockSparse;
      return;
    }
    const auto* heads = std::get_if<MInference>(&pattern_);
    if (heads != nullptr && !by_probe(pattern_, q_head(h))) {
      choice.pattern = HeadPattern::kStreaming;
      return rows(h).write_window(a_shape_window(heads->heads[q_head(h)]));
    }
    if (buffers_.has_nan[h]) return rows(h).write_dense();
    finish_slash(h);
    if (const auto* flex = std::get_if<FlexPrefill>(&pattern_)) {
      mean_rows(ops_, problem_.q(sequence_, q_head(h)), {probe_.first_row, lengths_.s_q},
                problem_.d_qk, problem_.dtype, worker.mean);
      pool_row(worker.mean, h, grid_.n_kv, worker.pooled);
      if (std::isnan(worker.pooled[0])) return rows(h).write_dense();
      choice =
          choose_flex_prefill(vertical(h), slash(h), worker.pooled, lengths_.s_kv,
                              problem_.block_size, rule(*flex), worker.choice, worker.histogram);
    } else {
      choice =
          choose_fixed_sizes(vertical(h), slash(h), lengths_.s_kv, problem_.block_size,
                             fixed_sizes(pattern_, q_head(h)), worker.choice, worker.histogram);
    }
    rows(h).write_choice(worker.choice);
  }

  FlexPrefillRule rule(const FlexPrefill& flex) const {
    return flex_prefill_rule(flex, problem_.block_size, grid_.n_kv);
  }

  // softmax over the first n key blocks of scale * mean . mean(k block j); all NaN if one is.
  void pool_row(const float* mean, int64_t h, int64_t n, float* row) const {
    const auto share = static_cast<float>(key_share(lengths_.s_kv, problem_.block_size, n - 1));
    ops_.softmax_dots(mean, k_means(kv_of(h)), n, problem_.d_qk, scale_, share, row);
  }

  void keep_map(int64_t h) const {
    const RowView q = problem_.q(sequence_, q_head(h));
    // Rows of the map before query block r: those of r = 0, 1, ... have first_q_block + 1, + 2, ...
    const auto row_of_map = [&](int64_t r) {
      return buffers_.map + r * (grid_.first_q_block + 1) + r * (r - 1) / 2;
    };
    parallel(grid_.n_q, [&](int w, int64_t r) {
      float* mean = buffers_.per_worker[w].mean;
      mean_rows(ops_, q, q_block_rows(lengths_, grid_, problem_.block_size, r), problem_.d_qk,
                problem_.dtype, mean);
      pool_row(mean, h, grid_.first_q_block + r + 1, row_of_map(r));
    });
    for (int64_t r = 0; r < grid_.n_q; ++r) {
      if (std::isnan(*row_of_map(r))) {
        buffers_.choices[h] = {};
        return rows(h).write_dense();
      }
    }
    rows(h).keep_map(buffers_.map, size_.map, rule(std::get<FlexPrefill>(pattern_)).gamma,
                     buffers_.per_worker[0].histogram);
  }

  // ---- The audit ----------------------------------------------------------------------------

  HeadAudit audit_head(int64_t h) const {
    const HeadChoice& choice = buffers_.choices[h];
    if (choice.pattern == HeadPattern::kDense) return {};
    const bool windowed = std::holds_alternative<StreamingLlm>(pattern_);
    return make_audit(choice, windowed ? window_mass(h) : kept_mass(h), rows(h).density());
  }

  double kept_mass(int64_t h) const {
    if (buffers_.has_nan[h]) return std::numeric_limits<double>::quiet_NaN();
    double kept = 0;
    for (int64_t block = 0; block < probe_.blocks(); ++block) {
      const uint64_t* row = rows(h).block_row(probe_.first_block + block);
      const float* mass = buffers_.block_mass + (2 * h + block) * grid_.n_kv;
      for (int64_t j = 0; j < grid_.n_kv; ++j) {
        if (has_bit(row, j)) kept += static_cast<double>(mass[j]);
      }
    }
    return kept;
  }

  // Inside the token window; the slash scores leave the global keys out.
  double window_mass(int64_t h) const {
    if (buffers_.has_nan[h]) return std::numeric_limits<double>::quiet_NaN();
    const int64_t local = std::min(std::get<StreamingLlm>(pattern_).local_window, lengths_.s_kv);
    double kept = 0;
    for (int64_t j = 0; j < global_keys_; ++j) kept += static_cast<double>(vertical(h)[j]);
    for (int64_t d = 0; d < local; ++d) kept += static_cast<double>(slash(h)[d]);
    return kept;
  }

  const Problem& problem_;
  const Pattern& pattern_;
  const TileOps& tiles_;
  const SelectOps& ops_;
  const Buffers& buffers_;
  const BlockScoreSelector& by_blocks_;  // has written its heads
  const BlockBits& bits_;
  int64_t sequence_;
  int32_t first_kv_;
  WaveSize size_;
  SequenceLengths lengths_;
  BlockGrid grid_;
  Probe probe_;
  float scale_;              // in units of log2
  int64_t global_keys_ = 0;  // keys whose mass counts as vertical alone (StreamingLlm)
};

}  // namespace

void select_cpu(const Problem& problem, const Pattern& pattern, const Execution& execution,
                Arena& arena, const BlockBits& bits, std::span<HeadAudit> audit) {
  if (const auto* cover = std::get_if<BlockCover>(&pattern)) {
    return select_cover_cpu(problem, *cover, execution, arena, bits, audit);
  }
  const TileOps& tiles = tile_ops(execution.cpu_target, problem.dtype);
  const int workers = worker_count(execution);
  const Buffers buffers(arena, problem, pattern, tiles, workers);
  const BlockScoreSelector by_blocks(arena, problem, pattern, execution.cpu_target, workers);
  if (arena.counting()) return;
  const SelectOps& ops = select_ops(tiles.target);
  bool probed = !audit.empty();
  for (int32_t h = 0; h < problem.h_q; ++h) probed |= by_probe(pattern, h);
  for (int64_t s = 0; s < problem.b(); ++s) {
    const std::span<HeadAudit> heads =
        audit.empty() ? audit : audit.subspan(s * problem.h_q, problem.h_q);
    const bool dense = stays_dense(problem.lengths[s], problem.block_size, pattern);
    if (!dense && by_blocks.needed()) by_blocks.select(s, bits);
    if (dense || !probed) {  // nothing to look at
      parallel_tasks(workers, problem.h_q, [&](int, int64_t h) {
        const HeadRows rows{problem, bits, s, static_cast<int32_t>(h)};
        if (dense) return rows.write_dense();
        if (const auto* window = std::get_if<StreamingLlm>(&pattern)) rows.write_window(*window);
        const auto* per_head = std::get_if<MInference>(&pattern);
        if (per_head != nullptr && !by_block_scores(pattern, static_cast<int32_t>(h))) {
          rows.write_window(a_shape_window(per_head->heads[h]));
        }
      });
      std::fill(heads.begin(), heads.end(), HeadAudit{});
      continue;
    }
    for (int32_t kv = 0; kv < problem.h_kv; kv += WaveSize(problem, s, workers).kv_heads) {
      Wave(problem, pattern, tiles, ops, buffers, by_blocks, bits, s, kv).run(heads);
    }
  }
}

}  // namespace flexprefill
