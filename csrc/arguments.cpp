// What the fused kernels take, decided once for all devices.
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>

#include "cross_entropy.h"
#include "problem.h"

namespace xent {
namespace {

// (N, C, d1..dK) against (N, d1..dK), or (C) against ().
bool is_shape_of_positions(const at::Tensor& logits, const at::Tensor& target) {
  if (target.dim() != logits.dim() - 1) return false;
  const int64_t dim = class_dim(logits);
  for (int64_t d = 0; d < target.dim(); ++d) {
    if (target.sym_size(d) != logits.sym_size(d < dim ? d : d + 1)) return false;
  }
  return true;
}

bool is_plain(const at::Tensor& tensor, const at::Tensor& logits) {
  return tensor.layout() == at::kStrided && tensor.device() == logits.device();
}

// Whether this build has kernels for the device.
bool has_kernel(c10::Device device) {
  if (device.is_cpu() || device.is_meta()) return true;
  if (!device.is_cuda()) return false;
  static const bool cuda = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("cross_entropy_ext::_forward", "")
                               .hasKernelForDispatchKey(c10::DispatchKey::CUDA);
  return cuda;
}

}  // namespace

bool has_value(const OptionalTensor& tensor) { return tensor && tensor->defined(); }

bool is_logits_type(at::ScalarType type) {
  return type == at::kFloat || type == at::kBFloat16 || type == at::kHalf || type == at::kDouble;
}

bool is_index_type(at::ScalarType type) {
  return type == at::kLong || type == at::kInt || type == at::kShort || type == at::kChar || type == at::kByte;
}

bool is_soft(const at::Tensor& logits, const at::Tensor& target) {
  return logits.dim() == target.dim() && logits.sym_sizes() == target.sym_sizes();
}

at::ScalarType default_loss_dtype(const at::Tensor& logits, const at::Tensor& target, const OptionalTensor& weight) {
  auto type = logits.scalar_type();
  if (!is_soft(logits, target)) return type;
  type = c10::promoteTypes(type, target.scalar_type());
  return has_value(weight) ? c10::promoteTypes(type, weight->scalar_type()) : type;
}

at::ScalarType arithmetic_type(const at::Tensor& logits, const at::Tensor& target, const OptionalTensor& weight) {
  return default_loss_dtype(logits, target, weight) == at::kDouble ? at::kDouble : at::kFloat;
}

void check_options(int64_t reduction, double label_smoothing, std::optional<at::ScalarType> loss_dtype) {
  TORCH_CHECK(reduction >= kNone && reduction <= kSum, "reduction must be 0, 1 or 2. Got: ", reduction);
  TORCH_CHECK(!loss_dtype || is_logits_type(*loss_dtype),
              "loss_dtype must be float16, bfloat16, float32 or float64. Got: ", *loss_dtype);
  TORCH_CHECK(label_smoothing >= 0, "label_smoothing must be between 0.0 and 1.0. Got: ", label_smoothing);
}

bool is_supported(const at::Tensor& logits, const at::Tensor& target, const OptionalTensor& weight,
                  int64_t ignore_index, double label_smoothing, std::optional<at::ScalarType> loss_dtype) {
  constexpr int64_t kMostDims = kMaxDims + 1;
  if (!is_plain(logits, logits) || !is_plain(target, logits) || !has_kernel(logits.device())) return false;
  if (!is_logits_type(logits.scalar_type()) || logits.dim() < 1 || logits.dim() > kMostDims) return false;
  if (!(label_smoothing >= 0 && label_smoothing <= 1)) return false;
  const bool soft = is_soft(logits, target);
  if (soft && (!is_logits_type(target.scalar_type()) || ignore_index >= 0)) return false;
  if (!soft && (!is_index_type(target.scalar_type()) || !is_shape_of_positions(logits, target))) return false;
  const auto classes = logits.sym_size(class_dim(logits));
  if (classes == 0) return false;
  if (!has_value(weight)) return true;
  if (!is_plain(*weight, logits) || weight->dim() != 1 || weight->sym_size(0) != classes) return false;
  if (soft) return !weight->is_complex();
  // Native asks for the logits' type; where the loss is wanted in float32, weights of that type go with it.
  const bool type_matches =
      weight->scalar_type() == logits.scalar_type() ||
      (weight->scalar_type() == at::kFloat && loss_dtype == at::kFloat && logits.scalar_type() != at::kDouble);
  return type_matches && !(c10::GradMode::is_enabled() && weight->requires_grad());
}

}  // namespace xent
