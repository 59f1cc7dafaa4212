// What compute-sanitizer's racecheck sees of a handover between warps: the same ring of slots,
// filled by one warp and read by another, ordered in three ways, and once not at all.
//   nvcc -std=c++17 -gencode arch=compute_90a,code=sm_90a -lineinfo -o control racecheck_control.cu
//   compute-sanitizer --tool racecheck ./control WAY
// 0: __syncthreads; 1: mbarriers by PTX with parity waits, as attend_sm90 does it; 2:
// cuda::barrier; 3: nothing, a race. Hazards under 1 with none under 0 say that the tool does not
// follow such a barrier; none under 3 would say that it sees nothing at all.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cuda/barrier>
#pragma nv_diag_suppress static_var_with_dynamic_init

namespace {

constexpr int kSlots = 4, kRounds = 64, kThreads = 64;
using Block = cuda::barrier<cuda::thread_scope_block>;

__device__ uint32_t address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}
__device__ void init(uint64_t* barrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(address(barrier)));
}
__device__ void arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(address(barrier)) : "memory");
}
__device__ void wait(uint64_t* barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred p;\nagain:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
      "@!p bra again;\n}\n" ::"r"(address(barrier)),
      "r"(parity)
      : "memory");
}

template <int kWay>
__global__ void hand_over(int* sums) {
  __shared__ int slots[kSlots];
  __shared__ uint64_t full[kSlots], empty[kSlots];
  __shared__ Block step;
  if (threadIdx.x == 0) {
    for (int s = 0; s < kSlots; ++s) {
      init(&full[s]);
      init(&empty[s]);
    }
    init(&step, kThreads);  // of cuda::barrier
  }
  __syncthreads();
  const bool writes = threadIdx.x < 32, first = threadIdx.x % 32 == 0;
  int sum = 0;
  for (int n = 0; n < kRounds; ++n) {
    const int slot = n % kSlots, round = n / kSlots;
    if (writes) {
      if (kWay == 1) wait(&empty[slot], (round & 1) ^ 1);
      if (first) slots[slot] = n;
      if (kWay == 1 && first) arrive(&full[slot]);
    }
    if (kWay == 0) __syncthreads();
    if (kWay == 2) step.arrive_and_wait();
    if (!writes) {
      if (kWay == 1) wait(&full[slot], round & 1);
      sum += slots[slot];
      if (kWay == 1) {
        __syncwarp();
        if (first) arrive(&empty[slot]);
      }
    }
    if (kWay == 0) __syncthreads();
    if (kWay == 2) step.arrive_and_wait();
  }
  if (!writes) sums[threadIdx.x - 32] = sum;
}

template <int kWay>
void run(const char* name) {
  int* sums = nullptr;
  int got[32] = {};
  if (cudaMalloc(&sums, sizeof(got)) != cudaSuccess) std::exit(77);
  hand_over<kWay><<<1, kThreads>>>(sums);
  if (cudaMemcpy(got, sums, sizeof(got), cudaMemcpyDeviceToHost) != cudaSuccess) std::exit(1);
  bool right = true;
  for (const int sum : got) right = right && sum == kRounds * (kRounds - 1) / 2;
  std::printf("control, %s: sums %s\n", name, right ? "right" : "wrong");
  cudaFree(sums);
}

}  // namespace

int main(int argc, char** argv) {
  switch (argc > 1 ? std::atoi(argv[1]) : 1) {
    case 0:
      run<0>("__syncthreads");
      break;
    case 1:
      run<1>("mbarrier, parity wait");
      break;
    case 2:
      run<2>("cuda::barrier");
      break;
    default:
      run<3>("no barrier, a race");
  }
  return 0;
}
