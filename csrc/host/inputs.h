// The tensors of a loss. Their meaning is in cross_entropy_ext/functional.
#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>
#include <c10/core/SymIntArrayRef.h>

#include <vector>

#include "options.h"

namespace xent {

using OptionalTensor = std::optional<at::Tensor>;
inline OptionalTensor optional(const at::Tensor& tensor) {
  return tensor.defined() ? OptionalTensor(tensor) : std::nullopt;
}

// The output layer that makes logits = input @ weight^T + bias.
struct Layer {
  at::Tensor input;   // (N, F)
  at::Tensor weight;  // (C, d1..dK, F)
  at::Tensor bias;    // (C, d1..dK), or undefined
};

// Every tensor but `logits` and `target` may be undefined.
struct Inputs {
  at::Tensor logits;              // (N, C, d1..dK); of a layer only a placeholder, which has no memory
  at::Tensor target;              // class indices, probabilities, the classes of pairs, or the teacher's logits
  at::Tensor weight = {};         // of classes
  at::Tensor companion = {};      // the probabilities of pairs, or the labels that go with a teacher
  at::Tensor sample_weight = {};  // a factor for each position
  at::Tensor denominator = {};    // of a mean, instead of what its positions weigh: a float64 scalar
  Layer layer = {};               // makes the logits, if it is defined

  const at::Tensor& pair_probs() const { return companion; }
  const at::Tensor& labels() const { return companion; }
  bool has_layer() const { return layer.input.defined(); }

  TargetKind target_kind(const Options& options) const;

  // The tensor that a gradient of the target is for: probabilities, or the teacher's logits.
  const at::Tensor& differentiable_target(const Options& options) const;

  // The same with logits that exist.
  Inputs with_logits() const;
};

// The order in which the tensors of a call are saved for the backward, and in which autograd counts them. Numbers that
// are tensors follow.
enum Slot : size_t {
  kLogits,  // or the layer's input
  kTarget,
  kWeight,
  kCompanion,
  kSampleWeight,
  kDenominator,
  kLayerWeight,
  kLayerBias,
  kFirstNumber,
};
constexpr size_t kSlots = kFirstNumber + kNumbers;

// Returns the tensors up to the last that there is.
std::vector<at::Tensor> to_slots(const Inputs& inputs, const Options& options);
Inputs inputs_of(at::TensorList slots);
std::vector<at::Tensor> numbers_of(at::TensorList slots);

// Optional tensors as private operators take them: the inputs from `weight` on but for a layer, and then the numbers,
// up to the last that there is. A list, because PyTorch's checks of operators take the None of a single optional tensor
// for one that was written to.
using OptionalTensors = c10::List<OptionalTensor>;
OptionalTensors as_list(std::vector<at::Tensor> tensors);
OptionalTensors to_list(const Inputs& inputs, const Options& options);
at::Tensor element_of(const OptionalTensors& list, size_t place);
std::vector<at::Tensor> to_tensors(const OptionalTensors& list);

// ---- shapes and types -----------------------------------------------------------------------------------------------

bool is_logits_type(at::ScalarType type);  // of logits, probabilities and losses
bool is_index_type(at::ScalarType type);
inline at::ScalarType widened(at::ScalarType type) {
  return type == at::kHalf || type == at::kBFloat16 ? at::kFloat : type;
}

// Returns true for a tensor with memory behind it, rather than one that a compiler or a transform traces with.
bool is_eager(const at::Tensor& tensor);

inline int64_t class_dim(const at::Tensor& logits) { return logits.dim() == 1 ? 0 : 1; }

// (N, d1..dK) of logits (N, C, d1..dK), or () of (C).
c10::SymDimVector shape_of_positions(const at::Tensor& logits);
int64_t count_positions(const at::Tensor& logits);

bool has_shape_of_logits(const at::Tensor& logits, const at::Tensor& target);     // as probabilities have
bool has_shape_of_positions(const at::Tensor& logits, const at::Tensor& target);  // as class indices have
bool has_shape_of_pairs(const at::Tensor& logits, const at::Tensor& target);      // (N, k, d1..dK), or (k)

// A tensor of the shape of the layer's logits, whose elements all share one.
at::Tensor logits_placeholder(const Layer& layer);
at::Tensor make_logits(const Layer& layer);

// The type in which a position's sums are formed, and of what the forward saves.
at::ScalarType arithmetic_type(const Inputs& inputs, const Options& options);

// The type of the loss: the one asked for, or native's.
at::ScalarType loss_type(const Inputs& inputs, const Options& options);

}  // namespace xent
