// The C API: the contract of flexprefill.h for plain C and for dlopen.
//
// Every call that can fail returns a status; when it is not FLEXPREFILL_OK,
// flexprefill_last_error() has the message, and no output was written. No exception leaves the
// library. Calls on different threads are independent as long as they share no handle, workspace or
// output that one of them changes.
//
// Structs that may grow start with `struct_size`, the size that the caller was compiled with. Take
// them from the *_default functions below, which fill it in, and change what differs.
#ifndef FLEXPREFILL_C_API_H_
#define FLEXPREFILL_C_API_H_

#include <stddef.h>
#include <stdint.h>
#include <string.h>

// The same definition as in types.h.
#if defined(_WIN32) || defined(FLEXPREFILL_STATIC)
#define FLEXPREFILL_API
#else
#define FLEXPREFILL_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

// Goes up when something is added here; what is here stays as it is within a major version.
#define FLEXPREFILL_C_API_VERSION 6

typedef int32_t flexprefill_status;
enum {
  FLEXPREFILL_OK = 0,
  FLEXPREFILL_INVALID_ARGUMENT = 1,  // the message: what was expected, what came
  FLEXPREFILL_UNSUPPORTED = 2,       // valid, but not on this backend, build or machine
  FLEXPREFILL_WORKSPACE_TOO_SMALL = 3,
  FLEXPREFILL_INTERNAL = 4,
  FLEXPREFILL_OUT_OF_MEMORY = 5
};

enum { FLEXPREFILL_FLOAT32 = 0, FLEXPREFILL_FLOAT16 = 1, FLEXPREFILL_BFLOAT16 = 2 };

enum {
  FLEXPREFILL_BACKEND_AUTO = 0,
  FLEXPREFILL_BACKEND_REFERENCE = 1,
  FLEXPREFILL_BACKEND_CPU = 2,
  FLEXPREFILL_BACKEND_CUDA = 3,  // since version 2, like the next two; Backend in types.h
  FLEXPREFILL_BACKEND_SM80 = 4,
  FLEXPREFILL_BACKEND_SM90 = 5
};

enum {
  FLEXPREFILL_CPU_AUTO = 0,
  FLEXPREFILL_CPU_BASELINE = 1,
  FLEXPREFILL_CPU_AVX2 = 2,
  FLEXPREFILL_CPU_AVX512 = 3,
  FLEXPREFILL_CPU_AVX512_BF16 = 4,
  FLEXPREFILL_CPU_AMX_BF16 = 5,
  FLEXPREFILL_CPU_NEON = 6
};

enum {
  FLEXPREFILL_PATTERN_DENSE = 0,
  FLEXPREFILL_PATTERN_FLEX_PREFILL = 1,
  FLEXPREFILL_PATTERN_VERTICAL_SLASH = 2,
  FLEXPREFILL_PATTERN_STREAMING_LLM = 3,
  // Since version 3.
  FLEXPREFILL_PATTERN_XATTENTION = 4,
  FLEXPREFILL_PATTERN_FLASH_PREFILL = 5,
  FLEXPREFILL_PATTERN_MINFERENCE = 6,
  FLEXPREFILL_PATTERN_BLOCK_COVER = 7  // since version 5
};

enum {
  FLEXPREFILL_HEAD_DENSE = 0,
  FLEXPREFILL_HEAD_VERTICAL_SLASH = 1,
  FLEXPREFILL_HEAD_QUERY_AWARE = 2,
  FLEXPREFILL_HEAD_STREAMING = 3,
  FLEXPREFILL_HEAD_BLOCK_SPARSE = 4,  // by a score for each block; since version 3
  FLEXPREFILL_HEAD_BLOCK_COVER = 5    // since version 5
};

// What min_kept_mass made of a call; Guard in flexprefill.h. Since version 6.
enum {
  FLEXPREFILL_GUARD_NONE = 0,
  FLEXPREFILL_GUARD_RAISED_GAMMA = 1,
  FLEXPREFILL_GUARD_DENSE = 2
};

// MInferenceHead::Kind in select.h.
enum {
  FLEXPREFILL_MINFERENCE_A_SHAPE = 0,
  FLEXPREFILL_MINFERENCE_VERTICAL_SLASH = 1,
  FLEXPREFILL_MINFERENCE_BLOCK_SPARSE = 2
};

#define FLEXPREFILL_NO_LIMIT (-1)

// A borrowed strided tensor. Strides count elements; that of the last dimension is 1.
typedef struct flexprefill_tensor {
  void* data;
  int32_t dtype;
  int32_t rank;
  int64_t shape[4];
  int64_t strides[4];
} flexprefill_tensor;

// What attention is asked to compute; causal, the query at row i stands at s_kv - s_q + i.
//
//   layout   q                     k, v                                  lengths
//   batch    [b, s_q, h_q, d_qk]   [b, s_kv, h_kv, d_qk | d_v]           from the shapes
//   packed   [t_q, h_q, d_qk]      [t_kv, h_kv, d_qk | d_v]              cu_seqlens_q, _kv
//   paged    batch or packed q     [pages, page_size, h_kv, d_qk | d_v]  page_table, seqlens_kv
//
// AttentionInput in types.h has the rules of heads, head dims and strides, and says what is device
// memory in a call of a CUDA backend: tensors, workspace and page_table, not the lengths.
typedef struct flexprefill_input {
  size_t struct_size;
  flexprefill_tensor q, k, v;
  const int32_t* cu_seqlens_q;  // [b + 1], packed q
  int64_t cu_seqlens_q_count;
  const int32_t* cu_seqlens_kv;  // [b + 1], packed k and v
  int64_t cu_seqlens_kv_count;
  const int32_t* page_table;  // [b, max_pages], paged k and v
  int64_t page_table_stride;  // elements between the rows of page_table
  int64_t max_pages;
  const int32_t* seqlens_kv;  // [b], paged k and v
  int64_t seqlens_kv_count;
  int32_t has_softmax_scale;  // 0: the scale is 1 / sqrt(d_qk)
  float softmax_scale;
  int32_t gqa_interleave;  // not 0: query head h reads K/V head h % h_kv, not h / (h_q / h_kv)
  int32_t block_size;      // 32, 64 or 128
} flexprefill_input;

// What one query head keeps under MInference; MInferenceHead in select.h.
typedef struct flexprefill_minference_head {
  int32_t kind;           // FLEXPREFILL_MINFERENCE_*
  int32_t reserved;       // 0
  int64_t vertical_size;  // tokens
  int64_t slash_size;     // tokens
} flexprefill_minference_head;

// `kind` says which of the fields count; sizes, budgets and windows are tokens.
typedef struct flexprefill_pattern {
  size_t struct_size;
  int32_t kind;           // FLEXPREFILL_PATTERN_*
  float gamma;            // flex_prefill, block_cover: share of the mass to cover, in (0, 1]
  float tau;              // flex_prefill: heads with jsd_sqrt below it are query-aware, in [0, 1]
  int32_t reserved;       // 0
  int64_t min_budget;     // flex_prefill
  int64_t max_budget;     // flex_prefill, block_cover; or FLEXPREFILL_NO_LIMIT
  int64_t vertical_size;  // vertical_slash
  int64_t slash_size;     // vertical_slash
  int64_t global_window;  // streaming_llm, flash_prefill
  int64_t local_window;   // streaming_llm, flash_prefill
  // Since version 3; XAttention, FlashPrefill and MInference in select.h.
  int64_t stride;                            // xattention: 8 or 16
  float threshold;                           // xattention, in (0, 1]
  float alpha;                               // flash_prefill, in [0, 1]
  int64_t last_queries;                      // flash_prefill
  const flexprefill_minference_head* heads;  // minference: [heads_count = h_q], used by the call
  int64_t heads_count;
  int32_t mean_correction;  // flash_prefill; not 0: dropped blocks count through their means
  int32_t reserved3;        // 0
  // Since version 5; BlockCover in select.h.
  float column_share;  // block_cover, in [0, 1]
  int32_t reserved5;   // 0
} flexprefill_pattern;

typedef struct flexprefill_execution {
  size_t struct_size;
  int32_t backend;      // FLEXPREFILL_BACKEND_*
  int32_t cpu_target;   // FLEXPREFILL_CPU_*
  int32_t num_threads;  // 0: as many as the process may use
  int32_t reserved;     // 0
  // Since version 2.
  void* stream;  // of the CUDA backends: a cudaStream_t of the current device
} flexprefill_execution;

// What was decided for one query head of one sequence; HeadAudit in select.h.
typedef struct flexprefill_head_audit {
  int32_t pattern;  // FLEXPREFILL_HEAD_*
  float jsd_sqrt;
  int32_t vertical_blocks;
  int32_t slash_blocks;
  float kept_mass;
  float density;
  // Since version 5; before it both were 0.
  float least_row_mass;      // block_cover; otherwise 1
  int32_t rows_below_gamma;  // block_cover
} flexprefill_head_audit;

// What a selection has cost one query head of one sequence; DenseComparison in compare.h.
typedef struct flexprefill_dense_comparison {
  float kept_mass;
  float least_kept_mass;
  float error;
  int32_t rows;
} flexprefill_dense_comparison;

// What a call of prefill is asked about itself, and its answers; PrefillAudit in flexprefill.h.
// Since version 6.
typedef struct flexprefill_prefill_audit {
  size_t struct_size;
  flexprefill_head_audit* heads;  // NULL with heads_count 0, or [b * h_q], sequence-major
  int64_t heads_count;
  int32_t has_min_kept_mass;  // 0: no floor
  float min_kept_mass;        // in [0, 1]
  int64_t compared_rows;      // of each head, compared with dense attention; host backends only
  flexprefill_dense_comparison* comparison;  // NULL with compared_rows 0, or [b * h_q]
  int64_t comparison_count;
  // Written.
  int32_t guard;  // FLEXPREFILL_GUARD_*
  float gamma;    // with FLEXPREFILL_GUARD_RAISED_GAMMA the gamma that was kept
} flexprefill_prefill_audit;

// The arrays of an index; BlockIndex in block_index.h.
typedef struct flexprefill_block_index_view {
  size_t struct_size;
  int32_t block_size;
  int32_t h_q;
  int64_t global_window;
  int64_t local_window;
  const int64_t* sequence_lengths;  // [sequence_count, 2]: s_q, s_kv
  int64_t sequence_count;
  const int64_t* indptr;  // [indptr_count]; rows by sequence, query head, query block
  int64_t indptr_count;
  const int32_t* indices;  // [indices_count]; ascending within a row
  int64_t indices_count;
  // Since version 3.
  int32_t mean_correction;  // BlockIndex::mean_correction
  int32_t reserved;         // 0
} flexprefill_block_index_view;

// An index in the caller's device memory; DeviceBlockIndex in block_index.h. Since version 2.
typedef struct flexprefill_device_block_index {
  size_t struct_size;
  int64_t* indptr;   // device memory, [rows + 1]
  int32_t* indices;  // device memory, [capacity]
  int64_t capacity;
  int64_t global_window;
  int64_t local_window;
  // Since version 4.
  int32_t mean_correction;  // BlockIndex::mean_correction
  int32_t reserved;         // 0
} flexprefill_device_block_index;

// Which key blocks every query block of every head attends to.
typedef struct flexprefill_block_index flexprefill_block_index;
// Scratch memory that grows when asked for more.
typedef struct flexprefill_workspace flexprefill_workspace;

// ---- Defaults

static inline flexprefill_input flexprefill_input_default(void) {
  flexprefill_input input;
  memset(&input, 0, sizeof(input));
  input.struct_size = sizeof(input);
  input.block_size = 128;
  return input;
}

// The published defaults of every kind.
static inline flexprefill_pattern flexprefill_pattern_default(int32_t kind) {
  flexprefill_pattern pattern;
  memset(&pattern, 0, sizeof(pattern));
  pattern.struct_size = sizeof(pattern);
  pattern.kind = kind;
  pattern.gamma = 0.9f;
  pattern.tau = 0.1f;
  pattern.min_budget = 1024;
  pattern.max_budget = FLEXPREFILL_NO_LIMIT;
  pattern.vertical_size = 8192;
  pattern.slash_size = 8192;
  pattern.global_window = 1024;
  pattern.local_window = 8192;
  pattern.stride = 16;
  pattern.threshold = 0.9f;
  pattern.alpha = 0.1f;
  if (kind == FLEXPREFILL_PATTERN_FLASH_PREFILL) {
    pattern.global_window = 256;
    pattern.local_window = 512;
  }
  pattern.last_queries = 1024;
  pattern.mean_correction = 1;
  pattern.column_share = 0.8f;
  return pattern;
}

static inline flexprefill_execution flexprefill_execution_default(void) {
  flexprefill_execution execution;
  memset(&execution, 0, sizeof(execution));
  execution.struct_size = sizeof(execution);
  return execution;
}

static inline flexprefill_prefill_audit flexprefill_prefill_audit_default(void) {
  flexprefill_prefill_audit audit;
  memset(&audit, 0, sizeof(audit));
  audit.struct_size = sizeof(audit);
  return audit;
}

static inline flexprefill_block_index_view flexprefill_block_index_view_default(void) {
  flexprefill_block_index_view view;
  memset(&view, 0, sizeof(view));
  view.struct_size = sizeof(view);
  view.block_size = 128;
  return view;
}

static inline flexprefill_device_block_index flexprefill_device_block_index_default(void) {
  flexprefill_device_block_index index;
  memset(&index, 0, sizeof(index));
  index.struct_size = sizeof(index);
  return index;
}

// A contiguous tensor; `rank` is 1 to 4.
static inline flexprefill_tensor flexprefill_tensor_contiguous(void* data, int32_t dtype,
                                                               int32_t rank, const int64_t* shape) {
  flexprefill_tensor tensor;
  int64_t stride = 1;
  memset(&tensor, 0, sizeof(tensor));
  tensor.data = data;
  tensor.dtype = dtype;
  tensor.rank = rank;
  for (int32_t i = rank < 4 ? rank - 1 : 3; i >= 0; --i) {
    tensor.shape[i] = shape[i];
    tensor.strides[i] = stride;
    stride *= shape[i];
  }
  return tensor;
}

// ---- The library

// Of the last failed call on this thread; "" if none failed. Valid until the next call.
FLEXPREFILL_API const char* flexprefill_last_error(void);
// "major.minor.patch".
FLEXPREFILL_API const char* flexprefill_version(void);
// FLEXPREFILL_C_API_VERSION of the library, not of the header.
FLEXPREFILL_API int32_t flexprefill_c_api_version(void);
// Writes at most `capacity` of the targets (FLEXPREFILL_CPU_*) that this build has and this
// processor runs, best first; returns how many there are.
FLEXPREFILL_API int32_t flexprefill_cpu_targets(int32_t* targets, int32_t capacity);
// NULL for a number that is no target.
FLEXPREFILL_API const char* flexprefill_cpu_target_name(int32_t target);

// ---- The stages
//
// `pattern` and `execution` may be NULL: flex_prefill and automatic choice. `workspace` holds at
// least what the *_workspace_size function says of a call with these lengths, any alignment: a
// shorter sequence may need more than a longer one. `audit` is NULL with audit_count 0, or [b *
// h_q], sequence-major.

FLEXPREFILL_API flexprefill_status flexprefill_select_workspace_size(
    const flexprefill_input* input, const flexprefill_pattern* pattern,
    const flexprefill_execution* execution, size_t* bytes);
// Replaces what `index` held.
FLEXPREFILL_API flexprefill_status flexprefill_select(
    const flexprefill_input* input, const flexprefill_pattern* pattern,
    const flexprefill_execution* execution, void* workspace, size_t workspace_bytes,
    flexprefill_block_index* index, flexprefill_head_audit* audit, int64_t audit_count);

FLEXPREFILL_API flexprefill_status flexprefill_attend_workspace_size(
    const flexprefill_input* input, const flexprefill_execution* execution, size_t* bytes);
// out   [b, s_q, h_q, d_v] or packed [t_q, h_q, d_v], must not overlap q, k or v
// lse   NULL, or [b, h_q, s_q] or packed [h_q, t_q], fp32, natural log
// index NULL: every causal block
FLEXPREFILL_API flexprefill_status flexprefill_attend(const flexprefill_input* input,
                                                      const flexprefill_block_index* index,
                                                      const flexprefill_execution* execution,
                                                      void* workspace, size_t workspace_bytes,
                                                      const flexprefill_tensor* out,
                                                      const flexprefill_tensor* lse);

FLEXPREFILL_API flexprefill_status flexprefill_prefill_workspace_size(
    const flexprefill_input* input, const flexprefill_pattern* pattern,
    const flexprefill_execution* execution, size_t* bytes);
// select and attend in one call.
FLEXPREFILL_API flexprefill_status
flexprefill_prefill(const flexprefill_input* input, const flexprefill_pattern* pattern,
                    const flexprefill_execution* execution, void* workspace, size_t workspace_bytes,
                    const flexprefill_tensor* out, const flexprefill_tensor* lse,
                    flexprefill_head_audit* audit, int64_t audit_count);
// The same, audited: with a floor for the kept mass, and a comparison with dense attention. Takes
// flexprefill_prefill_workspace_size; on a CUDA backend a floor waits for the stream once for each
// selection. Since version 6.
FLEXPREFILL_API flexprefill_status flexprefill_prefill_audited(
    const flexprefill_input* input, const flexprefill_pattern* pattern,
    const flexprefill_execution* execution, void* workspace, size_t workspace_bytes,
    const flexprefill_tensor* out, const flexprefill_tensor* lse, flexprefill_prefill_audit* audit);

// ---- The stages on a CUDA backend, with an index that stays on the device
//
// They wait for nothing and allocate nothing, so that a CUDA graph can capture them. `execution`
// names a CUDA backend. Since version 2.

// Rows of the index of an input, and how many indices it can have at most. Either may be NULL.
FLEXPREFILL_API flexprefill_status flexprefill_device_block_index_size(
    const flexprefill_input* input, int64_t* rows, int64_t* capacity);
FLEXPREFILL_API flexprefill_status flexprefill_select_on_device_workspace_size(
    const flexprefill_input* input, const flexprefill_pattern* pattern,
    const flexprefill_execution* execution, size_t* bytes);
// Writes the arrays of `index` in stream order, its windows and mean_correction at once.
FLEXPREFILL_API flexprefill_status
flexprefill_select_on_device(const flexprefill_input* input, const flexprefill_pattern* pattern,
                             const flexprefill_execution* execution, void* workspace,
                             size_t workspace_bytes, flexprefill_device_block_index* index);
FLEXPREFILL_API flexprefill_status flexprefill_attend_on_device_workspace_size(
    const flexprefill_input* input, const flexprefill_execution* execution, size_t* bytes);
// Blocks after a row's diagonal and entries beyond the capacity are left out.
FLEXPREFILL_API flexprefill_status flexprefill_attend_on_device(
    const flexprefill_input* input, const flexprefill_device_block_index* index,
    const flexprefill_execution* execution, void* workspace, size_t workspace_bytes,
    const flexprefill_tensor* out, const flexprefill_tensor* lse);

// Compares `out`, which attend made of `index`, with dense attention on `rows` rows of every head;
// figures [b * h_q]. Host backends only. Since version 3.
FLEXPREFILL_API flexprefill_status flexprefill_compare_with_dense(
    const flexprefill_input* input, const flexprefill_block_index* index,
    const flexprefill_tensor* out, int64_t rows, const flexprefill_execution* execution,
    flexprefill_dense_comparison* figures, int64_t figure_count);

// ---- The index

// The block grid of one sequence, anchored at absolute token 0: number of the block that holds
// query row 0, query blocks, key blocks.
FLEXPREFILL_API flexprefill_status flexprefill_block_grid(int64_t s_q, int64_t s_kv,
                                                          int32_t block_size,
                                                          int64_t* first_q_block, int64_t* n_q,
                                                          int64_t* n_kv);

// An index of no sequences, for flexprefill_select to fill.
FLEXPREFILL_API flexprefill_status flexprefill_block_index_create(flexprefill_block_index** index);
// Copies and checks the caller's arrays.
FLEXPREFILL_API flexprefill_status flexprefill_block_index_from_view(
    const flexprefill_block_index_view* view, flexprefill_block_index** index);
// The index that keeps every causal block; sequence_lengths [sequence_count, 2]: s_q, s_kv.
FLEXPREFILL_API flexprefill_status flexprefill_block_index_dense(const int64_t* sequence_lengths,
                                                                 int64_t sequence_count,
                                                                 int32_t h_q, int32_t block_size,
                                                                 flexprefill_block_index** index);
// NULL does nothing.
FLEXPREFILL_API void flexprefill_block_index_destroy(flexprefill_block_index* index);

FLEXPREFILL_API flexprefill_status
flexprefill_block_index_check(const flexprefill_block_index* index);
// Fills `view`, whose struct_size the caller has set, with pointers into the index: valid until it
// is changed or destroyed.
FLEXPREFILL_API flexprefill_status flexprefill_block_index_get_view(
    const flexprefill_block_index* index, flexprefill_block_index_view* view);
// Kept causal blocks / all causal blocks.
FLEXPREFILL_API flexprefill_status
flexprefill_block_index_density(const flexprefill_block_index* index, double* density);
// Writes `*size` bytes; with `bytes` NULL only says how many. An error if `capacity` is less.
FLEXPREFILL_API flexprefill_status flexprefill_block_index_serialize(
    const flexprefill_block_index* index, void* bytes, size_t capacity, size_t* size);
// Checks everything that it reads.
FLEXPREFILL_API flexprefill_status flexprefill_block_index_deserialize(
    const void* bytes, size_t size, flexprefill_block_index** index);

// ---- Scratch memory, for callers that do not bring their own

FLEXPREFILL_API flexprefill_status flexprefill_workspace_create(flexprefill_workspace** workspace);
// NULL does nothing.
FLEXPREFILL_API void flexprefill_workspace_destroy(flexprefill_workspace* workspace);
// `*data` has at least `bytes` bytes, until the next reserve or destroy.
FLEXPREFILL_API flexprefill_status flexprefill_workspace_reserve(flexprefill_workspace* workspace,
                                                                 size_t bytes, void** data);

#ifdef __cplusplus
}  // extern "C"
#endif

#endif  // FLEXPREFILL_C_API_H_
