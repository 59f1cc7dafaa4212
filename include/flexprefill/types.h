// Types that every stage shares: tensors, inputs, where to run, errors, workspace.
#ifndef FLEXPREFILL_TYPES_H_
#define FLEXPREFILL_TYPES_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>

#if defined(_WIN32) || defined(FLEXPREFILL_STATIC)
#define FLEXPREFILL_API
#else
#define FLEXPREFILL_API __attribute__((visibility("default")))
#endif

namespace flexprefill {

enum class DType : int32_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

// Which implementation computes. kReference is the double-precision specification, slow on purpose.
// The first three compute on host memory, the others on device memory (float16 and bfloat16).
enum class Backend : int32_t {
  kAuto = 0,  // kCpu
  kReference = 1,
  kCpu = 2,
  kCuda = 3,  // the fastest of the following for the current device
  kSm80 = 4,  // compute capability 8.0 and up: mma.sync and cp.async
  kSm90 = 5,  // compute capability 9.0: wgmma and TMA; a call that TMA cannot address runs as kSm80
};

// Instruction set of the CPU backend. kAuto takes the best that the processor has.
enum class CpuTarget : int32_t {
  kAuto = 0,
  kBaseline = 1,    // whatever the compiler's baseline is, through Highway
  kAvx2 = 2,        // AVX2 + FMA + F16C
  kAvx512 = 3,      // AVX-512 F/BW/CD/DQ/VL
  kAvx512Bf16 = 4,  // kAvx512 and vdpbf16ps
  kAmxBf16 = 5,     // kAvx512Bf16 and tdpbf16ps
  kNeon = 6,
};

enum class ErrorCode : int32_t {
  kInvalidArgument = 1,  // the message names the tensor or option, what was expected, what came
  kUnsupported = 2,      // valid, but not on this backend, build or machine
  kWorkspaceTooSmall = 3,
  kInternal = 4,
};

// The one exception type of the library. Thrown before any output is written.
class FLEXPREFILL_API Error : public std::runtime_error {
 public:
  Error(ErrorCode code, const std::string& message) : std::runtime_error(message), code_(code) {}
  ErrorCode code() const { return code_; }

 private:
  ErrorCode code_;
};

// A borrowed strided tensor. Strides count elements, not bytes; the last dimension must be
// contiguous (stride 1). `data` is not owned and must stay valid for the call.
struct TensorView {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
  int32_t rank = 0;
  std::array<int64_t, 4> shape{};
  std::array<int64_t, 4> strides{};
};

// A contiguous view of `shape`, rank 1 to 4.
FLEXPREFILL_API TensorView contiguous_view(void* data, DType dtype, std::span<const int64_t> shape);

// What attention is asked to compute; causal, bottom-right aligned: the query at row i stands at
// absolute position s_kv - s_q + i, 1 <= s_q <= s_kv.
//
//   layout   q                     k, v                                  lengths
//   batch    [b, s_q, h_q, d_qk]   [b, s_kv, h_kv, d_qk | d_v]           from the shapes
//   packed   [t_q, h_q, d_qk]      [t_kv, h_kv, d_qk | d_v]              cu_seqlens_q, _kv
//   paged    batch or packed q     [pages, page_size, h_kv, d_qk | d_v]  page_table, seqlens_kv
//
// h_q is a multiple of h_kv; d_qk and d_v are multiples of 8 from 16 to 256; q, k, v share one
// element type. Strides are free but for the contiguous last dimension; k and v may interleave.
//
// In a call of a CUDA backend q, k, v, all outputs, the workspace and page_table are memory of the
// current device; cu_seqlens_q, cu_seqlens_kv and seqlens_kv are host memory always, read before
// the call returns. The host does not see the entries of a page_table there: they are not checked.
struct AttentionInput {
  TensorView q, k, v;
  std::span<const int32_t> cu_seqlens_q;   // [b + 1], packed q: starts of the sequences in t_q
  std::span<const int32_t> cu_seqlens_kv;  // [b + 1], packed k and v
  const int32_t* page_table = nullptr;     // [b, max_pages], paged k and v
  int64_t page_table_stride = 0;           // elements between the rows of page_table (>= max_pages)
  int64_t max_pages = 0;
  std::span<const int32_t> seqlens_kv;                // [b], keys of each sequence, paged k and v
  std::optional<float> softmax_scale = std::nullopt;  // 1 / sqrt(d_qk) when absent
  bool gqa_interleave = false;  // query head h reads K/V head h / (h_q / h_kv), or if
                                // interleaved h % h_kv
  int32_t block_size = 128;     // 32, 64 or 128: of queries and of keys
};

// Where and how to run.
struct Execution {
  Backend backend = Backend::kAuto;
  CpuTarget cpu_target = CpuTarget::kAuto;
  int32_t num_threads = 0;  // of the CPU backend; 0: as many as the process may use
  void* stream = nullptr;   // of the CUDA backends: a cudaStream_t of the current device
};

// Caller's scratch memory, any alignment. Sizes come from the *_workspace_size functions, which
// run the same layout code as the calls and need shapes only (data may be nullptr). Contents before
// and after a call mean nothing.
struct Workspace {
  void* data = nullptr;
  size_t bytes = 0;
};

}  // namespace flexprefill

#endif  // FLEXPREFILL_TYPES_H_
