// Any layout and any mixture of types: classes at any stride, double arithmetic for half logits with float64
// probabilities. A warp or a block has a position to itself and reads its classes twice, 2 reads + 1 write, the second
// time from a cache where they fit one. Nothing is copied or made contiguous.
#pragma once

#include "rows.cuh"

namespace xent::gpu {

template <class T, class A, TargetKind kind, Team team>
__global__ void __launch_bounds__(kBlockThreads<team>, strided_resident(sizeof(A), team))
    strided(const __grid_constant__ Task task) {
  using S = Statistics<A, kind != TargetKind::kIndex, true>;
  constexpr int kTogether = 4;
  if (nothing_to_do(task)) return;

  XENT_SHARED_ARRAY(S, exchange, 2 * Members<team>::kWarps);
  const Members<team> members;
  const A scale_of_all = gradient_scale<A>(task);
  const bool forward = task.pass != Pass::kBackward, backward = task.pass != Pass::kForward;
  Sums sums{0, 0};
  int64_t round = 0;

  for (int64_t position = members.first; position < task.positions; position += members.step, ++round) {
    const T* const logits = static_cast<const T*>(task.logits.data) + offset_of(task, task.logits, position);
    const int64_t target = offset_of(task, task.target, position);
    const int64_t label = read_label<kind>(task, target);
    const bool counts = is_counted(label);
    const auto coefficient_of = [&](int64_t c) {
      A q = 0;
      if constexpr (kind == TargetKind::kSoft) q = read_element<A>(task.target, target + c * task.target.class_stride);
      return coefficient<kind>(task, c, q);
    };

    S statistics = S::of_nothing();
    Found<A> found;
    if (forward) {
      A target_logit = 0;
      if (kind != TargetKind::kSoft && counts && members.leads()) {
        target_logit = widen<A>(logits[label * task.logits.class_stride]);
      }
      if (counts) {
        for (int64_t c = members.thread; c < task.classes; c += kTogether * members.kThreads) {
          A x[kTogether], a[kTogether];
#pragma unroll
          for (int k = 0; k < kTogether; ++k) {
            const int64_t at = c + k * members.kThreads;
            x[k] = at < task.classes ? widen<A>(logits[at * task.logits.class_stride]) : A(-INFINITY);
            a[k] = at < task.classes ? coefficient_of(at) : A(0);
          }
          statistics.add(x, a);
        }
      }
      members.join(statistics, exchange, round);
      found = Found<A>::of(statistics);
      if (members.leads()) {
        finish_loss<kind>(task, position, target, offset_of(task, task.loss, position), label, target_logit, found,
                          sums);
      }
    } else {
      found = saved<A>(task, position);
      if (label == kBad && members.leads()) report_bad_target(task, position, target);
    }
    if (!backward) continue;

    T* const out = task.grad_logits
                       ? static_cast<T*>(task.grad_logits.data) + offset_of(task, task.grad_logits, position)
                       : nullptr;
    const int64_t grad_target = task.grad_target ? offset_of(task, task.grad_target, position) : 0;
    Gradient<kind, A> gradient;
    if (counts) {
      gradient.set(task, label, found,
                   scale_of_all * read_grad_output<A>(task, offset_of(task, task.grad_output, position)));
    }
    const auto gradient_of = [&](int) -> const auto& { return gradient; };
    for (int64_t c = members.thread; c < task.classes; c += members.kThreads) {
      A dx[1] = {A(0)};
      if (counts) {
        const A x[1] = {widen<A>(logits[c * task.logits.class_stride])};
        gradients<kind>(task, gradient_of, x, [&](A(&a)[1]) { a[0] = coefficient_of(c); }, dx);
        if (c == label) dx[0] = gradient.own(x[0]);
        if (kind == TargetKind::kSoft && task.grad_target) {
          write_probability_gradient(task, grad_target, c, gradient.of_probability(x[0]));
        }
      }
      if (out) out[c * task.grad_logits.class_stride] = narrow<T>(dx[0]);
    }
  }
  leave_sums(task, sums);
}

}  // namespace xent::gpu
