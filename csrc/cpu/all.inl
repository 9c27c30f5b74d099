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
}

template <class T>
static void backward_positions(const Backward& problem, int64_t begin, int64_t end) {
  problem.lanes == Lanes::kClasses ? backward_rows<T>(problem, begin, end) : backward_tiles<T>(problem, begin, end);
  if (problem.stream) SIMD_FENCE();
}
