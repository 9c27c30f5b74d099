#include "denominator.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/ne.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

namespace xent {

at::Tensor zero_unless(const at::Tensor& condition, const at::Tensor& tensor) {
  return condition.defined() ? at::where(condition, tensor, at::zeros_like(tensor)) : tensor;
}

at::Tensor count_denominator(const Inputs& in, const Options& options) {
  const TargetKind target_kind = in.target_kind(options);
  if (target_kind == TargetKind::kProbabilities) {
    if (in.sample_weight.defined()) return in.sample_weight.sum(at::kDouble);
    const auto positions = in.logits.sym_numel() / in.logits.sym_size(class_dim(in.logits));
    return at::zeros({}, in.logits.options().dtype(at::kDouble)).fill_(positions);
  }
  const at::Tensor index = in.target.to(at::kLong);  // which any ignore_index can be compared with
  const at::Tensor counted = index.ne(options.ignore_index);
  const at::Tensor valid = target_kind == TargetKind::kPairs ? counted.any(class_dim(in.logits)) : counted;
  at::Tensor counts = valid.to(at::kDouble);
  if (in.weight.defined() && target_kind == TargetKind::kIndices) {
    const int64_t last = in.weight.size(0) - 1;
    counts = in.weight.to(at::kDouble).take(index.clamp(0, last)) * counts;
  }
  if (in.sample_weight.defined()) counts = counts * zero_unless(valid, in.sample_weight);
  return counts.sum();
}

bool denominator_is_known(const Problem& problem) {
  if (problem.sample_weight) return false;
  return problem.target_kind == TargetKind::kProbabilities ||
         (problem.target_kind == TargetKind::kTeacher && !problem.labels);
}

at::Tensor safe_denominator(const at::Tensor& denominator, const at::Tensor& sum, bool empty_is_zero) {
  if (!empty_is_zero) return denominator;
  return at::where(denominator.eq(0).logical_and(sum.eq(0)), at::ones_like(denominator), denominator);
}

bool has_two_denominators(const Inputs& in, const Options& options) {
  return options.z_loss != 0 && options.reduction == kMean && in.weight.defined() && !in.denominator.defined() &&
         in.target_kind(options) == TargetKind::kIndices;
}

Inputs for_kernels(const Inputs& in, const Options& options) {
  if (!has_two_denominators(in, options)) return in;
  Inputs weighted = in, unweighted = in;
  unweighted.weight.reset();
  const at::Tensor of_classes = count_denominator(in, options);
  weighted.denominator = count_denominator(unweighted, options);
  at::Tensor ratio = weighted.denominator / of_classes;
  if (options.empty_is_zero) {  // then nothing is weighted, unless smoothing has weights of other classes
    at::Tensor nothing = of_classes.eq(0);
    if (options.label_smoothing != 0) nothing = nothing.logical_and(weighted.denominator.eq(0));
    ratio = at::where(nothing, at::ones_like(ratio), ratio);
  }
  weighted.weight = (in.weight.to(at::kDouble) * ratio).to(arithmetic_type(in, options));
  return weighted;
}

}  // namespace xent
