// The operators of linear and cross entropy: their schemas, the kernels that belong to no device, and derivatives.
#include "linear.h"

#include <ATen/SavedTensorHooks.h>
#include <ATen/TensorOperators.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <cmath>
#include <utility>
#include <vector>

#include "host/dispatch.h"

namespace xent::linear {

at::Tensor logits_placeholder(const Layer& layer) {
  c10::SymDimVector shape(layer.weight.sym_sizes());
  shape.pop_back();
  shape.insert(shape.begin(), layer.input.sym_size(0));
  return at::empty({}, layer.input.options().layout(at::kStrided)).expand_symint(shape);
}

at::Tensor logits_of(const Layer& layer) {
  const auto& weight = layer.weight;
  OptionalTensor bias;
  if (has_value(layer.bias)) bias = layer.bias->reshape({-1});
  const at::Tensor logits = at::linear(layer.input, weight.flatten(0, -2), bias);
  // A trace would keep the sizes as they are here.
  return weight.dim() == 2 ? logits : logits.view_symint(logits_placeholder(layer).sym_sizes());
}

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Variable;
using torch::autograd::variable_list;

// ---- the operators, for callers in C++ ------------------------------------------------------------------------------

template <class Signature, class... Arguments>
auto call(const c10::TypedOperatorHandle<Signature>& op, const Layer& layer, const Inputs& in, const Options& options,
          Arguments&&... arguments) {
  return op.call(layer.input, layer.weight, as_list({layer.bias}), in.target, Others::of(in, options),
                 options.integers(), options.numbers(), std::forward<Arguments>(arguments)...);
}

}  // namespace

at::Tensor loss(const Layer& layer, const Inputs& in, const Options& options, int64_t chunk) {
  static const auto op = find_operator<schema::Loss>("cross_entropy_ext::linear_cross_entropy");
  return call(op, layer, in, options, chunk);
}

Results loss_with_stats(const Layer& layer, const Inputs& in, const Options& options, int64_t chunk) {
  static const auto op = find_operator<schema::WithStats>("cross_entropy_ext::linear_cross_entropy_with_stats");
  return call(op, layer, in, options, chunk);
}

ForwardResult forward(const Layer& layer, const Inputs& in, const Options& options, int64_t chunk) {
  static const auto op = find_operator<schema::Forward>("cross_entropy_ext::_linear_forward");
  return call(op, layer, in, options, chunk);
}

ForwardBackwardResult forward_backward(const Layer& layer, const Inputs& in, const Options& options, int64_t chunk,
                                       std::array<bool, 3> wanted) {
  static const auto op = find_operator<schema::ForwardBackward>("cross_entropy_ext::_linear_forward_backward");
  return call(op, layer, in, options, chunk, wanted);
}

BackwardResult backward(const Layer& layer, const Gradients& gradients, const Inputs& in, const Options& options,
                        int64_t chunk, std::array<bool, 4> wanted) {
  static const auto op = find_operator<schema::Backward>("cross_entropy_ext::_linear_backward");
  return op.call(gradients.grad_output, gradients.statistics_or_scalar(), layer.input, layer.weight,
                 as_list({layer.bias}), in.target, Others::of(in, options), gradients.lse, gradients.denominator,
                 options.integers(), options.numbers(), chunk, wanted);
}

namespace {

// ---- what is done chunk by chunk, and what is not -------------------------------------------------------------------

// Whether the product is one that torch's matrix multiplication makes of these as they are, and the loss has a kernel.
bool is_supported(const Layer& layer, const Inputs& in, const Options& options) {
  const auto fits = [&](const at::Tensor& tensor) {
    return tensor.layout() == at::kStrided && tensor.device() == layer.input.device() &&
           tensor.scalar_type() == layer.input.scalar_type();
  };
  if (layer.input.layout() != at::kStrided || !fits(layer.weight)) return false;
  if (has_value(layer.bias) && !fits(*layer.bias)) return false;
  return xent::is_supported(in, options);
}

// With all the logits.
Outputs of_logits(const Layer& layer, const Inputs& in, const Options& options) {
  return composite({logits_of(layer), in.target, in.weight, in.companion, in.sample_weight, in.divisor}, options);
}

Outputs fallback_of(const Layer& layer, const Inputs& in, const Options& options) {
  return fallback({logits_of(layer), in.target, in.weight, in.companion, in.sample_weight, in.divisor}, options);
}

// As xent::correct_target_log_prob.
void correct(Outputs& outputs, const Layer& layer, const Inputs& in, const Options& options, int64_t chunk) {
  if (in.target_kind(options) != TargetKind::kProbabilities || (!has_value(in.weight) && options.label_smoothing == 0))
    return;
  const Options unweighted = options.without_weights(arithmetic_type(in, options));
  outputs[2] = -loss(layer, {in.logits, in.target, std::nullopt}, unweighted, chunk);
}

Outputs outputs_without_grad(const Layer& layer, const Inputs& in, const Options& options, int64_t chunk) {
  const auto [loss, lse, denominator] = forward(layer, KernelInputs(in, options)(), options, chunk);
  if (!options.statistics) return {loss};
  Outputs outputs = outputs_of(loss, lse, denominator, in, options);
  correct(outputs, layer, in, options, chunk);
  return outputs;
}

// ---- derivatives ----------------------------------------------------------------------------------------------------

// The tensors of a call, after they were saved.
struct Saved {
  at::Tensor input, weight, logits, target;
  OptionalTensor bias, class_weight, companion, sample_weight, divisor;
  Options options;
  int64_t chunk;

  // Those of the options among them.
  static constexpr size_t kNumbers = 8, kTensors = kNumbers + Options::kNumbers;

  static variable_list list(const Layer& layer, const Inputs& in, const Options& options) {
    const auto or_undefined = [](const OptionalTensor& tensor) { return tensor.value_or(at::Tensor()); };
    variable_list all{layer.input,
                      layer.weight,
                      or_undefined(layer.bias),
                      in.target,
                      or_undefined(in.weight),
                      or_undefined(in.companion),
                      or_undefined(in.sample_weight),
                      or_undefined(in.divisor)};
    all.insert(all.end(), options.tensors.begin(), options.tensors.end());
    all.resize(kTensors);
    return all;
  }

  static std::vector<at::Tensor> numbers(const variable_list& saved) {
    std::vector<at::Tensor> numbers(saved.begin() + kNumbers, saved.begin() + kTensors);
    const bool any = std::any_of(numbers.begin(), numbers.end(), [](const at::Tensor& one) { return one.defined(); });
    return any ? numbers : std::vector<at::Tensor>();
  }

  Saved(const variable_list& saved, const Options& options, int64_t chunk)
      : input(saved[0]),
        weight(saved[1]),
        target(saved[3]),
        bias(optional(saved[2])),
        class_weight(optional(saved[4])),
        companion(optional(saved[5])),
        sample_weight(optional(saved[6])),
        divisor(optional(saved[7])),
        options(options),
        chunk(chunk) {
    logits = logits_placeholder(layer());
  }

  Layer layer() const { return {input, weight, bias}; }
  Inputs inputs() const { return {logits, target, class_weight, companion, sample_weight, divisor}; }
};

// Returns true if the gradients are made together with the loss, while a chunk's logits are in memory: for gradients of
// the layer alone. float16 comes with a loss scale, without which gradients may be too small for it.
bool fuse_backward(const Layer& layer, const Inputs& in, const Options& options) {
  const auto needs_none = [](const OptionalTensor& tensor) { return !has_value(tensor) || !tensor->requires_grad(); };
  return options.reduction != kNone && !options.statistics && !in.target.requires_grad() && needs_none(in.companion) &&
         layer.input.scalar_type() != at::kHalf;
}

bool scale_requires_grad(const Options& options) {
  const OptionalTensor scale = options.tensor(Options::kLogitScale);
  return scale && scale->requires_grad();
}

// Where the context keeps the gradients of input, weight and bias that the forward has made.
constexpr const char* kMade[] = {"grad_input", "grad_weight", "grad_bias"};

struct LossFunction : torch::autograd::Function<LossFunction> {
  static constexpr bool is_traceable = true;

  static variable_list forward(AutogradContext* ctx, const Variable& input, const Variable& linear_weight,
                               const OptionalTensor& linear_bias, const Variable& target, const OptionalTensor& weight,
                               const OptionalTensor& companion, const OptionalTensor& sample_weight,
                               const OptionalTensor& divisor, const Options& options, int64_t chunk, bool one_pass,
                               const OptionalTensor& /*logit_scale, of the options*/) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const Layer layer{input, linear_weight, linear_bias};
    const at::Tensor logits = logits_placeholder(layer);
    const Inputs inputs{logits, target, weight, companion, sample_weight, divisor};
    const auto integers = options.integers();
    const auto numbers = options.numbers();
    ctx->saved_data["integers"] = std::vector<int64_t>(integers.begin(), integers.end());
    ctx->saved_data["numbers"] = std::vector<double>(numbers.begin(), numbers.end());
    ctx->saved_data["chunk"] = chunk;
    variable_list saved = Saved::list(layer, inputs, options);
    // Hooks on saved tensors mean to save memory, and may lose precision: then the backward makes all of it anew.
    const bool hooked = at::SavedTensorDefaultHooks::get_hooks() && is_eager(input);
    if (one_pass && !hooked) {
      const auto wanted = wanted_of(layer, options);
      auto [loss, of_input, of_weight, of_bias] = linear::forward_backward(layer, inputs, options, chunk, wanted);
      // Each by itself: compilers of backwards look for tensors here, and not for lists of them.
      for (auto&& [name, gradient] : {std::pair(kMade[0], of_input), {kMade[1], of_weight}, {kMade[2], of_bias}}) {
        ctx->saved_data[name] = gradient;
      }
      ctx->save_for_backward(saved);
      return {loss};
    }
    const auto [loss, lse, denominator] = linear::forward(layer, inputs, options, chunk);
    if (!one_pass) {
      saved.push_back(hooked ? at::Tensor() : lse);
      saved.push_back(hooked ? at::Tensor() : denominator);
    }
    ctx->save_for_backward(saved);
    if (!options.statistics) return {loss};
    ctx->set_materialize_grads(false);
    const Outputs outputs = outputs_of(loss, lse, denominator, inputs, options);
    ctx->mark_non_differentiable({outputs[4], outputs[5]});
    return {outputs.begin(), outputs.end()};
  }

  static std::array<bool, 3> wanted_of(const Layer& layer, const Options& options) {
    const bool of_scale = scale_requires_grad(options);
    return {of_scale || layer.input.requires_grad(), layer.weight.requires_grad(),
            has_value(layer.bias) && (of_scale || layer.bias->requires_grad())};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list list = ctx->get_saved_variables();
    const Saved saved(list,
                      Options::of(ctx->saved_data["integers"].toIntVector(),
                                  ctx->saved_data["numbers"].toDoubleVector(), Saved::numbers(list)),
                      ctx->saved_data["chunk"].toInt());
    if (c10::GradMode::is_enabled()) return differentiable_backward(list, saved, grads);
    if (list.size() == Saved::kTensors) return scaled_gradients(ctx, saved, grads[0]);
    const at::Tensor &lse = list[Saved::kTensors], &denominator = list[Saved::kTensors + 1];
    if (lse.defined()) return recomputed_gradients(saved, lse, denominator, grads);
    const at::AutoDispatchBelowADInplaceOrView below;
    const auto [loss, lse_again, denominator_again] =
        linear::forward(saved.layer(), saved.inputs(), saved.options, saved.chunk);
    return recomputed_gradients(saved, lse_again, denominator_again, grads);
  }

 private:
  // One result for each argument of forward.
  static variable_list results(const at::Tensor& of_input, const at::Tensor& of_weight, const at::Tensor& of_bias,
                               const Saved& saved) {
    const auto needs_grad = [](const at::Tensor& tensor) { return tensor.defined() && tensor.requires_grad(); };
    variable_list result(12);
    if (needs_grad(saved.input)) result[0] = of_input;
    if (needs_grad(saved.weight)) result[1] = of_weight;
    if (saved.bias && needs_grad(*saved.bias)) result[2] = of_bias;
    if (scale_requires_grad(saved.options)) {
      at::Tensor sum = sum_of_products(of_input, saved.input);
      if (saved.bias) sum = sum + sum_of_products(of_bias, *saved.bias);
      result[11] = scale_gradient(sum, *saved.options.tensor(Options::kLogitScale));
    }
    return result;
  }

  // Those for a grad_output of one, as the forward made them, times grad_output. Given away once, since whoever gets
  // them may write to them; a second backward has them made again, in the same way, so that it gets the same bits.
  static variable_list scaled_gradients(AutogradContext* ctx, const Saved& saved, const at::Tensor& grad) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const Layer layer = saved.layer();
    const double scale = grad.is_cpu() && is_eager(grad) ? grad.item<double>() : 1;
    if (!std::isfinite(scale)) {  // of which ignored positions take nothing
      const auto [loss, lse, denominator] = linear::forward(layer, saved.inputs(), saved.options, saved.chunk);
      return recomputed_gradients(saved, lse, denominator, {grad});
    }
    variable_list made;
    if (!ctx->saved_data[kMade[0]].isNone()) {
      for (const char* const name : kMade) {
        made.push_back(std::exchange(ctx->saved_data[name], at::IValue()).toTensor());
      }
    } else {
      const auto [loss, of_input, of_weight, of_bias] =
          linear::forward_backward(layer, saved.inputs(), saved.options, saved.chunk, wanted_of(layer, saved.options));
      made = {of_input, of_weight, of_bias};
    }
    const bool traced = !is_eager(grad) || !is_eager(made[0]);
    if (traced || !grad.is_cpu() || scale != 1) {
      for (at::Tensor& gradient : made) {
        if (traced) {
          gradient = gradient * grad;
        } else {
          gradient.mul_(grad);
        }
      }
    }
    return results(made[0], made[1], made[2], saved);
  }

  static variable_list recomputed_gradients(const Saved& saved, const at::Tensor& lse, const at::Tensor& denominator,
                                            const variable_list& grads) {
    const Layer layer = saved.layer();
    const Inputs inputs = saved.inputs();
    const Options& options = saved.options;
    const OptionalTensor of_statistics = gradients_of_statistics(grads, lse);
    at::Tensor grad = grads[0], divide_by = denominator;
    if (!grad.defined()) {  // of the statistics alone
      if (!of_statistics) return variable_list(12);
      const auto shape = options.reduction == kNone ? shape_of_positions(saved.logits) : c10::SymDimVector();
      grad = at::zeros_symint(shape, saved.input.options().dtype(*options.loss_dtype));
      divide_by = at::ones_like(denominator);  // by which the loss's mean may be undefined
    }
    const bool pairs = options.target_kind == TargetKind::kPairs;
    const at::Tensor& probabilities = inputs.differentiable_target(options);
    const auto wanted = wanted_of(layer, options);
    const auto [of_input, of_weight, of_bias, of_target] =
        linear::backward(layer, {grad, of_statistics, lse, divide_by}, inputs, options, saved.chunk,
                         {wanted[0], wanted[1], wanted[2], probabilities.requires_grad()});
    variable_list result = results(of_input, of_weight, of_bias, saved);
    if (probabilities.requires_grad()) result[pairs ? 5 : 3] = of_target;
    return result;
  }

  // With a graph of its own: through all the logits.
  static variable_list differentiable_backward(const variable_list& list, const Saved& saved,
                                               const variable_list& grads) {
    variable_list given, inputs;
    std::vector<size_t> places;
    for (size_t place = 0; place < Saved::kTensors; ++place) {
      const at::Tensor& tensor = list[place];
      // Of each, a node of its own: whatever else leads from one to another is not this function's.
      const bool differentiable = tensor.defined() && tensor.requires_grad();
      given.push_back(differentiable ? tensor.view_as(tensor) : tensor);
      if (!differentiable) continue;
      inputs.push_back(given.back());
      places.push_back(place == Saved::kNumbers + Options::kLogitScale ? 11 : place);
    }
    Options options = saved.options;
    options.tensors = Saved::numbers(given);
    const Saved nodes(given, options, saved.chunk);
    const Outputs outputs = of_logits(nodes.layer(), nodes.inputs(), options);
    variable_list of, for_outputs;
    for (size_t i = 0; i < grads.size() && i < 4; ++i) {
      if (!grads[i].defined()) continue;
      of.push_back(outputs[i]);
      for_outputs.push_back(grads[i]);
    }
    variable_list result(12);
    if (of.empty() || inputs.empty()) return result;
    const auto made = torch::autograd::grad(of, inputs, for_outputs, /*retain_graph=*/true, /*create_graph=*/true,
                                            /*allow_unused=*/true);
    for (size_t i = 0; i < made.size(); ++i) result[places[i]] = made[i];
    return result;
  }
};

bool has_tangent(const at::Tensor& tensor) { return tensor.defined() && tensor._fw_grad(0).defined(); }

Outputs outputs_autograd(const Layer& layer, const Inputs& in, const Options& given, int64_t chunk) {
  check(in, given);
  const variable_list all = Saved::list(layer, in, given);
  const bool forward_mode = std::any_of(all.begin(), all.end(), has_tangent);
  if (forward_mode || !is_supported(layer, in, given)) return fallback_of(layer, in, given);
  const Options options = with_loss_type(in, given);
  const bool graph = c10::GradMode::is_enabled() && std::any_of(all.begin(), all.end(), [](const at::Tensor& tensor) {
                       return tensor.defined() && tensor.requires_grad();
                     });
  if (!graph) {
    const at::AutoDispatchBelowADInplaceOrView below;
    return outputs_without_grad(layer, in, options, chunk);
  }
  const KernelInputs for_kernels(in, options);
  const Inputs inputs = for_kernels();
  const auto results = LossFunction::apply(layer.input, layer.weight, layer.bias, inputs.target, inputs.weight,
                                           inputs.companion, inputs.sample_weight, inputs.divisor, options, chunk,
                                           fuse_backward(layer, in, options), options.tensor(Options::kLogitScale));
  Outputs outputs;
  std::copy(results.begin(), results.end(), outputs.begin());
  if (options.statistics) correct(outputs, layer, in, options, chunk);
  return outputs;
}

// ---- the operators' kernels -----------------------------------------------------------------------------------------

Outputs outputs_of_operator(const Layer& layer, const Inputs& in, const Options& options, int64_t chunk) {
  if (!options.statistics) return {loss(layer, in, options, chunk)};
  return std::apply([](const auto&... results) { return Outputs{results...}; },
                    loss_with_stats(layer, in, options, chunk));
}

using Function = Outputs(const Layer&, const Inputs&, const Options&, int64_t chunk);

Outputs outputs_default(const Layer& layer, const Inputs& in, const Options& options, int64_t chunk) {
  check(in, options);
  if (!is_supported(layer, in, options)) return fallback_of(layer, in, options);
  return outputs_without_grad(layer, in, with_loss_type(in, options), chunk);
}

// torch.func: vmap, grad, jvp and their compositions.
Outputs outputs_functorch(const Layer& layer, const Inputs& in, const Options& options, int64_t) {
  check(in, options);
  return fallback_of(layer, in, options);
}

// The layer in half precision, as autocast has linear; the loss float32.
template <c10::DeviceType device, c10::DispatchKey key>
Outputs outputs_autocast(const Layer& layer, const Inputs& in, const Options& given, int64_t chunk) {
  const c10::impl::ExcludeDispatchKeyGuard without_autocast(key);
  if (layer.input.device().type() != device) return outputs_of_operator(layer, in, given, chunk);
  const auto type = at::autocast::get_autocast_dtype(device);
  const auto cast = [&](const at::Tensor& tensor) { return at::autocast::cached_cast(type, tensor, device); };
  const at::Tensor input = cast(layer.input), linear_weight = cast(layer.weight);
  OptionalTensor bias;
  if (has_value(layer.bias)) bias = cast(*layer.bias);
  const Layer narrow{input, linear_weight, bias};
  const at::Tensor logits = logits_placeholder(narrow);
  const Inputs inputs{logits, in.target, in.weight, in.companion, in.sample_weight, in.divisor};
  const auto [weight, options] = with_wide_loss(inputs, given);
  return outputs_of_operator(narrow, {logits, in.target, weight, in.companion, in.sample_weight, in.divisor}, options,
                             chunk);
}

template <Function function>
at::Tensor loss_by(XENT_LAYER, XENT_OTHER_INPUTS, XENT_OPTIONS, int64_t chunk) {
  const OptionalTensor bias = element_of(linear_bias, 0);
  const Others unpacked(others);
  const Layer layer{input, linear_weight, bias};
  const at::Tensor logits = logits_placeholder(layer);
  return function(layer, unpacked.with(logits, target), unpacked.options(integers, numbers), chunk)[0];
}

template <Function function>
Results results_by(XENT_LAYER, XENT_OTHER_INPUTS, XENT_OPTIONS, int64_t chunk) {
  const OptionalTensor bias = element_of(linear_bias, 0);
  const Others unpacked(others);
  const Layer layer{input, linear_weight, bias};
  const at::Tensor logits = logits_placeholder(layer);
  return as_tuple(function(layer, unpacked.with(logits, target), unpacked.options(integers, numbers), chunk));
}

// ---- Meta: shapes and types -----------------------------------------------------------------------------------------

ForwardResult forward_meta(XENT_LAYER, XENT_OTHER_INPUTS, XENT_OPTIONS, int64_t) {
  const at::Tensor logits = logits_placeholder({input, linear_weight, std::nullopt});
  const Others unpacked(others);
  return xent::forward(unpacked.with(logits, target), unpacked.options(integers, numbers));
}

at::Tensor gradient_meta(const at::Tensor& tensor, bool wanted) {
  return wanted ? at::empty_symint(tensor.sym_sizes(), tensor.options()) : at::empty({0}, tensor.options());
}

at::Tensor gradient_of_bias_meta(const OptionalTensors& linear_bias, const at::Tensor& input, bool wanted) {
  return wanted ? gradient_meta(*element_of(linear_bias, 0), true) : at::empty({0}, input.options());
}

ForwardBackwardResult forward_backward_meta(XENT_LAYER, XENT_OTHER_INPUTS, XENT_OPTIONS, int64_t,
                                            std::array<bool, 3> wanted) {
  const auto loss_dtype = *Options::of(integers, numbers).loss_dtype;
  return {at::empty({}, input.options().dtype(loss_dtype)), gradient_meta(input, wanted[0]),
          gradient_meta(linear_weight, wanted[1]), gradient_of_bias_meta(linear_bias, input, wanted[2])};
}

BackwardResult backward_meta(XENT_GRADIENTS, XENT_LAYER, XENT_OTHER_INPUTS, XENT_SAVED, XENT_OPTIONS, int64_t,
                             std::array<bool, 4> wanted) {
  const Others unpacked(others);
  const Inputs inputs = unpacked.with(input, target);
  return {gradient_meta(input, wanted[0]), gradient_meta(linear_weight, wanted[1]),
          gradient_of_bias_meta(linear_bias, input, wanted[2]),
          gradient_meta(inputs.differentiable_target(Options::of(integers, numbers)), wanted[3])};
}

static_assert(std::is_same_v<decltype(loss_by<outputs_default>), schema::Loss>);
static_assert(std::is_same_v<decltype(results_by<outputs_default>), schema::WithStats>);
static_assert(std::is_same_v<decltype(forward_meta), schema::Forward>);
static_assert(std::is_same_v<decltype(forward_backward_meta), schema::ForwardBackward>);
static_assert(std::is_same_v<decltype(backward_meta), schema::Backward>);

template <Function function>
void register_function(torch::Library& m) {
  m.impl("linear_cross_entropy", &loss_by<function>);
  m.impl("linear_cross_entropy_with_stats", &results_by<function>);
}

}  // namespace

// ---- registration ---------------------------------------------------------------------------------------------------

TORCH_LIBRARY_FRAGMENT(cross_entropy_ext, m) {
  const std::string layer = "Tensor input, Tensor linear_weight, Tensor?[] linear_bias, ";
  const std::string inputs = "Tensor target, Tensor?[] others, ";
  const std::string options = "int[] integers, float[] numbers, int chunk";
  const std::string gradients = "Tensor grad_input, Tensor grad_linear_weight, Tensor grad_linear_bias";
  const auto define = [&m](const std::string& schema) { m.def(schema.c_str()); };
  define("linear_cross_entropy(" + layer + inputs + options + ") -> Tensor");
  define("linear_cross_entropy_with_stats(" + layer + inputs + options +
         ") -> (Tensor loss, Tensor lse, Tensor target_log_prob, Tensor entropy, Tensor z_loss, Tensor argmax)");
  define("_linear_forward(" + layer + inputs + options + ") -> (Tensor loss, Tensor lse, Tensor denominator)");
  define("_linear_forward_backward(" + layer + inputs + options + ", bool[3] wanted) -> (Tensor loss, " + gradients +
         ")");
  define("_linear_backward(Tensor grad_output, Tensor grad_statistics, " + layer + inputs +
         "Tensor lse, Tensor denominator, " + options + ", bool[4] wanted) -> (" + gradients + ", Tensor grad_target)");
}

TORCH_LIBRARY_IMPL(cross_entropy_ext, CompositeExplicitAutograd, m) { register_function<outputs_default>(m); }
TORCH_LIBRARY_IMPL(cross_entropy_ext, Autograd, m) { register_function<outputs_autograd>(m); }
TORCH_LIBRARY_IMPL(cross_entropy_ext, FuncTorchDynamicLayerFrontMode, m) { register_function<outputs_functorch>(m); }

TORCH_LIBRARY_IMPL(cross_entropy_ext, AutocastCPU, m) {
  register_function<outputs_autocast<c10::kCPU, c10::DispatchKey::AutocastCPU>>(m);
}

TORCH_LIBRARY_IMPL(cross_entropy_ext, AutocastCUDA, m) {
  register_function<outputs_autocast<c10::kCUDA, c10::DispatchKey::AutocastCUDA>>(m);
}

TORCH_LIBRARY_IMPL(cross_entropy_ext, Meta, m) {
  m.impl("_linear_forward", &forward_meta);
  m.impl("_linear_forward_backward", &forward_backward_meta);
  m.impl("_linear_backward", &backward_meta);
}

}  // namespace xent::linear
