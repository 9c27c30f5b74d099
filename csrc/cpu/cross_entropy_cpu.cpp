// The CPU operators of cross entropy: tensors become a Problem, and kernels are called for its pieces.
#include <ATen/ops/empty.h>
#include <ATen/ops/ones.h>
#include <torch/library.h>

#include "host.h"
#include "host/denominator.h"
#include "host/operators.h"

namespace xent {
namespace {

// Up to this many classes a row is so short that what is done once for it, and at its ends, takes most of its time; a
// tile of many rows at once is faster even where it has to be transposed. With few positions there are no such tiles.
constexpr int64_t kFewClasses = 32, kShortRow = 96, kManyPositions = 64;

Lanes choose_lanes(const Problem& problem) {
  const bool general = problem.objective == Objective::kGeneral;
  const int64_t most = most_classes_of_tile(problem.arithmetic_in_double ? 8 : 4);
  if (general && problem.classes > most) return Lanes::kClasses;
  if (problem.classes < kFewClasses) return Lanes::kPositions;
  if (problem.logits.class_stride == 1) {
    return problem.classes <= (general ? most : kShortRow) && problem.positions >= kManyPositions ? Lanes::kPositions
                                                                                                  : Lanes::kClasses;
  }
  const int inner = problem.dims - 1;
  const bool neighbours = problem.logits.stride[inner] == 1 && problem.size[inner] >= kShortRun;
  return neighbours ? Lanes::kPositions : Lanes::kClasses;
}

// Returns e / C times the sum of the class weights.
double smoothed_total_of(const Problem& problem, const at::Tensor& weight) {
  double sum = 0;
  for (int64_t c = 0; c < problem.all_classes(); ++c) {
    sum +=
        problem.arithmetic_in_double ? weight.const_data_ptr<double>()[c] : double(weight.const_data_ptr<float>()[c]);
  }
  return problem.share * sum;
}

void make_problem_with_weights(Problem& problem, const Inputs& inputs, const Options& options,
                               const at::Tensor& kernel_weight, at::ScalarType arithmetic, const at::Tensor& lse) {
  make_problem(problem, inputs, options, kernel_weight, arithmetic, lse);
  if (kernel_weight.defined() && problem.smoothed_total != 0)
    problem.smoothed_total = smoothed_total_of(problem, kernel_weight);
}

// ---- what forward and backward share --------------------------------------------------------------------------------

// Everything of the backward but what is done position by position. Either gradient may be undefined.
Backward backward_problem(const at::Tensor& grad_logits, const at::Tensor& grad_target, const View& grad_output,
                          double scale, const Inputs& inputs, const Options& options, const at::Tensor& kernel_weight,
                          at::ScalarType arithmetic, const at::Tensor& lse) {
  Backward problem;
  make_problem_with_weights(problem, inputs, options, kernel_weight, arithmetic, lse);
  problem.grad_output = grad_output;
  problem.scale = scale;
  if (grad_logits.defined()) problem.grad_logits = view_with_classes(grad_logits);
  if (grad_target.defined()) problem.grad_target = view_with_classes(grad_target);
  merge_dimensions(problem, {&problem.logits, &problem.target, &problem.sample_weight, &problem.probs, &problem.labels,
                             &problem.grad_output, &problem.grad_logits, &problem.grad_target});
  problem.lanes = choose_lanes(problem);
  const bool inplace = grad_logits.defined() && grad_logits.is_alias_of(inputs.logits);
  problem.stream = !inplace && is_larger_than_caches(inputs.logits);
  problem.buffered = inplace || problem.stream;
  return problem;
}

// ---- forward --------------------------------------------------------------------------------------------------------

// The forward kernel itself makes the gradient where all of a position's exponentials are still at hand: in rows of one
// block, and in tiles of one.
bool kernel_makes_gradient(const Problem& problem) {
  const int64_t size = problem.arithmetic_in_double ? 8 : 4;
  if (problem.objective == Objective::kProbabilities || problem.objective == Objective::kGeneral) return false;
  if (problem.lanes == Lanes::kPositions) return problem.classes <= most_classes_of_tile(size);
  return problem.objective == Objective::kIndex && problem.classes >= kernels().vector_bytes / size &&
         problem.logits.class_stride == 1 && problem.classes <= kBlockVectors * kernels().vector_bytes / size;
}

// Over the targets that are not ignored. Raises the error for a target that is no class.
double sum_target_weights(Problem& problem, const Inputs& inputs, const Options& options) {
  int64_t bad_position = kNoPosition;
  problem.first_bad_position = &bad_position;
  SumsOfPieces pieces(size_t(count_of_pieces(problem, 1)));
  for_each_piece(problem, 1, [&](int64_t piece, int64_t begin, int64_t end) {
    kernels().sum_weights(problem, begin, end, pieces[size_t(piece)]);
  });
  raise_bad_target(inputs, options, bad_position);
  return sum_pieces(pieces).weight;
}

void backward_into(const at::Tensor& grad_logits, const at::Tensor& grad_target, const Gradients& gradients,
                   const Inputs& inputs, const Options& options);

enum class GradientOfForward { kNone, kNew, kInPlace };

ForwardBackwardResult run_forward(const Inputs& inputs, const Options& options, GradientOfForward wanted) {
  TORCH_CHECK_VALUE(wanted == GradientOfForward::kNone || !options.is_shard(),
                    "cross_entropy_ext::_forward_backward: a shard's gradient needs the lse of all classes");
  const at::Tensor& logits = inputs.logits;
  const bool mean = options.reduction == kMean;
  const auto arithmetic = arithmetic_type(inputs, options), loss_dtype = *options.loss_dtype;
  const auto weights = weight_for_kernel(inputs.weight, arithmetic, options.class_begin);
  const int64_t rows = saved_rows(inputs.target_kind(options), options);
  const at::Tensor lse = new_tensor({rows, count_positions(logits)}, arithmetic);
  const at::Tensor denominator = new_tensor({}, at::kDouble);
  at::Tensor grad_logits;
  if (wanted == GradientOfForward::kNew) grad_logits = empty_gradient(logits);
  if (wanted == GradientOfForward::kInPlace) grad_logits = logits;

  Forward problem;
  make_problem_with_weights(problem, inputs, options, weights, arithmetic, lse);
  if (grad_logits.defined()) problem.grad_logits = view_with_classes(grad_logits);
  problem.stream = is_larger_than_caches(logits);
  merge_dimensions(problem, {&problem.logits, &problem.target, &problem.sample_weight, &problem.probs, &problem.labels,
                             &problem.grad_logits});
  problem.lanes = choose_lanes(problem);
  const bool in_kernel = wanted == GradientOfForward::kNew && kernel_makes_gradient(problem);
  if (!in_kernel) problem.grad_logits = {};

  at::Tensor loss;
  if (options.reduction == kNone) {
    at::DimVector shape(logits.sizes());
    shape.erase(shape.begin() + class_dim(logits));
    loss = new_tensor(shape, loss_dtype);
    problem.loss = View{data_of(loss), element_type(loss_dtype)};
  }
  std::optional<Forward> teacher;
  if (problem.target_kind == TargetKind::kTeacher) {
    make_teacher_problem(teacher.emplace(problem), problem);
    teacher->loss = {};
  }

  const bool given = inputs.denominator.defined(), known = given || denominator_is_known(problem);
  double count = given ? inputs.denominator.item<double>() : double(problem.positions);
  if (grad_logits.defined() && mean) {  // the gradient needs the denominator before the loss is known
    if (!known) count = sum_target_weights(problem, inputs, options);
    problem.scale = 1 / safe_denominator(count, 0, options.empty_is_zero);
  }
  int64_t bad_position = kNoPosition;
  problem.first_bad_position = &bad_position;
  static const double one = 1;
  Backward gradient;
  if (grad_logits.defined() && !in_kernel) {
    gradient = backward_problem(grad_logits, {}, View{const_cast<double*>(&one), ElementType::kFloat64}, problem.scale,
                                inputs, options, weights, arithmetic, lse);
    gradient.first_bad_position = &bad_position;
  }
  SumsOfPieces pieces(size_t(count_of_pieces(problem, problem.classes)));
  for_each_piece(problem, problem.classes, [&](int64_t piece, int64_t begin, int64_t end) {
    Sums of_teacher;
    if (teacher) kernels().forward(*teacher, begin, end, of_teacher);
    kernels().forward(problem, begin, end, pieces[size_t(piece)]);
    if (gradient.grad_logits) kernels().backward(gradient, begin, end);
  });
  raise_bad_target(inputs, options, bad_position);

  double divided_by = 1;
  if (options.reduction != kNone) {
    const Sums sums = sum_pieces(pieces);
    if (!grad_logits.defined() && !known) count = sums.weight;
    if (mean) divided_by = safe_denominator(count, sums.loss, options.empty_is_zero);
    loss = new_tensor({}, loss_dtype);
    store_scalar(loss, sums.loss / divided_by);
  }
  *denominator.mutable_data_ptr<double>() = divided_by;
  // Targets that weigh nothing have a loss by label smoothing: then this was no mean over nothing.
  if (grad_logits.defined() && options.empty_is_zero && divided_by == 0) {
    backward_into(grad_logits, {}, {at::ones({}, denominator.options()), {}, lse, denominator}, inputs, options);
  }
  return {loss, lse, denominator, grad_logits};
}

}  // namespace

ForwardResult cpu::forward(const Inputs& inputs, const Options& options) {
  auto [loss, lse, denominator, gradient] = run_forward(inputs, options, GradientOfForward::kNone);
  return {std::move(loss), std::move(lse), std::move(denominator)};
}

ForwardBackwardResult cpu::forward_backward(const Inputs& inputs, const Options& options) {
  TORCH_CHECK(options.reduction != kNone, "cross_entropy_ext::_forward_backward: needs a reduction");
  return run_forward(inputs, options, GradientOfForward::kNew);
}

namespace {

ForwardResult forward_backward_in_place(const Inputs& inputs, const Options& options) {
  TORCH_CHECK(options.reduction != kNone && options.target_kind != TargetKind::kPairs,
              "cross_entropy_ext::_forward_backward_: needs a reduction, and no pairs");
  inputs.logits.mutable_data_ptr();  // no lazy copy shares it from here on
  auto [loss, lse, denominator, gradient] = run_forward(inputs, options, GradientOfForward::kInPlace);
  return {loss, lse, denominator};
}

// ---- backward -------------------------------------------------------------------------------------------------------

// Writes whichever gradient is defined.
void backward_into(const at::Tensor& grad_logits, const at::Tensor& grad_target, const Gradients& gradients,
                   const Inputs& inputs, const Options& options) {
  check_backward(gradients, inputs, options, grad_target.defined());
  if (grad_logits.defined()) grad_logits.mutable_data_ptr();  // no lazy copy shares it from here on
  const auto arithmetic = arithmetic_type(inputs, options);
  const auto weights = weight_for_kernel(inputs.weight, arithmetic, options.class_begin);

  const at::Tensor& grad_output = gradients.grad_output;
  const View grad_view = options.reduction == kNone
                             ? view_of_positions(grad_output)
                             : View{data_of(grad_output), element_type(grad_output.scalar_type())};
  Backward problem = backward_problem(grad_logits, grad_target, grad_view, 1 / gradients.denominator.item<double>(),
                                      inputs, options, weights, arithmetic, gradients.lse);
  if (gradients.grad_statistics.defined()) problem.grad_statistics = data_of(gradients.grad_statistics);
  if (problem.target_kind != TargetKind::kProbabilities && grad_logits.defined() &&
      grad_logits.is_alias_of(inputs.logits)) {
    sum_target_weights(problem, inputs, options);  // for its error, before anything is overwritten
  }
  int64_t bad_position = kNoPosition;
  problem.first_bad_position = &bad_position;
  // The forward has left the last logits that it read in the caches: each thread begins with them.
  for_each_piece<true>(problem, problem.classes,
                       [&](int64_t, int64_t begin, int64_t end) { kernels().backward(problem, begin, end); });
  raise_bad_target(inputs, options, bad_position);
}

at::Tensor or_empty(const at::Tensor& gradient, const at::Tensor& like) {
  return gradient.defined() ? gradient : at::empty({0}, like.options());
}

}  // namespace

BackwardResult cpu::backward(const Gradients& gradients, const Inputs& inputs, const Options& options,
                             std::array<bool, 2> wanted) {
  const at::Tensor& probabilities = inputs.differentiable_target(options);
  const at::Tensor grad_logits = wanted[0] ? empty_gradient(inputs.logits) : at::Tensor();
  const at::Tensor grad_target = wanted[1] ? empty_gradient(probabilities) : at::Tensor();
  backward_into(grad_logits, grad_target, gradients, inputs, options);
  return {or_empty(grad_logits, inputs.logits), or_empty(grad_target, probabilities)};
}

namespace {

at::Tensor backward_in_place(const Gradients& gradients, const Inputs& inputs, const Options& options,
                             bool target_wanted) {
  const at::Tensor& probabilities = inputs.differentiable_target(options);
  const at::Tensor grad_target = target_wanted ? empty_gradient(probabilities) : at::Tensor();
  backward_into(inputs.logits, grad_target, gradients, inputs, options);
  return or_empty(grad_target, probabilities);
}

}  // namespace

TORCH_LIBRARY_IMPL(cross_entropy_ext, CPU, m) {
  m.impl("_forward", &Adapter<&cpu::forward>::call);
  m.impl("_forward_backward", &Adapter<&cpu::forward_backward>::call);
  m.impl("_forward_backward_", &Adapter<&forward_backward_in_place>::call);
  m.impl("_backward", &Adapter<&cpu::backward>::call);
  m.impl("_backward_", &Adapter<&backward_in_place>::call);
}

}  // namespace xent
