// The output layer and its loss as one operator: logits = input @ weight^T + bias exist for a chunk of positions at a
// time. Matrix products are torch's own; the loss of a chunk, and its gradient in the chunk's place, are this
// package's.
#pragma once

#include "host/cross_entropy.h"

namespace xent::linear {

// What the logits (N, C, d1..dK) are made of. `others` has everything else that the loss is made of; its logits are a
// stand-in with the shape, the type and the device of those that are never made, and no memory.
struct Layer {
  const at::Tensor& input;     // (N, F)
  const at::Tensor& weight;    // (C, d1..dK, F)
  const OptionalTensor& bias;  // (C, d1..dK)
};

// A tensor of the shape of the layer's logits, which all share one element.
at::Tensor logits_placeholder(const Layer& layer);

// How many positions of N have their logits in memory at the same time; `asked` if it is not zero. `adds_up`: for a
// gradient of the weight.
int64_t chunk_size(const Layer& layer, int64_t asked, bool adds_up = false);

// The logits, all of them: for what only the composite can do.
at::Tensor logits_of(const Layer& layer);

// cross_entropy_ext::_linear_forward: as _forward.
ForwardResult forward(const Layer& layer, const Inputs& others, const Options& options, int64_t chunk);

// cross_entropy_ext::_linear_forward_backward -> loss, and for a grad_output of one the gradients of input, weight and
// bias: empty where they are not wanted. For reductions.
using ForwardBackwardResult = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
ForwardBackwardResult forward_backward(const Layer& layer, const Inputs& others, const Options& options, int64_t chunk,
                                       std::array<bool, 3> wanted);

// cross_entropy_ext::_linear_backward -> gradients of input, weight, bias, and probabilities.
using BackwardResult = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
BackwardResult backward(const Layer& layer, const Gradients& gradients, const Inputs& others, const Options& options,
                        int64_t chunk, std::array<bool, 4> wanted);

// cross_entropy_ext::linear_cross_entropy, linear_cross_entropy_with_stats.
at::Tensor loss(const Layer& layer, const Inputs& others, const Options& options, int64_t chunk);
Results loss_with_stats(const Layer& layer, const Inputs& others, const Options& options, int64_t chunk);

#define XENT_LAYER \
  const at::Tensor &input, const at::Tensor &linear_weight, [[maybe_unused]] const OptionalTensors &linear_bias

namespace schema {
using Loss = at::Tensor(XENT_LAYER, XENT_OTHER_INPUTS, XENT_OPTIONS, int64_t chunk);
using WithStats = Results(XENT_LAYER, XENT_OTHER_INPUTS, XENT_OPTIONS, int64_t chunk);
using Forward = ForwardResult(XENT_LAYER, XENT_OTHER_INPUTS, XENT_OPTIONS, int64_t chunk);
using ForwardBackward = ForwardBackwardResult(XENT_LAYER, XENT_OTHER_INPUTS, XENT_OPTIONS, int64_t chunk,
                                              std::array<bool, 3> wanted);
using Backward = BackwardResult(XENT_GRADIENTS, XENT_LAYER, XENT_OTHER_INPUTS, XENT_SAVED, XENT_OPTIONS, int64_t chunk,
                                std::array<bool, 4> wanted);
}  // namespace schema

}  // namespace xent::linear
