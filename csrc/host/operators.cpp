// The operators of torch.ops.cross_entropy_ext: their schemas, and the kernels that belong to no device (Meta,
// autocast, transforms).
//
// The public ones are cross_entropy, for the loss that PyTorch has, and general_cross_entropy and linear_cross_entropy
// for everything else, with a variant each that returns statistics. Their arguments have names and defaults, so that
// graphs and profiles can be read. They take a number as a scalar tensor by a second argument, `<number>_tensor`.
#include "operators.h"

#include <ATen/TensorOperators.h>
#include <ATen/autocast_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <sstream>
#include <string>

#include "denominator.h"
#include "dispatch.h"

namespace xent {
namespace {

// Numbers that are tensors have to reach compilers and transforms, so they go through the dispatcher.
c10::DispatchKey first_key(const Inputs& in, const Options& options, c10::DispatchKeySet keys = {}) {
  if (!options.tensors.empty()) return c10::DispatchKey::Undefined;
  for (const at::Tensor* tensor : {&in.logits, &in.target, &in.weight, &in.companion, &in.sample_weight,
                                   &in.denominator, &in.layer.weight, &in.layer.bias}) {
    if (tensor->defined()) keys = keys | tensor->key_set();
  }
  return xent::first_key(keys);
}

// ---- public operators: names, arguments and their order -------------------------------------------------------------

enum class Schema { kPlain, kWeighted, kGeneral, kLinear };

std::string schema_of(Schema schema) {
  std::ostringstream text;
  text << (schema == Schema::kLinear ? "Tensor input, Tensor linear_weight, " : "Tensor logits, ") << "Tensor target, ";
  const std::string loss_options = "*, ScalarType? loss_dtype=None, bool empty_is_zero=False, bool inplace=False";
  if (schema == Schema::kPlain || schema == Schema::kWeighted) {
    text << (schema == Schema::kWeighted ? "Tensor weight, " : "")
         << "int reduction=1, int ignore_index=-100, float label_smoothing=0.0, " << loss_options;
    return text.str();
  }
  for (const char* name : {"linear_bias", "weight", "pair_probs", "labels", "sample_weight", "denominator"}) {
    if (schema == Schema::kLinear || name != std::string("linear_bias")) text << "Tensor? " << name << "=None, ";
  }
  text << "int reduction=1, int ignore_index=-100, " << loss_options;
  constexpr Numbers kDefaults;
  for (const NumberOption& number : kNumberOptions) {
    text << ", float " << number.name << "=" << std::to_string(kDefaults.*number.value);
  }
  for (const NumberOption& number : kNumberOptions) text << ", Tensor? " << number.name << "_tensor=None";
  text << ", bool teacher=False, bool kl=False";
  if (schema == Schema::kLinear) text << ", int chunk=0";
  return text.str();
}

Schema schema_of(const c10::OperatorHandle& op) {
  const auto& schema = op.schema();
  if (schema.overload_name() == "weight") return Schema::kWeighted;
  if (schema.arguments().front().name() == "input") return Schema::kLinear;
  return schema.name() == "cross_entropy_ext::cross_entropy" ? Schema::kPlain : Schema::kGeneral;
}

// Visits the arguments in the schema's order. An archive reads them from the dispatcher's stack, or writes them to it.
template <class Archive, class Inputs, class Options>
void visit(Archive& archive, Schema schema, Inputs& in, Options& options) {
  const bool linear = schema == Schema::kLinear, general = linear || schema == Schema::kGeneral;
  archive(linear ? in.layer.input : in.logits);
  if (linear) archive(in.layer.weight);
  archive(in.target);
  if (linear) archive(in.layer.bias);
  if (schema != Schema::kPlain) archive(in.weight);
  if (general) {
    archive.companion(in, options);
    archive(in.sample_weight);
    archive(in.denominator);
  }
  archive(options.reduction);
  archive(options.ignore_index);
  if (!general) archive(options.label_smoothing);
  archive(options.loss_dtype);
  archive(options.empty_is_zero);
  archive(options.inplace);
  if (!general) return;
  archive.numbers(options);
  archive.teacher(options);
  archive(options.kl);
  if (linear) archive(options.chunk);
}

class Reader {
 public:
  explicit Reader(torch::jit::Stack& stack, size_t count) : next_(stack.end() - std::ptrdiff_t(count)) {}

  void operator()(at::Tensor& tensor) {
    c10::IValue value = take();
    if (value.isTensor()) tensor = std::move(value).toTensor();
  }
  void operator()(std::optional<at::ScalarType>& type) { type = take().toOptional<at::ScalarType>(); }
  void operator()(int64_t& integer) { integer = take().toInt(); }
  void operator()(bool& flag) { flag = take().toBool(); }
  void operator()(double& number) { number = take().toDouble(); }

  void companion(Inputs& in, Options& options) {
    (*this)(in.companion);
    if (in.pair_probs().defined()) options.target_kind = TargetKind::kPairs;
    at::Tensor labels;
    (*this)(labels);
    if (labels.defined()) in.companion = labels;
  }
  void numbers(Options& options) {
    for (const NumberOption& number : kNumberOptions) (*this)(options.*number.value);
    std::vector<at::Tensor> tensors(kNumbers);
    bool any = false;
    for (at::Tensor& tensor : tensors) {
      (*this)(tensor);
      any |= tensor.defined();
    }
    if (any) options.set_tensors(std::move(tensors));
  }
  void teacher(Options& options) {
    if (take().toBool()) options.target_kind = TargetKind::kTeacher;
  }

 private:
  c10::IValue take() { return std::move(*next_++); }

  torch::jit::Stack::iterator next_;
};

class Writer {
 public:
  template <class T>
  void operator()(const T& value) {
    stack.emplace_back(value);
  }
  void operator()(const at::Tensor& tensor) { stack.push_back(tensor.defined() ? c10::IValue(tensor) : c10::IValue()); }

  void companion(const Inputs& in, const Options& options) {
    const bool pairs = options.target_kind == TargetKind::kPairs;
    (*this)(pairs ? in.pair_probs() : at::Tensor());
    (*this)(pairs ? at::Tensor() : in.labels());
  }
  void numbers(const Options& options) {
    for (const double number : options.numbers()) (*this)(number);
    for (const NumberOption& number : kNumberOptions) (*this)(options.tensor(number.value));
  }
  void teacher(const Options& options) { (*this)(options.target_kind == TargetKind::kTeacher); }

  torch::jit::Stack stack;
};

// A public operator's kernel as the dispatcher calls it.
template <Loss* kernel>
void boxed(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const size_t count = op.schema().arguments().size();
  Inputs inputs;
  Options options;
  Reader reader(*stack, count);
  visit(reader, schema_of(op), inputs, options);
  options.statistics = op.schema().returns().size() > 1;
  if (inputs.layer.input.defined()) inputs.logits = logits_placeholder(inputs.layer);
  torch::jit::drop(*stack, count);
  for (at::Tensor& output : kernel(inputs, options).list(options.statistics)) stack->push_back(std::move(output));
}

Outputs call_operator(const c10::OperatorHandle& op, const Inputs& inputs, const Options& options) {
  Writer writer;
  visit(writer, schema_of(op), inputs, options);
  op.callBoxed(writer.stack);
  std::vector<at::Tensor> outputs;
  for (const c10::IValue& value : writer.stack) outputs.push_back(value.toTensor());
  return Outputs::of(outputs);
}

// Returns true for a loss that PyTorch has, too, and thus for arguments of cross_entropy.
bool is_plain(const Inputs& inputs, const Options& options) {
  return options.is_plain() && !inputs.has_layer() && !inputs.sample_weight.defined() && !inputs.denominator.defined();
}

}  // namespace

template <Loss* kernel>
void register_losses(torch::Library& m) {
  for (const char* name : {"cross_entropy", "cross_entropy.weight", "general_cross_entropy", "cross_entropy_with_stats",
                           "linear_cross_entropy", "linear_cross_entropy_with_stats"}) {
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&boxed<kernel>>());
  }
}

Outputs loss(const Inputs& in, const Options& options) {
  const c10::DispatchKey key = first_key(in, options);
  if (is_autograd(key)) return loss_autograd(in, options);
  if (key == c10::DispatchKey::CPU) return loss_without_grad(in, options);
  if (in.has_layer()) {
    static const auto linear = find_operator("cross_entropy_ext::linear_cross_entropy");
    static const auto linear_stats = find_operator("cross_entropy_ext::linear_cross_entropy_with_stats");
    return call_operator(options.statistics ? linear_stats : linear, in, options);
  }
  if (is_plain(in, options)) {
    static const auto plain = find_operator("cross_entropy_ext::cross_entropy");
    static const auto weighted = find_operator("cross_entropy_ext::cross_entropy", "weight");
    return call_operator(in.weight.defined() ? weighted : plain, in, options);
  }
  static const auto general = find_operator("cross_entropy_ext::general_cross_entropy");
  static const auto stats = find_operator("cross_entropy_ext::cross_entropy_with_stats");
  return call_operator(options.statistics ? stats : general, in, options);
}

void correct_target_log_prob(Outputs& outputs, const Inputs& in, const Options& options) {
  if (in.target_kind(options) != TargetKind::kProbabilities) return;
  if (!in.weight.defined() && options.label_smoothing == 0) return;
  Inputs bare{in.logits, in.target};
  bare.layer = in.layer;
  outputs.target_log_prob = -loss(bare, options.without_weights(arithmetic_type(in, options))).loss;
}

// ---- private operators, for callers in C++ --------------------------------------------------------------------------

namespace {

template <class Signature, class... Rest>
auto call_private(const c10::TypedOperatorHandle<Signature>& op, const Inputs& in, const Options& options,
                  Rest... rest) {
  return op.call(in.logits, in.target, to_list(in, options), options.integers(), options.numbers(), rest...);
}

template <class Signature, class... Rest>
auto call_private(const c10::TypedOperatorHandle<Signature>& op, const Gradients& gradients, const Inputs& in,
                  const Options& options, Rest... rest) {
  const at::Tensor& statistics = gradients.grad_statistics;
  return op.call(gradients.grad_output, statistics.defined() ? statistics : gradients.denominator, in.logits, in.target,
                 to_list(in, options), gradients.lse, gradients.denominator, options.integers(), options.numbers(),
                 rest...);
}

template <class Signature, class... Rest>
auto call_linear(const c10::TypedOperatorHandle<Signature>& op, const Inputs& in, const Options& options,
                 Rest... rest) {
  return op.call(in.layer.input, in.layer.weight, as_list({in.layer.bias}), in.target, to_list(in, options),
                 options.integers(), options.numbers(), options.chunk, rest...);
}

// The dispatcher's signatures of the private operators.
template <auto kernel>
auto find_private(const char* name) {
  return find_operator<decltype(Adapter<kernel>::call)>(name);
}
template <auto kernel>
auto find_linear(const char* name) {
  return find_operator<decltype(Adapter<kernel>::call_of_layer)>(name);
}

const auto& adapt_gradient_operator() {
  static const auto op = find_private<&xent::adapt_gradient_>("cross_entropy_ext::_adapt_gradient_");
  return op;
}

}  // namespace

bool fusing_pays(const at::Tensor& logits, int64_t reduction) {
  if (reduction == kNone) return false;
  if (logits.is_cuda()) return true;  // time is what memory moves
  constexpr int64_t kBytes = int64_t{64} << 20;
  return logits.is_cpu() && logits.numel() * logits.element_size() <= kBytes;
}

bool adapts_gradient(const at::Tensor& logits) {
  return adapt_gradient_operator().hasKernelForDispatchKey(logits.is_cuda() ? c10::DispatchKey::CUDA
                                                                            : c10::DispatchKey::CPU);
}

ForwardResult forward(const Inputs& in, const Options& options) {
  if (in.has_layer()) {
    static const auto linear = find_linear<&xent::forward>("cross_entropy_ext::_linear_forward");
    return call_linear(linear, in, options);
  }
  if (first_key(in, options) == c10::DispatchKey::CPU) return cpu::forward(in, options);
  static const auto op = find_private<&xent::forward>("cross_entropy_ext::_forward");
  return call_private(op, in, options);
}

ForwardBackwardResult forward_backward(const Inputs& in, const Options& options) {
  if (first_key(in, options) == c10::DispatchKey::CPU) return cpu::forward_backward(in, options);
  static const auto op = find_private<&xent::forward_backward>("cross_entropy_ext::_forward_backward");
  return call_private(op, in, options);
}

ForwardResult forward_backward_(const Inputs& in, const Options& options) {
  static const auto op = find_private<&xent::forward_backward_>("cross_entropy_ext::_forward_backward_");
  return call_private(op, in, options);
}

BackwardResult backward(const Gradients& gradients, const Inputs& in, const Options& options,
                        std::array<bool, 2> wanted) {
  c10::DispatchKeySet keys =
      gradients.grad_output.key_set() | gradients.lse.key_set() | gradients.denominator.key_set();
  if (gradients.grad_statistics.defined()) keys = keys | gradients.grad_statistics.key_set();
  if (first_key(in, options, keys) == c10::DispatchKey::CPU) return cpu::backward(gradients, in, options, wanted);
  static const auto op = find_private<&xent::backward>("cross_entropy_ext::_backward");
  return call_private(op, gradients, in, options, wanted);
}

at::Tensor backward_(const Gradients& gradients, const Inputs& in, const Options& options, bool target_wanted) {
  static const auto op = find_private<&xent::backward_>("cross_entropy_ext::_backward_");
  return call_private(op, gradients, in, options, target_wanted);
}

void adapt_gradient_(const Gradients& gradients, const Inputs& in, const Options& options,
                     const at::Tensor& grad_logits) {
  adapt_gradient_operator().call(
      gradients.grad_output, gradients.grad_statistics.defined() ? gradients.grad_statistics : gradients.denominator,
      in.logits, in.target, to_list(in, options), gradients.lse, gradients.denominator, options.integers(),
      options.numbers(), grad_logits);
}

LayerForwardBackwardResult layer_forward_backward(const Inputs& in, const Options& options,
                                                  std::array<bool, 3> wanted) {
  static const auto op = find_linear<&xent::layer_forward_backward>("cross_entropy_ext::_linear_forward_backward");
  return call_linear(op, in, options, wanted);
}

LayerBackwardResult layer_backward(const Gradients& gradients, const Inputs& in, const Options& options,
                                   std::array<bool, 4> wanted) {
  static const auto op = find_linear<&xent::layer_backward>("cross_entropy_ext::_linear_backward");
  const at::Tensor& statistics = gradients.grad_statistics;
  return op.call(gradients.grad_output, statistics.defined() ? statistics : gradients.denominator, in.layer.input,
                 in.layer.weight, as_list({in.layer.bias}), in.target, to_list(in, options), gradients.lse,
                 gradients.denominator, options.integers(), options.numbers(), options.chunk, wanted);
}

// ---- kernels that belong to no device -------------------------------------------------------------------------------

Outputs loss_without_grad(const Inputs& inputs, const Options& options) {
  check(inputs, options);
  if (!is_supported(inputs, options)) return fallback(inputs, options);
  const Options typed = with_loss_type(inputs, options);
  const auto [loss, lse, denominator] = forward(for_kernels(inputs, options), typed);
  if (!options.statistics) return Outputs::only(loss);
  Outputs outputs = outputs_of(loss, lse, denominator, inputs, typed);
  correct_target_log_prob(outputs, inputs, options);
  return outputs;
}

namespace {

// For torch.func (vmap, grad, jvp and their compositions): made of PyTorch's operations, which they transform.
Outputs loss_functorch(const Inputs& inputs, const Options& options) {
  check(inputs, options);
  return fallback(inputs, options);
}

// For tensor subclasses: decomposes into ATen operators, so that the subclass handles each one.
std::vector<at::Tensor> composite_of(const Inputs& inputs, const Options& options) {
  return loss_functorch(inputs, options).list(options.statistics);
}

// Half logits are read as they are, and the loss is float32.
template <c10::DeviceType device, c10::DispatchKey key>
Outputs loss_autocast(const Inputs& given, const Options& asked) {
  check(given, asked);
  if (given.logits.device().type() != device) {
    const c10::impl::ExcludeDispatchKeyGuard without_autocast(key);
    return loss(given, asked);
  }
  const auto [inputs, options] = with_autocast(given, asked);
  if (is_plain(given, asked) && !is_valid(inputs, options)) return Outputs::only(native_cross_entropy(given, asked));
  const c10::impl::ExcludeDispatchKeyGuard without_autocast(key);
  return loss(inputs, options);
}

// Shapes, types and strides.
ForwardResult forward_meta(const Inputs& inputs, const Options& options) {
  c10::SymDimVector shape = shape_of_positions(inputs.logits);
  c10::SymInt positions = 1;
  for (const c10::SymInt& size : shape) positions = positions * size;
  if (options.reduction != kNone) shape.clear();
  const auto like = inputs.logits.options();
  return {at::empty_symint(shape, like.dtype(loss_type(inputs, options))),
          at::empty_symint({saved_rows(inputs.target_kind(options), options), positions},
                           like.dtype(arithmetic_type(inputs, options))),
          at::empty({}, like.dtype(at::kDouble))};
}

ForwardBackwardResult forward_backward_meta(const Inputs& inputs, const Options& options) {
  auto [loss, lse, denominator] = forward_meta(inputs, options);
  return {loss, lse, denominator, at::empty_like(inputs.logits)};
}

at::Tensor gradient_meta(const at::Tensor& tensor, bool wanted) {
  return wanted ? at::empty_like(tensor) : at::empty({0}, tensor.options());
}

BackwardResult backward_meta(const Gradients&, const Inputs& inputs, const Options& options,
                             std::array<bool, 2> wanted) {
  return {gradient_meta(inputs.logits, wanted[0]), gradient_meta(inputs.differentiable_target(options), wanted[1])};
}

at::Tensor backward_meta_(const Gradients&, const Inputs& inputs, const Options& options, bool target_wanted) {
  return gradient_meta(inputs.differentiable_target(options), target_wanted);
}

void adapt_gradient_meta_(const Gradients&, const Inputs&, const Options&, const at::Tensor&) {}

// The layer's gradients are contiguous.
at::Tensor layer_gradient_meta(const at::Tensor& tensor, const Layer& layer, bool wanted) {
  if (wanted) return at::empty_symint(tensor.sym_sizes(), tensor.options());
  return at::empty({0}, (tensor.defined() ? tensor : layer.input).options());
}

LayerForwardBackwardResult layer_forward_backward_meta(const Inputs& inputs, const Options& options,
                                                       std::array<bool, 3> wanted) {
  const Layer& layer = inputs.layer;
  return {at::empty({}, layer.input.options().dtype(*options.loss_dtype)),
          layer_gradient_meta(layer.input, layer, wanted[0]), layer_gradient_meta(layer.weight, layer, wanted[1]),
          layer_gradient_meta(layer.bias, layer, wanted[2])};
}

LayerBackwardResult layer_backward_meta(const Gradients&, const Inputs& inputs, const Options& options,
                                        std::array<bool, 4> wanted) {
  const Layer& layer = inputs.layer;
  return {layer_gradient_meta(layer.input, layer, wanted[0]), layer_gradient_meta(layer.weight, layer, wanted[1]),
          layer_gradient_meta(layer.bias, layer, wanted[2]),
          layer_gradient_meta(inputs.differentiable_target(options), layer, wanted[3])};
}

}  // namespace

// ---- registration ---------------------------------------------------------------------------------------------------

TORCH_LIBRARY(cross_entropy_ext, m) {
  const auto define = [&m](const std::string& schema) { m.def(schema.c_str()); };
  const std::string statistics =
      "(Tensor loss, Tensor lse, Tensor target_log_prob, Tensor entropy, Tensor z_loss, Tensor argmax)";
  define("cross_entropy(" + schema_of(Schema::kPlain) + ") -> Tensor");
  define("cross_entropy.weight(" + schema_of(Schema::kWeighted) + ") -> Tensor");
  define("general_cross_entropy(" + schema_of(Schema::kGeneral) + ") -> Tensor");
  define("cross_entropy_with_stats(" + schema_of(Schema::kGeneral) + ") -> " + statistics);
  define("linear_cross_entropy(" + schema_of(Schema::kLinear) + ") -> Tensor");
  define("linear_cross_entropy_with_stats(" + schema_of(Schema::kLinear) + ") -> " + statistics);

  const std::string logits = "Tensor logits", overwritten = "Tensor(a!) logits";
  const std::string layer = "Tensor input, Tensor linear_weight, Tensor?[] linear_bias";
  const std::string inputs = ", Tensor target, Tensor?[] others", options = ", int[] integers, float[] numbers";
  const std::string gradients = "Tensor grad_output, Tensor grad_statistics, ";
  const std::string saved = ", Tensor lse, Tensor denominator";
  const std::string found = ") -> (Tensor loss, Tensor lse, Tensor denominator";
  define("_composite(" + logits + inputs + options + ") -> Tensor[]");
  define("_forward(" + logits + inputs + options + found + ")");
  define("_forward_backward(" + logits + inputs + options + found + ", Tensor grad_logits)");
  define("_forward_backward_(" + overwritten + inputs + options + found + ")");
  define("_backward(" + gradients + logits + inputs + saved + options +
         ", bool[2] wanted) -> (Tensor grad_logits, Tensor grad_target)");
  define("_backward_(" + gradients + overwritten + inputs + saved + options +
         ", bool target_wanted) -> Tensor grad_target");
  define("_adapt_gradient_(" + gradients + logits + inputs + saved + options + ", Tensor(a!) grad_logits) -> ()");

  const std::string of_layer = "Tensor grad_input, Tensor grad_linear_weight, Tensor grad_linear_bias";
  define("_linear_forward(" + layer + inputs + options + ", int chunk" + found + ")");
  define("_linear_forward_backward(" + layer + inputs + options + ", int chunk, bool[3] wanted) -> (Tensor loss, " +
         of_layer + ")");
  define("_linear_backward(" + gradients + layer + inputs + saved + options + ", int chunk, bool[4] wanted) -> (" +
         of_layer + ", Tensor grad_target)");
}

TORCH_LIBRARY_IMPL(cross_entropy_ext, CompositeImplicitAutograd, m) {
  m.impl("_composite", &Adapter<&composite_of, true>::call);
}

TORCH_LIBRARY_IMPL(cross_entropy_ext, CompositeExplicitAutograd, m) { register_losses<loss_without_grad>(m); }
TORCH_LIBRARY_IMPL(cross_entropy_ext, Autograd, m) { register_losses<loss_autograd>(m); }
TORCH_LIBRARY_IMPL(cross_entropy_ext, FuncTorchDynamicLayerFrontMode, m) { register_losses<loss_functorch>(m); }

TORCH_LIBRARY_IMPL(cross_entropy_ext, AutocastCPU, m) {
  register_losses<loss_autocast<c10::kCPU, c10::DispatchKey::AutocastCPU>>(m);
}

TORCH_LIBRARY_IMPL(cross_entropy_ext, AutocastCUDA, m) {
  register_losses<loss_autocast<c10::kCUDA, c10::DispatchKey::AutocastCUDA>>(m);
}

TORCH_LIBRARY_IMPL(cross_entropy_ext, Meta, m) {
  m.impl("_forward", &Adapter<&forward_meta, true>::call);
  m.impl("_forward_backward", &Adapter<&forward_backward_meta, true>::call);
  m.impl("_forward_backward_", &Adapter<&forward_meta, true>::call);
  m.impl("_backward", &Adapter<&backward_meta, true>::call);
  m.impl("_backward_", &Adapter<&backward_meta_, true>::call);
  m.impl("_adapt_gradient_", &Adapter<&adapt_gradient_meta_, true>::call);
  m.impl("_linear_forward", &Adapter<&forward_meta, true>::call_of_layer);
  m.impl("_linear_forward_backward", &Adapter<&layer_forward_backward_meta, true>::call_of_layer);
  m.impl("_linear_backward", &Adapter<&layer_backward_meta, true>::call_of_layer);
}

}  // namespace xent
