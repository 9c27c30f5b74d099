// The operator cross_entropy_ext::nll_loss: its schema, the kernels that belong to no device, and its derivatives.
#include "nll_loss.h"

#include <ATen/SavedTensorHooks.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/_make_dual.h>
#include <ATen/ops/_unpack_dual.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/nll_loss_nd.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "host/composite.h"
#include "host/dispatch.h"

namespace xent::nll {

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Variable;
using torch::autograd::variable_list;

// ---- the operators, for callers in C++ ------------------------------------------------------------------------------

c10::DispatchKeySet keys_of(XENT_NLL_INPUTS) {
  const c10::DispatchKeySet keys = input.key_set() | target.key_set();
  return weight.defined() ? keys | weight.key_set() : keys;
}

ForwardResult forward(XENT_NLL_INPUTS, XENT_NLL_OPTIONS, at::ScalarType loss_dtype) {
  if (first_key(keys_of(input, target, weight)) == c10::DispatchKey::CPU) {
    return cpu::forward(input, target, weight, reduction, ignore_index, loss_dtype);
  }
  static const auto op = find_operator<schema::Forward>("cross_entropy_ext::_nll_loss_forward");
  return op.call(input, target, as_list({weight}), reduction, ignore_index, loss_dtype);
}

at::Tensor backward(const at::Tensor& grad_output, XENT_NLL_INPUTS, const at::Tensor& denominator, XENT_NLL_OPTIONS) {
  static const auto op = find_operator<schema::Backward>("cross_entropy_ext::_nll_loss_backward");
  return op.call(grad_output, input, target, as_list({weight}), denominator, reduction, ignore_index);
}

// For errors, which are native's, and for what only native accepts.
at::Tensor native(XENT_NLL_INPUTS, XENT_NLL_OPTIONS, std::optional<at::ScalarType> loss_dtype) {
  const at::Tensor classes = is_index_type(target.scalar_type()) ? target.to(at::kLong) : target;
  const at::Tensor loss = at::nll_loss_nd(input, classes, optional(weight), reduction, ignore_index);
  return loss_dtype ? loss.to(*loss_dtype) : loss;
}

bool has_kernel(XENT_NLL_INPUTS, XENT_NLL_OPTIONS, std::optional<at::ScalarType> loss_dtype) {
  const Options options = options_of(reduction, ignore_index, loss_dtype);
  check_options(options);
  return is_supported({input, target, weight}, options);
}

// Half log-probabilities are read as they are; the loss is float32, as native's is of a copy.
std::pair<at::Tensor, at::ScalarType> with_wide_loss(const at::Tensor& input, const at::Tensor& weight,
                                                     std::optional<at::ScalarType> loss_dtype) {
  return {weight.defined() ? weight.to(widened(weight.scalar_type())) : weight,
          loss_dtype.value_or(widened(input.scalar_type()))};
}

// In PyTorch's operations: other devices, subclasses and transforms, which come before autocast.
at::Tensor fallback(XENT_NLL_INPUTS, XENT_NLL_OPTIONS, std::optional<at::ScalarType> loss_dtype) {
  const auto device = input.device().type();
  Options options = options_of(reduction, ignore_index, loss_dtype);
  at::Tensor class_weight = weight;
  if (at::autocast::is_autocast_available(device) && at::autocast::is_autocast_enabled(device)) {
    std::tie(class_weight, options.loss_dtype) = with_wide_loss(input, weight, loss_dtype);
  }
  check_options(options);
  const Inputs inputs{input, target, class_weight};
  return is_valid(inputs, options) ? composite_nll_loss(inputs, options)
                                   : native(input, target, weight, reduction, ignore_index, loss_dtype);
}

// For tensor subclasses: it decomposes into ATen operators.
at::Tensor composite_of(const at::Tensor& input, const at::Tensor& target, const OptionalTensors& weight,
                        XENT_NLL_OPTIONS, std::optional<at::ScalarType> loss_dtype) {
  return fallback(input, target, element_of(weight, 0), reduction, ignore_index, loss_dtype);
}

// ---- without autograd -----------------------------------------------------------------------------------------------

at::Tensor loss_without_grad(XENT_NLL_INPUTS, XENT_NLL_OPTIONS, std::optional<at::ScalarType> loss_dtype) {
  if (!has_kernel(input, target, weight, reduction, ignore_index, loss_dtype)) {
    return fallback(input, target, weight, reduction, ignore_index, loss_dtype);
  }
  return std::get<0>(forward(input, target, weight, reduction, ignore_index, loss_dtype.value_or(input.scalar_type())));
}

ForwardResult forward_meta(const at::Tensor& input, const at::Tensor&, const OptionalTensors&, int64_t reduction,
                           int64_t, at::ScalarType loss_dtype) {
  const auto shape = reduction == kNone ? shape_of_positions(input) : c10::SymDimVector();
  return {at::empty_symint(shape, input.options().dtype(loss_dtype)),
          at::empty({}, input.options().dtype(at::kDouble))};
}

at::Tensor backward_meta(const at::Tensor&, const at::Tensor& input, const at::Tensor&, const OptionalTensors&,
                         const at::Tensor&, int64_t, int64_t) {
  return at::empty_like(input);
}

template <c10::DeviceType device, c10::DispatchKey key>
at::Tensor loss_autocast(XENT_NLL_INPUTS, XENT_NLL_OPTIONS, std::optional<at::ScalarType> loss_dtype) {
  at::Tensor kernel_weight = weight;
  if (input.device().type() == device) {
    std::tie(kernel_weight, loss_dtype) = with_wide_loss(input, weight, loss_dtype);
    if (!has_kernel(input, target, kernel_weight, reduction, ignore_index, loss_dtype)) {
      return fallback(input, target, weight, reduction, ignore_index, loss_dtype);
    }
  }
  const c10::impl::ExcludeDispatchKeyGuard without_autocast(key);
  return loss(input, target, kernel_weight, reduction, ignore_index, loss_dtype);
}

// ---- derivatives ----------------------------------------------------------------------------------------------------

bool has_tangent(const at::Tensor& tensor) { return tensor.defined() && tensor._fw_grad(0).defined(); }

struct Saved {
  at::Tensor input, target;
  at::Tensor weight;
  at::Tensor denominator;
  int64_t reduction, ignore_index;

  static void save(AutogradContext* ctx, XENT_NLL_INPUTS, const at::Tensor& denominator, XENT_NLL_OPTIONS) {
    // Hooks on saved tensors may lose precision, of which the denominator can spare none.
    const bool hooked = denominator.defined() && at::SavedTensorDefaultHooks::get_hooks() && is_eager(denominator);
    if (hooked) ctx->saved_data["denominator"] = denominator;
    ctx->save_for_backward({input, target, weight, hooked ? at::Tensor() : denominator});
    ctx->saved_data["options"] = std::make_tuple(reduction, ignore_index);
  }

  explicit Saved(AutogradContext* ctx) {
    const auto saved = ctx->get_saved_variables();
    input = saved[0];
    target = saved[1];
    weight = saved[2];
    denominator = saved[3];
    const auto kept = denominator.defined() ? ctx->saved_data.end() : ctx->saved_data.find("denominator");
    if (kept != ctx->saved_data.end()) denominator = kept->second.toTensor();
    std::tie(reduction, ignore_index) = ctx->saved_data["options"].to<std::tuple<int64_t, int64_t>>();
  }
};

struct BackwardFunction : torch::autograd::Function<BackwardFunction> {
  static constexpr bool is_traceable = true;

  static Variable forward(AutogradContext* ctx, const Variable& grad_output, const Variable& input,
                          const Variable& target, const OptionalTensor& weight, const Variable& denominator,
                          XENT_NLL_OPTIONS) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const at::Tensor class_weight = weight.value_or(at::Tensor());
    Saved::save(ctx, {}, target, class_weight, {}, reduction, ignore_index);
    ctx->saved_data["dtype"] = grad_output.scalar_type();
    return nll::backward(grad_output, input, target, class_weight, denominator, reduction, ignore_index);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const Saved saved(ctx);
    variable_list result(7);
    result[0] = loss(grads[0], saved.target, saved.weight, saved.reduction, saved.ignore_index,
                     ctx->saved_data["dtype"].toScalarType());
    return result;
  }
};

struct LossFunction : torch::autograd::Function<LossFunction> {
  static constexpr bool is_traceable = true;

  static Variable forward(AutogradContext* ctx, const Variable& input, const Variable& target,
                          const OptionalTensor& weight, XENT_NLL_OPTIONS, at::ScalarType loss_dtype) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const at::Tensor class_weight = weight.value_or(at::Tensor());
    const auto [loss, denominator] = nll::forward(input, target, class_weight, reduction, ignore_index, loss_dtype);
    Saved::save(ctx, input, target, class_weight, denominator, reduction, ignore_index);
    return loss;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const Saved saved(ctx);
    variable_list result(6);
    // Where nothing is to be differentiated again, past one turn of the dispatcher.
    std::optional<at::AutoDispatchBelowADInplaceOrView> below;
    if (!c10::GradMode::is_enabled() && !has_tangent(grads[0])) below.emplace();
    result[0] = nll::backward(grads[0], saved.input, saved.target, saved.weight, saved.denominator, saved.reduction,
                              saved.ignore_index);
    return result;
  }
};

// function(x), of an x with a tangent: the tangent's function is the tangent of a linear function.
template <class Function>
at::Tensor with_tangent(const at::Tensor& x, const Function& function) {
  const auto [primal, tangent] = at::_unpack_dual(x, 0);
  return at::_make_dual(function(primal), function(tangent), 0);
}

at::Tensor loss_autograd(XENT_NLL_INPUTS, XENT_NLL_OPTIONS, std::optional<at::ScalarType> loss_dtype) {
  if (has_tangent(weight)) {
    return native(input, target, weight, reduction, ignore_index, loss_dtype);
  }
  if (!has_kernel(input, target, weight, reduction, ignore_index, loss_dtype)) {
    return fallback(input, target, weight, reduction, ignore_index, loss_dtype);
  }
  if (has_tangent(input)) {
    return with_tangent(
        input, [&](const at::Tensor& x) { return loss(x, target, weight, reduction, ignore_index, loss_dtype); });
  }
  const auto type = loss_dtype.value_or(input.scalar_type());
  if (input.requires_grad() && c10::GradMode::is_enabled()) {
    return LossFunction::apply(input, target, optional(weight), reduction, ignore_index, type);
  }
  const at::AutoDispatchBelowADInplaceOrView below;
  return std::get<0>(forward(input, target, weight, reduction, ignore_index, type));
}

at::Tensor backward_autograd(const at::Tensor& grad_output, XENT_NLL_TENSORS, const at::Tensor& denominator,
                             XENT_NLL_OPTIONS) {
  const at::Tensor weight = element_of(weights, 0);
  if (has_tangent(grad_output)) {
    return with_tangent(grad_output, [&](const at::Tensor& g) {
      return backward(g, input, target, weight, denominator, reduction, ignore_index);
    });
  }
  if (grad_output.requires_grad() && c10::GradMode::is_enabled()) {
    return BackwardFunction::apply(grad_output, input, target, optional(weight), denominator, reduction, ignore_index);
  }
  const at::AutoDispatchBelowADInplaceOrView below;
  return backward(grad_output, input, target, weight, denominator, reduction, ignore_index);
}

static_assert(std::is_same_v<decltype(backward_autograd), schema::Backward>);

using Function = decltype(loss_autograd);

template <Function function>
at::Tensor plain(const at::Tensor& input, const at::Tensor& target, XENT_NLL_OPTIONS,
                 std::optional<at::ScalarType> loss_dtype) {
  return function(input, target, {}, reduction, ignore_index, loss_dtype);
}

template <Function function>
at::Tensor weighted(const at::Tensor& input, const at::Tensor& target, const at::Tensor& weight, XENT_NLL_OPTIONS,
                    std::optional<at::ScalarType> loss_dtype) {
  return function(input, target, weight, reduction, ignore_index, loss_dtype);
}

static_assert(std::is_same_v<decltype(plain<loss_autograd>), schema::Loss>);
static_assert(std::is_same_v<decltype(weighted<loss_autograd>), schema::WeightedLoss>);

template <Function function>
void register_function(torch::Library& m) {
  m.impl("nll_loss", &plain<function>);
  m.impl("nll_loss.weight", &weighted<function>);
}

}  // namespace

at::Tensor loss(XENT_NLL_INPUTS, XENT_NLL_OPTIONS, std::optional<at::ScalarType> loss_dtype) {
  if (is_autograd(first_key(keys_of(input, target, weight)))) {
    return loss_autograd(input, target, weight, reduction, ignore_index, loss_dtype);
  }
  if (weight.defined()) {
    static const auto op = find_operator<schema::WeightedLoss>("cross_entropy_ext::nll_loss", "weight");
    return op.call(input, target, weight, reduction, ignore_index, loss_dtype);
  }
  static const auto op = find_operator<schema::Loss>("cross_entropy_ext::nll_loss");
  return op.call(input, target, reduction, ignore_index, loss_dtype);
}

// ---- registration ---------------------------------------------------------------------------------------------------

TORCH_LIBRARY_FRAGMENT(cross_entropy_ext, m) {
  const std::string options = "int reduction=1, int ignore_index=-100, *, ScalarType? loss_dtype=None) -> Tensor";
  m.def(("nll_loss(Tensor input, Tensor target, " + options).c_str());
  m.def(("nll_loss.weight(Tensor input, Tensor target, Tensor weight, " + options).c_str());
  m.def(
      "_composite_nll_loss(Tensor input, Tensor target, Tensor?[] weight, int reduction, int ignore_index, *, "
      "ScalarType? loss_dtype=None) -> Tensor");
  m.def(
      "_nll_loss_forward(Tensor input, Tensor target, Tensor?[] weight, int reduction, int ignore_index, "
      "ScalarType loss_dtype) -> (Tensor loss, Tensor denominator)");
  m.def(
      "_nll_loss_backward(Tensor grad_output, Tensor input, Tensor target, Tensor?[] weight, Tensor denominator, "
      "int reduction, int ignore_index) -> Tensor");
}

TORCH_LIBRARY_IMPL(cross_entropy_ext, CompositeImplicitAutograd, m) { m.impl("_composite_nll_loss", &composite_of); }

TORCH_LIBRARY_IMPL(cross_entropy_ext, CompositeExplicitAutograd, m) { register_function<loss_without_grad>(m); }

TORCH_LIBRARY_IMPL(cross_entropy_ext, Meta, m) {
  m.impl("_nll_loss_forward", &forward_meta);
  m.impl("_nll_loss_backward", &backward_meta);
}

TORCH_LIBRARY_IMPL(cross_entropy_ext, AutocastCPU, m) {
  register_function<loss_autocast<c10::kCPU, c10::DispatchKey::AutocastCPU>>(m);
}

TORCH_LIBRARY_IMPL(cross_entropy_ext, AutocastCUDA, m) {
  register_function<loss_autocast<c10::kCUDA, c10::DispatchKey::AutocastCUDA>>(m);
}

TORCH_LIBRARY_IMPL(cross_entropy_ext, Autograd, m) {
  register_function<loss_autograd>(m);
  m.impl("_nll_loss_backward", &backward_autograd);
}

// torch.func: vmap, grad, jvp and their compositions.
TORCH_LIBRARY_IMPL(cross_entropy_ext, FuncTorchDynamicLayerFrontMode, m) { register_function<fallback>(m); }

}  // namespace xent::nll
