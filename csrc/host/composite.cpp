#include "composite.h"

#include <ATen/TensorOperators.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/argmax.h>
#include <ATen/ops/cross_entropy_loss.h>
#include <ATen/ops/full_like.h>
#include <ATen/ops/gather.h>
#include <ATen/ops/log1p.h>
#include <ATen/ops/log_softmax.h>
#include <ATen/ops/logsumexp.h>
#include <ATen/ops/ne.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/scatter.h>
#include <ATen/ops/tanh.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include <algorithm>
#include <utility>
#include <variant>

#include "arguments.h"
#include "denominator.h"

namespace xent {
namespace {

// a * b, where zero times infinity is zero; at any other b, zero has the derivative b.
at::Tensor product(const at::Tensor& a, const at::Tensor& b) {
  return a * at::where(a.eq(0).logical_and(b.isinf()), at::zeros_like(b), b);
}

// The logarithm of the softmax, and lse. A sum without the largest logit's own 1 makes what is small exact: that
// logit's log-probability is -log1p(S), and its gradient S / (1 + S), where at::log_softmax has 0 for both.
std::pair<at::Tensor, at::Tensor> log_softmax_and_lse(const at::Tensor& x, int64_t dim) {
  // Gradients have the layout of this mask, which is that of the logits: of two layouts an operation takes the first,
  // and what scatter and gather make is contiguous.
  const at::Tensor all = at::ones_like(x, at::kBool);
  const at::Tensor is_other = all.logical_and(at::scatter(all, dim, at::argmax(x, dim, true), 0));
  const at::Tensor top = zero_unless(is_other.logical_not(), x).sum(dim, true);
  const at::Tensor below = zero_unless(is_other, x - top);
  const at::Tensor others = zero_unless(is_other, below.exp()).sum(dim, true);
  const at::Tensor log_s = at::log1p(others + (top - top));  // NaN for an infinite maximum
  // Without a majority, the largest logit's gradient would be a difference of larger numbers.
  const at::Tensor is_confident = others.lt(1);
  return {at::where(is_confident, below - log_s, at::log_softmax(x, dim)),
          at::where(is_confident, top + log_s, at::logsumexp(x, {dim}, true))};
}

// A number of the options, or the tensor that it comes as.
class Number {
 public:
  Number(double value) : is_(value) {}
  Number(at::Tensor tensor) : is_(std::move(tensor)) {}

  static Number of(const Options& options, double Numbers::* number) {
    const at::Tensor& tensor = options.tensor(number);
    return tensor.defined() ? Number(tensor) : Number(options.*number);
  }

  bool is_tensor() const { return std::holds_alternative<at::Tensor>(is_); }
  Number detached() const { return is_tensor() ? Number(std::get<at::Tensor>(is_).detach()) : *this; }

  friend Number operator*(const Number& a, const Number& b) {
    return std::visit([](const auto& x, const auto& y) -> Number { return x * y; }, a.is_, b.is_);
  }
  friend Number operator/(const Number& a, const Number& b) {
    return std::visit([](const auto& x, const auto& y) -> Number { return x / y; }, a.is_, b.is_);
  }
  friend Number operator-(const Number& a, const Number& b) {
    return std::visit([](const auto& x, const auto& y) -> Number { return x - y; }, a.is_, b.is_);
  }
  friend at::Tensor operator*(const at::Tensor& a, const Number& b) {
    return std::visit([&](const auto& y) -> at::Tensor { return a * y; }, b.is_);
  }
  friend at::Tensor operator/(const at::Tensor& a, const Number& b) {
    return std::visit([&](const auto& y) -> at::Tensor { return a / y; }, b.is_);
  }
  friend at::Tensor operator+(const at::Tensor& a, const Number& b) {
    return std::visit([&](const auto& y) -> at::Tensor { return a + y; }, b.is_);
  }

 private:
  std::variant<double, at::Tensor> is_;
};

// operation(x, number), where an infinite x has no part in the gradient of the number, which would be zero times
// infinity.
template <class Operation>
at::Tensor with_number(const at::Tensor& x, const Number& number, const Operation& operation) {
  if (!number.is_tensor()) return operation(x, number);
  const at::Tensor infinite = x.isinf();
  return at::where(infinite, operation(x, number.detached()),
                   operation(zero_unless(infinite.logical_not(), x), number));
}

constexpr auto kTimes = [](const at::Tensor& x, const Number& number) { return x * number; };
constexpr auto kDividedBy = [](const at::Tensor& x, const Number& number) { return x / number; };

// The error of the kernels, where values can be asked for; elsewhere whatever uses them raises its own.
void check_classes(const at::Tensor& index, const at::Tensor& counts, const at::Tensor& logits) {
  if (!index.is_cpu() || !is_eager(index)) return;
  const int64_t classes = logits.size(class_dim(logits));
  const at::Tensor bad = index.masked_select(counts.logical_and(index.lt(0).logical_or(index.ge(classes))));
  if (bad.numel() > 0) TORCH_CHECK_INDEX(false, "Target ", bad[0].item<int64_t>(), " is out of bounds.");
}

// The divergence of softmax(z / T) from softmax(x / T) as the kernels have it: see online_softmax.h.
at::Tensor divergence_of(const at::Tensor& x, const at::Tensor& z, const Number& temperature, int64_t dim) {
  const Number inverse = Number(1) / temperature;
  struct Softmax {
    at::Tensor difference, lost, rest;  // log softmax = (difference + lost) / T - rest

    Softmax(const at::Tensor& logits, const Number& temperature, const Number& inverse, int64_t dim) {
      const at::Tensor lse = log_softmax_and_lse(logits * inverse, dim).second;
      const at::Tensor origin = lse * temperature;
      rest = lse - origin * inverse;
      difference = logits - origin;
      const at::Tensor subtracted = difference - logits;
      lost = (logits - (difference - subtracted)) - (origin + subtracted);
      lost = zero_unless(lost.isfinite(), lost);
    }
    at::Tensor softmax(const Number& inverse) const { return ((difference + lost) * inverse - rest).exp(); }
  };
  const Softmax student(x, temperature, inverse, dim), teacher(z, temperature, inverse, dim);
  const at::Tensor p = student.softmax(inverse), q = teacher.softmax(inverse);
  const at::Tensor r = ((teacher.difference - student.difference) + (teacher.lost - student.lost)) * inverse -
                       (teacher.rest - student.rest);
  const int last = x.scalar_type() == at::kDouble ? 19 : 11;
  double coefficient = 1;
  for (int k = 2; k <= last; ++k) coefficient /= k;
  at::Tensor series = r * -coefficient + (coefficient * last);
  coefficient *= last;
  for (int k = last - 1; k > 2; --k) series = (r * series).neg() + (coefficient *= k);
  const at::Tensor near = r.abs().lt(1), bend = r * r * series;
  const at::Tensor none = q.eq(0), change = at::where(none, p, at::where(near, q * (bend - r), p - q));
  const at::Tensor excess = at::where(none, p, at::where(near, q * bend, (p - q + q * r).clamp_min(0)));
  const at::Tensor mass = q.sum(dim, true), s = change.sum(dim, true) / mass;
  return (excess.sum(dim, true) / mass - s * s * (s * (s * 0.25 - 1.0 / 3) + 0.5)).clamp_min(0);
}

// Makes the loss of every position. Class dimensions of size one are kept until the end.
class Composite {
 public:
  // `are_log_probs`: the logits are normalized already, as nll_loss takes them; of such there is the loss alone.
  Composite(const Inputs& in, const Options& options, bool are_log_probs = false)
      : in_(in),
        options_(options),
        target_kind_(in.target_kind(options)),
        dim_(class_dim(in.logits)),
        type_(arithmetic_type(in, options)),
        label_smoothing_(Number::of(options, &Numbers::label_smoothing)),
        z_loss_(Number::of(options, &Numbers::z_loss)),
        softcap_(Number::of(options, &Numbers::softcap)),
        logit_scale_(Number::of(options, &Numbers::logit_scale)),
        temperature_(Number::of(options, &Numbers::temperature)),
        alpha_(Number::of(options, &Numbers::alpha)) {
    const at::Tensor& labels = has_labels() ? in.labels() : in.target;
    if (target_kind_ == TargetKind::kIndices || target_kind_ == TargetKind::kPairs || has_labels()) {
      index_ = labels.to(at::kLong);
      if (target_kind_ != TargetKind::kPairs) index_ = index_.unsqueeze(dim_);
      const at::Tensor counts = index_.ne(options.ignore_index);
      check_classes(index_, counts, in.logits);
      index_ = zero_unless(counts, index_);
      probs_ = counts.to(type_);
      if (target_kind_ == TargetKind::kPairs) probs_ = zero_unless(counts, in.pair_probs().to(type_));
      valid_ = target_kind_ == TargetKind::kPairs ? counts.any(dim_, true) : counts;
    }
    raw_ = zero_unless(valid_, in.logits.to(type_));
    if (is_dense(target_kind_)) target_ = zero_unless(valid_, in.target.to(type_));
    logits_ = with_number(raw_, target_kind_ == TargetKind::kTeacher ? Number(1) / temperature_ : logit_scale_, kTimes);
    if (options.softcap != 0) logits_ = at::tanh(with_number(logits_, softcap_, kDividedBy)) * softcap_;
    if (are_log_probs) {
      log_p_ = logits_;
    } else {
      std::tie(log_p_, lse_) = log_softmax_and_lse(logits_, dim_);
    }
    if (in.weight.defined()) {
      std::vector<int64_t> shape(size_t(in.logits.dim()), 1);
      shape[size_t(dim_)] = -1;
      weight_ = in.weight.to(type_).view(shape);
    }
    if (in.sample_weight.defined()) sample_weight_ = in.sample_weight.to(type_).unsqueeze(dim_);
  }

  at::Tensor loss() const { return typed(reduce(target_loss())); }

  Outputs outputs() const {
    const at::Tensor z_loss = lse_ * lse_ * z_loss_;
    const bool apart = has_two_denominators(in_, options_);
    at::Tensor loss = target_loss();
    if (options_.z_loss != 0 && !apart) loss = loss + z_loss;
    loss = reduce(loss);
    if (apart) loss = loss + reduce(z_loss, /*by_class_weights=*/false);
    Outputs outputs;
    outputs.loss = typed(loss);
    if (!options_.statistics) return outputs;
    const auto of_positions = [&](const at::Tensor& tensor) { return zero_unless(valid_, tensor).squeeze(dim_); };
    outputs.lse = of_positions(lse_);
    outputs.target_log_prob = of_positions(target_log_prob());
    outputs.entropy = of_positions(-product(log_p_.exp(), log_p_).sum(dim_, true));
    outputs.z_loss = typed(reduce(z_loss, !apart).detach());
    const at::Tensor argmax = at::argmax(logits_.detach(), dim_, true);
    outputs.argmax = (valid_.defined() ? at::where(valid_, argmax, at::full_like(argmax, options_.no_class())) : argmax)
                         .squeeze(dim_);
    return outputs;
  }

 private:
  // The number of classes is the only size that a graph with symbolic sizes has to know.
  double classes() const { return double(in_.logits.sym_size(dim_).guard_int(__FILE__, __LINE__)); }

  bool has_labels() const { return target_kind_ == TargetKind::kTeacher && in_.labels().defined(); }

  at::Tensor smoothing() const {  // e / C sum_c w_c (lse - x_c)
    const at::Tensor terms = weight_.defined() ? product(weight_.expand_as(log_p_), log_p_) : log_p_;
    return terms.sum(dim_, true) * (label_smoothing_ / -classes());
  }

  at::Tensor target_log_prob() const {
    if (target_kind_ == TargetKind::kProbabilities) return product(target_, log_p_).sum(dim_, true);
    return product(probs_, at::gather(log_p_, dim_, index_)).sum(dim_, true);
  }

  at::Tensor target_loss() const {
    const Number keep = Number(1) - label_smoothing_;
    if (target_kind_ == TargetKind::kTeacher) return teacher_loss();
    if (target_kind_ == TargetKind::kProbabilities) {
      at::Tensor a = target_ * keep + label_smoothing_ / classes();
      if (weight_.defined()) a = a * weight_;
      return -product(a, log_p_).sum(dim_, true);
    }
    at::Tensor hits = probs_ * keep;
    if (weight_.defined()) hits = hits * at::gather(weight_.expand_as(log_p_), dim_, index_);
    const at::Tensor loss = -product(hits, at::gather(log_p_, dim_, index_)).sum(dim_, true);
    return options_.label_smoothing != 0 ? loss + smoothing() : loss;
  }

  at::Tensor teacher_loss() const {
    const Number square = temperature_ * temperature_;
    const at::Tensor log_q = log_softmax_and_lse(with_number(target_, temperature_, kDividedBy), dim_).first;
    const at::Tensor q = log_q.exp(), terms = zero_unless(q.ne(0), options_.kl ? log_q - log_p_ : -log_p_);
    const at::Tensor written = (q * terms).sum(dim_, true);
    const at::Tensor loss = (options_.kl ? divergence(written) : written) * square;
    if (!has_labels()) return loss;
    return loss * alpha_ - at::gather(log_softmax_and_lse(raw_, dim_).first, dim_, index_) * (Number(1) - alpha_);
  }

  // With the derivatives of the formula as it is written, and a value without its cancellation.
  at::Tensor divergence(const at::Tensor& written) const {
    const at::Tensor value = divergence_of(raw_.detach(), target_.detach(), temperature_, dim_).detach();
    return at::where(written.isfinite(), value + (written - written.detach()), written);
  }

  at::Tensor typed(const at::Tensor& result) const { return result.to(loss_type(in_, options_)); }

  at::Tensor reduce(at::Tensor loss, bool by_class_weights = true) const {
    if (sample_weight_.defined()) loss = loss * sample_weight_;
    loss = zero_unless(valid_, loss);
    if (options_.reduction == kNone) return loss.squeeze(dim_);
    const at::Tensor sum = loss.sum();
    if (options_.reduction == kSum) return sum;
    if (in_.denominator.defined()) return sum / safe_denominator(in_.denominator, sum, options_.empty_is_zero);
    at::Tensor counts = sample_weight_.defined() ? sample_weight_ : at::ones_like(loss);
    if (target_kind_ == TargetKind::kIndices && weight_.defined() && by_class_weights) {
      counts = counts * at::gather(weight_.expand_as(log_p_), dim_, index_);
    }
    const at::Tensor denominator = zero_unless(valid_, counts).sum();
    return sum / safe_denominator(denominator, sum, options_.empty_is_zero);
  }

  const Inputs& in_;
  const Options& options_;
  TargetKind target_kind_;
  int64_t dim_;
  at::ScalarType type_;
  Number label_smoothing_, z_loss_, softcap_, logit_scale_, temperature_, alpha_;
  at::Tensor raw_, logits_, log_p_, lse_;  // raw_: before they are transformed
  at::Tensor target_;                      // probabilities, or the teacher's logits
  at::Tensor index_, probs_, valid_;       // of labels and pairs; undefined for others
  at::Tensor weight_, sample_weight_;      // undefined for ones
};

}  // namespace

Outputs composite(const Inputs& inputs, const Options& options) { return Composite(inputs, options).outputs(); }

at::Tensor composite_nll_loss(const Inputs& inputs, const Options& options) {
  return Composite(inputs, options, /*are_log_probs=*/true).loss();
}

Outputs fallback(const Inputs& given, const Options& asked) {
  // Transforms and subclasses come before autocast.
  const auto device = given.logits.device().type();
  const bool autocast = at::autocast::is_autocast_available(device) && at::autocast::is_autocast_enabled(device);
  const Inputs made = given.with_logits();
  const auto [inputs, options] = autocast ? with_autocast(made, asked) : std::pair(made, asked);
  const Inputs natives{inputs.logits, inputs.target, inputs.weight};
  const Options known = options.without_tensors();
  if (options.target_kind == TargetKind::kNone && !is_valid(natives, known)) {
    const at::Tensor loss = native_cross_entropy(natives, known);
    if (options.is_plain() && !inputs.sample_weight.defined() && !inputs.denominator.defined())
      return Outputs::only(loss);
  }
  return composite(inputs, options);
}

at::Tensor native_cross_entropy(const Inputs& in, const Options& options) {
  const bool widen = is_index_type(in.target.scalar_type()) && in.target_kind(options) != TargetKind::kProbabilities;
  const at::Tensor target = widen ? in.target.to(at::kLong) : in.target;
  const auto native = [&](int64_t reduction) {
    return at::cross_entropy_loss(in.logits, target, optional(in.weight), reduction, options.ignore_index,
                                  options.label_smoothing);
  };
  at::Tensor loss = native(options.reduction);
  if (options.empty_is_zero && options.reduction == kMean) {
    const at::Tensor sum = native(kSum);
    loss = at::where(loss.isnan().logical_and(sum.eq(0)), sum, loss);
  }
  return options.loss_dtype ? loss.to(*options.loss_dtype) : loss;
}

at::Tensor sum_of_products(const at::Tensor& gradient, const at::Tensor& tensor) {
  const auto type = gradient.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const auto products = [&](const at::Tensor& a, const at::Tensor& b) {  // zero times infinity is zero
    return at::where(a.eq(0), at::zeros_like(a, at::TensorOptions(type)), a.to(type) * b.to(type)).sum(at::kDouble);
  };
  if (c10::GradMode::is_enabled() || !is_eager(gradient) || gradient.dim() == 0) return products(gradient, tensor);
  constexpr int64_t kElements = int64_t{1} << 20;  // at a time
  const int64_t N = gradient.size(0);
  const int64_t elements_of_row = std::max<int64_t>(1, gradient.numel() / std::max<int64_t>(1, N));
  const int64_t rows = std::max<int64_t>(1, kElements / elements_of_row);
  at::Tensor sum = at::zeros({}, gradient.options().dtype(at::kDouble));
  for (int64_t n = 0; n < N; n += rows) {
    const int64_t count = std::min(rows, N - n);
    sum.add_(products(gradient.narrow(0, n, count), tensor.narrow(0, n, count)));
  }
  return sum;
}

at::Tensor scale_gradient(const at::Tensor& sum, const at::Tensor& logit_scale) {
  return (sum.to(logit_scale.device()) / logit_scale).to(logit_scale.scalar_type());
}

Outputs outputs_of(const at::Tensor& loss, const at::Tensor& lse, const at::Tensor& denominator, const Inputs& inputs,
                   const Options& options) {
  const auto shape = shape_of_positions(inputs.logits);
  const auto row = [&](int64_t r) { return lse.select(0, r).view_symint(shape); };
  const at::Tensor sum = row(saved::kLse) + row(saved::kLseLost);
  at::Tensor z_loss =
      sum.to(at::kDouble, /*non_blocking=*/false, /*copy=*/true).square() * Number::of(options, &Numbers::z_loss);
  if (inputs.sample_weight.defined()) {  // which may be NaN at an ignored position, where the sum is zero
    z_loss = zero_unless(sum.ne(0), z_loss * inputs.sample_weight);
  }
  if (options.reduction != kNone) z_loss = z_loss.sum() / denominator;
  if (loss.scalar_type() != at::kDouble) z_loss = z_loss.to(loss.scalar_type());
  at::Tensor argmax = lse.view(lse.scalar_type() == at::kDouble ? at::kLong : at::kInt)
                          .select(0, saved::kArgmax)
                          .view_symint(shape)
                          .to(at::kLong, /*non_blocking=*/false, /*copy=*/true);
  if (options.no_class() != -1) argmax = argmax.masked_fill(argmax.lt(0), options.no_class());  // kernels save -1
  return {loss, sum, row(saved::kTargetLogProb).clone(), row(saved::kEntropy).clone(), z_loss, argmax};
}

}  // namespace xent
