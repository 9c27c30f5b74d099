#include "describe.h"

#include <algorithm>

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

OptionalTensor weight_for_kernel(const OptionalTensor& weight, at::ScalarType arithmetic) {
  if (!weight || !weight->defined()) return std::nullopt;
  return weight->to(arithmetic).contiguous();
}

int64_t count_positions(const at::Tensor& logits) {
  return logits.numel() / std::max<int64_t>(1, logits.size(class_dim(logits)));
}

void describe(Problem& problem, const at::Tensor& logits, const at::Tensor& target, const OptionalTensor& weight,
              at::ScalarType arithmetic, const at::Tensor& lse, int64_t ignore_index, double label_smoothing) {
  const bool soft = is_soft(logits, target);
  const int64_t dim = class_dim(logits);
  problem.classes = logits.size(dim);
  problem.positions = 1;
  for (int64_t d = 0; d < logits.dim(); ++d) {
    if (d == dim) continue;
    problem.size[problem.dims++] = logits.size(d);
    problem.positions *= logits.size(d);
  }
  problem.kind = soft ? TargetKind::kSoft : label_smoothing > 0 ? TargetKind::kSmoothedIndex : TargetKind::kIndex;
  problem.arithmetic_in_double = arithmetic == at::kDouble;
  problem.label_smoothing = label_smoothing;
  problem.ignore_index = ignore_index;
  problem.logits = view_with_classes(logits);
  problem.target = soft ? view_with_classes(target) : view_of_positions(target);
  problem.weight = weight ? data_of(*weight) : nullptr;
  problem.lse = data_of(lse);
  problem.smoothed_total = problem.kind == TargetKind::kSmoothedIndex ? label_smoothing : 0;
}

void check_forward(const at::Tensor& logits, const at::Tensor& target, const OptionalTensor& weight, int64_t reduction,
                   int64_t ignore_index, double label_smoothing, at::ScalarType loss_dtype) {
  check_options(reduction, label_smoothing, loss_dtype);
  TORCH_CHECK(is_supported(logits, target, weight, ignore_index, label_smoothing, loss_dtype),
              "cross_entropy_ext::_forward: arguments that cross_entropy_ext::cross_entropy does not pass on");
}

void check_backward(const at::Tensor& grad_output, const at::Tensor& logits, const at::Tensor& target,
                    const OptionalTensor& weight, const at::Tensor& lse, int64_t reduction, int64_t ignore_index,
                    double label_smoothing, bool target_wanted) {
  TORCH_CHECK(is_supported(logits, target, weight, ignore_index, label_smoothing, std::nullopt) ||
                  is_supported(logits, target, weight, ignore_index, label_smoothing, at::kFloat),
              "cross_entropy_ext::_backward: arguments that _forward does not accept");
  const auto arithmetic = arithmetic_type(logits, target, weight);
  const bool soft = is_soft(logits, target);
  TORCH_CHECK(soft || !target_wanted, "cross_entropy_ext::_backward: class indices have no gradient");
  const int64_t positions = count_positions(logits), rows = soft ? 3 : 2;
  TORCH_CHECK(lse.is_contiguous() && lse.scalar_type() == arithmetic && lse.numel() == rows * positions,
              "cross_entropy_ext::_backward: lse is not what _forward returned");
  TORCH_CHECK(reduction == kNone ? grad_output.numel() == positions && grad_output.dim() == logits.dim() - 1
                                 : grad_output.numel() == 1,
              "cross_entropy_ext::_backward: grad_output of shape ", grad_output.sizes(), " is not the loss's");
  TORCH_CHECK(grad_output.is_floating_point(), "cross_entropy_ext::_backward: grad_output of type ",
              grad_output.scalar_type());
}

}  // namespace xent
