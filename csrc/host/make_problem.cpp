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

OptionalTensor weight_for_kernel(const OptionalTensor& weight, at::ScalarType arithmetic, int64_t class_begin) {
  if (!weight || !weight->defined()) return std::nullopt;
  const at::Tensor typed = weight->to(arithmetic);
  return class_begin != 0 ? at::roll(typed, -class_begin) : typed.contiguous();
}

int64_t count_positions(const at::Tensor& logits) {
  return logits.numel() / std::max<int64_t>(1, logits.size(class_dim(logits)));
}

bool has_own_kernels(const Options& options) {
  return options.target_kind == TargetKind::kNone && !options.statistics && options.softcap == 0 &&
         options.logit_scale == 1 && !options.is_shard();
}

void make_problem(Problem& problem, const Inputs& inputs, const Options& options, const OptionalTensor& kernel_weight,
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
  problem.objective = !has_own_kernels(options)                           ? Objective::kGeneral
                      : problem.target_kind == TargetKind::kProbabilities ? Objective::kProbabilities
                      : options.label_smoothing > 0                       ? Objective::kSmoothedIndex
                                                                          : Objective::kIndex;
  problem.arithmetic_in_double = arithmetic == at::kDouble;
  problem.label_smoothing = problem.target_kind == TargetKind::kTeacher ? 0 : options.label_smoothing;
  problem.keep = 1 - problem.label_smoothing;
  problem.share = problem.label_smoothing / double(problem.all_classes());
  problem.z_loss = options.z_loss;
  problem.ignore_index = options.ignore_index;
  problem.logits = view_with_classes(logits);
  problem.target = problem.target_kind == TargetKind::kIndices ? view_of_positions(target) : view_with_classes(target);
  problem.weight = kernel_weight ? data_of(*kernel_weight) : nullptr;
  if (has_value(inputs.sample_weight)) problem.sample_weight = view_of_positions(*inputs.sample_weight);
  problem.lse = data_of(lse);
  problem.smoothed_total = is_dense(problem.target_kind) ? 0 : options.label_smoothing;
  if (problem.objective != Objective::kGeneral) return;

  problem.softcap = options.softcap;
  problem.logit_scale = options.logit_scale;
  if (problem.target_kind == TargetKind::kPairs) {
    problem.pairs = target.size(dim);
    problem.probs = view_with_classes(*inputs.companion);
  }
  if (problem.target_kind == TargetKind::kTeacher) {
    const bool labels = has_value(inputs.companion);
    if (labels) problem.labels = view_of_positions(*inputs.companion);
    problem.temperature = options.temperature;
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

bool count_is_known(const Problem& problem) {
  if (problem.sample_weight) return false;
  return problem.target_kind == TargetKind::kProbabilities ||
         (problem.target_kind == TargetKind::kTeacher && !problem.labels);
}

namespace {

void check_shard(const Inputs& inputs, const Options& options) {
  if (!options.is_shard() && options.class_begin == 0) return;
  const int64_t begin = options.class_begin, total = options.total_classes;
  const int64_t classes = inputs.logits.dim() > 0 ? inputs.logits.size(class_dim(inputs.logits)) : 0;
  TORCH_CHECK_VALUE(
      begin >= 0 && classes <= total && begin <= total - classes && total <= std::numeric_limits<int32_t>::max(),
      "cross_entropy_ext: the classes [", begin, ", ", begin + classes, ") are no shard of ", total);
  TORCH_CHECK_VALUE(options.target_kind != TargetKind::kTeacher,
                    "cross_entropy_ext: a teacher's classes cannot be sharded");
}

// With class weights in the type of arithmetic, which go with a wider loss.
bool is_supported_in_float(const Inputs& inputs, Options options) {
  options.loss_dtype = at::kFloat;
  return is_supported(inputs, options);
}

}  // namespace

void check_forward(const Inputs& inputs, const Options& options) {
  check_options(options);
  check_shard(inputs, options);
  TORCH_CHECK(options.loss_dtype && (is_supported(inputs, options) || is_supported_in_float(inputs, options)),
              "cross_entropy_ext::_forward: arguments that cross_entropy_ext::cross_entropy does not pass on");
}

void check_backward(const Gradients& gradients, const Inputs& inputs, const Options& options, bool target_wanted,
                    bool finds_lse) {
  check_shard(inputs, options);
  TORCH_CHECK(is_supported(inputs, options) || is_supported_in_float(inputs, options),
              "cross_entropy_ext::_backward: arguments that _forward does not accept");
  const auto arithmetic = arithmetic_type(inputs, options);
  const TargetKind target_kind = inputs.target_kind(options);
  const at::Tensor &lse = gradients.lse, &grad_output = gradients.grad_output;
  TORCH_CHECK(target_kind != TargetKind::kIndices || !target_wanted,
              "cross_entropy_ext::_backward: class indices have no gradient");
  const int64_t positions = count_positions(inputs.logits);
  const bool found_later = finds_lse && lse.numel() == 0;
  TORCH_CHECK(found_later || (lse.is_contiguous() && lse.scalar_type() == arithmetic &&
                              lse.numel() == saved_rows(target_kind, options) * positions),
              "cross_entropy_ext::_backward: lse is not what _forward returned");
  TORCH_CHECK(options.reduction == kNone
                  ? grad_output.numel() == positions && grad_output.dim() == inputs.logits.dim() - 1
                  : grad_output.numel() == 1,
              "cross_entropy_ext::_backward: grad_output of shape ", grad_output.sizes(), " is not the loss's");
  TORCH_CHECK(grad_output.is_floating_point(), "cross_entropy_ext::_backward: grad_output of type ",
              grad_output.scalar_type());
  if (!has_value(gradients.grad_statistics)) return;
  const at::Tensor& of_statistics = *gradients.grad_statistics;
  TORCH_CHECK(options.statistics && of_statistics.is_contiguous() && of_statistics.scalar_type() == arithmetic &&
                  of_statistics.numel() == 3 * positions,
              "cross_entropy_ext::_backward: grad_statistics are not those of _forward's statistics");
}

}  // namespace xent
