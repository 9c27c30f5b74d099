// The extension's own Python module.
#include <ATen/Version.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>
#include <torch/version.h>

#include "cpu/gradient_memory.h"
#include "cpu/kernels.h"
#if defined(WITH_CUDA)
#include "cuda/device.h"
#include "cuda/launch.h"
#include "cuda/tuning.h"
#endif
#include "host/operators.h"
#include "nll/nll_loss.h"

namespace xent {
namespace {

// The operators as functions, without the search for an overload and the conversion of each argument to any type that
// an operator could take: these cost more than a small loss.

at::Tensor cross_entropy_from_python(const at::Tensor& logits, const at::Tensor& target, const OptionalTensor& weight,
                                     int64_t reduction, int64_t ignore_index, double label_smoothing) {
  Options options;
  options.reduction = reduction;
  options.ignore_index = ignore_index;
  options.label_smoothing = label_smoothing;
  return loss({logits, target, weight.value_or(at::Tensor())}, options).loss;
}

at::Tensor nll_loss_from_python(const at::Tensor& input, const at::Tensor& target, const OptionalTensor& weight,
                                int64_t reduction, int64_t ignore_index) {
  return nll::loss(input, target, weight.value_or(at::Tensor()), reduction, ignore_index, std::nullopt);
}

// Arguments come in lists, as private operators have them.
using ListOfTensors = std::vector<OptionalTensor>;
using ListOfIntegers = std::vector<int64_t>;
using ListOfNumbers = std::vector<double>;

std::vector<at::Tensor> as_tensors(const ListOfTensors& list) {
  std::vector<at::Tensor> tensors;
  tensors.reserve(list.size());
  for (const OptionalTensor& tensor : list) tensors.push_back(tensor.value_or(at::Tensor()));
  return tensors;
}

at::Tensor loss_from_python(const at::Tensor& logits, const at::Tensor& target, const ListOfTensors& others,
                            const ListOfIntegers& integers, const ListOfNumbers& numbers) {
  const Call call(logits, target, as_tensors(others), integers, numbers);
  return loss(call.inputs, call.options).loss;
}

std::vector<at::Tensor> stats_from_python(const at::Tensor& logits, const at::Tensor& target,
                                          const ListOfTensors& others, const ListOfIntegers& integers,
                                          const ListOfNumbers& numbers) {
  const Call call(logits, target, as_tensors(others), integers, numbers);
  return loss(call.inputs, call.options).list(true);
}

// A loss whose options are numbers, in less time than lists take.
template <class T, size_t>
using ForEach = T;

template <size_t... place>
at::Tensor loss_with_numbers_from_python(const at::Tensor& logits, const at::Tensor& target,
                                         const OptionalTensor& weight, const OptionalTensor& sample_weight,
                                         int64_t reduction, int64_t ignore_index, ForEach<double, place>... numbers) {
  const Inputs inputs{logits, target, weight.value_or(at::Tensor()), {}, sample_weight.value_or(at::Tensor())};
  return loss(inputs, Options::of({reduction, ignore_index, -1, 0, 0, 0}, {numbers...})).loss;
}

template <size_t... place>
constexpr auto loss_with_numbers(std::index_sequence<place...>) {
  return &loss_with_numbers_from_python<place...>;
}

std::vector<at::Tensor> linear_loss_from_python(const at::Tensor& input, const at::Tensor& weight,
                                                const OptionalTensor& bias, const at::Tensor& target,
                                                const ListOfTensors& others, const ListOfIntegers& integers,
                                                const ListOfNumbers& numbers, int64_t chunk) {
  const Call call({input, weight, bias.value_or(at::Tensor())}, target, as_tensors(others), integers, numbers, chunk);
  return loss(call.inputs, call.options).list(call.options.statistics);
}

// torch.jit.trace has an operator as one node. ONNX has no such node: for it, the trace shows the operations that
// torch.func works with.
void trace(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
  const auto exports_to_onnx = [] {
    const pybind11::gil_scoped_acquire gil;
    return pybind11::module_::import("torch.onnx").attr("is_in_onnx_export")().cast<bool>();
  };
  if (exports_to_onnx()) {
    op.callBoxedForDispatchKey(c10::DispatchKey::FuncTorchDynamicLayerFrontMode, *stack);
  } else {
    static const auto any_operator = c10::Dispatcher::singleton()
                                         .findSchemaOrThrow("cross_entropy_ext::_forward", "")
                                         .getComputedKernelForDispatchKey(c10::DispatchKey::Tracer);
    any_operator.callBoxed(op, keys, stack);
  }
}

pybind11::dict build_info() {
  pybind11::dict info;
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#else
  info["compiler"] = "gcc " __VERSION__;
#endif
  info["torch"] = TORCH_VERSION;
  info["instruction_set"] = kernels_for(at::get_cpu_capability().c_str()).instruction_set;
#if defined(WITH_CUDA)
  info["cuda_archs"] = gpu::compiled_archs();
#else
  info["cuda_archs"] = pybind11::none();
#endif
  return info;
}

void check_errors() {
#if defined(WITH_CUDA)
  gpu::check_errors();
#endif
}

}  // namespace

TORCH_LIBRARY_IMPL(cross_entropy_ext, Tracer, m) {
  for (const char* name : {"cross_entropy", "cross_entropy.weight", "cross_entropy_with_stats", "general_cross_entropy",
                           "linear_cross_entropy", "linear_cross_entropy_with_stats", "nll_loss", "nll_loss.weight"}) {
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&trace>());
  }
}

}  // namespace xent

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("cross_entropy", torch::wrap_pybind_function_no_gil(&xent::cross_entropy_from_python));
  m.def("loss", torch::wrap_pybind_function_no_gil(&xent::loss_from_python));
  m.def("loss_with_stats", torch::wrap_pybind_function_no_gil(&xent::stats_from_python));
  m.def("loss_with_numbers",
        torch::wrap_pybind_function_no_gil(xent::loss_with_numbers(std::make_index_sequence<xent::kNumbers>())));
  m.def("linear_loss", torch::wrap_pybind_function_no_gil(&xent::linear_loss_from_python));
  m.def("nll_loss", torch::wrap_pybind_function_no_gil(&xent::nll_loss_from_python));
  m.def("build_info", &xent::build_info);
  m.def("check_errors", &xent::check_errors, pybind11::call_guard<pybind11::gil_scoped_release>());
  m.def("empty_cache", &xent::release_gradient_memory);
#if defined(WITH_CUDA)
  m.def("tune", &xent::gpu::tune);
#endif
}
