// The negative log likelihood of log-probabilities: what of it the files of the devices see.
//
// The loss is linear in its input, and the backward is its transpose, which never asks what the input is: it zeroes the
// gradient and writes one element for each position. So the derivative of the backward is the loss again, of whatever
// the gradient is multiplied by, and there are derivatives of any order without a line more.
#pragma once

#include <tuple>

#include "host/arguments.h"

#define XENT_NLL_INPUTS const at::Tensor &input, const at::Tensor &target, const at::Tensor &weight
#define XENT_NLL_TENSORS const at::Tensor &input, const at::Tensor &target, const OptionalTensors &weights
#define XENT_NLL_OPTIONS int64_t reduction, int64_t ignore_index

namespace xent::nll {

// cross_entropy_ext::nll_loss, or with a weight nll_loss.weight.
at::Tensor loss(XENT_NLL_INPUTS, XENT_NLL_OPTIONS, std::optional<at::ScalarType> loss_dtype);

// cross_entropy_ext::_nll_loss_forward -> loss, denominator (a float64 scalar; 1 unless the loss is a mean).
using ForwardResult = std::tuple<at::Tensor, at::Tensor>;

// The CPU's kernel, which C++ calls without the dispatcher.
namespace cpu {
ForwardResult forward(XENT_NLL_INPUTS, XENT_NLL_OPTIONS, at::ScalarType loss_dtype);
}

namespace schema {
using Loss = at::Tensor(const at::Tensor& input, const at::Tensor& target, XENT_NLL_OPTIONS,
                        std::optional<at::ScalarType> loss_dtype);
using WeightedLoss = at::Tensor(const at::Tensor& input, const at::Tensor& target, const at::Tensor& weight,
                                XENT_NLL_OPTIONS, std::optional<at::ScalarType> loss_dtype);
using Forward = ForwardResult(XENT_NLL_TENSORS, XENT_NLL_OPTIONS, at::ScalarType loss_dtype);
using Backward = at::Tensor(const at::Tensor& grad_output, XENT_NLL_TENSORS, const at::Tensor& denominator,
                            XENT_NLL_OPTIONS);
}  // namespace schema

// What make_problem(), is_supported() and the readers of targets take. The target is of indices, whatever its shape.
inline Options options_of(XENT_NLL_OPTIONS, std::optional<at::ScalarType> loss_dtype = std::nullopt) {
  Options options;
  options.reduction = reduction;
  options.ignore_index = ignore_index;
  options.loss_dtype = loss_dtype;
  options.target_kind = TargetKind::kIndices;
  return options;
}

// Raise an error unless the private operators were called with what the public one passes on.
inline void check_nll_forward(const Inputs& inputs, const Options& options) {
  check_options(options);
  TORCH_CHECK(is_supported(inputs, options),
              "cross_entropy_ext::_nll_loss_forward: arguments that cross_entropy_ext::nll_loss does not pass on");
}

inline void check_nll_backward(const at::Tensor& grad_output, const Inputs& inputs, const at::Tensor& denominator,
                               const Options& options) {
  Options with_float = options;
  with_float.loss_dtype = at::kFloat;
  TORCH_CHECK(is_supported(inputs, options) || is_supported(inputs, with_float),
              "cross_entropy_ext::_nll_loss_backward: arguments that _nll_loss_forward does not accept");
  const bool fits = options.reduction == kNone ? grad_output.sizes() == inputs.target.sizes() : grad_output.dim() == 0;
  TORCH_CHECK(fits && is_logits_type(grad_output.scalar_type()),
              "cross_entropy_ext::_nll_loss_backward: grad_output of ", grad_output.scalar_type(), " and shape ",
              grad_output.sizes(), " is not the loss's");
  TORCH_CHECK(denominator.scalar_type() == at::kDouble && denominator.numel() == 1,
              "cross_entropy_ext::_nll_loss_backward: denominator is not what _nll_loss_forward returned");
}

}  // namespace xent::nll
