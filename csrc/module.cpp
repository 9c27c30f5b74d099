// The extension's own Python module.
#include <ATen/Version.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <ATen/TracerMode.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/jit/frontend/tracer.h>
#include <torch/csrc/jit/ir/ir.h>
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
#include "host/cross_entropy.h"
#include "host/dispatch.h"
#include "linear/linear.h"
#include "nll/nll_loss.h"

namespace xent {
namespace {

// torch.ops.cross_entropy_ext.cross_entropy with its defaults, called without the search for an overload and the
// conversion of each argument to what any operator could take: they cost more than a small loss.
at::Tensor cross_entropy_from_python(const at::Tensor& logits, const at::Tensor& target, const OptionalTensor& weight,
                                     int64_t reduction, int64_t ignore_index, double label_smoothing) {
  return cross_entropy(logits, target, weight, reduction, ignore_index, label_smoothing, std::nullopt, false, false);
}

// The same of general_cross_entropy, for what native has no argument for.
at::Tensor cross_entropy_with_extras_from_python(const at::Tensor& logits, const at::Tensor& target,
                                                 const OptionalTensor& weight, int64_t reduction, int64_t ignore_index,
                                                 double label_smoothing, const OptionalTensor& sample_weight,
                                                 double z_loss, double softcap, double logit_scale) {
  Options options;
  options.reduction = reduction;
  options.ignore_index = ignore_index;
  options.label_smoothing = label_smoothing;
  options.z_loss = z_loss;
  options.softcap = softcap;
  options.logit_scale = logit_scale;
  return general_cross_entropy({logits, target, weight, std::nullopt, sample_weight}, options);
}

at::Tensor nll_loss_from_python(const at::Tensor& input, const at::Tensor& target, const OptionalTensor& weight,
                                int64_t reduction, int64_t ignore_index) {
  return nll::loss(input, target, weight, reduction, ignore_index, std::nullopt);
}

// The operators that take lists, with the tensors among them as Python has them.
using ListOfTensors = std::vector<OptionalTensor>;
using ListOfIntegers = std::vector<int64_t>;
using ListOfNumbers = std::vector<double>;

template <class Result, Result (*function)(const Inputs&, const Options&)>
Result from_python(const at::Tensor& logits, const at::Tensor& target, const ListOfTensors& others,
                   const ListOfIntegers& integers, const ListOfNumbers& numbers) {
  const Others unpacked{OptionalTensors(others)};
  return function(unpacked.with(logits, target), unpacked.options(integers, numbers));
}

template <class Result, Result (*function)(const linear::Layer&, const Inputs&, const Options&, int64_t)>
Result linear_from_python(const at::Tensor& input, const at::Tensor& weight, const ListOfTensors& biases,
                          const at::Tensor& target, const ListOfTensors& others, const ListOfIntegers& integers,
                          const ListOfNumbers& numbers, int64_t chunk) {
  const OptionalTensor bias = biases.empty() ? std::nullopt : biases.front();
  const Others unpacked{OptionalTensors(others)};
  return function({input, weight, bias}, unpacked.with(input, target), unpacked.options(integers, numbers), chunk);
}

void add_input(torch::jit::Node* node, const char* name, const c10::IValue& value) {
  using torch::jit::tracer::addInputs;
  if (value.isTensor()) return addInputs(node, name, value.toTensor());
  if (value.isInt()) return addInputs(node, name, value.toInt());
  if (value.isIntList()) return addInputs(node, name, at::IntArrayRef(value.toIntVector()));
  if (value.isDoubleList()) return addInputs(node, name, at::ArrayRef<double>(value.toDoubleVector()));
  TORCH_INTERNAL_ASSERT(value.isList());
  addInputs(node, name, value.to<OptionalTensors>());
}

// A node of the graph that torch.jit.trace makes. Torch's own kernel for this takes no lists of optional tensors.
void trace_with_lists(const c10::OperatorHandle& op, std::vector<c10::IValue>* stack) {
  namespace tracer = torch::jit::tracer;
  auto state = tracer::getTracingState();
  torch::jit::Node* const node = state->createNode(c10::Symbol::fromQualString(op.schema().name()), 0);
  tracer::recordSourceLocation(node);
  const auto& arguments = op.schema().arguments();
  const size_t first = stack->size() - arguments.size();
  for (size_t i = 0; i < arguments.size(); ++i) add_input(node, arguments[i].name().c_str(), (*stack)[first + i]);
  state->insertNode(node);
  tracer::setTracingState(nullptr);
  {
    const at::tracer::impl::NoTracerDispatchMode without_tracer;
    op.callBoxed(*stack);
  }
  tracer::setTracingState(std::move(state));
  for (size_t i = first; i < stack->size(); ++i) tracer::addOutput(node, (*stack)[i].toTensor());
}

// torch.jit.trace has an operator as one node. ONNX has no such node: for it, the trace shows what torch.func works
// with, the operations that a loss is made of.
void trace(const c10::OperatorHandle& op, c10::DispatchKeySet keys, std::vector<c10::IValue>* stack) {
  const auto exports_to_onnx = [] {
    const pybind11::gil_scoped_acquire gil;
    return pybind11::module_::import("torch.onnx").attr("is_in_onnx_export")().cast<bool>();
  };
  if (exports_to_onnx()) {
    op.callBoxedForDispatchKey(c10::DispatchKey::FuncTorchDynamicLayerFrontMode, *stack);
  } else if (std::any_of(op.schema().arguments().begin(), op.schema().arguments().end(),
                         [](const auto& argument) { return argument.name() == "others"; })) {
    trace_with_lists(op, stack);
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
  m.def("cross_entropy_with_extras", torch::wrap_pybind_function_no_gil(&xent::cross_entropy_with_extras_from_python));
  m.def("general_cross_entropy",
        torch::wrap_pybind_function_no_gil(&xent::from_python<at::Tensor, &xent::general_cross_entropy>));
  m.def("cross_entropy_with_stats",
        torch::wrap_pybind_function_no_gil(&xent::from_python<xent::Results, &xent::cross_entropy_with_stats>));
  m.def("linear_cross_entropy",
        torch::wrap_pybind_function_no_gil(&xent::linear_from_python<at::Tensor, &xent::linear::loss>));
  m.def("linear_cross_entropy_with_stats",
        torch::wrap_pybind_function_no_gil(&xent::linear_from_python<xent::Results, &xent::linear::loss_with_stats>));
  m.def("nll_loss", torch::wrap_pybind_function_no_gil(&xent::nll_loss_from_python));
  m.def("build_info", &xent::build_info);
  m.def("check_errors", &xent::check_errors, pybind11::call_guard<pybind11::gil_scoped_release>());
  m.def("empty_cache", &xent::release_gradient_memory);
#if defined(WITH_CUDA)
  m.def("tune", &xent::gpu::tune);
#endif
}
