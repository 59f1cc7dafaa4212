// The C API from plain C: prefill over packed sequences, an index through every form, and errors.
// With FLEXPREFILL_TEST_DLOPEN the library is loaded by the path in argv[1].
#include <flexprefill/c_api.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#ifdef FLEXPREFILL_TEST_DLOPEN
#include <dlfcn.h>
// dlsym gives an object pointer; POSIX promises that its bytes are those of the function pointer.
#define LOAD(name)                                                  \
  __typeof__(&flexprefill_##name) name = NULL;                      \
  do {                                                              \
    void* symbol = dlsym(library, "flexprefill_" #name);            \
    if (symbol == NULL) return fail("dlsym flexprefill_" #name, 0); \
    memcpy(&name, &symbol, sizeof(symbol));                         \
  } while (0)
#else
#define LOAD(name) __typeof__(&flexprefill_##name) name = flexprefill_##name
#endif

static int fail(const char* what, int line) {
  fprintf(stderr, "c_api_program.c:%d: failed: %s\n", line, what);
  return 1;
}
#define EXPECT(condition) \
  if (!(condition)) return fail(#condition, __LINE__)

enum { kHeadsQ = 4, kHeadsKv = 2, kDim = 32, kTokens = 700 };

static void fill(float* values, size_t n, uint32_t seed) {
  for (size_t i = 0; i < n; ++i) {
    seed = seed * 1664525u + 1013904223u;
    values[i] = (float)(seed >> 8) / (float)(1u << 23) - 1.0f;
  }
}

int main(int argc, char** argv) {
#ifdef FLEXPREFILL_TEST_DLOPEN
  EXPECT(argc == 2);
  void* library = dlopen(argv[1], RTLD_NOW | RTLD_LOCAL);
  if (library == NULL) return fail(dlerror(), __LINE__);
#else
  (void)argc;
  (void)argv;
#endif
  LOAD(last_error);
  LOAD(c_api_version);
  LOAD(cpu_targets);
  LOAD(cpu_target_name);
  LOAD(select_workspace_size);
  LOAD(select);
  LOAD(attend_workspace_size);
  LOAD(attend);
  LOAD(prefill_workspace_size);
  LOAD(prefill);
  LOAD(block_index_create);
  LOAD(block_index_destroy);
  LOAD(block_index_density);
  LOAD(workspace_create);
  LOAD(workspace_reserve);
  LOAD(workspace_destroy);

  EXPECT(c_api_version() == FLEXPREFILL_C_API_VERSION);
  int32_t targets[8];
  const int32_t n_targets = cpu_targets(targets, 8);
  EXPECT(n_targets >= 1 && n_targets <= 8);
  EXPECT(cpu_target_name(targets[0]) != NULL && cpu_target_name(-1) == NULL);

  // Two packed sequences of 300 and 400 tokens.
  static float q[kTokens * kHeadsQ * kDim], k[kTokens * kHeadsKv * kDim];
  static float v[kTokens * kHeadsKv * kDim], out[kTokens * kHeadsQ * kDim];
  static float again[kTokens * kHeadsQ * kDim], lse[kHeadsQ * kTokens];
  fill(q, sizeof(q) / sizeof(float), 1);
  fill(k, sizeof(k) / sizeof(float), 2);
  fill(v, sizeof(v) / sizeof(float), 3);
  const int32_t starts[3] = {0, 300, kTokens};
  const int64_t q_shape[3] = {kTokens, kHeadsQ, kDim};
  const int64_t kv_shape[3] = {kTokens, kHeadsKv, kDim};
  const int64_t lse_shape[2] = {kHeadsQ, kTokens};
  flexprefill_input input = flexprefill_input_default();
  input.q = flexprefill_tensor_contiguous(q, FLEXPREFILL_FLOAT32, 3, q_shape);
  input.k = flexprefill_tensor_contiguous(k, FLEXPREFILL_FLOAT32, 3, kv_shape);
  input.v = flexprefill_tensor_contiguous(v, FLEXPREFILL_FLOAT32, 3, kv_shape);
  input.cu_seqlens_q = input.cu_seqlens_kv = starts;
  input.cu_seqlens_q_count = input.cu_seqlens_kv_count = 3;
  input.block_size = 32;
  const flexprefill_tensor out_tensor =
      flexprefill_tensor_contiguous(out, FLEXPREFILL_FLOAT32, 3, q_shape);
  const flexprefill_tensor again_tensor =
      flexprefill_tensor_contiguous(again, FLEXPREFILL_FLOAT32, 3, q_shape);
  const flexprefill_tensor lse_tensor =
      flexprefill_tensor_contiguous(lse, FLEXPREFILL_FLOAT32, 2, lse_shape);
  flexprefill_pattern pattern = flexprefill_pattern_default(FLEXPREFILL_PATTERN_FLEX_PREFILL);
  pattern.min_budget = 64;
  pattern.gamma = 0.5f;

  flexprefill_workspace* workspace = NULL;
  void* scratch = NULL;
  size_t bytes = 0, most = 0;
  EXPECT(workspace_create(&workspace) == FLEXPREFILL_OK);
  EXPECT(prefill_workspace_size(&input, &pattern, NULL, &most) == FLEXPREFILL_OK);
  EXPECT(select_workspace_size(&input, &pattern, NULL, &bytes) == FLEXPREFILL_OK);
  most = bytes > most ? bytes : most;
  EXPECT(attend_workspace_size(&input, NULL, &bytes) == FLEXPREFILL_OK);
  most = bytes > most ? bytes : most;
  EXPECT(workspace_reserve(workspace, most, &scratch) == FLEXPREFILL_OK);

  flexprefill_head_audit audit[2 * kHeadsQ];
  EXPECT(prefill(&input, &pattern, NULL, scratch, most, &out_tensor, &lse_tensor, audit,
                 2 * kHeadsQ) == FLEXPREFILL_OK);
  float mean_density = 0;
  for (int i = 0; i < 2 * kHeadsQ; ++i) {
    EXPECT(audit[i].density > 0 && audit[i].density < 1);
    EXPECT(audit[i].kept_mass > 0 && audit[i].kept_mass <= 1.0001f);
    mean_density += audit[i].density / kHeadsQ;
  }

  // The same in two stages.
  flexprefill_block_index* index = NULL;
  double density = 0;
  EXPECT(block_index_create(&index) == FLEXPREFILL_OK);
  EXPECT(select(&input, &pattern, NULL, scratch, most, index, NULL, 0) == FLEXPREFILL_OK);
  EXPECT(block_index_density(index, &density) == FLEXPREFILL_OK);
  EXPECT(density > 0.05 && density < 1);
  EXPECT(attend(&input, index, NULL, scratch, most, &again_tensor, NULL) == FLEXPREFILL_OK);
  for (size_t i = 0; i < sizeof(out) / sizeof(float); ++i) {
    EXPECT(fabsf(out[i] - again[i]) <= 1e-6f);
  }
  for (size_t i = 0; i < sizeof(lse) / sizeof(float); ++i) EXPECT(isfinite(lse[i]));

  // Errors name what was wrong, and change nothing.
  out[0] = 12345.0f;
  pattern.gamma = NAN;
  EXPECT(prefill(&input, &pattern, NULL, scratch, most, &out_tensor, NULL, NULL, 0) ==
         FLEXPREFILL_INVALID_ARGUMENT);
  EXPECT(strstr(last_error(), "gamma") != NULL);
  pattern.gamma = 0.5f;
  EXPECT(prefill(&input, &pattern, NULL, scratch, 16, &out_tensor, NULL, NULL, 0) ==
         FLEXPREFILL_WORKSPACE_TOO_SMALL);
  EXPECT(strstr(last_error(), "workspace") != NULL);
  EXPECT(out[0] == 12345.0f);

  block_index_destroy(index);
  block_index_destroy(NULL);
  workspace_destroy(workspace);
  printf("density %.3f, best CPU target %s\n", mean_density / 2, cpu_target_name(targets[0]));
  return 0;
}
