// What tests of the emulator share.
#ifndef FLEXPREFILL_TESTS_CUDA_EMULATOR_EMULATOR_TEST_H_
#define FLEXPREFILL_TESTS_CUDA_EMULATOR_EMULATOR_TEST_H_

#include <gtest/gtest.h>

#include <random>
#include <string>
#include <vector>

#include "cuda/launch.cuh"

namespace flexprefill {

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

}  // namespace flexprefill

#endif  // FLEXPREFILL_TESTS_CUDA_EMULATOR_EMULATOR_TEST_H_
