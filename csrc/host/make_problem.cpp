#include "make_problem.h"

#include <ATen/ops/roll.h>

#include <algorithm>
#include <limits>

namespace xent {

ElementType element_type(at::ScalarType type) {
  switch (type) {
    case at::kHalf: return ElementType::kFloat16;
    case at::kBFloat16: return ElementType::kBFloat16;
    case at::kFloat: return ElementType::kFloat32;
    case at::kDouble: return ElementType::kFloat64;
    case at::kByte: return ElementType::kUInt8;
    case at::kChar: return ElementType::kInt8;
    case at::kShort: return ElementType::kInt16;
    case at::kInt: return ElementType::kInt32;
    case at::kLong: return ElementType::kInt64;
    default: TORCH_CHECK(false, "cross_entropy_ext: no kernel for ", type);
  }
}

void* data_of(const at::Tensor& tensor) { return const_cast<void*>(tensor.const_data_ptr()); }

View view_with_classes(const at::Tensor& tensor) {
  View view{data_of(tensor), element_type(tensor.scalar_type())};
  const int64_t dim = class_dim(tensor);
  view.class_stride = tensor.stride(dim);
  for (int64_t d = 0, at = 0; d < tensor.dim(); ++d) {
    if (d != dim) view.stride[at++] = tensor.stride(d);
  }
  return view;
}

View view_of_positions(const at::Tensor& tensor) {
  View view{data_of(tensor), element_type(tensor.scalar_type())};
  for (int64_t d = 0; d < tensor.dim(); ++d) view.stride[d] = tensor.stride(d);
  return view;
}

void merge_dimensions(Problem& problem, std::initializer_list<View*> views) {
  int last = -1;
  for (int d = 0; d < problem.dims; ++d) {
    const int64_t size = problem.size[d];
    if (size == 1) continue;
    const bool merges = last >= 0 && std::all_of(views.begin(), views.end(), [&](const View* view) {
                          return view->stride[last] == size * view->stride[d];
                        });
    if (merges) {
      problem.size[last] *= size;
    } else {
      problem.size[++last] = size;
    }
    for (View* view : views) view->stride[last] = view->stride[d];
  }
  if (last < 0) {
    problem.size[++last] = 1;
    for (View* view : views) view->stride[last] = 0;
  }
  problem.dims = last + 1;
}

at::Tensor weight_for_kernel(const at::Tensor& weight, at::ScalarType arithmetic, int64_t class_begin) {
  if (!weight.defined()) return weight;
  const at::Tensor typed = weight.to(arithmetic);
  return class_begin != 0 ? at::roll(typed, -class_begin) : typed.contiguous();
}

void make_problem(Problem& problem, const Inputs& inputs, const Options& options, const at::Tensor& kernel_weight,
                  at::ScalarType arithmetic, const at::Tensor& lse) {
  const at::Tensor &logits = inputs.logits, &target = inputs.target;
  const int64_t dim = class_dim(logits);
  problem.classes = logits.size(dim);
  problem.positions = 1;
  for (int64_t d = 0; d < logits.dim(); ++d) {
    if (d == dim) continue;
    problem.size[problem.dims++] = logits.size(d);
    problem.positions *= logits.size(d);
  }
  problem.target_kind = inputs.target_kind(options);
  problem.statistics = options.statistics;
  problem.class_begin = options.class_begin;
  problem.total_classes = options.total_classes;
  problem.objective = !options.has_own_kernels()                          ? Objective::kGeneral
                      : problem.target_kind == TargetKind::kProbabilities ? Objective::kProbabilities
                      : options.label_smoothing > 0                       ? Objective::kSmoothedIndex
                                                                          : Objective::kIndex;
  problem.arithmetic_in_double = arithmetic == at::kDouble;
  static_cast<Numbers&>(problem) = options;
  if (problem.target_kind == TargetKind::kTeacher) problem.label_smoothing = 0;
  problem.keep = 1 - problem.label_smoothing;
  problem.share = problem.label_smoothing / double(problem.all_classes());
  problem.ignore_index = options.ignore_index;
  problem.logits = view_with_classes(logits);
  problem.target = problem.target_kind == TargetKind::kIndices ? view_of_positions(target) : view_with_classes(target);
  problem.weight = kernel_weight.defined() ? data_of(kernel_weight) : nullptr;
  if (inputs.sample_weight.defined()) problem.sample_weight = view_of_positions(inputs.sample_weight);
  problem.lse = data_of(lse);
  problem.smoothed_total = is_dense(problem.target_kind) ? 0 : options.label_smoothing;
  if (problem.objective != Objective::kGeneral) return;

  if (problem.target_kind == TargetKind::kPairs) {
    problem.pairs = target.size(dim);
    problem.probs = view_with_classes(inputs.pair_probs());
  }
  if (problem.target_kind == TargetKind::kTeacher) {
    const bool labels = inputs.labels().defined();
    if (labels) problem.labels = view_of_positions(inputs.labels());
    problem.logit_scale = 1 / options.temperature;
    problem.teacher_scale = (labels ? options.alpha : 1) * options.temperature * options.temperature;
    problem.label_scale = labels ? 1 - options.alpha : 0;
    problem.kl = options.kl;
  }
}

void make_teacher_problem(Problem& teacher, const Problem& problem) {
  teacher.logits = problem.target;
  teacher.target_kind = TargetKind::kNone;
  teacher.kl = false;
  teacher.target = teacher.labels = teacher.sample_weight = View();
  teacher.z_loss = teacher.softcap = 0;
  const int64_t size = problem.arithmetic_in_double ? 8 : 4;
  teacher.lse = static_cast<char*>(problem.lse) + saved::kTeacherLse * problem.positions * size;
}

InMemoryOrder::InMemoryOrder(at::Tensor of_gradient, at::Tensor of_target, at::Tensor of_grad_output)
    : gradient(std::move(of_gradient)), target(std::move(of_target)), grad_output(std::move(of_grad_output)) {
  at::DimVector order;  // of the positions' dimensions
  for (int64_t d = 0; d < target.dim(); ++d) order.push_back(d);
  const auto stride = [&](int64_t d) { return gradient.stride(d == 0 ? 0 : d + 1); };
  const auto is_outer = [&](int64_t a, int64_t b) { return stride(a) > stride(b); };
  if (std::is_sorted(order.begin(), order.end(), is_outer)) return;
  std::stable_sort(order.begin(), order.end(), is_outer);
  target = target.permute(order);
  if (grad_output.dim() > 0) grad_output = grad_output.permute(order);
  for (int64_t& d : order) d += d > 0;
  order.insert(order.begin() + 1, int64_t{1});
  gradient = gradient.permute(order);
}

}  // namespace xent
