// The operators of torch.ops.cross_entropy_ext: their schemas, what they accept, and the kernels that belong to no
// device (Meta, autocast, transforms).
#include <ATen/TensorOperators.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/cross_entropy_loss.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/ne.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include "cross_entropy.h"
#include "problem.h"

namespace xent {
namespace {

const auto& forward_operator() {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("cross_entropy_ext::_forward", "").typed<decltype(forward)>();
  return op;
}

const auto& forward_backward_operator() {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("cross_entropy_ext::_forward_backward", "")
                             .typed<decltype(forward_backward)>();
  return op;
}

const auto& backward_operator() {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("cross_entropy_ext::_backward", "").typed<decltype(backward)>();
  return op;
}

const auto& backward_inplace_operator() {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("cross_entropy_ext::_backward_", "").typed<decltype(backward_)>();
  return op;
}

const auto& adapt_gradient_operator() {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("cross_entropy_ext::_adapt_gradient_", "")
                             .typed<decltype(adapt_gradient_)>();
  return op;
}

const auto& cross_entropy_operator() {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("cross_entropy_ext::cross_entropy", "")
                             .typed<decltype(cross_entropy)>();
  return op;
}

}  // namespace

// ---- which way
// --------------------------------------------------------------------------------------------------------

bool one_pass_pays(const at::Tensor& logits, int64_t reduction) {
  if (reduction == kNone) return false;
  if (logits.is_cuda()) return true;  // time is what memory moves
  constexpr int64_t kBytes = int64_t{64} << 20;
  return logits.is_cpu() && logits.numel() * logits.element_size() <= kBytes;
}

at::Tensor native_cross_entropy(const at::Tensor& logits, const at::Tensor& target, const OptionalTensor& weight,
                                int64_t reduction, int64_t ignore_index, double label_smoothing,
                                std::optional<at::ScalarType> loss_dtype, bool empty_is_zero) {
  const bool widen = is_index_type(target.scalar_type()) && !is_soft(logits, target);
  const at::Tensor native_target = widen ? target.to(at::kLong) : target;
  const auto native = [&](int64_t reduction) {
    return at::cross_entropy_loss(logits, native_target, weight, reduction, ignore_index, label_smoothing);
  };
  if (!empty_is_zero || reduction != kMean) {
    const at::Tensor loss = native(reduction);
    return loss_dtype ? loss.to(*loss_dtype) : loss;
  }
  // 0 / 0 is to be 0, for the gradient too: divide by one there.
  at::Tensor denominator;
  if (is_soft(logits, target)) {
    denominator = at::empty({}, logits.options().dtype(at::kDouble))
                      .fill_(target.sym_numel() / logits.sym_size(class_dim(logits)));
  } else {
    const at::Tensor valid = native_target.ne(ignore_index);
    const at::Tensor index = at::where(valid, native_target, at::zeros_like(native_target));
    const at::Tensor counts = has_value(weight) ? weight->to(at::kDouble).take(index) : valid.to(at::kDouble);
    denominator = at::where(valid, counts, at::zeros_like(counts)).sum();
  }
  const at::Tensor sum = native(kSum);
  const at::Tensor nothing = denominator.eq(0).logical_and(sum.eq(0));
  const at::Tensor loss = sum / at::where(nothing, at::ones_like(denominator), denominator).to(sum.scalar_type());
  return loss_dtype ? loss.to(*loss_dtype) : loss;
}

// ---- the operators, for callers in C++ ------------------------------------------------------------------------------

at::Tensor cross_entropy(const at::Tensor& logits, const at::Tensor& target, const OptionalTensor& weight,
                         int64_t reduction, int64_t ignore_index, double label_smoothing,
                         std::optional<at::ScalarType> loss_dtype, bool empty_is_zero, bool inplace) {
  return cross_entropy_operator().call(logits, target, weight, reduction, ignore_index, label_smoothing, loss_dtype,
                                       empty_is_zero, inplace);
}

ForwardResult forward(const at::Tensor& logits, const at::Tensor& target, const OptionalTensor& weight,
                      int64_t reduction, int64_t ignore_index, double label_smoothing, int64_t loss_dtype,
                      bool empty_is_zero) {
  return forward_operator().call(logits, target, weight, reduction, ignore_index, label_smoothing, loss_dtype,
                                 empty_is_zero);
}

ForwardBackwardResult forward_backward(const at::Tensor& logits, const at::Tensor& target, const OptionalTensor& weight,
                                       int64_t reduction, int64_t ignore_index, double label_smoothing,
                                       int64_t loss_dtype, bool empty_is_zero) {
  return forward_backward_operator().call(logits, target, weight, reduction, ignore_index, label_smoothing, loss_dtype,
                                          empty_is_zero);
}

BackwardResult backward(const at::Tensor& grad_output, const at::Tensor& logits, const at::Tensor& target,
                        const OptionalTensor& weight, const at::Tensor& lse, const at::Tensor& denominator,
                        int64_t reduction, int64_t ignore_index, double label_smoothing, std::array<bool, 2> wanted) {
  return backward_operator().call(grad_output, logits, target, weight, lse, denominator, reduction, ignore_index,
                                  label_smoothing, wanted);
}

at::Tensor backward_(const at::Tensor& grad_output, at::Tensor& logits, const at::Tensor& target,
                     const OptionalTensor& weight, const at::Tensor& lse, const at::Tensor& denominator,
                     int64_t reduction, int64_t ignore_index, double label_smoothing, bool target_wanted) {
  return backward_inplace_operator().call(grad_output, logits, target, weight, lse, denominator, reduction,
                                          ignore_index, label_smoothing, target_wanted);
}

void adapt_gradient_(const at::Tensor& grad_output, at::Tensor& grad_logits, const at::Tensor& logits,
                     const at::Tensor& target, const OptionalTensor& weight, const at::Tensor& lse,
                     const at::Tensor& denominator, int64_t reduction, int64_t ignore_index, double label_smoothing) {
  adapt_gradient_operator().call(grad_output, grad_logits, logits, target, weight, lse, denominator, reduction,
                                 ignore_index, label_smoothing);
}

bool adapts_gradient(const at::Tensor& logits) {
  return adapt_gradient_operator().hasKernelForDispatchKey(logits.is_cuda() ? c10::DispatchKey::CUDA
                                                                            : c10::DispatchKey::CPU);
}

namespace {

// ---- without autograd -----------------------------------------------------------------------------------------------

at::Tensor cross_entropy_without_grad(const at::Tensor& logits, const at::Tensor& target, const OptionalTensor& weight,
                                      int64_t reduction, int64_t ignore_index, double label_smoothing,
                                      std::optional<at::ScalarType> loss_dtype, bool empty_is_zero, bool) {
  check_options(reduction, label_smoothing, loss_dtype);
  if (!is_supported(logits, target, weight, ignore_index, label_smoothing, loss_dtype)) {
    return native_cross_entropy(logits, target, weight, reduction, ignore_index, label_smoothing, loss_dtype,
                                empty_is_zero);
  }
  return std::get<0>(forward(logits, target, weight, reduction, ignore_index, label_smoothing,
                             int64_t(loss_dtype.value_or(default_loss_dtype(logits, target, weight))), empty_is_zero));
}

// ---- Meta: shapes, types and strides --------------------------------------------------------------------------------

ForwardResult forward_meta(const at::Tensor& logits, const at::Tensor& target, const OptionalTensor& weight,
                           int64_t reduction, int64_t, double, int64_t loss_dtype, bool) {
  const int64_t dim = class_dim(logits);
  c10::SymDimVector shape;
  c10::SymInt positions = 1;
  for (int64_t d = 0; d < logits.dim(); ++d) {
    if (d == dim) continue;
    shape.push_back(logits.sym_size(d));
    positions = positions * logits.sym_size(d);
  }
  if (reduction != kNone) shape.clear();
  const auto arithmetic = arithmetic_type(logits, target, weight);
  return {at::empty_symint(shape, logits.options().dtype(at::ScalarType(loss_dtype))),
          at::empty_symint({is_soft(logits, target) ? 3 : 2, positions}, logits.options().dtype(arithmetic)),
          at::empty({}, logits.options().dtype(at::kDouble))};
}

at::Tensor gradient_meta(const at::Tensor& tensor, bool wanted) {
  return wanted ? at::empty_like(tensor) : at::empty({0}, tensor.options());
}

ForwardBackwardResult forward_backward_meta(const at::Tensor& logits, const at::Tensor& target,
                                            const OptionalTensor& weight, int64_t reduction, int64_t ignore_index,
                                            double label_smoothing, int64_t loss_dtype, bool empty_is_zero) {
  auto [loss, lse, denominator] =
      forward_meta(logits, target, weight, reduction, ignore_index, label_smoothing, loss_dtype, empty_is_zero);
  return {loss, lse, denominator, at::empty_like(logits)};
}

BackwardResult backward_meta(const at::Tensor&, const at::Tensor& logits, const at::Tensor& target,
                             const OptionalTensor&, const at::Tensor&, const at::Tensor&, int64_t, int64_t, double,
                             std::array<bool, 2> wanted) {
  return {gradient_meta(logits, wanted[0]), gradient_meta(target, wanted[1])};
}

at::Tensor backward_meta_(const at::Tensor&, at::Tensor&, const at::Tensor& target, const OptionalTensor&,
                          const at::Tensor&, const at::Tensor&, int64_t, int64_t, double, bool target_wanted) {
  return gradient_meta(target, target_wanted);
}

void adapt_gradient_meta_(const at::Tensor&, at::Tensor&, const at::Tensor&, const at::Tensor&, const OptionalTensor&,
                          const at::Tensor&, const at::Tensor&, int64_t, int64_t, double) {}

// ---- autocast: half logits are read as they are, the loss is float32 ------------------------------------------------

template <c10::DeviceType device, c10::DispatchKey key>
at::Tensor cross_entropy_autocast(const at::Tensor& logits, const at::Tensor& target, const OptionalTensor& weight,
                                  int64_t reduction, int64_t ignore_index, double label_smoothing,
                                  std::optional<at::ScalarType> loss_dtype, bool empty_is_zero, bool inplace) {
  check_options(reduction, label_smoothing, loss_dtype);
  const auto asked = loss_dtype;
  const auto widened = [](at::ScalarType type) {
    return type == at::kHalf || type == at::kBFloat16 ? at::kFloat : type;
  };
  OptionalTensor wide_weight = weight;
  if (logits.device().type() == device) {
    if (has_value(weight)) wide_weight = weight->to(widened(weight->scalar_type()));
    if (!loss_dtype) {
      auto type = widened(logits.scalar_type());
      if (is_soft(logits, target) && is_logits_type(type) && is_logits_type(target.scalar_type())) {
        type = c10::promoteTypes(type, widened(target.scalar_type()));
        if (has_value(weight)) type = c10::promoteTypes(type, wide_weight->scalar_type());
      }
      loss_dtype = type;
    }
    if (!is_supported(logits, target, wide_weight, ignore_index, label_smoothing, loss_dtype)) {
      return native_cross_entropy(logits, target, weight, reduction, ignore_index, label_smoothing, asked,
                                  empty_is_zero);
    }
  }
  const c10::impl::ExcludeDispatchKeyGuard without_autocast(key);
  return cross_entropy(logits, target, wide_weight, reduction, ignore_index, label_smoothing, loss_dtype, empty_is_zero,
                       inplace);
}

// ---- torch.func: vmap, grad, jvp and their compositions -------------------------------------------------------------

at::Tensor cross_entropy_functorch(const at::Tensor& logits, const at::Tensor& target, const OptionalTensor& weight,
                                   int64_t reduction, int64_t ignore_index, double label_smoothing,
                                   std::optional<at::ScalarType> loss_dtype, bool empty_is_zero, bool) {
  check_options(reduction, label_smoothing, loss_dtype);
  return native_cross_entropy(logits, target, weight, reduction, ignore_index, label_smoothing, loss_dtype,
                              empty_is_zero);
}

}  // namespace

TORCH_LIBRARY(cross_entropy_ext, m) {
  m.def(
      "cross_entropy(Tensor logits, Tensor target, Tensor? weight=None, int reduction=1, int ignore_index=-100, "
      "float label_smoothing=0.0, *, ScalarType? loss_dtype=None, bool empty_is_zero=False, bool inplace=False) "
      "-> Tensor");
  m.def(
      "_forward(Tensor logits, Tensor target, Tensor? weight, int reduction, int ignore_index, float label_smoothing, "
      "int loss_dtype, bool empty_is_zero) -> (Tensor loss, Tensor lse, Tensor denominator)");
  m.def(
      "_forward_backward(Tensor logits, Tensor target, Tensor? weight, int reduction, int ignore_index, "
      "float label_smoothing, int loss_dtype, bool empty_is_zero) "
      "-> (Tensor loss, Tensor lse, Tensor denominator, Tensor grad_logits)");
  m.def(
      "_backward(Tensor grad_output, Tensor logits, Tensor target, Tensor? weight, Tensor lse, Tensor denominator, "
      "int reduction, int ignore_index, float label_smoothing, bool[2] wanted) "
      "-> (Tensor grad_logits, Tensor grad_target)");
  m.def(
      "_backward_(Tensor grad_output, Tensor(a!) logits, Tensor target, Tensor? weight, Tensor lse, "
      "Tensor denominator, int reduction, int ignore_index, float label_smoothing, bool target_wanted) "
      "-> Tensor grad_target");
  m.def(
      "_adapt_gradient_(Tensor grad_output, Tensor(a!) grad_logits, Tensor logits, Tensor target, Tensor? weight, "
      "Tensor lse, Tensor denominator, int reduction, int ignore_index, float label_smoothing) -> ()");
}

TORCH_LIBRARY_IMPL(cross_entropy_ext, CompositeExplicitAutograd, m) {
  m.impl("cross_entropy", &cross_entropy_without_grad);
}

TORCH_LIBRARY_IMPL(cross_entropy_ext, Meta, m) {
  m.impl("_forward", &forward_meta);
  m.impl("_forward_backward", &forward_backward_meta);
  m.impl("_backward", &backward_meta);
  m.impl("_backward_", &backward_meta_);
  m.impl("_adapt_gradient_", &adapt_gradient_meta_);
}

TORCH_LIBRARY_IMPL(cross_entropy_ext, AutocastCPU, m) {
  m.impl("cross_entropy", &cross_entropy_autocast<c10::kCPU, c10::DispatchKey::AutocastCPU>);
}

TORCH_LIBRARY_IMPL(cross_entropy_ext, AutocastCUDA, m) {
  m.impl("cross_entropy", &cross_entropy_autocast<c10::kCUDA, c10::DispatchKey::AutocastCUDA>);
}

TORCH_LIBRARY_IMPL(cross_entropy_ext, FuncTorchDynamicLayerFrontMode, m) {
  m.impl("cross_entropy", &cross_entropy_functorch);
}

}  // namespace xent
