#include "cuda_emulator/instructions.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstring>

namespace cuda_emulator {
namespace {

constexpr uint32_t kAllLanes = 0xffffffffu;

std::array<float, 1 << 16> make_float16_table() {
  std::array<float, 1 << 16> table{};
  for (uint32_t bits = 0; bits < table.size(); ++bits) {
    const uint32_t exponent = bits >> 10 & 31, fraction = bits & 1023;
    float value = std::ldexp(static_cast<float>(exponent == 0 ? fraction : fraction + 1024),
                             static_cast<int>(std::max(exponent, 1U)) - 25);
    if (exponent == 31) value = fraction == 0 ? INFINITY : NAN;
    table[bits] = (bits >> 15) != 0 ? -value : value;
  }
  return table;
}
const std::array<float, 1 << 16> float16_table = make_float16_table();

}  // namespace

float to_float(Element type, uint32_t bits) {
  return type == Element::kBFloat16 ? std::bit_cast<float>(bits << 16)
                                    : float16_table[bits & 0xffff];
}

void cp_async(uint32_t shared, const void* global, int bytes, int source_bytes, Where where) {
  std::byte* to = shared_pointer(shared, bytes, bytes, "cp.async", where);
  if (reinterpret_cast<uintptr_t>(global) % bytes != 0 || source_bytes < 0 ||
      source_bytes > bytes) {
    fail("cp.async of " + std::to_string(source_bytes) + " bytes out of " + std::to_string(bytes) +
             " from an address that ends in " +
             std::to_string(reinterpret_cast<uintptr_t>(global) % 16),
         where);
  }
  check_access(to, bytes, Races::Kind::kWrite, where);
  instrumented_access(global, source_bytes, Races::Kind::kRead);
  std::fill_n(to, bytes, kPoison);
  thread_copies().open.emplace_back([=] {
    if (source_bytes > 0) std::memcpy(to, global, source_bytes);
    std::fill_n(to + source_bytes, bytes - source_bytes, std::byte{0});
  });
}

void cp_async_commit() { thread_copies().commit(); }

void cp_async_wait(int pending) { thread_copies().wait(pending); }

void ldmatrix(uint32_t* registers, int matrices, bool transposed, uint32_t row, Where where) {
  struct Lane {
    uint32_t* registers;
    uint32_t row;
  } lane{registers, row};
  if (lane_number() < 8 * matrices) {
    check_access(shared_pointer(row, 16, 16, "ldmatrix", where), 16, Races::Kind::kRead, where);
  }
  at_warp(
      kAllLanes, transposed ? "ldmatrix.trans" : "ldmatrix", lane,
      [&](Lane* const* lanes) {
        for (int m = 0; m < matrices; ++m) {
          uint16_t matrix[8][8];
          for (int r = 0; r < 8; ++r) {
            std::memcpy(matrix[r], shared_pointer(lanes[8 * m + r]->row, 16, 16, "ldmatrix", where),
                        16);
          }
          for (int l = 0; l < 32; ++l) {
            const int i = l / 4, j = l % 4 * 2;
            const uint32_t low = transposed ? matrix[j][i] : matrix[i][j];
            const uint32_t high = transposed ? matrix[j + 1][i] : matrix[i][j + 1];
            lanes[l]->registers[m] = low | high << 16;
          }
        }
      },
      where);
}

void stmatrix(const uint32_t* registers, uint32_t row, Where where) {
  struct Lane {
    const uint32_t* registers;
    uint32_t row;
  } lane{registers, row};
  check_access(shared_pointer(row, 16, 16, "stmatrix", where), 16, Races::Kind::kWrite, where);
  at_warp(
      kAllLanes, "stmatrix", lane,
      [&](Lane* const* lanes) {
        for (int m = 0; m < 4; ++m) {
          for (int r = 0; r < 8; ++r) {
            std::byte* to = shared_pointer(lanes[8 * m + r]->row, 16, 16, "stmatrix", where);
            for (int c = 0; c < 4; ++c) {
              std::memcpy(to + 4 * c, &lanes[4 * r + c]->registers[m], 4);
            }
          }
        }
      },
      where);
}

void mma_m16n8k16(Element type, float* d, const uint32_t* a, uint32_t b0, uint32_t b1,
                  Where where) {
  struct Lane {
    float* d;
    const uint32_t* a;
    uint32_t b[2];
  } lane{d, a, {b0, b1}};
  at_warp(
      kAllLanes, "mma.m16n8k16", lane,
      [type](Lane* const* lanes) {
        float left[16][16], right[16][8];
        for (int l = 0; l < 32; ++l) {
          const int group = l / 4, pair = l % 4 * 2;
          for (int half = 0; half < 2; ++half) {
            const int shift = 16 * half;
            for (int i = 0; i < 4; ++i) {
              left[group + i % 2 * 8][pair + i / 2 * 8 + half] =
                  to_float(type, lanes[l]->a[i] >> shift & 0xffff);
            }
            for (int i = 0; i < 2; ++i) {
              right[pair + i * 8 + half][group] = to_float(type, lanes[l]->b[i] >> shift & 0xffff);
            }
          }
        }
        float product[16][8] = {};
        for (int i = 0; i < 16; ++i) {
          for (int k = 0; k < 16; ++k) {
            for (int j = 0; j < 8; ++j) product[i][j] += left[i][k] * right[k][j];
          }
        }
        for (int l = 0; l < 32; ++l) {
          const int group = l / 4, pair = l % 4 * 2;
          for (int i = 0; i < 4; ++i) {
            lanes[l]->d[i] += product[group + i / 2 * 8][pair + i % 2];
          }
        }
      },
      where);
}

}  // namespace cuda_emulator
