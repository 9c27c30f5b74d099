// The kernel that a plan asks for, for logits of one type. Each type is compiled in a file of its own.
#pragma once

#include "rows.cuh"
#include "small_rows.cuh"
#include "spatial.cuh"
#include "strided.cuh"

namespace xent::gpu {

template <class T, Objective objective>
Status launch_kind(const Task& task, const Plan& plan, void* stream) {
#define XENT_LAUNCH(...) launch<__VA_ARGS__>(plan.shape, stream, task)
  using A = Arithmetic<T>;
  constexpr int N = kPerVector<T>;
  constexpr bool kPlain = objective != Objective::kGeneral;
  switch (plan.family) {
    case Family::kSmallRows:
      if constexpr (kPlain) return XENT_LAUNCH(small_rows<T, objective>);
      break;
    case Family::kRows:
      if (!plan.copied) return XENT_LAUNCH(rows<T, objective, Team::kBlock, false>);
      if (plan.team == Team::kWarp) return XENT_LAUNCH(rows<T, objective, Team::kWarp, true>);
      if (plan.team == Team::kBlock) return XENT_LAUNCH(rows<T, objective, Team::kBlock, true>);
      return XENT_LAUNCH(rows<T, objective, Team::kCluster, true>);
    case Family::kSpatial:
      if constexpr (kPlain) {
        if (!plan.vectors) return XENT_LAUNCH(spatial<T, objective, 1, false>);
        return plan.copied ? XENT_LAUNCH(spatial<T, objective, N, true>) : XENT_LAUNCH(spatial<T, objective, N, false>);
      }
      break;
    case Family::kStrided: break;
  }
  if constexpr ((objective == Objective::kProbabilities || !kPlain) && !std::is_same_v<A, double>) {
    if (task.arithmetic_in_double) {
      return plan.team == Team::kWarp ? XENT_LAUNCH(strided<T, double, objective, Team::kWarp>)
                                      : XENT_LAUNCH(strided<T, double, objective, Team::kBlock>);
    }
  }
  return plan.team == Team::kWarp ? XENT_LAUNCH(strided<T, A, objective, Team::kWarp>)
                                  : XENT_LAUNCH(strided<T, A, objective, Team::kBlock>);
#undef XENT_LAUNCH
}

// Calls use(an objective, as a type).
template <class Use>
Status with_objective(Objective objective, const Use& use) {
  switch (objective) {
    case Objective::kIndex: return use(std::integral_constant<Objective, Objective::kIndex>());
    case Objective::kSmoothedIndex: return use(std::integral_constant<Objective, Objective::kSmoothedIndex>());
    case Objective::kProbabilities: return use(std::integral_constant<Objective, Objective::kProbabilities>());
    default: return use(std::integral_constant<Objective, Objective::kGeneral>());
  }
}

template <class T>
Status most_clusters_of(const Task& task, const Plan& plan, int& most) {
  return with_objective(task.objective, [&](auto objective) {
    return clusters_at_a_time<rows<T, decltype(objective)::value, Team::kCluster, true>>(plan.shape, most);
  });
}

template <class T>
Status launch_loss_of(const Task& task, const Plan& plan, void* stream) {
  return with_objective(task.objective,
                        [&](auto objective) { return launch_kind<T, decltype(objective)::value>(task, plan, stream); });
}

}  // namespace xent::gpu
