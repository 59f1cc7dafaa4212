// The CUDA runtime's functions for one emulated device. Work runs when it is enqueued. Device
// memory can be reached only by work of a stream: a host that reads it gets a segmentation fault,
// as does a kernel beyond an allocation's pages; inside the pages, cudaFree finds what was written.
#include "cuda_emulator/runtime.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "cuda_emulator/emulator.h"

struct CUstream_st {
  CUgraph_st* captures = nullptr;
};
struct CUevent_st {};
struct CUgraph_st {
  std::vector<std::function<void()>> work;
};
struct CUgraphExec_st {
  std::vector<std::function<void()>> work;
};

namespace cuda_emulator {
namespace {

constexpr size_t kReserved = size_t{1} << 38;
constexpr size_t kMemory = size_t{4} << 30;
constexpr size_t kPage = 4096;
constexpr size_t kAlignment = 256;
constexpr std::byte kGuard{0xa5};

struct Allocation {
  std::byte* pages;
  size_t page_bytes;
  size_t bytes;
};

class Memory {
 public:
  std::recursive_mutex mutex;

  // nullptr where there is not enough.
  std::byte* allocate(size_t bytes) {
    if (start_ == nullptr) {
      set_up();
      void* reserved =
          mmap(nullptr, kReserved, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (reserved == MAP_FAILED) return nullptr;
      start_ = static_cast<std::byte*>(reserved);
    }
    const size_t room = (bytes + kAlignment - 1) / kAlignment * kAlignment;
    const size_t page_bytes = (room + kPage - 1) / kPage * kPage;
    if (bytes > kMemory || allocated_ + bytes > kMemory ||
        used_ + page_bytes + 2 * kPage > kReserved) {
      return nullptr;
    }
    std::byte* pages = start_ + used_ + kPage;
    used_ += page_bytes + kPage;
    allocated_ += bytes;
    std::byte* data = pages + page_bytes - room;  // as near to the page after it as can be
    mprotect(pages, page_bytes, PROT_READ | PROT_WRITE);
    std::fill(pages, data, kGuard);
    std::fill_n(data, bytes, kPoison);
    std::fill(data + bytes, pages + page_bytes, kGuard);
    allocations_[data] = {pages, page_bytes, bytes};
    if (open_ == 0) mprotect(pages, page_bytes, PROT_NONE);
    return data;
  }

  cudaError_t release(std::byte* data) {
    const auto found = allocations_.find(data);
    if (found == allocations_.end()) return cudaErrorInvalidValue;
    const Allocation allocation = found->second;
    mprotect(allocation.pages, allocation.page_bytes, PROT_READ | PROT_WRITE);
    const auto intact = [](std::byte byte) { return byte == kGuard; };
    const bool whole =
        std::all_of(allocation.pages, data, intact) &&
        std::all_of(data + allocation.bytes, allocation.pages + allocation.page_bytes, intact);
    allocations_.erase(found);
    allocated_ -= allocation.bytes;
    madvise(allocation.pages, allocation.page_bytes, MADV_DONTNEED);
    mprotect(allocation.pages, allocation.page_bytes, PROT_NONE);
    if (whole) return cudaSuccess;
    std::fprintf(stderr, "CUDA emulator: something was written beyond an allocation of %zu bytes\n",
                 allocation.bytes);
    return cudaErrorIllegalAddress;
  }

  bool is_device(const void* pointer) const {
    return start_ != nullptr && pointer >= start_ && pointer < start_ + kReserved;
  }

  // Whether all of it lies in one allocation.
  bool holds(const void* pointer, size_t bytes) const {
    const auto* data = static_cast<const std::byte*>(pointer);
    auto after = allocations_.upper_bound(const_cast<std::byte*>(data));
    if (after == allocations_.begin()) return false;
    const auto& [first, allocation] = *--after;
    return data + bytes <= first + allocation.bytes;
  }

  void open() {
    if (open_++ == 0) protect(PROT_READ | PROT_WRITE);
  }
  void close() {
    if (--open_ == 0) protect(PROT_NONE);
  }
  size_t free_bytes() const { return kMemory - allocated_; }

 private:
  void protect(int protection) {
    for (const auto& [data, allocation] : allocations_) {
      mprotect(allocation.pages, allocation.page_bytes, protection);
    }
  }

  std::byte* start_ = nullptr;
  size_t used_ = 0, allocated_ = 0;
  int open_ = 0;
  std::map<std::byte*, Allocation> allocations_;
};

Memory& memory() {
  static Memory instance;
  return instance;
}

class OpenMemory {
 public:
  OpenMemory() : lock_(memory().mutex) { memory().open(); }
  ~OpenMemory() { memory().close(); }
  OpenMemory(const OpenMemory&) = delete;
  OpenMemory& operator=(const OpenMemory&) = delete;

 private:
  std::lock_guard<std::recursive_mutex> lock_;
};

thread_local cudaError_t last_error = cudaSuccess;

cudaError_t report(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

// Host memory: all that is not the device's.
bool reachable(const void* pointer, size_t bytes, bool on_device) {
  return on_device ? memory().holds(pointer, bytes) : !memory().is_device(pointer);
}

cudaError_t copy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind,
                 cudaStream_t stream) {
  const bool to_device = kind == cudaMemcpyDefault
                             ? memory().is_device(to)
                             : kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice;
  const bool from_device = kind == cudaMemcpyDefault
                               ? memory().is_device(from)
                               : kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice;
  if (bytes == 0) return cudaSuccess;
  if (!reachable(to, bytes, to_device) || !reachable(from, bytes, from_device)) {
    return report(cudaErrorInvalidValue);
  }
  on_stream(stream, [=] { std::memmove(to, from, bytes); });
  return cudaSuccess;
}

cudaError_t set(void* to, int value, size_t bytes, cudaStream_t stream) {
  if (bytes == 0) return cudaSuccess;
  if (!memory().holds(to, bytes)) return report(cudaErrorInvalidValue);
  on_stream(stream, [=] { std::memset(to, value, bytes); });
  return cudaSuccess;
}

cudaError_t attribute(int* value, cudaDeviceAttr name) {
  switch (name) {
    case cudaDevAttrComputeCapabilityMajor:
      *value = settings().major;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = settings().minor;
      return cudaSuccess;
    case cudaDevAttrMultiProcessorCount:
      *value = settings().multiprocessors;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = static_cast<int>(shared_bytes_limit());
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = static_cast<int>(shared_bytes_limit() + 1024);
      return cudaSuccess;
    case cudaDevAttrL2CacheSize:
      *value = 50 << 20;
      return cudaSuccess;
    case cudaDevAttrMaxThreadsPerBlock:
      *value = 1024;
      return cudaSuccess;
    case cudaDevAttrPageableMemoryAccess:
      *value = 0;
      return cudaSuccess;
    default:
      return report(cudaErrorNotSupported);
  }
}

}  // namespace

bool is_device_memory(const void* pointer) { return memory().is_device(pointer); }

void on_stream(cudaStream_t stream, std::function<void()> work) {
  if (stream != nullptr && stream->captures != nullptr) {
    stream->captures->work.push_back(std::move(work));
    return;
  }
  const OpenMemory open;
  work();
}

}  // namespace cuda_emulator

using namespace cuda_emulator;

extern "C" {

// ---- Devices and errors

cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
  return report(device == 0 ? cudaSuccess : cudaErrorInvalidDevice);
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
  *properties = {};
  std::snprintf(properties->name, sizeof(properties->name), "emulated device %d.%d",
                settings().major, settings().minor);
  properties->major = settings().major;
  properties->minor = settings().minor;
  properties->multiProcessorCount = settings().multiprocessors;
  properties->sharedMemPerBlockOptin = shared_bytes_limit();
  properties->sharedMemPerMultiprocessor = shared_bytes_limit() + 1024;
  properties->l2CacheSize = 50 << 20;
  properties->totalGlobalMem = kMemory;
  properties->warpSize = 32;
  properties->maxThreadsPerBlock = 1024;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr name, int) {
  return attribute(value, name);
}
cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
cudaError_t cudaPeekAtLastError() { return last_error; }
cudaError_t cudaGetLastError() {
  const cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}
const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "cudaSuccess";
    case cudaErrorInvalidValue:
      return "cudaErrorInvalidValue";
    case cudaErrorInvalidDevice:
      return "cudaErrorInvalidDevice";
    case cudaErrorMemoryAllocation:
      return "cudaErrorMemoryAllocation";
    case cudaErrorIllegalAddress:
      return "cudaErrorIllegalAddress";
    case cudaErrorNotSupported:
      return "cudaErrorNotSupported";
    default:
      return "another error";
  }
}
const char* cudaGetErrorString(cudaError_t error) { return cudaGetErrorName(error); }

// ---- Memory

cudaError_t cudaMalloc(void** pointer, size_t bytes) {
  const std::lock_guard lock(memory().mutex);
  *pointer = bytes == 0 ? nullptr : memory().allocate(bytes);
  return report(*pointer == nullptr && bytes != 0 ? cudaErrorMemoryAllocation : cudaSuccess);
}
cudaError_t cudaFree(void* pointer) {
  const std::lock_guard lock(memory().mutex);
  return pointer == nullptr ? cudaSuccess
                            : report(memory().release(static_cast<std::byte*>(pointer)));
}
cudaError_t cudaMallocAsync(void** pointer, size_t bytes, cudaStream_t) {
  return cudaMalloc(pointer, bytes);
}
cudaError_t cudaFreeAsync(void* pointer, cudaStream_t) { return cudaFree(pointer); }
cudaError_t cudaMallocHost(void** pointer, size_t bytes) {
  *pointer = ::operator new(bytes);
  return cudaSuccess;
}
cudaError_t cudaHostAlloc(void** pointer, size_t bytes, unsigned) {
  return cudaMallocHost(pointer, bytes);
}
cudaError_t cudaFreeHost(void* pointer) {
  ::operator delete(pointer);
  return cudaSuccess;
}
cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  *free = memory().free_bytes();
  *total = kMemory;
  return cudaSuccess;
}
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* pointer) {
  *attributes = {};
  const bool device = memory().holds(pointer, 0);
  attributes->type = device ? cudaMemoryTypeDevice : cudaMemoryTypeUnregistered;
  attributes->devicePointer = device ? const_cast<void*>(pointer) : nullptr;
  return cudaSuccess;
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
  return copy(to, from, bytes, kind, nullptr);
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t stream) {
  return copy(to, from, bytes, kind, stream);
}
cudaError_t cudaMemcpy2D(void* to, size_t to_pitch, const void* from, size_t from_pitch,
                         size_t row_bytes, size_t rows, cudaMemcpyKind kind) {
  for (size_t row = 0; row < rows; ++row) {
    const cudaError_t error =
        copy(static_cast<std::byte*>(to) + row * to_pitch,
             static_cast<const std::byte*>(from) + row * from_pitch, row_bytes, kind, nullptr);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}
cudaError_t cudaMemset(void* to, int value, size_t bytes) { return set(to, value, bytes, nullptr); }
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream) {
  return set(to, value, bytes, stream);
}

// ---- Streams, events, graphs

// Where a stream is captured, its synchronisation is refused and ends the capture.
static cudaError_t synchronize(cudaStream_t stream) {
  return report(stream != nullptr && stream->captures != nullptr ? cudaErrorStreamCaptureUnsupported
                                                                 : cudaSuccess);
}
cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
cudaError_t cudaStreamCreate(cudaStream_t* stream) {
  *stream = new CUstream_st;
  return cudaSuccess;
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  return cudaStreamCreate(stream);
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  delete stream;
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) { return synchronize(stream); }
cudaError_t cudaStreamQuery(cudaStream_t stream) { return synchronize(stream); }
cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned) { return cudaSuccess; }
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  *status = stream != nullptr && stream->captures != nullptr ? cudaStreamCaptureStatusActive
                                                             : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
  if (stream == nullptr || stream->captures != nullptr) {
    return report(cudaErrorStreamCaptureUnsupported);
  }
  stream->captures = new CUgraph_st;
  return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  *graph = stream->captures;
  stream->captures = nullptr;
  return report(*graph == nullptr ? cudaErrorIllegalState : cudaSuccess);
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t graph,
                                 unsigned long long) {
  *executable = new CUgraphExec_st{graph->work};
  return cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream) {
  for (const auto& work : executable->work) on_stream(stream, work);
  return cudaSuccess;
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) {
  delete executable;
  return cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete graph;
  return cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t* event) {
  *event = new CUevent_st;
  return cudaSuccess;
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  return cudaEventCreate(event);
}
cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete event;
  return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t) { return cudaSuccess; }
cudaError_t cudaEventSynchronize(cudaEvent_t) { return cudaSuccess; }

// ---- Kernels

cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }

}  // extern "C"
