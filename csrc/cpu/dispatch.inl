// Everything that is compiled for each instruction set, in the order in which one builds on the other.
#include "simd.inl"
#include "kernel/online_softmax.h"
#include "load_store.inl"
#include "rows.inl"
#include "spatial.inl"
#include "general.inl"
#include "nll.inl"
#include "halves.inl"

template <class T>
static void forward_rows(const Forward& problem, int64_t begin, int64_t end, Sums& sums) {
  switch (problem.objective) {
    case Objective::kIndex:
      return problem.grad_logits ? forward_backward_rows<T>(problem, begin, end, sums)
                                 : forward_rows_of<T, Objective::kIndex>(problem, begin, end, sums);
    case Objective::kSmoothedIndex: return forward_rows_of<T, Objective::kSmoothedIndex>(problem, begin, end, sums);
    case Objective::kProbabilities: return forward_rows_of<T, Objective::kProbabilities>(problem, begin, end, sums);
    case Objective::kGeneral: return forward_general_rows<T>(problem, begin, end, sums);
  }
}

template <class T>
static void backward_rows(const Backward& problem, int64_t begin, int64_t end) {
  switch (problem.objective) {
    case Objective::kIndex: return backward_rows_of<T, Objective::kIndex>(problem, begin, end);
    case Objective::kSmoothedIndex: return backward_rows_of<T, Objective::kSmoothedIndex>(problem, begin, end);
    case Objective::kProbabilities: return backward_rows_of<T, Objective::kProbabilities>(problem, begin, end);
    case Objective::kGeneral: return backward_general_rows<T>(problem, begin, end);
  }
}

template <class T>
static void forward_tiles(const Forward& problem, int64_t begin, int64_t end, Sums& sums) {
  const int64_t width = width_of_tile<T>(problem);
  Cursor cursor(problem, begin);
  for (int64_t first = begin; first < end; first += width) {
    const int64_t count = std::min(width, end - first);
    switch (problem.objective) {
      case Objective::kIndex:
        problem.grad_logits ? forward_tile<T, Objective::kIndex, true>(problem, cursor, first, count, sums)
                            : forward_tile<T, Objective::kIndex, false>(problem, cursor, first, count, sums);
        break;
      case Objective::kSmoothedIndex:
        problem.grad_logits ? forward_tile<T, Objective::kSmoothedIndex, true>(problem, cursor, first, count, sums)
                            : forward_tile<T, Objective::kSmoothedIndex, false>(problem, cursor, first, count, sums);
        break;
      case Objective::kProbabilities:
        forward_tile<T, Objective::kProbabilities, false>(problem, cursor, first, count, sums);
        break;
      case Objective::kGeneral: forward_general_tile<T>(problem, cursor, first, count, sums); break;
    }
    cursor.skip(count);
  }
}

template <class T>
static void backward_tiles(const Backward& problem, int64_t begin, int64_t end) {
  const int64_t width = width_of_tile<T>(problem);
  Cursor cursor(problem, begin);
  for (int64_t first = begin; first < end; first += width) {
    const int64_t count = std::min(width, end - first);
    switch (problem.objective) {
      case Objective::kIndex: backward_tile<T, Objective::kIndex>(problem, cursor, first, count); break;
      case Objective::kSmoothedIndex: backward_tile<T, Objective::kSmoothedIndex>(problem, cursor, first, count); break;
      case Objective::kProbabilities: backward_tile<T, Objective::kProbabilities>(problem, cursor, first, count); break;
      case Objective::kGeneral: backward_general_tile<T>(problem, cursor, first, count); break;
    }
    cursor.skip(count);
  }
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

// The sum of the weights of the targets that count: what a mean divides by.
template <class T>
static void sum_target_weights(const Problem& problem, int64_t begin, int64_t end, Sums& sums) {
  const T* weight = problem.target_kind == TargetKind::kIndices ? static_cast<const T*>(problem.weight) : nullptr;
  Cursor cursor(problem, begin);
  for (int64_t first = begin; first < end; first += kTile) {
    const int64_t count = std::min(kTile, end - first);
    int64_t y[kTile + kLanes<T>];
    T sample_weights[kTile + kLanes<T>];
    read_labels(y, problem, cursor, first, count);
    if (problem.sample_weight) read_sample_weights(sample_weights, problem, cursor, count);
    sums.weight += sum_of_target_weights(weight, problem.sample_weight ? sample_weights : nullptr, y, count);
    cursor.skip(count);
  }
}
