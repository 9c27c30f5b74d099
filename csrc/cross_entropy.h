// The operators, as the host files see them: names, signatures and the few decisions that every device shares.
// Schemas and checks are in operators.cpp, derivatives in autograd.cpp, kernels behind cpu/ and cuda/.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <tuple>

namespace xent {

// ATen's numbering.
enum Reduction : int64_t { kNone = 0, kMean = 1, kSum = 2 };

using OptionalTensor = std::optional<at::Tensor>;

// cross_entropy_ext::cross_entropy. What the arguments mean is said in cross_entropy_ext/functional.py.
at::Tensor cross_entropy(const at::Tensor& logits, const at::Tensor& target, const OptionalTensor& weight,
                         int64_t reduction, int64_t ignore_index, double label_smoothing,
                         std::optional<at::ScalarType> loss_dtype, bool empty_is_zero, bool inplace);

// cross_entropy_ext::_forward -> loss, lse, denominator.
//   lse: (2, positions), or (3, positions) for soft targets; see Problem::lse.
//   denominator: what reduction 'mean' divided by, a float64 scalar; 1 for the others.
//   loss_dtype: an at::ScalarType, as a number: AOTInductor of torch 2.11 hands an operator that is declared with a
//   type the wrong one, off by one.
using ForwardResult = std::tuple<at::Tensor, at::Tensor, at::Tensor>;
ForwardResult forward(const at::Tensor& logits, const at::Tensor& target, const OptionalTensor& weight,
                      int64_t reduction, int64_t ignore_index, double label_smoothing, int64_t loss_dtype,
                      bool empty_is_zero);

// cross_entropy_ext::_forward_backward: the same, and the gradient of the logits for a grad_output of one. For
// reductions only; it may differ from _backward's by rounding, as exponentials are made once for both.
using ForwardBackwardResult = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
ForwardBackwardResult forward_backward(const at::Tensor& logits, const at::Tensor& target, const OptionalTensor& weight,
                                       int64_t reduction, int64_t ignore_index, double label_smoothing,
                                       int64_t loss_dtype, bool empty_is_zero);

// Whether logits of this size profit from making the gradient in the forward: one read instead of two, for memory that
// is taken earlier.
bool one_pass_pays(const at::Tensor& logits, int64_t reduction);

// cross_entropy_ext::_backward -> gradients of the logits and of a soft target; empty where `wanted` says no.
using BackwardResult = std::tuple<at::Tensor, at::Tensor>;
BackwardResult backward(const at::Tensor& grad_output, const at::Tensor& logits, const at::Tensor& target,
                        const OptionalTensor& weight, const at::Tensor& lse, const at::Tensor& denominator,
                        int64_t reduction, int64_t ignore_index, double label_smoothing, std::array<bool, 2> wanted);

// cross_entropy_ext::_backward_: the gradient takes the logits' storage. Returns the gradient of the target.
at::Tensor backward_(const at::Tensor& grad_output, at::Tensor& logits, const at::Tensor& target,
                     const OptionalTensor& weight, const at::Tensor& lse, const at::Tensor& denominator,
                     int64_t reduction, int64_t ignore_index, double label_smoothing, bool target_wanted);

// cross_entropy_ext::_adapt_gradient_: grad_logits is the gradient that _forward_backward made, for a grad_output of
// one, and becomes the one for grad_output. For devices whose host must not wait for the value of grad_output: where it
// is one, their kernel has nothing to do; else it makes the gradient anew, from the logits. Those that have it
// (`adapts_gradient`) use it in the place of _backward.
void adapt_gradient_(const at::Tensor& grad_output, at::Tensor& grad_logits, const at::Tensor& logits,
                     const at::Tensor& target, const OptionalTensor& weight, const at::Tensor& lse,
                     const at::Tensor& denominator, int64_t reduction, int64_t ignore_index, double label_smoothing);
bool adapts_gradient(const at::Tensor& logits);

bool has_value(const OptionalTensor& tensor);
bool is_logits_type(at::ScalarType type);  // of logits, probabilities and losses
bool is_index_type(at::ScalarType type);

// Probabilities or class indices: by shape alone, as native decides.
bool is_soft(const at::Tensor& logits, const at::Tensor& target);

inline int64_t class_dim(const at::Tensor& logits) { return logits.dim() == 1 ? 0 : 1; }

// The type in which a position's sums are formed, and of lse.
at::ScalarType arithmetic_type(const at::Tensor& logits, const at::Tensor& target, const OptionalTensor& weight);

// The type of the loss where the caller names none: native's.
at::ScalarType default_loss_dtype(const at::Tensor& logits, const at::Tensor& target, const OptionalTensor& weight);

// Native takes a negative or NaN label_smoothing for zero; here it is an error, as one above 1 is natively.
// So is a loss_dtype that is not one of a loss.
void check_options(int64_t reduction, double label_smoothing, std::optional<at::ScalarType> loss_dtype);

// Whether the fused kernels take these arguments. Where they do not, native_cross_entropy does, or raises its own
// error: there is one source of truth for messages and for corners not worth a kernel.
bool is_supported(const at::Tensor& logits, const at::Tensor& target, const OptionalTensor& weight,
                  int64_t ignore_index, double label_smoothing, std::optional<at::ScalarType> loss_dtype);

at::Tensor native_cross_entropy(const at::Tensor& logits, const at::Tensor& target, const OptionalTensor& weight,
                                int64_t reduction, int64_t ignore_index, double label_smoothing,
                                std::optional<at::ScalarType> loss_dtype, bool empty_is_zero);

}  // namespace xent
