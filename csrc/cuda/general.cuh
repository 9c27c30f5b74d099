// A position of a kGeneral task: any form of target, transformed logits, statistics. What position.cuh has for the
// plain loss, under the same names. Its switches are the same for all threads, so they cost a jump and no registers.
//
//   d/dx_c = D (A p_c - a_c) + (hits - hit_c) p_c + hit_c (p_c - 1) + R p_c + E p_c log p_c
//
// with p = softmax(x), what the target has of every class in the first term, what it has of a few in the next two, and
// what is added to the loss in the others. See the head of online_softmax.h. Of a shard the sums of the forward are of
// what is here; D, A and the hits of the backward are of all classes.
#pragma once

#include "position.cuh"

namespace xent::gpu {

// Whether any class may have a coefficient, but for what hits a few.
template <class A>
XENT_DEVICE bool has_coefficients(const Task& task) {
  return is_dense(task.target_kind) || numbers<A>(task).share != A(0);
}

// ---- logits ---------------------------------------------------------------------------------------------------------

// A logit, or a teacher's, scaled; at a temperature with the rounding of a division by it.
template <class A>
XENT_DEVICE A scaled(const Task& task, A x) {
  const A scale = numbers<A>(task).logit_scale, temperature = numbers<A>(task).temperature;
  const A y = rounded_product(x, scale);
  if (temperature == A(1)) return y;
  const A divided = fused(fused(-y, temperature, x), scale, y);
  return abs(y) < A(INFINITY) ? divided : y;
}

// Logits as the loss is of them. Rounded, wherever they are read again: a product that were fused with the subtraction
// of the maximum would not be the maximum's.
template <Objective objective, int N, class A>
XENT_DEVICE void transform(const Task& task, A (&x)[N]) {
  if constexpr (objective == Objective::kGeneral) {
#pragma unroll
    for (int j = 0; j < N; ++j) x[j] = scaled(task, x[j]);
    if (numbers<A>(task).softcap == A(0)) return;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      x[j] = rounded_product(numbers<A>(task).softcap, tanh_of(x[j] * numbers<A>(task).inverse_softcap));
    }
  }
}

template <Objective objective, class T, class A = Arithmetic<T>>
XENT_DEVICE A read_logit(const Task& task, const T* logits, int64_t c) {
  A x[1] = {widen<A>(logits[c * task.logits.class_stride])};
  transform<objective>(task, x);
  return x[0];
}

// d x / d logit.
template <class A>
XENT_DEVICE A slope_of(const Task& task, A x) {
  if (numbers<A>(task).softcap == A(0)) return numbers<A>(task).logit_scale;
  const A tanh = x * numbers<A>(task).inverse_softcap;
  return numbers<A>(task).logit_scale * (A(1) - tanh * tanh);
}

// ---- coefficients ---------------------------------------------------------------------------------------------------

// What turns an element of a dense target into a class's coefficient.
template <class A>
struct DenseTarget {
  A lse_high = 0, lse_low = 0;  // of a teacher

  XENT_DEVICE DenseTarget(const Task& task, int64_t position) {
    if (task.target_kind != TargetKind::kTeacher) return;
    lse_high = saved_row<A>(task, saved::kTeacherLse)[position];
    lse_low = saved_row<A>(task, saved::kTeacherLseLost)[position];
  }

  // `element` is the target's, where it is dense.
  XENT_DEVICE void set(const Task& task, int64_t c, A element, A& a, A& log_a) const {
    log_a = A(0);
    if (task.target_kind == TargetKind::kTeacher) {
      const A log_q = (scaled(task, element) - lse_high) - lse_low;
      a = exp2_fast(log_q * kLog2E<A>);
      if (task.kl) log_a = log_q;
    } else {
      a = class_weight<A>(task, c) * (task.target_kind == TargetKind::kProbabilities
                                          ? numbers<A>(task).keep * element + numbers<A>(task).share
                                          : numbers<A>(task).share);
    }
  }
};

// log softmax = (x - origin) / T - rest, for logits x as they were given: the difference has no rounding to speak of,
// of whatever magnitude the logits are.
template <class A>
struct Origin {
  A origin, rest;

  XENT_DEVICE Origin(const Task& task, A max, A log_sum)
      : origin(rounded_product(max, numbers<A>(task).temperature)),
        rest((max - rounded_product(origin, numbers<A>(task).logit_scale)) + log_sum) {}

  XENT_DEVICE void subtract_from(A x, A& difference, A& lost) const {
    two_sum(x, -origin, difference, lost);
    if (lost != lost) lost = A(0);  // an infinite logit has no lost part
  }
};

// A thread's part of a teacher's divergence. Its terms need the student's lse, and so a second look at the logits.
template <class A>
struct Divergence {
  A max;  // of the student
  Origin<A> student, teacher;
  A scale, lost_of_scale;  // 1 / T

  XENT_DEVICE Divergence(const Task& task, const DenseTarget<A>& dense, A max, A log_sum)
      : max(max),
        student(task, max, log_sum),
        teacher(task, dense.lse_high, dense.lse_low),
        scale(numbers<A>(task).logit_scale),
        lost_of_scale(fused(-scale, numbers<A>(task).temperature, A(1)) * scale) {}

  // Logits as they were given. The sums of `statistics` are used for others: spread for what is added up to the loss,
  // rest for the change, mass for the teacher's softmax.
  template <class Softmax>
  XENT_DEVICE void add(A x, A z, Softmax& softmax) const {
    A of_x, of_z, lost_of_x, lost_of_z, excess, change;
    student.subtract_from(x, of_x, lost_of_x);
    teacher.subtract_from(z, of_z, lost_of_z);
    const A p = exp2_fast(fused(of_x, scale, fused(lost_of_x, scale, -student.rest)) * kLog2E<A>);
    const A q = exp2_fast(fused(of_z, scale, fused(lost_of_z, scale, -teacher.rest)) * kLog2E<A>);
    const A gap = of_z - of_x, lost_of_gap = gap - gap == A(0) ? gap * lost_of_scale : A(0);
    const A lost = fused(lost_of_z - lost_of_x, scale, lost_of_gap) - (teacher.rest - student.rest);
    divergence_terms<A>(q, p, fused(gap, scale, lost), excess, change);
    softmax.spread.add(excess);
    softmax.rest.add(change);
    softmax.mass.add(q);
  }

  template <class Softmax>
  XENT_DEVICE Softmax of_nothing(const Task& task) const {
    Softmax softmax = Softmax::of_nothing(task);
    softmax.max = max;  // the same for all threads
    return softmax;
  }
};

// The k classes of a position and their probabilities. A class may be there several times.
template <class A>
struct Pairs {
  const Task& task;
  int64_t classes, probs;  // offsets

  XENT_DEVICE Pairs(const Task& task, int64_t position)
      : task(task), classes(offset_of(task, task.target, position)), probs(offset_of(task, task.probs, position)) {}

  XENT_DEVICE int64_t label(int64_t j) const {
    return checked_class<Objective::kGeneral>(task, task.target, classes + j * task.target.class_stride);
  }
  XENT_DEVICE A prob(int64_t j) const { return read_number<A>(task.probs, probs + j * task.probs.class_stride); }
};

// ---- the loss -------------------------------------------------------------------------------------------------------

// And the entropy, or, where there are labels besides a teacher, their log_sum. In the backward the mass of
// probabilities, or a teacher's loss.
template <class A>
struct GeneralResult : Result<A> {
  A second = 0;
  int64_t argmax = -1;

  template <bool kLong>
  static XENT_DEVICE GeneralResult of(const Task& task, const GeneralSums<A, kLong>& s) {
    GeneralResult result{Result<A>::of(task, s), s.slope != A(0) ? s.label_log_sum() : s.entropy(),
                         int64_t(s.argmax < 0 ? s.argmax - s.kNaN : s.argmax)};
    // A shard may be of nothing but -inf, as long as others are not: its lse is no NaN.
    if (task.is_shard() && s.max == -A(INFINITY) && s.rest.value() == A(0)) result.log_sum = result.second = A(0);
    return result;
  }
};

// Puts a divergence in its place among the sums that the loss is made of, when all threads have added their parts.
template <class A, class Softmax>
XENT_DEVICE void set_divergence(GeneralResult<A>& result, const Softmax& sums) {
  result.spread = divergence_of<A>(sums.spread.value(), sums.rest.value(), sums.mass.value());
  result.mass = A(0);
}

template <Objective objective, class A>
using ResultOf = std::conditional_t<objective == Objective::kGeneral, GeneralResult<A>, Result<A>>;
template <Objective objective, class A, bool kLong>
using SoftmaxOf = std::conditional_t<objective == Objective::kGeneral, GeneralSums<A, kLong>,
                                     OnlineSoftmax<A, objective != Objective::kIndex, kLong>>;
template <Objective objective, class A, int N>
using TermsOf = std::conditional_t<objective == Objective::kGeneral, Terms<A, N>, A[N]>;

// Pairs are coefficients of their classes: adds those of each `step`-th pair from `first` on.
template <class T, class A, bool kLong>
XENT_DEVICE void add_pairs(const Task& task, int64_t position, const T* logits, int64_t first, int64_t step,
                           GeneralSums<A, kLong>& softmax) {
  const Pairs<A> pairs(task, position);
  for (int64_t j = first; j < task.pairs; j += step) {
    const int64_t label = pairs.label(j);
    if (!task.is_here(label)) continue;
    const A x[1] = {read_logit<Objective::kGeneral, T, A>(task, logits, label)};
    softmax.raise(x[0]);  // it is counted by whoever has the class
    softmax.add_terms(
        x, Terms<A, 1>{{numbers<A>(task).keep * class_weight<A>(task, label) * pairs.prob(j)}, {A(0)}, label, 1});
  }
}

// N logits and what they mean, for the sums of a position.
template <int N, class A, class Softmax>
XENT_DEVICE void add_logits(const Task&, const A (&x)[N], const A (&a)[N], Softmax& softmax) {
  softmax.add(x, a);
}
template <int N, class A, bool kLong>
XENT_DEVICE void add_logits(const Task& task, const A (&x)[N], const Terms<A, N>& terms,
                            GeneralSums<A, kLong>& softmax) {
  softmax.add(task, x, terms);
  if (has_coefficients<A>(task)) softmax.add_terms(x, terms);
}

// scale * term, and zero where the scale is, whatever the term.
template <class A>
XENT_DEVICE A scaled_loss(A scale, A term) {
  return scale == A(0) ? A(0) : scale * term;
}

// Where all logits are -inf infinite, or NaN.
template <class A>
XENT_DEVICE A log_softmax(const Result<A>& result, A x) {
  return (result.max == -A(INFINITY) ? -A(INFINITY) : x - result.max) - result.log_sum;
}

// log p of an index target's class; of probabilities the mean of log p.
template <class T, class A>
XENT_DEVICE A target_log_prob(const Task& task, int64_t position, int64_t label, const T* logits, A target_logit,
                              const Result<A>& result) {
  if (task.target_kind == TargetKind::kIndices) return task.is_here(label) ? log_softmax(result, target_logit) : A(0);
  if (task.target_kind == TargetKind::kProbabilities) {
    if (result.max == -A(INFINITY)) return scaled_loss(result.mass, log_softmax(result, result.max));
    return -(result.spread + result.mass * result.log_sum);
  }
  A sum = 0;
  const Pairs<A> pairs(task, position);
  for (int64_t j = 0; j < task.pairs; ++j) {
    const int64_t c = pairs.label(j);
    if (!task.is_here(c)) continue;
    sum += scaled_loss(pairs.prob(j), log_softmax(result, read_logit<Objective::kGeneral, T, A>(task, logits, c)));
  }
  return sum;
}

// By one thread, after finish_loss.
template <class T, class A>
XENT_DEVICE void finish_statistics(const Task& task, int64_t position, int64_t label, const T* logits, A target_logit,
                                   const GeneralResult<A>& result) {
  if (!task.statistics) return;
  const bool counts = is_counted(label);
  saved_row<A>(task, saved::kEntropy)[position] = counts ? result.second : A(0);
  saved_row<A>(task, saved::kTargetLogProb)[position] =
      counts ? target_log_prob(task, position, label, logits, target_logit, result) : A(0);
  using Class = typename GeneralSums<A, false>::Class;
  reinterpret_cast<Class*>(saved_row<A>(task, saved::kArgmax))[position] = Class(counts ? result.argmax : -1);
}

template <Objective objective, class A>
XENT_DEVICE void finish_loss(const Task& task, const Destination<A>& to, int64_t label, A target_logit,
                             const GeneralResult<A>& result, Sums& sums) {
  const auto [max, log_sum, spread, mass] = static_cast<const Result<A>&>(result);
  const bool counts = is_counted(label);
  const auto save = [&](int row, A x) { saved_row<A>(task, row)[to.position] = counts ? x : A(0); };
  save(saved::kLse, max);
  save(saved::kLseLost, log_sum);
  if (task.target_kind == TargetKind::kNone) return;

  const A of_terms = index_loss(A(0), A(1), A(0), spread, mass, log_sum);
  A loss = 0, weight = 0, mass_here = mass;
  if (label == kBad) {
    loss = A(NAN);
    report_bad_target<objective>(task, to.position, to.target_offset);
  } else if (counts) {
    weight = A(1);
    loss = of_terms;
    if (task.target_kind == TargetKind::kIndices) {
      weight = class_weight<A>(task, label);
      const A hit = task.is_here(label) ? numbers<A>(task).keep * weight : A(0);
      loss += index_loss(hit, A(0), max - target_logit, A(0), A(0), log_sum);
      mass_here += hit;
    } else if (task.target_kind == TargetKind::kTeacher) {
      loss = scaled_loss(A(task.teacher_scale), of_terms);
      if (label >= 0) {
        loss += scaled_loss(A(task.label_scale), numbers<A>(task).temperature * (max - target_logit) + result.second);
      }
    }
    loss += z_loss_of(task, max + log_sum);
    if (task.is_shard() && max + log_sum == -A(INFINITY)) loss = mass_here > A(0) ? A(INFINITY) : A(0);
  }
  if (task.target_kind == TargetKind::kProbabilities || task.is_shard()) save(saved::kMass, mass_here);
  if (task.target_kind == TargetKind::kTeacher) {
    save(saved::kMass, of_terms);
    save(saved::kLabelMax, max);
    save(saved::kLabelLogSum, result.second);
  }
  to.add(task, loss, weight, sums);
}

// ---- the gradient ---------------------------------------------------------------------------------------------------

template <>
struct SavedResult<Objective::kGeneral> {
  template <class A>
  static XENT_DEVICE GeneralResult<A> at(const Task& task, int64_t position) {
    const auto row = [&](bool there, int row) { return there ? saved_row<A>(task, row)[position] : A(0); };
    GeneralResult<A> result{SavedResult<Objective::kIndex>::at<A>(task, position)};
    result.mass = row(is_dense(task.target_kind), saved::kMass);
    result.second = row(task.labels || task.statistics, task.labels ? saved::kLabelLogSum : saved::kEntropy);
    return result;
  }
};

template <class A>
struct Gradient<Objective::kGeneral, A> {
  A max, log_sum;
  A slope, reference, to_softmax;                   // as for every kind: softmax = 2^(x slope - reference) to_softmax
  A scale, of_log_prob;                             // of the loss and of target_log_prob
  A dense, mass, hits, rest;                        // D, A, the sum of what is hit, and R
  A entropy;                                        // E
  A to_total;                                       // times a power: what multiplies the softmax
  A labels, label_slope, label_log_sum, to_labels;  // softmax at temperature 1 = 2^((x - max) label_slope - ...)
  A teacher_loss;

  // All threads of a warp call it, for the same position.
  XENT_DEVICE void set(const Task& task, int64_t position, int64_t label, const GeneralResult<A>& result,
                       A grad_output) {
    const auto softmax = ToSoftmax<A>::of(result.max, result.log_sum);
    max = result.max;
    log_sum = result.log_sum;
    slope = softmax.slope;
    reference = softmax.reference;
    to_softmax = softmax.factor;
    const auto of_statistic = [&](int which) {
      return task.grad_statistics ? static_cast<const A*>(task.grad_statistics)[which * task.positions + position]
                                  : A(0);
    };
    scale = grad_output;
    of_log_prob = of_statistic(kGradTargetLogProb);
    entropy = -of_statistic(kGradEntropy);
    rest = scale * (numbers<A>(task).z_loss + numbers<A>(task).z_loss) * (max + log_sum) + of_statistic(kGradLse);
    if (task.grad_statistics) rest += entropy * result.second;

    dense = scale;
    mass = smoothed_total<A>(task);
    hits = A(0);
    teacher_loss = result.mass;
    switch (task.target_kind) {
      case TargetKind::kIndices: hits = hit_of(task, label); break;
      case TargetKind::kPairs: hits = hits_of_pairs(task, position); break;
      case TargetKind::kProbabilities:
        dense -= of_log_prob;
        mass = result.mass;
        break;
      default: dense *= A(task.teacher_scale); mass = A(1);
    }
    to_total = (hits + fused(dense, mass, rest)) * to_softmax;

    labels = task.labels ? scale * A(task.label_scale * task.temperature) : A(0);
    label_slope = numbers<A>(task).temperature * kLog2E<A>;
    label_log_sum = result.second;
    to_labels = labels * ToSoftmax<A>::of(A(0), label_log_sum).factor;
  }

  // What a class gains where a target of one hits it.
  XENT_DEVICE A hit_of(const Task& task, int64_t c) const {
    return scale * (numbers<A>(task).keep * class_weight<A>(task, c)) - of_log_prob;
  }

  XENT_DEVICE A hits_of_pairs(const Task& task, int64_t position) const {
    const Pairs<A> pairs(task, position);
    A sum = 0;
    for (int64_t j = int(threadIdx.x) % kWarp; j < task.pairs; j += kWarp) {
      const int64_t label = pairs.label(j);
      if (label >= 0) sum += hit_of(task, label) * pairs.prob(j);
    }
    return lanes_sum(sum, kWarp);
  }

  // Of N logits, one of which may be an index target's or a label's own.
  template <int N>
  XENT_DEVICE void of_logits(const Task& task, int64_t label, const A (&x)[N], const Terms<A, N>& terms,
                             A (&dx)[N]) const {
    A p[N];
    bool careful[N], any_careful = false;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const A power = exp2_fast(fused(x[j], slope, -reference));
      p[j] = power * to_softmax;
      dx[j] = fused(power, to_total, -(dense * terms.a[j]));
      careful[j] = terms.class_of(j) == label || (p[j] > A(0.5) && is_dense(task.target_kind));
      any_careful |= careful[j];
    }
    if (entropy != A(0)) {
#pragma unroll
      for (int j = 0; j < N; ++j) dx[j] += entropy_gradient(entropy, p[j], (x[j] - max) - log_sum);
    }
    if (labels != A(0)) {
#pragma unroll
      for (int j = 0; j < N; ++j) dx[j] += to_labels * exp2_fast((x[j] - max) * label_slope);
    }
#pragma unroll
    for (int j = 0; j < N; ++j) dx[j] *= slope_of(task, x[j]);
    if (!any_careful) return;
#pragma unroll 1
    for (int k = 0; k < N; ++k) {
      if (!pick(careful, k)) continue;
      const bool own = terms.class_of(k) == label;
      const A exact = of_class(task, pick(x, k), pick(terms.a, k), own ? hits : A(0), own ? A(0) : hits, own);
#pragma unroll
      for (int j = 0; j < N; ++j) dx[j] = j == k ? exact : dx[j];
    }
  }

  // Of one class wherever its softmax is: of all that is hit it has `hit`, and others the rest. `is_label`: of labels
  // besides a teacher.
  XENT_DEVICE A of_class(const Task& task, A x, A a, A hit, A others, bool is_label) const {
    const A log_p = (x - max) - log_sum;
    A dx = target_gradient(hit, others + rest, A(0), log_p) + dense * soft_gradient(mass, log_p, a);
    if (entropy != A(0)) dx += entropy_gradient(entropy, exp2_fast(log_p * kLog2E<A>), log_p);
    if (labels != A(0)) {
      A p, p_minus_one;
      exp_and_expm1((x - max) * numbers<A>(task).temperature - label_log_sum, p, p_minus_one);
      dx += labels * (is_label ? p_minus_one : p);
    }
    return dx * slope_of(task, x);
  }

  // Of class c of a dense target, which is to have a gradient.
  XENT_DEVICE void write_target(const Task& task, int64_t offset, int64_t c, A x, A a, A log_a) const {
    const A gap = (max - x) + log_sum;
    if (task.target_kind == TargetKind::kProbabilities) return write_probability_gradient(task, offset, c, dense * gap);
    write_element(task.grad_target, offset + c * task.grad_target.class_stride,
                  dense * numbers<A>(task).logit_scale * teacher_gradient(a, gap + log_a, teacher_loss));
  }

  // The same; and of a target of every class, which is written.
  template <int N>
  XENT_DEVICE void of_classes(const Task& task, int64_t grad_target, int64_t label, const A (&x)[N],
                              const Terms<A, N>& terms, A (&dx)[N]) const {
    if (task.grad_target && is_dense(task.target_kind)) {
#pragma unroll 1
      for (int j = 0; j < N; ++j) {
        write_target(task, grad_target, terms.class_of(j), pick(x, j), pick(terms.a, j), pick(terms.log, j));
      }
      if (!task.grad_logits) return;
    }
    of_logits(task, label, x, terms, dx);
  }

  // Of each `step`-th pair from `first` on: its probability's, and its class's, where `out` is the gradient of all
  // classes but for the pairs. A class that comes more than once is written where it comes first.
  template <class T>
  XENT_DEVICE void write_pairs(const Task& task, int64_t position, const T* logits, T* out, int64_t first,
                               int64_t step) const {
    const Pairs<A> pairs(task, position);
    const int64_t grad_probs = task.grad_target ? offset_of(task, task.grad_target, position) : 0;
    for (int64_t j = first; j < task.pairs; j += step) {
      const int64_t c = pairs.label(j);
      const bool here = task.is_here(c);
      const A x = here ? read_logit<Objective::kGeneral, T, A>(task, logits, c) : A(0);
      if (task.grad_target) {
        write_element(task.grad_target, grad_probs + j * task.grad_target.class_stride,
                      here ? hit_of(task, c) * ((max - x) + log_sum) : A(0));
      }
      if (!out || !here) continue;
      A own = 0, others = 0;  // where there are no others exactly zero, which hits - own would not be
      bool is_first = true;
      for (int64_t i = 0; i < task.pairs; ++i) {
        const int64_t label = pairs.label(i);
        if (label < 0) continue;
        is_first &= label != c || i >= j;
        const A hit = hit_of(task, label) * pairs.prob(i);
        (label == c ? own : others) += hit;
      }
      if (!is_first) continue;
      const A a = class_weight<A>(task, c) * numbers<A>(task).share;
      out[c * task.grad_logits.class_stride] = narrow<T>(of_class(task, x, a, own, others, false));
    }
  }
};

// The gradient of a target at a position that does not count.
XENT_DEVICE void write_target_zeros(const Task& task, int64_t position, int64_t first, int64_t step) {
  if (!task.grad_target) return;
  const int64_t offset = offset_of(task, task.grad_target, position);
  const int64_t count = task.target_kind == TargetKind::kPairs ? task.pairs : task.classes;
  for (int64_t j = first; j < count; j += step) {
    write_element(task.grad_target, offset + j * task.grad_target.class_stride, 0.f);
  }
}

}  // namespace xent::gpu
