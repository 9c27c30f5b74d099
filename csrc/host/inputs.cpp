#include "inputs.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>

#include <algorithm>
#include <functional>

namespace xent {

TargetKind Inputs::target_kind(const Options& options) const {
  if (options.target_kind != TargetKind::kNone) return options.target_kind;
  return has_shape_of_logits(logits, target) ? TargetKind::kProbabilities : TargetKind::kIndices;
}

const at::Tensor& Inputs::differentiable_target(const Options& options) const {
  return options.target_kind == TargetKind::kPairs ? pair_probs() : target;
}

Inputs Inputs::with_logits() const {
  if (!has_layer()) return *this;
  return {make_logits(layer), target, weight, companion, sample_weight, denominator, {}};
}

// ---- lists of tensors -----------------------------------------------------------------------------------------------

std::vector<at::Tensor> to_slots(const Inputs& in, const Options& options) {
  std::vector<at::Tensor> slots;
  slots.reserve(kSlots);
  slots.assign({in.has_layer() ? in.layer.input : in.logits, in.target, in.weight, in.companion, in.sample_weight,
                in.denominator, in.layer.weight, in.layer.bias});
  slots.insert(slots.end(), options.tensors.begin(), options.tensors.end());
  while (!slots.back().defined()) slots.pop_back();
  return slots;
}

Inputs inputs_of(at::TensorList slots) {
  const auto at = [&](Slot slot) { return slot < slots.size() ? slots[slot] : at::Tensor(); };
  Inputs inputs{at(kLogits), at(kTarget), at(kWeight), at(kCompanion), at(kSampleWeight), at(kDenominator), {}};
  if (slots.size() > kLayerWeight && slots[kLayerWeight].defined()) {
    inputs.layer = {at(kLogits), at(kLayerWeight), at(kLayerBias)};
    inputs.logits = logits_placeholder(inputs.layer);
  }
  return inputs;
}

std::vector<at::Tensor> numbers_of(at::TensorList slots) {
  if (slots.size() <= kFirstNumber) return {};
  std::vector<at::Tensor> numbers(slots.begin() + kFirstNumber, slots.end());
  numbers.resize(kNumbers);
  return numbers;
}

OptionalTensors as_list(std::vector<at::Tensor> tensors) {
  // Most calls have this list, so it is allocated once. It is not empty: AOTInductor's runtime takes that for no list.
  static const OptionalTensors none({OptionalTensor()});
  while (!tensors.empty() && !tensors.back().defined()) tensors.pop_back();
  if (tensors.empty()) return none;
  OptionalTensors list;
  list.reserve(tensors.size());
  for (const at::Tensor& tensor : tensors) list.push_back(optional(tensor));
  return list;
}

OptionalTensors to_list(const Inputs& in, const Options& options) {
  std::vector<at::Tensor> tensors{in.weight, in.companion, in.sample_weight, in.denominator};
  tensors.insert(tensors.end(), options.tensors.begin(), options.tensors.end());
  return as_list(std::move(tensors));
}

at::Tensor element_of(const OptionalTensors& list, size_t place) {
  return place < list.size() ? list.get(place).value_or(at::Tensor()) : at::Tensor();
}

std::vector<at::Tensor> to_tensors(const OptionalTensors& list) {
  std::vector<at::Tensor> tensors;
  tensors.reserve(list.size());
  for (size_t i = 0; i < list.size(); ++i) tensors.push_back(element_of(list, i));
  return tensors;
}

// ---- shapes and types -----------------------------------------------------------------------------------------------

bool is_logits_type(at::ScalarType type) {
  return type == at::kFloat || type == at::kBFloat16 || type == at::kHalf || type == at::kDouble;
}

bool is_index_type(at::ScalarType type) {
  return type == at::kLong || type == at::kInt || type == at::kShort || type == at::kChar || type == at::kByte;
}

bool is_eager(const at::Tensor& tensor) {
  constexpr c10::DispatchKeySet kTracing({c10::DispatchKey::Python, c10::DispatchKey::Functionalize,
                                          c10::DispatchKey::Batched, c10::DispatchKey::FuncTorchBatched,
                                          c10::DispatchKey::FuncTorchGradWrapper});
  return !tensor.key_set().has_any(kTracing) && !tensor.is_meta() && !c10::impl::TorchDispatchModeTLS::any_modes_set();
}

c10::SymDimVector shape_of_positions(const at::Tensor& logits) {
  c10::SymDimVector shape(logits.sym_sizes());
  if (!shape.empty()) shape.erase(shape.begin() + class_dim(logits));
  return shape;
}

int64_t count_positions(const at::Tensor& logits) {
  return logits.numel() / std::max<int64_t>(1, logits.size(class_dim(logits)));
}

namespace {

// Calls compare(sizes of a, sizes of b): as integers where none is symbolic, which takes a tenth of the time.
template <class Compare>
bool with_sizes(const at::Tensor& a, const at::Tensor& b, const Compare& compare) {
  const bool symbolic =
      a.unsafeGetTensorImpl()->has_symbolic_sizes_strides() || b.unsafeGetTensorImpl()->has_symbolic_sizes_strides();
  return symbolic ? compare(a.sym_sizes(), b.sym_sizes()) : compare(a.sizes(), b.sizes());
}

}  // namespace

bool has_shape_of_logits(const at::Tensor& logits, const at::Tensor& target) {
  return logits.dim() == target.dim() && with_sizes(logits, target, std::equal_to<>());
}

bool has_shape_of_positions(const at::Tensor& logits, const at::Tensor& target) {
  if (target.dim() != logits.dim() - 1) return false;
  const size_t dim = size_t(class_dim(logits));
  return with_sizes(logits, target, [&](const auto& of_logits, const auto& of_target) {
    for (size_t d = 0; d < of_target.size(); ++d) {
      if (of_target[d] != of_logits[d < dim ? d : d + 1]) return false;
    }
    return true;
  });
}

bool has_shape_of_pairs(const at::Tensor& logits, const at::Tensor& target) {
  if (target.dim() != logits.dim()) return false;
  for (int64_t d = 0; d < target.dim(); ++d) {
    if (d != class_dim(logits) && target.sym_size(d) != logits.sym_size(d)) return false;
  }
  return true;
}

at::Tensor logits_placeholder(const Layer& layer) {
  c10::SymDimVector shape(layer.weight.sym_sizes());
  shape.pop_back();
  shape.insert(shape.begin(), layer.input.sym_size(0));
  return at::empty({}, layer.input.options().layout(at::kStrided)).expand_symint(shape);
}

at::Tensor make_logits(const Layer& layer) {
  const at::Tensor& weight = layer.weight;
  const at::Tensor logits = at::linear(layer.input, weight.flatten(0, -2),
                                       layer.bias.defined() ? optional(layer.bias.reshape({-1})) : std::nullopt);
  // A trace would keep the sizes as they are here.
  return weight.dim() == 2 ? logits : logits.view_symint(logits_placeholder(layer).sym_sizes());
}

at::ScalarType loss_type(const Inputs& inputs, const Options& options) {
  if (options.loss_dtype) return *options.loss_dtype;
  auto type = inputs.logits.scalar_type();
  if (!is_dense(inputs.target_kind(options))) return type;
  type = c10::promoteTypes(type, inputs.target.scalar_type());
  return inputs.weight.defined() ? c10::promoteTypes(type, inputs.weight.scalar_type()) : type;
}

at::ScalarType arithmetic_type(const Inputs& inputs, const Options& options) {
  auto type = inputs.logits.scalar_type();
  if (type != at::kDouble && is_dense(inputs.target_kind(options))) {
    Options native;
    native.target_kind = options.target_kind;
    type = loss_type(inputs, native);
  }
  return type == at::kDouble ? at::kDouble : at::kFloat;
}

}  // namespace xent
