// Any layout and any mixture of types: classes at any stride, double arithmetic for half logits with float64
// probabilities. A warp or a block has a position to itself and reads its classes twice, the second time from a cache
// where they fit one: 2 reads + 1 write. Makes no copies.
#pragma once

#include "rows.cuh"

namespace xent::gpu {

// The coefficients of a position's classes, `step` apart; zero beyond the last.
template <Objective objective, class A>
struct ElementsOfTarget {
  static constexpr bool kGeneral = objective == Objective::kGeneral;
  struct Nothing {
    XENT_DEVICE Nothing(const Task&, int64_t) {}
  };
  const Task& task;
  int64_t offset;
  std::conditional_t<kGeneral, DenseTarget<A>, Nothing> dense;
  bool skipped = false;  // all are zero: a teacher's, in the first pass of a divergence

  XENT_DEVICE ElementsOfTarget(const Task& task, int64_t position)
      : task(task), offset(offset_of(task, task.target, position)), dense(task, position) {}

  XENT_DEVICE A element(int64_t c) const {
    if (kGeneral ? !is_dense(task.target_kind) : objective != Objective::kProbabilities) return A(0);
    return read_number<A>(task.target, offset + c * task.target.class_stride);
  }

  template <int N>
  XENT_DEVICE void load(int64_t c, int64_t step, A (&a)[N]) const {
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const int64_t at = c + j * step;
      a[j] = at < task.classes ? coefficient<objective>(task, at, element(at)) : A(0);
    }
  }
  template <int N>
  XENT_DEVICE void load(int64_t c, int64_t step, Terms<A, N>& terms) const {
    terms.first = c;
    terms.step = step;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const int64_t at = c + j * step;
      terms.a[j] = terms.log[j] = A(0);
      if (at < task.classes && has_coefficients<A>(task) && !skipped) {
        dense.set(task, at, element(at), terms.a[j], terms.log[j]);
      }
    }
  }
};

template <class T, class A, Objective objective, Team team>
__global__ void __launch_bounds__(kBlockThreads<team>, strided_resident(sizeof(A), team))
    strided(const __grid_constant__ Task task) {
  using Softmax = SoftmaxOf<objective, A, true>;
  constexpr int kTogether = 4;
  constexpr bool kGeneral = objective == Objective::kGeneral;
  if (nothing_to_do(task)) return;
  let_next_kernel_begin();

  XENT_SHARED_ARRAY(Softmax, exchange, 2 * Members<team>::kWarps);
  const Members<team> members;
  const A scale_of_all = gradient_scale<A>(task);
  const bool forward = task.pass != Pass::kBackward, backward = task.pass != Pass::kForward;
  Sums sums{0, 0};
  int64_t joins = 0;

  for (int64_t position = members.first; position < task.positions; position += members.step) {
    const T* const logits = static_cast<const T*>(task.logits.data) + offset_of(task, task.logits, position);
    const int64_t target = offset_of(task, labels_of<objective>(task), position);
    const int64_t label = read_label<objective, kWarp>(task, target);
    const bool counts = is_counted(label);
    ElementsOfTarget<objective, A> elements(task, position);

    Softmax softmax = Softmax::of_nothing(task);
    ResultOf<objective, A> result;
    if (forward) {
      A target_logit = 0;
      elements.skipped = kGeneral && task.kl;
      if (task.is_here(label) && members.leads()) target_logit = read_logit<objective, T, A>(task, logits, label);
      if (counts) {
        for (int64_t c = members.thread; c < task.classes; c += kTogether * members.kThreads) {
          A x[kTogether];
          TermsOf<objective, A, kTogether> a;
#pragma unroll
          for (int k = 0; k < kTogether; ++k) {
            const int64_t at = c + k * members.kThreads;
            x[k] = at < task.classes ? read_logit<objective, T, A>(task, logits, at) : A(-INFINITY);
          }
          elements.load(c, members.kThreads, a);
          add_logits(task, x, a, softmax);
        }
      }
      if constexpr (kGeneral) {
        if (counts) add_pairs(task, position, logits, members.index(), members.count(), softmax);
      }
      members.join(task, softmax, exchange, joins++);
      result = ResultOf<objective, A>::of(task, softmax);
      elements.skipped = false;
      if constexpr (kGeneral) {
        if (task.kl) {
          const Divergence<A> divergence(task, elements.dense, result.max, result.log_sum);
          softmax = divergence.template of_nothing<Softmax>(task);
          for (int64_t c = members.thread; counts && c < task.classes; c += members.kThreads) {
            divergence.add(widen<A>(logits[c * task.logits.class_stride]), elements.element(c), softmax);
          }
          members.join(task, softmax, exchange, joins++);
          set_divergence(result, softmax);
        }
      }
      if (members.leads()) {
        finish_loss<objective>(task, Destination<A>::of(task, position, target), label, target_logit, result, sums);
        if constexpr (kGeneral) finish_statistics(task, position, label, logits, target_logit, result);
      }
    } else {
      result = SavedResult<objective>::template at<A>(task, position);
      if (label == kBad && members.leads()) report_bad_target<objective>(task, position, target);
    }
    if (!backward) continue;

    T* const out = task.grad_logits
                       ? static_cast<T*>(task.grad_logits.data) + offset_of(task, task.grad_logits, position)
                       : nullptr;
    const int64_t grad_target = task.grad_target ? offset_of(task, task.grad_target, position) : 0;
    Gradient<objective, A> gradient;
    if (counts) gradient.set(task, position, label, result, scale_of_all * grad_output_of<A>(task, position));
    if (kGeneral && !counts) write_target_zeros(task, position, members.index(), members.count());
    const auto gradient_of = [&](int) -> const auto& { return gradient; };
    for (int64_t c = members.thread; c < task.classes; c += members.kThreads) {
      A dx[1] = {A(0)};
      if (counts) {
        const A x[1] = {read_logit<objective, T, A>(task, logits, c)};
        if constexpr (kGeneral) {
          Terms<A, 1> terms;
          elements.load(c, 1, terms);
          gradient.of_classes(task, grad_target, label, x, terms, dx);
        } else {
          gradients<objective>(task, gradient_of, x, [&](A(&a)[1]) { elements.load(c, 1, a); }, dx);
          if (c == label) dx[0] = gradient.own(x[0]);
          if (objective == Objective::kProbabilities && task.grad_target) {
            write_probability_gradient(task, grad_target, c, gradient.of_probability(x[0]));
          }
        }
      }
      if (out) out[c * task.grad_logits.class_stride] = narrow<T>(dx[0]);
    }
    if constexpr (kGeneral) {
      if (task.target_kind != TargetKind::kPairs || !counts) continue;
      members.barrier();  // the threads that have the pairs' classes have written them
      gradient.write_pairs(task, position, logits, out, members.index(), members.count());
    }
  }
  leave_sums(task, sums);
}

}  // namespace xent::gpu
