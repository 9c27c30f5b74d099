// Derivatives of cross entropy, of logits that are given or made by a layer.
//
// The loss saves its inputs and lse, never probabilities; the backward recomputes them from the logits. The backward is
// an operator with derivatives of its own: those of the composite, taken twice.
#include <ATen/SavedTensorHooks.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
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

#include <algorithm>
#include <cmath>
#include <iterator>
#include <utility>
#include <vector>

#include "denominator.h"
#include "operators.h"

namespace xent {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// ---- what a backward needs, through the context ---------------------------------------------------------------------

// Saved tensors: these two, and then the call's in the order of Slot.
enum Saved : size_t { kSavedLse, kSavedDenominator, kSavedSlots };

void save(AutogradContext* ctx, at::TensorList slots, at::Tensor lse, at::Tensor denominator) {
  variable_list saved{std::move(lse), std::move(denominator)};
  saved.insert(saved.end(), slots.begin(), slots.end());
  ctx->save_for_backward(std::move(saved));
}

// Writes one entry of three numbers for a loss that PyTorch has, too: a tuple has room for these, and more would cost
// allocations and lookups. Other options take two lists.
void save_options(AutogradContext* ctx, const Options& options) {
  const auto integers = options.integers();
  if (options.is_plain() && options.chunk == 0) {
    const auto [reduction, ignore_index, loss_dtype, flags, class_begin, total_classes] = integers;
    ctx->saved_data["options"] =
        std::make_tuple(reduction | (loss_dtype + 1) << 8 | flags << 16, ignore_index, options.label_smoothing);
    return;
  }
  const auto numbers = options.numbers();
  std::vector<int64_t> saved(integers.begin(), integers.end());
  saved.push_back(options.chunk);
  ctx->saved_data["integers"] = std::move(saved);
  ctx->saved_data["numbers"] = std::vector<double>(numbers.begin(), numbers.end());
}

Options saved_options(AutogradContext* ctx, std::vector<at::Tensor> tensors) {
  if (const auto plain = ctx->saved_data.find("options"); plain != ctx->saved_data.end()) {
    const auto [packed, ignore_index, label_smoothing] = plain->second.to<std::tuple<int64_t, int64_t, double>>();
    Options defaults;
    defaults.label_smoothing = label_smoothing;
    return Options::of({packed & 0xff, ignore_index, (packed >> 8 & 0xff) - 1, packed >> 16, 0, 0}, defaults.numbers());
  }
  std::vector<int64_t> integers = ctx->saved_data["integers"].toIntVector();
  const int64_t chunk = integers.back();
  integers.pop_back();
  Options options = Options::of(integers, ctx->saved_data["numbers"].toDoubleVector(), std::move(tensors));
  options.chunk = chunk;
  return options;
}

// Autograd is given the tensors that there are, and does not look into this list of all of them.
struct Arguments {
  variable_list all;

  variable_list present() const {
    variable_list defined;
    std::copy_if(all.begin(), all.end(), std::back_inserter(defined),
                 [](const auto& tensor) { return tensor.defined(); });
    return defined;
  }
};

// Returns the place of an argument among those that there are.
size_t place_of(size_t argument, at::TensorList all) {
  return size_t(std::count_if(all.begin(), all.begin() + std::ptrdiff_t(argument),
                              [](const auto& tensor) { return tensor.defined(); }));
}

// Returns the gradients of the arguments that there are, and none for the `others` arguments of a function.
variable_list gradients_of_present(const variable_list& gradients, at::TensorList all, size_t others) {
  variable_list result;
  result.reserve(all.size() + others);
  for (size_t i = 0; i < all.size(); ++i) {
    if (all[i].defined()) result.push_back(gradients[i]);
  }
  result.resize(result.size() + others);
  return result;
}

bool has_tangent(const at::Tensor& tensor) { return tensor.defined() && tensor._fw_grad(0).defined(); }
bool needs_graph(const at::Tensor& tensor) { return tensor.defined() && tensor.requires_grad(); }

// Returns a node of its own for each tensor that is to be differentiated: other paths that lead from one to another do
// not belong to this function.
at::Tensor own_node(const at::Tensor& tensor) { return tensor.view_as(tensor); }

// d loss / d w_c = sum over positions of q'_c (lse - x_c), for probabilities q'. A probability of zero adds nothing,
// even at a logit of -inf.
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
  return (positions.empty() ? terms : terms.sum(positions)).to(in.weight.scalar_type());
}

// ---- the backward and its derivatives -------------------------------------------------------------------------------

struct BackwardFunction : torch::autograd::Function<BackwardFunction> {
  static constexpr bool is_traceable = true;

  // Tensors of the backward: these, and then the call's in the order of Slot.
  enum Argument : size_t { kGradOutput, kGradStatistics, kLse, kDenominatorOfMean, kFirstSlot };

  static variable_list forward(AutogradContext* ctx, at::TensorList /*present*/, const Arguments& arguments,
                               const Options& options, std::array<bool, 2> wanted) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const at::TensorList tensors = arguments.all;
    const auto [grad_logits, grad_target] =
        xent::backward({tensors[kGradOutput], tensors[kGradStatistics], tensors[kLse], tensors[kDenominatorOfMean]},
                       inputs_of(tensors.slice(kFirstSlot)), options, wanted);
    variable_list saved = arguments.all;
    saved[kLse].reset();
    saved[kDenominatorOfMean].reset();
    ctx->save_for_backward(std::move(saved));
    save_options(ctx, options);
    ctx->saved_data["wanted"] = std::make_tuple(wanted[0], wanted[1]);
    return {grad_logits, grad_target};
  }

  // Differentiates the composite as this function did, and the result once more.
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const bool again = c10::GradMode::is_enabled();
    const at::AutoGradMode with_graph(true);
    variable_list given, inputs;
    std::vector<size_t> places;
    for (size_t i = 0; i < saved.size(); ++i) {
      const bool is_number = i >= size_t{kFirstSlot} + kFirstNumber, requires_grad = needs_graph(saved[i]);
      const bool differentiable = saved[i].defined() && saved[i].is_floating_point() && (!is_number || requires_grad);
      given.push_back(!differentiable ? saved[i]
                      : requires_grad ? own_node(saved[i])
                                      : saved[i].detach().requires_grad_());
      if (!differentiable) continue;
      inputs.push_back(given.back());
      places.push_back(i);
    }
    const at::TensorList slots = at::TensorList(given).slice(kFirstSlot);
    Options options = saved_options(ctx, numbers_of(slots));
    TORCH_CHECK_NOT_IMPLEMENTED(!options.is_shard(),
                                "cross_entropy_ext::_backward: of a shard of the classes it has no derivative");
    const Inputs in = inputs_of(slots);
    const at::Tensor &grad_output = given[kGradOutput], &grad_statistics = given[kGradStatistics];
    options.statistics = grad_statistics.defined();
    if (!options.loss_dtype) options.loss_dtype = grad_output.scalar_type();
    const Outputs outputs = composite(in, options);
    variable_list results{outputs.loss}, of_results{grad_output};
    if (options.statistics) {
      for (const auto& [row, result] : {std::pair(kGradLse, outputs.lse),
                                        {kGradTargetLogProb, outputs.target_log_prob},
                                        {kGradEntropy, outputs.entropy}}) {
        results.push_back(result);
        of_results.push_back(grad_statistics[row].view_symint(result.sym_sizes()));
      }
    }
    const auto [logits_wanted, target_wanted] = ctx->saved_data["wanted"].to<std::tuple<bool, bool>>();
    variable_list firsts, of_firsts;
    const auto differentiate = [&](const at::Tensor& input, const at::Tensor& grad) {
      if (!grad.defined() || grad.sym_sizes() != input.sym_sizes()) return;
      firsts.push_back(
          torch::autograd::grad(results, {input}, of_results, /*retain_graph=*/true, /*create_graph=*/true)[0]);
      of_firsts.push_back(grad);
    };
    if (logits_wanted) differentiate(in.logits, grads[0]);
    if (target_wanted) differentiate(in.differentiable_target(options), grads[1]);

    variable_list result(saved.size());
    variable_list present = saved;
    present[kLse] = present[kDenominatorOfMean] = grad_output;  // which were not saved
    if (firsts.empty() || inputs.empty()) return gradients_of_present(result, present, 3);
    const auto seconds = torch::autograd::grad(firsts, inputs, of_firsts, /*retain_graph=*/again,
                                               /*create_graph=*/again, /*allow_unused=*/true);
    for (size_t i = 0; i < seconds.size(); ++i) result[places[i]] = seconds[i];
    return gradients_of_present(result, present, 3);
  }
};

// ---- the gradient in the logits' place ------------------------------------------------------------------------------

// Returns true if every element has an address of its own: strides in increasing order each step past all that is
// below.
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

// Returns true if the gradient may overwrite the logits, which it may not
//   - while a graph of the backward is being built, which needs the logits again;
//   - under tracing, where the compiler plans memory, and for batched gradients, which have no storage;
//   - if the logits are a view with arithmetic of its own (neg), or an inference tensor;
//   - if they overlap themselves, or another tensor that is read;
//   - for pairs, whose kernel looks logits up after it has written.
bool can_overwrite(const Inputs& in, const at::Tensor& grad_output, const Options& options) {
  const at::Tensor& logits = in.logits;
  if (c10::GradMode::is_enabled() || !is_eager(logits) || !is_eager(grad_output)) return false;
  if (logits.is_neg() || logits.is_inference() || !has_distinct_addresses(logits)) return false;
  for (const at::Tensor* read :
       {&grad_output, &in.target, &in.weight, &in.companion, &in.sample_weight, &in.denominator}) {
    if (read->defined() && read->is_alias_of(logits)) return false;
  }
  return options.target_kind != TargetKind::kPairs;
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

// ---- the gradient in the forward ------------------------------------------------------------------------------------

bool scale_needs_graph(const Options& options) { return needs_graph(options.tensor(&Numbers::logit_scale)); }

// Returns true if the gradient is computed in the forward, while the logits are in registers or caches: only if no
// input but the logits, or the layer that makes them, requires one. float16 comes with a loss scale, which the gradient
// for a grad_output of one lacks. Logits that are given have more conditions: `inplace` is off, execution is eager, and
// there are no hooks on saved tensors, which are there to save memory.
bool fuse_backward(const Inputs& in, const Options& options) {
  if (options.statistics || needs_graph(in.target) || needs_graph(in.companion)) return false;
  if (in.has_layer()) return options.reduction != kNone && in.layer.input.scalar_type() != at::kHalf;
  return !options.inplace && options.tensors.empty() && needs_graph(in.logits) && !needs_graph(in.weight) &&
         in.logits.scalar_type() != at::kHalf && is_eager(in.logits) && fusing_pays(in.logits, options.reduction) &&
         !at::SavedTensorDefaultHooks::get_hooks();
}

// Returns true if a gradient for a grad_output of one can be scaled to another: not where it has been rounded to few
// bits, unless only its exponent changes; nor enlarged, for its smallest elements have lost bits or become zero; nor by
// NaN, which ignored positions do not take.
bool can_scale(at::ScalarType type, double scale) {
  if (scale == 1) return true;
  int exponent;
  const bool power_of_two = std::abs(std::frexp(scale, &exponent)) == 0.5;
  return std::abs(scale) <= 1 && type != at::kHalf && (type != at::kBFloat16 || power_of_two);
}

// Gradients of the layer that are computed: logit_scale's is made of those of the input and the bias.
std::array<bool, 3> wanted_of(const Layer& layer, const Options& options) {
  const bool of_scale = scale_needs_graph(options);
  return {of_scale || needs_graph(layer.input), needs_graph(layer.weight),
          layer.bias.defined() && (of_scale || needs_graph(layer.bias))};
}

// Entries of the context for gradients that the forward has made: one of logits, or three of a layer. Each by itself,
// since compilers of backwards look for tensors here, and not for lists of them.
constexpr const char* kMade[] = {"grad_logits", "grad_linear_weight", "grad_linear_bias"};

// Takes the gradients that the forward has made, or makes them again. They are given away once, since the receiver may
// write to them; a second backward has them made again in the same way, and gets the same bits.
variable_list fused_gradients(AutogradContext* ctx, const Inputs& inputs, const Options& options) {
  if (ctx->saved_data.count(kMade[0]) && !ctx->saved_data[kMade[0]].isNone()) {
    variable_list made;
    for (const char* const name : kMade) {
      if (ctx->saved_data.count(name)) made.push_back(std::exchange(ctx->saved_data[name], at::IValue()).toTensor());
    }
    return made;
  }
  if (!inputs.has_layer()) return {std::get<3>(forward_backward(inputs, options))};
  auto [loss, of_input, of_weight, of_bias] = layer_forward_backward(inputs, options, wanted_of(inputs.layer, options));
  return {of_input, of_weight, of_bias};
}

// Returns the gradients of lse, target_log_prob and entropy, which follow that of the loss in `grads`, as a backward
// takes them; undefined where there are none.
at::Tensor gradients_of_statistics(at::TensorList grads, const at::Tensor& lse) {
  variable_list rows;
  bool any = false;
  for (size_t i = 1; i <= 3 && i < grads.size(); ++i) {
    any |= grads[i].defined();
    rows.push_back(grads[i].defined() ? grads[i].reshape({-1}).to(lse.scalar_type())
                                      : at::zeros_like(lse.select(0, 0)));
  }
  return any ? at::stack(rows) : at::Tensor();
}

// ---- the loss -------------------------------------------------------------------------------------------------------

struct CrossEntropyFunction : torch::autograd::Function<CrossEntropyFunction> {
  static constexpr bool is_traceable = true;

  static variable_list forward(AutogradContext* ctx, at::TensorList /*present*/, const Arguments& arguments,
                               const Options& options, bool fuse) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const at::TensorList slots = arguments.all;
    const Inputs inputs = inputs_of(slots);
    save_options(ctx, options);
    // Hooks may lose precision, which lse cannot spare: the backward makes it anew, from the tensors that they return.
    const bool hooked = at::SavedTensorDefaultHooks::get_hooks() && is_eager(slots[kLogits]);
    at::Tensor loss, lse, denominator;
    if (!inputs.has_layer() && fuse) {
      std::tie(loss, lse, denominator, ctx->saved_data[kMade[0]]) = forward_backward(inputs, options);
    } else if (fuse && !hooked) {
      variable_list made(3);
      std::tie(loss, made[0], made[1], made[2]) =
          layer_forward_backward(inputs, options, wanted_of(inputs.layer, options));
      for (size_t i = 0; i < made.size(); ++i) ctx->saved_data[kMade[i]] = made[i];
    } else {
      std::tie(loss, lse, denominator) = xent::forward(inputs, options);
    }
    if (inputs.has_layer()) ctx->saved_data["fused"] = fuse;
    const bool without_lse = hooked || (inputs.has_layer() && fuse);
    save(ctx, slots, without_lse ? at::Tensor() : lse, without_lse ? at::Tensor() : denominator);
    if (!options.statistics) return {loss};
    ctx->set_materialize_grads(false);
    const Outputs outputs = outputs_of(loss, lse, denominator, inputs, options);
    ctx->mark_non_differentiable({outputs.z_loss, outputs.argmax});
    return outputs.list(true);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const at::TensorList slots = at::TensorList(saved).slice(kSavedSlots);
    const Options options = saved_options(ctx, numbers_of(slots));
    const bool graph = c10::GradMode::is_enabled();
    if (graph && slots.size() > kLayerWeight && slots[kLayerWeight].defined()) {
      return gradients_of_present(through_all_logits(slots, options, grads), slots, 3);
    }
    // Nothing is differentiated again: past one turn of the dispatcher.
    std::optional<at::AutoDispatchBelowADInplaceOrView> below;
    if (!graph && std::none_of(grads.begin(), grads.end(), has_tangent)) below.emplace();
    const Inputs inputs = inputs_of(slots);
    const at::Tensor &lse = saved[kSavedLse], &denominator = saved[kSavedDenominator];
    variable_list result(kSlots);
    if (inputs.has_layer()) {
      of_layer(ctx, result, grads, inputs, options, lse, denominator);
    } else {
      const auto wanted = [&](Slot slot) {
        return slot < slots.size() && slots[slot].defined() && ctx->needs_input_grad(place_of(slot, slots));
      };
      of_logits(ctx, result, grads, inputs, options, lse, denominator, wanted);
    }
    return gradients_of_present(result, slots, 3);
  }

 private:
  // lse and the denominator once more, where the forward left them out.
  static void find_lse(at::Tensor& lse, at::Tensor& denominator, const Inputs& inputs, const Options& options) {
    const at::AutoDispatchBelowADInplaceOrView below;
    std::tie(std::ignore, lse, denominator) = xent::forward(inputs, options);
  }

  // What a backward is given for these gradients of the results; nothing if none of them is there.
  static std::optional<Gradients> gradients_for(const variable_list& grads, const Inputs& inputs,
                                                const Options& options, const at::Tensor& lse,
                                                const at::Tensor& denominator) {
    Gradients gradients{grads[0], gradients_of_statistics(grads, lse), lse, denominator};
    if (gradients.grad_output.defined()) return gradients;
    if (!gradients.grad_statistics.defined()) return std::nullopt;
    const auto shape = options.reduction == kNone ? shape_of_positions(inputs.logits) : c10::SymDimVector();
    gradients.grad_output = at::zeros_symint(shape, inputs.logits.options().dtype(*options.loss_dtype));
    gradients.denominator = at::ones_like(denominator);  // the loss's mean may be undefined
    return gradients;
  }

  template <class Wanted>
  static void of_logits(AutogradContext* ctx, variable_list& result, const variable_list& grads, const Inputs& inputs,
                        const Options& options, at::Tensor lse, at::Tensor denominator, const Wanted& is_wanted) {
    if (!lse.defined()) find_lse(lse, denominator, inputs, options);
    const at::Tensor& logits = inputs.logits;
    const Slot target = options.target_kind == TargetKind::kPairs ? kCompanion : kTarget;
    const bool wanted_logits = is_wanted(kLogits), wanted_target = is_wanted(target),
               wanted_weight = is_wanted(kWeight);
    const bool wanted_scale = scale_needs_graph(options);
    const std::optional<Gradients> given = gradients_for(grads, inputs, options, lse, denominator);
    if (!given) return;
    Gradients gradients = *given;
    const at::Tensor& grad = gradients.grad_output;

    const bool fused = ctx->saved_data.count(kMade[0]);
    if (fused && wanted_logits && !c10::GradMode::is_enabled() && is_eager(grad)) {
      if (adapts_gradient(logits)) {
        const at::IValue made = std::exchange(ctx->saved_data[kMade[0]], at::IValue());
        if (!made.isNone()) {
          result[kLogits] = made.toTensor();
          return adapt_gradient_(gradients, inputs, options, result[kLogits]);
        }
      } else {
        const bool is_float = grad.is_cpu() && grad.scalar_type() == at::kFloat;  // read without the dispatcher's help
        const double scale = is_float ? double(*grad.const_data_ptr<float>()) : grad.item<double>();
        if (can_scale(logits.scalar_type(), scale)) {
          result[kLogits] = fused_gradients(ctx, inputs, options)[0];
          if (scale != 1) result[kLogits].mul_(scale);
          return;
        }
      }
    }
    if (fused) {
      ctx->saved_data[kMade[0]] = at::IValue();  // of no use: free it
      if (lse.sym_numel() == 0) find_lse(gradients.lse, denominator, inputs, options);
    }
    if (wanted_weight) result[kWeight] = weight_gradient(grad, inputs, denominator, options);
    if (wanted_logits && options.inplace && !wanted_scale && can_overwrite(inputs, grad, options)) {
      const at::AutoDispatchBelowADInplaceOrView below;
      logits.unsafeGetTensorImpl()->bump_version();  // other functions that saved the logits learn that they are gone
      const at::Tensor made = backward_(gradients, inputs, options, wanted_target);
      result[kLogits] = logits.detach();
      if (wanted_target) result[target] = made;
    } else if (wanted_logits || wanted_target || wanted_scale) {
      const auto [for_logits, for_target] =
          xent::backward(gradients, inputs, options, {wanted_logits || wanted_scale, wanted_target});
      if (wanted_logits) result[kLogits] = for_logits;
      if (wanted_scale) set_gradient_of_scale(result, sum_of_products(for_logits, logits), options);
      if (wanted_target) result[target] = for_target;
    }
  }

  static void of_layer(AutogradContext* ctx, variable_list& result, const variable_list& grads, const Inputs& inputs,
                       const Options& options, at::Tensor lse, at::Tensor denominator) {
    if (ctx->saved_data["fused"].toBool()) {
      const at::AutoDispatchBelowADInplaceOrView below;
      const at::Tensor& grad = grads[0];
      const double scale = grad.is_cpu() && is_eager(grad) ? grad.item<double>() : 1;
      if (std::isfinite(scale)) {
        variable_list made = fused_gradients(ctx, inputs, options);
        const bool traced = !is_eager(grad) || !is_eager(made[0]);
        for (at::Tensor& gradient : made) {
          if (traced) {
            gradient = gradient * grad;
          } else if (!grad.is_cpu() || scale != 1) {
            gradient.mul_(grad);
          }
        }
        return set_gradients(result, made[0], made[1], made[2], inputs, options);
      }
    }
    if (!lse.defined())
      find_lse(lse, denominator, inputs, options);  // or a scale of which ignored positions take nothing
    const std::optional<Gradients> gradients = gradients_for(grads, inputs, options, lse, denominator);
    if (!gradients) return;
    const auto wanted = wanted_of(inputs.layer, options);
    const bool wanted_target = needs_graph(inputs.differentiable_target(options));
    const auto [of_input, of_weight, of_bias, of_target] =
        layer_backward(*gradients, inputs, options, {wanted[0], wanted[1], wanted[2], wanted_target});
    set_gradients(result, of_input, of_weight, of_bias, inputs, options);
    if (wanted_target) result[options.target_kind == TargetKind::kPairs ? kCompanion : kTarget] = of_target;
  }

  static void set_gradients(variable_list& result, const at::Tensor& of_input, const at::Tensor& of_weight,
                            const at::Tensor& of_bias, const Inputs& inputs, const Options& options) {
    const Layer& layer = inputs.layer;
    if (needs_graph(layer.input)) result[kLogits] = of_input;
    if (needs_graph(layer.weight)) result[kLayerWeight] = of_weight;
    if (needs_graph(layer.bias)) result[kLayerBias] = of_bias;
    if (!scale_needs_graph(options)) return;
    at::Tensor sum = sum_of_products(of_input, layer.input);
    if (layer.bias.defined()) sum = sum + sum_of_products(of_bias, layer.bias);
    set_gradient_of_scale(result, sum, options);
  }

  static void set_gradient_of_scale(variable_list& result, const at::Tensor& sum, const Options& options) {
    const at::Tensor& scale = options.tensor(&Numbers::logit_scale);
    for (size_t i = 0; i < kNumbers; ++i) {
      if (kNumberOptions[i].value == &Numbers::logit_scale) result[kFirstNumber + i] = scale_gradient(sum, scale);
    }
  }

  // A layer's backward with a graph of its own.
  static variable_list through_all_logits(at::TensorList slots, Options options, const variable_list& grads) {
    variable_list given, inputs;
    std::vector<size_t> places;
    for (size_t i = 0; i < slots.size(); ++i) {
      given.push_back(needs_graph(slots[i]) ? own_node(slots[i]) : slots[i]);
      if (!needs_graph(slots[i])) continue;
      inputs.push_back(given.back());
      places.push_back(i);
    }
    if (!options.tensors.empty()) options.tensors = numbers_of(given);
    const variable_list outputs = composite(inputs_of(given).with_logits(), options).list(options.statistics);
    variable_list of, for_outputs;
    for (size_t i = 0; i < grads.size() && i < 4; ++i) {
      if (!grads[i].defined()) continue;
      of.push_back(outputs[i]);
      for_outputs.push_back(grads[i]);
    }
    variable_list result(kSlots);
    if (of.empty() || inputs.empty()) return result;
    const auto made = torch::autograd::grad(of, inputs, for_outputs, /*retain_graph=*/true, /*create_graph=*/true,
                                            /*allow_unused=*/true);
    for (size_t i = 0; i < made.size(); ++i) result[places[i]] = made[i];
    return result;
  }
};

template <class Is>
bool any_of(const Inputs& in, const Options& options, const Is& is) {
  return is(in.logits) || is(in.target) || is(in.weight) || is(in.companion) || is(in.sample_weight) ||
         is(in.denominator) || is(in.layer.input) || is(in.layer.weight) || is(in.layer.bias) ||
         std::any_of(options.tensors.begin(), options.tensors.end(), is);
}

}  // namespace

Outputs loss_autograd(const Inputs& given, const Options& asked) {
  check(given, asked);
  if (any_of(given, asked, has_tangent) || !is_supported(given, asked)) return fallback(given, asked);
  Options options = with_loss_type(given, asked);
  const bool weighted = has_two_denominators(given, options);
  const Inputs own = weighted ? for_kernels(given, options) : Inputs();
  const Inputs& inputs = weighted ? own : given;
  if (!c10::GradMode::is_enabled() || !any_of(given, asked, needs_graph)) {
    const at::AutoDispatchBelowADInplaceOrView below;
    auto [loss, lse, denominator] = forward(inputs, options);
    if (!options.statistics) return Outputs::only(std::move(loss));
    Outputs outputs = outputs_of(loss, lse, denominator, given, options);
    correct_target_log_prob(outputs, given, options);
    return outputs;
  }
  if (options.inplace) options.inplace = is_eager(given.logits) && !are_of_a_leaf(given.logits);
  const Arguments arguments{to_slots(inputs, options)};
  const variable_list present = arguments.present();
  Outputs outputs = Outputs::of(
      CrossEntropyFunction::apply(at::TensorList(present), arguments, options, fuse_backward(given, options)));
  if (options.statistics) correct_target_log_prob(outputs, given, options);
  return outputs;
}

namespace {

BackwardResult backward_autograd(const Gradients& gradients, const Inputs& inputs, const Options& options,
                                 std::array<bool, 2> wanted) {
  if (has_tangent(gradients.grad_output) || has_tangent(gradients.grad_statistics)) {
    // Function has no forward mode; but the gradients are linear in those of the results.
    const auto unpack = [](const at::Tensor& grad) {
      if (!grad.defined()) return std::pair(at::Tensor(), at::Tensor());
      const auto [primal, tangent] = at::_unpack_dual(grad, 0);
      return std::pair(primal, tangent.defined() ? tangent : at::zeros_like(primal));
    };
    const auto [primal, tangent] = unpack(gradients.grad_output);
    const auto [primal_of_statistics, tangent_of_statistics] = unpack(gradients.grad_statistics);
    const auto [for_logits, for_target] =
        xent::backward({primal, primal_of_statistics, gradients.lse, gradients.denominator}, inputs, options, wanted);
    const auto [logits_tangent, target_tangent] =
        xent::backward({tangent, tangent_of_statistics, gradients.lse, gradients.denominator}, inputs, options, wanted);
    return {wanted[0] ? at::_make_dual(for_logits, logits_tangent, 0) : for_logits,
            wanted[1] ? at::_make_dual(for_target, target_tangent, 0) : for_target};
  }
  Arguments arguments{{gradients.grad_output, gradients.grad_statistics, gradients.lse, gradients.denominator}};
  const variable_list slots = to_slots(inputs, options);
  arguments.all.insert(arguments.all.end(), slots.begin(), slots.end());
  const variable_list present = arguments.present();
  const auto results = BackwardFunction::apply(at::TensorList(present), arguments, options, wanted);
  return {results[0], results[1]};
}

}  // namespace

TORCH_LIBRARY_IMPL(cross_entropy_ext, Autograd, m) {
  m.impl("_backward", &Adapter<&backward_autograd, /*meta=*/true>::call);
}

}  // namespace xent
