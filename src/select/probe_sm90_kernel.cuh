// The probe of select on Hopper, its two passes. What they compute is said in probe_cuda.cuh.
//
//   pass 1   S [64 probe rows, 128 keys] = Q K^T: a thread has two rows, whose running max and sum
//            stay in its registers until the chunk's end
//   pass 2   S [64 keys, 128 probe rows] = K Q^T: a thread has two keys, so that vertical scores
//            are sums within a quad
//
// Both go through units of one product of 64 by 128. In pass 1 four warpgroups hide each other's
// waits; in pass 2, which has no registers for four, the next unit's product is under way while a
// unit's scores are worked on, and so are the other stream's.
#ifndef FLEXPREFILL_SRC_SELECT_PROBE_SM90_KERNEL_CUH_
#define FLEXPREFILL_SRC_SELECT_PROBE_SM90_KERNEL_CUH_

#include <cfloat>
#include <utility>

#include "select/probe_sm90_load.cuh"
#include "select/probe_sm90_plan.cuh"

namespace flexprefill {

constexpr uint32_t kProbeRows8 = 8 * sm90::kChunkRowBytes;  // bytes of 8 rows of a chunk

// One warpgroup on its stream of keys, tile after tile, kUnits a tile. kOverlapped: a unit's scores
// are worked on while the next one's product runs. Derived has
//   descriptors(tile's stage, unit, a, b)
//   unit(unit, scores, first key), with the unit known when compiled
template <typename Shape, int kStages, int kUnits, bool kOverlapped, typename Derived>
class ProbeStream {
 public:
  using Element = typename Shape::Element;

  __device__ ProbeStream(const ProbeSm90Params& params, const ProbeSm90Task<Shape>& task,
                         ProbeTiles<Shape, kStages>& tiles, int stream)
      : select_(params.select),
        scores_scale_(params.scores_scale),
        scale_log2_(params.scale_log2),
        task_(task),
        tiles_(tiles),
        plan_(params.select.sequences[task.sequence]),
        ring_(params.select, task),
        chunk_(params.select, task.sequence, task.first_chunk + stream),
        position_(plan_.probe_position),
        rows_(plan_.probe_rows),
        stream_(stream),
        warp_(static_cast<int32_t>(threadIdx.x) % 128 / 32),
        lane_(static_cast<int32_t>(threadIdx.x) % 32) {}

  __device__ __forceinline__ void run_units() {
    if (chunk_.tiles == 0) return;
    sm90::barrier_wait(&tiles_.q_full, 0);
    if constexpr (kOverlapped) {
      run_overlapped();
    } else {
      run_one_by_one();
    }
  }

 protected:
  // Whether some probe row must not see some key of the tile. Asked of the warp, as ptxas waits for
  // all products before a branch of which it does not know that the warp takes it together.
  __device__ bool is_masked(int32_t first_key, int32_t first_row) const {
    return __any_sync(0xffffffffu, first_key + 127 > position_ + first_row || rows_ < 128) != 0;
  }

  const SelectProblem& select_;
  const float scores_scale_, scale_log2_;
  const ProbeSm90Task<Shape>& task_;
  ProbeTiles<Shape, kStages>& tiles_;
  const SelectSequence& plan_;
  const ProbeRing<Shape, kStages> ring_;
  const ProbeChunk chunk_;
  // Of the plan, in registers: a load between two products would be a wait for it.
  const int32_t position_, rows_;
  const int stream_;
  const int32_t warp_, lane_;

 private:
  // No product runs while a tile's last scores are worked on (but the other stream's): where one
  // ran beyond a turn of the loop, ptxas had it waited for before the scores of the turn before.
  __device__ __forceinline__ void run_overlapped() {
    float scores[2][64];
#pragma unroll 1
    for (int32_t i = 0; i < chunk_.tiles; ++i) {
      const uint32_t place = ring_.place(stream_, i), stage = ring_.stage(place);
      const int32_t first_key = chunk_.begin + i * 128;
      sm90::barrier_wait(&tiles_.k_full[stage], ring_.parity(place));
      start(scores[0], stage, 0);
      for_units(std::make_integer_sequence<int, kUnits - 1>{}, [&]<int kUnit>() {
        start(scores[(kUnit + 1) % 2], stage, kUnit + 1);
        finish_before<1>(scores[kUnit % 2]);
        unit<kUnit>(scores[kUnit % 2], first_key);
      });
      // That phase is over: a branch, across which ptxas does not move the exponentials behind the
      // wait for the product that they should overlap.
      sm90::barrier_wait(&tiles_.k_full[stage], ring_.parity(place));
      finish_before<0>(scores[1]);
      probe_arrive(&tiles_.k_empty[stage]);
      unit<kUnits - 1>(scores[1], first_key);
    }
  }

  __device__ __forceinline__ void run_one_by_one() {
    float scores[64];
#pragma unroll 1
    for (int32_t i = 0; i < chunk_.tiles; ++i) {
      const uint32_t place = ring_.place(stream_, i), stage = ring_.stage(place);
      sm90::barrier_wait(&tiles_.k_full[stage], ring_.parity(place));
      for_units(std::make_integer_sequence<int, kUnits>{}, [&]<int kUnit>() {
        start(scores, stage, kUnit);
        finish_before<0>(scores);
        if (kUnit == kUnits - 1) probe_arrive(&tiles_.k_empty[stage]);
        unit<kUnit>(scores, chunk_.begin + i * 128);
      });
    }
  }

  template <int... kNumbers, typename F>
  __device__ __forceinline__ static void for_units(std::integer_sequence<int, kNumbers...>,
                                                   const F& f) {
    (f.template operator()<kNumbers>(), ...);
  }

  __device__ __forceinline__ void start(float (&scores)[64], uint32_t stage, int number) {
    uint64_t ab[2];
    static_cast<Derived*>(this)->descriptors(stage, number, ab[0], ab[1]);
    sm90::wgmma_pin(ab);
    sm90::wgmma_pin(scores);
    sm90::wgmma_fence();
#pragma unroll
    for (int step = 0; step < Shape::kDim / 16; ++step) {
      const int bytes = step / 4 * 128 * sm90::kChunkRowBytes + step % 4 * 32;
      sm90::wgmma_ss<Element, 128>(scores, sm90::wgmma_descriptor_at(ab[0], bytes),
                                   sm90::wgmma_descriptor_at(ab[1], bytes), step > 0);
    }
    sm90::wgmma_commit();
    sm90::wgmma_pin(scores);
  }

  // Until all units but the youngest kPending have their scores.
  template <int kPending>
  __device__ __forceinline__ void finish_before(float (&scores)[64]) {
    sm90::wgmma_wait<kPending>();
    sm90::wgmma_pin(scores);
  }

  template <int kUnit>
  __device__ __forceinline__ void unit(float (&scores)[64], int32_t first_key) {
    if (scores_scale_ != 1) {
#pragma unroll
      for (float& score : scores) score *= scores_scale_;
    }
    static_cast<Derived*>(this)->unit(kUnit, scores, first_key);
  }
};

// ---- Pass 1
// ------------------------------------------------------------------------------------------

// A unit is a head; the warpgroup has one half of the rows of every probe.
template <typename Shape, int kStages>
class ProbeStats
    : public ProbeStream<Shape, kStages, Shape::kHeads, false, ProbeStats<Shape, kStages>> {
 public:
  using Base = ProbeStream<Shape, kStages, Shape::kHeads, false, ProbeStats<Shape, kStages>>;

  __device__ ProbeStats(const ProbeSm90Params& params, const ProbeSm90Task<Shape>& task,
                        ProbeTiles<Shape, kStages>& tiles, int stream, int half)
      : Base(params, task, tiles, stream),
        half_(half),
        first_row_(half * 64 + this->warp_ * 16 + this->lane_ / 4) {
#pragma unroll
    for (int h = 0; h < Shape::kHeads; ++h) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        max_[h][r] = -FLT_MAX;
        sum_[h][r] = 0;
      }
    }
  }

  __device__ void run() {
    this->run_units();
    store();
  }

  __device__ void descriptors(uint32_t stage, int h, uint64_t& a, uint64_t& b) const {
    a = sm90::wgmma_descriptor(this->tiles_.q[h] + half_ * 64 * sm90::kChunkColumns, 16,
                               kProbeRows8);
    b = sm90::wgmma_descriptor(this->tiles_.k[stage], 16, kProbeRows8);
  }

  __device__ __forceinline__ void unit(int h, float (&scores)[64], int32_t first_key) {
    if (this->is_masked(first_key, half_ * 64)) mask(scores, first_key);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float& max = max_[h][r];
      float& sum = sum_[h][r];
      float highest = max;
#pragma unroll
      for (int g = 0; g < 16; ++g) {
        highest = fmaxf(highest, fmaxf(scores[4 * g + 2 * r], scores[4 * g + 2 * r + 1]));
      }
      // Nothing seen yet: the scores are -inf, and so they stay.
      const float scale = this->scale_log2_;
      const float shift = highest == -FLT_MAX ? 0.0f : -highest * scale;
      float parts[2] = {sum * exp2_approx(fmaf(max, scale, shift)), 0};
#pragma unroll
      for (int g = 0; g < 16; ++g) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          parts[e] += exp2_approx(fmaf(scores[4 * g + 2 * r + e], scale, shift));
        }
      }
      max = highest;
      sum = parts[0] + parts[1];
    }
  }

 private:
  // Scores of keys that a row does not see become -inf.
  __device__ __forceinline__ void mask(float (&scores)[64], int32_t first_key) const {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int32_t row = first_row_ + 8 * r;
      const int32_t last =
          row < this->rows_ ? this->position_ + row - first_key - this->lane_ % 4 * 2 : -1;
#pragma unroll
      for (int g = 0; g < 16; ++g) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          if (8 * g + e > last) scores[4 * g + 2 * r + e] = -INFINITY;
        }
      }
    }
  }

  // Max (units of log2) and sum of the chunk, four lanes a row.
  __device__ void store() {
    const int32_t chunk = this->task_.first_chunk + this->stream_;
    if (chunk >= this->plan_.chunks) return;
#pragma unroll
    for (int h = 0; h < Shape::kHeads; ++h) {
      const int64_t head = this->task_.head(h);
      float2* to = this->select_.chunk_stats +
                   (this->plan_.first_chunk + head * this->plan_.chunks + chunk) * 128;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float own = max_[h][r];
        float highest = fmaxf(own, __shfl_xor_sync(0xffffffffu, own, 1));
        highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, 2));
        const bool none = highest == -FLT_MAX;
        const float shift = none ? 0.0f : -highest * this->scale_log2_;
        float sum = sum_[h][r] * exp2_approx(fmaf(own, this->scale_log2_, shift));
        sum += __shfl_xor_sync(0xffffffffu, sum, 1);
        sum += __shfl_xor_sync(0xffffffffu, sum, 2);
        if (this->lane_ % 4 == 0) to[first_row_ + 8 * r] = {none ? -FLT_MAX : -shift, sum};
      }
    }
  }

  const int half_;
  const int32_t first_row_;  // and 8 below
  float max_[Shape::kHeads][2], sum_[Shape::kHeads][2];
};

// ---- Pass 2
// ------------------------------------------------------------------------------------------

// A unit is a head and a half of the tile's keys: every second group of 8, so that warp w's two
// have keys 32 w to 32 w + 31. A thread has keys 32 w + x + 8 (2 f + half) for f = 0, 1, x = lane /
// 4, by probe rows 8 g + 2 (lane % 4) + e. kAudit: block masses too, by token if there is a window;
// their sums leave no registers for a second unit.
template <typename Shape, int kStages, bool kAudit>
class ProbeScores : public ProbeStream<Shape, kStages, 2 * Shape::kHeads, !kAudit,
                                       ProbeScores<Shape, kStages, kAudit>> {
 public:
  using Base =
      ProbeStream<Shape, kStages, 2 * Shape::kHeads, !kAudit, ProbeScores<Shape, kStages, kAudit>>;

  __device__ ProbeScores(const ProbeSm90Params& params, const ProbeSm90Task<Shape>& task,
                         ProbeTiles<Shape, kStages>& tiles, ProbeScoresExtra<Shape>& extra,
                         int stream)
      : Base(params, task, tiles, stream),
        extra_(extra),
        s_kv_(params.select.problem.sequences[task.sequence].s_kv),
        chunks_(this->plan_.chunks),
        first_entry_(this->plan_.first_key),
        first_tail_(this->plan_.first_chunk + task.first_chunk + stream),
        thread_(static_cast<int32_t>(threadIdx.x) % 128),
        windowed_(kAudit && params.select.local_window > 0) {}

  __device__ void run() {
    clear_margins();
#pragma unroll
    for (float& carry : carry_) carry = 0;
    this->run_units();
    if (this->chunk_.tiles == 0 || this->select_.slash == nullptr || thread_ == 127) return;
    // The diagonals from the last tile's second key on; thread 127 carries none.
#pragma unroll
    for (int h = 0; h < Shape::kHeads; ++h) {
      store_diagonal(h, this->chunk_.begin + this->chunk_.tiles * 128 - 127 + thread_, carry_[h]);
    }
  }

  __device__ void descriptors(uint32_t stage, int unit, uint64_t& a, uint64_t& b) const {
    a = sm90::wgmma_descriptor(this->tiles_.k[stage] + unit % 2 * 8 * sm90::kChunkColumns, 16,
                               2 * kProbeRows8);
    b = sm90::wgmma_descriptor(this->tiles_.q[unit / 2], 16, kProbeRows8);
  }

  __device__ __forceinline__ void unit(int unit, float (&scores)[64], int32_t first_key) {
    const int h = unit / 2, half = unit % 2;
    if (half == 0) {
#pragma unroll
      for (int b = 0; b < 19; ++b) diagonal_[b][0] = diagonal_[b][1] = 0;
    }
    if (this->is_masked(first_key, 0) || windowed_) {
      add_unit<true>(h, half, scores, first_key);
    } else {
      add_unit<false>(h, half, scores, first_key);
    }
    if (half == 1) finish_tile(h, first_key);
  }

 private:
  template <bool kMasked>
  __device__ __forceinline__ void add_unit(int h, int half, float (&scores)[64],
                                           int32_t first_key) {
    const int32_t row0 = this->lane_ % 4 * 2, x = this->lane_ / 4;
    const int32_t key0 = first_key + this->warp_ * 32 + half * 8 + x;
    const float* offsets = extra_.negative_offset[h] + row0;
    // Rows that see a key, and those of the probe's second query block, counted from row0.
    const int32_t split = this->plan_.probe_split - row0;
    int32_t low[2], high[2];
#pragma unroll
    for (int f = 0; f < 2; ++f) {
      low[f] = key0 + 16 * f - this->position_;
      high[f] = this->rows_;
      if (windowed_ && key0 + 16 * f >= this->select_.global_window) {
        high[f] = static_cast<int32_t>(min(int64_t{high[f]}, low[f] + this->select_.local_window));
      }
      low[f] -= row0;
      high[f] -= row0;
    }
    float sums[2][2] = {};  // [f][in the probe's second query block]
#pragma unroll
    for (int g = 0; g < 16; ++g) {
      const auto offset = *reinterpret_cast<const float2*>(offsets + 8 * g);
#pragma unroll
      for (int f = 0; f < 2; ++f) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float a = exp2_approx(
              fmaf(scores[4 * g + 2 * f + e], this->scale_log2_, e == 0 ? offset.x : offset.y));
          if constexpr (kMasked) {
            a = 8 * g + e >= low[f] && 8 * g + e < high[f] ? a : 0;
          }
          if constexpr (kAudit) {
            const bool second = 8 * g + e >= split;
            sums[f][0] += second ? 0 : a;
            sums[f][1] += second ? a : 0;
          } else {
            sums[f][0] += a;
          }
          diagonal_[2 * f + half - g + 15][e] += a;
        }
      }
    }
#pragma unroll
    for (int f = 0; f < 2; ++f) {
      vertical_[0][2 * f + half] = sums[f][0];
      vertical_[1][2 * f + half] = sums[f][1];
    }
  }

  // The quad's sums of four keys: lane c gets that of key 8 c.
  __device__ float sum_quad(const float (&keys)[4]) const {
    const bool upper2 = (this->lane_ & 2) != 0, upper1 = (this->lane_ & 1) != 0;
    float two[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      two[i] = (upper2 ? keys[i + 2] : keys[i]) +
               __shfl_xor_sync(0xffffffffu, upper2 ? keys[i] : keys[i + 2], 2);
    }
    return (upper1 ? two[1] : two[0]) + __shfl_xor_sync(0xffffffffu, upper1 ? two[0] : two[1], 1);
  }

  // All 128 keys by all probe rows of a head are added up.
  __device__ __forceinline__ void finish_tile(int h, int32_t first_key) {
    const SelectProblem& select = this->select_;
    // This lane's key: lane % 4 says which of the four.
    const int32_t own = this->warp_ * 32 + this->lane_ % 4 * 8 + this->lane_ / 4;
    float total = sum_quad(vertical_[0]);
    if constexpr (kAudit) {
      const float second = sum_quad(vertical_[1]);
      add_masses(h, first_key, own, total, second);
      total += second;
    }
    if (select.slash == nullptr) return;  // an audit of windows wants masses alone
    store_if(first_key + own < s_kv_, select.vertical + (head_key(h) + first_key + own), total);
    finish_diagonals(h, first_key);
  }

  __device__ int64_t head_key(int h) const {
    return first_entry_ + static_cast<int64_t>(this->task_.head(h)) * s_kv_;
  }

  // Of all four warps of the stream.
  __device__ void sync() const {
    sm90::named_barrier_sync(kFirstBarrier + this->stream_, sm90::kWarpgroupThreads);
  }

  __device__ void clear_margins() {
    float* mine = extra_.diagonals[this->stream_].floats + this->warp_ * ProbeDiagonals::kWarp;
    for (int e = this->lane_; e < ProbeDiagonals::kWarp; e += 32) mine[e] = 0;
  }

  __device__ __forceinline__ void finish_diagonals(int h, int32_t first_key) {
    float* floats = extra_.diagonals[this->stream_].floats;
    const int32_t x = this->lane_ / 4;
    float* mine = floats + this->warp_ * ProbeDiagonals::kWarp + ProbeDiagonals::row_start(x) + 7 -
                  this->lane_ % 4 * 2;
    sync();  // the tile before has been read
#pragma unroll
    for (int b = 0; b < 19; ++b) {
      mine[8 * b] = diagonal_[b][0];
      mine[8 * b - 1] = diagonal_[b][1];
    }
    sync();
    // Diagonal u = key - row counted from first_key. Thread t finishes u = t - 127 and carries t +
    // 1 to the next tile. Those of warps 0 to the thread's own have some of the first, those of its
    // own to 3 of the other.
    float done = carry_[h], more = 0;
#pragma unroll
    for (int32_t i = 0; i < 5; ++i) {
      const bool first = i <= this->warp_;
      const int32_t w = first ? i : i - 1;
      const float part = warp_diagonal(floats, w, thread_ + (first ? 0 : 128) - 32 * w);
      done += first ? part : 0;
      more += first ? 0 : part;
    }
    carry_[h] = more;
    store_diagonal(h, first_key - 127 + thread_, done);
  }

  // What warp w has of diagonal key - row = 32 w + at - 127.
  __device__ static float warp_diagonal(const float* floats, int32_t w, int32_t at) {
    const float* rows = floats + w * ProbeDiagonals::kWarp + at;
    float sum = 0;
#pragma unroll
    for (int x = 0; x < 8; ++x) sum += rows[ProbeDiagonals::row_start(x) - x];
    return sum;
  }

  // Diagonal u = key - row of the probe is distance position - u.
  __device__ __forceinline__ void store_diagonal(int h, int32_t u, float value) const {
    const SelectProblem& select = this->select_;
    const int32_t chunk = this->task_.first_chunk + this->stream_;
    const int32_t distance = this->position_ - u;
    const int64_t head = this->task_.head(h);
    // The chunk before has more of it.
    const bool shared = u < this->chunk_.begin && chunk > 0;
    float* tail = select.slash_tails + (first_tail_ + head * chunks_) * kTailEntries;
    float* to = shared ? tail + (u - this->chunk_.begin + kTailEntries - 1)
                       : select.slash + (head_key(h) + distance);
    store_if(shared || (distance >= 0 && distance < s_kv_), to, value);
  }

  // Masses of the tile's blocks, of the probe's two query blocks.
  __device__ void add_masses(int h, int32_t first_key, int32_t own, float first, float second) {
    float (&sums)[2][128] = extra_.column_sums[this->stream_];
    const SelectProblem& select = this->select_;
    const DeviceSequence& sequence = select.problem.sequences[this->task_.sequence];
    sync();  // the tile before has been read
    sums[0][own] = first;
    sums[1][own] = second;
    sync();
    const int32_t block_size = select.problem.block_size, blocks = 128 / block_size;
    if (thread_ >= 2 * blocks) return;
    const int32_t half = thread_ / blocks, begin = thread_ % blocks * block_size;
    if (first_key + begin >= sequence.s_kv) return;
    float mass = 0;
    for (int32_t j = begin; j < begin + block_size; ++j) mass += sums[half][j];
    const int64_t head = this->task_.head(h);
    select
        .block_mass[2 * (this->plan_.first_block + head * sequence.n_kv) +
                    half * static_cast<int64_t>(sequence.n_kv) + (first_key + begin) / block_size] =
        mass;
  }

  static constexpr int kFirstBarrier = 2;  // of one a stream

  ProbeScoresExtra<Shape>& extra_;
  // Of the plan as well: keys, chunks, the first head's first key, and its chunk that is this one.
  const int32_t s_kv_, chunks_;
  const int64_t first_entry_, first_tail_;
  const int32_t thread_;
  const bool windowed_;
  float diagonal_[19][2];  // 8 x 8 blocks of scores on one diagonal of blocks
  float vertical_[2][4];
  float carry_[Shape::kHeads];
};

// negative_offset[row] such that exp2(scale * s + it) is the row's softmax over the number of rows,
// of all heads, by the computing threads. A head is dead if a row of it has no softmax: an infinite
// score made its sum NaN, or every score is -inf.
template <typename Shape>
__device__ void finish_probe_softmax(const SelectProblem& select, const ProbeSm90Task<Shape>& task,
                                     ProbeScoresExtra<Shape>& extra, int32_t thread) {
  constexpr int kThreads = Shape::kStreams * sm90::kWarpgroupThreads;
  const SelectSequence& plan = select.sequences[task.sequence];
  const int32_t row = thread % 128;
#pragma unroll 1
  for (int32_t h = thread / 128; h < Shape::kHeads; h += Shape::kStreams) {
    const int64_t head = task.head(h);
    const float2* stats = select.chunk_stats + (plan.first_chunk + head * plan.chunks) * 128 + row;
    float max = -FLT_MAX, sum = 0;
    // Sixteen chunks at once, which is all of them up to 64k tokens: one wait for L2, and no chain
    // of exponentials.
    constexpr int kAtOnce = 16;
#pragma unroll 1
    for (int32_t c = 0; c < plan.chunks; c += kAtOnce) {
      float2 some[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        some[i] =
            c + i < plan.chunks ? stats[static_cast<int64_t>(c + i) * 128] : float2{-FLT_MAX, 0};
      }
      float highest = max;
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) highest = fmaxf(highest, some[i].x);
      sum *= exp2_approx(max - highest);
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) sum += some[i].y * exp2_approx(some[i].x - highest);
      max = highest;
    }
    const bool used = row < plan.probe_rows;
    extra.negative_offset[h][row] =
        used ? -(max + log2f(sum * static_cast<float>(plan.probe_rows))) : 0.0f;
    const bool dead = __any_sync(0xffffffffu, used && !(sum > 0) ? 1 : 0) != 0;
    if (thread % 32 == 0) extra.dead[h][row / 32] = dead ? 1 : 0;
  }
  sm90::named_barrier_sync(4, kThreads);
  if (task.first_chunk != 0 || thread >= task.heads) return;
  const uint32_t (&dead)[4] = extra.dead[thread];
  select.dead[task.sequence * select.problem.h_q + task.head(thread)] =
      static_cast<uint8_t>(dead[0] | dead[1] | dead[2] | dead[3]);
}

// ---- Kernels
// -----------------------------------------------------------------------------------------

// With two streams: registers of a thread that computes and of one of the loading warpgroup.
constexpr int kProbeStatsRegisters = 104, kProbeStatsLoadRegisters = 64;
constexpr int kProbeComputeRegisters = 216, kProbeLoadRegisters = 64;

template <typename Shape>
__global__ void __launch_bounds__(Shape::kStatsThreads, 1)
    probe_stats_sm90_kernel(const __grid_constant__ ProbeSm90Params params) {
  using Shared = ProbeStatsShared<Shape>;
  constexpr int kStages = decltype(Shared::tiles)::kStages;
  auto& tiles = reinterpret_cast<Shared*>(shared_memory())->tiles;
  // Shuffled so that the compiler knows that a warp's threads stay together.
  const int warp = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 32, 0);
  if (threadIdx.x == 0) {
    tiles.init(8 + kProbePoolWarps);
    sm90::barrier_init_fence();
  }
  await_previous_kernel();
  start_next_kernel();
  const ProbeSm90Task<Shape> task(params);
  if (!task.any) return;
  __syncthreads();
  if (warp < 4) {
    if constexpr (Shape::kStreams == 2) sm90::registers_shrink<kProbeStatsLoadRegisters>();
    if (warp == 0) {
      ProbeLoader<Shape, kStages>(params, task, tiles).run();
    } else if (warp >= 4 - kProbePoolWarps) {
      KeyPooler<Shape, kStages>(params, task, tiles, warp - (4 - kProbePoolWarps)).run();
    }
  } else {
    if constexpr (Shape::kStreams == 2) sm90::registers_grow<kProbeStatsRegisters>();
    const int warpgroup = warp / 4 - 1;
    ProbeStats<Shape, kStages>(params, task, tiles, warpgroup / 2, warpgroup % 2).run();
  }
}

template <typename Shape, bool kAudit>
__global__ void __launch_bounds__(Shape::kThreads, 1)
    probe_scores_sm90_kernel(const __grid_constant__ ProbeSm90Params params) {
  using Shared = ProbeScoresShared<Shape>;
  constexpr int kStages = decltype(Shared::tiles)::kStages;
  // Tables, probes and keys are there: pass 1, which this one may overlap with, has awaited whoever
  // wrote them. Only what pass 1 writes has to be awaited.
  const ProbeSm90Task<Shape> task(params);
  if (!task.any) {
    await_previous_kernel();
    return;
  }
  auto& shared = *reinterpret_cast<Shared*>(shared_memory());
  // Shuffled so that the compiler knows that a warp's threads stay together.
  const int warp = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 32, 0);
  if (threadIdx.x == 0) {
    shared.tiles.init(4);
    sm90::barrier_init_fence();
  }
  __syncthreads();
  if (warp < 4) {
    if constexpr (Shape::kStreams == 2) sm90::registers_shrink<kProbeLoadRegisters>();
    if (warp == 0) ProbeLoader<Shape, kStages>(params, task, shared.tiles).run();
    await_previous_kernel();
    if (warp >= 4 - kProbePoolWarps) {
      pool_probes(params, task, shared.tiles, shared.extra,
                  static_cast<int32_t>(threadIdx.x) - (4 - kProbePoolWarps) * 32);
    }
  } else {
    if constexpr (Shape::kStreams == 2) sm90::registers_grow<kProbeComputeRegisters>();
    await_previous_kernel();
    start_next_kernel();
    finish_probe_softmax(params.select, task, shared.extra,
                         static_cast<int32_t>(threadIdx.x) - 128);
    ProbeScores<Shape, kStages, kAudit>(params, task, shared.tiles, shared.extra, warp / 4 - 1)
        .run();
  }
}

template <typename Shape>
void launch_probe_sm90(const ProbeSm90Params& params, uint32_t ctas, void* stream) {
  static_assert(sizeof(ProbeStatsShared<Shape>) <= 232448);
  static_assert(sizeof(ProbeScoresShared<Shape>) <= 232448);
  launch_overlapped(probe_stats_sm90_kernel<Shape>, dim3(ctas), dim3(Shape::kStatsThreads),
                    sizeof(ProbeStatsShared<Shape>), stream, params);
  const auto scores = params.select.audit != nullptr ? probe_scores_sm90_kernel<Shape, true>
                                                     : probe_scores_sm90_kernel<Shape, false>;
  launch_overlapped(scores, dim3(ctas), dim3(Shape::kThreads), sizeof(ProbeScoresShared<Shape>),
                    stream, params);
}

}  // namespace flexprefill

#endif  // FLEXPREFILL_SRC_SELECT_PROBE_SM90_KERNEL_CUH_
