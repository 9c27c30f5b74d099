// The options of a loss: what an operator takes besides tensors.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <vector>

#include "kernel/problem.h"

namespace xent {

// ATen's numbering.
enum Reduction : int64_t { kNone = 0, kMean = 1, kSum = 2 };

// One of `Numbers`, as operators, checks and graphs see it.
struct NumberOption {
  enum Range { kAnyFinite, kNonNegative, kPositive, kShare };

  const char* name;
  double Numbers::* value;
  Range range;        // of the value that a kernel gets
  const char* words;  // for the error

  bool is_in_range(double x) const;
};
constexpr size_t kNumbers = sizeof(Numbers) / sizeof(double);

// An option that is a number is a field of Numbers and a row of this table. The numbers of a loss that PyTorch has come
// first, and then those of losses with kernels of their own.
inline constexpr std::array<NumberOption, kNumbers> kNumberOptions{{
    {"label_smoothing", &Numbers::label_smoothing, NumberOption::kShare, "between 0 and 1"},
    {"z_loss", &Numbers::z_loss, NumberOption::kNonNegative, "a finite number of at least 0"},
    {"softcap", &Numbers::softcap, NumberOption::kNonNegative, "None or a finite number above 0"},  // zero is None
    {"logit_scale", &Numbers::logit_scale, NumberOption::kAnyFinite, "a finite number"},
    {"temperature", &Numbers::temperature, NumberOption::kPositive, "a finite number above 0"},
    {"alpha", &Numbers::alpha, NumberOption::kShare, "between 0 and 1"},
}};

struct Options : Numbers {
  int64_t reduction = kMean, ignore_index = -100;
  std::optional<at::ScalarType> loss_dtype;  // by default native's
  bool empty_is_zero = false;
  bool inplace = false;                        // the gradient takes the logits' storage
  bool statistics = false;                     // besides the loss
  TargetKind target_kind = TargetKind::kNone;  // kPairs or kTeacher; else the target's shape decides
  bool kl = false;                             // a teacher's divergence, not its cross entropy
  int64_t class_begin = 0, total_classes = 0;  // of a shard, see Problem; private operators alone take it
  int64_t chunk = 0;  // of a layer: how many positions have their logits in memory at a time; 0: as many as is fast

  // Numbers that come as scalar tensors, in the order of kNumberOptions, undefined for the others; empty where none
  // does. They change from call to call of a compiled graph, are transformed, or get a gradient. Their fields above are
  // NaN.
  std::vector<at::Tensor> tensors = {};

  // The options as private operators take them.
  static constexpr size_t kIntegers = 6;
  std::array<int64_t, kIntegers> integers() const;
  std::array<double, kNumbers> numbers() const;
  static Options of(at::IntArrayRef integers, at::ArrayRef<double> numbers, std::vector<at::Tensor> tensors = {});

  void set_tensors(std::vector<at::Tensor> numbers);

  // Returns the tensor that a number comes as, or an undefined one.
  const at::Tensor& tensor(double Numbers::* number) const;

  // Reads the values of the tensors, as kernels take them.
  Options with_values() &&;

  // Leaves the tensors' values open, with their defaults in the place of NaN.
  Options without_tensors() const { return Options::of(integers(), numbers()); }

  // Returns the options of the bare log-probability of probabilities, which a loss may weight or smooth.
  Options without_weights(at::ScalarType type) const;

  // Returns true for a loss that PyTorch has, too.
  bool is_plain() const { return is_plain_but_for<kOfPyTorch>() && tensors.empty(); }

  // Returns true if there are kernels for just this loss; the general ones take all others.
  bool has_own_kernels() const { return is_plain_but_for<kOfOwnKernels>(); }

  bool is_shard() const { return total_classes != 0; }

  // The argmax of an ignored position: neither a class nor ignore_index, so that comparing it with the targets counts
  // no padding as correct.
  int64_t no_class() const { return ignore_index == -1 ? -2 : -1; }

 private:
  // Numbers at the begin of kNumberOptions.
  static constexpr size_t kOfPyTorch = 1, kOfOwnKernels = 2;

  template <size_t numbers>
  bool is_plain_but_for() const {
    constexpr Numbers kDefaults;
    if (statistics || target_kind != TargetKind::kNone || is_shard()) return false;
    for (size_t i = numbers; i < kNumbers; ++i) {
      if (this->*kNumberOptions[i].value != kDefaults.*kNumberOptions[i].value) return false;
    }
    return true;
  }
};

// Raises an error for values out of range. The values of tensors are checked where they can be read.
void check_options(const Options& options);

}  // namespace xent
