// What a kernel is asked to do: raw pointers, sizes and strides. The only thing that crosses from the host code, which
// knows torch, to the kernels, which do not.
//
// A *position* is one element of the loss before its reduction: one (n, d1..dK) of logits (N, C, d1..dK). Positions are
// numbered in row-major order over (N, d1..dK). Each has `classes` logits, `class_stride` apart.
#pragma once

#include <cstdint>

#include "scalar_types.h"

namespace xent {

constexpr int kMaxDims = 12;  // dimensions of positions: N and d1..dK

// A tensor seen from the positions. All strides count elements and may be zero.
struct View {
  void* data = nullptr;
  ElementType type{};
  int64_t class_stride = 0;
  int64_t stride[kMaxDims] = {};

  XENT_HOST_DEVICE explicit operator bool() const { return data != nullptr; }
};

enum class TargetKind : uint8_t {
  kIndex,          // a = w_y [c = y]
  kSmoothedIndex,  // a = (1 - e) w_y [c = y] + (e / C) w_c
  kSoft,           // a = w_c ((1 - e) q_c + e / C)
};

// Which dimension a vector register (or a warp) runs along. Classes where they are contiguous and many; positions where
// those are contiguous, or classes are few.
enum class Lanes : uint8_t { kClasses, kPositions };

// The loss of a position is sum_c a_c (lse(x) - x_c), with coefficients a_c made from the target and the options.
// `Problem` is what forward and backward share. `T` in the comments is the type of arithmetic: double where the logits
// or the soft target are float64, float otherwise.
struct Problem {
  int64_t positions = 0;
  int64_t classes = 0;
  int dims = 0;  // adjacent dimensions that every view steps through alike are merged
  int64_t size[kMaxDims] = {};

  TargetKind kind = TargetKind::kIndex;
  Lanes lanes = Lanes::kClasses;
  bool arithmetic_in_double = false;
  double label_smoothing = 0;  // e
  double smoothed_total = 0;   // e / C times the sum of the class weights
  int64_t ignore_index = 0;

  View logits;
  View target;                   // class indices, or a probability for each class
  const void* weight = nullptr;  // T[classes], or null for ones

  // The logarithm of the sum of exponentials, as the unevaluated sum of two T: rounded to one, it would lose what
  // decides a confident position's gradient. Two arrays of `positions`; for soft targets a third holds A = sum_c a_c.
  void* lse = nullptr;

  // The first position whose target is neither a class nor ignore_index; stays at its initial value where there is
  // none.
  int64_t* first_bad_position = nullptr;
};

struct Sums {
  double loss = 0;
  double weight = 0;
};

struct Forward : Problem {
  View loss;  // where the losses go when they are not summed

  // Where the gradient goes when the kernel makes it in the same pass, for a grad_output of `scale`.
  View grad_logits;
  double scale = 1;
  bool stream = false;
};

struct Backward : Problem {
  View grad_output;  // one for each position (reduction 'none'), or a single element with strides of zero
  double scale = 1;  // 1 / denominator
  View grad_logits;  // absent where no gradient is asked for
  View grad_target;
  bool stream = false;    // the gradients are too large for the caches
  bool buffered = false;  // they cannot be stored as they are made: to be streamed, or in the place of the logits
};

}  // namespace xent
