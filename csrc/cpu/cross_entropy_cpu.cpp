// The CPU operators: tensors become a Problem, positions are shared out among threads, errors are raised.
#include <ATen/EmptyTensor.h>
#include <ATen/ExpandUtils.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/ones.h>
#include <ATen/Version.h>
#include <torch/csrc/stable/c/shim.h>
#include <c10/util/SmallVector.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>

#include "../describe.h"
#include "gradient_memory.h"
#include "kernels.h"

namespace xent {
namespace {

const Kernels& kernels() {
  static const Kernels& chosen = kernels_for(at::get_cpu_capability().c_str());
  return chosen;
}

// Up to this many classes a row is so short that what is done once for it, and at its ends, takes most of its time; a
// tile of many rows at once is faster even where it has to be transposed. With few positions there are no such tiles.
constexpr int64_t kFewClasses = 32, kShortRow = 96, kManyPositions = 64;

Lanes choose_lanes(const Problem& problem) {
  if (problem.classes < kFewClasses) return Lanes::kPositions;
  if (problem.logits.class_stride == 1) {
    return problem.classes <= kShortRow && problem.positions >= kManyPositions ? Lanes::kPositions : Lanes::kClasses;
  }
  const int inner = problem.dims - 1;
  const bool neighbours = problem.logits.stride[inner] == 1 && problem.size[inner] >= kShortRun;
  return neighbours ? Lanes::kPositions : Lanes::kClasses;
}

// Where there are weights, what smoothing makes of their sum.
double smoothed_total_of(const Problem& problem, const at::Tensor& weight) {
  double sum = 0;
  for (int64_t c = 0; c < problem.classes; ++c) {
    sum +=
        problem.arithmetic_in_double ? weight.const_data_ptr<double>()[c] : double(weight.const_data_ptr<float>()[c]);
  }
  return problem.label_smoothing / double(problem.classes) * sum;
}

void describe_with_weights(Problem& problem, const at::Tensor& logits, const at::Tensor& target,
                           const OptionalTensor& kernel_weight, at::ScalarType arithmetic, const at::Tensor& lse,
                           int64_t ignore_index, double label_smoothing) {
  describe(problem, logits, target, kernel_weight, arithmetic, lse, ignore_index, label_smoothing);
  if (kernel_weight && problem.kind == TargetKind::kSmoothedIndex) {
    problem.smoothed_total = smoothed_total_of(problem, *kernel_weight);
  }
}

// ---- threads --------------------------------------------------------------------------------------------------------

// Positions are cut into pieces of a size that follows from the shape alone, so that the order in which sums are
// formed, and with it every bit of the result, is the same for any number of threads. `work`: how many elements a
// position costs.
int64_t piece_size(const Problem& problem, int64_t work) {
  constexpr int64_t kElements = 32768;
  const int64_t positions = std::max<int64_t>(1, kElements / std::max<int64_t>(1, work));
  return problem.lanes == Lanes::kClasses ? positions : (positions + kTile - 1) / kTile * kTile;
}

int64_t count_of_pieces(const Problem& problem, int64_t work) {
  const int64_t size = piece_size(problem, work);
  return (problem.positions + size - 1) / size;
}

// Calls function(piece, begin, end) for every piece, on libtorch's own threads where there is enough to do.
template <bool backwards = false, class Function>
void for_each_piece(const Problem& problem, int64_t work, const Function& function) {
  constexpr int64_t kElementsWorthAThread = 16384;
  const int64_t size = piece_size(problem, work), pieces = count_of_pieces(problem, work);
  struct Context {
    const Function& function;
    int64_t size, positions;
  } context{function, size, problem.positions};
  const auto run = [](int64_t first, int64_t last, void* opaque) {
    const auto& context = *static_cast<Context*>(opaque);
    for (int64_t k = first; k < last; ++k) {
      const int64_t piece = backwards ? first + last - 1 - k : k;
      const int64_t begin = piece * context.size;
      context.function(piece, begin, std::min(begin + context.size, context.positions));
    }
  };
  const int64_t grain = std::max<int64_t>(1, kElementsWorthAThread / std::max<int64_t>(1, size * work));
  if (pieces <= grain) {
    run(0, pieces, &context);
  } else {
    TORCH_CHECK(torch_parallel_for(0, pieces, grain, run, &context) == 0, "cross_entropy_ext: a thread failed");
  }
}

constexpr int64_t kNoPosition = std::numeric_limits<int64_t>::max();

void raise_bad_target(const at::Tensor& target, int64_t position) {
  if (position == kNoPosition) return;
  int64_t offset = 0;
  for (int64_t d = target.dim() - 1; d >= 0; --d) {
    offset += position % target.size(d) * target.stride(d);
    position /= target.size(d);
  }
  const auto value = target.as_strided({}, {}, target.storage_offset() + offset).item<int64_t>();
  TORCH_CHECK_INDEX(false, "Target ", value, " is out of bounds.");
}

// ---- what forward and backward share --------------------------------------------------------------------------------

constexpr c10::DispatchKeySet kCpu(c10::DispatchKey::CPU);

// Without the dispatcher's help, which would cost more than a small tensor. What is large comes from memory whose pages
// are there already.
at::Tensor new_tensor(at::IntArrayRef shape, at::ScalarType type) {
  const size_t bytes = at::detail::computeStorageNbytesContiguous(shape, c10::elementSize(type));
  if (bytes < kLargeGradient) return at::detail::empty_cpu(shape, at::TensorOptions().dtype(type));
  return at::detail::empty_generic(shape, gradient_memory(), kCpu, type, std::nullopt);
}

// A tensor for the gradient of `tensor`, in its memory format.
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

// Everything of the backward but what is done position by position. Either gradient may be undefined.
Backward backward_problem(const at::Tensor& grad_logits, const at::Tensor& grad_target, const View& grad_output,
                          double scale, const at::Tensor& logits, const at::Tensor& target,
                          const OptionalTensor& kernel_weight, at::ScalarType arithmetic, const at::Tensor& lse,
                          int64_t ignore_index, double label_smoothing) {
  Backward problem;
  describe_with_weights(problem, logits, target, kernel_weight, arithmetic, lse, ignore_index, label_smoothing);
  problem.grad_output = grad_output;
  problem.scale = scale;
  if (grad_logits.defined()) problem.grad_logits = view_with_classes(grad_logits);
  if (grad_target.defined()) problem.grad_target = view_with_classes(grad_target);
  merge_dimensions(
      problem, {&problem.logits, &problem.target, &problem.grad_output, &problem.grad_logits, &problem.grad_target});
  problem.lanes = choose_lanes(problem);
  const bool inplace = grad_logits.defined() && grad_logits.is_alias_of(logits);
  problem.stream = !inplace && is_larger_than_caches(logits);
  problem.buffered = inplace || problem.stream;
  return problem;
}

// ---- forward --------------------------------------------------------------------------------------------------------

// The forward kernel itself makes the gradient where all of a position's exponentials are still at hand: in rows of one
// block, and in tiles of one.
bool kernel_makes_gradient(const Problem& problem) {
  const int64_t size = problem.arithmetic_in_double ? 8 : 4;
  if (problem.kind == TargetKind::kSoft) return false;
  if (problem.lanes == Lanes::kPositions) return problem.classes <= most_classes_of_tile(size);
  return problem.kind == TargetKind::kIndex && problem.classes >= kernels().vector_bytes / size &&
         problem.logits.class_stride == 1 && problem.classes <= kBlockVectors * kernels().vector_bytes / size;
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

using SumsOfPieces = c10::SmallVector<Sums, 4>;

Sums sum_pieces(const SumsOfPieces& pieces) {
  Sums sums;
  for (const Sums& piece : pieces) {
    sums.loss += piece.loss;
    sums.weight += piece.weight;
  }
  return sums;
}

// Over the targets that are not ignored. Raises the error for a target that is no class.
double sum_target_weights(Problem& problem, const at::Tensor& target) {
  int64_t bad_position = kNoPosition;
  problem.first_bad_position = &bad_position;
  SumsOfPieces pieces(size_t(count_of_pieces(problem, 1)));
  for_each_piece(problem, 1, [&](int64_t piece, int64_t begin, int64_t end) {
    kernels().sum_weights(problem, begin, end, pieces[size_t(piece)]);
  });
  raise_bad_target(target, bad_position);
  return sum_pieces(pieces).weight;
}

void backward_into(const at::Tensor& grad_logits, const at::Tensor& grad_target, const at::Tensor& grad_output,
                   const at::Tensor& logits, const at::Tensor& target, const OptionalTensor& weight,
                   const at::Tensor& lse, const at::Tensor& denominator, int64_t reduction, int64_t ignore_index,
                   double label_smoothing);

ForwardBackwardResult run_forward(const at::Tensor& logits, const at::Tensor& target, const OptionalTensor& weight,
                                  int64_t reduction, int64_t ignore_index, double label_smoothing,
                                  at::ScalarType loss_dtype, bool empty_is_zero, bool gradient_wanted) {
  check_forward(logits, target, weight, reduction, ignore_index, label_smoothing, loss_dtype);
  const bool soft = is_soft(logits, target);
  const auto arithmetic = arithmetic_type(logits, target, weight);
  const auto weights = weight_for_kernel(weight, arithmetic);
  const at::Tensor lse = new_tensor({soft ? 3 : 2, count_positions(logits)}, arithmetic);
  const at::Tensor denominator = new_tensor({}, at::kDouble);
  at::Tensor grad_logits;
  if (gradient_wanted) grad_logits = empty_gradient(logits);

  Forward problem;
  describe_with_weights(problem, logits, target, weights, arithmetic, lse, ignore_index, label_smoothing);
  if (grad_logits.defined()) problem.grad_logits = view_with_classes(grad_logits);
  problem.stream = is_larger_than_caches(logits);
  merge_dimensions(problem, {&problem.logits, &problem.target, &problem.grad_logits});
  problem.lanes = choose_lanes(problem);
  const bool in_kernel = grad_logits.defined() && kernel_makes_gradient(problem);
  if (!in_kernel) problem.grad_logits = {};

  at::Tensor loss;
  if (reduction == kNone) {
    at::DimVector shape(logits.sizes());
    shape.erase(shape.begin() + class_dim(logits));
    loss = new_tensor(shape, loss_dtype);
    problem.loss = View{data_of(loss), element_type(loss_dtype)};
  }

  double count = double(problem.positions);           // what a mean divides by
  if (grad_logits.defined() && reduction == kMean) {  // the gradient needs it first
    if (!soft) count = sum_target_weights(problem, target);
    problem.scale = count == 0 && empty_is_zero ? 1 : 1 / count;
  }
  int64_t bad_position = kNoPosition;
  problem.first_bad_position = &bad_position;
  static const double one = 1;
  Backward gradient;
  if (grad_logits.defined() && !in_kernel) {
    gradient = backward_problem(grad_logits, {}, View{const_cast<double*>(&one), ElementType::kFloat64}, problem.scale,
                                logits, target, weights, arithmetic, lse, ignore_index, label_smoothing);
    gradient.first_bad_position = &bad_position;
  }
  SumsOfPieces pieces(size_t(count_of_pieces(problem, problem.classes)));
  for_each_piece(problem, problem.classes, [&](int64_t piece, int64_t begin, int64_t end) {
    kernels().forward(problem, begin, end, pieces[size_t(piece)]);
    if (gradient.grad_logits) kernels().backward(gradient, begin, end);
  });
  raise_bad_target(target, bad_position);

  double divide_by = 1;
  if (reduction != kNone) {
    const Sums sums = sum_pieces(pieces);
    if (!grad_logits.defined() && !soft) count = sums.weight;
    if (reduction == kMean) divide_by = count;
    if (empty_is_zero && divide_by == 0 && sums.loss == 0) divide_by = 1;
    loss = new_tensor({}, loss_dtype);
    store_scalar(loss, sums.loss / divide_by);
  }
  *denominator.mutable_data_ptr<double>() = divide_by;
  // Targets that weigh nothing have a loss by label smoothing: then this was no mean over nothing.
  if (grad_logits.defined() && empty_is_zero && divide_by == 0) {
    backward_into(grad_logits, {}, at::ones({}, denominator.options()), logits, target, weight, lse, denominator,
                  reduction, ignore_index, label_smoothing);
  }
  return {loss, lse, denominator, grad_logits};
}

ForwardResult forward_cpu(const at::Tensor& logits, const at::Tensor& target, const OptionalTensor& weight,
                          int64_t reduction, int64_t ignore_index, double label_smoothing, int64_t loss_dtype,
                          bool empty_is_zero) {
  auto [loss, lse, denominator, grad_logits] =
      run_forward(logits, target, weight, reduction, ignore_index, label_smoothing, at::ScalarType(loss_dtype),
                  empty_is_zero, false);
  return {loss, lse, denominator};
}

ForwardBackwardResult forward_backward_cpu(const at::Tensor& logits, const at::Tensor& target,
                                           const OptionalTensor& weight, int64_t reduction, int64_t ignore_index,
                                           double label_smoothing, int64_t loss_dtype, bool empty_is_zero) {
  TORCH_CHECK(reduction != kNone, "cross_entropy_ext::_forward_backward: needs a reduction");
  return run_forward(logits, target, weight, reduction, ignore_index, label_smoothing, at::ScalarType(loss_dtype),
                     empty_is_zero, true);
}

// ---- backward -------------------------------------------------------------------------------------------------------

// Writes whichever gradient is defined.
void backward_into(const at::Tensor& grad_logits, const at::Tensor& grad_target, const at::Tensor& grad_output,
                   const at::Tensor& logits, const at::Tensor& target, const OptionalTensor& weight,
                   const at::Tensor& lse, const at::Tensor& denominator, int64_t reduction, int64_t ignore_index,
                   double label_smoothing) {
  check_backward(grad_output, logits, target, weight, lse, reduction, ignore_index, label_smoothing,
                 grad_target.defined());
  if (grad_logits.defined()) grad_logits.mutable_data_ptr();  // no lazy copy shares it from here on
  const bool soft = is_soft(logits, target);
  const auto arithmetic = arithmetic_type(logits, target, weight);
  const auto weights = weight_for_kernel(weight, arithmetic);

  const View grad_view = reduction == kNone ? view_of_positions(grad_output)
                                            : View{data_of(grad_output), element_type(grad_output.scalar_type())};
  Backward problem = backward_problem(grad_logits, grad_target, grad_view, 1 / denominator.item<double>(), logits,
                                      target, weights, arithmetic, lse, ignore_index, label_smoothing);
  if (!soft && grad_logits.defined() && grad_logits.is_alias_of(logits)) {
    sum_target_weights(problem, target);  // for its error, before anything is overwritten
  }
  int64_t bad_position = kNoPosition;
  problem.first_bad_position = &bad_position;
  // The forward has left the last logits that it read in the caches: each thread begins with them.
  for_each_piece<true>(problem, problem.classes,
                       [&](int64_t, int64_t begin, int64_t end) { kernels().backward(problem, begin, end); });
  raise_bad_target(target, bad_position);
}

BackwardResult backward_cpu(const at::Tensor& grad_output, const at::Tensor& logits, const at::Tensor& target,
                            const OptionalTensor& weight, const at::Tensor& lse, const at::Tensor& denominator,
                            int64_t reduction, int64_t ignore_index, double label_smoothing,
                            std::array<bool, 2> wanted) {
  const at::Tensor grad_logits = wanted[0] ? empty_gradient(logits) : at::Tensor();
  const at::Tensor grad_target = wanted[1] ? empty_gradient(target) : at::Tensor();
  backward_into(grad_logits, grad_target, grad_output, logits, target, weight, lse, denominator, reduction,
                ignore_index, label_smoothing);
  const auto or_empty = [](const at::Tensor& gradient, const at::Tensor& like) {
    return gradient.defined() ? gradient : at::empty({0}, like.options());
  };
  return {or_empty(grad_logits, logits), or_empty(grad_target, target)};
}

at::Tensor backward_cpu_(const at::Tensor& grad_output, at::Tensor& logits, const at::Tensor& target,
                         const OptionalTensor& weight, const at::Tensor& lse, const at::Tensor& denominator,
                         int64_t reduction, int64_t ignore_index, double label_smoothing, bool target_wanted) {
  const at::Tensor grad_target = target_wanted ? empty_gradient(target) : at::Tensor();
  backward_into(logits, grad_target, grad_output, logits, target, weight, lse, denominator, reduction, ignore_index,
                label_smoothing);
  return grad_target.defined() ? grad_target : at::empty({0}, target.options());
}

}  // namespace

TORCH_LIBRARY_IMPL(cross_entropy_ext, CPU, m) {
  m.impl("_forward", &forward_cpu);
  m.impl("_forward_backward", &forward_backward_cpu);
  m.impl("_backward", &backward_cpu);
  m.impl("_backward_", &backward_cpu_);
}

}  // namespace xent
