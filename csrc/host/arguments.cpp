#include "arguments.h"

#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>

namespace xent {
namespace {

bool is_on_device_of(const at::Tensor& tensor, const at::Tensor& logits) {
  return tensor.layout() == at::kStrided && tensor.device() == logits.device();
}

// Returns true if this build has kernels for the device.
bool has_kernel(c10::Device device) {
  if (device.is_cpu() || device.is_meta()) return true;
  if (!device.is_cuda()) return false;
  static const bool cuda = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("cross_entropy_ext::_forward", "")
                               .hasKernelForDispatchKey(c10::DispatchKey::CUDA);
  return cuda;
}

// Returns true for a layer whose product is one that torch's matrix multiplication makes of its tensors as they are.
bool is_supported(const Layer& layer) {
  const auto fits = [&](const at::Tensor& tensor) {
    return is_on_device_of(tensor, layer.input) && tensor.scalar_type() == layer.input.scalar_type();
  };
  return fits(layer.input) && fits(layer.weight) && (!layer.bias.defined() || fits(layer.bias));
}

}  // namespace

bool numbers_need_composite(const Options& options) {
  if (options.tensors.empty() || !c10::GradMode::is_enabled()) return false;
  for (size_t i = 0; i < kNumbers; ++i) {
    const at::Tensor& number = options.tensors[i];
    if (!number.defined() || !number.requires_grad()) continue;
    if (kNumberOptions[i].value != &Numbers::logit_scale || (is_eager(number) && number.item<double>() == 0))
      return true;
  }
  return false;
}

Options with_loss_type(const Inputs& inputs, const Options& options) {
  Options typed = options;
  typed.loss_dtype = loss_type(inputs, options);
  return typed;
}

std::pair<Inputs, Options> with_autocast(const Inputs& given, const Options& asked) {
  check(given, asked);
  Inputs inputs = given;
  Options options = asked;
  const auto device = inputs.logits.device().type();
  if (inputs.has_layer()) {
    const auto type = at::autocast::get_autocast_dtype(device);
    for (at::Tensor* tensor : {&inputs.layer.input, &inputs.layer.weight, &inputs.layer.bias}) {
      if (tensor->defined()) *tensor = at::autocast::cached_cast(type, *tensor, device);
    }
    inputs.logits = logits_placeholder(inputs.layer);
  }
  if (inputs.weight.defined()) inputs.weight = inputs.weight.to(widened(inputs.weight.scalar_type()));
  if (options.loss_dtype) return {inputs, options};
  auto type = widened(inputs.logits.scalar_type());
  if (is_dense(inputs.target_kind(options)) && is_logits_type(type) && is_logits_type(inputs.target.scalar_type())) {
    type = c10::promoteTypes(type, widened(inputs.target.scalar_type()));
    if (inputs.weight.defined()) type = c10::promoteTypes(type, inputs.weight.scalar_type());
  }
  options.loss_dtype = type;
  return {inputs, options};
}

int64_t saved_rows(TargetKind target_kind, const Options& options) {
  if (target_kind == TargetKind::kTeacher) return saved::kTeacherLseLost + 1;
  if (options.statistics) return saved::kArgmax + 1;
  return target_kind == TargetKind::kProbabilities || options.is_shard() ? saved::kMass + 1 : saved::kLseLost + 1;
}

// ---- checks ---------------------------------------------------------------------------------------------------------

void check(const Inputs& inputs, const Options& options) {
  check_options(options);
  TORCH_CHECK_VALUE(!options.is_shard(), "cross_entropy_ext: only _forward and _backward take a shard of the classes");
  if (options.target_kind == TargetKind::kNone && !inputs.sample_weight.defined() && !inputs.denominator.defined())
    return;
  const at::Tensor &logits = inputs.logits, &target = inputs.target;
  const at::Tensor &weight = inputs.weight, &companion = inputs.companion, &sample_weight = inputs.sample_weight;
  const auto positions = [&] { return c10::str(c10::SymIntArrayRef(shape_of_positions(logits))); };
  const auto check_type = [](const at::Tensor& tensor, bool is_right, const char* name, const char* accepted) {
    TORCH_CHECK_VALUE(is_right, name, " must be a tensor of ", accepted, ", but got ", tensor.scalar_type());
  };
  if (options.target_kind == TargetKind::kPairs || options.target_kind == TargetKind::kTeacher) {
    const char* const name = options.target_kind == TargetKind::kPairs ? "input" : "student_logits";
    TORCH_CHECK_VALUE(logits.dim() >= 1, name, " must have a class dimension, but got a scalar");
    check_type(logits, logits.is_floating_point(), name, "a floating type");
  }
  if (options.target_kind == TargetKind::kPairs) {
    check_type(target, is_index_type(target.scalar_type()), "indices", "int64, int32, int16, int8 or uint8");
    TORCH_CHECK_VALUE(has_shape_of_pairs(logits, target), "indices must have the input's shape ", logits.sym_sizes(),
                      " with k in the place of its classes, but got ", target.sym_sizes());
    TORCH_CHECK_VALUE(target.sym_size(class_dim(logits)) > 0,
                      "indices must have at least one class for each position (k > 0), but got the shape ",
                      target.sym_sizes());
    TORCH_CHECK_VALUE(companion.defined(), "probs must be a tensor of the shape of indices, but got None");
    check_type(companion, companion.is_floating_point(), "probs", "a floating type");
    TORCH_CHECK_VALUE(has_shape_of_logits(target, companion), "probs must have the shape of indices, ",
                      target.sym_sizes(), ", but got ", companion.sym_sizes());
  }
  if (options.target_kind == TargetKind::kTeacher) {
    check_type(target, target.is_floating_point(), "teacher_logits", "a floating type");
    TORCH_CHECK_VALUE(has_shape_of_logits(logits, target), "teacher_logits must have the shape of student_logits, ",
                      logits.sym_sizes(), ", but got ", target.sym_sizes());
    if (companion.defined()) {
      check_type(companion, is_index_type(companion.scalar_type()), "target", "int64, int32, int16, int8 or uint8");
      TORCH_CHECK_VALUE(has_shape_of_positions(logits, companion), "target must have a class for each position, ",
                        positions(), ", but got the shape ", companion.sym_sizes());
    }
  }
  if (weight.defined() && options.target_kind == TargetKind::kPairs) {
    check_type(weight, !weight.is_complex(), "weight", "a real type");
    TORCH_CHECK_VALUE(weight.dim() == 1 && weight.sym_size(0) == logits.sym_size(class_dim(logits)),
                      "weight must have one element for each of the ", logits.sym_size(class_dim(logits)),
                      " classes, but got the shape ", weight.sym_sizes());
  }
  if (sample_weight.defined()) {
    check_type(sample_weight, sample_weight.is_floating_point(), "sample_weight", "a floating type");
    TORCH_CHECK_VALUE(has_shape_of_positions(logits, sample_weight),
                      "sample_weight must have a factor for each position, ", positions(), ", but got the shape ",
                      sample_weight.sym_sizes());
  }
  if (inputs.denominator.defined()) {
    TORCH_CHECK_VALUE(options.reduction == kMean,
                      "denominator is what reduction 'mean' divides by, but got another one");
    check_type(inputs.denominator, inputs.denominator.scalar_type() == at::kDouble, "denominator", "float64");
    TORCH_CHECK_VALUE(inputs.denominator.dim() == 0,
                      "denominator must be a number or a scalar tensor, of shape (), but got the shape ",
                      inputs.denominator.sym_sizes());
    TORCH_CHECK_VALUE(inputs.denominator.device() == logits.device(), "denominator must be on the input's device, ",
                      logits.device(), ", but is on ", inputs.denominator.device());
  }
}

bool is_supported(const Inputs& inputs, const Options& options) {
  if (inputs.has_layer() && !is_supported(inputs.layer)) return false;
  return has_kernel(inputs.logits.device()) && is_valid(inputs, options);
}

bool is_valid(const Inputs& inputs, const Options& options) {
  constexpr int64_t kMostDims = kMaxDims + 1;
  const at::Tensor &logits = inputs.logits, &target = inputs.target;
  const at::Tensor &weight = inputs.weight, &companion = inputs.companion, &sample_weight = inputs.sample_weight;
  if (!is_on_device_of(logits, logits) || !is_on_device_of(target, logits)) return false;
  if (!is_logits_type(logits.scalar_type()) || logits.dim() < 1 || logits.dim() > kMostDims) return false;
  const bool smooths = options.label_smoothing >= 0 && options.label_smoothing <= 1;
  if (!smooths && !options.tensor(&Numbers::label_smoothing).defined()) return false;
  if (numbers_need_composite(options)) return false;
  const auto classes = logits.sym_size(class_dim(logits));
  if (classes == 0) return false;
  const auto is_of_positions = [&](const at::Tensor& tensor) {
    return is_on_device_of(tensor, logits) && has_shape_of_positions(logits, tensor);
  };
  const bool grad = c10::GradMode::is_enabled();
  if (sample_weight.defined()) {
    if (!is_of_positions(sample_weight) || !is_logits_type(sample_weight.scalar_type())) return false;
    if (grad && sample_weight.requires_grad()) return false;
  }
  if (inputs.denominator.defined() && grad && inputs.denominator.requires_grad()) return false;
  const TargetKind target_kind = inputs.target_kind(options);
  switch (target_kind) {
    case TargetKind::kProbabilities:
      if (!is_logits_type(target.scalar_type()) || options.ignore_index >= 0) return false;
      break;
    case TargetKind::kIndices:
      if (!is_index_type(target.scalar_type()) || !has_shape_of_positions(logits, target)) return false;
      break;
    case TargetKind::kPairs:
      if (!is_index_type(target.scalar_type()) || !has_shape_of_pairs(logits, target)) return false;
      if (!companion.defined() || !is_on_device_of(companion, logits) || !is_logits_type(companion.scalar_type()) ||
          !has_shape_of_logits(target, companion) || target.sym_size(class_dim(logits)) == 0) {
        return false;
      }
      break;
    default:
      if (!is_logits_type(target.scalar_type()) || !has_shape_of_logits(logits, target) || weight.defined()) {
        return false;
      }
      if (companion.defined() && (!is_of_positions(companion) || !is_index_type(companion.scalar_type()))) {
        return false;
      }
  }
  if (!weight.defined()) return true;
  const auto all_classes = options.is_shard() ? c10::SymInt(options.total_classes) : classes;
  if (!is_on_device_of(weight, logits) || weight.dim() != 1 || weight.sym_size(0) != all_classes) return false;
  if (target_kind == TargetKind::kProbabilities && options.is_plain() && !sample_weight.defined())
    return !weight.is_complex();
  if (grad && weight.requires_grad()) return false;
  if (target_kind != TargetKind::kIndices || options.is_shard()) return !weight.is_complex();
  // Native asks for the logits' type; where the loss is wanted in float32 or wider, weights of that type go with it.
  return weight.scalar_type() == logits.scalar_type() ||
         (weight.scalar_type() == at::kFloat && logits.scalar_type() != at::kDouble &&
          (options.loss_dtype == at::kFloat || options.loss_dtype == at::kDouble));
}

}  // namespace xent
