// The one adapter between the dispatcher and kernels.
//
// Kernels are functions of (Inputs, Options), or (Gradients, Inputs, Options), and perhaps more. Private operators take
// tensors, a list of optional tensors, and the options as two lists of numbers.
#pragma once

#include <array>
#include <tuple>
#include <utility>

#include "arguments.h"

namespace xent {

// Besides the inputs, a backward is given these. `grad_statistics`: (3, positions) in the type of arithmetic, see
// GradStatistic; or undefined.
struct Gradients {
  at::Tensor grad_output, grad_statistics, lse, denominator;
};

// Results of the private operators, see operators.h.
using ForwardResult = std::tuple<at::Tensor, at::Tensor, at::Tensor>;                      // loss, lse, denominator
using ForwardBackwardResult = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;  // and the logits' gradient
using BackwardResult = std::tuple<at::Tensor, at::Tensor>;  // gradients of the logits and the target

// Raise an error unless a private operator was called with arguments that the public one passes on.
void check_forward(const Inputs& inputs, const Options& options);
// `finds_lse`: the kernel forms lse from the logits if it is empty.
void check_backward(const Gradients& gradients, const Inputs& inputs, const Options& options, bool target_wanted,
                    bool finds_lse = false);

// The gradients of statistics travel by themselves, for PyTorch's batched gradients do not look into lists. Where there
// are none, the denominator stands in their place, which is a scalar.
inline at::Tensor unless_scalar(const at::Tensor& grad_statistics) {
  return grad_statistics.dim() == 0 ? at::Tensor() : grad_statistics;
}

struct Call {
  Inputs inputs;
  Options options;

  // `others`: weight, companion, sample_weight, denominator and the numbers, up to the last that there is.
  Call(const at::Tensor& logits, const at::Tensor& target, std::vector<at::Tensor> others, at::IntArrayRef integers,
       at::ArrayRef<double> numbers);
  Call(Layer layer, const at::Tensor& target, std::vector<at::Tensor> others, at::IntArrayRef integers,
       at::ArrayRef<double> numbers, int64_t chunk);
};

// Adapter<kernel>::call is what the dispatcher calls; with `meta`, options keep the tensors whose values are not known.
template <auto kernel, bool meta = false>
struct Adapter;

template <bool meta>
Options options_for_kernel(Options options) {
  if constexpr (meta) return options;
  return std::move(options).with_values();
}

template <class Result, class... Rest, Result (*kernel)(const Inputs&, const Options&, Rest...), bool meta>
struct Adapter<kernel, meta> {
  static Result call(const at::Tensor& logits, const at::Tensor& target, const OptionalTensors& others,
                     at::IntArrayRef integers, at::ArrayRef<double> numbers, Rest... rest) {
    Call call(logits, target, to_tensors(others), integers, numbers);
    const Options options = options_for_kernel<meta>(std::move(call.options));
    if constexpr (!meta) check_forward(call.inputs, options);
    return kernel(call.inputs, options, rest...);
  }

  static Result call_of_layer(const at::Tensor& input, const at::Tensor& linear_weight,
                              const OptionalTensors& linear_bias, const at::Tensor& target,
                              const OptionalTensors& others, at::IntArrayRef integers, at::ArrayRef<double> numbers,
                              int64_t chunk, Rest... rest) {
    Call call({input, linear_weight, element_of(linear_bias, 0)}, target, to_tensors(others), integers, numbers, chunk);
    const Options options = options_for_kernel<meta>(std::move(call.options));
    if constexpr (!meta) check_forward(call.inputs, options);
    return kernel(call.inputs, options, rest...);
  }
};

template <class Result, class... Rest, Result (*kernel)(const Gradients&, const Inputs&, const Options&, Rest...),
          bool meta>
struct Adapter<kernel, meta> {
  static Result call(const at::Tensor& grad_output, const at::Tensor& grad_statistics, const at::Tensor& logits,
                     const at::Tensor& target, const OptionalTensors& others, const at::Tensor& lse,
                     const at::Tensor& denominator, at::IntArrayRef integers, at::ArrayRef<double> numbers,
                     Rest... rest) {
    Call call(logits, target, to_tensors(others), integers, numbers);
    return kernel({grad_output, unless_scalar(grad_statistics), lse, denominator}, call.inputs,
                  options_for_kernel<meta>(std::move(call.options)), rest...);
  }

  static Result call_of_layer(const at::Tensor& grad_output, const at::Tensor& grad_statistics, const at::Tensor& input,
                              const at::Tensor& linear_weight, const OptionalTensors& linear_bias,
                              const at::Tensor& target, const OptionalTensors& others, const at::Tensor& lse,
                              const at::Tensor& denominator, at::IntArrayRef integers, at::ArrayRef<double> numbers,
                              int64_t chunk, Rest... rest) {
    Call call({input, linear_weight, element_of(linear_bias, 0)}, target, to_tensors(others), integers, numbers, chunk);
    return kernel({grad_output, unless_scalar(grad_statistics), lse, denominator}, call.inputs,
                  options_for_kernel<meta>(std::move(call.options)), rest...);
  }
};

}  // namespace xent
