#include "options.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "inputs.h"

namespace xent {
namespace {

size_t place_of(double Numbers::* number) {
  size_t place = 0;
  while (kNumberOptions[place].value != number) ++place;
  return place;
}

}  // namespace

bool NumberOption::is_in_range(double x) const {
  switch (range) {
    case kAnyFinite: return std::isfinite(x);
    case kNonNegative: return std::isfinite(x) && x >= 0;
    case kPositive: return std::isfinite(x) && x > 0;
    default: return x >= 0 && x <= 1;
  }
}

std::array<int64_t, Options::kIntegers> Options::integers() const {
  const int64_t flags = int64_t{empty_is_zero} | int64_t{inplace} << 1 | int64_t{statistics} << 2 | int64_t{kl} << 3 |
                        int64_t(target_kind) << 4;
  return {reduction, ignore_index, loss_dtype ? int64_t(*loss_dtype) : -1, flags, class_begin, total_classes};
}

std::array<double, kNumbers> Options::numbers() const {
  constexpr Numbers kDefaults;
  std::array<double, kNumbers> all;
  for (size_t i = 0; i < kNumbers; ++i) {  // no compiler is to write NaN into a program
    const auto value = kNumberOptions[i].value;
    all[i] = tensors.empty() || !tensors[i].defined() ? this->*value : kDefaults.*value;
  }
  return all;
}

Options Options::of(at::IntArrayRef integers, at::ArrayRef<double> numbers, std::vector<at::Tensor> tensors) {
  TORCH_CHECK(integers.size() == kIntegers && numbers.size() == kNumbers, "cross_entropy_ext: got ", integers.size(),
              " integers and ", numbers.size(), " numbers for the ", kIntegers, " and ", kNumbers, " of its options");
  Options options;
  options.reduction = integers[0];
  options.ignore_index = integers[1];
  if (integers[2] >= 0) options.loss_dtype = at::ScalarType(integers[2]);
  options.empty_is_zero = integers[3] & 1;
  options.inplace = integers[3] & 2;
  options.statistics = integers[3] & 4;
  options.kl = integers[3] & 8;
  options.target_kind = TargetKind(integers[3] >> 4);
  options.class_begin = integers[4];
  options.total_classes = integers[5];
  for (size_t i = 0; i < kNumbers; ++i) options.*kNumberOptions[i].value = numbers[i];
  options.set_tensors(std::move(tensors));
  return options;
}

void Options::set_tensors(std::vector<at::Tensor> numbers) {
  tensors = std::move(numbers);
  for (size_t i = 0; i < tensors.size(); ++i) {
    if (tensors[i].defined()) this->*kNumberOptions[i].value = std::numeric_limits<double>::quiet_NaN();
  }
}

const at::Tensor& Options::tensor(double Numbers::* number) const {
  static const at::Tensor none;
  return tensors.empty() ? none : tensors[place_of(number)];
}

Options Options::with_values() && {
  for (size_t i = 0; i < tensors.size(); ++i) {
    if (tensors[i].defined()) this->*kNumberOptions[i].value = tensors[i].item<double>();
  }
  tensors.clear();
  return std::move(*this);
}

Options Options::without_weights(at::ScalarType type) const {
  Options result;
  result.reduction = kNone;
  result.loss_dtype = type;
  result.chunk = chunk;
  if (!tensors.empty()) result.tensors.resize(kNumbers);
  for (const auto number : {&Numbers::softcap, &Numbers::logit_scale}) {
    result.*number = this->*number;
    if (!tensors.empty()) result.tensors[place_of(number)] = tensor(number);
  }
  return result;
}

void check_options(const Options& options) {
  if (!options.tensors.empty()) {
    // A compiler or a transform leaves values open. The kernels check the values that they get.
    const bool known = std::all_of(options.tensors.begin(), options.tensors.end(),
                                   [](const at::Tensor& number) { return !number.defined() || is_eager(number); });
    if (!known) return check_options(options.without_tensors());
    const Options valued = Options(options).with_values();
    TORCH_CHECK_VALUE(!options.tensor(&Numbers::softcap).defined() || valued.softcap > 0,
                      "softcap must be None or a finite number above 0, but got ", valued.softcap);
    return check_options(valued);
  }
  TORCH_CHECK(options.reduction >= kNone && options.reduction <= kSum,
              "reduction must be 0, 1 or 2. Got: ", options.reduction);
  TORCH_CHECK(!options.loss_dtype || is_logits_type(*options.loss_dtype),
              "loss_dtype must be float16, bfloat16, float32 or float64. Got: ", *options.loss_dtype);
  const bool plain = options.is_plain();  // then native judges a label_smoothing above 1
  TORCH_CHECK(options.label_smoothing >= 0 && (plain || options.label_smoothing <= 1),
              "label_smoothing must be between 0.0 and 1.0. Got: ", options.label_smoothing);
  if (plain) return;
  for (const NumberOption& number : kNumberOptions) {
    const double value = options.*number.value;
    TORCH_CHECK_VALUE(number.is_in_range(value), number.name, " must be ", number.words, ", but got ", value);
  }
}

}  // namespace xent
