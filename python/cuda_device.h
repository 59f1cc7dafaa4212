// What the extension itself asks of the CUDA runtime. A build without CUDA knows no devices.
#ifndef FLEXPREFILL_PYTHON_CUDA_DEVICE_H_
#define FLEXPREFILL_PYTHON_CUDA_DEVICE_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace flexprefill {

#if defined(FLEXPREFILL_PYTHON_CUDA)
constexpr bool kCudaBuilt = true;
#else
constexpr bool kCudaBuilt = false;
#endif

struct CudaDevice {
  std::string name;
  int32_t major = 0, minor = 0;  // compute capability
  int32_t multiprocessors = 0;
  int64_t memory_bytes = 0;
};

struct CudaInfo {
  bool built = false;   // whether this build has the CUDA backends
  int32_t runtime = 0;  // CUDA version as the runtime numbers it, 13000 for 13.0
  int32_t driver = 0;   // newest CUDA version that the driver runs; 0: no driver
  std::string error;    // why there are no devices, in the runtime's words
  std::vector<CudaDevice> devices;
};
CudaInfo cuda_info();  // asks the driver: milliseconds

// Makes `device` the thread's current device for its lifetime; -1 leaves everything as it is.
class DeviceGuard {
 public:
  explicit DeviceGuard(int32_t device);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = -1;
};

// Waits until everything on the stream of the device is done; throws Error(kInternal) with what
// went wrong there.
void wait_for_stream(int32_t device, void* stream);

// Copies device memory of the current device, in the order of the stream, and waits for it.
void copy_to_host(void* to, const void* from, size_t bytes, void* stream);

}  // namespace flexprefill

#endif  // FLEXPREFILL_PYTHON_CUDA_DEVICE_H_
