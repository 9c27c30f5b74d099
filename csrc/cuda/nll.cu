#include "nll.cuh"

namespace xent::gpu {

int launch_nll_forward(const Task& task, int64_t blocks, void* stream) {
  const LaunchShape shape{blocks, kNllThreads};
  return task.arithmetic_in_double ? launch<nll_forward<double>>(shape, stream, task)
                                   : launch<nll_forward<float>>(shape, stream, task);
}

int launch_nll_backward(const NllGradient& task, int64_t blocks, void* stream) {
  const LaunchShape shape{blocks, kNllThreads};
  return task.arithmetic_in_double ? launch<nll_backward<double>>(shape, stream, task)
                                   : launch<nll_backward<float>>(shape, stream, task);
}

}  // namespace xent::gpu
