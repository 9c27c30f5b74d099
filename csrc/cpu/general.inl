// Kernels of everything that is more than the plain loss: any form of target, transformed logits, statistics, and the
// gradient of any mixture of them.
//
// forward_general_rows, forward_general_tile      read the logits from memory once, and write lse, loss and statistics;
//                                                 a teacher's divergence may need a second read (kFarDivergence)
// backward_general_rows, backward_general_tile    read the logits and what was saved, and write the gradients
//
// Vector lanes are classes in rows and positions in tiles, as in rows.inl and spatial.inl. Logits are transformed and
// coefficients made in blocks that stay in the first-level cache: nothing of the logits' size is stored but gradients.
// A label is a pair of probability one. Options are asked for once for each vector or position, never by element.
//
// The gradient of a position is, times the derivative of the transform,
//
//   d/dx_c = softmax_c (P + E log softmax_c) - D a_c      less at the class of a label or of a pair
//
// The forward of a shard (Problem::total_classes) sums over its own classes and the pairs of these alone. The
// backward's P is of all pairs, wherever their classes are.

// ---- coefficients ---------------------------------------------------------------------------------------------------

// The coefficients a of a block's classes, or null where they are zero; for a teacher their logarithms, too. They do
// not contain what a label or pairs add to their own classes.
template <class T>
struct Coefficients {
  const T* a = nullptr;
  const T* log_q = nullptr;
};

// Reads those of the classes [c, c + n) of a position; `buffers` may take them.
template <class T>
XENT_INLINE Coefficients<T> read_coefficients(T (&buffers)[2][kBlock<T>], const Problem& problem, const Row& row,
                                              int64_t c, int64_t n) {
  if (problem.target_kind == TargetKind::kNone) return {};
  if (!is_dense(problem.target_kind) && problem.label_smoothing == 0) return {};
  if (problem.target_kind != TargetKind::kTeacher) return {dense_coefficients(buffers[0], problem, row.target, c, n)};
  const T rounded = saved_row<T>(problem, saved::kTeacherLse)[row.position];
  const T lost = saved_row<T>(problem, saved::kTeacherLseLost)[row.position];
  const int64_t stride = problem.target.class_stride;
  const T* z = read_or_point(buffers[1], problem.target, row.target + c * stride, stride, n);
  for_vectors<T>(n, [&](int64_t i, int64_t count) XENT_INLINE_LAMBDA {
    const Vector<T> log_q = (transformed<T>(problem, load_partial(z + i, count)) - rounded) - lost;
    store_partial(buffers[1] + i, log_q, count);
    store_partial(buffers[0] + i, exp(log_q), count);
  });
  return {buffers[0], buffers[1]};
}

// ---- sums -----------------------------------------------------------------------------------------------------------

// The sums that are needed besides those of rows.inl.
template <class T>
struct WantedSums {
  bool energy;    // for the entropy
  T temperature;  // of the logits, where labels need them without it; else zero
};

// energy = sum_c exp(x_c - max) (max - x_c);  label_rest = sum_c exp(T (x_c - max)) without the ties.
template <class T>
struct GeneralLaneSums : LaneSums<T, true> {
  Vector<T> energy{}, label_rest{};

  // For a teacher's divergence log_q is not zero, and spread = sum_c q_c (max - x_c + log q_c): where the distributions
  // are nearly the same, its terms are nearly log_sum each, and do not cancel.
  XENT_INLINE_MEMBER void add(Vector<T> x, Vector<T> max, Vector<T> a, Vector<T> log_q, const WantedSums<T>& wanted) {
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

  XENT_INLINE_MEMBER void raise_max(T to, const WantedSums<T>& wanted) {
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
                                            bool kl, const WantedSums<T>& wanted) {
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

// log softmax = (x - origin) / T - rest, for logits x as they were given. origin is T lse, and rest is what rounding
// lost of it. The difference has next to no rounding, however large the logits are.
template <class T>
struct Origin {
  Vector<T> origin, rest;

  XENT_INLINE_MEMBER Origin(const Problem& problem, Vector<T> lse, Vector<T> lost)
      : origin(lse * T(problem.temperature)), rest((lse - origin * T(1 / problem.temperature)) + lost) {}

  XENT_INLINE_MEMBER void subtract_from(Vector<T> x, Vector<T>& difference, Vector<T>& lost) const {
    two_sum(x, -origin, difference, lost);
    lost = select(lost == lost, lost, Vector<T>{});  // an infinite logit has no lost part
  }
};

// Below this divergence, found in the first read of the logits, a second read sums up DivergenceTerms. The first read
// is off by a few roundings of the logits, as native's loss is: above the bound that is little beside the divergence.
constexpr double kFarDivergence = 0.125;

// The terms of a teacher's divergence that do not cancel. They need the student's lse.
template <class T>
struct DivergenceTerms {
  using V = Vector<T>;
  T inverse, inverse_lost;  // of the temperature
  Origin<T> student, teacher;

  XENT_INLINE_MEMBER DivergenceTerms(const Problem& problem, V lse, V lse_lost, V of_teacher, V of_teacher_lost)
      : inverse(T(1 / problem.temperature)),
        inverse_lost(T(1 / problem.temperature - double(inverse))),
        student(problem, lse, lse_lost),
        teacher(problem, of_teacher, of_teacher_lost) {}

  // Adds the terms of logits as they were given; -inf where there is no class.
  XENT_INLINE_MEMBER void add(V x, V z, V& excess, V& change, V& mass) const {
    V of_x, of_z, lost_of_x, lost_of_z, term, of_change;
    student.subtract_from(x, of_x, lost_of_x);
    teacher.subtract_from(z, of_z, lost_of_z);
    const V p = exp(of_x * inverse + (lost_of_x * inverse - student.rest));
    const V q = exp(of_z * inverse + (lost_of_z * inverse - teacher.rest));
    const V gap = of_z - of_x, lost_of_gap = select(gap - gap == V{}, gap * inverse_lost, V{});
    const V r = gap * inverse + (((lost_of_z - lost_of_x) * inverse + lost_of_gap) - (teacher.rest - student.rest));
    divergence_terms<T>(q, p, r, term, of_change);
    excess += term;
    change += of_change;
    mass += q;
  }
};

template <class T>
static double divergence_of_row(const Problem& problem, const Row& row, int64_t position, T lse, T lse_lost) {
  constexpr int W = kLanes<T>;
  constexpr T kNone = -std::numeric_limits<T>::infinity();
  alignas(64) T of_student[kBlock<T>], of_teacher[kBlock<T>];
  const DivergenceTerms<T> terms(problem, broadcast(lse), broadcast(lse_lost),
                                 broadcast(saved_row<T>(problem, saved::kTeacherLse)[position]),
                                 broadcast(saved_row<T>(problem, saved::kTeacherLseLost)[position]));
  double excess = 0, change = 0, mass = 0;
  for (int64_t c = 0; c < problem.classes; c += kBlock<T>) {
    const int64_t n = std::min(kBlock<T>, problem.classes - c);
    const int64_t of_logits = problem.logits.class_stride, of_target = problem.target.class_stride;
    const T* const x = read_or_point(of_student, problem.logits, row.logits + c * of_logits, of_logits, n);
    const T* const z = read_or_point(of_teacher, problem.target, row.target + c * of_target, of_target, n);
    for (int64_t first = 0; first < n; first += kTermsOfASum * W) {
      Vector<T> part{}, part_of_change{}, part_of_mass{};
      for (int64_t i = first; i < std::min(first + kTermsOfASum * W, n); i += W) {
        const int64_t count = std::min<int64_t>(W, n - i);
        terms.add(load_partial(x + i, count, kNone), load_partial(z + i, count, kNone), part, part_of_change,
                  part_of_mass);
      }
      excess += sum_of_lanes<T>(part);
      change += sum_of_lanes<T>(part_of_change);
      mass += sum_of_lanes<T>(part_of_mass);
    }
  }
  return divergence_of<double>(excess, change, mass);
}

// ---- from sums to the loss ------------------------------------------------------------------------------------------
//
// V is double, for one position of many classes, or a vector of positions of few.

template <class V>
XENT_INLINE V constant(double x) {
  if constexpr (std::is_same_v<V, double>) {
    return x;
  } else {
    return V{} + std::remove_reference_t<decltype(std::declval<V&>()[0])>(x);
  }
}

// The sums over all classes of a position.
template <class V>
struct Totals {
  V max, ties, rest, spread, mass, energy, label_rest;
};

// The sums over a position's pairs, or of its label: of w p (max - x), w p, p (max - x) and p.
template <class V>
struct OwnSums {
  V weighted_gap{}, weight{}, gap{}, mass{};

  template <class T>
  XENT_INLINE_MEMBER void add(T w, T p, T gap_of_class) {
    if (p == 0) return;  // adds nothing, even at a logit of -inf
    if (w != 0) weighted_gap += w * p * gap_of_class;
    weight += w * p;
    gap += p * gap_of_class;
    mass += p;
  }
};

// What the forward finds out about a position.
template <class V>
struct Found {
  V log_sum{}, label_log_sum{};
  V loss{}, entropy{}, target_log_prob{};
  V saved_mass{};  // for the row kMass
};

// `sums`: Totals or GeneralRowSums.
template <class V, class AllSums>
XENT_INLINE Found<V> find(const Problem& problem, const AllSums& sums, const OwnSums<V>& own) {
  Found<V> found;
  const V zero{};
  V log_sum = log_of_sum(sums.ties, sums.rest);
  if (problem.is_shard()) log_sum = select(sums.ties + sums.rest == zero, zero, log_sum);  // `nothing` below
  found.log_sum = log_sum;
  const V dense = sums.spread + sums.mass * log_sum;
  found.entropy = log_sum + sums.energy / (sums.ties + sums.rest);
  switch (problem.target_kind) {
    case TargetKind::kNone: break;
    case TargetKind::kIndices:
    case TargetKind::kPairs: {
      const V keep = constant<V>(problem.keep);
      found.loss = keep * select(own.weight == zero, own.weighted_gap, own.weighted_gap + own.weight * log_sum);
      if (problem.share != 0) found.loss += constant<V>(problem.share) * dense;
      found.target_log_prob = -(own.gap + own.mass * log_sum);
      if (problem.is_shard()) found.saved_mass = keep * own.weight + constant<V>(problem.share) * sums.mass;
      break;
    }
    case TargetKind::kProbabilities:
      found.loss = dense;
      found.target_log_prob = -dense;
      found.saved_mass = sums.mass;
      break;
    case TargetKind::kTeacher:
      found.saved_mass = dense;
      found.loss = constant<V>(problem.teacher_scale) * dense;
      if (!problem.labels) break;
      found.label_log_sum = log_of_sum(sums.ties, sums.label_rest);
      if (problem.label_scale != 0) {
        const V of_label = constant<V>(problem.temperature) * own.gap + found.label_log_sum;
        found.loss += constant<V>(problem.label_scale) * of_label;
      }
      break;
  }
  if (problem.z_loss != 0) {
    const V lse = V(sums.max) + log_sum;
    found.loss += constant<V>(problem.z_loss) * lse * lse;
  }
  if (problem.is_shard()) {
    // All logits of a shard may be -inf, as long as another shard's are not: it has nothing of the softmax, and the
    // loss of any part of the target that it has is infinite.
    const auto nothing = sums.ties + sums.rest == zero;
    const V infinity = constant<V>(std::numeric_limits<double>::infinity());
    found.log_sum = select(nothing, -infinity, found.log_sum);
    found.loss = select(nothing, select(found.saved_mass > zero, infinity, zero), found.loss);
    found.entropy = select(nothing, zero, found.entropy);
  }
  return found;
}

// Calls use(class, probability, number of the pair) for each pair of a position that is not ignored. Classes are
// counted from here.
template <class T, class Use>
XENT_INLINE void for_pairs(const Problem& problem, const Cursor& cursor, const Use& use) {
  constexpr int64_t kAtATime = 64;
  const int64_t target = cursor.offset(problem.target), probs = cursor.offset(problem.probs);
  const int64_t step = problem.target.class_stride, step_of_probs = problem.probs.class_stride;
  for (int64_t first = 0; first < problem.pairs; first += kAtATime) {
    const int64_t n = std::min(kAtATime, problem.pairs - first);
    int64_t y[kAtATime];
    T probabilities[kAtATime];
    read_into(y, problem.target, target + first * step, step, n);
    read_into(probabilities, problem.probs, probs + first * step_of_probs, step_of_probs, n);
    const int64_t ignored = count_from_here(y, problem, n);
    for (int64_t i = 0; i < n; ++i) {
      if (y[i] != ignored) use(y[i], probabilities[i], first + i);
    }
  }
}

// The same for any target. The label of a position is its only pair.
template <class T, class Use>
XENT_INLINE void for_own(const Problem& problem, const Cursor& cursor, int64_t y, const Use& use) {
  if (problem.target_kind == TargetKind::kPairs) return for_pairs<T>(problem, cursor, use);
  if (problem.target_kind == TargetKind::kIndices || problem.labels) use(y, T(1), 0);
}

template <class T>
XENT_INLINE T weight_of_class(const Problem& problem, int64_t c) {
  return problem.weight ? static_cast<const T*>(problem.weight)[c] : T(1);
}

// ---- the terms of a gradient ----------------------------------------------------------------------------------------

// The constants of the gradient of a vector of positions, or of one position in every lane.
template <class T>
struct GeneralTerms {
  using V = Vector<T>;
  V rounded, lost;                // lse
  V label_max, label_log_sum;     // of the logits at temperature 1
  V softmax, entropy, dense;      // P, E, D
  V hit, rest;                    // P = hit + rest
  V of_loss, of_target_log_prob;  // the gradients of the results
  V label;                        // the factor of softmax(T x) - [c = y]
  V saved_mass;

  // `saved_at(row)` reads what the forward saved, `grad_at(row)` the gradients of statistics. `scale`: grad_output /
  // denominator, times the position's factor. `weight` and `mass`: of OwnSums.
  template <class SavedAt, class GradAt>
  XENT_INLINE_MEMBER void set(const Problem& problem, V scale, V weight, V mass, bool statistics,
                              const SavedAt& saved_at, const GradAt& grad_at) {
    V of_lse{};
    rounded = saved_at(saved::kLse);
    lost = saved_at(saved::kLseLost);
    of_loss = scale;
    label_max = label_log_sum = entropy = hit = of_target_log_prob = label = saved_mass = V{};
    if (problem.z_loss != 0) of_lse = scale * T(2 * problem.z_loss) * (rounded + lost);
    if (statistics) {
      of_target_log_prob = grad_at(kGradTargetLogProb);
      entropy = -grad_at(kGradEntropy);
      of_lse += grad_at(kGradLse) + entropy * saved_at(saved::kEntropy);
    }
    dense = scale * T(problem.share);
    rest = of_lse + scale * T(problem.smoothed_total);
    switch (problem.target_kind) {
      case TargetKind::kNone: break;
      case TargetKind::kIndices:
      case TargetKind::kPairs: hit = scale * T(problem.keep) * weight - of_target_log_prob * mass; break;
      case TargetKind::kProbabilities:
        saved_mass = saved_at(saved::kMass);
        dense = scale - of_target_log_prob;
        rest = of_lse + dense * saved_mass;
        break;
      case TargetKind::kTeacher:
        saved_mass = saved_at(saved::kMass);
        dense = rest = scale * T(problem.teacher_scale);
        if (!problem.labels) break;
        label_max = saved_at(saved::kLabelMax);
        label_log_sum = saved_at(saved::kLabelLogSum);
        label = scale * T(problem.label_scale * problem.temperature);
        break;
    }
    softmax = hit + rest;
  }

  XENT_INLINE_MEMBER V log_softmax(V x) const { return (x - rounded) - lost; }
  XENT_INLINE_MEMBER V label_log_softmax(const Problem& problem, V x) const {
    return (x - label_max) * T(problem.temperature) - label_log_sum;
  }

  // Completes the gradient of everything but entropy and transform.
  XENT_INLINE_MEMBER V complete(const Backward& problem, V gradient, V x, V log_p) const {
    if (problem.grad_statistics) gradient += entropy_gradient(entropy, exp(log_p), log_p);
    return is_transformed(problem) ? gradient * slope_of_transform<T>(problem, x) : gradient;
  }

  // `careful`: one of the classes may have a softmax near one, and a coefficient near A.
  template <bool careful>
  XENT_INLINE_MEMBER V gradient(const Backward& problem, V x, V a) const {
    const V log_p = log_softmax(x);
    V result = careful ? soft_gradient(softmax, log_p, dense * a) : plain_gradient(softmax, exp(log_p), dense * a);
    if (problem.label_scale != 0) result += label * exp(label_log_softmax(problem, x));
    return complete(problem, result, x, log_p);
  }

  // Returns the part of `hit` of the pairs of one class. w: its weight, p: the sum of their probabilities.
  XENT_INLINE_MEMBER V hit_of(const Problem& problem, V w, V p) const {
    return (of_loss * T(problem.keep) * w - of_target_log_prob) * p;
  }

  // The gradient of a class whose label or pairs have the part `own` of `hit`, besides its coefficient a.
  XENT_INLINE_MEMBER V own_gradient(const Backward& problem, V x, V own, V a) const {
    const V log_p = log_softmax(x), zero{};
    V result = problem.target_kind == TargetKind::kTeacher ? soft_gradient(softmax, log_p, dense * a)
                                                           : target_gradient(own, (hit - own) + rest, dense * a, log_p);
    if (problem.label_scale != 0) result += target_gradient(label, zero, zero, label_log_softmax(problem, x));
    return complete(problem, result, x, log_p);
  }

  // The gradient of a probability, or of a teacher's logit.
  XENT_INLINE_MEMBER V of_target_class(const Problem& problem, V x, V a, V log_q, V weight) const {
    const V minus_log_p = -log_softmax(x);
    if (problem.target_kind == TargetKind::kProbabilities) return dense * T(problem.keep) * weight * minus_log_p;
    return dense * T(problem.logit_scale) *
           teacher_gradient(a, problem.kl ? log_q + minus_log_p : minus_log_p, saved_mass);
  }
};

// ---- rows: forward --------------------------------------------------------------------------------------------------

// Writes what a position leaves behind. An ignored one leaves zeros, and an argmax of -1.
template <class T>
struct GeneralResult : PositionResult<T> {
  T max = 0;
  Found<double> found;
  Int<T> argmax = -1;

  XENT_INLINE_MEMBER void write(const Forward& problem, int64_t p, Sums& sums) const {
    PositionResult<T>::write(problem, p, sums);
    if (is_dense(problem.target_kind) || problem.is_shard()) saved_row<T>(problem, saved::kMass)[p] = this->mass;
    if (problem.statistics) {
      saved_row<T>(problem, saved::kEntropy)[p] = T(found.entropy);
      saved_row<T>(problem, saved::kTargetLogProb)[p] = T(found.target_log_prob);
      std::memcpy(saved_row<T>(problem, saved::kArgmax) + p, &argmax, sizeof argmax);
    }
    if (problem.labels) {
      saved_row<T>(problem, saved::kLabelMax)[p] = max;
      saved_row<T>(problem, saved::kLabelLogSum)[p] = T(found.label_log_sum);
    }
  }
};

// Returns the first class from c on whose logit is `value`, which may be NaN, or -1.
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
  return -1;
}

template <class T>
static void forward_general_rows(const Forward& problem, int64_t begin, int64_t end, Sums& sums) {
  const WantedSums<T> wanted{problem.statistics, T(problem.labels ? problem.temperature : 0)};
  BlockReader<T> blocks(problem);
  alignas(64) T coefficient_buffers[2][kBlock<T>];
  Cursor cursor(problem, begin);
  for (int64_t p = begin; p < end; ++p, cursor.advance(1)) {
    const Row row = row_at<Objective::kGeneral>(problem, cursor, p);
    GeneralResult<T> result;
    if (row.y < 0) {
      result.write(problem, p, sums);
      continue;
    }
    GeneralRowSums<T> of_row;
    int64_t block_of_maximum = 0;
    for (int64_t c = 0; c < problem.classes; c += kBlock<T>) {
      const Block<T> block = blocks.read(row, c);
      if (block.max > of_row.max) {
        of_row.raise_max(block.max, wanted);
        block_of_maximum = c;
      }
      const auto a = read_coefficients(coefficient_buffers, problem, row, c, block.n);
      of_row.add(sum_general_block(block, of_row.max, a, problem.kl, wanted), block.n);
    }
    const double log_sum = log_of_sum(of_row.ties, of_row.rest);
    if (problem.kl && !(of_row.spread + of_row.mass * log_sum >= kFarDivergence)) {
      const auto lse = Lse<T>::of(double(of_row.max), log_sum);
      of_row.spread = divergence_of_row(problem, row, p, lse.rounded, lse.lost);
      of_row.mass = 0;
    }
    OwnSums<double> own;
    for_own<T>(problem, cursor, row.y, [&](int64_t y, T probability, int64_t) {
      if (!problem.is_here(y)) return;
      const T logit = read_logit<T>(problem, row.logits + y * problem.logits.class_stride);
      own.add(double(weight_of_class<T>(problem, y)), double(probability), double(of_row.max) - double(logit));
    });
    const Found<double> found = find(problem, of_row, own);
    result.lse = Lse<T>::of(double(of_row.max), found.log_sum);
    if (result.lse.rounded == -std::numeric_limits<T>::infinity()) result.lse.lost = 0;  // of a shard
    result.mass = T(found.saved_mass);
    result.loss = found.loss * row.sample_weight;
    result.max = of_row.max;
    result.found = found;
    if (problem.statistics) {
      int64_t argmax = -1;  // an infinite maximum makes a NaN of the sum, too
      if (of_row.rest != of_row.rest) argmax = find_class(problem, row, 0, std::numeric_limits<T>::quiet_NaN());
      if (argmax < 0) argmax = find_class(problem, row, block_of_maximum, of_row.max);
      result.argmax = Int<T>(std::max<int64_t>(0, argmax));  // the first, where all are -inf
    }
    const double weight = problem.target_kind == TargetKind::kIndices ? double(weight_of_class<T>(problem, row.y)) : 1;
    sums.weight += weight * row.sample_weight;
    result.write(problem, p, sums);
  }
}

// ---- rows: backward -------------------------------------------------------------------------------------------------

template <class T>
static void zero_target_gradient(const Backward& problem, int64_t offset) {
  if (!problem.grad_target) return;
  if (problem.target_kind != TargetKind::kPairs)
    return zero_gradient<T>(problem, problem.grad_target, offset, problem.stream);
  const T zero = 0;
  for (int64_t j = 0; j < problem.pairs; ++j) {
    write_from(&zero, problem.grad_target, offset + j * problem.grad_target.class_stride, 1, 1);
  }
}

template <class T>
static void backward_general_rows(const Backward& problem, int64_t begin, int64_t end) {
  alignas(64) T logits_buffer[kBlock<T>], gradient_buffer[kBlock<T>];
  T of_class[kBlock<T>] = {};  // for each class, the sum of its pairs' probabilities
  alignas(64) T coefficient_buffers[2][kBlock<T>];
  const T* const weight = static_cast<const T*>(problem.weight);
  const T* const grads = static_cast<const T*>(problem.grad_statistics);
  const bool dense = is_dense(problem.target_kind);
  Cursor cursor(problem, begin);
  for (int64_t p = begin; p < end; ++p, cursor.advance(1)) {
    const Row row = row_at<Objective::kGeneral>(problem, cursor, p);
    const int64_t y = row.y, dq = cursor.offset(problem.grad_target);
    if (y < 0) {
      zero_gradient<T>(problem, problem.grad_logits, row.gradient, problem.stream);
      zero_target_gradient<T>(problem, dq);
      continue;
    }
    OwnSums<T> own;
    for_own<T>(problem, cursor, y,
               [&](int64_t c, T probability, int64_t) { own.add(weight_of_class<T>(problem, c), probability, T(0)); });
    GeneralTerms<T> terms;
    terms.set(
        problem, broadcast(T(scale_at(problem, cursor, row))), broadcast(own.weight), broadcast(own.mass),
        grads != nullptr, [&](int of) { return broadcast(saved_row<T>(problem, of)[p]); },
        [&](int of) { return broadcast(grads[of * problem.positions + p]); });
    for (int64_t c = 0; c < problem.classes; c += kBlock<T>) {
      const int64_t n = std::min(kBlock<T>, problem.classes - c);
      const T* const x = read_logits(logits_buffer, problem, row.logits + c * problem.logits.class_stride, n);
      const auto [a, log_q] = read_coefficients(coefficient_buffers, problem, row, c, n);
      if (dense && problem.grad_target) {
        for_vectors<T>(n, [&](int64_t i, int64_t count) XENT_INLINE_LAMBDA {
          const Vector<T> w = weight ? load_partial(weight + c + i, count) : broadcast(T(1));
          const Vector<T> log = log_q ? load_partial(log_q + i, count) : Vector<T>{};
          const Vector<T> of_target =
              terms.of_target_class(problem, load_partial(x + i, count), load_partial(a + i, count), log, w);
          store_partial(gradient_buffer + i, of_target, count);
        });
        const int64_t stride = problem.grad_target.class_stride;
        write_from(gradient_buffer, problem.grad_target, dq + c * stride, stride, n, problem.stream);
      }
      if (!problem.grad_logits) continue;
      const int64_t stride = problem.grad_logits.class_stride, out = row.gradient + c * stride;
      T* const result = write_or_point(gradient_buffer, problem.grad_logits, out, stride, problem.buffered);
      const bool careful = dense && block_maximum(x, n) - terms.rounded[0] > kNearOne<T>;
      for_vectors<T>(n, [&](int64_t i, int64_t count) XENT_INLINE_LAMBDA {
        const Vector<T> logit = load_partial(x + i, count), coefficient = a ? load_partial(a + i, count) : Vector<T>{};
        const Vector<T> of_logit = careful ? terms.template gradient<true>(problem, logit, coefficient)
                                           : terms.template gradient<false>(problem, logit, coefficient);
        store_partial(result + i, of_logit, count);
      });
      // A class may come more than once: its probabilities are added up before its gradient is made.
      const auto for_own_here = [&](const auto& use) {
        for_own<T>(problem, cursor, y, [&](int64_t at, T probability, int64_t) {
          if (c <= at && at < c + n) use(at, probability);
        });
      };
      for_own_here([&](int64_t at, T probability) { of_class[at - c] += probability; });
      for_own_here([&](int64_t at, T) {
        const Vector<T> w = broadcast(weight_of_class<T>(problem, at)), logit = broadcast(x[at - c]);
        const Vector<T> hit = terms.hit_of(problem, w, broadcast(of_class[at - c]));
        result[at - c] = terms.own_gradient(problem, logit, hit, broadcast(a ? a[at - c] : T(0)))[0];
      });
      for_own_here([&](int64_t at, T) { of_class[at - c] = 0; });
      if (result == gradient_buffer) {
        write_from(gradient_buffer, problem.grad_logits, out, stride, n, problem.stream);
      }
    }
    if (problem.target_kind != TargetKind::kPairs || !problem.grad_target) continue;
    zero_target_gradient<T>(problem, dq);  // for pairs that are ignored or another shard's
    for_own<T>(problem, cursor, y, [&](int64_t at, T, int64_t j) {
      if (!problem.is_here(at)) return;
      const T logit = read_logit<T>(problem, row.logits + at * problem.logits.class_stride);
      const Vector<T> hit = terms.hit_of(problem, broadcast(weight_of_class<T>(problem, at)), broadcast(T(1)));
      const T gradient = -(hit * terms.log_softmax(broadcast(logit)))[0];
      write_from(&gradient, problem.grad_target, dq + j * problem.grad_target.class_stride, 1, 1);
    });
  }
}

// ---- tiles ----------------------------------------------------------------------------------------------------------
//
// A tile has all classes of its positions (choose_lanes).

// A tile of positions: its logits and its target.
template <class T>
struct GeneralTile {
  Tile<T> x;      // logits, transformed
  Tile<T> q;      // the coefficients of a dense target; or room for the gradient of logits that have pairs
  Tile<T> log_q;  // a teacher's log q; or the sum of the probabilities that each class has in pairs
  int64_t lanes;
  int64_t y[kTile + kLanes<T>];  // as of read_labels

  GeneralTile(const Problem& problem, const Cursor& cursor, int64_t first, int64_t count)
      : x(problem), q(problem), log_q(problem), lanes(whole_groups<T>(count)) {
    read_labels(y, problem, cursor, first, count);
    std::fill(y + count, y + lanes, int64_t{kIgnored});
    read_tile(x, cursor, count, problem.logits, 0, problem.classes);
    if (is_transformed(problem)) {
      for_cells(problem,
                [&](int64_t c, int64_t v) { store(x.row(c) + v, transformed<T>(problem, load(x.row(c) + v))); });
    }
    if (problem.target_kind == TargetKind::kProbabilities) {
      read_tile(q, cursor, count, problem.target, 0, problem.classes);
      const T keep = T(problem.keep), share = T(problem.share);
      if (keep == 1 && !problem.weight) return;
      for_cells(problem, [&](int64_t c, int64_t v) {
        store(q.row(c) + v, weight_of_class<T>(problem, c) * (load(q.row(c) + v) * keep + share));
      });
    }
    if (problem.target_kind == TargetKind::kTeacher) {
      read_tile(log_q, cursor, count, problem.target, 0, problem.classes);
      alignas(64) T rounded[kTile + kGroupLanes<T>], lost[kTile + kGroupLanes<T>];
      std::copy_n(saved_row<T>(problem, saved::kTeacherLse) + first, count, rounded);
      std::copy_n(saved_row<T>(problem, saved::kTeacherLseLost) + first, count, lost);
      for (int64_t i = count; i < lanes; ++i) rounded[i] = lost[i] = 0;
      for_cells(problem, [&](int64_t c, int64_t v) {
        const Vector<T> z = transformed<T>(problem, load(log_q.row(c) + v));
        const Vector<T> logarithm = (z - load(rounded + v)) - load(lost + v);
        store(log_q.row(c) + v, logarithm);
        store(q.row(c) + v, exp(logarithm));
      });
    }
  }

  template <class Use>
  XENT_INLINE_MEMBER void for_cells(const Problem& problem, const Use& use) const {
    for (int64_t c = 0; c < problem.classes; ++c) {
      for (int64_t v = 0; v < lanes; v += kLanes<T>) use(c, v);
    }
  }

  XENT_INLINE_MEMBER Ints<T> counts_at(int64_t v) const { return load_classes<T>(y + v) >= 0; }

  // The dense coefficient of class c.
  XENT_INLINE_MEMBER Vector<T> coefficient(const Problem& problem, int64_t c, int64_t v) const {
    if (problem.target_kind == TargetKind::kNone) return Vector<T>{};
    if (is_dense(problem.target_kind)) return load(q.row(c) + v);
    return problem.label_smoothing == 0 ? Vector<T>{} : broadcast(weight_of_class<T>(problem, c));
  }
};

// The j-th pairs of a tile's positions, or their labels. Where they are ignored, or with `only_here` another shard's,
// they are kIgnored and have the probability zero.
template <class T>
struct PairOfTile {
  alignas(64) int64_t y[kTile];
  alignas(64) T probability[kTile];

  PairOfTile(const Problem& problem, const GeneralTile<T>& tile, const Cursor& cursor, int64_t count, int64_t j,
             bool only_here) {
    const bool pairs = problem.target_kind == TargetKind::kPairs;
    int64_t ignored = kIgnored;
    if (pairs) {
      read_positions(y, cursor, count, problem.target, j);
      read_positions(probability, cursor, count, problem.probs, j);
      ignored = count_from_here(y, problem, count);
    }
    for (int64_t i = 0; i < tile.lanes; ++i) {
      const bool counts = tile.y[i] >= 0 && !(pairs && y[i] == ignored);
      y[i] = !counts ? kIgnored : pairs ? y[i] : tile.y[i];
      probability[i] = !counts ? T(0) : pairs ? probability[i] : T(1);
    }
    for (int64_t i = 0; i < tile.lanes && only_here && problem.is_shard(); ++i) {
      if (problem.is_here(y[i])) continue;
      y[i] = kIgnored;
      probability[i] = 0;
    }
  }
};

// The OwnSums of each position. `max`: of its logits; or null, for no gaps and the pairs of all shards.
template <class T>
struct OwnSumsOfTile {
  alignas(64) T weighted_gap[kTile], weight[kTile], gap[kTile], mass[kTile];

  OwnSumsOfTile(const Problem& problem, const GeneralTile<T>& tile, const Cursor& cursor, int64_t count, const T* max) {
    for (T* sums : {weighted_gap, weight, gap, mass}) std::fill_n(sums, tile.lanes, T(0));
    const bool labelled = problem.target_kind == TargetKind::kIndices || problem.labels;
    for (int64_t j = 0; j < (labelled ? 1 : problem.pairs); ++j) {
      const PairOfTile<T> pair(problem, tile, cursor, count, j, max != nullptr);
      for (int64_t i = 0; i < count; ++i) {
        const int64_t c = pair.y[i];
        if (c < 0) continue;
        OwnSums<T> own{weighted_gap[i], weight[i], gap[i], mass[i]};
        own.add(weight_of_class<T>(problem, c), pair.probability[i], max ? max[i] - tile.x.row(c)[i] : T(0));
        weighted_gap[i] = own.weighted_gap;
        weight[i] = own.weight;
        gap[i] = own.gap;
        mass[i] = own.mass;
      }
    }
  }

  XENT_INLINE_MEMBER OwnSums<Vector<T>> at(int64_t v) const {
    return {load(weighted_gap + v), load(weight + v), load(gap + v), load(mass + v)};
  }
};

// Returns the first class of a NaN, or else of the largest logit.
template <class T>
static Ints<T> argmax_of_tile(const Problem& problem, const Tile<T>& x, Vector<T> max, int64_t v) {
  Ints<T> index{}, of_nan = index - 1;
  for (int64_t c = problem.classes - 1; c >= 0; --c) {
    const Vector<T> logit = load(x.row(c) + v);
    index = logit == max ? Ints<T>{} + Int<T>(c) : index;
    of_nan = logit != logit ? Ints<T>{} + Int<T>(c) : of_nan;
  }
  return of_nan >= 0 ? of_nan : index;
}

template <class T>
static Totals<Vector<T>> sum_general_tile(const Problem& problem, const GeneralTile<T>& tile, Vector<T> max, int64_t v,
                                          const WantedSums<T>& wanted) {
  GeneralLaneSums<T> sums;
  for (int64_t first = 0; first < problem.classes; first += kTermsOfASum) {
    GeneralLaneSums<T> part;
    for (int64_t c = first; c < std::min(first + kTermsOfASum, problem.classes); ++c) {
      part.add(load(tile.x.row(c) + v), max, tile.coefficient(problem, c, v),
               problem.kl ? load(tile.log_q.row(c) + v) : Vector<T>{}, wanted);
    }
    sums.add(part);
  }
  const Vector<T> ties = T(problem.classes) - sums.count_of_others();
  return {max,         ties,           sums.rest, sums.spread + sums.spread_lost, sums.mass + sums.mass_lost,
          sums.energy, sums.label_rest};
}

// The student's and the teacher's logits of a tile, as they were given.
template <class T>
struct GivenTile {
  Tile<T> x, z;

  GivenTile(const Problem& problem, const Cursor& cursor, int64_t count) : x(problem), z(problem) {
    read_tile(x, cursor, count, problem.logits, 0, problem.classes);
    read_tile(z, cursor, count, problem.target, 0, problem.classes);
  }
};

template <class T>
static Vector<T> divergence_of_tile(const Problem& problem, const GivenTile<T>& tile, const DivergenceTerms<T>& terms,
                                    int64_t v) {
  Vector<T> sums[3] = {}, lost[3] = {};
  for (int64_t first = 0; first < problem.classes; first += kTermsOfASum) {
    Vector<T> part[3] = {};
    for (int64_t c = first; c < std::min(first + kTermsOfASum, problem.classes); ++c) {
      terms.add(load(tile.x.row(c) + v), load(tile.z.row(c) + v), part[0], part[1], part[2]);
    }
    for (int i = 0; i < 3; ++i) add_keeping_lost(sums[i], part[i], lost[i]);
  }
  return divergence_of<T>(sums[0] + lost[0], sums[1] + lost[1], sums[2] + lost[2]);
}

// Replaces the sums of near softmaxes, which cancel, by their divergences.
template <class T>
static void refine_divergences(const Problem& problem, const GeneralTile<T>& tile, const Cursor& cursor, int64_t first,
                               int64_t count, Totals<Vector<T>>* totals) {
  using V = Vector<T>;
  constexpr int64_t W = kLanes<T>;
  const auto is_near = [&](int64_t v) {
    const Totals<V>& sums = totals[v / W];
    const V rough = sums.spread + sums.mass * log_of_sum(sums.ties, sums.rest);
    return (tile.counts_at(v) != Ints<T>{}) & ~(rough >= broadcast(T(kFarDivergence)));
  };
  Ints<T> any{};
  for (int64_t v = 0; v < count; v += W) any |= is_near(v);
  bool found = false;
  for (int64_t i = 0; i < W; ++i) found |= any[i] != 0;
  if (!found) return;
  const GivenTile<T> given(problem, cursor, count);
  for (int64_t v = 0; v < count; v += W) {
    const int64_t n = std::min(W, count - v), p = first + v;
    const auto of_teacher = [&](int row) { return load_partial(saved_row<T>(problem, row) + p, n); };
    Totals<V>& sums = totals[v / W];
    V lse, lse_lost;
    two_sum(sums.max, log_of_sum(sums.ties, sums.rest), lse, lse_lost);
    const DivergenceTerms<T> terms(problem, lse, lse_lost, of_teacher(saved::kTeacherLse),
                                   of_teacher(saved::kTeacherLseLost));
    const auto near = is_near(v);
    sums.spread = select(near, divergence_of_tile(problem, given, terms, v), sums.spread);
    sums.mass = select(near, V{}, sums.mass);
  }
}

template <class T>
static void forward_general_tile(const Forward& problem, const Cursor& cursor, int64_t first, int64_t count,
                                 Sums& sums) {
  using V = Vector<T>;
  const WantedSums<T> wanted{problem.statistics, T(problem.labels ? problem.temperature : 0)};
  const GeneralTile<T> tile(problem, cursor, first, count);
  alignas(64) T maxima[kTile], sample_weights[kTile + kGroupLanes<T>], losses[kTile + kGroupLanes<T>];
  read_sample_weights(sample_weights, problem, cursor, count);
  std::fill(sample_weights + count, sample_weights + tile.lanes, T(0));
  for (int64_t v = 0; v < tile.lanes; v += kLanes<T>) {
    V max = broadcast(std::numeric_limits<T>::lowest());
    for (int64_t c = 0; c < problem.classes; ++c) max = maximum(load(tile.x.row(c) + v), max);
    store(maxima + v, max);
  }
  const OwnSumsOfTile<T> own(problem, tile, cursor, count, maxima);
  Totals<V> totals[kTile / kLanes<T>];
  for (int64_t v = 0; v < count; v += kLanes<T>) {
    totals[v / kLanes<T>] = sum_general_tile(problem, tile, load(maxima + v), v, wanted);
  }
  if (problem.kl) refine_divergences(problem, tile, cursor, first, count, totals);
  for (int64_t v = 0; v < count; v += kLanes<T>) {
    const int64_t n = std::min<int64_t>(kLanes<T>, count - v), p = first + v;
    const V zero{}, max = load(maxima + v);
    const auto counts = tile.counts_at(v) != Ints<T>{};
    const auto save = [&](saved::Row row, V value) {
      store_partial(saved_row<T>(problem, row) + p, select(counts, value, zero), n);
    };
    const Found<V> found = find(problem, totals[v / kLanes<T>], own.at(v));
    store(losses + v, select(counts, found.loss * load(sample_weights + v), zero));
    V rounded, lost;
    two_sum(max, found.log_sum, rounded, lost);
    lost = select(rounded == -std::numeric_limits<T>::infinity(), zero, lost);  // of a shard
    save(saved::kLse, rounded);
    save(saved::kLseLost, lost);
    if (is_dense(problem.target_kind) || problem.is_shard()) save(saved::kMass, found.saved_mass);
    if (problem.labels) {
      save(saved::kLabelMax, max);
      save(saved::kLabelLogSum, found.label_log_sum);
    }
    if (problem.statistics) {
      save(saved::kEntropy, found.entropy);
      save(saved::kTargetLogProb, found.target_log_prob);
      const Ints<T> argmax = counts ? argmax_of_tile(problem, tile.x, max, v) : Ints<T>{} - 1;
      std::memcpy(saved_row<T>(problem, saved::kArgmax) + p, &argmax, size_t(n) * sizeof(T));
    }
  }
  sums.loss += sum_of<T>(losses, count);
  const T* const weight = problem.target_kind == TargetKind::kIndices ? static_cast<const T*>(problem.weight) : nullptr;
  sums.weight += sum_of_target_weights(weight, problem.sample_weight ? sample_weights : nullptr, tile.y, count);
  if (problem.loss) write_from(losses, problem.loss, first, 1, count);
}

// Sums up in `log_q` the probabilities that each class has in a position's pairs, in the order of OwnSumsOfTile: a
// class that has all of them then has exactly the same sum.
template <class T>
static void add_up_classes(const Problem& problem, GeneralTile<T>& tile, const Cursor& cursor, int64_t count) {
  tile.for_cells(problem, [&](int64_t c, int64_t v) { store(tile.log_q.row(c) + v, Vector<T>{}); });
  for (int64_t j = 0; j < problem.pairs; ++j) {
    const PairOfTile<T> pair(problem, tile, cursor, count, j, /*only_here=*/true);
    for (int64_t i = 0; i < count; ++i) {
      if (pair.y[i] >= 0) tile.log_q.row(pair.y[i])[i] += pair.probability[i];
    }
  }
}

// Writes the gradients of the j-th pairs of a tile: of their logits to `out`, and of their probabilities.
template <class T>
static void backward_pairs(const Backward& problem, const GeneralTile<T>& tile, Tile<T>& out, const Cursor& cursor,
                           int64_t count, int64_t j, const GeneralTerms<T>* terms) {
  const PairOfTile<T> pair(problem, tile, cursor, count, j, /*only_here=*/true);
  alignas(64) T logit[kTile], weight[kTile], probability[kTile], of_probability[kTile];
  for (int64_t i = 0; i < tile.lanes; ++i) {
    const int64_t c = std::max<int64_t>(0, pair.y[i]);
    logit[i] = tile.x.row(c)[i];
    weight[i] = weight_of_class<T>(problem, c);
    probability[i] = pair.y[i] < 0 ? T(0) : tile.log_q.row(c)[i];
  }
  for (int64_t v = 0; v < tile.lanes; v += kLanes<T>) {
    const GeneralTerms<T>& of = terms[v / kLanes<T>];
    const Vector<T> x = load(logit + v), w = load(weight + v), zero{};
    const Vector<T> hit = of.hit_of(problem, w, load(probability + v));
    const Vector<T> own = of.own_gradient(problem, x, hit, problem.label_smoothing == 0 ? zero : w);
    for (int64_t i = v; i < v + kLanes<T>; ++i) {
      if (pair.y[i] >= 0) out.row(pair.y[i])[i] = own[i - v];
    }
    const Vector<T> of_one = of.hit_of(problem, w, zero + T(1)) * of.log_softmax(x);
    store(of_probability + v, select(load_classes<T>(pair.y + v) >= 0, -of_one, zero));
  }
  if (problem.grad_target) {
    write_positions(of_probability, cursor, count, problem.grad_target, j);
  }
}

template <class T>
static void backward_general_tile(const Backward& problem, const Cursor& cursor, int64_t first, int64_t count) {
  using V = Vector<T>;
  constexpr int W = kLanes<T>;
  const bool dense = is_dense(problem.target_kind), pairs = problem.target_kind == TargetKind::kPairs;
  const T* const grads = static_cast<const T*>(problem.grad_statistics);
  GeneralTile<T> tile(problem, cursor, first, count);
  Tile<T>& out = pairs ? tile.q : tile.x;  // the gradient of pairs needs the logits again
  const OwnSumsOfTile<T> own(problem, tile, cursor, count, nullptr);
  alignas(64) T scale[kTile + kGroupLanes<T>] = {}, sample_weights[kTile];
  read_scales(scale, problem, cursor, count);
  read_sample_weights(sample_weights, problem, cursor, count);
  for (int64_t i = 0; i < count; ++i) scale[i] *= sample_weights[i];
  GeneralTerms<T> terms[kTile / W];
  for (int64_t v = 0; v < tile.lanes; v += W) {
    const int64_t n = std::min<int64_t>(W, count - v);
    const auto counts = tile.counts_at(v) != Ints<T>{};
    const auto at = [&](const T* row) { return load_partial(row + first + v, n); };
    GeneralTerms<T> of;
    of.set(
        problem, load(scale + v), load(own.weight + v), load(own.mass + v), grads != nullptr,
        [&](int row) { return at(saved_row<T>(problem, row)); },
        [&](int row) { return at(grads + row * problem.positions); });
    if (pairs) terms[v / W] = of;
    const bool labelled = problem.target_kind == TargetKind::kIndices || problem.labels;
    const Ints<T> y = load_classes<T>(tile.y + v);
    V own_gradient{};
    if (labelled) {
      T logit[W], coefficient[W];
      for (int k = 0; k < W; ++k) {
        const int64_t c = problem.is_here(tile.y[v + k]) ? tile.y[v + k] : 0;
        logit[k] = tile.x.row(c)[v + k];
        coefficient[k] = dense                          ? tile.q.row(c)[v + k]
                         : problem.label_smoothing == 0 ? T(0)
                                                        : weight_of_class<T>(problem, c);
      }
      own_gradient = of.own_gradient(problem, load(logit), of.hit, load(coefficient));
    }
    Ints<T> index{};
    for (int64_t c = 0; c < problem.classes; ++c, index += 1) {
      const V x = load(tile.x.row(c) + v), a = tile.coefficient(problem, c, v);
      V gradient = dense ? of.template gradient<true>(problem, x, a) : of.template gradient<false>(problem, x, a);
      if (labelled) gradient = select(y == index, own_gradient, gradient);
      if (dense && problem.grad_target) {
        const V log_q = problem.target_kind == TargetKind::kTeacher ? load(tile.log_q.row(c) + v) : V{};
        const V of_class = of.of_target_class(problem, x, a, log_q, broadcast(weight_of_class<T>(problem, c)));
        store(tile.q.row(c) + v, select(counts, of_class, V{}));
      }
      store(out.row(c) + v, select(counts, gradient, V{}));
    }
  }
  if (pairs) add_up_classes(problem, tile, cursor, count);
  for (int64_t j = 0; j < problem.pairs; ++j) backward_pairs(problem, tile, out, cursor, count, j, terms);
  if (problem.grad_logits) write_tile(out, cursor, count, problem.grad_logits, 0, problem.classes, problem.stream);
  if (dense && problem.grad_target) {
    write_tile(tile.q, cursor, count, problem.grad_target, 0, problem.classes, problem.stream);
  }
}
