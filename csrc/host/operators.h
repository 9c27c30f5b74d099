// The operators: for callers in C++, and for the files that register kernels of them.
#pragma once

#include <torch/library.h>

#include <array>
#include <tuple>

#include "adapter.h"
#include "composite.h"

namespace xent {

// ---- public operators -----------------------------------------------------------------------------------------------

// Calls the public operator that takes these arguments.
Outputs loss(const Inputs& inputs, const Options& options);

// Its kernel for autograd: makes a node in the graph where one of the tensors requires a gradient.
Outputs loss_autograd(const Inputs& inputs, const Options& options);

// Its kernel below autograd.
Outputs loss_without_grad(const Inputs& inputs, const Options& options);

// The log-probability is that of probabilities as they are: where the loss has weighted or smoothed them, it has no sum
// of these, and they are read once more.
void correct_target_log_prob(Outputs& outputs, const Inputs& inputs, const Options& options);

// Registers a kernel of all public operators, under the key of `m`.
using Loss = Outputs(const Inputs& inputs, const Options& options);
template <Loss* kernel>
void register_losses(torch::Library& m);

// ---- private operators ----------------------------------------------------------------------------------------------
//
// The work of a device. options.loss_dtype is set. For a layer, `_linear_forward` and so on are called, which make its
// logits chunk by chunk and call the others.

// _forward -> loss, lse, denominator.
//   lse: what is saved for the backward, (rows, positions) in the type of arithmetic; see saved::Row.
//   denominator: what reduction 'mean' divided by, a float64 scalar; 1 for the others.
ForwardResult forward(const Inputs& inputs, const Options& options);

// _forward_backward: also returns the gradient of the logits for a grad_output of one. For reductions only; it may
// differ from _backward's by rounding, as exponentials are made once for both. lse is empty where _adapt_gradient_
// finds it.
ForwardBackwardResult forward_backward(const Inputs& inputs, const Options& options);

// _forward_backward_: writes that gradient in the logits' place, of whatever size. Not for pairs.
ForwardResult forward_backward_(const Inputs& inputs, const Options& options);

// Returns true if a training step is faster where the forward makes the gradient of these logits: with one read instead
// of two, but memory that is taken earlier.
bool fusing_pays(const at::Tensor& logits, int64_t reduction);

// _backward -> gradients of the logits, and of probabilities or the teacher's logits; empty where `wanted` says no.
BackwardResult backward(const Gradients& gradients, const Inputs& inputs, const Options& options,
                        std::array<bool, 2> wanted);

// _backward_: the gradient takes the logits' storage. Returns the gradient of the target.
at::Tensor backward_(const Gradients& gradients, const Inputs& inputs, const Options& options, bool target_wanted);

// _adapt_gradient_: `grad_logits` is the gradient that _forward_backward made, for a grad_output of one, and becomes
// the one for grad_output. For devices whose host must not wait for the value of grad_output: if it is one, their
// kernel has nothing to do; else it makes the gradient anew from the logits, and finds lse where _forward_backward left
// it out.
void adapt_gradient_(const Gradients& gradients, const Inputs& inputs, const Options& options,
                     const at::Tensor& grad_logits);
bool adapts_gradient(const at::Tensor& logits);

// _linear_forward_backward -> loss, and the gradients of input, weight and bias for a grad_output of one.
// _linear_backward -> gradients of input, weight, bias, and of the target. Empty where they are not wanted.
using LayerForwardBackwardResult = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
using LayerBackwardResult = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
LayerForwardBackwardResult layer_forward_backward(const Inputs& inputs, const Options& options,
                                                  std::array<bool, 3> wanted);
LayerBackwardResult layer_backward(const Gradients& gradients, const Inputs& inputs, const Options& options,
                                   std::array<bool, 4> wanted);

// Kernels of the CPU, which C++ calls without the dispatcher.
namespace cpu {
ForwardResult forward(const Inputs& inputs, const Options& options);
ForwardBackwardResult forward_backward(const Inputs& inputs, const Options& options);
BackwardResult backward(const Gradients& gradients, const Inputs& inputs, const Options& options,
                        std::array<bool, 2> wanted);
}  // namespace cpu

}  // namespace xent
