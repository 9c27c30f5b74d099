// Everything that is compiled for an instruction set, in the order in which one file builds on the other; the choice of
// a kernel; and the table of them.
#include "simd.inl"
#include "kernel/online_softmax.h"
#include "load_store.inl"
#include "rows.inl"
#include "spatial.inl"
#include "general.inl"
#include "nll.inl"
#include "halves.inl"

// Calls use with the objective as a template argument.
template <class Use>
XENT_INLINE void with_objective(Objective objective, const Use& use) {
  switch (objective) {
    case Objective::kIndex: return use.template operator()<Objective::kIndex>();
    case Objective::kSmoothedIndex: return use.template operator()<Objective::kSmoothedIndex>();
    case Objective::kProbabilities: return use.template operator()<Objective::kProbabilities>();
    case Objective::kGeneral: return use.template operator()<Objective::kGeneral>();
  }
}

template <class T>
static void forward_rows(const Forward& problem, int64_t begin, int64_t end, Sums& sums) {
  with_objective(problem.objective, [&]<Objective objective>() {
    if constexpr (objective == Objective::kGeneral) {
      forward_general_rows<T>(problem, begin, end, sums);
    } else if (objective == Objective::kIndex && problem.grad_logits) {
      forward_backward_rows<T>(problem, begin, end, sums);
    } else {
      forward_rows_of<T, objective>(problem, begin, end, sums);
    }
  });
}

template <class T>
static void backward_rows(const Backward& problem, int64_t begin, int64_t end) {
  with_objective(problem.objective, [&]<Objective objective>() {
    if constexpr (objective == Objective::kGeneral) {
      backward_general_rows<T>(problem, begin, end);
    } else {
      backward_rows_of<T, objective>(problem, begin, end);
    }
  });
}

template <class T>
static void forward_tiles(const Forward& problem, int64_t begin, int64_t end, Sums& sums) {
  for_tiles(problem, begin, end, width_of_tile<T>(problem), [&](const Cursor& cursor, int64_t first, int64_t count) {
    with_objective(problem.objective, [&]<Objective objective>() {
      constexpr bool one_pass = objective != Objective::kProbabilities;
      if constexpr (objective == Objective::kGeneral) {
        forward_general_tile<T>(problem, cursor, first, count, sums);
      } else if (one_pass && problem.grad_logits) {
        forward_tile<T, objective, one_pass>(problem, cursor, first, count, sums);
      } else {
        forward_tile<T, objective, false>(problem, cursor, first, count, sums);
      }
    });
  });
}

template <class T>
static void backward_tiles(const Backward& problem, int64_t begin, int64_t end) {
  for_tiles(problem, begin, end, width_of_tile<T>(problem), [&](const Cursor& cursor, int64_t first, int64_t count) {
    with_objective(problem.objective, [&]<Objective objective>() {
      if constexpr (objective == Objective::kGeneral) {
        backward_general_tile<T>(problem, cursor, first, count);
      } else {
        backward_tile<T, objective>(problem, cursor, first, count);
      }
    });
  });
}

template <class T>
static void forward_positions(const Forward& problem, int64_t begin, int64_t end, Sums& sums) {
  problem.lanes == Lanes::kClasses ? forward_rows<T>(problem, begin, end, sums)
                                   : forward_tiles<T>(problem, begin, end, sums);
  if (problem.stream && problem.grad_logits) SIMD_FENCE();
}

template <class T>
static void backward_positions(const Backward& problem, int64_t begin, int64_t end) {
  problem.lanes == Lanes::kClasses ? backward_rows<T>(problem, begin, end) : backward_tiles<T>(problem, begin, end);
  if (problem.stream) SIMD_FENCE();
}

// ---- the table ------------------------------------------------------------------------------------------------------

static void forward(const Forward& problem, int64_t begin, int64_t end, Sums& sums) {
  problem.arithmetic_in_double ? forward_positions<double>(problem, begin, end, sums)
                               : forward_positions<float>(problem, begin, end, sums);
}

static void backward(const Backward& problem, int64_t begin, int64_t end) {
  problem.arithmetic_in_double ? backward_positions<double>(problem, begin, end)
                               : backward_positions<float>(problem, begin, end);
}

static void sum_weights(const Problem& problem, int64_t begin, int64_t end, Sums& sums) {
  problem.arithmetic_in_double ? sum_target_weights<double>(problem, begin, end, sums)
                               : sum_target_weights<float>(problem, begin, end, sums);
}

static void nll_forward(const Forward& problem, int64_t begin, int64_t end, Sums& sums) {
  problem.arithmetic_in_double ? forward_nll<double>(problem, begin, end, sums)
                               : forward_nll<float>(problem, begin, end, sums);
}

constexpr Kernels kKernels{SIMD_NAME,    SIMD_BYTES,    forward,
                           backward,     sum_weights,   nll_forward,
                           backward_nll, add_to_halves, add_scaled_to_halves};
