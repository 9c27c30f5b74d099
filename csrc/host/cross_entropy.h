// The operators, as the host files see them: names, signatures and the few decisions that every device shares.
// Schemas are in operators.cpp, checks in arguments.cpp, derivatives in autograd.cpp, kernels behind cpu/ and cuda/.
#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>

#include <array>
#include <functional>
#include <initializer_list>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "kernel/problem.h"

namespace xent {

// ATen's numbering.
enum Reduction : int64_t { kNone = 0, kMean = 1, kSum = 2 };

using OptionalTensor = std::optional<at::Tensor>;

// How optional tensors travel through the dispatcher: in order, up to the last that there is. A list, since PyTorch's
// checks of operators take the None of a single optional tensor for one that was written to.
using OptionalTensors = c10::List<OptionalTensor>;
OptionalTensors as_list(std::initializer_list<std::reference_wrapper<const OptionalTensor>> tensors);
OptionalTensor element_of(const OptionalTensors& list, size_t place);

// The gradients of statistics travel by themselves, for PyTorch's batched gradients do not look into lists. Where there
// are none, the denominator stands in their place, which is a scalar.
inline OptionalTensor unless_scalar(const at::Tensor& grad_statistics) {
  return grad_statistics.dim() == 0 ? std::nullopt : OptionalTensor(grad_statistics);
}

// Everything a loss is made of that is a tensor. What the arguments mean is said in cross_entropy_ext/functional.py.
struct Inputs {
  const at::Tensor& logits;
  const at::Tensor& target;                    // indices, probabilities, the classes of pairs, or the teacher's logits
  const OptionalTensor& weight;                // of classes
  const OptionalTensor& companion = kNothing;  // the probabilities of pairs, or the labels that go with a teacher
  const OptionalTensor& sample_weight = kNothing;
  const OptionalTensor& divisor = kNothing;  // of a mean, instead of what its positions weigh: a float64 scalar

  TargetKind target_kind(const struct Options& options) const;

  // What a gradient of the target is one of: probabilities, or the teacher's logits.
  const at::Tensor& differentiable_target(const struct Options& options) const;

 private:
  static const OptionalTensor kNothing;
};

// And what is none. Operators pass it on as two lists of numbers.
struct Options {
  int64_t reduction = kMean, ignore_index = -100;
  double label_smoothing = 0;
  std::optional<at::ScalarType> loss_dtype;
  bool empty_is_zero = false;
  bool inplace = false;                        // the gradient takes the logits' storage
  bool statistics = false;                     // besides the loss
  TargetKind target_kind = TargetKind::kNone;  // kPairs or kTeacher; else the target's shape decides
  bool kl = false;                             // a teacher's divergence, not its cross entropy
  double z_loss = 0, softcap = 0, logit_scale = 1;
  double temperature = 1, alpha = 1;           // of a teacher
  int64_t class_begin = 0, total_classes = 0;  // of a shard, see Problem; private operators alone take it

  static constexpr size_t kIntegers = 6, kNumbers = 6;
  enum Number : size_t { kLabelSmoothing, kZLoss, kSoftcap, kLogitScale, kTemperature, kAlpha };

  // The numbers that come as scalar tensors, and are NaN above: one for each Number, undefined for the others. Empty
  // where none does. They change from call to call of a compiled graph, or are transformed, or logit_scale is to get a
  // gradient.
  std::vector<at::Tensor> tensors = {};

  std::array<int64_t, kIntegers> integers() const;
  std::array<double, kNumbers> numbers() const;
  static Options of(at::IntArrayRef integers, at::ArrayRef<double> numbers, std::vector<at::Tensor> tensors = {});

  // The same with the values of the tensors, as kernels take them.
  Options with_values() &&;

  // Those of the bare log-probability of probabilities, which the loss has weighted or smoothed.
  Options without_weights(at::ScalarType type) const;

  OptionalTensor tensor(Number number) const {
    return tensors.empty() || !tensors[number].defined() ? std::nullopt : OptionalTensor(tensors[number]);
  }

  // Whether it is a loss that PyTorch has, too.
  bool is_plain() const {
    return !statistics && target_kind == TargetKind::kNone && z_loss == 0 && softcap == 0 && logit_scale == 1 &&
           !is_shard() && tensors.empty();
  }

  bool is_shard() const { return total_classes != 0; }

  // The argmax of an ignored position: neither a class nor ignore_index, so that comparing it with the targets counts
  // no padding as correct.
  int64_t no_class() const { return ignore_index == -1 ? -2 : -1; }
};

// The optional tensors of both, as an operator gets them: those of Inputs in their order, and then the numbers.
struct Others {
  OptionalTensor weight, companion, sample_weight, divisor;
  std::vector<at::Tensor> numbers;

  explicit Others(const OptionalTensors& list);
  static OptionalTensors of(const Inputs& inputs, const Options& options);

  Inputs with(const at::Tensor& logits, const at::Tensor& target) const {
    return {logits, target, weight, companion, sample_weight, divisor};
  }
  Options options(at::IntArrayRef integers, at::ArrayRef<double> known) const {
    return Options::of(integers, known, numbers);
  }
};

// cross_entropy_ext::_forward -> loss, lse, denominator.
//   lse: what is saved for the backward, (rows, positions) in the type of arithmetic; see saved::Row.
//   denominator: what reduction 'mean' divided by, a float64 scalar; 1 for the others.
// options.loss_dtype is set.
using ForwardResult = std::tuple<at::Tensor, at::Tensor, at::Tensor>;
ForwardResult forward(const Inputs& inputs, const Options& options);

// cross_entropy_ext::_forward_backward: the same, and the gradient of the logits for a grad_output of one. For
// reductions only; it may differ from _backward's by rounding, as exponentials are made once for both. Where nobody may
// ask for lse, it is left out: an empty tensor.
using ForwardBackwardResult = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
ForwardBackwardResult forward_backward(const Inputs& inputs, const Options& options);

// cross_entropy_ext::_forward_backward_: the same with the gradient in the logits' place, of whatever size. Not of
// pairs.
ForwardResult forward_backward_(const Inputs& inputs, const Options& options);

// Whether logits of this size profit from making the gradient in the forward: one read instead of two, for memory that
// is taken earlier.
bool fusing_pays(const at::Tensor& logits, int64_t reduction);

// What a backward is given besides the inputs. `grad_statistics`: (3, positions) in the type of arithmetic, see
// GradStatistic.
struct Gradients {
  const at::Tensor& grad_output;
  const OptionalTensor& grad_statistics;
  const at::Tensor& lse;
  const at::Tensor& denominator;

  // As an operator takes them.
  const at::Tensor& statistics_or_scalar() const { return grad_statistics ? *grad_statistics : denominator; }
};

// cross_entropy_ext::_backward -> gradients of the logits, and of probabilities or the teacher's logits; empty where
// `wanted` says no.
using BackwardResult = std::tuple<at::Tensor, at::Tensor>;
BackwardResult backward(const Gradients& gradients, const Inputs& inputs, const Options& options,
                        std::array<bool, 2> wanted);

// The gradients of lse, target_log_prob and entropy, which follow that of the loss in `grads`, as a backward takes
// them; nothing where there are none.
OptionalTensor gradients_of_statistics(const std::vector<at::Tensor>& grads, const at::Tensor& lse);

// cross_entropy_ext::_backward_: the gradient takes the logits' storage. Returns the gradient of the target.
at::Tensor backward_(const Gradients& gradients, const Inputs& inputs, const Options& options, bool target_wanted);

// cross_entropy_ext::_adapt_gradient_: grad_logits is the gradient that _forward_backward made, for a grad_output of
// one, and becomes the one for grad_output. For devices whose host must not wait for the value of grad_output: where it
// is one, their kernel has nothing to do; else it makes the gradient anew, from the logits, of which it also finds lse
// where _forward_backward left that out. Those that have it (`adapts_gradient`) use it in the place of _backward.
void adapt_gradient_(const Gradients& gradients, at::Tensor& grad_logits, const Inputs& inputs, const Options& options);
bool adapts_gradient(const at::Tensor& logits);

// cross_entropy_ext::cross_entropy, or with a weight cross_entropy.weight; general_cross_entropy;
// cross_entropy_with_stats.
at::Tensor cross_entropy(const at::Tensor& logits, const at::Tensor& target, const OptionalTensor& weight,
                         int64_t reduction, int64_t ignore_index, double label_smoothing,
                         std::optional<at::ScalarType> loss_dtype, bool empty_is_zero, bool inplace);
at::Tensor general_cross_entropy(const Inputs& inputs, const Options& options);

// Their kernel for autograd: the loss, with a node in the graph where one of its tensors requires a gradient.
at::Tensor loss_autograd(const Inputs& inputs, const Options& options);

// loss, lse, target_log_prob, entropy, z_loss, argmax.
using Results = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
Results cross_entropy_with_stats(const Inputs& inputs, const Options& options);

// ---- the same operators as the dispatcher has them, for the files that register kernels -----------------------------

#define XENT_PLAIN_OPTIONS                                                                                   \
  int64_t reduction, int64_t ignore_index, double label_smoothing, std::optional<at::ScalarType> loss_dtype, \
      bool empty_is_zero, bool inplace
#define XENT_OTHER_INPUTS [[maybe_unused]] const at::Tensor &target, [[maybe_unused]] const OptionalTensors &others
#define XENT_INPUTS [[maybe_unused]] const at::Tensor &logits, XENT_OTHER_INPUTS
#define XENT_OPTIONS [[maybe_unused]] at::IntArrayRef integers, [[maybe_unused]] at::ArrayRef<double> numbers
#define XENT_GRADIENTS \
  [[maybe_unused]] const at::Tensor &grad_output, [[maybe_unused]] const at::Tensor &grad_statistics
#define XENT_SAVED [[maybe_unused]] const at::Tensor &lse, [[maybe_unused]] const at::Tensor &denominator

namespace schema {
using CrossEntropy = at::Tensor(const at::Tensor& logits, const at::Tensor& target, XENT_PLAIN_OPTIONS);
using WeightedCrossEntropy = at::Tensor(const at::Tensor& logits, const at::Tensor& target, const at::Tensor& weight,
                                        XENT_PLAIN_OPTIONS);
using General = at::Tensor(XENT_INPUTS, XENT_OPTIONS);
using WithStats = Results(XENT_INPUTS, XENT_OPTIONS);
using Forward = ForwardResult(XENT_INPUTS, XENT_OPTIONS);
using ForwardBackward = ForwardBackwardResult(XENT_INPUTS, XENT_OPTIONS);
using ForwardBackwardInplace = ForwardResult(at::Tensor& logits, XENT_OTHER_INPUTS, XENT_OPTIONS);
using Backward = BackwardResult(XENT_GRADIENTS, XENT_INPUTS, XENT_SAVED, XENT_OPTIONS, std::array<bool, 2> wanted);
using BackwardInplace = at::Tensor(XENT_GRADIENTS, at::Tensor& logits, XENT_OTHER_INPUTS, XENT_SAVED, XENT_OPTIONS,
                                   bool target_wanted);
using AdaptGradient = void(XENT_GRADIENTS, at::Tensor& grad_logits, XENT_INPUTS, XENT_SAVED, XENT_OPTIONS);
}  // namespace schema

// Kernels that are written with Inputs and Options, as the dispatcher calls them.
template <class Result, Result (*function)(const Inputs&, const Options&)>
Result from_plain(const at::Tensor& logits, const at::Tensor& target, XENT_PLAIN_OPTIONS) {
  return function({logits, target, std::nullopt},
                  {reduction, ignore_index, label_smoothing, loss_dtype, empty_is_zero, inplace});
}

template <class Result, Result (*function)(const Inputs&, const Options&)>
Result from_weighted(const at::Tensor& logits, const at::Tensor& target, const at::Tensor& weight, XENT_PLAIN_OPTIONS) {
  return function({logits, target, weight},
                  {reduction, ignore_index, label_smoothing, loss_dtype, empty_is_zero, inplace});
}

template <class Result, Result (*function)(const Inputs&, const Options&)>
Result from_lists(XENT_INPUTS, XENT_OPTIONS) {
  const Others unpacked(others);
  return function(unpacked.with(logits, target), unpacked.options(integers, numbers));
}

// ---- decisions ------------------------------------------------------------------------------------------------------

inline bool has_value(const OptionalTensor& tensor) { return tensor && tensor->defined(); }
inline OptionalTensor optional(const at::Tensor& tensor) {
  return tensor.defined() ? OptionalTensor(tensor) : std::nullopt;
}
bool is_logits_type(at::ScalarType type);  // of logits, probabilities and losses
bool is_index_type(at::ScalarType type);
inline at::ScalarType widened(at::ScalarType type) {
  return type == at::kHalf || type == at::kBFloat16 ? at::kFloat : type;
}

// A tensor with memory behind it, rather than one that a compiler or a transform of functions traces with.
bool is_eager(const at::Tensor& tensor);

// Probabilities or class indices: by shape alone, as native decides.
bool has_shape_of_logits(const at::Tensor& logits, const at::Tensor& target);

inline int64_t class_dim(const at::Tensor& logits) { return logits.dim() == 1 ? 0 : 1; }

// The type in which a position's sums are formed, and of lse.
at::ScalarType arithmetic_type(const Inputs& inputs, const Options& options);

// The type of the loss: the one asked for, or native's.
at::ScalarType loss_type(const Inputs& inputs, const Options& options);
Options with_loss_type(const Inputs& inputs, const Options& options);

// Under autocast: half logits are read as they are, for a loss in float32 and with class weights in it.
std::pair<OptionalTensor, Options> with_wide_loss(const Inputs& inputs, Options options);

// (N, d1..dK) of logits (N, C, d1..dK), or () of (C).
c10::SymDimVector shape_of_positions(const at::Tensor& logits);

// How many rows of numbers the backward needs.
int64_t saved_rows(TargetKind target_kind, const Options& options);

// Raise an error for numbers that mean nothing: a negative or NaN label_smoothing, which native takes for zero; a
// loss_dtype that is not one of a loss.
void check_options(const Options& options);

// The same, and for tensors of which native knows nothing: pairs, teachers, weights of samples.
void check(const Inputs& inputs, const Options& options);

// Whether the arguments are those of a loss that this package defines. Native judges the others: it raises its error,
// or accepts a corner that is not worth a kernel. So there is one source of truth for messages.
bool is_valid(const Inputs& inputs, const Options& options);

// Whether the fused kernels take these arguments: they are valid, and this build has kernels for their device.
bool is_supported(const Inputs& inputs, const Options& options);

// The number that a mean divides by if none is given, a float64 scalar, found in torch's own operations: the sum of the
// positions that count, each times its sample weight, and of class indices times the weight of its class. A class out
// of range is an error elsewhere, and none here.
at::Tensor denominator_of_mean(const Inputs& inputs, const Options& options);

// The inputs as the kernels take them, which divide all of a mean by one number. The z-loss is not weighted by classes,
// and so not divided by their weights: with the denominators D of the cross entropy and Z of the z-loss,
//
//   sum_i s_i w_i ce_i / D + z sum_i s_i lse_i^2 / Z = sum_i s_i (w_i Z / D ce_i + z lse_i^2) / Z
//
// So where a mean has both, the kernels are given the class weights w Z / D, and Z as a denominator. Whatever else
// there is stays as it is. The result refers to this object and to `inputs`, which have to outlive it.
class KernelInputs {
 public:
  KernelInputs(const Inputs& inputs, const Options& options);
  Inputs operator()() const;

 private:
  const Inputs& in_;
  OptionalTensor weight_, divisor_;
};

// ---- what the results are where there is no kernel, in operations that are differentiable any number of times -------

// The loss and its statistics, in the order of Results. Statistics are undefined unless they are asked for.
using Outputs = std::array<at::Tensor, 6>;

inline Results as_tuple(const Outputs& outputs) { return std::tuple_cat(outputs); }

Outputs composite(const Inputs& inputs, const Options& options);

// nll_loss of log-probabilities, in the place of the logits.
at::Tensor composite_nll_loss(const Inputs& inputs, const Options& options);

// The same for arguments that need not be valid: `composite`, after native's errors, or what native makes of them.
Outputs fallback(const Inputs& inputs, const Options& options);

// The loss that is PyTorch's own in everything, but for the types of targets and of the result.
at::Tensor native_cross_entropy(const Inputs& inputs, const Options& options);

// The same from what the kernels have found out.
Outputs outputs_of(const at::Tensor& loss, const at::Tensor& lse, const at::Tensor& denominator, const Inputs& inputs,
                   const Options& options);

// The gradient of logit_scale: a loss depends on it in its product with the logits x alone, so that it is
// <d loss / d x, x> / logit_scale, and for the logits of a layer the same of its input and bias. Of both gradients the
// products with what they are of are given, summed.
at::Tensor sum_of_products(const at::Tensor& gradient, const at::Tensor& tensor);
at::Tensor scale_gradient(const at::Tensor& sum, const at::Tensor& logit_scale);

// Returns true if a number requires a gradient that the composite alone has: any number but logit_scale, and a
// logit_scale of zero.
bool numbers_need_composite(const Options& options);

// The log-probability is of probabilities as they are: where the loss has weighted or smoothed them, it has no sum of
// these, and they are read once more.
void correct_target_log_prob(Outputs& outputs, const Inputs& inputs, const Options& options);

}  // namespace xent
