#include "host.h"

#include <ATen/EmptyTensor.h>
#include <ATen/ExpandUtils.h>
#include <ATen/Version.h>

#include "gradient_memory.h"

namespace xent {

const Kernels& kernels() {
  static const Kernels& chosen = kernels_for(at::get_cpu_capability().c_str());
  return chosen;
}

Sums sum_pieces(const SumsOfPieces& pieces) {
  Sums sums;
  for (const Sums& piece : pieces) {
    sums.loss += piece.loss;
    sums.weight += piece.weight;
  }
  return sums;
}

void raise_bad_target(const Inputs& in, const Options& options, int64_t position) {
  if (position == kNoPosition) return;
  const TargetKind target_kind = in.target_kind(options);
  at::Tensor target = target_kind == TargetKind::kTeacher ? in.labels() : in.target;
  target = target_kind == TargetKind::kPairs
               ? target.movedim(class_dim(in.logits), -1).reshape({-1, target.size(class_dim(in.logits))})[position]
               : target.reshape(-1)[position].reshape(-1);
  const int64_t classes = options.is_shard() ? options.total_classes : in.logits.size(class_dim(in.logits));
  for (int64_t i = 0; i < target.numel(); ++i) {
    const auto value = target[i].item<int64_t>();
    if (value == options.ignore_index || (value >= 0 && value < classes)) continue;
    TORCH_CHECK_INDEX(false, "Target ", value, " is out of bounds.");
  }
}

constexpr c10::DispatchKeySet kCpu(c10::DispatchKey::CPU);

at::Tensor new_tensor(at::IntArrayRef shape, at::ScalarType type) {
  const size_t bytes = at::detail::computeStorageNbytesContiguous(shape, c10::elementSize(type));
  if (bytes < kLargeGradient) return at::detail::empty_cpu(shape, at::TensorOptions().dtype(type));
  return at::detail::empty_generic(shape, gradient_memory(), kCpu, type, std::nullopt);
}

at::Tensor empty_gradient(const at::Tensor& tensor) {
  const at::DimVector strides(tensor.is_non_overlapping_and_dense()
                                  ? tensor.strides()
                                  : at::IntArrayRef(at::infer_dense_strides(tensor.sizes(), tensor.strides())));
  if (size_t(tensor.numel() * tensor.element_size()) < kLargeGradient) {
    return at::detail::empty_strided_cpu(tensor.sizes(), strides, tensor.scalar_type());
  }
  return at::detail::empty_strided_generic(tensor.sizes(), strides, gradient_memory(), kCpu, tensor.scalar_type());
}

bool is_larger_than_caches(const at::Tensor& tensor) {
  constexpr int64_t kCaches = int64_t{16} << 20;
  return tensor.numel() * tensor.element_size() >= kCaches;
}

void store_scalar(const at::Tensor& scalar, double value) {
  void* data = scalar.mutable_data_ptr();
  switch (element_type(scalar.scalar_type())) {
    case ElementType::kFloat16: *static_cast<Float16*>(data) = to_float16(float(value)); break;
    case ElementType::kBFloat16: *static_cast<BFloat16*>(data) = to_bfloat16(float(value)); break;
    case ElementType::kFloat32: *static_cast<float*>(data) = float(value); break;
    default: *static_cast<double*>(data) = value;
  }
}

}  // namespace xent
