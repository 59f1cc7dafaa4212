// Tensor maps of a call's tensors: which of them the copy engine can address, and how.
#ifndef FLEXPREFILL_SRC_CUDA_TENSOR_MAP_CUH_
#define FLEXPREFILL_SRC_CUDA_TENSOR_MAP_CUH_

#include <array>
#include <cstddef>
#include <cstdint>

#include "cuda/sm90.cuh"
#include "flexprefill/types.h"

namespace flexprefill::sm90 {

// A tensor as TMA sees it: [dimension 3, dimension 2, rows, d]. Packed tensors have no dimension 3.
struct MapDimensions {
  std::array<int64_t, 3> sizes, strides;  // rows, heads, sequences (or pages); elements
};

inline MapDimensions map_dimensions(const TensorView& view) {
  if (view.rank == 3) {
    return {{view.shape[0], view.shape[1], 1}, {view.strides[0], view.strides[1], 0}};
  }
  return {{view.shape[1], view.shape[2], view.shape[0]},
          {view.strides[1], view.strides[2], view.strides[0]}};
}

// Bases and strides must be multiples of 16 bytes; strides of dimensions of one are not used.
inline bool can_address(const TensorView& view) {
  constexpr int64_t kMostBytes = int64_t{1} << 40, kMostElements = int64_t{1} << 31;
  if (reinterpret_cast<uintptr_t>(view.data) % 16 != 0) return false;
  const MapDimensions dimensions = map_dimensions(view);
  for (int i = 0; i < 3; ++i) {
    const int64_t bytes = dimensions.strides[i] * 2;
    if (dimensions.sizes[i] >= kMostElements) return false;
    if (dimensions.sizes[i] > 1 && (bytes <= 0 || bytes % 16 != 0 || bytes >= kMostBytes)) {
      return false;
    }
  }
  return true;
}

// Boxes of box_rows rows by 64 columns.
inline TensorMap make_tensor_map(const TensorView& view, int32_t d, int32_t box_rows) {
  const MapDimensions dimensions = map_dimensions(view);
  TensorMapShape shape{.data = view.data,
                       .sizes = {static_cast<uint64_t>(d)},
                       .strides = {},
                       .box_rows = static_cast<uint32_t>(box_rows),
                       .bfloat16 = view.dtype == DType::kBFloat16};
  for (int i = 0; i < 3; ++i) {
    const int64_t stride = dimensions.sizes[i] > 1 ? dimensions.strides[i] : d;
    shape.sizes[i + 1] = static_cast<uint64_t>(dimensions.sizes[i]);
    shape.strides[i] = static_cast<uint64_t>(stride) * 2;
  }
  return make_tensor_map(shape);
}

// Boxes of box_rows rows by 64 columns of [rows, d] without gaps, d a multiple of 8.
inline TensorMap make_rows_map(const std::byte* data, DType dtype, int64_t rows, int32_t d,
                               int32_t box_rows) {
  const uint64_t row_bytes = static_cast<uint64_t>(d) * 2;
  return make_tensor_map({.data = data,
                          .sizes = {static_cast<uint64_t>(d), static_cast<uint64_t>(rows), 1, 1},
                          .strides = {row_bytes, row_bytes, row_bytes},
                          .box_rows = static_cast<uint32_t>(box_rows),
                          .bfloat16 = dtype == DType::kBFloat16});
}

}  // namespace flexprefill::sm90

#endif  // FLEXPREFILL_SRC_CUDA_TENSOR_MAP_CUH_
