// Tensors become a Problem: what the host code of every device does first.
#pragma once

#include <initializer_list>

#include "cross_entropy.h"
#include "problem.h"

namespace xent {

ElementType element_type(at::ScalarType type);

// Kernels write only through views of tensors that are theirs to write.
void* data_of(const at::Tensor& tensor);

// A tensor of the logits' shape; one with an element for each position.
View view_with_classes(const at::Tensor& tensor);
View view_of_positions(const at::Tensor& tensor);

// Drops dimensions of size one and merges neighbours that all views step through as through one.
void merge_dimensions(Problem& problem, std::initializer_list<View*> views);

// The weights as the kernels want them: contiguous, in the type of arithmetic.
OptionalTensor weight_for_kernel(const OptionalTensor& weight, at::ScalarType arithmetic);

int64_t count_positions(const at::Tensor& logits);

// Everything but `lanes`, results and, where there are weights, `smoothed_total`.
void describe(Problem& problem, const at::Tensor& logits, const at::Tensor& target, const OptionalTensor& kernel_weight,
              at::ScalarType arithmetic, const at::Tensor& lse, int64_t ignore_index, double label_smoothing);

// Raise an error unless the private operators were called with what the public one passes on.
void check_forward(const at::Tensor& logits, const at::Tensor& target, const OptionalTensor& weight, int64_t reduction,
                   int64_t ignore_index, double label_smoothing, at::ScalarType loss_dtype);
void check_backward(const at::Tensor& grad_output, const at::Tensor& logits, const at::Tensor& target,
                    const OptionalTensor& weight, const at::Tensor& lse, int64_t reduction, int64_t ignore_index,
                    double label_smoothing, bool target_wanted);

}  // namespace xent
