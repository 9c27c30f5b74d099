// What the host asks of the CUDA kernels: a Problem, and where on the device the results go. Passed by value at each
// launch. Knows neither torch nor CUDA.
#pragma once

#include "kernel/problem.h"

namespace xent::gpu {

// A class index that is neither a class nor ignore_index. In host memory that the device reads and writes, so that the
// host learns of it without waiting for the device, and in no order with what else the device does. There may be one
// report at a time: the next one can come when the host has taken this one, from a kernel that still runs, too.
struct BadTarget {
  int64_t value = 0;
  int64_t position = 0;
  int64_t classes = 0;
  int32_t reported = 0;  // how many reports there have been. By the device, after the report
  int32_t taken = 0;     // how many of them the host has seen. By the host
};

// What one kernel is to do for every position.
enum class Pass : uint8_t {
  kForward,          // lse and loss
  kForwardBackward,  // and the gradient of the logits, from the same read
  kBackward,         // the gradients, from lse
};

struct Task : Problem {
  Pass pass = Pass::kForward;

  // ---- forward
  View loss;                     // one for each position, where they are not summed
  Sums* partial_sums = nullptr;  // else one for each block, in the order of the blocks

  // ---- gradients
  View grad_logits;
  View grad_target;  // of probabilities, the pairs' or the teacher's logits; absent where none is asked for
  View grad_output;  // one for each position (reduction 'none'), or a single element with strides of zero
  const void* grad_statistics = nullptr;  // T[3][positions], see GradStatistic; or null

  // What a mean divides by. In the backward the forward's result. For a gradient made in the forward it comes first, as
  // the blocks' sums of the targets' weights (count_targets), or is known.
  const double* denominator = nullptr;
  const Sums* counted = nullptr;
  int32_t counted_blocks = 0;
  double known_denominator = 1;
  bool empty_is_zero = false;

  // The gradient was made in the forward for a grad_output of one: if that is what it is, there is nothing to do. But a
  // mean's where one was counted, or none, is made anew (reduce.cuh).
  bool made_for_one = false, made_for_mean = false;

  double keep = 1, share = 0;  // 1 - e, e / C

  // In both types of arithmetic: a conversion takes as long as sixteen additions.
  template <class A>
  struct Numbers {
    A keep = 1, share = 0, logit_scale = 1, softcap = 0, inverse_softcap = 0;  // the last two are zero without a cap
    A temperature = 1;
    A z_loss = 0, smoothed_total = 0;
  };
  Numbers<float> in_float;
  Numbers<double> in_double;

  // e / C times the sum of the class weights, where it has to be formed on the device.
  const double* smoothed_total_on_device = nullptr;

  // How the kernel divides its work (plan.cpp).
  int32_t copy_bytes = 0;     // of shared memory, for what one team of threads works on at a time
  int32_t lanes_per_row = 1;  // small rows
  int32_t classes_per_lane = 1;
  int32_t rows_per_tile = 1;
  int32_t slices = 1;        // spatial: how many threads share the classes of a position
  int32_t slice_bits = 0;    // its logarithm
  bool twin_target = false;  // a target of every class lies and is aligned as the logits are

  BadTarget* bad_target = nullptr;
  int32_t* bad_targets = nullptr;  // how many reports were begun, in device memory: whoever adds one makes it
};

// Where the sums of a reduction end up.
struct Totals {
  const Sums* partial_sums = nullptr;
  int32_t blocks = 0;
  const Sums* counted = nullptr;  // as in Task
  int32_t counted_blocks = 0;
  bool mean = false;
  bool count_is_known = false;  // a mean divides by `known_count`
  bool empty_is_zero = false;
  double known_count = 1;
  View loss;
  double* denominator = nullptr;
};

// The sum of the class weights, for label smoothing.
struct WeightSum {
  const void* weight = nullptr;
  int64_t classes = 0;
  bool in_double = false;
  double factor = 1;
  double* result = nullptr;
};

// What launch decisions depend on. The emulator's tests choose small ones, to reach every decision with small inputs.
struct Device {
  int multiprocessors = 1;
  int64_t shared_per_multiprocessor = 100 << 10;
  int64_t shared_per_block = 99 << 10;
  int most_threads = 1536;  // of a multiprocessor
  int most_blocks = 16;
  int largest_cluster = 1;
  bool overlaps_kernels = false;
};

}  // namespace xent::gpu
