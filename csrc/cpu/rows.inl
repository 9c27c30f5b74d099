// Kernels whose vector lanes are classes: one position after the other, its logits in blocks of kBlock. For logits that
// are contiguous along the class dimension ((N, C), channels_last, a transposed (B, V, T)) and, through the staging
// buffer, for any other stride.
//
// The forward reads the logits from memory once: a block's maximum and then its sum of exponentials are taken while the
// block is in the first-level cache, and the sums so far are rescaled when a block raises the maximum. The backward
// reads them once more and writes the gradient, softmax(x) = exp(x - lse).

template <class T>
constexpr int64_t kBlock = kBlockVectors * kLanes<T>;

// Sums over the classes seen so far, relative to their maximum. `max` starts at the least finite number rather than at
// -inf: a leading block of masked logits then sums to zero instead of to NaN.
template <class T>
struct RowSums {
  T max = std::numeric_limits<T>::lowest();
  double ties = 0;    // logits equal to the maximum
  double rest = 0;    // sum of exp(x - max) of the others
  double spread = 0;  // sum of a (max - x)
  double mass = 0;    // sum of a

  XENT_INLINE_MEMBER void raise_max(T new_max) {
    const double raised = double(new_max) - double(max);
    if (ties != 0) rest = (rest + ties) * ::exp(-raised);  // before the first finite logit, both are zero
    ties = 0;
    if (mass != 0) spread += mass * raised;
    max = new_max;
  }
};

template <class T>
XENT_INLINE T block_maximum(const T* x, int64_t n) {
  constexpr int W = kLanes<T>;
  const Vector<T> lowest = broadcast(std::numeric_limits<T>::lowest());
  Vector<T> m0 = lowest, m1 = lowest, m2 = lowest, m3 = lowest;  // four chains hide the latency
  int64_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W) {
    m0 = maximum(load(x + i), m0);
    m1 = maximum(load(x + i + W), m1);
    m2 = maximum(load(x + i + 2 * W), m2);
    m3 = maximum(load(x + i + 3 * W), m3);
  }
  for (; i + W <= n; i += W) m0 = maximum(load(x + i), m0);
  if (i < n && n >= W) m1 = maximum(load(x + n - W), m1);  // some twice, which changes no maximum
  if (i < n && n < W) m1 = maximum(load_partial(x, n, std::numeric_limits<T>::lowest()), m1);
  return maximum_of_lanes<T>(maximum(maximum(m0, m1), maximum(m2, m3)));
}

// Of an infinite sum, nothing is lost.
template <class V>
XENT_INLINE void add_keeping_lost(V& sum, V term, V& lost) {
  V total, rounding;
  two_sum(sum, term, total, rounding);
  lost += select(total - total == V{}, rounding, V{});
  sum = total;
}

template <class T, bool dense>
struct LaneSums {
  Vector<T> others{}, rest{}, spread{}, mass{};  // others: how many logits are not equal to the maximum
  Vector<T> spread_lost{}, mass_lost{};          // what adding up parts of them lost

  // A coefficient of zero adds nothing, even at a logit of -inf; nor does the maximum itself, even at a coefficient of
  // infinity.
  XENT_INLINE_MEMBER Vector<T> add(Vector<T> x, Vector<T> max, Vector<T> a) {
    const Vector<T> zero{}, one = broadcast(T(1));
    const Vector<T> difference = x - max;
    const auto other = difference != zero;
    const Vector<T> exponential = exp(difference);
    rest = select(other, rest + exponential, rest);
    others = select(other, others + one, others);
    if constexpr (dense) {
      spread = select(other & (a != zero), spread - a * difference, spread);
      mass += a;
    }
    return exponential;
  }

  XENT_INLINE_MEMBER void add(const LaneSums& part) {
    rest += part.rest;
    others += part.others;
    if constexpr (dense) {
      add_keeping_lost(spread, part.spread, spread_lost);
      add_keeping_lost(mass, part.mass, mass_lost);
    }
  }
};

// Long sums of equal terms round the same way each time: no more than this many before the sum goes one level up.
constexpr int64_t kTermsOfASum = 8;

// The last vector of a block, whose other lanes hold `fill`.
template <class T>
XENT_INLINE Vector<T> load_last(const T* p, int64_t n, T fill) {
  return n >= kLanes<T> ? load_rest(p, n, fill) : load_partial(p, n, fill);
}

// `a` holds the coefficients of the block where they are dense. The exponentials are kept where there is room for them.
template <class T, bool dense, bool keep>
XENT_INLINE void add_block(RowSums<T>& sums, const T* x, const T* a, int64_t n, T* exponentials) {
  constexpr int W = kLanes<T>;
  const T block_max = block_maximum(x, n);
  if (block_max > sums.max) sums.raise_max(block_max);
  const Vector<T> max = broadcast(sums.max);
  LaneSums<T, dense> lanes;
  int64_t i = 0;
  while (i + W <= n) {
    LaneSums<T, dense> part;
    for (const int64_t end = std::min(i + kTermsOfASum * W, n); i + W <= end; i += W) {
      __builtin_prefetch(x + i + kBlock<T>);  // while this block is summed, the next one comes from memory
      const Vector<T> exponential = part.add(load(x + i), max, dense ? load(a + i) : Vector<T>{});
      if constexpr (keep) store(exponentials + i, exponential);
    }
    lanes.add(part);
  }
  if (i < n) {
    if constexpr (keep) store(exponentials + n - W, exp(load(x + n - W) - max));
    i += W;
    lanes.add(load_last(x, n, -std::numeric_limits<T>::infinity()), max, dense ? load_last(a, n, T(0)) : Vector<T>{});
  }
  sums.ties += double(i) - sum_of_lanes<T>(lanes.others);
  sums.rest += sum_of_lanes<T>(lanes.rest);
  if constexpr (dense) {
    sums.spread += sum_of_lanes<T>(lanes.spread) + sum_of_lanes<T>(lanes.spread_lost);
    sums.mass += sum_of_lanes<T>(lanes.mass) + sum_of_lanes<T>(lanes.mass_lost);
  }
}

// The dense part of the coefficients, for the classes [c, c + n) of a position:
// w_c for a smoothed index (its share of e / C is applied to the sums), w_c ((1 - e) q_c + e / C) for a soft target.
template <class T>
XENT_INLINE const T* dense_coefficients(T* buffer, const Problem& problem, int64_t target_offset, int64_t c,
                                        int64_t n) {
  const T* weight = static_cast<const T*>(problem.weight);
  if (problem.kind == TargetKind::kSoft) {
    const int64_t stride = problem.target.class_stride;
    const T keep = T(1 - problem.label_smoothing), share = T(problem.label_smoothing / double(problem.classes));
    const T* q = read_or_point(buffer, problem.target, target_offset + c * stride, stride, n);
    if (keep == 1 && !weight) return q;
    for (int64_t i = 0; i < n; ++i) buffer[i] = (weight ? weight[c + i] : T(1)) * (keep * q[i] + share);
    return buffer;
  }
  if (weight) return weight + c;
  for (int64_t i = 0; i < n; ++i) buffer[i] = 1;
  return buffer;
}

template <class T>
XENT_INLINE T one_target_gradient(T hit, T rest_of_total, T smoothed, T log_softmax) {
  return target_gradient(broadcast(hit), broadcast(rest_of_total), broadcast(smoothed), broadcast(log_softmax))[0];
}

// The gradient of an ignored position.
template <class T>
static void zero_gradient(const Problem& problem, const View& view, const Cursor& cursor, bool stream) {
  if (!view) return;
  const T zeros[64] = {};
  const int64_t offset = cursor.offset(view);
  for (int64_t c = 0; c < problem.classes; c += 64) {
    write_from(zeros, view, offset + c * view.class_stride, view.class_stride,
               std::min<int64_t>(64, problem.classes - c), stream);
  }
}

// The gradient of a row whose exponentials are at hand: exp(x - max) * factor, but for the target's class.
template <class T>
XENT_INLINE void scaled_exponentials(const Forward& problem, const Cursor& cursor, T* exponentials, T factor, int64_t y,
                                     T own) {
  const View& view = problem.grad_logits;
  const int64_t n = problem.classes, offset = cursor.offset(view);
  T* const result = write_or_point(exponentials, view, offset, view.class_stride, problem.stream);
  int64_t i = 0;
  for (; i + kLanes<T> <= n; i += kLanes<T>) store(result + i, load(exponentials + i) * factor);
  for (; i < n; ++i) result[i] = exponentials[i] * factor;
  result[y] = own;
  if (result == exponentials) write_from(exponentials, view, offset, view.class_stride, n, problem.stream);
}

template <class T, bool dense, bool one_pass>
static void forward_rows_of(const Forward& problem, int64_t begin, int64_t end, Sums& sums) {
  alignas(64) T logits_buffer[kBlock<T>], coefficient_buffer[kBlock<T>], exponentials[one_pass ? kBlock<T> : 1];
  const T* weight = static_cast<const T*>(problem.weight);
  T* const lse = static_cast<T*>(problem.lse);
  const bool soft = problem.kind == TargetKind::kSoft;
  const double share = problem.label_smoothing / double(problem.classes);
  Cursor cursor(problem, begin);
  for (int64_t p = begin; p < end; ++p, cursor.advance(1)) {
    const int64_t x = cursor.offset(problem.logits), t = cursor.offset(problem.target);
    int64_t y = 0;
    if (!soft) {
      read_into(&y, problem.target, t, 1, 1);
      check_targets(&y, problem, p, 1);
    }
    double loss = 0;
    T lse_rounded = 0, lse_lost = 0, mass = 0;
    if (y >= 0) {
      RowSums<T> row;
      for (int64_t c = 0; c < problem.classes; c += kBlock<T>) {
        const int64_t n = std::min(kBlock<T>, problem.classes - c);
        const int64_t stride = problem.logits.class_stride;
        const T* block = read_or_point(logits_buffer, problem.logits, x + c * stride, stride, n);
        const T* a = dense ? dense_coefficients(coefficient_buffer, problem, t, c, n) : nullptr;
        add_block<T, dense, one_pass>(row, block, a, n, exponentials);
      }
      const double log_sum = log_of_sum(row.ties, row.rest);
      double sum, lost;
      two_sum(double(row.max), log_sum, sum, lost);
      lse_rounded = T(sum);
      lse_lost = T(sizeof(T) == sizeof(double) ? lost : (double(row.max) - double(lse_rounded)) + log_sum);
      mass = T(row.mass);
      if (soft) {
        loss = index_loss(0., 1., 0., row.spread, row.mass, log_sum);
      } else {
        const double w = weight ? double(weight[y]) : 1;
        const double gap = double(row.max) - double(read_one<T>(problem.logits, x + y * problem.logits.class_stride));
        loss = index_loss((1 - problem.label_smoothing) * w, share, gap, row.spread, row.mass, log_sum);
        sums.weight += w;
        if constexpr (one_pass) {
          // The softmax of the target minus one: exact, for a target at the maximum has the exponential 1 and is a tie.
          const double minus_others = (double(exponentials[y]) - row.ties) - row.rest;
          const double factor_exact = problem.scale * w / (row.ties + row.rest);
          const T factor = T(factor_exact), own = T(factor_exact * minus_others);
          scaled_exponentials(problem, cursor, exponentials, factor, y, own);
        }
      }
    }
    if constexpr (one_pass) {
      if (y < 0) zero_gradient<T>(problem, problem.grad_logits, cursor, problem.stream);
    }
    lse[p] = lse_rounded;
    lse[problem.positions + p] = lse_lost;
    if (soft) lse[2 * problem.positions + p] = mass;
    sums.loss += loss;
    if (problem.loss) {
      const T rounded = T(loss);
      write_from(&rounded, problem.loss, p, 1, 1);
    }
  }
}

template <class T>
static void forward_rows(const Forward& problem, int64_t begin, int64_t end, Sums& sums) {
  if (problem.kind != TargetKind::kIndex) return forward_rows_of<T, true, false>(problem, begin, end, sums);
  problem.grad_logits ? forward_rows_of<T, false, true>(problem, begin, end, sums)
                      : forward_rows_of<T, false, false>(problem, begin, end, sums);
}

// What a position's gradient is made of; `scale` is grad_output / denominator.
template <class T>
struct GradientTerms {
  T scale, total;  // total: A
  T share;         // what multiplies the dense coefficients
  T lse_rounded, lse_lost;
  T correction;  // exp(-lse_lost): softmax = exp(x - lse_rounded) * correction saves an addition per element

  template <class V>
  XENT_INLINE_MEMBER V log_softmax(V x) const {
    return (x - lse_rounded) - lse_lost;
  }
};

// scale * (A softmax - a) for one vector of classes.
template <class T, TargetKind kind>
XENT_INLINE Vector<T> gradient(const GradientTerms<T>& terms, Vector<T> x, Vector<T> a) {
  if constexpr (kind != TargetKind::kIndex) {
    const Vector<T> coefficient = kind == TargetKind::kSoft ? a : terms.share * a;
    return terms.scale *
           plain_gradient(broadcast(terms.total * terms.correction), exp(x - terms.lse_rounded), coefficient);
  } else {
    return (terms.scale * terms.total * terms.correction) * exp(x - terms.lse_rounded);
  }
}

template <class T, TargetKind kind>
XENT_INLINE void gradient_block(T* out, const GradientTerms<T>& terms, const T* x, const T* a, int64_t n) {
  constexpr int W = kLanes<T>;
  constexpr bool dense = kind != TargetKind::kIndex;
  int64_t i = 0;
  for (; i + W <= n; i += W) store(out + i, gradient<T, kind>(terms, load(x + i), dense ? load(a + i) : Vector<T>{}));
  if (i == n) return;
  if (n >= W) {  // the last whole vector covers some lanes again
    i = n - W;
    store(out + i, gradient<T, kind>(terms, load(x + i), dense ? load(a + i) : Vector<T>{}));
  } else {
    const Vector<T> last = dense ? load_partial(a, n, T(0)) : Vector<T>{};
    store_partial(out, gradient<T, kind>(terms, load_partial(x, n, T(0)), last), n);
  }
}

template <class T, TargetKind kind>
static void backward_rows_of(const Backward& problem, int64_t begin, int64_t end) {
  constexpr bool soft = kind == TargetKind::kSoft, dense = kind != TargetKind::kIndex;
  alignas(64) T logits_buffer[kBlock<T>], coefficient_buffer[kBlock<T>], gradient_buffer[kBlock<T>];
  const T* weight = static_cast<const T*>(problem.weight);
  const T* const lse = static_cast<const T*>(problem.lse);
  const T keep = T(1 - problem.label_smoothing);
  const T share = T(problem.label_smoothing / double(problem.classes));
  Cursor cursor(problem, begin);
  for (int64_t p = begin; p < end; ++p, cursor.advance(1)) {
    const int64_t x = cursor.offset(problem.logits), t = cursor.offset(problem.target);
    const int64_t dx = cursor.offset(problem.grad_logits), dq = cursor.offset(problem.grad_target);
    int64_t y = 0;
    if (!soft) {
      read_into(&y, problem.target, t, 1, 1);
      check_targets(&y, problem, p, 1);
    }
    if (y < 0) {
      zero_gradient<T>(problem, problem.grad_logits, cursor, problem.stream);
      continue;
    }
    const T scale = T(read_one<double>(problem.grad_output, cursor.offset(problem.grad_output)) * problem.scale);
    const T hit = soft ? T(0) : keep * (weight ? weight[y] : T(1));
    const T rest_of_total = soft ? lse[2 * problem.positions + p] : T(problem.smoothed_total);
    const GradientTerms<T> terms{scale,  hit + rest_of_total,        soft ? T(1) : share,
                                 lse[p], lse[problem.positions + p], T(::exp(-double(lse[problem.positions + p])))};
    for (int64_t c = 0; c < problem.classes; c += kBlock<T>) {
      const int64_t n = std::min(kBlock<T>, problem.classes - c);
      const int64_t stride = problem.logits.class_stride;
      const T* block = read_or_point(logits_buffer, problem.logits, x + c * stride, stride, n);
      if (problem.grad_target) {
        for (int64_t i = 0; i < n; ++i) {
          gradient_buffer[i] = -scale * keep * (weight ? weight[c + i] : T(1)) * terms.log_softmax(block[i]);
        }
        write_from(gradient_buffer, problem.grad_target, dq + c * problem.grad_target.class_stride,
                   problem.grad_target.class_stride, n, problem.stream);
      }
      if (problem.grad_logits) {
        const T* a = dense ? dense_coefficients(coefficient_buffer, problem, t, c, n) : nullptr;
        const int64_t out_stride = problem.grad_logits.class_stride, out = dx + c * out_stride;
        T* const result = write_or_point(gradient_buffer, problem.grad_logits, out, out_stride, problem.buffered);
        gradient_block<T, kind>(result, terms, block, a, n);
        // At most one class has a softmax above a half; only there can a soft target's gradient cancel.
        if (soft && block_maximum(block, n) - terms.lse_rounded > T(-0.7)) {
          for (int64_t i = 0; i < n; ++i) {
            if (block[i] - terms.lse_rounded > T(-0.7)) {
              result[i] = scale * soft_gradient(broadcast(terms.total), broadcast(terms.log_softmax(block[i])),
                                                broadcast(a[i]))[0];
            }
          }
        }
        if (!soft && c <= y && y < c + n) {
          const T smoothed = dense ? share * a[y - c] : T(0);
          result[y - c] = scale * one_target_gradient(hit, rest_of_total, smoothed, terms.log_softmax(block[y - c]));
        }
        if (result == gradient_buffer) {
          write_from(gradient_buffer, problem.grad_logits, out, out_stride, n, problem.stream);
        }
      }
    }
  }
}

template <class T>
static void backward_rows(const Backward& problem, int64_t begin, int64_t end) {
  switch (problem.kind) {
    case TargetKind::kIndex: return backward_rows_of<T, TargetKind::kIndex>(problem, begin, end);
    case TargetKind::kSmoothedIndex: return backward_rows_of<T, TargetKind::kSmoothedIndex>(problem, begin, end);
    case TargetKind::kSoft: return backward_rows_of<T, TargetKind::kSoft>(problem, begin, end);
  }
}
