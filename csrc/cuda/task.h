// A task of the CUDA kernels: a Problem, where on the device its results go, and how the work is divided.
// Passed by value at each launch. Knows neither torch nor CUDA.
#pragma once

#include "kernel/problem.h"

namespace xent::gpu {

// A report of a class index that is neither a class nor ignore_index. It lies in host memory that the device reads and
// writes, so the host learns of it without waiting for the device. There is room for one report: the next is written
// once the host has taken this one, even by a kernel that is still running.
struct BadTarget {
  int64_t value = 0;
  int64_t position = 0;
  int64_t classes = 0;
  int32_t reported = 0;  // reports so far; the device writes it, after the report
  int32_t taken = 0;     // reports that the host has seen; the host writes it
};

// The work of one kernel at every position.
enum class Pass : uint8_t {
  kForward,          // lse and loss
  kForwardBackward,  // and the gradient of the logits, from the same read
  kBackward,         // the gradients, from lse
};

// How a kernel divides its work (plan.cpp).
struct Division {
  int32_t copy_bytes = 0;        // shared memory for what one team of threads works on at a time
  int32_t lanes_per_row = 1;     // small rows
  int32_t classes_per_lane = 1;  // small rows
  int32_t rows_per_tile = 1;     // small rows
  int32_t slices = 1;            // spatial: threads that share the classes of a position, a power of two
  int32_t slice_bits = 0;        // log2(slices)
  bool twin_target = false;      // a target of every class has the layout and the alignment of the logits
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

  // The mean's denominator. The backward reads the forward's. A fused forward needs it before the loss: counted by
  // count_targets as one sum of weights for each block, or known on the host.
  const double* denominator = nullptr;
  const Sums* counted = nullptr;
  int32_t counted_blocks = 0;
  double known_denominator = 1;
  bool empty_is_zero = false;

  // The forward made the gradient for a grad_output of one. Where that is the grad_output, the backward is done, unless
  // a mean's denominator may have been guessed (reduce.cuh: nothing_to_do).
  bool made_for_one = false, made_for_mean = false;

  // The options in both types of arithmetic (prepare): on the device, a conversion takes as long as sixteen additions.
  // Aligned so that two floats are one load.
  template <class A>
  struct alignas(8) Numbers {
    A keep = 1, share = 0, logit_scale = 1, softcap = 0, inverse_softcap = 0;  // the last two are zero without a cap
    A temperature = 1;
    A z_loss = 0, smoothed_total = 0;
  };
  Numbers<float> in_float;
  Numbers<double> in_double;

  // e / C times the sum of the class weights, where it has to be formed on the device.
  const double* smoothed_total_on_device = nullptr;

  Division division;  // of the plan, set by launch_loss

  BadTarget* bad_target = nullptr;
  int32_t* bad_targets = nullptr;  // in device memory, reports that were begun: the thread that adds one writes it
};

// Where the sums of a reduction end up.
struct Totals {
  const Sums* partial_sums = nullptr;
  int32_t blocks = 0;
  const Sums* counted = nullptr;  // as in Task
  int32_t counted_blocks = 0;
  bool mean = false;
  bool count_is_known = false;  // the denominator is `known_count`
  bool empty_is_zero = false;
  double known_count = 1;
  View loss;
  double* denominator = nullptr;
};

// A request for factor * sum of the class weights, for label smoothing.
struct WeightSum {
  const void* weight = nullptr;
  int64_t classes = 0;
  bool in_double = false;
  double factor = 1;
  double* result = nullptr;
};

// The limits that launch decisions depend on. The emulator's tests choose small ones, to reach every decision with
// small inputs.
struct Device {
  int multiprocessors = 1;
  int64_t shared_per_multiprocessor = 100 << 10;
  int64_t shared_per_block = 99 << 10;
  int most_threads = 1536;  // of a multiprocessor
  int most_blocks = 16;     // of a multiprocessor
  int largest_cluster = 1;
  bool overlaps_kernels = false;
};

}  // namespace xent::gpu
