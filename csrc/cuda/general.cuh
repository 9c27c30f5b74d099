// A position of a kGeneral task: any form of target, transformed logits, statistics, a shard. Provides what
// position.cuh has for the plain loss, under the same names. Its switches are the same for all threads, so they cost a
// jump and no registers. With p = softmax(x),
//
//   d/dx_c = D (A p_c - a_c) + (hits - hit_c) p_c + hit_c (p_c - 1) + R p_c + E p_c log p_c
//
// The first term is a target's that has every class, the next two are of one that has a few (`hits` is the sum of
// hit_c), R and E are of what is added to the loss: see the head of kernel/online_softmax.h. On a shard, the sums of
// the forward are of the classes here; D, A and the hits of the backward are of all classes.
#pragma once

#include "position.cuh"

namespace xent::gpu {

// Returns true where every class may have a coefficient: the first term.
template <class A>
XENT_DEVICE bool has_coefficients(const Task& task) {
  return is_dense(task.target_kind) || numbers<A>(task).share != A(0);
}

// ---- logits ---------------------------------------------------------------------------------------------------------

// Scales a logit, or a teacher's. At a temperature, it rounds as a division by it does.
template <class A>
XENT_DEVICE A scaled(const Task& task, A x) {
  const A scale = numbers<A>(task).logit_scale, temperature = numbers<A>(task).temperature;
  const A y = rounded_product(x, scale);
  if (temperature == A(1)) return y;
  const A divided = fused(fused(-y, temperature, x), scale, y);
  return abs(y) < A(INFINITY) ? divided : y;
}

// Scales and caps logits. The products are rounded: fused with the subtraction of the maximum, a product would not be
// the number that was found to be the maximum.
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

// Turns an element of a dense target into its class's coefficient.
template <class A>
struct DenseTarget {
  A lse_high = 0, lse_low = 0;  // of a teacher

  XENT_DEVICE DenseTarget(const Task& task, int64_t position) {
    if (task.target_kind != TargetKind::kTeacher) return;
    lse_high = saved_row<A>(task, saved::kTeacherLse)[position];
    lse_low = saved_row<A>(task, saved::kTeacherLseLost)[position];
  }

  // `element` matters only where the target is dense.
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

// log softmax = (x - origin) / T - rest, for logits x as they were given: the difference hardly rounds, whatever the
// magnitude of the logits.
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

// A thread's part of a teacher's divergence. Its terms need the student's lse, so the logits are read a second time.
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

  // Adds a student's and a teacher's logit, as they were given. Three sums of `sums` are borrowed: spread for the terms
  // of the loss, rest for the change, mass for the teacher's softmax.
  template <class Softmax>
  XENT_DEVICE void add(A x, A z, Softmax& sums) const {
    A of_x, of_z, lost_of_x, lost_of_z, excess, change;
    student.subtract_from(x, of_x, lost_of_x);
    teacher.subtract_from(z, of_z, lost_of_z);
    const A p = exp2_fast(fused(of_x, scale, fused(lost_of_x, scale, -student.rest)) * kLog2E<A>);
    const A q = exp2_fast(fused(of_z, scale, fused(lost_of_z, scale, -teacher.rest)) * kLog2E<A>);
    const A gap = of_z - of_x, lost_of_gap = gap - gap == A(0) ? gap * lost_of_scale : A(0);
    const A lost = fused(lost_of_z - lost_of_x, scale, lost_of_gap) - (teacher.rest - student.rest);
    divergence_terms<A>(q, p, fused(gap, scale, lost), excess, change);
    sums.spread.add(excess);
    sums.rest.add(change);
    sums.mass.add(q);
  }

  template <class Softmax>
  XENT_DEVICE Softmax of_nothing(const Task& task) const {
    Softmax sums = Softmax::of_nothing(task);
    sums.max = max;  // the same for all threads
    return sums;
  }
};

// The k classes of a position and their probabilities. A class may come several times.
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

// In the backward, `mass` is that of probabilities, or a teacher's loss.
template <class A>
struct GeneralResult : Result<A> {
  A label_log_sum_or_entropy = 0;  // with labels besides a teacher, and for statistics
  int64_t argmax = -1;

  template <bool kLong>
  static XENT_DEVICE GeneralResult of(const Task& task, const GeneralSums<A, kLong>& s) {
    GeneralResult result{Result<A>::of(task, s), s.slope != A(0) ? s.label_log_sum() : s.entropy(),
                         int64_t(s.argmax < 0 ? s.argmax - s.kNaN : s.argmax)};
    // All logits of a shard may be -inf while those of others are not: its lse is no NaN.
    if (task.is_shard() && s.max == -A(INFINITY) && s.rest.value() == A(0))
      result.log_sum = result.label_log_sum_or_entropy = A(0);
    return result;
  }
};

// Puts a divergence, of which all threads have added their parts, in its place among the sums of the loss.
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

// Adds the terms of each `step`-th pair from `first` on: pairs are coefficients of their classes.
template <class T, class A, bool kLong>
XENT_DEVICE void add_pairs(const Task& task, int64_t position, const T* logits, int64_t first, int64_t step,
                           GeneralSums<A, kLong>& softmax) {
  const Pairs<A> pairs(task, position);
  for (int64_t j = first; j < task.pairs; j += step) {
    const int64_t label = pairs.label(j);
    if (!task.is_here(label)) continue;
    const A x[1] = {read_logit<Objective::kGeneral, T, A>(task, logits, label)};
    softmax.raise(x[0]);  // the thread that has the class counts it
    softmax.add_terms(
        x, Terms<A, 1>{{numbers<A>(task).keep * class_weight<A>(task, label) * pairs.prob(j)}, {A(0)}, label, 1});
  }
}

// Adds N logits and their coefficients to the sums of a position.
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

// scale * term; zero where the scale is zero, even for an infinite term.
template <class A>
XENT_DEVICE A scaled_loss(A scale, A term) {
  return scale == A(0) ? A(0) : scale * term;
}

// Infinite or NaN where all logits are -inf.
template <class A>
XENT_DEVICE A log_softmax(const Result<A>& result, A x) {
  return (result.max == -A(INFINITY) ? -A(INFINITY) : x - result.max) - result.log_sum;
}

// log p of an index target's class, or the mean of log p under probabilities.
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

// One thread calls it, after finish_loss.
template <class T, class A>
XENT_DEVICE void finish_statistics(const Task& task, int64_t position, int64_t label, const T* logits, A target_logit,
                                   const GeneralResult<A>& result) {
  if (!task.statistics) return;
  const bool counts = is_counted(label);
  saved_row<A>(task, saved::kEntropy)[position] = counts ? result.label_log_sum_or_entropy : A(0);
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
        loss += scaled_loss(A(task.label_scale),
                            numbers<A>(task).temperature * (max - target_logit) + result.label_log_sum_or_entropy);
      }
    }
    loss += z_loss_of(task, max + log_sum);
    if (task.is_shard() && max + log_sum == -A(INFINITY)) loss = mass_here > A(0) ? A(INFINITY) : A(0);
  }
  if (task.target_kind == TargetKind::kProbabilities || task.is_shard()) save(saved::kMass, mass_here);
  if (task.target_kind == TargetKind::kTeacher) {
    save(saved::kMass, of_terms);
    save(saved::kLabelMax, max);
    save(saved::kLabelLogSum, result.label_log_sum_or_entropy);
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
    result.label_log_sum_or_entropy =
        row(task.labels || task.statistics, task.labels ? saved::kLabelLogSum : saved::kEntropy);
    return result;
  }
};

template <class A>
struct Gradient<Objective::kGeneral, A> {
  A max, log_sum;
  A slope, reference, to_softmax;                   // softmax = 2^(x slope - reference) to_softmax
  A scale, of_log_prob;                             // grad_output of the loss and of target_log_prob
  A dense, mass, hits, rest;                        // D, A, hits, R
  A entropy;                                        // E
  A to_total;                                       // power * to_total = (D A + hits + R) softmax
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
    if (task.grad_statistics) rest += entropy * result.label_log_sum_or_entropy;

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
    label_log_sum = result.label_log_sum_or_entropy;
    to_labels = labels * ToSoftmax<A>::of(A(0), label_log_sum).factor;
  }

  // hit_c of a class that an index target, or a pair of probability one, hits.
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

  // The gradient of N logits, one of which may be the target's or a label's.
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

  // The gradient of one class, exact for any softmax: `hit` is its own part of the hits, `others` the rest. `is_label`:
  // it is the label besides a teacher.
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

  // Writes the gradient of a dense target's class c.
  XENT_DEVICE void write_target(const Task& task, int64_t offset, int64_t c, A x, A a, A log_a) const {
    const A gap = (max - x) + log_sum;
    if (task.target_kind == TargetKind::kProbabilities) return write_probability_gradient(task, offset, c, dense * gap);
    write_element(task.grad_target, offset + c * task.grad_target.class_stride,
                  dense * numbers<A>(task).logit_scale * teacher_gradient(a, gap + log_a, teacher_loss));
  }

  // The gradient of N logits; also writes that of a dense target, if it is asked for.
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

  // Writes the gradient of each `step`-th pair's probability from `first` on, and of its class, where `out` has the
  // gradient of all classes but for the pairs. A class that comes more than once is written where it comes first.
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
      A own = 0, others = 0;  // exactly zero where there are no others, unlike hits - own
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

// Writes a target's gradient at a position that does not count.
XENT_DEVICE void write_target_zeros(const Task& task, int64_t position, int64_t first, int64_t step) {
  if (!task.grad_target) return;
  const int64_t offset = offset_of(task, task.grad_target, position);
  const int64_t count = task.target_kind == TargetKind::kPairs ? task.pairs : task.classes;
  for (int64_t j = first; j < count; j += step) {
    write_element(task.grad_target, offset + j * task.grad_target.class_stride, 0.f);
  }
}

}  // namespace xent::gpu
