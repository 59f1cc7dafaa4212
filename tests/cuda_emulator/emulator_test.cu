// The emulator itself: instructions against plain products, and mistakes that it must find.
#include <gtest/gtest.h>

#include <bit>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "cuda/launch.cuh"
#include "cuda/sm80.cuh"
#include "cuda/sm90.cuh"

namespace flexprefill {
namespace {

constexpr uint32_t kAll = 0xffffffffu;

// Memory of the device with a copy on the host.
template <typename T>
class DeviceArray {
 public:
  explicit DeviceArray(size_t size) : host(size) {
    cuda_check(cudaMalloc(reinterpret_cast<void**>(&data_), size * sizeof(T)), "cudaMalloc");
  }
  ~DeviceArray() { EXPECT_EQ(cudaFree(data_), cudaSuccess); }
  DeviceArray(const DeviceArray&) = delete;
  DeviceArray& operator=(const DeviceArray&) = delete;

  T* upload() {
    cuda_check(cudaMemcpy(data_, host.data(), bytes(), cudaMemcpyHostToDevice), "upload");
    return data_;
  }
  const std::vector<T>& download() {
    cuda_check(cudaMemcpy(host.data(), data_, bytes(), cudaMemcpyDeviceToHost), "download");
    return host;
  }
  T* data() { return data_; }

  std::vector<T> host;

 private:
  size_t bytes() const { return host.size() * sizeof(T); }
  T* data_ = nullptr;
};

template <typename T>
void fill_random(std::vector<T>& values, uint32_t seed) {
  std::mt19937 random(seed);
  std::uniform_real_distribution<float> uniform(-1.0F, 1.0F);
  for (T& value : values) value = T(uniform(random));
}

template <typename Call>
std::string error_of(Call call) {
  try {
    call();
  } catch (const Error& error) {
    return error.what();
  }
  return "no error";
}

#define EXPECT_FAILS(call, text)                                 \
  do {                                                           \
    const std::string message = error_of([&] { call; });         \
    EXPECT_NE(message.find(text), std::string::npos) << message; \
  } while (false)

// With several orders of the threads.
template <typename Call>
void with_seeds(Call call) {
  for (uint64_t seed = 1; seed <= 5; ++seed) {
    SCOPED_TRACE(seed);
    cuda_emulator::settings().seed = seed;
    call();
  }
}

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

// ---- Compute capability 9.0

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
  EXPECT_FAILS(test.run(Mistake::kTooManyBytes), "mbarrier.try_wait (emulator_test.cu");
  test.run(Mistake::kNoWait);
  EXPECT_TRUE(std::isnan(test.d.download()[0]));
}

}  // namespace
}  // namespace flexprefill
