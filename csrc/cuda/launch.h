// The CUDA kernels as functions: the wall between torch and CUDA. Each puts one kernel on a stream (a cudaStream_t) and
// returns its cudaError_t.
#pragma once

#include "plan.h"

namespace xent::gpu {

// Before the loss: a mean's denominator and smoothing's sum of weights, where the host does not know them.
int launch_count(const Task& task, int blocks, void* stream, bool is_overlapped = false);
int launch_weight_sum(const WeightSum& request, void* stream);

// The loss, the gradient or both, as task.pass says.
int launch_loss(Task task, const Plan& plan, void* stream);

// After the loss: its sum or mean over all positions.
int launch_finish(const Totals& totals, void* stream, bool overlaps = false);

// Finds how many clusters of the plan's kernel run at a time.
int most_clusters(const Task& task, const Plan& plan, int& most);

// Finds the compute capability, times ten, that the current device's code was compiled for: 80 even on a later device,
// where there was nothing better for it.
int compiled_for(int& capability);

// Returns the GPUs that there is code for, as nvcc counts them: "800,900".
const char* compiled_archs();

}  // namespace xent::gpu
