// The C API: converts its structs, calls the C++ API, turns exceptions into statuses.
#include "flexprefill/c_api.h"

#include <algorithm>
#include <cstddef>
#include <cstdio>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <span>
#include <stdexcept>
#include <string>
#include <variant>
#include <vector>

#include "flexprefill/flexprefill.h"

struct flexprefill_block_index {
  flexprefill::BlockIndex index;
};

struct flexprefill_workspace {
  flexprefill::WorkspaceBuffer buffer;
};

namespace flexprefill {
namespace {

static_assert(FLEXPREFILL_INVALID_ARGUMENT == static_cast<int>(ErrorCode::kInvalidArgument));
static_assert(FLEXPREFILL_UNSUPPORTED == static_cast<int>(ErrorCode::kUnsupported));
static_assert(FLEXPREFILL_WORKSPACE_TOO_SMALL == static_cast<int>(ErrorCode::kWorkspaceTooSmall));
static_assert(FLEXPREFILL_INTERNAL == static_cast<int>(ErrorCode::kInternal));
static_assert(FLEXPREFILL_FLOAT32 == static_cast<int>(DType::kFloat32));
static_assert(FLEXPREFILL_FLOAT16 == static_cast<int>(DType::kFloat16));
static_assert(FLEXPREFILL_BFLOAT16 == static_cast<int>(DType::kBFloat16));
static_assert(FLEXPREFILL_BACKEND_AUTO == static_cast<int>(Backend::kAuto));
static_assert(FLEXPREFILL_BACKEND_REFERENCE == static_cast<int>(Backend::kReference));
static_assert(FLEXPREFILL_BACKEND_CPU == static_cast<int>(Backend::kCpu));
static_assert(FLEXPREFILL_BACKEND_CUDA == static_cast<int>(Backend::kCuda));
static_assert(FLEXPREFILL_BACKEND_SM80 == static_cast<int>(Backend::kSm80));
static_assert(FLEXPREFILL_BACKEND_SM90 == static_cast<int>(Backend::kSm90));
static_assert(FLEXPREFILL_CPU_AUTO == static_cast<int>(CpuTarget::kAuto));
static_assert(FLEXPREFILL_CPU_NEON == static_cast<int>(CpuTarget::kNeon));
static_assert(FLEXPREFILL_HEAD_DENSE == static_cast<int>(HeadPattern::kDense));
static_assert(FLEXPREFILL_HEAD_BLOCK_COVER == static_cast<int>(HeadPattern::kBlockCover));
static_assert(FLEXPREFILL_HEAD_BLOCK_SPARSE == static_cast<int>(HeadPattern::kBlockSparse));
static_assert(FLEXPREFILL_HEAD_STREAMING == static_cast<int>(HeadPattern::kStreaming));
static_assert(FLEXPREFILL_GUARD_RAISED_GAMMA == static_cast<int>(Guard::kRaisedGamma));
static_assert(FLEXPREFILL_GUARD_DENSE == static_cast<int>(Guard::kDense));
// A view hands the sequences out as pairs of int64.
static_assert(sizeof(SequenceLengths) == 2 * sizeof(int64_t));

// Fixed, so that keeping a message never allocates.
thread_local char last_error[1024] = "";

flexprefill_status fail(flexprefill_status status, const char* message) {
  std::snprintf(last_error, sizeof(last_error), "%s", message);
  return status;
}

// Runs `body`; nothing leaves it but a status.
template <typename Body>
flexprefill_status guarded(Body&& body) noexcept {
  try {
    body();
    return FLEXPREFILL_OK;
  } catch (const Error& error) {
    return fail(static_cast<flexprefill_status>(error.code()), error.what());
  } catch (const std::bad_alloc&) {
    return fail(FLEXPREFILL_OUT_OF_MEMORY, "out of memory");
  } catch (const std::length_error&) {  // a container that no memory could hold
    return fail(FLEXPREFILL_OUT_OF_MEMORY, "out of memory");
  } catch (const std::exception& error) {
    return fail(FLEXPREFILL_INTERNAL, error.what());
  } catch (...) {
    return fail(FLEXPREFILL_INTERNAL, "an exception of unknown type");
  }
}

[[noreturn]] void refuse(const std::string& message) {
  throw Error(ErrorCode::kInvalidArgument, message);
}

template <typename T>
T& required(T* pointer, const char* name) {
  if (pointer == nullptr) refuse(std::string(name) + ": expected a pointer, got NULL");
  return *pointer;
}

template <typename T>
std::span<T> array(T* data, int64_t count, const char* name) {
  if (count < 0) {
    refuse(std::string(name) + ": expected a count of at least 0, got " + std::to_string(count));
  }
  if (count > 0 && data == nullptr) {
    refuse(std::string(name) + ": expected " + std::to_string(count) + " entries, got NULL");
  }
  return {data, static_cast<size_t>(count)};
}

// Copies a struct of the caller's size over one with the defaults. One from a newer header is
// taken as long as it asks for nothing that is not known here.
template <typename Struct>
Struct read_struct(const Struct* from, Struct defaults, size_t first_version, const char* name) {
  const size_t size = required(from, name).struct_size;
  if (size < first_version) {
    refuse(std::string(name) + ".struct_size: expected at least " + std::to_string(first_version) +
           ", got " + std::to_string(size) + " (set it to sizeof, or use the *_default function)");
  }
  if (size > sizeof(Struct)) {
    constexpr size_t kMost = 4096;  // more is no struct of a later version but garbage
    const auto* bytes = reinterpret_cast<const unsigned char*>(from);
    if (size > kMost ||
        std::any_of(bytes + sizeof(Struct), bytes + size, [](unsigned char b) { return b != 0; })) {
      throw Error(ErrorCode::kUnsupported,
                  std::string(name) + ": uses fields that came after version " + version());
    }
  }
  std::memcpy(&defaults, from, std::min(size, sizeof(Struct)));
  return defaults;
}

// Sizes in the version that brought each struct; they stay when the structs grow.
constexpr size_t kInputSize1 = sizeof(flexprefill_input);
constexpr size_t kPatternSize1 = offsetof(flexprefill_pattern, stride);
constexpr size_t kExecutionSize1 = offsetof(flexprefill_execution, stream);
constexpr size_t kViewSize1 = offsetof(flexprefill_block_index_view, mean_correction);
constexpr size_t kDeviceIndexSize1 = offsetof(flexprefill_device_block_index, mean_correction);
constexpr size_t kPrefillAuditSize1 = sizeof(flexprefill_prefill_audit);

TensorView to_tensor(const flexprefill_tensor& tensor) {
  TensorView view;
  view.data = tensor.data;
  view.dtype = static_cast<DType>(tensor.dtype);
  view.rank = tensor.rank;
  std::copy_n(tensor.shape, 4, view.shape.begin());
  std::copy_n(tensor.strides, 4, view.strides.begin());
  return view;
}

AttentionInput to_input(const flexprefill_input* from) {
  const flexprefill_input in = read_struct(from, flexprefill_input_default(), kInputSize1, "input");
  AttentionInput input;
  input.q = to_tensor(in.q);
  input.k = to_tensor(in.k);
  input.v = to_tensor(in.v);
  input.cu_seqlens_q = array(in.cu_seqlens_q, in.cu_seqlens_q_count, "cu_seqlens_q");
  input.cu_seqlens_kv = array(in.cu_seqlens_kv, in.cu_seqlens_kv_count, "cu_seqlens_kv");
  input.page_table = in.page_table;
  input.page_table_stride = in.page_table_stride;
  input.max_pages = in.max_pages;
  input.seqlens_kv = array(in.seqlens_kv, in.seqlens_kv_count, "seqlens_kv");
  if (in.has_softmax_scale != 0) input.softmax_scale = in.softmax_scale;
  input.gqa_interleave = in.gqa_interleave != 0;
  input.block_size = in.block_size;
  return input;
}

// A pattern of the caller's; `heads` holds what it points to.
Pattern to_pattern(const flexprefill_pattern* from, std::vector<MInferenceHead>& heads) {
  if (from == nullptr) return FlexPrefill{};
  const flexprefill_pattern in =
      read_struct(from, flexprefill_pattern_default(FLEXPREFILL_PATTERN_FLEX_PREFILL),
                  kPatternSize1, "pattern");
  switch (in.kind) {
    case FLEXPREFILL_PATTERN_DENSE:
      return Dense{};
    case FLEXPREFILL_PATTERN_FLEX_PREFILL: {
      FlexPrefill pattern{in.gamma, in.tau, in.min_budget, {}};
      if (in.max_budget != FLEXPREFILL_NO_LIMIT) pattern.max_budget = in.max_budget;
      return pattern;
    }
    case FLEXPREFILL_PATTERN_VERTICAL_SLASH:
      return VerticalSlash{in.vertical_size, in.slash_size};
    case FLEXPREFILL_PATTERN_STREAMING_LLM:
      return StreamingLlm{in.global_window, in.local_window};
    case FLEXPREFILL_PATTERN_XATTENTION:
      return XAttention{in.stride, in.threshold};
    case FLEXPREFILL_PATTERN_FLASH_PREFILL:
      return FlashPrefill{in.alpha, in.global_window, in.local_window, in.last_queries,
                          in.mean_correction != 0};
    case FLEXPREFILL_PATTERN_MINFERENCE:
      for (const flexprefill_minference_head& head :
           array(in.heads, in.heads_count, "pattern.heads")) {
        heads.push_back(
            {static_cast<MInferenceHead::Kind>(head.kind), head.vertical_size, head.slash_size});
      }
      return MInference{heads};
    case FLEXPREFILL_PATTERN_BLOCK_COVER: {
      BlockCover pattern{in.gamma, in.column_share, {}};
      if (in.max_budget != FLEXPREFILL_NO_LIMIT) pattern.max_budget = in.max_budget;
      return pattern;
    }
  }
  refuse("pattern.kind: expected 0 to 7, got " + std::to_string(in.kind));
}

Execution to_execution(const flexprefill_execution* from) {
  if (from == nullptr) return {};
  const flexprefill_execution in =
      read_struct(from, flexprefill_execution_default(), kExecutionSize1, "execution");
  if (in.cpu_target < FLEXPREFILL_CPU_AUTO || in.cpu_target > FLEXPREFILL_CPU_NEON) {
    refuse("execution.cpu_target: expected 0 to 6, got " + std::to_string(in.cpu_target));
  }
  return {.backend = static_cast<Backend>(in.backend),
          .cpu_target = static_cast<CpuTarget>(in.cpu_target),
          .num_threads = in.num_threads,
          .stream = in.stream};
}

DeviceBlockIndex to_device_index(const flexprefill_device_block_index* from) {
  const flexprefill_device_block_index in =
      read_struct(from, flexprefill_device_block_index_default(), kDeviceIndexSize1, "index");
  return {in.indptr,        in.indices,      in.capacity,
          in.global_window, in.local_window, in.mean_correction != 0};
}

std::vector<SequenceLengths> to_sequences(const int64_t* lengths, int64_t count) {
  std::vector<SequenceLengths> sequences(array(lengths, count, "sequence_lengths").size());
  for (size_t s = 0; s < sequences.size(); ++s) {
    sequences[s] = {lengths[2 * s], lengths[2 * s + 1]};
  }
  return sequences;
}

// Collects the figures of a call and hands them to the caller's array once it has succeeded.
class AuditOut {
 public:
  AuditOut(flexprefill_head_audit* audit, int64_t count)
      : to_(array(audit, count, "audit")), heads_(to_.size()) {}
  std::span<HeadAudit> heads() { return heads_; }
  void write() const {
    for (size_t h = 0; h < to_.size(); ++h) {
      const HeadAudit& head = heads_[h];
      to_[h] = {static_cast<int32_t>(head.pattern),
                head.jsd_sqrt,
                head.vertical_blocks,
                head.slash_blocks,
                head.kept_mass,
                head.density,
                head.least_row_mass,
                head.rows_below_gamma};
    }
  }

 private:
  std::span<flexprefill_head_audit> to_;
  std::vector<HeadAudit> heads_;
};

// The same for comparisons.
class ComparisonOut {
 public:
  ComparisonOut(flexprefill_dense_comparison* figures, int64_t count, const char* name)
      : to_(array(figures, count, name)), heads_(to_.size()) {}
  std::span<DenseComparison> heads() { return heads_; }
  void write() const {
    for (size_t h = 0; h < to_.size(); ++h) {
      const DenseComparison& head = heads_[h];
      to_[h] = {head.kept_mass, head.least_kept_mass, head.error, head.rows};
    }
  }

 private:
  std::span<flexprefill_dense_comparison> to_;
  std::vector<DenseComparison> heads_;
};

}  // namespace

// In this namespace they are declared anew, without the attribute of the header.
#pragma GCC visibility push(default)
extern "C" {

const char* flexprefill_last_error(void) { return last_error; }

const char* flexprefill_version(void) { return FLEXPREFILL_VERSION; }

int32_t flexprefill_c_api_version(void) { return FLEXPREFILL_C_API_VERSION; }

int32_t flexprefill_cpu_targets(int32_t* targets, int32_t capacity) {
  const std::span<const CpuTarget> supported = supported_cpu_targets();
  for (size_t i = 0; targets != nullptr && i < supported.size(); ++i) {
    if (static_cast<int64_t>(i) < capacity) targets[i] = static_cast<int32_t>(supported[i]);
  }
  return static_cast<int32_t>(supported.size());
}

const char* flexprefill_cpu_target_name(int32_t target) {
  if (target < FLEXPREFILL_CPU_AUTO || target > FLEXPREFILL_CPU_NEON) return nullptr;
  return cpu_target_name(static_cast<CpuTarget>(target));
}

flexprefill_status flexprefill_select_workspace_size(const flexprefill_input* input,
                                                     const flexprefill_pattern* pattern,
                                                     const flexprefill_execution* execution,
                                                     size_t* bytes) {
  return guarded([&] {
    std::vector<MInferenceHead> heads;
    required(bytes, "bytes") =
        select_workspace_size(to_input(input), to_pattern(pattern, heads), to_execution(execution));
  });
}

flexprefill_status flexprefill_select(const flexprefill_input* input,
                                      const flexprefill_pattern* pattern,
                                      const flexprefill_execution* execution, void* workspace,
                                      size_t workspace_bytes, flexprefill_block_index* index,
                                      flexprefill_head_audit* audit, int64_t audit_count) {
  return guarded([&] {
    std::vector<MInferenceHead> heads;
    AuditOut audit_out(audit, audit_count);
    select(to_input(input), to_pattern(pattern, heads), to_execution(execution),
           {workspace, workspace_bytes}, required(index, "index").index, audit_out.heads());
    audit_out.write();
  });
}

flexprefill_status flexprefill_attend_workspace_size(const flexprefill_input* input,
                                                     const flexprefill_execution* execution,
                                                     size_t* bytes) {
  return guarded([&] {
    required(bytes, "bytes") = attend_workspace_size(to_input(input), to_execution(execution));
  });
}

flexprefill_status flexprefill_attend(const flexprefill_input* input,
                                      const flexprefill_block_index* index,
                                      const flexprefill_execution* execution, void* workspace,
                                      size_t workspace_bytes, const flexprefill_tensor* out,
                                      const flexprefill_tensor* lse) {
  return guarded([&] {
    attend(to_input(input), index == nullptr ? nullptr : &index->index, to_execution(execution),
           {workspace, workspace_bytes}, to_tensor(required(out, "out")),
           lse == nullptr ? TensorView{} : to_tensor(*lse));
  });
}

flexprefill_status flexprefill_prefill_workspace_size(const flexprefill_input* input,
                                                      const flexprefill_pattern* pattern,
                                                      const flexprefill_execution* execution,
                                                      size_t* bytes) {
  return guarded([&] {
    std::vector<MInferenceHead> heads;
    required(bytes, "bytes") = prefill_workspace_size(to_input(input), to_pattern(pattern, heads),
                                                      to_execution(execution));
  });
}

flexprefill_status flexprefill_prefill(const flexprefill_input* input,
                                       const flexprefill_pattern* pattern,
                                       const flexprefill_execution* execution, void* workspace,
                                       size_t workspace_bytes, const flexprefill_tensor* out,
                                       const flexprefill_tensor* lse, flexprefill_head_audit* audit,
                                       int64_t audit_count) {
  return guarded([&] {
    std::vector<MInferenceHead> heads;
    AuditOut audit_out(audit, audit_count);
    prefill(to_input(input), to_pattern(pattern, heads), to_execution(execution),
            {workspace, workspace_bytes}, to_tensor(required(out, "out")),
            lse == nullptr ? TensorView{} : to_tensor(*lse), audit_out.heads());
    audit_out.write();
  });
}

flexprefill_status flexprefill_prefill_audited(const flexprefill_input* input,
                                               const flexprefill_pattern* pattern,
                                               const flexprefill_execution* execution,
                                               void* workspace, size_t workspace_bytes,
                                               const flexprefill_tensor* out,
                                               const flexprefill_tensor* lse,
                                               flexprefill_prefill_audit* audit) {
  return guarded([&] {
    std::vector<MInferenceHead> heads;
    const flexprefill_prefill_audit in =
        read_struct(audit, flexprefill_prefill_audit_default(), kPrefillAuditSize1, "audit");
    AuditOut heads_out(in.heads, in.heads_count);
    ComparisonOut comparison_out(in.comparison, in.comparison_count, "comparison");
    PrefillAudit asked{.heads = heads_out.heads(),
                       .compared_rows = in.compared_rows,
                       .comparison = comparison_out.heads()};
    if (in.has_min_kept_mass != 0) asked.min_kept_mass = in.min_kept_mass;
    prefill(to_input(input), to_pattern(pattern, heads), to_execution(execution),
            {workspace, workspace_bytes}, to_tensor(required(out, "out")),
            lse == nullptr ? TensorView{} : to_tensor(*lse), asked);
    heads_out.write();
    comparison_out.write();
    audit->guard = static_cast<int32_t>(asked.guard);
    audit->gamma = asked.gamma;
  });
}

flexprefill_status flexprefill_device_block_index_size(const flexprefill_input* input,
                                                       int64_t* rows, int64_t* capacity) {
  return guarded([&] {
    const AttentionInput in = to_input(input);
    if (rows != nullptr) *rows = device_block_index_rows(in);
    if (capacity != nullptr) *capacity = device_block_index_capacity(in);
  });
}

flexprefill_status flexprefill_select_on_device_workspace_size(
    const flexprefill_input* input, const flexprefill_pattern* pattern,
    const flexprefill_execution* execution, size_t* bytes) {
  return guarded([&] {
    std::vector<MInferenceHead> heads;
    required(bytes, "bytes") = select_on_device_workspace_size(
        to_input(input), to_pattern(pattern, heads), to_execution(execution));
  });
}

flexprefill_status flexprefill_select_on_device(const flexprefill_input* input,
                                                const flexprefill_pattern* pattern,
                                                const flexprefill_execution* execution,
                                                void* workspace, size_t workspace_bytes,
                                                flexprefill_device_block_index* index) {
  return guarded([&] {
    std::vector<MInferenceHead> heads;
    DeviceBlockIndex to = to_device_index(index);
    const Pattern chosen = to_pattern(pattern, heads);
    const auto* flash = std::get_if<FlashPrefill>(&chosen);
    const bool has_flag = index->struct_size > kDeviceIndexSize1;
    if (flash != nullptr && flash->mean_correction && !has_flag) {
      refuse("index.struct_size: expected that of version 4, which has mean_correction, got " +
             std::to_string(index->struct_size));
    }
    select_on_device(to_input(input), chosen, to_execution(execution), {workspace, workspace_bytes},
                     to);
    index->global_window = to.global_window;
    index->local_window = to.local_window;
    if (has_flag) index->mean_correction = to.mean_correction ? 1 : 0;
  });
}

flexprefill_status flexprefill_attend_on_device_workspace_size(
    const flexprefill_input* input, const flexprefill_execution* execution, size_t* bytes) {
  return guarded([&] {
    required(bytes, "bytes") =
        attend_on_device_workspace_size(to_input(input), to_execution(execution));
  });
}

flexprefill_status flexprefill_attend_on_device(const flexprefill_input* input,
                                                const flexprefill_device_block_index* index,
                                                const flexprefill_execution* execution,
                                                void* workspace, size_t workspace_bytes,
                                                const flexprefill_tensor* out,
                                                const flexprefill_tensor* lse) {
  return guarded([&] {
    attend_on_device(to_input(input), to_device_index(index), to_execution(execution),
                     {workspace, workspace_bytes}, to_tensor(required(out, "out")),
                     lse == nullptr ? TensorView{} : to_tensor(*lse));
  });
}

flexprefill_status flexprefill_compare_with_dense(const flexprefill_input* input,
                                                  const flexprefill_block_index* index,
                                                  const flexprefill_tensor* out, int64_t rows,
                                                  const flexprefill_execution* execution,
                                                  flexprefill_dense_comparison* figures,
                                                  int64_t figure_count) {
  return guarded([&] {
    ComparisonOut figures_out(figures, figure_count, "figures");
    compare_with_dense(to_input(input), required(index, "index").index,
                       to_tensor(required(out, "out")), rows, to_execution(execution),
                       figures_out.heads());
    figures_out.write();
  });
}

flexprefill_status flexprefill_block_grid(int64_t s_q, int64_t s_kv, int32_t block_size,
                                          int64_t* first_q_block, int64_t* n_q, int64_t* n_kv) {
  return guarded([&] {
    required(first_q_block, "first_q_block");
    required(n_q, "n_q");
    required(n_kv, "n_kv");
    if (s_q < 1 || s_q > s_kv || s_kv > std::numeric_limits<int32_t>::max()) {
      refuse("expected 1 <= s_q <= s_kv < 2^31, got s_q = " + std::to_string(s_q) +
             ", s_kv = " + std::to_string(s_kv));
    }
    if (block_size != 32 && block_size != 64 && block_size != 128) {
      refuse("block_size: expected 32, 64 or 128, got " + std::to_string(block_size));
    }
    const BlockGrid grid = block_grid({s_q, s_kv}, block_size);
    *first_q_block = grid.first_q_block;
    *n_q = grid.n_q;
    *n_kv = grid.n_kv;
  });
}

flexprefill_status flexprefill_block_index_create(flexprefill_block_index** index) {
  return guarded([&] {
    flexprefill_block_index*& made = required(index, "index");
    made = new flexprefill_block_index;
  });
}

flexprefill_status flexprefill_block_index_from_view(const flexprefill_block_index_view* view,
                                                     flexprefill_block_index** index) {
  return guarded([&] {
    required(index, "index");
    const flexprefill_block_index_view in =
        read_struct(view, flexprefill_block_index_view_default(), kViewSize1, "view");
    auto made = std::make_unique<flexprefill_block_index>();
    made->index.block_size = in.block_size;
    made->index.h_q = in.h_q;
    made->index.global_window = in.global_window;
    made->index.local_window = in.local_window;
    made->index.mean_correction = in.mean_correction != 0;
    made->index.sequences = to_sequences(in.sequence_lengths, in.sequence_count);
    const auto indptr = array(in.indptr, in.indptr_count, "indptr");
    const auto indices = array(in.indices, in.indices_count, "indices");
    made->index.indptr.assign(indptr.begin(), indptr.end());
    made->index.indices.assign(indices.begin(), indices.end());
    made->index.check();
    *index = made.release();
  });
}

flexprefill_status flexprefill_block_index_dense(const int64_t* sequence_lengths,
                                                 int64_t sequence_count, int32_t h_q,
                                                 int32_t block_size,
                                                 flexprefill_block_index** index) {
  return guarded([&] {
    required(index, "index");
    auto made = std::make_unique<flexprefill_block_index>();
    made->index =
        dense_block_index(to_sequences(sequence_lengths, sequence_count), h_q, block_size);
    *index = made.release();
  });
}

void flexprefill_block_index_destroy(flexprefill_block_index* index) { delete index; }

flexprefill_status flexprefill_block_index_check(const flexprefill_block_index* index) {
  return guarded([&] { required(index, "index").index.check(); });
}

flexprefill_status flexprefill_block_index_get_view(const flexprefill_block_index* index,
                                                    flexprefill_block_index_view* view) {
  return guarded([&] {
    const BlockIndex& from = required(index, "index").index;
    const size_t size = required(view, "view").struct_size;
    if (size < kViewSize1) {
      refuse("view.struct_size: expected at least " + std::to_string(kViewSize1) + ", got " +
             std::to_string(size));
    }
    flexprefill_block_index_view out = flexprefill_block_index_view_default();
    out.struct_size = size;
    out.block_size = from.block_size;
    out.h_q = from.h_q;
    out.global_window = from.global_window;
    out.local_window = from.local_window;
    out.mean_correction = from.mean_correction ? 1 : 0;
    out.sequence_lengths = reinterpret_cast<const int64_t*>(from.sequences.data());
    out.sequence_count = static_cast<int64_t>(from.sequences.size());
    out.indptr = from.indptr.data();
    out.indptr_count = static_cast<int64_t>(from.indptr.size());
    out.indices = from.indices.data();
    out.indices_count = static_cast<int64_t>(from.indices.size());
    std::memcpy(view, &out, std::min(size, sizeof(out)));
  });
}

flexprefill_status flexprefill_block_index_density(const flexprefill_block_index* index,
                                                   double* density) {
  return guarded([&] { required(density, "density") = required(index, "index").index.density(); });
}

flexprefill_status flexprefill_block_index_serialize(const flexprefill_block_index* index,
                                                     void* bytes, size_t capacity, size_t* size) {
  return guarded([&] {
    required(size, "size");
    const std::string stored = required(index, "index").index.serialize();
    if (bytes != nullptr) {
      if (capacity < stored.size()) {
        refuse("capacity: expected at least " + std::to_string(stored.size()) + " bytes, got " +
               std::to_string(capacity));
      }
      std::memcpy(bytes, stored.data(), stored.size());
    }
    *size = stored.size();
  });
}

flexprefill_status flexprefill_block_index_deserialize(const void* bytes, size_t size,
                                                       flexprefill_block_index** index) {
  return guarded([&] {
    required(index, "index");
    if (size > 0) required(static_cast<const char*>(bytes), "bytes");
    auto made = std::make_unique<flexprefill_block_index>();
    made->index = BlockIndex::deserialize({static_cast<const char*>(bytes), size});
    *index = made.release();
  });
}

flexprefill_status flexprefill_workspace_create(flexprefill_workspace** workspace) {
  return guarded([&] {
    flexprefill_workspace*& made = required(workspace, "workspace");
    made = new flexprefill_workspace;
  });
}

void flexprefill_workspace_destroy(flexprefill_workspace* workspace) { delete workspace; }

flexprefill_status flexprefill_workspace_reserve(flexprefill_workspace* workspace, size_t bytes,
                                                 void** data) {
  return guarded([&] {
    required(data, "data");
    *data = required(workspace, "workspace").buffer.reserve(bytes).data;
  });
}

}  // extern "C"
#pragma GCC visibility pop
}  // namespace flexprefill
