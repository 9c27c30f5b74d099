// A position as every kernel sees it: where its elements are, its target, the loss it adds and the constants of its
// gradient.
#pragma once

#include "online_softmax.cuh"
#include "task.h"

namespace xent::gpu {

template <class A>
XENT_DEVICE const Task::Numbers<A>& numbers(const Task& task) {
  if constexpr (sizeof(A) == 4) {
    return task.in_float;
  } else {
    return task.in_double;
  }
}

// ---- where ----------------------------------------------------------------------------------------------------------

// The offset of a position, in elements.
XENT_DEVICE int64_t offset_of(const Task& task, const View& view, int64_t position) {
  int64_t offset = 0;
#pragma unroll 1
  for (int d = task.dims - 1; d > 0; --d) {
    const int64_t outer = position / task.size[d];
    offset += (position - outer * task.size[d]) * view.stride[d];
    position = outer;
  }
  return offset + position * view.stride[0];
}

// The offset of the first position of a run along the last dimension.
XENT_DEVICE int64_t offset_of_run(const Task& task, const View& view, int64_t run) {
  int64_t offset = 0;
#pragma unroll 1
  for (int d = task.dims - 2; d > 0; --d) {
    const int64_t outer = run / task.size[d];
    offset += (run - outer * task.size[d]) * view.stride[d];
    run = outer;
  }
  return task.dims > 1 ? offset + run * view.stride[0] : 0;
}

// ---- elements of a type that is known at run time -------------------------------------------------------------------

template <class A>
XENT_DEVICE A read_number(const View& view, int64_t offset) {
  switch (view.type) {
    case ElementType::kFloat16: return A(widen<float>(static_cast<const Float16*>(view.data)[offset]));
    case ElementType::kBFloat16: return A(widen<float>(static_cast<const BFloat16*>(view.data)[offset]));
    case ElementType::kFloat32: return A(static_cast<const float*>(view.data)[offset]);
    default: return A(static_cast<const double*>(view.data)[offset]);
  }
}

XENT_DEVICE int64_t read_class(const View& view, int64_t offset) {
  switch (view.type) {
    case ElementType::kInt8: return static_cast<const int8_t*>(view.data)[offset];
    case ElementType::kUInt8: return static_cast<const uint8_t*>(view.data)[offset];
    case ElementType::kInt16: return static_cast<const int16_t*>(view.data)[offset];
    case ElementType::kInt32: return static_cast<const int32_t*>(view.data)[offset];
    default: return static_cast<const int64_t*>(view.data)[offset];
  }
}

// Reads N classes, whose loads are under way at the same time.
template <int N>
XENT_DEVICE void read_classes(const View& view, const int64_t (&offsets)[N], int64_t (&classes)[N]) {
  const auto read = [&](const auto* data) {
#pragma unroll
    for (int j = 0; j < N; ++j) classes[j] = data[offsets[j]];
  };
  switch (view.type) {
    case ElementType::kInt8: return read(static_cast<const int8_t*>(view.data));
    case ElementType::kUInt8: return read(static_cast<const uint8_t*>(view.data));
    case ElementType::kInt16: return read(static_cast<const int16_t*>(view.data));
    case ElementType::kInt32: return read(static_cast<const int32_t*>(view.data));
    default: return read(static_cast<const int64_t*>(view.data));
  }
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

// ---- the target -----------------------------------------------------------------------------------------------------

// A *label* is a class, or one of these: ignored; out of bounds; or a target that counts without being one class.
// Kernels hold it in an int where they have fewer than 2^31 classes.
constexpr int kManyClasses = -3;

// Turns a class index as it is read into a label; on a shard, classes count from its first.
template <Objective objective>
XENT_DEVICE int64_t checked_class(const Task& task, int64_t target) {
  if (target == task.ignore_index) return kIgnored;
  if constexpr (objective == Objective::kGeneral) {
    return target < 0 || target >= task.all_classes() ? kBad : task.counted_from_here(target);
  }
  return target < 0 || target >= task.classes ? kBad : target;
}

template <Objective objective>
XENT_DEVICE int64_t checked_class(const Task& task, const View& view, int64_t offset) {
  return checked_class<objective>(task, read_class(view, offset));
}

// The class indices that say which positions count: the labels besides a teacher, or the target itself.
template <Objective objective>
XENT_DEVICE const View& labels_of(const Task& task) {
  return objective == Objective::kGeneral && task.labels ? task.labels : task.target;
}

// The label of k pairs: kManyClasses where one counts, kIgnored where none does, kBad where one is. `kLanes` threads
// ask for one position together: 1, or a warp.
template <int kLanes>
XENT_DEVICE int64_t label_of_pairs(const Task& task, int64_t offset) {
  bool any = false, bad = false;
  for (int64_t j = kLanes == 1 ? 0 : int(threadIdx.x) % kLanes; j < task.pairs; j += kLanes) {
    const int64_t label = checked_class<Objective::kGeneral>(task, task.target, offset + j * task.target.class_stride);
    any |= label >= 0;
    bad |= label == kBad;
  }
  if constexpr (kLanes > 1) {
    static_assert(kLanes == kWarp);
    any = __any_sync(0xffffffffu, any);
    bad = __any_sync(0xffffffffu, bad);
  }
  return bad ? kBad : any ? kManyClasses : kIgnored;
}

// The label of a position, which is at `offset` in labels_of(task).
template <Objective objective, int kLanes = 1>
XENT_DEVICE int64_t read_label(const Task& task, int64_t offset) {
  if constexpr (objective == Objective::kProbabilities) return kManyClasses;
  if constexpr (objective == Objective::kGeneral) {
    if (task.target_kind == TargetKind::kPairs) return label_of_pairs<kLanes>(task, offset);
    if (task.target_kind != TargetKind::kIndices && !task.labels) return kManyClasses;
  }
  return checked_class<objective>(task, labels_of<objective>(task), offset);
}

// The labels of several positions, whose loads are under way at the same time.
template <Objective objective, int N>
XENT_DEVICE void read_labels(const Task& task, const int64_t (&offsets)[N], int64_t (&labels)[N]) {
  const bool one_class = objective != Objective::kProbabilities &&
                         (objective != Objective::kGeneral || task.labels || task.target_kind == TargetKind::kIndices);
  if (one_class) read_classes(labels_of<objective>(task), offsets, labels);
#pragma unroll
  for (int j = 0; j < N; ++j) {
    labels[j] = one_class ? checked_class<objective>(task, labels[j]) : read_label<objective>(task, offsets[j]);
  }
}

XENT_DEVICE bool is_counted(int64_t label) { return label >= 0 || label == kManyClasses; }

// Reports to the host, unless that still has to take an earlier report. The position is at `offset` in labels_of(task).
template <Objective objective>
XENT_DEVICE void report_bad_target(const Task& task, int64_t position, int64_t offset) {
  volatile BadTarget* const report = task.bad_target;
  const int32_t earlier = report->taken;
  if (atomicCAS(task.bad_targets, earlier, earlier + 1) != earlier) return;
  if constexpr (objective == Objective::kGeneral) {
    for (int64_t j = 1; j < task.pairs && checked_class<objective>(task, task.target, offset) != kBad; ++j) {
      offset += task.target.class_stride;
    }
  }
  report->value = read_class(labels_of<objective>(task), offset);
  report->position = position;
  report->classes = task.all_classes();
  __threadfence_system();
  report->reported = earlier + 1;
}

template <class A>
XENT_DEVICE A class_weight(const Task& task, int64_t c) {
  return task.weight ? static_cast<const A*>(task.weight)[c] : A(1);
}

// A class's coefficient in the loss, without what an index target adds to its own class.
template <Objective objective, class A>
XENT_DEVICE A coefficient(const Task& task, int64_t c, A probability) {
  if constexpr (objective == Objective::kIndex) return A(0);
  if constexpr (objective == Objective::kSmoothedIndex) return class_weight<A>(task, c) * numbers<A>(task).share;
  return class_weight<A>(task, c) * (numbers<A>(task).keep * probability + numbers<A>(task).share);
}

// e / C times the sum of the class weights.
template <class A>
XENT_DEVICE A smoothed_total(const Task& task) {
  return task.smoothed_total_on_device ? A(*task.smoothed_total_on_device) : numbers<A>(task).smoothed_total;
}

// Returns true where all coefficients are equal, without what an index target adds to its own class.
template <Objective objective>
XENT_DEVICE bool is_uniform(const Task& task) {
  return objective == Objective::kIndex || (objective == Objective::kSmoothedIndex && task.weight == nullptr);
}

// ---- the loss -------------------------------------------------------------------------------------------------------

// The sample weight at an offset; of a position.
template <class A>
XENT_DEVICE A read_sample_weight(const Task& task, int64_t offset) {
  return task.sample_weight ? read_number<A>(task.sample_weight, offset) : A(1);
}
template <class A>
XENT_DEVICE A sample_weight_of(const Task& task, int64_t position) {
  return task.sample_weight ? read_number<A>(task.sample_weight, offset_of(task, task.sample_weight, position)) : A(1);
}

// The result of the forward for a position. The names are those of OnlineSoftmax.
template <class A>
struct Result {
  A max, log_sum, spread, mass;

  template <class Softmax>
  static XENT_DEVICE Result of(const Task&, const Softmax& softmax) {
    return {softmax.max, softmax.log_sum(), softmax.spread.value(), softmax.mass.value()};
  }
};

template <class A>
XENT_DEVICE A z_loss_of(const Task& task, A lse) {
  return numbers<A>(task).z_loss * lse * lse;
}

template <class A>
XENT_DEVICE A* saved_row(const Task& task, int row) {
  return static_cast<A*>(task.lse) + row * task.positions;
}

// Where a position's results go, and their factor.
template <class A>
struct Destination {
  int64_t position, target_offset, loss_offset;  // offsets in labels_of(task) and in the losses
  A sample_weight;

  static XENT_DEVICE Destination of(const Task& task, int64_t position, int64_t target_offset) {
    return {position, target_offset, offset_of(task, task.loss, position), sample_weight_of<A>(task, position)};
  }

  // `weight` is the position's part of the mean's denominator, before its sample weight.
  XENT_DEVICE void add(const Task& task, A loss, A weight, Sums& sums) const {
    if (task.loss) {
      write_element(task.loss, loss_offset, loss * sample_weight);
    } else {
      sums.loss += double(loss * sample_weight);
      if (task.counted == nullptr) sums.weight += double(weight * sample_weight);
    }
  }
};

// Adds a position to its block's sums, and saves what the backward reads. One thread calls it.
template <Objective objective, class A>
XENT_DEVICE void finish_loss(const Task& task, const Destination<A>& to, int64_t label, A target_logit,
                             const Result<A>& result, Sums& sums) {
  const auto [max, log_sum, spread, mass] = result;
  A loss = 0, weight = 0, lse_high = 0, lse_low = 0;
  if (label == kBad) {
    loss = A(NAN);
    report_bad_target<objective>(task, to.position, to.target_offset);
  } else if (label != kIgnored) {
    lse_high = max;
    lse_low = log_sum;
    if constexpr (objective == Objective::kProbabilities) {
      weight = A(1);
      loss = index_loss(A(0), A(1), A(0), spread, mass, log_sum);
    } else {
      weight = class_weight<A>(task, label);
      const A hit = numbers<A>(task).keep * weight;
      loss = index_loss(hit, A(objective == Objective::kIndex ? 0 : 1), max - target_logit, spread, mass, log_sum);
    }
    loss += z_loss_of(task, max + log_sum);
  }
  if (task.lse) {
    saved_row<A>(task, saved::kLse)[to.position] = lse_high;
    saved_row<A>(task, saved::kLseLost)[to.position] = lse_low;
    if constexpr (objective == Objective::kProbabilities) saved_row<A>(task, saved::kMass)[to.position] = mass;
  }
  to.add(task, loss, weight, sums);
}

// ---- the gradient ---------------------------------------------------------------------------------------------------

// softmax = 2^(x slope - reference) factor.
template <class A>
struct ToSoftmax {
  A slope, reference, factor;

  static XENT_DEVICE ToSoftmax of(A max, A log_sum) {
    const auto known = KnownMaximum<A>::of(max);
    // factor = 2^(reference - lse log2(e)), with what rounding lost of the exponent.
    const A low = rounded_product(log_sum, kLog2E<A>), low_lost = fused(log_sum, kLog2E<A>, -low);
    A exponent, lost;
    two_sum(low, known.lost(), exponent, lost);
    return {known.slope, known.reference, exp2_fast(-exponent) * exp2_fast(-(lost + low_lost))};
  }
};

// The gradient g (A softmax - a) of a position that counts, as a function of the logit and its coefficient. The powers
// of two are KnownMaximum's, so a forward that has them at hand makes the same bits as a backward.
template <Objective objective, class A>
struct Gradient {
  A max, log_sum, total, scale;  // total: A, and what z_loss adds; scale: g
  A slope, reference;            // 2^(x slope - reference)
  A to_softmax;                  // power * to_softmax = softmax
  A to_total, to_scaled;         // power * to_total = A softmax, power * to_scaled = g A softmax
  A hit, rest, smoothed;         // of an index target's own class: total = hit + rest, a = hit + smoothed

  XENT_DEVICE void set(const Task& task, int64_t, int64_t label, const Result<A>& result, A grad_output) {
    const auto softmax = ToSoftmax<A>::of(result.max, result.log_sum);
    max = result.max;
    log_sum = result.log_sum;
    slope = softmax.slope;
    reference = softmax.reference;
    to_softmax = softmax.factor;
    scale = grad_output;
    hit = smoothed = A(0);
    rest = (numbers<A>(task).z_loss + numbers<A>(task).z_loss) * (max + log_sum);
    if constexpr (objective == Objective::kProbabilities) rest += result.mass;
    if constexpr (objective == Objective::kSmoothedIndex) {
      rest += smoothed_total<A>(task);
      smoothed = coefficient<objective>(task, label, A(0));
    }
    if constexpr (objective != Objective::kProbabilities) hit = numbers<A>(task).keep * class_weight<A>(task, label);
    total = hit + rest;
    to_total = total * to_softmax;
    to_scaled = scale * to_total;
  }

  XENT_DEVICE A power(A x) const { return exp2_fast(fused(x, slope, -reference)); }

  // For a class that is not an index target's own, from its power. Sets `careful` where that cancels.
  XENT_DEVICE A of_power(A power, A a, bool& careful) const {
    if constexpr (objective == Objective::kIndex) return power * to_scaled;
    if constexpr (objective == Objective::kProbabilities) careful |= power * to_softmax > A(0.5);
    return scale * fused(power, to_total, -a);
  }
  XENT_DEVICE A from_logit(A x, A a) const { return scale * soft_gradient(total, (x - max) - log_sum, a); }

  // For an index target's own class.
  XENT_DEVICE A own(A x) const { return scale * target_gradient(hit, rest, smoothed, (x - max) - log_sum); }

  // The gradient of a probability, without (1 - e) w.
  XENT_DEVICE A of_probability(A x) const { return scale * ((max - x) + log_sum); }
};

// Makes the gradients of N logits, as if none were an index target's own class. `of(j)` is the Gradient of the j-th;
// set_coefficients(a) is called where coefficients differ.
template <Objective objective, int N, class A, class Of, class SetCoefficients>
XENT_DEVICE void gradients(const Task& task, const Of& of, const A (&x)[N], const SetCoefficients& set_coefficients,
                           A (&dx)[N]) {
  bool careful = false;
  if (is_uniform<objective>(task)) {
#pragma unroll
    for (int j = 0; j < N; ++j) dx[j] = of(j).of_power(of(j).power(x[j]), numbers<A>(task).share, careful);
    return;
  }
  A a[N];
  set_coefficients(a);
#pragma unroll
  for (int j = 0; j < N; ++j) dx[j] = of(j).of_power(of(j).power(x[j]), a[j], careful);
  if (objective == Objective::kProbabilities && careful) {
#pragma unroll
    for (int j = 0; j < N; ++j) dx[j] = of(j).from_logit(x[j], a[j]);
  }
}

// Reads the result that the forward saved for a position.
template <Objective objective>
struct SavedResult {
  template <class A>
  static XENT_DEVICE Result<A> at(const Task& task, int64_t position) {
    const A mass = objective == Objective::kProbabilities ? saved_row<A>(task, saved::kMass)[position] : A(0);
    return {saved_row<A>(task, saved::kLse)[position], saved_row<A>(task, saved::kLseLost)[position], A(0), mass};
  }
};

template <class A>
XENT_DEVICE A read_grad_output(const Task& task, int64_t offset) {
  return task.grad_output ? read_number<A>(task.grad_output, offset) : A(1);
}
// With the position's sample weight.
template <class A>
XENT_DEVICE A grad_output_of(const Task& task, int64_t position) {
  return read_grad_output<A>(task, offset_of(task, task.grad_output, position)) * sample_weight_of<A>(task, position);
}

// Writes d loss / d q_c.
template <class A>
XENT_DEVICE void write_probability_gradient(const Task& task, int64_t position_offset, int64_t c, A of_probability) {
  write_element(task.grad_target, position_offset + c * task.grad_target.class_stride,
                numbers<A>(task).keep * class_weight<A>(task, c) * of_probability);
}

}  // namespace xent::gpu
