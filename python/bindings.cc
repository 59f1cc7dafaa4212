// The extension flex_prefill._core: tensors in through DLPack, calls out to the C++ API, errors
// back as Python exceptions. What a user sees is in flex_prefill/attention.py.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstdint>
#include <new>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "flexprefill/flexprefill.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace flexprefill {
namespace {

using AnyArray = nb::ndarray<nb::ro>;
using Int32Vector = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Int32Matrix = nb::ndarray<const int32_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Int64Vector = nb::ndarray<const int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using AuditArray =
    nb::ndarray<float, nb::shape<-1, -1, 6>, nb::c_contig, nb::device::cpu>;  // [b, h_q, 6]

[[noreturn]] void refuse(const std::string& message) {
  throw Error(ErrorCode::kInvalidArgument, message);
}

std::string element_type_text(nb::dlpack::dtype dtype) {
  static const char* const kKinds[] = {"int",    "uint",    "float", "opaque",
                                       "bfloat", "complex", "bool"};
  const std::string kind = dtype.code < std::size(kKinds) ? kKinds[dtype.code] : "type ";
  return kind + std::to_string(dtype.bits * dtype.lanes);
}

DType element_type(nb::dlpack::dtype dtype, const std::string& name, bool bfloat16_bits) {
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

nb::dlpack::dtype dlpack_type(DType dtype) {
  const auto code =
      dtype == DType::kBFloat16 ? nb::dlpack::dtype_code::Bfloat : nb::dlpack::dtype_code::Float;
  return {static_cast<uint8_t>(code), static_cast<uint8_t>(dtype == DType::kFloat32 ? 32 : 16), 1};
}

// A tensor of the caller's, held for as long as this lives; its memory is used where it is.
class Tensor {
 public:
  // `bfloat16_bits`: uint16 elements are the bits of bfloat16 (NumPy has no such type of its own).
  Tensor(nb::handle tensor, const std::string& name, bool writable, bool bfloat16_bits) {
    if (!nb::try_cast(tensor, array_, false)) {
      throw nb::type_error(
          (name + ": expected a tensor that speaks DLPack, got " + nb::str(tensor.type()).c_str())
              .c_str());
    }
    if (nb::ndarray<> unused; writable && !nb::try_cast(tensor, unused, false)) {
      refuse(name + ": expected writable memory, got a read-only tensor");
    }
    const int device = array_.device_type();
    if (device != nb::device::cpu::value && device != nb::device::cuda_host::value) {
      throw Error(ErrorCode::kUnsupported, name + ": expected a tensor in CPU memory, got DLPack " +
                                               "device type " + std::to_string(device));
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

 private:
  AnyArray array_;
  TensorView view_;
};

// A new contiguous array whose memory is aligned as JAX wants it; speaks DLPack.
nb::ndarray<nb::array_api> empty_like_type(const std::vector<size_t>& shape, const Tensor& like,
                                           bool float32) {
  constexpr std::align_val_t kAlignment{64};
  const DType dtype = float32 ? DType::kFloat32 : like.view().dtype;
  size_t bytes = dtype == DType::kFloat32 ? 4 : 2;
  for (size_t size : shape) bytes *= size;
  void* data = ::operator new(bytes > 0 ? bytes : 1, kAlignment);
  nb::capsule owner(data, [](void* p) noexcept { ::operator delete(p, kAlignment); });
  return {data, shape.size(), shape.data(), owner, nullptr, dlpack_type(dtype)};
}

Backend parse_backend(const std::string& name) {
  if (name == "auto") return Backend::kAuto;
  if (name == "reference") return Backend::kReference;
  if (name == "cpu") return Backend::kCpu;
  refuse("backend: expected \"auto\", \"reference\" or \"cpu\", got \"" + name + "\"");
}

CpuTarget parse_cpu_target(const std::string& name) {
  std::string names;
  for (int32_t i = 0; i <= static_cast<int32_t>(CpuTarget::kNeon); ++i) {
    const auto target = static_cast<CpuTarget>(i);
    if (name == cpu_target_name(target)) return target;
    names += std::string(i ? ", \"" : "\"") + cpu_target_name(target) + "\"";
  }
  refuse("cpu_target: expected one of " + names + ", got \"" + name + "\"");
}

// Everything of a call but the pattern and the outputs; keeps its tensors alive.
struct Call {
  Tensor q, k;
  std::optional<Tensor> v;
  std::optional<Int32Vector> cu_seqlens_q, cu_seqlens_kv, seqlens_kv;
  std::optional<Int32Matrix> page_table;
  Execution execution;
  AttentionInput input;

  Call(const Tensor& q_in, const Tensor& k_in, const Tensor* v_in,
       std::optional<Int32Vector> cu_seqlens_q_in, std::optional<Int32Vector> cu_seqlens_kv_in,
       std::optional<Int32Matrix> page_table_in, std::optional<Int32Vector> seqlens_kv_in,
       std::optional<double> softmax_scale, bool gqa_interleave, int32_t block_size,
       const std::string& backend, const std::string& cpu_target, int32_t num_threads)
      : q(q_in),
        k(k_in),
        cu_seqlens_q(std::move(cu_seqlens_q_in)),
        cu_seqlens_kv(std::move(cu_seqlens_kv_in)),
        seqlens_kv(std::move(seqlens_kv_in)),
        page_table(std::move(page_table_in)) {
    if (v_in != nullptr) v = *v_in;
    input.q = q.view();
    input.k = k.view();
    if (v) input.v = v->view();
    const auto span = [](const std::optional<Int32Vector>& array) {
      return array ? std::span<const int32_t>(array->data(), array->size())
                   : std::span<const int32_t>();
    };
    input.cu_seqlens_q = span(cu_seqlens_q);
    input.cu_seqlens_kv = span(cu_seqlens_kv);
    input.seqlens_kv = span(seqlens_kv);
    if (page_table) {
      input.page_table = page_table->data();
      input.page_table_stride = input.max_pages = static_cast<int64_t>(page_table->shape(1));
      // The core is told b by q alone, so the rows of the table are counted here.
      if (page_table->shape(0) != input.seqlens_kv.size()) {
        refuse("page_table: expected [b, max_pages] with b = " +
               std::to_string(input.seqlens_kv.size()) + " as in seqlens_kv, got " +
               std::to_string(page_table->shape(0)) + " rows");
      }
    }
    if (softmax_scale) input.softmax_scale = static_cast<float>(*softmax_scale);
    input.gqa_interleave = gqa_interleave;
    input.block_size = block_size;
    execution = {parse_backend(backend), parse_cpu_target(cpu_target), num_threads};
  }
};

// HeadAudit as the six floats of a row of AuditArray, in the order of its fields.
void write_audit(const std::vector<HeadAudit>& audit, float* rows) {
  for (const HeadAudit& head : audit) {
    *rows++ = static_cast<float>(head.pattern);
    *rows++ = head.jsd_sqrt;
    *rows++ = static_cast<float>(head.vertical_blocks);
    *rows++ = static_cast<float>(head.slash_blocks);
    *rows++ = head.kept_mass;
    *rows++ = head.density;
  }
}

std::vector<HeadAudit> audit_storage(const std::optional<AuditArray>& audit) {
  return std::vector<HeadAudit>(audit ? audit->shape(0) * audit->shape(1) : 0);
}

void call_prefill(const Call& call, const Pattern& pattern, const Tensor& out, const Tensor* lse,
                  std::optional<AuditArray> audit) {
  std::vector<HeadAudit> heads = audit_storage(audit);
  const TensorView lse_view = lse != nullptr ? lse->view() : TensorView{};
  {
    nb::gil_scoped_release released;
    WorkspaceBuffer buffer;
    const Workspace workspace =
        buffer.reserve(prefill_workspace_size(call.input, pattern, call.execution));
    prefill(call.input, pattern, call.execution, workspace, out.view(), lse_view, heads);
  }
  if (audit) write_audit(heads, audit->data());
}

size_t call_prefill_workspace_size(const Call& call, const Pattern& pattern) {
  return prefill_workspace_size(call.input, pattern, call.execution);
}

BlockIndex call_select(const Call& call, const Pattern& pattern, std::optional<AuditArray> audit) {
  std::vector<HeadAudit> heads = audit_storage(audit);
  BlockIndex index;
  {
    nb::gil_scoped_release released;
    WorkspaceBuffer buffer;
    const Workspace workspace =
        buffer.reserve(select_workspace_size(call.input, pattern, call.execution));
    select(call.input, pattern, call.execution, workspace, index, heads);
  }
  if (audit) write_audit(heads, audit->data());
  return index;
}

void call_attend(const Call& call, const BlockIndex* index, const Tensor& out, const Tensor* lse) {
  const TensorView lse_view = lse != nullptr ? lse->view() : TensorView{};
  nb::gil_scoped_release released;
  WorkspaceBuffer buffer;
  const Workspace workspace = buffer.reserve(attend_workspace_size(call.input, call.execution));
  attend(call.input, index, call.execution, workspace, out.view(), lse_view);
}

BlockIndex make_index(const Int64Vector& indptr, const Int32Vector& indices,
                      const std::vector<std::pair<int64_t, int64_t>>& sequences, int32_t h_q,
                      int32_t block_size, int64_t global_window, int64_t local_window) {
  BlockIndex index;
  index.block_size = block_size;
  index.h_q = h_q;
  index.global_window = global_window;
  index.local_window = local_window;
  for (const auto& [s_q, s_kv] : sequences) index.sequences.push_back({s_q, s_kv});
  index.indptr.assign(indptr.data(), indptr.data() + indptr.size());
  index.indices.assign(indices.data(), indices.data() + indices.size());
  index.check();
  return index;
}

template <typename T>
nb::ndarray<nb::numpy, const T, nb::ndim<1>> vector_view(const std::vector<T>& values,
                                                         nb::handle owner) {
  return {values.data(), {values.size()}, owner};
}

void bind_errors(nb::module_& m) {
  PyObject* unsupported = PyErr_NewExceptionWithDoc(
      "flex_prefill.UnsupportedError",
      "The call is valid, but this backend, build or machine cannot do it.", PyExc_RuntimeError,
      nullptr);
  if (unsupported == nullptr) nb::raise_python_error();
  m.attr("UnsupportedError") = nb::steal(unsupported);
  nb::register_exception_translator(
      [](const std::exception_ptr& error, void* unsupported_type) {
        try {
          std::rethrow_exception(error);
        } catch (const Error& e) {
          PyObject* type = PyExc_RuntimeError;
          if (e.code() == ErrorCode::kInvalidArgument) type = PyExc_ValueError;
          if (e.code() == ErrorCode::kUnsupported) type = static_cast<PyObject*>(unsupported_type);
          PyErr_SetString(type, e.what());
        }
      },
      unsupported);
}

void bind_index(nb::module_& m) {
  nb::class_<BlockIndex>(m, "BlockIndex")
      .def_static("make", &make_index, "indptr"_a, "indices"_a, "sequences"_a, "h_q"_a,
                  "block_size"_a, "global_window"_a, "local_window"_a)
      .def_static(
          "dense",
          [](const std::vector<std::pair<int64_t, int64_t>>& sequences, int32_t h_q,
             int32_t block_size) {
            std::vector<SequenceLengths> lengths;
            for (const auto& [s_q, s_kv] : sequences) lengths.push_back({s_q, s_kv});
            return dense_block_index(lengths, h_q, block_size);
          },
          "sequences"_a, "h_q"_a, "block_size"_a)
      .def_static(
          "deserialize",
          [](nb::bytes bytes) { return BlockIndex::deserialize({bytes.c_str(), bytes.size()}); },
          "data"_a)
      .def("serialize",
           [](const BlockIndex& index) {
             const std::string bytes = index.serialize();
             return nb::bytes(bytes.data(), bytes.size());
           })
      .def("check", &BlockIndex::check)
      .def("density", &BlockIndex::density)
      .def_ro("block_size", &BlockIndex::block_size)
      .def_ro("h_q", &BlockIndex::h_q)
      .def_ro("global_window", &BlockIndex::global_window)
      .def_ro("local_window", &BlockIndex::local_window)
      .def_prop_ro("sequences",
                   [](const BlockIndex& index) {
                     std::vector<std::pair<int64_t, int64_t>> pairs;
                     for (const auto& s : index.sequences) pairs.emplace_back(s.s_q, s.s_kv);
                     return pairs;
                   })
      .def_prop_ro("indptr",
                   [](nb::handle_t<BlockIndex> self) {
                     return vector_view(nb::cast<const BlockIndex&>(self).indptr, self);
                   })
      .def_prop_ro("indices", [](nb::handle_t<BlockIndex> self) {
        return vector_view(nb::cast<const BlockIndex&>(self).indices, self);
      });
  m.def(
      "block_grid",
      [](int64_t s_q, int64_t s_kv, int32_t block_size) {
        const BlockGrid grid = block_grid({s_q, s_kv}, block_size);
        return nb::make_tuple(grid.first_q_block, grid.n_q, grid.n_kv);
      },
      "s_q"_a, "s_kv"_a, "block_size"_a);
}

void bind_pattern(nb::module_& m) {
  nb::class_<Pattern>(m, "Pattern")
      .def_static("dense", [] { return Pattern(Dense{}); })
      .def_static(
          "flex_prefill",
          [](double gamma, double tau, int64_t min_budget, std::optional<int64_t> max_budget) {
            return Pattern(FlexPrefill{static_cast<float>(gamma), static_cast<float>(tau),
                                       min_budget, max_budget});
          },
          "gamma"_a, "tau"_a, "min_budget"_a, "max_budget"_a.none())
      .def_static(
          "vertical_slash",
          [](int64_t vertical_size, int64_t slash_size) {
            return Pattern(VerticalSlash{vertical_size, slash_size});
          },
          "vertical_size"_a, "slash_size"_a)
      .def_static(
          "streaming_llm",
          [](int64_t global_window, int64_t local_window) {
            return Pattern(StreamingLlm{global_window, local_window});
          },
          "global_window"_a, "local_window"_a);
}

}  // namespace

NB_MODULE(_core, m) {
  bind_errors(m);
  bind_index(m);
  bind_pattern(m);

  nb::class_<Tensor>(m, "Tensor")
      .def(nb::init<nb::handle, const std::string&, bool, bool>(), "tensor"_a.none(), "name"_a,
           "writable"_a = false, "bfloat16_bits"_a = false);
  m.def("empty_like_type", &empty_like_type, "shape"_a, "like"_a, "float32"_a = false);

  nb::class_<Call>(m, "Call").def(
      nb::init<const Tensor&, const Tensor&, const Tensor*, std::optional<Int32Vector>,
               std::optional<Int32Vector>, std::optional<Int32Matrix>, std::optional<Int32Vector>,
               std::optional<double>, bool, int32_t, const std::string&, const std::string&,
               int32_t>(),
      "q"_a, "k"_a, "v"_a.none(), "cu_seqlens_q"_a.none(), "cu_seqlens_kv"_a.none(),
      "page_table"_a.none(), "seqlens_kv"_a.none(), "softmax_scale"_a.none(), "gqa_interleave"_a,
      "block_size"_a, "backend"_a, "cpu_target"_a, "num_threads"_a);
  m.def("prefill", &call_prefill, "call"_a, "pattern"_a, "out"_a, "lse"_a.none(), "audit"_a.none());
  m.def("prefill_workspace_size", &call_prefill_workspace_size, "call"_a, "pattern"_a);
  m.def("select", &call_select, "call"_a, "pattern"_a, "audit"_a.none());
  m.def("attend", &call_attend, "call"_a, "index"_a.none(), "out"_a, "lse"_a.none());

  m.def("version", &version);
  m.def("supported_cpu_targets", [] {
    std::vector<std::string> names;
    for (CpuTarget target : supported_cpu_targets()) names.emplace_back(cpu_target_name(target));
    return names;
  });
}

}  // namespace flexprefill
