// The gradients of a layer's input, weight and bias, from those of its logits, chunk by chunk.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <vector>

#include "host/inputs.h"

namespace xent::linear {

inline bool is_half(at::ScalarType type) { return type == at::kHalf || type == at::kBFloat16; }

// Memory of the CPU is kept from one step to the next.
at::Tensor new_matrix(at::IntArrayRef shape, const at::Tensor& like, at::ScalarType type);

// Gradients of weight and bias are sums over the chunks. In half precision they are added up in float32 and rounded
// once. Such a sum of bfloat16 on the CPU is in two halves, of which one is the result's own memory.
class LayerGradients {
 public:
  // `weight`: the layer's as a matrix (C * d1 * ... * dK, F).
  LayerGradients(const Layer& layer, const at::Tensor& weight, std::array<bool, 3> wanted, int64_t chunks);

  // grad_logits: (n, C * d1 * ... * dK), of the positions from `first` on, which are overwritten. `labels`: their
  // classes, if there is one for each row, or undefined.
  void add(const at::Tensor& grad_logits, int64_t first, const at::Tensor& labels);

  // Returns those of input, weight and bias; empty where they are not wanted.
  std::array<at::Tensor, 3> results();

 private:
  // The gradients of the labels' logits are by far the largest of a row. Taken out of the product, which is rounded to
  // bfloat16 once for each chunk, and added in float32, they leave little for that rounding to lose.
  struct Labels {
    std::vector<int64_t> classes;
    std::vector<float> gradients;
  };

  void add_to_weight(const at::Tensor& rows, const at::Tensor& input, const at::Tensor& labels);
  static Labels take_labels(const at::Tensor& grad_logits, const at::Tensor& labels);
  void add_labels(const Labels& taken, const at::Tensor& input);
  void add_in_halves(const at::Tensor& grad_logits, const at::Tensor& input, bool first, bool last);

  const Layer& layer_;
  const at::Tensor& weight_;
  int64_t chunks_, done_ = 0;
  at::Tensor of_input_, of_weight_, of_bias_;
  at::Tensor sum_;  // of the weight's gradient: its lower halves, or in float32
  at::Tensor product_;
  bool in_halves_ = false;
};

}  // namespace xent::linear
