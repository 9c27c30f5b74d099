// Whatever is more than the plain loss, for rows: any form of target, transformed logits, statistics, and the gradient
// of any mixture of them. As in rows.inl vector lanes are classes, in blocks that stay in the first-level cache; logits
// are transformed and coefficients made there, so that nothing of the logits' size is ever stored but the gradient.
//
// A position's sums are those of rows.inl and two more; its gradient is
//
//   d/dx_c = softmax_c (P + E log softmax_c) - D a_c      less at a label's or a pair's class
//
// times the derivative of the transform. Options are asked for once for each vector or position, never by element.

// ---- coefficients ---------------------------------------------------------------------------------------------------

// Of a block: those that every class may have, or null where they are zero; for a teacher their logarithms, too.
template <class T>
struct Coefficients {
  const T* a = nullptr;
  const T* log_q = nullptr;
};

template <class T>
class CoefficientReader {
 public:
  explicit CoefficientReader(const Problem& problem) : problem_(problem) {}

  // For the classes [c, c + n) of the position whose target is at `offset`.
  XENT_INLINE_MEMBER Coefficients<T> read(int64_t position, int64_t offset, int64_t c, int64_t n) {
    switch (problem_.form) {
      case Form::kNone: return {};
      case Form::kTeacher: return softmax_of_teacher(position, offset + c * problem_.target.class_stride, n);
      case Form::kProbabilities: return {dense_coefficients(buffers_[0], problem_, offset, c, n)};
      default:
        if (problem_.label_smoothing == 0) return {};
        return {dense_coefficients(buffers_[0], problem_, offset, c, n)};
    }
  }

 private:
  XENT_INLINE_MEMBER Coefficients<T> softmax_of_teacher(int64_t position, int64_t offset, int64_t n) {
    constexpr int W = kLanes<T>;
    const T scale = T(problem_.logit_scale), rounded = saved_row<T>(problem_, saved::kTeacherLse)[position];
    const T lost = saved_row<T>(problem_, saved::kTeacherLseLost)[position];
    const T* z = read_or_point(buffers_[1], problem_.target, offset, problem_.target.class_stride, n);
    for (int64_t i = 0; i < n; i += W) {
      const int64_t count = n - i;
      const Vector<T> log_q = ((count >= W ? load(z + i) : load_partial(z + i, count, T(0))) * scale - rounded) - lost;
      store_partial(buffers_[1] + i, log_q, count);
      store_partial(buffers_[0] + i, exp(log_q), count);
    }
    return {buffers_[0], buffers_[1]};
  }

  const Problem& problem_;
  alignas(64) T buffers_[2][kBlock<T>];
};

// ---- sums -----------------------------------------------------------------------------------------------------------

// Which sums are asked for besides those of rows.inl.
template <class T>
struct Wanted {
  bool energy;    // for the entropy
  T temperature;  // of the logits, where labels want them without it; else zero
};

// `energy`: sum of exp(x - max) (max - x). `label_rest`: of exp(T (x - max)), without the ties.
template <class T>
struct GeneralLaneSums : LaneSums<T, true> {
  Vector<T> energy{}, label_rest{};

  // Of a teacher's divergence log_q is not zero, and its spread sum of q (max - x + log q): where the distributions are
  // nearly the same, its terms are nearly log_sum each, and do not cancel.
  XENT_INLINE_MEMBER void add(Vector<T> x, Vector<T> max, Vector<T> a, Vector<T> log_q, const Wanted<T>& wanted) {
    const Vector<T> zero{}, difference = x - max, exponential = exp(difference);
    const auto other = difference != zero;
    this->rest = select(other, this->rest + exponential, this->rest);
    this->others = select(other, this->others + 1, this->others);
    const Vector<T> length = log_q - difference;
    this->spread = select((a != zero) & (length != zero), this->spread + a * length, this->spread);
    this->mass += a;
    if (wanted.energy) energy = select(exponential != zero, energy - exponential * difference, energy);
    if (wanted.temperature != 0) {
      label_rest = select(other, label_rest + exp(difference * wanted.temperature), label_rest);
    }
  }

  XENT_INLINE_MEMBER void add(const GeneralLaneSums& part) {
    LaneSums<T, true>::add(part);
    energy += part.energy;
    label_rest += part.label_rest;
  }
};

template <class T>
struct GeneralRowSums : RowSums<T> {
  double energy = 0, label_rest = 0;

  XENT_INLINE_MEMBER void raise_max(T to, const Wanted<T>& wanted) {
    if (this->ties != 0) {
      const double raised = double(to) - double(this->max);
      energy = (energy + raised * (this->rest + this->ties)) * ::exp(-raised);
      label_rest = (label_rest + this->ties) * ::exp(-raised * double(wanted.temperature));
    }
    RowSums<T>::raise_max(to);
  }

  XENT_INLINE_MEMBER void add(const GeneralLaneSums<T>& lanes, int64_t n) {
    RowSums<T>::add(lanes, n);
    energy += sum_of_lanes<T>(lanes.energy);
    label_rest += sum_of_lanes<T>(lanes.label_rest);
  }
};

template <class T>
static GeneralLaneSums<T> sum_general_block(const Block<T>& block, T row_max, const Coefficients<T>& coefficients,
                                            bool kl, const Wanted<T>& wanted) {
  constexpr int W = kLanes<T>;
  const Vector<T> max = broadcast(row_max), zero{};
  const T *const x = block.x, *const a = coefficients.a, *const log_q = kl ? coefficients.log_q : nullptr;
  const int64_t n = block.n;
  GeneralLaneSums<T> sums;
  int64_t i = 0;
  while (i + W <= n) {
    GeneralLaneSums<T> part;
    for (const int64_t end = std::min(i + kTermsOfASum * W, n); i + W <= end; i += W) {
      part.add(load(x + i), max, a ? load(a + i) : zero, log_q ? load(log_q + i) : zero, wanted);
    }
    sums.add(part);
  }
  if (i < n) {
    sums.add(load_last(x, n, -std::numeric_limits<T>::infinity()), max, a ? load_last(a, n, T(0)) : zero,
             log_q ? load_last(log_q, n, T(0)) : zero, wanted);
  }
  return sums;
}

// ---- forward --------------------------------------------------------------------------------------------------------

// Calls use(class, probability, offset of the probability's gradient) for each pair that is not ignored.
template <class T, class Use>
XENT_INLINE void for_pairs(const Problem& problem, const Cursor& cursor, const Use& use) {
  const int64_t target = cursor.offset(problem.target), probs = cursor.offset(problem.probs);
  for (int64_t j = 0; j < problem.pairs; ++j) {
    int64_t y;
    read_into(&y, problem.target, target + j * problem.target.class_stride, 1, 1);
    if (y == problem.ignore_index) continue;
    use(y, read_one<T>(problem.probs, probs + j * problem.probs.class_stride), j);
  }
}

template <class T>
XENT_INLINE T weight_of_class(const Problem& problem, int64_t c) {
  return problem.weight ? static_cast<const T*>(problem.weight)[c] : T(1);
}

// Finishes a position from its sums.
template <class T>
struct GeneralResult : PositionResult<T> {
  Lse<T> label_lse;
  double entropy = 0, target_log_prob = 0;
  int64_t argmax = -1;

  void finish(const Forward& problem, const Row& row, const Cursor& cursor, const GeneralRowSums<T>& sums,
              double log_sum) {
    const double keep = 1 - problem.label_smoothing, share = problem.label_smoothing / double(problem.classes);
    const auto gap_of = [&](int64_t y) {
      return double(sums.max) - double(read_logit<T>(problem, row.logits + y * problem.logits.class_stride));
    };
    this->lse = Lse<T>::of(double(sums.max), log_sum);
    entropy = log_sum + sums.energy / (sums.ties + sums.rest);
    double loss = 0;
    switch (problem.form) {
      case Form::kNone: break;
      case Form::kIndices: {
        const double gap = gap_of(row.y), hit = keep * double(weight_of_class<T>(problem, row.y));
        loss = index_loss(hit, share, gap, sums.spread, sums.mass, log_sum);
        target_log_prob = -(gap + log_sum);
        break;
      }
      case Form::kPairs:
        loss = index_loss(0., share, 0., sums.spread, sums.mass, log_sum);
        for_pairs<T>(problem, cursor, [&](int64_t y, T probability, int64_t) {
          const double gap = gap_of(y), p = double(probability);
          loss += index_loss(keep * double(weight_of_class<T>(problem, y)) * p, 0., gap, 0., 0., log_sum);
          target_log_prob -= index_loss(p, 0., gap, 0., 0., log_sum);
        });
        break;
      case Form::kProbabilities:
        loss = index_loss(0., 1., 0., sums.spread, sums.mass, log_sum);
        target_log_prob = -loss;
        this->mass = T(sums.mass);
        break;
      case Form::kTeacher: {
        const double of_teacher = index_loss(0., 1., 0., sums.spread, sums.mass, log_sum);
        this->mass = T(of_teacher);
        loss = problem.teacher_scale * of_teacher;
        if (!problem.labels) break;
        const double label_log_sum = log_of_sum(sums.ties, sums.label_rest);
        label_lse = Lse<T>::of(problem.temperature * double(sums.max), label_log_sum);
        loss += index_loss(problem.label_scale, 0., problem.temperature * gap_of(row.y), 0., 0., label_log_sum);
        break;
      }
    }
    this->loss = finish_loss(problem, row, loss, double(sums.max) + log_sum);
  }

  XENT_INLINE_MEMBER void write(const Forward& problem, int64_t p, Sums& sums) const {
    PositionResult<T>::write(problem, p, sums);
    if (problem.form == Form::kProbabilities || problem.form == Form::kTeacher) {
      saved_row<T>(problem, saved::kMass)[p] = this->mass;
    }
    if (problem.statistics) {
      saved_row<T>(problem, saved::kEntropy)[p] = T(entropy);
      saved_row<T>(problem, saved::kTargetLogProb)[p] = T(target_log_prob);
      const Int<T> index = Int<T>(argmax);
      std::memcpy(saved_row<T>(problem, saved::kArgmax) + p, &index, sizeof index);
    }
    if (problem.form == Form::kTeacher) {
      saved_row<T>(problem, saved::kLabelLse)[p] = label_lse.rounded;
      saved_row<T>(problem, saved::kLabelLseLost)[p] = label_lse.lost;
    }
  }
};

// The first class from c on whose logit is `value`, or NaN.
template <class T>
static int64_t find_class(const Problem& problem, const Row& row, int64_t c, T value) {
  T buffer[kBlock<T>];
  for (; c < problem.classes; c += kBlock<T>) {
    const int64_t n = std::min(kBlock<T>, problem.classes - c);
    const T* x = read_logits(buffer, problem, row.logits + c * problem.logits.class_stride, n);
    for (int64_t i = 0; i < n; ++i) {
      if (x[i] == value || (value != value && x[i] != x[i])) return c + i;
    }
  }
  return 0;  // all are -inf
}

template <class T>
static void forward_general_rows(const Forward& problem, int64_t begin, int64_t end, Sums& sums) {
  const Wanted<T> wanted{problem.statistics, T(problem.labels ? problem.temperature : 0)};
  BlockReader<T> blocks(problem);
  CoefficientReader<T> coefficients(problem);
  Cursor cursor(problem, begin);
  for (int64_t p = begin; p < end; ++p, cursor.advance(1)) {
    const Row row = row_at(problem, cursor, p);
    GeneralResult<T> result;
    if (row.y >= 0) {
      GeneralRowSums<T> of_row;
      int64_t block_of_maximum = 0;
      for (int64_t c = 0; c < problem.classes; c += kBlock<T>) {
        const Block<T> block = blocks.read(row, c);
        if (block.max > of_row.max) {
          of_row.raise_max(block.max, wanted);
          block_of_maximum = c;
        }
        const auto a = coefficients.read(p, row.target, c, block.n);
        of_row.add(sum_general_block(block, of_row.max, a, problem.kl, wanted), block.n);
      }
      const double log_sum = log_of_sum(of_row.ties, of_row.rest);
      result.finish(problem, row, cursor, of_row, log_sum);
      if (problem.statistics) {
        const bool is_nan = of_row.rest != of_row.rest;
        result.argmax = is_nan ? find_class(problem, row, 0, std::numeric_limits<T>::quiet_NaN())
                               : find_class(problem, row, block_of_maximum, of_row.max);
      }
      const double w = problem.form == Form::kIndices ? double(weight_of_class<T>(problem, row.y)) : 1;
      sums.weight += w * row.sample_weight;
    }
    result.write(problem, p, sums);
  }
}

// ---- backward -------------------------------------------------------------------------------------------------------

template <class T>
struct GeneralTerms {
  Lse<T> lse, label_lse;
  T softmax = 0, entropy = 0, dense = 0;  // P, E, D
  T hit = 0, rest = 0;                    // of an index target's class: P = hit + rest
  T of_loss = 0;                          // grad_output / denominator, times the position's weight
  T of_target_log_prob = 0;
  T label = 0, temperature = 1;  // what multiplies softmax(T x) - [c = y]

  GeneralTerms(const Backward& problem, const Cursor& cursor, int64_t p, int64_t y) {
    const auto saved_at = [&](int row) { return saved_row<T>(problem, row)[p]; };
    lse = {saved_at(saved::kLse), saved_at(saved::kLseLost)};
    const double scale = scale_at(problem, cursor), keep = 1 - problem.label_smoothing;
    const double z = 2 * problem.z_loss * (double(lse.rounded) + double(lse.lost));
    double of_lse = problem.z_loss == 0 ? 0 : scale * z, of_target = 0;
    if (problem.grad_statistics) {
      const T* const grads = static_cast<const T*>(problem.grad_statistics) + p;
      const double of_entropy = double(grads[kGradEntropy * problem.positions]);
      of_target = double(grads[kGradTargetLogProb * problem.positions]);
      of_lse += double(grads[kGradLse * problem.positions]) - of_entropy * double(saved_at(saved::kEntropy));
      entropy = T(-of_entropy);
    }
    of_loss = T(scale);
    of_target_log_prob = T(of_target);
    dense = T(scale * (problem.label_smoothing / double(problem.classes)));
    rest = T(of_lse + scale * problem.smoothed_total);
    switch (problem.form) {
      case Form::kNone: break;
      case Form::kIndices: hit = T(scale * keep * double(weight_of_class<T>(problem, y)) - of_target); break;
      case Form::kPairs:
        for_pairs<T>(problem, cursor, [&](int64_t c, T probability, int64_t) { hit += pair(problem, c, probability); });
        break;
      case Form::kProbabilities:
        dense = T(scale - of_target);
        rest = T(of_lse + (scale - of_target) * double(saved_at(saved::kMass)));
        break;
      case Form::kTeacher:
        dense = rest = T(scale * problem.teacher_scale);
        if (!problem.labels) break;
        label_lse = {saved_at(saved::kLabelLse), saved_at(saved::kLabelLseLost)};
        temperature = T(problem.temperature);
        label = T(scale * problem.label_scale * problem.temperature);
        break;
    }
    softmax = hit + rest;
  }

  // The coefficient that a pair adds to its class.
  XENT_INLINE_MEMBER T pair(const Problem& problem, int64_t c, T probability) const {
    return pair(problem, c) * probability;
  }
  XENT_INLINE_MEMBER T pair(const Problem& problem, int64_t c) const {
    return of_loss * T(1 - problem.label_smoothing) * weight_of_class<T>(problem, c) - of_target_log_prob;
  }

  XENT_INLINE_MEMBER Vector<T> log_softmax(Vector<T> x) const { return (x - lse.rounded) - lse.lost; }
  XENT_INLINE_MEMBER Vector<T> label_log_softmax(Vector<T> x) const {
    return (x * temperature - label_lse.rounded) - label_lse.lost;
  }

  // What of_target, the gradient of the target's part, is completed by.
  XENT_INLINE_MEMBER Vector<T> with_entropy(const Problem& problem, Vector<T> of_target, Vector<T> x,
                                            Vector<T> log_softmax) const {
    if (entropy != 0) of_target += entropy_gradient(broadcast(entropy), exp(log_softmax), log_softmax);
    return is_transformed(problem) ? of_target * slope_of_transform<T>(problem, x) : of_target;
  }

  // `careful`: among the classes is one whose softmax is near one, as its coefficient may be.
  template <bool careful>
  XENT_INLINE_MEMBER Vector<T> gradient(const Problem& problem, Vector<T> x, Vector<T> a) const {
    const Vector<T> log_p = log_softmax(x), total = broadcast(softmax);
    Vector<T> result = careful ? soft_gradient(total, log_p, dense * a) : plain_gradient(total, exp(log_p), dense * a);
    if (label != 0) result += label * exp(label_log_softmax(x));
    return with_entropy(problem, result, x, log_p);
  }

  // Of a class that an index target or pairs give the coefficient `own`, besides a.
  XENT_INLINE_MEMBER T own_gradient(const Problem& problem, T logit, T own, T a) const {
    const Vector<T> x = broadcast(logit), log_p = log_softmax(x);
    const Vector<T> result =
        target_gradient(broadcast(own), broadcast((hit - own) + rest), broadcast(dense * a), log_p);
    return with_entropy(problem, result, x, log_p)[0];
  }

  // Of a label's class, beside a teacher.
  XENT_INLINE_MEMBER T label_gradient(const Problem& problem, T logit, T q) const {
    const Vector<T> x = broadcast(logit), zero{};
    const Vector<T> of_teacher = soft_gradient(broadcast(softmax), log_softmax(x), broadcast(dense * q));
    const Vector<T> of_label = target_gradient(broadcast(label), zero, zero, label_log_softmax(x));
    return with_entropy(problem, of_teacher + of_label, x, log_softmax(x))[0];
  }

  // Of a probability, or of the teacher's logit.
  XENT_INLINE_MEMBER Vector<T> of_target_class(const Backward& problem, Vector<T> x, Vector<T> a, Vector<T> log_q,
                                               Vector<T> weight, Vector<T> loss) const {
    const Vector<T> minus_log_p = -log_softmax(x);
    if (problem.form == Form::kProbabilities) return dense * T(1 - problem.label_smoothing) * weight * minus_log_p;
    return dense * T(problem.logit_scale) * teacher_gradient(a, problem.kl ? log_q + minus_log_p : minus_log_p, loss);
  }
};

// Calls function(i, count) for each vector of n elements, of which the last has fewer than all its lanes.
template <class T, class Function>
XENT_INLINE void for_vectors(int64_t n, const Function& function) {
  for (int64_t i = 0; i < n; i += kLanes<T>) function(i, std::min<int64_t>(kLanes<T>, n - i));
}

template <class T>
XENT_INLINE Vector<T> load_some(const T* p, int64_t i, int64_t count) {
  if (!p) return Vector<T>{};
  return count == kLanes<T> ? load(p + i) : load_partial(p + i, count, T(0));
}

template <class T>
static void zero_target_gradient(const Backward& problem, int64_t offset) {
  if (!problem.grad_target) return;
  if (problem.form != Form::kPairs) return zero_gradient<T>(problem, problem.grad_target, offset, problem.stream);
  const T zero = 0;
  for (int64_t j = 0; j < problem.pairs; ++j) {
    write_from(&zero, problem.grad_target, offset + j * problem.grad_target.class_stride, 1, 1);
  }
}

template <class T>
static void backward_general_rows(const Backward& problem, int64_t begin, int64_t end) {
  alignas(64) T logits_buffer[kBlock<T>], gradient_buffer[kBlock<T>];
  CoefficientReader<T> coefficients(problem);
  const T* const weight = static_cast<const T*>(problem.weight);
  const bool pairs = problem.form == Form::kPairs, dense = !pairs && problem.form != Form::kIndices;
  Cursor cursor(problem, begin);
  for (int64_t p = begin; p < end; ++p, cursor.advance(1)) {
    const int64_t logits = cursor.offset(problem.logits), target = cursor.offset(problem.target);
    const int64_t dx = cursor.offset(problem.grad_logits), dq = cursor.offset(problem.grad_target);
    int64_t y;
    read_labels(&y, problem, cursor, p, 1);
    if (y < 0) {
      zero_gradient<T>(problem, problem.grad_logits, dx, problem.stream);
      zero_target_gradient<T>(problem, dq);
      continue;
    }
    const GeneralTerms<T> terms(problem, cursor, p, y);
    const Vector<T> loss = broadcast(dense ? saved_row<T>(problem, saved::kMass)[p] : T(0));
    for (int64_t c = 0; c < problem.classes; c += kBlock<T>) {
      const int64_t n = std::min(kBlock<T>, problem.classes - c);
      const T* const x = read_logits(logits_buffer, problem, logits + c * problem.logits.class_stride, n);
      const auto [a, log_q] = coefficients.read(p, target, c, n);
      if (dense && problem.grad_target) {
        for_vectors<T>(n, [&](int64_t i, int64_t count) __attribute__((always_inline)) {
          const Vector<T> w = weight ? load_some(weight + c, i, count) : broadcast(T(1));
          const Vector<T> of_class = terms.of_target_class(problem, load_some(x, i, count), load_some(a, i, count),
                                                           load_some(log_q, i, count), w, loss);
          store_partial(gradient_buffer + i, of_class, count);
        });
        const int64_t stride = problem.grad_target.class_stride;
        write_from(gradient_buffer, problem.grad_target, dq + c * stride, stride, n, problem.stream);
      }
      if (!problem.grad_logits) continue;
      const int64_t stride = problem.grad_logits.class_stride, out = dx + c * stride;
      T* const result = write_or_point(gradient_buffer, problem.grad_logits, out, stride, problem.buffered);
      const bool careful = dense && block_maximum(x, n) - terms.lse.rounded > T(-0.7);
      for_vectors<T>(n, [&](int64_t i, int64_t count) __attribute__((always_inline)) {
        const Vector<T> logit = load_some(x, i, count), coefficient = load_some(a, i, count);
        const Vector<T> of_class = careful ? terms.template gradient<true>(problem, logit, coefficient)
                                           : terms.template gradient<false>(problem, logit, coefficient);
        store_partial(result + i, of_class, count);
      });
      const auto coefficient_of = [&](int64_t at) { return a ? a[at - c] : T(0); };
      const auto is_here = [&](int64_t at) { return c <= at && at < c + n; };
      if (pairs) {
        for_pairs<T>(problem, cursor, [&](int64_t at, T, int64_t) {
          if (!is_here(at)) return;
          T own = 0;  // a class may come more than once
          for_pairs<T>(problem, cursor, [&](int64_t same, T probability, int64_t) {
            if (same == at) own += terms.pair(problem, same, probability);
          });
          result[at - c] = terms.own_gradient(problem, x[at - c], own, coefficient_of(at));
        });
      } else if (problem.form == Form::kIndices && is_here(y)) {
        result[y - c] = terms.own_gradient(problem, x[y - c], terms.hit, coefficient_of(y));
      } else if (problem.labels && is_here(y)) {
        result[y - c] = terms.label_gradient(problem, x[y - c], coefficient_of(y));
      }
      if (result == gradient_buffer) {
        write_from(gradient_buffer, problem.grad_logits, out, stride, n, problem.stream);
      }
    }
    if (pairs && problem.grad_target) {
      zero_target_gradient<T>(problem, dq);  // of ignored pairs
      for_pairs<T>(problem, cursor, [&](int64_t at, T, int64_t j) {
        const T logit = read_logit<T>(problem, logits + at * problem.logits.class_stride);
        const T gradient = -terms.pair(problem, at) * terms.log_softmax(broadcast(logit))[0];
        write_from(&gradient, problem.grad_target, dq + j * problem.grad_target.class_stride, 1, 1);
      });
    }
  }
}
