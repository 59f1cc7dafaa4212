// The emulator's instructions of compute capability 9.0 (async.cc): against plain products, and
// mistakes that it must find.
#include <cmath>
#include <cstring>
#include <vector>

#include "cuda/sm80.cuh"
#include "cuda/sm90.cuh"
#include "cuda_emulator/emulator_test.h"

namespace flexprefill {
namespace {

// What one warpgroup_product does wrong.
enum class Mistake {
  kNone,
  kNoFence,
  kNoProxyFence,
  kNoWait,
  kEarlyWrite,
  kOverwrite,
  kTooManyBytes
};

// s = a b^T, then d [64, 128] = s [b c], all of a, b, c [64, 64] in shared memory by TMA.
// Rows of a beyond `rows` are stored by the threads, as zero.
template <typename T>
__global__ void warpgroup_product(const __grid_constant__ sm90::TensorMap a,
                                  const __grid_constant__ sm90::TensorMap b,
                                  const __grid_constant__ sm90::TensorMap c, float* s, float* d,
                                  int rows, Mistake mistake) {
  std::byte* sA = shared_memory();
  std::byte* sB = sA + 64 * 128;
  std::byte* sC = sB + 64 * 128;
  auto* barrier = reinterpret_cast<sm90::Barrier*>(sC + 64 * 128);
  const int t = static_cast<int>(threadIdx.x);
  if (t == 0) {
    sm90::barrier_init(barrier, 1);
    sm90::barrier_init_fence();
  }
  __syncthreads();
  if (t == 0) {
    const bool wrong = mistake == Mistake::kTooManyBytes;
    sm90::barrier_arrive_expect(barrier, 3 * 64 * 128 + (wrong ? 16 : 0));
    sm90::tma_load(&a, barrier, sA, 0, -1, 1, 0);
    sm90::tma_load(&b, barrier, sB, 0, 0, 0, 1);
    sm90::tma_load(&c, barrier, sC, 0, 0, 1, 1);
  }
  sm90::barrier_wait(barrier, 0);
  for (int row = rows + t / 8; row < 64; row += 16) {
    *reinterpret_cast<uint4*>(sA + row * 128 + t % 8 * 16) = uint4{};
  }
  if (mistake != Mistake::kNoProxyFence) sm90::fence_proxy_async();
  sm90::named_barrier_sync(1, 128);

  float rS[32], rD[64];
  if (mistake != Mistake::kNoFence) sm90::wgmma_fence();
  const uint64_t a_descriptor = sm90::wgmma_descriptor(sA, 0, 1024);
  const uint64_t b_descriptor = sm90::wgmma_descriptor(sB, 0, 1024);
  for (uint32_t k = 0; k < 4; ++k) {
    sm90::wgmma_ss<T, 64>(rS, sm90::wgmma_descriptor_at(a_descriptor, k * 32),
                          sm90::wgmma_descriptor_at(b_descriptor, k * 32), k > 0);
  }
  sm90::wgmma_commit();
  if (mistake == Mistake::kEarlyWrite) rS[3] = 1.0F;
  if (mistake == Mistake::kOverwrite) {
    __syncthreads();  // orders what the threads did, not what their products read
    *reinterpret_cast<float*>(sA + t * 4) = 1.0F;
  }
  if (mistake != Mistake::kNoWait) sm90::wgmma_wait<0>();

  uint32_t rP[16];
  for (int i = 0; i < 16; ++i) rP[i] = pack<T>(rS[2 * i], rS[2 * i + 1]);
  sm90::wgmma_fence();
  for (uint32_t k = 0; k < 4; ++k) {
    const uint64_t bc_descriptor = sm90::wgmma_descriptor(sB, 64 * 128, 1024);
    sm90::wgmma_rs_mn<T, 128>(rD, rP + 4 * k, sm90::wgmma_descriptor_at(bc_descriptor, k * 2048),
                              k > 0);
  }
  sm90::wgmma_commit();
  sm90::wgmma_wait<0>();
  const int row = t / 32 * 16 + t % 32 / 4;
  for (int i = 0; i < 64; ++i) {
    const int at_row = row + i / 2 % 2 * 8, column = i / 4 * 8 + t % 4 * 2 + i % 2;
    if (i < 32) s[at_row * 64 + column] = rS[i];
    d[at_row * 128 + column] = rD[i];
  }
}

template <typename T>
struct WarpgroupCase {
  static constexpr int kRows = 70, kColumns = 56;
  // [2, 2, kRows, kColumns]: a is [0, 1] from row -1 on, b [1, 0], c [1, 1]. What lies outside is
  // 0.
  DeviceArray<T> data{4 * kRows * kColumns};
  DeviceArray<float> s{64 * 64}, d{64 * 128};
  sm90::TensorMap map;

  WarpgroupCase() {
    fill_random(data.host, 3);
    map = sm90::make_tensor_map(
        {.data = data.upload(),
         .sizes = {kColumns, kRows, 2, 2},
         .strides = {kColumns * 2, kRows * kColumns * 2, 2 * kRows * kColumns * 2},
         .box_rows = 64,
         .bfloat16 = std::is_same_v<T, __nv_bfloat16>});
  }
  float at(int tensor, int row, int column) const {
    if (row < 0 || column >= kColumns) return 0;
    return float(data.host[(tensor * kRows + row) * kColumns + column]);
  }
  void run(Mistake mistake) {
    launch(warpgroup_product<T>, 1, 128, 3 * 64 * 128 + 8, nullptr, map, map, map, s.data(),
           d.data(), 60, mistake);
  }
};

template <typename T>
void check_warpgroup_product() {
  with_seeds([] {
    WarpgroupCase<T> test;
    test.run(Mistake::kNone);
    test.s.download();
    test.d.download();
    for (int i = 0; i < 64; ++i) {
      float p[64];
      for (int j = 0; j < 64; ++j) {
        float sum = 0;
        for (int k = 0; k < 64 && i < 60; ++k) sum += test.at(1, i - 1, k) * test.at(2, j, k);
        EXPECT_NEAR(test.s.host[i * 64 + j], sum, 1e-5F) << i << " " << j;
        p[j] = float(T(test.s.host[i * 64 + j]));
      }
      for (int k = 0; k < 128; ++k) {
        float sum = 0;
        for (int j = 0; j < 64; ++j) sum += p[j] * test.at(2 + k / 64, j, k % 64);
        EXPECT_NEAR(test.d.host[i * 128 + k], sum, 1e-4F) << i << " " << k;
      }
    }
  });
}

TEST(Emulator, WarpgroupProduct) {
  check_warpgroup_product<__nv_bfloat16>();
  check_warpgroup_product<__half>();
}

// What one store_matrices does wrong.
enum class StoreMistake { kNone, kNoProxyFence, kNoWait, kEarlyWrite };

// A warp: numbers to a box of 16 rows by stmatrix, and the box to `to` from row 8, column 0 on.
__global__ void store_matrices(const __grid_constant__ sm90::TensorMap to, StoreMistake mistake) {
  const int lane = static_cast<int>(threadIdx.x);
  const uint32_t row = static_cast<uint32_t>(lane) % 16;
  const uint32_t unit = shared_address(shared_memory()) + row * 128 + (lane / 16 ^ row % 8) * 16;
  for (uint32_t step = 0; step < 4; ++step) {  // of 16 columns
    uint32_t fragment[4];
    for (uint32_t i = 0; i < 4; ++i) {
      const uint32_t at = (lane / 4 + i % 2 * 8) * 64 + step * 16 + i / 2 * 8 + lane % 4 * 2;
      fragment[i] = at | (at + 1) << 16;
    }
    sm90::stmatrix_x4(fragment, unit ^ step * 32);
  }
  if (mistake != StoreMistake::kNoProxyFence) sm90::fence_proxy_async();
  __syncwarp();
  if (lane == 0) {
    sm90::tma_store(&to, shared_memory(), 0, 8, 1, 0);
    sm90::tma_store_commit();
    if (mistake == StoreMistake::kEarlyWrite) *reinterpret_cast<uint16_t*>(shared_memory()) = 7;
    if (mistake != StoreMistake::kNoWait) sm90::tma_store_wait_read();
  }
}

TEST(Emulator, StoresByTma) {
  constexpr int kRows = 20, kColumns = 56;  // the box goes beyond both
  const auto store = [](StoreMistake mistake) {
    DeviceArray<uint16_t> to(2 * kRows * kColumns);
    std::fill(to.host.begin(), to.host.end(), uint16_t{9999});
    const sm90::TensorMap map = sm90::make_tensor_map(
        {.data = to.upload(),
         .sizes = {kColumns, kRows, 2, 1},
         .strides = {kColumns * 2, kRows * kColumns * 2, 2 * kRows * kColumns * 2},
         .box_rows = 16,
         .bfloat16 = true});
    launch(store_matrices, 1, 32, 16 * 128, nullptr, map, mistake);
    return std::vector<uint16_t>(to.download());
  };
  const std::vector<uint16_t> stored = store(StoreMistake::kNone);
  for (int row = 0; row < 2 * kRows; ++row) {
    for (int column = 0; column < kColumns; ++column) {
      const int of_box = row - kRows - 8;
      EXPECT_EQ(stored[row * kColumns + column], of_box < 0 ? 9999 : of_box * 64 + column)
          << row << " " << column;
    }
  }
  EXPECT_EQ(store(StoreMistake::kNoWait)[(kRows + 8) * kColumns + 1], 9999);
  EXPECT_EQ(store(StoreMistake::kEarlyWrite)[(kRows + 8) * kColumns], 7);
  EXPECT_FAILS(store(StoreMistake::kNoProxyFence), "without fence.proxy.async");
}

TEST(Emulator, MistakesOfWarpgroupsAreNamed) {
  WarpgroupCase<__half> test;
  EXPECT_FAILS(test.run(Mistake::kNoFence), "wgmma without wgmma.fence");
  EXPECT_FAILS(test.run(Mistake::kNoProxyFence), "without fence.proxy.async");
  EXPECT_FAILS(test.run(Mistake::kEarlyWrite), "was written while");
  EXPECT_FAILS(test.run(Mistake::kOverwrite), "by wgmma of warpgroup 0");
  EXPECT_FAILS(test.run(Mistake::kTooManyBytes), "mbarrier.try_wait (emulator_sm90_test.cu");
  test.run(Mistake::kNoWait);
  EXPECT_TRUE(std::isnan(test.d.download()[0]));
}

}  // namespace
}  // namespace flexprefill
