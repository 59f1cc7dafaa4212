// Device memory for tests: guarded, poisoned, with host copies.
#ifndef FLEXPREFILL_TESTS_DEVICE_MEMORY_H_
#define FLEXPREFILL_TESTS_DEVICE_MEMORY_H_

#if defined(FLEXPREFILL_WITH_CUDA)
#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

namespace flexprefill::testing {

inline void expect_cuda(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
  }
}

// `bytes` of device memory at an address that is `misaligned` more than a multiple of 256, all 0xff
// (NaN in every float type), between guard bytes that nobody may write.
class DeviceMemory {
 public:
  DeviceMemory() = default;
  explicit DeviceMemory(size_t bytes, size_t misaligned = 0)
      : bytes_(bytes), offset_(kGuard + misaligned) {
    expect_cuda(cudaMalloc(&base_, offset_ + bytes_ + kGuard), "memory of a test");
    expect_cuda(cudaMemset(base_, kGuardByte, offset_ + bytes_ + kGuard), "guard");
    expect_cuda(cudaMemset(data(), 0xff, bytes_), "poison");
  }
  DeviceMemory(DeviceMemory&& other) noexcept { *this = std::move(other); }
  DeviceMemory& operator=(DeviceMemory&& other) noexcept {
    std::swap(base_, other.base_);
    std::swap(bytes_, other.bytes_);
    std::swap(offset_, other.offset_);
    return *this;
  }
  ~DeviceMemory() { cudaFree(base_); }

  std::byte* data() const { return static_cast<std::byte*>(base_) + offset_; }
  size_t size() const { return bytes_; }
  void write(const void* from) const {
    expect_cuda(cudaMemcpy(data(), from, bytes_, cudaMemcpyHostToDevice), "copy to the device");
  }
  void read(void* to) const {
    expect_cuda(cudaMemcpy(to, data(), bytes_, cudaMemcpyDeviceToHost), "copy from the device");
  }
  void check_guards(const char* name) const {
    std::vector<unsigned char> all(offset_ + bytes_ + kGuard);
    expect_cuda(cudaMemcpy(all.data(), base_, all.size(), cudaMemcpyDeviceToHost), "guard");
    const auto is_guard = [](unsigned char byte) { return byte == kGuardByte; };
    EXPECT_TRUE(std::all_of(all.begin(), all.begin() + static_cast<int64_t>(offset_), is_guard))
        << name << ": written before its first byte";
    EXPECT_TRUE(std::all_of(all.end() - kGuard, all.end(), is_guard))
        << name << ": written after its last byte";
  }

 private:
  static constexpr int64_t kGuard = 1024;
  static constexpr unsigned char kGuardByte = 0xa5;

  void* base_ = nullptr;
  size_t bytes_ = 0;
  size_t offset_ = 0;
};

}  // namespace flexprefill::testing
#endif

#endif  // FLEXPREFILL_TESTS_DEVICE_MEMORY_H_
