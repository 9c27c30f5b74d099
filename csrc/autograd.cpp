// Derivatives. The only file that knows autograd.
//
// The loss saves its inputs and lse, never probabilities; the backward recomputes them from the logits. The backward is
// an operator with derivatives of its own, written in ATen and so differentiable any number of times.
#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/FunctionalTensorWrapper.h>
#include <ATen/SavedTensorHooks.h>
#include <ATen/ops/log_softmax.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "cross_entropy.h"

namespace xent {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Variable;
using torch::autograd::variable_list;

// ---- options, through saved_data ------------------------------------------------------------------------------------

struct Options {
  int64_t reduction, ignore_index;
  double label_smoothing;
  int64_t loss_dtype = int64_t(at::kFloat);
  bool empty_is_zero = false, inplace = false;

  // In one entry of three, for which a tuple has room: more would cost allocations and lookups.
  void save(AutogradContext* ctx) const {
    const int64_t packed = reduction | int64_t{empty_is_zero} << 8 | int64_t{inplace} << 9 | loss_dtype << 16;
    ctx->saved_data["options"] = std::make_tuple(packed, ignore_index, label_smoothing);
  }

  static Options saved_in(AutogradContext* ctx) {
    const auto [packed, ignore_index, label_smoothing] =
        ctx->saved_data["options"].to<std::tuple<int64_t, int64_t, double>>();
    return {packed & 0xff, ignore_index, label_smoothing, packed >> 16, (packed & 0x100) != 0, (packed & 0x200) != 0};
  }
};

OptionalTensor optional(const at::Tensor& tensor) { return tensor.defined() ? OptionalTensor(tensor) : std::nullopt; }

// ---- the same mathematics in ATen, for second derivatives and for the gradient of class weights ---------------------

// Everything broadcasts against the logits; the class dimension is kept. Ignored positions have logits and a scale of
// zero, so nothing of theirs, not even a NaN, gets into a product.
struct Composite {
  int64_t dim;
  bool soft;
  double keep, share;         // 1 - e, e / C
  at::Tensor logits, weight;  // in the type of arithmetic; weight is 1 where there is none
  at::Tensor probabilities;   // q' = (1 - e) q + e / C, for soft targets
  at::Tensor coefficients;    // a
  at::Tensor total;           // A
  at::Tensor scale;           // grad_output / denominator
  at::Tensor valid;           // for index targets

  Composite(const at::Tensor& grad_output, const at::Tensor& raw_logits, const at::Tensor& target,
            const at::Tensor& raw_weight, const at::Tensor& denominator, const Options& options)
      : dim(class_dim(raw_logits)), soft(is_soft(raw_logits, target)) {
    const auto type = arithmetic_type(raw_logits, target, optional(raw_weight));
    keep = 1 - options.label_smoothing;
    logits = raw_logits.to(type);
    scale = grad_output.to(type) / denominator.to(type);
    if (options.reduction == kNone) scale = scale.unsqueeze(dim);
    std::vector<int64_t> weight_shape(size_t(logits.dim()), 1);
    weight_shape[size_t(dim)] = -1;
    weight = raw_weight.defined() ? raw_weight.to(type).view(weight_shape)
                                  : at::ones_like(logits.select(dim, 0).unsqueeze(dim));
    share = options.label_smoothing / double(logits.size(dim));
    if (soft) {
      probabilities = target.to(type) * keep + share;
      coefficients = weight * probabilities;
    } else {
      const at::Tensor index = target.to(at::kLong).unsqueeze(dim);
      valid = index.ne(options.ignore_index);
      logits = at::where(valid, logits, at::zeros_like(logits));
      scale = at::where(valid, scale, at::zeros_like(scale));
      const at::Tensor one_hot = at::zeros_like(logits).scatter(dim, at::where(valid, index, at::zeros_like(index)), 1);
      coefficients = weight * (one_hot * keep + share);
    }
    total = coefficients.sum(dim, true);
  }

  BackwardResult gradients(std::array<bool, 2> wanted) const {
    const auto empty = [&] { return at::zeros_like(logits.flatten().slice(0, 0, 0)); };
    return {wanted[0] ? scale * (total * softmax() - coefficients) : empty(),
            wanted[1] ? scale * keep * weight * minus_log_softmax() : empty()};
  }

  at::Tensor softmax() const { return at::softmax(logits, dim); }
  at::Tensor minus_log_softmax() const { return -at::log_softmax(logits, dim); }
  at::Tensor sum_over_classes(const at::Tensor& tensor) const { return tensor.sum(dim, true); }

  // Sums what has the logits' shape down to the weights'.
  at::Tensor sum_over_positions(const at::Tensor& tensor, const at::Tensor& like) const {
    std::vector<int64_t> positions;
    for (int64_t d = 0; d < tensor.dim(); ++d) {
      if (d != dim) positions.push_back(d);
    }
    return (positions.empty() ? tensor : tensor.sum(positions)).to(like.scalar_type());
  }
};

// d loss / d w_c = sum over positions of q'_c (lse - x_c); a probability of zero adds nothing, even at -inf.
at::Tensor weight_gradient(const at::Tensor& grad_output, const at::Tensor& logits, const at::Tensor& target,
                           const at::Tensor& weight, const at::Tensor& denominator, const Options& options) {
  const Composite c(grad_output, logits, target, weight, denominator, options);
  const at::Tensor q = c.probabilities;
  const at::Tensor terms = at::where(q.eq(0), at::zeros_like(c.logits), q * c.minus_log_softmax());
  return c.sum_over_positions(c.scale * terms, weight);
}

// ---- the backward and its derivatives -------------------------------------------------------------------------------

// With v and u the gradients of the results dx and dq, p = softmax(x) and g = grad_output / denominator:
//   f    = sum_c v_c g (A p_c - a_c) + sum_c u_c g (1 - e) w_c (lse - x_c)
//   df/dg   = f / g
//   df/dx_c = g A p_c (v_c - v.p) + g (p_c sum_k u_k (1 - e) w_k - u_c (1 - e) w_c)
//   df/da_c = g (v.p - v_c)
struct BackwardFunction : torch::autograd::Function<BackwardFunction> {
  static constexpr bool is_traceable = true;

  static variable_list forward(AutogradContext* ctx, const Variable& grad_output, const Variable& logits,
                               const Variable& target, const OptionalTensor& weight, const Variable& lse,
                               const Variable& denominator, int64_t reduction, int64_t ignore_index,
                               double label_smoothing, std::array<bool, 2> wanted) {
    const at::AutoDispatchBelowADInplaceOrView below;
    auto [grad_logits, grad_target] = xent::backward(grad_output, logits, target, weight, lse, denominator, reduction,
                                                     ignore_index, label_smoothing, wanted);
    ctx->save_for_backward({grad_output, logits, target, weight.value_or(at::Tensor()), denominator});
    Options{reduction, ignore_index, label_smoothing}.save(ctx);
    return {grad_logits, grad_target};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const auto &grad_output = saved[0], &logits = saved[1], &target = saved[2], &weight = saved[3];
    const auto& denominator = saved[4];
    const auto options = Options::saved_in(ctx);
    const Composite c(grad_output, logits, target, weight, denominator, options);
    const at::Tensor p = c.softmax();
    const auto same_shape = [&](const at::Tensor& grad) {
      return grad.defined() && grad.sym_sizes() == logits.sym_sizes();
    };

    at::Tensor for_scale = at::zeros_like(c.total), for_logits = at::zeros_like(c.logits), for_target, for_weight;
    if (same_shape(grads[0])) {
      at::Tensor v = grads[0].to(c.logits.scalar_type());
      if (!c.soft) v = at::where(c.valid, v, at::zeros_like(v));
      const at::Tensor v_dot_p = c.sum_over_classes(v * p);
      for_scale = for_scale + c.sum_over_classes(v * (c.total * p - c.coefficients));
      for_logits = for_logits + c.scale * c.total * p * (v - v_dot_p);
      if (c.soft) {
        const at::Tensor for_coefficients = c.scale * (v_dot_p - v);
        for_target = for_coefficients * c.weight * c.keep;
        for_weight = for_coefficients * c.probabilities;
      }
    }
    if (c.soft && same_shape(grads[1])) {
      const at::Tensor u = grads[1].to(c.logits.scalar_type()) * c.keep;
      const at::Tensor weighted = u * c.weight, minus_log_p = c.minus_log_softmax();
      for_scale = for_scale + c.sum_over_classes(weighted * minus_log_p);
      for_logits = for_logits + c.scale * (p * c.sum_over_classes(weighted) - weighted);
      const at::Tensor own = c.scale * u * minus_log_p;
      for_weight = for_weight.defined() ? for_weight + own : own;
    }

    at::Tensor for_grad_output;
    if (options.reduction == kNone) {
      if (!c.soft) for_scale = at::where(c.valid, for_scale, at::zeros_like(for_scale));
      for_grad_output = (for_scale / denominator).squeeze(c.dim);
    } else {
      if (!c.soft) for_scale = at::where(c.valid, for_scale, at::zeros_like(for_scale));
      for_grad_output = for_scale.sum() / denominator;
    }
    variable_list result(10);
    result[0] = for_grad_output.to(grad_output.scalar_type());
    result[1] = for_logits.to(logits.scalar_type());
    if (for_target.defined()) result[2] = for_target.to(target.scalar_type());
    if (for_weight.defined() && weight.defined() && weight.is_floating_point()) {
      result[3] = c.sum_over_positions(for_weight, weight);
    }
    return result;
  }
};

// ---- the gradient in the logits' place ------------------------------------------------------------------------------

// A tensor with memory behind it, rather than one that a compiler or a transform of functions traces with.
bool is_concrete(const at::Tensor& tensor) {
  constexpr c10::DispatchKeySet kTracing({c10::DispatchKey::Python, c10::DispatchKey::Functionalize,
                                          c10::DispatchKey::Batched, c10::DispatchKey::FuncTorchBatched,
                                          c10::DispatchKey::FuncTorchGradWrapper});
  return !tensor.key_set().has_any(kTracing) && !tensor.is_meta() && !c10::impl::TorchDispatchModeTLS::any_modes_set();
}

// Every element has an address of its own: strides in increasing order each step past all that is below.
bool has_distinct_addresses(const at::Tensor& tensor) {
  std::vector<std::pair<int64_t, int64_t>> dims;
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    if (tensor.size(d) != 1) dims.emplace_back(tensor.stride(d), tensor.size(d));
  }
  std::sort(dims.begin(), dims.end());
  int64_t extent = 1;
  for (const auto& [stride, size] : dims) {
    if (stride < extent) return false;
    extent = stride * (size - 1) + extent;
  }
  return true;
}

// Not while a graph of the backward is being built, which needs the logits again, nor under tracing, where the compiler
// plans memory; not for logits that are a view with arithmetic of its own, or that share addresses, among themselves or
// with what else is read.
bool can_overwrite(const at::Tensor& logits, const at::Tensor& grad_output, const at::Tensor& target,
                   const at::Tensor& weight) {
  for (const at::Tensor& read : {grad_output, target, weight}) {
    if (read.defined() && read.is_alias_of(logits)) return false;
  }
  return !c10::GradMode::is_enabled() && is_concrete(logits) && !logits.is_neg() && !logits.is_inference() &&
         has_distinct_addresses(logits);
}

// Whether to make the gradient in the forward: for logits that need one and nothing else does, and that are to be kept
// as they are, by plain evaluation. float16 comes with a loss scale, for which it could not be used (see can_scale).
// Hooks on saved tensors mean to save memory, which it would take.
bool wants_one_pass(const at::Tensor& logits, const at::Tensor& target, const OptionalTensor& weight, int64_t reduction,
                    bool inplace) {
  return !inplace && logits.requires_grad() && !target.requires_grad() && !(weight && weight->requires_grad()) &&
         logits.scalar_type() != at::kHalf && is_concrete(logits) && one_pass_pays(logits, reduction) &&
         !at::SavedTensorDefaultHooks::get_hooks();
}

// Whether a gradient for a grad_output of one can be scaled to another: not where it has been rounded to few bits,
// unless only its exponent changes; nor enlarged, for its smallest elements have lost bits or become zero; nor by NaN,
// which ignored positions do not take.
bool can_scale(at::ScalarType type, double scale) {
  if (scale == 1) return true;
  int exponent;
  const bool power_of_two = std::abs(std::frexp(scale, &exponent)) == 0.5;
  return std::abs(scale) <= 1 && type != at::kHalf && (type != at::kBFloat16 || power_of_two);
}

struct CrossEntropyFunction : torch::autograd::Function<CrossEntropyFunction> {
  static constexpr bool is_traceable = true;

  static variable_list forward(AutogradContext* ctx, const Variable& logits, const Variable& target,
                               const OptionalTensor& weight, int64_t reduction, int64_t ignore_index,
                               double label_smoothing, int64_t loss_dtype, bool empty_is_zero, bool inplace,
                               bool one_pass) {
    const at::AutoDispatchBelowADInplaceOrView below;
    at::Tensor loss, lse, denominator, grad_logits;
    if (one_pass) {
      std::tie(loss, lse, denominator, grad_logits) =
          forward_backward(logits, target, weight, reduction, ignore_index, label_smoothing, loss_dtype, empty_is_zero);
      ctx->saved_data["grad_logits"] = grad_logits;
    } else {
      std::tie(loss, lse, denominator) =
          xent::forward(logits, target, weight, reduction, ignore_index, label_smoothing, loss_dtype, empty_is_zero);
    }
    ctx->save_for_backward({logits, target, weight.value_or(at::Tensor()), lse, denominator});
    Options{reduction, ignore_index, label_smoothing, loss_dtype, empty_is_zero, inplace}.save(ctx);
    return {loss};
  }

  // The gradient for a grad_output of one, as the forward made it. Given away once, since whoever gets it may write to
  // it; a second backward has it made again, in the same way, so that it gets the same bits.
  static at::Tensor gradient_from_forward(AutogradContext* ctx, const at::Tensor& logits, const at::Tensor& target,
                                          const at::Tensor& weight, const Options& options) {
    const at::AutoDispatchBelowADInplaceOrView below;
    at::IValue& made = ctx->saved_data["grad_logits"];
    if (!made.isNone()) return std::exchange(made, at::IValue()).toTensor();
    return std::get<3>(forward_backward(logits, target, optional(weight), options.reduction, options.ignore_index,
                                        options.label_smoothing, options.loss_dtype, options.empty_is_zero));
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    auto logits = saved[0];
    const auto &target = saved[1], &weight = saved[2], &lse = saved[3], &denominator = saved[4];
    const auto options = Options::saved_in(ctx);
    // One edge for each tensor that forward was given.
    const bool wanted[] = {ctx->needs_input_grad(0), ctx->needs_input_grad(1),
                           weight.defined() && ctx->needs_input_grad(2)};
    const at::Tensor& grad = grads[0];

    variable_list result(10);
    const bool was_made = ctx->saved_data.count("grad_logits") && wanted[0] && !c10::GradMode::is_enabled();
    if (was_made && adapts_gradient(logits)) {
      const at::AutoDispatchBelowADInplaceOrView below;
      const at::IValue made = std::exchange(ctx->saved_data["grad_logits"], at::IValue());
      if (!made.isNone() && is_concrete(grad)) {
        result[0] = made.toTensor();
        adapt_gradient_(grad, result[0], logits, target, optional(weight), lse, denominator, options.reduction,
                        options.ignore_index, options.label_smoothing);
        return result;
      }
    } else if (was_made && is_concrete(grad)) {
      const bool is_float = grad.is_cpu() && grad.scalar_type() == at::kFloat;  // read without the dispatcher's help
      const double scale = is_float ? double(*grad.const_data_ptr<float>()) : grad.item<double>();
      if (can_scale(logits.scalar_type(), scale)) {
        result[0] = gradient_from_forward(ctx, logits, target, weight, options);
        if (scale != 1) result[0].mul_(scale);
        return result;
      }
    }
    if (ctx->saved_data.count("grad_logits")) ctx->saved_data["grad_logits"] = at::IValue();  // of no use: free it
    if (wanted[2]) result[2] = weight_gradient(grad, logits, target, weight, denominator, options);
    if (wanted[0] && options.inplace && can_overwrite(logits, grad, target, weight)) {
      const at::AutoDispatchBelowADInplaceOrView below;
      logits.unsafeGetTensorImpl()->bump_version();  // whoever else saved the logits learns that they are gone
      const at::Tensor grad_target =
          backward_(grad, logits, target, optional(weight), lse, denominator, options.reduction, options.ignore_index,
                    options.label_smoothing, wanted[1]);
      result[0] = logits.detach();
      if (wanted[1]) result[1] = grad_target;
    } else if (wanted[0] || wanted[1]) {
      auto [grad_logits, grad_target] =
          xent::backward(grad, logits, target, optional(weight), lse, denominator, options.reduction,
                         options.ignore_index, options.label_smoothing, {wanted[0], wanted[1]});
      if (wanted[0]) result[0] = grad_logits;
      if (wanted[1]) result[1] = grad_target;
    }
    return result;
  }
};

// ---- registration ---------------------------------------------------------------------------------------------------

bool has_tangent(const at::Tensor& tensor) { return tensor.defined() && tensor._fw_grad(0).defined(); }

at::Tensor cross_entropy_autograd(const at::Tensor& logits, const at::Tensor& target, const OptionalTensor& weight,
                                  int64_t reduction, int64_t ignore_index, double label_smoothing,
                                  std::optional<at::ScalarType> loss_dtype, bool empty_is_zero, bool inplace) {
  check_options(reduction, label_smoothing, loss_dtype);
  const bool forward_mode = has_tangent(logits) || has_tangent(target) || (weight && has_tangent(*weight));
  if (forward_mode || !is_supported(logits, target, weight, ignore_index, label_smoothing, loss_dtype)) {
    return native_cross_entropy(logits, target, weight, reduction, ignore_index, label_smoothing, loss_dtype,
                                empty_is_zero);
  }
  const auto type = int64_t(loss_dtype.value_or(default_loss_dtype(logits, target, weight)));
  const bool needs_graph = logits.requires_grad() || target.requires_grad() || (weight && weight->requires_grad());
  if (!needs_graph || !c10::GradMode::is_enabled()) {
    const at::AutoDispatchBelowADInplaceOrView below;
    return std::get<0>(forward(logits, target, weight, reduction, ignore_index, label_smoothing, type, empty_is_zero));
  }
  return CrossEntropyFunction::apply(logits, target, weight, reduction, ignore_index, label_smoothing, type,
                                     empty_is_zero, inplace,
                                     wants_one_pass(logits, target, weight, reduction, inplace))[0];
}

BackwardResult backward_autograd(const at::Tensor& grad_output, const at::Tensor& logits, const at::Tensor& target,
                                 const OptionalTensor& weight, const at::Tensor& lse, const at::Tensor& denominator,
                                 int64_t reduction, int64_t ignore_index, double label_smoothing,
                                 std::array<bool, 2> wanted) {
  if (has_tangent(grad_output)) {  // Function has no forward mode
    const Composite composite(grad_output, logits, target, weight.value_or(at::Tensor()), denominator,
                              {reduction, ignore_index, label_smoothing});
    auto [grad_logits, grad_target] = composite.gradients(wanted);
    return {grad_logits.to(logits.scalar_type()), wanted[1] ? grad_target.to(target.scalar_type()) : grad_target};
  }
  auto results = BackwardFunction::apply(grad_output, logits, target, weight, lse, denominator, reduction, ignore_index,
                                         label_smoothing, wanted);
  return {results[0], results[1]};
}

}  // namespace

TORCH_LIBRARY_IMPL(cross_entropy_ext, Autograd, m) {
  m.impl("cross_entropy", &cross_entropy_autograd);
  m.impl("_backward", &backward_autograd);
}

}  // namespace xent
