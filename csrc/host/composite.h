// The loss in PyTorch's own operations: for tensors without a kernel (other devices, subclasses, forward mode,
// transforms of functions), and for derivatives of derivatives.
#pragma once

#include "inputs.h"

namespace xent {

// Results of a loss. All but `loss` are undefined unless they are asked for.
struct Outputs {
  at::Tensor loss, lse, target_log_prob, entropy, z_loss, argmax;

  std::vector<at::Tensor> list(bool statistics) const {
    if (!statistics) return {loss};
    return {loss, lse, target_log_prob, entropy, z_loss, argmax};
  }
  static Outputs only(at::Tensor loss) { return {std::move(loss), {}, {}, {}, {}, {}}; }
  static Outputs of(at::TensorList list) {
    if (list.size() == 1) return {list[0], {}, {}, {}, {}, {}};
    return {list[0], list[1], list[2], list[3], list[4], list[5]};
  }
};

Outputs composite(const Inputs& inputs, const Options& options);

// nll_loss of log-probabilities, in the place of the logits.
at::Tensor composite_nll_loss(const Inputs& inputs, const Options& options);

// Takes arguments that need not be valid: returns the composite, after native's errors, or what native makes of them.
Outputs fallback(const Inputs& inputs, const Options& options);

// The loss that is PyTorch's own in everything, but for the types of targets and of the result.
at::Tensor native_cross_entropy(const Inputs& inputs, const Options& options);

// Makes the results of what the kernels have saved.
Outputs outputs_of(const at::Tensor& loss, const at::Tensor& lse, const at::Tensor& denominator, const Inputs& inputs,
                   const Options& options);

// The gradient of logit_scale: a loss depends on it in its product with the logits x alone, so that it is
// <d loss / d x, x> / logit_scale, and for the logits of a layer that of its input and bias in the place of x. Such a
// scalar product is zero where the gradient is, even times infinity.
at::Tensor sum_of_products(const at::Tensor& gradient, const at::Tensor& tensor);
at::Tensor scale_gradient(const at::Tensor& sum, const at::Tensor& logit_scale);

}  // namespace xent
