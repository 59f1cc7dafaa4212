// The CUDA backends: what is checked before work, which kernels take a call, and what goes between
// host and device.
#include "cuda/backend_cuda.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "attend/dense_rule.h"
#include "cuda/cuda_check.h"
#include "cuda/device_index.h"

namespace flexprefill {
namespace {

[[noreturn]] void unsupported(const std::string& message) {
  throw Error(ErrorCode::kUnsupported, message);
}

std::string version_text(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

// Throws unless this build's runtime works with the driver and there is a device.
void check_driver() {
  int driver = 0, devices = 0;
  static_cast<void>(cudaDriverGetVersion(&driver));
  const cudaError_t error = cudaGetDeviceCount(&devices);
  if (error == cudaSuccess && devices > 0) return;
  static_cast<void>(cudaGetLastError());
  if (driver == 0) unsupported("backend: no NVIDIA driver found");
  const std::string found = "driver for CUDA " + version_text(driver);
  if (error == cudaErrorInsufficientDriver) {
    unsupported("backend: the " + found + " is too old: this build needs one for CUDA " +
                version_text(CUDART_VERSION));
  }
  unsupported("backend: no CUDA device found (" + found + ", " + cuda_error_text(error) + ")");
}

DeviceInfo query_device(int device) {
  const auto attribute = [device](cudaDeviceAttr which) {
    int value = 0;
    cuda_check(cudaDeviceGetAttribute(&value, which, device), "properties of the device");
    return value;
  };
  const DeviceInfo info{.major = attribute(cudaDevAttrComputeCapabilityMajor),
                        .minor = attribute(cudaDevAttrComputeCapabilityMinor),
                        .multiprocessors = attribute(cudaDevAttrMultiProcessorCount),
                        .shared_bytes = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin),
                        .l2_bytes = attribute(cudaDevAttrL2CacheSize)};
  return info;
}

// "NVIDIA H200 (compute capability 9.0, driver for CUDA 13.0)"
std::string device_name(const DeviceInfo& info) {
  int device = 0, driver = 0;
  cudaDeviceProp properties{};
  cuda_check(cudaGetDevice(&device), "current device");
  cuda_check(cudaGetDeviceProperties(&properties, device), "properties of the device");
  cuda_check(cudaDriverGetVersion(&driver), "version of the driver");
  return std::string(properties.name) + " (compute capability " + std::to_string(info.major) + "." +
         std::to_string(info.minor) + ", driver for CUDA " + version_text(driver) + ")";
}

// kSm80 or kSm90; throws where the card cannot run what was asked for.
Backend card_backend(Backend asked) {
  const DeviceInfo& info = device_info();
  const bool hopper = info.major == 9 && info.minor == 0;
  if (asked == Backend::kSm90 && !hopper) {
    unsupported("backend sm90: expected a card of compute capability 9.0, got " +
                device_name(info));
  }
  return hopper && asked != Backend::kSm80 ? Backend::kSm90 : Backend::kSm80;
}

// ---- Before any work

bool is_capturing(const Execution& execution) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  // Also returns what went wrong on the device since the caller last asked.
  const cudaError_t error =
      cudaStreamIsCapturing(static_cast<cudaStream_t>(execution.stream), &status);
  if (error != cudaSuccess) {
    throw Error(ErrorCode::kInternal, "CUDA reported an error of earlier work, or the stream is " +
                                          ("none of this device's: " + cuda_error_text(error)));
  }
  return status != cudaStreamCaptureStatusNone;
}

// `waits`: what makes the call wait for the stream, or nullptr.
void check_call(const Execution& execution, const char* waits) {
  check_driver();
  // Looked at, not taken: it is the caller's to clear.
  if (const cudaError_t error = cudaPeekAtLastError(); error != cudaSuccess) {
    throw Error(ErrorCode::kInternal,
                "CUDA reported an error of earlier work: " + cuda_error_text(error));
  }
  if (is_capturing(execution) && waits != nullptr) {
    unsupported(std::string(waits) + " waits for the stream, which is being captured in a graph");
  }
}

// Host memory that the device cannot reach would end in a fault of the whole context.
void check_device_memory(const void* data, const char* name) {
  if (data == nullptr) return;
  cudaPointerAttributes attributes{};
  cuda_check(cudaPointerGetAttributes(&attributes, data), name);
  if (attributes.type != cudaMemoryTypeUnregistered) return;
  int device = 0, pageable = 0;
  cuda_check(cudaGetDevice(&device), "current device");
  cuda_check(cudaDeviceGetAttribute(&pageable, cudaDevAttrPageableMemoryAccess, device), name);
  if (pageable != 0) return;
  throw Error(ErrorCode::kInvalidArgument,
              std::string(name) + ": expected device memory for a CUDA backend, got host memory");
}

void check_memory(const Problem& problem, const Arena& arena) {
  check_device_memory(problem.q_view.data, "q");
  check_device_memory(problem.k_view.data, "k");
  check_device_memory(problem.v_view.data, "v");
  check_device_memory(problem.out_view.data, "out");
  check_device_memory(problem.lse_view.data, "lse");
  check_device_memory(problem.page_table, "page_table");
  check_device_memory(arena.base(), "workspace");
}

// All checks of a call; a size query has nothing to check but the card.
void begin(const Problem& problem, const Execution& execution, const Arena& arena,
           const char* waits = nullptr) {
  card_backend(execution.backend);
  if (arena.counting()) return;
  check_call(execution, waits);
  check_memory(problem, arena);
}

void wait(const Execution& execution) {
  cuda_check(cudaStreamSynchronize(static_cast<cudaStream_t>(execution.stream)),
             "waiting for the stream");
}

// ---- The stages, on a DeviceProblem that they share

void run_attend(const DeviceProblem& device, const Problem& problem, const DeviceRows& rows,
                const Execution& execution, Arena& arena) {
  const bool hopper = card_backend(execution.backend) == Backend::kSm90;
  if (arena.counting()) {
    // Which kernel takes the call depends on how the data will be aligned: enough for both.
    Problem shapes = problem;
    shapes.q_view.data = shapes.k_view.data = shapes.v_view.data = nullptr;
    Arena sm90 = arena;
    attend_sm80(device, problem, rows, execution, arena);
    if (!hopper || !attend_sm90_takes(shapes)) return;
    attend_sm90(device, problem, rows, execution, sm90);
    if (sm90.bytes() > arena.bytes()) arena = sm90;
    return;
  }
  const bool sm90 = hopper && attend_sm90_takes(problem);
  (sm90 ? attend_sm90 : attend_sm80)(device, problem, rows, execution, arena);
}

// The audit's place on the device, and the way back. A size query does not know whether an audit
// will be asked for, so it counts one.
class AuditCopy {
 public:
  AuditCopy(const Problem& problem, Arena& arena, std::span<HeadAudit> audit) : host_(audit) {
    if (arena.counting() || !audit.empty()) {
      device_ = arena.take<HeadAudit>(problem.b() * problem.h_q);
    }
  }
  HeadAudit* device() const { return device_; }
  void copy_back(const Execution& execution) const {
    if (host_.empty()) return;
    cuda_check(cudaMemcpyAsync(host_.data(), device_, host_.size_bytes(), cudaMemcpyDeviceToHost,
                               static_cast<cudaStream_t>(execution.stream)),
               "audit");
    wait(execution);
  }

 private:
  std::span<HeadAudit> host_;
  HeadAudit* device_ = nullptr;
};

// ---- What api.cc calls

void select(const Problem& problem, const Pattern& pattern, const Execution& execution,
            Arena& arena, const BlockBits& bits, std::span<HeadAudit> audit) {
  begin(problem, execution, arena, "select into a BlockIndex");
  const AuditCopy copy(problem, arena, audit);
  const DeviceProblem device = make_device_problem(problem, arena, execution.stream);
  select_cuda(device, problem, pattern, execution, arena, bits.words, copy.device());
  if (!arena.counting()) copy.copy_back(execution);
}

// Bits of a host index, in the workspace.
std::vector<uint64_t> host_bits(const Problem& problem, const BlockIndex& index) {
  BlockBits bits = BlockBits::layout(problem);
  std::vector<uint64_t> words(bits.word_count());
  bits.words = words.data();
  int64_t r = 0;
  for (int64_t s = 0; s < problem.b(); ++s) {
    for (int32_t head = 0; head < problem.h_q; ++head) {
      for (int64_t i = 0; i < problem.grids[s].n_q; ++i, ++r) {
        uint64_t* row = bits.row(problem, s, head, i);
        for (int64_t e = index.indptr[r]; e < index.indptr[r + 1]; ++e) {
          row[index.indices[e] / 64] |= uint64_t{1} << (index.indices[e] % 64);
        }
      }
    }
  }
  return words;
}

void attend(const Problem& problem, const BlockRows& rows, const Execution& execution,
            Arena& arena) {
  const bool has_index = rows.csr != nullptr;
  begin(problem, execution, arena, has_index ? "attend with a BlockIndex" : nullptr);
  DeviceRows device_rows{
      .bits = nullptr, .window = rows.window, .mean_correction = rows.mean_correction};
  uint64_t* words = nullptr;
  if (has_index) words = arena.take<uint64_t>(BlockBits::layout(problem).word_count());
  const DeviceProblem device = make_device_problem(problem, arena, execution.stream);
  if (has_index && !arena.counting()) {
    const std::vector<uint64_t> host = host_bits(problem, *rows.csr);
    cuda_check(cudaMemcpyAsync(words, host.data(), host.size() * sizeof(uint64_t),
                               cudaMemcpyHostToDevice, static_cast<cudaStream_t>(execution.stream)),
               "index");
    wait(execution);  // before `host` goes
  }
  device_rows.bits = words;
  run_attend(device, problem, device_rows, execution, arena);
}

// The measured rule is a part of the automatic choice: a caller who names sm80 or sm90, or asks for
// the figures of the heads, gets the pattern that was asked for. A size query has room for it.
bool goes_dense(const Problem& problem, const Pattern& pattern, const Execution& execution,
                const Arena& arena, bool audited) {
  const Backend card = card_backend(execution.backend);
  const bool automatic = execution.backend == Backend::kCuda && !audited && !arena.counting();
  const DenseRule rule = automatic ? dense_rule(card) : DenseRule{card, 0, 0, 0};
  return prefill_is_dense(rule, problem, pattern, device_info().multiprocessors);
}

void prefill(const Problem& problem, KeptMassGuard& guard, const BlockRows& rows,
             const Execution& execution, Arena& arena, std::span<HeadAudit> audit) {
  const char* audited = guard.active() ? "prefill with min_kept_mass" : "prefill with an audit";
  begin(problem, execution, arena, audit.empty() ? nullptr : audited);
  if (goes_dense(problem, guard.pattern(), execution, arena, !audit.empty())) {
    const DeviceProblem device = make_device_problem(problem, arena, execution.stream);
    run_attend(device, problem, {.bits = nullptr, .window = {}}, execution, arena);
    if (!arena.counting()) std::fill(audit.begin(), audit.end(), HeadAudit{});
    return;
  }
  const AuditCopy copy(problem, arena, audit);
  const DeviceProblem device = make_device_problem(problem, arena, execution.stream);
  uint64_t* bits = rows.bits->words;
  const Arena before = arena;
  const bool sparse = guard.select(audit, [&](const Pattern& pattern) {
    arena = before;
    select_cuda(device, problem, pattern, execution, arena, bits, copy.device());
    if (guard.active()) copy.copy_back(execution);
  });
  DeviceRows device_rows{.bits = nullptr, .window = {}};
  if (sparse) {
    device_rows = {.bits = bits, .window = rows.window, .mean_correction = rows.mean_correction};
  }
  run_attend(device, problem, device_rows, execution, arena);
  if (!arena.counting() && !guard.active()) copy.copy_back(execution);
}

std::vector<uint64_t> read_bits(const BlockBits& bits, const Execution& execution) {
  std::vector<uint64_t> words(bits.word_count());
  cuda_check(cudaMemcpyAsync(words.data(), bits.words, words.size() * sizeof(uint64_t),
                             cudaMemcpyDeviceToHost, static_cast<cudaStream_t>(execution.stream)),
             "index");
  wait(execution);
  return words;
}

void check_index_memory(const DeviceBlockIndex& index, const Arena& arena) {
  if (arena.counting()) return;
  check_device_memory(index.indptr, "indptr");
  check_device_memory(index.indices, "indices");
}

void select_to_index(const Problem& problem, const Pattern& pattern, const Execution& execution,
                     Arena& arena, const DeviceBlockIndex& index, HeadAudit* audit) {
  begin(problem, execution, arena);
  check_index_memory(index, arena);
  if (!arena.counting()) check_device_memory(audit, "audit");
  const int64_t words = BlockBits::layout(problem).word_count();
  auto* bits = arena.take<uint64_t>(words);
  int64_t* sums = lay_out_csr_sums(problem.first_row.back(), arena);
  const DeviceProblem device = make_device_problem(problem, arena, execution.stream);
  select_cuda(device, problem, pattern, execution, arena, bits, audit);
  if (!arena.counting()) bits_to_csr(device, bits, words, sums, index, execution.stream);
}

void attend_index(const Problem& problem, const DeviceBlockIndex& index, const Execution& execution,
                  Arena& arena) {
  begin(problem, execution, arena);
  check_index_memory(index, arena);
  auto* bits = arena.take<uint64_t>(BlockBits::layout(problem).word_count());
  const DeviceProblem device = make_device_problem(problem, arena, execution.stream);
  if (!arena.counting()) csr_to_bits(device, index, bits, execution.stream);
  const TokenWindow window = TokenWindow::of(index.global_window, index.local_window);
  const DeviceRows rows{.bits = bits, .window = window, .mean_correction = index.mean_correction};
  run_attend(device, problem, rows, execution, arena);
}

}  // namespace

const DeviceInfo& device_info() {
  static std::mutex mutex;
  static std::map<int, DeviceInfo> known;
  check_driver();
  int device = 0;
  cuda_check(cudaGetDevice(&device), "current device");
  const std::lock_guard lock(mutex);
  const auto found = known.find(device);
  if (found != known.end()) return found->second;
  const DeviceInfo info = query_device(device);
  if (info.major < 8) {
    unsupported("backend: expected a card of compute capability 8.0 or newer, got " +
                device_name(info));
  }
  return known.emplace(device, info).first->second;
}

bool overlaps_kernels() { return device_info().major == 9 && device_info().minor == 0; }

const BackendApi& cuda_backend_api() {
  static constexpr BackendApi::OnDevice kOnDevice{prefill, read_bits, select_to_index,
                                                  attend_index};
  static constexpr BackendApi kApi{select, attend, &kOnDevice};
  return kApi;
}

}  // namespace flexprefill
