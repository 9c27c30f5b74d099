// The operators of torch.ops.cross_entropy_ext: their schemas, and the kernels that belong to no device (Meta,
// autocast, transforms).
//
// The public ones are cross_entropy, for what PyTorch has, and for everything else general_cross_entropy, whose options
// come as two lists of numbers (Options::of), and cross_entropy_with_stats, its variant with more results.
#include <ATen/autocast_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "cpu/operators.h"
#include "cross_entropy.h"
#include "dispatch.h"

namespace xent {
namespace {

const auto& adapt_gradient_operator() {
  static const auto op = find_operator<schema::AdaptGradient>("cross_entropy_ext::_adapt_gradient_");
  return op;
}

// As of dispatch.h. Numbers that are tensors have to reach compilers and transforms, so they go through the dispatcher.
c10::DispatchKey first_key(const Inputs& in, const Options& options, c10::DispatchKeySet keys = {}) {
  if (!options.tensors.empty()) return c10::DispatchKey::Undefined;
  keys = keys | in.logits.key_set() | in.target.key_set();
  for (const OptionalTensor* other : {&in.weight, &in.companion, &in.sample_weight, &in.divisor}) {
    if (has_value(*other)) keys = keys | (*other)->key_set();
  }
  return xent::first_key(keys);
}

}  // namespace

bool fusing_pays(const at::Tensor& logits, int64_t reduction) {
  if (reduction == kNone) return false;
  if (logits.is_cuda()) return true;  // time is what memory moves
  constexpr int64_t kBytes = int64_t{64} << 20;
  return logits.is_cpu() && logits.numel() * logits.element_size() <= kBytes;
}

// ---- the operators, for callers in C++ ------------------------------------------------------------------------------

at::Tensor cross_entropy(const at::Tensor& logits, const at::Tensor& target, const OptionalTensor& weight,
                         int64_t reduction, int64_t ignore_index, double label_smoothing,
                         std::optional<at::ScalarType> loss_dtype, bool empty_is_zero, bool inplace) {
  const Inputs in{logits, target, weight};
  const Options options{reduction, ignore_index, label_smoothing, loss_dtype, empty_is_zero, inplace};
  if (is_autograd(first_key(in, options))) return loss_autograd(in, options);
  if (has_value(weight)) {
    static const auto op = find_operator<schema::WeightedCrossEntropy>("cross_entropy_ext::cross_entropy", "weight");
    return op.call(logits, target, *weight, reduction, ignore_index, label_smoothing, loss_dtype, empty_is_zero,
                   inplace);
  }
  static const auto op = find_operator<schema::CrossEntropy>("cross_entropy_ext::cross_entropy");
  return op.call(logits, target, reduction, ignore_index, label_smoothing, loss_dtype, empty_is_zero, inplace);
}

at::Tensor general_cross_entropy(const Inputs& in, const Options& options) {
  if (is_autograd(first_key(in, options))) return loss_autograd(in, options);
  static const auto op = find_operator<schema::General>("cross_entropy_ext::general_cross_entropy");
  return op.call(in.logits, in.target, Others::of(in, options), options.integers(), options.numbers());
}

Results cross_entropy_with_stats(const Inputs& in, const Options& options) {
  static const auto op = find_operator<schema::WithStats>("cross_entropy_ext::cross_entropy_with_stats");
  return op.call(in.logits, in.target, Others::of(in, options), options.integers(), options.numbers());
}

ForwardResult forward(const Inputs& in, const Options& options) {
  if (first_key(in, options) == c10::DispatchKey::CPU) return cpu::forward(in, options);
  static const auto op = find_operator<schema::Forward>("cross_entropy_ext::_forward");
  return op.call(in.logits, in.target, Others::of(in, options), options.integers(), options.numbers());
}

ForwardBackwardResult forward_backward(const Inputs& in, const Options& options) {
  if (first_key(in, options) == c10::DispatchKey::CPU) return cpu::forward_backward(in, options);
  static const auto op = find_operator<schema::ForwardBackward>("cross_entropy_ext::_forward_backward");
  return op.call(in.logits, in.target, Others::of(in, options), options.integers(), options.numbers());
}

ForwardResult forward_backward_(const Inputs& in, const Options& options) {
  static const auto op = find_operator<schema::ForwardBackwardInplace>("cross_entropy_ext::_forward_backward_");
  at::Tensor logits = in.logits;
  return op.call(logits, in.target, Others::of(in, options), options.integers(), options.numbers());
}

BackwardResult backward(const Gradients& gradients, const Inputs& in, const Options& options,
                        std::array<bool, 2> wanted) {
  const c10::DispatchKeySet keys = gradients.grad_output.key_set() | gradients.statistics_or_scalar().key_set() |
                                   gradients.lse.key_set() | gradients.denominator.key_set();
  if (first_key(in, options, keys) == c10::DispatchKey::CPU) return cpu::backward(gradients, in, options, wanted);
  static const auto op = find_operator<schema::Backward>("cross_entropy_ext::_backward");
  return op.call(gradients.grad_output, gradients.statistics_or_scalar(), in.logits, in.target, Others::of(in, options),
                 gradients.lse, gradients.denominator, options.integers(), options.numbers(), wanted);
}

at::Tensor backward_(const Gradients& gradients, const Inputs& in, const Options& options, bool target_wanted) {
  static const auto op = find_operator<schema::BackwardInplace>("cross_entropy_ext::_backward_");
  at::Tensor logits = in.logits;
  return op.call(gradients.grad_output, gradients.statistics_or_scalar(), logits, in.target, Others::of(in, options),
                 gradients.lse, gradients.denominator, options.integers(), options.numbers(), target_wanted);
}

void adapt_gradient_(const Gradients& gradients, at::Tensor& grad_logits, const Inputs& in, const Options& options) {
  adapt_gradient_operator().call(gradients.grad_output, gradients.statistics_or_scalar(), grad_logits, in.logits,
                                 in.target, Others::of(in, options), gradients.lse, gradients.denominator,
                                 options.integers(), options.numbers());
}

void correct_target_log_prob(Outputs& outputs, const Inputs& in, const Options& options) {
  if (in.target_kind(options) != TargetKind::kProbabilities || (!has_value(in.weight) && options.label_smoothing == 0))
    return;
  const Options unweighted = options.without_weights(arithmetic_type(in, options));
  outputs[2] = -general_cross_entropy({in.logits, in.target, std::nullopt}, unweighted);
}

bool adapts_gradient(const at::Tensor& logits) {
  return adapt_gradient_operator().hasKernelForDispatchKey(logits.is_cuda() ? c10::DispatchKey::CUDA
                                                                            : c10::DispatchKey::CPU);
}

namespace {

// ---- without autograd -----------------------------------------------------------------------------------------------

at::Tensor loss_without_grad(const Inputs& inputs, const Options& options) {
  check(inputs, options);
  if (!is_supported(inputs, options)) return fallback(inputs, options)[0];
  return std::get<0>(forward(KernelInputs(inputs, options)(), with_loss_type(inputs, options)));
}

Results results_without_grad(const Inputs& inputs, const Options& options) {
  check(inputs, options);
  if (!is_supported(inputs, options)) return as_tuple(fallback(inputs, options));
  const Options typed = with_loss_type(inputs, options);
  const auto [loss, lse, denominator] = forward(KernelInputs(inputs, options)(), typed);
  Outputs outputs = outputs_of(loss, lse, denominator, inputs, typed);
  correct_target_log_prob(outputs, inputs, options);
  return as_tuple(outputs);
}

// ---- Meta: shapes, types and strides --------------------------------------------------------------------------------

ForwardResult forward_meta(XENT_INPUTS, XENT_OPTIONS) {
  const Others unpacked(others);
  const Inputs inputs = unpacked.with(logits, target);
  const Options options = unpacked.options(integers, numbers);
  c10::SymDimVector shape = shape_of_positions(logits);
  c10::SymInt positions = 1;
  for (const c10::SymInt& size : shape) positions = positions * size;
  if (options.reduction != kNone) shape.clear();
  return {at::empty_symint(shape, logits.options().dtype(loss_type(inputs, options))),
          at::empty_symint({saved_rows(inputs.target_kind(options), options), positions},
                           logits.options().dtype(arithmetic_type(inputs, options))),
          at::empty({}, logits.options().dtype(at::kDouble))};
}

at::Tensor gradient_meta(const at::Tensor& tensor, bool wanted) {
  return wanted ? at::empty_like(tensor) : at::empty({0}, tensor.options());
}

ForwardBackwardResult forward_backward_meta(XENT_INPUTS, XENT_OPTIONS) {
  auto [loss, lse, denominator] = forward_meta(logits, target, others, integers, numbers);
  return {loss, lse, denominator, at::empty_like(logits)};
}

ForwardResult forward_backward_meta_(at::Tensor& logits, XENT_OTHER_INPUTS, XENT_OPTIONS) {
  return forward_meta(logits, target, others, integers, numbers);
}

BackwardResult backward_meta(XENT_GRADIENTS, XENT_INPUTS, XENT_SAVED, XENT_OPTIONS, std::array<bool, 2> wanted) {
  const Others unpacked(others);
  const Inputs inputs = unpacked.with(logits, target);
  return {gradient_meta(logits, wanted[0]),
          gradient_meta(inputs.differentiable_target(Options::of(integers, numbers)), wanted[1])};
}

at::Tensor backward_meta_(XENT_GRADIENTS, at::Tensor& logits, XENT_OTHER_INPUTS, XENT_SAVED, XENT_OPTIONS,
                          bool target_wanted) {
  const Others unpacked(others);
  const Inputs inputs = unpacked.with(logits, target);
  return gradient_meta(inputs.differentiable_target(Options::of(integers, numbers)), target_wanted);
}

void adapt_gradient_meta_(XENT_GRADIENTS, at::Tensor&, XENT_INPUTS, XENT_SAVED, XENT_OPTIONS) {}

// ---- autocast: half logits are read as they are, the loss is float32 ------------------------------------------------

}  // namespace

std::pair<OptionalTensor, Options> with_wide_loss(const Inputs& inputs, Options options) {
  check(inputs, options);
  OptionalTensor weight = inputs.weight;
  if (has_value(weight)) weight = weight->to(widened(weight->scalar_type()));
  if (!options.loss_dtype) {
    auto type = widened(inputs.logits.scalar_type());
    if (is_dense(inputs.target_kind(options)) && is_logits_type(type) && is_logits_type(inputs.target.scalar_type())) {
      type = c10::promoteTypes(type, widened(inputs.target.scalar_type()));
      if (has_value(weight)) type = c10::promoteTypes(type, weight->scalar_type());
    }
    options.loss_dtype = type;
  }
  return {weight, options};
}

namespace {

// Calls function(inputs, options) with what autocast makes of them.
template <class Function>
auto with_autocast(const Inputs& inputs, const Options& given, c10::DeviceType device, const Function& function) {
  check(inputs, given);
  if (inputs.logits.device().type() != device) return function(inputs, given);
  const auto [weight, options] = with_wide_loss(inputs, given);
  return function({inputs.logits, inputs.target, weight, inputs.companion, inputs.sample_weight, inputs.divisor},
                  options);
}

template <c10::DeviceType device, c10::DispatchKey key>
at::Tensor plain_autocast(const Inputs& inputs, const Options& given) {
  return with_autocast(inputs, given, device, [&](const Inputs& in, const Options& options) {
    if (!is_valid(in, options)) return native_cross_entropy(inputs, given);
    const c10::impl::ExcludeDispatchKeyGuard without_autocast(key);
    return cross_entropy(in.logits, in.target, in.weight, options.reduction, options.ignore_index,
                         options.label_smoothing, options.loss_dtype, options.empty_is_zero, options.inplace);
  });
}

template <c10::DeviceType device, c10::DispatchKey key>
at::Tensor general_autocast(XENT_INPUTS, XENT_OPTIONS) {
  const Others unpacked(others);
  return with_autocast(unpacked.with(logits, target), unpacked.options(integers, numbers), device,
                       [](const Inputs& inputs, const Options& options) {
                         const c10::impl::ExcludeDispatchKeyGuard without_autocast(key);
                         return general_cross_entropy(inputs, options);
                       });
}

template <c10::DeviceType device, c10::DispatchKey key>
Results stats_autocast(XENT_INPUTS, XENT_OPTIONS) {
  const Others unpacked(others);
  return with_autocast(unpacked.with(logits, target), unpacked.options(integers, numbers), device,
                       [](const Inputs& inputs, const Options& options) {
                         const c10::impl::ExcludeDispatchKeyGuard without_autocast(key);
                         return cross_entropy_with_stats(inputs, options);
                       });
}

template <c10::DeviceType device, c10::DispatchKey key>
void register_autocast(torch::Library& m) {
  m.impl("cross_entropy", TORCH_FN((from_plain<at::Tensor, plain_autocast<device, key>>)));
  m.impl("cross_entropy.weight", TORCH_FN((from_weighted<at::Tensor, plain_autocast<device, key>>)));
  m.impl("general_cross_entropy", &general_autocast<device, key>);
  m.impl("cross_entropy_with_stats", &stats_autocast<device, key>);
}

// ---- torch.func: vmap, grad, jvp and their compositions -------------------------------------------------------------

at::Tensor loss_functorch(const Inputs& inputs, const Options& options) {
  check(inputs, options);
  return fallback(inputs, options)[0];
}

Results results_functorch(const Inputs& inputs, const Options& options) {
  check(inputs, options);
  return as_tuple(fallback(inputs, options));
}

// The same for tensor subclasses: it decomposes into ATen operators, so that the subclass handles each of them.
std::vector<at::Tensor> composite_of(XENT_INPUTS, XENT_OPTIONS) {
  const Others unpacked(others);
  const Inputs inputs = unpacked.with(logits, target);
  const Options options = unpacked.options(integers, numbers);
  check(inputs, options);
  Outputs outputs = fallback(inputs, options);
  if (!options.statistics) return {outputs[0]};
  return {outputs.begin(), outputs.end()};
}

}  // namespace

TORCH_LIBRARY(cross_entropy_ext, m) {
  const std::string inputs = "Tensor target, Tensor?[] others";
  const std::string saved = "Tensor lse, Tensor denominator", options = "int[] integers, float[] numbers";
  const std::string loss = "(Tensor logits, " + inputs + ", " + options + ") -> ";
  const std::string gradients = "(Tensor grad_output, Tensor grad_statistics, ";
  const auto define = [&m](const std::string& schema) { m.def(schema.c_str()); };
  const std::string plain =
      "int reduction=1, int ignore_index=-100, float label_smoothing=0.0, *, ScalarType? loss_dtype=None, "
      "bool empty_is_zero=False, bool inplace=False) -> Tensor";
  define("cross_entropy(Tensor logits, Tensor target, " + plain);
  define("cross_entropy.weight(Tensor logits, Tensor target, Tensor weight, " + plain);
  define("general_cross_entropy" + loss + "Tensor");
  define("cross_entropy_with_stats" + loss +
         "(Tensor loss, Tensor lse, Tensor target_log_prob, Tensor entropy, Tensor z_loss, Tensor argmax)");
  define("_composite" + loss + "Tensor[]");
  define("_forward" + loss + "(Tensor loss, Tensor lse, Tensor denominator)");
  define("_forward_backward" + loss + "(Tensor loss, Tensor lse, Tensor denominator, Tensor grad_logits)");
  define("_forward_backward_(Tensor(a!) logits, " + inputs + ", " + options +
         ") -> (Tensor loss, Tensor lse, Tensor denominator)");
  define("_backward" + gradients + "Tensor logits, " + inputs + ", " + saved + ", " + options +
         ", bool[2] wanted) -> (Tensor grad_logits, Tensor grad_target)");
  define("_backward_" + gradients + "Tensor(a!) logits, " + inputs + ", " + saved + ", " + options +
         ", bool target_wanted) -> Tensor grad_target");
  define("_adapt_gradient_" + gradients + "Tensor(a!) grad_logits, Tensor logits, " + inputs + ", " + saved + ", " +
         options + ") -> ()");
}

TORCH_LIBRARY_IMPL(cross_entropy_ext, CompositeImplicitAutograd, m) { m.impl("_composite", &composite_of); }

TORCH_LIBRARY_IMPL(cross_entropy_ext, CompositeExplicitAutograd, m) {
  m.impl("cross_entropy", TORCH_FN((from_plain<at::Tensor, loss_without_grad>)));
  m.impl("cross_entropy.weight", TORCH_FN((from_weighted<at::Tensor, loss_without_grad>)));
  m.impl("general_cross_entropy", TORCH_FN((from_lists<at::Tensor, loss_without_grad>)));
  m.impl("cross_entropy_with_stats", TORCH_FN((from_lists<Results, results_without_grad>)));
}

TORCH_LIBRARY_IMPL(cross_entropy_ext, Meta, m) {
  m.impl("_forward", &forward_meta);
  m.impl("_forward_backward", &forward_backward_meta);
  m.impl("_forward_backward_", &forward_backward_meta_);
  m.impl("_backward", &backward_meta);
  m.impl("_backward_", &backward_meta_);
  m.impl("_adapt_gradient_", &adapt_gradient_meta_);
}

TORCH_LIBRARY_IMPL(cross_entropy_ext, AutocastCPU, m) {
  register_autocast<c10::kCPU, c10::DispatchKey::AutocastCPU>(m);
}

TORCH_LIBRARY_IMPL(cross_entropy_ext, AutocastCUDA, m) {
  register_autocast<c10::kCUDA, c10::DispatchKey::AutocastCUDA>(m);
}

TORCH_LIBRARY_IMPL(cross_entropy_ext, FuncTorchDynamicLayerFrontMode, m) {
  m.impl("cross_entropy", TORCH_FN((from_plain<at::Tensor, loss_functorch>)));
  m.impl("cross_entropy.weight", TORCH_FN((from_weighted<at::Tensor, loss_functorch>)));
  m.impl("general_cross_entropy", TORCH_FN((from_lists<at::Tensor, loss_functorch>)));
  m.impl("cross_entropy_with_stats", TORCH_FN((from_lists<Results, results_functorch>)));
}

}  // namespace xent
