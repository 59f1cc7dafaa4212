// Every operation of every table that this machine runs, against sums in double precision.
#include "cpu/tile_ops.h"

#include <bit>
#include <cmath>
#include <limits>
#include <random>
#include <tuple>
#include <vector>

#include <gtest/gtest.h>

#include "flexprefill/flexprefill.h"
#include "math.h"
#include "problem.h"

namespace flexprefill {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

// Memory aligned to 64 bytes, filled with NaN so that nothing reads what was not written.
template <typename T>
class Aligned {
 public:
  explicit Aligned(size_t n) : memory_(n * sizeof(T) + 64, std::byte{0xff}) {
    const auto address = reinterpret_cast<uintptr_t>(memory_.data());
    data_ = memory_.data() + (64 - address % 64) % 64;
  }
  T* data() { return reinterpret_cast<T*>(data_); }
  T& operator[](size_t i) { return data()[i]; }

 private:
  std::vector<std::byte> memory_;
  std::byte* data_;
};

// Rows of an element type in unaligned memory, further apart than they are long.
class Rows {
 public:
  Rows(int n, int d, DType dtype)
      : dtype_(dtype),
        stride_(static_cast<int64_t>(element_size(dtype)) * (d + 3)),
        memory_(n * stride_ + 1) {}
  std::byte* row(int i) { return memory_.data() + element_size(dtype_) + i * stride_; }
  int64_t stride() const { return stride_; }
  void set(int i, int c, float value) {
    store_float(row(i) + c * element_size(dtype_), dtype_, value);
  }
  double get(int i, int c) { return load_float(row(i) + c * element_size(dtype_), dtype_); }
  void randomize(int n, int d, uint32_t seed) {
    std::mt19937 generator(seed);
    std::normal_distribution<float> normal;
    for (int i = 0; i < n; ++i) {
      for (int c = 0; c < d; ++c) set(i, c, normal(generator));
    }
  }

 private:
  DType dtype_;
  int64_t stride_;
  std::vector<std::byte> memory_;
};

using Table = std::tuple<CpuTarget, DType>;

class TileOpsOn : public ::testing::TestWithParam<Table> {
 protected:
  const DType dtype = std::get<1>(GetParam());
  const TileOps& ops = tile_ops(std::get<0>(GetParam()), dtype);
};

TEST_P(TileOpsOn, IsTheTableAskedFor) {
  // Types without instructions of their own run another table of the same machine.
  if (dtype == DType::kBFloat16) {
    EXPECT_EQ(ops.target, std::get<0>(GetParam()));
  }
  EXPECT_LE(ops.panel, TileOps::kMaxPanel);
  EXPECT_EQ(TileOps::kMaxKeys % ops.key_step, 0);
}

TEST_P(TileOpsOn, ScoresAreDotProducts) {
  for (const int d : {16, 24, 64, 72, 128, 200, 256}) {
    Rows q(ops.panel, d, dtype), k(TileOps::kMaxKeys, d, dtype);
    q.randomize(ops.panel, d, 1);
    k.randomize(TileOps::kMaxKeys, d, 2);
    for (const int lanes : {1, ops.panel - 1, ops.panel}) {
      for (const auto& [first, n] : {std::pair{0, 128}, {0, 1}, {0, 37}, {16, 20}, {112, 16}}) {
        Aligned<std::byte> packed(ops.packed_q_bytes(d)), keys(ops.key_bytes(d));
        Aligned<float> s(TileOps::kMaxKeys * ops.panel);
        ops.pack_q(q.row(0), q.stride(), lanes, d, packed.data());
        // In two runs, as from two pages.
        const int split = std::min(16, first + n);
        ops.load_keys(k.row(0), k.stride(), split, 0, d, keys.data());
        if (first + n > split) {
          ops.load_keys(k.row(split), k.stride(), first + n - split, split, d, keys.data());
        }
        ops.scores(packed.data(), keys.data(), first, n, d, s.data());
        for (int key = first; key < first + n; ++key) {
          for (int lane = 0; lane < ops.panel; ++lane) {
            double dot = 0, size = 0;
            for (int c = 0; c < d && lane < lanes; ++c) {
              dot += q.get(lane, c) * k.get(key, c);
              size += std::abs(q.get(lane, c) * k.get(key, c));
            }
            ASSERT_NEAR(s[key * ops.panel + lane], dot, 1e-6 * size)
                << "d " << d << " key " << key << " lane " << lane;
          }
        }
      }
    }
  }
}

TEST_P(TileOpsOn, EveryElementIsConvertedExactly) {
  if (dtype == DType::kFloat32) GTEST_SKIP() << "nothing is converted";
  constexpr int kD = 16;
  Rows q(1, kD, dtype), k(TileOps::kMaxKeys, kD, dtype);
  for (int c = 0; c < kD; ++c) q.set(0, c, c == 3 ? 1.0f : 0.0f);
  Aligned<std::byte> packed(ops.packed_q_bytes(kD)), keys(ops.key_bytes(kD));
  Aligned<float> s(TileOps::kMaxKeys * ops.panel);
  ops.pack_q(q.row(0), q.stride(), 1, kD, packed.data());
  for (uint32_t bits = 0; bits < 65536; bits += TileOps::kMaxKeys) {
    for (int key = 0; key < TileOps::kMaxKeys; ++key) {
      const auto half = static_cast<uint16_t>(bits + key);
      std::memcpy(k.row(key) + 2 * 3, &half, 2);
    }
    ops.load_keys(k.row(0), k.stride(), TileOps::kMaxKeys, 0, kD, keys.data());
    ops.scores(packed.data(), keys.data(), 0, TileOps::kMaxKeys, kD, s.data());
    for (int key = 0; key < TileOps::kMaxKeys; ++key) {
      const auto want = static_cast<float>(k.get(key, 3));
      // The bf16 dot product takes subnormal numbers for 0.
      if (dtype == DType::kBFloat16 && std::abs(want) < 0x1p-126f) continue;
      ASSERT_TRUE(s[key * ops.panel] == want ||
                  (std::isnan(want) && std::isnan(s[key * ops.panel])))
          << "bits " << bits + key << ": " << s[key * ops.panel] << ", not " << want;
    }
  }
}

TEST_P(TileOpsOn, WeighIsAnOnlineSoftmax) {
  constexpr int kN = 32, kSteps = 3, kDv = 16;
  const float scale = 0.37f;
  Aligned<float> s(TileOps::kMaxKeys * ops.panel), max(ops.panel), sum(ops.panel);
  Aligned<float> o(TileOps::output_rows(kDv) * ops.panel);
  std::fill_n(o.data(), kDv * ops.panel, 0.0f);
  std::fill_n(max.data(), ops.panel, TileOps::kNoMax);
  std::fill_n(sum.data(), ops.panel, 0.0f);
  std::vector<std::vector<float>> seen(ops.panel);
  std::mt19937 generator(3);
  std::normal_distribution<float> normal(0, 30);
  for (int step = 0; step < kSteps; ++step) {
    for (int key = 0; key < kN; ++key) {
      for (int lane = 0; lane < ops.panel; ++lane) {
        float score = normal(generator) + 20 * step;
        if (lane == 0 || (lane == 1 && step == 0)) score = -kInfinity;  // sees nothing (yet)
        if (lane == 2 && key % 2 == 0) score = -kInfinity;
        if (lane == 3 && step == 1 && key == 7) score = kNan;
        if (lane == 4 && step == 1 && key == 7) score = kInfinity;
        s[key * ops.panel + lane] = score;
        seen[lane].push_back(score);
      }
    }
    ops.weigh(s.data(), kN, scale, kDv, max.data(), sum.data(), o.data());
    // The sum of the weights, as if all values were 1, kept in o through the rescaling.
    for (int lane = 0; lane < ops.panel; ++lane) {
      for (int key = 0; key < kN; ++key) {
        for (int c = 0; c < kDv; ++c) o[c * ops.panel + lane] += s[key * ops.panel + lane];
      }
    }
  }
  EXPECT_EQ(sum[0], 0);
  EXPECT_EQ(max[0], TileOps::kNoMax);
  EXPECT_EQ(o[0], 0);
  EXPECT_TRUE(std::isnan(sum[3]));
  EXPECT_TRUE(std::isnan(sum[4]));
  for (int lane = 1; lane < ops.panel; ++lane) {
    if (lane == 3 || lane == 4) continue;
    double top = -kInfinity, total = 0;
    for (const float score : seen[lane]) top = std::max(top, static_cast<double>(scale) * score);
    for (const float score : seen[lane]) {
      total += std::exp2(static_cast<double>(scale) * score - top);
    }
    const double rounding = 1e-6 * std::abs(top);
    EXPECT_LE(max[lane], top + rounding) << lane;
    EXPECT_GE(max[lane], top - TileOps::kMaxLag - rounding) << lane;
    const double unit = std::exp2(top - max[lane]);
    EXPECT_NEAR(sum[lane] / (total * unit), 1, 2e-5) << lane;
    for (int c = 0; c < kDv; ++c) {
      EXPECT_NEAR(o[c * ops.panel + lane] / (total * unit), 1, 2e-5) << lane;
    }
  }
}

TEST_P(TileOpsOn, WeightsAreAccurateAndVanish) {
  // x from -130 to 0 against exp2; a key that is not seen weighs exactly 0.
  const int panel = ops.panel;
  Aligned<float> s(TileOps::kMaxKeys * panel), max(panel), sum(panel), o(32 * panel);
  std::fill_n(o.data(), 32 * panel, 0.0f);
  for (int step = 0; step < 64; ++step) {
    std::vector<float> x(TileOps::kMaxKeys * panel);
    for (size_t i = 0; i < x.size(); ++i) {
      x[i] = -130.0f * static_cast<float>(step * x.size() + i) / static_cast<float>(64 * x.size());
    }
    x[5 * panel] = -kInfinity;
    x[6 * panel] = 0;
    std::copy(x.begin(), x.end(), s.data());
    std::fill_n(max.data(), panel, 0.0f);
    std::fill_n(sum.data(), panel, 0.0f);
    ops.weigh(s.data(), TileOps::kMaxKeys, 1, 16, max.data(), sum.data(), o.data());
    for (size_t i = 0; i < x.size(); ++i) {
      const double want = std::exp2(static_cast<double>(x[i]));
      ASSERT_NEAR(s[i], want, 3e-7 * want + 0x1p-126) << x[i];
    }
    EXPECT_EQ(s[5 * panel], 0);
    EXPECT_EQ(s[6 * panel], 1);
  }
}

TEST_P(TileOpsOn, AccumulateAddsWeightedValues) {
  for (const int d_v : {16, 24, 64, 72, 128, 200, 256}) {
    Rows v(TileOps::kMaxKeys, d_v, dtype);
    v.randomize(TileOps::kMaxKeys, d_v, 4);
    for (const int runs : {128, 32, 16, 7}) {
      const int n = 2 * ops.key_step + (runs == 128 ? 128 - 2 * ops.key_step : 0);
      Aligned<std::byte> values(ops.value_bytes(d_v));
      for (int at = 0; at < n; at += runs) {
        ops.load_values(v.row(at), v.stride(), std::min(runs, n - at), at, d_v, values.data());
      }
      Aligned<float> p(TileOps::kMaxKeys * ops.panel);
      Aligned<float> o(TileOps::output_rows(d_v) * ops.panel);
      std::mt19937 generator(5);
      std::uniform_real_distribution<float> uniform;
      std::vector<double> weights(n * ops.panel);
      for (size_t i = 0; i < weights.size(); ++i) weights[i] = p[i] = uniform(generator);
      for (int i = 0; i < d_v * ops.panel; ++i) o[i] = 0.25f;
      ops.accumulate(p.data(), values.data(), n, d_v, o.data());
      // Weights may be rounded to the type of the values.
      const double rounding = dtype == DType::kBFloat16 ? 0x1p-9 : 1e-6;
      for (int lane = 0; lane < ops.panel; ++lane) {
        for (int c = 0; c < d_v; ++c) {
          double want = 0.25, size = 0.25;
          for (int key = 0; key < n; ++key) {
            const double term = weights[key * ops.panel + lane] * v.get(key, c);
            want += term;
            size += std::abs(term);
          }
          ASSERT_NEAR(o[c * ops.panel + lane], want, rounding * size)
              << "d_v " << d_v << " runs of " << runs << " c " << c << " lane " << lane;
        }
      }
    }
  }
}

// Two blocks of one panel through `attend`. Scores rise by more than the lag from key `rise` of the
// second block on, so that the output is rescaled there; of that block lanes see a part.
TEST_P(TileOpsOn, AttendIsSoftmaxTimesValues) {
  if (ops.attend == nullptr) GTEST_SKIP() << "the table has none";
  const float scale = 0.1f;
  for (const int d : {16, 64, 72, 128, 256}) {
    const int d_v = d == 256 ? 128 : d;
    for (const int n : {ops.key_step, TileOps::kMaxKeys}) {
      for (const auto& [rise, last_seen] :
           {std::pair{-1, n}, {0, n}, {ops.key_step / 2, n}, {n - 1, n}, {-1, 0}, {1, 37}}) {
        Rows q(ops.panel, d, dtype), k(2 * n, d, dtype), v(2 * n, d_v, dtype);
        q.randomize(ops.panel, d, 1);
        k.randomize(2 * n, d, 2);
        v.randomize(2 * n, d_v, 3);
        for (int lane = 0; lane < ops.panel; ++lane) q.set(lane, 0, lane == 5 ? -1.0f : 1.0f);
        for (int key = n + rise; rise >= 0 && key < 2 * n; ++key) k.set(key, 0, 200);
        Aligned<std::byte> packed(ops.packed_q_bytes(d)), keys(ops.key_bytes(d)),
            values(ops.value_bytes(d_v));
        Aligned<float> s(TileOps::kMaxKeys * ops.panel), max(ops.panel), sum(ops.panel);
        Aligned<float> o(TileOps::output_rows(d_v) * ops.panel);
        std::fill_n(o.data(), TileOps::output_rows(d_v) * ops.panel, 0.0f);
        std::fill_n(max.data(), ops.panel, TileOps::kNoMax);
        std::fill_n(sum.data(), ops.panel, 0.0f);
        ops.pack_q(q.row(0), q.stride(), ops.panel, d, packed.data());
        for (const int first : {0, n}) {
          ops.load_keys(k.row(first), k.stride(), n, 0, d, keys.data());
          ops.load_values(v.row(first), v.stride(), n, 0, d_v, values.data());
          ops.attend(packed.data(), keys.data(), values.data(), n, first == 0 ? n : last_seen, d,
                     d_v, scale, s.data(), max.data(), sum.data(), o.data());
        }
        for (int lane = 0; lane < ops.panel; ++lane) {
          std::vector<double> x(2 * n);
          for (int key = 0; key < 2 * n; ++key) {
            for (int c = 0; c < d; ++c) x[key] += scale * q.get(lane, c) * k.get(key, c);
            if (key - n > last_seen + lane) x[key] = -kInfinity;
          }
          const double top = *std::max_element(x.begin(), x.end());
          double total = 0;
          for (double& score : x) total += score = std::exp2(score - top);
          ASSERT_NEAR(sum[lane] * std::exp2(max[lane] - top) / total, 1, 1e-4) << "lane " << lane;
          for (int c = 0; c < d_v; ++c) {
            double want = 0, size = 0;
            for (int key = 0; key < 2 * n; ++key) {
              want += x[key] / total * v.get(key, c);
              size += std::abs(x[key] / total * v.get(key, c));
            }
            ASSERT_NEAR(o[c * ops.panel + lane] / sum[lane], want, 0x1p-9 * size + 1e-4)
                << "d " << d << " n " << n << " rise " << rise << " lane " << lane << " c " << c;
          }
        }
      }
    }
  }
}

TEST_P(TileOpsOn, StoreDividesAndRounds) {
  constexpr int kDv = 24;
  Aligned<float> o(TileOps::output_rows(kDv) * ops.panel), sum(ops.panel);
  std::mt19937 generator(6);
  std::normal_distribution<float> normal;
  for (int lane = 0; lane < ops.panel; ++lane) {
    sum[lane] = 1.0f + 0.37f * static_cast<float>(lane);
    for (int c = 0; c < kDv; ++c) o[c * ops.panel + lane] = normal(generator);
  }
  // Halfway between two numbers of either type, beyond the largest, too small, not finite.
  const std::vector<float> special = {
      1.0f + 0x1p-11f, 1.0f + 0x3p-11f, 1.0f + 0x1p-8f, 1.0f + 0x3p-8f, 65519.0f,
      65520.0f,        0x1p-24f,        0x1.8p-24f,     0x1p-25f,       0x1p-26f,
      3.4e38f,         -kInfinity,      kInfinity,      kNan,           -0.0f};
  for (size_t c = 0; c < special.size(); ++c) o[c * ops.panel] = special[c];
  Rows out(ops.panel, kDv, dtype), want(ops.panel, kDv, dtype);
  const int n = ops.panel - 1;
  ops.store(o.data(), sum.data(), n, kDv, out.row(0), out.stride());
  for (int lane = 0; lane < ops.panel; ++lane) {
    for (int c = 0; c < kDv && lane < n; ++c) {
      want.set(lane, c, o[c * ops.panel + lane] / sum[lane]);
    }
    // The three elements between the rows as well: nothing else is written.
    for (int c = 0; c < (lane + 1 < ops.panel ? kDv + 3 : kDv); ++c) {
      const double a = out.get(lane, c), b = want.get(lane, c);
      ASSERT_TRUE((a == b && std::signbit(a) == std::signbit(b)) ||
                  (std::isnan(a) && std::isnan(b)))
          << "lane " << lane << " c " << c << ": " << a << ", not " << b;
    }
  }
}

std::vector<Table> tables() {
  std::vector<Table> all;
  for (const CpuTarget target : supported_cpu_targets()) {
    for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
      all.emplace_back(target, dtype);
    }
  }
  return all;
}

std::string table_name(const ::testing::TestParamInfo<Table>& tested) {
  return std::string(cpu_target_name(std::get<0>(tested.param))) + "_" +
         dtype_name(std::get<1>(tested.param));
}

INSTANTIATE_TEST_SUITE_P(Tables, TileOpsOn, ::testing::ValuesIn(tables()), table_name);

TEST(CpuTargets, TheBestComesFirstAndIsTaken) {
  ASSERT_FALSE(supported_cpu_targets().empty());
  EXPECT_EQ(tile_ops(CpuTarget::kAuto, DType::kBFloat16).target, supported_cpu_targets()[0]);
}

TEST(CpuTargets, OneThatTheMachineHasNotIsRefusedByName) {
  int refused = 0;
  for (int t = 1; t <= 6; ++t) {
    const auto target = static_cast<CpuTarget>(t);
    bool supported = false;
    for (const CpuTarget s : supported_cpu_targets()) supported |= s == target;
    if (supported) continue;
    ++refused;
    try {
      tile_ops(target, DType::kFloat32);
      ADD_FAILURE() << cpu_target_name(target) << " was not refused";
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::kUnsupported);
      EXPECT_NE(std::string(error.what()).find(std::string("got ") + cpu_target_name(target)),
                std::string::npos)
          << error.what();
    }
  }
  EXPECT_GT(refused, 0);  // no machine has both NEON and AVX2
}

}  // namespace
}  // namespace flexprefill
