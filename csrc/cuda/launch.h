// The CUDA kernels as functions: the wall between torch and CUDA. Each puts one kernel on a stream (a cudaStream_t) and
// returns its cudaError_t.
#pragma once

#include "plan.h"

namespace xent::gpu {

// Before: a mean's denominator and smoothing's sum of weights, where they are not known on the host.
int launch_count(const Task& task, int blocks, void* stream, bool is_overlapped = false);
int launch_weight_sum(const WeightSum& request, void* stream);

// How many clusters of the plan's kernel run at a time.
int most_clusters(const Task& task, const Plan& plan, int& most);

// The loss, the gradient or both, as task.pass says.
int launch_loss(const Task& task, const Plan& plan, void* stream);

// After: the loss of all positions.
int launch_finish(const Totals& totals, void* stream, bool overlaps = false);

// What the current device runs was compiled for this compute capability, times ten: 80 even on a later device, where
// there was nothing better for it.
int compiled_for(int& capability);

// For which GPUs: "800,900", as nvcc counts them.
const char* compiled_archs();

}  // namespace xent::gpu
