// A position as every kernel sees it: where its elements are, what its target says, the loss it adds and the constants
// of its gradient.
#pragma once

#include "statistics.cuh"
#include "task.h"

namespace xent::gpu {

// ---- where ----------------------------------------------------------------------------------------------------------

// The offset of a position, in elements.
XENT_DEVICE int64_t offset_of(const Task& task, const View& view, int64_t position) {
  int64_t offset = 0;
  for (int d = task.dims - 1; d > 0; --d) {
    const int64_t outer = position / task.size[d];
    offset += (position - outer * task.size[d]) * view.stride[d];
    position = outer;
  }
  return offset + position * view.stride[0];
}

// The offset of the first position of each run along the last dimension.
XENT_DEVICE int64_t offset_of_run(const Task& task, const View& view, int64_t run) {
  int64_t offset = 0;
  for (int d = task.dims - 2; d > 0; --d) {
    const int64_t outer = run / task.size[d];
    offset += (run - outer * task.size[d]) * view.stride[d];
    run = outer;
  }
  return task.dims > 1 ? offset + run * view.stride[0] : 0;
}

// ---- elements of a type that is known at run time -------------------------------------------------------------------

template <class To>
XENT_DEVICE To read_element(const View& view, int64_t offset) {
  switch (view.type) {
    case ElementType::kFloat16: return To(widen<float>(static_cast<const Float16*>(view.data)[offset]));
    case ElementType::kBFloat16: return To(widen<float>(static_cast<const BFloat16*>(view.data)[offset]));
    case ElementType::kFloat32: return To(static_cast<const float*>(view.data)[offset]);
    case ElementType::kFloat64: return To(static_cast<const double*>(view.data)[offset]);
    case ElementType::kInt8: return To(static_cast<const int8_t*>(view.data)[offset]);
    case ElementType::kUInt8: return To(static_cast<const uint8_t*>(view.data)[offset]);
    case ElementType::kInt16: return To(static_cast<const int16_t*>(view.data)[offset]);
    case ElementType::kInt32: return To(static_cast<const int32_t*>(view.data)[offset]);
    case ElementType::kInt64: return To(static_cast<const int64_t*>(view.data)[offset]);
  }
  return To(0);
}

template <class From>
XENT_DEVICE void write_element(const View& view, int64_t offset, From x) {
  switch (view.type) {
    case ElementType::kFloat16: static_cast<Float16*>(view.data)[offset] = narrow<Float16>(x); break;
    case ElementType::kBFloat16: static_cast<BFloat16*>(view.data)[offset] = narrow<BFloat16>(x); break;
    case ElementType::kFloat32: static_cast<float*>(view.data)[offset] = float(x); break;
    default: static_cast<double*>(view.data)[offset] = double(x); break;
  }
}

// ---- what the target says -------------------------------------------------------------------------------------------

// A class, or one of these. Kernels call with fewer than 2^31 classes, or (strided.cuh) take the class as it is.
constexpr int kIgnored = -1, kBad = -2, kProbabilities = -3;

// What a position's target is.
template <TargetKind kind>
XENT_DEVICE int64_t read_label(const Task& task, int64_t offset) {
  if constexpr (kind == TargetKind::kSoft) return kProbabilities;
  const int64_t target = read_element<int64_t>(task.target, offset);
  if (target == task.ignore_index) return kIgnored;
  return target < 0 || target >= task.classes ? kBad : target;
}

XENT_DEVICE bool is_counted(int64_t label) { return label >= 0 || label == kProbabilities; }

// Tells the host, unless it still has to take an earlier report. `offset`: of the position in the target.
XENT_DEVICE void report_bad_target(const Task& task, int64_t position, int64_t offset) {
  volatile BadTarget* const report = task.bad_target;
  const int32_t earlier = report->taken;
  if (atomicCAS(task.bad_targets, earlier, earlier + 1) != earlier) return;
  report->value = read_element<int64_t>(task.target, offset);
  report->position = position;
  report->classes = task.classes;
  __threadfence_system();
  report->reported = earlier + 1;
}

template <class A>
XENT_DEVICE A class_weight(const Task& task, int64_t c) {
  return task.weight ? static_cast<const A*>(task.weight)[c] : A(1);
}

// A class's coefficient in the loss, but for what an index target adds to its own class.
template <TargetKind kind, class A>
XENT_DEVICE A coefficient(const Task& task, int64_t c, A probability) {
  if constexpr (kind == TargetKind::kIndex) return A(0);
  if constexpr (kind == TargetKind::kSmoothedIndex) return class_weight<A>(task, c) * A(task.share);
  return class_weight<A>(task, c) * (A(task.keep) * probability + A(task.share));
}

// Whether all classes have the same coefficient, but for what an index target adds to its own.
template <TargetKind kind>
XENT_DEVICE bool is_uniform(const Task& task) {
  return kind == TargetKind::kSmoothedIndex && task.weight == nullptr;
}

// ---- the loss -------------------------------------------------------------------------------------------------------

// What a position adds to its block's sums, and leaves for the backward. By one thread. `target_offset`, `loss_offset`:
// of the position in the target and in the losses.
template <TargetKind kind, class A, class S>
XENT_DEVICE void finish_loss(const Task& task, int64_t position, int64_t target_offset, int64_t loss_offset,
                             int64_t label, A target_logit, const S& statistics, A log_sum, Sums& sums) {
  const A spread = statistics.spread.value(), mass = statistics.mass.value();
  A loss = 0, weight = 0, lse_high = 0, lse_low = 0;
  if (label == kBad) {
    loss = A(NAN);
    report_bad_target(task, position, target_offset);
  } else if (label != kIgnored) {
    lse_high = statistics.max;
    lse_low = log_sum;
    if constexpr (kind == TargetKind::kSoft) {
      loss = index_loss(A(0), A(1), A(0), spread, mass, log_sum);
    } else {
      weight = class_weight<A>(task, label);
      const A hit = A(task.keep) * weight;
      loss =
          index_loss(hit, A(kind == TargetKind::kIndex ? 0 : 1), statistics.max - target_logit, spread, mass, log_sum);
    }
  }
  A* const lse = static_cast<A*>(task.lse);
  lse[position] = lse_high;
  lse[task.positions + position] = lse_low;
  if constexpr (kind == TargetKind::kSoft) lse[2 * task.positions + position] = mass;
  if (task.loss) {
    write_element(task.loss, loss_offset, loss);
  } else {
    sums.loss += double(loss);
    sums.weight += double(weight);
  }
}

// ---- the gradient ---------------------------------------------------------------------------------------------------

// For a position whose target counts: g (A softmax - a) as a function of the logit and its coefficient.
template <TargetKind kind, class A>
struct Gradient {
  A max, log_sum, total, scale;     // total: A, scale: g
  A slope, reference, correction;   // softmax = 2^(x slope - reference) correction
  A normalizer, factor;             // A correction, g A correction
  A hit, smoothed_total, smoothed;  // of an index target's own class

  XENT_DEVICE void set(const Task& task, int64_t target, A max_logit, A log_of_sum, A mass, A grad_output) {
    max = max_logit;
    log_sum = log_of_sum;
    scale = grad_output;
    // lse * log2(e) as a number and what its rounding lost. Where it is huge any slope will do that keeps it: all
    // other classes come out as zero.
    slope = is_huge(max) ? A(1) : kLog2E<A>;
    const A high = max * slope, high_lost = fused(max, slope, -high);
    const A low = log_sum * kLog2E<A>, low_lost = fused(log_sum, kLog2E<A>, -low);
    A sum_lost;
    two_sum(high, low, reference, sum_lost);
    correction = exp2_fast(-(sum_lost + high_lost + low_lost));
    hit = smoothed_total = smoothed = A(0);
    total = mass;
    if constexpr (kind != TargetKind::kSoft) {
      hit = A(task.keep) * class_weight<A>(task, target);
      if constexpr (kind == TargetKind::kSmoothedIndex) {
        smoothed_total = A(task.smoothed_total_on_device ? *task.smoothed_total_on_device : task.smoothed_total);
        smoothed = coefficient<kind>(task, target, A(0));
      }
      total = hit + smoothed_total;
    }
    normalizer = total * correction;
    factor = scale * normalizer;
  }

  // A class that is not an index target's own.
  XENT_DEVICE A operator()(A x, A a) const {
    const A power = exp2_fast(fused(x, slope, -reference));
    if constexpr (kind == TargetKind::kIndex) return power * factor;
    if constexpr (kind == TargetKind::kSoft) {
      constexpr A kNearOne = A(0.4);  // a little less than a half: the correction is missing
      if (power > kNearOne && a + a > total) return scale * soft_gradient(total, (x - max) - log_sum, a);
    }
    return scale * fused(power, normalizer, -a);
  }

  // An index target's own class.
  XENT_DEVICE A own(A x) const { return scale * target_gradient(hit, smoothed_total, smoothed, (x - max) - log_sum); }

  // The gradient of a probability, but for (1 - e) w.
  XENT_DEVICE A of_probability(A x) const { return scale * ((max - x) + log_sum); }
};

// What the forward left for a position.
template <class A>
struct SavedLse {
  A max, log_sum, mass = 0;

  XENT_DEVICE SavedLse(const Task& task, int64_t position) {
    const A* const lse = static_cast<const A*>(task.lse);
    max = lse[position];
    log_sum = lse[task.positions + position];
    if (task.kind == TargetKind::kSoft) mass = lse[2 * task.positions + position];
  }
};

template <class A>
XENT_DEVICE A read_grad_output(const Task& task, int64_t offset) {
  return task.grad_output ? read_element<A>(task.grad_output, offset) : A(1);
}

// d loss / d q_c, for a target that is to have a gradient.
template <class A>
XENT_DEVICE void write_probability_gradient(const Task& task, int64_t position_offset, int64_t c, A of_probability) {
  write_element(task.grad_target, position_offset + c * task.grad_target.class_stride,
                A(task.keep) * class_weight<A>(task, c) * of_probability);
}

}  // namespace xent::gpu
