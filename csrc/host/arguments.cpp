// What the fused kernels take, decided once for all devices.
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>

#include "cross_entropy.h"

namespace xent {
namespace {

// Calls compare(sizes of a, sizes of b): as integers where none is symbolic, which takes a tenth of the time.
template <class Compare>
bool with_sizes(const at::Tensor& a, const at::Tensor& b, const Compare& compare) {
  const bool symbolic =
      a.unsafeGetTensorImpl()->has_symbolic_sizes_strides() || b.unsafeGetTensorImpl()->has_symbolic_sizes_strides();
  return symbolic ? compare(a.sym_sizes(), b.sym_sizes()) : compare(a.sizes(), b.sizes());
}

// (N, C, d1..dK) against (N, d1..dK), or (C) against ().
bool is_shape_of_positions(const at::Tensor& logits, const at::Tensor& target) {
  if (target.dim() != logits.dim() - 1) return false;
  const size_t dim = size_t(class_dim(logits));
  return with_sizes(logits, target, [&](const auto& of_logits, const auto& of_target) {
    for (size_t d = 0; d < of_target.size(); ++d) {
      if (of_target[d] != of_logits[d < dim ? d : d + 1]) return false;
    }
    return true;
  });
}

// (N, C, d1..dK) against (N, k, d1..dK), or (C) against (k).
bool is_shape_of_pairs(const at::Tensor& logits, const at::Tensor& target) {
  if (target.dim() != logits.dim()) return false;
  for (int64_t d = 0; d < target.dim(); ++d) {
    if (d != class_dim(logits) && target.sym_size(d) != logits.sym_size(d)) return false;
  }
  return true;
}

bool is_plain(const at::Tensor& tensor, const at::Tensor& logits) {
  return tensor.layout() == at::kStrided && tensor.device() == logits.device();
}

// Whether this build has kernels for the device.
bool has_kernel(c10::Device device) {
  if (device.is_cpu() || device.is_meta()) return true;
  if (!device.is_cuda()) return false;
  static const bool cuda = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("cross_entropy_ext::_forward", "")
                               .hasKernelForDispatchKey(c10::DispatchKey::CUDA);
  return cuda;
}

}  // namespace

bool is_logits_type(at::ScalarType type) {
  return type == at::kFloat || type == at::kBFloat16 || type == at::kHalf || type == at::kDouble;
}

bool is_index_type(at::ScalarType type) {
  return type == at::kLong || type == at::kInt || type == at::kShort || type == at::kChar || type == at::kByte;
}

bool is_eager(const at::Tensor& tensor) {
  constexpr c10::DispatchKeySet kTracing({c10::DispatchKey::Python, c10::DispatchKey::Functionalize,
                                          c10::DispatchKey::Batched, c10::DispatchKey::FuncTorchBatched,
                                          c10::DispatchKey::FuncTorchGradWrapper});
  return !tensor.key_set().has_any(kTracing) && !tensor.is_meta() && !c10::impl::TorchDispatchModeTLS::any_modes_set();
}

bool has_shape_of_logits(const at::Tensor& logits, const at::Tensor& target) {
  return logits.dim() == target.dim() && with_sizes(logits, target, std::equal_to<>());
}

// ---- options, as numbers --------------------------------------------------------------------------------------------

TargetKind Inputs::target_kind(const Options& options) const {
  if (options.target_kind != TargetKind::kNone) return options.target_kind;
  return has_shape_of_logits(logits, target) ? TargetKind::kProbabilities : TargetKind::kIndices;
}

const OptionalTensor Inputs::kNothing;

OptionalTensors as_list(std::initializer_list<std::reference_wrapper<const OptionalTensor>> tensors) {
  size_t size = tensors.size();
  while (size > 0 && !has_value(tensors.begin()[size - 1].get())) --size;
  // Most calls have this list, so it is allocated once. It is not empty: AOTInductor's runtime takes that for no list.
  static const OptionalTensors none({OptionalTensor()});
  if (size == 0) return none;
  OptionalTensors list;
  list.reserve(size);
  for (size_t i = 0; i < size; ++i) list.push_back(tensors.begin()[i].get());
  return list;
}

OptionalTensor element_of(const OptionalTensors& list, size_t place) {
  OptionalTensor tensor;
  if (place < list.size()) tensor = list.get(place);
  if (!has_value(tensor)) tensor.reset();
  return tensor;
}

Others::Others(const OptionalTensors& list)
    : weight(element_of(list, 0)),
      companion(element_of(list, 1)),
      sample_weight(element_of(list, 2)),
      divisor(element_of(list, 3)) {
  constexpr size_t kTensors = 4, kAll = kTensors + Options::kNumbers;
  TORCH_CHECK(list.size() <= kAll, "cross_entropy_ext: got ", list.size(), " optional tensors, but there are ", kAll);
  if (list.size() <= kTensors) return;
  for (size_t i = kTensors; i < kAll; ++i) numbers.push_back(element_of(list, i).value_or(at::Tensor()));
}

OptionalTensors Others::of(const Inputs& in, const Options& options) {
  if (options.tensors.empty()) return as_list({in.weight, in.companion, in.sample_weight, in.divisor});
  OptionalTensors list;
  for (const OptionalTensor& tensor : {in.weight, in.companion, in.sample_weight, in.divisor}) list.push_back(tensor);
  for (const at::Tensor& number : options.tensors) list.push_back(optional(number));
  return list;
}

const at::Tensor& Inputs::probabilities(const Options& options) const {
  return options.target_kind == TargetKind::kPairs ? *companion : target;
}

std::array<int64_t, Options::kIntegers> Options::integers() const {
  const int64_t flags = int64_t{empty_is_zero} | int64_t{inplace} << 1 | int64_t{statistics} << 2 | int64_t{kl} << 3 |
                        int64_t(target_kind) << 4;
  return {reduction, ignore_index, loss_dtype ? int64_t(*loss_dtype) : -1, flags, class_begin, total_classes};
}

std::array<double, Options::kNumbers> Options::numbers() const {
  std::array<double, kNumbers> all{label_smoothing, z_loss, softcap, logit_scale, temperature, alpha};
  if (!tensors.empty()) {  // no compiler is to write NaN into a program
    const std::array<double, kNumbers> defaults = Options().numbers();
    for (size_t i = 0; i < kNumbers; ++i) {
      if (tensors[i].defined()) all[i] = defaults[i];
    }
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
  const auto number = [&](size_t i) {
    return tensors.empty() || !tensors[i].defined() ? numbers[i] : std::numeric_limits<double>::quiet_NaN();
  };
  options.label_smoothing = number(kLabelSmoothing);
  options.z_loss = number(kZLoss);
  options.softcap = number(kSoftcap);
  options.logit_scale = number(kLogitScale);
  options.temperature = number(kTemperature);
  options.alpha = number(kAlpha);
  options.tensors = std::move(tensors);
  return options;
}

Options Options::with_values() && {
  if (tensors.empty()) return std::move(*this);
  std::array<double, kNumbers> all = numbers();
  for (size_t i = 0; i < kNumbers; ++i) {
    if (tensors[i].defined()) all[i] = tensors[i].item<double>();
  }
  return of(integers(), all);
}

Options Options::without_weights(at::ScalarType type) const {
  Options result;
  result.reduction = kNone;
  result.loss_dtype = type;
  result.softcap = softcap;
  result.logit_scale = logit_scale;
  if (!tensors.empty()) {
    result.tensors.resize(kNumbers);
    for (const Number number : {kSoftcap, kLogitScale}) result.tensors[number] = tensors[number];
  }
  return result;
}

bool numbers_need_composite(const Options& options) {
  if (options.tensors.empty() || !c10::GradMode::is_enabled()) return false;
  for (size_t i = 0; i < Options::kNumbers; ++i) {
    const at::Tensor& number = options.tensors[i];
    if (!number.defined() || !number.requires_grad()) continue;
    if (i != Options::kLogitScale || (is_eager(number) && number.item<double>() == 0)) return true;
  }
  return false;
}

// ---- types ----------------------------------------------------------------------------------------------------------

at::ScalarType loss_type(const Inputs& inputs, const Options& options) {
  if (options.loss_dtype) return *options.loss_dtype;
  auto type = inputs.logits.scalar_type();
  if (!is_dense(inputs.target_kind(options))) return type;
  type = c10::promoteTypes(type, inputs.target.scalar_type());
  return has_value(inputs.weight) ? c10::promoteTypes(type, inputs.weight->scalar_type()) : type;
}

at::ScalarType arithmetic_type(const Inputs& inputs, const Options& options) {
  auto type = inputs.logits.scalar_type();
  if (type != at::kDouble && is_dense(inputs.target_kind(options))) {
    Options native = options;
    native.loss_dtype = std::nullopt;
    type = loss_type(inputs, native);
  }
  return type == at::kDouble ? at::kDouble : at::kFloat;
}

Options with_loss_type(const Inputs& inputs, const Options& options) {
  Options typed = options;
  typed.loss_dtype = loss_type(inputs, options);
  return typed;
}

c10::SymDimVector shape_of_positions(const at::Tensor& logits) {
  c10::SymDimVector shape(logits.sym_sizes());
  if (!shape.empty()) shape.erase(shape.begin() + class_dim(logits));
  return shape;
}

int64_t saved_rows(TargetKind target_kind, const Options& options) {
  if (target_kind == TargetKind::kTeacher) return saved::kTeacherLseLost + 1;
  if (options.statistics) return saved::kArgmax + 1;
  return target_kind == TargetKind::kProbabilities || options.is_shard() ? saved::kMass + 1 : saved::kLseLost + 1;
}

// ---- checks ---------------------------------------------------------------------------------------------------------

void check_options(const Options& options) {
  if (!options.tensors.empty()) {
    // A compiler or a transform leaves values open. The kernels check the values that they get.
    const bool known = std::all_of(options.tensors.begin(), options.tensors.end(),
                                   [](const at::Tensor& number) { return !number.defined() || is_eager(number); });
    if (!known) return check_options(Options::of(options.integers(), options.numbers()));
    const Options valued = Options(options).with_values();
    TORCH_CHECK_VALUE(!options.tensor(Options::kSoftcap) || valued.softcap > 0,
                      "softcap must be None or a finite number above 0, but got ", valued.softcap);
    return check_options(valued);
  }
  TORCH_CHECK(options.reduction >= kNone && options.reduction <= kSum,
              "reduction must be 0, 1 or 2. Got: ", options.reduction);
  TORCH_CHECK(!options.loss_dtype || is_logits_type(*options.loss_dtype),
              "loss_dtype must be float16, bfloat16, float32 or float64. Got: ", *options.loss_dtype);
  TORCH_CHECK(options.label_smoothing >= 0,
              "label_smoothing must be between 0.0 and 1.0. Got: ", options.label_smoothing);
  if (options.is_plain()) return;
  TORCH_CHECK(options.label_smoothing <= 1,
              "label_smoothing must be between 0.0 and 1.0. Got: ", options.label_smoothing);
  TORCH_CHECK_VALUE(std::isfinite(options.z_loss) && options.z_loss >= 0,
                    "z_loss must be a finite number of at least 0, but got ", options.z_loss);
  TORCH_CHECK_VALUE(std::isfinite(options.softcap) && options.softcap >= 0,
                    "softcap must be None or a finite number above 0, but got ", options.softcap);
  TORCH_CHECK_VALUE(std::isfinite(options.logit_scale), "logit_scale must be a finite number, but got ",
                    options.logit_scale);
  if (options.target_kind == TargetKind::kTeacher) {
    TORCH_CHECK_VALUE(std::isfinite(options.temperature) && options.temperature > 0,
                      "temperature must be a finite number above 0, but got ", options.temperature);
    TORCH_CHECK_VALUE(options.alpha >= 0 && options.alpha <= 1, "alpha must be between 0 and 1, but got ",
                      options.alpha);
  }
}

void check(const Inputs& inputs, const Options& options) {
  check_options(options);
  TORCH_CHECK_VALUE(!options.is_shard(), "cross_entropy_ext: only _forward and _backward take a shard of the classes");
  if (options.target_kind == TargetKind::kNone && !has_value(inputs.sample_weight) && !has_value(inputs.divisor))
    return;
  const at::Tensor &logits = inputs.logits, &target = inputs.target;
  const OptionalTensor &weight = inputs.weight, &companion = inputs.companion, &sample_weight = inputs.sample_weight;
  const auto positions = [&] { return c10::str(c10::SymIntArrayRef(shape_of_positions(logits))); };
  const auto check_type = [](const at::Tensor& tensor, bool is_right, const char* name, const char* accepted) {
    TORCH_CHECK_VALUE(is_right, name, " must be a tensor of ", accepted, ", but got ", tensor.scalar_type());
  };
  if (options.target_kind == TargetKind::kPairs || options.target_kind == TargetKind::kTeacher) {
    const char* const name = options.target_kind == TargetKind::kPairs ? "input" : "student_logits";
    TORCH_CHECK_VALUE(logits.dim() >= 1, name, " must have a class dimension, but got a scalar");
    check_type(logits, logits.is_floating_point(), name, "a floating type");
  }
  if (options.target_kind == TargetKind::kPairs) {
    check_type(target, is_index_type(target.scalar_type()), "indices", "int64, int32, int16, int8 or uint8");
    TORCH_CHECK_VALUE(is_shape_of_pairs(logits, target), "indices must have the input's shape ", logits.sym_sizes(),
                      " with k in the place of its classes, but got ", target.sym_sizes());
    TORCH_CHECK_VALUE(target.sym_size(class_dim(logits)) > 0,
                      "indices must have at least one class for each position (k > 0), but got the shape ",
                      target.sym_sizes());
    TORCH_CHECK_VALUE(has_value(companion), "probs must be a tensor of the shape of indices, but got None");
    check_type(*companion, companion->is_floating_point(), "probs", "a floating type");
    TORCH_CHECK_VALUE(has_shape_of_logits(target, *companion), "probs must have the shape of indices, ",
                      target.sym_sizes(), ", but got ", companion->sym_sizes());
  }
  if (options.target_kind == TargetKind::kTeacher) {
    check_type(target, target.is_floating_point(), "teacher_logits", "a floating type");
    TORCH_CHECK_VALUE(has_shape_of_logits(logits, target), "teacher_logits must have the shape of student_logits, ",
                      logits.sym_sizes(), ", but got ", target.sym_sizes());
    if (has_value(companion)) {
      check_type(*companion, is_index_type(companion->scalar_type()), "target", "int64, int32, int16, int8 or uint8");
      TORCH_CHECK_VALUE(is_shape_of_positions(logits, *companion), "target must have a class for each position, ",
                        positions(), ", but got the shape ", companion->sym_sizes());
    }
  }
  if (has_value(weight) && options.target_kind == TargetKind::kPairs) {
    check_type(*weight, !weight->is_complex(), "weight", "a real type");
    TORCH_CHECK_VALUE(weight->dim() == 1 && weight->sym_size(0) == logits.sym_size(class_dim(logits)),
                      "weight must have one element for each of the ", logits.sym_size(class_dim(logits)),
                      " classes, but got the shape ", weight->sym_sizes());
  }
  if (has_value(sample_weight)) {
    check_type(*sample_weight, sample_weight->is_floating_point(), "sample_weight", "a floating type");
    TORCH_CHECK_VALUE(is_shape_of_positions(logits, *sample_weight),
                      "sample_weight must have a factor for each position, ", positions(), ", but got the shape ",
                      sample_weight->sym_sizes());
  }
  if (has_value(inputs.divisor)) {
    TORCH_CHECK_VALUE(options.reduction == kMean,
                      "denominator is what reduction 'mean' divides by, but got another one");
    check_type(*inputs.divisor, inputs.divisor->scalar_type() == at::kDouble, "denominator", "float64");
    TORCH_CHECK_VALUE(inputs.divisor->dim() == 0,
                      "denominator must be a number or a scalar tensor, of shape (), but got the shape ",
                      inputs.divisor->sym_sizes());
    TORCH_CHECK_VALUE(inputs.divisor->device() == logits.device(), "denominator must be on the input's device, ",
                      logits.device(), ", but is on ", inputs.divisor->device());
  }
}

bool is_supported(const Inputs& inputs, const Options& options) {
  return has_kernel(inputs.logits.device()) && is_valid(inputs, options);
}

bool is_valid(const Inputs& inputs, const Options& options) {
  constexpr int64_t kMostDims = kMaxDims + 1;
  const at::Tensor &logits = inputs.logits, &target = inputs.target;
  const OptionalTensor &weight = inputs.weight, &companion = inputs.companion, &sample_weight = inputs.sample_weight;
  if (!is_plain(logits, logits) || !is_plain(target, logits)) return false;
  if (!is_logits_type(logits.scalar_type()) || logits.dim() < 1 || logits.dim() > kMostDims) return false;
  const bool smooths = options.label_smoothing >= 0 && options.label_smoothing <= 1;
  if (!smooths && !options.tensor(Options::kLabelSmoothing)) return false;
  if (numbers_need_composite(options)) return false;
  const auto classes = logits.sym_size(class_dim(logits));
  if (classes == 0) return false;
  const auto is_of_positions = [&](const at::Tensor& tensor) {
    return is_plain(tensor, logits) && is_shape_of_positions(logits, tensor);
  };
  const bool grad = c10::GradMode::is_enabled();
  if (has_value(sample_weight)) {
    if (!is_of_positions(*sample_weight) || !is_logits_type(sample_weight->scalar_type())) return false;
    if (grad && sample_weight->requires_grad()) return false;
  }
  if (has_value(inputs.divisor) && grad && inputs.divisor->requires_grad()) return false;
  const TargetKind target_kind = inputs.target_kind(options);
  switch (target_kind) {
    case TargetKind::kProbabilities:
      if (!is_logits_type(target.scalar_type()) || options.ignore_index >= 0) return false;
      break;
    case TargetKind::kIndices:
      if (!is_index_type(target.scalar_type()) || !is_shape_of_positions(logits, target)) return false;
      break;
    case TargetKind::kPairs:
      if (!is_index_type(target.scalar_type()) || !is_shape_of_pairs(logits, target)) return false;
      if (!has_value(companion) || !is_plain(*companion, logits) || !is_logits_type(companion->scalar_type()) ||
          !has_shape_of_logits(target, *companion) || target.sym_size(class_dim(logits)) == 0) {
        return false;
      }
      break;
    default:
      if (!is_logits_type(target.scalar_type()) || !has_shape_of_logits(logits, target) || has_value(weight)) {
        return false;
      }
      if (has_value(companion) && (!is_of_positions(*companion) || !is_index_type(companion->scalar_type()))) {
        return false;
      }
  }
  if (!has_value(weight)) return true;
  const auto all_classes = options.is_shard() ? c10::SymInt(options.total_classes) : classes;
  if (!is_plain(*weight, logits) || weight->dim() != 1 || weight->sym_size(0) != all_classes) return false;
  if (target_kind == TargetKind::kProbabilities && options.is_plain() && !has_value(sample_weight))
    return !weight->is_complex();
  if (grad && weight->requires_grad()) return false;
  if (target_kind != TargetKind::kIndices || options.is_shard()) return !weight->is_complex();
  // Native asks for the logits' type; where the loss is wanted in float32 or wider, weights of that type go with it.
  return weight->scalar_type() == logits.scalar_type() ||
         (weight->scalar_type() == at::kFloat && logits.scalar_type() != at::kDouble &&
          (options.loss_dtype == at::kFloat || options.loss_dtype == at::kDouble));
}

}  // namespace xent
