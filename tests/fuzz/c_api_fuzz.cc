// Fuzz target of the stages through the C API. Pointers are to memory of limited size; everything
// else in the descriptors is the fuzzer's: ranks, shapes, strides, lengths, pages, options.
//
// A call must return, say why if it refuses, and leave the output alone if it does. Where a
// descriptor reaches outside its memory (a caller's error that no library can see) only the size
// query is called.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "flexprefill/c_api.h"
#include "fuzz_util.h"

namespace {

constexpr int64_t kTensorBytes = 1 << 16;
constexpr int64_t kInts = 64;
// Limits of what is computed, so that an input takes milliseconds.
constexpr int64_t kMostWork = 1 << 19;
constexpr int64_t kMostSequences = 1 << 12;
constexpr size_t kMostWorkspace = 64 << 20;

enum Function : uint8_t { kPrefill, kSelect, kAttend, kSelectThenAttend, kFunctions };
enum Flag : uint8_t {
  kWithLse = 1,
  kWithAudit = 2,
  kShortWorkspace = 4,
  kPaged = 8,
  kNull = 16,
  kAudited = 32  // flexprefill_prefill_audited, with what `fill` says
};

// The fuzzer's bytes, laid over this. Pointers in it are replaced.
struct Script {
  uint8_t function;
  uint8_t flags;
  uint8_t fill;  // every byte of q, k and v
  int8_t audit_change;
  int32_t ints[3][kInts];  // cu_seqlens_q; cu_seqlens_kv or the page table; seqlens_kv
  flexprefill_input input;
  flexprefill_pattern pattern;
  flexprefill_execution execution;
  flexprefill_tensor out, lse;
};

int64_t element_size(const flexprefill_tensor& tensor) {
  return tensor.dtype == FLEXPREFILL_FLOAT32 ? 4 : 2;
}

// Whether every element lies in kTensorBytes bytes from `data`.
bool in_memory(const flexprefill_tensor& tensor) {
  double first = 0, last = 0;  // exact where it matters
  for (int32_t i = 0; i < std::clamp(tensor.rank, 0, 4); ++i) {
    if (tensor.shape[i] <= 0) return true;
    const double reach =
        static_cast<double>(tensor.shape[i] - 1) * static_cast<double>(tensor.strides[i]);
    (reach < 0 ? first : last) += reach;
  }
  return first >= 0 && (last + 1) * static_cast<double>(element_size(tensor)) <= kTensorBytes;
}

// Upper bound of the products of a call: positions of q times keys times dims.
bool little_work(const flexprefill_input& input) {
  __int128 work = 1;
  for (int32_t i = 0; i < std::clamp(input.q.rank, 0, 4); ++i) {
    work *= std::max<int64_t>(input.q.shape[i], 1);
    if (work > kMostWork) return false;
  }
  __int128 keys = 1;
  if ((input.page_table != nullptr || input.k.rank == 4) && input.k.shape[1] > 0) {
    keys = input.k.shape[1];
  }
  if (input.k.rank == 3) keys = std::max<int64_t>(input.k.shape[0], 1);
  if (input.page_table != nullptr) keys *= std::clamp<int64_t>(input.max_pages, 1, kInts);
  return work * keys <= kMostWork;
}

// Puts real memory under the descriptors and takes back what would lie about its size.
void set_pointers(Script& script, std::vector<uint8_t> (&memory)[5]) {
  flexprefill_input& input = script.input;
  flexprefill_tensor* tensors[5] = {&input.q, &input.k, &input.v, &script.out, &script.lse};
  for (int i = 0; i < 5; ++i) tensors[i]->data = memory[i].data();
  if (script.flags & kNull) tensors[script.fill % 5]->data = nullptr;
  const auto limit = [](int64_t count) { return std::min(count, kInts); };
  input.cu_seqlens_q = script.ints[0];
  input.cu_seqlens_q_count = limit(input.cu_seqlens_q_count);
  input.cu_seqlens_kv = script.ints[1];
  input.cu_seqlens_kv_count = limit(input.cu_seqlens_kv_count);
  input.seqlens_kv = script.ints[2];
  input.seqlens_kv_count = limit(input.seqlens_kv_count);
  const int64_t sequences = std::max<int64_t>({input.q.shape[0], kInts, 1});
  const bool table_in_memory =
      input.max_pages <= kInts && (input.page_table_stride <= 0 ||
                                   static_cast<__int128>(sequences - 1) * input.page_table_stride +
                                           std::max<int64_t>(input.max_pages, 0) <=
                                       kInts * kInts);
  input.page_table = nullptr;
  if ((script.flags & kPaged) && table_in_memory) {
    static std::vector<int32_t> table(kInts * kInts);
    for (size_t i = 0; i < table.size(); ++i) table[i] = script.ints[1][i % kInts];
    input.page_table = table.data();
  }
  static std::vector<flexprefill_minference_head> heads(kInts);
  for (int64_t h = 0; h < kInts; ++h) {
    heads[h] = {script.ints[2][h], 0, script.pattern.vertical_size, script.ints[0][h]};
  }
  script.pattern.heads = heads.data();
  script.pattern.heads_count = limit(script.pattern.heads_count);
  input.struct_size = std::min(input.struct_size, sizeof(input));
  script.pattern.struct_size = std::min(script.pattern.struct_size, sizeof(script.pattern));
  script.execution.struct_size = std::min(script.execution.struct_size, sizeof(script.execution));
}

void expect_refusal(flexprefill_status status) {
  FUZZ_EXPECT(status == FLEXPREFILL_INVALID_ARGUMENT || status == FLEXPREFILL_UNSUPPORTED ||
              status == FLEXPREFILL_WORKSPACE_TOO_SMALL);
  FUZZ_EXPECT(flexprefill_last_error()[0] != '\0');
}

void run(Script& script, const std::vector<uint8_t>& out_memory) {
  const flexprefill_input& input = script.input;
  const bool attends = script.function != kSelect;
  size_t bytes = 0, attend_bytes = 0;
  flexprefill_status status =
      script.function == kPrefill
          ? flexprefill_prefill_workspace_size(&input, &script.pattern, &script.execution, &bytes)
      : script.function == kAttend
          ? flexprefill_attend_workspace_size(&input, &script.execution, &bytes)
          : flexprefill_select_workspace_size(&input, &script.pattern, &script.execution, &bytes);
  if (status == FLEXPREFILL_OK && script.function == kSelectThenAttend) {
    status = flexprefill_attend_workspace_size(&input, &script.execution, &attend_bytes);
    bytes = std::max(bytes, attend_bytes);
  }
  if (status != FLEXPREFILL_OK) expect_refusal(status);

  const bool with_lse = script.flags & kWithLse;
  if (bytes > kMostWorkspace || !little_work(input)) return;
  for (const flexprefill_tensor* tensor : {&input.q, &input.k, &input.v}) {
    if (!in_memory(*tensor)) return;
  }
  if (attends && (!in_memory(script.out) || (with_lse && !in_memory(script.lse)))) return;

  const bool is_short = (script.flags & kShortWorkspace) && bytes > 64;
  std::vector<uint8_t> workspace(is_short ? bytes / 2 : bytes, 0xff);
  int64_t audit_count = 0;
  if (script.flags & kWithAudit) {
    const int64_t b =
        input.q.rank == 4 ? input.q.shape[0] : std::max<int64_t>(input.cu_seqlens_q_count, 1) - 1;
    const int64_t h_q = input.q.shape[input.q.rank == 4 ? 2 : 1];
    audit_count =
        std::clamp<int64_t>(b, 0, kInts) * std::clamp<int64_t>(h_q, 0, 4096) + script.audit_change;
  }
  std::vector<flexprefill_head_audit> audit(static_cast<size_t>(std::max<int64_t>(audit_count, 0)));
  const flexprefill_tensor* lse = with_lse ? &script.lse : nullptr;

  const std::vector<uint8_t> out_before = out_memory;
  flexprefill_status done = FLEXPREFILL_OK;
  if (script.function == kPrefill) {
    if (script.flags & kAudited) {
      std::vector<flexprefill_dense_comparison> figures(audit.size());
      flexprefill_prefill_audit asked = flexprefill_prefill_audit_default();
      asked.heads = audit.data();
      asked.heads_count = audit_count;
      asked.has_min_kept_mass = script.fill & 1;
      asked.min_kept_mass = static_cast<float>(script.fill) / 200;
      asked.compared_rows = script.fill & 2;
      asked.comparison = figures.data();
      asked.comparison_count = asked.compared_rows > 0 ? audit_count : 0;
      done =
          flexprefill_prefill_audited(&input, &script.pattern, &script.execution, workspace.data(),
                                      workspace.size(), &script.out, lse, &asked);
    } else {
      done = flexprefill_prefill(&input, &script.pattern, &script.execution, workspace.data(),
                                 workspace.size(), &script.out, lse, audit.data(), audit_count);
    }
  } else if (script.function == kAttend) {
    done = flexprefill_attend(&input, nullptr, &script.execution, workspace.data(),
                              workspace.size(), &script.out, lse);
  } else {
    flexprefill_block_index* index = nullptr;
    FUZZ_EXPECT(flexprefill_block_index_create(&index) == FLEXPREFILL_OK);
    done = flexprefill_select(&input, &script.pattern, &script.execution, workspace.data(),
                              workspace.size(), index, audit.data(), audit_count);
    if (done == FLEXPREFILL_OK) {
      FUZZ_EXPECT(flexprefill_block_index_check(index) == FLEXPREFILL_OK);
      if (attends) {
        done = flexprefill_attend(&input, index, &script.execution, workspace.data(),
                                  workspace.size(), &script.out, lse);
      }
    }
    flexprefill_block_index_destroy(index);
  }
  if (done != FLEXPREFILL_OK) {
    expect_refusal(done);
    FUZZ_EXPECT(out_memory == out_before);
  } else {
    FUZZ_EXPECT(status == FLEXPREFILL_OK);
  }
}

std::string seed(Function function, int32_t kind, int32_t dtype, bool packed, bool paged) {
  Script script{};
  script.function = function;
  script.flags = kWithLse | kWithAudit | (paged ? kPaged : 0);
  script.fill = 0x3c;
  flexprefill_input& input = script.input = flexprefill_input_default();
  script.pattern = flexprefill_pattern_default(kind);
  script.pattern.min_budget = script.pattern.vertical_size = script.pattern.slash_size = 32;
  script.pattern.global_window = 16;
  script.pattern.local_window = 40;
  script.pattern.last_queries = 0;
  script.pattern.heads_count = 2;
  script.execution = flexprefill_execution_default();
  script.execution.num_threads = 1;
  input.block_size = 32;
  const int64_t t = 96, h_q = 2, h_kv = 1, d = 16;
  const int64_t q_shape[4] = {1, t, h_q, d}, kv_shape[4] = {1, t, h_kv, d};
  const int64_t page_shape[4] = {6, 16, h_kv, d};
  const int64_t lse_shape[3] = {1, h_q, t}, packed_lse_shape[2] = {h_q, t};
  input.q = packed ? flexprefill_tensor_contiguous(nullptr, dtype, 3, q_shape + 1)
                   : flexprefill_tensor_contiguous(nullptr, dtype, 4, q_shape);
  input.k = paged    ? flexprefill_tensor_contiguous(nullptr, dtype, 4, page_shape)
            : packed ? flexprefill_tensor_contiguous(nullptr, dtype, 3, kv_shape + 1)
                     : flexprefill_tensor_contiguous(nullptr, dtype, 4, kv_shape);
  input.v = input.k;
  script.out = input.q;
  script.lse =
      packed ? flexprefill_tensor_contiguous(nullptr, FLEXPREFILL_FLOAT32, 2, packed_lse_shape)
             : flexprefill_tensor_contiguous(nullptr, FLEXPREFILL_FLOAT32, 3, lse_shape);
  if (packed) {
    input.cu_seqlens_q_count = 2;
    script.ints[0][1] = t;
    if (!paged) {
      input.cu_seqlens_kv_count = 2;
      script.ints[1][1] = t;
    }
  }
  if (paged) {
    for (int32_t p = 0; p < 6; ++p) script.ints[1][p] = 5 - p;
    script.ints[2][0] = t;
    input.seqlens_kv_count = 1;
    input.max_pages = input.page_table_stride = 6;
  }
  return {reinterpret_cast<const char*>(&script), sizeof(script)};
}

}  // namespace

extern "C" int LLVMFuzzerInitialize(int* argc, char*** argv) {
  std::vector<std::string> seeds;
  for (uint8_t function = 0; function < kFunctions; ++function) {
    for (int32_t kind = 0; kind < 8; ++kind) {
      for (int32_t dtype = 0; dtype < 3; ++dtype) {
        const bool packed = (function + kind + dtype) % 2, paged = (kind + dtype) % 3 == 0;
        seeds.push_back(seed(static_cast<Function>(function), kind, dtype, packed, paged));
      }
    }
  }
  flexprefill::fuzz::write_seeds(*argc, *argv, seeds);
  return 0;
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Script script{};
  std::memcpy(&script, data, std::min(size, sizeof(script)));
  script.function %= kFunctions;
  if (script.input.q.shape[0] > kMostSequences && script.input.q.rank == 4) return 0;
  // Allocated anew, so that the address sanitizer sees the ends.
  std::vector<uint8_t> memory[5];
  for (std::vector<uint8_t>& bytes : memory) bytes.assign(kTensorBytes, script.fill);
  set_pointers(script, memory);
  run(script, memory[3]);
  return 0;
}
