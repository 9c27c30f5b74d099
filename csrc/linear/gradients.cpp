#include "gradients.h"

#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <utility>

#include "cpu/host.h"

namespace xent::linear {

at::Tensor new_matrix(at::IntArrayRef shape, const at::Tensor& like, at::ScalarType type) {
  return like.is_cpu() ? new_tensor(shape, type) : at::empty(shape, like.options().dtype(type));
}

LayerGradients::LayerGradients(const Layer& layer, const at::Tensor& weight, std::array<bool, 3> wanted, int64_t chunks)
    : layer_(layer), weight_(weight), chunks_(chunks) {
  const at::Tensor& input = layer.input;
  const auto type = input.scalar_type();
  if (wanted[0]) of_input_ = new_matrix(input.sizes(), input, type);
  if (wanted[1]) {
    of_weight_ = new_matrix(weight.sizes(), input, type);
    if (is_half(type) && chunks > 1) {
      in_halves_ = input.is_cpu() && type == at::kBFloat16;
      sum_ = new_matrix(weight.sizes(), input, in_halves_ ? at::kShort : at::kFloat);
    }
  }
  if (wanted[2]) {
    of_bias_ = at::zeros({weight.size(0)}, input.options().dtype(type == at::kDouble ? at::kDouble : at::kFloat));
  }
  if (chunks == 0 && wanted[1]) of_weight_.zero_();
}

void LayerGradients::add(const at::Tensor& grad_logits, int64_t first, const at::Tensor& labels) {
  const int64_t n = grad_logits.size(0);
  if (of_input_.defined()) {
    at::Tensor rows = of_input_.narrow(0, first, n);
    at::mm_out(rows, grad_logits, weight_);
  }
  if (of_bias_.defined()) of_bias_.add_(grad_logits.sum(at::IntArrayRef{0}, false, of_bias_.scalar_type()));
  if (of_weight_.defined()) add_to_weight(grad_logits, layer_.input.narrow(0, first, n), labels);
  ++done_;
}

std::array<at::Tensor, 3> LayerGradients::results() {
  if (sum_.defined() && !in_halves_) of_weight_.copy_(sum_);
  const auto or_empty = [&](const at::Tensor& tensor) {
    return tensor.defined() ? tensor : at::empty({0}, layer_.input.options());
  };
  at::Tensor of_weight = or_empty(of_weight_), of_bias = or_empty(of_bias_);
  if (of_weight_.defined()) of_weight = of_weight.view(layer_.weight.sizes());
  if (of_bias_.defined()) of_bias = of_bias.to(layer_.bias.scalar_type()).view(layer_.bias.sizes());
  return {or_empty(of_input_), of_weight, of_bias};
}

void LayerGradients::add_to_weight(const at::Tensor& rows, const at::Tensor& input, const at::Tensor& labels) {
  const bool first = done_ == 0, last = done_ == chunks_ - 1;
  const at::Tensor grad_logits = rows.t();
  if (in_halves_) {
    // Before the last sum is rounded, and after the first has begun.
    const Labels of_labels = labels.defined() ? take_labels(rows, labels) : Labels();
    if (labels.defined() && !first) add_labels(of_labels, input);
    add_in_halves(grad_logits, input, first, last);
    if (labels.defined() && first) add_labels(of_labels, input);
    return;
  }
  at::Tensor& sum = sum_.defined() ? sum_ : of_weight_;
  if (sum.scalar_type() == input.scalar_type()) {
    first ? at::mm_out(sum, grad_logits, input) : at::addmm_out(sum, sum, grad_logits, input);
  } else if (input.is_cuda()) {
    first ? at::mm_out(sum, grad_logits, input, at::kFloat)
          : at::addmm_out(sum, sum, grad_logits, input, at::kFloat, 1, 1);
  } else {
    const at::Tensor product = at::mm(grad_logits, input);
    first ? sum.copy_(product) : sum.add_(product);
  }
}

LayerGradients::Labels LayerGradients::take_labels(const at::Tensor& grad_logits, const at::Tensor& labels) {
  const int64_t classes = grad_logits.size(1);
  const at::Tensor index = labels.to(at::kLong).contiguous();
  const int64_t* const label = index.const_data_ptr<int64_t>();
  auto* const rows = grad_logits.mutable_data_ptr<at::BFloat16>();
  Labels taken;
  for (int64_t n = 0; n < grad_logits.size(0); ++n) {
    if (label[n] < 0 || label[n] >= classes) {  // ignored: its row is zero
      taken.classes.push_back(0);
      taken.gradients.push_back(0);
      continue;
    }
    at::BFloat16& of_label = rows[n * classes + label[n]];
    taken.classes.push_back(label[n]);
    taken.gradients.push_back(std::exchange(of_label, at::BFloat16(0)));
  }
  return taken;
}

void LayerGradients::add_labels(const Labels& taken, const at::Tensor& input) {
  const at::Tensor rows = input.contiguous();
  const int64_t features = rows.size(1);
  auto* const upper = static_cast<uint16_t*>(of_weight_.mutable_data_ptr());
  auto* const lower = static_cast<uint16_t*>(sum_.mutable_data_ptr());
  const auto* const x = static_cast<const uint16_t*>(rows.const_data_ptr());
  for (int64_t n = 0; n < rows.size(0); ++n) {
    const float factor = taken.gradients[size_t(n)];
    const int64_t row = taken.classes[size_t(n)] * features;
    if (factor != 0) kernels().add_scaled_to_halves(upper + row, lower + row, x + n * features, factor, features);
  }
}

// A product of few classes at a time stays in the caches until it is added.
void LayerGradients::add_in_halves(const at::Tensor& grad_logits, const at::Tensor& input, bool first, bool last) {
  constexpr int64_t kElements = int64_t{1} << 19, kGrain = 1 << 15;
  const int64_t features = input.size(1), rows = std::max<int64_t>(1, kElements / std::max<int64_t>(1, features));
  if (!product_.defined()) product_ = new_matrix({std::min(rows, weight_.size(0)), features}, input, at::kBFloat16);
  const auto bits = [](const at::Tensor& tensor) { return static_cast<uint16_t*>(tensor.mutable_data_ptr()); };
  for (int64_t c = 0; c < weight_.size(0); c += rows) {
    at::Tensor product = product_.narrow(0, 0, std::min(rows, weight_.size(0) - c));
    at::mm_out(product, grad_logits.narrow(0, c, product.size(0)), input);
    uint16_t* const upper = bits(of_weight_) + c * features;
    uint16_t* const lower = bits(sum_) + c * features;
    const uint16_t* const added = bits(product);
    for_each_piece_of(kGrain, product.numel(), 1, [&](int64_t, int64_t begin, int64_t end) {
      kernels().add_to_halves(upper + begin, lower + begin, added + begin, end - begin, first, last);
    });
  }
}

}  // namespace xent::linear
