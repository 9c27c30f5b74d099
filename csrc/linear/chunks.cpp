// Linear and cross entropy, a chunk of positions at a time: the operators that do the work, for every device.
//
// A chunk's logits are a matrix product; the loss overwrites them with their gradient while they are in the caches; two
// more products make of it the gradient of the chunk's input, which is final, and what it adds to those of weight and
// bias. So the three products are those of a linear layer, and what is read and written besides is the sum of the
// weight's gradient, once for each chunk: chunks are as small as that allows.
#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <utility>
#include <vector>
#include <limits>

#include "cpu/host.h"
#include "linear.h"

namespace xent::linear {
namespace {

bool is_half(at::ScalarType type) { return type == at::kHalf || type == at::kBFloat16; }

// Of memory that is kept from one step to the next, where there is such.
at::Tensor new_matrix(at::IntArrayRef shape, const at::Tensor& like, at::ScalarType type) {
  return like.is_cpu() ? new_tensor(shape, type) : at::empty(shape, like.options().dtype(type));
}

// (C * d1 * ... * dK, F)
at::Tensor as_matrix(const at::Tensor& weight) { return weight.flatten(0, -2); }

// ---- the gradients of the layer -------------------------------------------------------------------------------------

// Those of weight and bias are sums over the chunks. In half precision they are added up in float32, and rounded once:
// on the CPU those of bfloat16 as two halves, of which one is the result's own memory.
class LayerGradients {
 public:
  LayerGradients(const Layer& layer, const at::Tensor& weight, std::array<bool, 3> wanted, int64_t chunks)
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

  // grad_logits: (n, C * d1 * ... * dK), of the positions from `first` on; of no use afterwards. `labels`: their
  // classes, if there is one for each row.
  void add(const at::Tensor& grad_logits, int64_t first, const OptionalTensor& labels) {
    const int64_t n = grad_logits.size(0);
    if (of_input_.defined()) {
      at::Tensor rows = of_input_.narrow(0, first, n);
      at::mm_out(rows, grad_logits, weight_);
    }
    if (of_bias_.defined()) of_bias_.add_(grad_logits.sum(at::IntArrayRef{0}, false, of_bias_.scalar_type()));
    if (of_weight_.defined()) add_to_weight(grad_logits, layer_.input.narrow(0, first, n), labels);
    ++done_;
  }

  // In the order of Layer; empty where they are not wanted.
  std::array<at::Tensor, 3> results() {
    if (sum_.defined() && !in_halves_) of_weight_.copy_(sum_);
    const auto or_empty = [&](const at::Tensor& tensor) {
      return tensor.defined() ? tensor : at::empty({0}, layer_.input.options());
    };
    at::Tensor of_weight = or_empty(of_weight_), of_bias = or_empty(of_bias_);
    if (of_weight_.defined()) of_weight = of_weight.view(layer_.weight.sizes());
    if (of_bias_.defined()) of_bias = of_bias.to(layer_.bias->scalar_type()).view(layer_.bias->sizes());
    return {or_empty(of_input_), of_weight, of_bias};
  }

 private:
  void add_to_weight(const at::Tensor& rows, const at::Tensor& input, const OptionalTensor& labels) {
    const bool first = done_ == 0, last = done_ == chunks_ - 1;
    const at::Tensor grad_logits = rows.t();
    if (in_halves_) {
      // Before the last sum is rounded, and after the first has begun.
      const Labels of_labels = labels ? take_labels(rows, *labels) : Labels();
      if (labels && !first) add_labels(of_labels, input);
      add_in_halves(grad_logits, input, first, last);
      if (labels && first) add_labels(of_labels, input);
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

  // The gradients of the labels' logits, by far the largest of a row: taken out of the product, which is rounded to
  // bfloat16 once for each chunk, and added in float32, they leave little for that rounding to lose.
  struct Labels {
    std::vector<int64_t> classes;
    std::vector<float> gradients;
  };

  static Labels take_labels(const at::Tensor& grad_logits, const at::Tensor& labels) {
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

  void add_labels(const Labels& taken, const at::Tensor& input) {
    const at::Tensor rows = input.contiguous();
    const int64_t features = rows.size(1);
    uint16_t *const upper = static_cast<uint16_t*>(of_weight_.mutable_data_ptr()), *const lower =
                                                                                       static_cast<uint16_t*>(
                                                                                           sum_.mutable_data_ptr());
    const auto* const x = static_cast<const uint16_t*>(rows.const_data_ptr());
    for (int64_t n = 0; n < rows.size(0); ++n) {
      const float factor = taken.gradients[size_t(n)];
      const int64_t row = taken.classes[size_t(n)] * features;
      if (factor != 0) kernels().add_scaled_to_halves(upper + row, lower + row, x + n * features, factor, features);
    }
  }

  // A product of few classes at a time stays in the caches until it is added.
  void add_in_halves(const at::Tensor& grad_logits, const at::Tensor& input, bool first, bool last) {
    constexpr int64_t kElements = int64_t{1} << 19, kGrain = 1 << 15;
    const int64_t features = input.size(1), rows = std::max<int64_t>(1, kElements / std::max<int64_t>(1, features));
    if (!product_.defined()) product_ = new_matrix({std::min(rows, weight_.size(0)), features}, input, at::kBFloat16);
    const auto bits = [](const at::Tensor& tensor) { return static_cast<uint16_t*>(tensor.mutable_data_ptr()); };
    for (int64_t c = 0; c < weight_.size(0); c += rows) {
      at::Tensor product = product_.narrow(0, 0, std::min(rows, weight_.size(0) - c));
      at::mm_out(product, grad_logits.narrow(0, c, product.size(0)), input);
      uint16_t *const upper = bits(of_weight_) + c * features, *const lower = bits(sum_) + c * features;
      const uint16_t* const added = bits(product);
      for_each_piece_of(kGrain, product.numel(), 1, [&](int64_t, int64_t begin, int64_t end) {
        kernels().add_to_halves(upper + begin, lower + begin, added + begin, end - begin, first, last);
      });
    }
  }

  const Layer& layer_;
  const at::Tensor& weight_;
  int64_t chunks_, done_ = 0;
  at::Tensor of_input_, of_weight_, of_bias_;
  at::Tensor sum_;  // of the weight's gradient: its lower halves, or in float32
  at::Tensor product_;
  bool in_halves_ = false;
};

// ---- chunks ---------------------------------------------------------------------------------------------------------

// What a chunk's loss is made of.
struct Chunk {
  int64_t first, size, positions;
  at::Tensor matrix, logits;  // (n, C * d1 * ... * dK), and the same as (n, C, d1..dK)
  at::Tensor target;
  OptionalTensor companion, sample_weight;
  const OptionalTensor &weight, &divisor;

  Inputs inputs() const { return {logits, target, weight, companion, sample_weight, divisor}; }

  OptionalTensor labels(const Options& options) const {
    return inputs().target_kind(options) == TargetKind::kIndices && logits.dim() == 2 && !options.is_shard()
               ? OptionalTensor(target)
               : std::nullopt;
  }
};

// Calls function(chunk) for the positions in order. The logits' memory is the same for all of them.
template <class Function>
void for_each_chunk(const Layer& layer, const at::Tensor& weight, const Inputs& others, int64_t size,
                    const Function& function) {
  const int64_t N = layer.input.size(0);
  if (N == 0) return;
  size = std::min(size, N);
  const at::Tensor memory = new_matrix({size, weight.size(0)}, layer.input, layer.input.scalar_type());
  const at::Tensor bias = has_value(layer.bias) ? layer.bias->reshape({-1}) : at::Tensor();
  const at::Tensor transposed = weight.t();
  at::DimVector shape(others.logits.sizes());
  for (int64_t first = 0; first < N; first += size) {
    const int64_t n = std::min(size, N - first);
    const auto part = [&](const OptionalTensor& tensor) {
      return has_value(tensor) ? OptionalTensor(tensor->narrow(0, first, n)) : std::nullopt;
    };
    shape[0] = n;
    at::Tensor matrix = memory.narrow(0, 0, n);
    const at::Tensor input = layer.input.narrow(0, first, n);
    bias.defined() ? at::addmm_out(matrix, bias, input, transposed) : at::mm_out(matrix, input, transposed);
    function(Chunk{first, n, count_positions(others.logits) / N * n, matrix, matrix.view(shape),
                   others.target.narrow(0, first, n), part(others.companion), part(others.sample_weight), others.weight,
                   others.divisor});
  }
}

int64_t count_chunks(const Layer& layer, int64_t size) { return (layer.input.size(0) + size - 1) / size; }

// ---- reductions -----------------------------------------------------------------------------------------------------

// The options with which each chunk adds its part to a sum in float64. A mean gets its divisor. Where that is zero, no
// part may be 0 / 0 before the sum of all is known.
struct Parts {
  Options options;
  OptionalTensor divisor;
  at::Tensor total, denominator;

  Parts(const Inputs& in, const Options& given) : options(given), loss_dtype_(given.loss_dtype) {
    denominator = at::ones({}, in.logits.options().dtype(at::kDouble));
    if (given.reduction == kNone) return;
    options.loss_dtype = at::kDouble;
    total = at::zeros_like(denominator);
    if (given.reduction == kSum) return;
    divisor = denominator = has_value(in.divisor) ? *in.divisor : denominator_of_mean(in, given);
    if (!given.empty_is_zero) {
      divisor = at::where(denominator.eq(0), std::numeric_limits<double>::denorm_min(), denominator);
    }
  }

  // The sum of all parts, and a denominator with which a backward gives their gradients.
  at::Tensor finish() {
    at::Tensor loss = total;
    if (options.reduction == kMean) {
      const at::Tensor zero = denominator.eq(0);
      if (options.empty_is_zero) {
        denominator = at::where(zero.logical_and(total.eq(0)), 1.0, denominator);
      } else {
        loss = at::where(zero, total / denominator, total);
      }
    }
    return loss.to(*loss_dtype_);
  }

 private:
  std::optional<at::ScalarType> loss_dtype_;
};

// ---- the operators --------------------------------------------------------------------------------------------------

ForwardResult chunked_forward(XENT_LAYER, XENT_OTHER_INPUTS, XENT_OPTIONS, int64_t chunk) {
  const at::AutoDispatchBelowADInplaceOrView below;
  const OptionalTensor bias = element_of(linear_bias, 0);
  const Layer layer{input, linear_weight, bias};
  const at::Tensor shape_of_logits = logits_placeholder(layer), matrix = as_matrix(linear_weight);
  const Others unpacked(others);
  const Inputs all = unpacked.with(shape_of_logits, target);
  const Options options = unpacked.options(integers, numbers).with_values();
  check_forward(all, options);
  Parts parts(all, options);
  const at::Tensor lse = new_matrix({saved_rows(all.target_kind(options), options), count_positions(all.logits)}, input,
                                    arithmetic_type(all, options));
  at::Tensor loss;
  if (options.reduction == kNone) {
    const auto shape = shape_of_positions(all.logits);
    loss = at::empty_symint(shape, input.options().dtype(*options.loss_dtype));
  }
  const Inputs divided{all.logits, target, all.weight, all.companion, all.sample_weight, parts.divisor};
  for_each_chunk(layer, matrix, divided, chunk_size(layer, chunk), [&](const Chunk& part) {
    const auto [of_chunk, saved, denominator] = xent::forward(part.inputs(), parts.options);
    lse.narrow(1, part.first * (part.positions / part.size), part.positions).copy_(saved);
    options.reduction == kNone ? loss.narrow(0, part.first, part.size).copy_(of_chunk) : parts.total.add_(of_chunk);
  });
  if (options.reduction != kNone) loss = parts.finish();
  return {loss, lse, parts.denominator};
}

ForwardBackwardResult chunked_forward_backward(XENT_LAYER, XENT_OTHER_INPUTS, XENT_OPTIONS, int64_t chunk,
                                               std::array<bool, 3> wanted) {
  const at::AutoDispatchBelowADInplaceOrView below;
  const OptionalTensor bias = element_of(linear_bias, 0);
  const Layer layer{input, linear_weight, bias};
  const at::Tensor shape_of_logits = logits_placeholder(layer), matrix = as_matrix(linear_weight);
  const Others unpacked(others);
  const Inputs all = unpacked.with(shape_of_logits, target);
  const Options options = unpacked.options(integers, numbers).with_values();
  check_forward(all, options);
  TORCH_CHECK(options.reduction != kNone, "cross_entropy_ext::_linear_forward_backward: needs a reduction");
  Parts parts(all, options);
  const int64_t size = chunk_size(layer, chunk, wanted[1]);
  LayerGradients gradients(layer, matrix, wanted, count_chunks(layer, size));
  const Inputs divided{all.logits, target, all.weight, all.companion, all.sample_weight, parts.divisor};
  const at::Tensor one = at::ones({}, input.options().dtype(at::kFloat));
  for_each_chunk(layer, matrix, divided, size, [&](const Chunk& part) {
    const Inputs inputs = part.inputs();
    at::Tensor of_chunk, gradient = part.matrix;
    if (all.target_kind(options) == TargetKind::kPairs) {
      const auto [loss, lse, denominator] = xent::forward(inputs, parts.options);
      of_chunk = loss;
      gradient =
          std::get<0>(xent::backward({one, std::nullopt, lse, denominator}, inputs, parts.options, {true, false}));
      gradient = gradient.view(part.matrix.sizes());
    } else {
      of_chunk = std::get<0>(forward_backward_(inputs, parts.options));
    }
    parts.total.add_(of_chunk);
    gradients.add(gradient, part.first, part.labels(options));
  });
  const auto [of_input, of_weight, of_bias] = gradients.results();
  return {parts.finish(), of_input, of_weight, of_bias};
}

BackwardResult chunked_backward(XENT_GRADIENTS, XENT_LAYER, XENT_OTHER_INPUTS, XENT_SAVED, XENT_OPTIONS, int64_t chunk,
                                std::array<bool, 4> wanted) {
  const at::AutoDispatchBelowADInplaceOrView below;
  const OptionalTensor bias = element_of(linear_bias, 0);
  const Layer layer{input, linear_weight, bias};
  const at::Tensor shape_of_logits = logits_placeholder(layer), matrix = as_matrix(linear_weight);
  const Others unpacked(others);
  const Inputs all = unpacked.with(shape_of_logits, target);
  const Options options = unpacked.options(integers, numbers).with_values();
  const OptionalTensor statistics = unless_scalar(grad_statistics);
  const bool pairs = all.target_kind(options) == TargetKind::kPairs;
  const int64_t size = chunk_size(layer, chunk, wanted[1]);
  LayerGradients gradients(layer, matrix, {wanted[0], wanted[1], wanted[2]}, count_chunks(layer, size));
  const at::Tensor& probabilities = all.differentiable_target(options);
  const at::Tensor of_target =
      at::empty(wanted[3] ? probabilities.sizes() : at::IntArrayRef{0}, probabilities.options());
  for_each_chunk(layer, matrix, all, size, [&](const Chunk& part) {
    const int64_t begin = part.first * (part.positions / part.size);
    const auto columns = [&](const at::Tensor& rows) { return rows.narrow(1, begin, part.positions).contiguous(); };
    OptionalTensor of_statistics;
    if (statistics) of_statistics = columns(*statistics);
    const at::Tensor of_loss = options.reduction == kNone ? grad_output.narrow(0, part.first, part.size) : grad_output,
                     saved = columns(lse);
    const Gradients given{of_loss, of_statistics, saved, denominator};
    at::Tensor gradient = part.matrix, for_target;
    if (pairs) {
      std::tie(gradient, for_target) = xent::backward(given, part.inputs(), options, {true, wanted[3]});
      gradient = gradient.view(part.matrix.sizes());
    } else {
      for_target = backward_(given, part.inputs(), options, wanted[3]);
    }
    if (wanted[3]) of_target.narrow(0, part.first, part.size).copy_(for_target);
    gradients.add(gradient, part.first, part.labels(options));
  });
  const auto [of_input, of_weight, of_bias] = gradients.results();
  return {of_input, of_weight, of_bias, of_target};
}

static_assert(std::is_same_v<decltype(chunked_forward), schema::Forward>);
static_assert(std::is_same_v<decltype(chunked_forward_backward), schema::ForwardBackward>);
static_assert(std::is_same_v<decltype(chunked_backward), schema::Backward>);

}  // namespace

// The weight's gradient is read and written once for each chunk, in the time of `n` multiplications of each element:
// so a chunk has some hundreds of positions. As many as there are features, and its logits would take what that
// gradient takes: they are to be half of it, or less where the sum is in float32. Short rows share a chunk, whose work
// is to be worth a call.
int64_t chunk_size(const Layer& layer, int64_t asked, bool adds_up) {
  const int64_t N = layer.input.size(0), features = layer.weight.size(-1);
  if (asked > 0) return std::min(asked, std::max<int64_t>(1, N));
  const int64_t row = layer.weight.numel() / std::max<int64_t>(1, features);
  constexpr int64_t kWorthACall = int64_t{1} << 22;
  // On a GPU, thousands: an addition to the gradient is no cheaper there, and multiplications are.
  const int64_t share = is_half(layer.input.scalar_type()) ? features * 5 / 16 : features / 2;
  const int64_t balanced =
      layer.input.is_cuda() ? std::clamp<int64_t>(features, 1024, 8192) : std::clamp<int64_t>(share, 128, 512);
  // Where all logits together take no more than those of a chunk and the sum in float32 (2 F rows of half logits), they
  // are one chunk: without that sum, which is read and written once for each.
  if (adds_up && layer.input.is_cuda() && is_half(layer.input.scalar_type()) && N <= balanced + 2 * features) {
    return std::max<int64_t>(1, N);
  }
  const int64_t size = std::max(balanced, kWorthACall / std::max<int64_t>(1, row));
  const int64_t chunks = std::max<int64_t>(1, (N + size - 1) / size);
  return std::max<int64_t>(1, (N + chunks - 1) / chunks);
}

TORCH_LIBRARY_IMPL(cross_entropy_ext, CompositeExplicitAutograd, m) {
  m.impl("_linear_forward", &chunked_forward);
  m.impl("_linear_forward_backward", &chunked_forward_backward);
  m.impl("_linear_backward", &chunked_backward);
}

}  // namespace xent::linear
