// The CUDA operators: tensors become a Task, kernels are put on the current stream. Nothing here waits for the device,
// so everything can be captured into a CUDA graph.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <algorithm>

#include "host/adapter.h"
#include "host/denominator.h"
#include "host/make_problem.h"
#include "cross_entropy_cuda.h"
#include "device.h"
#include "launch.h"

namespace xent::gpu {

void raise_bad_target(c10::Device device) {
  const DeviceScope scope(device);
  BadTarget* const report = scope.bad_target();
  int32_t taken = __atomic_load_n(&report->taken, __ATOMIC_RELAXED);
  const int32_t reported = __atomic_load_n(&report->reported, __ATOMIC_ACQUIRE);
  if (reported == taken || scope.is_capturing()) return;
  const int64_t value = report->value, position = report->position, classes = report->classes;
  // Only one thread takes it.
  if (!__atomic_compare_exchange_n(&report->taken, &taken, reported, false, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED)) return;
  TORCH_CHECK_INDEX(false, "Target ", value, " is out of bounds. (Position ", position, " of a cross entropy over ",
                    classes, " classes, earlier on ", device,
                    ": its loss is NaN and its gradient zero. Kernels report this when they have run.)");
}

void check_errors() {
  for (const c10::Device device : synchronized_devices()) raise_bad_target(device);
}

namespace {

Task make_task(const DeviceScope& device, const Inputs& inputs, const Options& options, const at::Tensor& kernel_weight,
               at::ScalarType arithmetic, const at::Tensor& lse) {
  Task task;
  make_problem(task, inputs, options, kernel_weight, arithmetic, lse);
  task.bad_target = device.bad_target();
  task.bad_targets = device.bad_targets();
  return task;
}

void merge_dimensions(Task& task) {
  xent::merge_dimensions(task, {&task.logits, &task.target, &task.sample_weight, &task.probs, &task.labels, &task.loss,
                                &task.grad_output, &task.grad_logits, &task.grad_target});
}

// What kernels leave for each other, in one tensor of float64: the sums of the blocks that count the targets, and those
// of the blocks of the loss.
struct Workspace {
  at::Tensor memory;
  Sums *counted, *partial;

  Workspace(const at::Tensor& logits, int64_t counting_blocks, int64_t blocks) {
    static_assert(sizeof(Sums) == 2 * sizeof(double));
    memory = at::empty({2 * (counting_blocks + blocks)}, logits.options().dtype(at::kDouble));
    counted = reinterpret_cast<Sums*>(memory.mutable_data_ptr<double>());
    partial = counted + counting_blocks;
  }
};

// As many blocks as run at a time: a cluster that has to wait for another one's end would take as long again. Where no
// cluster of a size fits, as on a part of a GPU, tries the next smaller one, and at last none.
Plan plan_on(const DeviceScope& device, Task& task) {
  prepare(task);
  Device limits = device.limits();
  while (true) {
    Plan how = plan(task, limits);
    if (how.shape.cluster == 1) return how;
    int most = 0;
    check_cuda(most_clusters(task, how, most), "number of clusters");
    how.shape.blocks = std::min(how.shape.blocks, int64_t(most) * how.shape.cluster);
    if (most > 0) return how;
    limits.largest_cluster = how.shape.cluster / 2;
  }
}

// With class weights, what smoothing makes of their sum is known only on the device. Returns what has to outlive the
// launches.
at::Tensor sum_class_weights(Task& task, const at::Tensor& logits, const DeviceScope& device) {
  if (task.label_smoothing == 0 || is_dense(task.target_kind) || task.weight == nullptr) return {};
  const at::Tensor result = at::empty({}, logits.options().dtype(at::kDouble));
  task.smoothed_total_on_device = result.const_data_ptr<double>();
  const WeightSum request{task.weight, task.all_classes(), task.arithmetic_in_double, task.share,
                          result.mutable_data_ptr<double>()};
  check_cuda(launch_weight_sum(request, device.stream()), "sum of the class weights");
  return result;
}

// Leaves the lse of a teacher's logits where the kernels of the loss read it.
void sum_teacher(const Task& task, const DeviceScope& device) {
  if (task.target_kind != TargetKind::kTeacher) return;
  Task teacher = task;
  make_teacher_problem(teacher, task);
  teacher.pass = Pass::kForward;
  teacher.loss = teacher.grad_logits = View();
  const Plan how = plan_on(device, teacher);
  check_cuda(launch_loss(teacher, how, device.stream()), "lse of the teacher");
}

// ---- forward --------------------------------------------------------------------------------------------------------

// With `grad_logits`, which may be the logits themselves, the gradient is made from the same read, and lse is left out
// if the loss has kernels of its own: two numbers for each position, written for nobody, are a tenth of what 19 classes
// take.
ForwardResult run_forward(const Inputs& inputs, const Options& options, const at::Tensor& grad_logits) {
  const bool gradient_wanted = grad_logits.defined();
  TORCH_CHECK_VALUE(!gradient_wanted || !options.is_shard(),
                    "cross_entropy_ext::_forward_backward: a shard's gradient needs the lse of all classes");
  const at::Tensor& logits = inputs.logits;
  const DeviceScope device(logits.device());
  raise_bad_target(logits.device());
  const auto arithmetic = arithmetic_type(inputs, options);
  const auto weights = weight_for_kernel(inputs.weight, arithmetic, options.class_begin);
  at::DimVector saved{saved_rows(inputs.target_kind(options), options), count_positions(logits)};
  if (gradient_wanted && options.has_own_kernels()) saved = {0};
  const at::Tensor lse = at::empty(saved, logits.options().dtype(arithmetic));
  const at::Tensor denominator = at::empty({}, logits.options().dtype(at::kDouble));
  at::DimVector shape;
  if (options.reduction == kNone) {
    shape = logits.sizes();
    shape.erase(shape.begin() + class_dim(logits));
  }
  const at::Tensor loss = at::empty(shape, logits.options().dtype(*options.loss_dtype));

  const bool mean = options.reduction == kMean;
  Task task = make_task(device, inputs, options, weights, arithmetic, lse);
  task.pass = gradient_wanted ? Pass::kForwardBackward : Pass::kForward;
  task.known_denominator = mean ? double(task.positions) : 1;
  task.empty_is_zero = options.empty_is_zero;
  if (options.reduction == kNone) task.loss = view_of_positions(loss);
  if (gradient_wanted) task.grad_logits = view_with_classes(grad_logits);
  merge_dimensions(task);
  Plan how = plan_on(device, task);

  const bool given = inputs.denominator.defined(), known = !given && denominator_is_known(task);
  const bool count_first = gradient_wanted && mean && !known && !given;
  const bool overlaps = device.limits().overlaps_kernels;
  how.shape.overlaps = overlaps && count_first;
  how.shape.is_overlapped = overlaps;
  const int counting_blocks = count_first ? blocks_to_count(task.positions, device.limits()) : 0;
  const Workspace workspace(logits, counting_blocks, how.shape.blocks);
  const at::Tensor weight_sum = sum_class_weights(task, logits, device);
  sum_teacher(task, device);
  if (count_first) {
    task.partial_sums = workspace.counted;
    check_cuda(launch_count(task, counting_blocks, device.stream(), overlaps), "count of the targets");
    task.counted = workspace.counted;
    task.counted_blocks = counting_blocks;
  }
  at::Tensor as_counted;
  if (given) {  // as if one block had counted it
    as_counted = at::stack({at::zeros_like(inputs.denominator), inputs.denominator});
    task.counted = static_cast<const Sums*>(as_counted.const_data_ptr());
    task.counted_blocks = 1;
  }
  task.partial_sums = options.reduction == kNone ? nullptr : workspace.partial;
  check_cuda(launch_loss(task, how, device.stream()), "forward");

  Totals totals;
  totals.partial_sums = task.partial_sums;
  totals.blocks = options.reduction == kNone ? 0 : int32_t(how.shape.blocks);
  totals.counted = task.counted;
  totals.counted_blocks = task.counted_blocks;
  totals.mean = mean;
  totals.count_is_known = known;
  totals.known_count = double(task.positions);
  totals.empty_is_zero = options.empty_is_zero;
  if (options.reduction != kNone) totals.loss = View{data_of(loss), element_type(loss.scalar_type())};
  totals.denominator = denominator.mutable_data_ptr<double>();
  check_cuda(launch_finish(totals, device.stream(), overlaps), "reduction");
  return {loss, lse, denominator};
}

ForwardResult forward(const Inputs& inputs, const Options& options) { return run_forward(inputs, options, {}); }

ForwardBackwardResult forward_backward(const Inputs& inputs, const Options& options) {
  TORCH_CHECK(options.reduction != kNone, "cross_entropy_ext::_forward_backward: needs a reduction");
  const at::Tensor grad_logits = at::empty_like(inputs.logits);
  const auto [loss, lse, denominator] = run_forward(inputs, options, grad_logits);
  return {loss, lse, denominator, grad_logits};
}

// ---- backward -------------------------------------------------------------------------------------------------------

// Writes whichever gradient is defined. `made_for_one`: grad_logits holds the one for a grad_output of one.
void backward_into(const at::Tensor& grad_logits, const at::Tensor& grad_target, const Gradients& gradients,
                   const Inputs& inputs, const Options& options, bool made_for_one) {
  check_backward(gradients, inputs, options, grad_target.defined(), /*finds_lse=*/made_for_one);
  const at::Tensor &logits = inputs.logits, &grad_output = gradients.grad_output;
  const DeviceScope device(logits.device());
  raise_bad_target(logits.device());
  if (logits.numel() == 0 || (!grad_logits.defined() && !grad_target.defined())) return;
  if (grad_logits.defined()) grad_logits.mutable_data_ptr();  // no lazy copy shares it from here on
  const auto arithmetic = arithmetic_type(inputs, options);
  const auto weights = weight_for_kernel(inputs.weight, arithmetic, options.class_begin);
  Task task = make_task(device, inputs, options, weights, arithmetic, gradients.lse);
  task.pass = gradients.lse.numel() == 0 ? Pass::kForwardBackward : Pass::kBackward;
  if (gradients.grad_statistics.defined()) {
    task.grad_statistics = data_of(gradients.grad_statistics);
    made_for_one = false;
  }
  task.made_for_one = made_for_one;
  task.made_for_mean = made_for_one && options.reduction == kMean;
  task.denominator = gradients.denominator.const_data_ptr<double>();
  task.grad_output = options.reduction == kNone ? view_of_positions(grad_output)
                                                : View{data_of(grad_output), element_type(grad_output.scalar_type())};
  if (grad_logits.defined()) task.grad_logits = view_with_classes(grad_logits);
  if (grad_target.defined()) task.grad_target = view_with_classes(grad_target);
  merge_dimensions(task);
  const Plan how = plan_on(device, task);
  const at::Tensor weight_sum = sum_class_weights(task, logits, device);
  check_cuda(launch_loss(task, how, device.stream()), "backward");
}

at::Tensor gradient_of(const at::Tensor& tensor, bool wanted) { return wanted ? at::empty_like(tensor) : at::Tensor(); }

at::Tensor or_empty(const at::Tensor& gradient, const at::Tensor& like) {
  return gradient.defined() ? gradient : at::empty({0}, like.options());
}

BackwardResult backward(const Gradients& gradients, const Inputs& inputs, const Options& options,
                        std::array<bool, 2> wanted) {
  const at::Tensor& of_target = inputs.differentiable_target(options);
  const at::Tensor grad_logits = gradient_of(inputs.logits, wanted[0]), grad_target = gradient_of(of_target, wanted[1]);
  backward_into(grad_logits, grad_target, gradients, inputs, options, false);
  return {or_empty(grad_logits, inputs.logits), or_empty(grad_target, of_target)};
}

at::Tensor backward_in_place(const Gradients& gradients, const Inputs& inputs, const Options& options,
                             bool target_wanted) {
  const at::Tensor& of_target = inputs.differentiable_target(options);
  const at::Tensor grad_target = gradient_of(of_target, target_wanted);
  TORCH_CHECK(options.target_kind != TargetKind::kPairs, "cross_entropy_ext::_backward_: not for pairs");
  backward_into(inputs.logits, grad_target, gradients, inputs, options, false);
  return or_empty(grad_target, of_target);
}

// Where classes are neighbours, kernels read all of a row before they write to it. Else the gradient comes from a
// second read; and also where a denominator of zero may become one, which only the loss tells, and that comes later.
ForwardResult forward_backward_in_place(const Inputs& inputs, const Options& options) {
  const at::Tensor& logits = inputs.logits;
  TORCH_CHECK(options.reduction != kNone && options.target_kind != TargetKind::kPairs,
              "cross_entropy_ext::_forward_backward_: needs a reduction, and no pairs");
  const bool may_guess = options.reduction == kMean && options.empty_is_zero;
  if (options.has_own_kernels() && logits.stride(class_dim(logits)) == 1 && !may_guess) {
    logits.mutable_data_ptr();  // no lazy copy shares it from here on
    return run_forward(inputs, options, logits);
  }
  const auto [loss, lse, denominator] = forward(inputs, options);
  const at::Tensor one = at::ones({}, logits.options().dtype(at::kFloat));
  backward_into(logits, {}, {one, {}, lse, denominator}, inputs, options, false);
  return {loss, lse, denominator};
}

void adapt_gradient(const Gradients& gradients, const Inputs& inputs, const Options& options,
                    const at::Tensor& grad_logits) {
  backward_into(grad_logits, {}, gradients, inputs, options, true);
}

}  // namespace

void register_kernels(torch::Library& m) {
  register_nll_loss(m);
  m.impl("_forward", &Adapter<&forward>::call);
  m.impl("_forward_backward", &Adapter<&forward_backward>::call);
  m.impl("_forward_backward_", &Adapter<&forward_backward_in_place>::call);
  m.impl("_backward", &Adapter<&backward>::call);
  m.impl("_backward_", &Adapter<&backward_in_place>::call);
  m.impl("_adapt_gradient_", &Adapter<&adapt_gradient>::call);
}

}  // namespace xent::gpu
