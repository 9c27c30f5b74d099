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

// e / C times the sum of the class weights.
template <class A>
XENT_DEVICE A smoothed_total(const Task& task) {
  return A(task.smoothed_total_on_device ? *task.smoothed_total_on_device : task.smoothed_total);
}

// Whether all classes have the same coefficient, but for what an index target adds to its own.
template <TargetKind kind>
XENT_DEVICE bool is_uniform(const Task& task) {
  return kind == TargetKind::kIndex || (kind == TargetKind::kSmoothedIndex && task.weight == nullptr);
}

// ---- the loss -------------------------------------------------------------------------------------------------------

// What the forward finds out about a position: the names are those of Statistics.
template <class A>
struct Found {
  A max, log_sum, spread, mass;

  template <class S>
  static XENT_DEVICE Found of(const S& statistics) {
    return {statistics.max, statistics.log_sum(), statistics.spread.value(), statistics.mass.value()};
  }
};

// What a position adds to its block's sums, and leaves for the backward. By one thread. `target_offset`, `loss_offset`:
// of the position in the target and in the losses.
template <TargetKind kind, class A>
XENT_DEVICE void finish_loss(const Task& task, int64_t position, int64_t target_offset, int64_t loss_offset,
                             int64_t label, A target_logit, const Found<A>& found, Sums& sums) {
  const auto [max, log_sum, spread, mass] = found;
  A loss = 0, weight = 0, lse_high = 0, lse_low = 0;
  if (label == kBad) {
    loss = A(NAN);
    report_bad_target(task, position, target_offset);
  } else if (label != kIgnored) {
    lse_high = max;
    lse_low = log_sum;
    if constexpr (kind == TargetKind::kSoft) {
      loss = index_loss(A(0), A(1), A(0), spread, mass, log_sum);
    } else {
      weight = class_weight<A>(task, label);
      const A hit = A(task.keep) * weight;
      loss = index_loss(hit, A(kind == TargetKind::kIndex ? 0 : 1), max - target_logit, spread, mass, log_sum);
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

// For a position whose target counts: g (A softmax - a) as a function of the logit and its coefficient. Powers of two
// are KnownMaximum's, so a forward that has them at hand makes the same gradient as a backward, to the bit.
template <TargetKind kind, class A>
struct Gradient {
  A max, log_sum, total, scale;     // total: A, scale: g
  A slope, reference;               // 2^(x slope - reference)
  A to_softmax, to_total;           // times a power: softmax, A softmax
  A to_scaled;                      // and g A softmax
  A hit, smoothed_total, smoothed;  // of an index target's own class

  XENT_DEVICE void set(const Task& task, int64_t label, const Found<A>& found, A grad_output) {
    const auto known = KnownMaximum<A>::of(found.max);
    max = found.max;
    log_sum = found.log_sum;
    slope = known.slope;
    reference = known.reference;
    // 2^(reference - lse log2(e)), and what rounding loses of the exponent.
    const A low = rounded_product(log_sum, kLog2E<A>), low_lost = fused(log_sum, kLog2E<A>, -low);
    A exponent, lost;
    two_sum(low, known.lost(), exponent, lost);
    to_softmax = exp2_fast(-exponent) * exp2_fast(-(lost + low_lost));
    scale = grad_output;
    hit = smoothed_total = smoothed = A(0);
    total = found.mass;
    if constexpr (kind != TargetKind::kSoft) {
      hit = A(task.keep) * class_weight<A>(task, label);
      if constexpr (kind == TargetKind::kSmoothedIndex) {
        smoothed_total = gpu::smoothed_total<A>(task);
        smoothed = coefficient<kind>(task, label, A(0));
      }
      total = hit + smoothed_total;
    }
    to_total = total * to_softmax;
    to_scaled = scale * to_total;
  }

  XENT_DEVICE A power(A x) const { return exp2_fast(fused(x, slope, -reference)); }

  // Of a class that is not an index target's own, from its power. `careful` becomes true where that is not enough.
  XENT_DEVICE A of_power(A power, A a, bool& careful) const {
    if constexpr (kind == TargetKind::kIndex) return power * to_scaled;
    if constexpr (kind == TargetKind::kSoft) careful |= power * to_softmax > A(0.5);
    return scale * fused(power, to_total, -a);
  }
  XENT_DEVICE A from_logit(A x, A a) const { return scale * soft_gradient(total, (x - max) - log_sum, a); }

  // An index target's own class.
  XENT_DEVICE A own(A x) const { return scale * target_gradient(hit, smoothed_total, smoothed, (x - max) - log_sum); }

  // The gradient of a probability, but for (1 - e) w.
  XENT_DEVICE A of_probability(A x) const { return scale * ((max - x) + log_sum); }
};

// Of N logits, but for an index target's own class. `of(j)` is the j-th one's Gradient, `set_coefficients(a)` is called
// where coefficients differ.
template <TargetKind kind, int N, class A, class Of, class SetCoefficients>
XENT_DEVICE void gradients(const Task& task, const Of& of, const A (&x)[N], const SetCoefficients& set_coefficients,
                           A (&dx)[N]) {
  bool careful = false;
  if (is_uniform<kind>(task)) {
#pragma unroll
    for (int j = 0; j < N; ++j) dx[j] = of(j).of_power(of(j).power(x[j]), A(task.share), careful);
    return;
  }
  A a[N];
  set_coefficients(a);
#pragma unroll
  for (int j = 0; j < N; ++j) dx[j] = of(j).of_power(of(j).power(x[j]), a[j], careful);
  if (kind == TargetKind::kSoft && careful) {
#pragma unroll
    for (int j = 0; j < N; ++j) dx[j] = of(j).from_logit(x[j], a[j]);
  }
}

// What the forward left for a position.
template <class A>
XENT_DEVICE Found<A> saved(const Task& task, int64_t position) {
  const A* const lse = static_cast<const A*>(task.lse);
  const A mass = task.kind == TargetKind::kSoft ? lse[2 * task.positions + position] : A(0);
  return {lse[position], lse[task.positions + position], A(0), mass};
}

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
