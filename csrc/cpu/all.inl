// Everything that is compiled for each instruction set, in the order in which one builds on the other.
#include "simd.inl"
#include "../online_softmax.h"
#include "stage.inl"
#include "rows.inl"
#include "spatial.inl"

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
  const T* weight = static_cast<const T*>(problem.weight);
  Cursor cursor(problem, begin);
  for (int64_t first = begin; first < end; first += kTile) {
    const int64_t count = std::min(kTile, end - first);
    int64_t y[kTile];
    read_positions(y, cursor, count, problem.target);
    check_targets(y, problem, first, count);
    sums.weight += sum_of_target_weights(weight, y, count);
    cursor.skip(count);
  }
}
