// BlockCover on the CPU. Each sequence is done in waves of K/V heads, as in select_cpu.cc; in a
// wave
//   pack      asking rows of each query head into panels              task: head
//   pass      their softmax in blocks of keys; means of the keys      task: K/V head, chunk
//   columns   shares of the blocks, their maxima, the columns         task: head
//   map       means of queries by means of keys, a decision a row     task: head, panel of means
//   audit     density and kept mass                                   task: head
// K is read once, in tiles of 128 keys. Means have the inputs' element type, as on a GPU, so that
// their products are as fast as the asking rows'. A row of the map lives in its worker's memory and
// is decided at once: no map of a head is ever in memory. Nothing depends on the number of threads.
#include "select/select_cover_cpu.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstring>
#include <numbers>

#include "cpu/parallel.h"
#include "cpu/tile_ops.h"
#include "math.h"
#include "select/block_rules.h"
#include "select/select_blocks_cpu.h"
#include "select/select_ops.h"
#include "select/select_rows.h"

namespace flexprefill {
namespace {

constexpr int64_t kTile = TileOps::kMaxKeys;
constexpr int64_t kChunk = 1024;        // keys of a task, a multiple of kTile
constexpr int64_t kRowPad = 16;         // entries between rows of the map: no power of two apart
constexpr int64_t kTasksPerWorker = 4;  // that a wave has at least, if there are that many

struct WaveSize {
  WaveSize(const Problem& problem, int64_t sequence, int workers) {
    const int64_t s_kv = problem.lengths[sequence].s_kv;
    chunks = ceil_div(s_kv, kChunk);
    kv_heads = static_cast<int32_t>(
        std::clamp<int64_t>(ceil_div(kTasksPerWorker * workers, chunks), 1, problem.h_kv));
    heads = static_cast<int64_t>(kv_heads) * problem.group();
    n_kv = problem.grids[sequence].n_kv;
    pool_tokens = cover_pool(problem.block_size, s_kv);
    pools = ceil_div(s_kv, pool_tokens);
    pool_tiles = ceil_div(pools, kTile);
  }
  int32_t kv_heads = 0;
  int64_t heads = 0, chunks = 0, n_kv = 0;
  int64_t pool_tokens = 0;            // of a mean
  int64_t pools = 0, pool_tiles = 0;  // means of keys, and tiles of them
};

// What each worker has for itself.
struct WorkerBuffers {
  std::byte* keys;    // TileOps' operand
  float* tile;        // [kTile, panel]
  std::byte* rows;    // asking rows [kCoverAskingRows, d], or means [panel, d]
  std::byte* packed;  // one panel of means
  float* reference;   // [group, lanes]: what sums of asking rows are relative to
  float* max;         // [n_kv, panel]; then rows of the map [blocks of a panel, n_kv + kRowPad]
  float* share;       // [n_kv, panel]
  float* scratch;     // [n_kv]
  uint64_t* words;    // [2 * words of a row]
  Histogram* histogram;
};

// All scratch of a call, sized for its largest wave. heads, kv: of a wave; lanes: of all panels.
struct Buffers {
  Buffers(Arena& arena, const Problem& problem, const Pattern& pattern, const TileOps& tiles,
          int workers_)
      : workers(workers_),
        panels(ceil_div(kCoverAskingRows, tiles.panel)),
        lanes(panels * tiles.panel),
        packed_head(panels * static_cast<int64_t>(tiles.packed_q_bytes(problem.d_qk))),
        tile_bytes(static_cast<int64_t>(tiles.key_bytes(problem.d_qk))) {
    int64_t heads = 0, head_blocks = 0, blocks = 0, pools = 0, pool_tiles = 0;
    for (int64_t s = 0; s < problem.b(); ++s) {
      if (stays_dense(problem.lengths[s], problem.block_size, pattern)) continue;
      const WaveSize wave(problem, s, workers);
      heads = std::max(heads, wave.heads);
      head_blocks = std::max(head_blocks, wave.heads * wave.n_kv);
      blocks = std::max(blocks, wave.n_kv);
      pools = std::max(pools, wave.kv_heads * wave.pools);
      pool_tiles = std::max(pool_tiles, wave.kv_heads * wave.pool_tiles);
    }
    if (heads == 0) return;
    const int64_t row_words = ceil_div(blocks, 64);
    const auto row_bytes = static_cast<int64_t>(problem.d_qk * element_size(problem.dtype));
    packed = arena.take<std::byte>(heads * packed_head);
    max = arena.take<float>(head_blocks * lanes);
    share = arena.take<float>(head_blocks * lanes);
    most_asked = arena.take<float>(head_blocks);
    columns = arena.take<uint64_t>(heads * row_words);
    is_dense = arena.take<uint8_t>(heads);
    least_share = arena.take<uint32_t>(heads);
    rows_below = arena.take<int32_t>(heads);
    k_means = arena.take<std::byte>(pools * row_bytes);
    k_tiles = arena.take<std::byte>(pool_tiles * tile_bytes);
    per_worker = arena.take<WorkerBuffers>(workers);
    for (int w = 0; w < workers; ++w) {
      const WorkerBuffers buffers{
          .keys = arena.take<std::byte>(tiles.key_bytes(problem.d_qk)),
          .tile = arena.take<float>(kTile * tiles.panel),
          .rows = arena.take<std::byte>(kCoverAskingRows * row_bytes),
          .packed = arena.take<std::byte>(tiles.packed_q_bytes(problem.d_qk)),
          .reference = arena.take<float>(problem.group() * lanes),
          .max = arena.take<float>((blocks + kRowPad) * tiles.panel),
          .share = arena.take<float>(blocks * tiles.panel),
          .scratch = arena.take<float>(blocks),
          .words = arena.take<uint64_t>(2 * row_words),
          .histogram = arena.take<Histogram>(1)};
      if (!arena.counting()) per_worker[w] = buffers;
    }
  }

  int workers;
  int64_t panels;       // of the asking rows
  int64_t lanes;        // of all these panels
  int64_t packed_head;  // bytes of a head's panels
  int64_t tile_bytes;   // of a tile of means of keys

  std::byte* packed = nullptr;      // [heads, packed_head]
  float* max = nullptr;             // [heads, n_kv, lanes], in units of log2
  float* share = nullptr;           // [heads, n_kv, lanes]: sums, then masses of asking rows
  float* most_asked = nullptr;      // [heads, n_kv]: their maxima over the rows
  uint64_t* columns = nullptr;      // [heads, words]
  uint8_t* is_dense = nullptr;      // [heads]: for a number that is not finite
  uint32_t* least_share = nullptr;  // [heads]: bits of HeadAudit::least_row_mass
  int32_t* rows_below = nullptr;    // [heads]
  std::byte* k_means = nullptr;     // [kv, pools, d] elements
  std::byte* k_tiles = nullptr;     // [kv, pool_tiles, tile_bytes]: the same as TileOps' operands
  WorkerBuffers* per_worker = nullptr;
};

// One wave: query heads 0 .. heads - 1, group by group, of `kv_heads` K/V heads of a sequence.
class CoverWave {
 public:
  CoverWave(const Problem& problem, const BlockCover& pattern, const TileOps& tiles,
            const Buffers& buffers, const BlockBits& bits, int64_t sequence, int32_t first_kv)
      : problem_(problem),
        rule_(block_cover_rule(pattern, problem.block_size)),
        tiles_(tiles),
        ops_(select_ops(tiles.target)),
        buffers_(buffers),
        bits_(bits),
        sequence_(sequence),
        first_kv_(first_kv),
        size_(problem, sequence, buffers.workers),
        lengths_(problem.lengths[sequence]),
        grid_(problem.grids[sequence]),
        position_(lengths_.s_kv - lengths_.s_q),
        asking_(lengths_.s_q),
        scale_(problem.scale * std::numbers::log2e_v<float>) {
    size_.kv_heads = std::min(size_.kv_heads, problem.h_kv - first_kv);
    size_.heads = static_cast<int64_t>(size_.kv_heads) * problem.group();
  }

  // audit: of all query heads of the sequence, or empty.
  void run(std::span<HeadAudit> audit) {
    parallel(size_.heads, [&](int w, int64_t h) { pack(buffers_.per_worker[w], h); });
    parallel(size_.kv_heads * size_.chunks,
             [&](int w, int64_t task) { pass(buffers_.per_worker[w], task); });
    parallel(size_.kv_heads * size_.pool_tiles, [&](int, int64_t task) { load_means(task); });
    parallel(size_.heads, [&](int w, int64_t h) { columns(buffers_.per_worker[w], h); });
    // Long rows first; the heads of one panel share the means of the keys.
    const int64_t panels = ceil_div(grid_.n_q, blocks_per_panel());
    parallel(panels * size_.heads, [&](int w, int64_t task) {
      map(buffers_.per_worker[w], task % size_.heads, panels - 1 - task / size_.heads);
    });
    parallel(size_.heads, [&](int, int64_t h) {
      if (buffers_.is_dense[h] != 0) rows(h).write_dense();
      if (!audit.empty()) audit[q_head(h)] = audit_head(h);
    });
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
  RowView keys(int64_t kv) const {
    return problem_.k(sequence_, static_cast<int32_t>(first_kv_ + kv));
  }
  int64_t words() const { return BlockBits::words_per_row(grid_); }
  int64_t per_block() const { return problem_.block_size / size_.pool_tokens; }  // means of a block
  int64_t blocks_per_panel() const { return tiles_.panel / per_block(); }
  int64_t asking_block(int64_t k) const {
    return (position_ + asking_.row(k)) / problem_.block_size;
  }
  int64_t row_bytes() const {
    return static_cast<int64_t>(problem_.d_qk * element_size(problem_.dtype));
  }
  std::byte* k_mean(int64_t kv, int64_t pool) const {
    return buffers_.k_means + (kv * size_.pools + pool) * row_bytes();
  }
  std::byte* k_tile(int64_t kv, int64_t tile) const {
    return buffers_.k_tiles + (kv * size_.pool_tiles + tile) * buffers_.tile_bytes;
  }
  int64_t masses_at(int64_t h) const { return h * grid_.n_kv * buffers_.lanes; }

  // ---- The asking rows ------------------------------------------------------------------------

  void pack(const WorkerBuffers& worker, int64_t h) const {
    buffers_.is_dense[h] = 0;
    buffers_.least_share[h] = std::bit_cast<uint32_t>(1.0f);
    buffers_.rows_below[h] = 0;
    const RowView q = problem_.q(sequence_, q_head(h));
    const auto panel_bytes = static_cast<int64_t>(tiles_.packed_q_bytes(problem_.d_qk));
    for (int64_t k = 0; k < asking_.count; ++k) {
      std::memcpy(worker.rows + k * row_bytes(), q.row(asking_.row(k)), row_bytes());
    }
    for (int64_t p = 0; p < buffers_.panels; ++p) {
      const int64_t first = p * tiles_.panel;
      const int64_t n = std::clamp<int64_t>(asking_.count - first, 0, tiles_.panel);
      std::byte* to = buffers_.packed + h * buffers_.packed_head + p * panel_bytes;
      if (n == 0) {
        std::memset(to, 0, panel_bytes);
      } else {
        tiles_.pack_q(worker.rows + first * row_bytes(), row_bytes(), static_cast<int>(n),
                      problem_.d_qk, to);
      }
    }
  }

  void pass(const WorkerBuffers& worker, int64_t task) const {
    const int64_t kv = task / size_.chunks, chunk = task % size_.chunks;
    const RowView k = keys(kv);
    const int64_t chunk_end = std::min((chunk + 1) * kChunk, lengths_.s_kv);
    std::fill_n(worker.reference, problem_.group() * buffers_.lanes, TileOps::kNoMax);
    for (int64_t begin = chunk * kChunk; begin < chunk_end; begin += kTile) {
      const int64_t n = std::min(kTile, chunk_end - begin);
      for (int64_t j = begin; j < begin + n;) {
        const int64_t run = k.run(j, begin + n - j);
        tiles_.load_keys(k.row(j), k.row_stride, static_cast<int>(run), static_cast<int>(j - begin),
                         problem_.d_qk, worker.keys);
        j += run;
      }
      for (int64_t first = begin; first < begin + n; first += size_.pool_tokens) {
        pool(k, {first, std::min(first + size_.pool_tokens, begin + n)},
             k_mean(kv, first / size_.pool_tokens));
      }
      for (int64_t g = 0; g < problem_.group(); ++g) {
        add_tile(worker, kv * problem_.group() + g, begin, n,
                 worker.reference + g * buffers_.lanes);
      }
    }
  }

  // The mean of `rows`, rounded to the inputs' element type.
  void pool(const RowView& view, RowRange rows, std::byte* to) const {
    float mean[TileOps::kMaxHeadDim];
    const DType dtype = problem_.dtype;  // known not to change with what is stored
    const int32_t d = problem_.d_qk;
    mean_rows(ops_, view, rows, d, dtype, mean);
    const auto size = static_cast<int64_t>(element_size(dtype));
    for (int32_t c = 0; c < d; ++c) store_float(to + c * size, dtype, mean[c]);
  }

  // The blocks of a tile of keys, for all asking rows of head h. (Lanes beyond them count as rows
  // after the last one, with a weight of 0.)
  void add_tile(const WorkerBuffers& worker, int64_t h, int64_t begin, int64_t n,
                float* reference) const {
    const auto panel_bytes = static_cast<int64_t>(tiles_.packed_q_bytes(problem_.d_qk));
    for (int64_t p = 0; p < buffers_.panels; ++p) {
      tiles_.scores(buffers_.packed + h * buffers_.packed_head + p * panel_bytes, worker.keys, 0,
                    static_cast<int>(n), problem_.d_qk, worker.tile);
      float visible[TileOps::kMaxPanel];
      const int64_t first = p * tiles_.panel;
      const bool masked = begin + n - 1 > position_ + asking_.row(first);
      for (int l = 0; masked && l < tiles_.panel; ++l) {
        const int64_t seen = position_ + asking_.row(first + l) - begin + 1;
        visible[l] = static_cast<float>(std::clamp<int64_t>(seen, 0, n));
      }
      const int64_t at =
          masses_at(h) + begin / problem_.block_size * buffers_.lanes + p * tiles_.panel;
      ops_.block_stats({.s = worker.tile,
                        .panel = tiles_.panel,
                        .n = static_cast<int>(n),
                        .scale = scale_,
                        .visible = masked ? visible : nullptr},
                       problem_.block_size, 1.0f, buffers_.lanes, reference + first,
                       buffers_.max + at, buffers_.share + at);
    }
  }

  void columns(const WorkerBuffers& worker, int64_t h) const {
    float weight[SelectOps::kMaxShareLanes], total[SelectOps::kMaxShareLanes];
    for (int64_t l = 0; l < buffers_.lanes; ++l) weight[l] = l < asking_.count ? 1.0f : 0.0f;
    float* most_asked = buffers_.most_asked + h * grid_.n_kv;
    ops_.block_shares(buffers_.max + masses_at(h), grid_.n_kv, static_cast<int>(buffers_.lanes),
                      weight, buffers_.share + masses_at(h), total, most_asked);
    // An infinite score makes the sum NaN, a row of nothing but -inf makes it 0.
    if (!std::all_of(total, total + asking_.count, [](float x) { return x > 0; })) {
      buffers_.is_dense[h] = 1;
      return;
    }
    choose_columns(most_asked, grid_.n_kv, rule_.column_share, worker.histogram,
                   buffers_.columns + h * words());
  }

  // ---- The map --------------------------------------------------------------------------------

  void load_means(int64_t task) const {
    const int64_t kv = task / size_.pool_tiles, tile = task % size_.pool_tiles;
    const int64_t n = std::min(kTile, size_.pools - tile * kTile);
    tiles_.load_keys(k_mean(kv, tile * kTile), row_bytes(), static_cast<int>(n), 0, problem_.d_qk,
                     k_tile(kv, tile));
  }

  // Query blocks of one panel of means; a lane is a mean.
  void map(const WorkerBuffers& worker, int64_t h, int64_t panel_number) const {
    if (std::atomic_ref(buffers_.is_dense[h]).load(std::memory_order_relaxed) != 0) return;
    const int panel = tiles_.panel;
    const int64_t first_row = panel_number * blocks_per_panel();
    const int64_t n_rows = std::min(blocks_per_panel(), grid_.n_q - first_row);
    const int64_t first_pool = (grid_.first_q_block + first_row) * per_block();
    float weight[TileOps::kMaxPanel];
    pool_queries(worker, h, first_row, n_rows, weight);
    float visible[TileOps::kMaxPanel], reference[TileOps::kMaxPanel];
    std::fill_n(reference, panel, TileOps::kNoMax);
    const int64_t n_pools = std::min(first_pool + n_rows * per_block(), size_.pools);
    for (int64_t begin = 0; begin < n_pools; begin += kTile) {
      const int64_t n = std::min(kTile, n_pools - begin);
      tiles_.scores(worker.packed, k_tile(kv_of(h), begin / kTile), 0, static_cast<int>(n),
                    problem_.d_qk, worker.tile);
      const bool masked = begin + n - 1 > first_pool;
      for (int l = 0; masked && l < panel; ++l) {
        const int64_t seen = first_pool + l - begin + 1;
        visible[l] = static_cast<float>(std::clamp<int64_t>(seen, 0, n));
      }
      const bool ends = begin + n == size_.pools;
      const auto last_share =
          static_cast<float>(key_share(lengths_.s_kv, size_.pool_tokens, size_.pools - 1));
      ops_.block_stats({.s = worker.tile,
                        .panel = panel,
                        .n = static_cast<int>(n),
                        .scale = scale_,
                        .visible = masked ? visible : nullptr},
                       static_cast<int>(per_block()), ends ? last_share : 1.0f, panel, reference,
                       worker.max + begin / per_block() * panel,
                       worker.share + begin / per_block() * panel);
    }
    float total[TileOps::kMaxPanel];
    const int64_t n_blocks = ceil_div(n_pools, per_block());
    ops_.block_shares(worker.max, n_blocks, panel, weight, worker.share, total, nullptr);
    for (int l = 0; l < panel; ++l) {
      if (weight[l] > 0 && !(total[l] > 0)) {
        std::atomic_ref(buffers_.is_dense[h]).store(1, std::memory_order_relaxed);
        return;
      }
    }
    const int64_t pitch = n_blocks + kRowPad;
    float* scores = worker.max;
    for (int64_t j = 0; j < n_blocks; ++j) {
      const float* share = worker.share + j * panel;
      for (int64_t r = 0; r < n_rows; ++r, share += per_block()) {
        float sum = share[0];
        for (int64_t a = 1; a < per_block(); ++a) sum += share[a];
        scores[r * pitch + j] = sum;
      }
    }
    for (int64_t r = 0; r < n_rows; ++r) decide(worker, h, first_row + r, scores + r * pitch);
  }

  // Packs the means of n_rows query blocks; weight[lane]: its tokens' share of the block's, 0 where
  // there is no such mean.
  void pool_queries(const WorkerBuffers& worker, int64_t h, int64_t first_row, int64_t n_rows,
                    float* weight) const {
    const RowView q = problem_.q(sequence_, q_head(h));
    std::memset(worker.rows, 0, tiles_.panel * row_bytes());
    std::fill_n(weight, tiles_.panel, 0.0f);
    for (int64_t r = 0; r < n_rows; ++r) {
      const RowRange block = q_block_rows(lengths_, grid_, problem_.block_size, first_row + r);
      const int64_t first_token =
          (grid_.first_q_block + first_row + r) * problem_.block_size - position_;
      for (int64_t a = 0; a < per_block(); ++a) {
        const int64_t begin = std::max(first_token + a * size_.pool_tokens, block.begin);
        const int64_t end = std::min(first_token + (a + 1) * size_.pool_tokens, block.end);
        if (begin >= end) continue;
        const int64_t lane = r * per_block() + a;
        weight[lane] =
            static_cast<float>(end - begin) / static_cast<float>(block.end - block.begin);
        pool(q, {begin, end}, worker.rows + lane * row_bytes());
      }
    }
    tiles_.pack_q(worker.rows, row_bytes(), tiles_.panel, problem_.d_qk, worker.packed);
  }

  // Row q_row of head h from its row of the map.
  void decide(const WorkerBuffers& worker, int64_t h, int64_t q_row, const float* scores) const {
    const int64_t i = grid_.first_q_block + q_row;
    const uint64_t* columns = i >= asking_block(0) ? buffers_.columns + h * words() : nullptr;
    const RowMass mass =
        keep_cover(scores, i, grid_.n_kv, rule_, columns, buffers_.most_asked + h * grid_.n_kv,
                   worker.histogram, worker.scratch, worker.words,
                   bits_.row(problem_, sequence_, q_head(h), q_row));
    // Bits of floats that are not negative order like the floats.
    const auto bits = std::bit_cast<uint32_t>(mass.share());
    const std::atomic_ref least(buffers_.least_share[h]);
    for (uint32_t old = least.load(); bits < old && !least.compare_exchange_weak(old, bits);) {
    }
    if (mass.kept < mass.wanted) std::atomic_ref(buffers_.rows_below[h]).fetch_add(1);
  }

  // ---- The audit ------------------------------------------------------------------------------

  HeadAudit audit_head(int64_t h) const {
    if (buffers_.is_dense[h] != 0) return {};
    double kept = 0;
    for (int64_t k = 0; k < asking_.count;) {
      const int64_t block = asking_block(k);
      const int64_t first = k;
      while (k < asking_.count && asking_block(k) == block) ++k;
      const uint64_t* row = rows(h).block_row(block);
      for (int64_t j = 0; j <= block; ++j) {
        if (!has_bit(row, j)) continue;
        const float* mass = buffers_.share + masses_at(h) + j * buffers_.lanes;
        for (int64_t l = first; l < k; ++l) kept += static_cast<double>(mass[l]);
      }
    }
    const int64_t columns = count_bits(buffers_.columns + h * words(), grid_.n_kv);
    HeadAudit audit =
        make_audit({.pattern = HeadPattern::kBlockCover, .jsd_sqrt = 0, .vertical_blocks = columns},
                   kept / static_cast<double>(asking_.count), rows(h).density());
    audit.least_row_mass = std::bit_cast<float>(buffers_.least_share[h]);
    audit.rows_below_gamma = buffers_.rows_below[h];
    return audit;
  }

  const Problem& problem_;
  BlockCoverRule rule_;
  const TileOps& tiles_;
  const SelectOps& ops_;
  const Buffers& buffers_;
  const BlockBits& bits_;
  int64_t sequence_;
  int32_t first_kv_;
  WaveSize size_;
  SequenceLengths lengths_;
  BlockGrid grid_;
  int64_t position_;  // of the first query
  AskingRows asking_;
  float scale_;  // in units of log2
};

}  // namespace

void select_cover_cpu(const Problem& problem, const BlockCover& pattern, const Execution& execution,
                      Arena& arena, const BlockBits& bits, std::span<HeadAudit> audit) {
  const TileOps& tiles = tile_ops(execution.cpu_target, problem.dtype);
  const int workers = worker_count(execution);
  const Buffers buffers(arena, problem, pattern, tiles, workers);
  if (arena.counting()) return;
  for (int64_t s = 0; s < problem.b(); ++s) {
    const std::span<HeadAudit> heads =
        audit.empty() ? audit : audit.subspan(s * problem.h_q, problem.h_q);
    if (stays_dense(problem.lengths[s], problem.block_size, pattern)) {
      for (int32_t h = 0; h < problem.h_q; ++h) HeadRows{problem, bits, s, h}.write_dense();
      std::fill(heads.begin(), heads.end(), HeadAudit{});
      continue;
    }
    for (int32_t kv = 0; kv < problem.h_kv; kv += WaveSize(problem, s, workers).kv_heads) {
      CoverWave(problem, pattern, tiles, buffers, bits, s, kv).run(heads);
    }
  }
}

}  // namespace flexprefill
