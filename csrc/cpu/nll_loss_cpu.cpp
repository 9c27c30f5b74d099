// The CPU operators of the negative log likelihood.
#include <torch/library.h>

#include "host.h"
#include "nll/nll_loss.h"

namespace xent::nll {

ForwardResult cpu::forward(XENT_NLL_INPUTS, XENT_NLL_OPTIONS, at::ScalarType loss_dtype) {
  const Inputs inputs{input, target, weight};
  const Options options = options_of(reduction, ignore_index, loss_dtype);
  const auto arithmetic = arithmetic_type(inputs, options);
  const auto kernel_weight = weight_for_kernel(weight, arithmetic);
  const at::Tensor denominator = new_tensor({}, at::kDouble);
  Forward problem;
  make_problem(problem, inputs, options, kernel_weight, arithmetic, denominator);
  merge_dimensions(problem, {&problem.logits, &problem.target});

  at::Tensor loss;
  if (reduction == kNone) {
    at::DimVector shape(input.sizes());
    shape.erase(shape.begin() + class_dim(input));
    loss = new_tensor(shape, loss_dtype);
    problem.loss = View{data_of(loss), element_type(loss_dtype)};
  }
  constexpr int64_t kWork = 16;  // what is read lies in as many places as there are positions
  int64_t bad_position = kNoPosition;
  problem.first_bad_position = &bad_position;
  SumsOfPieces pieces(size_t(count_of_pieces(problem, kWork)));
  for_each_piece(problem, kWork, [&](int64_t piece, int64_t begin, int64_t end) {
    kernels().nll_forward(problem, begin, end, pieces[size_t(piece)]);
  });
  raise_bad_target(inputs, options, bad_position);

  const Sums sums = sum_pieces(pieces);
  const double divided_by = reduction == kMean ? sums.weight : 1;
  if (reduction != kNone) {
    loss = new_tensor({}, loss_dtype);
    store_scalar(loss, sums.loss / divided_by);
  }
  *denominator.mutable_data_ptr<double>() = divided_by;
  return {loss, denominator};
}

namespace {

ForwardResult forward_cpu(XENT_NLL_TENSORS, XENT_NLL_OPTIONS, at::ScalarType loss_dtype) {
  const at::Tensor weight = element_of(weights, 0);
  check_nll_forward({input, target, weight}, options_of(reduction, ignore_index, loss_dtype));
  return cpu::forward(input, target, weight, reduction, ignore_index, loss_dtype);
}

// So that pieces begin with a run of neighbours, or a tile of them.
int64_t size_of_pieces(int64_t classes, int64_t inner) {
  const int64_t unit = std::min(inner, kTile);
  return (positions_worth_a_piece(classes) + unit - 1) / unit * unit;
}

at::Tensor backward_cpu(const at::Tensor& grad_output, XENT_NLL_TENSORS, const at::Tensor& denominator,
                        XENT_NLL_OPTIONS) {
  const at::Tensor weight = element_of(weights, 0);
  const Inputs inputs{input, target, weight};
  const Options options = options_of(reduction, ignore_index);
  check_nll_backward(grad_output, inputs, denominator, options);
  const at::Tensor grad_input = empty_gradient(input);
  if (grad_input.numel() == 0) return grad_input;
  const auto arithmetic = arithmetic_type(inputs, options);
  const auto kernel_weight = weight_for_kernel(weight, arithmetic);

  const InMemoryOrder ordered(grad_input, target, grad_output);
  const Inputs in_order{ordered.gradient, ordered.target, weight};
  Backward problem;
  make_problem(problem, in_order, options, kernel_weight, arithmetic, denominator);
  problem.grad_output = view_of_positions(ordered.grad_output);
  problem.scale = 1 / denominator.item<double>();
  problem.grad_logits = problem.logits;
  problem.grad_logits.class_stride = ordered.inner_positions();
  problem.stream = is_larger_than_caches(grad_input);
  merge_dimensions(problem, {&problem.target, &problem.grad_output});

  int64_t bad_position = kNoPosition;
  problem.first_bad_position = &bad_position;
  const int64_t size = size_of_pieces(problem.classes, problem.grad_logits.class_stride);
  for_each_piece_of(size, problem.positions, problem.classes,
                    [&](int64_t, int64_t begin, int64_t end) { kernels().nll_backward(problem, begin, end); });
  raise_bad_target(in_order, options, bad_position);
  return grad_input;
}

static_assert(std::is_same_v<decltype(forward_cpu), schema::Forward>);
static_assert(std::is_same_v<decltype(backward_cpu), schema::Backward>);

}  // namespace

TORCH_LIBRARY_IMPL(cross_entropy_ext, CPU, m) {
  m.impl("_nll_loss_forward", &forward_cpu);
  m.impl("_nll_loss_backward", &backward_cpu);
}

}  // namespace xent::nll
