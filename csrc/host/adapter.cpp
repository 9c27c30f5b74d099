#include "adapter.h"

#include <limits>

namespace xent {

Call::Call(const at::Tensor& logits, const at::Tensor& target, std::vector<at::Tensor> others, at::IntArrayRef integers,
           at::ArrayRef<double> numbers) {
  constexpr size_t kTensors = 4, kAll = kTensors + kNumbers;
  TORCH_CHECK(others.size() <= kAll, "cross_entropy_ext: got ", others.size(), " optional tensors, but there are ",
              kAll);
  std::vector<at::Tensor> tensors;
  if (others.size() > kTensors) {
    others.resize(kAll);
    tensors.assign(others.begin() + kTensors, others.end());
  }
  others.resize(kTensors);
  inputs = {logits, target, std::move(others[0]), std::move(others[1]), std::move(others[2]), std::move(others[3]), {}};
  options = Options::of(integers, numbers, std::move(tensors));
}

Call::Call(Layer layer, const at::Tensor& target, std::vector<at::Tensor> others, at::IntArrayRef integers,
           at::ArrayRef<double> numbers, int64_t chunk)
    : Call(logits_placeholder(layer), target, std::move(others), integers, numbers) {
  inputs.layer = std::move(layer);
  options.chunk = chunk;
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
  const at::Tensor& of_statistics = gradients.grad_statistics;
  if (!of_statistics.defined()) return;
  TORCH_CHECK(options.statistics && of_statistics.is_contiguous() && of_statistics.scalar_type() == arithmetic &&
                  of_statistics.numel() == 3 * positions,
              "cross_entropy_ext::_backward: grad_statistics are not those of _forward's statistics");
}

}  // namespace xent
