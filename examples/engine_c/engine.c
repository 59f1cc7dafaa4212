// The two stages from plain C: select the blocks of a prompt, look at them, attend, and compare
// with dense attention.
#include <flexprefill/c_api.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

enum { kTokens = 4096, kQueryHeads = 4, kKvHeads = 2, kHeadDim = 64 };

static float noise(void) { return 2.0f * (float)rand() / (float)RAND_MAX - 1.0f; }

// Rows that attend to the first tokens, to a heavy one and to what is near.
static void fill(float* x, int token, int heavy) {
  for (int c = 0; c < kHeadDim; ++c) x[c] = 0.5f * noise();
  for (int f = 0; f < 8; ++f) {
    const float angle = (float)token * 0.06f * powf(0.75f, (float)f);
    x[2 * f] += 3.2f * cosf(angle);
    x[2 * f + 1] += 3.2f * sinf(angle);
  }
  if (heavy) x[20] += 9.5f;
}

static void check(flexprefill_status status) {
  if (status == FLEXPREFILL_OK) return;
  fprintf(stderr, "flexprefill: %s\n", flexprefill_last_error());
  exit(1);
}

int main(void) {
  static float q[kTokens][kQueryHeads][kHeadDim], k[kTokens][kKvHeads][kHeadDim];
  static float v[kTokens][kKvHeads][kHeadDim];
  static float sparse[kTokens][kQueryHeads][kHeadDim], dense[kTokens][kQueryHeads][kHeadDim];
  for (int i = 0; i < kTokens; ++i) {
    for (int h = 0; h < kQueryHeads; ++h) fill(q[i][h], i, 1);
    for (int h = 0; h < kKvHeads; ++h) {
      fill(k[i][h], i, i < 4 || i == 700);
      for (int c = 0; c < kHeadDim; ++c) v[i][h][c] = 1.0f + noise();
    }
  }

  const int64_t q_shape[4] = {1, kTokens, kQueryHeads, kHeadDim};
  const int64_t kv_shape[4] = {1, kTokens, kKvHeads, kHeadDim};
  flexprefill_input input = flexprefill_input_default();
  input.q = flexprefill_tensor_contiguous(q, FLEXPREFILL_FLOAT32, 4, q_shape);
  input.k = flexprefill_tensor_contiguous(k, FLEXPREFILL_FLOAT32, 4, kv_shape);
  input.v = flexprefill_tensor_contiguous(v, FLEXPREFILL_FLOAT32, 4, kv_shape);
  const flexprefill_tensor sparse_out =
      flexprefill_tensor_contiguous(sparse, FLEXPREFILL_FLOAT32, 4, q_shape);
  const flexprefill_tensor dense_out =
      flexprefill_tensor_contiguous(dense, FLEXPREFILL_FLOAT32, 4, q_shape);
  flexprefill_pattern pattern = flexprefill_pattern_default(FLEXPREFILL_PATTERN_FLEX_PREFILL);
  pattern.gamma = 0.95f;
  pattern.min_budget = 512;

  size_t select_bytes = 0, attend_bytes = 0;
  check(flexprefill_select_workspace_size(&input, &pattern, NULL, &select_bytes));
  check(flexprefill_attend_workspace_size(&input, NULL, &attend_bytes));
  const size_t bytes = select_bytes > attend_bytes ? select_bytes : attend_bytes;
  void* workspace = malloc(bytes);
  if (workspace == NULL && bytes > 0) return 1;

  flexprefill_block_index* index = NULL;
  flexprefill_head_audit audit[kQueryHeads];
  check(flexprefill_block_index_create(&index));
  check(flexprefill_select(&input, &pattern, NULL, workspace, bytes, index, audit, kQueryHeads));
  check(flexprefill_attend(&input, index, NULL, workspace, bytes, &sparse_out, NULL));
  check(flexprefill_attend(&input, NULL, NULL, workspace, bytes, &dense_out, NULL));

  static const char* const names[] = {"dense", "vertical-slash", "query-aware", "streaming"};
  for (int h = 0; h < kQueryHeads; ++h) {
    printf("head %d: %s, density %.3f, keeps %.3f of the probe's attention\n", h,
           names[audit[h].pattern], audit[h].density, audit[h].kept_mass);
  }
  double density = 0, difference = 0, norm = 0;
  check(flexprefill_block_index_density(index, &density));
  const float *got = &sparse[0][0][0], *want = &dense[0][0][0];
  for (int i = 0; i < kTokens * kQueryHeads * kHeadDim; ++i) {
    difference += (got[i] - want[i]) * (got[i] - want[i]);
    norm += want[i] * want[i];
  }
  const double error = sqrt(difference / norm);
  printf("flexprefill %s: density %.3f, relative error %.4f\n", flexprefill_version(), density,
         error);
  flexprefill_block_index_destroy(index);
  free(workspace);
  return error < 0.1 && density < 0.9 ? 0 : 1;
}
