// A tensor of the caller's as the extension takes it in: through DLPack, where its memory is.
#ifndef FLEXPREFILL_PYTHON_TENSOR_H_
#define FLEXPREFILL_PYTHON_TENSOR_H_

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstdint>
#include <string>

#include "flexprefill/types.h"

namespace flexprefill {

[[noreturn]] inline void refuse(const std::string& message) {
  throw Error(ErrorCode::kInvalidArgument, message);
}

inline std::string element_type_text(nanobind::dlpack::dtype dtype) {
  static const char* const kKinds[] = {"int",    "uint",    "float", "opaque",
                                       "bfloat", "complex", "bool"};
  const std::string kind = dtype.code < std::size(kKinds) ? kKinds[dtype.code] : "type ";
  return kind + std::to_string(dtype.bits * dtype.lanes);
}

inline DType element_type(nanobind::dlpack::dtype dtype, const std::string& name,
                          bool bfloat16_bits) {
  namespace nb = nanobind;
  if (dtype == nb::dtype<float>()) return DType::kFloat32;
  if (dtype == nb::dlpack::dtype{static_cast<uint8_t>(nb::dlpack::dtype_code::Float), 16, 1}) {
    return DType::kFloat16;
  }
  if (dtype == nb::dlpack::dtype{static_cast<uint8_t>(nb::dlpack::dtype_code::Bfloat), 16, 1} ||
      (bfloat16_bits && dtype == nb::dtype<uint16_t>())) {
    return DType::kBFloat16;
  }
  refuse(name + ": expected element type float32, float16 or bfloat16, got " +
         element_type_text(dtype));
}

// Held for as long as this lives. Memory of a GPU is used as such: the Python side has seen to it
// that all tensors of a call are on one device.
class Tensor {
 public:
  // `tensor`: what speaks DLPack, or a capsule of it, which is used up.
  // `bfloat16_bits`: uint16 elements are the bits of bfloat16 (NumPy has no such type of its own).
  Tensor(nanobind::handle tensor, const std::string& name, bool writable, bool bfloat16_bits) {
    namespace nb = nanobind;
    const bool is_capsule = PyCapsule_CheckExact(tensor.ptr());
    if (!nb::try_cast(tensor, array_, false)) {
      throw nb::type_error(
          (name + ": expected a tensor that speaks DLPack, got " + nb::str(tensor.type()).c_str())
              .c_str());
    }
    if (nb::ndarray<> unused; writable && !is_capsule && !nb::try_cast(tensor, unused, false)) {
      refuse(name + ": expected writable memory, got a read-only tensor");
    }
    const int device = array_.device_type();
    if (device != nb::device::cpu::value && device != nb::device::cuda_host::value &&
        device != nb::device::cuda::value && device != nb::device::cuda_managed::value) {
      throw Error(ErrorCode::kUnsupported, name +
                                               ": expected a tensor in CPU or CUDA memory, got " +
                                               "DLPack device type " + std::to_string(device));
    }
    if (array_.ndim() < 1 || array_.ndim() > 4) {
      refuse(name + ": expected rank 1 to 4, got rank " + std::to_string(array_.ndim()));
    }
    view_.data = const_cast<void*>(array_.data());
    view_.dtype = element_type(array_.dtype(), name, bfloat16_bits);
    view_.rank = static_cast<int32_t>(array_.ndim());
    for (int32_t i = 0; i < view_.rank; ++i) {
      view_.shape[i] = static_cast<int64_t>(array_.shape(i));
      view_.strides[i] = array_.stride(i);
    }
    // Strides of an empty tensor mean nothing, and frameworks make up different ones.
    if (array_.size() == 0) view_.strides.fill(1);
  }
  const TensorView& view() const { return view_; }
  bool on_cuda() const {
    const int device = array_.device_type();
    return device == nanobind::device::cuda::value ||
           device == nanobind::device::cuda_managed::value;
  }

 private:
  nanobind::ndarray<nanobind::ro> array_;
  TensorView view_;
};

}  // namespace flexprefill

#endif  // FLEXPREFILL_PYTHON_TENSOR_H_
