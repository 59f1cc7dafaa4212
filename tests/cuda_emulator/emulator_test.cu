// The emulator itself: instructions against plain products, and mistakes that it must find.
#include <bit>
#include <cstring>
#include <string>
#include <vector>

#include "cuda/sm80.cuh"
#include "cuda/sm90.cuh"
#include "cuda_emulator/emulator_test.h"

namespace flexprefill {
namespace {

constexpr uint32_t kAll = 0xffffffffu;

// ---- Threads

__global__ void block_sum(const int* values, int* sums) {
  auto* sSums = reinterpret_cast<int*>(shared_memory());
  int value = values[blockIdx.x * blockDim.x + threadIdx.x];
  for (int delta = 16; delta > 0; delta /= 2) value += __shfl_xor_sync(kAll, value, delta);
  if (threadIdx.x % 32 == 0) sSums[threadIdx.x / 32] = value;
  __syncthreads();
  if (threadIdx.x == 0) {
    int sum = 0;
    for (unsigned w = 0; w < blockDim.x / 32; ++w) sum += sSums[w];
    sums[blockIdx.x] = sum;
    atomicAdd(sums + gridDim.x, sum);
  }
}

TEST(Emulator, ThreadsMeet) {
  with_seeds([] {
    DeviceArray<int> values(3 * 256), sums(4);
    for (size_t i = 0; i < values.host.size(); ++i) values.host[i] = static_cast<int>(i * i % 71);
    launch(block_sum, 3, 256, 8 * sizeof(int), nullptr, values.upload(), sums.upload());
    int total = 0;
    for (int block = 0; block < 3; ++block) {
      int sum = 0;
      for (int i = 0; i < 256; ++i) sum += values.host[block * 256 + i];
      EXPECT_EQ(sums.download()[block], sum);
      total += sum;
    }
    EXPECT_EQ(sums.host[3], total);
  });
}

__global__ void shuffles(uint32_t* results) {
  const int lane = static_cast<int>(threadIdx.x);
  uint32_t* mine = results + lane * 8;
  mine[0] = __shfl_sync(kAll, lane, lane + 1, 8);
  mine[1] = __shfl_up_sync(kAll, lane, 3);
  mine[2] = __shfl_down_sync(kAll, lane, 2, 16);
  mine[3] = __ballot_sync(kAll, lane % 3 == 0);
  mine[4] = __match_any_sync(kAll, lane / 10);
  mine[5] = __reduce_add_sync(kAll, static_cast<uint32_t>(lane));
  if (lane < 4) mine[6] = __shfl_xor_sync(0xf, lane, 1);
  mine[7] = static_cast<uint32_t>(__syncthreads_count(lane < 5));
}

TEST(Emulator, WarpInstructions) {
  with_seeds([] {
    DeviceArray<uint32_t> results(32 * 8);
    launch(shuffles, 1, 32, 0, nullptr, results.data());
    results.download();
    for (uint32_t lane = 0; lane < 32; ++lane) {
      const uint32_t* mine = &results.host[lane * 8];
      EXPECT_EQ(mine[0], lane / 8 * 8 + (lane + 1) % 8);
      EXPECT_EQ(mine[1], lane < 3 ? lane : lane - 3);
      EXPECT_EQ(mine[2], lane % 16 + 2 < 16 ? lane + 2 : lane);
      EXPECT_EQ(mine[3], 0x49249249U);
      EXPECT_EQ(mine[4], lane < 10   ? 0x3ffU
                         : lane < 20 ? 0xffc00U
                         : lane < 30 ? 0x3ff00000U
                                     : 0xc0000000U);
      EXPECT_EQ(mine[5], 496U);
      if (lane < 4) {
        EXPECT_EQ(mine[6], lane ^ 1);
      }
      EXPECT_EQ(mine[7], 5U);
    }
  });
}

// ---- Mistakes

__global__ void without_barrier(float* results) {
  auto* sValues = reinterpret_cast<float*>(shared_memory());
  sValues[threadIdx.x] = 1.0F;
  results[threadIdx.x] = sValues[threadIdx.x ^ 32];
}

TEST(Emulator, MissingBarrierShows) {
  DeviceArray<float> results(64);
  EXPECT_FAILS(launch(without_barrier, 1, 64, 64 * sizeof(float), nullptr, results.data()),
               "race on shared memory");
  cuda_emulator::settings().find_races = false;
  with_seeds([&] {
    launch(without_barrier, 1, 64, 64 * sizeof(float), nullptr, results.data());
    int wrong = 0;
    for (const float value : results.download()) wrong += value == 1.0F ? 0 : 1;
    EXPECT_GT(wrong, 0);
  });
  cuda_emulator::settings().find_races = true;
}

// Rounds of a buffer that all write and all read; without the second barrier a write of the next
// round may come before a read of this one.
__global__ void rounds(int* results, bool second_barrier) {
  auto* sValues = reinterpret_cast<int*>(shared_memory());
  int sum = 0;
  for (int round = 0; round < 3; ++round) {
    sValues[threadIdx.x] = round;
    __syncthreads();
    sum += sValues[(threadIdx.x + 40) % blockDim.x];
    if (second_barrier) __syncthreads();
  }
  results[threadIdx.x] = sum;
}

TEST(Emulator, WriteAfterReadNeedsABarrier) {
  DeviceArray<int> results(64);
  with_seeds([&] {
    launch(rounds, 1, 64, 256, nullptr, results.data(), true);
    EXPECT_FAILS(launch(rounds, 1, 64, 256, nullptr, results.data(), false), "race on shared");
  });
}

// Every thread writes, then reads what the thread `distance` from it wrote: of its warp, of its
// half of the CTA, of the other half.
enum class Meet { kWarp, kHalf, kBlock, kBlockWithoutSome };

__global__ void read_at_distance(int* results, Meet meet, uint32_t distance) {
  auto* sValues = reinterpret_cast<int*>(shared_memory());
  sValues[threadIdx.x] = 1;
  if (meet == Meet::kBlockWithoutSome && threadIdx.x >= 64) return;
  if (meet == Meet::kWarp) {
    __syncwarp();
  } else if (meet == Meet::kHalf) {
    sm90::named_barrier_sync(1 + threadIdx.x / 64, 64);
  } else {
    __syncthreads();
  }
  results[threadIdx.x] = sValues[threadIdx.x ^ distance];
}

TEST(Emulator, AMeetingOrdersThoseThatMeet) {
  DeviceArray<int> results(128);
  const auto run = [&](Meet meet, uint32_t distance) {
    launch(read_at_distance, 1, 128, 512, nullptr, results.data(), meet, distance);
  };
  with_seeds([&] {
    run(Meet::kWarp, 16);
    EXPECT_FAILS(run(Meet::kWarp, 32), "race on shared memory");
    run(Meet::kHalf, 32);
    EXPECT_FAILS(run(Meet::kHalf, 64), "race on shared memory");
    run(Meet::kBlock, 64);
    run(Meet::kBlockWithoutSome, 32);
    EXPECT_FAILS(run(Meet::kBlockWithoutSome, 64), "race on shared memory");
  });
}

// Global memory: pairs of lanes that swap, or a flag that all set.
__global__ void swap_pairs(int* values, bool sync) {
  const auto lane = static_cast<int>(threadIdx.x);
  values[lane] = lane;
  if (sync) __syncwarp(0x3u << (lane & ~1));
  const int other = values[lane ^ 1];
  if (sync) __syncwarp();
  values[lane] = other;
}
__global__ void set_flag(uint8_t* flag, bool relaxed) {
  if (relaxed) {
    store_relaxed(flag, 1);
  } else {
    *flag = 1;
  }
}

TEST(Emulator, FindsRacesOnGlobalMemory) {
  DeviceArray<int> values(32);
  DeviceArray<uint8_t> flag(1);
  with_seeds([&] {
    launch(swap_pairs, 1, 32, 0, nullptr, values.data(), true);
    EXPECT_EQ(values.download()[6], 7);
    EXPECT_FAILS(launch(swap_pairs, 1, 32, 0, nullptr, values.data(), false),
                 "race on global memory");
    launch(set_flag, 2, 64, 0, nullptr, flag.data(), true);
    EXPECT_FAILS(launch(set_flag, 2, 64, 0, nullptr, flag.data(), false), "race on global memory");
    launch(set_flag, 2, 1, 0, nullptr, flag.data(), false);  // CTAs are not held against each other
  });
}

// Lanes that arrive at an mbarrier for their warp after __syncwarp, or too early.
__global__ void arrive_for_the_warp(int* results, bool sync) {
  auto* sValues = reinterpret_cast<int*>(shared_memory());
  auto* barrier = reinterpret_cast<sm90::Barrier*>(shared_memory() + 128);
  if (threadIdx.x == 0) sm90::barrier_init(barrier, 1);
  __syncthreads();
  if (threadIdx.x < 32) {
    sValues[threadIdx.x] = 1;
    if (sync) __syncwarp();
    if (threadIdx.x == 7) sm90::barrier_arrive(barrier);
  } else {
    sm90::barrier_wait(barrier, 0);
    results[threadIdx.x - 32] = sValues[threadIdx.x - 32];
  }
}

TEST(Emulator, ArrivalForAWarpNeedsSyncwarp) {
  DeviceArray<int> results(32);
  with_seeds([&] {
    launch(arrive_for_the_warp, 1, 64, 136, nullptr, results.data(), true);
    EXPECT_FAILS(launch(arrive_for_the_warp, 1, 64, 136, nullptr, results.data(), false),
                 "race on shared");
  });
}

__global__ void half_at_the_barrier() {
  if (threadIdx.x < 32) sm90::named_barrier_sync(1, 64);
  __syncthreads();
}
__global__ void half_the_warp() {
  if (threadIdx.x < 16) __shfl_sync(kAll, 1, 0);
}
__global__ void beyond_shared_memory() { shared_memory()[threadIdx.x] = std::byte{1}; }
__global__ void divergent() {
  if (threadIdx.x < 16) {
    __ballot_sync(kAll, 1);
  } else {
    __syncwarp();
  }
}

TEST(Emulator, MistakesAreNamed) {
  EXPECT_FAILS(launch(half_at_the_barrier, 1, 64, 0, nullptr), "no thread can go on");
  EXPECT_FAILS(launch(half_the_warp, 1, 32, 0, nullptr), "__shfl_sync");
  EXPECT_FAILS(launch(beyond_shared_memory, 1, 64, 32, nullptr), "beyond its shared memory");
  EXPECT_FAILS(launch(divergent, 1, 32, 0, nullptr), "different instructions");
}

__global__ void write_at(std::byte* data, int64_t offset) { data[offset] = std::byte{1}; }

TEST(EmulatorDeathTest, MemoryIsGuarded) {
  std::byte* data = nullptr;
  ASSERT_EQ(cudaMalloc(reinterpret_cast<void**>(&data), 1000), cudaSuccess);
  EXPECT_DEATH(data[0] = std::byte{1}, "the host accesses");
  EXPECT_DEATH(launch(write_at, 1, 1, 0, nullptr, data, int64_t{5000}), "no memory of the device");
  launch(write_at, 1, 1, 0, nullptr, data, int64_t{1001});
  EXPECT_EQ(cudaFree(data), cudaErrorIllegalAddress);
  EXPECT_EQ(cudaGetLastError(), cudaErrorIllegalAddress);
}

// ---- Streams

__global__ void increment(int* value) { *value += 1; }

TEST(Emulator, GraphsRunWhenLaunched) {
  DeviceArray<int> value(1);
  cudaStream_t stream = nullptr;
  ASSERT_EQ(cudaStreamCreate(&stream), cudaSuccess);
  ASSERT_EQ(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), cudaSuccess);
  ASSERT_EQ(cudaMemsetAsync(value.data(), 0, sizeof(int), stream), cudaSuccess);
  launch(increment, 1, 1, 0, stream, value.data());
  launch(increment, 1, 1, 0, stream, value.data());
  EXPECT_EQ(cudaStreamSynchronize(stream), cudaErrorStreamCaptureUnsupported);
  EXPECT_EQ(cudaGetLastError(), cudaErrorStreamCaptureUnsupported);
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t executable = nullptr;
  ASSERT_EQ(cudaStreamEndCapture(stream, &graph), cudaSuccess);
  ASSERT_EQ(cudaGraphInstantiate(&executable, graph, 0), cudaSuccess);
  for (int run = 0; run < 2; ++run) {
    value.host[0] = 7;
    value.upload();
    ASSERT_EQ(cudaGraphLaunch(executable, stream), cudaSuccess);
    EXPECT_EQ(value.download()[0], 2);
  }
  EXPECT_EQ(cudaGraphExecDestroy(executable), cudaSuccess);
  EXPECT_EQ(cudaGraphDestroy(graph), cudaSuccess);
  EXPECT_EQ(cudaStreamDestroy(stream), cudaSuccess);
}

// ---- Compute capability 8.0

// d [16, 8] = a [16, 16] b, where b is stored as [8, 16], or as [16, 8] if kTransposed.
template <typename T, bool kTransposed>
__global__ void warp_product(const T* a, const T* b, float* d, int wait) {
  const int lane = static_cast<int>(threadIdx.x);
  auto* sA = reinterpret_cast<T*>(shared_memory());
  T* sB = sA + 256;
  cp_async<16>(shared_address(sA + lane * 8), a + lane * 8);
  if (lane < 16) cp_async<16>(shared_address(sB + lane * 8), b + lane * 8);
  cp_async_commit();
  if (wait != 0) cp_async_wait<0>();
  __syncwarp();
  uint32_t rA[4], rB[2];
  ldmatrix_x4(rA, shared_address(sA + lane % 16 * 16 + lane / 16 * 8));
  if constexpr (kTransposed) {
    ldmatrix_x2_trans(rB, shared_address(sB + lane % 16 * 8));
  } else {
    ldmatrix_x2(rB, shared_address(sB + lane % 8 * 16 + lane / 8 % 2 * 8));
  }
  float rD[4] = {};
  mma_m16n8k16<T>(rD, rA, rB[0], rB[1]);
  for (int i = 0; i < 4; ++i) {
    d[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = rD[i];
  }
}

template <typename T, bool kTransposed>
void check_warp_product() {
  DeviceArray<T> a(16 * 16), b(16 * 8);
  DeviceArray<float> d(16 * 8);
  fill_random(a.host, 1);
  fill_random(b.host, 2);
  launch(warp_product<T, kTransposed>, 1, 32, 1024, nullptr, a.upload(), b.upload(), d.data(), 1);
  d.download();
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < 8; ++j) {
      float sum = 0;
      for (int k = 0; k < 16; ++k) {
        sum += float(a.host[i * 16 + k]) * float(b.host[kTransposed ? k * 8 + j : j * 16 + k]);
      }
      EXPECT_NEAR(d.host[i * 8 + j], sum, 1e-5F) << i << " " << j;
    }
  }
  launch(warp_product<T, kTransposed>, 1, 32, 1024, nullptr, a.upload(), b.upload(), d.data(), 0);
  for (const float value : d.download()) EXPECT_TRUE(std::isnan(value));
}

TEST(Emulator, WarpProduct) {
  check_warp_product<__nv_bfloat16, false>();
  check_warp_product<__nv_bfloat16, true>();
  check_warp_product<__half, false>();
  check_warp_product<__half, true>();
}

__global__ void copy_in_part(const std::byte* from, std::byte* to) {
  cp_async<16>(shared_address(shared_memory()), from, 5);
  cp_async_commit();
  cp_async<8>(shared_address(shared_memory() + 16), from, 0);
  cp_async_commit();
  cp_async_wait<1>();
  for (int i = 0; i < 24; ++i) to[i] = shared_memory()[i];
}
__global__ void copy_misaligned(const std::byte* from) {
  cp_async<8>(shared_address(shared_memory()), from + 4);
}

TEST(Emulator, CopiesLandAtTheWait) {
  DeviceArray<std::byte> from(16), to(24);
  for (size_t i = 0; i < 16; ++i) from.host[i] = static_cast<std::byte>(i + 1);
  launch(copy_in_part, 1, 1, 32, nullptr, from.upload(), to.data());
  to.download();
  for (size_t i = 0; i < 24; ++i) {
    EXPECT_EQ(to.host[i], i < 5 ? from.host[i] : i < 16 ? std::byte{0} : std::byte{0xff}) << i;
  }
  EXPECT_FAILS(launch(copy_misaligned, 1, 1, 32, nullptr, from.data()), "cp.async of 8 bytes");
}

}  // namespace
}  // namespace flexprefill
