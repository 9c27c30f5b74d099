// The CUDA operators of the negative log likelihood. As those of cross entropy, they never wait for the device.
#include "nll/nll_loss.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>

#include "host/make_problem.h"
#include "cross_entropy_cuda.h"
#include "device.h"
#include "launch.h"
#include "nll.h"

namespace xent::gpu {

int64_t plan_nll_gradient(NllGradient& task, const Device& device) {
  constexpr int64_t kElements = 8192, kLongestRun = 1024;  // of a tile
  const int64_t slab = task.classes * task.inner;
  task.inner_of_tile = std::min(task.inner, kLongestRun);
  task.slabs_of_tile = task.inner_of_tile == task.inner ? std::max<int64_t>(1, kElements / slab) : 1;
  task.classes_of_tile =
      task.slabs_of_tile > 1 ? task.classes : std::clamp(kElements / task.inner_of_tile, int64_t{1}, task.classes);
  return std::min<int64_t>(task.tiles(), int64_t{kNllResident} * device.multiprocessors);
}

namespace {

using namespace nll;

void make_nll_problem(Task& task, const DeviceScope& device, const Inputs& inputs, const Options& options,
                      const at::Tensor& kernel_weight, const at::Tensor& denominator) {
  make_problem(task, inputs, options, kernel_weight, arithmetic_type(inputs, options), denominator);
  task.bad_target = device.bad_target();
  task.bad_targets = device.bad_targets();
}

nll::ForwardResult forward_cuda(XENT_NLL_TENSORS, XENT_NLL_OPTIONS, at::ScalarType loss_dtype) {
  const at::Tensor weight = element_of(weights, 0);
  const Inputs inputs{input, target, weight};
  const Options options = options_of(reduction, ignore_index, loss_dtype);
  check_nll_forward(inputs, options);
  const DeviceScope device(input.device());
  raise_bad_target(input.device());
  const auto kernel_weight = weight_for_kernel(weight, arithmetic_type(inputs, options));
  at::DimVector shape;
  if (reduction == kNone) shape = target.sizes();
  const at::Tensor loss = at::empty(shape, input.options().dtype(loss_dtype));
  const at::Tensor denominator = at::empty({}, input.options().dtype(at::kDouble));

  Task task;
  make_nll_problem(task, device, inputs, options, kernel_weight, denominator);
  merge_dimensions(task, {&task.logits, &task.target});
  const int blocks = blocks_to_count(task.positions, device.limits());
  at::Tensor sums;
  if (reduction == kNone) {
    task.loss = View{data_of(loss), element_type(loss_dtype)};
  } else {
    sums = at::empty({blocks, 2}, denominator.options());
    task.partial_sums = reinterpret_cast<Sums*>(sums.mutable_data_ptr<double>());
  }
  check_cuda(launch_nll_forward(task, blocks, device.stream()), "negative log likelihood");

  Totals totals;
  totals.partial_sums = task.partial_sums;
  totals.blocks = reduction == kNone ? 0 : blocks;
  totals.mean = reduction == kMean;
  if (reduction != kNone) totals.loss = View{data_of(loss), element_type(loss_dtype)};
  totals.denominator = denominator.mutable_data_ptr<double>();
  check_cuda(launch_finish(totals, device.stream()), "reduction");
  return {loss, denominator};
}

at::Tensor backward_cuda(const at::Tensor& grad_output, XENT_NLL_TENSORS, const at::Tensor& denominator,
                         XENT_NLL_OPTIONS) {
  const at::Tensor weight = element_of(weights, 0);
  const Inputs inputs{input, target, weight};
  const Options options = options_of(reduction, ignore_index);
  check_nll_backward(grad_output, inputs, denominator, options);
  const DeviceScope device(input.device());
  raise_bad_target(input.device());
  const at::Tensor grad_input = at::empty_like(input);
  if (grad_input.numel() == 0) return grad_input;
  const auto kernel_weight = weight_for_kernel(weight, arithmetic_type(inputs, options));

  const InMemoryOrder ordered(grad_input, target, grad_output);
  NllGradient task;
  make_nll_problem(task, device, {ordered.gradient, ordered.target, weight}, options, kernel_weight, denominator);
  task.grad_output = view_of_positions(ordered.grad_output);
  task.denominator = denominator.const_data_ptr<double>();
  task.grad_logits = task.logits;
  task.inner = ordered.inner_positions();
  task.element_size = grad_input.element_size();
  merge_dimensions(task, {&task.target, &task.grad_output});
  const int64_t blocks = plan_nll_gradient(task, device.limits());
  check_cuda(launch_nll_backward(task, blocks, device.stream()), "gradient of the negative log likelihood");
  return grad_input;
}

static_assert(std::is_same_v<decltype(forward_cuda), nll::schema::Forward>);
static_assert(std::is_same_v<decltype(backward_cuda), nll::schema::Backward>);

}  // namespace

void register_nll_loss(torch::Library& m) {
  m.impl("_nll_loss_forward", &forward_cuda);
  m.impl("_nll_loss_backward", &backward_cuda);
}

}  // namespace xent::gpu
