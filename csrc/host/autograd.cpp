// Derivatives of cross entropy.
//
// The loss saves its inputs and lse, never probabilities; the backward recomputes them from the logits. The backward is
// an operator with derivatives of its own: those of the composite, taken twice.
#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/FunctionalTensorWrapper.h>
#include <ATen/SavedTensorHooks.h>
#include <ATen/ops/_make_dual.h>
#include <ATen/ops/_unpack_dual.h>
#include <ATen/ops/log_softmax.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/accumulate_grad.h>
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

// ---- what a backward needs, through the context ---------------------------------------------------------------------

// In one entry of three, for which a tuple has room: more would cost allocations and lookups. What native has no
// argument for comes in a second one, if there is anything.
void save_options(AutogradContext* ctx, const Options& options) {
  const auto [reduction, ignore_index, loss_dtype, flags, class_begin, total_classes] = options.integers();
  ctx->saved_data["options"] =
      std::make_tuple(reduction | (loss_dtype + 1) << 8 | flags << 16, ignore_index, options.label_smoothing);
  if (options.is_plain()) return;
  const auto numbers = options.numbers();
  ctx->saved_data["numbers"] = std::vector<double>(numbers.begin(), numbers.end());
  if (options.is_shard()) ctx->saved_data["shard"] = std::make_tuple(class_begin, total_classes);
}

// `tensors`: of the options, as they were saved.
Options saved_options(AutogradContext* ctx, std::vector<at::Tensor> tensors) {
  const auto [packed, ignore_index, label_smoothing] =
      ctx->saved_data["options"].to<std::tuple<int64_t, int64_t, double>>();
  std::array<int64_t, Options::kIntegers> integers{
      packed & 0xff, ignore_index, (packed >> 8 & 0xff) - 1, packed >> 16, 0, 0};
  if (const auto shard = ctx->saved_data.find("shard"); shard != ctx->saved_data.end()) {
    std::tie(integers[4], integers[5]) = shard->second.to<std::tuple<int64_t, int64_t>>();
  }
  const auto numbers = ctx->saved_data.find("numbers");
  if (numbers != ctx->saved_data.end()) {
    return Options::of(integers, numbers->second.toDoubleVector(), std::move(tensors));
  }
  Options plain;
  plain.label_smoothing = label_smoothing;
  return Options::of(integers, plain.numbers());
}

// The tensors that a Function was given, after it has unpacked what it saved.
struct SavedInputs {
  at::Tensor logits, target;
  OptionalTensor weight, companion, sample_weight, divisor;

  explicit SavedInputs(const variable_list& saved)
      : logits(saved[0]),
        target(saved[1]),
        weight(optional(saved[2])),
        companion(optional(saved[3])),
        sample_weight(optional(saved[4])),
        divisor(optional(saved[5])) {}

  Inputs inputs() const { return {logits, target, weight, companion, sample_weight, divisor}; }
};

// Those of the options come last, from `kSaved` on.
constexpr size_t kSaved = 8;

variable_list to_save(const Inputs& in, const Options& options, at::Tensor first, at::Tensor second) {
  const auto or_undefined = [](const OptionalTensor& tensor) { return tensor ? *tensor : at::Tensor(); };
  variable_list saved{in.logits,
                      in.target,
                      or_undefined(in.weight),
                      or_undefined(in.companion),
                      or_undefined(in.sample_weight),
                      or_undefined(in.divisor),
                      std::move(first),
                      std::move(second)};
  saved.insert(saved.end(), options.tensors.begin(), options.tensors.end());
  return saved;
}

// d loss / d w_c = sum over positions of q'_c (lse - x_c), for probabilities; one of zero adds nothing, even at -inf.
at::Tensor weight_gradient(const at::Tensor& grad_output, const Inputs& in, const at::Tensor& denominator,
                           const Options& options) {
  const auto type = arithmetic_type(in, options);
  const int64_t dim = class_dim(in.logits);
  at::Tensor scale = grad_output.to(type) / denominator.to(type);
  if (options.reduction == kNone) scale = scale.unsqueeze(dim);
  const at::Tensor q =
      in.target.to(type) * (1 - options.label_smoothing) + options.label_smoothing / double(in.logits.size(dim));
  const at::Tensor log_p = at::log_softmax(in.logits.to(type), dim);
  const at::Tensor terms = scale * at::where(q.eq(0), at::zeros_like(log_p), -q * log_p);
  std::vector<int64_t> positions;
  for (int64_t d = 0; d < terms.dim(); ++d) {
    if (d != dim) positions.push_back(d);
  }
  return (positions.empty() ? terms : terms.sum(positions)).to(in.weight->scalar_type());
}

// ---- the backward and its derivatives -------------------------------------------------------------------------------

struct BackwardFunction : torch::autograd::Function<BackwardFunction> {
  static constexpr bool is_traceable = true;

  static variable_list forward(AutogradContext* ctx, const Variable& grad_output, const OptionalTensor& grad_statistics,
                               const Variable& logits, const Variable& target, const OptionalTensor& weight,
                               const OptionalTensor& companion, const OptionalTensor& sample_weight,
                               const OptionalTensor& divisor, const Variable& lse, const Variable& denominator,
                               const Options& options, std::array<bool, 2> wanted,
                               const OptionalTensor& /*logit_scale, of the options*/) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const Inputs inputs{logits, target, weight, companion, sample_weight, divisor};
    auto [grad_logits, grad_target] =
        xent::backward({grad_output, grad_statistics, lse, denominator}, inputs, options, wanted);
    ctx->save_for_backward(to_save(inputs, options, grad_output, grad_statistics.value_or(at::Tensor())));
    save_options(ctx, options);
    ctx->saved_data["wanted"] = std::make_tuple(wanted[0], wanted[1]);
    return {grad_logits, grad_target};
  }

  // Differentiates the composite as this function did, and the result once more.
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const bool again = c10::GradMode::is_enabled();
    const at::AutoGradMode with_graph(true);
    // Of each, a node of its own: whatever else leads from one to another is not this function's.
    variable_list given;
    for (const at::Tensor& tensor : saved) {
      const bool differentiable = tensor.defined() && tensor.is_floating_point();
      given.push_back(!differentiable          ? tensor
                      : tensor.requires_grad() ? tensor.view_as(tensor)
                                               : tensor.detach().requires_grad_());
    }
    const Options options = saved_options(ctx, {given.begin() + kSaved, given.end()});
    TORCH_CHECK_NOT_IMPLEMENTED(!options.is_shard(),
                                "cross_entropy_ext::_backward: of a shard of the classes it has no derivative");
    const SavedInputs in(given);
    const at::Tensor &grad_output = given[6], &grad_statistics = given[7];
    Options asked = options;
    asked.statistics = grad_statistics.defined();
    if (!asked.loss_dtype) asked.loss_dtype = grad_output.scalar_type();
    const Outputs outputs = composite(in.inputs(), asked);
    variable_list results{outputs[0]}, of_results{grad_output};
    for (const int64_t row : {kGradLse, kGradTargetLogProb, kGradEntropy}) {
      if (!asked.statistics) break;
      results.push_back(outputs[size_t(1 + row)]);
      of_results.push_back(grad_statistics[row].view_symint(results.back().sym_sizes()));
    }
    const at::Tensor& probabilities = in.inputs().differentiable_target(options);
    const auto [logits_wanted, target_wanted] = ctx->saved_data["wanted"].to<std::tuple<bool, bool>>();
    variable_list firsts, of_firsts;
    const auto differentiate = [&](const at::Tensor& input, const at::Tensor& grad) {
      if (!grad.defined() || grad.sym_sizes() != input.sym_sizes()) return;
      firsts.push_back(
          torch::autograd::grad(results, {input}, of_results, /*retain_graph=*/true, /*create_graph=*/true)[0]);
      of_firsts.push_back(grad);
    };
    if (logits_wanted) differentiate(in.logits, grads[0]);
    if (target_wanted) differentiate(probabilities, grads[1]);

    // One result for each argument of forward; what is no tensor, and what was made of others, has none.
    variable_list result(13), inputs;
    std::vector<size_t> places;
    const auto add = [&](const at::Tensor& input, size_t place) {
      if (firsts.empty() || !input.defined() || !input.requires_grad()) return;
      inputs.push_back(input);
      places.push_back(place);
    };
    const size_t order[] = {2, 3, 4, 5, 6, 7, 0, 1};  // of what was saved, among the arguments
    for (size_t i = 0; i < std::size(order); ++i) add(given[i], order[i]);
    if (!options.tensors.empty()) add(options.tensors[Options::kLogitScale], 12);
    if (inputs.empty()) return result;
    const auto seconds = torch::autograd::grad(firsts, inputs, of_firsts, /*retain_graph=*/again,
                                               /*create_graph=*/again, /*allow_unused=*/true);
    for (size_t i = 0; i < seconds.size(); ++i) result[places[i]] = seconds[i];
    return result;
  }
};

// ---- the gradient in the logits' place ------------------------------------------------------------------------------

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
// Nor for pairs, whose logits are looked up when the gradient is there already.
bool can_overwrite(const Inputs& in, const at::Tensor& grad_output, const Options& options) {
  const at::Tensor& logits = in.logits;
  if (!is_eager(logits) || !is_eager(grad_output)) return false;  // batched gradients, say: these have no storage
  for (const OptionalTensor& read : {OptionalTensor(grad_output), OptionalTensor(in.target), in.weight, in.companion,
                                     in.sample_weight, in.divisor}) {
    if (has_value(read) && read->is_alias_of(logits)) return false;
  }
  if (options.target_kind == TargetKind::kPairs) return false;
  return !c10::GradMode::is_enabled() && !logits.is_neg() && !logits.is_inference() && has_distinct_addresses(logits);
}

// Returns true if the logits are in the memory of a leaf. No node asks for a leaf's values again, but the user keeps
// them. The logits are the leaf, or a view of it; or a user's function has made them by `detach` or `data`, as the last
// nodes of the graph show.
bool are_of_a_leaf(const at::Tensor& logits) {
  if (logits.is_leaf() || (logits.is_view() && logits._base().is_leaf())) return true;
  constexpr size_t kMostNodes = 16;
  std::vector<torch::autograd::Node*> nodes{logits.grad_fn().get()};
  for (size_t i = 0; i < nodes.size() && i < kMostNodes; ++i) {
    const auto* leaf = dynamic_cast<torch::autograd::AccumulateGrad*>(nodes[i]);
    if (leaf && leaf->variable.is_alias_of(logits)) return true;
    for (const auto& edge : nodes[i]->next_edges()) {
      if (edge.is_valid()) nodes.push_back(edge.function.get());
    }
  }
  return false;
}

// Whether to make the gradient in the forward: for logits that need one and nothing else does, and that are to be kept
// as they are, by plain evaluation. float16 comes with a loss scale, for which it could not be used (see can_scale).
// Hooks on saved tensors mean to save memory, which it would take.
// Nor where statistics may have gradients, too.
bool fuse_backward(const Inputs& in, const Options& options) {
  const at::Tensor& logits = in.logits;
  return !options.inplace && !options.statistics && logits.requires_grad() && !in.target.requires_grad() &&
         !(in.weight && in.weight->requires_grad()) && !(in.companion && in.companion->requires_grad()) &&
         logits.scalar_type() != at::kHalf && is_eager(logits) && fusing_pays(logits, options.reduction) &&
         options.tensors.empty() && !at::SavedTensorDefaultHooks::get_hooks();
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

}  // namespace

OptionalTensor gradients_of_statistics(const variable_list& grads, const at::Tensor& lse) {
  variable_list rows;
  bool any = false;
  for (size_t i = 1; i <= 3 && i < grads.size(); ++i) {
    any |= grads[i].defined();
    rows.push_back(grads[i].defined() ? grads[i].reshape({-1}).to(lse.scalar_type())
                                      : at::zeros_like(lse.select(0, 0)));
  }
  return any ? OptionalTensor(at::stack(rows)) : std::nullopt;
}

namespace {

struct CrossEntropyFunction : torch::autograd::Function<CrossEntropyFunction> {
  static constexpr bool is_traceable = true;

  static variable_list forward(AutogradContext* ctx, const Variable& logits, const Variable& target,
                               const OptionalTensor& weight, const OptionalTensor& companion,
                               const OptionalTensor& sample_weight, const OptionalTensor& divisor,
                               const Options& options, bool one_pass,
                               const OptionalTensor& /*logit_scale, of the options*/) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const Inputs inputs{logits, target, weight, companion, sample_weight, divisor};
    at::Tensor loss, lse, denominator, grad_logits;
    if (one_pass) {
      std::tie(loss, lse, denominator, grad_logits) = forward_backward(inputs, options);
      ctx->saved_data["grad_logits"] = grad_logits;
    } else {
      std::tie(loss, lse, denominator) = xent::forward(inputs, options);
    }
    // Hooks may lose precision, of which lse can spare none: the backward makes it anew, from the logits they return.
    const bool hooked = at::SavedTensorDefaultHooks::get_hooks() && is_eager(logits);
    ctx->save_for_backward(hooked ? to_save(inputs, options, {}, {}) : to_save(inputs, options, lse, denominator));
    save_options(ctx, options);
    if (!options.statistics) return {loss};
    ctx->set_materialize_grads(false);
    const Outputs outputs = outputs_of(loss, lse, denominator, inputs, options);
    ctx->mark_non_differentiable({outputs[4], outputs[5]});
    return {outputs.begin(), outputs.end()};
  }

  // The gradient for a grad_output of one, as the forward made it. Given away once, since whoever gets it may write to
  // it; a second backward has it made again, in the same way, so that it gets the same bits.
  static at::Tensor gradient_from_forward(AutogradContext* ctx, const Inputs& inputs, const Options& options) {
    const at::AutoDispatchBelowADInplaceOrView below;
    at::IValue& made = ctx->saved_data["grad_logits"];
    if (!made.isNone()) return std::exchange(made, at::IValue()).toTensor();
    return std::get<3>(forward_backward(inputs, options));
  }

  // lse and the denominator once more, where the forward left them out.
  static std::pair<at::Tensor, at::Tensor> lse_of(const Inputs& inputs, const Options& options) {
    const at::AutoDispatchBelowADInplaceOrView below;
    auto [loss, lse, denominator] = xent::forward(inputs, options);
    return {lse, denominator};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    SavedInputs in(saved);
    const Inputs inputs = in.inputs();
    at::Tensor lse = saved[6], denominator = saved[7];
    const Options options = saved_options(ctx, {saved.begin() + kSaved, saved.end()});
    if (!lse.defined()) std::tie(lse, denominator) = lse_of(inputs, options);
    const bool pairs = options.target_kind == TargetKind::kPairs;
    // One edge for each tensor that forward was given.
    const bool has_weight = has_value(in.weight), wanted_weight = has_weight && ctx->needs_input_grad(2);
    const bool wanted_target = ctx->needs_input_grad(pairs ? 2 + has_weight : 1);
    const bool wanted_logits = ctx->needs_input_grad(0);
    const OptionalTensor scale = options.tensor(Options::kLogitScale);
    const bool wanted_scale = scale && scale->requires_grad();

    variable_list result(9);
    at::Tensor& grad_target = result[pairs ? 3 : 1];
    at::Tensor grad = grads[0], divide_by = denominator;
    const OptionalTensor of_statistics = gradients_of_statistics(grads, lse);
    if (!grad.defined()) {  // of the statistics alone
      if (!of_statistics) return result;
      const auto shape = options.reduction == kNone ? shape_of_positions(in.logits) : c10::SymDimVector();
      grad = at::zeros_symint(shape, in.logits.options().dtype(*options.loss_dtype));
      divide_by = at::ones_like(denominator);  // by which the loss's mean may be undefined
    }
    const Gradients gradients{grad, of_statistics, lse, divide_by};

    const bool was_made = ctx->saved_data.count("grad_logits") && wanted_logits && !c10::GradMode::is_enabled();
    if (was_made && adapts_gradient(in.logits)) {
      const at::AutoDispatchBelowADInplaceOrView below;
      const at::IValue made = std::exchange(ctx->saved_data["grad_logits"], at::IValue());
      if (!made.isNone() && is_eager(grad)) {
        result[0] = made.toTensor();
        adapt_gradient_(gradients, result[0], inputs, options);
        return result;
      }
    } else if (was_made && is_eager(grad)) {
      const bool is_float = grad.is_cpu() && grad.scalar_type() == at::kFloat;  // read without the dispatcher's help
      const double scale = is_float ? double(*grad.const_data_ptr<float>()) : grad.item<double>();
      if (can_scale(in.logits.scalar_type(), scale)) {
        result[0] = gradient_from_forward(ctx, inputs, options);
        if (scale != 1) result[0].mul_(scale);
        return result;
      }
    }
    if (ctx->saved_data.count("grad_logits")) {
      ctx->saved_data["grad_logits"] = at::IValue();  // of no use: free it
      if (lse.sym_numel() == 0) lse = lse_of(inputs, options).first;
    }
    if (wanted_weight) result[2] = weight_gradient(grad, inputs, denominator, options);
    if (wanted_logits && options.inplace && !wanted_scale && can_overwrite(inputs, grad, options)) {
      const at::AutoDispatchBelowADInplaceOrView below;
      in.logits.unsafeGetTensorImpl()->bump_version();  // whoever else saved the logits learns that they are gone
      const at::Tensor made = backward_(gradients, inputs, options, wanted_target);
      result[0] = in.logits.detach();
      if (wanted_target) grad_target = made;
    } else if (wanted_logits || wanted_target || wanted_scale) {
      auto [for_logits, for_target] =
          xent::backward(gradients, inputs, options, {wanted_logits || wanted_scale, wanted_target});
      if (wanted_logits) result[0] = for_logits;
      if (wanted_scale) result[8] = scale_gradient(sum_of_products(for_logits, in.logits), *scale);
      if (wanted_target) grad_target = for_target;
    }
    return result;
  }
};

// ---- registration ---------------------------------------------------------------------------------------------------

bool has_tangent(const at::Tensor& tensor) { return tensor.defined() && tensor._fw_grad(0).defined(); }
bool has_tangent(const OptionalTensor& tensor) { return tensor && has_tangent(*tensor); }
bool needs_graph(const at::Tensor& tensor) { return tensor.requires_grad(); }
bool needs_graph(const OptionalTensor& tensor) { return tensor && tensor->requires_grad(); }

template <class Is>
bool any_of(const Inputs& in, const Is& is) {
  return is(in.logits) || is(in.target) || is(in.weight) || is(in.companion) || is(in.sample_weight) || is(in.divisor);
}

template <class Is>
bool any_of(const Inputs& in, const Options& options, const Is& is) {
  return any_of(in, is) || std::any_of(options.tensors.begin(), options.tensors.end(),
                                       [&](const at::Tensor& number) { return number.defined() && is(number); });
}

Outputs outputs_autograd(const Inputs& inputs, const Options& given) {
  check(inputs, given);
  const bool forward_mode = any_of(inputs, given, [](const auto& tensor) { return has_tangent(tensor); });
  if (forward_mode || !is_supported(inputs, given)) return fallback(inputs, given);
  Options options = with_loss_type(inputs, given);
  const KernelInputs for_kernels(inputs, options);
  const bool graph = any_of(inputs, given, [](const auto& tensor) { return needs_graph(tensor); });
  if (!graph || !c10::GradMode::is_enabled()) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const auto [loss, lse, denominator] = forward(for_kernels(), options);
    if (!options.statistics) return {loss};
    Outputs outputs = outputs_of(loss, lse, denominator, inputs, options);
    correct_target_log_prob(outputs, inputs, options);
    return outputs;
  }
  if (options.inplace) options.inplace = is_eager(inputs.logits) && !are_of_a_leaf(inputs.logits);
  const Inputs in = for_kernels();
  const auto results =
      CrossEntropyFunction::apply(in.logits, in.target, in.weight, in.companion, in.sample_weight, in.divisor, options,
                                  fuse_backward(inputs, options), options.tensor(Options::kLogitScale));
  Outputs outputs;
  std::copy(results.begin(), results.end(), outputs.begin());
  if (options.statistics) correct_target_log_prob(outputs, inputs, options);
  return outputs;
}

}  // namespace

at::Tensor loss_autograd(const Inputs& inputs, const Options& options) { return outputs_autograd(inputs, options)[0]; }

namespace {

Results results_autograd(const Inputs& inputs, const Options& options) {
  return as_tuple(outputs_autograd(inputs, options));
}

BackwardResult backward_autograd(XENT_GRADIENTS, XENT_INPUTS, XENT_SAVED, XENT_OPTIONS, std::array<bool, 2> wanted) {
  const Others unpacked(others);
  const Options options = unpacked.options(integers, numbers);
  const Inputs inputs = unpacked.with(logits, target);
  const OptionalTensor statistics = unless_scalar(grad_statistics);
  if (has_tangent(grad_output) || has_tangent(statistics)) {
    // Function has no forward mode; but the gradients are linear in those of the results.
    const auto unpack = [](const at::Tensor& grad) {
      const auto [primal, tangent] = at::_unpack_dual(grad, 0);
      return std::make_pair(primal, tangent.defined() ? tangent : at::zeros_like(primal));
    };
    const auto [primal, tangent] = unpack(grad_output);
    std::pair<OptionalTensor, OptionalTensor> of_statistics;
    if (statistics) of_statistics = unpack(*statistics);
    auto [for_logits, for_target] =
        xent::backward({primal, of_statistics.first, lse, denominator}, inputs, options, wanted);
    const auto [logits_tangent, target_tangent] =
        xent::backward({tangent, of_statistics.second, lse, denominator}, inputs, options, wanted);
    if (wanted[0]) for_logits = at::_make_dual(for_logits, logits_tangent, 0);
    if (wanted[1]) for_target = at::_make_dual(for_target, target_tangent, 0);
    return {for_logits, for_target};
  }
  auto results = BackwardFunction::apply(grad_output, statistics, logits, target, inputs.weight, inputs.companion,
                                         inputs.sample_weight, inputs.divisor, lse, denominator, options, wanted,
                                         options.tensor(Options::kLogitScale));
  return {results[0], results[1]};
}

}  // namespace

TORCH_LIBRARY_IMPL(cross_entropy_ext, Autograd, m) {
  m.impl("cross_entropy", TORCH_FN((from_plain<at::Tensor, loss_autograd>)));
  m.impl("cross_entropy.weight", TORCH_FN((from_weighted<at::Tensor, loss_autograd>)));
  m.impl("general_cross_entropy", TORCH_FN((from_lists<at::Tensor, loss_autograd>)));
  m.impl("cross_entropy_with_stats", TORCH_FN((from_lists<Results, results_autograd>)));
  m.impl("_backward", &backward_autograd);
}

}  // namespace xent
