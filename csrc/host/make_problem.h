// Tensors become a Problem: what the host code of every device does first.
#pragma once

#include <initializer_list>

#include "inputs.h"
#include "kernel/problem.h"

namespace xent {

ElementType element_type(at::ScalarType type);

// Kernels write only through views of tensors that are theirs to write.
void* data_of(const at::Tensor& tensor);

// A tensor of the logits' shape; one with an element for each position.
View view_with_classes(const at::Tensor& tensor);
View view_of_positions(const at::Tensor& tensor);

// Drops dimensions of size one and merges neighbours that all views step through as through one.
void merge_dimensions(Problem& problem, std::initializer_list<View*> views);

// The weights of classes as the kernels want them: contiguous, in the type of arithmetic, and from a shard's first
// class on.
at::Tensor weight_for_kernel(const at::Tensor& weight, at::ScalarType arithmetic, int64_t class_begin = 0);

// Fills in everything but `lanes`, results and, where there are weights, `smoothed_total`.
void make_problem(Problem& problem, const Inputs& inputs, const Options& options, const at::Tensor& kernel_weight,
                  at::ScalarType arithmetic, const at::Tensor& lse);

// The softmax of a teacher needs its lse first: the same positions with the teacher in the place of the logits, which
// leave it where the problem's own kernels read it.
void make_teacher_problem(Problem& teacher, const Problem& problem);

// Views of a gradient, and of what is read for it, with positions in the order of its memory. A dense tensor is then
// [outer positions][classes][inner positions].
struct InMemoryOrder {
  at::Tensor gradient, target, grad_output;

  InMemoryOrder(at::Tensor of_gradient, at::Tensor of_target, at::Tensor of_grad_output);

  // How many positions lie between one class and the next.
  int64_t inner_positions() const {
    const int64_t dim = class_dim(gradient);
    return gradient.size(dim) == 1 ? 1 : gradient.stride(dim);
  }
};

}  // namespace xent
