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

// The coefficients a_c of a loss, by which kernels are chosen: three objectives of the plain loss, and one for
// everything else.
enum class Objective : uint8_t {
  kIndex,          // a = w_y [c = y]
  kSmoothedIndex,  // a = (1 - e) w_y [c = y] + (e / C) w_c
  kProbabilities,  // a = w_c ((1 - e) q_c + e / C)
  kGeneral,        // any form of target, transformed logits, statistics, a shard of the classes
};

// Stand in the place of a class where a target is ignore_index, or no class at all.
constexpr int kIgnored = -1, kBad = -2;

// The kind of target.
enum class TargetKind : uint8_t {
  kNone,           // nothing but lse is asked for
  kIndices,        // class indices: a as of Objective::kSmoothedIndex
  kProbabilities,  // a as of Objective::kProbabilities
  kPairs,          // k classes i and their probabilities p: a = sum_j (1 - e) w_c p_j [c = i_j] + (e / C) w_c
  kTeacher,        // a = softmax of the teacher's logits, both at a temperature; and perhaps a label at temperature 1
};

// Returns true for a target with an element for every class, which may have a gradient of the logits' size.
XENT_HOST_DEVICE constexpr bool is_dense(TargetKind target_kind) {
  return target_kind == TargetKind::kProbabilities || target_kind == TargetKind::kTeacher;
}

// What the forward leaves for the backward: rows of `positions` numbers of type T, in `Problem::lse`.
namespace saved {
enum Row : int {
  // The logarithm of the sum of exponentials, as an unevaluated sum: rounded to one number, it would lose what decides
  // a confident position's gradient.
  kLse = 0,
  kLseLost = 1,
  // Probabilities, and every target of a shard: A = sum_c a_c. Teacher: the position's distillation loss, before its
  // factor.
  kMass = 2,
  // Statistics. The class of the largest logit is an integer as wide as T.
  kEntropy = 3,
  kTargetLogProb = 4,
  kArgmax = 5,
  // Teacher: of the logits x at its temperature T their maximum, and the logarithm of the sum of exp(T (x - maximum)):
  // apart, for T x has another rounding than the logits that were given. And the teacher's own lse.
  kLabelMax = 3,
  kLabelLogSum = 4,
  kTeacherLse = 5,
  kTeacherLseLost = 6,
};
}  // namespace saved

// Rows of the gradients of statistics.
enum GradStatistic : int { kGradLse = 0, kGradTargetLogProb = 1, kGradEntropy = 2 };

// Which dimension a vector register (or a warp) runs along. Classes where they are contiguous and many; positions where
// those are contiguous, or classes are few.
enum class Lanes : uint8_t { kClasses, kPositions };

// The options of a loss that are numbers. Kernels see them as they are, but for the changes that make_problem makes.
struct Numbers {
  double label_smoothing = 0;  // e
  double z_loss = 0;           // each position that counts adds z_loss lse^2
  double softcap = 0;          // x = softcap tanh(logit_scale x' / softcap) of the logits x' that are given; 0: no cap
  double logit_scale = 1;
  double temperature = 1;  // of a teacher's and a student's softmax: logits are divided by it
  double alpha = 1;        // share of the teacher in a loss that has labels, too
};

// The loss of a position is sum_c a_c (lse(x) - x_c), with coefficients a_c made from the target and the options.
// `Problem` is what forward and backward share. `T` in the comments is the type of arithmetic: double where the logits
// or the soft target are float64, float otherwise.
struct Problem : Numbers {
  int64_t positions = 0;
  int64_t classes = 0;
  int dims = 0;  // adjacent dimensions that every view steps through alike are merged
  int64_t size[kMaxDims] = {};

  Objective objective = Objective::kIndex;
  Lanes lanes = Lanes::kClasses;
  bool arithmetic_in_double = false;
  double keep = 1;            // 1 - e
  double share = 0;           // e / C, with the classes of all shards
  double smoothed_total = 0;  // e / C times the sum of the class weights
  int64_t ignore_index = 0;

  View logits;
  View target;                   // class indices, a probability for each class, k classes, or the teacher's logits
  View sample_weight;            // a factor for each position, or absent for ones
  const void* weight = nullptr;  // T[all_classes()] from class_begin on, or null for ones
  void* lse = nullptr;           // what is saved: two rows, and more of other targets; or null, for nothing

  // ---- kGeneral
  TargetKind target_kind = TargetKind::kNone;
  bool statistics = false;  // the forward saves them
  int64_t pairs = 0;        // k; the class_stride of `target` and `probs` is from one pair to the next
  View probs;               // of the pairs
  View labels;              // class indices besides the teacher, or absent
  double teacher_scale = 1, label_scale = 0;  // alpha T^2 and 1 - alpha
  bool kl = false;                            // less the teacher's entropy

  // A shard: the logits are those of the classes [class_begin, class_begin + classes) of `total_classes`, the others
  // are elsewhere. Class indices, class weights and label smoothing are of all of them. The forward finds out what the
  // shard alone has of the loss, L = sum_c a_c (lse - x_c) over its own classes and with its own lse; the loss is the
  // sum over shards of L + A (lse of all - lse). The backward is given what was saved as it is of all classes.
  int64_t class_begin = 0, total_classes = 0;  // zero: no shard

  XENT_HOST_DEVICE bool is_shard() const { return total_classes != 0; }
  XENT_HOST_DEVICE int64_t all_classes() const { return is_shard() ? total_classes : classes; }

  // Kernels count classes from the shard's first on, and around: those below `classes` are here.
  XENT_HOST_DEVICE int64_t counted_from_here(int64_t c) const {
    return c < class_begin ? c - class_begin + total_classes : c - class_begin;
  }
  XENT_HOST_DEVICE bool is_here(int64_t c) const { return uint64_t(c) < uint64_t(classes); }

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
  View grad_target;  // of probabilities, of the pairs' probabilities, or of the teacher's logits
  const void* grad_statistics = nullptr;  // T[3][positions], see GradStatistic; or null
  bool stream = false;                    // the gradients are too large for the caches
  bool buffered = false;  // they cannot be stored as they are made: to be streamed, or in the place of the logits
};

}  // namespace xent
