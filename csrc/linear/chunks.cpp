// The private operators of a layer, for every device: its logits exist for a chunk of positions at a time.
//
// A chunk's logits are a matrix product; the loss overwrites them with their gradient while they are in the caches; two
// more products make of it the gradient of the chunk's input, which is final, and a term of the gradients of weight and
// bias. So the three products are those of a linear layer. Besides, the sum of the weight's gradient is read and
// written once for each chunk: chunks are as small as that allows.
#include <ATen/TensorOperators.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>

#include <algorithm>
#include <limits>
#include <utility>

#include "gradients.h"
#include "host/denominator.h"
#include "host/operators.h"

namespace xent::linear {
namespace {

// ---- chunks ---------------------------------------------------------------------------------------------------------

// Returns how many of N positions have their logits in memory at the same time. `adds_up`: for a gradient of the
// weight, which is read and written once for each chunk, in the time of `n` multiplications of each element: so a chunk
// has some hundreds of positions. With as many as there are features, its logits would take what that gradient takes:
// they are to be half of it, or less where the sum is in float32. Short rows share a chunk, whose work is to be worth a
// call.
int64_t chunk_size(const Layer& layer, int64_t asked, bool adds_up = false) {
  const int64_t N = layer.input.size(0), features = layer.weight.size(-1);
  if (asked > 0) return std::min(asked, std::max<int64_t>(1, N));
  const int64_t row = layer.weight.numel() / std::max<int64_t>(1, features);
  constexpr int64_t kWorthACall = int64_t{1} << 22;
  // On a GPU, thousands: an addition to the gradient is no cheaper there, and multiplications are.
  const int64_t share = is_half(layer.input.scalar_type()) ? features * 5 / 16 : features / 2;
  const int64_t balanced =
      layer.input.is_cuda() ? std::clamp<int64_t>(features, 1024, 8192) : std::clamp<int64_t>(share, 128, 512);
  // If all logits together take no more than those of a chunk and the sum in float32 (2 F rows of half logits), they
  // are one chunk, without that sum.
  if (adds_up && layer.input.is_cuda() && is_half(layer.input.scalar_type()) && N <= balanced + 2 * features) {
    return std::max<int64_t>(1, N);
  }
  const int64_t size = std::max(balanced, kWorthACall / std::max<int64_t>(1, row));
  const int64_t chunks = std::max<int64_t>(1, (N + size - 1) / size);
  return std::max<int64_t>(1, (N + chunks - 1) / chunks);
}

int64_t count_chunks(const Layer& layer, int64_t size) { return (layer.input.size(0) + size - 1) / size; }

// The layer's weight as a matrix (C * d1 * ... * dK, F).
at::Tensor as_matrix(const at::Tensor& weight) { return weight.flatten(0, -2); }

struct Chunk {
  int64_t first, size;       // along the input's rows
  int64_t positions_of_row;  // d1 * ... * dK
  at::Tensor matrix;         // the logits as (n, C * d1 * ... * dK)
  Inputs inputs;

  int64_t first_position() const { return first * positions_of_row; }
  int64_t positions() const { return size * positions_of_row; }

  // The class of each row of the matrix, or undefined.
  at::Tensor labels(const Options& options) const {
    const bool has_labels = inputs.target_kind(options) == TargetKind::kIndices && inputs.logits.dim() == 2;
    return has_labels && !options.is_shard() ? inputs.target : at::Tensor();
  }
};

// Calls function(chunk) for the positions in order. The logits' memory is the same for all of them.
template <class Function>
void for_each_chunk(const Inputs& all, const at::Tensor& weight, int64_t size, const Function& function) {
  const Layer& layer = all.layer;
  const int64_t N = layer.input.size(0);
  if (N == 0) return;
  size = std::min(size, N);
  const at::Tensor memory = new_matrix({size, weight.size(0)}, layer.input, layer.input.scalar_type());
  const at::Tensor bias = layer.bias.defined() ? layer.bias.reshape({-1}) : layer.bias;
  const at::Tensor transposed = weight.t();
  at::DimVector shape(all.logits.sizes());
  for (int64_t first = 0; first < N; first += size) {
    const int64_t n = std::min(size, N - first);
    const auto part = [&](const at::Tensor& tensor) { return tensor.defined() ? tensor.narrow(0, first, n) : tensor; };
    shape[0] = n;
    at::Tensor matrix = memory.narrow(0, 0, n);
    const at::Tensor input = layer.input.narrow(0, first, n);
    bias.defined() ? at::addmm_out(matrix, bias, input, transposed) : at::mm_out(matrix, input, transposed);
    function(Chunk{first, n, count_positions(all.logits) / N, matrix,
                   Inputs{matrix.view(shape),
                          part(all.target),
                          all.weight,
                          part(all.companion),
                          part(all.sample_weight),
                          all.denominator,
                          {}}});
  }
}

// ---- reductions -----------------------------------------------------------------------------------------------------

// Each chunk adds its part to a sum in float64. A mean gets its denominator first. Where that is zero, no part may be
// 0 / 0 before the sum of all is known.
struct Parts {
  Inputs inputs;    // with the denominator of each part
  Options options;  // of each part
  at::Tensor total, denominator;

  Parts(const Inputs& all, const Options& given) : inputs(all), options(given), loss_dtype_(given.loss_dtype) {
    denominator = at::ones({}, all.logits.options().dtype(at::kDouble));
    if (given.reduction == kNone) return;
    options.loss_dtype = at::kDouble;
    total = at::zeros_like(denominator);
    if (given.reduction == kSum) return;
    denominator = all.denominator.defined() ? all.denominator : count_denominator(all, given);
    inputs.denominator = given.empty_is_zero
                             ? denominator
                             : at::where(denominator.eq(0), std::numeric_limits<double>::denorm_min(), denominator);
  }

  // The sum of all parts. `denominator` becomes one with which a backward gives their gradients.
  at::Tensor finish() {
    at::Tensor loss = total;
    if (options.reduction == kMean) {
      if (!options.empty_is_zero) loss = at::where(denominator.eq(0), total / denominator, total);
      denominator = safe_denominator(denominator, total, options.empty_is_zero);
    }
    return loss.to(*loss_dtype_);
  }

 private:
  std::optional<at::ScalarType> loss_dtype_;
};

// ---- the operators --------------------------------------------------------------------------------------------------

ForwardResult forward(const Inputs& all, const Options& options) {
  const at::AutoDispatchBelowADInplaceOrView below;
  Parts parts(all, options);
  const at::Tensor& input = all.layer.input;
  const at::Tensor lse = new_matrix({saved_rows(all.target_kind(options), options), count_positions(all.logits)}, input,
                                    arithmetic_type(all, options));
  at::Tensor loss;
  if (options.reduction == kNone) {
    loss = at::empty_symint(shape_of_positions(all.logits), input.options().dtype(*options.loss_dtype));
  }
  for_each_chunk(parts.inputs, as_matrix(all.layer.weight), chunk_size(all.layer, options.chunk),
                 [&](const Chunk& chunk) {
                   const auto [of_chunk, saved, denominator] = xent::forward(chunk.inputs, parts.options);
                   lse.narrow(1, chunk.first_position(), chunk.positions()).copy_(saved);
                   options.reduction == kNone ? loss.narrow(0, chunk.first, chunk.size).copy_(of_chunk)
                                              : parts.total.add_(of_chunk);
                 });
  if (options.reduction != kNone) loss = parts.finish();
  return {loss, lse, parts.denominator};
}

LayerForwardBackwardResult forward_backward(const Inputs& all, const Options& options, std::array<bool, 3> wanted) {
  const at::AutoDispatchBelowADInplaceOrView below;
  TORCH_CHECK(options.reduction != kNone, "cross_entropy_ext::_linear_forward_backward: needs a reduction");
  Parts parts(all, options);
  const at::Tensor matrix = as_matrix(all.layer.weight);
  const int64_t size = chunk_size(all.layer, options.chunk, wanted[1]);
  LayerGradients gradients(all.layer, matrix, wanted, count_chunks(all.layer, size));
  const at::Tensor one = at::ones({}, all.layer.input.options().dtype(at::kFloat));
  for_each_chunk(parts.inputs, matrix, size, [&](const Chunk& chunk) {
    at::Tensor of_chunk, gradient = chunk.matrix;
    if (options.target_kind == TargetKind::kPairs) {
      const auto [loss, lse, denominator] = xent::forward(chunk.inputs, parts.options);
      of_chunk = loss;
      gradient = std::get<0>(xent::backward({one, {}, lse, denominator}, chunk.inputs, parts.options, {true, false}));
      gradient = gradient.view(chunk.matrix.sizes());
    } else {
      of_chunk = std::get<0>(forward_backward_(chunk.inputs, parts.options));
    }
    parts.total.add_(of_chunk);
    gradients.add(gradient, chunk.first, chunk.labels(options));
  });
  const auto [of_input, of_weight, of_bias] = gradients.results();
  return {parts.finish(), of_input, of_weight, of_bias};
}

LayerBackwardResult backward(const Gradients& given, const Inputs& all, const Options& options,
                             std::array<bool, 4> wanted) {
  const at::AutoDispatchBelowADInplaceOrView below;
  const at::Tensor matrix = as_matrix(all.layer.weight);
  const int64_t size = chunk_size(all.layer, options.chunk, wanted[1]);
  LayerGradients gradients(all.layer, matrix, {wanted[0], wanted[1], wanted[2]}, count_chunks(all.layer, size));
  const at::Tensor& probabilities = all.differentiable_target(options);
  const at::Tensor of_target =
      at::empty(wanted[3] ? probabilities.sizes() : at::IntArrayRef{0}, probabilities.options());
  for_each_chunk(all, matrix, size, [&](const Chunk& chunk) {
    const auto columns = [&](const at::Tensor& rows) {
      return rows.defined() ? rows.narrow(1, chunk.first_position(), chunk.positions()).contiguous() : rows;
    };
    Gradients part{given.grad_output, columns(given.grad_statistics), columns(given.lse), given.denominator};
    if (options.reduction == kNone) part.grad_output = given.grad_output.narrow(0, chunk.first, chunk.size);
    at::Tensor gradient = chunk.matrix, for_target;
    if (options.target_kind == TargetKind::kPairs) {
      std::tie(gradient, for_target) = xent::backward(part, chunk.inputs, options, {true, wanted[3]});
      gradient = gradient.view(chunk.matrix.sizes());
    } else {
      for_target = backward_(part, chunk.inputs, options, wanted[3]);
    }
    if (wanted[3]) of_target.narrow(0, chunk.first, chunk.size).copy_(for_target);
    gradients.add(gradient, chunk.first, chunk.labels(options));
  });
  const auto [of_input, of_weight, of_bias] = gradients.results();
  return {of_input, of_weight, of_bias, of_target};
}

}  // namespace

TORCH_LIBRARY_IMPL(cross_entropy_ext, CompositeExplicitAutograd, m) {
  m.impl("_linear_forward", &Adapter<&forward>::call_of_layer);
  m.impl("_linear_forward_backward", &Adapter<&forward_backward>::call_of_layer);
  m.impl("_linear_backward", &Adapter<&backward>::call_of_layer);
}

}  // namespace xent::linear
