// The extension flex_prefill._core: tensors in through DLPack, calls out to the C++ API, errors
// back as Python exceptions. What a user sees is in flex_prefill/attention.py.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <cstdint>
#include <new>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "cuda_device.h"
#include "flexprefill/flexprefill.h"
#include "tensor.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace flexprefill {
namespace {

using Int32Vector = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
// A page table on the host, or of a CUDA call on the device.
using PageTable = nb::ndarray<const int32_t, nb::ndim<2>, nb::ro>;
using Scratch = nb::ndarray<uint8_t, nb::ndim<1>, nb::c_contig>;  // workspace of a CUDA call
using DeviceInt64 = nb::ndarray<int64_t, nb::ndim<1>, nb::c_contig>;
using DeviceInt32 = nb::ndarray<int32_t, nb::ndim<1>, nb::c_contig>;
using Int64Vector = nb::ndarray<const int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using AuditArray =
    nb::ndarray<float, nb::shape<-1, -1, 8>, nb::c_contig, nb::device::cpu>;  // [b, h_q, 8]
using ComparisonArray =
    nb::ndarray<float, nb::shape<-1, -1, 4>, nb::c_contig, nb::device::cpu>;  // [b, h_q, 4]

nb::dlpack::dtype dlpack_type(DType dtype) {
  const auto code =
      dtype == DType::kBFloat16 ? nb::dlpack::dtype_code::Bfloat : nb::dlpack::dtype_code::Float;
  return {static_cast<uint8_t>(code), static_cast<uint8_t>(dtype == DType::kFloat32 ? 32 : 16), 1};
}

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
  if (name == "cuda") return Backend::kCuda;
  if (name == "sm80") return Backend::kSm80;
  if (name == "sm90") return Backend::kSm90;
  refuse(
      "backend: expected \"auto\", \"cpu\", \"reference\", \"cuda\", \"sm80\" or \"sm90\", got \"" +
      name + "\"");
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
  std::optional<PageTable> page_table;
  int32_t device = -1;  // of CUDA; -1: host memory
  Execution execution;
  AttentionInput input;

  Call(const Tensor& q_in, const Tensor& k_in, const Tensor* v_in,
       std::optional<Int32Vector> cu_seqlens_q_in, std::optional<Int32Vector> cu_seqlens_kv_in,
       std::optional<PageTable> page_table_in, std::optional<Int32Vector> seqlens_kv_in,
       std::optional<double> softmax_scale, bool gqa_interleave, int32_t block_size,
       const std::string& backend, const std::string& cpu_target, int32_t num_threads,
       int32_t device_in, uintptr_t stream)
      : q(q_in),
        k(k_in),
        cu_seqlens_q(std::move(cu_seqlens_q_in)),
        cu_seqlens_kv(std::move(cu_seqlens_kv_in)),
        seqlens_kv(std::move(seqlens_kv_in)),
        page_table(std::move(page_table_in)),
        device(device_in) {
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
      input.page_table_stride = page_table->stride(0);
      input.max_pages = static_cast<int64_t>(page_table->shape(1));
      if (input.max_pages > 1 && page_table->stride(1) != 1) {
        refuse("page_table: expected a contiguous last dimension (stride 1), got stride " +
               std::to_string(page_table->stride(1)));
      }
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
    execution = {parse_backend(backend), parse_cpu_target(cpu_target), num_threads,
                 reinterpret_cast<void*>(stream)};  // NOLINT(performance-no-int-to-ptr)
    if (device >= 0 && execution.backend == Backend::kAuto) execution.backend = Backend::kCuda;
  }
};

// HeadAudit as the eight floats of a row of AuditArray, in the order of its fields.
void write_audit(const std::vector<HeadAudit>& audit, float* rows) {
  for (const HeadAudit& head : audit) {
    *rows++ = static_cast<float>(head.pattern);
    *rows++ = head.jsd_sqrt;
    *rows++ = static_cast<float>(head.vertical_blocks);
    *rows++ = static_cast<float>(head.slash_blocks);
    *rows++ = head.kept_mass;
    *rows++ = head.density;
    *rows++ = head.least_row_mass;
    *rows++ = static_cast<float>(head.rows_below_gamma);
  }
}

std::vector<HeadAudit> audit_storage(const std::optional<AuditArray>& audit) {
  return std::vector<HeadAudit>(audit ? audit->shape(0) * audit->shape(1) : 0);
}

// DenseComparison as the four floats of a row of ComparisonArray, in the order of its fields.
void write_comparison(const std::vector<DenseComparison>& comparison, float* rows) {
  for (const DenseComparison& head : comparison) {
    *rows++ = head.kept_mass;
    *rows++ = head.least_kept_mass;
    *rows++ = head.error;
    *rows++ = static_cast<float>(head.rows);
  }
}

std::vector<DenseComparison> comparison_storage(const std::optional<ComparisonArray>& array) {
  return std::vector<DenseComparison>(array ? array->shape(0) * array->shape(1) : 0);
}

// The caller's memory on the device, or for a call on the host memory of this object's own.
class CallWorkspace {
 public:
  template <typename Size>
  CallWorkspace(const std::optional<Scratch>& scratch, Size size) {
    workspace_ = scratch ? Workspace{scratch->data(), scratch->size()} : buffer_.reserve(size());
  }
  operator Workspace() const { return workspace_; }

 private:
  WorkspaceBuffer buffer_;
  Workspace workspace_;
};

// What the guard did, and the gamma that was kept: PrefillAudit::guard and gamma.
std::pair<int32_t, float> call_prefill(const Call& call, const Pattern& pattern, const Tensor& out,
                                       const Tensor* lse, std::optional<AuditArray> audit,
                                       const std::optional<Scratch>& scratch,
                                       std::optional<double> min_kept_mass, int64_t compared_rows,
                                       std::optional<ComparisonArray> comparison) {
  std::vector<HeadAudit> heads = audit_storage(audit);
  std::vector<DenseComparison> figures = comparison_storage(comparison);
  PrefillAudit asked{.heads = heads, .compared_rows = compared_rows, .comparison = figures};
  if (min_kept_mass) asked.min_kept_mass = static_cast<float>(*min_kept_mass);
  const TensorView lse_view = lse != nullptr ? lse->view() : TensorView{};
  {
    nb::gil_scoped_release released;
    const DeviceGuard guard(call.device);
    const CallWorkspace workspace(
        scratch, [&] { return prefill_workspace_size(call.input, pattern, call.execution); });
    prefill(call.input, pattern, call.execution, workspace, out.view(), lse_view, asked);
  }
  if (audit) write_audit(heads, audit->data());
  if (comparison) write_comparison(figures, comparison->data());
  return {static_cast<int32_t>(asked.guard), asked.gamma};
}

size_t call_prefill_workspace_size(const Call& call, const Pattern& pattern) {
  const DeviceGuard guard(call.device);
  return prefill_workspace_size(call.input, pattern, call.execution);
}

size_t call_select_workspace_size(const Call& call, const Pattern& pattern) {
  const DeviceGuard guard(call.device);
  return select_workspace_size(call.input, pattern, call.execution);
}

BlockIndex call_select(const Call& call, const Pattern& pattern, std::optional<AuditArray> audit,
                       const std::optional<Scratch>& scratch) {
  std::vector<HeadAudit> heads = audit_storage(audit);
  BlockIndex index;
  {
    nb::gil_scoped_release released;
    const DeviceGuard guard(call.device);
    const CallWorkspace workspace(
        scratch, [&] { return select_workspace_size(call.input, pattern, call.execution); });
    select(call.input, pattern, call.execution, workspace, index, heads);
  }
  if (audit) write_audit(heads, audit->data());
  return index;
}

size_t call_attend_workspace_size(const Call& call) {
  const DeviceGuard guard(call.device);
  return attend_workspace_size(call.input, call.execution);
}

void call_attend(const Call& call, const BlockIndex* index, const Tensor& out, const Tensor* lse,
                 const std::optional<Scratch>& scratch) {
  const TensorView lse_view = lse != nullptr ? lse->view() : TensorView{};
  nb::gil_scoped_release released;
  const DeviceGuard guard(call.device);
  const CallWorkspace workspace(scratch,
                                [&] { return attend_workspace_size(call.input, call.execution); });
  attend(call.input, index, call.execution, workspace, out.view(), lse_view);
}

void call_compare(const Call& call, const BlockIndex& index, const Tensor& out, int64_t rows,
                  const ComparisonArray& figures) {
  std::vector<DenseComparison> heads = comparison_storage(figures);
  {
    nb::gil_scoped_release released;
    compare_with_dense(call.input, index, out.view(), rows, call.execution, heads);
  }
  write_comparison(heads, figures.data());
}

// A DeviceBlockIndex and the memory that it borrows.
class DeviceRows {
 public:
  DeviceRows(const DeviceInt64& indptr, const DeviceInt32& indices, int64_t global_window,
             int64_t local_window, bool mean_correction)
      : indptr_(indptr), indices_(indices) {
    index.indptr = indptr_.data();
    index.indices = indices_.data();
    index.capacity = static_cast<int64_t>(indices_.size());
    index.global_window = global_window;
    index.local_window = local_window;
    index.mean_correction = mean_correction;
  }
  DeviceBlockIndex index;

 private:
  DeviceInt64 indptr_;
  DeviceInt32 indices_;
};

std::pair<int64_t, int64_t> device_index_size(const Call& call) {
  return {device_block_index_rows(call.input), device_block_index_capacity(call.input)};
}

size_t call_select_on_device_workspace_size(const Call& call, const Pattern& pattern) {
  const DeviceGuard guard(call.device);
  return select_on_device_workspace_size(call.input, pattern, call.execution);
}

void call_select_on_device(const Call& call, const Pattern& pattern, DeviceRows& rows,
                           std::optional<AuditArray> audit,
                           const std::optional<Scratch>& device_audit, const Scratch& scratch) {
  std::vector<HeadAudit> heads = audit_storage(audit);
  {
    nb::gil_scoped_release released;
    const DeviceGuard guard(call.device);
    auto* device_heads =
        device_audit ? reinterpret_cast<HeadAudit*>(device_audit->data()) : nullptr;
    select_on_device(call.input, pattern, call.execution, {scratch.data(), scratch.size()},
                     rows.index, device_heads);
    if (audit) {
      copy_to_host(heads.data(), device_heads, heads.size() * sizeof(HeadAudit),
                   call.execution.stream);
    }
  }
  if (audit) write_audit(heads, audit->data());
}

size_t call_attend_on_device_workspace_size(const Call& call) {
  const DeviceGuard guard(call.device);
  return attend_on_device_workspace_size(call.input, call.execution);
}

void call_attend_on_device(const Call& call, const DeviceRows& rows, const Tensor& out,
                           const Tensor* lse, const Scratch& scratch) {
  const TensorView lse_view = lse != nullptr ? lse->view() : TensorView{};
  nb::gil_scoped_release released;
  const DeviceGuard guard(call.device);
  attend_on_device(call.input, rows.index, call.execution, {scratch.data(), scratch.size()},
                   out.view(), lse_view);
}

BlockIndex make_index(const Int64Vector& indptr, const Int32Vector& indices,
                      const std::vector<std::pair<int64_t, int64_t>>& sequences, int32_t h_q,
                      int32_t block_size, int64_t global_window, int64_t local_window,
                      bool mean_correction) {
  BlockIndex index;
  index.block_size = block_size;
  index.h_q = h_q;
  index.global_window = global_window;
  index.local_window = local_window;
  index.mean_correction = mean_correction;
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

nb::dict cuda_info_dict() {
  const CudaInfo info = cuda_info();
  nb::list devices;
  for (const CudaDevice& device : info.devices) {
    nb::dict entry;
    entry["name"] = device.name;
    entry["compute_capability"] = nb::make_tuple(device.major, device.minor);
    entry["multiprocessors"] = device.multiprocessors;
    entry["memory_bytes"] = device.memory_bytes;
    devices.append(entry);
  }
  nb::dict result;
  result["built"] = info.built;
  result["runtime"] = info.runtime;
  result["driver"] = info.driver;
  result["error"] = info.error;
  result["devices"] = devices;
  return result;
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
                  "block_size"_a, "global_window"_a, "local_window"_a, "mean_correction"_a)
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
      .def_ro("mean_correction", &BlockIndex::mean_correction)
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

// MInference with the heads that it points to.
struct MInferencePattern : Pattern {
  explicit MInferencePattern(const std::vector<std::tuple<int32_t, int64_t, int64_t>>& in) {
    for (const auto& [kind, vertical_size, slash_size] : in) {
      heads.push_back({static_cast<MInferenceHead::Kind>(kind), vertical_size, slash_size});
    }
    Pattern::operator=(MInference{heads});
  }
  MInferencePattern(const MInferencePattern&) = delete;
  MInferencePattern& operator=(const MInferencePattern&) = delete;
  std::vector<MInferenceHead> heads;
};

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
          "global_window"_a, "local_window"_a)
      .def_static(
          "xattention",
          [](int64_t stride, double threshold) {
            return Pattern(XAttention{stride, static_cast<float>(threshold)});
          },
          "stride"_a, "threshold"_a)
      .def_static(
          "flash_prefill",
          [](double alpha, int64_t global_window, int64_t local_window, int64_t last_queries,
             bool mean_correction) {
            return Pattern(FlashPrefill{static_cast<float>(alpha), global_window, local_window,
                                        last_queries, mean_correction});
          },
          "alpha"_a, "global_window"_a, "local_window"_a, "last_queries"_a, "mean_correction"_a)
      .def_static(
          "block_cover",
          [](double gamma, double column_share, std::optional<int64_t> max_budget) {
            return Pattern(BlockCover{static_cast<float>(gamma), static_cast<float>(column_share),
                                      max_budget});
          },
          "gamma"_a, "column_share"_a, "max_budget"_a.none());
  nb::class_<MInferencePattern, Pattern>(m, "MInferencePattern")
      .def(nb::init<const std::vector<std::tuple<int32_t, int64_t, int64_t>>&>(), "heads"_a);
}

}  // namespace

NB_MODULE(_core, m) {
  bind_errors(m);
  bind_index(m);
  bind_pattern(m);

  nb::class_<Tensor>(m, "Tensor")
      .def(nb::init<nb::handle, const std::string&, bool, bool>(), "tensor"_a.none(), "name"_a,
           "writable"_a = false, "bfloat16_bits"_a = false)
      .def_prop_ro("on_cuda", &Tensor::on_cuda);
  m.def("empty_like_type", &empty_like_type, "shape"_a, "like"_a, "float32"_a = false);

  nb::class_<Call>(m, "Call").def(
      nb::init<const Tensor&, const Tensor&, const Tensor*, std::optional<Int32Vector>,
               std::optional<Int32Vector>, std::optional<PageTable>, std::optional<Int32Vector>,
               std::optional<double>, bool, int32_t, const std::string&, const std::string&,
               int32_t, int32_t, uintptr_t>(),
      "q"_a, "k"_a, "v"_a.none(), "cu_seqlens_q"_a.none(), "cu_seqlens_kv"_a.none(),
      "page_table"_a.none(), "seqlens_kv"_a.none(), "softmax_scale"_a.none(), "gqa_interleave"_a,
      "block_size"_a, "backend"_a, "cpu_target"_a, "num_threads"_a, "device"_a = -1,
      "stream"_a = 0);
  m.def("prefill", &call_prefill, "call"_a, "pattern"_a, "out"_a, "lse"_a.none(), "audit"_a.none(),
        "scratch"_a = nb::none(), "min_kept_mass"_a = nb::none(), "compared_rows"_a = 0,
        "comparison"_a = nb::none());
  m.def("compare_with_dense", &call_compare, "call"_a, "index"_a, "out"_a, "rows"_a, "figures"_a);
  m.def("prefill_workspace_size", &call_prefill_workspace_size, "call"_a, "pattern"_a);
  m.def("select", &call_select, "call"_a, "pattern"_a, "audit"_a.none(), "scratch"_a = nb::none());
  m.def("select_workspace_size", &call_select_workspace_size, "call"_a, "pattern"_a);
  m.def("attend", &call_attend, "call"_a, "index"_a.none(), "out"_a, "lse"_a.none(),
        "scratch"_a = nb::none());
  m.def("attend_workspace_size", &call_attend_workspace_size, "call"_a);

  nb::class_<DeviceRows>(m, "DeviceRows")
      .def(nb::init<const DeviceInt64&, const DeviceInt32&, int64_t, int64_t, bool>(), "indptr"_a,
           "indices"_a, "global_window"_a, "local_window"_a, "mean_correction"_a)
      .def_prop_ro("global_window", [](const DeviceRows& rows) { return rows.index.global_window; })
      .def_prop_ro("local_window", [](const DeviceRows& rows) { return rows.index.local_window; })
      .def_prop_ro("mean_correction",
                   [](const DeviceRows& rows) { return rows.index.mean_correction; });
  m.def("device_index_size", &device_index_size, "call"_a);
  m.def("select_on_device", &call_select_on_device, "call"_a, "pattern"_a, "rows"_a,
        "audit"_a.none(), "device_audit"_a.none(), "scratch"_a);
  m.def("select_on_device_workspace_size", &call_select_on_device_workspace_size, "call"_a,
        "pattern"_a);
  m.def("attend_on_device", &call_attend_on_device, "call"_a, "rows"_a, "out"_a, "lse"_a.none(),
        "scratch"_a);
  m.def("attend_on_device_workspace_size", &call_attend_on_device_workspace_size, "call"_a);

  m.def(
      "wait_for_stream",
      [](int32_t device, uintptr_t stream) {
        nb::gil_scoped_release released;
        wait_for_stream(device,
                        reinterpret_cast<void*>(stream));  // NOLINT(performance-no-int-to-ptr)
      },
      "device"_a, "stream"_a);
  m.def("cuda_info", &cuda_info_dict);
  m.attr("CUDA_BUILT") = kCudaBuilt;

  m.def("version", &version);
  m.def("supported_cpu_targets", [] {
    std::vector<std::string> names;
    for (CpuTarget target : supported_cpu_targets()) names.emplace_back(cpu_target_name(target));
    return names;
  });
}

}  // namespace flexprefill
