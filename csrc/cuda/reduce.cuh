// Sums over positions, in double, in two stages and a fixed order, without atomics: each block of a kernel leaves the
// sum of its own positions, and a reader of the total adds those in the order of the blocks. The result has the same
// bits in every run, and the host waits for nothing.
#pragma once

#include "position.cuh"

namespace xent::gpu {

XENT_DEVICE Sums add(Sums a, Sums b) { return {a.loss + b.loss, a.weight + b.weight}; }

// The sum over all threads of the block, for each of them. All threads call it, once.
XENT_DEVICE Sums block_sum(Sums sums) {
  XENT_SHARED_ARRAY(Sums, of_warps, 32);
  sums = {lanes_sum(sums.loss, kWarp), lanes_sum(sums.weight, kWarp)};
  if (threadIdx.x % kWarp == 0) of_warps[threadIdx.x / kWarp] = sums;
  __syncthreads();
  Sums total{0, 0};
  for (unsigned warp = 0; warp < blockDim.x / kWarp; ++warp) total = add(total, of_warps[warp]);
  return total;
}

// The sum of what `count` blocks left. Each warp adds for itself, and all get the same bits.
XENT_DEVICE Sums sum_of_blocks(const Sums* partial_sums, int count) {
  Sums sums{0, 0};
  for (int i = int(threadIdx.x) % kWarp; i < count; i += kWarp) sums = add(sums, partial_sums[i]);
  return {lanes_sum(sums.loss, kWarp), lanes_sum(sums.weight, kWarp)};
}

// ---- the beginning and the end of every kernel of the loss ----------------------------------------------------------

// Returns true where the gradient that the forward made is right as it is: for a grad_output of one and, for a mean,
// with a denominator that was counted and not guessed. After a guess the denominator is zero or one.
XENT_DEVICE bool nothing_to_do(const Task& task) {
  if (!task.made_for_one || read_number<double>(task.grad_output, 0) != 1) return false;
  return !task.made_for_mean || (*task.denominator != 0 && *task.denominator != 1);
}

// 1 / denominator. The backward reads the forward's. A fused forward needs it before the loss: counted by
// count_targets, or known on the host. A count of zero may yet become one, depending on the loss (finish), which
// empty_is_zero takes as its guess. All threads of a warp call it, once its first reads are under way, for it may have
// to wait for the count.
template <class A>
XENT_DEVICE A gradient_scale(const Task& task) {
  if (task.pass == Pass::kForward) return A(0);
  if (task.denominator) return A(1 / *task.denominator);
  double denominator = task.known_denominator;
  wait_for_previous_kernel();
  if (task.counted) denominator = sum_of_blocks(task.counted, task.counted_blocks).weight;
  return A(denominator == 0 && task.empty_is_zero ? 1 : 1 / denominator);
}

XENT_DEVICE void leave_sums(const Task& task, Sums sums) {
  wait_for_previous_kernel();  // blocks without a position, too: the next kernel waits for this one alone
  if (task.partial_sums == nullptr) return;
  sums = block_sum(sums);
  if (threadIdx.x == 0) task.partial_sums[blockIdx.x] = sums;
}

// ---- before the loss: the mean's denominator for a gradient that is made together with it ---------------------------

// Sums the weights of the targets that count. Reads labels and weights alone, several positions at a time, or the
// latency of a read would be paid for each.
template <class A>
__global__ void __launch_bounds__(kReduceThreads, kCountResident) count_targets(const __grid_constant__ Task task) {
  constexpr Objective objective = Objective::kGeneral;  // any
  let_next_kernel_begin();
  constexpr int N = kCountedTogether;
  Sums sums{0, 0};
  const int64_t step = int64_t(gridDim.x) * kReduceThreads;
  for (int64_t first = int64_t(blockIdx.x) * kReduceThreads + threadIdx.x; first < task.positions; first += N * step) {
    int64_t offsets[N], labels[N];
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const int64_t p = min(first + j * step, task.positions - 1);
      offsets[j] =
          task.dims == 1 ? p * labels_of<objective>(task).stride[0] : offset_of(task, labels_of<objective>(task), p);
    }
    read_labels<objective>(task, offsets, labels);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const int64_t p = first + j * step;
      if (p >= task.positions || !is_counted(labels[j])) continue;
      const A weight = task.target_kind == TargetKind::kIndices ? class_weight<A>(task, labels[j]) : A(1);
      sums.weight += double(weight * sample_weight_of<A>(task, p));
    }
  }
  leave_sums(task, sums);
}

// factor * sum of the class weights, in one block.
template <class A>
__global__ void __launch_bounds__(kReduceThreads) sum_weights(const __grid_constant__ WeightSum request) {
  Sums sums{0, 0};
  for (int64_t c = threadIdx.x; c < request.classes; c += kReduceThreads) {
    sums.weight += double(static_cast<const A*>(request.weight)[c]);
  }
  sums = block_sum(sums);
  if (threadIdx.x == 0) *request.result = request.factor * sums.weight;
}

// ---- after the loss -------------------------------------------------------------------------------------------------

// The loss of all positions, and the denominator that it was divided by. One warp. With empty_is_zero, a mean whose
// weights and losses sum to zero is zero: its denominator is one.
template <class A>
__global__ void __launch_bounds__(kFinishThreads) finish(const __grid_constant__ Totals totals) {
  wait_for_previous_kernel();
  const Sums sums = sum_of_blocks(totals.partial_sums, totals.blocks);
  const Sums counted = totals.counted ? sum_of_blocks(totals.counted, totals.counted_blocks) : sums;
  if (threadIdx.x != 0) return;
  A denominator = 1;
  if (totals.mean) denominator = totals.count_is_known ? totals.known_count : counted.weight;
  if (totals.empty_is_zero && denominator == 0 && sums.loss == 0) denominator = 1;
  if (totals.loss) write_element(totals.loss, 0, sums.loss / denominator);
  *totals.denominator = denominator;
}

}  // namespace xent::gpu
