// The operators, as the host files see them: names, signatures and the few decisions that every device shares.
// Schemas are in operators.cpp, checks in arguments.cpp, derivatives in autograd.cpp, kernels behind cpu/ and cuda/.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <tuple>

#include "problem.h"

namespace xent {

// ATen's numbering.
enum Reduction : int64_t { kNone = 0, kMean = 1, kSum = 2 };

using OptionalTensor = std::optional<at::Tensor>;

// Everything a loss is made of that is a tensor. What the arguments mean is said in cross_entropy_ext/functional.py.
struct Inputs {
  const at::Tensor& logits;
  const at::Tensor& target;         // indices, probabilities, the classes of pairs, or the teacher's logits
  const OptionalTensor& weight;     // of classes
  const OptionalTensor& companion;  // the probabilities of pairs, or the labels that go with a teacher
  const OptionalTensor& sample_weight;

  Form form(const struct Options& options) const;
};

// And what is none. Operators pass it on as two lists of numbers.
struct Options {
  int64_t reduction = kMean, ignore_index = -100;
  double label_smoothing = 0;
  std::optional<at::ScalarType> loss_dtype;
  bool empty_is_zero = false;
  bool inplace = false;     // the gradient takes the logits' storage
  bool statistics = false;  // besides the loss
  Form form = Form::kNone;  // kPairs or kTeacher; else the target's shape decides
  bool kl = false;          // a teacher's divergence, not its cross entropy
  double z_loss = 0, softcap = 0, logit_scale = 1;
  double temperature = 1, alpha = 1;  // of a teacher

  static constexpr size_t kIntegers = 4, kNumbers = 6;
  std::array<int64_t, kIntegers> integers() const;
  std::array<double, kNumbers> numbers() const;
  static Options of(at::IntArrayRef integers, at::ArrayRef<double> numbers);

  // Whether it is a loss that PyTorch has, too.
  bool is_plain() const {
    return !statistics && form == Form::kNone && z_loss == 0 && softcap == 0 && logit_scale == 1;
  }
};

// cross_entropy_ext::_forward -> loss, lse, denominator.
//   lse: what is saved for the backward, (rows, positions) in the type of arithmetic; see saved::Row.
//   denominator: what reduction 'mean' divided by, a float64 scalar; 1 for the others.
// options.loss_dtype is set.
using ForwardResult = std::tuple<at::Tensor, at::Tensor, at::Tensor>;
ForwardResult forward(const Inputs& inputs, const Options& options);

// cross_entropy_ext::_forward_backward: the same, and the gradient of the logits for a grad_output of one. For
// reductions only; it may differ from _backward's by rounding, as exponentials are made once for both.
using ForwardBackwardResult = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
ForwardBackwardResult forward_backward(const Inputs& inputs, const Options& options);

// Whether logits of this size profit from making the gradient in the forward: one read instead of two, for memory that
// is taken earlier.
bool one_pass_pays(const at::Tensor& logits, int64_t reduction);

// What a backward is given besides the inputs. `grad_statistics`: (3, positions) in the type of arithmetic, see
// GradStatistic.
struct Gradients {
  const at::Tensor& grad_output;
  const OptionalTensor& grad_statistics;
  const at::Tensor& lse;
  const at::Tensor& denominator;
};

// cross_entropy_ext::_backward -> gradients of the logits, and of probabilities or the teacher's logits; empty where
// `wanted` says no.
using BackwardResult = std::tuple<at::Tensor, at::Tensor>;
BackwardResult backward(const Gradients& gradients, const Inputs& inputs, const Options& options,
                        std::array<bool, 2> wanted);

// cross_entropy_ext::_backward_: the gradient takes the logits' storage. Returns the gradient of the target.
at::Tensor backward_(const Gradients& gradients, const Inputs& inputs, const Options& options, bool target_wanted);

// cross_entropy_ext::_adapt_gradient_: grad_logits is the gradient that _forward_backward made, for a grad_output of
// one, and becomes the one for grad_output. For devices whose host must not wait for the value of grad_output: where it
// is one, their kernel has nothing to do; else it makes the gradient anew, from the logits. Those that have it
// (`adapts_gradient`) use it in the place of _backward.
void adapt_gradient_(const Gradients& gradients, at::Tensor& grad_logits, const Inputs& inputs, const Options& options);
bool adapts_gradient(const at::Tensor& logits);

// The same operators as the dispatcher has them, for the files that register their kernels.
namespace schema {
#define XENT_INPUTS                                                                             \
  const at::Tensor &logits, const at::Tensor &target, const OptionalTensor &weight,             \
      const OptionalTensor &companion, const OptionalTensor &sample_weight
#define XENT_OPTIONS at::IntArrayRef integers, at::ArrayRef<double> numbers
#define XENT_GRADIENTS const at::Tensor &grad_output, const OptionalTensor &grad_statistics
#define XENT_SAVED const at::Tensor &lse, const at::Tensor &denominator
using Forward = ForwardResult(XENT_INPUTS, XENT_OPTIONS);
using ForwardBackward = ForwardBackwardResult(XENT_INPUTS, XENT_OPTIONS);
using Backward = BackwardResult(XENT_GRADIENTS, XENT_INPUTS, XENT_SAVED, XENT_OPTIONS, std::array<bool, 2> wanted);
using BackwardInplace = at::Tensor(const at::Tensor& grad_output, const OptionalTensor& grad_statistics,
                                   at::Tensor& logits, const at::Tensor& target, const OptionalTensor& weight,
                                   const OptionalTensor& companion, const OptionalTensor& sample_weight, XENT_SAVED,
                                   XENT_OPTIONS, bool target_wanted);
using AdaptGradient = void(at::Tensor& grad_logits, XENT_GRADIENTS, XENT_INPUTS, XENT_SAVED, XENT_OPTIONS);
}  // namespace schema

bool has_value(const OptionalTensor& tensor);
bool is_logits_type(at::ScalarType type);  // of logits, probabilities and losses
bool is_index_type(at::ScalarType type);

// Probabilities or class indices: by shape alone, as native decides.
bool has_shape_of_logits(const at::Tensor& logits, const at::Tensor& target);

inline int64_t class_dim(const at::Tensor& logits) { return logits.dim() == 1 ? 0 : 1; }

// Whether a target says something of every class, so that it may have a gradient of the logits' size.
inline bool is_dense(Form form) { return form == Form::kProbabilities || form == Form::kTeacher; }

// The type in which a position's sums are formed, and of lse.
at::ScalarType arithmetic_type(const Inputs& inputs, const Options& options);

// The type of the loss: the one asked for, or native's.
at::ScalarType loss_type(const Inputs& inputs, const Options& options);

// How many rows of numbers the backward needs.
int64_t saved_rows(Form form, bool statistics);

// Raise an error for numbers that mean nothing. Native takes a negative or NaN label_smoothing for zero; here it is an
// error, as one above 1 is natively. So is a loss_dtype that is not one of a loss.
void check_options(const Options& options);

// Raises one for what native does not know: pairs, teachers, weights of samples.
void check_shapes(const Inputs& inputs, const Options& options);

// Whether the fused kernels take these arguments. Where they do not, `composite` does, or native_cross_entropy for what
// native has, or raises its own error: there is one source of truth for messages and for corners not worth a kernel.
bool is_supported(const Inputs& inputs, const Options& options);

at::Tensor native_cross_entropy(const Inputs& inputs, const Options& options);

// The loss and its statistics: loss, lse, target_log_prob, entropy, z_loss, argmax.
using Outputs = std::array<at::Tensor, 6>;

// In operations that are differentiable any number of times. Statistics are made where they are asked for.
Outputs composite(const Inputs& inputs, const Options& options);

}  // namespace xent
