// The number that a mean divides by.
//
// It is given by the caller, or it is known from the shape (probabilities: as many as there are positions), or it is
// counted: the sum over the positions that are not ignored of sample weight times class weight. A mean over nothing is
// 0 / 0, which `empty_is_zero` makes zero by a denominator of one.
#pragma once

#include "inputs.h"

namespace xent {

// Counts it in torch's own operations: a float64 scalar. A class out of range is an error elsewhere, and none here.
at::Tensor count_denominator(const Inputs& inputs, const Options& options);

// Returns true if it is the number of positions.
bool denominator_is_known(const Problem& problem);

// Returns one where a mean over nothing is to be zero: the gradient divides by it, too.
inline double safe_denominator(double denominator, double sum, bool empty_is_zero) {
  return empty_is_zero && denominator == 0 && sum == 0 ? 1 : denominator;
}
at::Tensor safe_denominator(const at::Tensor& denominator, const at::Tensor& sum, bool empty_is_zero);

// Returns true if a mean divides the cross entropy by class weights, and has a z-loss, which it does not.
bool has_two_denominators(const Inputs& inputs, const Options& options);

// Returns the inputs as the kernels take them, which divide all of a mean by one number. The z-loss is not weighted by
// classes, and so not divided by their weights: with the denominators D of the cross entropy and Z of the z-loss,
//
//   sum_i s_i w_i ce_i / D + z sum_i s_i lse_i^2 / Z = sum_i s_i (w_i Z / D ce_i + z lse_i^2) / Z
//
// So where a mean has both, the kernels are given the class weights w Z / D, and Z as a denominator.
Inputs for_kernels(const Inputs& inputs, const Options& options);

// Returns the tensor, and zero where the condition is false; a condition that is undefined is true everywhere.
at::Tensor zero_unless(const at::Tensor& condition, const at::Tensor& tensor);

}  // namespace xent
